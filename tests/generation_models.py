"""Tiny Hugging Face models with S2 settings, and prompts for them."""

from dataclasses import dataclass

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 97
PAD = 0
# Layer 2 is dense, layer 1 has S2 heads of two strides.
SETTINGS = {
    "block_size": 16,
    "local_blocks": 2,
    "vert_stride": [3, 4],
    "sink_blocks": 1,
    "dense_layers": [2],
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large enough that rounding does not change greedy tokens
}
MODEL_CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24}),
}


def save_model(directory, family: str, **config) -> None:
    """Saves a random model with S2 settings in its config.json, as the export writes them."""
    model_class, config_class, options = MODEL_CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SHAPE, **options}))
    for key, value in {"s2_attention": SETTINGS, "attn_implementation": "s2", **config}.items():
        if value is not None:
            setattr(model.config, key, value)
    model.save_pretrained(directory)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@dataclass(frozen=True)
class Batch:
    """Prompts in one tensor, padded on one side; `row` returns the real tokens of a row of any result."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, prompts: list[list[int]], side: str) -> "Batch":
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), PAD)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            columns = slice(longest - len(prompt), longest) if side == "left" else slice(len(prompt))
            ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
        return cls(ids, mask)

    def row(self, result: torch.Tensor, row: int) -> torch.Tensor:
        return result[row, self.attention_mask[row].bool()]


def logits_of(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Returns the logits `[tokens, vocabulary]` of one unpadded sequence, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """Returns the greedy continuation, recomputing the whole sequence for every token."""
    sequence = list(prompt)
    for _ in range(tokens):
        sequence.append(int(logits_of(model, sequence)[-1].argmax()))
    return sequence[len(prompt) :]
