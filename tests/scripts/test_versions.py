"""The sets of package versions: what is pinned, what setup.py allows and what the docs say are one thing."""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = {"tested": "constraints.txt", "oldest": "constraints-oldest.txt"}


def pinned(versions: str) -> dict[str, str]:
    """The one version of each package in a constraints file, those of other platforms left out."""
    lines = (ROOT / FILES[versions]).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [r for r in requirements if r.marker is None or r.marker.evaluate()]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in here}


def direct_requirements() -> list[Requirement]:
    """What setup.py asks for, its extra `dev` included."""
    quoted = re.findall(r'"([a-z][\w.-]*(?:\[\w+\])?[=><][^"]*)"', (ROOT / "setup.py").read_text())
    return [Requirement(text) for text in quoted if not text.startswith("megatron-core[te]")]


@pytest.mark.parametrize("versions", FILES)
def test_every_package_has_one_version_that_setup_py_allows(versions):
    versions_of = pinned(versions)
    for requirement in direct_requirements():
        assert versions_of[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_oldest_set_is_the_lower_bounds():
    versions_of = pinned("oldest")
    for requirement in direct_requirements():
        lowest = min(s.version for s in requirement.specifier if s.operator in (">=", "=="))
        oldest = versions_of[canonicalize_name(requirement.name)]
        assert re.fullmatch(re.escape(lowest) + r"(\.0)*", oldest), requirement


@pytest.mark.parametrize("versions", FILES)
def test_the_docs_name_these_versions(versions):
    rows = (ROOT / "docs" / "versions.md").read_text().splitlines()
    row = next(row for row in rows if row.startswith(f"| {versions} |"))
    for name in ("torch", "triton", "megatron-core", "transformers"):
        assert f" {pinned(versions)[name]} |" in row, name


def test_another_set_is_refused():
    run = subprocess.run(
        ["bash", ROOT / "scripts" / "test.sh", "--versions", "latest"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (
        2,
        "error: --versions latest: must be tested, oldest or newest\n",
    )
