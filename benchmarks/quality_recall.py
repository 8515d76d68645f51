"""How many needles of each length, depth and phase of their block a Megatron checkpoint recalls.

Run as a module, because a process can load only one checkpoint: a JSON object with the arguments of `recall`
on the command line, a list of its cells in one line on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.quality_needles_data import needle_sequences, needles_of

_CERTAIN = 0.5  # a value with more than half of the probability is the one that greedy decoding gives


def recall(
    checkpoint: str, lengths: list[int], needles: int, depths: int, block_size: int, phases: int, seed: int
) -> list[dict]:
    """Returns how many needles were asked for and found, of each length, part of the depth and phase.

    Args:
        checkpoint: directory of Megatron's `--save`.
        needles: number of needles that are asked for at each length, at least.
        depths: number of equal parts of the depth.
        block_size, phases: a needle's phase is that of the block of its key, modulo `phases`.
        seed: of the sequences, which are the same for all checkpoints.

    Returns:
        Cells with `length`, `depth` (middle of the part), `asked`, `found`; after those of a length others
        with `phase` in place of `depth`, which count the same needles. None has no needles.
    """
    from megatron_s2.generation.evaluation import load_megatron

    model, cells = load_megatron(checkpoint), []
    for length in lengths:
        rng, each = np.random.default_rng([seed, length]), needles_of(length)
        places, found = [], []
        for _ in range(-(-needles // each)):
            sequence, [keys] = needle_sequences(rng, 1, length, each)
            places.append(keys)
            found.append(answers(model, sequence, each) > _CERTAIN)
        places, found = np.concatenate(places), np.concatenate(found)
        groups = {
            "depth": (places * depths // (length - 2 * each), (np.arange(depths) + 0.5) / depths),
            "phase": (places // block_size % phases, np.arange(phases)),
        }
        for name, (group, values) in groups.items():
            asked = np.bincount(group, minlength=len(values))
            hits = np.bincount(group[found], minlength=len(values))
            for value, count, hit in zip(values.tolist(), asked.tolist(), hits.tolist()):
                if count:
                    cells.append({"length": length, name: value, "asked": count, "found": hit})
    return cells


def answers(model, sequence: np.ndarray, needles: int) -> np.ndarray:
    """Returns the probability of the value after each key that is asked for, in the order of the questions.

    Args:
        model: with `token_losses`, as of `load_megatron`; the loss at n is that of token n + 1.
        sequence: `[1, length]`, of `needle_sequences`.
    """
    import torch

    with torch.no_grad():
        [losses] = model.token_losses(torch.from_numpy(sequence)).cpu()
    return np.exp(-losses[len(losses) + 1 - 2 * needles :: 2].double().numpy())


if __name__ == "__main__":
    from megatron_s2.training.patches import hide_transformer_engine, quiet_known_warnings

    quiet_known_warnings()
    hide_transformer_engine()  # nothing here computes with it
    arguments = json.loads(sys.argv[1])
    print(json.dumps(recall(Path(arguments.pop("checkpoint")), **arguments)))
