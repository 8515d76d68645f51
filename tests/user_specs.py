"""A user's own layer spec, as `--spec user_specs small_s2` names it."""

from functools import partial

from megatron_s2.layers.specs import s2_layer_spec

small_s2 = partial(s2_layer_spec, block_size=16, local_blocks=2, vert_stride=3)
