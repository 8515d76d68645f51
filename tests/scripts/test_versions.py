"""The sets of package versions: what is pinned, what setup.py allows and what the docs say are one thing."""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = {"tested": "constraints.txt", "oldest": "constraints-oldest.txt"}
TE_FILE = "constraints-te.txt"


def pinned(file: str) -> dict[str, str]:
    """The one version of each package in a constraints file, those of other platforms left out."""
    lines = (ROOT / file).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [r for r in requirements if r.marker is None or r.marker.evaluate()]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in here}


def direct_requirements() -> list[Requirement]:
    """What setup.py asks for, its extra `dev` included."""
    quoted = re.findall(r'"([a-z][\w.-]*(?:\[\w+\])?[=><][^"]*)"', (ROOT / "setup.py").read_text())
    return [Requirement(text) for text in quoted if not text.startswith("megatron-core[te]")]


@pytest.mark.parametrize("versions", FILES)
def test_every_package_has_one_version_that_setup_py_allows(versions):
    versions_of = pinned(FILES[versions])
    for requirement in direct_requirements():
        assert versions_of[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_oldest_set_is_the_lower_bounds():
    versions_of = pinned(FILES["oldest"])
    for requirement in direct_requirements():
        lowest = min(s.version for s in requirement.specifier if s.operator in (">=", "=="))
        oldest = versions_of[canonicalize_name(requirement.name)]
        assert re.fullmatch(re.escape(lowest) + r"(\.0)*", oldest), requirement


@pytest.mark.parametrize("versions", FILES)
def test_the_docs_name_these_versions(versions):
    rows = (ROOT / "docs" / "versions.md").read_text().splitlines()
    row = next(row for row in rows if row.startswith(f"| {versions} |"))
    for name in ("torch", "triton", "megatron-core", "transformers"):
        assert f" {pinned(FILES[versions])[name]} |" in row, name


def test_transformer_engine_is_pinned_in_one_place_and_adds_to_the_tested_versions():
    added = pinned(TE_FILE)
    assert all(re.fullmatch(r"[\d.]+", version) for version in added.values())
    assert not added.keys() & pinned(FILES["tested"]).keys()
    engines = {added[f"transformer-engine{part}"] for part in ("", "-cu13", "-torch")}
    assert len(engines) == 1  # its loader asserts that
    rows = (ROOT / "docs" / "versions.md").read_text()
    assert f"Transformer Engine {engines.pop()}" in rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--versions latest", "--versions latest: must be tested, oldest or newest"),
        ("--with-te --versions oldest", "--with-te: only with the tested versions; remove --versions oldest"),
    ],
)
def test_other_sets_are_refused(words, message):
    run = subprocess.run(
        ["bash", ROOT / "scripts" / "test.sh", *words.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (2, f"error: {message}\n")
