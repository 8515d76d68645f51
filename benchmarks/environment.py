"""Where a row comes from: machine, versions of packages, commit, hash of the measured code, date.

`python -m benchmarks.environment` prints what `scripts/gpu_record.sh` needs of it.
"""

import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_s2

ROOT = Path(__file__).parent.parent
# The code that every row's `commit` stands for; benchmarks of other code store a hash of that as well.
_MEASURED = (
    "megatron_s2/pattern/*.py",
    "megatron_s2/kernels/*.py",
    "megatron_s2/kernels/*.cpp",
    "benchmarks/cases.py",
    "benchmarks/implementations.py",
    "benchmarks/exactness.py",
    "benchmarks/measure.py",
    "benchmarks/attention_trial.py",
)
# All code that a stage of the record, or a test, may run.
ALL_CODE = (
    *("megatron_s2/**/*.py", "megatron_s2/**/*.cpp", "benchmarks/*.py"),
    *("scripts/*.*", "scripts/lib/*", "tests/**/*.py"),
)


def facts(device: str = "cpu") -> dict:
    """Returns the part of a row that all rows of a run on `cpu` or `cuda` have in common."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": package_version("triton"),
            "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
            "dkernel": package_version("dkernel"),
            "megatron_s2": megatron_s2.__version__,
        },
        "commit": commit(),
    }


def machine(device: str) -> dict:
    """Describes this machine; `load` is the load average of the last minute."""
    cores = len(os.sched_getaffinity(0))
    cpu = _cpu_model()
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", (gpu or f"{cpu} {cores} cores").lower()).strip("-"),
        "cpu": cpu,
        "gpu": gpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def package_version(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> dict:
    """Identifies the measured code: `hash` of the commit, `dirty` if the code differs from it, `code` a hash
    of the code itself. Without git, `hash` and `dirty` are None."""
    files = _files(_MEASURED)
    status = _git("status", "--porcelain", "--", *(str(path.relative_to(ROOT)) for path in files))
    return {
        "hash": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "code": code_hash(_MEASURED),
    }


def code_hash(patterns: Iterable[str]) -> str:
    """Returns a hash of the source files that match glob patterns relative to the checkout.

    Raises:
        FileNotFoundError: a pattern matches no file, so that the hash would miss code that has moved.
    """
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in _files(patterns))).hexdigest()[:16]


def _files(patterns: Iterable[str]) -> list[Path]:
    files = {pattern: list(ROOT.glob(pattern)) for pattern in patterns}
    if missing := [pattern for pattern, paths in files.items() if not paths]:
        raise FileNotFoundError(f"no file of {ROOT} matches {', '.join(missing)}")
    return sorted({path for paths in files.values() for path in paths})


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


def same_setting(row: dict, now: dict) -> bool:
    """Whether a row was measured by the same code, versions and threads on the same machine as `now`."""
    return _setting(row) == _setting(now)


def _setting(facts: dict) -> tuple:
    machine = {key: value for key, value in facts["machine"].items() if key != "load"}
    return facts["commit"].get("code"), facts["versions"], machine  # the oldest rows have no `code`


def main(device: str | None = None) -> None:
    """Prints the device (`cuda` if there is one, unless given), the machine's name, and a hash of all code,
    versions and machine: a stage of the record that was done under the same hash is not run again."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    now = facts(device)
    setting = json.dumps([code_hash(ALL_CODE), _setting(now)])
    print(device, now["machine"]["name"], hashlib.sha256(setting.encode()).hexdigest()[:16])


if __name__ == "__main__":
    main(*sys.argv[1:])
