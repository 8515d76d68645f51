"""A converted model computes the same logits in Megatron, run by the user's command, as in transformers."""

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from generation_models import greedy
from hf_models import CONFIGS, TINY, assert_bit_equal, convert, edit_config, make_model, weights
from megatron_logits import ONE_STEP, logits, run_all
from megatron_run import call_in_fork
from te_process import build, in_te_process
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

import megatron_s2.hf  # noqa: F401 - registers the attention function
from megatron_s2.calibration.layered_model import LayeredModel, dense_attention

S2 = ("--s2-attention", "--s2-block-size", "16", "--s2-local-blocks", "2", "--s2-vert-stride")
STRIDES = {  # one per KV head
    "llama3.1": ("3", "4"),
    "llama3.2, tied": ("3", "4"),
    "mistral": ("3", "4"),
    "qwen2": ("3", "4"),
    "qwen3": ("0", "4"),
    "llama, one KV head": ("3",),
    "qwen3, one KV head": ("3",),
    "llama, yarn": ("3", "4"),
    "phi3": ("3", "4"),
    "phi3, partial and tied": ("3", "4"),
    "mixtral": ("3", "4"),
    "qwen3 moe": ("3", "4"),
    "qwen3 moe, dense layers": ("3", "4"),
}
# Long enough for the slower rotary frequencies of Llama 3 scaling to make a difference.
LENGTH = 512


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(TINY["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf")
    return {family: make_model(directory / family, family) for family in CONFIGS}


@pytest.fixture(scope="module")
def checkpoints(sources, tmp_path_factory):
    directory = tmp_path_factory.mktemp("megatron")
    outputs = {family: directory / str(number) for number, family in enumerate(sources)}
    for family, source in sources.items():
        convert("hf-to-megatron", source, outputs[family])
    for family, strides in STRIDES.items():
        outputs[f"sparse {family}"] = directory / f"sparse-{len(outputs)}"
        convert("hf-to-megatron", sources[family], outputs[f"sparse {family}"], *S2, *strides)
    return outputs


@pytest.fixture(scope="module")
def logits_in_megatron(checkpoints, tokens):
    return logits(checkpoints, tokens)


def logits_in_transformers(source, tokens, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_those_of_transformers_dense(sources, logits_in_megatron, tokens, family):
    expected = logits_in_transformers(sources[family], tokens, attn_implementation="eager")
    assert expected.std() > 0.3
    torch.testing.assert_close(
        logits_in_megatron[family][..., : TINY["vocab_size"]], expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", STRIDES)
def test_logits_equal_those_of_transformers_sparse(sources, logits_in_megatron, tokens, tmp_path, family):
    convert("hf-to-megatron", sources[family], tmp_path / "megatron", *S2, *STRIDES[family])
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "sparse", "--max-shard-size", "60KB")
    assert len(list(tmp_path.glob("sparse/*.safetensors"))) > 2
    assert_bit_equal(weights(sources[family]), weights(tmp_path / "sparse"))
    sparse = logits_in_transformers(tmp_path / "sparse", tokens)
    expected = logits_in_megatron[f"sparse {family}"][..., : TINY["vocab_size"]]
    torch.testing.assert_close(sparse, expected, rtol=1e-5, atol=1e-5)
    assert (sparse - logits_in_megatron[family][..., : TINY["vocab_size"]]).abs().max() > 1e-3


NOT_LLAMA = ["llama, yarn", "phi3, partial and tied", "mixtral", "qwen3 moe, dense layers"]


@pytest.mark.parametrize("family", NOT_LLAMA)
def test_a_calibration_computes_the_same_layer_by_layer(sources, tokens, family):
    expected = logits_in_transformers(sources[family], tokens)
    model = LayeredModel(AutoModelForCausalLM.from_pretrained(sources[family]))
    computed = model.logits(model.run(tokens[0], dense_attention))
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", NOT_LLAMA)
def test_both_formats_generate_the_same_tokens(checkpoints, tokens, tmp_path, family):
    checkpoint = checkpoints[f"sparse {family}"]
    convert("megatron-to-hf", checkpoint, tmp_path / "sparse")
    prompt = tokens[0, :100].tolist()
    words = ["--token-ids", "--prompt", " ".join(map(str, prompt)), "--max-new-tokens", "8"]
    from_hf, from_megatron = (
        call_in_fork("generate", "main", [flag, str(path), *words]).out.split()
        for flag, path in (("--hf", tmp_path / "sparse"), ("--load", checkpoint))
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert from_hf == from_megatron == [str(token) for token in greedy(model, prompt, 8)]


def with_transformer_engine(checkpoint: Path) -> list[str]:
    flags = (checkpoint / "resume.args").read_text().split()
    return [*flags, "--load", str(checkpoint), "--no-rope-fusion"]  # nothing stands in for that kernel


@pytest.mark.te
def test_layers_of_transformer_engine_find_every_key(checkpoints):
    for name, checkpoint in checkpoints.items():
        words = [*ONE_STEP.split(), "--seq-length", str(LENGTH), *with_transformer_engine(checkpoint)]
        built = in_te_process(build, words)
        assert "TELayerNormColumnParallelLinear" in built.modules.values()
        written = FileSystemReader(checkpoint / "release").read_metadata().state_dict_metadata
        assert built.keys <= set(written), name
        left = {key for key in written if not key.startswith("common_state")} - built.keys
        assert all("core_attention._extra_state" in key or is_local_norm(key, written) for key in left), name


def is_local_norm(key: str, written: Collection[str]) -> bool:
    """Whether a key is that of a norm before experts in Megatron's own layers, stored beside the other."""
    layer, norm, _ = key.partition("mlp.linear_fc1.")
    return norm != "" and f"{layer}pre_mlp_layernorm.weight" in written


@pytest.mark.te
def test_layers_of_transformer_engine_compute_the_same(checkpoints, logits_in_megatron, tokens):
    """Of the sparse models without experts: nothing stands in for Transformer Engine's dense attention, nor
    for the kernel of a router."""
    with_experts = [f"sparse {name}" for name in STRIDES if "num_experts_per_tok" in CONFIGS[name]]
    sparse = {
        name: path
        for name, path in checkpoints.items()
        if name.startswith("sparse") and name not in with_experts
    }
    flags = {name: with_transformer_engine(path) for name, path in sparse.items()}
    computed = in_te_process(run_all, flags, tokens)
    for name, logits_of_model in computed.items():
        torch.testing.assert_close(logits_of_model, logits_in_megatron[name], rtol=1e-5, atol=1e-5)


def test_padded_tokens_have_zero_logits(logits_in_megatron):
    for logits_of_model in logits_in_megatron.values():
        assert logits_of_model.shape[-1] == 256
        assert not logits_of_model[..., TINY["vocab_size"] :].any()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama3.1", {"rope_type": "default"}),
        ("llama3.2, tied", {"factor": 8.0}),  # the factor that stock Megatron always uses
        ("llama, linear", {"rope_type": "default"}),
        ("llama, yarn", {"rope_type": "default"}),
        ("llama, yarn", {"original_max_position_embeddings": 2048}),
        ("qwen3, yarn with every entry", {"mscale": 1.0}),
        ("qwen3, yarn with every entry", {"truncate": True}),
    ],
)
def test_rope_scaling_changes_the_logits(sources, tokens, family, changes, tmp_path):
    scaled = logits_in_transformers(sources[family], tokens)
    other = make_model(tmp_path / "other", family)
    edit_config(other, rope_parameters=CONFIGS[family]["rope_parameters"] | changes)
    assert (scaled - logits_in_transformers(other, tokens)).abs().max() > 1e-3
