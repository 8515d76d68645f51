"""Offload through the user's command: the same bits wherever state lies and whoever updates it, the losses of
Megatron's own optimizer, and the state of either in checkpoints."""

from pathlib import Path

import pytest
import torch
from megatron_run import Run, train_all

# A learning rate at which a last bit that Adam rounds otherwise does not move bfloat16 weights much: the
# losses of 20 steps show what is wrong, not chaos.
STEPS = "--train-iters 20 --lr 3e-5 --min-lr 3e-6 --clip-grad 0.1 --bf16 --eval-iters 0"
STOCK = f"{STEPS} --use-distributed-optimizer"
OFFLOAD = f"{STEPS} --s2-offload"
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
    assert set(found) == {"param", "exp_avg", "exp_avg_sq"}
    return found


def saving(runs: dict[str, str], directory: Path) -> dict[str, str]:
    return {
        name: f"{flags} --ckpt-format torch --save-interval 20 --save '{directory / name / 'checkpoint'}'"
        for name, flags in runs.items()
    }


def batches(accumulation: int, ranks: int) -> str:
    micro = 8 // accumulation
    return f"--micro-batch-size {micro} --global-batch-size {micro * accumulation * ranks}"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_same_bits_at_every_placement_and_the_losses_of_megatrons_optimizer(tmp_path, ranks, accumulation):
    batch = batches(accumulation, ranks)
    runs = {"stock": f"{STOCK} {batch}"}
    runs |= {
        name: f"{OFFLOAD} {batch} {flags}" for name, flags in placements(tmp_path / "nvme", ranks).items()
    }
    runs = train_all(tmp_path, saving(runs, tmp_path), ranks)
    stock, first, *others = runs.values()
    assert len(stock.losses) == 20
    assert stock.losses[20] < stock.losses[1] - 0.03
    assert max(stock.scalar("grad-norm").values()) > 0.1, "nothing is clipped"
    assert first.losses == pytest.approx(stock.losses, rel=1e-5)
    assert first.scalar("grad-norm") == pytest.approx(stock.scalar("grad-norm"), rel=1e-3)
    expected = state(first)
    for other in others:
        assert other.losses == first.losses
        for name, x in state(other).items():
            assert torch.equal(x, expected[name]), f"{other.log_dir.name}: {name}"
