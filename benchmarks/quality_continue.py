"""A pretrained model made sparse: loss and needles before and after a short training, beside a dense control.

Each training is `examples/continue-pretraining/train.sh`. All see the same sequences in the same order, so
that their training losses can be compared step by step.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import display, patterns
from benchmarks.benchmark import Row
from benchmarks.quality_experiment import Experiment, Run
from benchmarks.quality_text import HELD_OUT, PACKAGES, TOY_HELD_OUT, TOY_PACKAGES, Text, make_text
from benchmarks.quality_training import Launcher, train_by_recipe
from megatron_s2.errors import flag_name
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import read_pattern_file

DENSE, UNIFORM, CALIBRATED = "dense", "uniform", "calibrated"
_ANNEALED = "-annealed"
VARIANTS = (DENSE, UNIFORM, CALIBRATED, UNIFORM + _ANNEALED, CALIBRATED + _ANNEALED)
_SAVE_INTERVAL = 16  # steps; a checkpoint of 135M weights has 2 GB
_UNIFORM = {"local_blocks": 8, "vert_stride": 16, "sink_blocks": 1}


@dataclass(frozen=True)
class Size:
    """How long is trained.

    Args:
        steps: number of steps; 0 judges the model as it is.
        batch: sequences of a step.
        texts: held-out sequences of the loss.
        kinds: of needles.
        needles: how many of each kind at each of ten depths, each in a text of its own, by the length of the
            texts, the longest of which is the model's full context.
    """

    steps: int
    seq_length: int = 4096
    batch: int = 4
    texts: int = 16
    kinds: tuple[str, ...] = ("code", "assignment", "comment", "entry")
    needles: tuple[tuple[int, int], ...] = ((4096, 2), (8192, 1))

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.steps * self.batch * self.seq_length

    def flags(self, dtype: str) -> list[str]:
        """Returns what the training is given besides the recipe's flags and the pattern."""
        words = (
            f"--global-batch-size {self.batch} --lr 1e-4 --min-lr 1e-5 --lr-warmup-iters {self.steps // 10} "
            "--keep-activations"
        ).split()
        return [*words, "--bf16"] if dtype == "bfloat16" else words

    def anneal_steps(self, variant: str) -> int:
        """Returns how many steps anneal: half of those of an annealed variant."""
        return self.steps // 2 if variant.endswith(_ANNEALED) else 0


def pattern_flags(variant: str, file: Path) -> list[str]:
    """Returns the recipe's flags of a variant's pattern; a stride of 1 is dense attention."""
    if variant == DENSE:
        return ["--s2-local-blocks", "1", "--s2-vert-stride", "1"]
    if variant.startswith(CALIBRATED):
        return ["--s2-pattern-file", str(file)]
    return [word for name, x in _UNIFORM.items() for word in (flag_name(f"s2_{name}"), str(x))]


def settings_of(variant: str, file: Path, num_layers: int, num_kv_heads: int) -> S2Settings | None:
    """Returns the attention of a variant; None is dense."""
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads}
    if variant.startswith(CALIBRATED):
        return read_pattern_file(file, **sizes, source="--pattern-file")
    return S2Settings(**sizes, **_UNIFORM) if variant.startswith(UNIFORM) else None


SIZES = {"0": Size(0), "0.5M": Size(32), "2M": Size(128)}
_TOY = {"seq_length": 512, "batch": 1, "texts": 2, "kinds": ("code",), "needles": ((512, 1), (1024, 1))}
TOY_SIZES = {"0": Size(0, **_TOY), "toy": Size(2, **_TOY)}


def runs(args: Namespace, launcher: Launcher) -> Iterator[Run]:
    """Yields the runs of one size after another."""
    from transformers import AutoConfig

    if args.hf is None:
        raise ValueError("--hf: must be given; make it with bash scripts/get_small_model.sh DIR")
    hf, file = args.hf.absolute(), args.pattern_file.absolute()
    config = AutoConfig.from_pretrained(hf)
    model = {"num_layers": config.num_hidden_layers, "num_kv_heads": config.num_key_value_heads}
    sizes = TOY_SIZES if args.toy else SIZES
    sources = (TOY_PACKAGES, TOY_HELD_OUT) if args.toy else (PACKAGES, HELD_OUT)
    text = make_text(launcher.work, launcher.python, *sources, hf, launcher.threads)
    for name in args.sizes:
        size = sizes[name]
        for variant in args.variants:
            if variant.endswith(_ANNEALED) and not size.steps:
                continue
            setting = {
                "size": name,
                "variant": variant,
                "seed": 1234,  # the recipe's
                "dtype": args.dtype,
                "model": hf.name,
                "steps": size.steps,
                "pattern": file.stem if variant.startswith(CALIBRATED) else variant.removesuffix(_ANNEALED),
                "pattern_hash": patterns.pattern_hash(settings_of(variant, file, **model)),
                "flags": size.flags(args.dtype),
                "anneal_steps": size.anneal_steps(variant),
                "seq_length": size.seq_length,
                "texts": size.texts,
                "kinds": list(size.kinds),
                "needles_of_each_kind": [list(pair) for pair in size.needles],
                "text": text.row(),
            }
            measure = partial(_measure, launcher, size, setting, text, hf, file)
            yield Run(f"{name} {variant}", setting, measure)


def _measure(launcher: Launcher, size: Size, setting: Row, text: Text, hf: Path, file: Path) -> Row:
    """Returns the part of a row that is measured; without steps, of the model with the pattern untrained."""
    from megatron_s2.calibration.source import load_source

    needles = {length: count * size.kinds for length, count in size.needles}
    judged = partial(
        patterns.measure,
        data_path=text.held_out,
        seq_length=size.seq_length,
        texts=size.texts,
        needles=needles,
    )
    if not size.steps:
        source = load_source(hf, None, setting["dtype"])
        settings = settings_of(setting["variant"], file, source.model.num_layers, source.model.num_kv_heads)
        return {"tokens": 0, **_judged(judged(source, settings))}
    fields = ("model", "steps", "pattern_hash", "flags", "anneal_steps", "seq_length", "text")
    directory = launcher.directory("continue", setting, fields)
    trained = train_by_recipe(
        launcher,
        directory,
        hf,
        text,
        pattern_flags(setting["variant"], file),
        size.seq_length,
        [*setting["flags"], "--s2-anneal-steps", str(setting["anneal_steps"])],
        size.steps,
        min(size.steps, _SAVE_INTERVAL),
    )
    source = load_source(directory / "exported", None, setting["dtype"])
    return {
        "tokens": size.tokens,
        **_judged(judged(source, source.settings)),
        "train_losses": list(trained.losses.items()),
        "tokens_per_second": size.batch * size.seq_length / trained.step_seconds["median"],
        "step_seconds": trained.step_seconds,
        "other_cpus": trained.other_cpus,
        "command": trained.command,
    }


def _judged(measured: Row) -> Row:
    """Returns what `patterns.measure` found, without what it compares with a stored row."""
    return {name: measured[name] for name in ("kv", "flops", "loss", "needles")}


# Tables and pictures.

_STYLES = {
    DENSE: {"color": "#333333"},
    UNIFORM: {"color": "#c55a11"},
    UNIFORM + _ANNEALED: {"color": "#c55a11", "linestyle": "--"},
    CALIBRATED: {"color": "#12355b"},
    CALIBRATED + _ANNEALED: {"color": "#12355b", "linestyle": "--"},
}
_ALLOWED_GAP = 1.0  # percent over dense, drawn as a line
_COLUMNS = display.columns(
    ("tokens", "attention", "K/V", "loss", "over dense", "needles", "of dense's", "tokens/s"),
    "<6 <34 >5 >8 >10 >14 >11 >9",
)
_LEGEND = (
    "K/V: keys and values that the last token sees, as a share of all. over dense: of the loss, against the\n"
    "dense model after as many tokens. needles: statements hidden in held-out text, recalled greedily, in\n"
    "texts as long as those of training / as the model's full context. of dense's: of those that this dense\n"
    "model recalls."
)


def newest(rows: list[Row]) -> list[list[Row]]:
    """Returns the newest row of each (tokens, variant, pattern), shortest training first.

    They are grouped by model, text and what is judged.
    """
    setting = ("model", "text", "dtype", "seq_length", "texts", "kinds", "needles_of_each_kind")
    groups = display.newest_rows(rows, setting, ("size", "variant", "pattern"), "loss")
    return [
        sorted(
            group.values(), key=lambda row: (row["tokens"], VARIANTS.index(row["variant"]), row["pattern"])
        )
        for group in groups
    ]


def _control(row: Row, group: list[Row]) -> Row | None:
    """Returns the row of dense attention after the same training."""
    dense = (other for other in group if other["variant"] == DENSE)
    same = ("size", "flags", "steps")
    return next((other for other in dense if all(other[name] == row[name] for name in same)), None)


def _found(row: Row) -> dict[int, np.ndarray]:
    """Returns which needles were found, by the length of their texts; they are the same for all rows of a
    group."""
    found: dict[int, list[bool]] = {}
    for needle in row["needles"]:
        found.setdefault(needle["length"], []).append(needle["found"])
    return {length: np.array(some) for length, some in found.items()}


def _of_controls(row: Row, control: Row) -> list[float | None]:
    """Returns the share of the control's needles that were found, by the length of their texts."""
    ours = _found(row)
    return [
        ours[length][theirs].mean() if theirs.any() else None for length, theirs in _found(control).items()
    ]


def _name(row: Row) -> str:
    return f"{row['variant']} ({row['pattern']})" if row["variant"].startswith(CALIBRATED) else row["variant"]


def table(rows: list[Row]) -> str:
    lines = []
    for group in newest(rows):
        first = group[0]
        lines.append(
            f"{first['model']} made sparse and trained on, {first['dtype']}, Python source, sequences of "
            f"{first['seq_length']} tokens"
        )
        lines += display.format_table(_COLUMNS, [_cells(row, _control(row, group)) for row in group])
        trained = [row for row in group if row["tokens"]]
        lines += display.load_notes(trained, lambda row: f"{row['size']} {_name(row)}")
    return "\n".join([*lines, _LEGEND])


def _cells(row: Row, control: Row | None) -> list[str]:
    gap = None if control is None else 100 * (row["loss"] / control["loss"] - 1)
    shares = [] if control is None else _of_controls(row, control)
    return [
        row["size"],
        _name(row),
        f"{row['kv']:.3f}",
        f"{row['loss']:.4f}",
        display.cell(gap, "{:+.2f}%"),
        " / ".join(f"{found.sum()}/{len(found)}" for found in _found(row).values()),
        " / ".join(display.cell(share, "{:.0%}") for share in shares) or "-",
        display.cell(row.get("tokens_per_second"), "{:.0f}"),
    ]


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws, for each model and text, how the training loss nears dense attention's, and needles found."""
    paths = []
    for index, group in enumerate(newest(rows)):
        paths.append(display.picture_path(directory, "quality-continue", index))
        _draw(group, paths[-1])
    return paths


def _draw(group: list[Row], path: Path) -> None:
    longest = max(row["tokens"] for row in group)
    with display.picture(path, (10, 4), (1, 2)) as ((gap, needles),):
        for name in dict.fromkeys(map(_name, group)):
            rows = [row for row in group if _name(row) == name]
            style = _STYLES[rows[0]["variant"]]
            for row in rows:
                if row["tokens"] == longest > 0 and row["variant"] != DENSE and _control(row, group):
                    ends, ours = np.array(row["train_losses"]).T
                    _, theirs = np.array(_control(row, group)["train_losses"]).T
                    tokens = ends * longest / row["steps"]
                    gap.plot(tokens, 100 * (ours / theirs - 1), label=name, **style)
            points = [(row["tokens"], 100 * np.concatenate([*_found(row).values()]).mean()) for row in rows]
            needles.plot(*zip(*points), marker="o", label=name, **style)
        gap.axhline(_ALLOWED_GAP, color="#999999", linewidth=1, linestyle=":")
        gap.axhline(0, color="#333333", linewidth=1)
        gap.set(ylabel="training loss over dense (%)")
        needles.set(ylabel="needles found (%)", ylim=(-4, 104))
        for axis in (gap, needles):
            axis.set_xlabel("tokens of training")
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend()


EXPERIMENT = Experiment(
    name="continue",
    help="loss and needles of a pretrained model that is made sparse, before and after a short training",
    sizes=tuple(SIZES),
    toy_sizes=tuple(TOY_SIZES),
    variants=VARIANTS,
    cpu_ranks=1,  # two would need twice the memory
    runs=runs,
    table=table,
    plot=plot,
)
