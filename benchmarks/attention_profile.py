"""Where an attention call's time goes: its kernels by torch.profiler, and what their hardware counters say.

Counters come from Nsight Compute (`ncu`) where it is on PATH and may read them; else the row says why not.
Run as a module, this file is the process that ncu looks at.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.attention import Trial, passes_of
from benchmarks.benchmark import Benchmark, Row, WrongResultError, require_none_wrong
from benchmarks.cases import DEFAULT_SHAPES, PASSES, SHAPES, Case
from benchmarks.environment import ROOT
from benchmarks.exactness import check
from benchmarks.implementations import IMPLEMENTATIONS, names_on
from benchmarks.measure import kernel_times

DEFAULT_LENGTHS = {"cpu": [4096], "cuda": [32768, 131072]}
MOST_KERNELS = 8
_METRICS = {
    "seconds": "gpu__time_duration.sum",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
_LONGEST = 300.0  # seconds that ncu may take for one pass


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--cases", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}; as attention"
    )
    parser.add_argument(
        "--seq-lengths", nargs="+", type=int, metavar="N", help="tokens (default: 4096; on cuda 32768 131072)"
    )
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME", help="default: all there are"
    )


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Rows of one implementation at a time.

    Raises:
        WrongResultError: when all is looked at, because ours computes something else than it claims; or at
            once, because this process has lost the GPU.
    """
    lengths = args.seq_lengths or DEFAULT_LENGTHS[args.device]
    if min(lengths) < 1:
        raise ValueError(f"--seq-lengths {min(lengths)}: must be >= 1")
    names = [name for name in names_on(args.device) if name in (args.implementations or IMPLEMENTATIONS)]
    found = []
    for name in args.cases or DEFAULT_SHAPES[args.device]:
        for length in lengths:
            case = Case(SHAPES[name], length, args.device)
            for implementation in names:
                setting = {"case": name, "implementation": implementation, **case.row()}
                rows = [row for row in stored if setting.items() <= row.items()]
                if not rows:
                    trial = Trial(IMPLEMENTATIONS[implementation], case)
                    rows = [setting | row for row in look_at(name, trial)]
                    yield from rows
                    if trial.is_broken:
                        raise WrongResultError(f"{trial.failure}; the same command goes on behind it")
                found += rows
    require_none_wrong(found)


def look_at(name: str, trial: Trial) -> list[Row]:
    """A row of each pass: its kernels, or why there are none."""
    case, rows = trial.case, []
    possible = trial.passes
    if possible:
        with trial.attempt(possible):
            check(trial.implementation, case)
    for which in PASSES:
        row = {"pass": which, "kernels": None, "kernel_seconds": None, "counters": None, "no_counters": None}
        if which in trial.passes and not trial.is_broken:
            with trial.attempt([which]):
                runs = passes_of(trial.implementation.prepare(case), case)
                runs[which]()
                kernels = kernel_times(runs[which], case.device)
                row["kernel_seconds"] = sum(kernel["seconds"] for kernel in kernels)
                row["kernels"] = kernels[:MOST_KERNELS]
                del runs
                row["counters"], row["no_counters"] = counters(name, case, trial.implementation.name, which)
        lost = trial.failure if trial.is_broken else None
        flops = case.flops(trial.implementation.pattern(case))[which]
        rows.append(row | {"flops": flops, "not_measured": trial.reasons.get(which) or lost})
    return rows


# ---------------------------------------------------------------------------------------------------------
# hardware counters


def counters(name: str, case: Case, implementation: str, which: str) -> tuple[list[dict] | None, str | None]:
    """Seconds, and percent of peak of tensor cores and DRAM, of each kernel; or None and why not."""
    if case.device != "cuda":
        return None, "not on cuda"
    ncu = shutil.which("ncu")
    if ncu is None:
        return None, "ncu is not on PATH"
    torch.cuda.empty_cache()  # the other process needs the memory
    words = [ncu, "--csv", "--print-units", "base", "--metrics", ",".join(_METRICS.values())]
    words += ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    words += [sys.executable, "-m", "benchmarks.attention_profile"]
    try:
        done = subprocess.run(
            [*words, name, str(case.seq_length), implementation, which],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"ncu took more than {_LONGEST:.0f} s"
    return parsed_counters(done.stdout, done.returncode)


def parsed_counters(output: str, status: int) -> tuple[list[dict] | None, str | None]:
    """What ncu printed, by kernel in the order of their launches; or None and its reason."""
    lines = output.splitlines()
    errors = [line.removeprefix("==ERROR== ") for line in lines if line.startswith("==ERROR==")]
    table = [line for line in lines if line.startswith('"')]
    if status or errors or not table:
        last = lines[-1] if lines else "it printed nothing"
        return None, f"ncu, status {status}: {errors[0] if errors else last}"
    kernels: dict[str, dict] = {}
    for found in csv.DictReader(table):
        kernel = kernels.setdefault(found["ID"], {"name": found["Kernel Name"]})
        for field, metric in _METRICS.items():
            if found["Metric Name"] == metric:
                kernel[field] = _number(found["Metric Value"])
    for kernel in kernels.values():
        kernel["seconds"] = kernel.get("seconds") and kernel["seconds"] / 1e9  # ncu's base unit is ns
    return list(kernels.values()), None


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # ncu's n/a: this GPU has no such counter


def _main(name: str, length: str, implementation: str, which: str) -> None:
    case = Case(SHAPES[name], int(length), "cuda")
    run_pass = passes_of(IMPLEMENTATIONS[implementation].prepare(case), case)[which]
    run_pass()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run_pass()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


# ---------------------------------------------------------------------------------------------------------
# for people


def table(rows: list[Row]) -> str:
    newest = {
        json.dumps([row[key] for key in ("case", "device", "seq_length", "implementation", "pass")]): row
        for row in rows
    }
    lines = []
    for row in newest.values():
        who = f"{row['case']}, {row['seq_length']} tokens, {row['implementation']}, {row['pass']}"
        if row["kernels"] is None:
            lines.append(f"{who}: not measured: {row['not_measured']}")
            continue
        rate = row["flops"] / row["kernel_seconds"] / 1e12
        lines.append(
            f"{who}: {1e3 * row['kernel_seconds']:.3f} ms in kernels, {rate:.3f} TFLOP/s on visible pairs"
        )
        for kernel in row["kernels"]:
            share = kernel["seconds"] / row["kernel_seconds"]
            lines.append(f"  {share:>6.1%} {kernel['calls']:>4} calls  {kernel['name'][:80]}")
        for kernel in row["counters"] or ():
            tensor, dram = (_percent(kernel.get(field)) for field in ("tensor_percent", "dram_percent"))
            lines.append(f"  tensor cores {tensor}, DRAM {dram} of peak  {kernel['name'][:80]}")
        if row["no_counters"]:
            lines.append(f"  counters not read: {row['no_counters']}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "not read" if value is None else f"{value:.0f}%"


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws nothing: the table says it."""
    return []


BENCHMARK = Benchmark(
    name="profile",
    help="where an attention call's time goes: kernels, and hardware counters where they can be read",
    add_arguments=add_arguments,
    run=run,
    table=table,
    plot=plot,
    takes_device=True,
)

if __name__ == "__main__":
    _main(*sys.argv[1:])
