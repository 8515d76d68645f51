"""Packaging of megatron-s2."""

from pathlib import Path

from setuptools import find_packages, setup

# The lower bounds are the oldest set of docs/versions.md (constraints-oldest.txt). torch has no upper bound:
# images for GPUs bring their own. Megatron has one: its training loop changes with every release.
TEST = ["pytest>=8.2", "pytest-xdist>=3.8.0", "hypothesis>=6.100"]
PLOT = ["matplotlib>=3.9"]

setup(
    name="megatron-s2",
    version="0.1.0",
    description="S2 attention for long-context pretraining with unmodified NVIDIA Megatron",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_s2", "megatron_s2.*"]),
    package_data={"megatron_s2.kernels": ["torch_tasks.cpp"]},  # compiled where it is used
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "megatron-core[training]>=0.19,<0.20",
        "safetensors>=0.5",
        "transformers>=5.4",
        "tensorboard>=2.18",
    ],
    extras_require={
        "plot": PLOT,
        "wandb": ["wandb"],
        # Builds CUDA code; NVIDIA's Apex has no package on PyPI (the `apex` there is unrelated).
        "te": ["megatron-core[te]>=0.19,<0.20"],
        "test": [*TEST, *PLOT],
        "dev": [*TEST, *PLOT, "ruff==0.17.5", "import-linter==2.17", "pre-commit>=4"],
    },
)
