"""Command-line options that several benchmarks share."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from megatron_s2.errors import flag_name


def add_names(
    parser: ArgumentParser, flag: str, names: Iterable[str], text: str, default: list[str] | None = None
) -> None:
    """Adds an option that takes one or more of some names; `text` completes its help."""
    text = f"any of {', '.join(names)}; {text}"
    parser.add_argument(flag, nargs="+", choices=names, default=default, metavar="NAME", help=text)


def add_integers(
    parser: ArgumentParser, flag: str, expected: str, text: str, default: list[int] | None = None
) -> None:
    """Adds an option that takes integers separated by commas; `expected` says of what, for its error message:
    "numbers of ranks, such as 2,4"."""

    def integers(value: str) -> list[int]:
        try:
            return [int(word) for word in value.split(",")]
        except ValueError:
            raise ArgumentTypeError(f"{value}: must be {expected}") from None

    parser.add_argument(flag, type=integers, default=default, metavar="N,N,…", help=text)


def require_positive(**values: int) -> None:
    """Raises ValueError, naming the flag, if the value of an option is less than 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{flag_name(name)} {value}: must be >= 1")


def add_size_arguments[Sizes](
    parser: ArgumentParser, defaults: Mapping[str, Sizes], meanings: Mapping[str, str] | None = None
) -> None:
    """Adds an integer option for each field of a dataclass.

    Args:
        defaults: instance of the dataclass that has the default values, by device.
        meanings: help text by field; the default values follow it.
    """
    group = parser.add_argument_group("the model, by default of a size for the device")
    for name in (field.name for field in fields(next(iter(defaults.values())))):
        values = ", ".join(f"{getattr(sizes, name)} on {device}" for device, sizes in defaults.items())
        text = "; ".join(filter(None, ((meanings or {}).get(name), values)))
        group.add_argument(flag_name(name), type=int, metavar="N", help=text)


def chosen_sizes[Sizes](args: Namespace, defaults: Mapping[str, Sizes]) -> Sizes:
    """Returns the defaults of `args.device`, with the values of the given options in place of theirs."""
    sizes = defaults[args.device]
    given = {field.name: getattr(args, field.name) for field in fields(sizes)}
    return replace(sizes, **{name: value for name, value in given.items() if value is not None})
