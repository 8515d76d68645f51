"""What the tests of scripts/plan.py and scripts/plan_offload.py share."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from script_main import SCRIPTS, load_main
from waiting import PATIENCE

PNG = b"\x89PNG\r\n\x1a\n"


class PlanningScript:
    """A script of that name that prints a table, or JSON with `--json`, and draws a picture with `--plot`.

    Args:
        flags: flags of a complete command line, to which the methods add theirs.
    """

    def __init__(self, name: str, flags: list[str]) -> None:
        self.name, self.flags = name, flags
        self.main = load_main(name)

    def json(self, capsys, *more) -> dict:
        self.main([*self.flags, *map(str, more), "--json"])
        return json.loads(capsys.readouterr().out)

    def refusal(self, capsys, *argv) -> str:
        """Returns the one line with which the script ends on a wrong command line."""
        with pytest.raises(SystemExit) as ended:
            self.main(list(map(str, argv)))
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    def assert_page_shows_output(self, capsys, page: str) -> None:
        """Asserts that every console block of `docs/<page>` with the script shows what the script prints."""
        text = (SCRIPTS.parent / "docs" / page).read_text()
        block = rf"^```console\n\$ python scripts/{self.name}.py (.*?[^\\])\n(.*?)^```$"
        shown = re.findall(block, text, re.M | re.S)
        assert shown
        for command, output in shown:
            self.main(command.replace("\\\n", " ").split())
            assert capsys.readouterr().out == output

    def assert_imports_nothing_heavy(self) -> None:
        program = (
            "import runpy, sys\n"
            f"sys.argv = [{str(SCRIPTS / f'{self.name}.py')!r}, *{self.flags!r}]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as ended: assert not ended.code\n"
            "print([name for name in ('torch', 'megatron', 'matplotlib', 'triton') if name in sys.modules])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"

    def assert_draws(self, capsys, picture: Path) -> str:
        """Asserts that `--plot` writes a PNG file; returns what the script prints beside it."""
        pytest.importorskip("matplotlib")
        self.main([*self.flags, "--plot", str(picture)])
        assert picture.read_bytes().startswith(PNG)
        return capsys.readouterr().out


def short_id(value: object) -> str | None:
    """The id of a case: its flags; a message has none."""
    return None if isinstance(value, str) else " ".join(map(str, value))
