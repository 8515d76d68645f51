"""Pattern files: the attention pattern of every layer of one model, as JSON that can be edited by hand.

    {"format": "megatron-s2-pattern", "version": 1, "num_layers": 3, "num_kv_heads": 3, "block_size": 64,
     "layers": [
      {"dense": true},
      {"local_blocks": 8, "sink_blocks": 1, "strides": [16, 0, 4], "phases": [0, 0, 2]},
      {"local_blocks": 8, "sink_blocks": 1, "strides": [0, 0, 0]}
     ]}

`sink_blocks` is 0 and `phases` are the default ones of `S2Pattern` where they are left out. `note` and
`made_with` may hold any JSON, for readers; nothing else is allowed.

In version 2 a file also has `pattern_heads`, the number of query heads of the model: `strides` and `phases`
are then those of its query heads, which may differ within a KV group. Other files are of version 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_s2.errors import InputError
from megatron_s2.pattern.layer_pattern import layer_entries
from megatron_s2.pattern.settings import S2Settings

FORMAT = "megatron-s2-pattern"
_SIZES = {  # by the version of the file
    1: ("num_layers", "num_kv_heads", "block_size"),
    2: ("num_layers", "num_kv_heads", "pattern_heads", "block_size"),
}
_METADATA = ("note", "made_with")


def read_pattern_file(
    path: str | Path,
    *,
    num_layers: int | None = None,
    num_kv_heads: int | None = None,
    num_query_heads: int | None = None,
    source: str = "--s2-pattern-file",
) -> S2Settings:
    """Returns the settings in a pattern file.

    Args:
        num_layers, num_kv_heads, num_query_heads: sizes of the model that the file must be for; None for any.
        source: what names the file in messages.

    Raises:
        InputError: the file cannot be read, is not a pattern file of this version, is for another model, or
            an entry is out of range. The message names the file, the layer and the field.
    """
    try:
        settings = _settings(_parsed(path), num_layers, num_kv_heads)
        settings.check_query_heads(num_query_heads)
        return settings
    except ValueError as error:
        raise InputError(f"{source} {path}: {error}") from None


def write_pattern_file(
    path: str | Path, settings: S2Settings, *, note: str | None = None, made_with: object = None
) -> None:
    """Writes settings as a pattern file, one layer per line, with the phases as numbers.

    Args:
        note: text for readers.
        made_with: how the file was made, anything that JSON can hold.

    Raises:
        OSError: the file cannot be written.
    """
    settings = settings.per_layer
    version = 1 if settings.pattern_heads is None else 2
    head = {"format": FORMAT, "version": version}
    head |= {name: value for name, value in (("note", note), ("made_with", made_with)) if value is not None}
    head |= {name: getattr(settings, name) for name in _SIZES[version]}
    lines = [f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items()]
    layers = ",\n".join(f"  {json.dumps(entry)}" for entry in layer_entries(settings.layers))
    Path(path).write_text("{\n" + "".join(lines) + ' "layers": [\n' + layers + "\n ]\n}\n", encoding="utf-8")


def _parsed(path: str | Path) -> object:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("is not JSON: it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated}: is there twice")
    return entries


def _settings(content: object, num_layers: int | None, num_kv_heads: int | None) -> S2Settings:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'is not a pattern file: its "format" must be "{FORMAT}"')
    version = content.get("version")
    if type(version) is not int or version not in _SIZES:
        raise ValueError(f"version {version}: must be 1 or 2, the ones that this version reads")
    sizes = _SIZES[version]
    for name in content:
        if name not in ("format", "version", "layers", *sizes, *_METADATA):
            rule = "needs version 2" if name in _SIZES[2] else "is not a field of a pattern file"
            raise ValueError(f"{name}: {rule}")
    for name in (*sizes, "layers"):
        if name not in content:
            raise ValueError(f"{name}: is missing")
    for name in sizes:
        if type(content[name]) is not int or content[name] < 1:
            raise ValueError(f"{name} {content[name]!r}: must be a whole number >= 1")
    for name, size in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads)):
        if size is not None and content[name] != size:
            raise ValueError(f"{name} {content[name]}: is for another model; this one has {size}")
    if not isinstance(content["layers"], list):
        raise ValueError("layers: must be a list with one object per layer")
    for number, entry in enumerate(content["layers"], 1):
        if entry is None:
            raise ValueError(f"layer {number} null: must be an object")
    return S2Settings(**{name: content[name] for name in sizes}, layers=content["layers"])
