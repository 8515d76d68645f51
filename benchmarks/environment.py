"""What every row says about where it comes from: machine, versions, commit, date."""

import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_s2

ROOT = Path(__file__).parent.parent
_MEASURED = (
    "megatron_s2/*pattern.py",
    "megatron_s2/kernels/*.py",
    "benchmarks/cases.py",
    "benchmarks/implementations.py",
    "benchmarks/exactness.py",
    "benchmarks/measure.py",
    "benchmarks/attention.py",
)


def facts(device: str = "cpu") -> dict:
    """The part of a row that is the same for a whole run on `cpu` or `cuda`."""
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
    """`load` is the load average of the minute before the run."""
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
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> dict:
    """Which code was measured: the commit, whether that code differs from it, and a hash of the code itself.

    A copy of the sources without git has the last only.
    """
    files = _files(_MEASURED)
    status = _git("status", "--porcelain", "--", *(str(path.relative_to(ROOT)) for path in files))
    return {
        "hash": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "code": code_hash(_MEASURED),
    }


def code_hash(patterns: Iterable[str]) -> str:
    """A hash of the sources that patterns, relative to the checkout, name."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in _files(patterns))).hexdigest()[:16]


def _files(patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


def same_setting(row: dict, now: dict) -> bool:
    """Whether a row was measured by the same code, on the same machine with the same versions and threads.

    Rows from before the code's hash was stored never were.
    """

    def setting(facts: dict) -> tuple:
        machine = {key: value for key, value in facts["machine"].items() if key != "load"}
        return facts["commit"].get("code"), facts["versions"], machine

    return setting(row) == setting(now)
