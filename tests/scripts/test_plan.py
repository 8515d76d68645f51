"""scripts/plan.py: prints a table or JSON, draws a picture, and refuses bad flags in one line."""

import json

import pytest
from planning import PlanningScript, short_id

from megatron_s2.parallel.cost import SCHEDULES
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file

MIB = 2**20
# 128K tokens on 8 ranks, 32/8 heads of 128 in bf16, window 1024 tokens, stride 8.
FLAGS = [
    *("--seq-length", "131072", "--num-layers", "4", "--hidden-size", "4096", "--bf16"),
    *("--num-attention-heads", "32", "--num-query-groups", "8", "--context-parallel-size", "8"),
    *("--s2-attention", "--s2-block-size", "64", "--s2-local-blocks", "16", "--s2-vert-stride", "8"),
]
script = PlanningScript("plan", FLAGS)


def test_json_has_each_layer_with_bytes_schedule_and_imbalance(capsys):
    layers = script.json(capsys, "--s2-dense-layers", "2")["layers"]
    assert [(layer["layer"], layer["dense"]) for layer in layers] == [
        (1, False),
        (2, True),
        (3, False),
        (4, False),
    ]
    first = layers[0]
    assert {name: count / MIB for name, count in first["bytes_received_forward"].items()} == {
        "gather": 63.5,
        "a2a": 280,
        "ring": 448,
        "all_gather": 448,
    }
    assert first["schedule"] == "gather"
    assert first["imbalance"] == first["schedules"]["gather"]["imbalance"] <= 1.02
    assert first["schedules"]["gather"]["received_forward"] == {"least": 59.75 * MIB, "most": 63.5 * MIB}


def test_a_pattern_file_is_planned_layer_by_layer(capsys, tmp_path):
    window_only, mixed = ({"local_blocks": 16, "strides": strides} for strides in ([0] * 8, [0, 8] * 4))
    layers = ({"dense": True}, mixed, window_only, window_only)
    write_pattern_file(path := tmp_path / "pattern.json", S2Settings(4, 8, 64, layers=layers))
    flags = [*FLAGS[: FLAGS.index("--s2-block-size")], "--s2-pattern-file", str(path)]
    script.main([*flags, "--json"])
    planned = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["dense"] for layer in planned] == [True, False, False, False]
    received = [layer["bytes_received_forward"]["gather"] / MIB for layer in planned]
    # Halos of two chunks, 15 blocks of 8 heads of 128 bf16 keys and values; half of the shards of a pattern
    # of stride 8, which are 56 MiB.
    assert received[2] == received[3] == 2 * 15 * 64 * 8 * 2 * 128 * 2 / MIB == 7.5
    assert received[1] == pytest.approx(7.5 + 56 / 2, rel=0.01)
    script.main(flags)
    table = capsys.readouterr().out
    assert "layers 3-4: block 64, window 16 (1024 tokens), no stride" in table
    assert script.refusal(capsys, *FLAGS, "--s2-pattern-file", path).startswith(
        "error: --s2-block-size: must not be set with --s2-pattern-file"
    )


def test_a_schedule_that_is_not_possible_is_null(capsys):
    plan = script.json(capsys, "--context-parallel-size", 64)
    layer = plan["layers"][0]
    assert layer["bytes_received_forward"]["a2a"] is layer["schedules"]["a2a"] is None
    assert plan["predicted_seconds"]["a2a"] is None
    assert layer["schedule"] == "gather"
    assert layer["why"] == "a2a cannot give 32 query heads of a tensor-parallel rank to 64 ranks"


def test_a_given_schedule_is_chosen(capsys):
    assert {layer["schedule"] for layer in script.json(capsys, "--s2-cp-schedule", "a2a")["layers"]} == {
        "a2a"
    }


def test_element_size_batch_and_head_size_scale_the_bytes(capsys):
    def ring(*more):
        return script.json(capsys, *more)["layers"][0]["bytes_received_forward"]["ring"]

    once = ring()
    assert ring("--micro-batch-size", 3) == 3 * once
    assert ring("--kv-channels", 64) == once // 2
    fp32 = [word for word in FLAGS if word != "--bf16"]
    script.main([*fp32, "--fp32", "--json"])
    assert json.loads(capsys.readouterr().out)["call"]["element_size"] == 4
    script.main([*fp32, "--bytes-per-element", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["call"]["element_size"] == 1


def test_rates_change_only_the_predicted_time(capsys):
    default = script.json(capsys)
    slow = script.json(capsys, "--s2-intra-gigabytes-per-s", 1, "--s2-efficiency", 0.1)
    assert slow["predicted_seconds"]["chosen"] > default["predicted_seconds"]["chosen"]
    bytes_of = [plan["layers"][0]["bytes_received_forward"] for plan in (slow, default)]
    assert bytes_of[0] == bytes_of[1]


def test_the_table_names_every_schedule_and_the_choice_with_its_reason(capsys):
    script.main([*FLAGS, "--s2-dense-layers", "1"])
    out = capsys.readouterr().out
    assert "layers 1: dense\n" in out
    assert "layers 2-4: block 64, window 16 (1024 tokens), stride 8\n" in out
    sparse = out.split("layers 2-4")[1].splitlines()
    rows = {
        line.split()[0]: line for line in sparse if line.startswith("  ") and line.split()[0] in SCHEDULES
    }
    assert set(rows) == set(SCHEDULES)
    assert rows["gather"].split()[1] == "*"
    assert "59.8-63.5" in rows["gather"]
    assert "280.0" in rows["a2a"] and "448.0" in rows["ring"] and "448.0" in rows["all_gather"]
    (why,) = [line for line in sparse if line.startswith("  gather: ")]
    assert why.endswith(" of a2a, which receives 280.0 MiB")


def test_the_docs_page_shows_the_output_of_the_command(capsys):
    script.assert_page_shows_output(capsys, "context-parallel.md")


def test_it_needs_no_torch_no_megatron_and_no_matplotlib():
    script.assert_imports_nothing_heavy()


def test_four_thousand_ranks(capsys):
    plan = script.json(capsys, "--context-parallel-size", 4096, "--seq-length", 2**23, "--num-layers", 80)
    assert len(plan["layers"]) == 80
    assert all(layer["imbalance"] <= 1.02 for layer in plan["layers"])


def test_a_picture_is_drawn(capsys, tmp_path):
    assert "layers 1-4" in script.assert_draws(capsys, tmp_path / "plan.png")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sequence", 5], "unrecognized arguments: --sequence 5"),
        (["--seq-length", 100], "--seq-length 100: must be a multiple of 16 (2 x --context-parallel-size)"),
        (
            ["--hidden-size", 100],
            "--hidden-size 100: must be a multiple of --num-attention-heads 32, or --kv-",
        ),
        (["--num-attention-heads", 0, "--kv-channels", 8], "--num-attention-heads 0: must be >= 1"),
        (["--s2-block-size", 48], "--s2-block-size 48: must be a power of two >= 16"),
        (["--s2-efficiency", 2], "--s2-efficiency 2.0: must be at most 1"),
        (
            ["--s2-cp-schedule", "a2a", "--context-parallel-size", 64],
            "--s2-cp-schedule a2a: must be auto or gather",
        ),
        (["--s2-cp-schedule", "ring"], "argument --s2-cp-schedule: invalid choice: 'ring'"),
        (["--fp32"], "argument --fp32: not allowed with argument --bf16"),
        (["--bytes-per-element", "x"], "argument --bytes-per-element: invalid int value: 'x'"),
        (["--plot", "plan.gif"], "--plot plan.gif: must end in .png or .svg"),
        (
            ["--plot", "a.png", "--context-parallel-size", 1],
            "--context-parallel-size 1: must be at least 2 with --plot",
        ),
    ],
    ids=short_id,
)
def test_wrong_flags_end_in_one_line(capsys, more, message):
    assert script.refusal(capsys, *FLAGS, *more).startswith(f"error: {message}")


def test_a_picture_that_cannot_be_written_is_named(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "plan.png"
    assert str(below) in script.refusal(capsys, *FLAGS, "--plot", below)


def test_a_missing_flag_is_named(capsys):
    line = script.refusal(capsys, "--num-layers", 2, "--context-parallel-size", 2)
    assert line == "error: the following arguments are required: --seq-length, --num-attention-heads"
