"""Workarounds for Megatron: each does what its name says, may be called twice, and touches nothing else.

That runs start, resume bit for bit and print no warnings, which needs most of them, is shown by
tests/test_pretrain.py.
"""

import sys
import warnings
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets import utils
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.training import argument_utils, training
from megatron_arguments import parse

from megatron_s2.pattern import S2Settings
from megatron_s2.training.patches import (
    EmptySplitError,
    apply_patches,
    count_s2_flops,
    keep_padding_to_its_own_sample,
    let_distributed_optimizer_resume_with_torch_adam,
    let_eval_interval_be_unset,
    quiet_known_warnings,
    refuse_empty_splits,
    skip_compiling_dataset_helpers,
    skip_jit_warmup,
)

TOUCHED = [
    (utils, "compile_helpers"),
    (GPTDataset, "_get_num_epochs"),
    (GPTDataset, "__getitem__"),
    (DistributedOptimizer, "state_dict"),
    (DistributedOptimizer, "_set_main_param_and_optimizer_states"),
    (argument_utils, "gpt_config_from_args"),
    (training, "initialize_megatron"),
    (training, "set_jit_fusion_options"),
    (training, "num_floating_point_operations"),
    (training, "update_seqlen_stats_from_cu_seqlens"),
]
ONLY_ON_CPU = {"initialize_megatron", "set_jit_fusion_options"}
BY_SETTINGS = {"num_floating_point_operations", "update_seqlen_stats_from_cu_seqlens"}


def names() -> dict[str, object]:
    return {name: getattr(owner, name) for owner, name in TOUCHED}


@pytest.fixture(autouse=True)
def unpatched():
    """Gives every name back what it was."""
    before = names()
    yield before
    for owner, name in TOUCHED:
        setattr(owner, name, before[name])


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "gpu"])
def test_all_patches_together_touch_what_they_name(unpatched, cpu):
    apply_patches(cpu)
    changed = {name for name, now in names().items() if now is not unpatched[name]}
    assert changed == set(unpatched) - BY_SETTINGS - (set() if cpu else ONLY_ON_CPU)


def test_a_second_time_wraps_nothing_again(unpatched):
    apply_patches(cpu=True)
    apply_patches(cpu=True)
    for name in (
        "state_dict",
        "_set_main_param_and_optimizer_states",
        "initialize_megatron",
        "gpt_config_from_args",
    ):
        assert names()[name].__wrapped__ is unpatched[name]


def test_the_dataset_helpers_of_the_wheel_are_not_compiled(monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("compiles"))
    skip_compiling_dataset_helpers()
    utils.compile_helpers()


def test_dataset_helpers_that_are_missing_are_left_to_megatron(unpatched, monkeypatch):
    monkeypatch.setattr("megatron_s2.training.patches.find_spec", lambda name: None)
    skip_compiling_dataset_helpers()
    assert utils.compile_helpers is unpatched["compile_helpers"]


def test_the_warm_up_draws_no_random_numbers():
    skip_jit_warmup()
    before = torch.get_rng_state()
    training.set_jit_fusion_options("whatever Megatron passes")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_optimizers_of_nvidia_are_left_alone(unpatched, monkeypatch):
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    let_distributed_optimizer_resume_with_torch_adam()
    assert DistributedOptimizer.state_dict is unpatched["state_dict"]


def test_only_known_warnings_are_silenced_and_only_where_they_come_from():
    known = "Transformer Engine and Apex are not installed. Falling back."
    said = [(known, "megatron.core"), ("it matters", "megatron.core"), (known, "a_users_module")]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_known_warnings()
        for message, module in said:
            warnings.warn_explicit(message, UserWarning, "file.py", 1, module)
    assert [str(warning.message) for warning in shown] == ["it matters", known]


def test_a_split_without_tokens_is_refused_instead_of_repeated_for_ever():
    refuse_empty_splits()
    dataset = SimpleNamespace(
        num_samples=4,
        index_split=Split.valid,
        dataset_path="data/text",
        config=SimpleNamespace(split="99,1,0", sequence_length=128, add_extra_token_to_sequence=1),
    )
    assert GPTDataset._get_num_epochs(dataset, 200) == 3
    with pytest.raises(EmptySplitError, match=r"^--split 99,1,0: the valid split of data/text has no tokens"):
        GPTDataset._get_num_epochs(dataset, 0)


def test_the_padding_of_the_first_sample_is_none_of_later_ones(unpatched, monkeypatch):
    """Tokens 1 to 9, of which 5 is the tokenizer's padding; each sample begins one later."""
    keep_padding_to_its_own_sample()
    monkeypatch.setattr(GPTDataset, "__abstractmethods__", frozenset())
    dataset = object.__new__(GPTDataset)
    dataset.config = SimpleNamespace(
        **dict.fromkeys(["reset_position_ids", "reset_attention_mask", "eod_mask_loss"], False),
        **dict.fromkeys(["create_attention_mask", "inter_document_masking"], False),
        add_extra_token_to_sequence=True,
        tokenizer=SimpleNamespace(eod=100),
    )
    dataset.masks_and_position_ids_are_cacheable, dataset.masks_and_position_ids_are_cached = True, False
    dataset._pad_token_id = 5
    monkeypatch.setattr(
        GPTDataset,
        "_query_document_sample_shuffle_indices",
        lambda self, index: (np.arange(1 + index, 6 + index), [], [5]),
    )
    masks = [dataset[index]["loss_mask"].tolist() for index in (2, 0, 3)]
    assert masks == [[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize(("given", "used"), [(None, sys.maxsize), (0, sys.maxsize), (7, 7)])
def test_without_an_interval_no_iteration_is_evaluated(given, used):
    args = Namespace(eval_interval=given)
    let_eval_interval_be_unset(args)
    assert args.eval_interval == used


# Throughput.

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
