"""Megatron's self-attention with S2 core attention and, in static inference, the small KV cache."""

from __future__ import annotations

from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.decode_step import plan_step


class S2SelfAttention(SelfAttention):
    """`SelfAttention` whose core attention is `S2CoreAttention`, with the same parameters and arguments.

    Megatron's own stores all keys and values of a static inference context, before the rotary embedding, and
    does not call core attention in a dynamic one. This class stores a `KVCache` in the static context, at
    `key_value_memory_dict[layer_number, batch_size_offset]`. The context's `swap_key_value_dict` does not
    support it, and raises TypeError.

    Raises:
        ValueError: in `forward`: the context is dynamic or too short, the model is in training mode, or the
            tokens do not follow those in the cache.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        *others,
        inference_params: BaseInferenceContext | None = None,
        **named,
    ) -> tuple[Tensor, Tensor | None]:
        """As `SelfAttention.forward`."""
        context = inference_context or inference_params
        arguments = (hidden_states, attention_mask, key_value_states, context, *others)
        if context is None:
            return super().forward(*arguments, **named)
        if context.is_dynamic_batching():
            raise ValueError(
                "inference_context: must be a StaticInferenceContext with S2 attention: a dynamic one "
                "bypasses core attention (a StaticInferenceEngine creates one itself without legacy=True)"
            )
        if self.training:
            raise ValueError("inference_context: must be None in training mode with S2 attention")
        previous = self.core_attention.kv_cache
        try:
            return super().forward(*arguments, **named)
        finally:
            self.core_attention.kv_cache = previous

    def _adjust_key_value_for_inference(
        self,
        inference_context: BaseInferenceContext | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        *others,
        **named,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, AttnMaskType, None]:
        """Returns only the new tokens, with the rotary angles of their positions; others are in the cache."""
        if inference_context is None:
            return super()._adjust_key_value_for_inference(
                None, query, key, value, rotary_pos_emb, *others, **named
            )
        self.core_attention.kv_cache = self._cache(inference_context, key)
        if rotary_pos_emb is not None:
            start = inference_context.sequence_len_offset
            rotary_pos_emb = tuple(angles[start : start + key.shape[0]] for angles in rotary_pos_emb)
        return query, key, value, rotary_pos_emb, self.attn_mask_type, None

    def _cache(self, context: BaseInferenceContext, key: Tensor) -> KVCache:
        """Returns the cache of this layer for a part of the batch, a new one if the sequences start.

        The first layer of a decoding step plans the step for all layers.
        """
        caches, index = context.key_value_memory_dict, (self.layer_number, context.batch_size_offset)
        start, (tokens, batch, kv_heads, head_dim) = context.sequence_len_offset, key.shape
        limit = context.max_sequence_length
        if start + tokens > limit:
            raise ValueError(
                f"max_sequence_length {limit}: must be at least the {start + tokens} tokens of a row"
            )
        if start == 0:
            pattern = self.core_attention.pattern
            caches[index] = KVCache(pattern, batch, head_dim, key.dtype, key.device, limit, kv_heads)
        lengths = caches[index].lengths if index in caches else []
        if lengths != [start] * batch:
            raise ValueError(
                f"sequence_len_offset {start}: must be the length of each of the {batch} cached sequences, "
                f"{lengths}: S2 attention's cache drops tokens, and can neither go back nor skip some"
            )
        rows = range(batch)
        if tokens == 1 and not caches[index].is_planned(rows):
            layers = [cache for (_, offset), cache in caches.items() if offset == index[1]]
            plan_step([cache for cache in layers if cache.lengths == lengths], rows)
        return caches[index]
