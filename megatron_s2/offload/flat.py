"""The flat state seen from the model: where its parameters lie, and what gradients of them have come."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_s2.offload.arena import aligned_starts
from megatron_s2.offload.plan import ALIGNMENT, OffloadPlan, Subgroup


@dataclass(frozen=True)
class Parameter:
    """A model parameter, or the part of one that this rank updates, in the flat state.

    Args:
        start: its first element there, a multiple of `ALIGNMENT`.
        weights: `[n]`, what the model computes with, contiguous, of any float dtype of at most 4 bytes.
            A step writes it.
        group: index of its settings.
    """

    start: int
    weights: torch.Tensor
    group: int = 0

    @property
    def stop(self) -> int:
        """Behind its last element."""
        return self.start + self.weights.numel()

    @property
    def end(self) -> int:
        """Behind the padding that follows it."""
        return -(-self.stop // ALIGNMENT) * ALIGNMENT


def lay_out(weights: Sequence[torch.Tensor], groups: Sequence[int]) -> tuple[list[Parameter], int]:
    """Parameters one after another in the flat state, and its elements, padding included."""
    starts, elements = aligned_starts([x.numel() for x in weights])
    return [Parameter(*one) for one in zip(starts, weights, groups)], elements


class Run(NamedTuple):
    """A parameter's elements within a subgroup, in flat coordinates; from `stop` to `end` is padding."""

    start: int
    stop: int
    end: int
    weights: torch.Tensor
    group: int

    def in_place_of(self, gradient: torch.Tensor) -> torch.Tensor:
        """Room for its weights in the memory of its gradient, float32 `[end - start]`."""
        return gradient.view(self.weights.dtype)[: self.stop - self.start]


def runs_of(subgroup: Subgroup, parameters: Sequence[Parameter]) -> list[Run]:
    """What of the parameters lies in a subgroup."""
    runs = []
    for p in parameters:
        a, end = max(p.start, subgroup.start), min(p.end, subgroup.stop)
        if a < end:
            stop = min(p.stop, end)
            runs.append(Run(a, stop, end, p.weights[a - p.start : stop - p.start], p.group))
    return runs


def check_layout(plan: OffloadPlan, parameters: Sequence[Parameter], device: torch.device) -> None:
    """Raise ValueError where parameters and plan do not fit."""
    end = 0
    for n, p in enumerate(parameters):
        x = p.weights
        if p.start % ALIGNMENT or p.start < end:
            raise ValueError(f"parameter {n} at {p.start}: must begin at a multiple of {ALIGNMENT} >= {end}")
        if x.device.type != device.type or not x.is_contiguous() or x.dim() != 1 or x.element_size() > 4:
            raise ValueError(f"parameter {n}: weights must be flat, contiguous, on {device}, <= 4 bytes each")
        end = p.end
    if not end or plan.elements != end:
        raise ValueError(f"plan of {plan.elements} elements: parameters have {end}, padding included")


class Piece(NamedTuple):
    """Gradients of elements `start` to `stop`, finished at `mark`."""

    start: int
    stop: int
    source: torch.Tensor
    mark: object


class Gradients:
    """What has come of one step's gradients.

    Args:
        parameters: in the order of their starts, none without elements.
        device: where gradients are.
        wait: lets what the caller begins come after a piece's mark; called before a piece is given out.
    """

    def __init__(
        self, parameters: Sequence[Parameter], device: torch.device, wait: Callable[[object], object]
    ) -> None:
        self._parameters, self._device, self._wait = parameters, device, wait
        self._starts = [p.start for p in parameters]
        self._pieces: list[Piece] = []

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def add(self, start: int, stop: int, source: torch.Tensor, mark: object) -> Piece:
        """Remember a piece; its source is flat.

        Raises:
            ValueError: elements outside of parameters, or there before, or another number of gradients.
        """
        where = bisect_right(self._starts, start) - 1
        if not (0 <= start < stop and where >= 0 and stop <= self._parameters[where].stop):
            raise ValueError(f"flush of elements {start} to {stop}: must lie within one parameter")
        if source.numel() != stop - start or source.device.type != self._device.type:
            raise ValueError(
                f"flush of elements {start} to {stop}: source must have {stop - start} on {self._device}, "
                f"not {source.numel()} on {source.device}"
            )
        after = bisect_right(self._pieces, start, key=lambda one: one.start)
        for other in self._pieces[max(after - 1, 0) : after + 1]:
            if other.start < stop and start < other.stop:
                twice = max(start, other.start)
                raise ValueError(f"flush of elements {start} to {stop}: {twice} was flushed before")
        piece = Piece(start, stop, source, mark)
        insort(self._pieces, piece, key=lambda one: one.start)
        return piece

    def check_complete(self) -> None:
        """Raise ValueError where gradients are missing."""
        missing = sum(p.stop - p.start for p in self._parameters)
        missing -= sum(piece.stop - piece.start for piece in self._pieces)
        if not missing:
            return
        stops = {piece.start: piece.stop for piece in self._pieces}
        for p in self._parameters:
            first = p.start
            while first in stops:
                first = stops[first]
            if first < p.stop:
                raise ValueError(f"step: gradients of {missing} elements were not flushed, first {first}")

    def parts(self, start: int, stop: int) -> Iterator[Piece]:
        """What there is of elements `start` to `stop`, cut to them."""
        first = max(bisect_right(self._pieces, start, key=lambda one: one.start) - 1, 0)
        for piece in self._pieces[first:]:
            if piece.start >= stop:
                break
            a, b = max(piece.start, start), min(piece.stop, stop)
            if a < b:
                self._wait(piece.mark)
                yield Piece(a, b, piece.source[a - piece.start : b - piece.start], piece.mark)

    def gather(self, start: int, stop: int, target: torch.Tensor) -> None:
        """The same into `[stop - start]` float32, zeros where there is nothing."""
        target.zero_()
        for a, b, source, _ in self.parts(start, stop):
            target[a - start : b - start].copy_(source, non_blocking=True)

    def clear(self) -> None:
        """Forget all."""
        self._pieces = []
