"""scripts/eval_loss.py computes the mean loss of a dataset, which equals that of the first training step."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_loss import main
from hf_models import convert, make_model
from megatron_run import ROOT, call_in_fork, train_all
from safetensors.torch import load_file, save_file
from selection import exhaustive
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from waiting import PATIENCE

from megatron_s2.data.command import run_command
from megatron_s2.data.token_ids import write_record
from megatron_s2.generation import evaluation
from megatron_s2.generation.evaluation import Evaluation, evaluate, load_hugging_face, windows
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file

S2 = ("--s2-attention", "--s2-block-size", "16", "--s2-local-blocks", "2", "--s2-vert-stride", "3")
LENGTH, WINDOWS = 128, 8


def write_documents(prefix: Path, documents: list[list[int]]) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def run_in_fork(*words: object) -> tuple[str, str]:
    """Returns the last line and stderr of the command, run in a fork because of Megatron's global state."""
    done = call_in_fork("eval_loss", "main", [*map(str, words)])
    return done.out.splitlines(keepends=True)[-1], done.err


def loss_of(printed: str) -> float:
    found = re.fullmatch(rf"loss (\S+), perplexity \S+, over {WINDOWS * LENGTH} tokens\n", printed)
    return float(found[1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def data(directory) -> Path:
    """One document of complete windows, so that one epoch of training consists of them, in any order."""
    tokens = np.random.default_rng(3).integers(0, 250, LENGTH * WINDOWS + 1)
    return write_documents(directory / "one", [tokens.tolist()])


@pytest.fixture(scope="module", params=["sparse", *exhaustive("dense")])
def model(request, directory) -> tuple[Path, Path]:
    """Hugging Face directory and checkpoint of a model whose vocabulary needs no padding, which Megatron
    would count."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": LENGTH, "vocab_size": 256}
    name = request.param
    source = make_model(directory / f"{name}-hf", "qwen3", **sizes)
    checkpoint = directory / f"{name}-megatron"
    convert("hf-to-megatron", source, checkpoint, *(S2 if name == "sparse" else ()))
    if name == "sparse":
        convert("megatron-to-hf", checkpoint, directory / "sparse-back")
        source = directory / "sparse-back"
    return source, checkpoint


def test_a_conversion_and_the_first_training_step_agree(model, data, tmp_path, capsys):
    source, checkpoint = model
    data_flags = ("--data-path", str(data), "--seq-length", str(LENGTH), "--micro-batch-size", "3")
    out, err = run_in_fork("--load", checkpoint, *data_flags)
    assert err == ""
    loss = loss_of(out)
    main(["--hf", str(source), *data_flags])
    assert loss_of(capsys.readouterr().out) == pytest.approx(loss, rel=1e-5)
    flags = f"--load {checkpoint} {(checkpoint / 'resume.args').read_text()} --tokenizer-type NullTokenizer"
    flags += f" --train-iters 1 --micro-batch-size 2 --global-batch-size {WINDOWS} --eval-iters 0"
    split = f"--data-path {data} --split 100,0,0"
    assert train_all(tmp_path, {"run": flags}, model="", data=split)["run"].losses == {
        1: pytest.approx(loss, rel=1e-4)
    }


@pytest.mark.exhaustive
def test_the_command_prints_only_the_loss(directory, data):
    source = make_model(directory / "alone-hf", "qwen3", max_position_embeddings=LENGTH, vocab_size=256)
    convert("hf-to-megatron", source, directory / "alone")
    words = ["--load", directory / "alone", "--data-path", data, "--seq-length", str(LENGTH)]
    command = [sys.executable, ROOT / "scripts" / "eval_loss.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert loss_of(done.stdout) > 0


def test_notes_about_annealing_and_padding(directory, data):
    source = make_model(directory / "odd-hf", "qwen3", num_hidden_layers=2, vocab_size=250)
    convert("hf-to-megatron", source, directory / "odd", *S2, "--s2-anneal-steps", "10")
    _, err = run_in_fork("--load", directory / "odd", "--data-path", data, "--seq-length", LENGTH)
    assert err.splitlines() == [
        "note: step 0 of --s2-anneal-steps 10: attention has stride 1 and window 8, not yet stride 3 and "
        "window 2",
        "note: the loss counts 6 rows of vocabulary padding, as its training does and --hf does not",
    ]


def test_patterns_are_judged_on_a_dense_model(directory, data, capsys):
    source = make_model(
        directory / "judged", "llama2", num_hidden_layers=2, num_key_value_heads=2, vocab_size=256
    )
    narrow = S2Settings(2, 2, 16, local_blocks=2, vert_stride=(0, 3), sink_blocks=1)
    files = {"all.json": S2Settings(2, 2, 16, vert_stride=1), "narrow.json": narrow}
    for name, settings in files.items():
        write_pattern_file(directory / name, settings)
    paths = [str(directory / name) for name in files]
    words = ["--hf", str(source), "--data-path", str(data), "--seq-length", str(LENGTH)]
    main([*words, *(word for path in paths for word in ("--s2-pattern-file", path))])
    heading, *rows, over = capsys.readouterr().out.splitlines()
    assert re.split("  +", heading)[1:] == ["keys and values", "pairs", "loss", "over dense", "perplexity"]
    assert over == f"over {LENGTH * WINDOWS} tokens in windows of {LENGTH}"
    found = {name: cells for name, *cells in map(str.split, rows)}
    assert list(found) == ["dense", *paths], "the dense model first"
    main(words)
    dense = loss_of(capsys.readouterr().out)
    assert found["dense"][:3] == ["100.0%", "100.0%", f"{dense:.4f}"]
    assert float(found[paths[0]][2]) == pytest.approx(dense, abs=2e-4)
    kept = sum(sum(narrow.pattern(n).kv_tokens(LENGTH)) for n in (1, 2)) / (4 * LENGTH)
    assert found[paths[1]][0] == f"{kept:.1%}"

    convert("hf-to-megatron", source, directory / "narrow", "--s2-attention", "--s2-pattern-file", paths[1])
    convert("megatron-to-hf", directory / "narrow", directory / "narrow-hf")
    words[1] = str(directory / "narrow-hf")
    main(words)
    exported = loss_of(capsys.readouterr().out)
    assert float(found[paths[1]][2]) == pytest.approx(exported, abs=1e-4)
    assert abs(exported - dense) > 1e-3
    for flags, message in (
        (words, f"--s2-pattern-file {paths[1]}: must not be given with --hf {words[1]}"),
        (["--load", *words[1:]], "--s2-pattern-file: must be given with --hf"),
    ):
        assert run_command(main, [*flags, "--s2-pattern-file", paths[1]]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_windows_are_consecutive_across_documents(tmp_path):
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
    reference = AutoModelForCausalLM.from_pretrained(source)
    (tokens,) = windows(data, LENGTH, samples=3, batch=3)
    with torch.no_grad():
        expected = reference(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    losses = -expected.gather(-1, tokens[:, 1:, None])
    expected = losses.mean().item()
    model = load_hugging_face(source)
    found = evaluate(model.token_losses, windows(data, LENGTH, samples=3))
    assert found.tokens == 3 * LENGTH and found.loss == pytest.approx(expected, rel=1e-6)
    assert found.by_position == (found.loss,)
    in_quarters = evaluate(model.token_losses, windows(data, LENGTH, samples=3, batch=2), position_parts=4)
    assert in_quarters.loss == pytest.approx(expected, rel=1e-6)
    assert in_quarters.by_position == pytest.approx([q.mean().item() for q in losses.chunk(4, 1)], rel=1e-6)
    monkeypatch.setattr(evaluation, "LOGITS_CHUNK", 50)
    in_chunks = evaluate(model.token_losses, windows(data, LENGTH, samples=3))
    assert in_chunks.loss == pytest.approx(expected, rel=1e-6)


def test_tokens_of_another_tokenizer_are_refused_before_the_evaluation(directory, data, capsys, monkeypatch):
    source = make_model(directory / "small", "llama2", vocab_size=200)
    evaluated = []
    monkeypatch.setattr(evaluation, "_check_tokens", lambda *tokens: evaluated.append(tokens))
    words = ("--hf", str(source), "--data-path", str(data), "--seq-length", str(LENGTH))
    assert run_command(main, words) == 2
    assert capsys.readouterr().err == (
        f"error: --data-path {data}: has token id 249; the model has 200 tokens (--hf {source}); give data "
        "that was tokenized with the model's tokenizer\n"
    )
    assert not evaluated


def test_tokens_that_no_record_tells_of_are_refused_by_window(directory, data, tmp_path, capsys):
    source = make_model(directory / "smaller", "llama2", vocab_size=200)
    prefix = tmp_path / "data"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", f"{prefix}{suffix}")
    write_record(f"{prefix}.ids", 3, Path(f"{prefix}.bin").stat().st_size)
    words = ("--hf", str(source), "--data-path", str(prefix), "--seq-length", str(LENGTH))
    assert run_command(main, words) == 2
    expected = r"error: --data-path: has token id 2\d\d; the model has 200 tokens \(--hf .*\); give data .*\n"
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
def test_damaged_data_is_refused(data, tmp_path, capsys, suffix, damage, message):
    for each in (".bin", ".idx"):
        old = Path(f"{data}{each}").read_bytes()
        (tmp_path / f"one{each}").write_bytes(damage(old) if each == suffix else old)
    words = ("--hf", "/nowhere", "--data-path", str(tmp_path / "one"), "--seq-length", str(LENGTH))
    assert run_command(main, words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_windows_beyond_the_positions_are_noted(directory, data, capsys):
    source = make_model(directory / "short", "llama2", vocab_size=256, max_position_embeddings=64)
    main(["--hf", str(source), "--data-path", str(data), "--seq-length", str(LENGTH), "--samples", "1"])
    assert capsys.readouterr().err.startswith(f"note: {LENGTH} tokens in a row: the model has 64 positions")


def test_another_architecture_is_refused(directory, data, capsys):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)).save_pretrained(directory / "gpt2")
    words = ("--hf", str(directory / "gpt2"), "--data-path", str(data), "--seq-length", str(LENGTH))
    assert run_command(main, words) == 2
    assert "model_type gpt2: must be one of llama, mistral," in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickled"])
def test_an_incomplete_model_is_refused(directory, tmp_path, data, capsys, damage):
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


def test_the_printed_line():
    found = Evaluation(math.log(2), 16, 8, (0.5, 1.25))
    assert str(found) == "loss 0.693147, perplexity 2.0000, over 16 tokens"
    assert found.position_table() == "tokens    loss\n1 to 4  0.5000\n5 to 8  1.2500"
    assert "perplexity inf" in str(Evaluation(1e4, 1, 1, (1e4,)))


def test_the_command_prints_the_loss_by_position_first(directory, data, capsys):
    source = make_model(directory / "by-position", "llama2", vocab_size=256)
    words = ["--hf", str(source), "--data-path", str(data), "--seq-length", str(LENGTH)]
    main([*words, "--position-parts", "2"])
    heading, first, second, loss = capsys.readouterr().out.splitlines(keepends=True)
    assert heading.split() == ["tokens", "loss"]
    assert first.startswith("1 to 64") and second.startswith("65 to 128")
    mean = (float(first.split()[-1]) + float(second.split()[-1])) / 2
    assert loss_of(loss) == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hf", "/nowhere"], "--hf /nowhere: is not a directory with a config.json"),
        (["--load", "/nowhere"], "--load /nowhere: is not a directory"),
        (["--hf", "/nowhere", "--seq-length", "0"], "--seq-length 0: must be >= 1"),
        (
            ["--hf", "/nowhere", "--position-parts", "3"],
            "--position-parts 3: must be >= 1 and divide --seq-length 128; give another",
        ),
        (
            ["--hf", "/nowhere", "--position-parts", "2", "--s2-pattern-file", "a.json"],
            "--position-parts: must not be given with --s2-pattern-file; leave one out",
        ),
        (["--hf", "/nowhere", "--samples", "9"], "has 8 windows of 128 tokens, not 9"),
        (
            ["--hf", "/nowhere", "--data-path", "/no/data"],
            "--data-path /no/data: there is not a file /no/data.bin",
        ),
    ],
)
def test_bad_input_is_refused(data, words, message, capsys):
    status = run_command(main, ["--data-path", str(data), "--seq-length", str(LENGTH), *words])
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", printed.err)
