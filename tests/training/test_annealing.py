"""Annealing from dense attention to S2: the stages, and training through them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron_run import Runs
from selection import exhaustive
from test_s2_training import FOUR_LAYERS, FROM, FULL_RECOMPUTE, RICH

from megatron_s2.pattern import S2Pattern, S2Settings
from megatron_s2.pattern.annealing import Annealing, stages

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


def test_window_only_heads_narrow_until_their_strided_blocks_go():
    target = S2Pattern(num_kv_heads=3, block_size=16, local_blocks=1, vert_stride=(0, 4, 0))
    narrowing = stages(target)
    assert [p.strides for p in narrowing] == [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 4, 8), (0, 4, 0)]
    assert [p.local_blocks for p in narrowing] == [16, 8, 4, 2, 1]
    assert narrowing[3].head_phases == (0, 0, 2), "they see different blocks on the way"
    for before, after in pairwise(visible(pattern, 24) for pattern in narrowing):
        assert all(b < a for a, b in zip(before, after))


def test_layers_of_other_strides_narrow_in_the_same_stages():
    layers = [{"local_blocks": 2, "strides": [8]}, {"dense": True}, {"local_blocks": 1, "strides": [2]}]
    annealing = Annealing(S2Settings(3, 1, 16, layers=layers), 30, lambda: 10)
    narrowing = [annealing.stages(annealing.settings.pattern(n)) for n in (1, 2, 3)]
    assert [len(patterns) for patterns in narrowing] == [4, 1, 4]
    assert [(p.strides[0], p.local_blocks) for p in narrowing[2]] == [(1, 8), (2, 4), (2, 2), (2, 1)]
    assert str(annealing).endswith("stride 4, window 4 from step 20; stride 8, window 2 from step 30")
    pairs = sum(annealing.current(patterns).visible_pairs(1000)[0] for patterns in narrowing)
    assert annealing.mean_pairs(1000) == pytest.approx(pairs / 3)


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
        strides.setdefault(max(annealing.current(patterns).strides), []).append(step[0])
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
def runs(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("runs")
    saved = directory / "checkpoint"
    afresh = f"--load {saved} --ckpt-step 6 --finetune --no-load-rng"
    return Runs(
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


@pytest.mark.exhaustive
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


# Four stages of two steps. Weights never move, so a step's loss says which batch it was and which pattern.
BLOCKS = "--s2-attention --s2-block-size 16 --s2-sink-blocks 1"
TARGET = f"{BLOCKS} --s2-local-blocks 1 --s2-vert-stride 8 3 --s2-phases 5 2"
STAGES = (
    f"{BLOCKS} --s2-local-blocks 8 --s2-vert-stride 1",
    f"{BLOCKS} --s2-local-blocks 4 --s2-vert-stride 2 --s2-phases 1 0",
    f"{BLOCKS} --s2-local-blocks 2 --s2-vert-stride 4 3 --s2-phases 1 2",
    TARGET,
)
STAGE_OF_STEP = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 7: 3, 8: 3}
SHARP = "--init-method-std 0.2"  # attention that tells keys apart, as a trained model's does
STILL = f"--train-iters 8 --lr 0 --min-lr 0 --eval-interval 1 {SHARP}"
TRAINING, VALIDATION = "lm loss", "lm loss validation"


@pytest.fixture(scope="module")
def still(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("still")
    saved = directory / "checkpoint"
    annealed = f"{TARGET} --s2-anneal-steps 6 {STILL}"
    return Runs(
        directory,
        {
            "annealed": f"{annealed} --save {saved} --save-interval 3",
            "resumed": f"{annealed} --load {saved} --ckpt-step 3",
            "evaluated": f"{annealed} --load {saved} --ckpt-step 3 --skip-train",
            **{f"stage {k}": f"{flags} {STILL}" for k, flags in enumerate(STAGES)},
        },
    )


def of_fixed_patterns(still: Runs, tag: str) -> dict[int, float]:
    """What each step logs in a run whose pattern is, from its first step on, that of the step's stage."""
    fixed = [still[f"stage {k}"].scalar(tag) for k in range(len(STAGES))]
    for step in STAGE_OF_STEP:
        assert len({losses[step] for losses in fixed}) == len(fixed)
    return {step: fixed[k][step] for step, k in STAGE_OF_STEP.items()}


def test_each_step_trains_on_the_pattern_of_its_stage(still):
    assert still["annealed"].losses == of_fixed_patterns(still, TRAINING)


def test_a_run_resumed_inside_a_stage_trains_on_its_pattern(still):
    expected = of_fixed_patterns(still, TRAINING)
    assert still["resumed"].losses == {step: expected[step] for step in (4, 5, 6, 7, 8)}


def test_evaluation_after_a_step_sees_the_pattern_of_that_step(still):
    expected = of_fixed_patterns(still, VALIDATION)
    assert still["annealed"].scalar(VALIDATION) == expected
    assert still["resumed"].scalar(VALIDATION) == {step: expected[step] for step in (4, 5, 6, 7, 8)}


def test_evaluation_of_a_checkpoint_sees_the_pattern_it_was_in(still):
    expected = still["stage 1"].scalar(VALIDATION)[1]  # a run that does not train begins with the first batch
    assert f"iteration 3 on validation set | lm loss value: {expected:.6E}" in still["evaluated"].output


# A dense step, one with stride 2, two with the target. No dense head: each tensor rank has one to narrow.
NARROWING = f"{RICH} --s2-num-dense-heads 0 --s2-anneal-steps 2 --exit-interval 4 --eval-interval 2"
PIPELINE, CONTEXT = "--pipeline-model-parallel-size 2", "--context-parallel-size 2"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("one")
    start = directory / "checkpoint"
    return Runs(
        directory,
        {
            "start": f"{FOUR_LAYERS} {RICH} {SHARP} --train-iters 1 --save {start} --save-interval 1",
            "annealed": f"{FROM} {start} {NARROWING}",
            "full recompute": f"{FROM} {start} {NARROWING} {FULL_RECOMPUTE}",
        },
    )


@pytest.fixture(scope="module")
def two_ranks(one_rank, tmp_path_factory) -> Runs:
    annealed = f"{FROM} {one_rank['start'].log_dir.parent / 'checkpoint'} {NARROWING}"
    return Runs(
        tmp_path_factory.mktemp("two"),
        {
            "tensor": f"{annealed} --tensor-model-parallel-size 2",
            "pipeline": f"{annealed} {PIPELINE}",
            "interleaved": f"{annealed} {PIPELINE} --num-layers-per-virtual-pipeline-stage 1",
            "pipeline, full recompute": f"{annealed} {PIPELINE} {FULL_RECOMPUTE}",
            "context, gather": f"{annealed} {CONTEXT} --s2-cp-schedule gather",
            "context, a2a": f"{annealed} {CONTEXT} --s2-cp-schedule a2a",
            "context, full recompute": f"{annealed} {CONTEXT} --s2-cp-schedule gather {FULL_RECOMPUTE}",
        },
        ranks=2,
    )


@pytest.mark.parametrize(
    "layout",
    [
        "pipeline, full recompute",
        "context, gather",
        *exhaustive("tensor", "pipeline", "interleaved", "context, a2a", "context, full recompute"),
    ],
)
def test_two_ranks_narrow_as_one(two_ranks, one_rank, layout):
    for tag, steps in ((TRAINING, [1, 2, 3, 4]), (VALIDATION, [2, 4])):
        control = one_rank["annealed"].scalar(tag)
        assert sorted(control) == steps
        assert two_ranks[layout].scalar(tag) == pytest.approx(control, rel=1e-4)


@pytest.mark.exhaustive
def test_recomputation_narrows_at_the_same_steps(one_rank):
    assert one_rank["full recompute"].losses == one_rank["annealed"].losses
