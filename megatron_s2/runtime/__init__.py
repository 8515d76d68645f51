"""What makes stock Megatron run here: the CPU runtime and named workarounds."""
