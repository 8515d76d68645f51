"""A tiny Llama for tests of calibration."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def tiny_llama(vocab_size: int, layers: int, initializer_range: float) -> PreTrainedModel:
    """Returns a random model with four query heads on two KV heads."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=initializer_range,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
