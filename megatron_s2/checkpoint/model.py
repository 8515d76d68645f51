"""What a checkpoint is a checkpoint of, in words that neither format owns."""

from dataclasses import dataclass

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_PADDING = 128


@dataclass(frozen=True)
class Model:
    """A decoder of one of the `FAMILIES`: RMSNorm, SwiGLU, rotary positions, grouped queries, no linear bias.

    Args:
        family: Hugging Face's `model_type`. qwen2 has biases of query, key and value; qwen3 norms of query
            and key per head.
        vocab_size: tokens that have an embedding, without any padding.
        llama3_factor: how much slower low frequencies turn, as in Llama 3.1; None for no such scaling.
        linear_factor: by what positions are divided; None for no such scaling.
        tied: the output layer is the embedding.
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

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in training: one number whatever the tensor-parallel size (that divides 128),
        so that the padding, which takes part in the softmax, is the same in every layout."""
        return -(-self.vocab_size // _PADDING) * _PADDING
