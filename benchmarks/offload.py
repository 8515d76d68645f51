"""Optimizer offload in training: step time and peak memory of ours, of Megatron's and of none."""

from __future__ import annotations

import math
import os
import re
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks import offload_report
from benchmarks.benchmark import WRONG, Benchmark, Row, WrongResultError, require_none_wrong
from benchmarks.environment import code_hash, package_version
from benchmarks.measure import Company, summary
from benchmarks.training_process import Training, train
from megatron_s2.offload.plan import ALIGNMENT, GB, SUBGROUP_SIZE

WARM_UP = 3
HEAD_DIM = 64
LOSS_TOLERANCE = 1e-4  # of a mean over so many tokens; roundings of 16-bit logits average out with their root
TOLERANCE_TOKENS = 1024
NOTES = {
    "cpu": "Without a GPU a thread plays its part, on the same cores and in the same memory: the times say "
    "what a schedule costs there; what a GPU would gain they cannot say.",
    "cuda": "One rank of one GPU, which has all cores and the links to itself.",
}
SHARE = r"the GPU updates ([\d.]+)% of"  # as the plan that a run prints says it
_CODE = (
    "megatron_s2/pretrain.py",
    "megatron_s2/training/forward_step.py",
    "megatron_s2/offload/*.py",
    "megatron_s2/runtime/*.py",
    "benchmarks/offload.py",
    "benchmarks/training_process.py",
)
_PACKAGES = ("megatron-core", "transformer-engine")


@dataclass(frozen=True)
class Case:
    """One way to hold and update the optimizer's state.

    Args:
        flags: of Megatron and ours, beside the model's.
        fraction: of ours: asked share of the GPU's updates, a number or `auto`.
        flush: of ours: whether gradients leave for the host during backward.
    """

    name: str
    flags: tuple[str, ...]
    fraction: float | str | None = None
    flush: bool | None = None

    @property
    def is_ours(self) -> bool:
        return self.fraction is not None

    @property
    def may_be_refused(self) -> bool:
        """Megatron's offload need not run everywhere; that it does not is a row as well."""
        return self.name in offload_report.PEERS and self.name != NONE.name


def _hybrid(name: str, *more: str) -> Case:
    flags = "--optimizer-cpu-offload --use-precision-aware-optimizer --use-distributed-optimizer"
    return Case(name, (*flags.split(), "--optimizer-offload-fraction", "1.0", *_OVERLAP, *more))


def _ours(fraction: float | str, flush: bool) -> Case:
    flags = ("--s2-offload", "--s2-offload-gpu-fraction", str(fraction))
    name = f"s2-{fraction}-flush" if flush else f"s2-{fraction}"
    return Case(name, (*flags, *_OVERLAP) if flush else flags, fraction, flush)


_OVERLAP = ("--overlap-grad-reduce",)
NONE = Case("none", ("--use-distributed-optimizer", *_OVERLAP))
_ALL = [
    NONE,
    *(_ours(fraction, flush) for fraction in (0, 0.25, 0.5, 0.75, 1, "auto") for flush in (True, False)),
    _hybrid("hybrid"),
    _hybrid("hybrid-overlap", "--overlap-cpu-optimizer-d2h-h2d"),
]
CASES = {case.name: case for case in _ALL}


@dataclass(frozen=True)
class Model:
    """Sizes of what is trained; a micro-batch is one sequence.

    Args:
        subgroup_size: parameters that move together, small enough for the fractions to differ.
        bucket_size: parameters whose gradients are reduced, and can be flushed, together; small enough for
            that to begin long before backward ends.
    """

    hidden_size: int
    num_layers: int
    seq_length: int
    subgroup_size: int
    bucket_size: int

    @property
    def flags(self) -> list[str]:
        """One implementation on every machine, without dropout: runs that should agree can.

        The learning rate is one at which a last bit that Adam rounds otherwise does not move 16-bit weights
        much.
        """
        return (
            f"--hidden-size {self.hidden_size} --num-layers {self.num_layers} "
            f"--num-attention-heads {self.hidden_size // HEAD_DIM} "
            f"--seq-length {self.seq_length} --max-position-embeddings {self.seq_length} "
            "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
            "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
            "--transformer-impl local --no-rope-fusion --no-persist-layer-norm "
            "--no-gradient-accumulation-fusion --no-masked-softmax-fusion "
            "--mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0 --seed 1234 "
            f"--ddp-bucket-size {self.bucket_size} "
            "--bf16 --lr 3e-5 --lr-decay-style constant --clip-grad 1.0 --eval-iters 0"
        ).split()


DEFAULTS = {
    "cpu": Model(384, num_layers=5, seq_length=16, subgroup_size=2**18, bucket_size=2**20),
    "cuda": Model(1536, num_layers=12, seq_length=2048, subgroup_size=SUBGROUP_SIZE, bucket_size=2**25),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="NAME",
        help=f"of {', '.join(CASES)} (default: all). s2-F is ours with the GPU's fraction F; with -flush, "
        f"gradients leave during backward. {NONE.name} is what the others' losses are compared with, so it "
        "runs in any case",
    )
    parser.add_argument(
        "--accumulation",
        type=_numbers,
        default=[1, 4, 16],
        metavar="N,N,…",
        help="micro-batches of a step, default 1,4,16",
    )
    parser.add_argument(
        "--gpu-memory-gb",
        type=float,
        metavar="X",
        help=f"GB (10**9 bytes) that PyTorch may take of the GPU; {NONE.name} may take all there is, and its "
        "peak says whether it would fit (default: no limit)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="timed steps, and as many again for the optimizer's part (default: %(default)s)",
    )
    add_model_arguments(parser)


def add_model_arguments(parser: ArgumentParser) -> None:
    sizes = parser.add_argument_group("the model, by default of a size for the device").add_argument
    sizes("--hidden-size", type=int, help=_default_help("hidden_size"))
    sizes("--num-layers", type=int, help=_default_help("num_layers"))
    sizes("--seq-length", type=int, help=f"tokens of a micro-batch; {_default_help('seq_length')}")
    sizes("--subgroup-size", type=int, help=f"of ours; {_default_help('subgroup_size')}")
    sizes("--bucket-size", type=int, help=f"of gradient reductions; {_default_help('bucket_size')}")


def _default_help(field: str) -> str:
    return ", ".join(f"{getattr(model, field)} on {device}" for device, model in DEFAULTS.items())


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text}: must be numbers of micro-batches, such as 1,4") from None


def model_of(args: Namespace) -> Model:
    """The model that the options ask for.

    Raises:
        ValueError: naming the flag whose value does not fit, before anything runs.
    """
    asked = {name: getattr(args, name) for name in vars(DEFAULTS["cpu"])}
    model = replace(DEFAULTS[args.device], **{name: x for name, x in asked.items() if x is not None})
    if model.hidden_size < 1 or model.hidden_size % HEAD_DIM:
        raise ValueError(f"--hidden-size {model.hidden_size}: must be a positive multiple of {HEAD_DIM}")
    if model.subgroup_size < 1 or model.subgroup_size % ALIGNMENT:
        raise ValueError(f"--subgroup-size {model.subgroup_size}: must be a positive multiple of {ALIGNMENT}")
    counts = {
        "--num-layers": model.num_layers,
        "--seq-length": model.seq_length,
        "--bucket-size": model.bucket_size,
        "--repeats": args.repeats,
        "--accumulation": min(args.accumulation),
    }
    for flag, value in counts.items():
        if value < 1:
            raise ValueError(f"{flag} {value}: must be >= 1")
    return model


# ---------------------------------------------------------------------------------------------------------
# what is measured


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Rows of one accumulation after the other, a fresh process for each; without offload first, since the
    others' losses are compared with it. What has other losses than it must have keeps its times as
    `unproven_seconds`, which nothing shows.

    Raises:
        WrongResultError: when all is measured, because a training failed, or has other losses.
    """
    model, found = model_of(args), []
    if args.gpu_memory_gb is not None:
        if args.device != "cuda":
            raise ValueError(f"--gpu-memory-gb {args.gpu_memory_gb:g}: must not be set with --device cpu")
        if not 0 < args.gpu_memory_gb < math.inf:
            raise ValueError(f"--gpu-memory-gb {args.gpu_memory_gb:g}: must be > 0")
    for accumulation in args.accumulation:
        control = first = None
        for case in CASES.values():
            if case.name not in args.cases and case is not NONE:
                continue
            setting = _setting(case, model, accumulation, args)
            row = next((row for row in reversed(stored) if setting.items() <= row.items()), None)
            before = row
            if row is None:
                row = setting | measure(case, model, accumulation, args)
            if row["not_measured"] is None:
                try:
                    require_same_losses(row, control, first if case.is_ours else None)
                except WrongResultError as error:
                    row = row | {"not_measured": f"{WRONG}{error}", "unproven_seconds": row["seconds"]}
                    row["seconds"] = None
                else:
                    control = control or row
                    first = first or (row if case.is_ours else None)
            found.append(row)
            if row is not before:
                yield row
    require_none_wrong(found)


def _setting(case: Case, model: Model, accumulation: int, args: Namespace) -> Row:
    """What a stored row must have been measured with to stand for a new one."""
    return {
        "case": case.name,
        "fraction": case.fraction,
        "flush": case.flush,
        "accumulation": accumulation,
        "device": args.device,
        "model": vars(model),
        "gpu_memory_gb": args.gpu_memory_gb,
        "flags": flags(case, model, accumulation, args.threads),
        "warm_up": WARM_UP,
        "repeats": args.repeats,
        "packages": {name: package_version(name) for name in _PACKAGES},
        "offload_code": offload_code(),
    }


def offload_code() -> str:
    """A hash of the measured code that `environment.commit` does not count: that of offload in training."""
    return code_hash(_CODE)


def flags(case: Case, model: Model, accumulation: int, threads: int) -> list[str]:
    """Megatron's command line, but for the number of iterations and where it logs."""
    batch = ["--micro-batch-size", "1", "--global-batch-size", str(accumulation)]
    ours = ["--s2-offload-subgroup-size", str(model.subgroup_size), "--s2-offload-cpu-threads", str(threads)]
    return [*model.flags, *batch, *case.flags, *(ours if case.is_ours else [])]


def measure(case: Case, model: Model, accumulation: int, args: Namespace) -> Row:
    """What `_setting` leaves open."""
    start, before = time.perf_counter(), os.times()
    with Company() as company:
        words = flags(case, model, accumulation, args.threads)
        limit = None if args.gpu_memory_gb is None or case is NONE else int(args.gpu_memory_gb * GB)
        training = train(words, WARM_UP, args.repeats, args.device, args.threads, gpu_memory=limit)
    elapsed, after = time.perf_counter() - start, os.times()
    own = after.children_user + after.children_system - before.children_user - before.children_system
    results = _results(training)
    if training.status and not case.may_be_refused:
        who = f"{case.name} at accumulation {accumulation}"
        results["not_measured"] = f"{WRONG}{who} ended with status {training.status}: {training.failure}"
    knows_share = case.is_ours and not training.status
    return {
        **results,
        "gpu_share": round(_printed(SHARE, training) / 100, 3) if knows_share else None,
        "other_cpus": company.cpus and round(max(0.0, company.cpus - own / elapsed), 2),
        "note": NOTES[args.device],
    }


def _results(training: Training) -> Row:
    failed = training.status != 0
    return {
        "not_measured": training.failure if failed else None,
        "parameters": None if failed else int(_printed(r"number of parameters on .*: (\d+)", training)),
        "losses": list(training.losses),
        "seconds": None if failed else summary(np.array(training.step_seconds)),
        "optimizer_seconds": None if failed else summary(np.array(training.optimizer_seconds)),
        "host_peak_bytes": training.host_peak_bytes,
        "gpu_peak_bytes": training.gpu_peak_bytes,
    }


def _printed(pattern: str, training: Training) -> float:
    found = re.search(pattern, training.output)
    if found is None:
        raise WrongResultError(f"a training printed nothing like {pattern!r}")
    return float(found[1])


def require_same_losses(row: Row, control: Row | None, first: Row | None) -> None:
    """The losses of a row are finite, those of the row without offload, which must be there, to the rounding
    of 16-bit weights, and those of the first of ours to the bit.

    Raises:
        WrongResultError: says where and by how much they are not.
    """
    who = f"{row['case']} at accumulation {row['accumulation']}"
    losses = row["losses"]
    steps = row["warm_up"] + 2 * row["repeats"]
    if len(losses) != steps or not all(map(math.isfinite, losses)):
        raise WrongResultError(f"{who}: must have {steps} finite losses, has {losses}")
    if control is None and row["case"] != NONE.name:
        raise WrongResultError(f"{who}: {NONE.name} has no losses to compare with")
    tokens = row["accumulation"] * row["model"]["seq_length"]
    rounding = LOSS_TOLERANCE * max(1.0, math.sqrt(TOLERANCE_TOKENS / tokens))
    for other, tolerance in ((control, rounding), (first, 0.0)):
        for step, (got, expected) in enumerate(zip(losses, other["losses"] if other else ()), 1):
            if abs(got - expected) > tolerance * abs(expected):
                raise WrongResultError(
                    f"{who}: the loss of step {step} is {got:.9g}, that of {other['case']} {expected:.9g}; "
                    f"they may differ by {tolerance:.3g} of it"
                )


BENCHMARK = Benchmark(
    name="offload",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    table=offload_report.table,
    plot=offload_report.plot,
    takes_device=True,
)
