"""Reads a Megatron log from standard input and prints what a person waits for: the table, losses, errors."""

import re
import sys
import time

_STEP = re.compile(
    r"iteration\s+(\d+)/\s*(\d+) .*?elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: ([-+.\deE]+|nan)"
)
_VALIDATION = re.compile(
    r"validation loss at (?:iteration|the end)?.*?(\d+).*?lm loss value: ([-+.\deE]+|nan)"
)
_SHOWN = re.compile(r"^(megatron-s2:|S2 attention|error:|Traceback|\s*\w*(Error|Exception)\b)")
_SAVED = re.compile(r"successfully saved checkpoint from iteration\s+(\d+)")
_SECONDS_BETWEEN_STEPS = 5.0


def main() -> None:
    last_shown, in_table = 0.0, False
    for line in sys.stdin:
        if step := _STEP.search(line):
            iteration, total, milliseconds, loss = step.groups()
            now = time.monotonic()
            if now - last_shown >= _SECONDS_BETWEEN_STEPS or iteration == total:
                last_shown = now
                left = (int(total) - int(iteration)) * float(milliseconds) / 1000
                print(
                    f"   step {iteration}/{total}  loss {float(loss):.3f}  about {left:.0f} s left",
                    flush=True,
                )
        elif evaluation := _EVALUATION.search(line):
            print(
                f"   {'test' if evaluation[1] else 'validation'} loss {float(evaluation[2]):.3f}", flush=True
            )
        elif saved := _SAVED.search(line):
            print(f"   checkpoint saved at step {saved[1]}", flush=True)
        elif _SHOWN.search(line) or (in_table and line.startswith("  ")):
            print(f"   {line.rstrip()}", flush=True)
        in_table = line.startswith("S2 attention") or (in_table and line.startswith("  "))


if __name__ == "__main__":
    main()
