"""megatron-s2: S2 attention for long-context pretraining with unmodified Megatron.

The public names load on first use, so that `import megatron_s2` imports neither torch nor Megatron.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME_OF = {
    "BlockMaskPattern": "megatron_s2.pattern",
    "S2Pattern": "megatron_s2.pattern",
    "s2_attention": "megatron_s2.kernels",
}

__all__ = ["BlockMaskPattern", "S2Pattern", "s2_attention"]


def __getattr__(name: str):
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
