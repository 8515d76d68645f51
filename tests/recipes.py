"""The recipes in examples/, and the command lines that they would launch."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_run import ROOT
from waiting import PATIENCE

EXAMPLES = ROOT / "examples"
RECIPES = {
    "tiny-cpu": EXAMPLES / "tiny-cpu" / "train.sh",
    "one-gpu": EXAMPLES / "one-gpu" / "train.sh",
    "slurm": EXAMPLES / "slurm" / "train.sbatch",
}
RANKS = {"one-gpu": 1, "slurm": 32}
SLURM = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_NNODES": "4",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[3-6]",
}
LAUNCHER = '#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@"\n'
SCONTROL = "#!/bin/bash\nprintf 'node3\\nnode4\\nnode5\\nnode6\\n'\n"


def environment(first_on_path: Path | None = None) -> dict[str, str]:
    places = [first_on_path, Path(sys.executable).parent, os.environ["PATH"]]
    return {**os.environ, **SLURM, "PATH": ":".join(str(place) for place in places if place)}


def launch(directory: Path, recipe: str, *words: str) -> subprocess.CompletedProcess:
    """Runs a recipe in `directory`, with stand-ins for the launchers that print the words they are given."""
    for name, script in {"torchrun": LAUNCHER, "srun": LAUNCHER, "scontrol": SCONTROL}.items():
        (directory / name).write_text(script)
        (directory / name).chmod(0o755)
    return subprocess.run(
        ["bash", str(RECIPES[recipe]), *words],
        cwd=directory,
        env=environment(first_on_path=directory),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def split(done: subprocess.CompletedProcess) -> tuple[list[str], list[str]]:
    """The launcher's words and the training's."""
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    script = words.index("scripts/pretrain_gpt.py")
    return words[:script], words[script + 1 :]
