"""How one Megatron tensor corresponds to one or more Hugging Face tensors.

Hugging Face stores one tensor per layer, expert and projection. Megatron stacks the experts of a layer along
an axis, and all layers along another if they have the same tensors; it fuses query, key and value into one
tensor and gate and up into another.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_s2.checkpoint.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

LAYERS = "decoder.layers."

Tensors = Sequence["torch.Tensor"]


@dataclass(frozen=True)
class Fusion:
    """Fuses the Hugging Face tensors of one layer into a Megatron tensor, and splits it again."""

    fuse: Callable[[Tensors, ModelConfig], torch.Tensor]
    split: Callable[[torch.Tensor, ModelConfig], Tensors]


def _concatenate_gate_up(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    import torch

    return torch.cat(tuple(tensors))


def _split_gate_up(fused: torch.Tensor, model: ModelConfig) -> Tensors:
    return fused.chunk(2)


def _interleave_qkv(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    """Returns rows [groups, (queries per group + key + value) * head_dim]; a KV head follows its queries."""
    import torch

    groups = [tensor.reshape(model.num_query_groups, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _split_qkv(fused: torch.Tensor, model: ModelConfig) -> Tensors:
    queries_per_group = model.num_attention_heads // model.num_query_groups
    groups = fused.reshape(model.num_query_groups, -1, *fused.shape[1:])
    rows = [queries_per_group * model.head_dim, model.head_dim, model.head_dim]
    return [tensor.flatten(0, 1) for tensor in groups.split(rows, dim=1)]


def _interleave_rows(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    """As `_interleave_qkv`, of one tensor with the rows of query, then key, then value."""
    [tensor] = tensors
    sizes = _dim_sizes(model)
    return _interleave_qkv(tensor.split([sizes["query"], sizes["key"], sizes["key"]]), model)


def _split_rows(fused: torch.Tensor, model: ModelConfig) -> Tensors:
    import torch

    return [torch.cat(tuple(_split_qkv(fused, model)))]


def _part_rows(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    """Returns the even rows and then the odd ones."""
    import torch

    return torch.cat((tensors[0][::2], tensors[0][1::2]))


def _alternate_rows(fused: torch.Tensor, model: ModelConfig) -> Tensors:
    import torch

    return [torch.stack(fused.chunk(2), 1).flatten(0, 1)]


IDENTITY = Fusion(lambda tensors, model: tensors[0], lambda tensor, model: [tensor])
GATE_UP = Fusion(_concatenate_gate_up, _split_gate_up)
GATE_UP_ROWS = Fusion(_part_rows, _alternate_rows)
QKV = Fusion(_interleave_qkv, _split_qkv)
QKV_ROWS = Fusion(_interleave_rows, _split_rows)


@dataclass(frozen=True)
class TensorMapping:
    """A Megatron tensor and the Hugging Face tensors it is made of.

    Args:
        key: key in a Megatron checkpoint, without the prefix of a layer.
        hf_dims: names of the Hugging Face tensors, without the prefix of a layer, each with its dimensions in
            the words of `_dim_sizes`, such as "vocab hidden". Those of a tensor that each expert has contain
            `{expert}`.
        transformer_engine_key: key that Transformer Engine's layers use; None where it is `key`.
    """

    key: str
    hf_dims: dict[str, str]
    fusion: Fusion = IDENTITY
    transformer_engine_key: str | None = None


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of a model, or one layer of it, or one expert of a layer, in both formats.

    Args:
        keys: key in a Megatron checkpoint, and then that of Transformer Engine's layers if it is another. A
            checkpoint of `write_release` has all of them, one of a training has one.
        stacked: index and size of each leading axis along which it is stacked in the checkpoint.
        shape: shape in Megatron, without the leading axes.
        hf_shapes: names and shapes of its Hugging Face tensors, in the order that `fusion` expects.
    """

    keys: tuple[str, ...]
    stacked: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    hf_shapes: dict[str, tuple[int, ...]]
    fusion: Fusion = field(repr=False)

    @property
    def key(self) -> str:
        return self.keys[0]

    def stored_in(self, keys: Container[str]) -> ModelTensor:
        """Returns the tensor with the key that a checkpoint with `keys` has for it; itself if it has none."""
        found = tuple(key for key in self.keys if key in keys)
        return replace(self, keys=found[:1]) if found else self

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor in the checkpoint."""
        return (*(size for _, size in self.stacked), *self.shape)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this part of the tensor in the checkpoint, with leading axes of 1."""
        return (*(1 for _ in self.stacked), *self.shape)

    @property
    def global_offset(self) -> tuple[int, ...]:
        """Index of the first element of this part in the tensor in the checkpoint."""
        return (*(index for index, _ in self.stacked), *(0 for _ in self.shape))


def layer_prefix(model: ModelConfig, layer: int) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the prefix of the keys of a layer, and the axes along which its tensors are stacked."""
    if model.layers_are_alike:
        return LAYERS, ((layer, model.num_layers),)
    return f"{LAYERS}{layer}.", ()


def mapped_tensors(
    mapping: TensorMapping, model: ModelConfig, layer: int | None = None
) -> Iterator[ModelTensor]:
    """Yields the tensor of `model` that a mapping describes, in layer `layer` or outside of layers; that of
    each expert if the experts have it."""
    prefix, stacked = ("", ()) if layer is None else layer_prefix(model, layer)
    hf_prefix = "" if layer is None else f"model.layers.{layer}."
    sizes = _dim_sizes(model)
    keys = (mapping.key, *filter(None, [mapping.transformer_engine_key]))
    per_expert = any("{expert}" in name for name in mapping.hf_dims)
    for expert in range(model.experts.count if per_expert else 1):
        hf_shapes = {
            hf_prefix + name.format(expert=expert): tuple(sizes[dim] for dim in dims.split())
            for name, dims in mapping.hf_dims.items()
        }
        shapes = list(hf_shapes.values())
        yield ModelTensor(
            tuple(prefix + key for key in keys),
            (*stacked, (expert, model.experts.count)) if per_expert else stacked,
            (sum(rows for rows, *_ in shapes), *shapes[0][1:]),
            hf_shapes,
            mapping.fusion,
        )


def _dim_sizes(model: ModelConfig) -> dict[str, int]:
    sizes = {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "head": model.head_dim,
        "query": model.num_attention_heads * model.head_dim,
        "key": model.num_query_groups * model.head_dim,
        "query+key+value": (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim,
        "gate+up": 2 * model.ffn_hidden_size,
    }
    if model.experts is not None:
        sizes |= {"experts": model.experts.count, "expert_ffn": model.experts.ffn_hidden_size}
    return sizes
