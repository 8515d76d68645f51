"""Lets tests import the script, and keeps them on one thread."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread):
    """Models of these sizes gain nothing from threads."""
