"""Tiny Megatron GPTs with S2 attention, built on the CPU without Megatron's training loop."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch

from megatron_s2.layers.config import S2TransformerConfig

VOCAB = 96
S2 = {
    "s2_attention": True,
    "s2_block_size": 16,
    "s2_local_blocks": 2,
    "s2_vert_stride": (3, 4),
    "s2_sink_blocks": 1,
    "s2_dense_layers": (2,),
}
SHAPE = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "init_method_std": 0.2,  # large enough that rounding does not change greedy tokens
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "transformer_impl": "local",
}
MODERN = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False}


@contextmanager
def one_rank():
    """Sets up process groups of one rank, and returns the CPU where Megatron asks for a GPU."""
    from megatron.core import parallel_state, tensor_parallel
    from torch import distributed

    tracker = SimpleNamespace(fork=lambda *_: nullcontext())
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker),
    ):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_global_memory_buffer()
            distributed.destroy_process_group()


def gpt(position: str = "rope", tied: bool = False, max_positions: int = 512, **config):
    """Returns a GPTModel in evaluation mode; to be called inside `one_rank`."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_s2.layers.specs import s2_layer_spec

    transformer = S2TransformerConfig(**SHAPE | MODERN | S2 | config)
    torch.manual_seed(0)
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=s2_layer_spec(GPTModelConfig(transformer=transformer, vocab_size=VOCAB)),
        vocab_size=VOCAB,
        max_sequence_length=max_positions,
        position_embedding_type=position,
        share_embeddings_and_output_weights=tied,
        parallel_output=False,
    )
    for name, parameter in model.named_parameters():
        if "softmax_offset" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens: list[int]) -> torch.Tensor:
    """Returns the logits `[tokens, vocabulary]` of one sequence, without a cache."""
    ids = torch.tensor([tokens])
    return model(ids, torch.arange(len(tokens))[None], None)[0]


def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    """Returns the greedy continuation, recomputing the whole sequence for every token."""
    sequence = list(prompt)
    for _ in range(tokens):
        sequence.append(int(logits_of(model, sequence)[-1].argmax()))
    return sequence[len(prompt) :]


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
