"""A pytest plugin: a stored row for each test as it ends; what passed with the same code is not run again.

`pytest -p benchmarks.tests_passed --tests-passed DIR`, with xdist or without.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.environment import code_hash, facts, same_setting
from benchmarks.record import CODE
from benchmarks.results import ResultFile, read_rows

_LAST = 2000  # characters kept of what a failed test says


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tests-passed", type=Path, metavar="DIR", help="directory of the rows")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("tests_passed") is not None:
        config.pluginmanager.register(TestsPassed(config), "tests-passed")


class TestsPassed:
    """Rows of one session; workers of xdist get from it what is left out, and store nothing."""

    __test__ = False

    def __init__(self, config: pytest.Config):
        self._results = None
        if (given := getattr(config, "workerinput", None)) is not None:
            self._passed = set(given["tests_passed"])
            return
        now = {**facts("cuda" if torch.cuda.is_available() else "cpu"), "record_code": code_hash(CODE)}
        self._results = ResultFile(config.rootpath / config.getoption("tests_passed"), "tests", now)
        before = read_rows(self._results.path.parent.parent, "tests").get(self._results.path.parent, [])
        newest = {
            row["test"]: row["outcome"]
            for row in before
            if row["record_code"] == now["record_code"] and same_setting(row, now)
        }
        self._passed = {test for test, outcome in newest.items() if outcome == "passed"}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        node.workerinput["tests_passed"] = sorted(self._passed)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._passed]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self._passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ends = report.when == "call" or not report.passed  # a failed or skipped setup, a failed teardown
        if self._results is None or not ends:
            return
        said = None if report.passed else str(report.longrepr)[-_LAST:]
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "said": said}
        self._results.append(row)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._passed:
            session.exitstatus = pytest.ExitCode.OK
