"""A checkpoint goes on with the attention it was trained with, and `--spec` is checked like the flag."""

import pytest
from megatron_run import MOCK_DATA, Run, train_all

from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file

S2 = "--s2-attention --s2-block-size 16 --s2-local-blocks 2 --s2-vert-stride 3"
SPEC = "--spec user_specs small_s2"  # the same pattern


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    directory = tmp_path_factory.mktemp("runs")
    sparse, stock = directory / "checkpoint-sparse", directory / "checkpoint-stock"
    again = f"--load {sparse} --ckpt-step 5"
    # The pattern of S2, layer by layer; another one; and one for another model.
    same, other, larger = (directory / f"{name}.json" for name in ("same", "other", "larger"))
    write_pattern_file(same, S2Settings(2, 2, 16, 2, 3))
    write_pattern_file(other, S2Settings(2, 2, 16, 2, (3, 0)))
    write_pattern_file(larger, S2Settings(3, 2, 16, 2, 3))
    by_file, filed = "--s2-attention --s2-pattern-file", directory / "checkpoint-filed"
    return train_all(
        directory,
        {
            "whole": f"{S2} --save {sparse} --save-interval 5",
            "stock": f"--save {stock} --save-interval 5",
            "same": f"{again} {S2}",
            "from the checkpoint": f"{again} --use-checkpoint-args",
            "dense": again,
            "another stride": f"{again} {S2} --s2-vert-stride 8",
            "another layer dense": f"{again} {S2} --s2-dense-layers 1",
            "sinks": f"{again} {S2} --s2-learnable-sink",
            "another stride than the checkpoint's": f"{again} --use-checkpoint-args --s2-vert-stride 8",
            "sparse from stock": f"--load {stock} {S2}",
            "finetune": f"--load {stock} --finetune {S2}",
            "by file": f"{by_file} {same} --save {filed} --save-interval 5",
            "file from its checkpoint": f"--load {filed} --ckpt-step 5 --use-checkpoint-args",
            "flags from a file's checkpoint": f"--load {filed} --ckpt-step 5 {S2}",
            "another file": f"--load {filed} --ckpt-step 5 {by_file} {other}",
            "file of another model": f"{by_file} {larger}",
            "spec": f"{SPEC}",
            "spec, masked": f"{SPEC} --reset-attention-mask",
            "spec, windowed": f"{SPEC} --window-size 16,0",
            "spec, flash decode": f"{SPEC} --flash-decode",
            "spec, dropout": f"{SPEC} --attention-dropout 0.1",
            "no such spec": "--spec nowhere at_all",
            "no GPU": f"{S2} --s2-backend triton",
        },
        data=MOCK_DATA,
    )


def test_a_file_trains_as_the_flags_that_it_says(runs):
    assert runs["by file"].losses == runs["whole"].losses


@pytest.mark.parametrize(
    "run",
    ["same", "from the checkpoint", "file from its checkpoint", "flags from a file's checkpoint"],
)
def test_the_same_attention_continues_bit_for_bit(runs, run):
    later = {step: loss for step, loss in runs["whole"].losses.items() if step > 5}
    assert runs[run].losses == later


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("dense", "--s2-attention not given: the checkpoint was trained with it"),
        ("another stride", "--s2-vert-stride 8: the checkpoint was trained with 3"),
        ("another layer dense", "--s2-dense-layers (1,): the checkpoint was trained with ()"),
        (
            "another file",
            "--s2-pattern-file: layer 1: window 2, sinks 0, strides 3 0, phases 0 0: the checkpoint was "
            "trained with window 2, sinks 0, strides 3 3, phases 0 1; give the same, or --finetune",
        ),
        ("file of another model", "--s2-pattern-file /"),
        ("sinks", "--softmax-type learnable: the checkpoint was trained with vanilla"),
        ("another stride than the checkpoint's", "--s2-vert-stride 8: the checkpoint was trained with 3"),
        ("sparse from stock", "--s2-attention given: the checkpoint was trained without it"),
        ("spec, masked", f"--reset-attention-mask: must not be set with {SPEC}"),
        ("spec, windowed", f"--window-size: must not be set with {SPEC}"),
        ("spec, flash decode", f"--flash-decode: must not be set with {SPEC}"),
        ("spec, dropout", f"--attention-dropout 0.1: must be 0 with {SPEC}"),
        ("no GPU", "--s2-backend triton: needs a GPU"),
        ("no such spec", "--spec nowhere at_all: cannot be imported"),
    ],
)
def test_another_attention_is_refused_in_one_line_before_anything_is_built(runs, run, message):
    lines = [line for line in runs[run].output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, runs[run].output
    assert lines[0].startswith(f"error: {message}")
    assert runs[run].status == 2
    assert "Traceback" not in runs[run].output
    assert "building" not in runs[run].output


def test_finetuning_may_change_the_attention_and_says_so(runs):
    assert runs["finetune"].status == 0
    assert "--finetune changes the attention: --s2-attention given" in runs["finetune"].output


def test_our_spec_is_announced_like_the_flag(runs):
    assert "S2 in 2 of 2 layers" in runs["spec"].output
    assert runs["spec"].losses == runs["whole"].losses
