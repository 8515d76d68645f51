"""A conversion holds one file of weights at most, where one and the model in its own dtype would be allowed.

Measured is how far the resident memory of a process rises during a conversion, mapped files included.
"""

import json
import math
import subprocess
import sys

import torch
from megatron_run import ROOT
from waiting import PATIENCE

from megatron_s2.checkpoint import hf_config
from megatron_s2.checkpoint.safetensors_files import write_weights
from megatron_s2.checkpoint.tensors import placed_tensors

SHARD = 40 * 10**6
# Of allocators, of what libraries set up when they are first used, of a tensor that is cut or joined.
SLACK = 40 * 10**6
# Many small tensors, so that what is held of one weighs little.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "vocab_size": 4000,
}
CONVERT = """
import sys
from pathlib import Path

import torch

import megatron.core.safe_globals
import megatron_s2.checkpoint.convert
from convert_checkpoint import main

torch.set_num_threads(1)

def resident(name):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])

def risen(*words):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets VmHWM
    main(words)
    return resident("VmHWM") - before

there = risen("hf-to-megatron", "--input", "hf", "--output", "megatron")
back = risen("megatron-to-hf", "--input", "megatron", "--output", "back", "--max-shard-size", sys.argv[1])
print(there, back)
"""


def test_no_more_than_a_file_of_weights_is_held(tmp_path):
    source = tmp_path / "hf"
    source.mkdir()
    shapes = {
        name: shape
        for placed in placed_tensors(hf_config.model_of(CONFIG))
        for name, shape in placed.parts.items()
    }
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    whole = sum(sizes.values())
    assert whole > 250e6
    tensors = ((name, torch.full(shape, 0.5, dtype=torch.bfloat16)) for name, shape in shapes.items())
    write_weights(source, sizes, tensors, SHARD)
    (source / "config.json").write_text(json.dumps(CONFIG))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n{CONVERT}",
            str(SHARD),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for directory in ("hf", "back"):
        assert len(list((tmp_path / directory).glob("*.safetensors"))) == math.ceil(whole / SHARD)
    there, back = map(int, done.stdout.splitlines()[-1].split())
    assert there < SHARD + SLACK < whole / 3
    assert back < SHARD + SLACK
