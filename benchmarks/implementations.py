"""The measured implementations of attention: ours and the alternatives, each with its backend forced."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.cases import Case
from megatron_s2 import S2Pattern, s2_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _not_missing(case: Case) -> None:
    """The implementation runs wherever its device is there."""


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention; inputs and output are `[batch, seq, heads, head_dim]`.

    Args:
        name: name in rows.
        devices: devices on which it runs.
        prepare: `prepare(case)` does what is needed once per shape and length, such as building masks, and
            returns the attention. It is timed separately.
        sparse: whether queries see what the case's pattern shows, instead of the whole past.
        ours: whether it is this project's: an error in it fails the benchmark, one in another is a result.
        missing: `missing(case)` returns a one-line reason why it cannot run here, or None.
        forward_only: devices on which it has no backward.
    """

    name: str
    devices: tuple[str, ...]
    prepare: Callable[[Case], Attention]
    sparse: bool = True
    ours: bool = False
    missing: Callable[[Case], str | None] = _not_missing
    forward_only: tuple[str, ...] = ()

    def pattern(self, case: Case) -> S2Pattern:
        """Returns the pattern that this implementation claims to compute."""
        return case.pattern if self.sparse else replace(case.pattern, vert_stride=1, phases=None)

    def unavailable(self, case: Case, pass_name: str) -> str | None:
        """Returns a one-line reason why a pass cannot run here, or None."""
        if pass_name != "forward" and case.device in self.forward_only:
            return f"no backward on {case.device}"
        return self.missing(case)


def _s2(backend: str, case: Case) -> Attention:
    return partial(s2_attention, pattern=case.pattern, return_lse=False, backend=backend)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _sdpa(case: Case) -> Attention:
    return _dense


def _sdpa_on(backend: SDPBackend, case: Case) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):  # raises instead of falling back to another backend
            return _dense(q, k, v)

    return attention


def _sdpa_refuses(backend: SDPBackend, case: Case) -> str | None:
    """Returns PyTorch's own reasons to refuse a backend, from a short call of the same shape."""
    short = replace(case, seq_length=min(case.seq_length, 1024))
    q, k, v, _ = short.inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _sdpa_on(backend, short)(q, k, v)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reasons = [str(warning.message).split(" (Triggered")[0] for warning in caught]
            return f"refused by PyTorch: {' '.join([*reasons, str(error).splitlines()[0]])}"
    return None


def _forced_sdpa(name: str, backend: SDPBackend) -> Implementation:
    prepare, missing = partial(_sdpa_on, backend), partial(_sdpa_refuses, backend)
    return Implementation(name, ("cuda",), prepare, sparse=False, missing=missing)


def flex_block_mask(case: Case) -> BlockMask:
    """Returns the case's pattern for FlexAttention, in blocks of the pattern's own size.

    It is built from block indices, never from a token mask; only diagonal blocks need the causal mask.
    """
    p = case.pattern
    blocks = p.block_mask(p.num_blocks(case.seq_length)).to(case.device)
    blocks = blocks.repeat_interleave(case.shape.heads // p.num_kv_heads, 0)[None]
    diagonal = torch.eye(blocks.shape[-1], dtype=torch.bool, device=case.device).expand_as(blocks)

    def counts_and_indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *counts_and_indices(diagonal),
        *counts_and_indices(blocks & ~diagonal),
        BLOCK_SIZE=p.block_size,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(case.seq_length, case.seq_length),
    )


def flex_options(case: Case, backend: str | None = None) -> tuple[str | None, dict[str, object]]:
    """Returns how FlexAttention is compiled and its options: on a GPU its own tiles, warps and stages, the
    fastest of those that it measures.

    Tiles larger than the mask's blocks it refuses; all that it would measure are, for blocks below 64, so
    that their tiles are given and only warps and stages measured.
    """
    if case.device != "cuda":
        return None, {}
    options = {"BACKEND": backend} if backend else {}
    if case.pattern.block_size < 64:
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options |= dict.fromkeys(names, case.pattern.block_size)
    return "max-autotune-no-cudagraphs", options


def _flex(case: Case, backend: str | None = None) -> Attention:
    torch.compiler.reset()  # earlier lengths count towards the limit of recompilations
    mode, options = flex_options(case, backend)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)
    mask = flex_block_mask(case)
    forward_only = case.device in IMPLEMENTATIONS["flex"].forward_only

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Where it has no backward, it refuses inputs that require gradients.
        q, k, v = (x.detach() if forward_only else x for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options or None).transpose(
            1, 2
        )

    return attention


def _no_compiler(case: Case) -> str | None:
    if case.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler, which FlexAttention needs on the CPU"
    return None


def _no_flash_backend(case: Case) -> str | None:
    """Its backend of FlashAttention-4 needs a package of its own."""
    try:
        found = importlib.util.find_spec("flash_attn.cute")
    except ImportError:  # there is none, or it is of another PyTorch
        found = None
    return None if found else "FlexAttention's FLASH backend: the package flash-attn-4 is not installed"


def _dkernel(case: Case) -> Attention:
    from dkernel import SparseAttention

    p, group = case.pattern, case.shape.heads // case.pattern.num_kv_heads
    blocks = p.block_mask(p.num_blocks(case.seq_length)).repeat_interleave(group, 0)
    attend = SparseAttention(p.block_size, blocks, seq_dim=1).to(case.device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:  # its training kernels need as many KV heads as query heads
            k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        return attend(q, k, v)

    return attention


def _no_dkernel(case: Case) -> str | None:
    return None if importlib.util.find_spec("dkernel") else "the package dkernel is not installed"


_ALL = (
    Implementation("s2-torch", ("cpu",), partial(_s2, "torch"), ours=True),
    Implementation("s2-triton", ("cuda",), partial(_s2, "triton"), ours=True),
    Implementation("sdpa", ("cpu",), _sdpa, sparse=False),
    _forced_sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    _forced_sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    Implementation("flex", ("cpu", "cuda"), _flex, missing=_no_compiler, forward_only=("cpu",)),
    Implementation("flex-flash", ("cuda",), partial(_flex, backend="FLASH"), missing=_no_flash_backend),
    Implementation("dkernel", ("cuda",), _dkernel, missing=_no_dkernel),
)
IMPLEMENTATIONS = {implementation.name: implementation for implementation in _ALL}
DENSE = [implementation.name for implementation in _ALL if not implementation.sparse]


def names_on(device: str) -> list[str]:
    return [name for name, implementation in IMPLEMENTATIONS.items() if device in implementation.devices]
