"""s2_attention names and refuses bad arguments before anything runs, with every backend; needs no GPU."""

import pytest
import torch
from attention_cases import random_mask, s2

from megatron_s2 import s2_attention
from megatron_s2.kernels.tuning import tuning_for


def tensors(q=(2, 40, 4, 16), k=(2, 40, 2, 16), v=(2, 40, 2, 16), dtype=torch.float32) -> dict:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in {"q": q, "k": k, "v": v}.items()}


def packed(*cu_seqlens: int) -> dict:
    return tensors((40, 4, 16), (40, 2, 16), (40, 2, 16)) | {"cu_seqlens": torch.tensor(cu_seqlens)}


ANY_BACKEND = {
    "one dimension less": (tensors(q=(40, 4, 16)), "q (40, 4, 16): must be [batch, seq, heads, head_dim]"),
    "batch in packed": (tensors() | {"cu_seqlens": [0, 40]}, "q (2, 40, 4, 16): must be [tokens, heads"),
    "other batch": (tensors(q=(1, 40, 4, 16)), "k (2, 40, 2, 16): must have the batch of q, 1"),
    "other keys in v": (tensors(v=(2, 41, 2, 16)), "v (2, 41, 2, 16): must match k (2, 40, 2, 16)"),
    "other head_dim in k": (tensors(k=(2, 40, 2, 8)), "k (2, 40, 2, 8): must have the head_dim of q, 16"),
    "no head_dim": (tensors(v=(2, 40, 2, 0)), "v (2, 40, 2, 0): must have a head_dim >= 1"),
    "uneven groups": (tensors(q=(2, 40, 5, 16)), "k with 2 heads: must divide the 5 heads of q"),
    "integers": (tensors(dtype=torch.int32), "q torch.int32: must be float16, bfloat16, float32 or float64"),
    "other dtype": (tensors() | {"k": torch.zeros(2, 40, 2, 16).half()}, "k torch.float16: must be"),
    "other device": (
        tensors() | {"v": torch.zeros(2, 40, 2, 16, device="meta")},
        "v on meta: must be on the device of q, cpu",
    ),
    "pattern of other heads": (
        tensors() | {"pattern": s2(3)},
        "pattern for 3 heads: must be for the 2 heads of k, or for the 4 heads of q",
    ),
    "short mask": (
        tensors() | {"pattern": random_mask(2, 2)},
        "pattern of 2 blocks: must have the 3 of 40 tokens",
    ),
    "short mask, packed": (
        packed(0, 3, 40) | {"pattern": random_mask(2, 2)},
        "pattern of 2 blocks: must have the 3 of 37 tokens",
    ),
    "sinks of other heads": (
        tensors() | {"sink_logits": torch.zeros(2)},
        "sink_logits (2,): must be [heads] = [4]",
    ),
    "queries past the keys": (tensors() | {"q_start": 1}, "q_start 1: must be >= 0 and leave room for 40"),
    "decreasing": (packed(0, 30, 10, 40), "cu_seqlens [0, 30, 10, 40] … [40]: must not decrease, from 0 to"),
    "ends too early": (packed(0, 10, 39), "cu_seqlens [0, 10, 39] … [39]: must not decrease, from 0 to 40"),
    "ends too late": (packed(0, 10, 41), "cu_seqlens [0, 10, 41] … [41]: must not decrease, from 0 to 40"),
    "starts late": (packed(1, 10, 40), "cu_seqlens [1, 10, 40] … [40]: must not decrease, from 0 to 40"),
    "unknown tuning": (tensors() | {"tuning": "fast"}, "tuning 'fast': must be a Tuning, autotune or None"),
}


def refused(message: str, arguments: dict) -> None:
    with pytest.raises(ValueError) as error:
        s2_attention(**{"pattern": s2()} | arguments)
    assert str(error.value).startswith(message), error.value


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("arguments", "message"), ANY_BACKEND.values(), ids=ANY_BACKEND)
def test_every_backend_refuses(arguments, message, backend):
    refused(message, arguments | {"backend": backend})


TRITON_ALONE = {
    "float64": (tensors(dtype=torch.float64), "q torch.float64: must be float16, bfloat16 or float32"),
    "head_dim": (
        tensors((1, 8, 2, 257), (1, 8, 2, 257), (1, 8, 2, 16)),
        "q (1, 8, 2, 257): must have at most 256 as head_dim",
    ),
    "v_head_dim": (
        tensors((1, 8, 2, 16), (1, 8, 2, 16), (1, 8, 2, 300)),
        "v (1, 8, 2, 300): must have at most 256 as head_dim",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), TRITON_ALONE.values(), ids=TRITON_ALONE)
def test_the_triton_backend_refuses(arguments, message):
    refused(message, arguments | {"backend": "triton"})
    assert s2_attention(**{"pattern": s2()} | arguments)[0].isfinite().all(), "but another backend does"


def test_other_backends_refuse_a_tuning():
    refused("tuning Tuning(", tensors() | {"tuning": tuning_for(9, 16, 2), "backend": "torch"})


def test_repeated_offsets_are_empty_documents():
    some = packed(0, 30, 40) | {"pattern": s2()}
    filled = some | {"cu_seqlens": torch.tensor([0, 30, 40, 40, 40])}
    for one, other in zip(s2_attention(**some), s2_attention(**filled)):
        assert torch.equal(one, other)
