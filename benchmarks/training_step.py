"""A whole training step: S2 attention against dense, through the real entry point.

Every case is the same model and the same command but for the layers that stay dense. Dense attention is that
of `S2CoreAttention` with every layer dense, PyTorch's SDPA forced to its flash kernel: Megatron's local core
attention makes a matrix of all scores, which is 0.5 TB in bf16 for 16 heads at 131072 tokens.
"""

from __future__ import annotations

import math
import os
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks import training_step_report
from benchmarks.benchmark import WRONG, Benchmark, Row, WrongResultError, is_wrong, require_none_wrong
from benchmarks.environment import code_hash, package_version
from benchmarks.measure import Company, summary
from benchmarks.training_process import Training, train
from megatron_s2.pattern.block_pattern import attention_flops
from megatron_s2.pattern.settings import S2Settings

OUT_OF_MEMORY = "out of memory"
CASES = {
    "dense": ("--s2-dense-layer-freq", "1"),
    "s2-first-two-dense": ("--s2-dense-layers", "1,2"),
    "s2": (),
}
CHECK = training_step_report.CHECK
CHECKED_STEPS = 4
CHECK_SHARE = 0.1  # the kernels sum in other orders, and weights of 16 bits carry that on
_CODE = (
    "megatron_s2/pretrain.py",
    "megatron_s2/training/forward_step.py",
    "megatron_s2/pattern/settings.py",
    "megatron_s2/layers/*.py",
    "megatron_s2/runtime/*.py",
    "benchmarks/training_step.py",
    "benchmarks/training_process.py",
)


@dataclass(frozen=True)
class Model:
    """Sizes of what is trained, one sequence a step; the rest is `flags`."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    block_size: int
    local_blocks: int
    vert_stride: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int:
        """Tokens that every head sees whole."""
        return self.local_blocks * self.block_size

    def settings(self, case: str) -> S2Settings:
        """S2 attention of a case."""
        return S2Settings(
            self.num_layers,
            self.num_query_groups,
            self.block_size,
            self.local_blocks,
            self.vert_stride,
            dense_layers=(1, 2) if case == "s2-first-two-dense" else (),
            dense_layer_freq=int(case == "dense"),
        )

    def flags(self, case: str, seq_length: int) -> list[str]:
        """Megatron's command line, but for the number of iterations and where it logs."""
        return (
            f"--num-layers {self.num_layers} --hidden-size {self.hidden_size} "
            f"--ffn-hidden-size {self.ffn_hidden_size} --num-attention-heads {self.num_attention_heads} "
            f"--group-query-attention --num-query-groups {self.num_query_groups} "
            f"--seq-length {seq_length} --max-position-embeddings {seq_length} "
            "--position-embedding-type rope --rotary-base 500000 --normalization RMSNorm --swiglu "
            "--disable-bias-linear --untie-embeddings-and-output-weights "
            "--attention-dropout 0 --hidden-dropout 0 --transformer-impl local --no-rope-fusion "
            "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
            f"--mock-data --tokenizer-type NullTokenizer --vocab-size {self.vocab_size - 1} --num-workers 0 "
            "--micro-batch-size 1 --global-batch-size 1 --seed 1234 --bf16 --use-distributed-optimizer "
            f"--init-method-std {self.hidden_size**-0.5:.4g} "  # scores of about unit variance: they matter
            "--lr 3e-5 --lr-decay-style constant --clip-grad 1.0 --eval-iters 0 "
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
            f"--s2-attention --s2-block-size {self.block_size} --s2-local-blocks {self.local_blocks} "
            f"--s2-vert-stride {self.vert_stride}"
        ).split() + list(CASES[case])


MODELS = {
    "cpu": Model(4, 64, 128, 4, 2, vocab_size=256, block_size=16, local_blocks=8, vert_stride=4),
    "cuda": Model(24, 2048, 6144, 16, 4, vocab_size=32000, block_size=64, local_blocks=8, vert_stride=16),
}
LENGTHS = {"cpu": [512, 2048], "cuda": [8192, 32768, 65536, 131072]}


def step_flops(model: Model, case: str, seq_length: int) -> dict[str, int]:
    """FLOPs of one step of one sequence, really done: by products with weights (`linear`) and by attention on
    its visible pairs (`attention`). A multiply-add counts as two; norms, rotations and softmax are left out.

    A product with weights is done once forward and twice backward; the layers' forward is done once more by
    full recomputation, the output layer's is not.
    """
    h, tokens = model.hidden_size, seq_length
    projections = h * (2 * h + 2 * model.num_query_groups * model.head_dim)
    layers = model.num_layers * (projections + 3 * h * model.ffn_hidden_size)
    pairs = model.num_layers * model.num_attention_heads * model.settings(case).mean_pairs(seq_length)
    forward, backward = attention_flops(round(pairs), model.head_dim)
    return {
        "linear": 2 * tokens * (4 * layers + 3 * h * model.vocab_size),
        "attention": 2 * forward + backward,
    }


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="NAME",
        help=f"of {', '.join(CASES)}, in the order to measure them in (default: all)",
    )
    parser.add_argument(
        "--seq-lengths",
        type=_lengths,
        metavar="N,N,…",
        help="tokens of a step (default: "
        + "; on cuda ".join(",".join(map(str, LENGTHS[device])) for device in ("cpu", "cuda"))
        + ")",
    )
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: %(default)s)")
    sizes = parser.add_argument_group("the model, by default of a size for the device").add_argument
    for name in Model.__dataclass_fields__:
        default = ", ".join(f"{getattr(model, name)} on {device}" for device, model in MODELS.items())
        sizes(f"--{name.replace('_', '-')}", type=int, metavar="N", help=default)


def _lengths(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text}: must be numbers of tokens, such as 8192,32768") from None


def model_of(args: Namespace) -> Model:
    """The model that the options ask for.

    Raises:
        ValueError: naming the flag whose value does not fit, before anything runs.
    """
    asked = {name: getattr(args, name) for name in Model.__dataclass_fields__}
    model = replace(MODELS[args.device], **{name: x for name, x in asked.items() if x is not None})
    counts = {**vars(model), "seq_lengths": min(args.seq_lengths), "repeats": args.repeats}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be >= 1")
    if args.warm_up < 1:
        raise ValueError(f"--warm-up {args.warm_up}: must be >= 1, the first step compiles")
    if model.local_blocks < 2:
        raise ValueError("--local-blocks 1: must be >= 2, for the check in the window to show anything")
    for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_query_groups")):
        if getattr(model, whole) % getattr(model, part):
            flag, other = (f"--{name.replace('_', '-')} {getattr(model, name)}" for name in (whole, part))
            raise ValueError(f"{flag}: must be a multiple of {other}")
    return model


# ---------------------------------------------------------------------------------------------------------
# what is measured


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Rows of one length after the other, a fresh process for each case; before the first one of the check of
    `checked_losses`. Where that is wrong, times of S2 are stored as `unproven_seconds`, which nothing shows.

    Raises:
        WrongResultError: when all is measured, because a training failed, but for want of memory, or has
            other losses than it must have.
    """
    args.seq_lengths = args.seq_lengths or LENGTHS[args.device]
    model, found = model_of(args), []
    about = _about(model, args)
    check = next((row for row in stored if row["case"] == CHECK and _same(row, about)), None)
    for seq_length in args.seq_lengths:
        for case in args.cases:
            setting = _setting(case, model, seq_length, args)
            row = next((row for row in stored if _same(row, setting)), None)
            if row is None:
                if check is None:
                    check = about | check_row(model, args)
                    yield check
                row = setting | measure(case, model, seq_length, args) | {"checked": check["checked"]}
                if is_wrong(check) and case != "dense" and row["seconds"]:
                    row |= {"not_measured": check["not_measured"], "unproven_seconds": row["seconds"]}
                    row["seconds"] = None
                yield row
            found.append(row)
    require_none_wrong([*([check] if check else []), *found])


def check_row(model: Model, args: Namespace) -> Row:
    """What `checked_losses` finds, or that it is wrong."""
    row = {"case": CHECK, "seq_length": model.window, "checked": None, "not_measured": None, "seconds": None}
    try:
        return row | {"checked": checked_losses(model, args)}
    except WrongResultError as error:
        return row | {"not_measured": f"{WRONG}{error}"}


def _same(row: Row, setting: Row) -> bool:
    return setting.items() <= row.items()


def _about(model: Model, args: Namespace) -> Row:
    """What the check's result holds for."""
    return {
        "device": args.device,
        "model": vars(model),
        "packages": {"megatron-core": package_version("megatron-core")},
        "step_code": code_hash(_CODE),
    }


def _setting(case: str, model: Model, seq_length: int, args: Namespace) -> Row:
    """What a stored row must have been measured with to stand for a new one."""
    return _about(model, args) | {
        "case": case,
        "seq_length": seq_length,
        "warm_up": args.warm_up,
        "repeats": args.repeats,
        "flags": model.flags(case, seq_length),
    }


def checked_losses(model: Model, args: Namespace) -> Row:
    """Trains dense and S2 on sequences as long as the window, which both see whole: they must agree there. A
    third training that sees little but its own blocks shows how far losses move where attention is wrong.

    Beyond the window dense and S2 compute different things, so no comparison at the timed lengths would prove
    more: there losses are checked to be finite, and the kernels are checked by the attention benchmark.

    Raises:
        WrongResultError: dense and S2 differ by more than a small part of that.
    """
    forgetful = replace(model, local_blocks=1, vert_stride=2 * model.local_blocks)
    losses = {}
    for name, one, case in (("dense", model, "dense"), ("s2", model, "s2"), ("own blocks", forgetful, "s2")):
        flags = one.flags(case, model.window)
        training = train(flags, 1, CHECKED_STEPS - 1, args.device, args.threads, time_optimizer=False)
        if training.status:
            raise WrongResultError(f"{name} at {model.window} tokens: {training.failure}")
        losses[name] = training.losses
    off, far = (_distance(losses[name], losses["dense"]) for name in ("s2", "own blocks"))
    if not off <= CHECK_SHARE * far:
        raise WrongResultError(
            f"s2 at {model.window} tokens, where it sees all: losses are {off:.3g} off dense ones; "
            f"allowed is {CHECK_SHARE:g} of {far:.3g}, by which they are off where it sees its own blocks"
        )
    return {
        "seq_length": model.window,
        "losses": {name: list(found) for name, found in losses.items()},
        "s2_off": off,
        "own_blocks_off": far,
    }


def _distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """Root of the mean square of their differences."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(losses, others, strict=True)) / len(others))


def measure(case: str, model: Model, seq_length: int, args: Namespace) -> Row:
    """What `_setting` leaves open."""
    start, before = time.perf_counter(), os.times()
    with Company() as company:
        flags = model.flags(case, seq_length)
        training = train(flags, args.warm_up, args.repeats, args.device, args.threads, time_optimizer=False)
    elapsed, after = time.perf_counter() - start, os.times()
    own = after.children_user + after.children_system - before.children_user - before.children_system
    reason = not_measured(case, seq_length, training)
    flops, dense = (step_flops(model, name, seq_length) for name in (case, "dense"))
    return {
        "not_measured": reason,
        "losses": list(training.losses),
        "seconds": None if reason else summary(np.array(training.step_seconds)),
        "flops": flops,
        "dense_flops": dense,
        "speedup_bound": sum(dense.values()) / sum(flops.values()),
        "host_peak_bytes": training.host_peak_bytes,
        "gpu_peak_bytes": training.gpu_peak_bytes,
        "other_cpus": company.cpus and round(max(0.0, company.cpus - own / elapsed), 2),
    }


def not_measured(case: str, seq_length: int, training: Training) -> str | None:
    """Why a training has no times: memory was too small for it, it failed otherwise, or its losses are not
    finite; None where it has."""
    who = f"{case} at {seq_length} tokens"
    if training.status:
        full = ("OutOfMemoryError", "can't allocate memory", "CUDA out of memory")
        if any(words in training.output for words in full):
            return OUT_OF_MEMORY
        return f"{WRONG}{who} ended with status {training.status}: {training.failure}"
    if not all(map(math.isfinite, training.losses)):
        return f"{WRONG}{who}: losses must be finite, are {list(training.losses)}"
    return None


BENCHMARK = Benchmark(
    name="step",
    help="a whole training step: S2 attention against dense, through the real entry point",
    add_arguments=add_arguments,
    run=run,
    table=training_step_report.table,
    plot=training_step_report.plot,
    takes_device=True,
)
