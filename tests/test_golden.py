"""The losses of the quickstart's model and schedule stay what they were.

`python tests/test_golden.py` writes the golden file anew; CONTRIBUTING.md says when that is right.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from megatron_run import ROOT, train_all

GOLDEN = Path(__file__).parent / "golden" / "quickstart_losses.json"
STEPS = 6
# Other CPUs add in other orders. With PyTorch, MKL and oneDNN held to older instruction sets than those the
# file was made with (AVX-512), the losses moved by at most 2e-6 of their value (docs/log.md, 2026-11-21).
RELATIVE = 1e-4


def corpus(directory: Path) -> str:
    """Data flags for text that is the same on every machine: 600 documents of a random two-word grammar."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.Generator(np.random.PCG64(2407_17678))
    follower = random.integers(1, 4095, size=(4095, 4))
    builder = IndexedDatasetBuilder(f"{directory}/text.bin", dtype=np.uint16)
    for _ in range(600):
        words = [int(random.integers(1, 4095))]
        for choice in random.integers(0, 4, size=random.integers(50, 800)):
            words.append(int(follower[words[-1], choice]))
        builder.add_document([*words, 4095], [len(words) + 1])
    builder.finalize(f"{directory}/text.idx")
    return f"--data-path {directory}/text --data-cache-path {directory}/cache --split 100,0,0"


def quickstart_losses(directory: Path) -> list[float]:
    """The first `STEPS` losses of the quickstart, on two ranks, with `corpus` for its text."""
    flags = (ROOT / "scripts" / "lib" / "quickstart.args").read_text() + (
        f"--global-batch-size 16 --train-iters 165 --lr-warmup-iters 7 --exit-interval {STEPS} "
        "--vocab-size 4096 --eval-iters 0"
    )
    runs = train_all(directory / "run", {"quickstart": flags}, ranks=2, model="", data=corpus(directory))
    losses = runs["quickstart"].losses
    return [losses[step] for step in range(1, STEPS + 1)]


@pytest.mark.exhaustive
def test_the_quickstart_has_the_losses_it_had(tmp_path):
    golden = json.loads(GOLDEN.read_text())["losses"]
    assert quickstart_losses(tmp_path) == pytest.approx(golden, rel=RELATIVE)


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as directory:
        losses = quickstart_losses(Path(directory))
    GOLDEN.write_text(json.dumps({"losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write_golden())
