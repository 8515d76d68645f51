"""Where an attention call's time goes: its kernels by torch.profiler, and what their hardware counters say.

Counters are read by Nsight Compute if `ncu` is on PATH and has the permission; if not, the row says why. Run
as a module, this file is the process that ncu profiles.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch

from benchmarks import display
from benchmarks.attention_trial import Trial, passes_of
from benchmarks.benchmark import Benchmark, Row, WrongResultError, require_none_wrong
from benchmarks.cases import DEFAULT_SHAPES, PASSES, SHAPES, Case
from benchmarks.environment import ROOT
from benchmarks.implementations import IMPLEMENTATIONS, names_on
from benchmarks.measure import kernel_times
from benchmarks.options import add_names, require_positive

DEFAULT_LENGTHS = {"cpu": [4096], "cuda": [32768, 131072]}
MOST_KERNELS = 8
_METRICS = {
    "seconds": "gpu__time_duration.sum",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
_NCU_LIMIT = 300.0  # seconds for one pass


def add_arguments(parser: ArgumentParser) -> None:
    add_names(parser, "--cases", SHAPES, "shapes and patterns (default: as attention)")
    parser.add_argument(
        "--seq-lengths", nargs="+", type=int, metavar="N", help="tokens (default: 4096; on cuda 32768 131072)"
    )
    add_names(parser, "--implementations", IMPLEMENTATIONS, "default: all that run on the device")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields the rows of one implementation after another. A process that lost the GPU ends at once."""
    lengths = args.seq_lengths or DEFAULT_LENGTHS[args.device]
    require_positive(seq_lengths=min(lengths))
    names = [name for name in names_on(args.device) if name in (args.implementations or IMPLEMENTATIONS)]
    shapes = args.cases or DEFAULT_SHAPES[args.device]
    found = []
    for shape, length, name in ((s, n, i) for s in shapes for n in lengths for i in names):
        case = Case(SHAPES[shape], length, args.device)
        setting = {"case": shape, "implementation": name, **case.row()}
        rows = [row for row in stored if setting.items() <= row.items()]
        if not rows:
            trial = Trial(IMPLEMENTATIONS[name], case)
            rows = [setting | row for row in profile(shape, trial)]
            yield from rows
            if trial.lost_gpu:
                raise WrongResultError(f"{trial.failure}; the same command continues after it")
        found += rows
    require_none_wrong(found)


def profile(shape: str, trial: Trial) -> list[Row]:
    """Returns a row for each pass, with its kernels or the reason why there are none."""
    case, rows = trial.case, []
    trial.check()
    for name in PASSES:
        row = {"pass": name, "kernels": None, "kernel_seconds": None, "counters": None, "no_counters": None}
        if name in trial.passes and not trial.lost_gpu:
            with trial.attempt([name]):
                runs = passes_of(trial.implementation.prepare(case), case)
                runs[name]()
                kernels = kernel_times(runs[name], case.device)
                row["kernel_seconds"] = sum(kernel["seconds"] for kernel in kernels)
                row["kernels"] = kernels[:MOST_KERNELS]
                del runs
                row["counters"], row["no_counters"] = counters(shape, case, trial.implementation.name, name)
        flops = case.flops(trial.implementation.pattern(case))[name]
        reason = trial.reasons.get(name) or (trial.failure if trial.lost_gpu else None)
        rows.append(row | {"flops": flops, "not_measured": reason})
    return rows


def counters(
    shape: str, case: Case, implementation: str, pass_name: str
) -> tuple[list[dict] | None, str | None]:
    """Profiles a pass under ncu. Returns the seconds of each kernel and its use of tensor cores and DRAM in
    percent of their peaks, or None and the reason why they cannot be read."""
    if case.device != "cuda":
        return None, "not on cuda"
    ncu = shutil.which("ncu")
    if ncu is None:
        return None, "ncu is not on PATH"
    torch.cuda.empty_cache()  # the other process needs the memory
    command = [ncu, "--csv", "--print-units", "base", "--metrics", ",".join(_METRICS.values())]
    command += ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    command += [sys.executable, "-m", "benchmarks.attention_profile"]
    command += [shape, str(case.seq_length), implementation, pass_name]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_NCU_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"ncu took more than {_NCU_LIMIT:.0f} s"
    return parse_counters(done.stdout, done.returncode)


def parse_counters(output: str, status: int) -> tuple[list[dict] | None, str | None]:
    """Parses the output of ncu; returns the kernels in launch order, or None and ncu's error."""
    lines = output.splitlines()
    errors = [line.removeprefix("==ERROR== ") for line in lines if line.startswith("==ERROR==")]
    csv_lines = [line for line in lines if line.startswith('"')]
    if status or errors or not csv_lines:
        last = lines[-1] if lines else "it printed nothing"
        return None, f"ncu, status {status}: {errors[0] if errors else last}"
    kernels: dict[str, dict] = {}
    for line in csv.DictReader(csv_lines):
        kernel = kernels.setdefault(line["ID"], {"name": line["Kernel Name"]})
        for field, metric in _METRICS.items():
            if line["Metric Name"] == metric:
                kernel[field] = _number(line["Metric Value"])
    for kernel in kernels.values():
        kernel["seconds"] = kernel.get("seconds") and kernel["seconds"] / 1e9  # ncu's base unit is ns
    return list(kernels.values()), None


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # ncu prints n/a where the GPU has no such counter


def _main(shape: str, length: str, implementation: str, pass_name: str) -> None:
    case = Case(SHAPES[shape], int(length), "cuda")
    run_pass = passes_of(IMPLEMENTATIONS[implementation].prepare(case), case)[pass_name]
    run_pass()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run_pass()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def table(rows: list[Row]) -> str:
    lines = []
    key = ("case", "device", "seq_length", "implementation", "pass")
    for row in {tuple(row[name] for name in key): row for row in rows}.values():
        where = f"{row['case']}, {row['seq_length']} tokens, {row['implementation']}, {row['pass']}"
        if row["kernels"] is None:
            lines.append(f"{where}: {display.reason(row)}")
            continue
        rate = row["flops"] / row["kernel_seconds"] / 1e12
        lines.append(
            f"{where}: {1e3 * row['kernel_seconds']:.3f} ms in kernels, {rate:.3f} TFLOP/s on visible pairs"
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


BENCHMARK = Benchmark(
    name="profile",
    help="where an attention call's time goes: kernels, and hardware counters where they can be read",
    add_arguments=add_arguments,
    run=run,
    table=table,
)

if __name__ == "__main__":
    _main(*sys.argv[1:])
