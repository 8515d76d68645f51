"""The architecture of a model, in terms that neither Hugging Face nor Megatron owns."""

from dataclasses import dataclass

_VOCAB_MULTIPLE = 128


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
class ModelConfig:
    """A decoder with RMSNorm, SwiGLU, rotary position embeddings and grouped-query attention; or Phi-3-small,
    which has another norm and activation.

    Args:
        family: Hugging Face's `model_type`, a key of `families.FAMILIES`.
        vocab_size: number of tokens, without padding.
        llama3_factor: factor of `llama3` rope scaling, as in Llama 3.1; None without such scaling.
        linear_factor: factor of `linear` rope scaling, which divides positions; None without such scaling.
        tied: whether the output layer shares its weight with the embedding.
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
    phi3_small: Phi3Small | None = None

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding in training.

        The padding takes part in the softmax. A multiple of 128 suits every tensor-parallel size that divides
        128, so that the loss does not depend on the parallel layout.
        """
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
