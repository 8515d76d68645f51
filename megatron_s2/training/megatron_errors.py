"""The errors of Megatron's own validation, in words that name the flags."""

from __future__ import annotations

import linecache
import re
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_s2.errors import flag_name


@contextmanager
def errors_that_name_flags(args: Namespace) -> Iterator[None]:
    """Turns what Megatron refuses inside the context into a ValueError that names the flags concerned.

    Args:
        args: parsed arguments, whose names Megatron uses in its messages and conditions.
    """
    try:
        yield
    except AssertionError as error:
        raise ValueError(_with_flags(failed_assertion(error), _statement(error), args)) from error
    except ValueError as error:
        if (message := _with_flags(str(error), _statement(error), args)) == str(error):
            raise  # as the class it has
        raise ValueError(message) from error


def failed_assertion(error: AssertionError) -> str:
    """Returns the message of a failed assertion in Megatron's validation or, if it has none, its condition.

    Raises:
        AssertionError: `error`, if it is not from Megatron: it is then a bug, not bad input.
    """
    import megatron.core

    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not Path(frame.filename).is_relative_to(Path(megatron.core.__file__).parents[1]):
        raise error
    if str(error):
        return str(error)
    condition = _statement(error).removeprefix("assert ").rstrip(", \\")
    return f"Megatron requires {re.sub(r'\bargs\.(\w+)', lambda name: flag_name(name[1]), condition)}"


def _statement(error: Exception) -> str:
    """Returns the line of code that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = frame.lineno or 0
    last = max(first, frame.end_lineno or 0)
    return " ".join(linecache.getline(frame.filename, line).strip() for line in range(first, last + 1))


def _with_flags(message: str, statement: str, args: Namespace) -> str:
    """Returns the message with arguments replaced by their flags; if it has none, those of the statement."""
    if "--" in message:
        return message

    def flag(name: re.Match[str]) -> str:
        return flag_name(name[0]) if name[0] in vars(args) else name[0]

    named = re.sub(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", flag, message)
    if "--" in named:
        return named
    flags = [
        flag_name(name) for name in re.findall(r"\b(?:args|self)\.(\w+)", statement) if name in vars(args)
    ]
    return f"{', '.join(dict.fromkeys(flags))}: {message}" if flags else message
