"""A conversion holds at most one file of weights in memory.

The tests measure how far the resident memory of a process rises during a conversion, mapped files included.
A small model is converted before, so that what libraries allocate when they are first used is not counted.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
from megatron_run import ROOT
from waiting import PATIENCE

from megatron_s2.checkpoint.families import model_tensors
from megatron_s2.checkpoint.hf_config import model_from_config
from megatron_s2.checkpoint.safetensors_files import write_safetensors

SHARD = 40 * 10**6
# For allocators, and for a tensor that is fused or split.
SLACK = 40 * 10**6
# Many small tensors, so that one in memory weighs little.
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "vocab_size": 4000,
}
EXPERTS = {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
CONFIGS = {
    "llama": {"model_type": "llama", "num_hidden_layers": 32},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_hidden_layers": 6, **EXPERTS},
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

def growth(*words):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets VmHWM
    main(words)
    return resident("VmHWM") - before

for size in ("small", "large"):
    to_megatron = growth("hf-to-megatron", "--input", f"{size}/hf", "--output", f"{size}/megatron")
    to_hugging_face = growth(
        *("megatron-to-hf", "--input", f"{size}/megatron", "--output", f"{size}/back"),
        *("--max-shard-size", sys.argv[1]),
    )
print(to_megatron, to_hugging_face)
"""


def write_model(directory, config: dict) -> int:
    """Writes a Hugging Face model in files of at most `SHARD` bytes, and returns its bytes."""
    shapes = {
        name: shape
        for tensor in model_tensors(model_from_config(config))
        for name, shape in tensor.hf_shapes.items()
    }
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    directory.mkdir(parents=True)
    tensors = ((name, torch.full(shape, 0.5, dtype=torch.bfloat16)) for name, shape in shapes.items())
    write_safetensors(directory, sizes, tensors, SHARD)
    (directory / "config.json").write_text(json.dumps(config))
    return sum(sizes.values())


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", CONFIGS)
def test_at_most_one_file_of_weights_is_in_memory(tmp_path, family):
    config = SIZES | CONFIGS[family]
    write_model(tmp_path / "small/hf", config | {"num_hidden_layers": 1})
    total = write_model(tmp_path / "large/hf", config)
    assert total > 250e6
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
        assert len(list((tmp_path / "large" / directory).glob("*.safetensors"))) == math.ceil(total / SHARD)
    to_megatron, to_hugging_face = map(int, done.stdout.splitlines()[-1].split())
    assert to_megatron < SHARD + SLACK < total / 3
    assert to_hugging_face < SHARD + SLACK
