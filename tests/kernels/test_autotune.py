"""Autotuning chooses the fastest tiles, stores the choice in a file and checks the files it reads."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from megatron_s2.cache_file import cache_folder
from megatron_s2.kernels.autotune import Autotuner, Key
from megatron_s2.kernels.tuning import KERNELS, Tiles, candidates, tuning_for

SLOW, FAST, BROKEN = Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(256, 256, 8, 4)
SECONDS = {SLOW: 2.0, FAST: 1.0, BROKEN: float("inf")}
KEY = Key(
    kernel="forward",
    chip="NVIDIA H200",
    dtype="torch.bfloat16",
    head_dim=128,
    v_head_dim=128,
    block_size=64,
    group=4,
    mask=False,
    triton="3.9.0",
    candidates=(SLOW, FAST, BROKEN),
)


class Process:
    """The autotuner of one process, on a chip whose times are `seconds`."""

    def __init__(self, folder, seconds=SECONDS, meanwhile=lambda: None):
        self.measured = []
        self._launched = None
        self._seconds = seconds
        self._meanwhile = meanwhile
        self._tuner = Autotuner(self._measure, folder)

    def _measure(self, launch):
        launch()
        self.measured.append(self._launched)
        self._meanwhile()
        return self._seconds[self._launched]

    def choose(self, key=KEY) -> Tiles:
        return self._tuner.choose(key, lambda tiles: setattr(self, "_launched", tiles))


def test_the_fastest_candidate_is_chosen_and_each_measured_once(tmp_path):
    process = Process(tmp_path)
    assert [process.choose() for _ in range(2)] == [FAST, FAST]
    assert process.measured == [SLOW, FAST, BROKEN]


def test_a_single_candidate_is_not_measured(tmp_path):
    process = Process(tmp_path)
    assert process.choose(replace(KEY, candidates=(SLOW,))) == SLOW
    assert not process.measured and not list(tmp_path.iterdir())


def test_of_equally_fast_candidates_the_shipped_one_is_chosen(tmp_path):
    assert Process(tmp_path, dict.fromkeys(SECONDS, 1.0)).choose() == SLOW


OTHER_PROCESS = """
import sys
from pathlib import Path
from megatron_s2.kernels.autotune import Autotuner, Key
from megatron_s2.kernels.tuning import Tiles

def never(launch):
    raise AssertionError("measured again")

key = eval(sys.argv[2])
print(Autotuner(never, Path(sys.argv[1])).choose(key, None) == key.candidates[1])
"""


def test_another_process_reads_the_choice_and_measures_nothing(tmp_path):
    Process(tmp_path).choose()
    other = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path), repr(KEY)]
    assert subprocess.run(other, check=True, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "dq"},
        {"chip": "NVIDIA H100"},
        {"dtype": "torch.float32"},
        {"head_dim": 64},
        {"v_head_dim": 64},
        {"block_size": 32},
        {"group": 1},
        {"mask": True},
        {"triton": "3.10.0"},
        {"candidates": (FAST, SLOW)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_the_key_has_a_choice_of_its_own(change, tmp_path):
    Process(tmp_path).choose()
    process = Process(tmp_path)
    process.choose(replace(KEY, **change))
    assert process.measured


@pytest.mark.parametrize(
    "text",
    ["", '{"tiles": [64', "[]", '{"tiles": [64]}', '{"tiles": [1, 2, 3, 4]}', '{"tiles": [64, 16, 4, 2]}'],
    ids=["empty", "cut short", "no object", "half a choice", "no tiles", "no candidate"],
)
def test_a_damaged_or_foreign_file_is_measured_again_with_one_warning(text, tmp_path):
    Process(tmp_path).choose()
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    process = Process(tmp_path)
    with pytest.warns(UserWarning, match="is not used, measuring again") as warned:
        assert [process.choose() for _ in range(2)] == [FAST, FAST]
    assert len(warned) == 1 and len(process.measured) == 3
    assert json.loads(file.read_text())["tiles"] == [64, 64, 4, 2]


def test_the_first_of_several_ranks_to_finish_decides(tmp_path):
    first = Process(tmp_path)
    second = Process(tmp_path, {SLOW: 1.0, FAST: 2.0, BROKEN: 3.0}, meanwhile=first.choose)
    assert second.choose() == first.choose() == FAST
    assert len(first.measured) == len(second.measured) == 3
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_folder_that_cannot_be_written_causes_a_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="is not kept"):
        assert Process(tmp_path / "file" / "folder").choose() == FAST


def test_choices_are_stored_in_the_folder_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "MEGATRON_S2_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "megatron_s2"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "megatron_s2"
    monkeypatch.setenv("MEGATRON_S2_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    with warnings.catch_warnings(action="error"):
        Process(None).choose()
    assert len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("capability", [8, 9, 10])
@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_few_candidates_and_the_shipped_one_is_first(kernel, capability, head_dim, element_size):
    tiles = candidates(kernel, capability, head_dim, element_size)
    assert tiles[0] == getattr(tuning_for(capability, head_dim, element_size), kernel)
    assert 1 <= len(tiles) == len(set(tiles)) <= 3
