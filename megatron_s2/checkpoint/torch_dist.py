"""Megatron's `torch_dist` checkpoints: tensors cut along layers, written and read one layer at a time.

A checkpoint is a directory of torch.distributed.checkpoint: files of tensors and a pickle, `.metadata`, that
says where each is. What a user gives is not unpickled as it is: only the classes that such metadata consists
of are allowed in it, and tensors and arguments are read by torch's own `weights_only` reader.
"""

import io
import json
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
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
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_s2.data.errors import InputError

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
        _raise_cause(error)
    (release / "metadata.json").write_text(json.dumps(_FORMAT))
    (directory / _TRACKER).write_text(_RELEASE)


def _raise_cause(error: CheckpointException) -> None:
    """Raises what stopped torch.distributed.checkpoint, which catches everything, Ctrl-C included.

    That of a full disk lies deeper: `torch.save` ends in a RuntimeError about where it stopped.
    """
    cause, _ = next(iter(error.failures.values()))
    deeper = cause
    while deeper is not None and not isinstance(deeper, OSError):
        deeper = deeper.__context__
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
        self._reader = _SafeReader(self.path)
        self._metadata = self._reader.read_metadata()
        self.common = self._read_common()

    @property
    def args(self) -> Namespace:
        """The arguments of the run that wrote it."""
        if not isinstance(self.common.get("args"), Namespace):
            raise InputError(f"{self.path}: holds no arguments, so the model is not known")
        return self.common["args"]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Size and dtype of every tensor."""
        return {
            key: (tuple(stored.size), stored.properties.dtype)
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, wanted: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, torch.Tensor]:
        """Parts of tensors, however they are cut in the files.

        Args:
            wanted: offsets and sizes of the part, by key.
        """
        parts = {
            key: torch.empty(sizes, dtype=self._metadata.state_dict_metadata[key].properties.dtype)
            for key, (_, sizes) in wanted.items()
        }
        offsets = {key: place for key, (place, _) in wanted.items()}
        try:
            checkpoint.load(parts, storage_reader=self._reader, planner=_PartsPlanner(offsets), no_dist=True)
        except CheckpointException as error:
            _raise_cause(error)
        return parts

    def _read_common(self) -> dict:
        older = self.path / _COMMON_OF_OLDER
        if older.is_file():
            return _read_safely(older, older.open("rb"))
        stream = {_COMMON: io.BytesIO()}
        if _COMMON not in self._metadata.state_dict_metadata:
            raise InputError(f"{self.path}: holds no arguments, so the model is not known")
        checkpoint.load(stream, storage_reader=self._reader, planner=_BytesPlanner(), no_dist=True)
        return _read_safely(self.path, stream[_COMMON])[0]


def _iteration(directory: Path) -> str:
    tracker = directory / _TRACKER
    if not tracker.is_file():
        raise InputError(f"--input {directory}: is no checkpoint: it has no {_TRACKER}")
    text = tracker.read_text().strip()
    if text == _RELEASE:
        return _RELEASE
    if not text.isdigit():
        raise InputError(f"{tracker}: must say an iteration or {_RELEASE}, not {text!r}")
    return f"iter_{int(text):07}"


def _read_safely(path: Path, stream: io.IOBase) -> object:
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals(SAFE_GLOBALS), stream:
        try:
            return torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{path}: its arguments are not read, because that may run code: {reason}"
            ) from None


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`; anything but the classes it consists of is refused."""

    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _CLASSES_OF_METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")


class _SafeReader(FileSystemReader):
    _read: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if self._read is None:
            path = Path(self.path) / ".metadata"
            with path.open("rb") as stream:
                try:
                    self._read = _MetadataUnpickler(stream).load()
                except (pickle.UnpicklingError, EOFError, AttributeError) as error:
                    raise InputError(f"{path}: is not read: {error}") from None
            if not isinstance(self._read, Metadata):
                raise InputError(f"{path}: is not read: it holds no metadata")
            for place in self._read.storage_data.values():
                if Path(place.relative_path).name != place.relative_path:
                    raise InputError(f"{path}: names {place.relative_path}, a file elsewhere")
        return self._read


class _PartsPlanner(DefaultLoadPlanner):
    """Reads parts of tensors: `offsets` says where each begins."""

    def __init__(self, offsets: dict[str, tuple[int, ...]]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._offsets = offsets

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, part in self.state_dict.items():
            place = ChunkStorageMetadata(torch.Size(self._offsets[key]), part.size())
            items += create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key], [place])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]


class _BytesPlanner(DefaultLoadPlanner):
    """Gives the bytes of an object as they are, where the default unpickles them."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = value
