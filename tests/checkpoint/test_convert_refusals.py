"""Input that cannot be converted is refused in one line with status 2, and no output is left."""

import os
import pickle
import resource
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hf_models import assert_refused, convert, edit_config, make_model, run_conversion, store

from megatron_s2.checkpoint import atomic_directory, torch_dist
from megatron_s2.checkpoint import convert as conversion

S2 = ("--s2-attention", "--s2-block-size", "16", "--s2-local-blocks", "2", "--s2-vert-stride", "4")


@pytest.fixture
def source(tmp_path) -> Path:
    return make_model(tmp_path / "hf", "llama3.1", num_hidden_layers=2)


@pytest.fixture
def trained(source, tmp_path) -> Path:
    convert("hf-to-megatron", source, tmp_path / "megatron", *S2)
    return tmp_path / "megatron"


def change_arguments(trained: Path, **changes) -> None:
    """Changes arguments in a checkpoint, in the file where older versions of Megatron stored them."""
    common = torch_dist.CheckpointReader(trained).common
    vars(common["args"]).update(changes)
    torch.save(common, trained / "release" / "common.pt")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"model_type": "gpt_neox"},
            "model_type gpt_neox: must be one of llama, mistral, qwen2, qwen3,",
        ),
        (
            {"model_type": "olmo2"},
            "model_type olmo2: cannot be converted: its norms follow attention and MLP",
        ),
        ({"model_type": ["llama"]}, "model_type ['llama']: must be one of llama,"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures ['LlamaForSequenceC"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act gelu: must be silu"),
        ({"attention_bias": True}, "config.json: attention_bias True: must be False"),
        ({"mlp_bias": True}, "config.json: mlp_bias True: must be False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}: must be None"),
        ({"hidden_size": "64"}, "config.json: hidden_size 64: must be a whole number >= 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3: must divide num_attention_heads 4"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_type dynamic: must be default, linear, llama3 or yarn",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, "factor 2.5: must be a whole number"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_scaling: factor None: must be a number"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "rope_theta 0.5: must be a whole number"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta inf: must be a number > 0"),
        ({"rope_parameters": [8.0]}, "rope_scaling [8.0]: must be an object or null"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps small: must be a number > 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5: must be 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: must be 1.0"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4, "rope_theta": 5e5}}},
            "rope_scaling: full_attention {'rope_type': 'yarn', 'factor': 4, 'rope_theta': 500000.0}: is not",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "attention_factor": 2}},
            "rope_scaling: attention_factor 2: is not known for rope_type default",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 4}},
            "factor 4: is not known for rope_type d",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4, "beta_fast": 32}},
            "rope_scaling: beta_fast 32: is not known for rope_type linear",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_type longrope: must be default,"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false': must be true or false"),
        ({"tie_word_embeddings": 1}, "config.json: tie_word_embeddings 1: must be true or false"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "low_freq_factor 2.0: must be 1, fixed in Megatron",
        ),
        ({"s2_attention": {"stride": 4}}, "s2_attention stride: is not a setting of S2 attention"),
        ({"s2_attention": {"block_size": 48}}, "s2_attention: block_size 48: must be a power of two"),
        ({"s2_attention": {"block_size": "16"}}, "s2_attention: block_size '16': must be a whole number"),
        ({"s2_attention": {"block_size": 16.0}}, "s2_attention: block_size 16.0: must be a whole number"),
        ({"s2_attention": {"sink_blocks": None}}, "s2_attention: sink_blocks None: must be a whole number"),
        ({"s2_attention": {"local_blocks": True}}, "s2_attention: local_blocks True: must be a whole number"),
        (
            {"s2_attention": {"vert_stride": [[3], [4]]}},
            "config.json: s2_attention: vert_stride [[3], [4]]: must be a whole number or a list of whole",
        ),
        ({"s2_attention": {"phases": 1}}, "phases 1: must be a list of whole numbers or null"),
        ({"s2_attention": {"phases": [0, "1"]}}, "phases [0, '1']: must be a list of whole numbers or null"),
        ({"s2_attention": {"dense_layers": {"1": 2}}}, "{'1': 2}: must be a list of whole numbers"),
        ({"s2_attention": "yes"}, "s2_attention yes: must be an object"),
        ({"s2_attention": {"layers": 3}}, "s2_attention: layers 3: must be a list with one object per layer"),
        ({"s2_attention": {"layers": [{}]}}, "s2_attention: layer 2: is missing, of 2 layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unsupported_config(source, entries, message):
    edit_config(source, **entries)
    assert_refused("hf-to-megatron", source, message)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        ("llama, yarn", YARN | {"attention_factor": 1.1}, "attention_factor 1.1: must be null: Megatron"),
        ("llama, yarn", YARN | {"truncate": 1}, "rope_scaling: truncate 1: must be true or false"),
        ("llama, yarn", YARN | {"beta_fast": -1}, "rope_scaling: beta_fast -1: must be a number > 0"),
        ("llama, yarn", YARN | {"factor": None}, "rope_scaling: factor None: must be a number > 0"),
        ("llama, yarn", YARN | {"original_max_position_embeddings": 1.5}, "beddings 1.5: must be a whole"),
        ("llama, yarn", YARN | {"low_freq_factor": 2}, "low_freq_factor 2: is not known for rope_type yarn"),
        ("phi3", YARN, "rope_scaling: rope_type yarn: must be default"),
        ("phi3", {"rope_type": "longrope"}, "rope_scaling: rope_type longrope: must be default"),
        ("phi3", {"type": "su"}, "rope_scaling: rope_type su: must be default"),
        ("phi3", {"partial_rotary_factor": 0.7}, "factor 0.7: must leave an even part of head_dim 16"),
        ("phi3", {"partial_rotary_factor": 2.0}, "factor 2.0: must leave an even part of head_dim 16"),
    ],
    ids=str,
)
def test_unsupported_rotary_positions(tmp_path, family, rope, message):
    source = make_model(tmp_path / "hf", family)
    edit_config(source, rope_parameters=rope)
    assert_refused("hf-to-megatron", source, message)


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1: must be 0.0"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5: must be at most num_local_experts 4"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok 1: must be at least 2"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts None: must be a whole number >= 1"),
        ("mixtral", {"router_aux_loss_coef": "no"}, "router_aux_loss_coef no: must be a number >= 0"),
        ("qwen3 moe", {"num_experts_per_tok": 1}, "1: must be at least 2, as in Megatron where weights sum"),
        ("qwen3 moe", {"norm_topk_prob": 1}, "config.json: norm_topk_prob 1: must be true or false"),
        ("qwen3 moe", {"mlp_only_layers": 1}, "mlp_only_layers 1: must be a list of whole numbers"),
        ("qwen3 moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0: must be a whole number >= 1"),
        ("qwen3 moe", {"decoder_sparse_step": 4}, "decoder_sparse_step 4 leave no layer experts"),
        ("qwen3 moe", {"moe_intermediate_size": None}, "moe_intermediate_size None: must be a whole number"),
    ],
    ids=str,
)
def test_unsupported_experts(tmp_path, family, entries, message):
    source = make_model(tmp_path / "hf", family)
    edit_config(source, **entries)
    assert_refused("hf-to-megatron", source, message)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral", "qwen3 moe"])
def test_a_sliding_window_without_s2(tmp_path, family):
    windowed = {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1}
    source = make_model(tmp_path / "hf", family, **windowed)
    assert_refused("hf-to-megatron", source, "sliding_window 4096: the converted model would see everything")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "model.layers.1.mlp.up_proj.weight: missing"),
        (
            {"model.layers.1.mlp.up_proj.bias": torch.zeros(96)},
            "up_proj.bias: config.json describes a model w",
        ),
        ({"model.norm.weight": torch.ones(65)}, "model.norm.weight: has shape [65]; config.json says [64]"),
        ({"model.norm.weight": torch.ones(64).char()}, "norm.weight: is stored as I8; must be one of F32"),
        (
            {"model.layers.1.input_layernorm.weight": torch.ones(64).bfloat16()},
            "is stored as BF16, but model.layers.0.input_layernorm.weight as F32; must be the same",
        ),
        (
            {f"model.layers.{n}.self_attn.k_proj.weight": torch.ones(32, 64).bfloat16() for n in (0, 1)},
            "k_proj.weight: is stored as BF16, but model.layers.0.self_attn.q_proj.weight as F32; must be",
        ),
        (
            {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(96, 64).half() for n in (0, 1)},
            "up_proj.weight: is stored as F16, but model.layers.0.mlp.gate_proj.weight as F32; must be the",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype", "layers of two dtypes", "query and key", "gate and up"],
)
def test_weights_that_contradict_the_config(source, changed, message):
    store(source, changed)
    assert_refused("hf-to-megatron", source, message)


def test_a_tied_output_layer_that_differs(tmp_path):
    source = make_model(tmp_path / "hf", "qwen3, tied")
    for other in (torch.ones(250, 64), torch.ones(250, 64).half(), torch.ones(256, 64)):
        store(source, {"lm_head.weight": other})
        assert_refused("hf-to-megatron", source, "lm_head.weight: differs from model.embed_tokens.weight")


def test_pickled_weights_are_not_opened(source):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert_refused("hf-to-megatron", source, "pytorch_model.bin: is a pickle, which can run code")


def test_a_directory_without_a_model(tmp_path):
    assert_refused("hf-to-megatron", tmp_path / "nowhere", "nowhere: there is no such directory")
    assert_refused("megatron-to-hf", tmp_path / "nowhere", "nowhere: there is no such directory")
    (tmp_path / "empty").mkdir()
    assert_refused("hf-to-megatron", tmp_path / "empty", "config.json: there is no such file")
    assert_refused("megatron-to-hf", tmp_path / "empty", "empty: is not a checkpoint: it has no latest_chec")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--s2-vert-stride", "4"), "--s2-vert-stride: needs --s2-attention"),
        (("--s2-attention", "--s2-block-size", "48"), "--s2-block-size 48: must be a power of two"),
        (("--s2-attention", "--s2-learnable-sink"), "--s2-learnable-sink: must not be set"),
        (("--s2-attention", "--s2-backend", "torch"), "--s2-backend: must not be set: it is for training"),
    ],
)
def test_s2_flags_that_do_not_describe_a_model(source, flags, message):
    assert_refused("hf-to-megatron", source, message, *flags)


def test_a_pattern_that_differs_from_the_models(source, trained, tmp_path):
    convert("megatron-to-hf", trained, tmp_path / "sparse")
    message = "--s2-vert-stride 8: the model was trained with 4; give the same"
    assert_refused("hf-to-megatron", tmp_path / "sparse", message, *S2, "--s2-vert-stride", "8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softmax_type": "learnable"}, "--s2-learnable-sink: none of the families has learned sinks"),
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm: the checkpoint was trained with it"),
        ({"spec": ["a", "b"]}, "--spec"),
        ({"num_experts": 8, "add_qkv_bias": True}, "--add-qkv-bias: no family has it together with --num"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "--add-qkv-bias: no family has it together with"),
        ({"rotary_percent": 0.5, "add_qkv_bias": True}, "--rotary-percent 0.5: the checkpoint was trained"),
        ({"position_embedding_type": "none"}, "--position-embedding-type none: the checkpoint was trained"),
        ({"rotary_seq_len_interpolation_factor": 2}, "--rotary-seq-len-interpolation-factor 2: the check"),
        ({"ffn_hidden_size": 48}, "linear_fc1.weight: has shape [2, 192, 64]; its arguments say [2, 96, 64]"),
        ({"qk_layernorm": True}, "q_layernorm.weight: missing; the checkpoint's arguments say"),
        ({"untie_embeddings_and_output_weights": False}, "output_layer.weight: no llama model has it"),
        ({"kv_channels": None}, "--kv-channels: missing from the checkpoint's arguments"),
        ({"s2_anneal_steps": 100}, "the checkpoint is of step 7, before its attention is the pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_fits_no_family(trained, changes, message):
    change_arguments(trained, **changes)
    if "s2_anneal_steps" in changes:
        common = torch.load(trained / "release/common.pt", weights_only=False)
        torch.save(common | {"iteration": 7}, trained / "release/common.pt")
    assert_refused("megatron-to-hf", trained, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_router_score_function": "sigmoid"}, "--moe-router-score-function sigmoid: the checkpoint was"),
        ({"moe_shared_expert_intermediate_size": 64}, "--moe-shared-expert-intermediate-size 64: the check"),
        ({"moe_router_load_balancing_type": ["sinkhorn"]}, "--moe-router-load-balancing-type sinkhorn: the"),
        ({"moe_router_pre_softmax": True}, "--moe-router-pre-softmax True: the checkpoint was trained with"),
        ({"moe_layer_freq": 2}, "--moe-layer-freq 2: the checkpoint was trained with it; must be 1"),
        ({"num_experts": 3}, "mlp.router.weight: has shape [3, 4, 64]; its arguments say [3, 3, 64]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_experts_that_fit_no_family(tmp_path, changes, message):
    convert("hf-to-megatron", make_model(tmp_path / "hf", "mixtral"), tmp_path / "megatron")
    change_arguments(tmp_path / "megatron", **changes)
    assert_refused("megatron-to-hf", tmp_path / "megatron", message)


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("qwen3", "--rope-scaling yarn", "--rope-scaling-factor: must be given with --rope-scaling"),
        ("qwen3", "--rope-scaling-factor 2", "--rope-scaling: must be given with --rope-scaling-factor"),
        ("qwen3", "--rope-scaling linear --rope-scaling-factor 2.5", "-factor 2.5: must be a whole number"),
        ("qwen3", "--rope-scaling llama3 --rope-scaling-factor 4", "needs a model of 8192 positions, fixed"),
        ("phi3", "--rope-scaling yarn --rope-scaling-factor 4", "--rope-scaling yarn: must be left out"),
        ("qwen3", "--rope-scaling yarn --rope-scaling-factor 0.5", "invalid number >= 1 value: '0.5'"),
        ("qwen3", "--rope-scaling longrope --rope-scaling-factor 4", "invalid choice: 'longrope'"),
        ("qwen3", "--max-position-embeddings 0", "invalid whole number >= 1 value: '0'"),
    ],
)
def test_a_longer_context_that_the_model_cannot_have(tmp_path, family, flags, message):
    source = make_model(tmp_path / "hf", family)
    assert_refused("hf-to-megatron", source, message, *flags.split())


def test_a_checkpoint_with_annealing_that_was_never_trained(source, tmp_path):
    """Its attention is still dense, whatever pattern its arguments name."""
    convert("hf-to-megatron", source, tmp_path / "megatron", *S2, "--s2-anneal-steps", "100")
    message = "is of step 0, before its attention is the pattern; take one from step 100 on, or convert the"
    assert_refused("megatron-to-hf", tmp_path / "megatron", message)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_family_that_contradicts_the_arguments(tmp_path, family):
    convert("hf-to-megatron", make_model(tmp_path / "hf", family), tmp_path / "megatron")
    flags = ("--family", "mistral")
    assert_refused(
        "megatron-to-hf", tmp_path / "megatron", f"--family mistral: the model is {family}", *flags
    )


def test_an_unknown_vocabulary_size(trained):
    change_arguments(trained, vocab_size=None)
    (trained / "huggingface" / "config.json").unlink()
    assert_refused("megatron-to-hf", trained, "--vocab-size: must be given")
    assert_refused("megatron-to-hf", trained, "(tokens: --vocab-size)", "--vocab-size", "400")
    assert_refused("megatron-to-hf", trained, "invalid whole number >= 1 value: '-1'", "--vocab-size", "-1")
    assert convert("megatron-to-hf", trained, trained.parent / "output", "--vocab-size", "250")


def test_a_vocabulary_size_that_contradicts_the_known_one(trained):
    message = "--vocab-size 200: the checkpoint, or the model that it began with, has 250; leave it out"
    assert_refused("megatron-to-hf", trained, message, "--vocab-size", "200")
    change_arguments(trained, vocab_size=None)  # now only its config.json contains it
    assert_refused("megatron-to-hf", trained, message, "--vocab-size", "200")
    assert convert("megatron-to-hf", trained, trained.parent / "output", "--vocab-size", "250")


class _Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_code_in_a_pickle_is_not_run(trained, tmp_path, monkeypatch, file):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    harmful = {"args": Namespace(harm=_Harmful())}
    if file == "common.pt":
        torch.save(harmful, trained / "release" / file)
    else:
        (trained / "release" / file).write_bytes(pickle.dumps(harmful))
    assert_refused("megatron-to-hf", trained, str(trained / "release"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_an_existing_output_is_not_touched(source, trained, tmp_path, direction):
    given = source if direction == "hf-to-megatron" else trained
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").touch()
    assert_refused(direction, given, "output: exists already; give a directory that does not")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["precious"]


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_the_unfinished_output_of_another_process_is_not_touched(source, trained, tmp_path, direction):
    """A process with the same id may write to the same disk from another machine."""
    given = source if direction == "hf-to-megatron" else trained
    unfinished = tmp_path / f".output.{os.getpid()}.part"
    unfinished.mkdir()
    (unfinished / "precious").touch()
    assert_refused(direction, given, f"File exists: '{unfinished}'")
    assert [path.name for path in unfinished.iterdir()] == ["precious"]


def test_values_beyond_the_range_of_a_dtype(source, tmp_path):
    store(source, {"model.layers.1.mlp.up_proj.weight": torch.full((96, 64), 70_000.0)})
    convert("hf-to-megatron", source, tmp_path / "megatron")
    message = "--dtype float16: model.layers.1.mlp.up_proj.weight has values beyond its maximum, 65504"
    assert_refused("megatron-to-hf", tmp_path / "megatron", message, "--dtype", "float16")


def test_an_output_path_that_a_shell_would_split(source):
    status, _, errors = run_conversion("hf-to-megatron", source, source.parent / "two words")
    assert status == 2
    assert "must be a path without spaces" in errors


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_is_too_small(source, trained, monkeypatch, direction):
    monkeypatch.setattr(atomic_directory.shutil, "disk_usage", lambda path: Namespace(free=1000))
    given = source if direction == "hf-to-megatron" else trained
    assert_refused(direction, given, "GB and its disk has 1e-06 GB left")


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_up(source, trained, tmp_path, direction):
    """A limit on file sizes stands in for a full disk: the kernel stops a write half-way."""
    given = source if direction == "hf-to-megatron" else trained
    before, limit = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    try:
        status, printed, errors = run_conversion(direction, given, tmp_path / "output")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (status, printed) == (2, ""), errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "File too large" in errors and str(tmp_path / ".output.") in errors
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_no_space_left_after_the_weights(source, trained, monkeypatch, direction):
    def write(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "_copy", write)
    given = source if direction == "hf-to-megatron" else trained
    assert_refused(direction, given, "No space left on device")


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_ctrl_c_leaves_nothing(source, trained, tmp_path, monkeypatch, direction):
    to_megatron = direction == "hf-to-megatron"
    reader = conversion.SafetensorsReader if to_megatron else conversion.CheckpointReader
    read, reads = reader.read, iter(range(1000))

    def interrupted_read(self, *wanted):
        if next(reads) == 5:
            signal.raise_signal(signal.SIGINT)
        return read(self, *wanted)

    monkeypatch.setattr(reader, "read", interrupted_read)
    given = source if to_megatron else trained
    before = sorted(tmp_path.iterdir())
    status, printed, errors = run_conversion(direction, given, tmp_path / "output")
    assert (status, printed, errors) == (130, "", "interrupted\n")
    assert sorted(tmp_path.iterdir()) == before
