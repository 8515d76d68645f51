"""A pytest plugin that stores a row for each test as it ends, and skips tests that passed with the same code.

`pytest -p benchmarks.tests_passed --tests-passed DIR`, with or without xdist.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.environment import ALL_CODE, code_hash, facts, same_setting
from benchmarks.results import ResultFile, read_rows

_LONGEST_TEXT = 2000  # characters kept of the report of a failed test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tests-passed", type=Path, metavar="DIR", help="directory of the rows")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("tests_passed") is not None:
        config.pluginmanager.register(TestsPassed(config), "tests-passed")


class TestsPassed:
    """The rows of one session. Workers of xdist receive the names of tests that passed, and store nothing."""

    __test__ = False

    def __init__(self, config: pytest.Config):
        self._results = None
        if (worker := getattr(config, "workerinput", None)) is not None:
            self._passed = set(worker["tests_passed"])
            return
        now = {**facts("cuda" if torch.cuda.is_available() else "cpu"), "record_code": code_hash(ALL_CODE)}
        self._results = ResultFile(config.rootpath / config.getoption("tests_passed"), "tests", now)
        machine = self._results.path.parent
        outcomes = {
            row["test"]: row["outcome"]
            for row in read_rows(machine.parent, "tests").get(machine, [])
            if row["record_code"] == now["record_code"] and same_setting(row, now)
        }
        self._passed = {test for test, outcome in outcomes.items() if outcome == "passed"}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        node.workerinput["tests_passed"] = sorted(self._passed)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        passed = [item for item in items if item.nodeid in self._passed]
        if passed:
            config.hook.pytest_deselected(items=passed)
            items[:] = [item for item in items if item.nodeid not in self._passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        is_end = report.when == "call" or not report.passed  # failed or skipped setup, failed teardown
        if self._results is None or not is_end:
            return
        text = None if report.passed else str(report.longrepr)[-_LONGEST_TEXT:]
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "said": text}
        self._results.append(row)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._passed:
            session.exitstatus = pytest.ExitCode.OK
