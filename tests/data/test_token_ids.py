"""The largest token id of a dataset is recorded, or looked for in bounded time, and compared with a model."""

from pathlib import Path

import numpy as np
import pytest

from megatron_s2.data import token_ids
from megatron_s2.data.token_ids import Vocabulary, check_token_ids, find_token_ids, write_record
from megatron_s2.errors import InputError


def write(prefix: Path, ids, dtype=np.int32) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_document(np.asarray(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_without_a_record_the_data_are_looked_at(tmp_path, dtype):
    found = find_token_ids(write(tmp_path / "a", [3, 60_000, 7], dtype))
    assert (found.smallest, found.largest, found.looked_at, found.tokens) == (3, 60_000, 3, 3)


def test_a_record_is_believed_while_it_is_of_these_data(tmp_path):
    prefix = write(tmp_path / "a", [1, 2, 3])
    write_record(f"{prefix}.ids", 9, 12)
    assert find_token_ids(prefix).largest == 9 and find_token_ids(prefix).looked_at == 0
    for damage in (b"", b"no record", Path(f"{prefix}.ids").read_bytes() + b"x"):
        Path(f"{prefix}.ids").write_bytes(damage)
        assert find_token_ids(prefix).largest == 3
    write_record(f"{prefix}.ids", 9, 16)  # of data of another size
    assert find_token_ids(prefix).largest == 3


def test_a_look_at_large_data_is_bounded_and_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(token_ids, "_CHUNK_BYTES", 400)
    ids = np.zeros(10_000, np.int32)
    ids[0], ids[5_000], ids[99] = 1, 5, 2
    found = find_token_ids(write(tmp_path / "a", ids), most_bytes=4_000)
    assert (found.largest, found.looked_at, found.tokens) == (5, 1_000, 10_000)
    assert find_token_ids(str(tmp_path / "a"), most_bytes=100_000).looked_at == 10_000
    assert find_token_ids(str(tmp_path / "a"), most_bytes=40).looked_at == 10


def test_data_without_tokens_have_no_largest_id(tmp_path):
    found = find_token_ids(write(tmp_path / "a", []))
    assert (found.largest, found.looked_at, found.tokens) == (-1, 0, 0)


def test_token_ids_beyond_the_vocabulary_are_refused_with_flag_and_numbers(tmp_path):
    small, large = write(tmp_path / "small", [0, 299]), write(tmp_path / "large", [304])
    data = [("--data-path", small), ("--valid-data-path", large)]
    with pytest.raises(InputError) as refused:
        check_token_ids(data, Vocabulary(300, "--vocab-size 300"))
    assert str(refused.value) == (
        f"--valid-data-path {large}: has token id 304; the model has 300 tokens (--vocab-size 300); give "
        "data that was tokenized with the model's tokenizer"
    )
    write_record(f"{small}.ids", 300, 8)
    with pytest.raises(InputError, match=rf"^--data-path {small}: has token id 300; "):
        check_token_ids(data[:1], Vocabulary(300, "--vocab-size 300"))


def test_what_was_looked_at_is_said(tmp_path):
    one, two = write(tmp_path / "one", [0, 299]), write(tmp_path / "two", [0, 1, 2])
    assert check_token_ids([("--data-path", one)], Vocabulary(300, "")) == (
        f"{one}: no record of the largest token id; looked at 2 of 2 tokens, the largest is 299, of 300 that "
        "the model has"
    )
    assert check_token_ids([("--data-path", one), ("--data-path", two)], Vocabulary(300, "")).startswith(
        "2 datasets: no record of the largest token id; looked at 5 of 5 tokens, "
    )
    write_record(f"{one}.ids", 299, 8)
    assert check_token_ids([("--data-path", one), ("--data-path", "s3://a/b")], Vocabulary(300, "")) is None


def test_negative_ids_are_refused_but_for_padding(tmp_path):
    assert check_token_ids([("--data-path", write(tmp_path / "a", [3, -1]))], Vocabulary(300, ""))
    with pytest.raises(InputError, match="has token id -2; the model has 300 tokens"):
        check_token_ids([("--data-path", write(tmp_path / "b", [3, -2]))], Vocabulary(300, ""))


def test_an_index_of_something_else_is_refused(tmp_path):
    prefix = write(tmp_path / "a", [1])
    Path(f"{prefix}.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(InputError, match=r"a\.idx: is not an index of token ids"):
        find_token_ids(prefix)
