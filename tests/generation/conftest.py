"""What tests of generation share: one thread, and patterns that tiny sequences exercise."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass
