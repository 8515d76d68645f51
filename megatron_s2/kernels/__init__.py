"""S2 attention behind one signature: `s2_attention` checks its arguments once and hands them to a backend.

reference   dense masked attention, quadratic memory: the truth that tests compare with
torch       blocked, linear memory, any device; what training on a CPU uses
triton      the same on a GPU, deterministic; its kernels are imported when first used
"""

from megatron_s2.kernels.interface import s2_attention

__all__ = ["s2_attention"]
