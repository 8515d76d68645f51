"""Megatron's `torch_dist` checkpoints, written and read one layer of one tensor at a time.

Such a checkpoint is a directory of torch.distributed.checkpoint: files of tensors, and a pickle `.metadata`
that lists where each tensor is stored. Files that a user provides are not trusted: `.metadata` is unpickled
with only the classes allowed that such metadata consists of; tensors and arguments are read by torch's
`weights_only` reader, after their checksums have been verified, which torch does not do.
"""

import io
import json
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from megatron_s2.checkpoint.tensors import ModelTensor
from megatron_s2.errors import InputError

_TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# Key, and file of older versions, of what is not a tensor: arguments and iteration.
_COMMON = "common_state/shard_0_1"
_COMMON_FILE = "common.pt"
_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
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
# Exceptions that unpickling, torch's readers and the checks of their results raise on damaged files.
_READ_ERRORS = (
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


def write_release(
    directory: Path,
    tensors: Iterable[ModelTensor],
    dtypes: Mapping[str, torch.dtype],
    load: Callable[[ModelTensor], torch.Tensor],
    empty_states: Iterable[str],
    args: Namespace,
) -> None:
    """Writes a checkpoint that Megatron loads with `--load directory` as the start of a new run.

    Args:
        dtypes: dtype of each tensor, by key.
        load: returns the values of a tensor; each is loaded, written and freed before the next.
        empty_states: keys of the extra states, which are stored empty.
        args: the arguments to store.
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
            planner=_StreamingPlanner(tensors, dtypes, load, objects),
            no_dist=True,
        )
    except CheckpointException as error:
        _raise_cause(error, release)
    (release / "metadata.json").write_text(json.dumps(_FORMAT))
    (directory / _TRACKER).write_text(_RELEASE)


def _raise_cause(error: CheckpointException, directory: Path) -> None:
    """Raises the exception behind a CheckpointException, into which torch turns all others, KeyboardInterrupt
    included.

    On a full disk `torch.save` raises a RuntimeError; the OSError is in its context.
    """
    cause, _ = next(iter(error.failures.values()))
    os_error = cause
    while os_error is not None and not isinstance(os_error, OSError):
        os_error = os_error.__context__
    if os_error is not None and os_error.errno and os_error.filename is None:
        os_error = OSError(os_error.errno, os_error.strerror, str(directory))
    raise os_error or cause from None


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Leaves out the path of the directory, because it is renamed after writing."""
        return StorageMeta(save_id=self.save_id)


class _StreamingPlanner(DefaultSavePlanner):
    """Loads each tensor only when it is written."""

    def __init__(
        self,
        tensors: Iterable[ModelTensor],
        dtypes: Mapping[str, torch.dtype],
        load: Callable[[ModelTensor], torch.Tensor],
        objects: dict[str, object],
    ):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = {(key, tensor.global_offset): tensor for tensor in tensors for key in tensor.keys}
        self._dtypes, self._load, self._objects = dtypes, load, objects

    def create_local_plan(self) -> SavePlan:
        tensors = [
            WriteItem(
                index=MetadataIndex(key, tensor.global_offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        torch.Size(tensor.global_offset), torch.Size(tensor.local_shape)
                    ),
                    properties=TensorProperties(dtype=self._dtypes[key]),
                    size=torch.Size(tensor.global_shape),
                ),
            )
            for (key, _), tensor in self._tensors.items()
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
        tensor = self._tensors[index.fqn, tuple(index.offset)]
        return self._load(tensor).reshape(tensor.local_shape)


class CheckpointReader:
    """Reads a `torch_dist` checkpoint that Megatron or `write_release` wrote.

    Args:
        directory: the directory of Megatron's `--save`; its tracker file names the iteration to read.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it contains classes that are not allowed.
    """

    def __init__(self, directory: Path):
        self.path = directory / _iteration_name(directory)
        if not (self.path / "metadata.json").is_file() or not (self.path / ".metadata").is_file():
            raise InputError(f"--input {directory}: {self.path.name} is not a torch_dist checkpoint")
        self._metadata = _read_metadata(self.path / ".metadata")
        self._tensors = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        # Of each tensor that has been read, by their index along the first axis; None for more than one.
        self._chunks: dict[str, dict[int | None, list[ChunkStorageMetadata]]] = {}
        self.common = self._read_common()

    @property
    def args(self) -> Namespace:
        """Arguments of the run that wrote the checkpoint."""
        if not isinstance(self.common.get("args"), Namespace):
            raise InputError(f"{self.path}: contains no arguments, so the model is not known")
        return self.common["args"]

    @property
    def iteration(self) -> int:
        """Number of training steps completed."""
        if not isinstance(self.common.get("iteration"), int):
            raise InputError(f"{self.path}: contains no iteration")
        return self.common["iteration"]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns the shape and dtype of every tensor by key."""
        return {key: (tuple(stored.size), stored.properties.dtype) for key, stored in self._tensors.items()}

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the part of a tensor at `offset` with `shape`, assembled from the chunks in the files.

        Raises:
            InputError: a file is damaged, or no file contains some of the elements.
        """
        part = torch.empty(shape, dtype=self._tensors[key].properties.dtype)
        filled = 0
        for chunk in self._chunks_near(key, offset, shape):
            begin = [max(a, b) for a, b in zip(offset, chunk.offsets)]
            end = [min(a + b, c + d) for a, b, c, d in zip(offset, shape, chunk.offsets, chunk.sizes)]
            if all(a < b for a, b in zip(begin, end)):
                overlap = part[_index(begin, end, offset)]
                overlap.copy_(self._read_chunk(key, chunk)[_index(begin, end, chunk.offsets)])
                filled += overlap.numel()
        if filled != part.numel():
            raise InputError(f"{self.path}: {key} is incomplete: no file contains a part of it")
        return part

    def _chunks_near(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> Iterable[ChunkStorageMetadata]:
        """Returns the chunks of a tensor without those that cannot overlap a part of it.

        Of a tensor that is stacked, each part has one element along the first axis, and so has each chunk; a
        model of experts has thousands of parts and of chunks.
        """
        if key not in self._chunks:
            by_index = self._chunks[key] = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                by_index[chunk.offsets[0] if tuple(chunk.sizes[:1]) == (1,) else None].append(chunk)
        by_index = self._chunks[key]
        return [*by_index[offset[0]], *by_index[None]] if shape[0] == 1 else self._tensors[key].chunks

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        tensor = self._load(MetadataIndex(key, chunk.offsets), _load_tensor)
        listed = (chunk.sizes, self._tensors[key].properties.dtype)
        if not isinstance(tensor, torch.Tensor) or (tensor.shape, tensor.dtype) != listed:
            raise InputError(f"{self.path}: {key} has another shape or dtype in its file than in .metadata")
        return tensor

    def _read_common(self) -> dict:
        file = self.path / _COMMON_FILE
        if file.is_file():
            with _as_input_error(f"{file}: cannot be read: it is damaged, or may run code"):
                _check_crc(file)
                common = _load_arguments(file)
        elif _COMMON in self._metadata.state_dict_metadata:
            common = self._load(MetadataIndex(_COMMON), _load_arguments)
            common = common[0] if isinstance(common, list) and common else None
        else:
            raise InputError(f"{self.path}: contains no arguments, so the model is not known")
        if not isinstance(common, dict):
            raise InputError(f"{self.path}: contains no arguments, so the model is not known")
        return common

    def _load(self, index: MetadataIndex, load: Callable[[io.IOBase], object]) -> object:
        """Returns the object stored under an index, read by `load`."""
        location = self._metadata.storage_data.get(index)
        if location is None:
            raise InputError(f"{self.path}: .metadata does not list {index.fqn}")
        path = self.path / location.relative_path
        problem = f"{path}: {index.fqn} cannot be read: it is damaged, or may run code"
        with _as_input_error(problem), path.open("rb") as file:
            _check_crc(_FileRange(file, location.offset, location.length))
            return load(_FileRange(file, location.offset, location.length))


def _index(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """Returns the index of the elements from `begin` to `end` in a tensor whose first element is `origin`."""
    return tuple(slice(a - start, b - start) for a, b, start in zip(begin, end, origin))


def _iteration_name(directory: Path) -> str:
    """Returns the name of the directory to read, such as `iter_0000010`."""
    tracker = directory / _TRACKER
    if not tracker.is_file():
        raise InputError(f"--input {directory}: is not a checkpoint: it has no {_TRACKER}")
    text = tracker.read_text(errors="replace").strip()
    if text == _RELEASE:
        return _RELEASE
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InputError(f"{tracker}: must contain an iteration or {_RELEASE}, not {text[:40]!r}")
    return f"iter_{int(text):07}"


@contextmanager
def _as_input_error(message: str) -> Iterator[None]:
    """Turns what reading a damaged file raises into an InputError whose text begins with `message`."""
    try:
        yield
    except _READ_ERRORS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{message}: {reason}") from None


def _check_crc(file: io.IOBase | Path) -> None:
    """Raises BadZipFile if a record of a `torch.save` file, a zip archive, does not match its CRC32."""
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed, which torch.save never does")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} in it does not match its CRC32")


def _load_tensor(stream: io.IOBase) -> torch.Tensor:
    return torch.load(stream, map_location="cpu", weights_only=True)


def _load_arguments(stream: io.IOBase | Path) -> object:
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return torch.load(stream, map_location="cpu", weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles `.metadata` and refuses every class that it does not consist of."""

    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not allowed")


def _read_metadata(path: Path) -> Metadata:
    """Returns the content of `.metadata` after checking that the files it names exist and are long enough."""
    ends: dict[str, int] = {}
    with _as_input_error(f"{path}: cannot be read"), path.open("rb") as stream:
        read = _MetadataUnpickler(stream).load()
        if not isinstance(read, Metadata):
            raise TypeError("it contains no metadata")
        for stored in read.state_dict_metadata.values():
            if isinstance(stored, TensorStorageMetadata):
                _check_stored(stored)
        for location in read.storage_data.values():
            if min(location.offset, location.length) < 0 or location.transform_descriptors:
                raise ValueError("it contains an invalid or compressed range of a file")
            name = location.relative_path
            if not name or Path(name).name != name:
                raise ValueError(f"it names {name!r}, which is not a file in the directory")
            ends[name] = max(ends.get(name, 0), location.offset + location.length)
    for name, end in ends.items():
        file = path.with_name(name)
        if not file.is_file():
            raise InputError(f"{file}: missing, though .metadata lists it")
        if file.stat().st_size < end:
            raise InputError(f"{file}: is truncated at {file.stat().st_size} of {end} bytes")
    return read


def _check_stored(stored: TensorStorageMetadata) -> None:
    """Raises TypeError or ValueError if an entry of `.metadata` does not describe a tensor."""
    if not isinstance(stored.properties.dtype, torch.dtype):
        raise TypeError("it contains an invalid dtype")
    for chunk in stored.chunks:
        if not len(stored.size) == len(chunk.offsets) == len(chunk.sizes):
            raise ValueError("it contains a chunk with other dimensions than its tensor")


class _FileRange(io.RawIOBase):
    """The bytes of a file from `offset` on, `length` of them, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int):
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(self._length - self._position, 0)])
        self._position += count
        return count
