"""Documents of a corpus: their order, and what is skipped and counted."""

import json
import os

import pytest

from megatron_s2.data.documents import Corpus, Tally
from megatron_s2.errors import InputError


def read(path, **options):
    tally = Tally()
    return list(Corpus(str(path), **options).read(tally)), tally


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def test_each_line_of_a_json_lines_file_is_a_document(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", '{"text": "one"}', "", '{"text": "two\\n", "id": 2}', "")
    assert read(file) == (["one", "two\n"], Tally(documents=2, bytes=7))


def test_the_key_of_the_text_can_be_chosen(tmp_path):
    file = write_lines(tmp_path / "a.json", '{"text": "no", "body": "yes"}')
    assert read(file, json_key="body")[0] == ["yes"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"text": "one"}'), ("a.json", '{"text": "one"}'), ("a.txt", "one")]
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read(tmp_path) == (["one"], Tally(documents=1, bytes=3))
    if name != "a.txt":
        assert read(tmp_path / name)[0] == ["one"]


def test_a_directory_is_walked_depth_first_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c/x.txt", "c.txt", "a/B.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path)[0] == ["a/B.txt", "a/c/x.txt", "a/z.txt", "b.txt", "c.txt"]


def test_text_is_not_changed(tmp_path):
    text = "windows\r\nold mac\rgrüße 🙂\t \n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path) == ([text], Tally(documents=1, bytes=len(text.encode())))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".JSON"])
def test_json_lines_are_the_same_alone_and_in_a_directory(tmp_path, suffix):
    file = write_lines(tmp_path / f"shard0{suffix}", '{"text": "one"}', '{"text": "two"}')
    (tmp_path / "shard1.txt").write_text('{"text": "three"}')
    assert read(file)[0] == ["one", "two"]
    assert read(tmp_path)[0] == ["one", "two", '{"text": "three"}']


@pytest.mark.parametrize("content", ['{\n  "indent": 2\n}', "[1]"])
def test_other_json_in_a_directory_is_refused_with_what_to_do(tmp_path, content):
    (tmp_path / "package.json").write_text(content)
    with pytest.raises(InputError, match=r"package\.json:1: .*; --exclude '\*\.json' skips such files$"):
        read(tmp_path)
    assert read(tmp_path, exclude=("*.json",)) == ([], Tally())


def test_pattern_exclude_and_hidden_names(tmp_path):
    for name in ("a.py", "a.txt", "site-packages/b.py", "test_c.py", ".git/d.py", ".e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path, pattern="*.py", exclude=("site-packages", "test_*"))[0] == ["a.py"]
    assert read(tmp_path, pattern=".*.py")[0] == [".e.py"]


def test_symbolic_links_do_not_repeat_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "sub" / "z.txt").symlink_to("a.txt")
    (tmp_path / "zub").symlink_to("sub")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read(tmp_path) == (["a"], Tally(documents=1, bytes=1, repeated=3))


def test_links_out_of_the_directory_are_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.txt").write_text("a")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    assert read(tmp_path / "inside")[0] == ["a"]


def test_a_fifo_is_skipped(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert read(tmp_path) == ([], Tally())


def test_files_without_text_are_skipped_and_counted(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b" \n\t\r\n")
    (tmp_path / "latin1").write_bytes("grüße".encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"ELF\0\0")
    (tmp_path / "text").write_bytes(b"text")
    assert read(tmp_path) == (["text"], Tally(documents=1, bytes=4, empty=2, undecodable=2))


def test_json_lines_without_text_are_skipped_and_counted(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("", " \n", "a\0b", "\ud800", "text")]
    assert read(write_lines(tmp_path / "a.jsonl", *lines)) == (
        ["text"],
        Tally(documents=1, bytes=4, empty=2, undecodable=2),
    )


def test_unreadable_files_are_skipped_and_counted(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "secret.txt").write_text("b")
    real_open = open

    def refusing(path, *args):  # permission bits do not stop a test that runs as root
        if str(path).endswith("secret.txt"):
            raise PermissionError(path)
        return real_open(path, *args)

    monkeypatch.setattr("builtins.open", refusing)
    assert read(tmp_path) == (["a"], Tally(documents=1, bytes=1, unreadable=1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', "not a line of JSON"),
        (b'{"text": "\xfc"}', "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON: maximum recursion depth"),
        ('{"text": "fine", "tree": ' + '{"a":' * 100_000, "not a line of JSON: maximum recursion depth"),
        ('["text"]', "must be a JSON object, is list"),
        ('{"body": "x"}', "has no key 'text' (--json-key); it has ['body']"),
        ('{"text": 3}', "'text' (--json-key) must hold a string, is int"),
        ('{"text": null}', "'text' (--json-key) must hold a string, is NoneType"),
    ],
    ids=["broken", "not-utf8", "deep", "deep value", "list", "other-key", "number", "null"],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = write_lines(tmp_path / "a.jsonl", '{"text": "fine"}', "", line)
    with pytest.raises(InputError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}:3: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing", ""])
def test_a_path_that_does_not_exist_is_refused(tmp_path, name):
    path = str(tmp_path / name) if name else ""
    with pytest.raises(InputError, match=r"--input .*: does not exist"):
        Corpus(path)


def test_a_file_that_is_not_json_lines_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"--input .*a\.txt: must be a directory or a file of JSON lines"):
        Corpus(str(tmp_path / "a.txt"))


def test_size_is_that_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("four")
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    (tmp_path / "link.txt").symlink_to("a.txt")
    assert Corpus(str(tmp_path)).size() == 6
