"""GPTs of Transformer Engine's own layers, without Apex: built in every layout, and computed by stand-ins."""

import pytest
import torch
from megatron_run import MOCK_DATA, MODERN, TINY, call_in_fork
from recipes import RANKS, launch, split
from te_process import BuiltRank, build, first_gradients, in_te_process

pytestmark = pytest.mark.te

S2 = "--s2-attention --s2-block-size 16 --s2-local-blocks 2 --s2-vert-stride 2 --s2-dense-layers 1"
MODELS = {
    "RMSNorm": f"{MODERN} --qk-layernorm",
    "LayerNorm and biases": "--position-embedding-type rope",
    "experts": f"{MODERN} --num-experts 4 --moe-router-topk 2",
}
DENSE = [model for model in MODELS if model != "experts"]
# The shape of the Slurm recipe's model, small; its eight KV heads are those of its tensor-parallel ranks.
SMALL = """
    --num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 16 --num-query-groups 8
    --seq-length 8192 --max-position-embeddings 8192 --vocab-size 1000
"""
# Module paths of norms that Transformer Engine's linear layers contain, and where the local layers have them.
CONTAINED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def words(model: str) -> list[str]:
    # Nothing stands in for the kernel of the rotary embedding.
    return f"{TINY} {MODELS[model]} {MOCK_DATA} {S2} --no-rope-fusion".split()


def local_name(name: str) -> str:
    for contained, local in CONTAINED_NORMS.items():
        name = name.replace(contained, local)
    return name


def assert_only_the_head_does_not_fuse(built: BuiltRank) -> None:
    fused = {built.modules[path] for path, fuses in built.fuses.items() if fuses}
    assert fused and all(kind.startswith("TE") for kind in fused)
    unfused = [path for path, fuses in built.fuses.items() if not fuses]
    assert unfused == [path for path in built.modules if path == "output_layer"]


def assert_stored_alike(built: BuiltRank, local: BuiltRank) -> None:
    """All but the extra states of norms, which torch's norms do not have."""
    more = {key for key, _ in built.sharded.keys() - local.sharded.keys()}
    assert all("layernorm._extra_state" in key for key in more), more
    assert {place: built.sharded[place] for place in local.sharded} == local.sharded


@pytest.mark.parametrize("model", MODELS)
def test_only_the_head_does_not_accumulate_weight_gradients_by_a_kernel(model):
    """It is Megatron's, which needs an extension of Apex for that."""
    assert_only_the_head_does_not_fuse(in_te_process(build, words(model)))


@pytest.mark.parametrize("model", DENSE)
def test_checkpoint_keys_are_those_of_local_layers(model):
    """Not of experts: Megatron (0.19.2) stores the norm before them under two names."""
    built = in_te_process(build, words(model))
    assert_stored_alike(built, call_in_fork("te_process", "build", words(model)).returned)


@pytest.mark.parametrize("model", DENSE)
def test_gradients_are_those_of_local_layers(model):
    """Not of experts: nothing stands in for the kernel of their router."""
    gradients = in_te_process(first_gradients, words(model))
    expected = call_in_fork("te_process", "first_gradients", words(model)).returned
    assert {local_name(name) for name in gradients} == set(expected)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert torch.equal(gradient, expected[local_name(name)]), name


@pytest.mark.parametrize("changed", ["", "--context-parallel-size 2"], ids=["as it stands", "CP2"])
@pytest.mark.parametrize("rank", [0, RANKS["slurm"] - 1], ids=["first stage", "last stage"])
def test_the_slurm_recipe_builds_with_all_its_layout_flags(tmp_path, rank, changed):
    _, argv = split(
        launch(tmp_path, "slurm", "--out", str(tmp_path / "out"), *SMALL.split(), *changed.split())
    )
    built = in_te_process(build, argv, RANKS["slurm"], rank)
    assert_only_the_head_does_not_fuse(built)
    assert sum(kind == "S2CoreAttention" for kind in built.modules.values()) == 2
    assert_stored_alike(built, call_in_fork("te_process", "build", argv, RANKS["slurm"], rank).returned)
