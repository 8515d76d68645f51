"""A run that would break or hang later is refused first, by the flag that names the cause."""

import json
import math
import re
from argparse import Namespace

import pytest
from parsed_arguments import arguments

from megatron_s2.training.checks import (
    _AT_LEAST,
    _BELOW_ONE,
    _POSITIVE,
    check_model,
    check_numbers,
    check_parallel_sizes,
    check_paths,
    check_rates,
    check_wandb,
)


@pytest.fixture
def prefix(tmp_path) -> str:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").touch()
    return str(tmp_path / "text")


def test_what_exists_is_accepted(prefix, tmp_path):
    lines = tmp_path / "blend.txt"
    lines.write_text(f"0.3 {prefix} 0.7 {prefix}\n")
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [prefix], "valid": f"1 {prefix}", "test": None}))
    for given in (
        {},
        {"data_path": [prefix]},
        {"data_path": ["30", prefix, "70", prefix]},
        {"data_path": [prefix, prefix]},
        {"train_data_path": [prefix], "valid_data_path": [prefix]},
        {"data_args_path": str(lines)},
        {"per_split_data_args_path": str(splits)},
        {"load": str(tmp_path)},
        {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)},
    ):
        check_paths(arguments(**given))


def test_the_first_launch_of_a_job_that_resumes_from_its_own_saves_is_accepted(tmp_path):
    check_paths(arguments(load=str(tmp_path / "run"), save=f"{tmp_path}/other/../run/"))


def test_a_name_on_the_hub_and_remote_data_are_not_looked_for_on_disk():
    check_paths(arguments(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="Qwen/Qwen3-0.6B"))
    check_paths(arguments(data_path=["s3://bucket/text"]))


@pytest.mark.parametrize(
    "given",
    [
        {"data_path": ["/nowhere/text"]},
        {"data_path": ["0.5", "/nowhere/text", "0.5", "/nowhere/more"]},
        {"train_data_path": ["/nowhere/text"]},
        {"valid_data_path": ["/nowhere/text"]},
        {"test_data_path": ["/nowhere/text"]},
        {"data_args_path": "/nowhere/blend.txt"},
        {"per_split_data_args_path": "/nowhere/splits.json"},
        {"load": "/nowhere/run"},
        {"load": "/nowhere/run", "save": "/nowhere/else"},
        {"pretrained_checkpoint": "/nowhere/run"},
        {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/nowhere/tokenizer"},
        {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "tokenizer.model"},
        {"vocab_file": "/nowhere/vocab.json"},
        {"merge_file": "/nowhere/merges.txt"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_does_not_exist_is_refused_by_its_flag(given):
    flag = "--" + next(name for name in given if name != "tokenizer_type").replace("_", "-")
    with pytest.raises(ValueError, match=f"^{flag} .*: there is no "):
        check_paths(arguments(**given))


@pytest.mark.parametrize(
    ("tokenizer", "flag"),
    [
        (None, "--vocab-file"),
        ("GPT2BPETokenizer", "--vocab-file"),
        ("HuggingFaceTokenizer", "--tokenizer-model"),
    ],
)
def test_a_tokenizer_needs_its_files_named(tokenizer, flag):
    with pytest.raises(ValueError, match=f"^{flag}: must be given"):
        check_paths(arguments(tokenizer_type=tokenizer))


def test_a_checkpoint_may_name_the_tokenizer():
    check_paths(arguments(tokenizer_type=None, use_checkpoint_args=True))


def test_both_files_of_a_dataset_are_needed(prefix, tmp_path):
    (tmp_path / "text.idx").unlink()
    with pytest.raises(ValueError, match=r"text\.idx"):
        check_paths(arguments(data_path=[prefix]))


def test_a_blend_file_is_read_to_its_last_entry(prefix, tmp_path):
    lines = tmp_path / "blend.txt"
    lines.write_text(f"0.3 {prefix} 0.7 {prefix}-missing")
    with pytest.raises(ValueError, match=r"--data-args-path .*missing"):
        check_paths(arguments(data_args_path=str(lines)))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [prefix], "valid": [prefix]}))
    with pytest.raises(ValueError, match='must have the keys "train", "valid" and "test"'):
        check_paths(arguments(per_split_data_args_path=str(splits)))


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-inf", "0.0"])
@pytest.mark.parametrize("flag", ["--data-path", "--valid-data-path", "--data-args-path", "per split"])
def test_the_weights_of_a_blend_are_positive(prefix, tmp_path, weight, flag):
    words = ["1", prefix, weight, f"{prefix}"]
    lines, splits = tmp_path / "blend.txt", tmp_path / "splits.json"
    lines.write_text(" ".join(words))
    splits.write_text(json.dumps({"train": [1, prefix], "valid": words, "test": None}))
    given, where = {
        "--data-path": ({"data_path": words}, "--data-path"),
        "--valid-data-path": ({"valid_data_path": words}, "--valid-data-path"),
        "--data-args-path": ({"data_args_path": str(lines)}, f"--data-args-path {lines}"),
        "per split": (
            {"per_split_data_args_path": str(splits)},
            f'--per-split-data-args-path {splits}: "valid"',
        ),
    }[flag]
    with pytest.raises(ValueError) as refused:
        check_paths(arguments(**given))
    assert str(refused.value) == (
        f"{where}: {prefix} has the weight {weight}; must be a positive number; leave out data that are not "
        "to be used"
    )


def test_the_weights_of_a_blend_have_shares(prefix):
    for weights in (("1e308", "1e308"), ("1e308", "1e-308")):
        with pytest.raises(ValueError, match=r"^--data-path: the weights must be of similar size"):
            check_paths(arguments(data_path=[weights[0], prefix, weights[1], prefix]))


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_blend_is_refused(tmp_path, content):
    (tmp_path / "blend").write_bytes(content)
    message = f"^--data-args-path {tmp_path}/blend: is empty; must be prefixes, or weights and prefixes"
    with pytest.raises(ValueError, match=message):
        check_paths(arguments(data_args_path=str(tmp_path / "blend")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "must be JSON; maximum recursion depth"),
        (b"{", "must be JSON; Expecting property name"),
        (b"\xff", "must be UTF-8: "),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark; save it without"),
        (b"[1]", r"must be a JSON object, is \[1\]"),
        (b'{"train": "", "valid": null, "test": null}', '"train": is empty; must be prefixes, or weights'),
        (b'{"train": null, "valid": [], "test": null}', '"valid": is empty; must be prefixes, or weights'),
        (b'{"train": null, "valid": null, "test": 3}', '"test" must be a list or a string of prefixes'),
        (
            b'{"train": [["a"]], "valid": null, "test": null}',
            '"train" must be a list or a string of prefixes',
        ),
    ],
    ids=["deep", "broken", "not-utf8", "bom", "list", "empty", "empty-list", "number", "nested"],
)
def test_a_file_of_splits_is_looked_into(tmp_path, content, message):
    (tmp_path / "splits").write_bytes(content)
    with pytest.raises(ValueError, match=f"^--per-split-data-args-path {tmp_path}/splits: {message}"):
        check_paths(arguments(per_split_data_args_path=str(tmp_path / "splits")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "must be JSON; "),
        ("[]", "must be a JSON object"),
        ('{"a": "b"}', "must map each prefix"),
    ],
    ids=["deep", "list", "words"],
)
def test_a_file_of_sequences_is_looked_into(tmp_path, content, message):
    path = tmp_path / "sequences"
    with pytest.raises(ValueError, match=f"^--per-dataset-sequences-path {path}: there is no such file"):
        check_paths(arguments(per_dataset_sequences_path=str(path)))
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^--per-dataset-sequences-path {path}: {message}"):
        check_paths(arguments(per_dataset_sequences_path=str(path)))
    path.write_text('{"a": 3}')
    check_paths(arguments(per_dataset_sequences_path=str(path)))


def test_a_byte_order_mark_in_a_blend_is_refused(prefix, tmp_path):
    (tmp_path / "blend").write_text(f"1 {prefix}", encoding="utf-8-sig")
    with pytest.raises(ValueError, match=r"^--data-args-path .*: begins with a byte order mark"):
        check_paths(arguments(data_args_path=str(tmp_path / "blend")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wandb_exp_name": "e"}, "--wandb-save-dir: must be given with --wandb-project p, or --save"),
        ({"save": "/s"}, "--wandb-exp-name: must be given with --wandb-project p"),
    ],
)
def test_wandb_needs_a_name_and_a_directory(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_wandb(arguments(wandb_project="p", **given))
    check_wandb(arguments(**given))
    check_wandb(arguments(wandb_project="p", wandb_exp_name="e", save="/s"))


def test_wandb_must_be_installed(monkeypatch):
    monkeypatch.setattr("megatron_s2.training.checks.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--wandb-project p: needs wandb: .*megatron-s2\[wandb\]"):
        check_wandb(arguments(wandb_project="p", wandb_exp_name="e", save="/s"))


def test_a_data_flag_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"^--data-path: must be followed by a prefix"):
        check_paths(arguments(data_path=[]))


# The model.


def model(**given):
    known = {"num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2}
    known |= dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1)
    known |= {"context_parallel_size": 1, "world_size": 1, "num_experts": None}
    known |= {"vocab_size": None, "hidden_size": 64, "kv_channels": None, "position_embedding_type": "rope"}
    return Namespace(**{**known, "config_logger_dir": "", **given})


def test_the_query_groups_divide_the_heads():
    check_model(model())
    check_model(model(group_query_attention=False, num_query_groups=3))
    for groups in (0, 3, 8):
        message = f"^--num-query-groups {groups}: must divide --num-attention-heads 4"
        with pytest.raises(ValueError, match=message):
            check_model(model(num_query_groups=groups))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vocab_size": 0}, "--vocab-size 0: must be >= 1"),
        ({"num_experts": 2, "moe_router_topk": 3}, "--moe-router-topk 3: must be at most --num-experts 2"),
        (
            {"tensor_model_parallel_size": 2, "context_parallel_size": 3, "world_size": 4},
            "--tensor-model-parallel-size 2, --context-parallel-size 3: the product must divide the number "
            "of ranks, 4",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_that_megatron_breaks_on_are_refused(given, message):
    with pytest.raises(ValueError) as refusal:
        check_model(model(**given))
        check_parallel_sizes(model(**given))
    assert str(refusal.value) == message


def numbers(**given):
    known = dict.fromkeys([*_AT_LEAST, *_POSITIVE], None) | dict.fromkeys(_BELOW_ONE, 0.1)
    return Namespace(**known | given)


@pytest.mark.parametrize(
    ("names", "wrong", "right", "rule"),
    [
        ([name for name, least in _AT_LEAST.items() if least == 1], (0, -1), (1, 2), ">= 1"),
        ([name for name, least in _AT_LEAST.items() if least == 0], (-1, math.nan, math.inf), (0, 2), ">= 0"),
        (_POSITIVE, (0, -1.0, math.nan, math.inf), (1e-9, 2), "> 0"),
        (_BELOW_ONE, (1, 2, -0.1, math.nan), (0, 0.999), ">= 0 and < 1"),
    ],
    ids=["positive integers", "not negative", "positive", "below one"],
)
def test_numbers_that_megatron_breaks_on_are_refused(names, wrong, right, rule):
    for name in names:
        for value in right:
            check_numbers(numbers(**{name: value}))
        for value in wrong:
            message = f"--{name.replace('_', '-')} {value}: must be {rule}"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                check_numbers(numbers(**{name: value}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction 1.0: must be >= 0 and < 1"),
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters 10: must be smaller than --train-iters 10"),
        (
            {"lr_warmup_iters": 5, "lr_decay_iters": 5},
            "--lr-warmup-iters 5: must be smaller than --lr-decay-iters 5",
        ),
        (
            {"train_iters": None, "train_samples": 8, "lr_warmup_samples": 9},
            "--lr-warmup-samples 9: must be smaller than --train-samples 8",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_warmup_ends_before_the_schedule_does(given, message):
    none = dict.fromkeys(("train_samples", "lr_decay_iters", "lr_decay_samples", "lr_warmup_fraction"))
    none |= dict.fromkeys(("lr", "lr_decay_style", "decoupled_lr", "decoupled_min_lr", "min_lr"))
    warmup = {"lr_warmup_iters": 0, "lr_warmup_samples": 0, "lr_warmup_init": 0.0}
    fine = Namespace(**none | warmup | {"train_iters": 10, "lr": 1e-3, "min_lr": 0.0})
    check_rates(fine)
    with pytest.raises(ValueError) as refusal:
        check_rates(Namespace(**vars(fine) | given))
    assert str(refusal.value) == message


def test_the_config_logger_is_refused():
    with pytest.raises(
        ValueError, match=r"^--config-logger-dir /tmp/c: Megatron cannot write its configuration"
    ):
        check_model(model(config_logger_dir="/tmp/c"))
