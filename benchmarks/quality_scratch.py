"""Trained from scratch, S2 beside dense: validation loss at three sizes, and by position in the sequence."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks import display
from benchmarks.benchmark import Row
from benchmarks.quality_experiment import Experiment, Run
from benchmarks.quality_text import HELD_OUT, PACKAGES, TOY_HELD_OUT, TOY_PACKAGES, Text, make_text
from benchmarks.quality_training import Launcher, evaluate, train
from benchmarks.quality_variants import (
    COMMON_FLAGS,
    DENSE,
    STYLES,
    VARIANTS,
    attention_flags,
    variant_settings,
)
from megatron_s2.pattern import S2Settings

PARTS = 16


@dataclass(frozen=True)
class Size:
    """A model, and what it is trained on; every KV head is a query head's own.

    So small a model, after so few tokens, uses hardly anything beyond 128 tokens. The window is a fraction of
    that: shards have work to do.

    Args:
        seq_length: tokens of a sequence.
        batch: sequences of a step.
        lr: largest learning rate; it ends at a tenth.
        seeds: seeds by default, of weights and of the order of the text.
        evaluated: windows of `seq_length` tokens of held-out text; None for all.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    steps: int
    lr: float
    seeds: tuple[int, ...] = (1,)
    head_dim: int = 32
    seq_length: int = 2048
    batch: int = 2
    vocab_size: int = 4096
    block_size: int = 16
    local_blocks: int = 2
    vert_stride: int = 8
    evaluated: int | None = None

    @property
    def ffn_hidden_size(self) -> int:
        return 2 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Number of weights of the layers' products: without embeddings, output layer and norms."""
        attention = 4 * self.num_attention_heads * self.head_dim
        return self.num_layers * self.hidden_size * (attention + 3 * self.ffn_hidden_size)

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.steps * self.batch * self.seq_length

    def settings(self, variant: str) -> S2Settings:
        """Returns the attention of a variant."""
        s2 = S2Settings(
            self.num_layers, self.num_attention_heads, self.block_size, self.local_blocks, self.vert_stride
        )
        return variant_settings(s2, variant, self.seq_length)

    def flags(self, seed: int, dtype: str) -> list[str]:
        """Returns Megatron's command line, without attention, data, number of steps and where to save and
        log."""
        model = (
            f"--num-layers {self.num_layers} --hidden-size {self.hidden_size} "
            f"--ffn-hidden-size {self.ffn_hidden_size} --num-attention-heads {self.num_attention_heads} "
            f"--kv-channels {self.head_dim} "
            f"--seq-length {self.seq_length} --max-position-embeddings {self.seq_length} "
            f"--init-method-std {self.hidden_size**-0.5:.4g} --seed {seed} "
            f"--global-batch-size {self.batch} "
            f"--lr {self.lr:g} --min-lr {self.lr / 10:g} --lr-decay-style cosine "
            f"--lr-warmup-iters {self.steps // 20} --weight-decay 0.1 --adam-beta2 0.95 "
            "--untie-embeddings-and-output-weights"
        )
        precision = ["--bf16"] if dtype == "bfloat16" else []
        return [*f"{model} {COMMON_FLAGS}".split(), *precision]


SIZES = {
    "1.4M": Size(6, 128, 8, steps=1000, lr=3e-3, seeds=(1, 2)),
    "4M": Size(6, 256, 8, steps=1000, lr=2e-3),
    "12M": Size(8, 384, 12, steps=1000, lr=1.5e-3),
}
TOY_SIZES = {
    "toy": Size(
        *(3, 64, 2),
        *(6, 1e-3),
        seq_length=128,
        batch=2,
        vocab_size=512,
        vert_stride=3,
        evaluated=4,
    )
}


def runs(args: Namespace, launcher: Launcher) -> Iterator[Run]:
    """Yields the runs of one size after another: for each seed all variants."""
    sizes = TOY_SIZES if args.toy else SIZES
    sources = (TOY_PACKAGES, TOY_HELD_OUT) if args.toy else (PACKAGES, HELD_OUT)

    @cache
    def text_of(vocab_size: int) -> Text:
        return make_text(launcher.work, launcher.python, *sources, vocab_size, launcher.threads)

    for name in args.sizes:
        size, text = sizes[name], text_of(sizes[name].vocab_size)
        for seed in args.seeds or size.seeds:
            for variant in args.variants:
                setting = {
                    "size": name,
                    "variant": variant,
                    "seed": seed,
                    "dtype": args.dtype,
                    "steps": size.steps,
                    "flags": size.flags(seed, args.dtype),
                    "attention": attention_flags(size.settings(variant)),
                    "evaluated": size.evaluated,
                    "text": text.row(),
                }
                run_name = f"{name} {variant} seed {seed}"
                measure = partial(_measure, launcher, size, setting, text)
                yield Run(run_name, setting, measure)


def _measure(launcher: Launcher, size: Size, setting: Row, text: Text) -> Row:
    directory = launcher.directory("scratch", setting, ("flags", "attention", "steps", "text"))
    data = ["--data-path", text.train, "--split", "100,0,0", "--eval-iters", "0", "--num-workers", "1"]
    data += ["--data-cache-path", launcher.work / "cache", "--tokenizer-type", "HuggingFaceTokenizer"]
    data += ["--tokenizer-model", text.tokenizer]
    data += ["--micro-batch-size", launcher.sequences_per_rank(size.batch)]
    flags = [*setting["flags"], *setting["attention"], *data]
    trained = train(launcher, directory, flags, size.steps, max(1, size.steps // 10))
    log = directory / "log.txt"
    loss = evaluate(launcher, trained, text.held_out, size.seq_length, size.evaluated, PARTS, log)
    settings = size.settings(setting["variant"])
    dense = size.settings(DENSE)
    pairs = settings.mean_pairs(size.seq_length) / dense.mean_pairs(size.seq_length)
    return {
        "parameters": size.parameters,
        "seq_length": size.seq_length,
        "tokens": size.tokens,
        "pairs": float(pairs),
        **loss,
        "train_losses": list(trained.losses.items()),
        "ranks": launcher.ranks,
        "tokens_per_second": size.batch * size.seq_length / trained.step_seconds["median"],
        "step_seconds": trained.step_seconds,
        "other_cpus": trained.other_cpus,
        "command": trained.command,
    }


# Tables and pictures.

_ALLOWED_GAP = 1.0  # percent over dense, drawn as a line
_SHOWN_PARTS = 8
_COLUMNS = display.columns(
    ("size", "attention", "seed", "tokens", "pairs", "loss", "over dense", "last quarter", "tokens/s"),
    "<5 <18 >5 >8 >6 >8 >11 >13 >9",
)
_LEGEND = (
    "pairs: query-key pairs over those of dense attention. loss: nats per token of held-out text.\n"
    "over dense: by how much it exceeds that of dense with the same size, seed and tokens; last quarter: of\n"
    "the positions."
)


def newest(rows: list[Row]) -> list[list[Row]]:
    """Returns the newest row of each (size, variant, seed), smallest size first, for each text and dtype."""
    groups = display.newest_rows(rows, ("text", "dtype"), ("size", "variant", "seed"), "loss")
    return [sorted(group.values(), key=_order) for group in groups]


def _order(row: Row) -> tuple:
    return row["parameters"], row["seed"], VARIANTS.index(row["variant"])


def dense_of(row: Row, group: Iterable[Row]) -> Row | None:
    """Returns the row of the dense model that a row is to be compared with, if there is one."""
    same = ("size", "seed", "tokens", "evaluated_tokens", "flags")
    of_dense = (other for other in group if other["variant"] == DENSE)
    return next((other for other in of_dense if all(other[name] == row[name] for name in same)), None)


def over_dense(row: Row, dense: Row | None, parts: int = 1) -> np.ndarray | None:
    """Returns by how many percent the loss exceeds that of dense, in each of equal parts of the positions;
    None without `dense`."""
    if dense is None:
        return None
    ours, theirs = (np.reshape(one["by_position"], (parts, -1)).mean(1) for one in (row, dense))
    return 100 * (ours / theirs - 1)


def mean_over_dense(rows: Iterable[Row], group: Iterable[Row], parts: int = 1) -> np.ndarray | None:
    """Returns the mean of `over_dense` of rows, which differ in their seeds; None if none can be compared."""
    gaps = [over_dense(row, dense_of(row, group), parts) for row in rows]
    gaps = [gap for gap in gaps if gap is not None]
    return np.mean(gaps, 0) if gaps else None


def table(rows: list[Row]) -> str:
    lines = []
    for group in newest(rows):
        lines += _describe(group[0])
        lines += display.format_table(_COLUMNS, [_cells(row, group) for row in group])
        lines += _position_lines(group)
        lines += display.load_notes(group, lambda row: f"{row['size']} {row['variant']} seed {row['seed']}")
    return "\n".join([*lines, _LEGEND])


def _describe(row: Row) -> list[str]:
    text = row["text"]
    return [
        f"from scratch, {row['dtype']}, sequences of {row['seq_length']} tokens; Python source, "
        f"{text['train_tokens']} tokens and {text['held_out_tokens']} held out, of",
        ", ".join(f"{name} {version}" for name, version in text["packages"].items()),
    ]


def _cells(row: Row, group: list[Row]) -> list[str]:
    dense = dense_of(row, group)
    whole, quarters = over_dense(row, dense), over_dense(row, dense, 4)
    return [
        row["size"],
        row["variant"],
        row["seed"],
        f"{row['tokens'] / 1e6:.3g}M",
        f"{row['pairs']:.3f}",
        f"{row['loss']:.4f}",
        *(display.cell(gaps if gaps is None else gaps[-1], "{:+.2f}%") for gaps in (whole, quarters)),
        f"{row['tokens_per_second']:.0f}",
    ]


def _of_each(group: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Returns the rows of each (size, variant), which differ in their seeds."""
    found = {}
    for row in group:
        found.setdefault((row["size"], row["variant"]), []).append(row)
    return found


def _position_lines(group: list[Row]) -> list[str]:
    """Returns a table over dense by position, the mean of all seeds."""
    part = group[0]["seq_length"] // _SHOWN_PARTS
    titles = ["size", "over dense to token", *(str((n + 1) * part) for n in range(_SHOWN_PARTS))]
    lines = []
    for (size, variant), rows in _of_each(group).items():
        gaps = mean_over_dense(rows, group, _SHOWN_PARTS)
        if variant != DENSE and gaps is not None:
            lines.append([size, variant, *(f"{gap:+.2f}%" for gap in gaps)])
    columns = display.columns(titles, "<5 <19" + " >8" * _SHOWN_PARTS)
    return display.format_table(columns, lines) if lines else []


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws, for each text and dtype, loss and gap to dense by size, and both by position."""
    paths = []
    for index, group in enumerate(newest(rows)):
        for name, draw in (("sizes", _draw_sizes), ("positions", _draw_positions)):
            paths.append(display.picture_path(directory, f"quality-scratch-{name}", index))
            draw(group, paths[-1])
    return paths


def _draw_sizes(group: list[Row], path: Path) -> None:
    with display.picture(path, (10, 4), (1, 2)) as ((loss, gap),):
        for variant, style in STYLES.items():
            rows = [row for row in group if row["variant"] == variant]
            points = [
                (row["parameters"], over[-1])
                for row in rows
                if (over := over_dense(row, dense_of(row, group))) is not None
            ]
            style = {**style, "linestyle": "", "label": variant, "alpha": 0.8}
            if rows:
                loss.plot([row["parameters"] for row in rows], [row["loss"] for row in rows], **style)
            if points and variant != DENSE:
                gap.plot(*zip(*points), **style)
        loss.set(ylabel="loss on held-out text (nats per token)")
        gap.set(ylabel="over dense (%)")
        gap.axhline(_ALLOWED_GAP, color="#999999", linewidth=1, linestyle=":")
        gap.axhline(0, color="#333333", linewidth=1)
        names = {row["parameters"]: row["size"] for row in group}
        for axis in (loss, gap):
            axis.set_xscale("log")
            axis.set_xticks([*names], names.values())
            axis.minorticks_off()
            axis.set_xlabel("weights without embeddings; a point for each seed")
            axis.grid(alpha=0.3)
        loss.legend()


def _draw_positions(group: list[Row], path: Path) -> None:
    sizes = list(dict.fromkeys(row["size"] for row in group))
    with display.picture(path, (4 * len(sizes), 6), (2, len(sizes))) as axes:
        for (size, variant), rows in _of_each(group).items():
            loss, gap = axes[:, sizes.index(size)]
            ends = rows[0]["seq_length"] / PARTS * (np.arange(PARTS) + 1)
            style = STYLES[variant] | {"label": variant, "markersize": 4}
            loss.plot(ends, np.mean([row["by_position"] for row in rows], 0), **style)
            gaps = mean_over_dense(rows, group, PARTS)
            if gaps is not None:
                gap.plot(ends, gaps, **style)
            loss.set(title=size)
            gap.set(xlabel="position, up to this token")
            for axis in (loss, gap):
                axis.grid(alpha=0.3)
        axes[0, 0].set(ylabel="loss (nats per token)")
        axes[1, 0].set(ylabel="over dense (%)")
        axes[0, 0].legend()


EXPERIMENT = Experiment(
    name="scratch",
    help="loss of models trained from scratch, by size and by position in the sequence",
    sizes=tuple(SIZES),
    toy_sizes=tuple(TOY_SIZES),
    variants=VARIANTS,
    cpu_ranks=2,
    runs=runs,
    table=table,
    plot=plot,
)
