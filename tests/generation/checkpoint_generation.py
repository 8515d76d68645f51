"""What a trained checkpoint generates, three ways: our cache, no cache, Megatron's static inference engine.

A script, because a process can load one Megatron checkpoint: `checkpoint_generation.py CHECKPOINT REQUEST`.
"""

import atexit
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch


def main(directory: Path, request: dict) -> dict:
    from megatron_s2.training.patches import quiet_known_warnings

    quiet_known_warnings()
    from gpt_models import greedy

    from megatron_s2.generation.decoding import Request, generate
    from megatron_s2.generation.loading import load_gpt
    from megatron_s2.generation.megatron_model import GPTDecoder

    torch.set_num_threads(1)
    loaded = load_gpt(directory)
    todo = Request(request["prompts"], request["tokens"])
    decoder = GPTDecoder(loaded.model, len(todo.prompts), todo.max_tokens)
    done = generate(decoder, todo)
    decoder.close()
    sinks = [name for name, _ in loaded.model.named_parameters() if "softmax_offset" in name]
    return {
        "cache": done.rows,
        "recomputed": [greedy(loaded.model, prompt, todo.max_new_tokens) for prompt in todo.prompts],
        "static": _by_megatron(loaded.model, todo.prompts, todo.max_new_tokens),
        "cache again": _again(loaded.model, todo),
        "sinks": len(sinks),
        "epsilon": loaded.model.config.layernorm_epsilon,
        "text": loaded.text.decode(loaded.text.encode("1 2 3")),
        "stop": sorted(loaded.text.stop),
    }


def _require_no_process_group() -> None:
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        os._exit(1)


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
    done = engine.generate([" ".join(map(str, prompt)) for prompt in prompts], sampling_params=sampling)
    return [request.generated_tokens.tolist() for request in done]


def _again(model, todo) -> list[list[int]]:
    """Where an engine of Megatron's has been."""
    from megatron_s2.generation.decoding import generate
    from megatron_s2.generation.megatron_model import GPTDecoder

    return generate(GPTDecoder(model, len(todo.prompts), todo.max_tokens), todo).rows


if __name__ == "__main__":
    atexit.register(_require_no_process_group)  # what is registered first is called last
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
