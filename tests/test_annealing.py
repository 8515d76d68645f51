"""Annealing from dense attention to S2: the stages, and training through them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron_run import train_all

from megatron_s2.annealing import Annealing, stages
from megatron_s2.pattern import S2Pattern
from megatron_s2.settings import S2Settings

PATTERN = S2Pattern(num_kv_heads=4, block_size=16, local_blocks=2, vert_stride=8)


def visible(pattern: S2Pattern, blocks: int) -> list[set[tuple[int, int]]]:
    """Of each head, the blocks that each query block sees."""
    mask = pattern.block_mask(blocks)
    return [{(i, j) for i, j in mask[head].nonzero().tolist()} for head in range(pattern.num_kv_heads)]


def test_stages_double_the_stride_and_halve_the_window():
    assert [(p.strides, p.local_blocks) for p in stages(PATTERN)] == [
        ((1,) * 4, 16),
        ((2,) * 4, 8),
        ((4,) * 4, 4),
        ((8,) * 4, 2),
    ]
    assert stages(PATTERN)[-1] is PATTERN


def test_heads_stop_at_their_own_stride():
    target = S2Pattern(
        num_kv_heads=3, block_size=16, local_blocks=1, vert_stride=(2, 6, 8), num_dense_heads=1
    )
    assert [p.strides for p in stages(target)] == [(1, 1, 1), (2, 2, 1), (2, 4, 1), (2, 6, 1)]


@given(st.sampled_from([2, 4, 8]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.integers(0, 5))
def test_each_stage_sees_a_part_of_what_the_one_before_saw(stride, window, heads, sinks, layer):
    target = S2Pattern(heads, 16, window, stride, sink_blocks=sinks, layer=layer)
    seen = [visible(pattern, 24) for pattern in stages(target)]
    assert all(len(head) == 24 * 25 // 2 for head in seen[0])
    for before, after in pairwise(seen):
        assert all(b < a for a, b in zip(before, after))


def test_the_stages_share_the_steps_equally():
    step = [0]
    annealing = Annealing(S2Settings(2, 4, 16, 2, 8), 30, lambda: step[0])
    patterns = stages(PATTERN)
    strides = {}
    for step[0] in range(40):
        strides.setdefault(max(annealing.now(patterns).strides), []).append(step[0])
    assert {stride: (min(s), max(s)) for stride, s in strides.items()} == {
        1: (0, 9),
        2: (10, 19),
        4: (20, 29),
        8: (30, 39),
    }
    assert str(annealing).startswith("stride 1, window 16 from step 0; stride 2, window 8 from step 10;")
    step[0] = 0
    assert annealing.mean_pairs(100) == 100 * 101 / 2
    step[0] = 30
    assert annealing.mean_pairs(1000) == annealing.settings.mean_pairs(1000)


S2 = "--s2-attention --s2-block-size 16 --s2-local-blocks 1 --s2-vert-stride 4"
ANNEALED = f"{S2} --s2-anneal-steps 6"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    saved = directory / "checkpoint"
    afresh = f"--load {saved} --ckpt-step 6 --finetune --no-load-rng"
    return train_all(
        directory,
        {
            "annealed": f"{ANNEALED} --save {saved} --save-interval 2",
            "dense": S2.replace("stride 4", "stride 1"),
            "sparse": S2,
            "resumed": f"{ANNEALED} --load {saved} --ckpt-step 4",
            "sparse from the last stage": f"{S2} {afresh}",
            "annealed from the last stage": f"{ANNEALED} {afresh}",
            "otherwise": f"{S2} --s2-anneal-steps 8 --load {saved} --ckpt-step 4",
            "alone": "--s2-anneal-steps 6",
            "negative": f"{S2} --s2-anneal-steps -1",
            "from dense to dense": f"{ANNEALED} --s2-vert-stride 1",
        },
    )


def test_a_run_begins_dense_and_narrows(runs):
    annealed, dense, sparse = (runs[name].losses for name in ("annealed", "dense", "sparse"))
    assert [annealed[n] == pytest.approx(dense[n], rel=1e-6) for n in (1, 2, 3)] == [True] * 3
    assert annealed[4] != pytest.approx(dense[4], rel=1e-6)
    assert annealed[1] != pytest.approx(sparse[1], rel=1e-6)
    text = "stride 1, window 4 from step 0; stride 2, window 2 from step 3; stride 4, window 1 from step 6"
    assert f"  annealing: {text}" in runs["annealed"].output.splitlines()


def test_a_resumed_run_goes_on_in_its_stage(runs):
    assert runs["resumed"].losses == {n: loss for n, loss in runs["annealed"].losses.items() if n > 4}


def test_finetuning_counts_from_its_own_first_step(runs):
    dense_again, sparse = (runs[f"{name} from the last stage"].losses[1] for name in ("annealed", "sparse"))
    assert dense_again != pytest.approx(sparse, rel=1e-6)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("otherwise", "--s2-anneal-steps 8: the checkpoint was trained with 6"),
        ("alone", "--s2-anneal-steps: needs --s2-attention"),
        ("negative", "--s2-anneal-steps -1: must be >= 1"),
        ("from dense to dense", "--s2-anneal-steps 6: the pattern is dense already (stride 1)"),
    ],
)
def test_what_has_no_meaning_is_refused(runs, run, message):
    assert runs[run].status == 2
    assert any(line.startswith(f"error: {message}") for line in runs[run].output.splitlines())
