"""Reads a Megatron log from standard input and prints what a person waits for: the table, losses, errors."""

import re
import signal
import sys
import time

_STEP = re.compile(r"iteration\s+(\d+)/\s*(\d+) .*?lm loss: (\S+)")
_EVALUATION = re.compile(r"validation loss at iteration \d+( on test set)?.*?lm loss value: (\S+)")
_SAVED = re.compile(r"successfully saved checkpoint from iteration\s+(\d+)")
_SHOWN = re.compile(r"^(megatron-s2:|error:|Traceback|(\[rank\d+\]: )?[\w.]*(Error|Exception)\b)")
_TABLE = re.compile(r"^S2 attention")
_SECONDS_BETWEEN_STEPS = 5.0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the ranks; what they say last is shown
    first, last_shown, in_table, interrupted = None, 0.0, False, False
    for line in sys.stdin:
        in_table = bool(_TABLE.search(line)) or (in_table and line.startswith("  "))
        if step := _STEP.search(line):
            iteration, total, now = int(step[1]), int(step[2]), time.monotonic()
            first = first or (iteration, now)
            if now - last_shown >= _SECONDS_BETWEEN_STEPS or iteration == total:
                last_shown = now
                pace = (now - first[1]) / max(1, iteration - first[0])
                left = f"about {(total - iteration) * pace:.0f} s left" if pace else ""
                say(f"step {iteration}/{total}  loss {float(step[3]):.3f}  {left}")
        elif evaluation := _EVALUATION.search(line):
            say(f"{'test' if evaluation[1] else 'validation'} loss {float(evaluation[2]):.3f}")
        elif saved := _SAVED.search(line):
            say(f"checkpoint saved at step {saved[1]}")
        elif in_table or (_SHOWN.search(line) and not interrupted):
            say(line.rstrip())
            interrupted = line.startswith("megatron-s2: interrupted")  # the launcher's traceback is no news


def say(text: str) -> None:
    print(f"   {text}", flush=True)


if __name__ == "__main__":
    main()
