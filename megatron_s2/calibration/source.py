"""The model that is calibrated or asked for needles: a Hugging Face directory, or a Megatron checkpoint."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_s2.calibration.layered_model import LayeredModel
from megatron_s2.checkpoint.convert import to_hugging_face
from megatron_s2.data.token_ids import Vocabulary
from megatron_s2.data.tokenizer import has_tokenizer
from megatron_s2.generation.hugging_face import load_pretrained
from megatron_s2.hf import settings_of
from megatron_s2.pattern import S2Settings


@dataclass(frozen=True)
class Source:
    """A model and what belongs to it.

    Args:
        flag: flag that it comes from and its value, for messages.
        tokenizer: None for a model without one.
        settings: the pattern that it was trained with; None for a dense model.
    """

    flag: str
    model: LayeredModel
    tokenizer: PreTrainedTokenizerBase | None
    settings: S2Settings | None

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens that the model knows."""
        return Vocabulary(self.model.vocab_size, self.flag)

    def required_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer.

        Raises:
            ValueError: there is none.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{self.flag}: has no tokenizer, which needles are made with; put its files there"
            )
        return self.tokenizer


def load_source(hf: Path | None, checkpoint: Path | None, dtype: str = "auto") -> Source:
    """Loads a model onto the GPU, or the CPU where there is none.

    A Megatron checkpoint is exported to a temporary directory first (`checkpoint/convert.py`).

    Args:
        hf: Hugging Face directory; None to load `checkpoint`.
        checkpoint: directory of Megatron's `--save`.
        dtype: dtype of the weights, as transformers names it; "auto" for that of the files.

    Raises:
        ValueError: there is no such model, or one of another family.
    """
    if hf is not None:
        return _load(hf, f"--hf {hf}", dtype)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        try:
            to_hugging_face(
                checkpoint, directory, dtype=None, max_shard_size=5 * 10**9, vocab_size=None, family=None
            )
        except ValueError as error:
            raise ValueError(str(error).replace("--input", "--load", 1)) from error
        return _load(directory, f"--load {checkpoint}", dtype)


def _load(directory: Path, flag: str, dtype: str) -> Source:
    model = load_pretrained(directory, dtype)
    has_pattern = getattr(model.config, "s2_attention", None) is not None
    settings = settings_of(model.config) if has_pattern else None
    tokenizer = AutoTokenizer.from_pretrained(directory) if has_tokenizer(directory) else None
    try:
        return Source(flag, LayeredModel(model), tokenizer, settings)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
