"""S2 core attention as Megatron modules and layer specs."""
