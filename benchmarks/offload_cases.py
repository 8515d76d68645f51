"""The cases of the offload benchmarks: ways to hold the optimizer's state, the trained model, their flags."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

from benchmarks.options import add_size_arguments, chosen_sizes, require_positive
from benchmarks.training_process import MODEL_FLAGS
from megatron_s2.offload.plan import ALIGNMENT, SUBGROUP_SIZE

HEAD_DIM = 64


@dataclass(frozen=True)
class Case:
    """One way to hold and update the optimizer's state.

    Args:
        flags: flags of Megatron and ours, in addition to the model's.
        fraction: requested share of updates on the GPU, a number or `auto`; None for a case without our
            offload.
        flush: whether gradients are copied to the host during backward; None as for `fraction`.
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
        """Whether a failure is a result: Megatron's offload does not run everywhere."""
        return not self.is_ours and self.name != NONE.name


_OVERLAP = ("--overlap-grad-reduce",)


def _ours(fraction: float | str, flush: bool) -> Case:
    flags = ("--s2-offload", "--s2-offload-gpu-fraction", str(fraction))
    name = f"s2-{fraction}-flush" if flush else f"s2-{fraction}"
    return Case(name, (*flags, *_OVERLAP) if flush else flags, fraction, flush)


def _hybrid(name: str, *more: str) -> Case:
    flags = "--optimizer-cpu-offload --use-precision-aware-optimizer --use-distributed-optimizer"
    return Case(name, (*flags.split(), "--optimizer-offload-fraction", "1.0", *_OVERLAP, *more))


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
    """Sizes of the trained model; a micro-batch is one sequence.

    Args:
        subgroup_size: parameters that move together, few enough for the fractions to differ.
        bucket_size: parameters whose gradients are reduced, and can be flushed, together; few enough for that
            to begin long before backward ends.
    """

    hidden_size: int
    num_layers: int
    seq_length: int
    subgroup_size: int
    bucket_size: int


MODELS = {
    "cpu": Model(384, num_layers=5, seq_length=16, subgroup_size=2**18, bucket_size=2**20),
    "cuda": Model(1536, num_layers=12, seq_length=2048, subgroup_size=SUBGROUP_SIZE, bucket_size=2**25),
}


def flags(case: Case, model: Model, accumulation: int, threads: int) -> list[str]:
    """Returns Megatron's command line, without the number of iterations and where to log."""
    model_flags = (
        f"{MODEL_FLAGS} --hidden-size {model.hidden_size} --num-layers {model.num_layers} "
        f"--num-attention-heads {model.hidden_size // HEAD_DIM} "
        f"--seq-length {model.seq_length} --max-position-embeddings {model.seq_length} --vocab-size 255 "
        f"--ddp-bucket-size {model.bucket_size} --global-batch-size {accumulation}"
    )
    ours = f"--s2-offload-subgroup-size {model.subgroup_size} --s2-offload-cpu-threads {threads}"
    return [*model_flags.split(), *case.flags, *(ours.split() if case.is_ours else [])]


def add_model_arguments(parser: ArgumentParser) -> None:
    meanings = {
        "seq_length": "tokens of a micro-batch",
        "subgroup_size": "parameters of a subgroup of our offload",
        "bucket_size": "parameters of a gradient reduction",
    }
    add_size_arguments(parser, MODELS, meanings)


def model_of(args: Namespace) -> Model:
    """Returns the model that the options describe, or raises ValueError if one is out of range."""
    model = chosen_sizes(args, MODELS)
    if model.hidden_size < 1 or model.hidden_size % HEAD_DIM:
        raise ValueError(f"--hidden-size {model.hidden_size}: must be a positive multiple of {HEAD_DIM}")
    if model.subgroup_size < 1 or model.subgroup_size % ALIGNMENT:
        raise ValueError(f"--subgroup-size {model.subgroup_size}: must be a positive multiple of {ALIGNMENT}")
    require_positive(**vars(model))
    return model
