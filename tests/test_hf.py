"""The attention function for transformers: correct in every family, with padding on either side and with
either cache; an error where it would be wrong."""

import copy
import json
import pickle

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
from megatron_run import run_command
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import megatron_s2.hf
from megatron_s2.hf import CACHE_ARGUMENT, S2Cache, settings_of
from megatron_s2.kv_cache.cache import cache_bytes
from megatron_s2.pattern import S2Settings

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


def test_prompts_share_a_forked_prefix(llama):
    """Tails of unequal length are padded behind it."""
    [prefix], tails = prompts(150), prompts(9, 1, 30)
    cache, batch = S2Cache(llama.config), Batch.of(tails, "left")
    with torch.no_grad():
        llama(torch.tensor([prefix]), use_cache=True, **{CACHE_ARGUMENT: cache})
    forked = cache.fork([0, 0, 0])
    assert all(len(layer.shared) == 1 for layer in forked.caches)
    ids = torch.cat([torch.tensor([prefix] * 3), batch.input_ids], 1)
    mask = torch.cat([torch.ones(3, len(prefix), dtype=torch.long), batch.attention_mask], 1)
    for made in (forked, cache.fork([0, 0, 0])):
        given = {"input_ids": ids, "attention_mask": mask, CACHE_ARGUMENT: made}
        got = llama.generate(**given, max_new_tokens=20, do_sample=False)
        assert got[:, ids.shape[1] :].tolist() == [greedy(llama, prefix + tail, 20) for tail in tails]


def test_max_tokens_bounds_the_allocation(llama):
    batch, cache = Batch.of(prompts(40), "left"), S2Cache(llama.config, max_tokens=59)
    llama.generate(**vars(batch), max_new_tokens=20, do_sample=False, **{CACHE_ARGUMENT: cache})
    assert sum(layer.capacity_bytes for layer in cache.caches) < 59 * 2 * 2 * 16 * 4 * 3
    refused(
        llama,
        "max_tokens 59: must be at least the 60 tokens",
        torch.ones(1, 1, dtype=torch.long),
        **{CACHE_ARGUMENT: cache},
    )


@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_stride_1_is_dense(family, tmp_path):
    save_model(tmp_path, family, s2_attention={**SETTINGS, "vert_stride": 1})
    sparse, dense = load(tmp_path), load(tmp_path, attn_implementation="eager")
    assert dense.config._attn_implementation == "eager"
    [tokens] = prompts(130)
    assert_close(logits_of(sparse, tokens), logits_of(dense, tokens))


LAYERS = [
    {"local_blocks": 2, "sink_blocks": 1, "strides": [0, 3], "phases": [0, 1]},
    {"dense": True},
    {"local_blocks": 1, "strides": [4, 0], "sink_blocks": 0, "phases": [2, 0]},
]


def test_a_dense_model_attends_by_a_pattern_for_each_layer(tmp_path):
    save_model(tmp_path / "sparse", "llama", s2_attention={"block_size": 16, "layers": LAYERS})
    save_model(tmp_path / "dense", "llama", s2_attention=None, attn_implementation=None)
    sparse, dense = load(tmp_path / "sparse"), load(tmp_path / "dense")
    [tokens] = prompts(130)
    expected, before = logits_of(sparse, tokens), logits_of(dense, tokens)
    megatron_s2.hf.set_pattern(dense, S2Settings(3, 2, 16, layers=LAYERS))
    assert torch.equal(logits_of(dense, tokens), expected)
    assert dense.config.s2_attention == sparse.config.s2_attention
    cache = S2Cache(dense.config)
    how = {"max_new_tokens": 12, "do_sample": False, CACHE_ARGUMENT: cache}
    got = dense.generate(**vars(Batch.of([tokens], "left")), **how)
    assert got[0, 130:].tolist() == greedy(dense, tokens, 12)
    kept = [cache_bytes(settings_of(dense.config).pattern(n), 141, 16, torch.float32) for n in (1, 2, 3)]
    assert [layer.bytes for layer in cache.caches] == kept
    assert (expected - before).abs().max() > 0.1
    megatron_s2.hf.set_pattern(dense, None)
    assert torch.equal(logits_of(dense, tokens), before)
    assert not hasattr(dense.config, "s2_attention")


def test_a_pattern_for_each_query_head(tmp_path):
    """Logits equal those of dense attention under a mask for each query head; the cache gives the same."""
    of_query_heads = {
        "block_size": 16,
        "local_blocks": 2,
        "vert_stride": 4,
        "phases": [1, 2, 3, 0],
        "pattern_heads": 4,
    }
    save_model(tmp_path, "llama", s2_attention=of_query_heads)
    model, [tokens] = load(tmp_path), prompts(150)
    pattern = settings_of(model.config).pattern(1)
    seen = pattern.block_mask(10).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :150, :150].tril()
    mask = torch.zeros(1, 4, 150, 150).masked_fill(~seen, float("-inf"))
    with torch.no_grad():
        expected = load(tmp_path, attn_implementation="eager")(torch.tensor([tokens]), mask).logits[0]
    assert_close(logits_of(model, tokens), expected)

    batch = Batch.of(prompts(5, 150), "left")
    cache = S2Cache(model.config)
    got = model.generate(**vars(batch), **{CACHE_ARGUMENT: cache}, max_new_tokens=20, do_sample=False)
    assert got[:, 150:].tolist() == [greedy(model, text, 20) for text in prompts(5, 150)]
    assert cache.caches[0].dense_bytes == 2 * cache.caches[0].head_dim * 4 * 2 * sum(cache.caches[0].lengths)

    model.config.s2_attention = of_query_heads | {"pattern_heads": 2, "phases": [1, 2]}
    with pytest.raises(ValueError, match="pattern_heads 2: must be the 4 query heads of the model"):
        settings_of(model.config)


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


def resized(model):
    model.resize_token_embeddings(120)
    return model


def merged(model):
    """A change of the weights, as `merge_and_unload` of a LoRA makes it: the model stays the same object."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight += torch.ones(len(weight), 1) @ torch.full((1, weight.shape[1]), 1e-3)
    return model


COPIES = {
    "loaded and saved": lambda directory: load(directory),
    "other dtype": lambda directory: load(directory, dtype=torch.bfloat16),
    "half": lambda directory: load(directory).half(),
    "resized embeddings": lambda directory: resized(load(directory)),
    "merged LoRA": lambda directory: merged(load(directory)),
    "deep copy": lambda directory: copy.deepcopy(load(directory)),
    "pickled": lambda directory: pickle.loads(pickle.dumps(load(directory))),
    "run": lambda directory: (model := load(directory), logits_of(model, [1, 2, 3]))[0],
    "run dense": lambda directory: load(directory, attn_implementation="sdpa"),
    "from_config": lambda directory: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)),
    "config alone": AutoConfig.from_pretrained,
    "config of a dict": lambda directory: LlamaConfig.from_dict(
        AutoConfig.from_pretrained(directory).to_dict()
    ),
    "config by hand": lambda directory: LlamaConfig(**SHAPE, s2_attention=SETTINGS),
    "inner model": lambda directory: load(directory).model,
}


@pytest.fixture(scope="module")
def copies(directories, tmp_path_factory):
    """A copy of the llama for each of `COPIES`, none of which transformers lets know that it runs S2."""
    made = tmp_path_factory.mktemp("copies")
    for name, make in COPIES.items():
        make(directories["llama"]).save_pretrained(made / name)
    return made


@pytest.mark.parametrize("name", COPIES)
def test_every_saved_copy_says_s2(copies, name):
    saved = json.loads((copies / name / "config.json").read_text())
    assert (saved["attn_implementation"], saved["s2_attention"]) == ("s2", SETTINGS)


def test_a_copy_has_the_same_logits(copies, llama):
    [tokens] = prompts(130)
    assert torch.equal(logits_of(load(copies / "loaded and saved"), tokens), logits_of(llama, tokens))


def test_no_copy_loads_dense_without_this_module(copies):
    script = """
import sys
assert "megatron_s2.hf" not in sys.modules
from transformers import AutoConfig, AutoModelForCausalLM
for directory in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    except ValueError as error:
        print("s2" in str(error))
    else:
        print(model.config._attn_implementation)
"""
    names = [name for name in COPIES if name != "inner model"]
    found = run_command("-c", script, *(copies / name for name in names))
    assert found.stdout.split() == ["True"] * len(names), found.stderr


def test_a_pattern_without_a_named_attention_runs_s2(directories, tmp_path):
    """As in a copy that transformers wrote alone, or with an explicit None."""
    save_model(tmp_path, "llama", attn_implementation=None)
    entries = json.loads((tmp_path / "config.json").read_text())
    del entries["attn_implementation"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert load(tmp_path).config._attn_implementation == "s2"
    assert load(directories["llama"], attn_implementation=None).config._attn_implementation == "s2"
    by_hand = LlamaConfig(**SHAPE)
    by_hand.s2_attention = SETTINGS
    assert LlamaForCausalLM(by_hand).config._attn_implementation == "s2"


def test_a_model_without_a_pattern_is_left_alone(directories, tmp_path):
    model = load(directories["llama"], attn_implementation="sdpa")
    del model.config.s2_attention
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())
    assert load(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("gradients_of", ["weights", "embeddings"])
def test_a_cache_is_refused_while_gradients_are_recorded(directories, gradients_of):
    model = load(directories["llama"]).train()
    model.requires_grad_(gradients_of == "weights")
    embeddings = model.get_input_embeddings()(torch.tensor(prompts(40))).detach().requires_grad_()
    message = (
        f"^{CACHE_ARGUMENT}: must not be an S2Cache while gradients are recorded, because it passes none"
    )
    cache = S2Cache(model.config)
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeddings, use_cache=True, **{CACHE_ARGUMENT: cache})
    with torch.no_grad():
        model(inputs_embeds=embeddings, use_cache=True, **{CACHE_ARGUMENT: cache})
    assert [layer.lengths for layer in cache.caches] == [[40]] * 3


@pytest.mark.parametrize("cache", ["none", "s2", "dynamic"])
def test_autocast_runs_as_dense_attention_does(directories, cache):
    """On float32 weights: prompt and decoded token are as exact as sdpa in a dense model."""
    [tokens] = prompts(100)
    ids, caches = (
        torch.tensor([tokens]),
        {"s2": S2Cache, "dynamic": lambda config: DynamicCache(config=config)},
    )
    model = load(directories["llama"])
    exact = logits_of(model, tokens)
    given = {"use_cache": False} if cache == "none" else {CACHE_ARGUMENT: caches[cache](model.config)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if cache == "none":
            got = model(ids, **given).logits[0]
        else:
            got = torch.cat([model(part, **given).logits[0] for part in (ids[:, :99], ids[:, 99:])])
    assert (got.float() - exact).norm() < 0.05 * exact.norm()
    dense, rounded = load(directories["llama"], attn_implementation="sdpa"), None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = dense(ids, use_cache=False).logits[0]
    limit = 2 * (rounded.float() - logits_of(dense, tokens)).norm()
    assert (got.float() - exact).norm() < limit


def test_autocast_trains(directories):
    model, [tokens] = load(directories["llama"]).train(), prompts(100)
    ids, weight = torch.tensor([tokens]), model.model.layers[0].self_attn.q_proj.weight

    def gradient():
        return torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, weight)[0]

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        got = gradient()
    assert got.dtype == torch.float32
    assert (got - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
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


@pytest.mark.parametrize("first_window", [2, 3])
def test_a_window_is_refused_only_where_a_layer_has_it(tmp_path, first_window):
    config = Qwen2Config(**SHAPE, sliding_window=64, use_sliding_window=True, max_window_layers=first_window)
    config.s2_attention, config._attn_implementation = SETTINGS, "s2"
    model, [tokens] = Qwen2ForCausalLM(config).eval(), prompts(100)
    if first_window < config.num_hidden_layers:
        refused(model, "^sliding_window 64: must be null")
    else:
        assert logits_of(model, tokens).isfinite().all()


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
