"""Adds the flags without which a Megatron command line cannot run in this environment.

Megatron's defaults assume a GPU, Transformer Engine and Apex. So that a command line written for them runs
unchanged on a laptop, flags that were not given are set to the values that work there. This is done to the
list of arguments, before Megatron parses it: only there can a default be distinguished from a flag that the
user gave, which is refused, not overridden, if it cannot work; and Megatron validates the final values.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import takewhile

from megatron_s2.optional_package import IMPORT_ERRORS


@dataclass(frozen=True)
class Environment:
    """Which of the things that Megatron's defaults assume are available."""

    gpu: bool
    transformer_engine: bool
    apex: bool

    @classmethod
    def detect(cls) -> "Environment":
        """Queries torch for a GPU and imports NVIDIA's packages (`amp_C`: PyPI's `apex` is unrelated)."""
        import torch

        gpu = torch.cuda.is_available()
        return cls(
            gpu=gpu,
            transformer_engine=gpu and _imports("transformer_engine.pytorch"),
            apex=gpu and _imports("amp_C"),
        )


def _imports(name: str) -> bool:
    try:
        import_module(name)
    except IMPORT_ERRORS:
        return False
    return True


@dataclass(frozen=True)
class _Flag:
    """A flag that an environment requires, and its value if it takes one."""

    name: str
    value: str | None = None

    @property
    def words(self) -> list[str]:
        return [self.name] if self.value is None else [self.name, self.value]


_WITHOUT_GPU = (
    _Flag("--distributed-backend", "gloo"),  # NCCL is for GPUs
    _Flag("--use-cpu-initialization"),  # weights are initialized from the CPU's generator
    _Flag("--no-masked-softmax-fusion"),  # CUDA kernels
    _Flag("--no-bias-gelu-fusion"),  # compiled for a GPU
    _Flag("--no-bias-swiglu-fusion"),
    _Flag("--no-bias-dropout-fusion"),
    _Flag("--disable-jit-fuser"),
)
_WITHOUT_TRANSFORMER_ENGINE = (
    _Flag("--transformer-impl", "local"),
    _Flag("--no-rope-fusion"),  # Transformer Engine's kernel
)
# Transformer Engine's layers need none of these, and accumulate weight gradients by kernels of their own. For
# the LM head, which is Megatron's in both, see `accumulate_weight_gradients_without_apex` of `patches.py`.
_LOCAL_WITHOUT_APEX = (
    _Flag("--no-persist-layer-norm"),  # not supported by torch's norms
    _Flag("--no-gradient-accumulation-fusion"),  # Apex's CUDA extension
    _Flag("--no-masked-softmax-fusion"),  # kernels that only Apex builds
)

# Flags that need a GPU, and what to do instead. They are refused, because a run without them would train
# something else than the command line says.
_NEEDS_GPU = {
    "--fp8-format": "use --bf16",
    "--fp4-format": "use --bf16",
    "--fp8-param-gather": "use --bf16",
    "--fp4-param-gather": "use --bf16",
    "--cuda-graph-impl": "remove it",
    "--enable-cuda-graph": "remove it",
    "--external-cuda-graph": "remove it",
    "--optimizer-cuda-graph": "remove it",
    "--tp-comm-overlap": "remove it",
    "--use-torch-fsdp2": "use --use-distributed-optimizer",
    "--use-megatron-fsdp": "use --use-distributed-optimizer",
    "--use-nccl-ub": "remove it",
    "--use-sharp": "remove it",
    "--pipeline-model-parallel-comm-backend": "remove it",
    "--te-rng-tracker": "remove it",
    "--moe-grouped-gemm": "remove it",
    "--cpu-offloading-num-layers": "remove it",
    "--fine-grained-activation-offloading": "remove it",
    "--gpu-sniff-test-interval": "remove it",
    "--record-memory-history": "remove it",
    "--log-energy": "remove it",
    "--async-save": "remove it",
    "--optimizer-cpu-offload": "remove it",
}
# Values of `--recompute-modules` for which Megatron calls Transformer Engine without checking for it.
_RECOMPUTED_BY_TRANSFORMER_ENGINE = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")
_HARMLESS_VALUES = {("--cuda-graph-impl", "none"), ("--cpu-offloading-num-layers", "0")}


def rank() -> int:
    """Returns the global rank of this process, 0 without a launcher; works before torch.distributed does."""
    return int(os.environ.get("RANK", "0"))


def given(argv: Sequence[str], flag: str) -> str | bool | None:
    """Returns the last value of a flag on a command line; True for a flag without a value, None if absent."""
    found: str | bool | None = None
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name != flag:
            continue
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        found = value if equals else True if following.startswith("--") else following
    return found


def runnable_arguments(argv: Sequence[str], environment: Environment) -> tuple[list[str], list[str]]:
    """Returns the command line `argv` with the flags that `environment` requires, and these flags alone.

    Raises:
        ValueError: a given flag cannot work in the environment; the message names it and what to do.
    """
    required: list[_Flag] = []
    if not environment.gpu:
        required += _WITHOUT_GPU
        for flag, remedy in _NEEDS_GPU.items():
            value = given(argv, flag)
            if flag == "--optimizer-cpu-offload" and given(argv, "--s2-offload") is not None:
                continue  # which sets it itself and runs everywhere
            if value is not None and (flag, value) not in _HARMLESS_VALUES:
                shown = flag if value is True else f"{flag} {value}"
                raise ValueError(f"{shown}: needs a GPU, and there is none here; {remedy}")
    if not environment.transformer_engine:
        required += _WITHOUT_TRANSFORMER_ENGINE
        _refuse_recompute_modules(argv)
    if not environment.apex:
        if given(argv, "--defer-embedding-wgrad-compute"):
            raise ValueError(
                "--defer-embedding-wgrad-compute: needs Apex's extension for weight gradients, "
                "and it is not here; remove it"
            )
        if not environment.transformer_engine or given(argv, "--transformer-impl") == "local":
            required += _LOCAL_WITHOUT_APEX
            _refuse_torch_norms(argv, environment)

    added: list[str] = []
    for flag in dict.fromkeys(required):
        value = given(argv, flag.name)
        if value is None:
            added += flag.words
        elif flag.value is not None and value != flag.value:
            lacking = "Transformer Engine" if environment.gpu else "a GPU"
            raise ValueError(
                f"{flag.name} {value}: needs {lacking}, and there is none here; use {flag.name} {flag.value}"
            )
    return [*argv, *added], added


def _refuse_recompute_modules(argv: Sequence[str]) -> None:
    for position, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag != "--recompute-modules":
            continue
        following = takewhile(lambda word: not word.startswith("--"), argv[position + 1 :])
        for module in [value] if equals else following:
            if module in _RECOMPUTED_BY_TRANSFORMER_ENGINE:
                raise ValueError(
                    f"--recompute-modules {module}: needs Transformer Engine, and there is none here; "
                    f"leave {module} out"
                )


def _refuse_torch_norms(argv: Sequence[str], environment: Environment) -> None:
    """Refuses what torch's norms do not support, which Megatron checks only when it builds them."""
    if given(argv, "--apply-layernorm-1p"):
        reason = "and neither is here; remove it"
        if environment.transformer_engine:
            reason = "and --transformer-impl local has neither; remove one of the two flags"
        raise ValueError(f"--apply-layernorm-1p: needs the norms of Transformer Engine or Apex, {reason}")


def describe(environment: Environment, added: Sequence[str]) -> str | None:
    """Returns a message about the flags that were added; None where the defaults of Megatron apply."""
    if not added:
        return None if environment.gpu else "megatron-s2: no GPU found, training on CPU (gloo)"
    packages = {"Transformer Engine": environment.transformer_engine, "Apex": environment.apex}
    reason = "no " + " or ".join(name for name, there in packages.items() if not there)
    if not environment.gpu:
        reason = "no GPU found, training on CPU (gloo)"
    return f"megatron-s2: {reason}; set: {' '.join(added)}"
