"""A model survives the conversion to Megatron and back bit by bit, in every family and dtype."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hf_models import (
    CONFIGS,
    LLAMA3,
    assert_bit_equal,
    convert,
    edit_config,
    make_model,
    run_conversion,
    store,
    weights,
)
from transformers import AutoModelForCausalLM
from waiting import PATIENCE

from megatron_s2.checkpoint import families
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import read_pattern_file, write_pattern_file

S2 = ("--s2-attention", "--s2-block-size", "16", "--s2-local-blocks", "2", "--s2-vert-stride", "3", "4")
LLAMA3_SCALING = {entry: value for entry, value in LLAMA3.items() if entry != "rope_theta"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_round_trip_is_bit_exact(tmp_path, family, dtype, shards):
    size = "5GB" if shards == "one file" else "60KB"
    source = make_model(tmp_path / "hf", family, dtype, size)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--max-shard-size", size)
    for directory in (source, tmp_path / "back"):
        assert (len(list(directory.glob("*.safetensors"))) > 3) == (shards == "shards")
    assert_bit_equal(weights(source), weights(tmp_path / "back"))
    assert config(tmp_path / "back") == config(source)


def test_each_tensor_keeps_its_dtype(tmp_path):
    source = make_model(tmp_path / "hf", "qwen3", torch.bfloat16)
    wider = {name: tensor.float() / 3 for name, tensor in weights(source).items() if tensor.dim() == 1}
    halved = {name: tensor.half() for name, tensor in weights(source).items() if "down_proj" in name}
    store(source, wider | halved)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--max-shard-size", "60KB")
    assert {tensor.dtype for tensor in weights(source).values()} == {
        torch.float32,
        torch.bfloat16,
        torch.float16,
    }
    assert_bit_equal(weights(source), weights(tmp_path / "back"))
    assert config(tmp_path / "back") == config(source)
    assert max(file.stat().st_size for file in tmp_path.glob("back/*.safetensors")) < 70_000

    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "float32", "--dtype", "float32")
    widened = {name: tensor.float() for name, tensor in weights(source).items()}
    assert_bit_equal(weights(tmp_path / "float32"), widened)
    assert config(tmp_path / "float32")["dtype"] == "float32"


@pytest.mark.parametrize("flags", [(), S2], ids=["dense", "sparse"])
def test_family_of_a_mistral_whose_config_is_missing(tmp_path, flags):
    source = make_model(tmp_path / "hf", "mistral")
    convert("hf-to-megatron", source, tmp_path / "megatron", *flags)
    printed = convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "beside")
    config_path = tmp_path / "megatron/huggingface/config.json"
    assert f"beside: mistral (from {config_path}), 3 layers, " in printed
    shutil.rmtree(tmp_path / "megatron/huggingface")  # as in a checkpoint that a training saved
    printed = convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "plain")
    assert (
        "plain: llama (or Mistral or Phi3, the same in Megatron: --family mistral or phi3), 3 layers, "
        in printed
    )
    printed = convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "asked", "--family", "mistral")
    assert "asked: mistral (from --family), 3 layers, " in printed
    assert config(tmp_path / "plain")["architectures"] == ["LlamaForCausalLM"]
    assert config(tmp_path / "asked")["architectures"] == ["MistralForCausalLM"]
    assert config(tmp_path / "asked")["sliding_window"] is None
    for name in ("plain", "asked"):
        assert_bit_equal(weights(source), weights(tmp_path / name))
    if not flags:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "asked")
        assert type(loaded).__name__ == "MistralForCausalLM"
        assert_bit_equal(dict(loaded.named_parameters()), weights(source))


@pytest.mark.parametrize(
    ("family", "flag"),
    [
        ("qwen2", "--add-qkv-bias"),
        ("qwen3, tied", "--qk-layernorm"),
        ("phi3, partial and tied", "--rotary-percent"),
        ("mixtral", "--num-experts"),
        ("qwen3 moe, dense layers", "--qk-layernorm and --num-experts"),
    ],
)
def test_families_that_the_arguments_identify(tmp_path, family, flag):
    source = make_model(tmp_path / "hf", family)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron/huggingface")
    printed = convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    model_type = config(source)["model_type"]
    assert f"back: {model_type} (from the checkpoint's {flag}), 3 layers, dense attention, no tok" in printed
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_bit_equal(dict(loaded.named_parameters()), parameters(source))


def parameters(source) -> dict[str, torch.Tensor]:
    """Returns the parameters of a model as transformers loads it; it may fuse those of experts."""
    return dict(AutoModelForCausalLM.from_pretrained(source).named_parameters())


@pytest.mark.parametrize("family", ["mixtral", "qwen3 moe, dense layers"])
def test_the_norm_of_experts_under_the_key_of_either_spec(tmp_path, family):
    """A training saves it under the key of its own layers, Megatron's or Transformer Engine's."""
    source = make_model(tmp_path / "hf", family)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    path = tmp_path / "megatron/release/.metadata"
    metadata = pickle.loads(path.read_bytes())
    keys = metadata.state_dict_metadata.keys()
    local = [key for key in keys if key.endswith("mlp.linear_fc1.layer_norm_weight")]
    other = [key for key in keys if key.endswith("pre_mlp_layernorm.weight")]
    for number, left in enumerate((local, other)):
        kept = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if key not in left or key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.") not in keys
        }
        path.write_bytes(pickle.dumps(replace(metadata, state_dict_metadata=kept)))
        assert len(kept) < len(keys)
        convert("megatron-to-hf", tmp_path / "megatron", tmp_path / f"back{number}")
        assert_bit_equal(weights(source), weights(tmp_path / f"back{number}"))


def test_the_coefficient_of_the_balancing_loss_is_a_flag(tmp_path):
    source = make_model(tmp_path / "hf", "mixtral", router_aux_loss_coef=0.02)
    printed = convert("hf-to-megatron", source, tmp_path / "megatron")
    assert "\n--moe-aux-loss-coeff 0.02\n" in printed
    assert "--moe-layer-freq" not in printed
    source = make_model(tmp_path / "other", "qwen3 moe, dense layers", norm_topk_prob=False)
    printed = convert("hf-to-megatron", source, tmp_path / "other-megatron")
    assert "\n--moe-layer-freq ([1]*1+[0]*1+[1]*1)\n" in printed
    assert "\n--moe-router-pre-softmax\n" in printed


def test_family_offers_the_families_that_are_the_same_in_megatron(tmp_path, monkeypatch):
    _, _, errors = run_conversion("megatron-to-hf", tmp_path, tmp_path / "output", "--family", "none")
    assert re.findall(r"\w+", errors.partition("choose from")[2]) == ["llama", "mistral", "phi3"]
    other = families.Family("OtherForCausalLM", megatron_args={"qk_layernorm": True})
    monkeypatch.setitem(families.FAMILIES, "other", other)
    assert families.ambiguous_families() == ["llama", "mistral", "qwen3", "phi3", "other"]


def test_reads_symlinks_in_read_only_directories(tmp_path):
    """As in the cache of the Hugging Face Hub: links to files with other names."""
    source = make_model(tmp_path / "hf", "llama3.1", shard_size="60KB")
    (source / "tokenizer.json").write_text("{}")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../blobs/{number}")
        (blobs / str(number)).chmod(0o400)
    snapshot.chmod(0o500)
    convert("hf-to-megatron", snapshot, tmp_path / "megatron")
    (tmp_path / "link").symlink_to("megatron", target_is_directory=True)
    convert("megatron-to-hf", tmp_path / "link", tmp_path / "back")
    assert_bit_equal(weights(source), weights(tmp_path / "back"))
    assert not (tmp_path / "back/tokenizer.json").is_symlink()
    (tmp_path / "back/tokenizer.json").write_text("writable")


def test_transformers_reads_the_shards(tmp_path):
    source = make_model(tmp_path / "hf", "qwen2", shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--max-shard-size", "100KB")
    assert_bit_equal(weights(source), weights(tmp_path / "back"))

    files = sorted(tmp_path.glob("back/*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert max(file.stat().st_size for file in files) < 110_000  # with the header of the file
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(source).keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_bit_equal(dict(loaded.named_parameters()), {**weights(source)})


def test_dtype_rounds_the_weights(tmp_path):
    source = make_model(tmp_path / "hf", "qwen3")
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--dtype", "bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in weights(source).items()}
    assert_bit_equal(weights(tmp_path / "back"), rounded)
    assert config(tmp_path / "back")["dtype"] == "bfloat16"


def test_a_tied_output_layer_may_be_stored_as_well(tmp_path):
    source = make_model(tmp_path / "hf", "qwen3, tied")
    stored = weights(source)
    store(source, {"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert_bit_equal(weights(tmp_path / "back"), stored)


def test_the_config_of_transformers_4_is_read(tmp_path):
    source = make_model(tmp_path / "hf", "llama3.1")
    rope = config(source)["rope_parameters"]
    convert("hf-to-megatron", source, tmp_path / "new")
    theta = rope.pop("rope_theta")
    edit_config(source, rope_parameters=None, rope_theta=theta, rope_scaling=rope, head_dim=None)
    convert("hf-to-megatron", source, tmp_path / "old")
    assert (tmp_path / "old/resume.args").read_text() == (tmp_path / "new/resume.args").read_text()


def test_the_pattern_survives_a_round_trip(tmp_path):
    source = make_model(tmp_path / "hf", "llama2", num_key_value_heads=2)
    convert("hf-to-megatron", source, tmp_path / "megatron", *S2, "--s2-dense-layers", "1,3")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "sparse")
    assert config(tmp_path / "sparse")["s2_attention"] == {
        "block_size": 16,
        "local_blocks": 2,
        "vert_stride": [3, 4],
        "sink_blocks": 0,
        "phases": None,
        "num_dense_heads": 0,
        "dense_layers": [1, 3],
        "dense_layer_freq": 0,
    }
    convert("hf-to-megatron", tmp_path / "sparse", tmp_path / "again")  # without S2 flags
    assert (tmp_path / "again/resume.args").read_text() == (tmp_path / "megatron/resume.args").read_text()
    convert("megatron-to-hf", tmp_path / "again", tmp_path / "twice")
    assert config(tmp_path / "twice") == config(tmp_path / "sparse")


def test_a_pattern_for_each_layer_survives_a_round_trip(tmp_path):
    source = make_model(tmp_path / "hf", "llama2", num_key_value_heads=2)
    layers = [
        {"dense": True},
        {"local_blocks": 2, "sink_blocks": 1, "strides": [0, 3], "phases": [0, 2]},
        {"local_blocks": 1, "sink_blocks": 0, "strides": [0, 0], "phases": [0, 0]},
    ]
    settings, given = S2Settings(3, 2, 16, layers=layers), tmp_path / "given.json"
    write_pattern_file(given, settings)
    flags = ("--s2-attention", "--s2-pattern-file", str(given))
    convert("hf-to-megatron", source, tmp_path / "megatron", *flags)
    given.unlink()
    stored = tmp_path / "megatron/pattern.json"
    assert read_pattern_file(stored) == settings
    lines = (tmp_path / "megatron/resume.args").read_text().splitlines()
    assert [line for line in lines if "s2" in line] == ["--s2-attention", f"--s2-pattern-file {stored}"]

    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "sparse")
    assert config(tmp_path / "sparse")["s2_attention"] == {"block_size": 16, "layers": layers}
    convert("hf-to-megatron", tmp_path / "sparse", tmp_path / "again")  # without S2 flags
    assert read_pattern_file(tmp_path / "again/pattern.json") == settings
    status, _, errors = run_conversion("hf-to-megatron", tmp_path / "sparse", tmp_path / "other", *S2)
    assert status == 2
    assert errors.startswith(
        "error: --s2-pattern-file: layer 1: window 2, sinks 0, strides 3 4, phases 0 0: "
    )
    assert "the model was trained with dense attention; give the same" in errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [((), None), (S2, "the pattern has no sinks"), ((*S2, "--s2-sink-blocks", "1"), None)],
    ids=["dense", "no sinks", "sinks"],
)
def test_a_dense_model_without_sinks_is_noted_with_its_cost(tmp_path, flags, said):
    source = make_model(tmp_path / "hf", "llama2", num_key_value_heads=2)
    _, _, errors = run_conversion("hf-to-megatron", source, tmp_path / "megatron", *flags)
    assert errors.count("\n") == bool(said)
    if said:
        assert errors.startswith(f"note: {said}: before training that costs a pretrained model much")
        convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "sparse")
        assert not run_conversion("hf-to-megatron", tmp_path / "sparse", tmp_path / "trained")[2]


def test_the_flags_of_the_model_are_printed(tmp_path):
    source = make_model(tmp_path / "hf", "qwen3", torch.bfloat16)
    printed = convert("hf-to-megatron", source, tmp_path / "megatron", *S2, "--s2-anneal-steps", "100")
    for line in (
        "--qk-layernorm",
        "--kv-channels 32",
        "--bf16",
        "--s2-anneal-steps 100",
        "--norm-epsilon 1e-06",
    ):
        assert f"\n{line}\n" in printed


@pytest.mark.exhaustive
def test_transformers_refuses_a_sparse_model_where_s2_is_not_registered(tmp_path):
    """An explicit None is the one way around it, as docs/checkpoints.md says."""
    source = make_model(tmp_path / "hf", "qwen3")
    convert("hf-to-megatron", source, tmp_path / "megatron", *S2)
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "sparse")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        "print(A.from_pretrained(sys.argv[1], attn_implementation=None).config._attn_implementation); "
        "A.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "sparse"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "sdpa\n"
    assert done.returncode != 0
    assert 'attn_implementation="s2"` is not supported' in done.stderr


def test_a_sliding_window_is_replaced_by_the_pattern(tmp_path):
    source = make_model(tmp_path / "hf", "mistral", sliding_window=4096)
    convert("hf-to-megatron", source, tmp_path / "megatron", *S2)
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "sparse")
    assert config(tmp_path / "sparse")["sliding_window"] is None


def test_tokenizer_files_are_copied(tmp_path):
    source = make_model(tmp_path / "hf", "llama3.1")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"chat_template": "yes"}')
    printed = convert("hf-to-megatron", source, tmp_path / "megatron")
    tokenizer = tmp_path / "megatron" / "huggingface"
    assert f"--tokenizer-type HuggingFaceTokenizer\n--tokenizer-model {tokenizer}\n" in printed
    printed = convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert printed.endswith(f", dense attention, tokenizer from {tokenizer}\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_every_kind_of_tokenizer_file_is_copied(tmp_path):
    """Mistral's tekken.json alone is a tokenizer; what is left out is named."""
    source = make_model(tmp_path / "hf", "mistral")
    kept = ("tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "vocab.txt", "spiece.model")
    for name in (*kept, "README.md", "modeling.py", ".gitattributes"):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    printed = convert("hf-to-megatron", source, tmp_path / "megatron")
    tokenizer = tmp_path / "megatron" / "huggingface"
    assert f"--tokenizer-type HuggingFaceTokenizer\n--tokenizer-model {tokenizer}\n" in printed
    assert printed.endswith(f"\nnot copied from {source}: README.md, modeling.py\n")
    assert printed.count("not copied") == 1
    printed = convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert printed.endswith(f", dense attention, tokenizer from {tokenizer}\n")
    for name in kept:
        assert (tmp_path / "back" / name).read_text() == name
    assert (tmp_path / "back" / "additional_chat_templates" / "tools.jinja").read_text() == "tools"


@pytest.mark.parametrize(
    ("family", "flags", "entries", "printed"),
    [
        (
            "qwen3",
            "--max-position-embeddings 32768 --rotary-base 4000000",
            {"max_position_embeddings": 32768, "rope_theta": 4000000.0, "rope_scaling": None},
            "--rotary-base 4000000",
        ),
        (
            "mistral",
            "--max-position-embeddings 65536 --rope-scaling yarn --rope-scaling-factor 4",
            {
                "max_position_embeddings": 65536,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16384,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": True,
                },
            },
            "--yarn-original-max-position-embeddings 16384",
        ),
        (
            "llama3.1",
            "--rope-scaling llama3 --rope-scaling-factor 32",
            {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3_SCALING, "factor": 32.0}},
            "--rope-scaling-factor 32.0",
        ),
        (
            "llama, yarn",
            "--rope-scaling linear --rope-scaling-factor 8",
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "--rotary-seq-len-interpolation-factor 8",
        ),
    ],
    ids=["base", "yarn", "llama3", "linear"],
)
def test_a_longer_context_is_part_of_the_model_from_then_on(tmp_path, family, flags, entries, printed):
    source = make_model(tmp_path / "hf", family)
    lines = convert("hf-to-megatron", source, tmp_path / "megatron", *flags.split())
    assert f"\n{printed}\n" in lines
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    longer = config(tmp_path / "back")
    assert {entry: longer.get(entry) for entry in entries} == entries
    assert "rope_parameters" not in longer
    assert_bit_equal(weights(source), weights(tmp_path / "back"))
    again = convert("hf-to-megatron", tmp_path / "back", tmp_path / "again")
    assert again.replace("again", "megatron") == lines
