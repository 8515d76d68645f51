"""scripts/plan_offload.py: rates in, table or JSON or picture out, one line where something does not fit."""

import pytest
from planning import PlanningScript, short_id

FLAGS = [
    *("--params", "7e9", "--h2d-gbps", "50", "--d2h-gbps", "50"),
    *("--cpu-gparams", "2", "--gpu-gparams", "80"),
]
script = PlanningScript("plan_offload", FLAGS)

from benchmarks.offload_schedules import SCHEDULES  # noqa: E402  (the script makes it importable)


def test_json_has_every_schedule_with_its_step(capsys):
    plan = script.json(capsys)
    assert set(SCHEDULES) <= set(plan)
    assert {"interleaved", "zero_offload", "twinflow", "dos_k2", "dos_k3", "streaming"} <= set(plan)
    assert plan["interleaved"]["step_seconds"] == pytest.approx(1.2, rel=0.01)
    assert plan["zero_offload"]["step_seconds"] == pytest.approx(7 * (4 / 50 + 1 / 2), rel=0.01)
    assert plan["dos_k2"]["step_seconds"] == pytest.approx(1.75, rel=0.01)
    assert plan["dos_k2"]["ratio_to_interleaved"] > 1.4
    assert plan["predicted"]["limits"]["cpu"] == pytest.approx(1.2, rel=0.01)
    for name in SCHEDULES:
        one = plan[name]
        assert one["step_seconds"] == one["update_seconds"] + one["exposed_seconds"]
    assert plan["params"] == 7 * 10**9 and plan["rates"]["h2d"] == 50e9 and plan["rates"]["dram"] is None


@pytest.mark.parametrize("text", ["7e9", "7B", "7b", "7000M", "7000000K", "0.007T", "7000000000"])
def test_parameters_are_numbers_or_have_a_letter(capsys, text):
    assert script.json(capsys, "--params", text)["params"] == 7 * 10**9


def test_every_rate_counts(capsys):
    default = script.json(capsys)["interleaved"]["step_seconds"]
    for flag, value in (
        ("--h2d-gbps", 25),
        ("--d2h-gbps", 20),
        ("--cpu-gparams", 1),
        ("--gpu-gparams", 2),
        ("--dram-gbps", 90),
        ("--backward-seconds", 0.01),
    ):
        assert script.json(capsys, flag, value)["interleaved"]["step_seconds"] > 1.05 * default, flag


def test_a_fraction_may_be_given_and_is_not_better_than_auto(capsys):
    auto = script.json(capsys, "--gpu-fraction", "auto")
    assert auto == script.json(capsys)
    half = script.json(capsys, "--s2-offload-gpu-fraction", 0.5)
    assert half["interleaved"]["gpu_fraction"] == pytest.approx(0.5, abs=0.001)
    assert half["interleaved"]["step_seconds"] > 1.4 * auto["interleaved"]["step_seconds"]


def test_budgets_place_the_state(capsys):
    nvme = ["--nvme-read-gbps", 12, "--nvme-write-gbps", 10]
    plan = script.json(capsys, "--gpu-budget-gb", 10, "--host-budget-gb", 40, *nvme)
    ours = plan["interleaved"]
    assert 9.8e9 < ours["gpu_bytes"] < 10.3e9  # the two buffer sets are extra
    assert 39.8e9 < ours["host_bytes"] <= 40e9
    assert ours["nvme_bytes"] == pytest.approx(84e9 - 10e9 - 40e9 * 12 / 16, rel=0.02)
    assert ours["bottleneck"].startswith("NVMe write")
    same = ["--s2-offload-gpu-budget-gb", 10, "--s2-offload-host-budget-gb", 40, *nvme]
    assert script.json(capsys, *same) == plan


def test_smaller_subgroups_fill_the_pipeline_sooner(capsys):
    coarse = script.json(capsys, "--params", "200M", "--subgroup-size", 2**24)
    fine = script.json(capsys, "--params", "200M", "--s2-offload-subgroup-size", 2**20)
    assert fine["interleaved"]["step_seconds"] < coarse["interleaved"]["step_seconds"]


def test_the_table_says_by_how_much_ours_is_faster(capsys):
    script.main(FLAGS)
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()[:1]}
    assert set(SCHEDULES) <= set(rows)
    assert rows["interleaved"][4:6] == ["1.202", "1.00"]
    assert rows["dos_k2"][4:6] == ["1.751", "1.46"]
    assert rows["streaming"][4:6] == ["1.726", "1.44"]
    assert "interleaved, by the model: host to GPU limits the update to 1.2 s, then CPU with 1.2 s\n" in out
    assert "by interleaving: update 3.500 -> 1.202 s, 2.91x\n" in out
    assert "by flushing gradients during backward: 0.560 -> 0.000 s after it\n" in out


def test_the_page_shows_what_the_command_prints(capsys):
    script.assert_page_shows_output(capsys, "offload.md")


def test_it_needs_no_torch_no_megatron_and_no_matplotlib():
    script.assert_imports_nothing_heavy()


def test_a_picture_is_drawn(capsys, tmp_path):
    assert "interleaved" in script.assert_draws(capsys, tmp_path / "offload.png")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--h2d", 5], "unrecognized arguments: --h2d 5"),
        (["--params", "7X"], "argument --params: invalid parameters value: '7X'"),
        (["--params", "1.5"], "argument --params: invalid parameters value: '1.5'"),
        (["--params", "nan"], "argument --params: invalid parameters value: 'nan'"),
        (["--params", "inf"], "argument --params: invalid parameters value: 'inf'"),
        (["--params", "0"], "--params 0: must be >= 1"),
        (["--cpu-gparams", 0], "--cpu-gparams 0.0: must be a positive number"),
        (["--dram-gbps", "inf"], "--dram-gbps inf: must be a positive number"),
        (["--h2d-gbps", "fast"], "argument --h2d-gbps: invalid float value: 'fast'"),
        (["--nvme-read-gbps", 5], "--nvme-read-gbps and --nvme-write-gbps: must be given together"),
        (["--backward-seconds", -1], "--backward-seconds -1.0: must be >= 0"),
        (["--gpu-fraction", "some"], "argument --gpu-fraction/--s2-offload-gpu-fraction: invalid"),
        (["--gpu-fraction", 2], "--s2-offload-gpu-fraction 2.0: must be between 0 and 1"),
        (["--subgroup-size", 100], "--s2-offload-subgroup-size 100: must be a multiple of 64"),
        (["--gpu-budget-gb", -1], "--s2-offload-gpu-budget-gb -1: must be >= 0"),
        (["--gpu-budget-gb", "inf"], "--gpu-budget-gb inf: must be a finite number"),
        (["--host-budget-gb", 5], "--s2-offload-host-budget-gb 5: the host must hold 112.000 GB"),
        (["--plot", "plan.gif"], "--plot plan.gif: must end in .png or .svg"),
    ],
    ids=short_id,
)
def test_wrong_flags_end_in_one_line(capsys, more, message):
    assert script.refusal(capsys, *FLAGS, *more).startswith(f"error: {message}")


def test_a_missing_flag_is_named(capsys):
    missing = "--h2d-gbps, --d2h-gbps, --gpu-gparams"
    line = script.refusal(capsys, "--params", "7B", "--cpu-gparams", "2")
    assert line == f"error: the following arguments are required: {missing}"
