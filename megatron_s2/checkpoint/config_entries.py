"""Checks of single entries of a `config.json`."""

import math
from collections.abc import Mapping

from megatron_s2.errors import InputError

Config = Mapping[str, object]


def positive_int(config: Config, entry: str) -> int:
    """Returns an entry that must be a whole number >= 1; raises InputError where it is not."""
    value = config.get(entry)
    if not isinstance(value, int) or value < 1:
        raise entry_error(entry, value, "must be a whole number >= 1")
    return value


def positive_number(entry: str, value: object) -> float:
    """Returns the value of an entry, which must be a number > 0; raises InputError where it is not."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise entry_error(entry, value, "must be a number > 0")
    return float(value)


def entry_error(entry: str, value: object, rule: str) -> InputError:
    """Returns the error of an entry that has another value than it must have."""
    return InputError(f"config.json: {entry} {value}: {rule}")
