"""Workarounds for Megatron: each does what its name says, may be called twice, and touches nothing else.

That runs start, resume bit for bit and print no warnings, which needs most of them, is shown by
tests/test_pretrain.py.
"""

import sys
import warnings
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets import utils
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.training import argument_utils, training
from torch import distributed

from megatron_s2.data.token_ids import Vocabulary
from megatron_s2.training.patches import (
    EmptySplitError,
    TokenIdError,
    accumulate_weight_gradients_without_apex,
    apply_patches,
    keep_padding_to_its_own_sample,
    let_distributed_optimizer_resume_with_torch_adam,
    let_eval_interval_be_unset,
    let_torch_norms_be_sequence_parallel,
    quiet_known_warnings,
    refuse_empty_splits,
    refuse_tokens_beyond,
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
    (ColumnParallelLinear, "__init__"),
    (RowParallelLinear, "__init__"),
    (WrappedTorchNorm, "__new__"),
    (token_dispatcher, "maybe_move_tensor_to_cpu"),
]
ONLY_ON_CPU = {
    (training, "initialize_megatron"),
    (training, "set_jit_fusion_options"),
    (token_dispatcher, "maybe_move_tensor_to_cpu"),
}


def names() -> dict[tuple[object, str], object]:
    return {place: getattr(*place) for place in TOUCHED}


@pytest.fixture(autouse=True)
def unpatched():
    """Gives every name back what it was."""
    before = names()
    yield before
    for place, value in before.items():
        setattr(*place, value)


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "gpu"])
def test_all_patches_together_touch_what_they_name(unpatched, cpu):
    apply_patches(cpu)
    changed = {place for place, now in names().items() if now is not unpatched[place]}
    assert changed == set(unpatched) - (set() if cpu else ONLY_ON_CPU)


def test_a_second_time_wraps_nothing_again(unpatched):
    apply_patches(cpu=True)
    apply_patches(cpu=True)
    replaced = {(utils, "compile_helpers"), (training, "set_jit_fusion_options")}
    for place in set(TOUCHED) - replaced:
        assert names()[place].__wrapped__ is unpatched[place]


def test_the_dataset_helpers_of_the_wheel_are_not_compiled(monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("compiles"))
    skip_compiling_dataset_helpers()
    utils.compile_helpers()


def test_dataset_helpers_that_are_missing_are_left_to_megatron(unpatched, monkeypatch):
    monkeypatch.setattr("megatron_s2.training.patches.find_spec", lambda name: None)
    skip_compiling_dataset_helpers()
    assert utils.compile_helpers is unpatched[utils, "compile_helpers"]


def test_the_warm_up_draws_no_random_numbers():
    skip_jit_warmup()
    before = torch.get_rng_state()
    training.set_jit_fusion_options("whatever Megatron passes")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_optimizers_of_nvidia_are_left_alone(unpatched, monkeypatch):
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    let_distributed_optimizer_resume_with_torch_adam()
    assert DistributedOptimizer.state_dict is unpatched[DistributedOptimizer, "state_dict"]


@pytest.fixture
def alone():
    """A process group of one rank."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "kind", [ColumnParallelLinear, partial(RowParallelLinear, input_is_parallel=True)], ids=["column", "row"]
)
def test_megatrons_linear_layers_need_no_apex_and_the_configuration_keeps_the_fusion(alone, kind):
    """That Transformer Engine's layers then fuse is shown by tests/test_transformer_engine.py."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=True,
    )
    accumulate_weight_gradients_without_apex()
    layer = kind(
        *(16, 32),
        config=config,
        init_method=torch.nn.init.ones_,
        bias=False,
        skip_bias_add=False,
        tp_group=alone,
    )
    layer(torch.ones(3, 1, 16))[0].sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((32, 16), 3.0))
    assert layer.config is config and config.gradient_accumulation_fusion


def test_the_extension_of_apex_is_used_where_it_is(unpatched, monkeypatch):
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    accumulate_weight_gradients_without_apex()
    assert names() == unpatched


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_norm_is_marked_where_each_rank_norms_its_own_tokens(unpatched, sequence_parallel):
    let_torch_norms_be_sequence_parallel()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization="RMSNorm",
        persist_layer_norm=False,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=2,
    )
    norm = WrappedTorchNorm(config=config, hidden_size=8, eps=1e-6)
    assert isinstance(norm, torch.nn.RMSNorm)
    assert norm.weight.sequence_parallel == config.sequence_parallel == sequence_parallel


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


def test_a_sample_with_a_token_beyond_the_vocabulary_is_refused(unpatched, monkeypatch):
    texts = ([3, 9, -1], [3, 10], [-2, 3], [3, 77])
    monkeypatch.setattr(
        GPTDataset,
        "_query_document_sample_shuffle_indices",
        lambda self, index: (np.array(texts[index]), "documents", "lengths"),
    )
    refuse_tokens_beyond(Vocabulary(20, "earlier"))
    refuse_tokens_beyond(Vocabulary(10, "--vocab-size 10"))
    dataset = SimpleNamespace(dataset_path="data/text", _pad_token_id=77)
    query = partial(GPTDataset._query_document_sample_shuffle_indices, dataset)
    assert query(0)[1:] == ("documents", "lengths")
    assert query(3)[0].tolist() == [3, 77]
    for index, token in ((1, 10), (2, -2)):
        message = (
            rf"^the data at data/text: has token id {token}; the model has 10 tokens \(--vocab-size 10\)"
        )
        with pytest.raises(TokenIdError, match=message):
            query(index)


def test_the_error_of_a_data_loaders_process_is_its_message():
    last_line = "megatron_s2.training.patches.TokenIdError: a: has 3"
    traceback = f"Caught TokenIdError in worker 0.\nTraceback\n  x\n{last_line}"
    assert str(TokenIdError(f"{traceback}\n")) == str(TokenIdError("a: has 3")) == "a: has 3"


@pytest.mark.parametrize(("given", "used"), [(None, sys.maxsize), (0, sys.maxsize), (7, 7)])
def test_without_an_interval_no_iteration_is_evaluated(given, used):
    args = Namespace(eval_interval=given)
    let_eval_interval_be_unset(args)
    assert args.eval_interval == used
