"""Makes Triton's interpreter three times as quick, multiply bfloat16, and round an fma once."""

from dataclasses import replace

import numpy as np


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


def multiply_bfloat16() -> None:
    """Lets `tl.dot` multiply bfloat16, which the interpreter keeps as the 16 bits of an integer and
    multiplies as such: in float32, whose upper half they are, products of bfloat16 are exact, as on tensor
    cores."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def as_float32(x):
        if x.dtype.scalar != bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), float32)

    def create_dot(self, a, b, *others):
        return multiply(self, as_float32(a), as_float32(b), *others)

    InterpreterBuilder.create_dot = create_dot


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once: exact product in double, sum rounded to odd, then to float32."""
    product, c = np.multiply(a, b, dtype=np.float64), np.float64(c)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    inexact_and_even = (error != 0) & (total.view(np.int64) & 1 == 0)
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(inexact_and_even, odd, total).astype(np.float32)


def round_fma_once() -> None:
    """Lets `tl.fma` of float32 round once, as a GPU does; before Triton 3.9 the interpreter rounds twice."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self, x, y, z):
        return TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma
