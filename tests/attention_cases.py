"""One call of `s2_attention`, with its inputs and everything to compare its results with."""

from dataclasses import dataclass

import torch

from megatron_s2 import BlockMaskPattern, S2Pattern, s2_attention
from megatron_s2.kernels.compare import Results, attention_results
from megatron_s2.kernels.reference import masked_attention, visible_tokens
from megatron_s2.kernels.tuning import Tuning
from megatron_s2.pattern import BlockPattern


def s2(num_kv_heads=2, local_blocks=2, vert_stride=4, block_size=16, **others) -> S2Pattern:
    return S2Pattern(num_kv_heads, block_size, local_blocks, vert_stride, warn_lost=False, **others)


def random_mask(num_kv_heads: int, blocks: int, block_size: int = 16) -> BlockMaskPattern:
    mask = torch.rand(num_kv_heads, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.3
    return BlockMaskPattern((mask | torch.eye(blocks, dtype=torch.bool)).tril(), block_size)


@dataclass(frozen=True)
class Case:
    """One call of s2_attention; lengths in tokens. With `kv_group` the heads of the pattern are query heads,
    each so many of which share a KV head."""

    pattern: BlockPattern
    special: str = ""
    batch: int = 2
    queries: int = 111
    group: int = 2
    kv_group: int = 1
    dim: int = 16
    v_dim: int | None = None
    q_start: int = 0
    unused_keys: int = 0
    documents: tuple[int, ...] | None = None
    sink_logits: bool = False
    softmax_scale: float | None = None
    layout: str = "batch first"
    device: str = "cpu"
    tuning: Tuning | None = None

    def __str__(self) -> str:
        name = f"B{self.batch}-T{self.queries}-H{self.kv_heads}-HQ{self.heads}-D{self.dim}"
        return f"{name}-{self.special}" if self.special else name

    @property
    def kv_heads(self) -> int:
        return self.pattern.num_kv_heads // self.kv_group

    @property
    def heads(self) -> int:
        return self.pattern.num_kv_heads * self.group

    @property
    def keys(self) -> int:
        return self.q_start + self.queries + self.unused_keys

    def inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        """q, k, v, sink_logits, dout and dlse, from a fixed seed."""
        H, HQ, v_dim = self.kv_heads, self.heads, self.v_dim or self.dim
        draw = torch.Generator().manual_seed(0)

        def tensor(tokens: int, heads: int, dim: int) -> torch.Tensor:
            batch = () if self.documents else (self.batch,)
            if self.layout == "sequence first":
                x = torch.randn(tokens, *batch, heads, dim, generator=draw, dtype=torch.float64)
                return x.to(dtype).transpose(0, 1)
            if self.layout == "head_dim apart":
                x = torch.randn(*batch, tokens, dim, heads, generator=draw, dtype=torch.float64)
                return x.to(dtype).transpose(-1, -2)
            return torch.randn(*batch, tokens, heads, dim, generator=draw, dtype=torch.float64).to(dtype)

        q, k, v = (
            tensor(*shape)
            for shape in ((self.queries, HQ, self.dim), (self.keys, H, self.dim), (self.keys, H, v_dim))
        )
        dout = tensor(self.queries, HQ, v_dim)
        sink_logits = torch.randn(HQ, generator=draw, dtype=torch.float64).to(dtype)
        dlse = tensor(self.queries, HQ, 1)[..., 0].transpose(-1, -2)
        inputs = {"q": q, "k": k, "v": v, "sink_logits": sink_logits, "dout": dout, "dlse": dlse}
        inputs = {name: x.to(self.device) for name, x in inputs.items()}
        return inputs if self.sink_logits else inputs | {"sink_logits": None}

    def attention(self, backend: str):
        """s2_attention as a function of the tensors alone."""
        cu_seqlens = None if self.documents is None else torch.tensor(self.documents)

        def attend(q, k, v, sink_logits):
            return s2_attention(
                q,
                k,
                v,
                self.pattern,
                softmax_scale=self.softmax_scale,
                sink_logits=sink_logits,
                cu_seqlens=cu_seqlens,
                q_start=self.q_start,
                backend=backend,
                tuning=self.tuning if backend == "triton" else None,
            )

        return attend

    def plain_attention(self, q, k, v, sink_logits):
        """What anyone would write in PyTorch, in the dtype of the inputs."""
        packed = self.documents is not None
        if packed:
            q, k, v = q[None], k[None], v[None]
        documents = list(zip(self.documents, self.documents[1:])) if packed else [(0, self.queries)]
        k, v = (x.repeat_interleave(self.kv_group, 2) for x in (k, v))
        visible = visible_tokens(self.pattern, q.shape[1], k.shape[1], documents, self.q_start).to(q.device)
        scale = self.softmax_scale or self.dim**-0.5
        out, lse = masked_attention(q, k, v, visible, scale, sink_logits)
        return (out[0], lse[0]) if packed else (out, lse)

    def results(self, backend: str, dtype=torch.float64, out=True, lse=True) -> Results:
        """Results and gradients, those that come through `out` and those that come through `lse`."""
        inputs = self.inputs(dtype)
        inputs |= ({} if out else {"dout": None}) | ({} if lse else {"dlse": None})
        attend = self.plain_attention if backend == "plain" else self.attention(backend)
        return attention_results(attend, **inputs)


def of_query_heads(kv_group: int, special: str, **fields) -> Case:
    """A case whose pattern has a head for each query head; the heads of a group see different blocks."""
    heads = 2 * kv_group
    strides = tuple((4, 3, 1, 0)[h % 4] for h in range(heads))
    pattern = s2(heads, vert_stride=strides, phases=tuple(range(heads)), sink_blocks=1)
    return Case(pattern, f"query heads {special}", group=1, kv_group=kv_group, **fields)


def packed(*lengths: int) -> dict:
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return {"batch": 1, "queries": offsets[-1], "documents": tuple(offsets)}
