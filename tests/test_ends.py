"""How a training process ends: with the right status, everything said, and nobody waited for.

Run as a script, this file is the process whose forks end, one in each way; unlike those of `multiprocessing`,
they end as any Python process does.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

LOST = "context-parallel exchange of layer 3, group [0, 1]: a rank died or did not answer in time: Timed out"


def fail(argv):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def lose_a_peer(argv):
    from megatron_s2.parallel.collectives import PeerLostError

    raise PeerLostError(LOST) from RuntimeError("Timed out")


def be_interrupted(argv):
    raise KeyboardInterrupt


def be_interrupted_while_peers_end(argv):
    """The collective fails before Python has delivered this rank's own signal."""

    def deliver(_):
        raise KeyboardInterrupt

    time.sleep = deliver
    lose_a_peer(argv)


def be_refused(argv):
    print("error: --lr fast: must be a number", file=sys.stderr)
    sys.exit(2)


def be_refused_in_the_run(argv):
    """As for a sample with a token that the model does not have."""
    complete(argv)
    be_refused(argv)


def complete(argv):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


# What the training does, the exit status, what is said last, and whether threads and children may be alive.
ENDS = {
    "error": (fail, 1, "RuntimeError: CUDA error: an illegal memory access was encountered", True),
    "lost peer": (lose_a_peer, 1, f"error: {LOST} (on rank 0)", True),
    "Ctrl-C": (be_interrupted, 130, "megatron-s2: interrupted", True),
    "Ctrl-C that comes late": (be_interrupted_while_peers_end, 130, "megatron-s2: interrupted", True),
    "bad input": (be_refused, 2, "error: --lr fast: must be a number", False),
    "bad data": (be_refused_in_the_run, 2, "error: --lr fast: must be a number", True),
    "complete": (complete, 0, None, False),
}


@pytest.fixture(scope="module")
def ends() -> dict[str, dict]:
    told = subprocess.run([sys.executable, __file__], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(told)


@pytest.mark.parametrize("name", ENDS)
def test_status_and_last_words(ends, name):
    _, status, last_words, _ = ENDS[name]
    end = ends[name]
    assert end["status"] == status, end["output"]
    printed = end["output"].splitlines()
    assert printed.count("trained so far") == 1
    said = [line for line in printed if line != "trained so far" and not line.startswith("wandb: ")]
    assert said[-1:] == ([last_words] if last_words else [])
    assert len(said) <= 1 or (name == "error" and said[0] == "Traceback (most recent call last):")


@pytest.mark.parametrize("name", [name for name, (*_, at_once) in ENDS.items() if at_once])
def test_an_end_at_once_leaves_no_child_and_tells_wandb(ends, name):
    assert not ends[name]["child"]
    assert f"wandb: {ends[name]['status']}" in ends[name]["output"].splitlines()


def _poll(store) -> None:
    while True:
        store.check(["nothing"])


def _end(name: str) -> None:
    from torch.distributed import HashStore

    from megatron_s2 import pretrain

    pretrain.train, *_, at_once = ENDS[name]
    if at_once:  # as a queue that waits for a peer; an interpreter that ends now aborts
        threading.Thread(target=_poll, args=(HashStore(),), daemon=True).start()
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
        print(child.pid, file=sys.stderr)
    sys.modules["wandb"] = SimpleNamespace(finish=lambda exit_code: print(f"wandb: {exit_code}"))
    print("trained so far")
    pretrain.main([])


def _observe(name: str) -> dict:
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if not pid:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            _end(name)
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        lines = output.read().splitlines()
    child = None
    if ENDS[name][-1]:
        child = int(lines.pop(0))
    return {"status": status, "output": "\n".join(lines), "child": child is not None and _lives(child)}


def _lives(pid: int) -> bool:
    """Whether the process still works after a while: it may take a moment to end."""
    stat, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.01)
    return True


if __name__ == "__main__":
    import megatron_s2.pretrain  # noqa: F401

    print(json.dumps({name: _observe(name) for name in ENDS}))
