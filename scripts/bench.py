"""Runs benchmarks and draws their results: `scripts/bench.py attention`, `scripts/bench.py plot`."""

import argparse
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are part of the checkout, not of the installed package

import torch  # noqa: E402  (needs the path above)

from benchmarks.benchmark import WrongResultError  # noqa: E402
from benchmarks.environment import facts, same_setting  # noqa: E402
from benchmarks.options import require_positive  # noqa: E402
from benchmarks.registry import BENCHMARKS  # noqa: E402
from benchmarks.results import ResultFile, read_all_rows, read_rows  # noqa: E402
from megatron_s2.data.output import check_writable  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="directory of the result files (default: benchmarks/results)",
    )
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for benchmark in BENCHMARKS.values():
        command = commands.add_parser(benchmark.name, help=benchmark.help, parents=[common])
        command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
        command.add_argument(
            "--again", action="store_true", help="repeat what the same code has measured on this machine"
        )
        if benchmark.takes_device:
            command.add_argument(
                "--device",
                choices=("auto", "cpu", "cuda"),
                default="auto",
                help="where to measure (default: cuda where there is one, else cpu)",
            )
        benchmark.add_arguments(command)
    commands.add_parser("plot", help="draw the stored rows", parents=[common])
    args = parser.parse_args(argv)
    try:
        check_writable("--out", str(args.out))
        plot(args.out) if args.command == "plot" else measure(args)
    except (WrongResultError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, WrongResultError) else 2
    except KeyboardInterrupt:
        print("interrupted: what was measured is stored; the same command continues", file=sys.stderr)
        return 130
    return 0


def measure(args: argparse.Namespace) -> None:
    require_positive(threads=args.threads)
    torch.set_num_threads(args.threads)
    benchmark = BENCHMARKS[args.command]
    device = "cpu"
    if benchmark.takes_device:
        device = args.device = _device(args.device)
    now = facts(device)
    results = ResultFile(args.out, benchmark.name, now)
    if benchmark.portable:
        stored = read_all_rows(args.out, benchmark.name)
    else:
        earlier = read_rows(args.out, benchmark.name).get(results.path.parent, [])
        stored = [row for row in earlier if same_setting(row, now)]
    if args.again:
        stored = []
    new, wrong = [], None
    try:
        for row in benchmark.run(args, stored):
            new.append(results.append(row))
            if sys.stderr.isatty():
                print(f"{len(new)} rows", end="\r", file=sys.stderr, flush=True)
    except WrongResultError as error:
        wrong = error
    print(benchmark.table(stored + new))
    print(f"rows: {results.path}" if new else "nothing new: all this is stored (--again measures it again)")
    if wrong:
        raise wrong


def _device(choice: str) -> str:
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: must be cpu or auto here, PyTorch finds no CUDA device")
    return ("cuda" if torch.cuda.is_available() else "cpu") if choice == "auto" else choice


def plot(directory: Path) -> None:
    for benchmark in BENCHMARKS.values():
        if benchmark.portable:
            places = {directory: read_all_rows(directory, benchmark.name)}
        else:
            places = read_rows(directory, benchmark.name)
        for place, rows in places.items():
            for path in benchmark.plot(rows, place):
                print(path)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: what is measured stays, nothing runs on
    sys.exit(main())
