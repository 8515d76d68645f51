"""The attention function for transformers: correct in every family, with padding on either side and with
either cache; an error where it would be wrong."""

import json

import pytest
import torch
from generation_models import (
    MODEL_CLASSES,
    PAD,
    SETTINGS,
    SHAPE,
    Batch,
    greedy,
    logits_of,
    prompts,
    save_model,
)
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import megatron_s2.hf
from megatron_s2.hf import CACHE_ARGUMENT, S2Cache, settings_of
from megatron_s2.kv_cache.cache import cache_bytes

TOLERANCE = 1e-5
LENGTHS = (5, 150, 47)


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    directories = {family: tmp_path_factory.mktemp(family) for family in MODEL_CLASSES}
    for family, directory in directories.items():
        save_model(directory, family)
    return directories


@pytest.fixture(scope="module", params=MODEL_CLASSES)
def model(request, directories):
    return load(directories[request.param])


@pytest.fixture(scope="module")
def llama(directories):
    return load(directories["llama"])


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    assert (got - expected).abs().max().item() <= TOLERANCE * max(1.0, scale)


def test_the_config_selects_s2_attention(model):
    assert model.config._attn_implementation == "s2"
    assert settings_of(model.config).vert_stride == (3, 4)
    assert settings_of(model.config).num_layers == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    texts = prompts(*LENGTHS)
    batch = Batch.of(texts, side)
    with torch.no_grad():
        logits = model(**vars(batch)).logits
    for row, text in enumerate(texts):
        assert_close(batch.row(logits, row), logits_of(model, text))


@pytest.mark.parametrize("cache", ["s2", "dynamic"])
def test_generation_equals_a_full_recompute(model, cache):
    texts = prompts(*LENGTHS)
    batch = Batch.of(texts, "left")
    s2_cache = {CACHE_ARGUMENT: S2Cache(model.config)} if cache == "s2" else {}
    got = model.generate(**vars(batch), **s2_cache, max_new_tokens=24, do_sample=False)
    expected = [greedy(model, text, 24) for text in texts]
    assert got[:, batch.input_ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("chunks", [(150, 1, 1, 1), (7, 60, 1, 33, 2, 1)], ids=str)
def test_logits_of_every_step_equal_a_full_recompute(model, chunks):
    [tokens] = prompts(sum(chunks))
    expected, cache, done = logits_of(model, tokens), S2Cache(model.config), 0
    for chunk in chunks:
        with torch.no_grad():
            ids = torch.tensor([tokens[done : done + chunk]])
            logits = model(ids, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[0]
        assert_close(logits, expected[done : done + chunk])
        done += chunk
        patterns = [settings_of(model.config).pattern(number) for number in (1, 2, 3)]
        head_dim = model.model.layers[0].self_attn.head_dim
        kept = [cache_bytes(pattern, done, head_dim, torch.float32) for pattern in patterns]
        assert [layer.bytes for layer in cache.caches] == kept


def test_right_padded_prompts_are_continued(llama):
    texts, [more] = prompts(20, 90), prompts(3)
    batch, cache = Batch.of(texts, "right"), S2Cache(llama.config)
    mask = torch.cat([batch.attention_mask, torch.ones(2, 3, dtype=torch.long)], 1)
    positions = torch.tensor([[20, 21, 22], [90, 91, 92]])
    with torch.no_grad():
        llama(**vars(batch), use_cache=True, **{CACHE_ARGUMENT: cache})
        got = llama(
            torch.tensor([more, more]), mask, positions, use_cache=True, **{CACHE_ARGUMENT: cache}
        ).logits
    for row, text in enumerate(texts):
        assert_close(got[row], logits_of(llama, text + more)[-3:])


def test_beams_share_and_reorder_the_cache(llama):
    batch = Batch.of(prompts(40, 60), "left")
    how = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    expected = llama.generate(**vars(batch), **how)
    assert torch.equal(
        llama.generate(**vars(batch), **how, **{CACHE_ARGUMENT: S2Cache(llama.config)}), expected
    )


def test_max_tokens_bounds_the_allocation(llama):
    batch, cache = Batch.of(prompts(40), "left"), S2Cache(llama.config, max_tokens=59)
    llama.generate(**vars(batch), max_new_tokens=20, do_sample=False, **{CACHE_ARGUMENT: cache})
    assert sum(layer.capacity_bytes for layer in cache.caches) < 59 * 2 * 2 * 16 * 4 * 3
    with pytest.raises(ValueError, match="max_tokens 59: must be at least the 60 tokens"):
        llama(torch.ones(1, 1, dtype=torch.long), **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_stride_1_is_dense(family, tmp_path):
    save_model(tmp_path, family, s2_attention={**SETTINGS, "vert_stride": 1})
    sparse, dense = load(tmp_path), load(tmp_path, attn_implementation="eager")
    assert dense.config._attn_implementation == "eager"
    [tokens] = prompts(130)
    assert_close(logits_of(sparse, tokens), logits_of(dense, tokens))


def test_the_pattern_changes_the_logits(llama, directories):
    """Otherwise every comparison above would hold for dense attention, too."""
    dense = load(directories["llama"], attn_implementation="sdpa")
    [tokens] = prompts(130)
    assert (logits_of(llama, tokens) - logits_of(dense, tokens)).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_ignore_padding(directories, side):
    """Gradients of a padded batch equal those of its rows alone."""
    model, texts = load(directories["llama"]).train(), prompts(30, 90)
    batch = Batch.of(texts, side)
    weight = model.model.layers[0].self_attn.k_proj.weight

    def gradient(ids, mask, labels):
        loss = model(ids, mask, labels=labels, num_items_in_batch=1).loss
        return torch.autograd.grad(loss, weight)[0]

    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    together = gradient(batch.input_ids, batch.attention_mask, labels)
    alone = [gradient(torch.tensor([text]), None, torch.tensor([text])) for text in texts]
    assert_close(together, sum(alone))


def test_a_saved_copy_keeps_s2(llama, tmp_path):
    logits_of(llama, [1, 2, 3])
    llama.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["attn_implementation"] == "s2"
    assert saved["s2_attention"] == SETTINGS


def refused(model, message: str, *inputs, **kwargs) -> None:
    with pytest.raises(ValueError, match=message):
        model(*(inputs or (torch.ones(1, 40, dtype=torch.long),)), **kwargs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "^s2_attention None: must be a dict of S2 settings"),
        ({"strides": 4}, "^s2_attention strides: must be one of block_size, dense_layer_freq"),
        ({"num_layers": 3}, "^s2_attention num_layers: must be one of"),
        ({"block_size": 17}, "^block_size 17: must be a power of two"),
    ],
)
def test_refuses_a_model_without_settings(tmp_path, settings, message):
    save_model(tmp_path, "llama", s2_attention=settings, attn_implementation=None)
    model = load(tmp_path, attn_implementation="s2")
    refused(model, message)
    with pytest.raises(ValueError, match=message):
        S2Cache(model.config)


def test_refuses_unsupported_masks_and_caches(llama):
    four = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    refused(llama, r"^attention_mask: must be \[batch, tokens\]", attention_mask=four)
    packed = torch.tensor([[*range(20), *range(20)]])
    refused(llama, "^attention: must be causal over whole rows", position_ids=packed, use_cache=False)
    cache = DynamicCache(config=llama.config)
    refused(
        llama,
        r"^attention_mask \(1, 39\): must be \[batch, tokens\] = \(1, 40\)",
        attention_mask=torch.zeros(1, 39),
        **{CACHE_ARGUMENT: cache},
    )
    with pytest.raises(ValueError, match=rf"^{CACHE_ARGUMENT}: must be an S2Cache or a DynamicCache"):
        llama.generate(torch.ones(1, 40, dtype=torch.long), max_new_tokens=2, cache_implementation="static")


def test_refuses_a_mask_that_changes_earlier_padding(llama):
    batch, cache = Batch.of(prompts(20, 50), "left"), S2Cache(llama.config)
    with torch.no_grad():
        llama(**vars(batch), **{CACHE_ARGUMENT: cache})
    mask = torch.ones(2, 51)
    mask[0, 0] = 0
    refused(
        llama,
        "^attention_mask: must not change the columns of cached tokens",
        torch.ones(2, 1, dtype=torch.long),
        attention_mask=mask,
        **{CACHE_ARGUMENT: cache},
    )


def test_refuses_unsupported_attention_options(tmp_path):
    config = {**SHAPE, "s2_attention": SETTINGS, "attn_implementation": "s2"}
    model = LlamaForCausalLM(LlamaConfig(**config, attention_dropout=0.1)).train()
    refused(model, "^attention_dropout: must not be set")
    save_model(tmp_path, "mistral", sliding_window=64)
    refused(load(tmp_path), "^sliding_window 64: must be null")


def test_refuses_the_cache_with_another_attention(directories):
    dense = load(directories["llama"], attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r'^attn_implementation "sdpa": must be "s2" to use an S2Cache$'):
        S2Cache(dense.config)


def test_refuses_assisted_generation(llama):
    cache = S2Cache(llama.config)
    with torch.no_grad():
        llama(torch.full((1, 40), PAD + 1), **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match=f"^{CACHE_ARGUMENT}: must not be an S2Cache in assisted generation"):
        cache.crop(-1)
    assert megatron_s2.hf.NAME == "s2"
