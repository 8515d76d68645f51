"""The KV cache that keeps what later tokens see, and attention over it."""
