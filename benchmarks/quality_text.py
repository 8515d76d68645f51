"""Text of the quality benchmark: Python sources of installed packages, a tokenizer, two datasets.

The datasets have no file in common. The tokenizer is a given one, or trained on the training files.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_s2.data.documents import Corpus
from megatron_s2.data.preprocess import preprocess_data
from megatron_s2.data.tokenizer import train_tokenizer

# Packages of the tested set with much source in long files. Not transformers: its models copy each other, so
# that whole files held out would be known by heart.
PACKAGES = (
    *("fonttools", "hypothesis", "matplotlib", "megatron-core", "mpmath", "networkx", "numpy", "sympy"),
    "torch",
)
TOY_PACKAGES = ("filelock", "packaging")
HELD_OUT = 32  # of the files in their order, every 32nd is held out
TOY_HELD_OUT = 4
_TOKENIZER_BYTES = 1 << 24
_RECORD = "text.json"

# Prints {package: {"version": …, "files": [path on disk, …]}}.
_LIST_SOURCES = """
import json, sys
from importlib.metadata import PackageNotFoundError, distribution
found = {}
for name in sys.argv[1:]:
    try:
        package = distribution(name)
    except PackageNotFoundError:
        sys.exit(f"{name} is not installed")
    files = [f for f in package.files or () if f.suffix == ".py" and ".." not in f.parts]
    found[name] = {"version": package.version, "files": sorted(str(f.locate()) for f in files)}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Text:
    """Tokenizer and datasets on disk.

    Args:
        directory: where the datasets are, by prefix.
        tokenizer: directory of the tokenizer.
        packages: versions of the packages.
        train_tokens, held_out_tokens: number of tokens of the datasets.
        hash: of all tokens: rows with the same one were measured on the same text.
    """

    directory: Path
    tokenizer: Path
    packages: dict[str, str]
    train_tokens: int
    held_out_tokens: int
    hash: str

    @property
    def train(self) -> Path:
        return self.directory / "train_text_document"

    @property
    def held_out(self) -> Path:
        return self.directory / "held-out_text_document"

    def row(self) -> dict:
        """Returns what a row says about the text."""
        fields = asdict(self)
        del fields["directory"], fields["tokenizer"]
        return fields


def make_text(
    work: Path, python: str, packages: tuple[str, ...], held_out: int, tokenizer: int | Path, workers: int
) -> Text:
    """Returns the text, which is made if `work` does not have it.

    Args:
        python: interpreter that has the packages.
        held_out: n holds every n-th file out.
        tokenizer: directory of a tokenizer, or tokens of one that is trained on the training files.
        workers: number of processes that tokenize.

    Raises:
        ValueError: a package is not installed, or its files are not on disk.
    """
    sources = _sources(python, packages)
    versions = {name: source["version"] for name, source in sources.items()}
    key = hashlib.sha256(json.dumps([versions, held_out, _name_of(tokenizer)]).encode()).hexdigest()[:8]
    directory = work / f"text-{key}"
    if not (directory / _RECORD).exists():
        _make(directory, sources, held_out, tokenizer, workers)
    found = directory / "tokenizer" if isinstance(tokenizer, int) else tokenizer
    return Text(directory, found, versions, **json.loads((directory / _RECORD).read_text()))


def _name_of(tokenizer: int | Path) -> int | str:
    if isinstance(tokenizer, int):
        return tokenizer
    return hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()


def _sources(python: str, packages: tuple[str, ...]) -> dict:
    done = subprocess.run([python, "-c", _LIST_SOURCES, *packages], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--python {python}: {done.stderr.strip().splitlines()[-1]}; install it there")
    return json.loads(done.stdout)


def _make(directory: Path, sources: dict, held_out: int, tokenizer: int | Path, workers: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    paths = [Path(path) for _, source in sorted(sources.items()) for path in source["files"]]
    parts = {"train": [], "held-out": []}
    for n, text in enumerate(_distinct_texts(paths)):
        parts["train" if n % held_out else "held-out"].append(text)
    corpora = {}
    for name, texts in parts.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        corpora[name] = Corpus(str(path))
    if isinstance(tokenizer, int):
        trained = directory / "tokenizer"
        train_tokenizer(corpora["train"], tokenizer, str(trained), max_bytes=_TOKENIZER_BYTES, overwrite=True)
        tokenizer = trained
    tokens, digest = {}, hashlib.sha256()
    for name, corpus in corpora.items():
        done = preprocess_data(
            corpus,
            str(directory / name),
            "HuggingFaceTokenizer",
            str(tokenizer),
            append_eod=True,
            workers=workers,
            overwrite=True,
        )
        tokens[name] = done.tokens
        digest.update(Path(f"{done.prefix}.bin").read_bytes())
        os.remove(corpus.path)
    record = {
        "train_tokens": tokens["train"],
        "held_out_tokens": tokens["held-out"],
        "hash": digest.hexdigest()[:16],
    }
    (directory / _RECORD).write_text(json.dumps(record) + "\n")  # last: a directory with it is complete


def _distinct_texts(paths: list[Path]):
    """Yields the text of each file; of files with the same contents only the first."""
    seen = set()
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text and not text.isspace() and text not in seen:
            seen.add(text)
            yield text
