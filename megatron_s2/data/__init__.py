"""From raw text to Megatron's indexed datasets."""
