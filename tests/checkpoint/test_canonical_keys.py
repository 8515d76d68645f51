"""A conversion writes the keys of Megatron's layers, of the local and of the Transformer Engine specs."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_s2.checkpoint.families import model_tensors
from megatron_s2.checkpoint.model_config import Experts, ModelConfig
from megatron_s2.checkpoint.tensors import LAYERS

QWEN3 = ModelConfig("qwen3", 1, 64, 96, 4, 2, 32, 250, 128, 1e-6, 10000, None, None, True)
LLAMA = replace(QWEN3, family="llama")
MIXTRAL = replace(QWEN3, family="mixtral", experts=Experts(2, 96, 2, True, (True,)))


class Linear:
    weights = ("weight",)


class Norm:
    weights = ("weight",)


class LinearAfterNorm:
    """Like Transformer Engine's `LayerNormLinear`, which also has the weight of the norm as a parameter."""

    weights = ("weight", "layer_norm_weight")


def backend(fused: bool) -> SimpleNamespace:
    """Returns a stand-in for the modules of Transformer Engine (`fused`) or for the local ones."""
    return SimpleNamespace(
        column_parallel_linear=lambda: Linear,
        row_parallel_linear=lambda: Linear,
        column_parallel_layer_norm_linear=lambda: LinearAfterNorm if fused else None,
        fuse_layernorm_and_linear=lambda: fused,
        layer_norm=lambda **kwargs: Norm,
        grouped_mlp_modules=lambda grouped: None,
        core_attention=lambda: IdentityOp,
        activation_func=lambda: None,
    )


def submodules(node: object, path: str = "") -> dict[str, object]:
    """Returns the classes in a spec, by path."""
    if isinstance(node, partial):
        node = node.keywords.get("submodules")
    elif isinstance(node, ModuleSpec):
        node = node.submodules
    if hasattr(node, "weights"):
        return {path: node}
    fields = getattr(node, "__dataclass_fields__", {})
    return {
        inner: module
        for name in fields
        for inner, module in submodules(getattr(node, name), f"{path}.{name}".lstrip(".")).items()
    }


def keys(spec: ModuleSpec) -> set[str]:
    """Returns the keys of the parameters of a layer in a checkpoint, by the map in its spec."""
    keys_map = spec.submodules.sharded_state_dict_keys_map
    found = set()
    for path, module in submodules(spec).items():
        for parameter in module.weights:
            key = f"{path}.{parameter}"
            for prefix, renamed in keys_map.items():
                if key.startswith(prefix):
                    key = renamed + key.removeprefix(prefix)
            found.add(key)
    return found


@pytest.fixture(params=["local", "Transformer Engine"])
def layer_spec(request, monkeypatch):
    """Returns the spec of a layer, given what `get_gpt_layer_local_spec` takes."""
    if request.param == "local":
        monkeypatch.setattr(gpt_layer_specs, "LocalSpecProvider", lambda: backend(fused=False))
        return partial(gpt_layer_specs.get_gpt_layer_local_spec, normalization="RMSNorm")
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", lambda: backend(fused=True))
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec


@pytest.mark.parametrize(("model", "qk_layernorm"), [(LLAMA, False), (QWEN3, True)], ids=["llama", "qwen3"])
def test_the_keys_of_a_layer(layer_spec, model, qk_layernorm):
    spec = layer_spec(qk_layernorm=qk_layernorm)
    written = {tensor.key for tensor in model_tensors(model) if tensor.key.startswith(LAYERS)}
    assert written == {LAYERS + key for key in keys(spec)}


def test_the_keys_of_a_layer_with_experts(layer_spec):
    """Those of the experts themselves are not in a spec; tests of logits load them."""
    spec_keys = {LAYERS + key for key in keys(layer_spec(num_experts=2))}
    expected = {key for key in spec_keys if "_experts." not in key}
    tensors = [tensor.stored_in(expected) for tensor in model_tensors(MIXTRAL)]
    found = {tensor.key for tensor in tensors if tensor.key.startswith(LAYERS)}
    assert expected == {key for key in found if "mlp.experts." not in key and "router" not in key}
