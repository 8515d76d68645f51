"""The timeline of an offloaded optimizer step, predicted and measured: the fourth step of a training."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.display import picture_path
from benchmarks.environment import code_hash, package_version
from benchmarks.offload import OFFLOAD_CODE
from benchmarks.offload_cases import CASES, add_model_arguments, flags, model_of
from benchmarks.results import newest_match
from benchmarks.training_process import train
from megatron_s2.offload.trace import Event, bottleneck, of_update, read_trace, span

CASE = CASES["s2-auto-flush"]
STEPS = 4  # a step is traced if its number is a power of two


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields one row, unless it is stored, or raises WrongResultError if the training failed."""
    model = model_of(args)
    command = flags(CASE, model, 1, args.threads)
    setting = {
        "device": args.device,
        "model": vars(model),
        "flags": command,
        "packages": {"megatron-core": package_version("megatron-core")},
        "offload_code": code_hash(OFFLOAD_CODE),
    }
    if newest_match(stored, setting):
        return
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/trace.json"
        command = [*command, "--s2-offload-trace", path]
        training = train(command, 1, STEPS - 1, args.device, args.threads, time_optimizer=False)
        if training.status:
            raise WrongResultError(f"ended with status {training.status}: {training.failure}")
        timelines = read_trace(path)
    yield setting | {
        "seconds": {name: span(of_update(events)) for name, events in timelines.items()},
        "bottleneck": {name: bottleneck(events) for name, events in timelines.items()},
        "timelines": {
            name: [[e.queue, e.name, round(e.start, 7), round(e.end, 7)] for e in events]
            for name, events in timelines.items()
        },
    }


def _newest(rows: list[Row]) -> list[Row]:
    """Returns the newest row of each device and model."""
    return list({json.dumps([row["device"], row["model"]]): row for row in rows}.values())


def table(rows: list[Row]) -> str:
    lines = []
    for row in _newest(rows):
        m, seconds = row["model"], row["seconds"]
        lines += [
            f"hidden {m['hidden_size']}, {m['num_layers']} layers, subgroups of {m['subgroup_size']}, "
            f"{row['device']}: update {1e3 * seconds['predicted']:.1f} ms predicted, "
            f"{1e3 * seconds['measured']:.1f} ms measured, "
            f"{seconds['measured'] / seconds['predicted']:.2f} of the prediction",
            *(f"  {name}: {text}" for name, text in row["bottleneck"].items()),
        ]
    return "\n".join(lines)


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws a picture for each model: what each queue does, predicted above measured."""
    from megatron_s2.report.offload_timeline import draw_timelines

    paths = []
    for index, row in enumerate(_newest(rows)):
        timelines = {name: [Event(*event) for event in events] for name, events in row["timelines"].items()}
        paths.append(picture_path(directory, "timeline", index))
        m = row["model"]
        title = f"{directory.name}: hidden {m['hidden_size']}, {m['num_layers']} layers"
        draw_timelines(timelines, paths[-1], title)
    return paths


BENCHMARK = Benchmark(
    name="timeline", help=__doc__, add_arguments=add_model_arguments, run=run, table=table, plot=plot
)
