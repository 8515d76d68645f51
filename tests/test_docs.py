"""The documentation keeps its word: its Python prints what stands beside it, its links exist."""

import argparse
import re
from pathlib import Path

import pytest
from megatron_run import run_command

from megatron_s2.training.arguments import add_s2_args

DOCS = Path(__file__).parent.parent / "docs"
# Whose numbers are all printed by their own Python blocks.
COMPUTED = [
    DOCS / "how-s2-works.md",
    DOCS / "pattern-files.md",
    DOCS / "context-parallel.md",
    DOCS / "offload.md",
    DOCS / "generation.md",
]
MOST_IMAGE_BYTES = 150_000


def python_blocks() -> list:
    return [
        pytest.param(page, block, id=f"{page.stem}-{number}")
        for page in COMPUTED
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S))
    ]


@pytest.mark.parametrize(("page", "block"), python_blocks())
def test_each_python_block_prints_what_the_page_says(page, block, tmp_path):
    if "picture" in block:
        pytest.importorskip("matplotlib")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    block = f"import sys; sys.path.append({str(DOCS.parent)!r})  # for the benchmarks\n{block}"
    done = run_command("-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout in page.read_text(), f"{page.name} should say:\n{done.stdout}"
    drawn = {image.name for image in (tmp_path / "docs" / "images").iterdir()}
    assert drawn == set(re.findall(r"docs/images/([\w.-]+)", block))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_links_to_exists(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pictures_are_small():
    for image in (DOCS / "images").iterdir():
        assert image.stat().st_size < MOST_IMAGE_BYTES, image.name


def test_the_tables_of_flags_have_every_flag_once_and_no_other():
    parser = argparse.ArgumentParser()
    add_s2_args(parser)
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--s2-")}
    pages = "".join((DOCS / page).read_text() for page in ("how-s2-works.md", "offload.md"))
    assert sorted(re.findall(r"^\| `(--s2-[a-z0-9-]+)`", pages, re.M)) == sorted(flags)
