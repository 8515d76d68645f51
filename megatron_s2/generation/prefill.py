"""In which order the prompts of a batch run through the model, so that what several begin with runs once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

# Sharing fewer tokens costs more, in forks and in calls of attention, than it saves.
LEAST_SHARED = 64

Tokens = Sequence[int]


@dataclass(frozen=True)
class PrefillPass:
    """Tokens that are fed to the sequences of a decoder together.

    Args:
        parents: per sequence, the one of the pass before that it continues; None for a new one. None as a
            whole in the first pass, whose sequences are all new.
        rows: tokens of each sequence.
        ends: per prompt that ends with these tokens, the index of its sequence.
    """

    parents: list[int | None] | None
    rows: list[Tokens]
    ends: dict[int, int]

    @property
    def padded_tokens(self) -> int:
        """Number of tokens that the model runs for the pass, in which rows are padded to the longest."""
        return len(self.rows) * max(map(len, self.rows))


def plan_prefill(prompts: Sequence[Tokens], least_shared: int = LEAST_SHARED) -> list[PrefillPass]:
    """Returns the passes that feed all prompts; the sequences of the last one are the prompts, in order.

    They are those of `shared_passes`, unless one pass of whole prompts has no more tokens, padding included:
    for example where one of many prompts is long and shares nothing.

    Args:
        prompts: tokens of each prompt, at least one.
    """
    shared = shared_passes(prompts, least_shared)
    whole = PrefillPass(None, [*prompts], {n: n for n in range(len(prompts))})
    return shared if sum(step.padded_tokens for step in shared) < whole.padded_tokens else [whole]


def shared_passes(prompts: Sequence[Tokens], least_shared: int) -> list[PrefillPass]:
    """Returns the passes that feed what prompts have in common once.

    What at least two prompts have in common, if it is at least `least_shared` tokens, is fed once: first what
    prompts begin with, level by level where groups share more, at last the rest of every prompt.

    Args:
        prompts: tokens of each prompt, at least one.
    """
    root = _branch(prompts, range(len(prompts)), 0, least_shared)
    tails = [(prompt, None, prompts[prompt]) for prompt in root.alone]
    passes, current = [], root.branches
    parents: list[int | None] | None = None
    while current:
        ends = {prompt: n for n, branch in enumerate(current) for prompt in branch.ends}
        passes.append(PrefillPass(parents, [branch.tokens for branch in current], ends))
        following, parents = [], []
        if not any(branch.branches for branch in current):
            for n, branch in enumerate(current):
                tails += [(prompt, n, prompts[prompt][branch.stop :]) for prompt in branch.alone]
            break
        for n, branch in enumerate(current):
            waiting = [branch.without_tokens()] if branch.alone else []
            following += [*branch.branches, *waiting]
            parents += [n] * (len(branch.branches) + len(waiting))
        current = following
    tails.sort()
    last = {prompt: prompt for prompt, _, tail in tails if tail}
    return [
        *passes,
        PrefillPass([n for _, n, _ in tails] if passes else None, [tail for _, _, tail in tails], last),
    ]


@dataclass(frozen=True)
class _Branch:
    """Tokens up to position `stop` that prompts have in common.

    Args:
        tokens: those of them that no branch before has.
        ends: prompts without further tokens.
        alone: prompts that share no further tokens, those without any included.
        branches: what groups of the other prompts have in common from there on.
    """

    stop: int
    tokens: Tokens
    ends: list[int]
    alone: list[int]
    branches: list[_Branch]

    def without_tokens(self) -> _Branch:
        """Returns the branch for passes in which its prompts wait for others."""
        return _Branch(self.stop, [], [], self.alone, [])


def _branch(prompts: Sequence[Tokens], members: Sequence[int], stop: int, least: int) -> _Branch:
    """Returns what follows position `stop`, which ends what `members` of the prompts have in common; without
    tokens of its own."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for n in members:
        alike[tuple(prompts[n][stop : stop + least])].append(n)
    alone, branches = [], []
    for start, group in alike.items():
        if len(group) == 1 or len(start) < least:
            alone += group
            continue
        end = stop + _common([prompts[n][stop:] for n in group])
        rest = _branch(prompts, group, end, least)
        ends = [n for n in group if len(prompts[n]) == end]
        branches.append(_Branch(end, prompts[group[0]][stop:end], ends, rest.alone, rest.branches))
    return _Branch(stop, [], [], sorted(alone), branches)


def _common(rows: Sequence[Tokens]) -> int:
    """Number of tokens with which all rows begin."""
    shortest, longest = min(map(list, rows)), max(map(list, rows))
    pairs = zip(shortest, longest)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(shortest))
