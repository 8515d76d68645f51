"""Megatron's `torch_dist` checkpoints: tensors cut along layers, written and read one layer at a time.

A checkpoint is a directory of torch.distributed.checkpoint: files of tensors and a pickle, `.metadata`, that
says where each is. What a user gives is not unpickled as it is: only the classes that such metadata consists
of are allowed in it, and tensors and arguments are read by torch's own `weights_only` reader, which takes
no look at checksums, so that they are compared before.
"""

import io
import json
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    FileSystemWriter,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_s2.errors import InputError

_TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = "common_state/shard_0_1"
_COMMON_OF_OLDER = "common.pt"
_DCP = "torch.distributed.checkpoint"
_CLASSES_OF_METADATA = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.planner", "SavePlan"),
    (f"{_DCP}.planner", "WriteItem"),
    (f"{_DCP}.planner", "WriteItemType"),
    (f"{_DCP}.planner", "TensorWriteData"),
    (f"{_DCP}.planner", "BytesIOWriteData"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}
# What unpickling, torch's readers and a look at the result raise where bytes are not what they were.
_OF_GARBLED_BYTES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Chunk:
    """A tensor to write, or one layer of one.

    Args:
        key: its name in the checkpoint.
        size: of the whole tensor.
        offsets, sizes: where in it this part lies.
        make: gives its values, of `sizes` without the first axis where that is 1 of several layers.
    """

    key: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def write_release(
    directory: Path, chunks: Iterable[Chunk], empty_states: Iterable[str], args: Namespace
) -> None:
    """Writes a checkpoint that Megatron loads with `--load directory` as the start of a new run.

    Args:
        chunks: the model; each is made, written and let go before the next.
        empty_states: keys of extra states.
        args: what stands as the arguments of the run that wrote it.
    """
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    objects = {_COMMON: [common]} | {key: [None] for key in empty_states}
    release = directory / _RELEASE
    try:
        checkpoint.save(
            {},
            storage_writer=_Writer(release),
            planner=_StreamingPlanner(list(chunks), objects),
            no_dist=True,
        )
    except CheckpointException as error:
        _raise_cause(error, release)
    (release / "metadata.json").write_text(json.dumps(_FORMAT))
    (directory / _TRACKER).write_text(_RELEASE)


def _raise_cause(error: CheckpointException, directory: Path) -> None:
    """Raises what stopped torch.distributed.checkpoint, which catches everything, Ctrl-C included.

    That of a full disk lies deeper: `torch.save` ends in a RuntimeError about where it stopped.
    """
    cause, _ = next(iter(error.failures.values()))
    deeper = cause
    while deeper is not None and not isinstance(deeper, OSError):
        deeper = deeper.__context__
    if deeper is not None and deeper.errno and deeper.filename is None:
        deeper = OSError(deeper.errno, deeper.strerror, str(directory))
    raise deeper or cause from None


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Without the name of the directory, which is not its last."""
        return StorageMeta(save_id=self.save_id)


class _StreamingPlanner(DefaultSavePlanner):
    """Plans to write what does not exist yet, and makes each chunk when its turn has come."""

    def __init__(self, chunks: list[Chunk], objects: dict[str, object]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        tensors = [
            WriteItem(
                index=MetadataIndex(chunk.key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)),
                    properties=TensorProperties(dtype=chunk.dtype),
                    size=torch.Size(chunk.size),
                ),
            )
            for chunk in self._chunks.values()
        ]
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(objects + tensors)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save(self._objects[index.fqn], stream)
            return stream
        chunk = self._chunks[index.fqn, tuple(index.offset)]
        return chunk.make().reshape(chunk.sizes)


class Checkpoint:
    """A `torch_dist` checkpoint that Megatron wrote, or `write_release`.

    Args:
        directory: what Megatron was given as `--save`; its tracker file says which iteration counts.

    Raises:
        InputError: it is none, or damaged, or holds what is not read safely.
    """

    def __init__(self, directory: Path):
        self.path = directory / _iteration(directory)
        if not (self.path / "metadata.json").is_file() or not (self.path / ".metadata").is_file():
            raise InputError(f"--input {directory}: {self.path.name} is no torch_dist checkpoint")
        self._metadata = _read_metadata(self.path / ".metadata")
        self._tensors = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self.common = self._read_common()

    @property
    def args(self) -> Namespace:
        """The arguments of the run that wrote it."""
        if not isinstance(self.common.get("args"), Namespace):
            raise InputError(f"{self.path}: holds no arguments, so the model is not known")
        return self.common["args"]

    @property
    def iteration(self) -> int:
        """Steps of training that the run had taken."""
        if not isinstance(self.common.get("iteration"), int):
            raise InputError(f"{self.path}: does not say its iteration")
        return self.common["iteration"]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Size and dtype of every tensor."""
        return {key: (tuple(stored.size), stored.properties.dtype) for key, stored in self._tensors.items()}

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A part of a tensor, however it is cut in the files.

        Args:
            offsets, sizes: of the part.

        Raises:
            InputError: a file is damaged.
        """
        stored = self._tensors[key]
        part = torch.empty(sizes, dtype=stored.properties.dtype)
        filled = 0
        for chunk in stored.chunks:
            first = [max(mine, its) for mine, its in zip(offsets, chunk.offsets)]
            last = [min(a + b, c + d) for a, b, c, d in zip(offsets, sizes, chunk.offsets, chunk.sizes)]
            if all(begin < end for begin, end in zip(first, last)):
                piece = part[_between(first, last, offsets)]
                piece.copy_(self._read_chunk(key, chunk)[_between(first, last, chunk.offsets)])
                filled += piece.numel()
        if filled != part.numel():
            raise InputError(f"{self.path}: {key} is not whole: a part of it is in none of the files")
        return part

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        tensor = self._load(MetadataIndex(key, chunk.offsets), _load_tensor)
        said = (chunk.sizes, self._tensors[key].properties.dtype)
        if not isinstance(tensor, torch.Tensor) or (tensor.shape, tensor.dtype) != said:
            raise InputError(f"{self.path}: {key} has another shape or dtype in its file than .metadata says")
        return tensor

    def _read_common(self) -> dict:
        older = self.path / _COMMON_OF_OLDER
        if older.is_file():
            with _told_as_input_error(f"{older}: is not read: it is damaged, or may run code"):
                _check_sums(older)
                common = _load_arguments(older)
        elif _COMMON in self._metadata.state_dict_metadata:
            common = self._load(MetadataIndex(_COMMON), _load_arguments)
            common = common[0] if isinstance(common, list) and common else None
        else:
            raise InputError(f"{self.path}: holds no arguments, so the model is not known")
        if not isinstance(common, dict):
            raise InputError(f"{self.path}: holds no arguments, so the model is not known")
        return common

    def _load(self, index: MetadataIndex, load: Callable[[io.IOBase], object]) -> object:
        """What is stored under an index, as `load` reads it."""
        place = self._metadata.storage_data.get(index)
        if place is None:
            raise InputError(f"{self.path}: .metadata does not say where {index.fqn} is")
        file = self.path / place.relative_path
        problem = f"{file}: {index.fqn} is not read: it is damaged, or may run code"
        with _told_as_input_error(problem), file.open("rb") as whole:
            _check_sums(_Slice(whole, place.offset, place.length))
            return load(_Slice(whole, place.offset, place.length))


def _between(first: Sequence[int], last: Sequence[int], begin: Sequence[int]) -> tuple[slice, ...]:
    """What lies from `first` to `last`, in a tensor that begins at `begin`."""
    return tuple(slice(a - start, b - start) for a, b, start in zip(first, last, begin))


def _iteration(directory: Path) -> str:
    tracker = directory / _TRACKER
    if not tracker.is_file():
        raise InputError(f"--input {directory}: is no checkpoint: it has no {_TRACKER}")
    text = tracker.read_text(errors="replace").strip()
    if text == _RELEASE:
        return _RELEASE
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InputError(f"{tracker}: must say an iteration or {_RELEASE}, not {text[:40]!r}")
    return f"iter_{int(text):07}"


@contextmanager
def _told_as_input_error(what: str) -> Iterator[None]:
    """Whatever stops a reader in garbled bytes is one line, which begins with `what`."""
    try:
        yield
    except _OF_GARBLED_BYTES as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{what}: {reason}") from None


def _check_sums(file: io.IOBase | Path) -> None:
    """Raises BadZipFile unless all that `torch.save` wrote, a zip archive, is what its CRC32s say."""
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed, which torch.save never does")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} in it has not the CRC32 that it was written with")


def _load_tensor(stream: io.IOBase) -> torch.Tensor:
    return torch.load(stream, map_location="cpu", weights_only=True)


def _load_arguments(stream: io.IOBase | Path) -> object:
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return torch.load(stream, map_location="cpu", weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`; anything but the classes it consists of is refused."""

    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _CLASSES_OF_METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")


def _read_metadata(path: Path) -> Metadata:
    """What `.metadata` says, where the files that it names are there and as long as it says."""
    ends: dict[str, int] = {}
    with _told_as_input_error(f"{path}: is not read"), path.open("rb") as stream:
        read = _MetadataUnpickler(stream).load()
        if not isinstance(read, Metadata):
            raise TypeError("it holds no metadata")
        for stored in read.state_dict_metadata.values():
            if isinstance(stored, TensorStorageMetadata):
                _check_stored(stored)
        for place in read.storage_data.values():
            if min(place.offset, place.length) < 0 or place.transform_descriptors:
                raise ValueError("it names a part of a file that is none, or is compressed")
            name = place.relative_path
            if not name or Path(name).name != name:
                raise ValueError(f"it names {name!r}, a file elsewhere")
            ends[name] = max(ends.get(name, 0), place.offset + place.length)
    for name, end in ends.items():
        file = path.with_name(name)
        if not file.is_file():
            raise InputError(f"{file}: missing, though the checkpoint has a part in it")
        if file.stat().st_size < end:
            raise InputError(f"{file}: is cut off at {file.stat().st_size} of {end} bytes")
    return read


def _check_stored(stored: TensorStorageMetadata) -> None:
    """Raises TypeError or ValueError unless it describes a tensor."""
    if not isinstance(stored.properties.dtype, torch.dtype):
        raise TypeError("it names a dtype that is none")
    for chunk in stored.chunks:
        if not len(stored.size) == len(chunk.offsets) == len(chunk.sizes):
            raise ValueError("it names a part of a tensor with other axes")


class _Slice(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(self._length - self._at, 0)])
        self._at += count
        return count
