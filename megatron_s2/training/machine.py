"""Turns a Megatron command line into one that can run on this machine, and says what it changed.

Megatron's defaults assume a GPU, Transformer Engine and Apex. A command line written for such a machine
should run as it stands on a laptop, so the flags that cannot work here get the one value that can. This
happens on the list of arguments, before Megatron parses them: only there can a default be told from what the
user typed, so an explicit wish that cannot be met is refused instead of overruled; Megatron's own validation
sees the final values; and what was added is exactly what the user could have typed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import takewhile


@dataclass(frozen=True)
class Machine:
    """What Megatron's defaults need, and whether it is here."""

    gpu: bool
    transformer_engine: bool
    apex: bool

    @classmethod
    def detect(cls) -> "Machine":
        """Asks torch for a GPU and imports NVIDIA's packages (`amp_C`: PyPI's `apex` is something else)."""
        import torch

        gpu = torch.cuda.is_available()
        return cls(
            gpu=gpu,
            transformer_engine=gpu and _imports("transformer_engine.pytorch"),
            apex=gpu and _imports("amp_C"),
        )


def _imports(name: str) -> bool:
    """Whether a package is there and fits: one built for another CUDA or torch fails in its own ways."""
    try:
        import_module(name)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


@dataclass(frozen=True)
class _Fix:
    """A flag that must be given on a machine, with the values that a user may have given it themselves."""

    flag: str
    value: str | None = None

    @property
    def words(self) -> list[str]:
        return [self.flag] if self.value is None else [self.flag, self.value]


_WITHOUT_GPU = (
    _Fix("--distributed-backend", "gloo"),  # NCCL is for GPUs
    _Fix("--use-cpu-initialization"),  # weights are drawn from the CPU's generator
    _Fix("--no-masked-softmax-fusion"),  # CUDA kernels
    _Fix("--no-bias-gelu-fusion"),  # compiled for a GPU
    _Fix("--no-bias-swiglu-fusion"),
    _Fix("--no-bias-dropout-fusion"),
    _Fix("--disable-jit-fuser"),
)
_WITHOUT_TRANSFORMER_ENGINE = (
    _Fix("--transformer-impl", "local"),
    _Fix("--no-rope-fusion"),  # Transformer Engine's kernel
)
_WITHOUT_APEX = (
    _Fix("--no-persist-layer-norm"),  # torch's norms refuse it
    _Fix("--no-gradient-accumulation-fusion"),  # Apex's CUDA extension
    _Fix("--no-masked-softmax-fusion"),  # kernels that only Apex builds
)

# Flags that only make sense with a GPU, and what to do instead. Refused, because leaving them out silently
# would train something else than what was asked for.
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
# What `--recompute-modules` can name only with Transformer Engine: its code is called without asking.
_RECOMPUTED_BY_TRANSFORMER_ENGINE = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")
_HARMLESS_VALUES = {("--cuda-graph-impl", "none"), ("--cpu-offloading-num-layers", "0")}


def _given(argv: Sequence[str], flag: str) -> str | bool | None:
    """The value a flag has on a command line (the last one counts), True without a value, None if absent."""
    found: str | bool | None = None
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name != flag:
            continue
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        found = value if equals else True if following.startswith("--") else following
    return found


def runnable_arguments(argv: Sequence[str], machine: Machine) -> tuple[list[str], list[str]]:
    """The command line `argv`, made runnable on `machine`, and the words that were added to it.

    Raises:
        ValueError: for a flag the user gave that cannot work here, naming the flag and what to do.
    """
    fixes: list[_Fix] = []
    if not machine.gpu:
        fixes += _WITHOUT_GPU
        for flag, remedy in _NEEDS_GPU.items():
            value = _given(argv, flag)
            if flag == "--optimizer-cpu-offload" and _given(argv, "--s2-offload") is not None:
                continue  # which sets it itself and runs everywhere
            if value is not None and (flag, value) not in _HARMLESS_VALUES:
                shown = flag if value is True else f"{flag} {value}"
                raise ValueError(f"{shown}: needs a GPU, and there is none here; {remedy}")
    if not machine.transformer_engine:
        fixes += _WITHOUT_TRANSFORMER_ENGINE
        _refuse_recompute_modules(argv)
        if not machine.apex:
            fixes += _WITHOUT_APEX
            _refuse_sequence_parallel(argv)

    added: list[str] = []
    for fix in dict.fromkeys(fixes):
        value = _given(argv, fix.flag)
        if value is None:
            added += fix.words
        elif fix.value is not None and value != fix.value:
            lacking = "Transformer Engine" if machine.gpu else "a GPU"
            raise ValueError(
                f"{fix.flag} {value}: needs {lacking}, and there is none here; use {fix.flag} {fix.value}"
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


def _refuse_sequence_parallel(argv: Sequence[str]) -> None:
    """Torch's norms cannot take a sequence split over ranks; Megatron says so only when it builds them."""
    tensor_parallel = _given(argv, "--tensor-model-parallel-size") not in (None, "1")
    if tensor_parallel and _given(argv, "--sequence-parallel"):
        raise ValueError(
            "--sequence-parallel: needs the norms of Transformer Engine or Apex, "
            "and neither is here; remove it"
        )


def describe(machine: Machine, added: Sequence[str]) -> str | None:
    """One line that tells the user what was changed, or None when nothing was."""
    if not added:
        return None if machine.gpu else "megatron-s2: no GPU found, training on CPU (gloo)"
    reason = "no Transformer Engine or Apex" if machine.gpu else "no GPU found, training on CPU (gloo)"
    return f"megatron-s2: {reason}; set: {' '.join(added)}"
