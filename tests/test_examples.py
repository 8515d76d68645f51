"""Each recipe in examples/ starts a training that Megatron and S2 accept; those for a CPU really run.

Of the others, the command line is taken from the script, by stand-ins for the launchers, and goes through
the parser, our checks and Megatron's own validation, as on the machine that the recipe is for.
"""

import json
import re
import shlex
import subprocess
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
from megatron_arguments import parse, validate_on_gpus
from megatron_run import call_in_fork, environment_of_forks, train_all
from recipes import EXAMPLES, RANKS, RECIPES, environment, launch, split
from waiting import PATIENCE

from megatron_s2.layers.arguments import settings_from_args
from megatron_s2.training.arguments import validate_s2_args
from megatron_s2.training.checks import check_paths
from megatron_s2.training.environment import Environment, runnable_arguments

NVIDIA_CONTAINER = Environment(gpu=True, transformer_engine=True, apex=True)
PLAIN_GPU = Environment(gpu=True, transformer_engine=False, apex=False)


@pytest.fixture
def launched(tmp_path):
    """Runs a recipe with stand-ins for the launchers, and gives the words it would have launched."""
    return partial(launch, tmp_path)


def accepted(argv: list[str], ranks: int, target: Environment = NVIDIA_CONTAINER) -> Namespace:
    """The arguments after everything that a run asks of them before it builds a model."""
    argv, _ = runnable_arguments(argv, target)
    args = parse(argv, ranks)
    check_paths(args)
    validate_s2_args(args, argv)
    return validate_on_gpus(args)


@pytest.mark.parametrize("recipe", RANKS)
def test_a_recipe_is_accepted_as_it_stands(launched, recipe):
    _, argv = split(launched(recipe))
    args = accepted(argv, RANKS[recipe])
    assert args.s2_attention and args.bf16 and args.use_distributed_optimizer
    assert args.mock_data and args.tokenizer_type == "NullTokenizer"
    assert settings_from_args(args).dense_layers == (1, 2)
    assert settings_from_args(args).coverage().lost == 0


def test_one_gpu_needs_nothing_but_pytorch(launched):
    _, argv = split(launched("one-gpu"))
    args = accepted(argv, 1, PLAIN_GPU)
    assert args.transformer_impl == "local"
    assert args.seq_length == 32768


def test_the_slurm_recipe_uses_every_rank(launched):
    launcher, argv = split(launched("slurm"))
    assert launcher[0] == "srun"
    assert " ".join(launcher[launcher.index("torchrun") :]) == (
        "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-id 4711 --rdzv-backend c10d "
        "--rdzv-endpoint node3:24711"
    )
    args = accepted(argv, RANKS["slurm"])
    sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.data_parallel_size
    assert sizes == (8, 2, 2)
    assert args.exit_signal_handler


@pytest.mark.parametrize("recipe", RANKS)
def test_the_users_data_takes_the_place_of_mock_data(launched, tmp_path, recipe):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").touch()
    prefix, tokenizer = str(tmp_path / "text"), str(tmp_path)
    _, argv = split(launched(recipe, "--data-prefix", prefix, "--tokenizer", tokenizer))
    args = accepted(argv, RANKS[recipe])
    assert args.data_path == [prefix] and not args.mock_data
    assert (args.tokenizer_type, args.tokenizer_model) == ("HuggingFaceTokenizer", tokenizer)


@pytest.mark.parametrize("recipe", RANKS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data-prefix", "text"], "--tokenizer: must be given with --data-prefix"),
        (["--tokenizer", "words"], "--data-prefix: must be given with --tokenizer"),
        (["--out"], "--out: needs a value"),
    ],
)
def test_half_a_choice_of_data_is_refused(launched, recipe, words, message):
    done = launched(recipe, *words)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("recipe", RANKS)
def test_a_second_call_goes_on_where_the_first_ended(launched, recipe):
    _, argv = split(launched(recipe, "--out", "runs/mine"))
    args = accepted(argv, RANKS[recipe])
    assert args.save == args.load == "runs/mine/checkpoint"
    assert args.ckpt_format == "torch_dist"
    assert args.tensorboard_dir == "runs/mine/tensorboard"


@pytest.mark.parametrize("recipe", RANKS)
def test_flags_of_the_user_count_more_than_the_recipes(launched, recipe):
    _, argv = split(launched(recipe, "--lr", "1e-4", "--s2-vert-stride", "4", "--train-iters", "700"))
    args = accepted(argv, RANKS[recipe])
    assert (args.lr, args.s2_vert_stride, args.train_iters) == (1e-4, 4, 700)


def test_sbatch_options_stand_where_slurm_reads_them():
    """Slurm stops reading at the first line that is neither a comment nor empty."""
    header = re.match(r"(#.*\n)+", RECIPES["slurm"].read_text())[0]
    assert header.count("#SBATCH ") == RECIPES["slurm"].read_text().count("#SBATCH ") > 5


SHORT = ["--train-iters", "2", "--eval-iters", "1", "--lr-warmup-iters", "0"]


def test_the_laptop_recipe_trains(launched, tmp_path):
    launcher, argv = split(launched("tiny-cpu", *SHORT))
    assert launcher == ["torchrun", "--standalone", "--nproc-per-node", "2"]
    argv += ["--tensorboard-dir", str(tmp_path / "run")]
    run = train_all(tmp_path, {"run": shlex.join(argv)}, ranks=2, model="", data="")["run"]
    assert "S2 in 3 of 4 layers" in run.output
    assert sorted(run.losses) == [1, 2]


@pytest.mark.exhaustive
def test_the_laptop_recipe_runs(tmp_path):
    logs = tmp_path / "logs"
    done = subprocess.run(
        ["bash", str(RECIPES["tiny-cpu"]), *SHORT, "--tensorboard-dir", logs],
        cwd=tmp_path,
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"iteration +2/ +2 .* lm loss: \d", done.stdout)
    assert list(logs.iterdir())


def made_sparse(directory: Path, model: Path, prefix: Path, words: str) -> subprocess.CompletedProcess:
    """Runs the recipe that trains a dense model on, on a tiny one."""
    words += f" --hf {model} --data-prefix {prefix} --out {directory / 'out'} --seq-length 64 --num-workers 0"
    words += " --global-batch-size 4 --lr 3e-3 --lr-warmup-iters 0 --log-interval 1"
    pattern = "--s2-block-size 16 --s2-local-blocks 1 --s2-vert-stride 2"
    return subprocess.run(
        ["bash", str(EXAMPLES / "continue-pretraining" / "train.sh"), *words.split()],
        cwd=directory,
        env=environment_of_forks() | {"PATTERN": pattern, "SAMPLES": "4"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def losses_of(done: subprocess.CompletedProcess) -> list[float]:
    """What was judged, in order."""
    return [float(loss) for loss in re.findall(r"^loss (\S+), perplexity", done.stdout, re.M)]


@pytest.mark.exhaustive
def test_a_dense_model_is_made_sparse_in_two_calls(tmp_path):
    """The training ends early, before the attention is the pattern, so that there is nothing to export yet,
    and a second call goes on."""
    model, prefix = tiny_model(tmp_path), tiny_data(tmp_path)
    words = "--train-iters 8 --s2-anneal-steps 6 --save-interval 4"
    begun = made_sparse(tmp_path, model, prefix, f"{words} --exit-interval 4")
    assert begun.returncode == 2
    assert "the checkpoint is of step 4, before its attention is the pattern" in begun.stderr
    dense, sparse = losses_of(begun)
    assert dense != sparse
    assert "annealing: stride 1, window 2 from step 0; stride 2, window 1 from step 6" in begun.stdout
    ended = made_sparse(tmp_path, model, prefix, words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.search(r"iteration +5/ +8 ", ended.stdout) and "iteration        4/" not in ended.stdout
    assert losses_of(ended)[0] < sparse - 0.3
    assert "exported.new: qwen3 (from " in ended.stdout
    assert "It goes on: The" in ended.stdout


STAND_IN = """#!/bin/bash
printf "%s\\n" "$*" >>"$(dirname "$0")/calls"
while (($#)); do [[ $1 != --output ]] || { mkdir -p "$2" && echo --swiglu >"$2/resume.args"; }; shift; done
"""


def test_each_stage_of_a_longer_context_begins_with_the_model_of_the_one_before(tmp_path):
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    words = ["--hf", "model", "--data-prefix", "data", "--out", str(out), "--lr", "1e-6"]
    script = EXAMPLES / "longer-context" / "train.sh"
    for _ in range(2):  # the second call finds that all is done
        done = subprocess.run(
            ["bash", str(script), *words], env=environment(tmp_path), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        calls = (tmp_path / "calls").read_text().splitlines()
        conversions = [call for call in calls if "hf-to-megatron" in call]
        trainings = [call for call in calls if "pretrain_gpt" in call]
        assert len(conversions) == len(trainings) == 2
    stages = {"32768": ("model", "2044000", "500"), "131072": (f"{out}/32768/exported", "8360000", "0")}
    for (tokens, (model, base, anneal)), conversion, training in zip(stages.items(), conversions, trainings):
        assert f"--input {model} --output {out}/{tokens}/start " in conversion
        assert f" --max-position-embeddings {tokens} --rotary-base {base} --s2-attention " in conversion
        assert "pretrain_gpt.py --swiglu " in training
        assert f" --seq-length {tokens} " in training
        assert f" --s2-anneal-steps {anneal} " in training
        assert training.endswith(" --lr 1e-6")


@pytest.mark.exhaustive
def test_a_context_is_made_longer_in_two_stages(tmp_path):
    model, prefix = tiny_model(tmp_path), tiny_data(tmp_path)
    words = f"--hf {model} --data-prefix {prefix} --out {tmp_path / 'out'} --num-workers 0 --lr 3e-3"
    words += " --global-batch-size 4 --lr-warmup-iters 0 --log-interval 1 --save-interval 4"
    pattern = "--s2-block-size 16 --s2-local-blocks 1 --s2-vert-stride 2"
    stages = {"STAGES": "128 40000 8\n256 80000 4", "PATTERN": pattern, "SAMPLES": "4"}
    done = subprocess.run(
        ["bash", str(EXAMPLES / "longer-context" / "train.sh"), *words.split(), "--s2-anneal-steps", "4"],
        env=environment_of_forks() | stages,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    exported = json.loads((tmp_path / "out/256/exported/config.json").read_text())
    assert (exported["rope_theta"], exported["max_position_embeddings"]) == (80000.0, 256)
    before, _, after, *_ = losses_of(done)
    assert after < before - 0.3


def tiny_model(directory: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_s2.data.documents import Corpus
    from megatron_s2.data.tokenizer import train_tokenizer

    (directory / "text").mkdir()
    (directory / "text" / "one.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 100)
    train_tokenizer(Corpus(str(directory / "text")), 270, str(directory / "model"))
    sizes = {"vocab_size": 270, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    described = AutoConfig.for_model("qwen3", **sizes, **heads, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(described).save_pretrained(directory / "model")
    return directory / "model"


def tiny_data(directory: Path) -> Path:
    words = f"--input {directory / 'text'} --output-prefix {directory / 'data'} --append-eod --workers 1 "
    words += f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {directory / 'model'}"
    call_in_fork("preprocess_data", "main", words.split())
    return directory / "data_text_document"
