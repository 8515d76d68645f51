"""A decoder of transformers, run layer by layer with any attention on the queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from megatron_s2.checkpoint.families import FAMILIES
from megatron_s2.kernels import s2_attention
from megatron_s2.pattern import S2Settings

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Attention of a layer: `attend(layer, q, k, v, scale)`, the layer counted from 0, all tensors `[1, tokens,
heads, head_dim]` with rotary positions applied."""

_NAME = "megatron_s2_calibration"
# Tokens whose logits are in memory at a time.
_LOGITS_CHUNK = 1024


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    attend: Attend,
    scaling: float,
    **_,
) -> tuple[Tensor, None]:
    """Attention function for transformers' `AttentionInterface`: hands over to `attend`."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(module.layer_idx, q, k, v, scaling), None


AttentionInterface.register(_NAME, _attention_forward)


class LayeredModel:
    """A causal language model whose attention is a function argument. No gradients of weights are computed.

    Args:
        model: model of a family that is converted (`checkpoint/families.py`), in evaluation mode; its
            attention implementation is replaced.

    Raises:
        ValueError: another family, or a model with a sliding window of its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        if config.model_type not in FAMILIES:
            raise ValueError(f"model_type {config.model_type}: must be one of {', '.join(FAMILIES)}")
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
        if slides and getattr(config, "sliding_window", None) is not None:
            raise ValueError(f"sliding_window {config.sliding_window}: must be null: a pattern has its own")
        model.set_attn_implementation(_NAME)
        self._model = model.eval().requires_grad_(False)
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.vocab_size = config.vocab_size
        self.positions = config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self._model.device

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the hidden states `[1, tokens, hidden]` before the first layer of tokens `[tokens]`."""
        return self._model.get_input_embeddings()(tokens.to(self.device)[None])

    def rotary(self, start: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of hidden states whose first token is at position `start`."""
        positions = torch.arange(start, start + hidden.shape[1], device=self.device)[None]
        return self._model.base_model.rotary_emb(hidden, position_ids=positions)

    def layer(self, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Returns the hidden states `[1, tokens, hidden]` after layer `index`, counted from 0."""
        layer = self._model.base_model.layers[index]
        return layer(hidden, attention_mask=None, position_embeddings=rotary, attend=attend)

    def run(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Returns the hidden states `[1, tokens, hidden]` after the last layer of tokens `[tokens]`."""
        hidden = self.embed(tokens)
        rotary = self.rotary(0, hidden)
        for index in range(self.num_layers):
            hidden = self.layer(index, hidden, rotary, attend)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns float32 logits `[1, tokens, vocabulary]` of hidden states after the last layer."""
        return self._model.lm_head(self._model.base_model.norm(hidden)).float()

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Returns the cross entropy `[tokens]` of labels `[tokens]`, given hidden states after all layers."""
        labels = labels.to(self.device)
        chunks = zip(hidden.split(_LOGITS_CHUNK, 1), labels.split(_LOGITS_CHUNK))
        return torch.cat([F.cross_entropy(self.logits(h)[0], y, reduction="none") for h, y in chunks])

    def divergences(self, hidden: Tensor, dense: Tensor) -> Tensor:
        """Returns the Kullback-Leibler divergence `[tokens]` in nats of predictions from a dense run's.

        Args:
            hidden, dense: hidden states after all layers, `[1, tokens, hidden]`.
        """
        chunks = zip(hidden.split(_LOGITS_CHUNK, 1), dense.split(_LOGITS_CHUNK, 1))
        log_probs = (
            (self.logits(h)[0].log_softmax(-1), self.logits(d)[0].log_softmax(-1)) for h, d in chunks
        )
        return torch.cat([F.kl_div(h, d, reduction="none", log_target=True).sum(-1) for h, d in log_probs])


def dense_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention to everything, by PyTorch's own kernel; an `Attend`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(
        1, 2
    )


def pattern_attention(settings: S2Settings | None) -> Attend:
    """Returns the attention with the pattern of each layer; None makes every layer dense."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if settings is None or settings.is_dense(layer + 1):
            return dense_attention(layer, q, k, v, scale)
        return s2_attention(q, k, v, settings.pattern(layer + 1), scale, return_lse=False)

    return attend
