"""How one Megatron tensor corresponds to one or more Hugging Face tensors.

Hugging Face stores one tensor per layer and projection. Megatron stores one tensor for all layers, stacked
along the first axis, and fuses query, key and value into one tensor and gate and up into another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class TensorMapping:
    """A Megatron tensor and the Hugging Face tensors it is made of.

    Args:
        key: key in a Megatron checkpoint, without the prefix `LAYERS`.
        hf_dims: names of the Hugging Face tensors, without the prefix of a layer, each with its dimensions in
            the words of `_dim_sizes`, such as "vocab hidden".
    """

    key: str
    hf_dims: dict[str, str]
    fusion: Fusion = IDENTITY


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of a model, or one layer of it, in both formats.

    Args:
        key: key in a Megatron checkpoint.
        layer: index of the layer, from 0; None for a tensor outside of layers.
        shape: shape in Megatron, without the layer axis.
        global_shape: shape of the whole tensor in the checkpoint, with all layers.
        hf_shapes: names and shapes of its Hugging Face tensors, in the order that `fusion` expects.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    hf_shapes: dict[str, tuple[int, ...]]
    fusion: Fusion = field(repr=False)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this part of the tensor in the checkpoint, with a layer axis of 1."""
        return self.shape if self.layer is None else (1, *self.shape)

    @property
    def global_offset(self) -> tuple[int, ...]:
        """Index of the first element of this part in the tensor in the checkpoint."""
        zeros = (0,) * len(self.shape)
        return zeros if self.layer is None else (self.layer, *zeros)


def model_tensor(mapping: TensorMapping, model: ModelConfig, layer: int | None = None) -> ModelTensor:
    """Returns the tensor of `model` that a mapping describes, in layer `layer` or outside of layers."""
    key_prefix, hf_prefix = ("", "") if layer is None else (LAYERS, f"model.layers.{layer}.")
    sizes = _dim_sizes(model)
    hf_shapes = {
        hf_prefix + name: tuple(sizes[dim] for dim in dims.split()) for name, dims in mapping.hf_dims.items()
    }
    shapes = list(hf_shapes.values())
    shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
    global_shape = shape if layer is None else (model.num_layers, *shape)
    return ModelTensor(key_prefix + mapping.key, layer, shape, global_shape, hf_shapes, mapping.fusion)


def _dim_sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "head": model.head_dim,
        "query": model.num_attention_heads * model.head_dim,
        "key": model.num_query_groups * model.head_dim,
        "query+key+value": (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim,
        "gate+up": 2 * model.ffn_hidden_size,
    }
