"""The attention variants that the quality benchmark compares, and their Megatron flags."""

from __future__ import annotations

from dataclasses import replace

from megatron_s2.pattern import S2Settings

DENSE, FIRST_TWO, S2, WINDOW, NO_SHARDS = VARIANTS = (
    *("dense", "s2-first-two-dense", "s2"),
    *("window-only", "no-shards"),
)
STYLES = {
    DENSE: {"color": "#333333", "marker": "s", "linestyle": "--"},
    FIRST_TWO: {"color": "#5b9bd5", "marker": "^"},
    S2: {"color": "#12355b", "marker": "o"},
    WINDOW: {"color": "#c55a11", "marker": "v"},
    NO_SHARDS: {"color": "#999999", "marker": "x"},
}
# A model without dropout and biases, and clipped gradients, which all experiments have in common.
COMMON_FLAGS = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0 --clip-grad 1.0"
)


def variant_settings(s2: S2Settings, variant: str, seq_length: int) -> S2Settings:
    """Returns the attention of a variant.

    Args:
        s2: that of the variant `s2`.
        seq_length: tokens of a sequence; the window of `window-only` is the smallest that costs at least as
            much there as `s2`, while `no-shards` has the window of `s2`.
    """
    if variant == DENSE:
        return replace(s2, dense_layer_freq=1)
    if variant == FIRST_TWO:
        return replace(s2, dense_layers=(1, 2))
    if variant in (WINDOW, NO_SHARDS):
        window = replace(s2, vert_stride=0)
        while variant == WINDOW and window.mean_pairs(seq_length) < s2.mean_pairs(seq_length):
            window = replace(window, local_blocks=window.local_blocks + 1)
        return window
    return s2


def attention_flags(settings: S2Settings) -> list[str]:
    """Returns the flags of settings with one stride for all heads."""
    words = (
        f"--s2-attention --s2-block-size {settings.block_size} --s2-local-blocks {settings.local_blocks} "
        f"--s2-vert-stride {settings.vert_stride}"
    ).split()
    if settings.dense_layers:
        words += ["--s2-dense-layers", ",".join(map(str, settings.dense_layers))]
    if settings.dense_layer_freq:
        words += ["--s2-dense-layer-freq", str(settings.dense_layer_freq)]
    return words
