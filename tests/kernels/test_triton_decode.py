"""Specification of decoding in Triton: it equals plain attention to the entries of each head.

Run as `test_triton.py` is. Storage behind the entries of a head is NaN.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from attention_cases import s2
from selection import thinned
from triton_cases import DEVICE, INTERPRETED, LOW_PRECISION, on_device

from megatron_s2 import S2Pattern, s2_attention
from megatron_s2.kernels.compare import require_as_exact_as_plain, require_equal
from megatron_s2.kernels.reference import masked_attention
from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.cached_attention import cached_attention


@dataclass(frozen=True)
class Decoding:
    """One token of each sequence.

    Args:
        kept: number of keys of each KV head of each sequence.
        capacities: capacity of each KV head of each storage, in keys.
    """

    special: str
    kept: tuple[tuple[int, ...], ...]
    capacities: tuple[tuple[int, ...], ...] = ((600, 600),)
    group: int = 4
    dim: int = 16
    sink_logits: bool = False
    layout: str = "batch first"

    def __str__(self) -> str:
        H = len(self.kept[0])
        return f"B{len(self.kept)}-H{H}-HQ{H * self.group}-D{self.dim}-{self.special}"

    def inputs(self, dtype: torch.dtype) -> dict:
        """Arguments of `decode_attention`."""
        draw = torch.Generator().manual_seed(0)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(DEVICE, dtype)

        batch, heads = len(self.kept), len(self.kept[0]) * self.group
        if self.layout == "head_dim apart":
            q = tensor(batch, self.dim, heads).transpose(1, 2)
        else:
            q = tensor(heads, batch, self.dim).transpose(0, 1)
        storages, first = [], 0
        for capacities in self.capacities:
            pair = [tensor(batch, len(capacities), capacities[0], self.dim) for _ in range(2)]
            for x in pair:
                for row, kept in enumerate(self.kept):
                    for i in range(len(capacities)):
                        x[row, i, kept[first + i] :] = float("nan")
            storages.append(pair)
            first += len(capacities)
        sinks = tensor(heads) if self.sink_logits else None
        kept = torch.tensor(self.kept, dtype=torch.int32, device=DEVICE)
        return {"q": q, "storages": storages, "kept": kept, "softmax_scale": 0.3, "sink_logits": sinks}

    def plain(self, dtype: torch.dtype, compute: torch.dtype) -> torch.Tensor:
        """Plain PyTorch, head by head."""
        given = self.inputs(dtype)
        out = torch.zeros(given["q"].shape, dtype=compute, device=DEVICE)
        q = given["q"].to(compute)
        heads = [(storage, i) for storage in given["storages"] for i in range(storage[0].shape[1])]
        for row, counts in enumerate(self.kept):
            for g, ((storage, i), kept) in enumerate(zip(heads, counts)):
                if kept:
                    rows = slice(g * self.group, (g + 1) * self.group)
                    keys = (x[row, i, None, :kept, None].to(compute) for x in storage)
                    sinks = given["sink_logits"]
                    out[row, rows] = masked_attention(
                        q[row, None, None, rows],
                        *keys,
                        torch.ones(1, 1, kept, dtype=torch.bool, device=DEVICE),
                        given["softmax_scale"],
                        None if sinks is None else sinks[rows].to(compute),
                    )[0]
        return out


CASES = [
    *(Decoding(f"{n} keys", ((n, 1), (1, n))) for n in (1, 127, 128, 129)),
    *(Decoding(f"{n} keys", ((n,),), ((600,),), group=1) for n in (255, 256, 257, 600)),
    Decoding("unequal rows", ((300, 5), (1, 257), (513, 512))),
    Decoding("a sequence without keys", ((0, 0), (130, 7)), sink_logits=True),
    Decoding("no keys and no sink", ((0, 0), (130, 7))),
    Decoding("sink logits", ((300, 17),), sink_logits=True),
    Decoding("several storages", ((40, 37, 590, 9), (5, 7, 33, 80)), ((64, 64), (600,), (80,)), group=2),
    Decoding("dense head", ((40, 41, 42, 1100),), ((48, 48, 48), (1100,)), group=5, sink_logits=True),
    Decoding("many splits", ((8300,),), ((8704,),), group=1),
    Decoding("no groups", ((270, 3),), group=1),
    Decoding("a group of 5", ((270, 3),), group=5),
    Decoding("a group of 20", ((270, 3),), group=20),
    *(Decoding("head_dim", ((270, 3),), ((288, 288),), dim=dim) for dim in (11, 64, 80, 128, 256)),
    Decoding("head_dim apart", ((270, 3), (5, 30)), layout="head_dim apart"),
]  # fmt: skip


@on_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_equals_plain_attention(case):
    from megatron_s2.kernels.triton_decode import decode_attention

    exact = case.plain(torch.float32, torch.float64)
    out = decode_attention(**case.inputs(torch.float32))
    assert out.dtype == torch.float32 and out.is_contiguous()
    require_equal({"out": out}, {"out": exact}, most=1e-5)
    assert not out[[not any(kept) for kept in case.kept]].any()


@on_device
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "case", thinned(CASES, lambda case: not INTERPRETED or case.special in ("runs", "dense head")), ids=str
)
def test_low_precision_is_as_exact_as_plain_pytorch(case, dtype):
    from megatron_s2.kernels.triton_decode import decode_attention

    out = decode_attention(**case.inputs(dtype))
    assert out.dtype == dtype
    plain, exact = ({"out": case.plain(dtype, compute)} for compute in (dtype, torch.float64))
    require_as_exact_as_plain({"out": out}, plain, exact)


@on_device
def test_splits_do_not_depend_on_the_number_of_entries():
    """The bits of a head therefore do not depend on other sequences and heads."""
    from megatron_s2.kernels.triton_decode import decode_attention

    given = Decoding("", ((300, 17), (290, 40))).inputs(torch.float32)
    both = decode_attention(**given)
    given["kept"][1] = 3
    assert torch.equal(decode_attention(**given)[0], both[0])


@on_device
def test_returns_the_log_sum_exp_of_the_keys():
    """Of keys in several splits, and without any; a sink has no part in it."""
    from megatron_s2.kernels.triton_decode import decode_attention

    case = Decoding("lse", ((300, 17), (0, 256)), group=2, sink_logits=True)
    given = case.inputs(torch.float32)
    out, lse = decode_attention(**given, return_lse=True)
    assert torch.equal(out, decode_attention(**given))
    [(k, _)], q = given["storages"], given["q"].double()
    for row, counts in enumerate(case.kept):
        for g, kept in enumerate(counts):
            heads = slice(g * case.group, (g + 1) * case.group)
            exact = (q[row, heads] @ k[row, g, :kept].double().T * 0.3).logsumexp(-1)
            torch.testing.assert_close(lse[row, heads].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("capacities", "batch", "span"),
    [
        ([100], 1, 256),
        ([8192] * 8, 1, 256),
        ([131072] * 8, 1, 4096),
        ([8192] * 7 + [131072], 1, 768),
        ([8192] * 8, 5, 1280),
        ([8192] * 8, 64, 16384),
    ],
)
def test_there_are_about_256_splits(capacities, batch, span):
    from megatron_s2.kernels.triton_decode import split_span

    assert split_span(capacities, batch) == span
    programs = batch * sum(-(-capacity // span) for capacity in capacities)
    assert programs <= 256 + batch * len(capacities)


def test_a_tile_has_16_kib_of_keys():
    from megatron_s2.kernels.triton_decode import decode_tiles

    cut = {(dim, size): decode_tiles(dim, 4, size).keys for dim in (16, 64, 80, 256) for size in (2, 4)}
    assert cut == {
        (16, 2): 128, (16, 4): 128, (64, 2): 128, (64, 4): 64, (80, 2): 64, (80, 4): 32, (256, 2): 32,
        (256, 4): 16,
    }  # fmt: skip
    assert [decode_tiles(64, group, 2).rows for group in (1, 16, 17, 40)] == [16, 16, 32, 64]


# Through the cache.


@pytest.fixture
def calls(monkeypatch):
    """Number of calls of each entry to the Triton kernels."""
    from megatron_s2.kernels import triton_decode
    from megatron_s2.kernels.triton_slice import TritonSlice

    found = Counter()

    def counting(name, function):
        def counted(*args):
            found[name] += 1
            return function(*args)

        return counted

    for home, name in ((triton_decode, "decode_attention"), (TritonSlice, "forward")):
        monkeypatch.setattr(home, name, counting(name, getattr(home, name)))
    return found


STEPS = ((33, 70), (1, 1), (1, 0), (90, 3), (0, 1), (1, 1), (5, 40), (1, 1))


def fed(pattern: S2Pattern, q, k, v, sinks, backend: str) -> list[torch.Tensor]:
    """Outputs of each row's tokens, fed step by step."""
    cache = KVCache(pattern, len(STEPS[0]), k.shape[-1], k.dtype, k.device)
    outs, done = [[] for _ in STEPS[0]], [0] * len(STEPS[0])
    for step in STEPS:
        new = []
        for x in (q, k, v):
            padded = x.new_full((len(step), max(step), *x.shape[2:]), float("nan"))
            for row, count in enumerate(step):
                padded[row, :count] = x[row, done[row] : done[row] + count]
            new.append(padded)
        out = cached_attention(*new, cache, sink_logits=sinks, new=step, backend=backend)
        for row, count in enumerate(step):
            outs[row].append(out[row, :count])
            assert not out[row, count:].any()
            done[row] += count
        if backend == "triton":
            poison_spare(cache)
    return [torch.cat(row) for row in outs]


def poison_spare(cache: KVCache) -> None:
    for storage in cache.storages:
        for row in range(cache.batch):
            for i, g in enumerate(storage.heads):
                for x in (storage.k, storage.v):
                    x[row, i, cache.own(row, g) :] = float("nan")


CACHED = {
    "s2": s2(),
    "dense head first": s2(4, vert_stride=(1, 4, 4, 3), sink_blocks=1),
    "window of one block": s2(3, local_blocks=1, num_dense_heads=1),
    "window only mixed": s2(3, vert_stride=(0, 4, 1), sink_blocks=1),
}


@on_device
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "name", thinned(CACHED, lambda name: not INTERPRETED or name == "window of one block")
)
def test_attention_through_the_cache_equals_recomputing(name, backend, calls):
    pattern = CACHED[name]
    draw = torch.Generator().manual_seed(0)
    lengths = [sum(row) for row in zip(*STEPS)]
    H = pattern.num_kv_heads
    q, k, v = (
        torch.randn(len(lengths), max(lengths), heads, 16, generator=draw).to(DEVICE)
        for heads in (2 * H, H, H)
    )
    sinks = torch.randn(2 * H, generator=draw).to(DEVICE)
    got = fed(pattern, q, k, v, sinks, backend)
    for row, length in enumerate(lengths):
        exact = s2_attention(
            *(x[row : row + 1, :length].double() for x in (q, k, v)), pattern, sink_logits=sinks.double(),
            return_lse=False, backend="reference",
        )  # fmt: skip
        require_equal({"out": got[row]}, {"out": exact[0]}, most=1e-5)
    # Four times tokens follow cached ones, with a pass over the window and one over the shard.
    decoded = sum(max(step) == 1 for step in STEPS)
    assert calls == ({"decode_attention": decoded, "forward": 8} if backend == "triton" else {})


@on_device
def test_a_token_reads_what_sequences_share(calls):
    pattern, draw = s2(2, local_blocks=1, vert_stride=(1, 4)), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 90, heads, 16, generator=draw).to(DEVICE) for heads in (4, 2, 2))
    q, k, v = (torch.cat([x[:1, :80].expand(3, -1, -1, -1), x[:, 80:]], 1) for x in (q, k, v))
    cache = KVCache(pattern, 1, 16, device=DEVICE)
    cached_attention(q[:1, :80], k[:1, :80], v[:1, :80], cache, backend="torch")
    cache, outs = cache.fork([0, 0, 0]), []
    poison_spare(cache)
    for t in (80, 81):
        outs.append(cached_attention(*(x[:, t : t + 1] for x in (q, k, v)), cache, backend="triton"))
    assert calls == {"decode_attention": 2}
    exact = s2_attention(*(x[:, :82].double() for x in (q, k, v)), pattern, backend="reference")[0]
    require_equal({"out": torch.cat(outs, 1)}, {"out": exact[:, 80:]}, most=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backend": "cuda"}, "backend 'cuda': must be auto, reference, torch or triton"),
        ({"backend": "triton"}, "q torch.float64: must be float16, .* use backend torch"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits \(3,\): must be \[heads\] = \[4\]"),
        ({"q": torch.zeros(1, 1, 4, 16)}, "q torch.float32: must have the cache's torch.float64"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_refused_before_the_cache_changes(changed, message):
    cache = KVCache(s2(), 1, 16, torch.float64)
    q, k = (torch.zeros(1, 1, heads, 16, dtype=torch.float64) for heads in (4, 2))
    with pytest.raises(ValueError, match=f"^{message}"):
        cached_attention(**{"q": q, "k": k, "v": k, "cache": cache} | changed)
    assert cache.lengths == [0]
