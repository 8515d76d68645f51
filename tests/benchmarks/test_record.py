"""The record: stages run in order inside a budget, none twice, none stops the others, what lacks is said."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RUNNER
from waiting import PATIENCE, wait_until

ROOT = RUNNER.parents[1]
SCRIPT = ROOT / "scripts" / "gpu_record.sh"


@pytest.fixture(scope="module")
def record(bench):
    from benchmarks import record

    return record


FACTS = {
    "date": "2026-11-21T12:00:00+00:00",
    "machine": {"name": "a-machine", "gpu": None},
    "versions": {"torch": "2"},
    "commit": {"code": "x"},
}


@pytest.fixture
def code(record, monkeypatch):
    """One code on one machine, whatever happens to the checkout meanwhile."""
    monkeypatch.setattr(record, "code_hash", lambda patterns: "same")
    monkeypatch.setattr(record, "facts", lambda device: FACTS)


def rows_in(directory: Path, benchmark: str = "record") -> list[dict]:
    files = sorted(directory.glob(f"*/{benchmark}-*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def prints(record, name: str, text: str, **more):
    return record.Stage(name, ("-c", text), **more)


# Decisions.


def test_a_stage_takes_what_is_left_up_to_its_own_most_or_is_not_begun(record):
    stage = prints(record, "a", "", least=30, most=200)
    assert [record.seconds_for(stage, left) for left in (500, 100, 30, 29, -1)] == [200, 100, 30, None, None]
    assert record.seconds_for(prints(record, "page", "", always=True), -1) > 0


# Seconds of what each stage of one GPU does, each piece stored at its end; as the pieces were measured, or by
# the FLOPs, with what a process takes to start and kernels to compile.
PIECES = {
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
START = 8


def one_call(record, plan, left: dict, minutes: float, hanging: str | None = None) -> list[str]:
    """Takes from `left` what a call finishes; the stages that it began."""
    seconds, begun = 60 * minutes - record._DRAWING, []
    for stage in plan:
        limit = None if stage.always or not left[stage.name] else record.seconds_for(stage, seconds)
        if limit is None:
            continue
        begun.append(stage.name)
        taken = START
        while left[stage.name] and stage.name != hanging and taken + left[stage.name][0] <= limit:
            taken += left[stage.name].pop(0)
        seconds -= limit if left[stage.name] else taken
    return begun


@pytest.mark.parametrize("hanging", [None, "tests", "attention"])
def test_some_calls_of_nine_minutes_finish_every_stage(record, hanging):
    plan = record.stages(record.COMMITTED, toy=False)
    left = {name: list(pieces) for name, pieces in PIECES.items()}
    assert list(left) == [stage.name for stage in plan if not stage.always]
    calls = 0
    while any(pieces for name, pieces in left.items() if name != hanging):
        before = {name: len(pieces) for name, pieces in left.items()}
        begun = one_call(record, plan, left, 9, hanging)
        calls += 1
        for name in begun:
            assert name == hanging or len(left[name]) < before[name], (calls, name, "got nowhere")
        assert calls < 20
    assert calls <= (8 if hanging else 6)


def test_some_stages_alone_can_be_asked_for(record, capsys, tmp_path):
    plan = record.stages(record.COMMITTED, toy=False)
    names = [stage.name for stage in record.chosen(plan, ["decode", "step"])]
    assert names == ["step", "decode", "plots", "page"]
    assert record.chosen(plan, None) == plan
    assert record.main(["--toy", "--out", str(tmp_path), "--stages", "step", "speed"]) == 2
    assert capsys.readouterr().err.startswith("error: --stages speed: must be of device, tests, attention,")


def test_a_stage_is_done_for_its_words_code_machine_and_versions(record):
    stage = prints(record, "a", "pass")
    setting = {"machine": {"name": "m", "load": 1.0}, "versions": {"torch": "2"}, "commit": {"code": "x"}}
    now = {**setting, "record_code": "c"}
    done = {**now, "stage": "a", "words": ["-c", "pass"], "result": "done"}
    assert record.is_done(stage, [done], {**now, "machine": {"name": "m", "load": 9.0}})
    for other in (
        {"result": "failed"},
        {"words": ["-c", "other"]},
        {"record_code": "d"},
        {"versions": {"torch": "3"}},
        {"machine": {"name": "n", "load": 1.0}},
    ):
        assert not record.is_done(stage, [done | other], now), other
    assert not record.is_done(prints(record, "a", "pass", always=True), [done], now)


def test_without_megatron_the_record_and_its_page_are_there_all_the_same():
    modules = "benchmarks.record, benchmarks.registry, benchmarks.results_page"
    code = f"import sys; sys.modules['megatron'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tests_without_megatron_say_so(record, monkeypatch):
    tests = next(stage for stage in record.stages(record.COMMITTED, toy=False) if stage.name == "tests")
    monkeypatch.setattr(record, "find_spec", lambda name: None)
    told = record.judged(tests, 2, ["4 errors in 2 s"])
    assert told["result"] == "failed" and "megatron-core is not installed" in told["reason"]
    assert "4 errors in 2 s" in told["reason"]
    step = next(stage for stage in record.stages(record.COMMITTED, toy=False) if stage.name == "step")
    assert record.outcome_of(step, 100)["reason"] == f"megatron-core is not installed for {sys.executable}"
    assert record.judged(tests, 5, [])["result"] == "not measured"


def test_every_command_of_the_record_is_one_that_the_runner_takes(record, bench, capsys):
    """Parsed only: those of the GPU cannot run here."""
    for toy in (False, True):
        for stage in record.stages(record.COMMITTED, toy):
            script, *words = stage.words
            if script == "scripts/bench.py":
                with pytest.raises(SystemExit) as ended:
                    bench.main([*words, "--help"])  # bad words end with status 2 before
                assert ended.value.code == 0, stage.name
    plan = record.stages(record.COMMITTED, toy=False)
    assert [stage.name for stage in plan][:2] == ["device", "tests"]
    assert [stage.name for stage in plan][-2:] == ["plots", "page"]
    assert not any(str(ROOT) in word for stage in plan for word in stage.words), "rows name no one's folders"


# Stages of a line each.


def test_a_failed_stage_is_named_and_stops_no_other(record, code, tmp_path, capsys):
    plan = [
        prints(record, "first", "print('one')"),
        prints(record, "second", "print('broken pipe'); raise SystemExit(3)"),
        prints(record, "third", "print('three')"),
        prints(record, "page", "print('drawn')", always=True),
    ]
    assert record.record(plan, tmp_path, 600, "cpu") == 1
    out, err = capsys.readouterr()
    assert err == "error: failed: second; why is said above and stored\n"
    assert "   three" in out and "   drawn" in out
    assert [(row["stage"], row["result"]) for row in rows_in(tmp_path)] == [
        *(("first", "done"), ("second", "failed"), ("third", "done"), ("page", "done"))
    ]
    assert rows_in(tmp_path)[1]["reason"] == "exit status 3: broken pipe"
    assert record.record(plan, tmp_path, 600, "cpu") == 1
    assert [row["stage"] for row in rows_in(tmp_path)[4:]] == ["second", "page"], (
        "what is done is not repeated"
    )


def test_without_time_nothing_is_begun_but_the_page_is_written(record, code, tmp_path, capsys):
    plan = [prints(record, "first", "1"), prints(record, "page", "print('drawn')", always=True)]
    assert record.record(plan, tmp_path, 0, "cpu") == 0
    first, page = rows_in(tmp_path)
    assert (first["result"], first["reason"], page["result"]) == ("not measured", "no time left", "done")
    assert "not finished: first; the same command goes on" in capsys.readouterr().out


def test_a_stage_whose_time_is_up_ends_with_all_it_began(record, code, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_GRACE", 0.5)
    limit, wait = 0.1, subprocess.Popen.wait

    def wait_and_begin(process, timeout=None):
        if timeout == limit:
            wait_until(lambda: pid.exists() and pid.read_text())
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_and_begin)
    child = "import os, time; open(r'{0}', 'w').write(str(os.getpid())); time.sleep(600)"
    deaf = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    pid = tmp_path / "pid"
    begin = f"subprocess.run([sys.executable, '-c', {child.format(pid)!r}])"
    status, _ = record.run(["-c", deaf + begin], limit)
    assert status is None
    wait_until(lambda: ended(int(pid.read_text())))
    stage = prints(record, "deaf", "")
    assert record.judged(stage, status, [])["result"] == "out of time"


def test_a_stage_does_not_outlive_a_record_that_is_killed(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"from benchmarks import record; record.run(['-c', {child!r}], 600)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: process.poll() is not None or (pid.exists() and pid.read_text()))
    assert process.poll() is None
    process.kill()
    process.wait()
    wait_until(lambda: ended(int(pid.read_text())))


def ended(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for has no memory left."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "VmRSS" not in status.read_text()


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


def test_tests_that_passed_are_stored_one_by_one_and_not_run_again(tmp_path):
    """Nor by the workers of xdist."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(SAME_CODE)
    words = ["-m", "pytest", "-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    words += ["-p", "benchmarks.tests_passed", "--tests-passed", str(tmp_path / "rows")]

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *words, str(tmp_path), *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    first = run()
    assert first.returncode == 1, first.stdout + first.stderr
    rows = rows_in(tmp_path / "rows", "tests")
    assert [row["outcome"] for row in rows].count("passed") == 3 and len(rows) == 4
    (failed,) = (row for row in rows if row["outcome"] == "failed")
    assert failed["test"].endswith("::test_fails_while_there_is_no_file") and "no file" in failed["said"]
    (tmp_path / "there").touch()
    second = run("-n", "1")
    assert second.returncode == 0 and "1 passed" in second.stdout, second.stdout + second.stderr
    assert len(rows_in(tmp_path / "rows", "tests")) == 5
    third = run()
    assert third.returncode == 0, third.stdout + third.stderr
    assert len(rows_in(tmp_path / "rows", "tests")) == 5


DRIVER = """
import sys
sys.path.insert(0, {root!r})
from benchmarks import record
record.code_hash, record.facts = lambda patterns: "same", lambda device: {facts!r}
words = "print('one')", "import time; print('begun', flush=True); time.sleep(600)"
plan = [record.Stage(name, ("-c", text)) for name, text in zip(("first", "second"), words)]
record.stages = lambda out, toy: plan
sys.exit(record.main(["--toy", "--out", {out!r}]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_record_keeps_what_is_done_and_goes_on(record, code, tmp_path, number):
    out = str(tmp_path / "rows")
    driver = DRIVER.format(root=str(ROOT), out=out, facts=FACTS)
    process = subprocess.Popen(
        ["bash", "-c", 'trap "" INT; exec "$@"', "-", sys.executable, "-c", driver],  # as a background job
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "begun" in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert err == "interrupted: what was measured is stored, the same command goes on\n"
    assert [row["result"] for row in rows_in(tmp_path / "rows")] == ["done", "interrupted"]
    plan = [prints(record, "first", "print('one')"), prints(record, "second", "print('two')")]
    assert record.record(plan, tmp_path / "rows", 600, "cpu") == 0
    assert [row["stage"] for row in rows_in(tmp_path / "rows")[2:]] == ["second"]


# The command.


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPT), "--python", sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )


def test_the_script_shows_its_options_and_refuses_a_python_that_is_none():
    shown = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    assert all(
        flag in shown
        for flag in ("--out DIR", "--minutes M", "--plan", "--toy", "--stages NAME", "--python PATH")
    )
    refused = subprocess.run(
        ["bash", str(SCRIPT), "--python", "/nowhere/python"], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: --python /nowhere/python: must be a Python that runs\n",
    )


def test_the_record_of_a_gpu_needs_one(record, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: False)
    for words, message in (
        (
            [],
            "no CUDA device: this measures one GPU; --toy --out DIR runs all stages on the CPU at toy sizes",
        ),
        (["--toy"], "--toy: needs --out DIR, another than benchmarks/results, which is for measurements"),
        (["--toy", "--out", str(record.COMMITTED)], "--toy: needs --out DIR, another than"),
        (["--toy", "--out", str(tmp_path), "--minutes", "-1"], "--minutes -1: must be >= 0"),
    ):
        assert record.main(words) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_the_plan_says_what_each_stage_may_take(record, code, capsys, tmp_path):
    assert record.main(["--plan", "--toy", "--out", str(tmp_path), "--minutes", "11"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == [stage.name for stage in record.stages(tmp_path, toy=True)]
    assert " at the end " in lines["page"]
    seconds = {name: line.split()[1] for name, line in lines.items() if name not in ("plots", "page")}
    assert seconds["tests"] == "150" and seconds["step"] == "620", "of 660 some are kept for the pictures"
    assert not list(tmp_path.iterdir())


def test_the_toy_record_goes_through_its_stages(record, tmp_path):
    """All but those of the optimizer, whose trainings test_offload_bench starts."""
    names = ["device", "tests", "attention", "profile", "step", "decode"]
    done = command("--toy", "--out", str(tmp_path), "--minutes", "60", "--stages", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {row["stage"]: row for row in rows_in(tmp_path)}
    assert list(stages) == [*names, "plots", "page"]
    results = {name: row["result"] for name, row in stages.items()}
    assert results.pop("tests") in ("done", "not measured")
    assert set(results.values()) == {"done"}
    for name in ("device", "attention", "profile", "step", "decode"):
        assert rows_in(tmp_path, name), name
    assert [row["case"] for row in rows_in(tmp_path, "step") if row["seconds"]] == ["s2"]
    pictures = {path.name for path in tmp_path.glob("*/*.png")}
    assert pictures == {"attention-cpu.png", "step.png", "decode.png"}
    page = (tmp_path / "results.md").read_text()
    assert "No GPU has been measured yet" in page
    assert all(f"### {name}, on " in page for name in ("step", "decode", "record"))
