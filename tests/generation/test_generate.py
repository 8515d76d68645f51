"""scripts/generate.py with both kinds of model, bad input and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from generate import main
from generation_models import VOCAB, greedy, prompts, save_model
from hf_models import convert
from megatron_run import call_in_fork, call_on_ranks, train_all
from script_main import exit_status
from selection import exhaustive
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from waiting import PATIENCE

import megatron_s2.hf
from megatron_s2.data.command import run_command
from megatron_s2.generation.prompts import read_prompts
from megatron_s2.generation.text_codec import (
    TextCodec,
    TokenStreamer,
    hugging_face_codec,
    megatron_codec,
)
from megatron_s2.kv_cache.cache import cache_bytes
from megatron_s2.pattern.pattern_file import write_pattern_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"
TRAINED = """
    --num-layers 3 --train-iters 1 --save-interval 1 --s2-attention --s2-block-size 16 --s2-local-blocks 2
    --s2-vert-stride 3 4 --s2-dense-layers 2 --s2-learnable-sink --qk-layernorm --norm-epsilon 1e-6
    --init-method-std 0.2
"""
LENGTHS = (5, 100, 47)


def process(*command) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A model with a tokenizer in which token n is the word `wn`."""
    directory = tmp_path_factory.mktemp("qwen3")
    save_model(directory, "qwen3")
    tokenizer = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w96").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(hugging_face):
    return AutoModelForCausalLM.from_pretrained(hugging_face).eval()


@pytest.fixture(scope="module")
def converted(hugging_face, tmp_path_factory):
    """The same model as a Megatron checkpoint, moved after the conversion; it contains its tokenizer."""
    from megatron_s2.checkpoint.convert import to_megatron
    from megatron_s2.data.command import CommandParser
    from megatron_s2.training.arguments import add_s2_args

    directory = tmp_path_factory.mktemp("converted")
    to_megatron(hugging_face, directory / "first", add_s2_args(CommandParser()).parse_args([]))
    return (directory / "first").rename(directory / "checkpoint")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    train_all(directory / "runs", {"s2": f"{TRAINED} --save {directory / 'checkpoint'}"})
    return directory / "checkpoint"


def words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def flags(*given) -> list[str]:
    return [*map(str, given), "--token-ids"]


def spelled(tokens: list[int]) -> str:
    """The text of tokens, as the tokenizer spells it."""
    return " ".join(f"w{token}" for token in tokens)


def prompt_flags(texts: list[list[int]], spell=words) -> list[str]:
    return [word for text in texts for word in ("--prompt", spell(text))]


def output(capsys, *given) -> tuple[str, str]:
    assert run_command(main, flags(*given)) == 0
    return tuple(capsys.readouterr())


def test_a_prompt_is_continued(capsys, hugging_face, model):
    [prompt] = prompts(100)
    out, err = output(capsys, "--hf", hugging_face, *prompt_flags([prompt]), "--max-new-tokens", 12)
    assert out == words(greedy(model, prompt, 12)) + "\n"
    prefill, decode, cache = err.splitlines()
    assert prefill.startswith("prefill: 100 tokens in ") and prefill.endswith(" tokens/s")
    assert decode.startswith("decode: 11 tokens in ")
    settings = megatron_s2.hf.settings_of(model.config)
    kept = sum(cache_bytes(settings.pattern(layer), 111, 24, model.dtype) for layer in (1, 2, 3))
    assert cache.startswith(f"cache: {kept} bytes, dense {3 * 2 * 111 * 2 * 24 * 4} bytes ")


def test_files_of_prompts_are_a_batch(capsys, hugging_face, model, tmp_path):
    """JSON lines with a byte order mark and blank lines; and a text of several lines, which is one prompt."""
    *texts, last = prompts(*LENGTHS, 20)
    lines = ["", *(json.dumps({"prompt": words(text), "id": 1}) for text in texts), "", ""]
    (tmp_path / "prompts.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    text = f"\ufeff{words(last[:9])}\r\n\r\n{words(last[9:])}\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    files = [word for name in ("prompts.jsonl", "prompt.txt") for word in ("--prompt-file", tmp_path / name)]
    out, _ = output(capsys, "--hf", hugging_face, *files, "--max-new-tokens", 9)
    expected = [f"[{row + 1}] {words(greedy(model, text, 9))}" for row, text in enumerate([*texts, last])]
    assert out.splitlines() == expected


def test_a_source_file_is_continued_from_its_end(capsys, tmp_path):
    """6,000 tokens, in lines, beyond a prefill chunk and the tokenizer's own maximum."""
    save_model(tmp_path / "model", "llama", max_position_embeddings=8192)
    model, [tokens] = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), prompts(6000)
    tokenizer = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512).save_pretrained(
        tmp_path / "model"
    )
    lines = [spelled(tokens[n : n + 7]) for n in range(0, 6000, 7)]
    (tmp_path / "source.py").write_text("\n".join(lines) + "\n")
    given = ["--hf", tmp_path / "model", "--prompt-file", tmp_path / "source.py", "--max-new-tokens", 4]
    assert run_command(main, [str(word) for word in given]) == 0
    out, err = capsys.readouterr()
    assert out == spelled(greedy(model, tokens, 4)) + "\n"
    assert err.startswith("prefill: 6000 tokens in ")


def test_prompts_that_begin_alike_share(capsys, hugging_face, model):
    [common], tails = prompts(100), prompts(3, 1, 20)
    texts = [common + tail for tail in tails]
    out, err = output(capsys, "--hf", hugging_face, *prompt_flags(texts), "--max-new-tokens", 9)
    assert out.splitlines() == [f"[{n + 1}] {words(greedy(model, text, 9))}" for n, text in enumerate(texts)]
    prefill, decode, _ = err.splitlines()
    assert prefill.startswith("prefill: 324 tokens in ")
    assert prefill.endswith("; 124 ran through the model, 200 are shared")
    assert decode.startswith("decode: 24 tokens in ")


def test_a_text_is_a_prompt_as_it_is(tmp_path):
    """With its line breaks, and white space at its end."""
    text = "def f():\r\n\treturn 1\n\n  "
    (tmp_path / "f.py").write_bytes(text.encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "f.py")] == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b" \n", "p.txt: has no prompt: it must have text"),
        ("p.txt", b"\xff", "p.txt: must be UTF-8: "),
        ("p.txt", b"1 2 three", "p.txt: must be token ids, such as '12 7 30'"),
        ("p.txt", b"1 97", "p.txt: token 97 is not in the model's vocabulary of 97"),
        ("p.jsonl", b"\n", 'p.jsonl: has no prompt: it must have lines such as {"prompt": "Once upon"}'),
        ("p.jsonl", b'{"prompt": "1"}\n1 2\n', "p.jsonl:2: must be a line of JSON: "),
        ("p.jsonl", b'\n["1"]', 'p.jsonl:2: must be an object with a text, such as {"prompt": '),
        ("p.jsonl", b'{"text": "1"}', 'p.jsonl:1: must be an object with a text, such as {"prompt": '),
        ("p.jsonl", b'{"prompt": [1]}', 'p.jsonl:1: must be an object with a text, such as {"prompt": '),
        ("p.jsonl", b'{"prompt": ""}', "p.jsonl:1: must have at least one token"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: must be a line of JSON: "),
    ],
)
def test_a_bad_prompt_file_is_one_line(capsys, hugging_face, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert run_command(main, flags("--hf", hugging_face, "--prompt-file", tmp_path / name)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --prompt-file {tmp_path}/{message}") and err.count("\n") == 1


def test_a_long_bad_prompt_is_shortened(capsys, hugging_face):
    assert run_command(main, flags("--hf", hugging_face, "--prompt", "word " * 2000)) == 2
    err = capsys.readouterr().err
    assert err == f"error: --prompt '{'word ' * 8}…': must be token ids, such as '12 7 30'\n"


def test_more_tokens_than_positions_are_noted(capsys, tmp_path):
    save_model(tmp_path, "qwen3", max_position_embeddings=100)
    _, err = output(capsys, "--hf", tmp_path, *prompt_flags(prompts(99)), "--max-new-tokens", 3)
    assert err.splitlines()[0] == (
        "note: 101 tokens in a row: the model has 100 positions (max_position_embeddings)"
    )


def test_too_little_memory_is_one_line(capsys, hugging_face):
    asked = flags("--hf", hugging_face, "--prompt", "1", "--max-new-tokens", 10**15)
    assert run_command(main, asked) == 2
    assert f"--max-new-tokens {10**15}: must be less" in capsys.readouterr().err


def test_special_tokens_are_not_written(hugging_face):
    """For the tokenizers of Megatron and of Hugging Face."""
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(hugging_face), metadata_path={"library": "huggingface"}
    )
    ids = [3, 96, 4]
    decoded = [megatron_codec(tokenizer, "HuggingFaceTokenizer", stop=frozenset({5})).decode(ids)]
    assert [*decoded, hugging_face_codec(hugging_face, frozenset({5})).decode(ids)] == ["w3 w4"] * 2


def test_text_ends_with_the_stop_token(capsys, hugging_face, model):
    [prompt] = prompts(30)
    row = greedy(model, prompt, 8)
    stop = row[4]
    end = row.index(stop)
    given = ["--hf", str(hugging_face), *prompt_flags([prompt], spelled), "--max-new-tokens", "8"]
    assert run_command(main, given) == 0
    assert capsys.readouterr().out == spelled(row) + "\n"
    config = hugging_face / "generation_config.json"
    before = config.read_text()
    config.write_text(json.dumps({"eos_token_id": stop}))
    try:
        assert run_command(main, given) == 0
        assert capsys.readouterr().out == spelled(row[: end + 1]) + "\n"
        assert run_command(main, [*given, "--ignore-eos"]) == 0
        assert capsys.readouterr().out == spelled(row) + "\n"
    finally:
        config.write_text(before)


def test_a_seed_reproduces_the_text(capsys, hugging_face):
    sampling = ("--max-new-tokens", 20, "--temperature", 1.0, "--top-k", 50, "--top-p", 0.9)
    drawn = [
        output(capsys, "--hf", hugging_face, "--prompt", "1 2 3", *sampling, "--seed", seed)[0]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_megatron_checkpoint_generates_the_same_text(converted, model):
    given = prompt_flags(prompts(*LENGTHS), spelled)
    words = ["--load", str(converted), *given, "--max-new-tokens", "12", "--ignore-eos"]
    done = call_in_fork("generate", "main", words)
    out, err = done.out, done.err
    rows = [greedy(model, text, 12) for text in prompts(*LENGTHS)]
    assert out.splitlines() == [f"[{n + 1}] {spelled(row)}" for n, row in enumerate(rows)]
    assert [line.split(":")[0] for line in err.splitlines()] == ["prefill", "decode", "cache"]


def test_a_dense_model_generates_by_a_pattern_file(capsys, model, tmp_path, hugging_face):
    """As the model whose pattern the file has: from its directory and, converted, from a checkpoint."""
    write_pattern_file(path := tmp_path / "pattern.json", megatron_s2.hf.settings_of(model.config))
    save_model(tmp_path / "dense", "qwen3", s2_attention=None, attn_implementation=None)
    [prompt] = prompts(100)
    given = [*prompt_flags([prompt]), "--max-new-tokens", 6, "--s2-pattern-file", path]
    expected = words(greedy(model, prompt, 6)) + "\n"
    assert output(capsys, "--hf", tmp_path / "dense", *given)[0] == expected
    convert("hf-to-megatron", tmp_path / "dense", tmp_path / "megatron")
    assert call_in_fork("generate", "main", flags("--load", tmp_path / "megatron", *given)).out == expected
    assert run_command(main, flags("--hf", hugging_face, *given)) == 2
    assert "which was trained with a pattern of its own" in capsys.readouterr().err


def texts_of_which_two_begin_alike() -> list[list[int]]:
    *texts, common, tail = prompts(*LENGTHS, 190, 20)
    return [*texts, common + tail, common + tail[:3]]


@pytest.fixture(scope="module")
def generated(trained):
    """What one rank generates, in several ways."""
    given = trained, texts_of_which_two_begin_alike(), 16
    return call_in_fork("checkpoint_generation", "generated", *given).returned


def test_a_trained_checkpoint_generates_the_same_with_any_cache(generated):
    found = generated
    assert found["cache"] == found["recomputed"] == found["static"] == found["cache again"]
    assert (found["sinks"], found["epsilon"]) == (3, 1e-6)
    assert not found["has process group"]
    assert (found["text"], found["stop"]) == ("1 2 3", [])


@pytest.mark.parametrize(("tensor", "context"), [(1, 2), *exhaustive((2, 1), (2, 2), (4, 1), (1, 4))])
def test_ranks_generate_the_tokens_of_one(trained, generated, tensor, context):
    given = trained, texts_of_which_two_begin_alike(), 16, tensor, context
    for rank in call_on_ranks(tensor * context, "checkpoint_generation", "generated_on_rank", *given):
        shared, apart = rank.returned["shared"], rank.returned["apart"]
        assert shared.rows == apart.rows == generated["cache"]
        assert shared.kept_bytes < apart.kept_bytes == rank.returned["formula"] < apart.dense_bytes


def test_a_checkpoint_generates_on_two_ranks(converted, model):
    """By the command, tensor-parallel; prompts share a beginning, and rank 0 alone writes."""
    [common], tails = prompts(90), prompts(5, 30)
    texts = [common + tail for tail in tails]
    given = ["--load", str(converted), *prompt_flags(texts), "--token-ids", "--max-new-tokens", "12"]
    first, second = call_on_ranks(2, "generate", "main", [*given, "--tensor-model-parallel-size", "2"])
    assert first.out.splitlines() == [f"[{n + 1}] {words(greedy(model, x, 12))}" for n, x in enumerate(texts)]
    prefill, _, cache = first.err.splitlines()
    assert prefill.endswith("; 125 ran through the model, 90 are shared")
    assert cache.startswith("cache of rank 0: ")
    assert (second.out, second.err) == ("", "")


@pytest.mark.exhaustive
def test_a_hugging_face_model_generates_on_two_ranks(hugging_face, model):
    texts = prompts(*LENGTHS)
    given = ["--hf", str(hugging_face), *prompt_flags(texts), "--token-ids", "--max-new-tokens", "12"]
    first, second = call_on_ranks(2, "generate", "main", [*given, "--context-parallel-size", "2"])
    assert first.out.splitlines() == [f"[{n + 1}] {words(greedy(model, x, 12))}" for n, x in enumerate(texts)]
    assert (second.out, second.err) == ("", "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0: must be >= 1"),
        ("--context-parallel-size -1", "--context-parallel-size -1: must be >= 1"),
        (
            "--tensor-model-parallel-size 2 --context-parallel-size 3",
            "--tensor-model-parallel-size 2, --context-parallel-size 3: the product must be 1, the number "
            "of ranks, which torchrun --nproc-per-node sets",
        ),
        ("--pipeline-model-parallel-size 2", "unrecognized arguments: --pipeline-model-parallel-size 2"),
    ],
)
def test_sizes_that_do_not_fit_the_ranks_are_refused(capsys, hugging_face, given, message):
    words = flags("--hf", hugging_face, "--prompt", 1, *given.split())
    assert exit_status(main, words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_rank_of_several_refuses_in_one_line(capsys, hugging_face, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    words = flags("--hf", hugging_face, "--prompt", 1)
    assert exit_status(main, words) == 2
    message = "--tensor-model-parallel-size 1, --context-parallel-size 1: the product must be 2, the number"
    assert capsys.readouterr().err.startswith(f"error: {message} of ranks, ")
    assert exit_status(main, [*words, "--tensor-model-parallel-size", "2"]) == 2
    message = "--tensor-model-parallel-size 2: must be 1 with --hf; convert the model"
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_ctrl_c_ends_quietly(hugging_face):
    running = process(SCRIPT, "--hf", hugging_face, *flags("--prompt", "1 2", "--max-new-tokens", 10**6))
    assert running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("note: ")] == ["interrupted"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--prompt 1", "error: one of the arguments --hf --load is required"),
        ("--hf {hf}", "error: one of the arguments --prompt --prompt-file is required"),
        ("--hf /nowhere --prompt 1", "error: --hf /nowhere: is not a directory with a config.json"),
        ("--load /nowhere --prompt 1", "error: --load /nowhere: is not a directory"),
        ("--load {hf} --prompt 1", "error: --load {hf}: is not a checkpoint: it has no latest"),
        ("--hf {hf} --prompt-file /nowhere", "error: --prompt-file /nowhere: is not a file"),
        ("--hf {hf} --prompt one", "error: --prompt 'one': must be token ids"),
        ("--hf {hf} --prompt 97", "error: --prompt '97': token 97 is not in the model's vocabulary of 97"),
        ("--hf {hf} --prompt 1 --max-new-tokens 0", "error: --max-new-tokens 0: must be >= 1"),
        ("--hf {hf} --prompt 1 --temperature -1", "error: --temperature -1.0: must be >= 0 and finite"),
        ("--hf {hf} --prompt 1 --temperature inf", "error: --temperature inf: must be >= 0 and finite"),
        ("--hf {hf} --prompt 1 --top-k -1", "error: --top-k -1: must be >= 0"),
        ("--hf {hf} --prompt 1 --top-p 0", "error: --top-p 0.0: must be above 0 and at most 1"),
        ("--hf {hf} --prompt 1 --seed -1", "error: --seed -1: must be >= 0 and below 2**63"),
        (
            "--hf {hf} --prompt 1 --seed 9223372036854775808",
            "error: --seed 9223372036854775808: must be >= 0",
        ),
    ],
)
def test_bad_input_is_refused(capsys, hugging_face, given, message):
    words = [word.format(hf=hugging_face) for word in given.split()]
    status = exit_status(main, flags(*words))
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith(message.format(hf=hugging_face)) and err.count("\n") == 1


def test_models_without_s2_or_tokenizer_are_refused(capsys, tmp_path):
    save_model(tmp_path / "s2", "llama")
    assert run_command(main, ["--hf", str(tmp_path / "s2"), "--prompt", "text"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --tokenizer-model {tmp_path / 's2'}: has no tokenizer")
    save_model(tmp_path / "dense", "llama", s2_attention=None, attn_implementation=None)
    assert run_command(main, flags("--hf", tmp_path / "dense", "--prompt", "1")) == 2
    assert capsys.readouterr().err.startswith(f"error: --hf {tmp_path / 'dense'}: s2_attention None: must be")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_streamer_writes_the_decoded_text(kind):
    """With spaces and bytes whose text depends on their neighbours."""
    if kind == "bytes":
        tokenizer = Tokenizer(BPE({letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(), decoders.ByteLevel()
    else:
        pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", "\u2581a", "a", "b"]
        tokenizer = Tokenizer(BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
        tokenizer.pre_tokenizer = Metaspace()
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    ids = tokenizer.encode("a b  \u00e9a \U0001f600 a\n\n b").ids
    codec, written = TextCodec(list, tokenizer.decode, frozenset()), []
    streamer = TokenStreamer(codec, written.append)
    for token in ids:
        streamer.add(token)
    streamer.end()
    assert "".join(written) == tokenizer.decode(ids) and len(written) > 5


def test_a_character_of_several_tokens_is_written_when_it_is_complete():
    pieces = [b"a", "\u00e9".encode()[:1], "\u00e9".encode()[1:], b"b"]
    codec = TextCodec(
        list, lambda ids: b"".join(pieces[n] for n in ids).decode(errors="replace"), frozenset()
    )
    written = []
    streamer = TokenStreamer(codec, written.append)
    for token in range(4):
        streamer.add(token)
    streamer.end()
    assert written == ["a", "\u00e9", "b", ""]
