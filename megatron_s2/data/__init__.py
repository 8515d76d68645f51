"""Raw text, tokenizers and Megatron's indexed datasets."""
