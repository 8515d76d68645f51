"""Megatron's own parser and validation on a command line, without starting a run."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from types import SimpleNamespace
from unittest import mock

from megatron.training import argument_utils, arguments

from megatron_s2.training.arguments import add_s2_args

HOPPER = SimpleNamespace(major=9, minor=0)


def read_help_once() -> None:
    """Parses Megatron's source, which has the help of its flags, now and not at each parsing of arguments."""
    read, found = argument_utils.ArgumentGroupFactory._get_field_docstrings, {}

    def read_once(self, config: type) -> dict[str, str]:
        if config not in found:
            found[config] = read(self, config)
        return found[config]

    argument_utils.ArgumentGroupFactory._get_field_docstrings = read_once
    arguments.add_megatron_arguments(ArgumentParser())


read_help_once()


def parse(argv: Sequence[str], ranks: int = 1) -> Namespace:
    """The namespace of a command line on one of `ranks` ranks; ends the process as argparse does."""
    with (
        mock.patch.object(sys, "argv", ["pretrain_gpt.py", *argv]),
        mock.patch.dict("os.environ", WORLD_SIZE=str(ranks)),
    ):
        return arguments.parse_args(add_s2_args)


def validate_on_gpus(args: Namespace) -> Namespace:
    """Megatron's validation of parsed arguments, on a node that answers as one with Hopper GPUs does."""
    with (
        mock.patch("torch.cuda.get_device_properties", return_value=HOPPER),
        mock.patch.dict("os.environ", CUDA_DEVICE_MAX_CONNECTIONS="1"),
    ):
        return arguments.validate_args(args)
