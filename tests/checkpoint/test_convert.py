"""A model goes to Megatron's format and comes back bit by bit, whatever family, dtype and files it has."""

import json
import subprocess
import sys

import pytest
import torch
from hf_models import FAMILIES, assert_bit_equal, convert, edit_config, make_model, weights
from transformers import AutoModelForCausalLM

S2 = ("--s2-attention", "--s2-block-size", "16", "--s2-local-blocks", "2", "--s2-vert-stride", "3", "4")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_changes_no_bit(tmp_path, family, dtype):
    source = make_model(tmp_path / "hf", family, dtype)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert_bit_equal(weights(source), weights(tmp_path / "back"))
    assert config(tmp_path / "back") == config(source)


def test_shards_are_read_and_written(tmp_path):
    source = make_model(tmp_path / "hf", "qwen2", shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--max-shard-size", "100KB")
    assert_bit_equal(weights(source), weights(tmp_path / "back"))

    files = sorted(tmp_path.glob("back/*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert max(file.stat().st_size for file in files) < 110_000  # the file's head included
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(source).keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_bit_equal(dict(loaded.named_parameters()), {**weights(source)})


def test_another_dtype_is_a_rounding_of_the_weights(tmp_path):
    source = make_model(tmp_path / "hf", "qwen3")
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--dtype", "bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in weights(source).items()}
    assert_bit_equal(weights(tmp_path / "back"), rounded)
    assert config(tmp_path / "back")["dtype"] == "bfloat16"


def test_a_tied_output_layer_may_be_stored_again(tmp_path):
    from safetensors.torch import save_file

    source = make_model(tmp_path / "hf", "qwen3, tied")
    stored = weights(source)
    save_file(
        stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, source / "model.safetensors"
    )
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert_bit_equal(weights(tmp_path / "back"), stored)


def test_the_config_of_older_transformers_is_read(tmp_path):
    source = make_model(tmp_path / "hf", "llama3.1")
    rope = config(source)["rope_parameters"]
    convert("hf-to-megatron", source, tmp_path / "new")
    theta = rope.pop("rope_theta")
    edit_config(source, rope_parameters=None, rope_theta=theta, rope_scaling=rope, head_dim=None)
    convert("hf-to-megatron", source, tmp_path / "old")
    assert (tmp_path / "old/resume.args").read_text() == (tmp_path / "new/resume.args").read_text()


def test_the_pattern_is_part_of_the_config_and_comes_back(tmp_path):
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


def test_flags_of_training_that_belong_to_the_model_are_printed(tmp_path):
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


def test_transformers_refuses_a_sparse_model_where_s2_is_not_registered(tmp_path):
    source = make_model(tmp_path / "hf", "qwen3")
    convert("hf-to-megatron", source, tmp_path / "megatron", *S2)
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "sparse")
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "sparse"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert 'attn_implementation="s2"` is not supported' in done.stderr


def test_a_sliding_window_is_replaced_by_the_pattern(tmp_path):
    source = make_model(tmp_path / "hf", "mistral", sliding_window=4096)
    convert("hf-to-megatron", source, tmp_path / "megatron", *S2)
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "sparse")
    assert config(tmp_path / "sparse")["sliding_window"] is None


def test_tokenizer_files_go_along(tmp_path):
    source = make_model(tmp_path / "hf", "llama3.1")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"chat_template": "yes"}')
    printed = convert("hf-to-megatron", source, tmp_path / "megatron")
    place = tmp_path / "megatron" / "huggingface"
    assert f"--tokenizer-type HuggingFaceTokenizer\n--tokenizer-model {place}\n" in printed
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
