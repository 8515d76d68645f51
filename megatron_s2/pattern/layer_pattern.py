"""The pattern of one layer as plain numbers, and its JSON form: an entry of `layers` in a pattern file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_s2.pattern.s2_pattern import S2Pattern

_DENSE = "dense"
_NUMBERS = {"local_blocks": 1, "sink_blocks": 0}  # fields that are one number, and the smallest one
_LISTS = ("strides", "phases")


@dataclass(frozen=True)
class LayerPattern:
    """The S2 pattern of one layer, apart from the block size, which is the model's.

    Args:
        local_blocks: size of the window in blocks, including the diagonal block, >= 1.
        strides: stride of each head in blocks; 1 is dense, 0 window-only. Heads are the KV heads, or the
            query heads (`S2Settings.pattern_heads`).
        sink_blocks: number of blocks at the start of the sequence that every head always sees.
        phases: phase of each head; None for the default phases of `S2Pattern`.
    """

    local_blocks: int
    strides: tuple[int, ...]
    sink_blocks: int = 0
    phases: tuple[int, ...] | None = None

    @classmethod
    def of(cls, pattern: S2Pattern) -> LayerPattern:
        """Returns the numbers of a pattern, with its phases."""
        return cls(pattern.local_blocks, pattern.strides, pattern.sink_blocks, pattern.head_phases)

    def pattern(self, block_size: int, layer: int = 0) -> S2Pattern:
        """Returns the pattern.

        Args:
            block_size: tokens per block.
            layer: index among the S2 layers, which rotates default phases.

        Raises:
            ValueError: a field is out of range; the message starts with its name.
        """
        return S2Pattern(
            num_kv_heads=len(self.strides),
            block_size=block_size,
            local_blocks=self.local_blocks,
            vert_stride=self.strides,
            sink_blocks=self.sink_blocks,
            phases=self.phases,
            layer=layer,
            warn_lost=False,
        )

    def __str__(self) -> str:
        lists = {"strides": self.strides, "phases": self.phases or ()}
        parts = [f"{name} {' '.join(map(str, values))}" for name, values in lists.items() if values]
        return f"window {self.local_blocks}, sinks {self.sink_blocks}, {', '.join(parts)}"

    def entry(self) -> dict[str, object]:
        """Returns the JSON form."""
        return {
            "local_blocks": self.local_blocks,
            "sink_blocks": self.sink_blocks,
            "strides": list(self.strides),
            **({} if self.phases is None else {"phases": list(self.phases)}),
        }


def layer_entries(layers: Sequence[LayerPattern | None]) -> list[dict[str, object]]:
    """Returns the JSON form of the layers of a model; None is a dense layer."""
    return [{_DENSE: True} if layer is None else layer.entry() for layer in layers]


def layers_of(
    entries: Sequence[Mapping[str, object] | LayerPattern | None],
    num_layers: int,
    num_heads: int,
    head_name: str = "KV head",
) -> tuple[LayerPattern | None, ...]:
    """Returns the layers that JSON entries describe; None is a dense layer. Layers pass as they are.

    Args:
        entries: one per layer, `{"dense": true}`, or an object with `local_blocks`, `strides` and optionally
            `sink_blocks` and `phases`.
        num_layers: number of layers of the model.
        num_heads: number of heads that a layer has strides and phases for.
        head_name: what a head is, for messages.

    Raises:
        ValueError: an entry is not of this form; the message begins with `layer`, its number from 1 and the
            field.
    """
    if len(entries) < num_layers:
        raise ValueError(f"layer {len(entries) + 1}: is missing, of {num_layers} layers")
    if len(entries) > num_layers:
        raise ValueError(f"layer {num_layers + 1}: must not be there, with {num_layers} layers")
    heads = f"one per {head_name} ({num_heads})"
    return tuple(_layer(number, entry, num_heads, heads) for number, entry in enumerate(entries, 1))


def _layer(number: int, entry: object, num_heads: int, heads: str) -> LayerPattern | None:
    layer = f"layer {number}"
    if isinstance(entry, Mapping):
        entry = _from_entry(layer, entry, heads)
    elif not isinstance(entry, LayerPattern | None):
        raise ValueError(f"{layer} {entry!r}: must be an object")
    if entry is not None:
        for name in _LISTS:
            if (values := getattr(entry, name)) is not None and len(values) != num_heads:
                raise ValueError(f"{layer}: {name} {list(values)}: must be {heads}")
    return entry


def _from_entry(layer: str, entry: Mapping[str, object], heads: str) -> LayerPattern | None:
    for name in entry:
        if name not in (_DENSE, *_NUMBERS, *_LISTS):
            allowed = ", ".join((_DENSE, *_NUMBERS, *_LISTS))
            raise ValueError(f"{layer}: {name}: is not a field of a layer; must be one of {allowed}")
    if _DENSE in entry:
        if entry[_DENSE] is not True:
            raise ValueError(f"{layer}: {_DENSE} {entry[_DENSE]!r}: must be true, or left out")
        if len(entry) > 1:
            other = next(name for name in entry if name != _DENSE)
            raise ValueError(f"{layer}: {other}: must not be set with {_DENSE}")
        return None
    for name in ("local_blocks", "strides"):
        if name not in entry:
            raise ValueError(f"{layer}: {name}: is missing; a dense layer has {_DENSE} true")
    for name, smallest in _NUMBERS.items():
        value = entry.get(name, smallest)
        if type(value) is not int or value < smallest:
            raise ValueError(f"{layer}: {name} {value!r}: must be a whole number >= {smallest}")
    for name in _LISTS:
        values = entry.get(name, ())
        is_list = isinstance(values, list | tuple)
        if not is_list or any(type(value) is not int or value < 0 for value in values):
            raise ValueError(f"{layer}: {name} {values!r}: must be a list of whole numbers >= 0, {heads}")
    fields = {name: tuple(entry[name]) if name in _LISTS else entry[name] for name in entry}
    return LayerPattern(**fields)
