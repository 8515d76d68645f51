"""Hugging Face weights on disk: one safetensors file, or several with an index."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_s2.checkpoint.tensors import ModelTensor
from megatron_s2.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Buffers that old versions of transformers saved, although they follow from config.json.
_DERIVED = ".rotary_emb.inv_freq"


class SafetensorsReader:
    """Reads the tensors of a directory one by one.

    Raises:
        InputError: the directory has no safetensors, or a file or the index is damaged.
    """

    def __init__(self, directory: Path):
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for path in _files(directory):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name in self._files:
                        raise InputError(f"{path}: {name} is in {self._files[name].name} as well")
                    stored = file.get_slice(name)
                    self._files[name] = path
                    self._shapes[name] = tuple(stored.get_shape())
                    self._dtypes[name] = stored.get_dtype()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def check(self, tensors: Iterable[ModelTensor], optional: tuple[str, ...] = ()) -> None:
        """Checks that the directory has the Hugging Face tensors of `tensors` and no others.

        Args:
            optional: names of further tensors that may be there.

        Raises:
            InputError: a tensor is missing, unknown, or has another shape or an unsupported dtype; or tensors
                that become one in Megatron, such as query, key and value of all layers, differ in dtype.
        """
        expected: set[str] = set(optional)
        dtypes: dict[str, tuple[str, str]] = {}
        for tensor in tensors:
            for name, shape in tensor.hf_shapes.items():
                expected.add(name)
                if name not in self._files:
                    raise InputError(f"{name}: missing; config.json says that the model has it")
                if self._shapes[name] != shape:
                    raise InputError(
                        f"{name}: has shape {list(self._shapes[name])}; config.json says {list(shape)}"
                    )
                dtype = self._dtypes[name]
                if dtype not in _STORED_DTYPES:
                    raise InputError(
                        f"{name}: is stored as {dtype}; must be one of {', '.join(_STORED_DTYPES)}"
                    )
                first, first_dtype = dtypes.setdefault(tensor.key, (name, dtype))
                if dtype != first_dtype:
                    raise InputError(
                        f"{name}: is stored as {dtype}, but {first} as {first_dtype}; must be the same, "
                        "because they are one tensor in Megatron"
                    )
        for name in self._files:
            if name not in expected and not name.endswith(_DERIVED):
                raise InputError(f"{name}: config.json describes a model without it")

    def dtype(self, name: str) -> torch.dtype:
        return _STORED_DTYPES[self._dtypes[name]]

    def read(self, name: str) -> torch.Tensor:
        with _opened(self._files[name]) as file:
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise InputError(f"{self._files[name]}: {name} cannot be read: {error}") from None


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: is not a safetensors file, or is damaged: {error}") from None


def _files(directory: Path) -> list[Path]:
    index, single = directory / _INDEX, directory / _SINGLE
    if index.is_file():
        files = _files_of_index(index)
        if single.is_file() and single not in files:
            raise InputError(f"{index}: does not name {_SINGLE}, which is there as well; remove one of them")
        return files
    if single.is_file():
        return [single]
    for pattern in _PICKLES:
        for pickled in sorted(directory.glob(pattern)):
            raise InputError(
                f"{pickled}: is a pickle, which can run code when it is read; give safetensors "
                "(transformers saves them by default)"
            )
    raise InputError(f"--input {directory}: has neither {_SINGLE} nor {_INDEX}")


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map must be an object that maps each tensor to its file")
    for tensor, name in weight_map.items():
        is_name = isinstance(name, str) and name != "" and Path(name).name == name
        if not is_name or not (index.parent / name).is_file():
            raise InputError(f"{index}: {tensor!r} is in {name!r}, which is not a file in {index.parent}")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file; raises InputError if there is none."""
    try:
        read = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    if not isinstance(read, dict):
        raise InputError(f"{path}: must be a JSON object")
    return read


def write_safetensors(
    directory: Path, sizes: dict[str, int], tensors: Iterator[tuple[str, torch.Tensor]], max_shard_size: int
) -> None:
    """Writes tensors, in the order given, to as few files as `max_shard_size` allows.

    Args:
        sizes: size of each tensor in bytes.
        tensors: names and values, in the order of `sizes`. The tensors of one file are in memory at a time.
        max_shard_size: largest size of a file in bytes.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > max_shard_size:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files, start=1):
        file_name = _SINGLE if len(files) == 1 else f"model-{index:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        path = directory / file_name
        try:
            save_file(dict(islice(tensors, len(names))), path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from None
        path.chmod(directory.stat().st_mode & 0o666)  # save_file allows only the owner to read it
    if len(files) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(content, indent=2) + "\n")
