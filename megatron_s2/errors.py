"""The exceptions that more than one package raises, and how their messages name a flag."""


class InputError(ValueError):
    """Bad input. The message is one line that names the flag or file, its value and what is allowed."""


def flag_name(argument: str) -> str:
    """The command-line flag of an argument's name: `--s2-block-size` for `s2_block_size`."""
    return "--" + argument.replace("_", "-")
