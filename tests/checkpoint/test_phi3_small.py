"""Phi-3-small: the converted model computes what a plain implementation does, and survives the way back."""

import json

import pytest
import torch
from hf_models import assert_bit_equal, assert_refused, convert, edit_config, weights
from megatron_logits import logits
from megatron_run import call_in_fork
from plain_phi3_small import CONFIG, save_model
from plain_phi3_small import logits as plain_logits

from megatron_s2.checkpoint.hf_config import config_from_model, model_from_config, s2_settings_from_config
from megatron_s2.checkpoint.megatron_args import args_from_model
from megatron_s2.errors import InputError
from megatron_s2.generation.hugging_face import load_pretrained
from megatron_s2.pattern import S2Settings

LENGTH = 300
# What changes the logits, beside the published form of the model.
VARIANTS = {
    "published": {},
    "dense": {"dense_attention_every_n_layers": 1},
    "sparse everywhere, untied limits": {"dense_attention_every_n_layers": None, "gegelu_limit": None},
    "equal heads": {"blocksparse_homo_head_pattern": True, "rope_position_scale": 2.0},
}
# From the model's page; entries that change nothing are left out.
PUBLISHED = {
    "architectures": ["Phi3SmallForCausalLM"],
    "attention_dropout_prob": 0.0,
    "blocksparse_block_size": 64,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64,
    "blocksparse_vert_stride": 8,
    "dense_attention_every_n_layers": 2,
    "ff_dim_multiplier": None,
    "ff_intermediate_size": 14336,
    "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True,
    "hidden_act": "gegelu",
    "hidden_size": 4096,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 8192,
    "model_type": "phi3small",
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_use_scaling": True,
    "mup_width_multiplier": 8.0,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "rope_scaling": None,
    "vocab_size": 100352,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("phi3small")
    return {name: save_model(directory / str(n), **VARIANTS[name]) for n, name in enumerate(VARIANTS)}


@pytest.fixture(scope="module")
def checkpoints(sources, tmp_path_factory):
    directory = tmp_path_factory.mktemp("megatron")
    outputs = {name: directory / source.name for name, source in sources.items()}
    for name, source in sources.items():
        convert("hf-to-megatron", source, outputs[name])
    return outputs


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(CONFIG["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def computed(checkpoints, tokens):
    return logits(checkpoints, tokens)


@pytest.mark.filterwarnings("ignore:S2 pattern")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_the_plain_implementation(sources, computed, tokens, name):
    expected = plain_logits(weights(sources[name]), CONFIG | VARIANTS[name], tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(
        computed[name][..., : CONFIG["vocab_size"]], expected, rtol=1e-5, atol=1e-5 * float(expected.std())
    )
    for other in set(VARIANTS) - {name}:
        assert (computed[name] - computed[other]).abs().max() > 1e-2


def test_the_checkpoint_generates_what_the_plain_implementation_does(sources, checkpoints, tokens):
    """By the command, which restores muP and the activation from the checkpoint's arguments."""
    prompt, of_model = tokens[0, :150].tolist(), weights(sources["published"])
    expected = list(prompt)
    for _ in range(8):
        expected.append(int(plain_logits(of_model, CONFIG, torch.tensor([expected]))[0, -1].argmax()))
    given = ["--load", str(checkpoints["published"]), "--prompt", " ".join(map(str, prompt)), "--token-ids"]
    done = call_in_fork("generate", "main", [*given, "--max-new-tokens", "8"])
    assert done.out.split() == [str(token) for token in expected[150:]]


@pytest.mark.filterwarnings("ignore:S2 pattern")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_round_trip_is_bit_exact(sources, checkpoints, tmp_path, name):
    printed = convert("megatron-to-hf", checkpoints[name], tmp_path / "back", "--max-shard-size", "60KB")
    assert (
        "back: phi3small (from the checkpoint's --use-mup and --quick-geglu and --add-qkv-bias), 4 "
        in printed
    )
    assert len(list(tmp_path.glob("back/*.safetensors"))) > 2
    assert_bit_equal(weights(sources[name]), weights(tmp_path / "back"))
    assert json.loads((tmp_path / "back/config.json").read_text()) == CONFIG | VARIANTS[name]


def test_a_round_trip_in_bfloat16(tmp_path):
    source = save_model(tmp_path / "hf", torch.bfloat16)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert_bit_equal(weights(source), weights(tmp_path / "back"))


def test_the_published_model(tmp_path):
    model = model_from_config(PUBLISHED)
    assert model.tied and model.head_dim == 128
    args = args_from_model(model)
    assert {name: args[name] for name in ("mup_embedding_mult", "mup_output_mult", "rotary_base")} == {
        "mup_embedding_mult": 10.0,
        "mup_output_mult": 0.125,
        "rotary_base": 1000000,
    }
    settings = s2_settings_from_config(PUBLISHED, model)
    assert settings.sparse_layers == list(range(1, 33, 2))
    assert settings.pattern(1).head_phases == tuple((h + 1) % 8 for h in range(32))
    assert settings.pattern(2).num_kv_heads == 8, "dense layers need no copies of keys"
    assert config_from_model(model, PUBLISHED, settings, "bfloat16") == PUBLISHED | {
        "torch_dtype": "bfloat16"
    }
    described = config_from_model(model, {}, settings, "bfloat16")
    assert model_from_config(described) == model
    assert s2_settings_from_config(described, model) == settings
    assert {"intermediate_size", "rms_norm_eps", "head_dim", "s2_attention"}.isdisjoint(described)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu: must be gegelu"),
        ({"mup_use_scaling": False}, "mup_use_scaling False: must be true"),
        ({"mup_attn_multiplier": 2.0}, "mup_attn_multiplier 2.0: must be 1.0"),
        ({"mup_width_multiplier": 49.0}, "mup_width_multiplier 49.0: must have an exact inverse"),
        ({"rope_scaling": {"type": "su"}}, "must be null; Megatron has no LongRoPE"),
        ({"ff_dim_multiplier": 4}, "ff_dim_multiplier 4: must be null; state ff_intermediate_size"),
        ({"dense_attention_every_n_layers": -1}, "dense_attention_every_n_layers -1: must be a whole number"),
        ({"blocksparse_block_size": 48}, "blocksparse pattern: block_size 48: must be a power of two >= 16"),
        ({"blocksparse_homo_head_pattern": 1}, "blocksparse_homo_head_pattern 1: must be true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_megatron_does_not_have_is_refused(tmp_path, changes, message):
    source = save_model(tmp_path / "hf")
    edit_config(source, **changes)
    assert_refused("hf-to-megatron", source, message)


def test_another_pattern_is_refused(sources, tmp_path):
    """The model has its own; and config.json has no words for most others."""
    flags = ["--s2-attention", "--s2-block-size", "16", "--s2-vert-stride", "4"]
    status_message = "the model was trained with"
    source = save_model(tmp_path / "hf")
    assert_refused("hf-to-megatron", source, status_message, *flags)
    model = model_from_config(CONFIG)
    for fields in ({"sink_blocks": 1}, {"dense_layers": (1,)}, {"vert_stride": 0}, {"vert_stride": (4, 8)}):
        settings = S2Settings(4, 2, 16, **fields)
        with pytest.raises(InputError, match=r"config\.json of phi3small cannot describe it"):
            config_from_model(model, CONFIG, settings, "float32")


def test_transformers_has_no_such_model(sources):
    with pytest.raises(ValueError, match=r"^--hf \S+: transformers has no phi3small; convert it"):
        load_pretrained(sources["published"])
