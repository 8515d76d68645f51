"""Reads prompts from files: a text is one prompt, JSON lines are several."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_JSON_LINES = ".jsonl"
_KEY = "prompt"


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Args:
        source: flag that it comes from and its value, or line, with which an error message about it begins.
    """

    text: str
    source: str


def excerpt(text: str) -> str:
    """Returns a quoted text for an error message, shortened if it is long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def read_prompts(path: Path) -> list[Prompt]:
    """Returns the prompts in a file.

    A `.jsonl` file has one JSON object per line, with a prompt under `prompt`; blank lines are ignored. Any
    other file is one prompt: its whole text, unchanged, with its last line break if it ends with one. A byte
    order mark at its beginning is not text.

    Raises:
        ValueError: the file cannot be read, is not UTF-8 or has no prompt; the message starts with
            `--prompt-file`, the file and, in JSON lines, the number of the line.
    """
    flag = f"--prompt-file {path}"
    if not path.exists() or path.is_dir():
        raise ValueError(f"{flag}: is not a file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{flag}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag}: must be UTF-8: {error}") from None
    if path.suffix != _JSON_LINES:
        if not text.strip():
            raise ValueError(f"{flag}: has no prompt: it must have text")
        return [Prompt(text, flag)]
    lines = enumerate(text.split("\n"), 1)
    prompts = [Prompt(_json_prompt(line, f"{flag}:{n}"), f"{flag}:{n}") for n, line in lines if line.strip()]
    if not prompts:
        raise ValueError(f'{flag}: has no prompt: it must have lines such as {{"prompt": "Once upon"}}')
    return prompts


def _json_prompt(line: str, source: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: must be a line of JSON: {error}") from None
    text = record.get(_KEY) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{source}: must be an object with a text, such as {{"prompt": "Once upon"}}')
    return text
