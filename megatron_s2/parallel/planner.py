"""The planner."""

from megatron_s2.parallel.cost import AttentionCall, ExchangeBytes, exchange_bytes

__all__ = ["AttentionCall", "ExchangeBytes", "exchange_bytes"]
