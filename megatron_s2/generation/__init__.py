"""Generation with the small S2 KV cache."""
