"""Text generation with the small S2 KV cache, and the evaluation of losses."""
