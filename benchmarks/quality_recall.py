"""How many needles of each depth and length a Megatron checkpoint recalls.

Run as a module, because a process can load only one checkpoint: a JSON object with the arguments of `recall`
on the command line, a list of its cells in one line on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.quality_needles_data import needle_sequences

_CERTAIN = 0.5  # a value with more than half of the probability is the one that greedy decoding gives


def recall(
    checkpoint: str, lengths: list[int], sequences: int, needles: int, depths: int, seed: int
) -> list[dict]:
    """Returns for each length and each of equal parts of the depth how many needles were asked for and found.

    Args:
        checkpoint: directory of Megatron's `--save`.
        sequences: sequences of each length.
        needles: needles of a sequence, each asked for once at its end.
        depths: number of parts.
        seed: of the sequences, which are the same for all checkpoints.
    """
    import torch

    from megatron_s2.generation.evaluation import load_megatron

    model, cells = load_megatron(checkpoint), []
    for length in lengths:
        rng = np.random.default_rng([seed, length])
        asked, found = np.zeros(depths, dtype=int), np.zeros(depths, dtype=int)
        for _ in range(sequences):
            tokens, [places] = needle_sequences(rng, 1, length, needles)
            with torch.no_grad():
                [losses] = model.token_losses(torch.from_numpy(tokens)).cpu()
            answers = np.exp(-losses[-2 * needles :: 2].double().numpy())
            part = places * depths // (length - 2 * needles)
            np.add.at(asked, part, 1)
            np.add.at(found, part, answers > _CERTAIN)
        for part in range(depths):
            cell = {"length": length, "depth": (part + 0.5) / depths}
            cells.append(cell | {"asked": int(asked[part]), "found": int(found[part])})
    return cells


if __name__ == "__main__":
    from megatron_s2.training.patches import hide_transformer_engine, quiet_known_warnings

    quiet_known_warnings()
    hide_transformer_engine()  # nothing here computes with it
    arguments = json.loads(sys.argv[1])
    print(json.dumps(recall(Path(arguments.pop("checkpoint")), **arguments)))
