"""Packed micro-batches: the host knows the documents, so that no layer waits for the device, and none takes
them one by one."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpt_models import gpt, one_rank
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.utils import flatten_batch_for_packed_sequences
from megatron.training import training
from torch.utils._python_dispatch import TorchDispatchMode
from transfers import Transfers

from megatron_s2.layers.packed_row import row_on_device
from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Settings
from megatron_s2.training import forward_step
from megatron_s2.training.forward_step import get_batch, packed_sequences
from megatron_s2.training.hooks import count_s2_flops
from megatron_s2.training.patches import rotate_packed_tokens_of_a_row

TOKENS = 240
FEW, MANY = (0, 100, TOKENS), (0, *range(7, TOKENS, 10), TOKENS)
CPU = torch.device("cpu")
ONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.fixture(autouse=True)
def unpatched(monkeypatch):
    """Gives Megatron's functions back after the test."""
    for owner, name in (
        (rope_utils, "_apply_rotary_pos_emb_thd"),
        (training, "update_seqlen_stats_from_cu_seqlens"),
        (training, "num_floating_point_operations"),
        (training, "_seqlen_stats_in_iteration"),
        (training, "_seqlen_stats_active"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def samples(*edges: tuple[int, ...]) -> np.ndarray:
    """Offsets of the documents of each sample, filled up as Megatron's data set does."""
    return np.array([[*row, *[TOKENS] * (TOKENS + 1 - len(row))] for row in edges], dtype=np.int32)


class Operations(TorchDispatchMode):
    """Names of the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **kwargs or {})


# Batches.


@pytest.mark.parametrize("rows", [(FEW,), (MANY, FEW, (0, TOKENS), MANY)], ids=len)
def test_the_rows_of_all_samples_become_one(one_device, rows):
    packed = packed_sequences(samples(*rows), TOKENS)
    tensor = torch.from_numpy(samples(*rows))
    theirs = flatten_batch_for_packed_sequences({"cu_seqlens": tensor, "tokens": tensor[:, 1:]})
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.cu_seqlens_q.tolist() == theirs["cu_seqlens"][0].tolist()
    assert packed.max_seqlen_q == theirs["cu_seqlens"][0].diff().max()


def test_a_batch_reads_only_what_the_loader_has_on_the_host(one_device, monkeypatch):
    args = Namespace(
        dataloader_inter_document_masking=True,
        create_attention_mask_in_dataloader=False,
        context_parallel_size=1,
        pipeline_model_parallel_size=1,
        micro_batch_size=2,
        seq_length=TOKENS,
    )
    monkeypatch.setattr(forward_step, "get_args", lambda: args)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    ids = torch.arange(2 * TOKENS).view(2, TOKENS)
    sample = dict.fromkeys(("tokens", "labels", "position_ids"), ids) | {"loss_mask": ids.float()}
    sample |= {"cu_seqlens": torch.from_numpy(samples(FEW, MANY)), "max_seqlen": torch.tensor([140, 10])}
    count_s2_flops(S2Settings(num_layers=3, num_kv_heads=2))
    with Transfers() as copies:
        batch = get_batch(iter([sample]), None)
    assert copies.to_host == ["numpy"]
    assert batch.tokens.tolist() == ids.view(1, -1).tolist()
    assert batch.packed.cu_seqlens_q.tolist() == [*FEW, *(TOKENS + edge for edge in MANY[1:])]


@pytest.fixture
def one_device():
    with one_rank():
        yield


# The model.


def train(model, packed) -> None:
    ids = torch.arange(TOKENS)[None] % 90
    model(ids, ids, None, packed_seq_params=packed).sum().backward()


@pytest.mark.parametrize("edges", [FEW, MANY], ids=["few", "many"])
def test_no_layer_waits_for_the_device(one_device, edges):
    rotate_packed_tokens_of_a_row()
    model = gpt().train()
    packed = packed_sequences(samples(edges), TOKENS)
    with Transfers() as copies:
        train(model, packed)
    assert copies.to_host == []


def test_all_layers_share_one_table_of_angles(one_device):
    rotate_packed_tokens_of_a_row()
    model = gpt().train()
    packed = packed_sequences(samples(MANY), TOKENS)
    with Operations() as operations:
        train(model, packed)
    assert operations.names.count("aten.cos.default") == 1


# The rotary embedding.


def rotated(t, edges, freqs, group=ONE, **options) -> torch.Tensor:
    return rope_utils._apply_rotary_pos_emb_thd(
        t, row_on_device(edges, CPU), freqs, cp_group=group, **options
    )


@pytest.mark.parametrize("edges", [FEW, MANY, (0, TOKENS)], ids=len)
@pytest.mark.parametrize(
    ("dtype", "dim", "options"),
    [
        (torch.float32, 16, {}),
        (torch.bfloat16, 16, {"mscale": 1.25}),
        (torch.float32, 8, {"rotary_interleaved": True}),
        (torch.float32, 16, {"mla_rotary_interleaved": True}),
    ],
    ids=["fp32", "bf16 scaled", "partial interleaved", "mla"],
)
def test_rotation_by_row_has_the_bits_of_megatrons_by_document(edges, dtype, dim, options):
    draw = torch.Generator().manual_seed(0)
    t, upstream = (torch.randn(TOKENS, 2, 16, generator=draw).to(dtype) for _ in range(2))
    freqs = torch.rand(max(np.diff(edges)), 1, 1, dim, generator=draw) * 100
    t.requires_grad_()

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        out = rotated(t, edges, freqs, **options)
        return out, *torch.autograd.grad(out, t, upstream)

    theirs = outcome()
    rotate_packed_tokens_of_a_row()
    assert all(torch.equal(*pair) for pair in zip(outcome(), theirs))


def test_empty_documents_do_not_turn_others():
    rotate_packed_tokens_of_a_row()
    t, freqs = torch.randn(TOKENS, 2, 16), torch.rand(TOKENS // 2 + 20, 1, 1, 16)
    assert torch.equal(rotated(t, (0, 0, 100, 100, TOKENS, TOKENS), freqs), rotated(t, FEW, freqs))


def test_a_context_parallel_rank_rotates_its_part_of_the_row():
    rotate_packed_tokens_of_a_row()
    draw = torch.Generator().manual_seed(0)
    t, freqs = torch.randn(TOKENS, 2, 16, generator=draw), torch.rand(TOKENS // 2, 1, 1, 16, generator=draw)
    whole = rotated(t, MANY, freqs)
    for rank in range(3):
        rows = torch.from_numpy(Zigzag(3, TOKENS).positions(rank))
        group = SimpleNamespace(size=lambda: 3, rank=lambda rank=rank: rank)
        assert torch.equal(rotated(t[rows], MANY, freqs, group), whole[rows])


def test_the_operations_of_a_rotation_do_not_depend_on_the_documents():
    rotate_packed_tokens_of_a_row()
    t, freqs = torch.randn(TOKENS, 2, 16), torch.rand(TOKENS // 2 + 20, 1, 1, 16)
    counts = []
    for edges in (FEW, MANY):
        cu_seqlens = row_on_device(edges, CPU)
        for _layer in range(2):
            with Operations() as operations:
                rope_utils._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=ONE)
        counts.append(len(operations.names))
    assert counts[0] == counts[1] < 15
