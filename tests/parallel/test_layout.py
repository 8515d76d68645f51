"""The zigzag layout: every position has one owner and one local index, as in Megatron's data loader."""

import numpy as np
import pytest
import torch

from megatron_s2.parallel.layout import Zigzag

SIZES = [(1, 2), (1, 6), (2, 4), (2, 12), (3, 18), (4, 8), (5, 70)]


@pytest.mark.parametrize(("ranks", "tokens"), SIZES)
def test_every_position_is_held_once(ranks, tokens):
    zigzag = Zigzag(ranks, tokens)
    held = np.concatenate([zigzag.positions(rank) for rank in range(ranks)])
    assert sorted(held.tolist()) == list(range(tokens))


@pytest.mark.parametrize(("ranks", "tokens"), SIZES)
def test_owner_and_local_index_identify_the_position(ranks, tokens):
    zigzag = Zigzag(ranks, tokens)
    positions = np.arange(tokens)
    owner, local = zigzag.owner(positions), zigzag.local(positions)
    back = [zigzag.positions(rank)[index] for rank, index in zip(owner, local)]
    assert back == positions.tolist()


@pytest.mark.parametrize(("ranks", "tokens"), SIZES)
def test_a_rank_holds_one_early_and_one_late_chunk(ranks, tokens):
    zigzag = Zigzag(ranks, tokens)
    assert zigzag.local_tokens == 2 * zigzag.chunk == tokens // ranks
    for rank in range(ranks):
        (first, _), (late, _) = zigzag.chunks(rank)
        assert (first // zigzag.chunk, late // zigzag.chunk) == (rank, 2 * ranks - 1 - rank)


@pytest.mark.parametrize(("ranks", "tokens"), SIZES)
def test_chunk_order_puts_the_chunks_of_all_ranks_in_sequence(ranks, tokens):
    zigzag = Zigzag(ranks, tokens)
    by_rank = np.concatenate([zigzag.positions(rank) for rank in range(ranks)]).reshape(2 * ranks, -1)
    assert by_rank[zigzag.chunk_order()].ravel().tolist() == list(range(tokens))


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 12), (3, 18), (4, 8)])
def test_the_layout_is_that_of_megatrons_loader(ranks, tokens, monkeypatch):
    utils = pytest.importorskip("megatron.core.utils")
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        dealt = utils.get_batch_on_this_cp_rank({"tokens": torch.arange(tokens)[None]}, is_hybrid_cp=False)
        assert dealt["tokens"].flatten().tolist() == Zigzag(ranks, tokens).positions(rank).tolist()


@pytest.mark.parametrize(
    ("ranks", "tokens", "message"),
    [
        (4, 12, "tokens 12: must be a multiple of 8 (two chunks for each of 4 ranks)"),
        (2, -4, "tokens -4: must be a multiple of 4 (two chunks for each of 2 ranks)"),
        (0, 8, "ranks 0: must be >= 1"),
    ],
)
def test_tokens_that_make_no_equal_chunks_are_refused(ranks, tokens, message):
    with pytest.raises(ValueError) as refused:
        Zigzag(ranks, tokens)
    assert str(refused.value) == message
