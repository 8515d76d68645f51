"""The config.json of published models is read alike, whether transformers 4 or 5 saved it."""

import json

import pytest
from transformers import AutoConfig

from megatron_s2.checkpoint.hf_config import config_from_model, model_from_config, sliding_window

# As saved by transformers 4, without the entries that do not describe the model.
PUBLISHED = {
    "Llama 2": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Llama 3.2": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "Mistral": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "Qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Phi-4": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "max_position_embeddings": 16384,
        "model_type": "phi3",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "Mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
LINEAR = {"factor": 4.0, "type": "linear"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_4_and_5_describe_the_same_model(tmp_path, name):
    older = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(older))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "newer")
    newer = json.loads((tmp_path / "newer/config.json").read_text())
    assert "rope_parameters" in newer
    assert model_from_config(newer) == model_from_config(older)
    assert sliding_window(newer) is sliding_window(older) is None


def test_a_window_without_a_switch_and_without_a_default():
    """As in Phi-3, whose `sliding_window` applies wherever it is not null, and is null if missing."""
    config = PUBLISHED["Llama 2"] | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    assert sliding_window(config) is sliding_window(config | {"sliding_window": None}) is None
    windowed = config | {"sliding_window": 2047}
    assert sliding_window(windowed) == 2047
    model = model_from_config(config)
    assert config_from_model(model, windowed, None, "bfloat16") == config | {
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    assert "sliding_window" not in config_from_model(model, config, None, "bfloat16")


@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3"])
@pytest.mark.parametrize(
    ("entries", "window"),
    [
        ({"max_window_layers": 28, "sliding_window": 4096}, None),
        ({"max_window_layers": 99, "sliding_window": 4096}, None),
        ({"max_window_layers": None, "sliding_window": 4096}, None),
        ({"max_window_layers": 27, "sliding_window": 4096}, 4096),
        ({"max_window_layers": 0, "sliding_window": None}, 4096),
        ({"max_window_layers": 27, "sliding_window": 64, "use_sliding_window": False}, None),
    ],
    ids=str,
)
def test_only_layers_that_slide_have_a_window(tmp_path, name, entries, window):
    """As in transformers, which fills in what is missing (None here)."""
    config = PUBLISHED[name] | {"num_hidden_layers": 28, "use_sliding_window": True} | entries
    config = {entry: value for entry, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path)
    slides = "sliding_attention" in loaded.layer_types
    assert sliding_window(config) == window == (loaded.sliding_window if slides else None)
    loaded.save_pretrained(tmp_path)
    assert sliding_window(json.loads((tmp_path / "config.json").read_text())) == window


@pytest.mark.parametrize("scaling", [LINEAR, LINEAR | {"rope_type": "linear"}])
def test_both_names_of_the_rope_type(scaling):
    assert model_from_config(PUBLISHED["Llama 2"] | {"rope_scaling": scaling}).linear_factor == 4


@pytest.mark.parametrize(
    "name", ["attention_bias", "mlp_bias", "partial_rotary_factor", "quantization_config"]
)
def test_null_means_the_default(name):
    llama = PUBLISHED["Llama 3.2"]
    assert model_from_config(llama | {name: None}) == model_from_config(llama)


def test_null_in_rope_parameters_means_the_default():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": None}
    assert model_from_config(PUBLISHED["Llama 2"] | {"rope_parameters": rope}) == model_from_config(
        PUBLISHED["Llama 2"]
    )


def test_rope_scaling_takes_precedence_over_rope_parameters():
    """As in every version of transformers."""
    both = {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert model_from_config(PUBLISHED["Llama 2"] | both).linear_factor == 4
