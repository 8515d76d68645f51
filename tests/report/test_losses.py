"""Reports from the logs of a run: scalars, the picture of losses, and the lines of scripts/lib/watch.py."""

import subprocess
import sys
from pathlib import Path

import pytest
from megatron_run import ROOT, run_command
from torch.utils.tensorboard import SummaryWriter
from waiting import PATIENCE

from megatron_s2.pattern import S2Pattern
from megatron_s2.report.losses import Losses, draw_losses, read_scalars
from megatron_s2.report.pattern_picture import draw_pattern

STARTS = {".png": b"\x89PNG", ".svg": b"<?xml"}


def log(directory: Path, **scalars: dict[int, float]) -> Path:
    """Writes one tensorboard file, as one run does; underscores in tags become blanks."""
    with SummaryWriter(str(directory)) as writer:
        for tag, values in scalars.items():
            for step, value in values.items():
                writer.add_scalar(tag.replace("_", " "), value, step)
    return directory


@pytest.fixture
def run(tmp_path) -> Path:
    """Logs of a run of four steps with two evaluations."""
    return log(
        tmp_path / "logs",
        lm_loss={1: 8.0, 2: 7.0, 3: 6.5, 4: 6.0},
        lm_loss_validation={2: 7.25, 4: 6.125},
    )


def script(name: str, *words) -> subprocess.CompletedProcess:
    return run_command(ROOT / "scripts" / name, *words)


def test_scalars_are_read_by_iteration(run):
    assert read_scalars(run, "lm loss validation") == {2: 7.25, 4: 6.125}


def test_long_runs_are_read_whole(tmp_path):
    many = {step: 1 / step for step in range(1, 12_000)}
    assert list(read_scalars(log(tmp_path, lm_loss=many), "lm loss")) == list(many)


def test_a_resumed_run_replaces_the_steps_that_it_repeats(run):
    log(run, lm_loss={4: 5.5, 5: 5.0})
    assert read_scalars(run, "lm loss") == {1: 8.0, 2: 7.0, 3: 6.5, 4: 5.5, 5: 5.0}


def test_scalars_that_were_not_logged_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"logs: must hold tensorboard scalars named 'lm losses'$"):
        read_scalars(run, "lm losses")
    with pytest.raises(ValueError, match=r"nowhere: there is no such directory$"):
        read_scalars(tmp_path / "nowhere", "lm loss")


def test_losses_are_described(run):
    losses = Losses.read(run)
    assert (losses.untrained, losses.last_validation) == (8.0, 6.125)
    assert str(losses) == (
        "validation loss 6.125 after 4 steps; the untrained model's loss was 8.000: 1.88 nats better"
    )


def test_losses_need_an_evaluation(tmp_path):
    log(tmp_path, lm_loss={1: 8.0})
    with pytest.raises(ValueError, match="must hold tensorboard scalars named 'lm loss validation'"):
        Losses.read(tmp_path)


@pytest.mark.parametrize("suffix", STARTS)
def test_losses_are_drawn(run, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"loss{suffix}"
    draw_losses(Losses.read(run), picture, title="a title")
    assert picture.read_bytes().startswith(STARTS[suffix])


def test_the_script_draws_and_describes_the_losses(run, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    done = script("plot_losses.py", "--tensorboard-dir", run, "--output", picture)
    assert (done.returncode, done.stdout) == (0, f"{Losses.read(run)}\n")
    assert picture.read_bytes().startswith(STARTS[".png"])


def test_the_script_refuses_a_directory_without_losses(tmp_path):
    done = script("plot_losses.py", "--tensorboard-dir", tmp_path, "--output", tmp_path / "loss.png")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --tensorboard-dir {tmp_path}: must hold tensorboard scalars named 'lm loss'\n"
    )


# scripts/plot_pattern.py


def test_a_training_command_line_is_enough_to_draw_its_pattern(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "pattern.svg"
    flags = (ROOT / "scripts" / "lib" / "quickstart.args").read_text().split()
    done = script("plot_pattern.py", "--output", picture, "--layers", "2", *flags)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(STARTS[".svg"])


def test_an_invalid_pattern_is_refused(tmp_path):
    flags = ["--num-query-groups", "2", "--s2-block-size", "48"]
    done = script("plot_pattern.py", "--output", tmp_path / "pattern.png", *flags)
    assert (done.returncode, done.stderr) == (2, "error: --s2-block-size 48: must be a power of two >= 16\n")


def test_a_pattern_is_drawn_from_the_flags_of_a_whole_training(tmp_path):
    flags = "--num-query-groups 2 --lr 1e-3 --s2-attention --s2-vert-stride 2 8 --s2-phases 1 1"
    assert script("plot_pattern.py", *flags.split(), "--output", tmp_path / "flags.svg").returncode == 0
    pattern = S2Pattern(
        num_kv_heads=2, block_size=64, local_blocks=8, vert_stride=(2, 8), phases=(1, 1), warn_lost=False
    )
    draw_pattern(pattern, tmp_path / "pattern.svg")
    assert (tmp_path / "flags.svg").read_bytes() == (tmp_path / "pattern.svg").read_bytes()


def test_a_picture_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for output, what in ((tmp_path / "x.txt", "must end in"), (tmp_path / "file" / "x.png", "is a file")):
        done = script("plot_pattern.py", "--output", output, "--num-query-groups", "2")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and what in done.stderr


# scripts/lib/watch.py: the lines of a Megatron log that it shows.

STEP = (
    " [2026-11-21 03:10:46.897482] iteration        {step}/     165 | consumed samples:            8 | "
    "elapsed time per iteration (ms): 399.5 | learning rate: 5.000000E-04 | global batch size:     8 | "
    "lm loss: {loss} | loss scale: 1.0 | grad norm: 1.233 | number of nan iterations:   0 |"
)


def watched(*lines: str) -> list[str]:
    command = [sys.executable, ROOT / "scripts" / "lib" / "watch.py"]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_the_startup_table_is_shown_and_megatrons_other_lines_are_not():
    shown = watched(
        "megatron-s2: no GPU found, training on CPU (gloo); set: --distributed-backend gloo",
        "using world size: 2, data-parallel size: 2",
        "S2 attention (arXiv 2407.17678)",
        "  core attention     S2 in 4 of 4 layers",
        "  set for S2: --attention-dropout 0",
        "------------------------ arguments ------------------------",
        "  accumulate_allreduce_grads_in_fp32 .............. False",
        "Number of parameters in transformer block in billions:  0.00",
    )
    assert shown == [
        "   megatron-s2: no GPU found, training on CPU (gloo); set: --distributed-backend gloo",
        "   S2 attention (arXiv 2407.17678)",
        "     core attention     S2 in 4 of 4 layers",
        "     set for S2: --attention-dropout 0",
    ]


def test_steps_are_shown_at_intervals_and_the_last_always():
    """All lines arrive at once, so no step between the first and the last is due."""
    steps = [STEP.format(step=step, loss=f"{8 - step / 100:.6E}") for step in (1, 2, 3, 165)]
    shown = watched(*steps)
    assert [line.split("  loss ")[0] for line in shown] == ["   step 1/165", "   step 165/165"]
    assert "loss 7.990" in shown[0] and "loss 6.350" in shown[1]


def test_evaluations_and_checkpoints_are_shown():
    shown = watched(
        " validation loss at iteration 40 on validation set | lm loss value: 4.538547E+00 | lm loss PPL: 9 |",
        " validation loss at iteration 165 on test set | lm loss value: 4.5E+00 | lm loss PPL: 9.3E+01 | ",
        "  successfully saved checkpoint from iteration     150 to checkpoint [ t 1/1, p 1/1 ]",
    )
    assert shown == ["   validation loss 4.539", "   test loss 4.500", "   checkpoint saved at step 150"]


def test_errors_are_shown():
    shown = (
        "error: --s2-block-size 48: must be a power of two >= 16",
        "Traceback (most recent call last):",
        "RuntimeError: the reason",
        "torch.OutOfMemoryError: CUDA out of memory",
        "[rank1]: ValueError: of one rank",
        "[rank1]: torch.distributed.DistBackendError: of its network",
    )
    frames = (
        '  File "training.py", line 1, in train',
        "    raise RuntimeError",
        "[rank1]:     raise ValueError",
    )
    assert watched(*shown, *frames) == [f"   {line}" for line in shown]
