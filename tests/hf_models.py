"""Tiny Hugging Face models of every family, and the conversion command."""

import contextlib
import io
import json
from pathlib import Path

import torch
from convert_checkpoint import main
from safetensors.torch import load, save_file
from script_main import exit_status
from transformers import AutoConfig, AutoModelForCausalLM

# Four query heads on two KV heads; a vocabulary that Megatron pads to 256.
TINY = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
}
CONFIGS = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3.1": {"model_type": "llama", "rope_parameters": {**LLAMA3, "factor": 8.0}},
    "llama3.2, tied": {
        "model_type": "llama",
        "rope_parameters": {**LLAMA3, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama, linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "mistral, tied": {
        "model_type": "mistral",
        "sliding_window": None,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3, tied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "llama, one KV head": {"model_type": "llama", "num_key_value_heads": 1},
    "qwen3, one KV head": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 32},
    "llama, yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3, yarn with every entry": {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
    },
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "phi3, partial and tied": {
        "model_type": "phi3",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 250000.0,
            "partial_rotary_factor": 0.75,
        },
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3 moe": {**QWEN3_MOE, "norm_topk_prob": True},
    "qwen3 moe, dense layers": {**QWEN3_MOE, "mlp_only_layers": [1], "tie_word_embeddings": True},
}


def make_model(
    directory: Path, family: str, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **changes
) -> Path:
    """Saves a random model of `CONFIGS`; norms and biases are random, too, not ones and zeros."""
    described = {**TINY, **CONFIGS[family], **changes}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    return directory


def edit_config(directory: Path, **changes) -> None:
    """Changes entries of a config.json; None removes an entry."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def convert(direction: str, source: Path, output: Path, *flags: str) -> str:
    """Returns what a conversion prints; raises RuntimeError with its error message if it fails."""
    status, printed, errors = run_conversion(direction, source, output, *flags)
    if status:
        raise RuntimeError(errors)
    return printed


def run_conversion(direction: str, source: Path, output: Path, *flags: str) -> tuple[int, str, str]:
    """Returns the exit status, stdout and stderr of a conversion."""
    words = [direction, "--input", str(source), "--output", str(output), *flags]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = exit_status(main, words)
    return status, out.getvalue(), err.getvalue()


def assert_refused(direction: str, source: Path, message: str, *flags: str) -> None:
    """Asserts that a conversion ends with one line that contains `message` and leaves no files."""
    output = source.parent / "output"
    before = sorted(source.parent.iterdir())
    status, printed, errors = run_conversion(direction, source, output, *flags)
    assert (status, printed) == (2, ""), errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert sorted(source.parent.iterdir()) == before


def store(source: Path, changed: dict[str, torch.Tensor | None]) -> None:
    """Changes tensors of a model that is stored in one file; None removes a tensor."""
    kept = {name: tensor for name, tensor in (weights(source) | changed).items() if tensor is not None}
    save_file(kept, source / "model.safetensors")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a Hugging Face directory."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load(file.read_bytes()).items()
    }


def assert_bit_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert right[name].dtype == tensor.dtype, name
        assert torch.equal(right[name], tensor), name
