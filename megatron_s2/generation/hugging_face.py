"""Loads Hugging Face models, and generates with one whose attention is S2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from megatron_s2.hf import CACHE_ARGUMENT, NAME, S2Cache, settings_of
from megatron_s2.kv_cache.cache import KVCache


def load_pretrained(directory: str | Path, dtype: str = "auto", *, needs_s2: bool = False) -> PreTrainedModel:
    """Loads a causal language model from safetensors onto the GPU, or the CPU where there is none.

    It runs with S2 attention if its config.json has S2 settings, else with SDPA.

    Args:
        dtype: dtype of the weights, as transformers names it; "auto" for that of the files.
        needs_s2: whether to refuse a model without S2 settings.

    Raises:
        ValueError: the directory has no such model, or an incomplete one.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"--hf {directory}: is not a directory with a config.json")
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory)
        sparse = needs_s2 or getattr(config, "s2_attention", None) is not None
        if sparse:
            settings_of(config)
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=NAME if sparse else "sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--hf {directory}: {error}") from error
    if missing := report["missing_keys"]:
        raise ValueError(
            f"--hf {directory}: has no {min(missing)}; transformers would initialize it randomly"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class HuggingFaceDecoder:
    """A `Decoder` (decoding.py) over a causal language model of transformers.

    Args:
        model: model with `attn_implementation="s2"`; set to evaluation mode.
        batch: number of sequences.
        max_tokens: largest number of tokens of a sequence.

    Raises:
        ValueError: the model has another attention, or no S2 settings.
    """

    def __init__(self, model: PreTrainedModel, batch: int, max_tokens: int) -> None:
        self._model = model.eval()
        self._cache = S2Cache(model.config, max_tokens)
        self._lengths = [0] * batch
        self._mask = torch.zeros(batch, 0, dtype=torch.long, device=model.device)

    @property
    def caches(self) -> list[KVCache]:
        return self._cache.caches

    @torch.no_grad()
    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """See `Decoder.feed`. Rows are padded on the left."""
        width, device = max(map(len, rows)), self._model.device
        padding = [width - len(row) for row in rows]
        tokens = torch.tensor([[*[0] * pad, *row] for pad, row in zip(padding, rows)], device=device)
        columns = torch.arange(width, device=device)
        real = columns >= torch.tensor(padding, device=device)[:, None]
        starts = torch.tensor([n - pad for n, pad in zip(self._lengths, padding)], device=device)
        self._mask = torch.cat([self._mask, real.long()], 1)
        logits = self._model(
            tokens,
            attention_mask=self._mask,
            position_ids=(starts[:, None] + columns).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self._cache},
        ).logits
        self._lengths = [length + len(row) for length, row in zip(self._lengths, rows)]
        return logits[:, -1]
