"""The loss of a data set, by scripts/eval_loss.py: the plain mean, and that of a training's first step."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_loss import main
from hf_models import convert, make_model
from megatron_run import ROOT, train_all
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from waiting import PATIENCE

from megatron_s2.data.command import run_command
from megatron_s2.generation import evaluation
from megatron_s2.generation.evaluation import Evaluation, evaluate, hugging_face_model, windows

S2 = ("--s2-attention", "--s2-block-size", "16", "--s2-local-blocks", "2", "--s2-vert-stride", "3")
LENGTH, WINDOWS = 128, 8
LAYOUTS = {
    "TP1": "",
    "TP2": "--tensor-model-parallel-size 2",
    "PP2": "--pipeline-model-parallel-size 2",
    "DP2": "--use-distributed-optimizer",
}


def write_documents(prefix: Path, documents: list[list[int]]) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def in_a_process(*words: object) -> tuple[str, str]:
    """stdout and stderr of the command; a checkpoint's model leaves Megatron's global state behind."""
    command = [sys.executable, str(ROOT / "scripts" / "eval_loss.py"), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def loss_of(printed: str) -> float:
    found = re.fullmatch(rf"loss (\S+), perplexity \S+, over {WINDOWS * LENGTH} tokens\n", printed)
    return float(found[1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def data(directory) -> Path:
    """One document of whole windows, so that an epoch of training sees just these, in any order."""
    tokens = np.random.default_rng(3).integers(0, 250, LENGTH * WINDOWS + 1)
    return write_documents(directory / "one", [tokens.tolist()])


@pytest.fixture(scope="module", params=["dense", "sparse"])
def model(request, directory) -> tuple[Path, Path]:
    """Hugging Face directory and checkpoint; the vocabulary needs no padding, which Megatron would count."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": LENGTH, "vocab_size": 256}
    name = request.param
    source = make_model(directory / f"{name}-hf", "qwen3", **sizes)
    checkpoint = directory / f"{name}-megatron"
    convert("hf-to-megatron", source, checkpoint, *(S2 if name == "sparse" else ()))
    if name == "sparse":
        convert("megatron-to-hf", checkpoint, directory / "sparse-back")
        source = directory / "sparse-back"
    return source, checkpoint


def test_both_sides_of_a_conversion_and_the_first_step_of_training_agree(model, data, tmp_path, capsys):
    source, checkpoint = model
    on = ("--data-path", str(data), "--seq-length", str(LENGTH), "--micro-batch-size", "3")
    out, err = in_a_process("--load", checkpoint, *on)
    assert err == ""
    loss = loss_of(out)
    main(["--hf", str(source), *on])
    assert loss_of(capsys.readouterr().out) == pytest.approx(loss, rel=1e-5)
    flags = f"--load {checkpoint} {(checkpoint / 'resume.args').read_text()} --tokenizer-type NullTokenizer"
    flags += f" --train-iters 1 --micro-batch-size 2 --global-batch-size {WINDOWS} --eval-iters 0"
    of_data = f"--data-path {data} --split 100,0,0"
    for ranks in (1, 2):
        chosen = {name: f"{flags} {more}" for name, more in LAYOUTS.items() if ranks == 1 + (name != "TP1")}
        for name, run in train_all(tmp_path / str(ranks), chosen, ranks, model="", data=of_data).items():
            assert run.losses == {1: pytest.approx(loss, rel=1e-4)}, name


def test_what_makes_a_loss_another_is_noted(directory, data):
    """Attention that is still being annealed, and padding of the vocabulary."""
    source = make_model(directory / "odd-hf", "qwen3", num_hidden_layers=2, vocab_size=250)
    convert("hf-to-megatron", source, directory / "odd", *S2, "--s2-anneal-steps", "10")
    _, err = in_a_process("--load", directory / "odd", "--data-path", data, "--seq-length", LENGTH)
    assert err.splitlines() == [
        "note: step 0 of --s2-anneal-steps 10: attention has stride 1 and window 8, not yet 3 and 2",
        "note: the loss counts 6 rows of vocabulary padding, as its training does and --hf does not",
    ]


def test_windows_follow_one_another_through_documents_of_any_length(tmp_path):
    stream = list(range(100))
    documents = [stream[:1], stream[1:40], [], stream[40:43], stream[43:]]
    prefix = write_documents(tmp_path / "text", [d for d in documents if d])
    batches = list(windows(prefix, 10, batch=4))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    rows = torch.cat(batches)
    assert rows.tolist() == [stream[10 * n : 10 * n + 11] for n in range(9)]
    assert torch.equal(torch.cat(list(windows(prefix, 10, samples=2))), rows[:2])


def test_the_loss_is_the_mean_over_tokens(directory, data, monkeypatch):
    source = make_model(directory / "plain", "llama2", vocab_size=256)
    network = AutoModelForCausalLM.from_pretrained(source)
    (tokens,) = windows(data, LENGTH, samples=3, batch=3)
    with torch.no_grad():
        expected = network(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    expected = -expected.gather(-1, tokens[:, 1:, None]).mean().item()
    model = hugging_face_model(source)
    found = evaluate(model.losses, windows(data, LENGTH, samples=3))
    assert found.tokens == 3 * LENGTH and found.loss == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(evaluation, "PIECE", 50)
    in_pieces = evaluate(model.losses, windows(data, LENGTH, samples=3))
    assert in_pieces.loss == pytest.approx(expected, rel=1e-6)


def test_tokens_of_another_tokenizer_are_refused(directory, data, capsys):
    source = make_model(directory / "small", "llama2", vocab_size=200)
    words = ("--hf", str(source), "--data-path", str(data), "--seq-length", str(LENGTH))
    assert run_command(main, words) == 2
    expected = r"error: --data-path: has token \d+, which is none of the model's 200\n"
    assert re.fullmatch(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".idx", lambda old: b"no index" + old[8:], "one.idx is damaged"),
        (".idx", lambda old: old[:30], "one.idx is damaged"),
        (".idx", lambda old: b"", "one.idx is empty"),
        (".bin", lambda old: b"", "one.bin is empty"),
        (".bin", lambda old: old[:-4], "one.bin is shorter than"),
    ],
)
def test_damaged_data_is_one_line(data, tmp_path, capsys, suffix, damage, message):
    for each in (".bin", ".idx"):
        old = Path(f"{data}{each}").read_bytes()
        (tmp_path / f"one{each}").write_bytes(damage(old) if each == suffix else old)
    words = ("--hf", "/nowhere", "--data-path", str(tmp_path / "one"), "--seq-length", str(LENGTH))
    assert run_command(main, words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_windows_beyond_the_models_positions_are_noted(directory, data, capsys):
    source = make_model(directory / "short", "llama2", vocab_size=256, max_position_embeddings=64)
    main(["--hf", str(source), "--data-path", str(data), "--seq-length", str(LENGTH), "--samples", "1"])
    assert capsys.readouterr().err.startswith(f"note: {LENGTH} tokens in a row: the model knows 64 positions")


def test_another_architecture_is_refused(directory, data, capsys):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)).save_pretrained(directory / "gpt2")
    words = ("--hf", str(directory / "gpt2"), "--data-path", str(data), "--seq-length", str(LENGTH))
    assert run_command(main, words) == 2
    assert "model_type gpt2: must be one of llama, mistral," in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickled"])
def test_a_model_that_is_not_whole_is_refused(directory, tmp_path, data, capsys, damage):
    source = make_model(tmp_path / "model", "llama2", vocab_size=256)
    weights = source / "model.safetensors"
    if damage == "missing":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        torch.save(load_file(weights), source / "pytorch_model.bin")
        weights.unlink()
    words = ("--hf", str(source), "--data-path", str(data), "--seq-length", str(LENGTH))
    assert run_command(main, words) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"error: --hf {source}: ")
    assert ("has no model.norm.weight" in err) is (damage == "missing")


def test_the_line_it_prints():
    assert str(Evaluation(math.log(2), 10)) == "loss 0.693147, perplexity 2.0000, over 10 tokens"
    assert "perplexity inf" in str(Evaluation(1e4, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hf", "/nowhere"], "--hf /nowhere: is no directory with a config.json"),
        (["--load", "/nowhere"], "--load /nowhere: is no directory"),
        (["--hf", "/nowhere", "--seq-length", "0"], "--seq-length 0: must be >= 1"),
        (["--hf", "/nowhere", "--samples", "9"], "has 8 windows of 128 tokens, not 9"),
        (
            ["--hf", "/nowhere", "--data-path", "/no/data"],
            "--data-path /no/data: there is no file /no/data.bin",
        ),
    ],
)
def test_bad_input_is_one_line(data, words, message, capsys):
    status = run_command(main, ["--data-path", str(data), "--seq-length", str(LENGTH), *words])
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", printed.err)
