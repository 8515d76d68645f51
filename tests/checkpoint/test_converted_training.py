"""A converted checkpoint trains with its printed flags, alike in every parallel layout."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import eval_loss
import numpy as np
import pytest
import torch
from hf_models import convert, make_model, store, weights
from megatron_run import STEPS, Runs, assert_same_losses, call_in_fork, train_all
from selection import exhaustive, thinned
from transformers import AutoTokenizer

from megatron_s2.data.documents import Corpus
from megatron_s2.data.tokenizer import train_tokenizer

S2 = ("--s2-attention", "--s2-block-size", "16", "--s2-local-blocks", "2", "--s2-vert-stride", "3")
# A dense model, and sparse ones: one whose output layer is tied to the embedding, which pipeline stages
# share, and two with experts, in each layer or not.
MODELS = {
    "llama": ("llama3.1", ()),
    "qwen2": ("qwen2, tied", S2),
    "mixtral": ("mixtral", S2),
    "qwen3-moe": ("qwen3 moe, dense layers", S2),
}
WITH_EXPERTS = ("mixtral", "qwen3-moe")
LAYOUTS = {
    "TP2": "--tensor-model-parallel-size 2 --sequence-parallel",  # without it, no experts
    "PP2": "--pipeline-model-parallel-size 2",
    "DP2": "--use-distributed-optimizer",
}
EXPERT_PARALLEL = {
    "EP2": "--expert-model-parallel-size 2",
    "EP2 by all-to-all": "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
}
CASES = [
    *((model, layout) for model in MODELS for layout in LAYOUTS),
    ("qwen2", "CP2"),
    *((model, layout) for model in WITH_EXPERTS for layout in EXPERT_PARALLEL),
]
IN_DEFAULT_SUITE = [("qwen2", "TP2"), ("mixtral", "EP2")]
# Models whose first loss is compared with that of scripts/eval_loss.py: family, S2 flags and vocabulary size,
# of which 250 is padded to 256.
EVALUATED = {
    "tied": ("llama3.2, tied", (), 256),
    "mistral": ("mistral", S2, 256),
    "padded": ("qwen2", (), 250),
    "experts": ("qwen3 moe, dense layers", S2, 256),
    "phi3": ("phi3, partial and tied", S2, 256),
    "yarn": ("llama, yarn", S2, 256),
}
# Models and the layouts in which their first loss is compared.
EVALUATED_IN = [
    ("tied", "PP2"),
    ("mistral", "DP2"),
    ("padded", "TP2"),
    ("experts", "TP2"),
    ("phi3", "TP2"),
    *((model, "TP1") for model in EVALUATED),
]
LENGTH = 128
VOCAB_SIZE = 270  # Megatron pads it to 384
TEN_STEPS = "--eval-iters 0 --load"
# Losses are compared on data without padding: Megatron (0.19.2) applies the loss mask of the first sample
# that a rank reads to all samples, and which sample that is depends on the layout.
NO_PADDING = "--tokenizer-type NullTokenizer"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("converted")


def add_tokenizer(source: Path, directory: Path) -> None:
    (directory / "text").mkdir()
    (directory / "text" / "one.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 50)
    trained = train_tokenizer(Corpus(str(directory / "text")), VOCAB_SIZE, str(directory / "tokenizer"))
    shutil.copytree(trained.directory, source, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def flags(directory) -> dict[str, str]:
    """Flags that resume each model: `--load` and the content of `resume.args`."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": VOCAB_SIZE}
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
    """The same window of tokens repeated, so that every sample of training and evaluation is that window."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    window = np.random.default_rng(3).integers(0, 250, LENGTH).tolist()
    builder = IndexedDatasetBuilder(str(directory / "window.bin"), dtype=np.int32)
    builder.add_document(window * 8, [LENGTH * 8])
    builder.finalize(str(directory / "window.idx"))
    return directory / "window"


def loss_in_transformers(model: Path, data: Path) -> float:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        eval_loss.main(["--hf", str(model), "--data-path", str(data), "--seq-length", str(LENGTH)])
    return float(re.match(r"loss (\S+),", printed.getvalue())[1])


def loss_of_checkpoint(checkpoint: Path, data: Path) -> float:
    """Runs in a fork, because Megatron's global state cannot be reset."""
    words = ["--load", str(checkpoint), "--data-path", str(data), "--seq-length", str(LENGTH)]
    return float(re.search(r"^loss (\S+),", call_in_fork("eval_loss", "main", words).out, re.M)[1])


@pytest.fixture(scope="module")
def evaluated(directory, data) -> dict[str, tuple[float, str]]:
    """Evaluated loss of each model of `EVALUATED`, and the flags that train it on the same data.

    The padded model is evaluated from its Megatron checkpoint, because training counts the padding of the
    vocabulary, which transformers does not have.
    """
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    found = {}
    for name, (family, s2, vocab_size) in EVALUATED.items():
        source = make_model(directory / f"{name}-hf", family, vocab_size=vocab_size, **sizes)
        checkpoint, back = directory / f"{name}-evaluated", directory / f"{name}-back"
        convert("hf-to-megatron", source, checkpoint, *s2)
        convert("megatron-to-hf", checkpoint, back)
        is_padded = name == "padded"
        loss = loss_of_checkpoint(checkpoint, data) if is_padded else loss_in_transformers(back, data)
        resume = (checkpoint / "resume.args").read_text()
        data_flags = f"--data-path {data} --split 100,0,0 --train-iters 3"
        found[name] = loss, f"{TEN_STEPS} {checkpoint} {resume} {NO_PADDING} {data_flags}"
    return found


@pytest.fixture(scope="module")
def mixed(directory) -> str:
    """Flags that train a model of bfloat16 matrices and float32 norms for one step and save it."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": VOCAB_SIZE}
    source = make_model(directory / "mixed-hf", "qwen3", torch.bfloat16, **sizes)
    store(source, {name: norm.float() for name, norm in weights(source).items() if norm.dim() == 1})
    convert("hf-to-megatron", source, directory / "mixed-megatron")
    words = (directory / "mixed-megatron" / "resume.args").read_text()
    saves = f"--save {directory / 'mixed-trained'} --save-interval 1 --train-iters 1"
    return f"{TEN_STEPS} {directory / 'mixed-megatron'} {words} {saves}"


@pytest.fixture(scope="module")
def one_rank(directory, flags) -> Runs:
    loads = f"{TEN_STEPS} {directory / 'llama-megatron'}"
    return Runs(
        directory / "one",
        {
            "llama": flags["llama"],
            "qwen2": f"{flags['qwen2']} {NO_PADDING} --save {directory / 'trained'} --save-interval 10",
            "mixtral": f"{flags['mixtral']} --save {directory / 'mixtral-trained'} --save-interval 10",
            "qwen3-moe": flags["qwen3-moe"],
            "tokenizer": f"{flags['qwen2']} --train-iters 2",
            "finetune": f"{flags['llama']} --finetune",
            "checkpoint args": f"{loads} --use-checkpoint-args --vocab-size {VOCAB_SIZE} --norm-epsilon 1e-6 "
            "--use-rope-scaling",
            "dense": flags["qwen2"].replace("--s2-attention", "").partition("--s2-")[0],
            "another stride": f"{flags['qwen2']} --s2-vert-stride 8",
        },
        model="",
    )


@pytest.fixture(scope="module")
def two_ranks(directory, flags) -> Runs:
    layouts = LAYOUTS | EXPERT_PARALLEL | {"CP2": "--context-parallel-size 2"}
    runs = {f"{model} {layout}": f"{flags[model]} {NO_PADDING} {layouts[layout]}" for model, layout in CASES}
    runs["qwen2 TP2"] += f" --save {directory / 'trained-by-two'} --save-interval 10"
    runs["mixtral EP2"] += f" --save {directory / 'mixtral-by-two'} --save-interval 10"
    return Runs(directory / "two", runs, ranks=2, model="")


@pytest.mark.parametrize(("model", "layout"), thinned(CASES, IN_DEFAULT_SUITE.__contains__))
def test_losses_are_the_same_in_every_layout(one_rank, two_ranks, model, layout):
    assert_same_losses(two_ranks[f"{model} {layout}"], one_rank[model], 1e-4)


@pytest.mark.parametrize("model", thinned(MODELS, lambda model: model != "qwen3-moe"))
def test_the_loss_falls(one_rank, model):
    losses = one_rank[model].losses
    assert losses[STEPS] < losses[1] - 0.4


@pytest.mark.exhaustive
@pytest.mark.parametrize(("model", "layout"), EVALUATED_IN)
def test_the_first_loss_equals_the_evaluated_loss(evaluated, tmp_path, model, layout):
    expected, words = evaluated[model]
    ranks, flags = (1, words) if layout == "TP1" else (2, f"{words} {LAYOUTS[layout]}")
    losses = train_all(tmp_path, {"run": flags}, ranks, model="", data="")["run"].losses
    assert losses[1] == pytest.approx(expected, abs=1e-4)
    assert losses[3] < losses[2] < losses[1] - 0.01


@pytest.mark.exhaustive
def test_padding_changes_the_loss(directory, evaluated, data):
    with_padding, _ = evaluated["padded"]
    assert with_padding > loss_in_transformers(directory / "padded-back", data) + 1e-3


def test_training_saves_all_weights_in_one_dtype(directory, mixed):
    assert train_all(directory / "one", {"mixed": mixed}, model="")["mixed"].status == 0
    convert("megatron-to-hf", directory / "mixed-trained", directory / "mixed-back")
    assert {tensor.dtype for tensor in weights(directory / "mixed-back").values()} == {torch.bfloat16}


def test_training_uses_the_tokenizer_of_the_model(one_rank):
    run = one_rank["tokenizer"]
    assert "tokenizer_type .................................. HuggingFaceTokenizer" in run.output
    assert run.losses[1] == pytest.approx(one_rank["qwen2"].losses[1], rel=0.1)


@pytest.mark.parametrize("run", ["checkpoint args", *exhaustive("finetune")])
def test_other_ways_to_load_give_the_same_losses(one_rank, run):
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


@pytest.mark.parametrize(
    ("model", "layout", "names"),
    [
        ("qwen2", "TP2", ("trained", "trained-by-two")),
        ("mixtral", "EP2", ("mixtral-trained", "mixtral-by-two")),
    ],
)
def test_trained_checkpoints_of_every_layout_are_exported(
    directory, one_rank, two_ranks, model, layout, names
):
    assert one_rank[model].status == two_ranks[f"{model} {layout}"].status == 0
    for name in names:
        convert("megatron-to-hf", directory / name, directory / f"{name}-hf")
        if model == "qwen2":
            assert AutoTokenizer.from_pretrained(directory / f"{name}-hf").vocab_size <= VOCAB_SIZE
    one, two, before = (weights(directory / f"{name}-hf") for name in (*names, model))
    assert one.keys() == two.keys() == before.keys()
    for name, tensor in one.items():
        assert tensor.shape == before[name].shape
        assert (tensor - before[name]).abs().max() > 1e-4, f"{name} was not trained"
        assert (tensor - two[name]).abs().max() < 1e-3, name
