"""scripts/lib/env.sh: which Python it takes, and what it does to the environment, with fakes for both."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE, wait_until

ENV_SH = Path(__file__).parents[2] / "scripts" / "lib" / "env.sh"

# Stands for a Python: answers the questions of env.sh, makes environments of itself, logs its calls.
FAKE = """#!/bin/bash
case "$1 $2" in
    "-c "*) echo "{minor} {complete}"; exit {status} ;;
    "-V ") echo "Python 3.{minor}.0"; exit ;;
    "-m venv")
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        printf '#!/bin/bash\\necho "pip 1.0 from %s/lib/pip"\\n' "$3" > "$3/bin/pip"
        chmod +x "$3/bin/pip"
        touch "$3/pyvenv.cfg"
        ;;
    "-m pip") if [[ -e {root}/pip-does ]]; then source {root}/pip-does; fi ;;
esac
echo "$1 $2 3.{minor}" >> {root}/calls
echo "$*" >> {root}/words
"""


TE_PINS = """# pinned
transformer_engine==2.0
transformer_engine_torch==2.0
einops==1.0
"""
# Stands for pip: it downloads sources, and keeps what of them would be compiled, and how.
PIP_WITH_SOURCES = """
for last; do :; done
case "$*" in
    *" download "*)
        words=$*
        folder=${{words#*--dest }}
        folder=${{folder%% *}}
        mkdir -p {root}/source/csrc/inner
        echo one > {root}/source/csrc/one.cpp
        echo two > {root}/source/csrc/inner/two.cpp
        tar -czf "$folder/source.tar.gz" -C {root} source
        ;;
    *" install "*)
        if [[ -d $last ]]; then
            cat $(sed 's/#include//; s/"//g' "$last/csrc/all.cpp") > {root}/compiled
        fi
        ;;
esac
"""


class Machine:
    """A directory with a repository of env.sh alone, a PATH and a pyenv, all of them fake."""

    def __init__(self, root):
        self.root = root
        self.repository = root / "repository"
        (self.repository / "scripts" / "lib").mkdir(parents=True)
        shutil.copy(ENV_SH, self.repository / "scripts" / "lib")
        (self.repository / "setup.py").write_text("first")
        for name in ("constraints.txt", "constraints-oldest.txt"):
            (self.repository / name).write_text(name)
        (self.repository / "constraints-te.txt").write_text(TE_PINS)
        (root / "bin").mkdir()
        self.venv = self.repository / ".venv"

    def python(self, path, minor, complete=True, status=0):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        answers = {"minor": minor, "complete": "yes" if complete else "no", "status": status}
        file.write_text(FAKE.format(root=self.root, **answers))
        file.chmod(0o755)
        return str(file)

    def start(self, command, path=("bin",), **variables):
        environment = {
            "PATH": ":".join(str(self.root / place) for place in path),
            "HOME": str(self.root),
            **variables,
        }
        prelude = 'set -euo pipefail; source scripts/lib/env.sh; VENV=$ROOT/.venv; PATH="$PATH${TOOLS:-}"'
        return subprocess.Popen(
            ["/bin/bash", "-c", f"{prelude}; {command}"],
            cwd=self.repository,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, command, **settings):
        process = self.start(command, **settings)
        process.out, process.err = process.communicate(timeout=PATIENCE)
        return process

    def enter(self):
        return self.run("enter_environment dev; type -P python", TOOLS=":/usr/bin:/bin", PYTHON=self.chosen())

    def chosen(self):
        return self.python("bin/python3", 12)

    def calls(self):
        log = self.root / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_the_lowest_suitable_version_on_path_is_taken(machine):
    machine.python("bin/python3", 14)
    machine.python("bin/python3.13", 13)
    expected = machine.python("later/python3.12", 12)
    assert machine.run("find_python", path=("bin", "later")).out.strip() == expected


def test_the_first_on_path_wins_among_equals(machine):
    expected = machine.python("bin/python3", 12)
    machine.python("bin/python3.12", 12)
    machine.python("later/python3", 12)
    machine.python(".pyenv/versions/3.12.1/bin/python", 12)
    assert machine.run("find_python", path=("bin", "later")).out.strip() == expected


def test_shims_that_fail_and_old_versions_are_passed_over(machine):
    machine.python("bin/python3", 11, status=1)
    machine.python("bin/python3.12", 12, status=127)
    expected = machine.python("later/python3.12", 12)
    assert machine.run("find_python", path=("bin", "later")).out.strip() == expected


@pytest.mark.parametrize("place", [".pyenv", "elsewhere"])
def test_versions_of_pyenv_are_found(machine, place):
    machine.python("bin/python3", 11, status=1)
    machine.python(f"{place}/versions/3.13.0/bin/python", 13)
    expected = machine.python(f"{place}/versions/3.12.1/bin/python", 12)
    settings = {} if place == ".pyenv" else {"PYENV_ROOT": str(machine.root / place)}
    assert machine.run("find_python", **settings).out.strip() == expected


def test_a_python_that_cannot_make_environments_is_a_last_resort(machine):
    machine.python("bin/python3", 12, complete=False)
    expected = machine.python("bin/python3.13", 13)
    assert machine.run("find_python").out.strip() == expected


def test_without_ensurepip_the_package_to_install_is_named(machine):
    fake = machine.python("bin/python3", 12, complete=False)
    result = machine.run("find_python")
    assert result.returncode == 1
    assert result.err.startswith(f"error: {fake} cannot make environments")
    assert "sudo apt install python3.12-venv" in result.err


def test_without_any_python_the_message_says_what_to_do(machine):
    result = machine.run("find_python")
    assert (result.returncode, result.out) == (1, "")
    assert result.err == (
        f"error: no Python >= 3.12 on PATH or in {machine.root}/.pyenv/versions; "
        "install one, or set PYTHON to its path\n"
    )


def test_the_variable_comes_first_and_nothing_takes_its_place(machine):
    machine.python("bin/python3", 12)
    expected = machine.python("mine/python", 14)
    assert machine.run("find_python", PYTHON=expected).out.strip() == expected
    result = machine.run("find_python", PYTHON="/nowhere/python")
    assert result.returncode == 1
    assert result.err == "error: PYTHON=/nowhere/python: must be a Python >= 3.12 that runs\n"


def test_the_environment_that_is_to_be_made_is_no_candidate(machine):
    machine.python("repository/.venv/bin/python3", 12)
    expected = machine.python("bin/python3", 13)
    assert machine.run("find_python", path=("repository/.venv/bin", "bin")).out.strip() == expected


def test_a_real_python_is_understood(machine):
    assert machine.run(f"probe_python {sys.executable}").out == f"{sys.version_info[1]} yes\n"


def test_it_installs_once_and_again_when_setup_py_changes(machine):
    first = machine.enter()
    assert machine.calls() == ["-m venv 3.12", "-m pip 3.12"]
    assert first.out.strip() == str(machine.venv / "bin" / "python")
    assert [line[:10] for line in first.err.splitlines()] == ["== making ", "== install"]

    assert machine.enter().err == ""
    assert machine.calls() == []

    (machine.repository / "setup.py").write_text("second")
    machine.enter()
    assert machine.calls() == ["-m pip 3.12"]


def test_it_installs_again_when_the_constraints_change(machine):
    machine.enter()
    machine.calls()
    (machine.repository / "constraints-oldest.txt").write_text("of another set")
    machine.enter()
    assert machine.calls() == []
    (machine.repository / "constraints.txt").write_text("second")
    machine.enter()
    assert machine.calls() == ["-m pip 3.12"]


@pytest.mark.parametrize(
    "versions, folder, flags",
    [
        ("tested", ".venv", "--constraint {}/constraints.txt"),
        ("oldest", ".venv-oldest", "--constraint {}/constraints-oldest.txt"),
        ("newest", ".venv-newest", "--upgrade --upgrade-strategy eager"),
    ],
)
def test_each_set_of_versions_has_an_environment_of_its_own(machine, versions, folder, flags):
    command = f"enter_environment dev {versions}; type -P python"
    entered = machine.run(command, TOOLS=":/usr/bin:/bin", PYTHON=machine.chosen())
    assert entered.out.strip() == str(machine.repository / folder / "bin" / "python")
    pip = (machine.root / "words").read_text().splitlines()[-1]
    assert pip.endswith(f" {flags.format(machine.repository)} --editable {machine.repository}[dev]")


def enter_with_te(machine, prelude=""):
    (machine.root / "pip-does").write_text(PIP_WITH_SOURCES.format(root=machine.root))
    return machine.run(
        f"{prelude} enter_environment dev te; type -P python",
        TOOLS=":/usr/bin:/bin",
        TMPDIR=str(machine.root),
        PYTHON=machine.chosen(),
    )


def test_transformer_engine_is_compiled_once_from_one_file_into_an_environment_of_its_own(machine):
    (machine.root / "bin" / "g++").touch(mode=0o755)
    entered = enter_with_te(machine)
    assert entered.out.strip() == str(machine.repository / ".venv-te" / "bin" / "python"), entered.err
    assert (machine.root / "compiled").read_text() == "two\none\n"
    editable, others, sources, compiled = (machine.root / "words").read_text().splitlines()[-4:]
    assert editable.endswith(
        f"--constraint {machine.repository}/constraints.txt --editable {machine.repository}[dev]"
    )
    assert others.endswith(" install --no-deps transformer_engine==2.0 einops==1.0")
    assert " download --no-deps " in sources and sources.endswith(" transformer_engine_torch==2.0")
    assert " install --no-deps --no-build-isolation --no-cache-dir " in compiled
    assert list(machine.root.glob("tmp.*")) == []

    machine.calls()
    assert enter_with_te(machine).err == ""
    assert machine.calls() == []
    with (machine.repository / "constraints-te.txt").open("a") as pins:
        pins.write("zipp==1.0\n")
    assert enter_with_te(machine).returncode == 0
    assert machine.calls() == ["-m pip 3.12"] * 4


def test_without_a_compiler_there_is_no_transformer_engine_and_the_message_says_what_to_install(machine):
    entered = enter_with_te(machine, 'type() { [[ $2 != g++ ]] && builtin type "$@"; };')
    assert entered.returncode == 1
    assert "sudo apt install g++" in entered.err


def test_extras_are_installed_each_when_asked_for(machine):
    machine.enter()
    machine.calls()
    command = "enter_environment plot"
    machine.run(command, TOOLS=":/usr/bin:/bin")
    assert machine.calls() == ["-m pip 3.12"]
    machine.run(command, TOOLS=":/usr/bin:/bin")
    assert machine.calls() == []


def test_an_installation_that_failed_is_tried_again_in_the_same_environment(machine):
    (machine.root / "pip-does").write_text("exit 1")
    failed = machine.enter()
    assert failed.returncode == 1
    assert failed.err.splitlines()[-1].startswith(f"error: installing into {machine.venv} failed")
    (machine.root / "pip-does").unlink()
    machine.calls()
    assert machine.enter().returncode == 0
    assert machine.calls() == ["-m pip 3.12"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_after_an_interrupted_installation_the_environment_is_made_anew(machine, number):
    # pip answers Ctrl-C by failing, not by dying of it
    (machine.root / "pip-does").write_text(
        f"trap 'exit 1' INT; touch {machine.root}/begun; read -t {PATIENCE:.0f} <> <(:)"
    )
    machine.chosen()
    process = machine.start("enter_environment dev", TOOLS=":/usr/bin:/bin")
    wait_until(lambda: (machine.root / "begun").exists())
    os.killpg(process.pid, number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if number == signal.SIGINT else -number)

    (machine.root / "pip-does").unlink()
    machine.calls()
    again = machine.enter()
    assert again.err.startswith(f"== {machine.venv} is broken or half made: removing it\n")
    assert machine.calls() == ["-m venv 3.12", "-m pip 3.12"]


def test_an_environment_whose_python_is_gone_is_made_anew(machine):
    machine.enter()
    machine.calls()
    (machine.venv / "bin" / "python").unlink()
    machine.enter()
    assert machine.calls() == ["-m venv 3.12", "-m pip 3.12"]


def test_an_environment_of_a_repository_that_was_moved_is_made_anew(machine):
    machine.enter()
    machine.calls()
    machine.repository = machine.repository.rename(machine.root / "moved")
    machine.venv = machine.repository / ".venv"
    assert machine.enter().out.strip() == str(machine.venv / "bin" / "python")
    assert machine.calls() == ["-m venv 3.12", "-m pip 3.12"]


def test_what_is_no_environment_is_not_removed(machine):
    machine.venv.mkdir()
    (machine.venv / "mine").touch()
    machine.enter()
    assert (machine.venv / "mine").exists()


def test_two_scripts_started_together_install_once(machine):
    (machine.root / "pip-does").write_text("sleep 0.5")
    machine.chosen()
    both = [machine.start("enter_environment dev", TOOLS=":/usr/bin:/bin") for _ in range(2)]
    outcomes = [process.communicate(timeout=PATIENCE)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert machine.calls() == ["-m venv 3.12", "-m pip 3.12"]
    assert sum("waiting for another script" in err for err in outcomes) == 1
