"""What stands around `megatron.training.pretrain`."""
