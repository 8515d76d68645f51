"""Needles: a small model learns to recall values of keys from anywhere in up to 32768 tokens, in stages."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import display
from benchmarks.benchmark import Row
from benchmarks.quality_experiment import Experiment, Run
from benchmarks.quality_needles_data import (
    VOCABULARY,
    periodic_sequences,
    shifted_needle_sequences,
    write_sequences,
)
from benchmarks.quality_training import Launcher, Trained, recalled, train
from benchmarks.quality_variants import COMMON_FLAGS, DENSE, S2, WINDOW, attention_flags, variant_settings
from megatron_s2.pattern import S2Settings

VARIANTS = (S2, WINDOW, DENSE)
_DATA_SEED = 7  # of training sequences; those of the evaluation have another
_RECALL = {"needles": 2**12, "depths": 16, "seed": 11}
_TOY_RECALL = {"needles": 16, "depths": 2, "seed": 11}


@dataclass(frozen=True)
class Model:
    """Sizes and pattern of the model.

    Half of each head's dimensions have rotary positions, of short wavelengths, and queries and keys have
    biases: by these a head attends to the token before, whatever the tokens are. By the other half keys are
    found at any distance. There are as many heads as phases: every layer sees all blocks.
    """

    num_layers: int = 2
    hidden_size: int = 128
    head_dim: int = 32
    num_attention_heads: int = 16
    block_size: int = 16
    local_blocks: int = 2
    vert_stride: int = 16

    def settings(self, variant: str, longest: int) -> S2Settings:
        """Returns the attention of a variant; that of `window-only` costs as much as S2 at `longest`."""
        s2 = S2Settings(
            self.num_layers, self.num_attention_heads, self.block_size, self.local_blocks, self.vert_stride
        )
        return variant_settings(s2, variant, longest)

    def flags(self) -> list[str]:
        """Returns the part of Megatron's command line that is the same for all attentions and stages."""
        return (
            f"--num-layers {self.num_layers} --hidden-size {self.hidden_size} "
            f"--ffn-hidden-size {self.hidden_size} --num-attention-heads {self.num_attention_heads} "
            f"--kv-channels {self.head_dim} --rotary-percent 0.5 --rotary-base 20 --add-qkv-bias "
            "--init-method-std 0.07 --embedding-init-method-std 0.05 --weight-decay 0.01 --adam-beta2 0.99 "
            f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} "
            f"{COMMON_FLAGS}"
        ).split()


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Args:
        length: tokens of a sequence.
        batch: sequences of a step.
        final_lr: what the learning rate falls to, linearly. While recall forms it had better not fall.
        periodic: share of sequences that repeat with periods, which make induction heads form. There must be
            more blocks than phases. All others have needles.
    """

    length: int
    steps: int
    batch: int
    lr: float
    final_lr: float
    periodic: float = 0.0

    def sequences(self) -> Iterator[np.ndarray]:
        """Yields the sequences and one more, whose first token is the last label; the same ones each time."""
        rng = np.random.default_rng([_DATA_SEED, self.length])
        left = self.steps * self.batch + 1
        while left:
            count = min(left, max(1, 2**20 // self.length))
            if periodic := round(count * self.periodic):
                yield periodic_sequences(rng, periodic, self.length)
            if needles := count - periodic:
                yield shifted_needle_sequences(rng, needles, self.length)
            left -= count

    def row(self) -> dict:
        """Returns what a row says about the data; `hash` is that of the first sequences."""
        first = hashlib.sha256(next(self.sequences()).tobytes())
        return asdict(self) | {"hash": first.hexdigest()[:16]}

    def flags(self, seed: int) -> list[str]:
        return (
            f"--seq-length {self.length} --max-position-embeddings {self.length} --seed {seed} "
            f"--global-batch-size {self.batch} --lr {self.lr:g} --min-lr {self.final_lr:g} "
            f"--lr-decay-style linear --lr-warmup-iters {-(-self.steps // 20)}"
        ).split()


MODEL, TOY_MODEL = Model(), Model(2, 64, 32, 2, vert_stride=2)
STAGES = {
    "periods": Stage(512, 5500, 4, 1e-3, 1e-3, periodic=1.0),
    "512": Stage(512, 3000, 4, 1e-3, 1e-4, periodic=0.25),
    "2048": Stage(2048, 200, 4, 5e-4, 5e-5),
    "8192": Stage(8192, 80, 2, 2e-4, 1e-5),
    "32768": Stage(32768, 30, 2, 1.5e-4, 1e-5),
}
TOY_STAGES = {"64": Stage(64, 2, 4, 1e-3, 1e-3, periodic=0.5), "128": Stage(128, 2, 2, 5e-4, 5e-5)}


def runs(args: Namespace, launcher: Launcher) -> Iterator[Run]:
    """Yields the stages of one variant after another; a stage begins from the checkpoint of the former.

    Those of `window_holds_all` are trained with S2 alone.
    """
    model, stages = (TOY_MODEL, TOY_STAGES) if args.toy else (MODEL, STAGES)
    phases = {"block_size": model.block_size, "phases": model.vert_stride}
    asked = (_TOY_RECALL if args.toy else _RECALL) | phases
    longest = max(stage.length for stage in stages.values())
    rows = {name: stage.row() for name, stage in stages.items()}
    precision = ["--bf16"] if args.dtype == "bfloat16" else []
    for seed in args.seeds or (1,):
        for variant in args.variants:
            former, trained = None, None
            for name, stage in stages.items():
                attention = S2 if window_holds_all(model, stage, longest) else variant
                setting = {
                    "size": name,
                    "variant": attention,
                    "seed": seed,
                    "dtype": args.dtype,
                    "steps": stage.steps,
                    "flags": [*model.flags(), *precision, *stage.flags(seed)],
                    "attention": attention_flags(model.settings(attention, longest)),
                    "data": rows[name],
                    "asked": asked,
                    "former": former,
                }
                fields = ("flags", "attention", "steps", "data", "former")
                directory = launcher.directory("needles", setting, fields)
                train_it = partial(_train, launcher, stage, setting, directory, trained)
                if name in args.sizes and attention == variant:
                    lengths = sorted({some.length for some in stages.values() if some.length <= stage.length})
                    measure = partial(_measure, launcher, setting, lengths, directory, train_it)
                    yield Run(f"{name} {variant} seed {seed}", setting, measure)
                former, trained = directory.name, train_it


def window_holds_all(model: Model, stage: Stage, longest: int) -> bool:
    """Returns whether the window of `window-only` holds the whole sequence: nothing is out of its reach.

    Such a stage, in which recall forms, is S2's for all variants. What a control with another attention then
    lacks, it cannot see; that it was slower to form recall is not measured.
    """
    window = model.settings(WINDOW, longest)
    return window.local_blocks * window.block_size >= stage.length


def _train(launcher: Launcher, stage: Stage, setting: Row, directory: Path, former) -> Trained:
    """Trains a stage, after the former ones if their checkpoints are not here."""
    start = None if former is None else former().checkpoint
    data = launcher.work / f"needles-{stage.length}-{stage.steps * stage.batch}-{setting['data']['hash']}"
    if not Path(f"{data}.idx").exists():
        write_sequences(data, stage.sequences())
    flags = [
        *setting["flags"],
        *setting["attention"],
        "--data-path",
        data,
        "--split",
        "100,0,0",
        "--eval-iters",
        "0",
    ]
    flags += ["--num-workers", "1", "--data-cache-path", launcher.work / "cache"]
    micro_batch = max(1, min(launcher.sequences_per_rank(stage.batch), 8192 // stage.length))
    flags += ["--micro-batch-size", micro_batch]
    return train(launcher, directory, flags, stage.steps, max(1, stage.steps // 10), start)


def _measure(launcher: Launcher, setting: Row, lengths: list[int], directory: Path, train_it) -> Row:
    trained = train_it()
    stage = setting["data"]
    tokens = stage["batch"] * stage["length"]
    return {
        "tokens": tokens * stage["steps"],
        "cells": recalled(launcher, trained, setting["asked"] | {"lengths": lengths}, directory / "log.txt"),
        "train_losses": list(trained.losses.items()),
        "ranks": launcher.ranks,
        "tokens_per_second": tokens / trained.step_seconds["median"],
        "step_seconds": trained.step_seconds,
        "other_cpus": trained.other_cpus,
        "command": trained.command,
    }


# Tables and pictures.

_LEGEND = (
    "share of needles found: at all depths, at the depth where fewest are, and in the phase (block of the\n"
    "key, modulo the stride) where fewest are. found: the value has more than half of the probability."
)


def newest(rows: list[Row]) -> list[list[Row]]:
    """Returns the newest row of each (variant, seed, stage), for each dtype and each way to ask."""
    groups = display.newest_rows(rows, ("dtype", "asked"), ("variant", "seed", "size"), "cells")
    return [sorted(group.values(), key=_order) for group in groups]


def _order(row: Row) -> tuple:
    return VARIANTS.index(row["variant"]), row["seed"], row["data"]["length"]


def found_shares(row: Row, by: str = "depth") -> dict[int, np.ndarray]:
    """Returns the share of needles found in each group, by length.

    Args:
        by: `depth`, shallow to deep, or `phase`, of the block of a needle's key.
    """
    shares: dict[int, list[float]] = {}
    for cell in row["cells"]:
        if by in cell:
            shares.setdefault(cell["length"], []).append(cell["found"] / max(1, cell["asked"]))
    return {length: np.array(some) for length, some in shares.items()}


def table(rows: list[Row]) -> str:
    lines = []
    for group in newest(rows):
        lengths = sorted({length for row in group for length in found_shares(row)})
        titles = ("attention", "seed", "trained to", "tokens", "loss", "tokens/s", *map(str, lengths))
        columns = display.columns(titles, "<12 >5 >11 >8 >7 >9" + " >21" * len(lengths))
        lines.append(f"needles, {group[0]['dtype']}; mean / worst depth / worst phase at each length")
        lines += display.format_table(columns, [_cells(row, lengths) for row in group])
        lines += display.load_notes(group, lambda row: f"{row['size']} {row['variant']} seed {row['seed']}")
    return "\n".join([*lines, _LEGEND])


def _cells(row: Row, lengths: list[int]) -> list[str]:
    shares, of_phases = found_shares(row), found_shares(row, "phase")
    return [
        row["variant"],
        row["seed"],
        row["size"],
        f"{row['tokens'] / 1e6:.3g}M",
        f"{row['train_losses'][-1][1]:.3f}",
        f"{row['tokens_per_second']:.0f}",
        *(
            f"{shares[length].mean():.1%} / {shares[length].min():.1%} / {of_phases[length].min():.1%}"
            if length in shares
            else "-"
            for length in lengths
        ),
    ]


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws, for each dtype and way to ask, a heat map for each variant after its last stage."""
    paths = []
    for index, group in enumerate(newest(rows)):
        paths.append(display.picture_path(directory, "quality-needles", index))
        last = {row["variant"]: row for row in group}
        with display.picture(paths[-1], (1 + 3.2 * len(last), 4.5), (1, len(last))) as (axes,):
            for axis, (variant, row) in zip(axes, last.items()):
                shares = found_shares(row)
                grid = np.array([*shares.values()]).T
                image = axis.imshow(
                    grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", extent=(0, len(shares), 1, 0)
                )
                axis.set_xticks(np.arange(len(shares)) + 0.5, map(str, shares))
                axis.set(title=f"{variant}, trained to {row['size']}", xlabel="tokens")
            axes[0].set(ylabel="depth of the needle")
            axes[-1].figure.colorbar(image, ax=list(axes), label="share found")
    return paths


EXPERIMENT = Experiment(
    name="needles",
    help="values of keys recalled from each depth of up to 32768 tokens; the sizes are stages of training",
    sizes=tuple(STAGES),
    toy_sizes=tuple(TOY_STAGES),
    variants=VARIANTS,
    cpu_ranks=2,
    runs=runs,
    table=table,
    plot=plot,
)
