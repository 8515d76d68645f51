"""S2 attention in Hugging Face transformers: importing this module registers `attn_implementation="s2"`.

    import megatron_s2.hf
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="s2")
    model.generate(**inputs, cache=megatron_s2.hf.S2Cache(model.config))

The settings are those of `s2_attention` in the model's config.json: fields of `S2Settings` but `num_layers`
and `num_kv_heads`, which the configuration has anyway. Its `"attn_implementation": "s2"` makes transformers
refuse the model where this module is not imported, instead of running it dense. Any decoder works that asks
transformers for its attention function: Llama, Mistral, Qwen2 and Qwen3 are tested.

A padded token takes no part: the position of a token, from which its block follows, is its index among the
real tokens of its row, wherever the padding lies. No mask of tokens x tokens is built.

Before transformers 5.24 the argument `cache` is called `past_key_values`; `CACHE_ARGUMENT` is its name in the
installed version. Without `S2Cache`, transformers' own dynamic cache gives the same results and keeps
everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function, create_causal_mask

from megatron_s2.kernels import s2_attention
from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.cached_attention import cached_attention
from megatron_s2.pattern.s2_pattern import S2Pattern
from megatron_s2.pattern.settings import S2Settings

NAME = "s2"
CACHE_ARGUMENT = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
_FROM_THE_MODEL = ("num_layers", "num_kv_heads")


def settings_of(config: PreTrainedConfig) -> S2Settings:
    """The S2 settings of a model's configuration.

    Raises:
        ValueError: it has none, or one is unknown or out of range.
    """
    given = getattr(config, "s2_attention", None)
    if not isinstance(given, dict):
        raise ValueError(
            f's2_attention {given}: must be a dict of S2 settings with attn_implementation="s2"; the '
            "config.json of a model trained dense has none: load it with another attn_implementation"
        )
    allowed = S2Settings.__dataclass_fields__.keys() - set(_FROM_THE_MODEL)
    if unknown := given.keys() - allowed:
        raise ValueError(f"s2_attention {min(unknown)}: must be one of {', '.join(sorted(allowed))}")
    # Where the configuration is saved again, the copy must not run dense either.
    config.attn_implementation = NAME
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return _settings(config.num_hidden_layers, kv_heads, tuple(sorted(fields.items())))


@lru_cache
def _settings(num_layers: int, num_kv_heads: int, fields: tuple[tuple[str, object], ...]) -> S2Settings:
    return S2Settings(num_layers=num_layers, num_kv_heads=num_kv_heads, **dict(fields))


@lru_cache(maxsize=1024)
def _pattern(settings: S2Settings, layer_number: int) -> S2Pattern:
    return settings.pattern(layer_number)


# ---------------------------------------------------------------------------------------------------------
# What transformers calls


@dataclass(frozen=True)
class Padding:
    """What the attention layers of one forward pass are given for a padded batch.

    Args:
        real: bool `[batch, tokens]`, the cached ones included: which of them are no padding.
        queries: tokens of this pass, the last ones.
    """

    real: Tensor
    queries: int

    @property
    def new(self) -> Tensor:
        """`real` of this pass's tokens."""
        return self.real[:, self.real.shape[1] - self.queries :]

    @cached_property
    def counts(self) -> list[int]:
        """Real tokens of each row."""
        return self.real.sum(1).tolist()

    @cached_property
    def new_counts(self) -> list[int]:
        """Real tokens of each row in this pass."""
        return self.new.sum(1).tolist()


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
) -> Padding | None:
    """The padding of a batch as transformers' `AttentionMaskInterface` is asked for it; None without padding.

    Raises:
        ValueError: the model or the call asks for more than causal attention to unpadded tokens.
    """
    if config is not None:
        settings_of(config)
        if getattr(config, "sliding_window", None) is not None:
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
    if attention_mask is None or attention_mask.all():
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)}: must be [batch, tokens] = "
            f"{(batch_size, kv_length)}, the cached tokens included"
        )
    return Padding(attention_mask.bool(), q_length)


def s2_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Padding | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """S2 attention as transformers' `AttentionInterface` is asked for it.

    Args:
        module: an attention layer with `config` and `layer_idx`.
        query: `[batch, heads, queries, head_dim]`; the queries are the last of the keys' tokens.
        key, value: `[batch, kv_heads, keys, head_dim]`, or what an `S2Cache` returns for them.
        attention_mask: what `s2_mask` returned.

    Returns:
        `[batch, queries, heads, head_dim]`, zeros for padding; and None for the probabilities, which nobody
        has.

    Raises:
        ValueError: the layer asks for what S2 attention does not have.
    """
    refused = {
        "attention_dropout": dropout or None,
        "is_causal": None if (module.is_causal if is_causal is None else is_causal) else False,
        **{name: kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux", "position_bias")},
    }
    for name, asked in refused.items():
        if asked is not None:
            raise ValueError(f'{name}: must not be asked for with attn_implementation="s2"')
    if not isinstance(attention_mask, Padding | None):
        raise ValueError('attention_mask: must be [batch, tokens] with attn_implementation="s2"')
    pattern = _pattern(settings_of(module.config), module.layer_idx + 1)
    q = query.transpose(1, 2)
    if isinstance(key, NewTokens):
        return key.attend(q, attention_mask, scaling), None
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is None:
        q_start = k.shape[1] - q.shape[1]
        return s2_attention(q, k, v, pattern, scaling, q_start=q_start, return_lse=False), None
    attend = _packed if q.shape[1] == k.shape[1] else _by_row
    return attend(q, k, v, pattern, scaling, attention_mask), None


def _packed(q: Tensor, k: Tensor, v: Tensor, pattern: S2Pattern, scale, padding: Padding) -> Tensor:
    """Whole rows: the real tokens of all of them one after another, a document per row."""
    real = padding.real.to(q.device)
    offsets = list(accumulate(padding.counts, initial=0))
    out = s2_attention(q[real], k[real], v[real], pattern, scale, cu_seqlens=offsets, return_lse=False)
    rows = out.new_zeros(*q.shape[:-1], out.shape[-1])
    return rows.masked_scatter(real[:, :, None, None], out)


def _by_row(q: Tensor, k: Tensor, v: Tensor, pattern: S2Pattern, scale, padding: Padding) -> Tensor:
    """Queries behind cached keys: each row has a length of its own."""
    real, new = padding.real.to(q.device), padding.new.to(q.device)
    rows = []
    for row in range(q.shape[0]):
        q_row, k_row, v_row = q[row, new[row]], k[row, real[row]], v[row, real[row]]
        q_start = len(k_row) - len(q_row)
        out = s2_attention(
            q_row[None], k_row[None], v_row[None], pattern, scale, q_start=q_start, return_lse=False
        )
        rows.append(
            out.new_zeros(*q.shape[1:3], out.shape[-1]).masked_scatter(new[row, :, None, None], out[0])
        )
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------
# The small cache


@dataclass(frozen=True)
class NewTokens:
    """What `S2Cache` returns in place of keys: the new ones, and the cache that the others are in.

    No tensor, so that another attention than ours fails on it.

    Args:
        k, v: `[batch, kv_heads, tokens, head_dim]`.
    """

    k: Tensor
    v: Tensor
    cache: KVCache

    def attend(self, q: Tensor, padding: Padding | None, scale: float | None) -> Tensor:
        """Attention of the queries `[batch, tokens, heads, head_dim]`; the cache takes the tokens up."""
        k, v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        if padding is None:
            if len(set(self.cache.lengths)) > 1:
                raise ValueError(
                    "attention_mask: must be given, [batch, tokens], because an earlier one had padding"
                )
            return cached_attention(q, k, v, self.cache, scale)
        new = padding.new_counts
        if padding.counts != [length + count for length, count in zip(self.cache.lengths, new)]:
            raise ValueError("attention_mask: must have the columns of cached tokens as they were before")
        # Real tokens first, as the cache wants them, and back.
        order = (~padding.new).to(q.device, torch.int8).argsort(dim=1, stable=True)
        rows = torch.arange(len(order), device=q.device)[:, None]
        out = cached_attention(q[rows, order], k[rows, order], v[rows, order], self.cache, scale, new=new)
        return out[rows, order.argsort(1)]


class S2CacheLayer(CacheLayerMixin):
    """The small cache of one layer (`generation.cache.KVCache`) as a layer of a transformers cache.

    Args:
        pattern: which blocks each KV head sees.
        max_tokens: most tokens that a row will have, where that is known.
    """

    def __init__(self, pattern: S2Pattern, max_tokens: int | None = None) -> None:
        super().__init__()
        self.pattern = pattern
        self.max_tokens = max_tokens
        self.cache: KVCache | None = None
        self.columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, _, _, head_dim = key_states.shape
        self.cache = KVCache(
            self.pattern, batch, head_dim, key_states.dtype, key_states.device, self.max_tokens
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[NewTokens, NewTokens]:
        """The new tokens, which attention hands on to the cache: only there it is known which are padding."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.columns += key_states.shape[2]
        new = NewTokens(key_states, value_states, self.cache)
        return new, new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the batch so far, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def reset(self) -> None:
        self.cache, self.columns, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"{CACHE_ARGUMENT}: must not be an S2Cache where tokens are taken back (assisted "
                "generation): what they made it forget is gone"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.cache.select([row for row in range(self.cache.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            self.cache.select(indices.tolist())


class S2Cache(Cache):
    """A transformers cache that keeps per KV head only what later tokens see: pass it as `cache`.

    Args:
        config: the model's configuration.
        max_tokens: most tokens that a row will have, prompt included, where that is known: then memory is set
            aside once and exactly.

    Raises:
        ValueError: the model does not run with `attn_implementation="s2"`, or has no S2 settings.
    """

    def __init__(self, config: PreTrainedConfig, max_tokens: int | None = None) -> None:
        config = config.get_text_config(decoder=True)
        if config._attn_implementation != NAME:
            raise ValueError(
                f'attn_implementation "{config._attn_implementation}": must be "s2" to use an S2Cache'
            )
        settings = settings_of(config)
        numbers = range(1, settings.num_layers + 1)
        super().__init__(layers=[S2CacheLayer(_pattern(settings, number), max_tokens) for number in numbers])

    @property
    def caches(self) -> list[KVCache]:
        """The caches of the layers that have had tokens."""
        return [layer.cache for layer in self.layers if layer.cache is not None]


AttentionInterface.register(NAME, s2_attention_forward)
AttentionMaskInterface.register(NAME, s2_mask)
