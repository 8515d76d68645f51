"""What a trained checkpoint generates, three ways: our cache, no cache, Megatron's static inference context.

A script, because a process can load one Megatron checkpoint: `checkpoint_generation.py CHECKPOINT REQUEST`.
"""

import json
import sys
from pathlib import Path

import torch


def main(directory: Path, request: dict) -> dict:
    from megatron_s2.runtime.patches import quiet_known_warnings

    quiet_known_warnings()
    from gpt_models import greedy

    from megatron_s2.generation.checkpoint import load_gpt
    from megatron_s2.generation.decoding import Request, generate
    from megatron_s2.generation.gpt import GPTDecoder

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
        "static": [_static(loaded.model, prompt, todo.max_new_tokens) for prompt in todo.prompts],
        "sinks": len(sinks),
        "epsilon": loaded.model.config.layernorm_epsilon,
        "text": loaded.text.decode(loaded.text.encode("1 2 3")),
        "stop": sorted(loaded.text.stop),
    }


@torch.no_grad()
def _static(model, prompt: list[int], tokens: int) -> list[int]:
    from megatron.core.inference.contexts import StaticInferenceContext

    context = StaticInferenceContext(1, len(prompt) + tokens)
    new, row = prompt, []
    for _ in range(tokens):
        start = context.sequence_len_offset
        positions = torch.arange(start, start + len(new))[None]
        logits = model(torch.tensor([new]), positions, None, inference_context=context)
        context.sequence_len_offset += len(new)
        row.append(int(logits[0, -1].argmax()))
        new = row[-1:]
    return row


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
