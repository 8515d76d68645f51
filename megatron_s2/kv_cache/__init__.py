"""KV cache that stores only what later tokens see, and attention over it."""
