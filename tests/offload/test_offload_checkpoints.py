"""Checkpoints of an offloaded optimizer: in every format, from every tier, read back at other placements and
numbers of ranks, and by Megatron's own optimizers; and after being killed at any point."""

import random
import re
from itertools import product
from pathlib import Path

import pytest
from megatron_run import Run, train_all, train_until_killed

BASE = (
    "--bf16 --lr 3e-5 --min-lr 3e-6 --lr-decay-iters 60 --clip-grad 0.1 --eval-iters 0 --micro-batch-size 2"
)
FOUR_STEPS = f"{BASE} --global-batch-size 8 --train-iters 4 --save-interval 2"
STOCK = "--use-distributed-optimizer"
HYBRID = f"{STOCK} --optimizer-offload-fraction 0"
FORMATS = {
    "reshardable over ranks": "--ckpt-format torch_dist",
    "fully reshardable": "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable",
    "torch": "--ckpt-format torch",
}
RANKS = (1, 2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def placements(directory) -> list[str]:
    (directory / "nvme").mkdir()
    ours = "--s2-offload --overlap-grad-reduce --s2-offload-gpu-fraction"
    return [
        f"{ours} 0",
        f"{ours} 1 --s2-offload-subgroup-size 1344",
        f"{ours} 0.5 --s2-offload-nvme-dir {directory / 'nvme'} --s2-offload-host-budget-gb 0.0003 "
        "--s2-offload-gpu-budget-gb 0.0001 --s2-offload-subgroup-size 1024",
    ]


@pytest.fixture(scope="module")
def saved(directory, placements) -> dict[tuple[int, str], Run]:
    """A run per number of ranks and format, each at a placement of its own, that saves halfway."""
    runs = {}
    for ranks in RANKS:
        flags = {
            name: f"{FOUR_STEPS} {placements[n]} {form} --save '{directory}/{ranks} {name}'"
            for n, (name, form) in enumerate(FORMATS.items())
        }
        finished = train_all(directory / f"saved-{ranks}", flags, ranks)
        for name in FORMATS:
            from_step_2(directory / f"{ranks} {name}")
        runs |= {(ranks, name): run for name, run in finished.items()}
    return runs


def from_step_2(checkpoint: Path) -> None:
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("2")  # "torch" knows no --ckpt-step


@pytest.fixture(scope="module")
def resumed(directory, placements, saved) -> dict[tuple[int, str, int], Run]:
    """Each checkpoint at each number of ranks, at a placement other than its own."""
    runs = {}
    for ranks in RANKS:
        flags = {
            (before, name): f"{FOUR_STEPS} {placements[(n + 1 + (ranks != before)) % 3]} {form} "
            f"--load '{directory}/{before} {name}'"
            for before, (n, (name, form)) in product(RANKS, enumerate(FORMATS.items()))
        }
        finished = train_all(
            directory / f"resumed-{ranks}",
            {f"{b} {name}": words for (b, name), words in flags.items()},
            ranks,
        )
        runs |= {(*key, ranks): run for key, run in zip(flags, finished.values())}
    return runs


def test_placements_train_alike(saved):
    for ranks in RANKS:
        first, *others = (saved[ranks, name].losses for name in FORMATS)
        assert len(first) == 4
        assert all(losses == first for losses in others)


@pytest.mark.parametrize("after", RANKS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("before", RANKS)
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(saved, resumed, before, form, after):
    rest = {step: loss for step, loss in saved[before, form].losses.items() if step > 2}
    went_on = resumed[before, form, after]
    assert went_on.status == 0, went_on.output
    if after == before:
        assert went_on.losses == rest
    else:  # sums over ranks round otherwise
        assert went_on.losses == pytest.approx(rest, rel=1e-4)


@pytest.mark.parametrize("form", ["reshardable over ranks", "fully reshardable"])
def test_checkpoints_of_and_for_megatrons_optimizers(placements, tmp_path, form):
    common = f"{FOUR_STEPS} {FORMATS[form]}"
    hybrid = {"hybrid": f"{common} {STOCK} --optimizer-offload-fraction 0 --save {tmp_path}/hybrid"}
    runs = train_all(tmp_path / "hybrid-run", hybrid, before=["hybrid_device_optimizer_on_cpu"])
    flags = {
        "stock": f"{common} {STOCK} --save {tmp_path}/stock",
        "ours": f"{common} {placements[2]} --save {tmp_path}/ours",
        "ours goes on with stock": f"{common} {STOCK} --load {tmp_path}/ours --ckpt-step 2",
    }
    for name in ("stock", "hybrid"):
        load = f"--load {tmp_path}/{name} --ckpt-step 2"
        flags[f"{name} goes on with ours"] = f"{common} {placements[1]} {load}"
        flags[f"weights of {name} with ours"] = f"{common} {placements[0]} {load} --finetune"
        flags[f"weights of {name} with stock"] = f"{common} {STOCK} {load} --finetune"
    runs |= train_all(tmp_path / "runs", flags)
    whole = runs["stock"].losses
    rest = {step: loss for step, loss in whole.items() if step > 2}
    for name in ("ours", "hybrid"):
        assert runs[name].losses == pytest.approx(whole, rel=1e-5), name
    for name in ("stock goes on with ours", "hybrid goes on with ours", "ours goes on with stock"):
        assert runs[name].losses == pytest.approx(rest, rel=1e-5), name
    for name in ("stock", "hybrid"):
        theirs, ours = (runs[f"weights of {name} with {which}"].losses for which in ("stock", "ours"))
        assert len(ours) == 4
        assert ours == pytest.approx(theirs, rel=1e-5), name


KILLERS = [  # of interventions.py, with the most beginnings that they let pass, and the longest time after
    ("kill_step", 4, 0.01),
    ("kill_save", 2, 0.3),
    ("kill_store", 200, 0.001),
]


def test_killed_at_twenty_random_points_it_goes_on_from_its_last_checkpoint(tmp_path, placements):
    """Within a step, a save, or a write to NVMe."""
    sixty_steps = f"{BASE} --global-batch-size 4 --train-iters 60 --save-interval 3 {placements[2]}"
    again = f"{sixty_steps} --save {tmp_path}/checkpoint --load {tmp_path}/checkpoint"
    undisturbed = train_all(tmp_path, {"whole": sixty_steps})["whole"].losses
    whole = {step: f"{loss:.6E}" for step, loss in undisturbed.items()}
    assert len(whole) == 60
    rng = random.Random(5)
    for kill in range(20):
        killer, most, longest = KILLERS[kill % 3]
        run = tmp_path / f"run-{kill}"
        assert train_until_killed(run, again, killer, rng.randint(1, most), longest * rng.random())
        assert printed_losses(run).items() <= whole.items(), run.name
    last = printed_losses(train_all(tmp_path, {"last": again})["last"].log_dir)
    assert last.items() <= whole.items() and max(last) == 60


def printed_losses(run: Path) -> dict[int, str]:
    """Those that a run printed before it ended, by iteration; without its second, for which Megatron prints
    the mean of the first two. (What goes to tensorboard may be lost with the run.)"""
    lines = re.findall(r"iteration +(\d+)/.*lm loss: (\S+)", (run / "output.txt").read_text())
    return {int(iteration): loss for n, (iteration, loss) in enumerate(lines) if n != 1}
