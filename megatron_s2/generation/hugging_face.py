"""Loads Hugging Face models, and generates with one whose attention is S2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from megatron_s2.hf import CACHE_ARGUMENT, NAME, PaddingMask, S2Cache, settings_of
from megatron_s2.kernels.host_integers import copy_to_device
from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.decode_step import plan_step


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
        self._real = torch.zeros(batch, 0, dtype=torch.bool, device=model.device)

    @property
    def caches(self) -> list[KVCache]:
        return self._cache.caches

    @torch.no_grad()
    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """See `Decoder.feed`. Rows are padded on the left. The host waits for nothing."""
        new, width = [len(row) for row in rows], max(map(len, rows))
        tokens = [[*[0] * (width - len(row)), *row] for row in rows]
        starts = [[length + count - width] for length, count in zip(self._lengths, new)]
        padding = [[width - count] for count in new]
        if width == 1 and self.caches:
            active = [row for row, count in enumerate(new) if count]
            tables = plan_step(self.caches, active, tokens, starts, padding)
        else:
            tables = copy_to_device(self._model.device, tokens, starts, padding)
        token_ids, start, pad = (table.to(self._model.device) for table in tables)
        columns = torch.arange(width, device=self._model.device)
        self._lengths = [length + count for length, count in zip(self._lengths, new)]
        self._real = torch.cat([self._real, columns >= pad], 1)
        # Handed over here, because transformers would read a mask back from the device.
        self._cache.set_padding(PaddingMask(self._real, width, self._lengths, new))
        return self._model(
            token_ids,
            position_ids=(start + columns).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self._cache},
        ).logits[:, -1]
