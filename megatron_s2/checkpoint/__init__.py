"""Checkpoints from and to other formats: Hugging Face directories and Megatron's `torch_dist`."""
