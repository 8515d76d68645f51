"""The model families that are converted: their config.json, their tensors and their Megatron arguments.

A family is one entry of `FAMILIES`; everything else in this package works from that entry. The section "Add a
family" of docs/checkpoints.md lists the steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_s2.checkpoint import phi3_small
from megatron_s2.checkpoint.model_config import ModelConfig
from megatron_s2.checkpoint.tensors import (
    GATE_UP,
    QKV,
    QKV_ROWS,
    ModelTensor,
    TensorMapping,
    layer_prefix,
    mapped_tensors,
)

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
ATTENTION = (
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
)
MLP = (
    TensorMapping("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "hidden"}),
    TensorMapping(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
        GATE_UP,
    ),
    TensorMapping("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}),
)
# Of Phi-3, in which query, key and value are one tensor, and gate and up another.
FUSED_QKV = TensorMapping(
    "self_attention.linear_qkv.weight", {"self_attn.qkv_proj.weight": "query+key+value hidden"}, QKV_ROWS
)
FUSED_GATE_UP = TensorMapping("mlp.linear_fc1.weight", {"mlp.gate_up_proj.weight": "gate+up hidden"})
QKV_BIAS = TensorMapping(
    "self_attention.linear_qkv.bias",
    {"self_attn.q_proj.bias": "query", "self_attn.k_proj.bias": "key", "self_attn.v_proj.bias": "key"},
    QKV,
)
QK_NORMS = (
    TensorMapping("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "head"}),
    TensorMapping("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "head"}),
)


def _expert_tensors(block: str, gate: str, up: str, down: str) -> tuple[TensorMapping, ...]:
    """Returns the tensors of a layer's experts and of their router, given the names in Hugging Face.

    Megatron's own layers and those of Transformer Engine have different keys for the norm, because the first
    linear layer of an MLP contains it in Transformer Engine, and that of an expert does not.
    """
    expert = f"{block}.experts.{{expert}}"
    return (
        TensorMapping(
            "mlp.linear_fc1.layer_norm_weight",
            {"post_attention_layernorm.weight": "hidden"},
            transformer_engine_key="pre_mlp_layernorm.weight",
        ),
        TensorMapping("mlp.router.weight", {f"{block}.gate.weight": "experts hidden"}),
        TensorMapping(
            "mlp.experts.experts.linear_fc1.weight",
            {
                f"{expert}.{gate}.weight": "expert_ffn hidden",
                f"{expert}.{up}.weight": "expert_ffn hidden",
            },
            GATE_UP,
        ),
        TensorMapping(
            "mlp.experts.experts.linear_fc2.weight", {f"{expert}.{down}.weight": "hidden expert_ffn"}
        ),
    )


@dataclass(frozen=True)
class ExpertEntries:
    """Experts of a family: their tensors, and the entries of config.json that describe them.

    Args:
        tensors: the tensors of a layer with experts that take the place of an MLP's.
        count: name of the entry, and of others with the same meaning.
        ffn_hidden_size, top_k: names of the entries.
        normalization: name of the entry that says whether the weights of a token's experts are divided by
            their sum, false if missing; None where they always are.
        may_be_missing: whether some layers may have an MLP, by `decoder_sparse_step` and `mlp_only_layers`.
    """

    tensors: tuple[TensorMapping, ...]
    count: tuple[str, ...]
    ffn_hidden_size: str
    top_k: str = "num_experts_per_tok"
    normalization: str | None = None
    may_be_missing: bool = False


@dataclass(frozen=True)
class Family:
    """A Hugging Face `model_type`.

    Args:
        architecture: the class that `architectures` in config.json names.
        attention: the tensors of a layer's attention.
        mlp: the tensors of a layer's MLP.
        experts: experts in the place of the MLP; None where the family has none.
        final_norm: the tensors of the norm behind the last layer.
        megatron_args: Megatron arguments that this family has and the others lack. The family of a Megatron
            checkpoint is recognized by them, and by whether it has experts.
        required_entries: sizes that config.json must state, because transformers would otherwise use a fixed
            number. The others may be missing or null: `head_dim` is then hidden_size / num_attention_heads,
            `num_key_value_heads` is num_attention_heads.
        defaults: value of each entry that config.json may lack, where it is not that of the other families.
        rope_types: values of `rope_type` that the family has and Megatron, too.
        has_partial_rotary: whether `partial_rotary_factor` may be less than 1.
        has_window_switch: whether `sliding_window` in config.json applies only where `use_sliding_window` is
            true. In other families it applies wherever it is not null.
        has_full_layers: whether a window that is switched on slides only in layers where `layer_types` says
            so, or else from `max_window_layers` on.
    """

    architecture: str
    attention: tuple[TensorMapping, ...] = ATTENTION
    mlp: tuple[TensorMapping, ...] = MLP
    experts: ExpertEntries | None = None
    final_norm: tuple[TensorMapping, ...] = FINAL_NORM
    megatron_args: Mapping[str, object] = field(default_factory=dict)
    required_entries: tuple[str, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    has_partial_rotary: bool = False
    has_window_switch: bool = False
    has_full_layers: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Arguments by whose presence the family of a Megatron checkpoint is recognized."""
        return (*self.megatron_args, *(["num_experts"] if self.experts else []))


FAMILIES = {
    "llama": Family("LlamaForCausalLM", has_window_switch=True, has_full_layers=True),
    "mistral": Family(
        "MistralForCausalLM",
        required_entries=("num_key_value_heads",),
        defaults={"sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        attention=(*ATTENTION, QKV_BIAS),
        megatron_args={"add_qkv_bias": True},
        required_entries=("num_key_value_heads",),
        has_window_switch=True,
        has_full_layers=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        attention=(*ATTENTION, *QK_NORMS),
        megatron_args={"qk_layernorm": True},
        required_entries=("num_key_value_heads", "head_dim"),
        has_window_switch=True,
        has_full_layers=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        attention=(ATTENTION[0], FUSED_QKV, ATTENTION[2]),
        mlp=(MLP[0], FUSED_GATE_UP, MLP[2]),
        defaults={"rms_norm_eps": 1e-5},
        rope_types=("default",),
        has_partial_rotary=True,
    ),
    phi3_small.NAME: Family(
        phi3_small.ARCHITECTURE,
        attention=phi3_small.ATTENTION,
        mlp=phi3_small.MLP,
        final_norm=phi3_small.FINAL_NORM,
        megatron_args=phi3_small.MARKS,
        required_entries=("num_key_value_heads",),
        rope_types=("default", "linear"),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        mlp=(),
        experts=ExpertEntries(
            _expert_tensors("block_sparse_moe", gate="w1", up="w3", down="w2"),
            count=("num_local_experts",),
            ffn_hidden_size="intermediate_size",
        ),
        required_entries=("num_key_value_heads",),
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        attention=(*ATTENTION, *QK_NORMS),
        experts=ExpertEntries(
            _expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
            count=("num_experts", "num_local_experts"),
            ffn_hidden_size="moe_intermediate_size",
            normalization="norm_topk_prob",
            may_be_missing=True,
        ),
        megatron_args={"qk_layernorm": True},
        required_entries=("num_key_value_heads",),
        has_window_switch=True,
    ),
}
# Families that Megatron 0.19 has no layers for, and why.
IMPOSSIBLE = {
    "olmo2": "its norms follow attention and MLP, and those of query and key span all heads; Megatron's "
    "precede them, and span one head",
}


def ambiguous_families() -> list[str]:
    """Returns the families that are the same in Megatron as another one, so that `--family` has to choose."""
    marks = [set(family.marks) for family in FAMILIES.values()]
    return [name for name, family in FAMILIES.items() if marks.count(set(family.marks)) > 1]


def _layer_mappings(model: ModelConfig, layer: int) -> tuple[TensorMapping, ...]:
    family = FAMILIES[model.family]
    return (*family.attention, *(family.experts.tensors if model.has_experts(layer) else family.mlp))


def model_tensors(model: ModelConfig) -> Iterator[ModelTensor]:
    """Yields every tensor of `model`, from the embedding to the output layer."""
    yield from mapped_tensors(EMBEDDING, model)
    for layer in range(model.num_layers):
        for mapping in _layer_mappings(model, layer):
            yield from mapped_tensors(mapping, model, layer)
    for mapping in FAMILIES[model.family].final_norm:
        yield from mapped_tensors(mapping, model)
    if not model.tied:
        yield from mapped_tensors(OUTPUT, model)


def extra_state_keys(model: ModelConfig) -> Iterator[str]:
    """Yields the keys of the extra states (of FP8 training) that Megatron expects in a checkpoint.

    Every module with a tensor has one, in Megatron's own layers and in Transformer Engine's, and so has core
    attention; the modules of experts have one per expert. They are empty after a conversion.
    """
    for layer in range(model.num_layers):
        prefix, stacked = layer_prefix(model, layer)
        modules = {(f"{prefix}self_attention.core_attention", stacked)}
        for mapping in _layer_mappings(model, layer):
            for tensor in mapped_tensors(mapping, model, layer):
                modules |= {(key.rpartition(".")[0], tensor.stacked) for key in tensor.keys}
        for module, axes in sorted(modules):
            yield f"{module}._extra_state/{_shard(axes)}"
    yield f"decoder.final_layernorm._extra_state/{_shard(())}"


def _shard(stacked: tuple[tuple[int, int], ...]) -> str:
    """Returns how Megatron names a part of an object: `shard_` with its indices and the sizes of the axes."""
    indices, sizes = zip(*stacked) if stacked else ((0,), (1,))
    return f"shard_{'.'.join(map(str, indices))}_{'.'.join(map(str, sizes))}"
