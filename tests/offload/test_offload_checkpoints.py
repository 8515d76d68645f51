"""Checkpoints of an offloaded optimizer: in every format, from every tier, read back at other placements and
numbers of ranks, and by Megatron's own optimizers; and after being killed at any point."""

import random
import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

import pytest
from megatron_run import Run, Runs, train_all, train_until_killed
from selection import exhaustive

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
def saved(directory, placements) -> dict[int, Runs]:
    """By number of ranks, a run per format, each at a placement of its own, that saves halfway."""
    return {
        ranks: Runs(
            directory / f"saved-{ranks}",
            {
                name: f"{FOUR_STEPS} {placements[n]} {form} --save '{checkpoint(directory, ranks, name)}'"
                for n, (name, form) in enumerate(FORMATS.items())
            },
            ranks=ranks,
        )
        for ranks in RANKS
    }


def checkpoint(directory: Path, ranks: int, name: str) -> Path:
    return directory / f"{ranks} {name}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", RANKS)
def test_placements_train_alike(saved, ranks):
    first, *others = (run.losses for run in saved[ranks].values())
    assert len(first) == 4
    assert all(losses == first for losses in others)


@pytest.mark.parametrize(
    ("form", "before", "after"),
    [
        ("reshardable over ranks", 2, 2),
        ("fully reshardable", 2, 1),
        ("torch", 1, 1),
        *exhaustive(("reshardable over ranks", 1, 2), ("fully reshardable", 1, 2), ("torch", 2, 1)),
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(directory, placements, saved, form, before, after):
    """At a placement other than that of the run before."""
    whole, place = saved[before][form].losses, checkpoint(directory, before, form)
    (place / "latest_checkpointed_iteration.txt").write_text("2")  # "torch" knows no --ckpt-step
    other = placements[([*FORMATS].index(form) + 1 + (after != before)) % 3]
    flags = {f"{form}, {before} to {after}": f"{FOUR_STEPS} {other} {FORMATS[form]} --load '{place}'"}
    (went_on,) = train_all(directory / "resumed", flags, after).values()
    assert went_on.status == 0, went_on.output
    rest = {step: loss for step, loss in whole.items() if step > 2}
    if after == before:
        assert went_on.losses == rest
    else:  # sums over ranks round otherwise
        assert went_on.losses == pytest.approx(rest, rel=1e-4)


@pytest.fixture(scope="module")
def exchanged(directory, placements) -> dict[str, Mapping[str, Run]]:
    """By format, runs of Megatron's optimizers and of ours, and what goes on from the other's checkpoint."""
    found = {}
    for form, flags in FORMATS.items():
        place, common = directory / f"exchanged {form}", f"{FOUR_STEPS} {flags}"
        runs = {
            "stock": f"{common} {STOCK} --save '{place}/stock'",
            "ours": f"{common} {placements[2]} --save '{place}/ours'",
            "ours goes on with stock": f"{common} {STOCK} --load '{place}/ours' --ckpt-step 2",
        }
        for name in ("stock", "hybrid"):
            load = f"--load '{place}/{name}' --ckpt-step 2"
            runs[f"{name} goes on with ours"] = f"{common} {placements[1]} {load}"
            runs[f"weights of {name} with ours"] = f"{common} {placements[0]} {load} --finetune"
            runs[f"weights of {name} with stock"] = f"{common} {STOCK} {load} --finetune"
        hybrid = {"hybrid": f"{common} {HYBRID} --save '{place}/hybrid'"}
        before = ["hybrid_device_optimizer_on_cpu"]
        found[form] = ChainMap(Runs(place / "hybrid run", hybrid, before=before), Runs(place / "runs", runs))
    return found


SHARDED = ["reshardable over ranks", *exhaustive("fully reshardable")]


@pytest.mark.parametrize("form", SHARDED)
def test_checkpoints_of_and_for_megatrons_optimizers(exchanged, form):
    runs = exchanged[form]
    whole = runs["stock"].losses
    rest = {step: loss for step, loss in whole.items() if step > 2}
    for name in ("ours", "hybrid"):
        assert runs[name].losses == pytest.approx(whole, rel=1e-5), name
    for name in ("stock goes on with ours", "hybrid goes on with ours", "ours goes on with stock"):
        assert runs[name].losses == pytest.approx(rest, rel=1e-5), name


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("form", "name"), [("reshardable over ranks", "stock"), ("fully reshardable", "hybrid")]
)
def test_weights_of_megatrons_optimizers(exchanged, form, name):
    assert len(exchanged[form][name].losses) == 4
    theirs, ours = (exchanged[form][f"weights of {name} with {which}"].losses for which in ("stock", "ours"))
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=1e-5), name


KILLERS = [  # of interventions.py, with the most beginnings that they let pass, and the longest time after
    ("kill_step", 4, 0.01),
    ("kill_save", 2, 0.3),
    ("kill_store", 200, 0.001),
]


@pytest.mark.exhaustive
def test_killed_at_random_points_it_goes_on_from_its_last_checkpoint(tmp_path, placements):
    """Within a step, a save, or a write to NVMe."""
    steps = 12
    flags = f"{BASE} --global-batch-size 4 --train-iters {steps} --save-interval 3 {placements[2]}"
    again = f"{flags} --save {tmp_path}/checkpoint --load {tmp_path}/checkpoint"
    undisturbed = train_all(tmp_path, {"whole": flags})["whole"].losses
    whole = {step: f"{loss:.6E}" for step, loss in undisturbed.items()}
    assert len(whole) == steps
    rng = random.Random(5)
    for kill, (killer, most, longest) in enumerate(KILLERS):
        run = tmp_path / f"run-{kill}"
        assert train_until_killed(run, again, killer, rng.randint(1, most), longest * rng.random())
        assert printed_losses(run).items() <= whole.items(), run.name
    last = printed_losses(train_all(tmp_path, {"last": again})["last"].log_dir)
    assert last.items() <= whole.items() and max(last) == steps


def printed_losses(run: Path) -> dict[int, str]:
    """Those that a run printed before it ended, by iteration; without its second, for which Megatron prints
    the mean of the first two. (What goes to tensorboard may be lost with the run.)"""
    lines = re.findall(r"iteration +(\d+)/.*lm loss: (\S+)", (run / "output.txt").read_text())
    return {int(iteration): loss for n, (iteration, loss) in enumerate(lines) if n != 1}
