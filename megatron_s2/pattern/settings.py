"""S2 settings of a whole model, and the pattern of each layer that follows from them.

Flags, Megatron's configuration, the startup table and the planners all exchange this one dataclass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_s2.pattern.block_pattern import dense_pairs
from megatron_s2.pattern.layer_pattern import LayerPattern, layer_entries, layers_of
from megatron_s2.pattern.s2_pattern import Coverage, S2Pattern, coverage_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class S2Settings:
    """S2 settings of one model. Layers are numbered from 1, as in Megatron.

    Args:
        num_layers: number of transformer layers of the whole model.
        num_kv_heads: number of KV heads (query groups) of a layer, over all tensor-parallel ranks.
        block_size, local_blocks, vert_stride, sink_blocks, phases, num_dense_heads: as in `S2Pattern`.
        dense_layers: numbers of the layers that keep dense attention.
        dense_layer_freq: n also keeps every n-th layer dense; 0 keeps none.
        layers: a pattern for each layer, None for a dense one, instead of the fields from `local_blocks` to
            `dense_layer_freq`; `LayerPattern`s or their JSON form, as in a pattern file. Default phases are
            replaced by numbers.
        pattern_heads: heads that strides, phases and dense heads are given for: None for the KV heads, or the
            number of query heads, where those of a KV group see different blocks (`BlockPattern`). A layer
            whose groups see the same nevertheless has the pattern of its KV heads.

    Raises:
        ValueError: a field is out of range, or set beside `layers`; the message starts with its name.
    """

    num_layers: int
    num_kv_heads: int
    block_size: int = 64
    local_blocks: int = 8
    vert_stride: int | tuple[int, ...] = 16
    sink_blocks: int = 0
    phases: tuple[int, ...] | None = None
    num_dense_heads: int = 0
    dense_layers: tuple[int, ...] = ()
    dense_layer_freq: int = 0
    layers: tuple[LayerPattern | None, ...] | None = None
    pattern_heads: int | None = None

    def __post_init__(self) -> None:
        if self.pattern_heads is not None and (
            self.pattern_heads < self.num_kv_heads or self.pattern_heads % self.num_kv_heads
        ):
            raise ValueError(
                f"pattern_heads {self.pattern_heads}: must be the number of query heads, a multiple of the "
                f"{self.num_kv_heads} KV heads"
            )
        if self.layers is not None:
            self._set_layers()
        for layer in self.dense_layers:
            if not 1 <= layer <= self.num_layers:
                raise ValueError(f"dense_layers {layer}: must be between 1 and the {self.num_layers} layers")
        if self.dense_layer_freq < 0:
            raise ValueError(f"dense_layer_freq {self.dense_layer_freq}: must be >= 0")
        _ = self.first_pattern

    def _set_layers(self) -> None:
        for field in fields(self):
            if field.name in _OF_ALL_LAYERS and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} {getattr(self, field.name)}: must not be set with a pattern for each layer"
                )
        layers = layers_of(self.layers, self.num_layers, self._heads, self._head_name)
        numbered, index = [], 0
        for number, layer in enumerate(layers, 1):
            if layer is not None:
                try:
                    layer = LayerPattern.of(layer.pattern(self.block_size, index))
                except ValueError as error:
                    is_of_model = str(error).startswith("block_size")
                    raise ValueError(str(error) if is_of_model else f"layer {number}: {error}") from None
                index += 1
            numbered.append(layer)
        object.__setattr__(self, "layers", tuple(numbered))

    @property
    def _heads(self) -> int:
        """Number of heads that the fields are given for."""
        return self.pattern_heads or self.num_kv_heads

    @property
    def _head_name(self) -> str:
        return "KV head" if self.pattern_heads is None else "query head"

    def check_query_heads(self, num_query_heads: int | None) -> None:
        """Raises ValueError unless the patterns are those of KV heads, or of this number of query heads (None
        for any)."""
        if None not in (self.pattern_heads, num_query_heads) and self.pattern_heads != num_query_heads:
            raise ValueError(
                f"pattern_heads {self.pattern_heads}: must be the {num_query_heads} query heads of the "
                "model, or left out for a pattern per KV head"
            )

    @cached_property
    def per_layer(self) -> S2Settings:
        """The same patterns in the form with `layers`, in which settings are equal if their patterns are."""
        sparse = {n: self.pattern(n) for n in self.sparse_layers}
        per_query_head = any(pattern.num_kv_heads > self.num_kv_heads for pattern in sparse.values())
        if self.layers is not None and per_query_head == (self.pattern_heads is not None):
            return self
        if per_query_head:
            sparse = {n: self._pattern_of_heads(n) for n in sparse}
        layers = tuple(
            LayerPattern.of(sparse[n]) if n in sparse else None for n in range(1, self.num_layers + 1)
        )
        return S2Settings(
            self.num_layers,
            self.num_kv_heads,
            self.block_size,
            layers=layers,
            pattern_heads=self.pattern_heads if per_query_head else None,
        )

    @cached_property
    def first_pattern(self) -> S2Pattern:
        """The pattern of the first S2 layer, of `pattern_heads` heads if these are given. Without `layers`,
        other S2 layers differ only in the rotation of their phases."""
        if self.layers is not None:
            numbers = next((layer for layer in self.layers if layer is not None), None)
            numbers = numbers or LayerPattern(S2Settings.local_blocks, (1,) * self._heads)
            return numbers.pattern(self.block_size)
        return S2Pattern(
            num_kv_heads=self._heads,
            block_size=self.block_size,
            local_blocks=self.local_blocks,
            vert_stride=self.vert_stride,
            sink_blocks=self.sink_blocks,
            phases=self.phases,
            num_dense_heads=self.num_dense_heads,
        )

    @cached_property
    def dense_pattern(self) -> S2Pattern:
        """The pattern of a layer that keeps dense attention."""
        return replace(
            self.first_pattern,
            num_kv_heads=self.num_kv_heads,
            vert_stride=1,
            phases=None,
            num_dense_heads=0,
        )

    def is_dense(self, layer_number: int) -> bool:
        """Whether layer `layer_number` (from 1) keeps dense attention."""
        if self.layers is not None:
            return self.layers[layer_number - 1] is None
        every = self.dense_layer_freq and layer_number % self.dense_layer_freq == 0
        return bool(every) or layer_number in self.dense_layers

    def pattern(self, layer_number: int) -> S2Pattern:
        """The pattern of layer `layer_number` (from 1), over all KV heads of the layer; or over all query
        heads, where those of a group see different blocks.

        Default phases rotate from one S2 layer to the next; dense layers in between do not count.
        """
        if self.is_dense(layer_number):
            return self.dense_pattern
        return self._pattern_of_heads(layer_number).shared_by(self.num_kv_heads)

    def _pattern_of_heads(self, layer_number: int) -> S2Pattern:
        """The pattern of an S2 layer over the heads that the fields are given for."""
        if self.layers is not None:
            return self.layers[layer_number - 1].pattern(self.block_size)
        return self.first_pattern.for_layer(self.sparse_layers.index(layer_number))

    @cached_property
    def sparse_layers(self) -> list[int]:
        """Numbers of the layers with S2 attention."""
        return [layer for layer in range(1, self.num_layers + 1) if not self.is_dense(layer)]

    def coverage(self) -> Coverage:
        """The share of the distant past that the S2 layers of the model see together; of a model without any,
        the share that one would see."""
        return coverage_of([self.pattern(layer) for layer in self.sparse_layers] or [self.first_pattern])

    @cached_property
    def distinct_patterns(self) -> list[tuple[S2Pattern, int]]:
        """The distinct patterns of the S2 layers, each with the number of layers that have it."""
        patterns = map(self.pattern, self.sparse_layers)
        return list(Counter(p.select_heads(range(p.num_kv_heads)) for p in patterns).items())

    def describe(self) -> str:
        """The patterns without their phases as text: `block 64, window 8 (512 tokens), stride 16`."""
        if self.layers is None:
            return self.first_pattern.describe()
        return f"block {self.block_size}, a pattern for each layer"

    def mean_pairs(self, lengths: ArrayLike) -> np.ndarray:
        """Mean number of query-key pairs of core attention per layer and head, for each length in tokens."""
        return self.mean_pairs_of(self.distinct_patterns, lengths)

    def mean_pairs_of(self, patterns: Iterable[tuple[S2Pattern, int]], lengths: ArrayLike) -> np.ndarray:
        """`mean_pairs` if the S2 layers had these patterns, each with the number of layers that have it."""
        import numpy as np

        from megatron_s2.pattern.pair_counts import visible_pairs

        lengths = np.asarray(lengths, dtype=np.int64)
        dense = (self.num_layers - len(self.sparse_layers)) * dense_pairs(lengths)
        sparse = np.zeros_like(lengths)
        for pattern, layers in patterns:
            pairs = visible_pairs(pattern, lengths.ravel()).sum(0).reshape(lengths.shape)
            sparse += layers * pairs * (self._heads // pattern.num_kv_heads)
        return (sparse / self._heads + dense) / self.num_layers


# The fields that describe the pattern; a model's configuration has the other two anyway.
PATTERN_FIELDS = tuple(
    name for name in S2Settings.__dataclass_fields__ if name not in ("num_layers", "num_kv_heads")
)
# Those that `layers` replaces.
_OF_ALL_LAYERS = tuple(
    name for name in PATTERN_FIELDS if name not in ("block_size", "layers", "pattern_heads")
)


def pattern_fields(settings: S2Settings) -> dict[str, object]:
    """Returns the fields that describe the pattern, as numbers, tuples and JSON objects: those that count."""
    if settings.layers is not None:
        found = {"block_size": settings.block_size, "layers": layer_entries(settings.layers)}
    else:
        found = {name: getattr(settings, name) for name in PATTERN_FIELDS if name != "layers"}
        del found["pattern_heads"]
    return found | ({} if settings.pattern_heads is None else {"pattern_heads": settings.pattern_heads})
