"""s2_layer_spec: Megatron's own spec for a model, with S2 attention and nothing else replaced."""

from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import pytest
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_s2.layers import specs
from megatron_s2.layers.config import S2TransformerConfig
from megatron_s2.layers.core_attention import S2CoreAttention
from megatron_s2.layers.self_attention import S2SelfAttention
from megatron_s2.layers.specs import s2_layer_spec
from megatron_s2.parallel.time_model import Cluster
from megatron_s2.pattern import S2Settings

CHOSEN = {
    "s2_attention": True,
    "s2_block_size": 32,
    "s2_vert_stride": (4, 2),
    "s2_dense_layers": (1,),
    "s2_backend": "reference",
}
SETTINGS = S2Settings(num_layers=4, num_kv_heads=2, block_size=32, vert_stride=(4, 2), dense_layers=(1,))


def model(kind=S2TransformerConfig, **chosen) -> GPTModelConfig:
    plain = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    return GPTModelConfig(transformer=kind(**plain | {"transformer_impl": "local"} | chosen), vocab_size=256)


def core_attention(layer):
    return layer.submodules.self_attention.submodules.core_attention


def assert_s2(built: partial, settings: S2Settings, backend: str) -> None:
    assert built.func is S2CoreAttention
    assert built.keywords == {
        "settings": settings,
        "backend": backend,
        "autotune": False,
        "cp_schedule": "auto",
        "cluster": Cluster(),
        "traffic": None,
        "annealing": None,
    }


def test_the_local_spec_has_s2_core_attention():
    spec = s2_layer_spec(model(**CHOSEN))
    assert spec.module is TransformerLayer
    assert_s2(core_attention(spec), SETTINGS, "reference")


def test_autotuning_reaches_the_layers():
    spec = s2_layer_spec(model(**CHOSEN, s2_autotune=True))
    assert core_attention(spec).keywords["autotune"] is True


def test_everything_else_is_as_megatron_chose_it():
    ours, theirs = s2_layer_spec(model(**CHOSEN)), default_layer_spec(model(**CHOSEN), None)
    assert ours.submodules.self_attention.module is S2SelfAttention
    ours.submodules.self_attention.module = SelfAttention
    ours.submodules.self_attention.submodules.core_attention = core_attention(theirs)
    assert ours.module is theirs.module
    for field in fields(theirs.submodules):
        built, exact = (getattr(spec.submodules, field.name) for spec in (ours, theirs))
        if isinstance(exact, partial):
            built, exact = ((part.func, part.args, part.keywords) for part in (built, exact))
        assert built == exact, field.name


def test_every_layer_of_a_mixture_of_experts_has_it(monkeypatch):
    """With experts Megatron gives a block, one spec for each layer of a pipeline stage."""
    monkeypatch.setattr("megatron.core.parallel_state.get_pipeline_model_parallel_rank", lambda: 0)
    experts = {"num_moe_experts": 4, "moe_layer_freq": [0, 1, 0, 1], "add_bias_linear": False}
    block = s2_layer_spec(model(**CHOSEN, **experts), vp_stage=0)
    assert len(block.layer_specs) == 4
    for layer in block.layer_specs:
        assert_s2(core_attention(layer), SETTINGS, "reference")


def test_settings_given_to_the_function_count_more_than_the_configurations():
    spec = partial(s2_layer_spec, block_size=16, dense_layers=())(model(**CHOSEN))
    settings = S2Settings(num_layers=4, num_kv_heads=2, block_size=16, vert_stride=(4, 2))
    assert_s2(core_attention(spec), settings, "reference")


def test_a_stock_configuration_gets_the_defaults():
    spec = s2_layer_spec(model(TransformerConfig))
    assert_s2(core_attention(spec), S2Settings(num_layers=4, num_kv_heads=2), "auto")


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"^block_size 48: must be a power of two"):
        s2_layer_spec(model(), block_size=48)
    with pytest.raises(ValueError, match=r"^--s2-block-size 48: must be a power of two"):
        model(**CHOSEN | {"s2_block_size": 48})


def test_the_spec_of_another_implementation_is_treated_alike(monkeypatch):
    """Transformer Engine's needs its package; what it has in common with every spec is what is relied on."""
    attention = SimpleNamespace(
        module=SelfAttention, submodules=SimpleNamespace(core_attention="TEDotProductAttention", linear_qkv=1)
    )
    engine = SimpleNamespace(submodules=SimpleNamespace(self_attention=attention, mlp="TENormMLP"))
    asked = []
    monkeypatch.setattr(
        specs, "default_layer_spec", lambda config, vp_stage: asked.append((config, vp_stage)) or engine
    )
    config = model(transformer_impl="transformer_engine", **CHOSEN)
    spec = s2_layer_spec(config, vp_stage=1)
    assert spec is engine and asked == [(config, 1)]
    assert_s2(core_attention(spec), SETTINGS, "reference")
    assert attention.module is S2SelfAttention
    assert (attention.submodules.linear_qkv, engine.submodules.mlp) == (1, "TENormMLP")
