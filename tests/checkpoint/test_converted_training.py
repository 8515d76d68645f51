"""A converted checkpoint goes on in training, with its printed flags, under every parallel layout alike."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import eval_loss
import numpy as np
import pytest
import torch
from hf_models import convert, make_model, store, weights
from megatron_run import MOCK_DATA, ROOT, Run, assert_same_losses, train_all
from transformers import AutoTokenizer
from waiting import PATIENCE

from megatron_s2.data.documents import Corpus
from megatron_s2.data.tokenizer import train_tokenizer

S2 = ("--s2-attention", "--s2-block-size", "16", "--s2-local-blocks", "2", "--s2-vert-stride", "3")
# One is dense, one sparse; of one the output layer is the embedding, which pipeline stages share.
MODELS = {"llama": ("llama3.1", ()), "qwen2": ("qwen2, tied", S2)}
LAYOUTS = {
    "TP2": "--tensor-model-parallel-size 2",
    "PP2": "--pipeline-model-parallel-size 2",
    "DP2": "--use-distributed-optimizer",
}
CASES = [*((model, layout) for model in MODELS for layout in LAYOUTS), ("qwen2", "CP2")]
# Those whose first loss is compared with that of scripts/eval_loss.py, and their tokens; the vocabulary of
# one is padded to 256.
JUDGED = {"tied": ("llama3.2, tied", (), 256), "mistral": ("mistral", S2, 256), "padded": ("qwen2", (), 250)}
LENGTH = 128
TOKENS = 270  # a vocabulary that Megatron pads to 384
TEN_STEPS = "--eval-iters 0 --load"
# Losses are compared on data without padding: Megatron (0.19.2) masks in all samples what is padding in the
# first that a rank reads, which is another one in each layout.
NO_PADDING = "--tokenizer-type NullTokenizer"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("converted")


def add_tokenizer(source: Path, directory: Path) -> None:
    (directory / "text").mkdir()
    (directory / "text" / "one.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 50)
    trained = train_tokenizer(Corpus(str(directory / "text")), TOKENS, str(directory / "tokenizer"))
    shutil.copytree(trained.directory, source, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def flags(directory) -> dict[str, str]:
    """What resumes each model: `--load` and the words of `resume.args`."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": TOKENS}
    found = {}
    for name, (family, s2) in MODELS.items():
        source = make_model(directory / f"{name}-hf", family, **sizes)
        if name == "qwen2":
            add_tokenizer(source, directory)
        checkpoint = directory / f"{name}-megatron"
        convert("hf-to-megatron", source, checkpoint, *s2)
        words = (checkpoint / "resume.args").read_text().split()
        found[name] = f"{TEN_STEPS} {checkpoint} {' '.join(words)}"
    return found


@pytest.fixture(scope="module")
def data(directory) -> Path:
    """One window of tokens again and again, so that every sample of a training and of an evaluation is it."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    window = np.random.default_rng(3).integers(0, 250, LENGTH).tolist()
    builder = IndexedDatasetBuilder(str(directory / "window.bin"), dtype=np.int32)
    builder.add_document(window * 8, [LENGTH * 8])
    builder.finalize(str(directory / "window.idx"))
    return directory / "window"


def loss_of_hugging_face(model: Path, data: Path) -> float:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        eval_loss.main(["--hf", str(model), "--data-path", str(data), "--seq-length", str(LENGTH)])
    return float(re.match(r"loss (\S+),", said.getvalue())[1])


def loss_of_checkpoint(checkpoint: Path, data: Path) -> float:
    """In a process of its own: Megatron's global state is left behind there."""
    words = ["--load", checkpoint, "--data-path", data, "--seq-length", str(LENGTH)]
    command = [sys.executable, ROOT / "scripts" / "eval_loss.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return float(re.match(r"loss (\S+),", done.stdout)[1])


@pytest.fixture(scope="module")
def judged(directory, data) -> dict[str, tuple[float, str]]:
    """The loss that is said of each model of `JUDGED`, and the flags that train it on the same data. That of
    the padded one is said of the checkpoint, because a training counts padding and transformers has none."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    found = {}
    for name, (family, s2, tokens) in JUDGED.items():
        source = make_model(directory / f"{name}-hf", family, vocab_size=tokens, **sizes)
        checkpoint, back = directory / f"{name}-judged", directory / f"{name}-back"
        convert("hf-to-megatron", source, checkpoint, *s2)
        convert("megatron-to-hf", checkpoint, back)
        is_padded = name == "padded"
        loss = loss_of_checkpoint(checkpoint, data) if is_padded else loss_of_hugging_face(back, data)
        resume = (checkpoint / "resume.args").read_text()
        of_data = f"--data-path {data} --split 100,0,0 --train-iters 3"
        found[name] = loss, f"{TEN_STEPS} {checkpoint} {resume} {NO_PADDING} {of_data}"
    return found


@pytest.fixture(scope="module")
def mixed(directory) -> str:
    """What trains a model of bfloat16 matrices and float32 norms for one step, and saves it."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": TOKENS}
    source = make_model(directory / "mixed-hf", "qwen3", torch.bfloat16, **sizes)
    store(source, {name: norm.float() for name, norm in weights(source).items() if norm.dim() == 1})
    convert("hf-to-megatron", source, directory / "mixed-megatron")
    words = (directory / "mixed-megatron" / "resume.args").read_text()
    saves = f"--save {directory / 'mixed-trained'} --save-interval 1 --train-iters 1"
    return f"{TEN_STEPS} {directory / 'mixed-megatron'} {words} {saves} {MOCK_DATA}"


@pytest.fixture(scope="module")
def one_rank(directory, flags, judged, mixed) -> dict[str, Run]:
    loads = f"{TEN_STEPS} {directory / 'llama-megatron'}"
    runs = {
        "llama": flags["llama"],
        "qwen2": f"{flags['qwen2']} {NO_PADDING} --save {directory / 'trained'} --save-interval 10",
        "its tokenizer": f"{flags['qwen2']} --train-iters 2",
        "finetune": f"{flags['llama']} --finetune",
        "from its arguments": f"{loads} --use-checkpoint-args --vocab-size {TOKENS} --norm-epsilon 1e-6 "
        "--use-rope-scaling",
        "dense": flags["qwen2"].replace("--s2-attention", "").partition("--s2-")[0],
        "another stride": f"{flags['qwen2']} --s2-vert-stride 8",
    }
    runs = {name: f"{MOCK_DATA} {words}" for name, words in runs.items()}
    runs |= {f"{name} TP1": words for name, (_, words) in judged.items()}
    return train_all(directory / "one", runs | {"mixed": mixed}, model="", data="")


@pytest.fixture(scope="module")
def two_ranks(directory, flags, judged) -> dict[str, Run]:
    layouts = LAYOUTS | {"CP2": "--context-parallel-size 2"}
    runs = {f"{model} {layout}": f"{flags[model]} {NO_PADDING} {layouts[layout]}" for model, layout in CASES}
    runs["qwen2 TP2"] += f" --save {directory / 'trained-by-two'} --save-interval 10"
    runs = {name: f"{MOCK_DATA} {words}" for name, words in runs.items()}
    for name, (_, words) in judged.items():
        runs |= {f"{name} {layout}": f"{words} {LAYOUTS[layout]}" for layout in LAYOUTS}
    return train_all(directory / "two", runs, ranks=2, model="", data="")


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_losses_are_the_same_in_every_layout(one_rank, two_ranks, model, layout):
    assert_same_losses(two_ranks[f"{model} {layout}"], one_rank[model], 1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_falls(one_rank, model):
    losses = one_rank[model].losses
    assert losses[10] < losses[1] - 0.4


@pytest.mark.parametrize("layout", ["TP1", *LAYOUTS])
@pytest.mark.parametrize("model", JUDGED)
def test_the_first_loss_is_that_of_an_evaluation(judged, one_rank, two_ranks, model, layout):
    said, _ = judged[model]
    losses = (one_rank | two_ranks)[f"{model} {layout}"].losses
    assert losses[1] == pytest.approx(said, abs=1e-4)
    assert losses[3] < losses[2] < losses[1] - 0.01


def test_padding_makes_a_difference_that_these_tests_see(directory, judged, data):
    counted, _ = judged["padded"]
    assert counted > loss_of_hugging_face(directory / "padded-back", data) + 1e-3


def test_a_training_saves_all_weights_in_its_own_dtype(directory, one_rank):
    assert one_rank["mixed"].status == 0
    convert("megatron-to-hf", directory / "mixed-trained", directory / "mixed-back")
    assert {tensor.dtype for tensor in weights(directory / "mixed-back").values()} == {torch.bfloat16}


def test_the_tokenizer_is_the_models_own(one_rank):
    run = one_rank["its tokenizer"]
    assert "tokenizer_type .................................. HuggingFaceTokenizer" in run.output
    assert run.losses[1] == pytest.approx(one_rank["qwen2"].losses[1], rel=0.1)


@pytest.mark.parametrize("run", ["finetune", "from its arguments"])
def test_other_ways_to_load_start_from_the_same_weights(one_rank, run):
    assert one_rank[run].losses == one_rank["llama"].losses


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("dense", "--s2-attention not given: the checkpoint was trained with it"),
        ("another stride", "--s2-vert-stride 8: the checkpoint was trained with 3"),
    ],
)
def test_another_attention_needs_finetune(one_rank, run, message):
    assert one_rank[run].status == 2
    assert f"error: {message}" in one_rank[run].output


def test_what_was_trained_is_exported_whatever_layout_saved_it(directory, one_rank, two_ranks):
    for name in ("trained", "trained-by-two"):
        convert("megatron-to-hf", directory / name, directory / f"{name}-hf")
        assert AutoTokenizer.from_pretrained(directory / f"{name}-hf").vocab_size <= TOKENS
    one, two, before = (weights(directory / f"{name}-hf") for name in ("trained", "trained-by-two", "qwen2"))
    assert one.keys() == two.keys() == before.keys()
    for name, tensor in one.items():
        assert tensor.shape == before[name].shape
        assert (tensor - before[name]).abs().max() > 1e-4, f"{name} was not trained"
        assert (tensor - two[name]).abs().max() < 1e-3, name
