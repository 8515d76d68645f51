"""The record: stages run in order inside a budget, none twice, none stops the others, none outlives it."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RUNNER, rows_in
from megatron_run import environment_of_forks, run_command
from waiting import PATIENCE, wait_until

ROOT = RUNNER.parents[1]
SCRIPT = ROOT / "scripts" / "gpu_record.sh"
FIELDS = ("date", "setting", "stage", "words", "result", "seconds", "limit", "reason")


def logged(directory: Path) -> list[dict]:
    """Returns what the record has logged of its stages."""
    lines = [line for path in directory.glob("**/record.tsv") for line in path.read_text().splitlines()]
    return [dict(zip(FIELDS, line.split("\t"), strict=True)) for line in lines]


def results(directory: Path) -> list[tuple[str, str]]:
    return [(row["stage"], row["result"]) for row in logged(directory)]


# Stages of a few lines, in Bash.


def record_of(directory: Path, stages: dict[str, str], most: int = 300, setting: str = "same") -> list[str]:
    """Returns the command of a record of some stages, given by their code; `page` is drawn at the end."""
    lines = [
        *("set -euo pipefail", "source scripts/lib/env.sh", "source scripts/lib/record.sh", "GRACE=1"),
        f"INTERPRETER=bash LOG={directory}/a-machine/record.tsv SETTING={setting}",
        "DEADLINE=$((SECONDS + 600))",
    ]
    for name, code in stages.items():
        (directory / name).write_text(code)
        lines.append(f"{'drawing page' if name == 'page' else f'stage {name} 5 {most}'} {directory}/{name}")
    return ["bash", "-c", "\n".join([*lines, "run_stages"])]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_failed_stage_is_named_and_stops_no_other(tmp_path):
    stages = {
        "first": "echo one",
        "second": "echo broken; echo '  pipe'; exit 3",
        "third": "echo three",
        "page": "echo drawn",
    }
    command = record_of(tmp_path, stages)
    done = run(command)
    assert done.returncode == 1 and done.stderr.endswith(
        f"error: failed: second; see above and {tmp_path}/a-machine/record.tsv\n"
    )
    assert done.stdout == "   one\n   broken\n     pipe\n   three\n   drawn\n"
    assert results(tmp_path) == [("first", "done"), ("second", "failed"), ("third", "done")]
    assert logged(tmp_path)[1]["reason"] == "exit status 3: broken | pipe"
    again = run(command)
    assert again.stdout == "   broken\n     pipe\n   drawn\n" and "first: done before" in again.stderr
    assert results(tmp_path)[3:] == [("second", "failed")], "what is done is not repeated"


def test_a_stage_is_done_for_its_words_and_setting(tmp_path):
    assert run(record_of(tmp_path, {"first": "echo one"})).stdout == "   one\n"
    assert run(record_of(tmp_path, {"first": "echo one"})).stdout == ""
    assert run(record_of(tmp_path, {"first": "echo one"}, setting="other")).stdout == "   one\n"
    command = record_of(tmp_path, {"first": "echo $1"})
    command[-1] = command[-1].replace(f"{tmp_path}/first", f"{tmp_path}/first word")
    assert run(command).stdout == "   word\n"


def test_a_stage_takes_what_is_left_up_to_its_most_or_is_not_begun(tmp_path):
    """The seconds may tick on meanwhile."""
    command = record_of(tmp_path, {"first": "echo one", "page": "echo drawn"})
    for left, most in ((500, 300), (100, 100), (5, None), (-1, None)):
        change = f"LEAST[first]=6 DEADLINE=$((SECONDS + {left})); limit_of first || echo none"
        limit = run([*command[:2], command[2].replace("run_stages", change)]).stdout.strip()
        assert limit == "none" if most is None else most - 60 <= int(limit) <= most
    done = run([*command[:2], command[2].replace("run_stages", "DEADLINE=0; run_stages")])
    assert done.returncode == 0 and done.stdout == "   drawn\n"
    assert "not finished: first; the same command continues" in done.stderr
    assert [(row["result"], row["reason"]) for row in logged(tmp_path)] == [("not measured", "no time left")]


def has_ended(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for has no memory left."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "VmRSS" not in status.read_text()


def test_a_stage_whose_time_is_up_ends_with_all_that_it_started(tmp_path):
    pid = tmp_path / "pid"
    deaf = f"trap '' TERM; sleep 100000 & echo $! >{pid}; wait"
    for most in (2**n for n in range(10)):  # on a busy machine the time may be up before the stage begins
        done = run(record_of(tmp_path, {"deaf": deaf, "next": "echo next"}, most))
        if pid.exists():
            break
    wait_until(lambda: has_ended(int(pid.read_text())))
    assert done.returncode == 0 and done.stdout.endswith("next\n") and "not finished: deaf" in done.stderr
    assert results(tmp_path)[-1] == ("next", "done") and ("deaf", "out of time") in results(tmp_path)


WAITING = "trap 'echo stopped; exit 1' TERM; sleep 100000 & echo $! >{pid}; wait"


def start(command: list[str], pid: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: process.poll() is not None or (pid.exists() and pid.read_text()))
    assert process.poll() is None
    return process


def test_a_stage_does_not_outlive_a_record_that_is_killed(tmp_path):
    pid = tmp_path / "pid"
    process = start(record_of(tmp_path, {"first": WAITING.format(pid=pid)}), pid)
    process.kill()
    process.communicate(timeout=PATIENCE)
    wait_until(lambda: has_ended(int(pid.read_text())))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_record_keeps_what_is_done_and_goes_on(tmp_path, number):
    pid = tmp_path / "pid"
    command = record_of(tmp_path, {"first": "echo one", "second": WAITING.format(pid=pid)})
    process = start(command, pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "   stopped\n" in out
    assert err.endswith("interrupted: what was measured is stored; the same command continues\n")
    wait_until(lambda: has_ended(int(pid.read_text())))
    assert results(tmp_path) == [("first", "done"), ("second", "interrupted")]
    assert run(record_of(tmp_path, {"first": "echo one", "second": "echo two"})).stdout == "   two\n"


# The command, with a Python that runs nothing.


@pytest.fixture
def fake(tmp_path):
    """Returns a function that runs the command with a Python that shows its arguments, on a machine with a
    GPU, with packages as they are named."""

    def command(*words: str, device: str = "cuda", packages: str = "megatron xdist"):
        python = tmp_path / "python"
        python.write_text(
            f"""#!/bin/bash
            case "$*" in
                *find_spec*) for name in {packages}; do [[ "$*" != *"'$name'"* ]] || exit 0; done; exit 1 ;;
                *benchmarks.environment*) echo {device} a-machine same ;;
                *) echo "$*" ;;
            esac"""
        )
        python.chmod(0o755)
        return run(["bash", str(SCRIPT), "--python", str(python), *words])

    return command


# Seconds of the parts of each stage on one GPU, each stored at its end: measured, or estimated by the FLOPs.
PARTS = {
    "device": [6],
    "tests": [2] * 150,
    "attention": [25] * 20,
    "attention-stride-64": [13],
    "profile": [10, 8, 8],
    "step": [105, 60, 130, 80],
    "step-shorter": [40, 30, 35, 60, 40, 45, 30, 28, 28],
    "offload": [50, 60, 75, 70, 60, 60],
    "timeline": [13],
    "decode": [5] * 5,
    "attention-256k": [40, 40, 60, 60],
}
START, DRAWING = 8, 40  # a process starts and compiles; the script keeps some for pictures


def limits() -> dict[str, tuple[int, int]]:
    """Returns least and most seconds of each stage of one GPU, as the script has them."""
    text = SCRIPT.read_text()
    body = text.partition("gpu_stages() {")[2].partition("\n}")[0]
    stages = re.findall(r"^ +(?:bench|train) (\S+) +(\d+) +(\d+)", body, re.MULTILINE)
    tests = re.findall(r"stage (tests) (\d+) (\d+)", text)
    return {name: (int(least), int(most)) for name, least, most in (stages[0], *tests, *stages[1:])}


def one_call(left: dict[str, list], seconds: float, hanging: str | None) -> list[str]:
    """Takes from `left` the parts that a call of some seconds finishes; returns the stages that it began."""
    begun = []
    for name, (least, most) in limits().items():
        if not left[name] or seconds < least:
            continue
        begun.append(name)
        limit, taken = min(most, seconds), START
        while left[name] and name != hanging and taken + left[name][0] <= limit:
            taken += left[name].pop(0)
        seconds -= limit if left[name] else taken
    return begun


@pytest.mark.parametrize("hanging", [None, "tests", "attention"])
def test_some_calls_of_nine_minutes_finish_every_stage(hanging):
    left = {name: list(parts) for name, parts in PARTS.items()}
    assert list(left) == list(limits())
    calls = 0
    while any(parts for name, parts in left.items() if name != hanging):
        before = {name: len(parts) for name, parts in left.items()}
        begun = one_call(left, 9 * 60 - DRAWING, hanging)
        calls += 1
        for name in begun:
            assert name == hanging or len(left[name]) < before[name], (calls, name, "got nowhere")
    assert calls <= (8 if hanging else 6)


def test_stages_run_in_order_then_pictures_and_page(fake, tmp_path):
    done = fake("--out", str(tmp_path / "rows"))
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == [(name, "done") for name in limits()]
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[:2] == [
        f"scripts/bench.py device --device cuda --out {tmp_path}/rows",
        "-m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors "
        f"-p benchmarks.tests_passed --tests-passed {tmp_path}/rows -n auto",
    ]
    assert lines[-2:] == [
        f"scripts/bench.py plot --out {tmp_path}/rows",
        f"-m benchmarks.results_page --results {tmp_path}/rows --page {tmp_path}/rows/results.md",
    ]
    some = fake("--out", str(tmp_path / "some"), "--stages", "decode", "step")
    assert results(tmp_path / "some") == [("step", "done"), ("decode", "done")] and some.returncode == 0
    assert len(some.stdout.splitlines()) == 4


def test_without_megatron_what_trains_fails_with_the_reason(fake, tmp_path):
    done = fake("--out", str(tmp_path / "rows"), packages="xdist")
    assert done.returncode == 1 and "error: failed: step step-shorter offload timeline;" in done.stderr
    reasons = {row["stage"]: row["reason"] for row in logged(tmp_path)}
    assert reasons["step"] == f"megatron-core is not installed for {tmp_path}/python"
    assert reasons["device"] == ""


def test_every_command_is_one_that_the_runner_takes(fake, bench, tmp_path):
    """Parsed only: those of a GPU cannot run here."""
    for options in (["--plan"], ["--plan", "--toy", "--out", str(tmp_path)]):
        lines = fake(*options).stdout.splitlines()
        commands = [line.partition("scripts/bench.py ")[2].split() for line in lines]
        assert sum(map(bool, commands)) == len(lines) - 2, "all but tests and page"
        for words in filter(None, commands):
            with pytest.raises(SystemExit) as ended:
                bench.main([*words, "--help"])  # bad words end with status 2 before
            assert ended.value.code == 0, words
        if "--toy" not in options:
            assert not any(str(ROOT) in line for line in lines), "the log names no one's folders"


def test_the_plan_says_what_each_stage_may_take(fake, tmp_path):
    out = tmp_path / "rows"
    done = fake("--plan", "--toy", "--out", str(out), "--minutes", "11", device="cpu")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert list(lines)[:3] == ["device", "tests", "attention"] and list(lines)[-2:] == ["plots", "page"]
    assert " 150 s " in lines["tests"] and " at the end " in lines["page"]
    assert 560 <= int(lines["step"].split()[1]) <= 620, "of 660 some are kept for the pictures"
    assert not out.exists()


def test_what_does_not_fit_is_refused_by_name(fake, tmp_path):
    shown = run(["bash", str(SCRIPT), "--help"]).stdout
    assert all(f"--{flag}" in shown for flag in ("out", "minutes", "stages", "plan", "toy", "python"))
    toy = ["--toy", "--out", str(tmp_path / "rows")]
    for words, message in (
        (
            [],
            "no CUDA device: this measures one GPU; --toy --out DIR runs all stages on the CPU at toy sizes",
        ),
        (["--toy"], "--toy: needs --out DIR, another than benchmarks/results, which is for measurements"),
        (["--toy", "--out", str(ROOT / "benchmarks" / "results")], "--toy: needs --out DIR, another than"),
        ([*toy, "--minutes", "-1"], "--minutes -1: must be a number >= 0"),
        ([*toy, "--minutes"], "--minutes: needs a value"),
        ([*toy, "--stages", "step", "speed"], "--stages speed: must be of device, tests, attention,"),
        (["--fast"], "--fast: must be one of the options that --help lists"),
    ):
        refused = fake(*words, device="cpu")
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: {message}"), refused.stderr
    refused = run(["bash", str(SCRIPT), "--python", "/nowhere/python"])
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: --python /nowhere/python: must be a Python that runs\n",
    )
    assert not (tmp_path / "rows").exists()


# Tests that passed.

TESTS = """
import pytest, time

@pytest.mark.parametrize("n", range(3))
def test_passes(n):
    pass

def test_fails_while_there_is_no_file(pytestconfig):
    assert (pytestconfig.rootpath / "there").exists(), "no file"
"""
SAME_CODE = """
from benchmarks import tests_passed

tests_passed.code_hash, tests_passed.same_setting = lambda patterns: "same", lambda row, now: True
"""


@pytest.mark.exhaustive
def test_tests_that_passed_are_stored_one_by_one_and_not_run_again(tmp_path):
    """Nor by the workers of xdist."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(SAME_CODE)
    words = ["-m", "pytest", "-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    words += ["-p", "benchmarks.tests_passed", "--tests-passed", str(tmp_path / "rows"), str(tmp_path)]
    first = run_command(*words)
    assert first.returncode == 1, first.stdout + first.stderr
    rows = rows_in(tmp_path / "rows", "tests")
    assert [row["outcome"] for row in rows].count("passed") == 3 and len(rows) == 4
    (failed,) = (row for row in rows if row["outcome"] == "failed")
    assert failed["test"].endswith("::test_fails_while_there_is_no_file") and "no file" in failed["said"]
    (tmp_path / "there").touch()
    second = run_command(*words, "-n", "1")
    assert second.returncode == 0 and "1 passed" in second.stdout, second.stdout + second.stderr
    assert len(rows_in(tmp_path / "rows", "tests")) == 5
    third = run_command(*words)
    assert third.returncode == 0, third.stdout + third.stderr
    assert len(rows_in(tmp_path / "rows", "tests")) == 5


TERMINATED = """
import os, runpy, signal, sys
from dataclasses import replace
from benchmarks import registry

end = lambda args, stored: os.kill(os.getpid(), signal.SIGTERM)
registry.BENCHMARKS["device"] = replace(registry.BENCHMARKS["device"], run=end)
sys.argv = ["bench.py", "device"]
runpy.run_path("scripts/bench.py", run_name="__main__")
"""


def test_a_benchmark_ends_at_sigterm_as_at_ctrl_c(tmp_path):
    done = run([sys.executable, "-c", TERMINATED])
    assert done.returncode == 130 and done.stderr.startswith("interrupted: what was measured is stored")


# All of it.


def test_benchmarks_and_page_can_be_imported_without_megatron():
    code = "import sys; sys.modules['megatron'] = None; import benchmarks.registry, benchmarks.results_page"
    assert run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.exhaustive
def test_the_toy_record_goes_through_its_stages(tmp_path):
    """All but those of the optimizer, whose trainings test_offload_bench starts."""
    names = ["device", "tests", "attention", "profile", "step", "decode"]
    words = ["--toy", "--out", str(tmp_path), "--minutes", "60", "--stages", *names]
    env = environment_of_forks()
    command = ["bash", str(SCRIPT), "--python", shutil.which("python", path=env["PATH"]), *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = dict(results(tmp_path))
    assert list(stages) == names and stages.pop("tests") in ("done", "not measured")
    assert set(stages.values()) == {"done"}
    for name in stages:
        assert rows_in(tmp_path, name), name
    assert [row["case"] for row in rows_in(tmp_path, "step") if row["seconds"]] == ["s2"]
    pictures = {path.name for path in tmp_path.glob("*/*.png")}
    assert pictures == {"attention-cpu.png", "step.png", "decode.png"}
    page = (tmp_path / "results.md").read_text()
    assert "No GPU has been measured yet" in page
    assert all(f"### {name}, on " in page for name in ("step", "decode", "record"))
