"""Offload through the user's command: the same bits wherever state lies and whoever updates it, the losses of
Megatron's own optimizer, and the state of either in checkpoints."""

import re
from pathlib import Path

import pytest
import torch
from megatron_run import MODERN, STEPS, Run, train_all
from selection import exhaustive, thinned

# A learning rate at which a last bit that Adam rounds otherwise does not move bfloat16 weights much: the
# losses of a few steps show what is wrong, not chaos.
BASE = "--lr 3e-5 --min-lr 3e-6 --clip-grad 0.1 --bf16 --eval-iters 0"
STOCK = f"{BASE} --use-distributed-optimizer"
OFFLOAD = f"{BASE} --s2-offload"
IN_BACKWARD = "--overlap-grad-reduce"
SMALL = "--s2-offload-subgroup-size 4096"


def fraction(value: float) -> str:
    return f"--s2-offload-gpu-fraction {value}"


def on_nvme(directory: Path, ranks: int = 1) -> str:
    """Less than a third of the 1.3 MB of state on the host, some on the GPU, the rest on NVMe."""
    directory.mkdir(exist_ok=True)
    return (
        f"--s2-offload-nvme-dir {directory} --s2-offload-host-budget-gb {0.0007 / ranks} "
        f"--s2-offload-gpu-budget-gb {0.0002 / ranks} --s2-offload-subgroup-size 1024"
    )


def placements(directory: Path, ranks: int) -> dict[str, str]:
    odd = "--s2-offload-subgroup-size 1344"
    return {
        "all on the CPU": f"{fraction(0)} {IN_BACKWARD}",
        "all on the GPU, after backward": f"{fraction(1)} {SMALL}",
        "a third on the GPU, odd subgroups": f"{fraction(0.33)} {odd} {IN_BACKWARD}",
        "on NVMe": f"{fraction(0.5)} {on_nvme(directory, ranks)} {IN_BACKWARD} --overlap-param-gather",
    }


def state(run: Run) -> dict[str, torch.Tensor]:
    """What `--ckpt-format torch` saved of the optimizer: masters and averages of all ranks."""
    found = {}
    for file in sorted(run.log_dir.glob("checkpoint/iter_*/**/distrib_optim.pt")):
        for buffers in torch.load(file, weights_only=False).values():
            for tensors in buffers.values() if isinstance(buffers, dict) else []:
                found |= {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    assert set(found) == {"param", "exp_avg", "exp_avg_sq"}  # of one buffer: all weights are bfloat16
    return found


def saving(runs: dict[str, str], directory: Path) -> dict[str, str]:
    return {
        name: f"{flags} --ckpt-format torch --save '{directory / name}/checkpoint' --save-interval {STEPS}"
        for name, flags in runs.items()
    }


def batches(accumulation: int, ranks: int) -> str:
    micro = 8 // accumulation
    return f"--micro-batch-size {micro} --global-batch-size {micro * accumulation * ranks}"


@pytest.mark.parametrize("ranks", [1, *exhaustive(2)])
def test_same_bits_at_every_placement_and_the_losses_of_megatrons_optimizer(tmp_path, ranks):
    batch = batches(accumulation=3, ranks=ranks)
    runs = {"stock": f"{STOCK} {batch}"}
    chosen = placements(tmp_path / "nvme", ranks)
    runs |= {name: f"{OFFLOAD} {batch} {flags}" for name, flags in chosen.items()}
    runs = train_all(tmp_path, saving(runs, tmp_path), ranks)
    stock, first, *others = runs.values()
    assert len(stock.losses) == STEPS
    assert stock.losses[STEPS] < stock.losses[1] - 0.01
    assert max(stock.scalar("grad-norm").values()) > 0.1, "nothing is clipped"
    assert first.losses == pytest.approx(stock.losses, rel=1e-5)
    assert first.scalar("grad-norm") == pytest.approx(stock.scalar("grad-norm"), rel=1e-3)
    expected = state(first)
    for other in others:
        assert other.losses == first.losses
        for name, x in state(other).items():
            assert torch.equal(x, expected[name]), f"{other.log_dir.name}: {name}"


EXPERTS = "--num-experts 2 --moe-layer-freq 2 --moe-router-topk 1 --moe-router-pre-softmax"
FEATURES = {
    "fp16 with a dynamic loss scale, loss per token, two kinds of expert layers": "--fp16 "
    f"--initial-loss-scale 64 --loss-scale-window 2 --calculate-per-token-loss {EXPERTS}",
    "bf16, reduction in bfloat16, no clipping": "--bf16 --grad-reduce-in-bf16 --clip-grad 0",
    "float32, norm of the weights": "--log-params-norm",
    "bf16, norm of the masters": "--bf16 --log-params-norm",
}
LAYOUTS = {
    "tensor parallel, norms summed over ranks": "--tensor-model-parallel-size 2 --qk-layernorm",
    "tied embeddings over the pipeline": "--pipeline-model-parallel-size 2",
    "experts over ranks": f"{EXPERTS} --expert-model-parallel-size 2",
    "data parallel, norm of the masters": "--log-params-norm",
}
UNTIED = "--untie-embeddings-and-output-weights"


def assert_trains_as_stock(directory: Path, flags: str, ranks: int = 1, model: str = MODERN) -> None:
    """Five steps of each, with a third of the gradients on their way to the host during backward."""
    # With an eps far above the gradients' size updates are proportional to them: a wrong factor shows.
    common = "--lr 3e-3 --min-lr 3e-4 --adam-eps 0.1 --clip-grad 0.1 --eval-iters 0 --micro-batch-size 2"
    common += f" --global-batch-size {4 * ranks} --train-iters 5 {flags}"
    offload = f"--s2-offload {fraction(0.67)} {SMALL} {IN_BACKWARD}"
    runs = {"stock": f"--use-distributed-optimizer {common}", "ours": f"{offload} {common}"}
    stock, ours = train_all(directory, runs, ranks, model).values()
    assert len(ours.losses) == 5, ours.output
    assert ours.losses == pytest.approx(stock.losses, rel=1e-5)
    assert ours.scalar("grad-norm") == pytest.approx(stock.scalar("grad-norm"), rel=1e-3)
    if "--log-params-norm" in flags:
        assert ours.scalar("params-norm") == pytest.approx(stock.scalar("params-norm"), rel=1e-5)


@pytest.mark.parametrize("feature", thinned(FEATURES, lambda feature: feature.startswith("fp16")))
def test_what_megatron_does_to_gradients_is_done(tmp_path, feature):
    assert_trains_as_stock(tmp_path, FEATURES[feature])


@pytest.mark.parametrize("layout", thinned(LAYOUTS, lambda layout: layout.startswith("tied")))
def test_gradients_that_change_after_their_reduction_leave_late(tmp_path, layout):
    assert_trains_as_stock(tmp_path, f"--bf16 {LAYOUTS[layout]}", 2, MODERN.replace(UNTIED, ""))


def test_a_step_with_infinite_gradients_leaves_the_state_as_it_is(tmp_path):
    """A loss scale of 2^26 overflows half precision; each skipped step halves it."""
    flags = f"--fp16 --initial-loss-scale {2**26} --hysteresis 1 --eval-iters 0 --lr 3e-5 --min-lr 3e-6"
    flags += " --seq-length 32 --lr-decay-iters 10"
    runs = {
        "stock": f"{flags} --use-distributed-optimizer --train-iters 12",
        "offload": f"{flags} --s2-offload {fraction(0.5)} {SMALL} {IN_BACKWARD} --train-iters 12",
    }
    runs = train_all(tmp_path, runs)
    skipped = [step for step, norm in runs["stock"].scalar("loss-scale").items() if norm > 2**20]
    assert 3 < len(skipped) < 10
    assert runs["offload"].scalar("loss-scale") == runs["stock"].scalar("loss-scale")
    assert runs["offload"].losses == pytest.approx(runs["stock"].losses, rel=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_leave_during_backward(tmp_path, overlap):
    """From the second step on, before which Megatron does not know the order in which they get ready."""
    flags = f"{OFFLOAD} --train-iters 4 {batches(3, 1)} {fraction(0)} {IN_BACKWARD if overlap else ''}"
    run = train_all(tmp_path, {"run": flags}, before=["report_when_gradients_leave"])["run"]
    counts = re.search(r"gradients left: {'in backward': (\d+), 'later': (\d+)}", run.output)
    matrices, vectors = 2 * 4 + 2, 2 * 2 + 1
    early = 3 * matrices if overlap else 0
    assert [int(count) for count in counts.groups()] == [early, 4 * (matrices + vectors) - early]


@pytest.mark.exhaustive
def test_a_run_holds_its_host_budget_while_its_state_is_several_times_larger(tmp_path):
    """The process grows by that much less than where the host holds all; how much both grow by activations
    and by what would be the GPU's memory is the same."""
    budget, slack = 45_000_000, 48 * 2**20
    flags = (
        f"{OFFLOAD} --train-iters 3 --num-layers 6 --hidden-size 512 --ffn-hidden-size 1536 --seq-length 32"
    )
    flags += f" --micro-batch-size 1 --global-batch-size 1 {fraction(0)} {IN_BACKWARD}"
    flags += f" --s2-offload-subgroup-size {2**19}"
    on_disk = f"--s2-offload-nvme-dir {tmp_path} --s2-offload-host-budget-gb {budget / 1e9}"
    runs = {}
    for name, more in {"on the host": "", "on NVMe": on_disk}.items():  # a process each
        watched = {"before": ["report_memory_of_offload"]}
        runs |= train_all(tmp_path / "runs", {name: f"{flags} {more}"}, **watched)
    took = {name: int(re.search(r"offload took: (\d+) bytes", run.output)[1]) for name, run in runs.items()}
    parameters = int(re.search(r"of rank 0: (\d+) parameters", runs["on NVMe"].output)[1])
    assert 12 * parameters > 4 * budget
    assert took["on the host"] - took["on NVMe"] > 16 * parameters - budget - slack
    assert runs["on NVMe"].losses == runs["on the host"].losses


REFUSED = {
    "--s2-offload --optimizer-offload-fraction 0.5": "--optimizer-offload-fraction: must not be set with "
    "--s2-offload: the share that the GPU updates is --s2-offload-gpu-fraction",
    "--s2-offload-trace x.json": "--s2-offload-trace: needs --s2-offload",
    "--s2-offload --s2-offload-nvme-dir /nowhere": "--s2-offload-nvme-dir: needs "
    "--s2-offload-host-budget-gb; without it all state stays in memory",
    "--s2-offload --s2-offload-host-budget-gb 0.001": "--s2-offload-host-budget-gb 0.001: the host must hold "
    "0.002 GB (106816 parameters of 16 bytes); raise it, raise --s2-offload-gpu-budget-gb, or name a "
    "directory with --s2-offload-nvme-dir",
}


def test_what_does_not_fit_is_refused(tmp_path):
    runs = train_all(tmp_path, {f"run-{n}": flags for n, flags in enumerate(REFUSED)})
    for run, message in zip(runs.values(), REFUSED.values()):
        assert run.status == 2
        assert f"error: {message}" in run.output.splitlines()
