"""S2 attention in Hugging Face transformers: importing this module registers `attn_implementation="s2"`.

    import megatron_s2.hf
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="s2")
    model.generate(**inputs, cache=megatron_s2.hf.S2Cache(model.config))

Prompts that begin alike share what `S2Cache.fork` returns for their common beginning.

The pattern is read from `s2_attention` in the model's config.json, an object with fields of `S2Settings`.
With `"attn_implementation": "s2"` in config.json, transformers refuses to load the model unless this module
has been imported, instead of running it dense. transformers drops that entry whenever it writes a
configuration; while this module is imported, every configuration with `s2_attention` is written with it, and
runs with S2 unless another attention is chosen by name. Every decoder that uses transformers' attention
interface works; the families that transformers has and docs/checkpoints.md converts are tested.

Padding is ignored: the position of a token, which determines its block, is its index among the real tokens of
its row, on whichever side the padding is. No mask of tokens x tokens is built.

Before transformers 5.24 the argument `cache` is called `past_key_values`; `CACHE_ARGUMENT` is its name in the
installed version. Without an `S2Cache`, transformers' own dynamic cache gives the same results but keeps
everything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from inspect import signature
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function, create_causal_mask

from megatron_s2.kernels import s2_attention
from megatron_s2.kernels.numerics import autocast_dtype
from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.cached_attention import cached_attention
from megatron_s2.kv_cache.decode_step import plan_step
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.pattern import S2Pattern, S2Settings
from megatron_s2.pattern.settings import PATTERN_FIELDS, pattern_fields

NAME = "s2"
_SETTINGS, _LAYERS = "s2_attention", "layers"
CACHE_ARGUMENT = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


def settings_of(config: PreTrainedConfig) -> S2Settings:
    """Returns the S2 settings in a model's configuration.

    Raises:
        ValueError: there are none, or a setting is unknown or out of range.
    """
    given = getattr(config, _SETTINGS, None)
    if not isinstance(given, dict):
        raise ValueError(
            f's2_attention {given}: must be a dict of S2 settings with attn_implementation="s2"; the '
            "config.json of a model trained dense has none: load it with another attn_implementation"
        )
    if unknown := given.keys() - set(PATTERN_FIELDS):
        raise ValueError(f"s2_attention {min(unknown)}: must be one of {', '.join(sorted(PATTERN_FIELDS))}")
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if given.get(_LAYERS) is not None:
        fields[_LAYERS] = json.dumps(given[_LAYERS])  # hashable
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    settings = _settings(config.num_hidden_layers, kv_heads, tuple(sorted(fields.items())))
    settings.check_query_heads(config.num_attention_heads)
    return settings


@lru_cache
def _settings(num_layers: int, num_kv_heads: int, fields: tuple[tuple[str, object], ...]) -> S2Settings:
    given = dict(fields)
    if given.get(_LAYERS) is not None:
        given[_LAYERS] = json.loads(given[_LAYERS])
    return S2Settings(num_layers=num_layers, num_kv_heads=num_kv_heads, **given)


def set_pattern(model: PreTrainedModel, settings: S2Settings | None) -> None:
    """Makes a model attend by a pattern, without a change of its weights; None makes it dense (SDPA).

    Args:
        settings: settings for the sizes of the model, as `read_pattern_file` returns them. They become
            `s2_attention` of its configuration.

    Raises:
        ValueError: the settings have another number of layers.
    """
    if settings is None:
        vars(model.config).pop(_SETTINGS, None)
        model.set_attn_implementation("sdpa")
        return
    # As from a config.json: with lists for tuples.
    setattr(model.config, _SETTINGS, json.loads(json.dumps(pattern_fields(settings))))
    settings_of(model.config)
    model.set_attn_implementation(NAME)


@lru_cache(maxsize=1024)
def _pattern(settings: S2Settings, layer_number: int) -> S2Pattern:
    return settings.pattern(layer_number)


# ---------------------------------------------------------------------------------------------------------
# What a configuration says about itself, from its first moment to its last copy


def _chosen_attention(config: PreTrainedConfig) -> str | None:
    """Getter of `_attn_implementation`: S2 where the configuration has a pattern and no attention is chosen.

    transformers would choose sdpa.
    """
    chosen = _TRANSFORMERS_ATTENTION.fget(config)
    return NAME if chosen is None and vars(config).get(_SETTINGS) is not None else chosen


def _entries(config: PreTrainedConfig) -> dict[str, object]:
    """`to_dict`, with which transformers writes every config.json, with `attn_implementation` for a pattern.

    Whatever attention this process runs: the weights were trained with the pattern.
    """
    entries = _TRANSFORMERS_ENTRIES(config)
    if entries.get(_SETTINGS) is not None:
        entries["attn_implementation"] = NAME
    return entries


_TRANSFORMERS_ATTENTION = PreTrainedConfig._attn_implementation
_TRANSFORMERS_ENTRIES = PreTrainedConfig.to_dict


def _patch_configurations() -> None:
    """Replaces `PreTrainedConfig.to_dict` and the getter of `PreTrainedConfig._attn_implementation`, which
    change nothing in configurations without `s2_attention`."""
    PreTrainedConfig.to_dict = wraps(_TRANSFORMERS_ENTRIES)(_entries)
    PreTrainedConfig._attn_implementation = _TRANSFORMERS_ATTENTION.getter(_chosen_attention)


# ---------------------------------------------------------------------------------------------------------
# The functions that transformers calls


@dataclass(frozen=True)
class PaddingMask:
    """Which tokens of a batch are real, as the attention layers of one forward pass receive it.

    Args:
        real: bool `[batch, tokens]`, including the cached tokens; False for padding.
        queries: number of tokens of this pass, the last of `tokens`.
        counts: number of real tokens of each row.
        new_counts: number of real tokens of each row in this pass.
    """

    real: Tensor
    queries: int
    counts: list[int]
    new_counts: list[int]

    @classmethod
    def read(cls, real: Tensor, queries: int) -> PaddingMask | None:
        """Returns the mask with these real tokens, in one copy to the host; None if all tokens are real."""
        counts, new_counts = torch.stack([real.sum(1), real[:, real.shape[1] - queries :].sum(1)]).tolist()
        if min(counts) == real.shape[1]:
            return None
        return cls(real, queries, counts, new_counts)

    @property
    def new(self) -> Tensor:
        """`real` of the tokens of this pass, `[batch, queries]`."""
        return self.real[:, self.real.shape[1] - self.queries :]

    @cached_property
    def columns(self) -> list[Tensor]:
        """Columns of the real tokens of each row, in ascending order."""
        return self._real_first(self.real, self.counts)

    @cached_property
    def new_columns(self) -> list[Tensor]:
        """Columns, among those of this pass, of the real tokens of each row, in ascending order."""
        return self._real_first(self.new, self.new_counts)

    @staticmethod
    def _real_first(real: Tensor, counts: list[int]) -> list[Tensor]:
        """Indexing by the mask itself would wait for the device once per row and tensor."""
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)
        return [row[:count] for row, count in zip(order, counts)]


def s2_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig | None = None,
    **_,
) -> PaddingMask | None:
    """Mask function for transformers' `AttentionMaskInterface`; returns None for a batch without padding.

    Raises:
        ValueError: the model or the call needs another mask than a causal one with padding.
    """
    if config is not None:
        settings_of(config)
        layer_types = getattr(config, "layer_types", None)
        slides = layer_types is None or "sliding_attention" in layer_types
        if slides and getattr(config, "sliding_window", None) is not None:
            raise ValueError(
                f'sliding_window {config.sliding_window}: must be null with attn_implementation="s2", whose '
                "window is local_blocks of s2_attention"
            )
    if mask_function is not causal_mask_function:
        raise ValueError(
            'attention: must be causal over whole rows with attn_implementation="s2"; packed sequences '
            "(position_ids that start again) and masks of a model's own are not supported"
        )
    if kv_offset or int(q_offset) + q_length != kv_length:
        raise ValueError(
            f'{CACHE_ARGUMENT}: must be an S2Cache or a DynamicCache with attn_implementation="s2"'
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)}: must be [batch, tokens] = "
            f"{(batch_size, kv_length)}, the cached tokens included"
        )
    return PaddingMask.read(attention_mask.bool(), q_length)


def s2_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PaddingMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention function for transformers' `AttentionInterface`.

    Args:
        module: attention layer with `config` and `layer_idx`.
        query: `[batch, heads, queries, head_dim]`, the last of the tokens of the keys.
        key, value: `[batch, kv_heads, keys, head_dim]`, or the `NewTokens` that an `S2Cache` returns.
        attention_mask: the value returned by `s2_mask`.

    Returns:
        The output `[batch, queries, heads, head_dim]`, zeros for padding; and None instead of the
        probabilities, which are not computed.

    Raises:
        ValueError: the layer needs something that S2 attention does not support.
    """
    refused = {
        "attention_dropout": dropout or None,
        "is_causal": None if (module.is_causal if is_causal is None else is_causal) else False,
        **{name: kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux", "position_bias")},
    }
    for name, asked in refused.items():
        if asked is not None:
            raise ValueError(f'{name}: must not be set with attn_implementation="s2"')
    if not isinstance(attention_mask, PaddingMask | None):
        raise ValueError('attention_mask: must be [batch, tokens] with attn_implementation="s2"')
    q = query.transpose(1, 2)
    if isinstance(key, NewTokens):
        return key.attend(q, attention_mask, scaling), None
    pattern = _pattern(settings_of(module.config), module.layer_idx + 1)
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is None:
        q_start = k.shape[1] - q.shape[1]
        return s2_attention(q, k, v, pattern, scaling, q_start=q_start, return_lse=False), None
    attend = _attend_packed if q.shape[1] == k.shape[1] else _attend_by_row
    return attend(q, k, v, pattern, scaling, attention_mask), None


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, pattern: S2Pattern, scale: float | None, padding: PaddingMask
) -> Tensor:
    """Attention within complete rows: their real tokens are packed, one document per row."""
    offsets = list(accumulate(padding.counts, initial=0))
    width = padding.real.shape[1]
    tokens = torch.cat([row * width + columns for row, columns in enumerate(padding.columns)]).to(q.device)
    packed = (x.flatten(0, 1)[tokens] for x in (q, k, v))
    out = s2_attention(*packed, pattern, scale, cu_seqlens=offsets, return_lse=False)
    rows = out.new_zeros(q.shape[0] * width, *out.shape[1:])
    return rows.index_copy(0, tokens, out).unflatten(0, q.shape[:2])


def _attend_by_row(
    q: Tensor, k: Tensor, v: Tensor, pattern: S2Pattern, scale: float | None, padding: PaddingMask
) -> Tensor:
    """Attention of queries that follow cached keys, row by row, because each row has another length."""
    rows = []
    for row, (columns, new_columns) in enumerate(zip(padding.columns, padding.new_columns)):
        real, new = columns.to(q.device), new_columns.to(q.device)
        q_row, k_row, v_row = q[row, new], k[row, real], v[row, real]
        q_start = len(k_row) - len(q_row)
        out = s2_attention(
            q_row[None], k_row[None], v_row[None], pattern, scale, q_start=q_start, return_lse=False
        )
        rows.append(out.new_zeros(q.shape[1], *out.shape[2:]).index_copy(0, new, out[0]))
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------
# The cache


@dataclass(frozen=True)
class NewTokens:
    """Keys and values of new tokens and the cache of the earlier ones, which `S2Cache` returns as keys.

    It is not a tensor, so that any other attention function fails on it.

    Args:
        k, v: `[batch, kv_heads, tokens, head_dim]`.
    """

    k: Tensor
    v: Tensor
    layer: S2CacheLayer

    def attend(self, q: Tensor, padding: PaddingMask | None, scale: float | None) -> Tensor:
        """Returns the attention of queries `[batch, tokens, heads, head_dim]` and appends the new tokens to
        the cache."""
        k, v, cache = self.k.transpose(1, 2), self.v.transpose(1, 2), self.layer.cache
        padding = self.layer.padding if padding is None else padding
        if padding is None:
            if len(set(cache.lengths)) > 1:
                raise ValueError(
                    "attention_mask: must be given, [batch, tokens], because an earlier one had padding"
                )
            new = [q.shape[1]] * cache.batch
        else:
            new = padding.new_counts
            if padding.counts != [length + count for length, count in zip(cache.lengths, new)]:
                raise ValueError("attention_mask: must not change the columns of cached tokens")
        if q.shape[1] == 1:
            self.layer.plan([row for row, count in enumerate(new) if count])
        if q.shape[1] == 1 or min(new) == q.shape[1]:
            return cached_attention(q, k, v, cache, scale, new=new)
        # The cache requires real tokens first; the output is put back in order.
        order = (~padding.new).to(q.device, torch.int8).argsort(dim=1, stable=True)
        rows = torch.arange(len(order), device=q.device)[:, None]
        out = cached_attention(q[rows, order], k[rows, order], v[rows, order], cache, scale, new=new)
        return out[rows, order.argsort(1)]


class S2CacheLayer(CacheLayerMixin):
    """A layer of a transformers cache with the small cache of one model layer (`KVCache`).

    Args:
        pattern: the blocks that each KV head sees.
        max_tokens: largest number of tokens of a row; None where it is not known.
        context: ranks over which the cache is spread (`KVCache`); None for one rank.

    Attributes:
        padding: padding of the next pass where `attention_mask` is not given; None where there is none.
        layers: all layers of the same cache, whose decoding steps are planned at once.
    """

    def __init__(
        self,
        pattern: S2Pattern,
        max_tokens: int | None = None,
        context: ContextParallelGroup | None = None,
    ) -> None:
        super().__init__()
        self.pattern = pattern
        self.max_tokens = max_tokens
        self.context = context
        self.cache: KVCache | None = None
        self.columns = 0
        self.padding: PaddingMask | None = None
        self.layers: list[S2CacheLayer] = [self]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads, _, head_dim = key_states.shape
        dtype = autocast_dtype(key_states) or key_states.dtype
        device = key_states.device
        self.cache = KVCache(
            self.pattern, batch, head_dim, dtype, device, self.max_tokens, kv_heads, self.context
        )
        self.is_initialized = True

    def plan(self, rows: list[int]) -> None:
        """Plans one token of each of `rows`, in this layer and in those that will follow in the same pass."""
        if rows and not self.cache.is_planned(rows):
            lengths = self.cache.lengths
            caches = [layer.cache for layer in self.layers if layer.cache is not None]
            plan_step([cache for cache in caches if cache.lengths == lengths], rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[NewTokens, NewTokens]:
        """Returns the new tokens without storing them: attention, which knows the padding, does that."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                f"{CACHE_ARGUMENT}: must not be an S2Cache while gradients are recorded, because it passes "
                "none on; train with use_cache=False, or generate under torch.no_grad()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.columns += key_states.shape[2]
        new = NewTokens(key_states, value_states, self)
        return new, new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of columns of the batch so far, including padding."""
        return self.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.16

    def reset(self) -> None:
        self.cache, self.columns, self.is_initialized, self.padding = None, 0, False, None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"{CACHE_ARGUMENT}: must not be an S2Cache in assisted generation, which removes tokens: the "
                "cache has already dropped entries for them"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.cache = self.cache.fork([row for row in range(self.cache.batch) for _ in range(repeats)])

    def fork(self, rows: Sequence[int | None]) -> S2CacheLayer:
        """Returns a layer of another cache, whose sequences are these (`KVCache.fork`)."""
        forked = copy(self)
        forked.padding = None
        if self.cache is not None:
            forked.cache = self.cache.fork(rows)
        return forked

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            self.cache.select(indices.tolist())


class S2Cache(Cache):
    """A transformers cache that keeps for each KV head only what later tokens see; pass it as `cache`.

    Args:
        config: the model's configuration.
        max_tokens: largest number of tokens of a row, including the prompt; memory is then allocated once and
            exactly. None where it is not known.
        context: ranks over which the keys and values of every head are spread, each of which runs the model
            on the same tokens; None to keep all of them here.

    Raises:
        ValueError: the model does not run with `attn_implementation="s2"`, or has no S2 settings.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int | None = None,
        context: ContextParallelGroup | None = None,
    ) -> None:
        config = config.get_text_config(decoder=True)
        if config._attn_implementation != NAME:
            raise ValueError(
                f'attn_implementation "{config._attn_implementation}": must be "s2" to use an S2Cache'
            )
        settings = settings_of(config)
        layer_numbers = range(1, settings.num_layers + 1)
        super().__init__(
            layers=[S2CacheLayer(_pattern(settings, number), max_tokens, context) for number in layer_numbers]
        )
        self._connect()

    def _connect(self) -> None:
        for layer in self.layers:
            layer.layers = self.layers

    def fork(self, rows: Sequence[int | None]) -> S2Cache:
        """Returns a cache of these sequences, in this order, which share what they have in common.

        A row may occur several times, such as the common beginning of several prompts; its shard is then
        stored once, and only the window is copied. None is a sequence without tokens. This cache can be used
        on, and neither changes the other. Padding of the next pass is forgotten.

        Args:
            rows: indices of sequences of this cache.
        """
        forked = copy(self)
        forked.layers = [layer.fork(rows) for layer in self.layers]
        forked._connect()
        return forked

    def set_padding(self, padding: PaddingMask | None) -> None:
        """Sets the padding of the next pass for a caller that knows it and gives no `attention_mask`."""
        for layer in self.layers:
            layer.padding = padding

    @property
    def caches(self) -> list[KVCache]:
        """The caches of the layers that have received tokens."""
        return [layer.cache for layer in self.layers if layer.cache is not None]


_patch_configurations()
AttentionInterface.register(NAME, s2_attention_forward)
AttentionMaskInterface.register(NAME, s2_mask)
