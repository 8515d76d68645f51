"""The model families that are converted: their config.json, their tensors and their Megatron arguments.

A family is one entry of `FAMILIES`; everything else in this package works from that entry. The section "Add a
family" of docs/checkpoints.md lists the steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_s2.checkpoint import phi3_small
from megatron_s2.checkpoint.model_config import ModelConfig
from megatron_s2.checkpoint.tensors import GATE_UP, LAYERS, QKV, ModelTensor, TensorMapping, model_tensor

# Sizes: the field of `ModelConfig`, the entry of config.json and the argument of Megatron.
SIZES = (
    ("num_layers", "num_hidden_layers", "num_layers"),
    ("hidden_size", "hidden_size", "hidden_size"),
    ("ffn_hidden_size", "intermediate_size", "ffn_hidden_size"),
    ("num_attention_heads", "num_attention_heads", "num_attention_heads"),
    ("num_query_groups", "num_key_value_heads", "num_query_groups"),
    ("head_dim", "head_dim", "kv_channels"),
    ("vocab_size", "vocab_size", "vocab_size"),
    ("max_position_embeddings", "max_position_embeddings", "max_position_embeddings"),
)

EMBEDDING = TensorMapping("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"})
FINAL_NORM = (TensorMapping("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}),)
OUTPUT = TensorMapping("output_layer.weight", {"lm_head.weight": "vocab hidden"})
LAYER = (
    TensorMapping("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "hidden"}),
    TensorMapping(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": "query hidden",
            "self_attn.k_proj.weight": "key hidden",
            "self_attn.v_proj.weight": "key hidden",
        },
        QKV,
    ),
    TensorMapping("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden query"}),
    TensorMapping("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "hidden"}),
    TensorMapping(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
        GATE_UP,
    ),
    TensorMapping("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}),
)
QKV_BIAS = TensorMapping(
    "self_attention.linear_qkv.bias",
    {"self_attn.q_proj.bias": "query", "self_attn.k_proj.bias": "key", "self_attn.v_proj.bias": "key"},
    QKV,
)
QK_NORMS = (
    TensorMapping("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "head"}),
    TensorMapping("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "head"}),
)


@dataclass(frozen=True)
class Family:
    """A Hugging Face `model_type`.

    Args:
        architecture: the class that `architectures` in config.json names.
        layer_tensors: the tensors of one layer.
        final_norm: the tensors of the norm behind the last layer.
        megatron_args: Megatron arguments that this family has and the others lack. The family of a Megatron
            checkpoint is recognized by them.
        required_entries: sizes that config.json must state, because transformers would otherwise use a fixed
            number. The others may be missing or null: `head_dim` is then hidden_size / num_attention_heads,
            `num_key_value_heads` is num_attention_heads.
        has_window_switch: whether `sliding_window` in config.json applies only where `layer_types` says so or
            `use_sliding_window` is true, then to the layers from `max_window_layers` on. In other families it
            applies wherever it is not null.
        default_sliding_window: value of `sliding_window` in tokens where config.json lacks the entry.
    """

    architecture: str
    layer_tensors: tuple[TensorMapping, ...] = LAYER
    final_norm: tuple[TensorMapping, ...] = FINAL_NORM
    megatron_args: Mapping[str, object] = field(default_factory=dict)
    required_entries: tuple[str, ...] = ()
    has_window_switch: bool = False
    default_sliding_window: int | None = None


FAMILIES = {
    "llama": Family("LlamaForCausalLM", has_window_switch=True),
    "mistral": Family(
        "MistralForCausalLM",
        required_entries=("num_key_value_heads",),
        default_sliding_window=4096,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        layer_tensors=(*LAYER, QKV_BIAS),
        megatron_args={"add_qkv_bias": True},
        required_entries=("num_key_value_heads",),
        has_window_switch=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        layer_tensors=(*LAYER, *QK_NORMS),
        megatron_args={"qk_layernorm": True},
        required_entries=("num_key_value_heads", "head_dim"),
        has_window_switch=True,
    ),
    phi3_small.NAME: Family(
        phi3_small.ARCHITECTURE,
        layer_tensors=phi3_small.LAYER,
        final_norm=phi3_small.FINAL_NORM,
        megatron_args=phi3_small.MARKS,
        required_entries=("num_key_value_heads",),
    ),
}


def ambiguous_families() -> list[str]:
    """Returns the families that are the same in Megatron as another one, so that `--family` has to choose."""
    arguments = [family.megatron_args for family in FAMILIES.values()]
    return [name for name, family in FAMILIES.items() if arguments.count(family.megatron_args) > 1]


def model_tensors(model: ModelConfig) -> Iterator[ModelTensor]:
    """Yields every tensor of `model`, from the embedding to the output layer."""
    yield model_tensor(EMBEDDING, model)
    for layer in range(model.num_layers):
        for mapping in FAMILIES[model.family].layer_tensors:
            yield model_tensor(mapping, model, layer)
    for mapping in FAMILIES[model.family].final_norm:
        yield model_tensor(mapping, model)
    if not model.tied:
        yield model_tensor(OUTPUT, model)


def extra_state_keys(model: ModelConfig) -> Iterator[str]:
    """Yields the keys of the extra states (of FP8 training) that Megatron expects in a checkpoint.

    Every module with a tensor has one, in Megatron's own layers and in Transformer Engine's, and so has core
    attention. They are empty after a conversion.
    """
    tensors = FAMILIES[model.family].layer_tensors
    modules = {mapping.key.rpartition(".")[0] for mapping in tensors} | {"self_attention.core_attention"}
    for layer in range(model.num_layers):
        for module in sorted(modules):
            yield f"{LAYERS}{module}._extra_state/shard_{layer}_{model.num_layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
