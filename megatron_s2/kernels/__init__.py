"""S2 attention behind one function, `s2_attention`, with three backends.

    reference  dense masked attention with quadratic memory; tests compare the other backends with it
    torch      blocked attention with linear memory on any device; training on a CPU uses it
    triton     the same on a GPU, deterministic; Triton is imported by the first call

The Triton backend in reading order: `triton_backend` prepares the arguments, `triton_ops` has the custom
operators with autograd and FLOP counts. Kernels stand with their launches in `triton_forward`, `triton_dq`,
`triton_dkv` and `triton_decode`; what they share is in `triton_common` (device functions) and `triton_args`
(what launches keep between calls). `triton_programs` says which tile of which document a program computes,
`triton_capture` what holds for CUDA graphs, `tuning` has the tile sizes for each chip.
"""

from megatron_s2.kernels.interface import s2_attention

__all__ = ["s2_attention"]
