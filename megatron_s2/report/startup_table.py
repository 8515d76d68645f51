"""The table that a run prints at its start: the layers that S2 attention replaces, and what it saves."""

from __future__ import annotations

from itertools import groupby

from megatron_s2.parallel.planner import ModelPlan
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.block_pattern import dense_pairs
from megatron_s2.report.table import aligned


def startup_table(
    settings: S2Settings,
    seq_len: int,
    head_dim: int,
    bytes_per_element: int,
    context_parallel: ModelPlan | None = None,
) -> str:
    """Returns the table as text: replaced layers, pattern of each group of layers, cost compared to dense.

    Args:
        settings: S2 settings of the model.
        seq_len: tokens per sequence.
        head_dim: elements per head of a key or value.
        bytes_per_element: bytes per element of a cached key or value.
        context_parallel: plan of context parallelism, if there is more than one rank.
    """
    sparse = settings.sparse_layers
    dense = [n for n in range(1, settings.num_layers + 1) if settings.is_dense(n)]
    rows = [
        ("core attention", f"S2 in {len(sparse)} of {settings.num_layers} layers"),
        *([("dense layers", ranges(dense))] if dense else []),
        ("pattern", settings.describe()),
    ]
    rows += [(f"layers {ranges(layers)}", text) for text, layers in _groups(settings).items()]
    rows += [
        ("distant past seen", _coverage(settings)),
        ("attention FLOPs", _flops(settings.mean_pairs(seq_len), dense_pairs(seq_len), seq_len)),
        ("keys and values", _kv_bytes(settings, seq_len, head_dim, bytes_per_element)),
    ]
    if context_parallel is not None:
        rows += [
            (f"{context_parallel.call.ranks} ranks, layers {ranges(list(group.layers))}", str(group.plan))
            for group in context_parallel.groups
        ]
    return "\n".join(["S2 attention (arXiv 2407.17678)", *aligned(rows, left=(0, 1), indent="  ")])


def _groups(settings: S2Settings) -> dict[str, list[int]]:
    """The S2 layers by what the table says of them: phases, with a pattern for each layer the pattern."""
    groups: dict[str, list[int]] = {}
    for layer in settings.sparse_layers:
        pattern = settings.pattern(layer)
        text = pattern.describe_phases()
        if settings.layers is not None:
            text = f"{pattern.describe().partition(', ')[2]}, {text}"
        groups.setdefault(text, []).append(layer)
    return groups


def _coverage(settings: S2Settings) -> str:
    patterns = [settings.pattern(layer) for layer in settings.sparse_layers] or [settings.first_pattern]
    by_layer, together = sorted(pattern.coverage().fraction for pattern in patterns), settings.coverage()
    if not together.fraction:
        return "0%: every head of the S2 layers is window-only"
    by_one = " to ".join(dict.fromkeys(f"{fraction:.0%}" for fraction in (by_layer[0], by_layer[-1])))
    text = f"{by_one} by one S2 layer, {together.fraction:.0%} by all S2 layers together"
    if together.lost and len(settings.sparse_layers) == settings.num_layers:
        text += f" (WARNING: {together.lost} of every {together.period} distant blocks are seen by no layer)"
    return text


def _flops(ours: float, dense: float, seq_len: int) -> str:
    return f"{ours / dense:.1%} of dense at {seq_len} tokens ({dense / ours:.1f}x fewer)"


def _kv_bytes(settings: S2Settings, seq_len: int, head_dim: int, bytes_per_element: int) -> str:
    """Size of the KV cache in generation: the keys and values that the last query reads, over all layers."""
    ours = sum(
        settings.pattern(n).kv_bytes(seq_len, head_dim, bytes_per_element)
        for n in range(1, settings.num_layers + 1)
    )
    dense = settings.num_layers * settings.dense_pattern.kv_bytes(seq_len, head_dim, bytes_per_element)
    return (
        f"{_bytes(ours)} per sequence of {seq_len} tokens in generation, {ours / dense:.1%} of dense "
        f"({_bytes(dense)})"
    )


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def ranges(numbers: list[int]) -> str:
    """Numbers as text: `1-3, 7` for [1, 2, 3, 7], cut off with `…` after six ranges."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(parts[:6]) + (", …" if len(parts) > 6 else "")
