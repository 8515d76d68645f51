"""Attention through the cache equals attention to the whole sequence: in one call, in chunks, by token."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from attention_cases import s2
from ranks import run_on_ranks
from selection import exhaustive

from megatron_s2 import s2_attention
from megatron_s2.kernels.compare import require_as_exact_as_plain, require_equal
from megatron_s2.kernels.reference import masked_attention, visible_tokens
from megatron_s2.kv_cache.cache import KVCache, cache_bytes, dense_cache_bytes
from megatron_s2.kv_cache.cached_attention import cached_attention
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.pattern import S2Pattern


@dataclass(frozen=True)
class Generation:
    """Sequences that are fed to a cache in steps.

    Args:
        steps: number of new tokens of each row in each step.
    """

    name: str
    steps: tuple[tuple[int, ...], ...]
    pattern: S2Pattern = field(default_factory=lambda: s2(num_kv_heads=2))
    group: int = 2
    kv_group: int = 1  # heads of the pattern that share a KV head: more than one are query heads
    dim: int = 16
    sink_logits: bool = False
    softmax_scale: float | None = None
    max_tokens: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def lengths(self) -> list[int]:
        return [sum(step[row] for step in self.steps) for row in range(len(self.steps[0]))]

    def inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        draw = torch.Generator().manual_seed(0)
        batch, longest, H = len(self.lengths), max(self.lengths), self.pattern.num_kv_heads
        kv_heads = H // self.kv_group
        q, k, v = (
            torch.randn(batch, longest, heads, self.dim, generator=draw, dtype=torch.float64).to(dtype)
            for heads in (H * self.group, kv_heads, kv_heads)
        )
        sinks = torch.randn(H * self.group, generator=draw, dtype=torch.float64).to(dtype)
        return q, k, v, sinks if self.sink_logits else None

    def fed(self, dtype: torch.dtype, group: ContextParallelGroup | None = None) -> torch.Tensor:
        """Outputs of the real tokens, row after row, computed through the cache."""
        q, k, v, sinks = self.inputs(dtype)
        batch = len(self.lengths)
        kv_heads = k.shape[2]
        given = {"max_tokens": self.max_tokens, "num_kv_heads": kv_heads, "group": group}
        cache = KVCache(self.pattern, batch, self.dim, dtype, **given)
        outs, done = [[] for _ in range(batch)], [0] * batch
        for step in self.steps:
            padded = []
            for x in (q, k, v):
                rows = x.new_full((batch, max(step), *x.shape[2:]), float("nan"))
                for row, new in enumerate(step):
                    rows[row, :new] = x[row, done[row] : done[row] + new]
                padded.append(rows)
            out = cached_attention(*padded, cache, self.softmax_scale, sinks, new=step)
            for row, new in enumerate(step):
                outs[row].append(out[row, :new])
                assert not out[row, new:].any()
                done[row] += new
            assert cache.lengths == done
            assert cache.bytes == sum(cache_bytes(cache.pattern, n, self.dim, dtype) for n in done)
            assert cache.dense_bytes == sum(dense_cache_bytes(kv_heads, n, self.dim, dtype) for n in done)
        return torch.cat([part for row in outs for part in row])

    def recomputed(self, dtype: torch.dtype, attention) -> torch.Tensor:
        """The same outputs, computed from whole sequences."""
        q, k, v, sinks = self.inputs(dtype)
        rows = [[x[row : row + 1, :length] for x in (q, k, v)] for row, length in enumerate(self.lengths)]
        return torch.cat([attention(*row, sinks)[0] for row in rows])

    def with_everything(self, q, k, v, sinks) -> torch.Tensor:
        return s2_attention(
            q, k, v, self.pattern, self.softmax_scale, sinks, return_lse=False, backend="reference"
        )

    def plain(self, q, k, v, sinks) -> torch.Tensor:
        k, v = (x.repeat_interleave(self.kv_group, 2) for x in (k, v))
        visible = visible_tokens(self.pattern, q.shape[1], k.shape[1], [(0, q.shape[1])], 0)
        return masked_attention(q, k, v, visible, self.softmax_scale or self.dim**-0.5, sinks)[0]


def decoded(*prompts: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    return prompts, *[(1,) * len(prompts)] * tokens


GENERATIONS = [
    Generation("shorter than the window", decoded(5, tokens=3)),
    Generation("across the window's end", decoded(29, tokens=40)),
    Generation("much longer than the window", decoded(230, tokens=20)),
    Generation("no prompt", ((1,),) * 70),
    Generation("whole blocks", ((32,), (64,), (16,), *((1,),) * 18)),
    Generation("in chunks", ((7,), (50,), (3,), (90,), (1,), (2,))),
    Generation("unequal batch", decoded(3, 100, 33, 16, tokens=20)),
    Generation("unequal chunks", ((3, 0, 40), (20, 70, 1), (1, 1, 1), (5, 30, 0), (0, 1, 1), (1, 0, 1))),
    Generation("a dense head", decoded(100, 7, tokens=20), s2(3, num_dense_heads=1)),
    Generation("dense heads first", ((40, 90), (70, 3), (1, 1)), s2(4, vert_stride=(1, 1, 4, 3))),
    Generation("window only", decoded(70, 7, tokens=20), s2(2, vert_stride=0)),
    Generation("window only mixed", decoded(100, 7, tokens=20), s2(3, vert_stride=(0, 4, 1), sink_blocks=1)),
    Generation("a dense layer", ((40, 90), (70, 3), (1, 1)), s2(2, vert_stride=1)),
    Generation("sinks", ((130,), (20,), (1,), (1,)), s2(2, sink_blocks=2)),
    Generation("one block window", ((90,), (33,), *((1,),) * 20), s2(2, local_blocks=1)),
    Generation("sink logits", ((90, 5), (33, 20), (1, 1), (1, 0)), sink_logits=True),
    Generation("scale", ((90,), (33,), (1,)), softmax_scale=0.7),
    Generation("no groups", ((90,), (33,), (1,)), s2(4), group=1),
    Generation(
        "query heads",
        ((90, 7), (33, 40), (1, 1), (1, 1)),
        s2(4, vert_stride=(4, 3, 1, 4), phases=(0, 2, 0, 3)),
        group=1,
        kv_group=2,
    ),
    Generation("known maximum", ((90, 60), (1, 1), (20, 50)), max_tokens=111),
]


@pytest.fixture(params=GENERATIONS, ids=str)
def generation(request) -> Generation:
    return request.param


def test_equals_the_reference_in_float64(generation):
    got = generation.fed(torch.float64)
    exact = generation.recomputed(torch.float64, generation.with_everything)
    require_equal({"out": got}, {"out": exact})


def fed_on_rank(rank: int) -> dict[str, torch.Tensor]:
    group = ContextParallelGroup(dist.group.WORLD)
    return {case.name: case.fed(torch.float64, group) for case in GENERATIONS}


@pytest.mark.parametrize("ranks", [2, *exhaustive(3, 4)])
def test_equals_the_reference_if_the_cache_is_spread_over_ranks(ranks, tmp_path):
    """On every rank, which also checks its bytes after each step."""
    results = run_on_ranks(ranks, fed_on_rank, tmp_path)
    for case in GENERATIONS:
        exact = case.recomputed(torch.float64, case.with_everything)
        require_equal({"out": results[0][case.name]}, {"out": exact})
        assert all(torch.equal(result[case.name], results[0][case.name]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_is_as_exact_as_plain_pytorch(generation, dtype):
    require_as_exact_as_plain(
        got={"out": generation.fed(dtype)},
        plain={"out": generation.recomputed(dtype, generation.plain)},
        exact={
            "out": torch.cat(
                [
                    generation.with_everything(
                        *(x[row : row + 1, :length].double() for x in generation.inputs(dtype)[:3]),
                        generation.inputs(dtype)[3].double() if generation.sink_logits else None,
                    )[0]
                    for row, length in enumerate(generation.lengths)
                ]
            )
        },
    )


def test_queries_that_do_not_fit_are_refused():
    cache = KVCache(s2(2), 1, 16)
    q, k = torch.zeros(1, 3, 5, 16), torch.zeros(1, 3, 2, 16)
    with pytest.raises(ValueError, match=r"^q \(1, 3, 5, 16\): must be \[batch, tokens, heads, head_dim\]"):
        cached_attention(q, k, k, cache)


@pytest.mark.parametrize("name", ["q", "k", "v", "sink_logits"])
def test_recorded_gradients_are_refused(name):
    """They would be lost in silence; the cache keeps what it had."""
    cache = KVCache(s2(2), 1, 16)
    given = {x: torch.randn(1, 3, heads, 16) for x, heads in (("q", 4), ("k", 2), ("v", 2))}
    given |= {"sink_logits": torch.zeros(4)}
    given[name].requires_grad_()
    message = f"^{name}: must not require gradients with a KV cache, which passes none on"
    with pytest.raises(ValueError, match=message):
        cached_attention(cache=cache, **given)
    if name in ("k", "v"):
        with pytest.raises(ValueError, match=message):
            cache.append(given["k"], given["v"])
    assert cache.lengths == [0]
    with torch.no_grad():
        assert cached_attention(cache=cache, **given).isfinite().all()
