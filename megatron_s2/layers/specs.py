"""Megatron's layer specs with S2 core attention, and self-attention that uses the small KV cache."""

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
from megatron_s2.parallel.collectives import Traffic
from megatron_s2.pattern.annealing import Annealing


def s2_layer_spec(
    config: GPTModelConfig,
    vp_stage: int | None = None,
    *,
    traffic: Traffic | None = None,
    annealing: Annealing | None = None,
    **settings,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Returns Megatron's layer spec for `config` (local or Transformer Engine, MLP or MoE) with S2 core
    attention.

    It also works from a stock Megatron-LM checkout, by `--spec megatron_s2.layers.specs s2_layer_spec`. That
    has no `--s2-…` flags, so the settings are the defaults of `S2Settings`. To choose others, bind them in a
    module of your own: `my_spec = functools.partial(s2_layer_spec, block_size=32, vert_stride=8)`.

    Args:
        config: model configuration, whose transformer configuration contains the S2 settings.
        vp_stage: virtual pipeline stage, for specs that differ between stages.
        traffic: counters of the bytes of context parallelism.
        annealing: annealing schedule of the run; None without annealing.
        settings: fields of `S2Settings` that replace those of the configuration.

    Raises:
        ValueError: a setting is out of range, or the configuration would bypass S2 attention.
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
