"""The architecture of a model, in terms that neither Hugging Face nor Megatron owns."""

from dataclasses import dataclass

_VOCAB_MULTIPLE = 128
# Context that Megatron's `llama3` scaling takes as the original one, in tokens.
LLAMA3_POSITIONS = 8192


@dataclass(frozen=True)
class Experts:
    """Routed experts in the place of an MLP, chosen by a softmax over all of them.

    Args:
        count: number of experts of a layer.
        ffn_hidden_size: intermediate size of an expert.
        top_k: number of experts that compute a token.
        is_normalized: whether the weights of a token's experts are divided by their sum.
        layers: whether each layer has experts; the others have an MLP.
    """

    count: int
    ffn_hidden_size: int
    top_k: int
    is_normalized: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True)
class Phi3Small:
    """What only Phi-3-small has (`phi3_small.py`).

    Args:
        embedding_multiplier: factor on the embeddings.
        logits_divisor: number by which logits are divided.
        gegelu_limit: limit of the gated activation; None without one.
    """

    embedding_multiplier: float
    logits_divisor: float
    gegelu_limit: float | None


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of rotary positions (arXiv 2309.00071).

    Args:
        factor: how many times longer the context is than the original one.
        original_positions: length of the original context in tokens.
        beta_fast, beta_slow: rotations over the original context above which a dimension keeps its frequency,
            and below which it is interpolated.
        mscale, mscale_all_dim: queries and keys are multiplied by (0.1 mscale ln(factor) + 1) /
            (0.1 mscale_all_dim ln(factor) + 1).
        is_truncated: whether the dimensions of `beta_fast` and `beta_slow` are rounded to whole ones.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    is_truncated: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, SwiGLU, rotary position embeddings and grouped-query attention; or Phi-3-small,
    which has another norm and activation.

    Args:
        family: Hugging Face's `model_type`, a key of `families.FAMILIES`.
        vocab_size: number of tokens, without padding.
        llama3_factor: factor of `llama3` rope scaling, as in Llama 3.1; None without such scaling.
        linear_factor: factor of `linear` rope scaling, which divides positions; None without such scaling.
        tied: whether the output layer shares its weight with the embedding.
        experts: the experts; None where every layer has an MLP.
        rotary_percent: share of a head's dimensions that are rotated, from the first on.
        yarn: YaRN scaling; None without such scaling.
        phi3_small: what only Phi-3-small has; None in the other families.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: int
    llama3_factor: float | None
    linear_factor: int | None
    tied: bool
    experts: Experts | None = None
    rotary_percent: float = 1.0
    yarn: Yarn | None = None
    phi3_small: Phi3Small | None = None

    @property
    def rope_type(self) -> str:
        """Hugging Face's `rope_type`."""
        scalings = {"llama3": self.llama3_factor, "linear": self.linear_factor, "yarn": self.yarn}
        return next((name for name, scaling in scalings.items() if scaling is not None), "default")

    def has_experts(self, layer: int) -> bool:
        """Returns whether a layer, counted from 0, has experts in the place of an MLP."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def layers_are_alike(self) -> bool:
        """Whether all layers have the same tensors, which Megatron then stores stacked."""
        return self.experts is None or all(self.experts.layers)

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding in training.

        The padding takes part in the softmax. A multiple of 128 suits every tensor-parallel size that divides
        128, so that the loss does not depend on the parallel layout.
        """
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
