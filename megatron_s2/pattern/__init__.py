"""Which key blocks each KV head sees, in integers."""
