"""Which tensors a model has in both formats, and how the rows of one are laid out in the other.

One table serves both directions. Hugging Face has one tensor per layer and projection; Megatron has one
tensor over all layers (first axis), with query, key and value in one and gate and up in one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_s2.checkpoint.model import Model

Parts = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How a Megatron tensor is made of Hugging Face's, and the way back."""

    join: Callable[[Parts, Model], torch.Tensor]
    split: Callable[[torch.Tensor, Model], Parts]


def _gate_above_up(parts: Parts, model: Model) -> torch.Tensor:
    return torch.cat(tuple(parts))


def _gate_and_up(stacked: torch.Tensor, model: Model) -> Parts:
    return stacked.chunk(2)


def _group_by_group(parts: Parts, model: Model) -> torch.Tensor:
    """Rows [groups, (queries per group + key + value) * head_dim]: each KV head follows its queries."""
    groups = [part.reshape(model.num_query_groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _query_key_value(joined: torch.Tensor, model: Model) -> Parts:
    queries = model.num_attention_heads // model.num_query_groups
    groups = joined.reshape(model.num_query_groups, -1, *joined.shape[1:])
    sizes = [queries * model.head_dim, model.head_dim, model.head_dim]
    return [part.flatten(0, 1) for part in groups.split(sizes, dim=1)]


SAME = Layout(lambda parts, model: parts[0], lambda tensor, model: [tensor])
STACKED = Layout(_gate_above_up, _gate_and_up)
INTERLEAVED = Layout(_group_by_group, _query_key_value)


@dataclass(frozen=True)
class _Row:
    """One line of the table: a Megatron key and Hugging Face's names (a layer's without their prefix), each
    with its shape in the words of `_sizes`."""

    megatron: str
    parts: dict[str, str]
    layout: Layout = SAME


_EMBEDDING = _Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"})
_FINAL_NORM = _Row("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"})
_OUTPUT = _Row("output_layer.weight", {"lm_head.weight": "vocab hidden"})
_LAYER = (
    _Row("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "hidden"}),
    _Row(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": "query hidden",
            "self_attn.k_proj.weight": "key hidden",
            "self_attn.v_proj.weight": "key hidden",
        },
        INTERLEAVED,
    ),
    _Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden query"}),
    _Row("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "hidden"}),
    _Row(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
        STACKED,
    ),
    _Row("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}),
)
_QKV_BIAS = _Row(
    "self_attention.linear_qkv.bias",
    {"self_attn.q_proj.bias": "query", "self_attn.k_proj.bias": "key", "self_attn.v_proj.bias": "key"},
    INTERLEAVED,
)
_HEAD_NORMS = (
    _Row("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "head"}),
    _Row("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "head"}),
)
_LAYER_OF = {
    "llama": _LAYER,
    "mistral": _LAYER,
    "qwen2": (*_LAYER, _QKV_BIAS),
    "qwen3": (*_LAYER, *_HEAD_NORMS),
}

# Modules whose state besides weights (of 8-bit training) Megatron expects in a checkpoint. It is empty here.
EXTRA_STATES_OF_LAYER = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
EXTRA_STATES_OF_HEAD_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
LAYERS = "decoder.layers."


def _sizes(model: Model) -> dict[str, int]:
    return {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "head": model.head_dim,
        "query": model.num_attention_heads * model.head_dim,
        "key": model.num_query_groups * model.head_dim,
    }


@dataclass(frozen=True)
class Placed:
    """One tensor of a model, or one layer of it, in both formats.

    Args:
        key: Megatron's name in a sharded checkpoint.
        layer: from 0; None for what is not in a layer.
        shape: in Megatron, without the axis of layers.
        parts: Hugging Face's names with their shapes, in the order of `layout`.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    layout: Layout = field(repr=False)


def placed_tensors(model: Model) -> Iterator[Placed]:
    """Every tensor of `model`, from the embedding to the output layer."""
    yield _placed(_EMBEDDING, model)
    for layer in range(model.num_layers):
        for row in _LAYER_OF[model.family]:
            yield _placed(row, model, layer)
    yield _placed(_FINAL_NORM, model)
    if not model.tied:
        yield _placed(_OUTPUT, model)


def _placed(row: _Row, model: Model, layer: int | None = None) -> Placed:
    sizes = _sizes(model)
    before_key, before_part = ("", "") if layer is None else (LAYERS, f"model.layers.{layer}.")
    parts = {
        before_part + name: tuple(sizes[word] for word in shape.split()) for name, shape in row.parts.items()
    }
    shapes = list(parts.values())
    rows = sum(shape[0] for shape in shapes)
    return Placed(before_key + row.megatron, layer, (rows, *shapes[0][1:]), parts, row.layout)


def extra_state_keys(model: Model) -> Iterator[str]:
    """Keys of the (empty) extra states, of Megatron's own layers and of Transformer Engine's."""
    modules = EXTRA_STATES_OF_LAYER + (EXTRA_STATES_OF_HEAD_NORMS if model.family == "qwen3" else ())
    for layer in range(model.num_layers):
        for module in modules:
            yield f"{LAYERS}{module}._extra_state/shard_{layer}_{model.num_layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
