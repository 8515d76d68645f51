"""Flags, checks, configuration, batches, CPU runtime, patches and hooks of `megatron.training.pretrain`."""
