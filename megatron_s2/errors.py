"""The exception that every package raises for bad input, and the spelling of flags in its messages."""


class InputError(ValueError):
    """Bad input. The message is one line that names the flag or file, its value and what is allowed."""


def flag_name(argument: str) -> str:
    """Returns the command-line flag of an argument: `--s2-block-size` for `s2_block_size`."""
    return "--" + argument.replace("_", "-")
