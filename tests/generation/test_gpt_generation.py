"""A Megatron GPTModel computes the same with the cache as from whole sequences."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from gpt_models import SHAPE, VOCAB, gpt, greedy, logits_of, one_rank, prompts
from megatron.core.activations import quick_gelu
from transfers import Transfers

from megatron_s2.generation import decoding
from megatron_s2.generation.decoding import GenerationRequest, generate
from megatron_s2.generation.megatron_model import GPTDecoder
from megatron_s2.kv_cache.cache import cache_bytes, dense_cache_bytes

KINDS = {
    "rope": {},
    "learned positions": {"position": "learned_absolute", "tied": True},
    "no positions": {"position": "none"},
    "sink logits": {"softmax_type": "learnable"},
    "query and key norms": {"qk_layernorm": True},
    "layer norm and biases": {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "add_bias_linear": True,
    },
    "phi-3-small": {
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "activation_func": quick_gelu,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 1.5,
        "use_mup": True,
        "mup_embedding_mult": 10.0,
        "mup_output_mult": 0.125,
        "s2_pattern_heads": 4,
        "s2_vert_stride": 4,
        "s2_phases": (1, 2, 3, 0),
    },
}
LENGTHS = (5, 150, 47)


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    with one_rank():
        yield


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return gpt(**KINDS[request.param])


@pytest.fixture(scope="module")
def plain_model():
    return gpt()


@pytest.fixture
def decoder_of():
    """Constructor of a `GPTDecoder` that is closed when the test ends."""
    decoders = []

    def make(*args, **kwargs):
        decoders.append(GPTDecoder(*args, **kwargs))
        return decoders[-1]

    yield make
    for decoder in decoders:
        decoder.close()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1.0, expected.abs().max().item())
    assert (got - expected).abs().max().item() <= 1e-5 * scale


def test_greedy_tokens_equal_a_full_recompute(model, decoder_of):
    texts = prompts(*LENGTHS)
    expected = [greedy(model, text, 12) for text in texts]
    request = GenerationRequest(texts, max_new_tokens=12)
    done = generate(decoder_of(model, len(texts), request.max_tokens), request)
    assert done.rows == expected
    assert (done.prompt_tokens, done.decoded_tokens) == (sum(LENGTHS), 11 * len(texts))


@pytest.mark.parametrize(
    "chunks", [(1,) * 50, (150, 1, 1), (7, 60, 1, 33, 2, 1)], ids=["tokens", "prompt", "chunks"]
)
def test_logits_equal_a_full_recompute(model, decoder_of, chunks):
    [tokens] = prompts(sum(chunks))
    expected = logits_of(model, tokens)
    decoder, done = decoder_of(model, 1, sum(chunks)), 0
    for chunk in chunks:
        logits = decoder.feed([tokens[done : done + chunk]])
        done += chunk
        assert_close(logits[0], expected[done - 1])


def test_rows_may_be_empty(plain_model, decoder_of):
    """As those of finished sequences are while others continue."""
    one, other = prompts(40, 90)
    expected = [logits_of(plain_model, text)[-1] for text in (one, other)]
    decoder = decoder_of(plain_model, 2, 91)
    decoder.feed([one[:30], other[:70]])
    decoder.feed([[], other[70:89]])
    last = decoder.feed([one[30:], other[89:]])
    assert_close(last, torch.stack(expected))


@pytest.mark.parametrize("common", [0, 100], ids=["apart", "shared"])
def test_a_step_is_one_copy_to_the_device_and_one_back(plain_model, decoder_of, common):
    """Also where a window moves on, where a row has ended, and where prompts share what they begin with."""
    counted = {}
    for tokens in (2, 42):
        texts = [[7] * common + text for text in prompts(*LENGTHS)]
        request = GenerationRequest(texts, tokens)
        decoder = decoder_of(plain_model, request.first_batch, request.max_tokens)
        with Transfers() as transfers:
            generate(decoder, request)
        decoder.close()
        counted[tokens] = transfers
    assert len(counted[42].to_device) - len(counted[2].to_device) == 40
    assert len(counted[42].to_host) - len(counted[2].to_host) == 40


def test_cache_sizes_equal_the_closed_form(plain_model, decoder_of):
    texts = prompts(*LENGTHS)
    request = GenerationRequest(texts, max_new_tokens=9)
    decoder = decoder_of(plain_model, len(texts), request.max_tokens)
    done = generate(decoder, request)
    head_dim, lengths = SHAPE["kv_channels"], [length + 8 for length in LENGTHS]
    patterns = [cache.pattern for cache in decoder.caches]
    assert patterns[1].is_dense(0) and not patterns[0].is_dense(0)
    assert done.kept_bytes == sum(
        cache_bytes(pattern, length, head_dim, torch.float32) for pattern in patterns for length in lengths
    )
    assert done.dense_bytes == 3 * dense_cache_bytes(2, sum(lengths), head_dim, torch.float32)
    assert done.kept_bytes < done.dense_bytes
    assert done.capacity_bytes >= done.kept_bytes


def test_a_long_prompt_is_prefilled_in_chunks(plain_model, decoder_of, monkeypatch):
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 32)
    texts = prompts(*LENGTHS)
    request, expected = (
        GenerationRequest(texts, max_new_tokens=5),
        [greedy(plain_model, text, 5) for text in texts],
    )
    done = generate(decoder_of(plain_model, len(texts), request.max_tokens), request)
    assert done.rows == expected


def test_shared_prefixes_run_through_the_model_once(plain_model, decoder_of, monkeypatch):
    """In chunks, for two groups of prompts, one of which shares more, beside one that shares nothing."""
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 32)
    system, more, other, alone, *tails = prompts(150, 70, 90, 40, 3, 30, 17, 1)
    texts = [system + tails[0], other + tails[0], [*system, *more, *tails[1]], alone, other]
    texts += [[*system, *more, *tails[2]], [*system, *more], [*system, *more]]
    expected = [greedy(plain_model, text, 20) for text in texts]
    request = GenerationRequest(texts, max_new_tokens=20)
    done = generate(decoder_of(plain_model, request.first_batch, request.max_tokens), request)
    assert done.rows == expected
    assert done.prompt_tokens == sum(map(len, texts))
    assert done.prefill_tokens == 150 + 70 + 90 + 40 + 3 + 3 + 30 + 17
    apart = GenerationRequest(texts, max_new_tokens=20, least_shared=10**6)
    assert apart.first_batch == len(texts)
    unshared = generate(decoder_of(plain_model, len(texts), apart.max_tokens), apart)
    assert (unshared.rows, unshared.prefill_tokens) == (done.rows, done.prompt_tokens)
    assert done.kept_bytes < unshared.kept_bytes and done.dense_bytes == unshared.dense_bytes


def test_32_prompts_with_a_common_prefix_cost_one_and_the_tails(plain_model, decoder_of):
    """Counted where tokens enter the model, padding included."""
    [prefix] = prompts(480)
    texts = [[*prefix, n, n + 1] for n in range(32)]
    expected = [greedy(plain_model, text, 1) for text in texts[::8]]
    request = GenerationRequest(texts, max_new_tokens=1)
    fed, hook = [], lambda module, arguments: fed.append(arguments[0].numel())
    handle = plain_model.embedding.word_embeddings.register_forward_pre_hook(hook)
    done = generate(decoder_of(plain_model, request.first_batch, request.max_tokens), request)
    handle.remove()
    assert fed == [480, 32 * 2] and done.prefill_tokens == 480 + 32 * 2
    assert done.rows[::8] == expected


def test_a_stop_token_ends_only_its_row(plain_model, decoder_of):
    texts = prompts(40, 70)
    rows = [greedy(plain_model, text, 12) for text in texts]
    stop = next(token for token in rows[0][2:] if token not in rows[1])
    end = rows[0].index(stop) + 1
    request, seen = GenerationRequest(texts, 12, stop={stop}), []
    done = generate(decoder_of(plain_model, 2, 100), request, on_token=lambda *token: seen.append(token))
    assert done.rows == [rows[0][:end], rows[1]]
    assert [token for row, token in seen if row == 0] == rows[0][:end]


@torch.no_grad()
def in_static_context(model, context, new: torch.Tensor) -> torch.Tensor:
    """Returns the logits `[batch, tokens, vocabulary]` of the next tokens `[batch, tokens]` in a static
    context."""
    start = context.sequence_len_offset
    positions = torch.arange(start, start + new.shape[1]).expand_as(new)
    logits = model(new, positions, None, inference_context=context)
    context.increment_sequence_len_offset(new.shape[1])
    return logits


def static_context(batch: int, tokens: int):
    from megatron.core.inference.contexts import StaticInferenceContext

    return StaticInferenceContext(batch, tokens)


def test_megatrons_static_inference_equals_a_full_recompute(model):
    """Two prompts of equal length, in chunks, and a second use of the context."""
    texts = torch.tensor([prompts(120)[0], prompts(60, 120)[1]])
    expected = torch.stack([logits_of(model, text) for text in texts.tolist()])
    context = static_context(2, 120)
    for cuts in ((0, 100, 101, 102, 120), (0, 33, 96, 97, 120)):
        for first, stop in pairwise(cuts):
            assert_close(in_static_context(model, context, texts[:, first:stop]), expected[:, first:stop])
        context.reset()
    caches, head_dim = context.key_value_memory_dict, SHAPE["kv_channels"]
    assert set(caches) == {(1, 0), (2, 0), (3, 0)}
    for layer, cache in zip(model.decoder.layers, caches.values()):
        pattern = layer.self_attention.core_attention.pattern
        assert cache.bytes == 2 * cache_bytes(pattern, 120, head_dim, torch.float32)
    if pattern.num_kv_heads == SHAPE["num_query_groups"]:  # else keys and values are kept for each query head
        assert sum(cache.bytes for cache in caches.values()) < sum(
            cache.dense_bytes for cache in caches.values()
        )
    assert torch.equal(logits_of(model, texts[0].tolist()), expected[0]), "the model keeps a cache"


def test_megatrons_static_inference_copies_once_per_step(plain_model):
    [text] = torch.tensor(prompts(120))
    context = static_context(2, 120)
    in_static_context(plain_model, context, text[:60].expand(2, -1))
    with Transfers() as transfers:
        for position in range(60, 100):
            in_static_context(plain_model, context, text[position : position + 1].expand(2, -1))
    assert transfers.to_device == ["tensor"] * 40
    assert transfers.to_host == []


def test_a_static_context_separates_parts_of_a_batch(plain_model):
    texts = torch.tensor(prompts(50, 50))
    expected = torch.stack([logits_of(plain_model, text) for text in texts.tolist()])
    context = static_context(2, 50)
    for first, stop in ((0, 30), (30, 50)):
        for row in (0, 1):
            context.batch_size_offset, context.sequence_len_offset = row, first
            logits = in_static_context(plain_model, context, texts[row : row + 1, first:stop])
            assert_close(logits[0], expected[row, first:stop])


def test_refuses_what_would_bypass_the_cache(plain_model):
    [prompt] = prompts(50)
    tokens, context = torch.tensor([prompt]), static_context(1, 60)
    in_static_context(plain_model, context, tokens)
    context.sequence_len_offset = 40
    with pytest.raises(
        ValueError, match=r"^sequence_len_offset 40: must be the length of each .* sequences, \[50\]"
    ):
        in_static_context(plain_model, context, tokens[:, :1])
    context.sequence_len_offset = 50
    with pytest.raises(ValueError, match=r"^max_sequence_length 60: must be at least the 100 tokens"):
        in_static_context(plain_model, context, tokens)
    dynamic = SimpleNamespace(is_static_batching=lambda: False, is_dynamic_batching=lambda: True)
    hidden = torch.zeros(1, 1, SHAPE["hidden_size"])
    attention = plain_model.decoder.layers[0].self_attention
    with pytest.raises(ValueError, match=r"^inference_context: must be a StaticInferenceContext"):
        attention(hidden, None, inference_context=dynamic)
    with pytest.raises(ValueError, match=r"^inference_context: must be None in training mode"):
        attention.train()(hidden, None, inference_context=static_context(1, 60))
    attention.eval()
    attention.core_attention.context_parallel = object()
    try:
        with pytest.raises(ValueError, match=r"^--context-parallel-size: must be 1 in generation"):
            attention(hidden, None, inference_context=static_context(1, 60))
    finally:
        attention.core_attention.context_parallel = None


def test_padding_of_the_vocabulary_has_no_logits(plain_model, decoder_of):
    [prompt] = prompts(20)
    logits = decoder_of(plain_model, 1, 20, vocab_size=VOCAB - 6).feed([prompt])
    assert logits.shape == (1, VOCAB - 6)


def test_close_restores_the_model(plain_model):
    [tokens] = prompts(50)
    before = logits_of(plain_model, tokens)
    decoder = GPTDecoder(plain_model, 1, 50)
    decoder.feed([tokens])
    decoder.close()
    assert torch.equal(logits_of(plain_model, tokens), before)


def test_refuses_unsupported_models():
    with pytest.raises(ValueError, match=r"^--max-position-embeddings 64: must be at least the 65 tokens"):
        GPTDecoder(gpt(position="learned_absolute", max_positions=64), 1, 65)
    parallel = gpt()
    parallel.config.context_parallel_size = 2
    with pytest.raises(ValueError, match=r"^--context-parallel-size 2: must be 1 in generation"):
        GPTDecoder(parallel, 1, 65)
    dense = gpt()
    dense.decoder.layers[0].self_attention.core_attention = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"^--s2-attention: must be given: 1 of 3 layers have another"):
        GPTDecoder(dense, 1, 65)
