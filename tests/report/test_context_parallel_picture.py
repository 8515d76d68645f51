"""Pictures of context parallelism: the senders of the keys, and plans over the number of ranks."""

import numpy as np
import pytest

from megatron_s2.parallel.cost import SCHEDULES
from megatron_s2.parallel.planner import plan_model
from megatron_s2.pattern import S2Pattern, S2Settings

pytest.importorskip("matplotlib")

from megatron_s2.report.context_parallel_picture import draw_exchange, draw_plans, plan_sizes

PATTERN = S2Pattern(num_kv_heads=4, block_size=16, local_blocks=3, vert_stride=4)


def test_each_strip_shows_the_senders_of_the_keys():
    figure = draw_exchange(PATTERN, ranks=4, rank=1, chunk_blocks=4)
    held_by, gather, a2a, everything = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    owner = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 8 + [2] * 4 + [1] * 4 + [0] * 4
    assert held_by.tolist() == [owner]
    assert everything.tolist() == [owner] * 4
    (mine,) = [head for head in range(4) if (a2a[head] != -1).any()]
    assert a2a[mine].tolist() == owner
    for head in range(4):
        needed = set(range(4, 8)) | set(range(24, 28))  # its chunks
        needed |= {2, 3, 22, 23}  # two halo blocks before each chunk
        needed |= {b for b in range(29) if (b + PATTERN.head_phases[head]) % 4 == 0}  # before the last window
        assert gather[head].tolist() == [owner[b] if b in needed else -1 for b in range(32)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"ranks": 5}, "ranks 5: must be between 1 and 4"), ({"rank": 4}, "rank 4: must be between 0 and 3")],
)
def test_ranks_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        draw_exchange(PATTERN, **changes)


def plans(*sizes):
    settings = S2Settings(num_layers=3, num_kv_heads=4, vert_stride=4, dense_layers=(1,))
    sequence = {"seq_length": 2**16, "num_attention_heads": 4, "head_dim": 64}
    return [plan_model(settings, context_parallel=size, **sequence) for size in sizes]


def test_plans_are_drawn_as_lines_that_end_where_a_schedule_is_not_possible():
    drawn = plans(2, 4, 8)
    bytes_axes, time_axes = draw_plans(drawn).axes
    for schedule, received, seconds in zip(SCHEDULES, bytes_axes.lines, time_axes.lines):
        for point, plan in enumerate(drawn):
            if schedule == "a2a" and plan.call.ranks == 8:
                assert np.isnan(received.get_ydata()[point]) and np.isnan(seconds.get_ydata()[point])
                continue
            dense, sparse = (group.plan.schedules[schedule].received_forward.most for group in plan.groups)
            assert received.get_ydata()[point] == pytest.approx((dense + 2 * sparse) / 3 / 2**20)
            assert seconds.get_ydata()[point] == pytest.approx(1000 * plan.seconds(schedule))


@pytest.mark.parametrize(
    ("largest", "tokens", "sizes"),
    [(8, 64, [2, 4, 8]), (12, 2400, [2, 4, 8, 12]), (24, 240, [2, 4, 8, 24]), (2, 64, [2]), (3, 18, [3])],
)
def test_sizes_are_powers_of_two_that_fit_the_sequence_and_the_largest(largest, tokens, sizes):
    assert plan_sizes(largest, tokens) == sizes


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_plans_give_the_same_bytes(tmp_path, suffix):
    for name in ("first", "second"):
        draw_plans(plans(2, 4), tmp_path / f"plans-{name}{suffix}")
        draw_exchange(PATTERN, tmp_path / f"exchange-{name}{suffix}")
    for kind in ("plans", "exchange"):
        first, second = (tmp_path / f"{kind}-{name}{suffix}" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
