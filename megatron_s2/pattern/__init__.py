"""Attention patterns: which key blocks each KV head sees, in integers, without torch."""

from megatron_s2.pattern.block_pattern import BlockPattern
from megatron_s2.pattern.mask_pattern import BlockMaskPattern
from megatron_s2.pattern.s2_pattern import S2Pattern
from megatron_s2.pattern.settings import S2Settings

__all__ = ["BlockMaskPattern", "BlockPattern", "S2Pattern", "S2Settings"]
