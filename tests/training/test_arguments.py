"""The --s2-… flags on Megatron's own parser: defaults, what is settled, what is refused, and their help."""

import re
from argparse import ArgumentParser
from dataclasses import fields

import pytest
from megatron_arguments import parse

from megatron_s2.errors import flag_name
from megatron_s2.layers.arguments import _BYPASSES, settings_from_args
from megatron_s2.layers.config import S2TransformerConfig, s2_settings
from megatron_s2.parallel.time_model import Cluster
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file
from megatron_s2.training.arguments import (
    add_s2_args,
    differences_from_checkpoint,
    load_s2_args,
    validate_s2_args,
)

MODEL = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 128"
)
S2 = f"{MODEL} --s2-attention"
# What a model brings along; everything else of the settings is chosen by a flag.
OF_THE_MODEL = {"num_layers", "num_kv_heads"}
CHOSEN = {field.name: field for field in fields(S2Settings) if field.name not in OF_THE_MODEL}
IN_A_FILE = {"layers"}  # no flag of its own: what --s2-pattern-file contains
# Flags that are no settings of the pattern.
RATES = {field.name: field for field in fields(Cluster)}
OTHER_FLAGS = {"attention", "learnable_sink", "backend", "autotune", "anneal_steps", "cp_schedule", *RATES}
PATTERN_FILE = {"pattern_file"}


def validated(words: str):
    """The namespace after our validation, and what was settled."""
    argv = words.split()
    args = parse(argv)
    return args, validate_s2_args(args, argv)


def refusal(words: str) -> str:
    with pytest.raises(ValueError) as refused:
        validated(words)
    return str(refused.value)


def flags() -> dict[str, object]:
    """Our argparse actions by the name of their field, without the prefix."""
    parser = ArgumentParser()
    add_s2_args(parser)
    of_attention = [a for a in parser._actions if re.match("s2_(?!offload)", a.dest)]
    return {a.dest.removeprefix("s2_"): a for a in of_attention}


# Flags, settings and configuration stay in step.


def test_every_setting_has_its_flag_and_no_flag_is_without_meaning():
    assert set(flags()) == set(CHOSEN) - IN_A_FILE | OTHER_FLAGS | PATTERN_FILE


def test_every_setting_is_a_field_of_the_configuration_with_the_same_default():
    configured = {f.name.removeprefix("s2_"): f for f in fields(S2TransformerConfig) if f.name[:3] == "s2_"}
    assert set(configured) == set(CHOSEN) | OTHER_FLAGS - {"learnable_sink"}  # that one sets --softmax-type
    for name, field in (CHOSEN | RATES).items():
        assert configured[name].default == field.default


@pytest.mark.parametrize("name", [*sorted(CHOSEN.keys() - IN_A_FILE), *RATES])
def test_the_help_text_names_the_default_of_the_setting(name):
    said = re.search(r"Default (\w+(?:\.\d+)?)", flags()[name].help)
    default = (CHOSEN | RATES)[name].default
    if default is None:
        by_default = {"phases": "phases spread over the KV heads", "pattern_heads": "the KV heads"}
        assert f"By default {by_default[name]}" in flags()[name].help
    else:
        assert said[1] == ("none" if default == () else str(default))


def test_help_prints(capsys):
    parser = ArgumentParser()
    add_s2_args(parser)
    parser.print_help()
    assert "(j + phase) % stride is 0" in " ".join(capsys.readouterr().out.split())


# What validation gives.


def test_without_s2_nothing_is_changed():
    args, settled = validated(MODEL)
    assert settled == []
    assert args.attention_dropout == 0.1
    assert not args.s2_attention


def test_defaults_are_filled_in():
    args, _ = validated(S2)
    assert {name: getattr(args, f"s2_{name}") for name in CHOSEN} == {n: f.default for n, f in CHOSEN.items()}
    assert args.s2_backend == "auto" and args.s2_autotune is False
    assert settings_from_args(args) == S2Settings(num_layers=8, num_kv_heads=2)


def test_every_flag_reaches_the_settings():
    args, _ = validated(
        f"{S2} --s2-block-size 16 --s2-local-blocks 3 --s2-vert-stride 4 8 --s2-sink-blocks 1 "
        "--s2-phases 1 5 --s2-num-dense-heads 1 --s2-dense-layers 1,2 --s2-dense-layer-freq 4 "
        "--s2-backend reference --s2-autotune"
    )
    assert settings_from_args(args) == S2Settings(
        num_layers=8,
        num_kv_heads=2,
        block_size=16,
        local_blocks=3,
        vert_stride=(4, 8),
        sink_blocks=1,
        phases=(1, 5),
        num_dense_heads=1,
        dense_layers=(1, 2),
        dense_layer_freq=4,
    )
    assert args.s2_backend == "reference" and args.s2_autotune


def test_one_stride_is_a_number_and_several_are_one_per_head():
    assert validated(f"{S2} --s2-vert-stride 4")[0].s2_vert_stride == 4
    assert validated(f"{S2} --s2-vert-stride 4 2")[0].s2_vert_stride == (4, 2)


def test_without_groups_every_head_is_a_kv_head():
    args, _ = validated("--s2-attention --num-layers 2 --num-attention-heads 4 --seq-length 128")
    assert settings_from_args(args).num_kv_heads == 4


def test_the_configuration_gives_the_settings_of_the_flags():
    args, _ = validated(f"{S2} --s2-block-size 32 --s2-vert-stride 4 2 --s2-dense-layers 2")
    config = S2TransformerConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        **{f"s2_{name}": getattr(args, f"s2_{name}") for name in CHOSEN},
    )
    assert s2_settings(config) == settings_from_args(args)


def test_what_follows_from_s2_is_settled_and_told():
    args, settled = validated(S2)
    assert settled == ["--attention-dropout 0", "--no-create-attention-mask-in-dataloader"]
    assert args.attention_dropout == 0
    assert not args.create_attention_mask_in_dataloader
    assert args.softmax_type == "vanilla"


def test_what_the_user_settled_already_is_not_told():
    _, settled = validated(f"{S2} --attention-dropout 0 --no-create-attention-mask-in-dataloader")
    assert settled == []


@pytest.mark.parametrize("words", ["--s2-learnable-sink", "--s2-learnable-sink --softmax-type learnable"])
def test_the_learnable_sink_is_megatrons(words):
    assert validated(f"{S2} {words}")[0].softmax_type == "learnable"


# What validation refuses.


@pytest.mark.parametrize("name", sorted({*CHOSEN, *OTHER_FLAGS, *PATTERN_FILE} - {"attention", *IN_A_FILE}))
def test_a_flag_without_s2_attention_is_refused(name):
    values = {"dense_layers": "1", "backend": "torch", "cp_schedule": "auto"}
    values |= dict.fromkeys(("learnable_sink", "autotune"), "")
    flag = "--s2-" + name.replace("_", "-")
    assert refusal(f"{MODEL} {flag} {values.get(name, '0')}") == f"{flag}: needs --s2-attention"


BYPASSING_VALUES = {
    "--heterogeneous-layers-config-encoded-json": "{}",
    "--experimental-attention-variant": "gated_delta_net",
    "--heterogeneous-layers-config-path": "layers.json",
    "--window-size": "16,0",
    "--hierarchical-context-parallel-sizes": "2 2",
}


@pytest.mark.parametrize("name", _BYPASSES)
def test_what_would_bypass_s2_is_refused_with_the_reason(name):
    flag = flag_name(name)
    words = f"{S2} {flag} {BYPASSING_VALUES.get(flag, '')}"
    assert refusal(words) == f"{flag}: must not be set with --s2-attention: {_BYPASSES[name]}"


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "--s2-block-size 48": "--s2-block-size 48: must be a power of two >= 16",
        "--s2-local-blocks 0": "--s2-local-blocks 0: must be >= 1",
        "--s2-vert-stride -1": "--s2-vert-stride -1: must be >= 0 (0 is window-only)",
        "--s2-pattern-file /no/file": "--s2-pattern-file /no/file: there is no such file",
        "--s2-pattern-file /no/file --s2-sink-blocks 1": "--s2-sink-blocks: must not be set with "
        "--s2-pattern-file, which contains the whole pattern",
        "--s2-vert-stride 2 4 8": "--s2-vert-stride (2, 4, 8): must be one or one per KV head (2)",
        "--s2-sink-blocks -1": "--s2-sink-blocks -1: must be >= 0",
        "--s2-phases 3": "--s2-phases (3,): must be one per KV head (2)",
        "--s2-phases 0 -1": "--s2-phases (0, -1): must be >= 0",
        "--s2-num-dense-heads 3": "--s2-num-dense-heads 3: must be between 0 and 2",
        "--s2-dense-layers 1,9": "--s2-dense-layers 9: must be between 1 and the 8 layers",
        "--s2-dense-layer-freq -1": "--s2-dense-layer-freq -1: must be >= 0",
        "--s2-block-size 256": "--seq-length 128: must be at least one block (--s2-block-size 256)",
        "--attention-dropout 0.1": "--attention-dropout 0.1: must be 0 with --s2-attention: S2 attention "
        "has no dropout inside the softmax",
        "--attention-dropout=0.2": "--attention-dropout 0.2: must be 0 with --s2-attention: S2 attention "
        "has no dropout inside the softmax",
        "--context-parallel-size 3": "--seq-length 128: must be a multiple of 2 * --context-parallel-size "
        "= 6",
        "--context-parallel-size 8 --s2-cp-schedule a2a": "--s2-cp-schedule a2a: must be auto or gather "
        "where --context-parallel-size 8 is larger than --num-attention-heads 4 over "
        "--tensor-model-parallel-size 1",
        "--s2-anneal-steps 9 --cuda-graph-impl local": "--cuda-graph-impl local: must not be set with "
        "--s2-anneal-steps: a CUDA graph keeps the attention that it captured",
        "--dataloader-inter-document-masking --cuda-graph-impl local": "--cuda-graph-impl local: must not be "
        "set with --dataloader-inter-document-masking: a CUDA graph keeps the documents that it captured",
        "--s2-anneal-steps 9 --enable-cuda-graph": "--enable-cuda-graph: must not be set with "
        "--s2-anneal-steps: a CUDA graph keeps the attention that it captured",
        "--context-parallel-size 2 --s2-autotune": "--s2-autotune: must not be set with "
        "--context-parallel-size 2, which does not tune",
        "--context-parallel-size 2 --s2-backend reference": "--s2-backend reference: must be auto, torch or "
        "triton with --context-parallel-size 2",
        "--s2-inter-gigabytes-per-s 0": "--s2-inter-gigabytes-per-s 0.0: must be positive",
        "--transformer-impl inference_optimized": "--transformer-impl inference_optimized: must be local or "
        "transformer_engine with --s2-attention: it bypasses core attention",
        "--attention-backend local": "--attention-backend local: must not be set with --s2-attention: it "
        "replaces S2 by dense attention",
        "--position-embedding-type relative": "--position-embedding-type relative: must be another with "
        "--s2-attention: S2 attention does not take an attention bias",
        "--s2-learnable-sink --softmax-type off-by-one": "--softmax-type off-by-one: must not be set with "
        "--s2-learnable-sink",
    }.items(),
)  # fmt: skip
def test_bad_input_is_refused_by_flag_and_value(words, message):
    assert refusal(f"{S2} {words}") == message


def test_a_model_without_layers_or_heads_is_refused():
    assert refusal("--s2-attention --num-attention-heads 4") == "--num-layers: must be given"
    assert refusal("--s2-attention --num-layers 2") == "--num-attention-heads: must be given"


def test_use_checkpoint_args_takes_the_attention_and_nothing_of_the_cluster():
    saved, _ = validated(f"{S2} --s2-vert-stride 4 --s2-sink-blocks 1 --s2-learnable-sink --s2-backend torch "
                         "--s2-cp-schedule a2a --s2-gpus-per-node 4 --s2-autotune")  # fmt: skip
    args = parse(f"{MODEL} --s2-sink-blocks 2".split())
    load_s2_args(args, saved)
    assert args.s2_attention and args.s2_vert_stride == 4 and args.softmax_type == "learnable"
    assert args.s2_sink_blocks == 2
    for name in ("backend", "cp_schedule", "gpus_per_node", "autotune"):
        assert getattr(args, f"s2_{name}") is None


# Pattern files.

LAYER = {"local_blocks": 4, "sink_blocks": 1, "strides": [0, 4], "phases": [0, 3]}
PER_LAYER = S2Settings(8, 2, 16, layers=({"dense": True}, *[LAYER] * 6, LAYER | {"strides": [0, 0]}))


@pytest.fixture
def by_file(tmp_path) -> str:
    write_pattern_file(tmp_path / "pattern.json", PER_LAYER)
    return f"{S2} --s2-pattern-file {tmp_path / 'pattern.json'}"


def test_a_pattern_file_is_read_once_and_reaches_layers_and_checkpoint(by_file, tmp_path):
    args, _ = validated(by_file)
    (tmp_path / "pattern.json").unlink()
    assert settings_from_args(args) == settings_from_args(args) == PER_LAYER
    assert args.s2_block_size == 16 and args.s2_vert_stride == S2Settings.vert_stride
    config = S2TransformerConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        **{f"s2_{name}": getattr(args, f"s2_{name}") for name in CHOSEN},
    )
    assert s2_settings(config) == PER_LAYER


def test_patterns_of_query_heads_by_flags_and_by_file(tmp_path):
    flags = f"{S2} --s2-pattern-heads 4 --s2-vert-stride 4 --s2-phases 0 1 2 3"
    args, _ = validated(flags)
    settings = settings_from_args(args)
    assert settings.pattern(1).head_phases == (0, 1, 2, 3)
    write_pattern_file(tmp_path / "pattern.json", settings)
    by_file, _ = validated(f"{S2} --s2-pattern-file {tmp_path / 'pattern.json'}")
    assert by_file.s2_pattern_heads == 4
    assert differences_from_checkpoint(args, by_file) == differences_from_checkpoint(by_file, args) == []
    for heads, rule in (
        (6, "the 4 query heads of the model, or left out for a pattern per KV head"),
        (3, "the number of query heads, a multiple of the 2 KV heads"),
    ):
        refused = refusal(f"{S2} --s2-pattern-heads {heads}")
        assert refused == f"--s2-pattern-heads {heads}: must be {rule}"


def test_a_pattern_file_for_another_model_is_refused(by_file, tmp_path):
    message = (
        f"--s2-pattern-file {tmp_path / 'pattern.json'}: num_layers 8: is for another model; this one has 4"
    )
    assert refusal(by_file.replace("--num-layers 8", "--num-layers 4")) == message


def test_use_checkpoint_args_takes_the_patterns_of_the_layers(by_file, tmp_path):
    saved, _ = validated(by_file)
    args = parse(MODEL.split())
    load_s2_args(args, saved)
    validate_s2_args(args)
    assert settings_from_args(args) == PER_LAYER
    args = parse(f"{MODEL} --s2-vert-stride 8".split())
    load_s2_args(args, saved)
    with pytest.raises(
        ValueError, match=r"^--s2-vert-stride 8: must not be set with a pattern for each layer$"
    ):
        validate_s2_args(args)
    other, _ = validated(f"{S2} --s2-vert-stride 8")
    args = parse(by_file.split())
    load_s2_args(args, other)
    validate_s2_args(args)
    assert settings_from_args(args) == PER_LAYER, "a given file counts more than the checkpoint"


def test_patterns_are_compared_layer_by_layer(by_file, tmp_path):
    args, _ = validated(by_file)
    assert differences_from_checkpoint(args, args) == []
    write_pattern_file(
        tmp_path / "pattern.json", S2Settings(8, 2, 16, layers=[*[LAYER] * 7, LAYER | {"strides": [0, 0]}])
    )
    other, _ = validated(by_file)
    assert differences_from_checkpoint(other, args) == [
        "--s2-pattern-file: layer 1: window 4, sinks 1, strides 0 4, phases 0 3: the checkpoint was trained "
        "with dense attention"
    ]
    flags = f"{S2} --s2-block-size 16 --s2-vert-stride 4 2 --s2-dense-layers 2"
    by_flags, _ = validated(flags)
    write_pattern_file(tmp_path / "pattern.json", settings_from_args(by_flags))
    same, _ = validated(by_file)
    assert differences_from_checkpoint(same, by_flags) == differences_from_checkpoint(by_flags, same) == []
    assert differences_from_checkpoint(args, by_flags)[0].startswith(
        "--s2-pattern-file: layer 1: dense attention:"
    )
