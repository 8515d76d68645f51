"""Everything that is claimed of a GPU, measured by one command inside a time budget: `scripts/gpu_record.sh`.

Stages run one after the other, each a process of its own that ends when its time is up, or with this one.
What became of a stage is a stored row; one that is done for the same code, machine and versions is not run
again, and the benchmarks and tests themselves go on from their own rows.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import NoReturn

import torch

from benchmarks.benchmark import Row
from benchmarks.environment import ROOT, code_hash, facts, same_setting
from benchmarks.results import ResultFile, read_rows

COMMITTED = ROOT / "benchmarks" / "results"
DRAWING = ("plots", "page")
NO_TIME = "no time left"
CODE = ("megatron_s2/**/*.py", "benchmarks/*.py", "scripts/*.*", "scripts/lib/*", "tests/**/*.py")
_NO_MEGATRON = f"megatron-core is not installed for {sys.executable}"
_DRAWING = 40.0  # seconds of the budget kept for pictures and page
_DRAWING_LIMIT = 300.0
_GRACE = 20.0  # seconds between the request to end and the end
_LAST_LINES = 15
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Stage:
    """One process of the record.

    Args:
        name: as in rows.
        words: arguments of this Python.
        least: seconds below which it is not begun: what its longest piece takes, which stores nothing before
            its end, so that a stage that is begun gets on.
        most: seconds that it may take of one call, so that one that hangs leaves time to those after it.
        megatron: whether it can do nothing without megatron-core.
        empty_status: exit status that says there was nothing to do.
        always: makes pictures or pages from rows: takes no part in the budget and is never done for good.
    """

    name: str
    words: tuple[str, ...]
    least: float = 5.0
    most: float = 300.0
    megatron: bool = False
    empty_status: int | None = None
    always: bool = False


def stages(out: Path, toy: bool) -> list[Stage]:
    """The record in order, of one GPU or as a toy on the CPU."""
    rows = str(out.relative_to(ROOT) if out.is_relative_to(ROOT) else out)

    def bench(name: str, options: str, least: float, most: float, megatron: bool = False) -> Stage:
        words = options.split()
        own = ("scripts/bench.py", words[0], "--device", "cpu" if toy else "cuda", "--out", rows)
        return Stage(name, (*own, *words[1:]), least, most, megatron)

    pytest = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest += ["-p", "benchmarks.tests_passed", "--tests-passed", rows]
    if not toy and find_spec("xdist"):
        pytest += ["-n", "auto"]  # compiling takes the cores, not the GPU
    tests = Stage("tests", (*pytest, *(["tests/benchmarks"] if toy else [])), 20, 150, empty_status=5)
    page = "docs/results.md" if out == COMMITTED else f"{rows}/results.md"
    words = ("-m", "benchmarks.results_page", "--results", rows, "--page", page)
    plots, page_stage = DRAWING
    drawing = [
        Stage(plots, ("scripts/bench.py", "plot", "--out", rows), always=True),
        Stage(page_stage, words, always=True),
    ]
    if toy:
        small = "--hidden-size 64 --num-layers 1 --seq-length 8 --subgroup-size 4096 --bucket-size 16384"
        attention = "attention --seq-lengths 1024 --repeats 2 --implementations s2-torch sdpa"
        offload = f"offload {small} --accumulation 1 --repeats 1 --cases s2-auto-flush"
        return [
            bench("device", "device --repeats 2", 5, 300),
            tests,
            bench("attention", attention, 5, 600),
            bench("profile", "profile --seq-lengths 128 --implementations s2-torch", 5, 300),
            bench("step", "step --seq-lengths 256 --cases s2 --warm-up 1 --repeats 2", 5, 1200, True),
            bench("offload", offload, 5, 900, True),
            bench("timeline", f"timeline {small}", 5, 600, True),
            bench("decode", "decode --context 256,512 --repeats 1", 5, 300),
            *drawing,
        ]
    # 2.04e9 parameters, 18 bytes each beside activations: more than the stated 40 GB; without state less.
    large = "--hidden-size 2560 --num-layers 26 --seq-length 1024"
    names = "s2-auto-flush hybrid hybrid-overlap s2-1-flush s2-0.5-flush"
    offload = f"offload {large} --gpu-memory-gb 40 --accumulation 1 --repeats 3 --cases {names}"
    to_128k = ",".join(str(2**n) for n in range(17, 11, -1))
    profile = "profile --cases grouped --implementations s2-triton sdpa-flash sdpa-cudnn"
    longest = "step --seq-lengths 131072 --cases s2 dense s2-first-two-dense --warm-up 1 --repeats 2"
    return [
        bench("device", "device", 5, 60),
        tests,
        bench("attention", f"attention --seq-lengths {to_128k}", 30, 240),
        bench("attention-stride-64", "attention --cases stride-64 --seq-lengths 131072", 25, 120),
        bench("profile", profile, 25, 120),
        bench("step", longest, 150, 420, True),
        bench("step-shorter", "step --seq-lengths 32768,65536,8192 --warm-up 2 --repeats 3", 90, 300, True),
        bench("offload", offload, 90, 360, True),
        bench("timeline", f"timeline {large}", 30, 120, True),
        bench("decode", "decode", 20, 120),
        bench("attention-256k", "attention --seq-lengths 262144 --repeats 3", 60, 300),
        *drawing,
    ]


# ---------------------------------------------------------------------------------------------------------
# decisions


def is_done(stage: Stage, rows: Sequence[Row], now: Row) -> bool:
    """Whether it is stored as done for the code, machine and versions of `now`."""
    return not stage.always and any(
        row["result"] == "done"
        and row["words"] == list(stage.words)
        and row["record_code"] == now["record_code"]
        and same_setting(row, now)
        for row in rows
    )


def seconds_for(stage: Stage, left: float) -> float | None:
    """How long it may take of the seconds left; None where it would be begun in vain."""
    if stage.always:
        return _DRAWING_LIMIT
    return min(stage.most, left) if left >= stage.least else None


def chosen(plan: Sequence[Stage], names: Sequence[str] | None) -> list[Stage]:
    """The stages of these names, and what draws and writes; all without names.

    Raises:
        ValueError: there is no such stage.
    """
    own = [stage.name for stage in plan if not stage.always]
    if unknown := set(names or ()) - set(own):
        raise ValueError(f"--stages {' '.join(sorted(unknown))}: must be of {', '.join(own)}")
    return [stage for stage in plan if stage.always or not names or stage.name in names]


def judged(stage: Stage, status: int | None, last_lines: Sequence[str]) -> Row:
    """What became of a stage: its exit status, or None where its time was up."""
    if status is None:
        return {"result": "out of time", "reason": "its time was up; what it had finished is stored"}
    if status == 0:
        return {"result": "done", "reason": None}
    if status == stage.empty_status:
        return {"result": "not measured", "reason": "no test ran: there is no CUDA device"}
    reason = f"exit status {status}: {' | '.join(last_lines)}"
    if stage.name == "tests" and find_spec("megatron") is None:
        reason = f"{_NO_MEGATRON}, which most test files import; {reason}"
    return {"result": "failed", "reason": reason}


def described(plan: Sequence[Stage], rows: Sequence[Row], now: Row, seconds: float) -> str:
    """The plan as text: each stage, the most it may take, and its command."""
    lines = []
    for stage in plan:
        limit = seconds_for(stage, seconds)
        time_text = "no time" if limit is None else f"{limit:.0f} s"
        if stage.always or is_done(stage, rows, now):
            time_text = "at the end" if stage.always else "done"
        lines.append(f"{stage.name:<20} {time_text:>10}  {' '.join(stage.words)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# execution


def record(plan: Sequence[Stage], out: Path, seconds: float, device: str) -> int:
    """Runs what is not done, stores and says what became of each stage; the exit status.

    Raises:
        KeyboardInterrupt: told to stop; the stage that ran was ended, and what it had measured is stored.
    """
    now = {**facts(device), "record_code": code_hash(CODE)}
    results = ResultFile(out, "record", now)
    before = read_rows(out, "record").get(results.path.parent, [])
    pending = [stage for stage in plan if not is_done(stage, before, now)]
    end = time.monotonic() + max(0.0, seconds - _DRAWING)
    outcomes = {}
    for stage in plan:
        if stage not in pending:
            say(f"{stage.name}: done before")
            continue
        limit = seconds_for(stage, end - time.monotonic())
        begin = time.monotonic()
        try:
            outcome = outcome_of(stage, limit)
        except KeyboardInterrupt:
            outcome = {"result": "interrupted", "reason": None}
        taken = {"seconds": round(time.monotonic() - begin, 1), "limit": limit and round(limit, 1)}
        outcomes[stage.name] = outcome["result"]
        results.append({"stage": stage.name, "words": list(stage.words), **outcome, **taken})
        say(f"{stage.name}: {outcome['result']}" + (f": {outcome['reason']}" if outcome["reason"] else ""))
        if outcome["result"] == "interrupted":
            raise KeyboardInterrupt
    return summed_up(outcomes)


def outcome_of(stage: Stage, limit: float | None) -> Row:
    """Runs a stage, where that is possible; what became of it."""
    if stage.megatron and find_spec("megatron") is None:
        return {"result": "failed", "reason": _NO_MEGATRON}
    if limit is None:
        return {"result": "not measured", "reason": NO_TIME}
    say(f"{stage.name}: at most {limit:.0f} s")
    return judged(stage, *run(stage.words, limit))


def run(words: Sequence[str], limit: float) -> tuple[int | None, list[str]]:
    """Exit status of this Python with `words`, None after `limit` seconds, and the last lines it printed.

    Its process group gets SIGINT when time is up or this process is told to stop, and SIGKILL some seconds
    later; it gets SIGKILL where this process is killed.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_ending_with_parent(),
    )
    last_lines: deque[str] = deque(maxlen=_LAST_LINES)
    reader = Thread(target=_show, args=(process.stdout, last_lines), daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        _end_group(process)
        reader.join(_GRACE)
    return status, list(last_lines)


def _ending_with_parent() -> Callable[[], object] | None:
    """Has the system kill the process that calls it when its parent ends; Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    return partial(ctypes.CDLL(None).prctl, set_parent_death_signal, int(signal.SIGKILL))


def _show(stream, last_lines: deque[str]) -> None:
    for line in stream:
        print(f"   {line}", end="", flush=True)
        if line.strip():
            last_lines.append(line.strip())


def _end_group(process: subprocess.Popen) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summed_up(outcomes: dict[str, str]) -> int:
    """Says what is left to do, by the result of each stage; 1 where one failed."""
    failed, unfinished = (
        [name for name, result in outcomes.items() if result in results]
        for results in (["failed"], ["out of time", "not measured"])
    )
    if unfinished:
        say(f"not finished: {', '.join(unfinished)}; the same command goes on")
    if failed:
        print(f"error: failed: {', '.join(failed)}; why is said above and stored", file=sys.stderr)
    return 1 if failed else 0


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def arguments() -> ArgumentParser:
    parser = ArgumentParser(prog="gpu_record.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory of the rows (default: benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=30, help="time budget (default: %(default)s)")
    parser.add_argument("--toy", action="store_true", help="all stages on the CPU at toy sizes; needs --out")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these, and pictures and page")
    parser.add_argument("--plan", action="store_true", help="say what would run and for how long, no more")
    return parser


def out_of(args: Namespace) -> Path:
    """Where rows go.

    Raises:
        ValueError: the options do not fit this machine or one another.
    """
    if not 0 <= args.minutes < float("inf"):
        raise ValueError(f"--minutes {args.minutes:g}: must be >= 0")
    out = (args.out or COMMITTED).resolve()
    if args.toy and (args.out is None or out == COMMITTED):
        raise ValueError("--toy: needs --out DIR, another than benchmarks/results, which is for measurements")
    if not args.toy and not args.plan and not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device: this measures one GPU; --toy --out DIR runs all stages on the CPU at toy sizes"
        )
    return out


def _stop(number: int, frame: object) -> NoReturn:
    for again in _STOPS:
        signal.signal(again, signal.SIG_IGN)  # the stage that runs is being ended
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    try:
        out = out_of(args)
        plan, seconds = chosen(stages(out, args.toy), args.stages), 60 * args.minutes
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.plan:
        device = "cpu" if args.toy or not torch.cuda.is_available() else "cuda"
        now = {**facts(device), "record_code": code_hash(CODE)}
        rows = [row for rows in read_rows(out, "record").values() for row in rows]
        print(described(plan, rows, now, max(0.0, seconds - _DRAWING)))
        return 0
    for number in _STOPS:  # SIGINT too: a background job of a shell ignores it, and so would the stages
        signal.signal(number, _stop)
    try:
        return record(plan, out, seconds, "cpu" if args.toy else "cuda")
    except KeyboardInterrupt:
        print("interrupted: what was measured is stored, the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
