"""Small patterns, which a test can enumerate."""

import numpy as np

from megatron_s2 import BlockMaskPattern, S2Pattern


def a_pattern(**fields) -> S2Pattern:
    return S2Pattern(**({"num_kv_heads": 4, "block_size": 16, "local_blocks": 2, "vert_stride": 4} | fields))


def a_mask_pattern(num_blocks: int = 8) -> BlockMaskPattern:
    return BlockMaskPattern(np.tril(np.ones((2, num_blocks, num_blocks), dtype=bool)), block_size=16)
