"""Layer specs: Megatron's own, with S2 core attention, and self-attention that knows its small cache."""

from __future__ import annotations

from functools import partial

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_s2.layers.arguments import refuse_bypasses
from megatron_s2.layers.config import cluster_of, s2_settings
from megatron_s2.layers.core_attention import S2CoreAttention
from megatron_s2.layers.self_attention import S2SelfAttention
from megatron_s2.parallel.exchange import Traffic
from megatron_s2.pattern.annealing import Annealing


def s2_layer_spec(
    config: GPTModelConfig,
    vp_stage: int | None = None,
    *,
    traffic: Traffic | None = None,
    annealing: Annealing | None = None,
    **settings,
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layer spec that Megatron would choose for `config` (local or Transformer Engine, MLP or MoE), with
    S2 core attention.

    Also for a stock Megatron-LM checkout: `--spec megatron_s2.layers.specs s2_layer_spec`. Its parser knows
    no `--s2-...` flags, so there the settings are the defaults of `S2Settings`. A module of your own sets
    others: `my_spec = functools.partial(s2_layer_spec, block_size=32, vert_stride=8)`.

    Args:
        config: the model configuration; S2 settings come from its transformer configuration.
        vp_stage: virtual pipeline stage, for specs that differ between stages.
        traffic: where the layers count the bytes of context parallelism.
        annealing: where the run is between dense attention and S2.
        settings: fields of `S2Settings` that count more than the configuration's.

    Raises:
        ValueError: as `S2Settings`, or the configuration would bypass S2 attention.
    """
    refuse_bypasses(config.transformer, "S2 attention")
    spec = default_layer_spec(config, vp_stage)
    core_attention = partial(
        S2CoreAttention,
        settings=s2_settings(config.transformer, **settings),
        backend=getattr(config.transformer, "s2_backend", "auto"),
        autotune=getattr(config.transformer, "s2_autotune", False),
        cp_schedule=getattr(config.transformer, "s2_cp_schedule", "auto"),
        cluster=cluster_of(config.transformer),
        traffic=traffic,
        annealing=annealing,
    )
    for layer in spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]:
        attention = layer.submodules.self_attention
        attention.submodules.core_attention = core_attention
        if attention.module is SelfAttention:
            attention.module = S2SelfAttention
    return spec
