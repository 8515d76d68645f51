"""Phi-3-small in plain PyTorch, from the published model's description and independent of the package.

It is the oracle of the conversion, because transformers has no class for it: slow, dense scores with a mask
for each query head, float32 in the order in which one would write it down.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

# Eight query heads on two KV heads; blocks of 16 tokens; every second layer dense.
CONFIG = {
    "architectures": ["Phi3SmallForCausalLM"],
    "model_type": "phi3small",
    "vocab_size": 250,
    "hidden_size": 64,
    "ff_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "hidden_act": "gegelu",
    "gegelu_limit": 1.5,  # 20 in the published model; small enough that it clamps here
    "layer_norm_epsilon": 1e-5,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "mup_use_scaling": True,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
    "blocksparse_block_size": 16,
    "blocksparse_num_local_blocks": 3,
    "blocksparse_vert_stride": 8,
    "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def save_model(directory: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Saves a random model; norms and biases are random, too, not ones and zeros."""
    config = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, dtype), directory / "model.safetensors")
    return directory


def random_weights(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(11)
    hidden, ffn = config["hidden_size"], config["ff_intermediate_size"]
    qkv = hidden + 2 * hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for n in range(config["num_hidden_layers"]):
        for name, rows, columns in (
            ("self_attn.query_key_value", qkv, hidden),
            ("self_attn.dense", hidden, hidden),
            ("mlp.up_proj", 2 * ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ):
            shapes[f"model.layers.{n}.{name}.weight"] = (rows, columns)
            shapes[f"model.layers.{n}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"model.layers.{n}.{name}.{part}": (hidden,) for part in ("weight", "bias")}
    shapes |= {f"model.final_layernorm.{part}": (hidden,) for part in ("weight", "bias")}
    weights = {}
    for name, shape in shapes.items():
        is_norm = "layernorm.weight" in name
        values = torch.randn(shape, generator=draw) * (0.3 if len(shape) == 2 else 0.2) + is_norm
        weights[name] = values.to(dtype)
    return weights


def logits(weights: dict[str, Tensor], config: dict, tokens: Tensor) -> Tensor:
    """Returns the logits `[batch, tokens, vocabulary]`."""
    weights = {name: weight.float() for name, weight in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], scale, shift, config["layer_norm_epsilon"])

    x = weights["model.embed_tokens.weight"][tokens] * config["mup_embedding_multiplier"]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        qkv = linear(f"{layer}.self_attn.query_key_value", norm(f"{layer}.input_layernorm", x))
        x = x + linear(f"{layer}.self_attn.dense", attention(qkv, config, n))
        up = linear(f"{layer}.mlp.up_proj", norm(f"{layer}.post_attention_layernorm", x))
        x = x + linear(f"{layer}.mlp.down_proj", gegelu(up, config["gegelu_limit"]))
    x = norm("model.final_layernorm", x)
    return x @ weights["model.embed_tokens.weight"].T / config["mup_width_multiplier"]


def gegelu(up: Tensor, limit: float | None) -> Tensor:
    gate, linear = up[..., 0::2], up[..., 1::2]
    if limit is not None:
        gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (linear + 1)


def attention(qkv: Tensor, config: dict, n: int) -> Tensor:
    """Attention of layer `n` (from 0), given rows of query, key and value heads group by group."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    group, head_dim = heads // kv_heads, config["hidden_size"] // heads
    batch, length, _ = qkv.shape
    by_group = qkv.view(batch, length, kv_heads, group + 2, head_dim)
    q = rotated(by_group[:, :, :, :group].flatten(2, 3), config)
    k = rotated(by_group[:, :, :, group], config)
    v = by_group[:, :, :, group + 1]
    out = torch.empty_like(q)
    for h in range(heads):
        scores = q[:, :, h] @ k[:, :, h // group].transpose(1, 2) / head_dim
        scores = scores.masked_fill(~visible(config, n, h, length), -math.inf)
        out[:, :, h] = scores.softmax(-1) @ v[:, :, h // group]
    return out.flatten(2)


def rotated(x: Tensor, config: dict) -> Tensor:
    half = x.shape[-1] // 2
    positions = torch.arange(x.shape[1]) / config["rope_position_scale"]
    frequencies = config["rope_embedding_base"] ** (-torch.arange(half) / half)
    angles = (positions[:, None] * frequencies)[:, None]
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def visible(config: dict, n: int, h: int, length: int) -> Tensor:
    """Bool `[tokens, tokens]`, which keys the queries of head `h` in layer `n` see."""
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = columns <= rows
    every = config["dense_attention_every_n_layers"]
    if every and (n + 1) % every == 0:
        return causal
    row_block, block = (x // config["blocksparse_block_size"] for x in (rows, columns))
    h = 0 if config["blocksparse_homo_head_pattern"] else h
    step = max(1, config["blocksparse_vert_stride"] // config["num_attention_heads"])
    strided = (block + h * step + 1) % config["blocksparse_vert_stride"] == 0
    return causal & ((row_block - block < config["blocksparse_num_local_blocks"]) | strided)
