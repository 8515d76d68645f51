"""Refuses a run whose files are not there, before anything is built from them.

Megatron finds a missing data file only after the model has been built, and takes a missing `--load` directory
for a fresh start. These checks read the parsed arguments and the file system, nothing else.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

# Megatron's names of tokenizers that `--tokenizer-model` describes, as a file or (Hugging Face) also by name.
_TOKENIZERS_FROM_FILE = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
)
_TOKENIZERS_FROM_MODEL = (*_TOKENIZERS_FROM_FILE, "HuggingFaceTokenizer")
_REMOTE_SCHEMES = ("s3://", "msc://")


def check_paths(args: Namespace) -> None:
    """Checks every path that a run will read.

    Raises:
        ValueError: naming the flag and the path that does not exist.
    """
    _check_data(args)
    _check_load(args)
    _check_tokenizer(args)


def _check_data(args: Namespace) -> None:
    for flag, prefixes in _data_prefixes(args):
        for prefix in prefixes:
            if prefix.startswith(_REMOTE_SCHEMES):
                continue
            for suffix in (".bin", ".idx"):
                if not os.path.isfile(prefix + suffix):
                    raise ValueError(
                        f"{flag} {prefix}: there is no file {prefix}{suffix}; "
                        "give the prefix that scripts/preprocess_data.py wrote"
                    )


def _data_prefixes(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    """Each flag that names data, with the prefixes it names."""
    for flag in ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"):
        words = getattr(args, flag[2:].replace("-", "_"))
        if words:
            yield flag, _without_weights(words)
    if args.data_args_path:
        _check_file("--data-args-path", args.data_args_path)
        yield "--data-args-path", _without_weights(Path(args.data_args_path).read_text().split())
    if args.per_split_data_args_path:
        flag, path = "--per-split-data-args-path", args.per_split_data_args_path
        _check_file(flag, path)
        try:
            splits = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{flag} {path}: must be JSON; {error}") from None
        for split in ("train", "valid", "test"):
            if split not in splits:
                raise ValueError(f'{flag} {path}: must have the keys "train", "valid" and "test"')
            words = splits[split] or []
            yield flag, _without_weights(words.split() if isinstance(words, str) else words)


def _without_weights(words: Iterable[str]) -> list[str]:
    """The prefixes of a blend, given as Megatron reads it: prefixes, or weight, prefix, weight, prefix, …"""
    words = [str(word) for word in words]
    if len(words) % 2 == 0 and all(_is_number(word) for word in words[::2]):
        return words[1::2]
    return words


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _check_load(args: Namespace) -> None:
    """The first launch of a job that saves and loads in one place finds nothing there; that is no mistake."""
    for flag in ("--load", "--pretrained-checkpoint"):
        path = getattr(args, flag[2:].replace("-", "_"), None)
        if not path or path.startswith(_REMOTE_SCHEMES) or os.path.isdir(path):
            continue
        is_first_launch = (
            flag == "--load" and args.save and os.path.abspath(args.save) == os.path.abspath(path)
        )
        if not is_first_launch:
            raise ValueError(
                f"{flag} {path}: there is no such directory; "
                "to start afresh, remove the flag or give the --save directory"
            )


def _check_tokenizer(args: Namespace) -> None:
    for flag in ("--vocab-file", "--merge-file"):
        if path := getattr(args, flag[2:].replace("-", "_")):
            _check_file(flag, path)
    model = args.tokenizer_model
    if args.use_checkpoint_args and not args.tokenizer_type:
        return  # the checkpoint names the tokenizer
    if (args.tokenizer_type or "GPT2BPETokenizer") == "GPT2BPETokenizer" and not args.vocab_file:
        raise ValueError(
            "--vocab-file: must be given, with --merge-file, for GPT2BPETokenizer (Megatron's default); "
            "or choose another --tokenizer-type"
        )
    if args.tokenizer_type in _TOKENIZERS_FROM_MODEL and not model:
        raise ValueError(f"--tokenizer-model: must be given for --tokenizer-type {args.tokenizer_type}")
    if not model:
        return
    # A Hugging Face name such as "org/model" is looked up on the hub, so only what looks like a path is one.
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if (args.tokenizer_type in _TOKENIZERS_FROM_FILE or looks_like_path) and not os.path.exists(model):
        raise ValueError(f"--tokenizer-model {model}: there is no such file or directory")


def _check_file(flag: str, path: str) -> None:
    if not os.path.isfile(path):
        raise ValueError(f"{flag} {path}: there is no such file")
