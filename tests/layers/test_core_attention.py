"""S2CoreAttention, built alone: Megatron's shapes, the reference's values, stock attention where dense."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from largest_tensor import LargestTensor
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_s2 import s2_attention
from megatron_s2.layers import core_attention
from megatron_s2.layers.config import S2TransformerConfig
from megatron_s2.layers.core_attention import S2CoreAttention
from megatron_s2.parallel import planner
from megatron_s2.parallel.time_model import Cluster
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.annealing import Annealing

HEADS, KV_HEADS, DIM, BATCH = 4, 2, 16, 2
SPARSE, DENSE = 1, 2  # numbers of layers
SETTINGS = S2Settings(
    num_layers=3,
    num_kv_heads=KV_HEADS,
    block_size=16,
    local_blocks=2,
    vert_stride=3,
    sink_blocks=1,
    dense_layers=(DENSE,),
)
OURS = partial(S2CoreAttention, settings=SETTINGS)
both_kinds = pytest.mark.parametrize("layer", [SPARSE, DENSE], ids=["sparse", "dense"])


def config(config_class=TransformerConfig, **fields) -> TransformerConfig:
    plain = {"num_layers": 3, "hidden_size": HEADS * DIM, "num_attention_heads": HEADS}
    return config_class(**plain | {"num_query_groups": KV_HEADS, "attention_dropout": 0.0} | fields)


@pytest.fixture
def attention(one_rank):
    """Builds the core attention of a layer."""
    groups = one_rank

    def build(layer: int = SPARSE, kind=OURS, **fields):
        contract = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "pg_collection": groups}
        contract |= {name: fields.pop(name) for name in ("attention_type", "softmax_scale") if name in fields}
        return kind(config=config(**fields), layer_number=layer, **contract)

    return build


@pytest.fixture
def stock(attention):
    """Builds Megatron's own core attention."""
    return partial(attention, kind=DotProductAttention)


def tensors(tokens: int, *batch: int, dtype=torch.float64, keys: int | None = None) -> list[torch.Tensor]:
    """Query, key and value as Megatron has them after the rotary embedding, from a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(tokens, HEADS), (keys or tokens, KV_HEADS), (keys or tokens, KV_HEADS)]
    return [
        torch.randn(length, *batch, heads, DIM, generator=draw, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for length, heads in shapes
    ]


def expected(layer: int, q, k, v, **others) -> torch.Tensor:
    """The reference on `[batch, seq, heads, head_dim]`, in Megatron's layout."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, _ = s2_attention(q, k, v, SETTINGS.pattern(layer), backend="reference", **others)
    return out.transpose(0, 1).flatten(2)


def causal_mask(tokens: int) -> torch.Tensor:
    """Megatron's: true where attention is forbidden."""
    return torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu(1)


def packed(*lengths: int, padded: tuple[int, ...] | None = None) -> PackedSeqParams:
    def ends(sizes):
        return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    real, held = ends(lengths), None if padded is None else ends(padded)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=held,
        cu_seqlens_kv_padded=held,
    )


def outcome(module, inputs, **call) -> list[torch.Tensor]:
    """The output, and the gradients of inputs and parameters under a fixed upstream gradient."""
    out = module(*inputs, call.pop("mask", None), **call)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [
        out,
        *torch.autograd.grad(out, [*inputs, *module.parameters()], upstream.to(out.dtype)),
    ]


def assert_equal(got: torch.Tensor, exact: torch.Tensor, relative: float = 1e-10) -> None:
    assert got.shape == exact.shape
    assert (got - exact).abs().max() <= relative * exact.abs().max()


# Values.


@both_kinds
@pytest.mark.parametrize("tokens", [128, 111, 7])
def test_a_batch_is_attended_as_the_reference_does(attention, layer, tokens):
    q, k, v = tensors(tokens, BATCH)
    out = attention(layer)(q, k, v, None)
    assert out.shape == (tokens, BATCH, HEADS * DIM)
    assert_equal(out, expected(layer, q, k, v))


@both_kinds
def test_packed_documents_are_attended_one_by_one(attention, layer):
    q, k, v = tensors(120)
    out = attention(layer)(q, k, v, None, packed_seq_params=packed(50, 3, 67))
    assert out.shape == (120, HEADS * DIM)
    alone = [
        expected(layer, *(x[start:stop, None] for x in (q, k, v)))[:, 0]
        for start, stop in ((0, 50), (50, 53), (53, 120))
    ]
    assert_equal(out, torch.cat(alone))


def test_padded_documents_begin_where_their_padding_says(attention):
    q, k, v = tensors(128)
    padded = attention()(q, k, v, None, packed_seq_params=packed(50, 60, padded=(64, 64)))
    assert_equal(padded, attention()(q, k, v, None, packed_seq_params=packed(64, 64)))


@both_kinds
def test_the_softmax_scale_is_megatrons(attention, layer):
    q, k, v = tensors(64, BATCH)
    out = attention(layer, softmax_scale=0.5)(q, k, v, None)
    assert_equal(out, expected(layer, q, k, v, softmax_scale=0.5))


@both_kinds
@pytest.mark.parametrize("queries", [1, 5, 16])
def test_in_inference_the_queries_are_the_last_positions(attention, layer, queries):
    q, k, v = tensors(100, BATCH)
    out = attention(layer)(q[-queries:], k, v, None)
    assert_equal(out, expected(layer, q, k, v)[-queries:])


@both_kinds
def test_a_single_query_needs_no_mask(attention, layer):
    q, k, v = tensors(100, BATCH)
    one = attention(layer)(q[-1:], k, v, None, attn_mask_type=AttnMaskType.no_mask)
    assert_equal(one, expected(layer, q, k, v)[-1:])


@pytest.mark.parametrize(("autotune", "tuning"), [(False, None), (True, "autotune")])
def test_tiles_are_measured_where_asked_for(attention, monkeypatch, autotune, tuning):
    asked = []

    def recorded(*args, **options):
        asked.append(options["tuning"])
        return s2_attention(*args, **options)

    monkeypatch.setattr(core_attention, "s2_attention", recorded)
    attention(kind=partial(OURS, autotune=autotune))(*tensors(32, BATCH), None)
    assert asked == [tuning]


def test_each_layer_has_its_own_pattern(attention):
    assert [attention(n).pattern for n in (1, 2, 3)] == [
        SETTINGS.pattern(n).slice_heads(0, KV_HEADS) for n in (1, 2, 3)
    ]
    assert attention(1).pattern != attention(3).pattern


def test_a_tensor_parallel_rank_computes_its_heads_of_the_whole(attention, second_of_two_ranks):
    layer = S2CoreAttention(
        config(softmax_type="learnable"),
        SPARSE,
        AttnMaskType.causal,
        "self",
        pg_collection=second_of_two_ranks,
        settings=SETTINGS,
    )
    assert layer.pattern == SETTINGS.pattern(SPARSE).slice_heads(1, 2)
    q, k, v = tensors(100, BATCH)
    whole = attention(softmax_type="learnable")(q, k, v, None)
    half = layer(q[:, :, HEADS // 2 :], k[:, :, 1:], v[:, :, 1:], None)
    assert_equal(half, whole[:, :, HEADS * DIM // 2 :])

    sinks = layer.sharded_state_dict("a.", metadata={"dp_cp_group": None})["a.softmax_offset"]
    assert (sinks.global_shape, sinks.global_offset) == ((HEADS,), (HEADS // 2,))


def test_a_tensor_parallel_rank_computes_its_query_heads_of_a_pattern_for_each(
    attention, second_of_two_ranks
):
    """Layer 1 has different phases in a group; layer 2 has not, and needs no copies of its keys."""
    entries = [{"local_blocks": 2, "strides": [3] * HEADS, "phases": p} for p in ([0, 1, 2, 0], [1, 1, 2, 2])]
    of_query_heads = S2Settings(2, KV_HEADS, 16, layers=entries, pattern_heads=HEADS)
    kind = partial(S2CoreAttention, settings=of_query_heads)
    assert [attention(n, kind).pattern.num_kv_heads for n in (1, 2)] == [HEADS, KV_HEADS]
    q, k, v = inputs = tensors(100, BATCH)
    whole = attention(1, kind)(*inputs, None)
    mask = of_query_heads.pattern(1).block_mask(7).repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert_equal(attention(1, kind)(q, k, v, None), whole)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k.repeat_interleave(HEADS // KV_HEADS, 2)) / DIM**0.5
    scores = scores.masked_fill(~(mask[:, :100, :100].tril()), float("-inf"))
    plain = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), v.repeat_interleave(HEADS // KV_HEADS, 2))
    assert_equal(whole, plain.flatten(2))

    rank = S2CoreAttention(
        config(),
        1,
        AttnMaskType.causal,
        "self",
        pg_collection=second_of_two_ranks,
        settings=of_query_heads,
    )
    half = rank(q[:, :, HEADS // 2 :], k[:, :, 1:], v[:, :, 1:], None)
    assert_equal(half, whole[:, :, HEADS * DIM // 2 :])


# Beside Megatron's DotProductAttention.


def test_a_dense_layer_is_stock_attention(attention, stock):
    inputs = tensors(111, BATCH, dtype=torch.float32)
    ours = outcome(attention(DENSE), inputs)
    theirs = outcome(stock(DENSE), inputs, mask=causal_mask(111))
    for got, exact in zip(ours, theirs):
        assert_equal(got, exact, relative=1e-5)


@pytest.mark.parametrize("softmax", ["off-by-one", "learnable"])
def test_sink_logits_are_megatrons(attention, stock, softmax):
    """Megatron draws learned ones, ours start at 0; with the same values, the same results and gradients."""
    ours, theirs = attention(DENSE, softmax_type=softmax), stock(DENSE, softmax_type=softmax)
    assert torch.equal(ours.softmax_offset, torch.zeros(HEADS))
    if softmax == "learnable":
        with torch.no_grad():
            for module in (ours, theirs):
                module.softmax_offset.copy_(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    inputs = tensors(64, BATCH, dtype=torch.float32)
    results = zip(outcome(ours, inputs), outcome(theirs, inputs, mask=causal_mask(64)), strict=True)
    for got, exact in results:
        assert_equal(got, exact, relative=1e-5)


@pytest.mark.parametrize("softmax", ["vanilla", "off-by-one", "learnable"])
def test_a_checkpoint_holds_what_megatrons_holds(attention, stock, softmax):
    call = {"prefix": "decoder.layers.0.", "metadata": {"dp_cp_group": None}}
    ours = attention(softmax_type=softmax).sharded_state_dict(**call)
    theirs = stock(softmax_type=softmax).sharded_state_dict(**call)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert (ours[key].key, ours[key].global_shape, ours[key].dtype) == (
            tensor.key,
            tensor.global_shape,
            tensor.dtype,
        )


def test_learned_sinks_are_split_over_ranks_as_megatrons(attention):
    sinks = attention(softmax_type="learnable").softmax_offset
    assert sinks.tensor_model_parallel and sinks.partition_dim == 0


# Memory.


@both_kinds
@pytest.mark.parametrize("documents", [None, (2048, 1500, 548)], ids=["batch", "packed"])
def test_no_tensor_is_of_size_seq_by_seq(attention, layer, documents):
    inputs = tensors(4096, *(() if documents else (1,)), dtype=torch.float32)
    boundaries = packed(*documents) if documents else None
    with LargestTensor() as largest:
        outcome(attention(layer), inputs, packed_seq_params=boundaries)
    # The upstream gradient of `outcome` is drawn in float64; S x S numbers of one head were 64 times that.
    assert largest.most <= 2 * inputs[0].nbytes


# Refusals.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_type": "cross"}, "attention_type cross: must be self"),
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1: must be 0 with S2 attention"),
    ],
    ids=str,
)
def test_what_is_not_causal_self_attention_is_refused(attention, fields, message):
    with pytest.raises(ValueError, match=message):
        attention(**fields)


@pytest.fixture
def over_two_ranks(attention, one_rank):
    one_rank.cp = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    return attention(context_parallel_size=2)


# Schedules of context parallelism.

STEPS = 6  # annealing steps: stride 1 from step 0, stride 2 from step 3, stride 3 from step 6


@pytest.fixture
def schedule_of(attention, one_rank, monkeypatch):
    """Calls a layer on rank 0 of 4 without any group; returns the pattern and schedule that it passes."""
    one_rank.cp = SimpleNamespace(rank=lambda: 0, size=lambda: 4)
    taken = []

    def recorded(q, k, v, pattern, group, schedule, **others):
        taken.append((pattern, schedule))
        return q

    monkeypatch.setattr(core_attention, "context_parallel_attention", recorded)

    def call(layer, tokens: int) -> tuple:
        layer(*tensors(tokens // 4, BATCH), None)
        return taken.pop()

    return call


def test_schedules_are_chosen_when_a_layer_is_built_for_every_stage(attention, schedule_of, monkeypatch):
    iteration = [0]
    annealing = Annealing(SETTINGS, STEPS, lambda: iteration[0])
    # On links so slow that only bytes count, the dense stage moves heads and later stages gather shards.
    kind = partial(OURS, annealing=annealing, cluster=Cluster(intra_gigabytes_per_s=1e-6))
    built = attention(kind=kind, config_class=S2TransformerConfig, context_parallel_size=4, seq_length=4096)
    monkeypatch.setattr(planner, "plan_schedule", None)
    schedules = {}
    for iteration[0] in range(STEPS + 1):
        pattern, schedule = schedule_of(built, 4096)
        assert pattern == built.pattern
        schedules.setdefault(pattern, set()).add(schedule)
    assert list(schedules.values()) == [{"a2a"}, {"gather"}, {"gather"}]


def test_a_length_that_is_unknown_when_a_layer_is_built_is_planned_once(attention, schedule_of, monkeypatch):
    built = attention(context_parallel_size=4)
    first = [schedule_of(built, tokens) for tokens in (64, 128)]
    monkeypatch.setattr(planner, "plan_schedule", None)
    assert [schedule_of(built, tokens) for tokens in (64, 128)] == first


def test_a_schedule_that_is_not_possible_is_refused_when_a_layer_is_built(attention, schedule_of):
    with pytest.raises(ValueError, match="--s2-cp-schedule a2a: must be auto or gather"):
        attention(
            kind=partial(OURS, cp_schedule="a2a"),
            config_class=S2TransformerConfig,
            context_parallel_size=8,
            seq_length=64,
        )


def test_packed_rows_dealt_out_in_another_way_are_refused_under_context_parallelism(over_two_ranks):
    with pytest.raises(ValueError, match="packed_seq_params: must come from megatron_s2's entry point"):
        over_two_ranks(*tensors(16), None, packed_seq_params=packed(16))


def test_generation_is_refused_under_context_parallelism(over_two_ranks):
    query, key, value = tensors(16, BATCH)
    with pytest.raises(ValueError, match="--context-parallel-size: must be 1 in generation"):
        over_two_ranks(query[-1:], key, value, None)


@both_kinds
def test_an_attention_bias_is_refused(attention, layer):
    with pytest.raises(ValueError, match="attention_bias: must be None"):
        attention(layer)(*tensors(16, BATCH), None, attention_bias=torch.zeros(1))


@both_kinds
@pytest.mark.parametrize("mask", [AttnMaskType.padding, AttnMaskType.no_mask, AttnMaskType.arbitrary])
def test_masks_that_are_not_causal_are_refused(attention, layer, mask):
    with pytest.raises(ValueError, match=f"attn_mask_type {mask.name}: must be causal"):
        attention(layer)(*tensors(16, BATCH), None, attn_mask_type=mask)


def test_packing_in_another_layout_is_refused(attention):
    params = packed(16)
    params.qkv_format = "sbhd"
    with pytest.raises(ValueError, match="qkv_format sbhd: must be thd"):
        attention()(*tensors(16), None, packed_seq_params=params)
