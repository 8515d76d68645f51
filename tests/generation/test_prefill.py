"""Every prompt is fed completely, and what several begin with is fed once."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_s2.generation.prefill import PrefillPass, plan_prefill, shared_passes

prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=7)


def fed(passes: list[PrefillPass]) -> list[list[int]]:
    """The tokens of each sequence at the end; asserts that each prompt ends where the plan says so."""
    sequences, ended = [], {}
    for step in passes:
        parents = [None] * len(step.rows) if step.parents is None else step.parents
        before = [[] if n is None else sequences[n] for n in parents]
        sequences = [[*old, *new] for old, new in zip(before, step.rows, strict=True)]
        assert all(step.rows[n] for n in step.ends.values()) and not ended.keys() & step.ends.keys()
        ended |= {prompt: sequences[n] for prompt, n in step.ends.items()}
    assert ended == dict(enumerate(sequences))
    return sequences


def tokens(passes: list[PrefillPass]) -> int:
    return sum(len(row) for step in passes for row in step.rows)


@given(prompts=prompts_of_few_tokens, least=st.integers(1, 5))
def test_the_sequences_of_the_last_pass_are_the_prompts(prompts, least):
    passes = shared_passes(prompts, least)
    assert passes[0].parents is None and all(step.parents is not None for step in passes[1:])
    assert fed(passes) == prompts


@given(prompts=prompts_of_few_tokens)
def test_every_distinct_beginning_is_fed_once(prompts):
    beginnings = {tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt) + 1)}
    assert tokens(shared_passes(prompts, least_shared=1)) == len(beginnings)


def test_32_prompts_with_4096_tokens_in_common():
    prompts = [[7] * 4096 + [n] * (n + 1) for n in range(32)]
    first, rest = plan_prefill(prompts)
    assert (len(first.rows), len(rest.rows)) == (1, 32)
    assert tokens([first, rest]) == 4096 + sum(range(1, 33))


def test_fewer_tokens_than_the_least_are_not_shared():
    prompts = [[1] * 63 + [n] * 9 for n in (2, 3)]
    assert plan_prefill(prompts) == [PrefillPass(None, prompts, {0: 0, 1: 1})]
    assert len(plan_prefill([[1, *prompt] for prompt in prompts])) == 2


def test_prompts_that_share_nothing_are_fed_with_the_tails():
    """Beside the tokens that others share they would only be padding there."""
    shared = [5] * 100
    passes = shared_passes([[1, 2], [*shared, 1], [3] * 200, shared], 64)
    assert [step.parents for step in passes] == [None, [None, 0, None, 0]]
    assert [[len(row) for row in step.rows] for step in passes] == [[100], [2, 1, 200, 0]]
    assert [step.ends for step in passes] == [{3: 0}, {0: 0, 1: 1, 2: 2}]


def test_groups_share_more_than_all_do():
    system, few = [1] * 70, [2] * 80
    passes = shared_passes([[*system, *few, 1], [*system, 9], [*system, *few, 3]], 64)
    assert [[len(row) for row in step.rows] for step in passes] == [[70], [80, 0], [1, 1, 1]]
    assert [step.parents for step in passes] == [None, [0, 0], [0, 1, 0]]


@given(prompts=prompts_of_few_tokens, least=st.integers(1, 5))
def test_sharing_never_runs_more_tokens_than_whole_prompts(prompts, least):
    passes = plan_prefill(prompts, least)
    assert fed(passes) == prompts
    assert sum(step.padded_tokens for step in passes) <= len(prompts) * max(map(len, prompts))


def test_a_long_prompt_that_shares_nothing_makes_whole_prompts_cheaper():
    alike = [[7] * 4096 + [n] for n in range(31)]
    assert len(plan_prefill([*alike, [8] * 4096])) == 1
    assert len(plan_prefill(alike)) == 2
