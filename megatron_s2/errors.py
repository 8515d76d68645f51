"""The error of the data commands."""


class InputError(ValueError):
    """Bad input, told in one line that names the flag or file, its value and what is allowed."""
