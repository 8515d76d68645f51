"""Damaged input is refused in one line that names the file, and no output is left."""

import io
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hf_models import assert_bit_equal, assert_refused, convert, make_model, run_conversion, weights

from megatron_s2.checkpoint import torch_dist

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path) -> Path:
    return make_model(tmp_path / "hf", "qwen3", shard_size="200KB")


@pytest.fixture
def converted(source, tmp_path) -> Path:
    convert("hf-to-megatron", source, tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.fixture
def release(converted) -> Path:
    return converted / "release"


def cut(file: Path, share: float = 0.5) -> None:
    written = file.read_bytes()
    file.write_bytes(written[: int(len(written) * share)])


def garble(file: Path, first: float, last: float) -> None:
    """Overwrites a part of a file, given as shares of its size, with random bytes."""
    written = bytearray(file.read_bytes())
    part = slice(int(first * len(written)), int(last * len(written)))
    written[part] = random.Random(1).randbytes(len(written[part]))
    file.write_bytes(written)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_tensor_file(converted, release, share):
    file = release / "__0_0.distcp"
    size = file.stat().st_size
    cut(file, share)
    message = f"{file}: is truncated at {int(size * share)} of {size} bytes"
    assert_refused("megatron-to-hf", converted, message)


def test_a_missing_tensor_file(converted, release):
    (release / "__0_0.distcp").unlink()
    assert_refused("megatron-to-hf", converted, "__0_0.distcp: missing, though .metadata lists it")


def test_damaged_tensors_are_found_while_others_are_written(converted, release):
    garble(release / "__0_0.distcp", 0.7, 0.8)
    flags = ("--max-shard-size", "50KB")
    assert_refused("megatron-to-hf", converted, "__0_0.distcp: decoder.layers.", *flags)


def test_one_flipped_bit_of_a_weight(converted, release):
    """torch's reader does not notice it."""
    key, file = "decoder.layers.mlp.linear_fc2.weight", release / "__0_0.distcp"
    metadata = torch_dist._read_metadata(release / ".metadata")
    location = next(value for index, value in metadata.storage_data.items() if index.fqn == key)

    def read() -> torch.Tensor:
        return torch.load(io.BytesIO(file.read_bytes()[location.offset : location.offset + location.length]))

    before, written = read(), bytearray(file.read_bytes())
    written[location.offset + location.length // 2] ^= 1
    file.write_bytes(written)
    assert (read() != before).sum() == 1
    assert_refused(
        "megatron-to-hf", converted, f"{file}: {key} cannot be read: it is damaged, or may run code: "
    )


@pytest.mark.parametrize("file", ["__0_0.distcp", "common.pt"])
def test_a_changed_argument(converted, release, file):
    """The arguments could be read, with a vocabulary of 251 instead of 250 tokens."""
    if file == "common.pt":
        torch.save(torch_dist.CheckpointReader(converted).common, release / file)
    written = (release / file).read_bytes()
    (release / file).write_bytes(written.replace(b"K\xfa", b"K\xfb", 1))
    assert_refused("megatron-to-hf", converted, "data.pkl in it does not match its CRC32")


def test_damaged_arguments(converted, release):
    garble(release / "__0_0.distcp", 0.0, 0.02)
    message = "__0_0.distcp: common_state/shard_0_1 cannot be read: it is damaged, or may run code: "
    assert_refused("megatron-to-hf", converted, message)


@pytest.mark.parametrize("damage", [cut, lambda file: garble(file, 0.1, 0.6), lambda file: cut(file, 0)])
def test_damaged_arguments_in_a_separate_file(converted, release, damage):
    torch.save(torch_dist.CheckpointReader(converted).common, release / "common.pt")
    damage(release / "common.pt")
    message = f"{release}/common.pt: cannot be read: it is damaged, or may run code: "
    assert_refused("megatron-to-hf", converted, message)


@pytest.mark.parametrize("common", [None, [], {"args": 1}])
def test_missing_arguments(converted, release, common):
    torch.save(common, release / "common.pt")
    assert_refused("megatron-to-hf", converted, f"{release}: contains no arguments")


@pytest.mark.parametrize("damage", [cut, lambda file: garble(file, 0.1, 0.6), lambda file: cut(file, 0)])
def test_damaged_metadata(converted, release, damage):
    damage(release / ".metadata")
    assert_refused("megatron-to-hf", converted, f"{release}/.metadata: cannot be read: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.chunks.pop(), "is incomplete: no file contains a part of it"),
        (lambda stored: setattr(stored.properties, "dtype", torch.bfloat16), "has another shape or dtype in"),
    ],
    ids=["missing chunk", "wrong dtype"],
)
def test_metadata_that_contradicts_the_files(converted, monkeypatch, change, message):
    read, key = torch_dist._read_metadata, "decoder.layers.mlp.linear_fc2.weight"

    def read_changed(path):
        metadata = read(path)
        change(metadata.state_dict_metadata[key])
        return metadata

    monkeypatch.setattr(torch_dist, "_read_metadata", read_changed)
    assert_refused("megatron-to-hf", converted, f"{key} {message}")


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "common.pt"])
def test_random_damage_never_ends_in_a_traceback(source, converted, release, tmp_path, file):
    """Nor in wrong weights."""
    torch.save(torch_dist.CheckpointReader(converted).common, release / "common.pt")
    intact, dice = (release / file).read_bytes(), random.Random(5)
    refused, expected = 0, weights(source)
    for number in range(40):
        damaged = bytearray(intact)
        for _ in range(4):
            damaged[dice.randrange(len(intact))] = dice.randrange(256)
        (release / file).write_bytes(damaged)
        output = tmp_path / f"output-{number}"
        status, _, errors = run_conversion("megatron-to-hf", converted, output)
        assert status == 0 or (status, errors.count("\n"), errors[:7]) == (2, 1, "error: ")
        if status == 0 and file != ".metadata":  # it has no checksum
            assert_bit_equal(weights(output), expected)
        refused += status != 0
    assert refused


@pytest.mark.parametrize("text", [b"\xff\xfe", b"iter", b"", b"9" * 5000, "²".encode()])
def test_a_tracker_without_an_iteration(converted, text):
    (converted / "latest_checkpointed_iteration.txt").write_bytes(text)
    assert_refused("megatron-to-hf", converted, "iteration.txt: must contain an iteration or release, not ")


def test_ctrl_c_while_reading_arguments(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist, "_load_arguments", lambda stream: signal.raise_signal(signal.SIGINT))
    status, printed, errors = run_conversion("megatron-to-hf", converted, tmp_path / "output")
    assert (status, printed, errors) == (130, "", "interrupted\n")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_safetensors_file(source, share):
    file = sorted(source.glob("*.safetensors"))[1]
    cut(file, share)
    assert_refused("hf-to-megatron", source, f"{file}: is not a safetensors file, or is damaged")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map must be an object that maps each tensor to its file"),
        ([], "weight_map must be an object that maps each tensor to its file"),
        ({}, "weight_map must be an object that maps each tensor to its file"),
        (["a"], "weight_map must be an object that maps each tensor to its file"),
        ({"a": 1}, "'a' is in 1, which is not a file in"),
        ({"a": ["b"]}, "'a' is in ['b'], which is not a file in"),
        ({"a": "none.safetensors"}, "'a' is in 'none.safetensors', which is not a file in"),
        ({"a": ""}, "'a' is in '', which is not a file in"),
        ({"a": ".."}, "'a' is in '..', which is not a file in"),
        ({"a": "../hf/config.json"}, "'a' is in '../hf/config.json', which is not a file in"),
        ({"a": "config.json"}, "config.json: is not a safetensors file"),
    ],
    ids=str,
)
def test_an_index_that_names_files_outside_the_directory(source, weight_map, message):
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_refused("hf-to-megatron", source, message)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_an_index_that_is_no_json_object(source, text):
    (source / INDEX).write_bytes(text)
    assert_refused("hf-to-megatron", source, f"{source / INDEX}: ")


def test_an_index_beside_another_model(source, tmp_path):
    other = make_model(tmp_path / "other", "qwen3")
    shutil.copyfile(other / WEIGHTS, source / WEIGHTS)
    assert_refused("hf-to-megatron", source, f"does not name {WEIGHTS}, which is there as well")
