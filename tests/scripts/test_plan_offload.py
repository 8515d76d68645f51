"""scripts/plan_offload.py: rates in, table or JSON or picture out, one line where something does not fit."""

import json
import re
import subprocess
import sys

import pytest
from script_main import SCRIPTS, load_main
from waiting import PATIENCE

SCRIPT = SCRIPTS / "plan_offload.py"
FLAGS = [
    *("--params", "7e9", "--h2d-gbps", "50", "--d2h-gbps", "50"),
    *("--cpu-gparams", "2", "--gpu-gparams", "80"),
]
main = load_main("plan_offload")

from benchmarks.offload_schedules import SCHEDULES  # noqa: E402  (the script makes it importable)


def as_json(capsys, *more) -> dict:
    main([*FLAGS, *map(str, more), "--json"])
    return json.loads(capsys.readouterr().out)


def test_json_has_every_schedule_with_its_step(capsys):
    plan = as_json(capsys)
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
    assert as_json(capsys, "--params", text)["params"] == 7 * 10**9


def test_every_rate_counts(capsys):
    default = as_json(capsys)["interleaved"]["step_seconds"]
    for flag, value in (
        ("--h2d-gbps", 25),
        ("--d2h-gbps", 20),
        ("--cpu-gparams", 1),
        ("--gpu-gparams", 2),
        ("--dram-gbps", 90),
        ("--backward-seconds", 0.01),
    ):
        assert as_json(capsys, flag, value)["interleaved"]["step_seconds"] > 1.05 * default, flag


def test_a_fraction_may_be_given_and_is_not_better_than_auto(capsys):
    auto = as_json(capsys, "--gpu-fraction", "auto")
    assert auto == as_json(capsys)
    half = as_json(capsys, "--s2-offload-gpu-fraction", 0.5)
    assert half["interleaved"]["gpu_fraction"] == pytest.approx(0.5, abs=0.001)
    assert half["interleaved"]["step_seconds"] > 1.4 * auto["interleaved"]["step_seconds"]


def test_budgets_place_the_state(capsys):
    nvme = ["--nvme-read-gbps", 12, "--nvme-write-gbps", 10]
    plan = as_json(capsys, "--gpu-budget-gb", 10, "--host-budget-gb", 40, *nvme)
    ours = plan["interleaved"]
    assert 9.8e9 < ours["gpu_bytes"] < 10.3e9  # the two buffer sets are extra
    assert 39.8e9 < ours["host_bytes"] <= 40e9
    assert ours["nvme_bytes"] == pytest.approx(84e9 - 10e9 - 40e9 * 12 / 16, rel=0.02)
    assert ours["bottleneck"].startswith("NVMe write")
    same = ["--s2-offload-gpu-budget-gb", 10, "--s2-offload-host-budget-gb", 40, *nvme]
    assert as_json(capsys, *same) == plan


def test_smaller_subgroups_fill_the_pipeline_sooner(capsys):
    coarse = as_json(capsys, "--params", "200M", "--subgroup-size", 2**24)
    fine = as_json(capsys, "--params", "200M", "--s2-offload-subgroup-size", 2**20)
    assert fine["interleaved"]["step_seconds"] < coarse["interleaved"]["step_seconds"]


def test_the_table_says_by_how_much_ours_is_faster(capsys):
    main(FLAGS)
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
    page = (SCRIPT.parents[1] / "docs" / "offload.md").read_text()
    shown = re.findall(
        r"^```console\n\$ python scripts/plan_offload.py (.*?[^\\])\n(.*?)^```$", page, re.M | re.S
    )
    assert shown
    for command, output in shown:
        main(command.replace("\\\n", " ").split())
        assert capsys.readouterr().out == output


def test_it_needs_no_torch_no_megatron_and_no_matplotlib():
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(SCRIPT)!r}, *{FLAGS!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print([name for name in ('torch', 'megatron', 'matplotlib', 'triton') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_picture_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "offload.png"
    main([*FLAGS, "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "interleaved" in capsys.readouterr().out


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
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value)),
)
def test_wrong_flags_end_in_one_line(capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        main([*FLAGS, *map(str, more)])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_missing_flag_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--params", "7B", "--cpu-gparams", "2"])
    assert ended.value.code == 2
    missing = "--h2d-gbps, --d2h-gbps, --gpu-gparams"
    assert capsys.readouterr().err == f"error: the following arguments are required: {missing}\n"
