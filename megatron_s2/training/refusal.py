"""How a command on several ranks refuses bad input: status 2, and one line from one rank."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from megatron_s2.training.environment import rank

_MESSAGE_SECONDS = 10.0


def refuse(message: str, only_here: bool = False) -> NoReturn:
    """Ends this rank with status 2; rank 0, or with `only_here` this rank, prints the message, in one line.

    A launcher kills all ranks when one has ended, so other ranks first wait for rank 0. If it does not end,
    the input is bad only on this node (for example a missing path), and its first rank prints it; if that
    does not end either, only here.
    """
    line = f"error: {' '.join(message.split())}"
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)
        report_to_launcher(message)
    elif only_here:
        print(f"{line} (on rank {rank()})", file=sys.stderr, flush=True)
        report_to_launcher(message)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        time.sleep(_MESSAGE_SECONDS if is_first else 2 * _MESSAGE_SECONDS)
        print(f"{line} (on rank {rank()})", file=sys.stderr, flush=True)
        report_to_launcher(message)
    sys.exit(2)


def report_to_launcher(message: str) -> None:
    """Gives torchrun the message for its summary, in place of the advice to enable tracebacks.

    The file and its fields are those of `torch.distributed.elastic.multiprocessing.errors`.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
