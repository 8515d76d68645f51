"""The timeline of an offloaded optimizer step, predicted and measured: the fourth step of a training."""

from __future__ import annotations

import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.environment import package_version
from benchmarks.offload import CASES, add_model_arguments, flags, model_of, offload_code
from benchmarks.training_process import train
from megatron_s2.offload.trace import Event, bottleneck, of_update, read_trace, span

CASE = CASES["s2-auto-flush"]
STEPS = 4  # a power of two: steps of that number are traced


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.set_defaults(repeats=STEPS - 1, accumulation=[1])


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """One row, unless it is stored.

    Raises:
        WrongResultError: the training failed.
    """
    model = model_of(args)
    words = flags(CASE, model, 1, args.threads)
    setting = {
        "device": args.device,
        "model": vars(model),
        "flags": words,
        "packages": {"megatron-core": package_version("megatron-core")},
        "offload_code": offload_code(),
    }
    if any(setting.items() <= row.items() for row in stored):
        return
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/trace.json"
        traced = [*words, "--s2-offload-trace", path]
        training = train(traced, 1, STEPS - 1, args.device, args.threads, time_optimizer=False)
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


def _newest(rows: list[Row]) -> list[Row]:
    """Of each model and device."""
    return list({json.dumps([row["device"], row["model"]]): row for row in rows}.values())


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """A picture for each model: what each queue did, predicted above measured."""
    from megatron_s2.report.offload_timeline import draw_timelines

    paths = []
    for row in _newest(rows):
        timelines = {name: [Event(*event) for event in events] for name, events in row["timelines"].items()}
        paths.append(directory / ("timeline.png" if not paths else f"timeline-{len(paths) + 1}.png"))
        m = row["model"]
        title = f"{directory.name}: hidden {m['hidden_size']}, {m['num_layers']} layers"
        draw_timelines(timelines, paths[-1], title)
    return paths


BENCHMARK = Benchmark(
    name="timeline",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    table=table,
    plot=plot,
    takes_device=True,
)
