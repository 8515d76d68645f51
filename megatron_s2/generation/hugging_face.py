"""Loads Hugging Face models, and generates with one whose attention is S2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from megatron_s2.checkpoint import phi3_small
from megatron_s2.checkpoint.safetensors_files import read_json
from megatron_s2.hf import CACHE_ARGUMENT, NAME, PaddingMask, S2Cache, set_pattern, settings_of
from megatron_s2.kernels.host_integers import copy_to_device
from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.decode_step import plan_step
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import read_pattern_file


def load_pretrained(
    directory: str | Path,
    dtype: str = "auto",
    *,
    needs_s2: bool = False,
    pattern_file: str | Path | None = None,
) -> PreTrainedModel:
    """Loads a causal language model from safetensors onto the GPU, or the CPU where there is none.

    It runs with S2 attention if its config.json has S2 settings, else with SDPA.

    Args:
        dtype: dtype of the weights, as transformers names it; "auto" for that of the files.
        needs_s2: whether to refuse a model without S2 settings.
        pattern_file: pattern file by which a dense model attends.

    Raises:
        ValueError: the directory has no such model, or an incomplete one; or the pattern file is not for it.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"--hf {directory}: is not a directory with a config.json")
    disable_progress_bar()
    if read_json(Path(directory) / "config.json").get("model_type") == phi3_small.NAME:
        raise ValueError(
            f"--hf {directory}: transformers has no {phi3_small.NAME}; convert it "
            "(scripts/convert_checkpoint.py hf-to-megatron) and give the checkpoint with --load"
        )
    try:
        config = AutoConfig.from_pretrained(directory)
        has_pattern = getattr(config, "s2_attention", None) is not None
        sparse = has_pattern or (needs_s2 and pattern_file is None)
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
    if pattern_file is not None:
        set_pattern(model, pattern_of_file(model, directory, pattern_file))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def pattern_of_file(model: PreTrainedModel, directory: str | Path, pattern_file: str | Path) -> S2Settings:
    """Returns the settings in a pattern file for a dense model.

    Args:
        directory: the model's, for messages.

    Raises:
        ValueError: the model has a pattern of its own, or the file is not for it.
    """
    config = model.config
    if getattr(config, "s2_attention", None) is not None:
        raise ValueError(
            f"--s2-pattern-file {pattern_file}: must not be given with --hf {directory}, which was trained "
            "with a pattern of its own (s2_attention in config.json)"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return read_pattern_file(
        pattern_file,
        num_layers=config.num_hidden_layers,
        num_kv_heads=kv_heads,
        num_query_heads=config.num_attention_heads,
    )


class HuggingFaceDecoder:
    """A `Decoder` (decoding.py) over a causal language model of transformers.

    Args:
        model: model with `attn_implementation="s2"`; set to evaluation mode.
        batch: number of sequences.
        max_tokens: largest number of tokens of a sequence.
        context: as in `S2Cache`.

    Raises:
        ValueError: the model has another attention, or no S2 settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        max_tokens: int,
        context: ContextParallelGroup | None = None,
    ) -> None:
        self._model = model.eval()
        self._cache = S2Cache(model.config, max_tokens, context)
        self._lengths = [0] * batch
        self._real = torch.zeros(batch, 0, dtype=torch.bool, device=model.device)

    @property
    def caches(self) -> list[KVCache]:
        return self._cache.caches

    def fork(self, rows: Sequence[int | None]) -> None:
        """See `Decoder.fork`."""
        self._cache = self._cache.fork(rows)
        self._lengths = [0 if row is None else self._lengths[row] for row in rows]
        # Padding within the cache has no effect: all columns so far become those of the real tokens.
        columns = torch.arange(max(self._lengths), device=self._real.device)
        self._real = columns < torch.tensor(self._lengths, device=self._real.device)[:, None]

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
