"""Conversion between Hugging Face directories and Megatron's `torch_dist` checkpoints."""
