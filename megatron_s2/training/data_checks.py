"""Checks of the data and the tokenizer that a command line names.

Megatron opens data files only after it has built the model, and loops forever on a split without documents.
These checks read only the parsed arguments, the tokenizer and the file system.
"""

import json
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_s2.data.token_ids import REMOTE_SCHEMES, Vocabulary, check_token_ids, read_index
from megatron_s2.data.tokenizer import GROW_MODEL, number_of_ids
from megatron_s2.errors import InputError

# Values of `--tokenizer-type` that need `--tokenizer-model`: a file or, for Hugging Face, a name on the hub.
_TOKENIZERS_FROM_FILE = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
)
_TOKENIZERS_FROM_MODEL = (*_TOKENIZERS_FROM_FILE, "HuggingFaceTokenizer")
# Tokenizers for which --vocab-size says how many tokens they have themselves.
_TOKENIZERS_WITHOUT_TOKENS = ("NullTokenizer", "NullMultimodalTokenizer")
_DEFAULT_SPLIT = "969, 30, 1"  # Megatron's, for --data-path
_SPLITS = ("training", "validation", "test")


def check_data(args: Namespace) -> None:
    """Checks that every dataset of the run has both its files.

    Raises:
        ValueError: a file does not exist, or a blend is malformed; the message names the flag.
    """
    for flag, prefixes in _data_prefixes(args):
        for prefix in prefixes:
            for suffix in (".bin", ".idx"):
                if not os.path.isfile(prefix + suffix):
                    raise ValueError(
                        f"{flag} {prefix}: there is no file {prefix}{suffix}; "
                        "give the prefix that scripts/preprocess_data.py wrote"
                    )


def check_sequences_per_dataset(args: Namespace) -> None:
    """Checks the file of `--per-dataset-sequences-path`.

    Raises:
        ValueError: it is not a JSON object of integers; the message names the flag.
    """
    flag, path = "--per-dataset-sequences-path", args.per_dataset_sequences_path
    if path is not None:
        numbers = _json_object(flag, path)
        if not all(isinstance(number, int) for number in numbers.values()):
            raise ValueError(f"{flag} {path}: must map each prefix to its number of sequences")


def check_tokenizer(args: Namespace) -> None:
    """Checks that the tokenizer has the files that its type needs.

    Raises:
        ValueError: one is not given, or does not exist; the message names the flag.
    """
    for flag in ("--vocab-file", "--merge-file"):
        if path := getattr(args, flag[2:].replace("-", "_")):
            _check_file(flag, path)
    model = args.tokenizer_model
    if args.use_checkpoint_args and not args.tokenizer_type:
        return  # the tokenizer is an argument in the checkpoint
    if (args.tokenizer_type or "GPT2BPETokenizer") == "GPT2BPETokenizer" and not args.vocab_file:
        raise ValueError(
            "--vocab-file: must be given, with --merge-file, for GPT2BPETokenizer (Megatron's default); "
            "or choose another --tokenizer-type"
        )
    if args.tokenizer_type in _TOKENIZERS_FROM_MODEL and not model:
        raise ValueError(f"--tokenizer-model: must be given for --tokenizer-type {args.tokenizer_type}")
    if not model:
        return
    # "org/model" may be a name on the Hugging Face hub; any other value with a slash is a path.
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if (args.tokenizer_type in _TOKENIZERS_FROM_FILE or looks_like_path) and not os.path.exists(model):
        raise ValueError(f"--tokenizer-model {model}: there is no such file or directory")


def check_splits(args: Namespace) -> None:
    """Checks that every split with a share of the documents has at least one, with Megatron's rounding.

    Megatron builds such a split even if `--eval-iters 0` leaves it unused, and loops forever if it is empty.
    Call `check_paths` first, because the files must exist.

    Raises:
        ValueError: a split is empty; the message names its flag, the prefix and what to do.
    """
    for flag, prefixes in _data_prefixes(args):
        if flag == "--data-args-path" and not args.split:
            raise ValueError(f"--split: must be given with {flag}")
        split = args.split or _DEFAULT_SPLIT
        shares = _shares(split) if flag in ("--data-path", "--data-args-path") else [(0.0, 1.0)]
        for prefix in prefixes:
            try:
                documents = read_index(prefix).sequences
            except InputError as error:
                raise ValueError(f"{flag} {error}") from None
            if documents == 0:
                raise ValueError(f"{flag} {prefix}: has no documents")
            for name, share in zip(_SPLITS, shares):
                if share and _boundary(share[0], documents) == _boundary(share[1], documents):
                    raise ValueError(
                        f"--split {split}: leaves the {name} split of {prefix} without documents (of its "
                        f"{documents}); give it a larger share or none: --split 100,0,0 --eval-iters 0 "
                        "trains on all"
                    )


def vocabulary_of(args: Namespace, tokenizer) -> Vocabulary:
    """Returns the token ids that a model may be trained on: those of its tokens, not of the padding.

    Args:
        args: validated arguments of Megatron.
        tokenizer: the tokenizer that Megatron built from them.
    """
    data = Vocabulary.advice
    tokenizer_ids = _tokenizer_ids(args, tokenizer)
    known = [Vocabulary(tokenizer_ids, tokenizer_flag(args))]
    if args.vocab_size and args.tokenizer_type not in _TOKENIZERS_WITHOUT_TOKENS:
        is_new = not args.load and not args.pretrained_checkpoint
        more = "for all tokens of the tokenizer, remove --vocab-size" if is_new else GROW_MODEL
        known.append(Vocabulary(args.vocab_size, f"--vocab-size {args.vocab_size}", f"{data}; {more}"))
    if args.padded_vocab_size:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        enough = -(-tokenizer_ids // multiple) * multiple
        more = f"; for a new model, --padded-vocab-size {enough} has a row for each id of the tokenizer"
        known.append(
            Vocabulary(
                args.padded_vocab_size,
                f"--padded-vocab-size {args.padded_vocab_size}",
                data + (more if enough > args.padded_vocab_size else ""),
            )
        )
    return min(known, key=lambda vocabulary: vocabulary.size)


def check_vocabulary(args: Namespace, tokenizer) -> list[str]:
    """Checks that every token of the data is one of the model's.

    On one tensor-parallel rank Megatron fails at the first other token; on more it trains with an embedding
    of zeros for it, and says nothing.

    Returns:
        Lines for the user: data that could only be looked at in part, a tokenizer with more tokens than the
        model.

    Raises:
        ValueError: naming the flag, the prefix, the token id and the size of the vocabulary.
    """
    vocabulary = vocabulary_of(args, tokenizer)
    data = [(flag, prefix) for flag, prefixes in _data_prefixes(args) for prefix in prefixes]
    lines = []
    has_tokens = args.tokenizer_type not in _TOKENIZERS_WITHOUT_TOKENS
    if has_tokens and (tokenizer_ids := _tokenizer_ids(args, tokenizer)) > vocabulary.size:
        lines.append(
            f"{tokenizer_flag(args)} has token ids up to {tokenizer_ids - 1}, the model has "
            f"{vocabulary.size} tokens ({vocabulary.source}); data with ids beyond are refused; "
            f"{vocabulary.advice}"
        )
    looked_at = check_token_ids(data, vocabulary)
    return lines if looked_at is None else [*lines, looked_at]


def _tokenizer_ids(args: Namespace, tokenizer) -> int:
    """One more than the largest id, of a token or of the end of a document.

    Megatron documents --vocab-size as what comes before the end-of-document token, and its NullTokenizer once
    numbered it so: data that end with that id are right.
    """
    if args.tokenizer_type in _TOKENIZERS_WITHOUT_TOKENS:
        return max(tokenizer.vocab_size, 1 + (args.vocab_size or 0))
    return max(number_of_ids(tokenizer), 1 + (-1 if tokenizer.eod is None else tokenizer.eod))


def tokenizer_flag(args: Namespace) -> str:
    """Returns the flag and its value that name the tokenizer."""
    if args.tokenizer_model:
        return f"--tokenizer-model {args.tokenizer_model}"
    return f"--tokenizer-type {args.tokenizer_type}"


def _boundary(share: float, documents: int) -> int:
    return round(share * float(documents))


def _shares(split: str) -> list[tuple[float, float] | None]:
    """Returns start and stop of each split as fractions of all documents; None for one without a share."""
    from megatron.core.datasets import blended_megatron_dataset_config as config

    try:
        shares = [float(word) for word in split.split(",")]
    except ValueError:
        shares = []
    # Megatron finds numbers by their digits: it would take 1e2 for 1 and 2, and nan for nothing.
    is_plain = set(split) <= set("0123456789., ")
    if not is_plain or not 1 <= len(shares) <= len(_SPLITS) or sum(shares) == 0:
        raise ValueError(
            f"--split {split}: must be the shares of the training, validation and test split, such as 99,1,0"
        )
    return config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(split))


def _data_prefixes(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yields each flag that was given data, and the prefixes of its files on local disks."""
    for flag in ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"):
        words = getattr(args, flag[2:].replace("-", "_"))
        if words is None:
            continue
        if not words:
            raise ValueError(f"{flag}: must be followed by a prefix, or weights and prefixes")
        yield flag, _prefixes(flag, words)
    if args.data_args_path:
        flag, path = "--data-args-path", args.data_args_path
        yield flag, _prefixes(f"{flag} {path}", _text(flag, path).split())
    if args.per_split_data_args_path:
        flag, path = "--per-split-data-args-path", args.per_split_data_args_path
        splits = _json_object(flag, path)
        for split in ("train", "valid", "test"):
            if split not in splits:
                raise ValueError(f'{flag} {path}: must have the keys "train", "valid" and "test"')
            words = splits[split]
            if words is None:
                continue
            words = words.split() if isinstance(words, str) else words
            if not isinstance(words, list) or not all(isinstance(word, str | int | float) for word in words):
                raise ValueError(
                    f'{flag} {path}: "{split}" must be a list or a string of prefixes, or of weights and '
                    f"prefixes, or null; is {json.dumps(words)[:80]}"
                )
            yield flag, _prefixes(f'{flag} {path}: "{split}"', words)


def _prefixes(where: str, words: Iterable[object]) -> list[str]:
    """Returns the local prefixes of a blend: a list of prefixes, or of weights and prefixes in turn.

    Raises:
        ValueError: it is empty, or a weight is not positive; the message begins with `where`.
    """
    words = [str(word) for word in words]
    if not words:
        raise ValueError(f"{where}: is empty; must be prefixes, or weights and prefixes")
    if len(words) % 2 or not all(_is_number(word) for word in words[::2]):
        return [word for word in words if not word.startswith(REMOTE_SCHEMES)]
    weights, prefixes = [float(word) for word in words[::2]], words[1::2]
    for weight, prefix in zip(words[::2], prefixes):
        if not 0 < float(weight) < math.inf:
            raise ValueError(
                f"{where}: {prefix} has the weight {weight}; must be a positive number; leave out data that "
                "are not to be used"
            )
    if not 0 < min(weights) / sum(weights) < math.inf:
        raise ValueError(f"{where}: the weights must be of similar size; {min(weights)} is lost in their sum")
    return [prefix for prefix in prefixes if not prefix.startswith(REMOTE_SCHEMES)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _json_object(flag: str, path: str) -> dict:
    try:
        content = json.loads(_text(flag, path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{flag} {path}: must be JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{flag} {path}: must be a JSON object, is {json.dumps(content)[:80]}")
    return content


def _text(flag: str, path: str) -> str:
    """The text of a file that Megatron reads again: it knows no byte order mark and no other encoding."""
    _check_file(flag, path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: must be UTF-8: {error}") from None
    if text.startswith("\ufeff"):
        raise ValueError(f"{flag} {path}: begins with a byte order mark; save it without (UTF-8, no BOM)")
    return text


def _check_file(flag: str, path: str) -> None:
    if not os.path.isfile(path):
        raise ValueError(f"{flag} {path}: there is no such file")
