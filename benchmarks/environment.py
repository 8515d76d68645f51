"""What every row says about where it comes from: machine, versions, commit, date."""

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_s2

ROOT = Path(__file__).parent.parent
_MEASURED_CODE = ("megatron_s2/pattern.py", "megatron_s2/kernels", "benchmarks/*.py", "scripts/bench.py")


def facts() -> dict:
    """The part of a row that is the same for a whole run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "megatron_s2": megatron_s2.__version__,
        },
        "commit": commit(),
    }


def machine() -> dict:
    cores = len(os.sched_getaffinity(0))
    cpu = _cpu_model()
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", f"{cpu} {cores} cores".lower()).strip("-"),
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> dict:
    """The checked-out commit, and whether the code that is measured differs from it."""
    return {
        "hash": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", *_MEASURED_CODE)),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
