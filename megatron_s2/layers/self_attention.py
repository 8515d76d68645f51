"""Megatron's self-attention over S2 core attention, with the small KV cache in static inference."""

from __future__ import annotations

from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.decode_step import plan_step


class S2SelfAttention(SelfAttention):
    """`SelfAttention` whose core attention is `S2CoreAttention`, with the same parameters and arguments.

    Megatron's own keeps all keys and values of a static inference context, before the rotary embedding, and
    does not ask core attention at all in a dynamic one. This one keeps in the static context, at
    `key_value_memory_dict[layer_number, batch_size_offset]`, a `KVCache`; `swap_key_value_dict` cannot take
    that apart, and raises TypeError.

    Raises:
        ValueError: in `forward`: the context is a dynamic one or too short, the model is in training mode, or
            tokens do not follow those that the cache has had.
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
                "bypasses core attention (a StaticInferenceEngine makes one itself without legacy=True)"
            )
        if self.training:
            raise ValueError("inference_context: must be None in training mode with S2 attention")
        before = self.core_attention.kv_cache
        try:
            return super().forward(*arguments, **named)
        finally:
            self.core_attention.kv_cache = before

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
        """New tokens stay alone, at their own positions: core attention finds the others in its cache."""
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
        """That of this layer and part of the batch; an empty one where a sequence begins.

        The first layer of a decoding step plans it for all layers.
        """
        caches, place = context.key_value_memory_dict, (self.layer_number, context.batch_size_offset)
        start, (tokens, batch, _, head_dim) = context.sequence_len_offset, key.shape
        most = context.max_sequence_length
        if start + tokens > most:
            raise ValueError(
                f"max_sequence_length {most}: must be at least the {start + tokens} tokens of a row"
            )
        if start == 0:
            caches[place] = KVCache(self.core_attention.pattern, batch, head_dim, key.dtype, key.device, most)
        had = caches[place].lengths if place in caches else []
        if had != [start] * batch:
            raise ValueError(
                f"sequence_len_offset {start}: must be what each of the {batch} sequences has had, {had}: S2 "
                "attention's cache forgets, and can neither go back nor leave out"
            )
        rows = range(batch)
        if tokens == 1 and not caches[place].is_planned(rows):
            layers = [cache for (_, offset), cache in caches.items() if offset == place[1]]
            plan_step([cache for cache in layers if cache.lengths == had], rows)
        return caches[place]
