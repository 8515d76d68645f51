"""Generates from a trained checkpoint with our cache, without a cache, and with Megatron's static inference
engine.

Called in a fork, because a process can load only one Megatron checkpoint.
"""

import atexit
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch


def generated(directory: Path, prompts: list[list[int]], tokens: int) -> dict:
    """Returns the continuations of `tokens` tokens in each way, and properties of the loaded model."""
    from gpt_models import greedy

    from megatron_s2.generation.decoding import GenerationRequest, generate
    from megatron_s2.generation.loading import load_gpt
    from megatron_s2.generation.megatron_model import GPTDecoder

    loaded = load_gpt(directory)
    request = GenerationRequest(prompts, tokens)
    decoder = GPTDecoder(loaded.model, request.first_batch, request.max_tokens)
    result = generate(decoder, request)
    decoder.close()
    sinks = [name for name, _ in loaded.model.named_parameters() if "softmax_offset" in name]
    found = {
        "cache": result.rows,
        "recomputed": [greedy(loaded.model, prompt, request.max_new_tokens) for prompt in request.prompts],
        "static": _by_megatron(loaded.model, request.prompts, request.max_new_tokens),
        "cache again": _again(loaded.model, request),
        "sinks": len(sinks),
        "epsilon": loaded.model.config.layernorm_epsilon,
        "text": loaded.codec.decode(loaded.codec.encode("1 2 3")),
        "stop": sorted(loaded.codec.stop),
    }
    atexit._run_exitfuncs()  # a forked process does not run them
    return found | {"has process group": torch.distributed.is_initialized()}


def generated_on_rank(
    directory: Path, prompts: list[list[int]], tokens: int, tensor: int, context: int
) -> dict:
    """Returns what a rank of several generates, with shared prefixes and apart, and the formula of the bytes
    that its caches keep for prompts apart."""
    from megatron_s2.generation.decoding import GenerationRequest, generate
    from megatron_s2.generation.loading import load_gpt
    from megatron_s2.generation.megatron_model import GPTDecoder
    from megatron_s2.generation.prefill import LEAST_SHARED
    from megatron_s2.generation.ranks import RankLayout
    from megatron_s2.kv_cache.cache import cache_bytes
    from megatron_s2.kv_cache.shard_part import shard_part

    loaded = load_gpt(directory, needs_tokenizer=False, layout=RankLayout(tensor, context))
    results = {}
    for name, least in {"shared": LEAST_SHARED, "apart": 10**6}.items():
        request = GenerationRequest(prompts, tokens, least_shared=least)
        decoder = GPTDecoder(loaded.model, request.first_batch, request.max_tokens, context=loaded.context)
        results[name] = generate(decoder, request, ranks=torch.distributed.group.WORLD)
        decoder.close()
    formula = 0
    for layer in loaded.model.decoder.layers:
        pattern = layer.self_attention.core_attention.pattern
        if loaded.context is not None:
            pattern = shard_part(pattern, loaded.context.rank, context)
        formula += sum(cache_bytes(pattern, len(x) + tokens - 1, 16, torch.float32) for x in prompts)
    atexit._run_exitfuncs()
    return results | {"formula": formula}


def _by_megatron(model, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    tokenizer = SimpleNamespace(  # Megatron's NullTokenizer has no bos
        tokenize=lambda text: [int(word) for word in text.split()],
        detokenize=lambda ids, **_: " ".join(map(str, ids)),
        bos=None,
        eod=-1,
    )
    context = StaticInferenceContext(len(prompts), max(map(len, prompts)) + tokens)
    with mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")):
        controller = TextGenerationController(GPTInferenceWrapper(model, context), tokenizer)
    engine = StaticInferenceEngine(controller, legacy=True)
    sampling = SamplingParams(num_tokens_to_generate=tokens, top_k=1, termination_id=-1)
    results = engine.generate([" ".join(map(str, prompt)) for prompt in prompts], sampling_params=sampling)
    return [result.generated_tokens.tolist() for result in results]


def _again(model, request) -> list[list[int]]:
    """Generates with our cache after an engine of Megatron has run."""
    from megatron_s2.generation.decoding import generate
    from megatron_s2.generation.megatron_model import GPTDecoder

    return generate(GPTDecoder(model, request.first_batch, request.max_tokens), request).rows
