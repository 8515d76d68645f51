"""A Megatron GPTModel decodes through the cache what it computes from whole sequences."""

import pytest
import torch
from gpt_models import SHAPE, VOCAB, gpt, greedy, logits_of, one_rank, prompts

from megatron_s2.generation import decoding
from megatron_s2.generation.cache import cache_bytes, dense_cache_bytes
from megatron_s2.generation.decoding import Request, generate
from megatron_s2.generation.gpt import GPTDecoder

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
    """`GPTDecoder`, closed when the test ends."""
    decoders = []

    def make(*given, **named):
        decoders.append(GPTDecoder(*given, **named))
        return decoders[-1]

    yield make
    for decoder in decoders:
        decoder.close()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1.0, expected.abs().max().item())
    assert (got - expected).abs().max().item() <= 1e-5 * scale


def test_greedy_tokens_are_those_of_a_full_recompute(model, decoder_of):
    texts = prompts(*LENGTHS)
    expected = [greedy(model, text, 12) for text in texts]
    request = Request(texts, max_new_tokens=12)
    done = generate(decoder_of(model, len(texts), request.max_tokens), request)
    assert done.rows == expected
    assert (done.prompt_tokens, done.decoded_tokens) == (sum(LENGTHS), 11 * len(texts))


@pytest.mark.parametrize(
    "chunks", [(1,) * 50, (150, 1, 1), (7, 60, 1, 33, 2, 1)], ids=["tokens", "prompt", "chunks"]
)
def test_logits_are_those_of_a_full_recompute(model, decoder_of, chunks):
    [tokens] = prompts(sum(chunks))
    expected = logits_of(model, tokens)
    decoder, done = decoder_of(model, 1, sum(chunks)), 0
    for chunk in chunks:
        logits = decoder.feed([tokens[done : done + chunk]])
        done += chunk
        assert_close(logits[0], expected[done - 1])


def test_rows_may_wait(plain_model, decoder_of):
    """As finished sequences do while others go on."""
    one, other = prompts(40, 90)
    expected = [logits_of(plain_model, text)[-1] for text in (one, other)]
    decoder = decoder_of(plain_model, 2, 91)
    decoder.feed([one[:30], other[:70]])
    decoder.feed([[], other[70:89]])
    last = decoder.feed([one[30:], other[89:]])
    assert_close(last, torch.stack(expected))


def test_bytes_are_the_closed_form(plain_model, decoder_of):
    texts = prompts(*LENGTHS)
    request = Request(texts, max_new_tokens=9)
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


def test_a_long_prompt_is_read_in_chunks(plain_model, decoder_of, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 32)
    texts = prompts(*LENGTHS)
    request, expected = Request(texts, max_new_tokens=5), [greedy(plain_model, text, 5) for text in texts]
    done = generate(decoder_of(plain_model, len(texts), request.max_tokens), request)
    assert done.rows == expected


def test_a_stop_token_ends_its_row_only(plain_model, decoder_of):
    texts = prompts(40, 70)
    rows = [greedy(plain_model, text, 12) for text in texts]
    stop = next(token for token in rows[0][2:] if token not in rows[1])
    end = rows[0].index(stop) + 1
    request, seen = Request(texts, 12, stop={stop}), []
    done = generate(decoder_of(plain_model, 2, 100), request, on_token=lambda *what: seen.append(what))
    assert done.rows == [rows[0][:end], rows[1]]
    assert [token for row, token in seen if row == 0] == rows[0][:end]


def test_static_inference_gives_the_same_tokens(plain_model):
    """Megatron's own context, in which keys and values arrive whole."""
    from megatron.core.inference.contexts import StaticInferenceContext

    [prompt] = prompts(100)
    expected = greedy(plain_model, prompt, 12)
    context = StaticInferenceContext(1, 112)
    new, rows = prompt, []
    for _ in range(12):
        start = context.sequence_len_offset
        positions = torch.arange(start, start + len(new))[None]
        with torch.no_grad():
            logits = plain_model(torch.tensor([new]), positions, None, inference_context=context)
        context.sequence_len_offset += len(new)
        rows.append(int(logits[0, -1].argmax()))
        new = rows[-1:]
    assert rows == expected


def test_padding_of_the_vocabulary_never_comes(plain_model, decoder_of):
    [prompt] = prompts(20)
    logits = decoder_of(plain_model, 1, 20, vocab_size=VOCAB - 6).feed([prompt])
    assert logits.shape == (1, VOCAB - 6)


def test_a_closed_decoder_leaves_the_model_as_it_was(plain_model):
    [tokens] = prompts(50)
    before = logits_of(plain_model, tokens)
    decoder = GPTDecoder(plain_model, 1, 50)
    decoder.feed([tokens])
    decoder.close()
    assert torch.equal(logits_of(plain_model, tokens), before)


def test_refuses_what_has_no_cache():
    with pytest.raises(ValueError, match=r"^--max-position-embeddings 64: must be at least the 65 tokens"):
        GPTDecoder(gpt(position="learned_absolute", max_positions=64), 1, 65)
    divided = gpt()
    divided.config.context_parallel_size = 2
    with pytest.raises(ValueError, match=r"^--context-parallel-size 2: must be 1 in generation"):
        GPTDecoder(divided, 1, 65)
    dense = gpt()
    dense.decoder.layers[0].self_attention.core_attention = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"^--s2-attention: must be given: 1 of 3 layers have another"):
        GPTDecoder(dense, 1, 65)
