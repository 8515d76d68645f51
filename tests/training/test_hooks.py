"""The count of FLOPs behind `--log-throughput`. The other hooks are shown by whole trainings."""

import pytest
import torch
from megatron.training import training
from megatron_arguments import parse

from megatron_s2.pattern.settings import S2Settings
from megatron_s2.training.hooks import count_s2_flops

BATCH, SEQ, HEADS, KV_HEADS, LAYERS = 4, 200, 4, 2, 3
SPARSE = S2Settings(
    num_layers=LAYERS,
    num_kv_heads=KV_HEADS,
    block_size=16,
    local_blocks=2,
    vert_stride=(3, 4),
    sink_blocks=1,
    dense_layers=(2,),
)
ALL_DENSE = S2Settings(num_layers=LAYERS, num_kv_heads=KV_HEADS, block_size=16, dense_layer_freq=1)


@pytest.fixture(autouse=True)
def unpatched(monkeypatch):
    """Megatron's own functions, which are back after the test."""
    names = ("num_floating_point_operations", "update_seqlen_stats_from_cu_seqlens")
    before = {name: getattr(training, name) for name in names}
    for name, function in before.items():
        monkeypatch.setattr(training, name, function)
    return before


@pytest.fixture(scope="module")
def model():
    """Parsed arguments, with what Megatron's validation would derive as far as the count reads it."""
    args = parse(
        f"--num-layers {LAYERS} --hidden-size 64 --num-attention-heads {HEADS} --group-query-attention "
        f"--num-query-groups {KV_HEADS} --seq-length {SEQ} --swiglu".split()
    )
    args.kv_channels, args.ffn_hidden_size, args.padded_vocab_size = 16, 256, 512
    return args


def training_flops(settings: S2Settings, *lengths: int) -> int:
    """Core attention in Megatron's convention: forward, and backward as twice the forward."""
    patterns = [settings.pattern(n) for n in range(1, LAYERS + 1)]
    return 3 * sum(pattern.flops(length, HEADS, 16).forward for pattern in patterns for length in lengths)


def without_attention(unpatched, model, tokens: int) -> float:
    return unpatched["num_floating_point_operations"](model, BATCH, 0, tokens)


def counted_packed(model, *lengths: int) -> float:
    """What a training step with one packed micro-batch of these documents counts."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    training.update_seqlen_stats_from_cu_seqlens(boundaries)
    tokens, squares = training.consume_seqlen_stats_in_iteration()
    return training.num_floating_point_operations(model, BATCH, squares, tokens)


@pytest.mark.parametrize("settings", [SPARSE, ALL_DENSE], ids=["sparse", "dense"])
def test_a_batch_counts_the_flops_of_its_patterns(unpatched, model, settings):
    count_s2_flops(settings)
    counted = training.num_floating_point_operations(model, BATCH)
    expected = without_attention(unpatched, model, BATCH * SEQ) + BATCH * training_flops(settings, SEQ)
    assert counted == pytest.approx(expected, rel=1e-12)
    assert type(counted) in (int, float)  # it goes into checkpoints, which must not need NumPy to be read


def test_dense_layers_count_as_megatron_counts_them_but_for_the_diagonal(unpatched, model):
    """Megatron takes half of the square for a causal mask, we the pairs: S * S against S * (S + 1)."""
    linear = without_attention(unpatched, model, BATCH * SEQ)
    megatrons = unpatched["num_floating_point_operations"](model, BATCH) - linear
    count_s2_flops(ALL_DENSE)
    ours = training.num_floating_point_operations(model, BATCH) - linear
    assert ours / megatrons == pytest.approx((SEQ + 1) / SEQ, rel=1e-12)


def test_packed_documents_count_each_for_itself(unpatched, model):
    count_s2_flops(SPARSE)
    lengths = (70, 1, 129)
    expected = without_attention(unpatched, model, sum(lengths)) + training_flops(SPARSE, *lengths)
    assert counted_packed(model, *lengths) == pytest.approx(expected, rel=1e-12)


def test_micro_batches_without_documents_count_nothing():
    count_s2_flops(SPARSE)
    training.update_seqlen_stats_from_cu_seqlens(None)
    training.update_seqlen_stats_from_cu_seqlens(torch.zeros(1, dtype=torch.int32))
    assert training.consume_seqlen_stats_in_iteration() == (None, None)


def test_a_second_call_replaces_the_settings(model):
    def counted(*all_settings: S2Settings) -> tuple[float, float]:
        for settings in all_settings:
            count_s2_flops(settings)
        return training.num_floating_point_operations(model, BATCH), counted_packed(model, 90, 40)

    assert counted(SPARSE) == counted(SPARSE, SPARSE) == counted(ALL_DENSE, SPARSE) != counted(ALL_DENSE)
