"""A transformers model decodes with one copy to the device per step and one back."""

import pytest
import torch
from generation_models import Batch, greedy, prompts, save_model
from transfers import Transfers
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_s2.generation.decoding import GenerationRequest, generate
from megatron_s2.generation.hugging_face import HuggingFaceDecoder
from megatron_s2.generation.sampling import Sampling
from megatron_s2.hf import CACHE_ARGUMENT, S2Cache

LENGTHS = {"one": (40,), "equal": (40, 40), "unequal": (5, 150, 47)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_model(directory, "llama")
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def transfers_per_step(decode, steps: int = 40) -> tuple[float, float]:
    """Returns the copies to the host and to the device of a step, from runs of two lengths."""
    counted = []
    for tokens in (2, 2 + steps):
        with Transfers() as transfers:
            decode(tokens)
        counted.append((len(transfers.to_host), len(transfers.to_device)))
    (host, device), (more_host, more_device) = counted
    return (more_host - host) / steps, (more_device - device) / steps


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_step_is_one_copy_to_the_device_and_one_back(model, lengths):
    def decode(tokens):
        request = GenerationRequest(prompts(*lengths), tokens)
        generate(HuggingFaceDecoder(model, len(lengths), request.max_tokens), request)

    assert transfers_per_step(decode) == (1, 1)


def test_ended_rows_cost_nothing_and_change_nothing(model):
    texts = prompts(40, 70)
    rows = [greedy(model, text, 12) for text in texts]
    stop = next(token for token in rows[0][2:] if token not in rows[1])
    request = GenerationRequest(texts, 12, stop={stop})
    with Transfers() as transfers:
        done = generate(HuggingFaceDecoder(model, 2, request.max_tokens), request)
    assert done.rows == [rows[0][: rows[0].index(stop) + 1], rows[1]]
    # The logits of the prompts, and of each of 11 steps the tokens; the first tokens are on the host already.
    assert transfers.to_host == ["cpu", *["tolist"] * 12]


def test_sampling_copies_the_logits_of_all_rows_at_once():
    sampling, logits = Sampling(temperature=1.0), torch.randn(8, 50)
    with Transfers() as transfers:
        sampling.choose(logits, {row: sampling.generator(row) for row in range(8)})
    assert transfers.to_host.count("cpu") == 1


@pytest.mark.parametrize(
    ("cache", "lengths", "device"), [("s2", "one", 1), ("s2", "unequal", 1), ("dynamic", "unequal", None)]
)
def test_generate_of_transformers_reads_the_mask_once(model, cache, lengths, device):
    """Besides the question whether all rows have ended, which `generate` asks after each token."""

    def decode(tokens):
        made = S2Cache(model.config) if cache == "s2" else DynamicCache(config=model.config)
        given = {**vars(Batch.of(prompts(*LENGTHS[lengths]), "left")), CACHE_ARGUMENT: made}
        if lengths == "one":
            del given["attention_mask"]
        model.generate(**given, max_new_tokens=tokens, do_sample=False)

    to_host, to_device = transfers_per_step(decode)
    assert to_host <= 2
    assert device is None or to_device == device
