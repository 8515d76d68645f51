"""Stock Megatron through our entry point, on CPU: parallelism, precision, resume, refusals, signals."""

import re
import signal
from pathlib import Path

import numpy as np
import pytest
from megatron_run import STEPS, Launched, Run, Runs, assert_same_losses, launch, train_all
from selection import exhaustive

from megatron_s2.data.token_ids import write_record

# Four layers, so that two pipeline stages of two interleaved chunks have one each. Runs that should agree
# start from the same saved weights: pipeline stages would otherwise draw theirs from seeds of their own.
FOUR_LAYERS = "--num-layers 4"
FROM = "--num-layers 4 --finetune --no-load-optim --no-load-rng --load"
OLDER_MODEL = "--position-embedding-type learned_absolute --normalization LayerNorm"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("one")
    start, saved, sharded = (directory / f"checkpoint-{name}" for name in ("start", "saved", "sharded"))
    schedule = "--train-iters 6 --save-interval 2"
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    return Runs(
        directory,
        {
            "start": f"{FOUR_LAYERS} --train-iters 1 --save {start} --save-interval 1",
            "control": f"{FROM} {start}",
            "recompute": f"{FROM} {start} {recompute}",
            "bf16": f"{FROM} {start} --bf16",
            "whole": f"{schedule} --save {saved}",
            "resumed": f"{schedule} --load {saved} --ckpt-step 2",
            "whole-sharded": f"{schedule} --use-distributed-optimizer --save {sharded}",
            "resumed-sharded": f"{schedule} --use-distributed-optimizer --load {sharded} --ckpt-step 2",
        },
    )


# A checkpoint of three steps, continued to the fifth with other flags.
OVERRIDE = "--override-opt-param-scheduler"
RESUMED = {
    "same rate": f"{OVERRIDE}",
    "higher rate": f"--lr 2e-3 --min-lr 2e-4 {OVERRIDE}",
    "higher rate, sharded": f"--lr 2e-3 --min-lr 2e-4 {OVERRIDE} --use-distributed-optimizer",
    "decoupled, higher rate": f"--lr 2e-3 --min-lr 2e-4 --decoupled-lr 2e-2 {OVERRIDE}",
    "decoupled, higher rate, sharded": f"--lr 2e-3 --min-lr 2e-4 --decoupled-lr 2e-2 {OVERRIDE} "
    "--use-distributed-optimizer",
    "rate of the checkpoint": "--lr 2e-3 --min-lr 2e-4 --use-checkpoint-opt-param-scheduler",
    "--lr 0.002: the checkpoint was trained with 0.001": "--lr 2e-3",
    "--min-lr 0.0002: the checkpoint was trained with 0.0001": "--min-lr 2e-4",
    "--train-iters 5: the checkpoint was trained with 3": "",
    "--decoupled-lr 0.0001: the checkpoint was trained with None": f"--decoupled-lr 1e-4 {OVERRIDE}",
    "--num-layers 3: the checkpoint was trained with 2": f"--num-layers 3 {OVERRIDE}",
    "--add-qkv-bias given: the checkpoint was trained without it": f"--add-qkv-bias {OVERRIDE}",
    "--use-distributed-optimizer given: the checkpoint was trained without it": f"--s2-offload {OVERRIDE}",
    "--optimizer sgd: the checkpoint was trained with adam": f"--optimizer sgd {OVERRIDE}",
    "--bf16 or --fp16: the checkpoint was trained with neither": f"--bf16 {OVERRIDE}",
    "--ckpt-step 7: there is no ": f"--ckpt-step 7 {OVERRIDE}",
    "--ckpt-format torch: ": f"--ckpt-format torch {OVERRIDE}",
}


@pytest.fixture(scope="module")
def other_schedules(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("schedules")
    sharded, decoupled = "--use-distributed-optimizer", "--decoupled-lr 1e-2"
    saved = {
        "": directory / "checkpoint-plain",
        sharded: directory / "checkpoint-sharded",
        decoupled: directory / "checkpoint-decoupled",
        f"{decoupled} {sharded}": directory / "checkpoint-decoupled-sharded",
    }
    first = {
        f"start {flag}": f"--train-iters 3 --save-interval 3 --save {path} {flag}"
        for flag, path in saved.items()
    }

    def trained_with(name: str, flags: str) -> str:
        words = [decoupled] if name.startswith("decoupled") else []
        return " ".join([*words, *([sharded] if sharded in flags else [])])

    resumed = {
        name: f"--train-iters 5 --load {saved[trained_with(name, flags)]} {flags}"
        for name, flags in RESUMED.items()
    }
    return Runs(directory, first | resumed)


@pytest.fixture(scope="module")
def start(one_rank) -> Path:
    return one_rank["start"].log_dir.parent / "checkpoint-start"


@pytest.fixture(scope="module")
def two_ranks(start, tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("two")
    saved = directory / "checkpoint-saved"
    pipeline = "--pipeline-model-parallel-size 2"
    schedule = "--use-distributed-optimizer --bf16 --train-iters 4 --save-interval 2"
    return Runs(
        directory,
        {
            "tensor": f"{FROM} {start} --tensor-model-parallel-size 2",
            "pipeline": f"{FROM} {start} {pipeline}",
            "interleaved": f"{FROM} {start} {pipeline} --num-layers-per-virtual-pipeline-stage 1",
            "data": f"{FROM} {start} --use-distributed-optimizer",
            "data-overlapped": f"{FROM} {start} --use-distributed-optimizer --overlap-grad-reduce "
            "--overlap-param-gather",
            "data-bf16": f"{FROM} {start} --use-distributed-optimizer --bf16",
            "whole": f"{schedule} --save {saved}",
            "resumed": f"{schedule} --load {saved} --ckpt-step 2",
        },
        ranks=2,
    )


def assert_continues(resumed: Run, whole: Run, after: int) -> None:
    """Bit-equal: every loss after the checkpoint is the uninterrupted run's, to the last bit of a float32."""
    assert resumed.losses and resumed.losses == {
        step: loss for step, loss in whole.losses.items() if step > after
    }


def test_the_model_learns(one_rank):
    losses = one_rank["control"].losses
    assert losses[STEPS] < losses[1] - 0.2


@pytest.mark.parametrize(
    "layout", ["tensor", "data-overlapped", *exhaustive("pipeline", "interleaved", "data")]
)
def test_two_ranks_train_as_one(two_ranks, one_rank, layout):
    assert_same_losses(two_ranks[layout], one_rank["control"], relative=1e-4)


def test_full_recompute_changes_nothing(one_rank):
    assert one_rank["recompute"].losses == one_rank["control"].losses


def test_bf16_follows_fp32(one_rank):
    assert_same_losses(one_rank["bf16"], one_rank["control"], relative=1e-2)


@pytest.mark.exhaustive
def test_two_ranks_train_in_bf16_as_one(one_rank, two_ranks):
    assert_same_losses(two_ranks["data-bf16"], one_rank["bf16"], relative=1e-3)


@pytest.mark.parametrize("optimizer", ["-sharded", *exhaustive("")])
def test_a_resumed_run_is_the_uninterrupted_one(one_rank, optimizer):
    assert_continues(one_rank[f"resumed{optimizer}"], one_rank[f"whole{optimizer}"], after=2)


@pytest.mark.exhaustive
def test_a_resumed_run_is_the_uninterrupted_one_on_two_ranks_in_bf16(two_ranks):
    assert_continues(two_ranks["resumed"], two_ranks["whole"], after=2)


@pytest.mark.parametrize("ranks", [1, *exhaustive(2)])
def test_the_user_sees_one_line_about_the_cpu_and_no_warnings(tmp_path, ranks):
    """The user's command, alone and with torchrun."""
    run = launch(tmp_path, "--train-iters 2", ranks=ranks, model=OLDER_MODEL, from_nothing=True)
    assert run.status == 0, run.output
    lines = run.output.splitlines()
    (line,) = (line for line in lines if line.startswith("megatron-s2:"))
    assert "no GPU found, training on CPU (gloo); set: --distributed-backend gloo" in line
    assert "Warning:" not in run.output


REFUSED = {
    "--data-path": "--data-path /nowhere/text",
    "--load": "--load /nowhere/run",
    "--tokenizer-model": "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /nowhere/tokenizer",
    "--fp8-format": "--fp8-format hybrid",
    "--sft": "--sft",
    "--micro-batch-size 2: must be 1": "--dataloader-inter-document-masking --pipeline-model-parallel-size 2",
    "unrecognized arguments: --no-such-flag": "--no-such-flag 3",
    "argument --lr: invalid float value": "--lr fast",
    "--max-position-embeddings (64)": "--max-position-embeddings 64",
    "Megatron requires --min-lr <= --lr": "--min-lr 1",
    "Megatron requires --save-interval is not None": "--save /nowhere/run",
    "--num-query-groups 3: must divide --num-attention-heads 4": "--num-query-groups 3",
    "--data-path: must be followed by a prefix": "--data-path",
    "--optimizer-cpu-offload: needs a GPU": "--optimizer-cpu-offload",
    "--recompute-modules layernorm: needs Transformer Engine": "--recompute-granularity selective "
    "--recompute-modules core_attn layernorm",
    "--config-logger-dir /nowhere/log": "--config-logger-dir /nowhere/log",
    "--rampup-batch-size: Megatron 0.19 ignores it; use": "--rampup-batch-size 2 2 8",
    "--save {here}/file: {here}/file is a file": "--save {here}/file --save-interval 1",
    "--save {here}/file/run: {here}/file is a file": "--save {here}/file/run --save-interval 1",
    "--tensorboard-dir {here}/file: {here}/file is a file": "--tensorboard-dir {here}/file",
    "--data-cache-path {here}/file/cache: {here}/file is a file": "--data-cache-path {here}/file/cache",
    "--s2-offload-trace {here}: is a directory": "--s2-offload --s2-offload-trace {here}",
    "--result-rejected-tracker-filename {here}/file/x: {here}/file is": "--rerun-mode validate_results "
    "--result-rejected-tracker-filename {here}/file/x",
    "--heterogeneous-layers-config-path /no/x: there is": "--heterogeneous-layers-config-path /no/x",
    "--tokenizer-model {here}/file: cannot be loaded: ": "--tokenizer-type SentencePieceTokenizer "
    "--tokenizer-model {here}/file",
    "--num-layers 0: must be >= 1": "--num-layers 0",
    "--log-interval 0: must be >= 1": "--log-interval 0",
    "--adam-eps nan: must be >= 0": "--adam-eps nan",
    "--adam-beta2 1.5: must be >= 0 and < 1": "--adam-beta2 1.5",
    "--rotary-base 0: must be > 0": "--rotary-base 0",
    "--kv-channels 15 (--hidden-size over": "--hidden-size 60",
    "--lr-warmup-init 1.0: must be at most --lr 0.001": "--lr-warmup-init 1",
    "--lr-wsd-decay-iters: must be given": "--lr-decay-style WSD",
    "--decoupled-lr 0.001: must differ from --lr": "--decoupled-lr 1e-3",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, Run]:
    here = tmp_path_factory.mktemp("refused")
    (here / "file").touch()
    runs = {f"run-{i}": flags.format(here=here) for i, flags in enumerate(REFUSED.values())}
    finished = train_all(here, runs, data="")
    return dict(zip(REFUSED, finished.values()))


def write_documents(prefix: Path, lengths: list[int | range]) -> Path:
    """Writes documents whose tokens are 0, 1, … up to a length, or those of a range."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for tokens in (length if isinstance(length, range) else range(length) for length in lengths):
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_data_that_leaves_a_split_empty_is_refused_and_not_waited_for(tmp_path):
    few = write_documents(tmp_path / "few", [60] * 400)
    hollow = write_documents(tmp_path / "hollow", [60] * 90 + [0] * 10)
    runs = train_all(
        tmp_path,
        {
            "no documents": f"--data-path {few} --split 969,30,1",
            "no tokens": f"--data-path {hollow} --split 90,10,0",
            "fine": f"--data-path {few} --split 90,10,0 --train-iters 2",
        },
        data="",
    )
    assert_refused(runs["no documents"], "--split 969,30,1: leaves the test split")
    assert "error: --split 90,10,0: the valid split of " in runs["no tokens"].output
    assert "Traceback" not in runs["no tokens"].output
    assert [run.status for run in runs.values()] == [2, 2, 0]


UNKNOWN = "has token id 299; the model has 256 tokens (--tokenizer-type NullTokenizer); give data that was "
WHOLE = "--split 100,0,0 --eval-iters 0"


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_that_are_none_of_the_models_are_refused_before_the_run(tmp_path, ranks):
    """Tokens up to 299 for an embedding of 256 rows, at any tensor parallelism."""
    few, many = (write_documents(tmp_path / str(ids), [ids] * 40) for ids in (250, 300))
    flags = {
        "training": f"--data-path {many} {WHOLE}",
        "validation": f"--train-data-path {few} --valid-data-path {many}",
        "fine": f"--data-path {few} {WHOLE} --train-iters 2",
    }
    tensor = f"--tensor-model-parallel-size {ranks}"
    runs = train_all(tmp_path, {name: f"{words} {tensor}" for name, words in flags.items()}, ranks, data="")
    assert_refused(runs["training"], f"error: --data-path {many}: {UNKNOWN}")
    assert_refused(runs["validation"], f"error: --valid-data-path {many}: {UNKNOWN}")
    assert [run.status for run in runs.values()] == [2, 2, 0]
    looked_at = f"megatron-s2: {few}: no record of the largest token id; looked at 10000 of 10000 tokens"
    assert looked_at in runs["fine"].output


def test_tokens_that_no_record_tells_of_end_the_run_that_reads_them(tmp_path):
    """Every document has them; the record claims that all ids are few."""
    many = write_documents(tmp_path / "many", [range(299, 300)] * 400)
    write_record(f"{many}.ids", 254, 400 * 4)
    flags = f"--data-path {many} {WHOLE}"
    runs = train_all(tmp_path, {"here": flags, "in a process": f"{flags} --num-workers 1"}, data="")
    for run in runs.values():
        assert run.status == 2
        assert "Traceback" not in run.output
        (error,) = [line for line in run.output.splitlines() if line.startswith("error: ")]
        assert error == f"error: the data at {many}: {UNKNOWN}tokenized with the model's tokenizer"


def test_wandb_without_a_key_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    flags = f"--wandb-project p --wandb-exp-name e --wandb-save-dir {tmp_path}"
    run = launch(tmp_path / "run", flags)
    assert run.status == 2
    assert_refused(run, "error: --wandb-project p: wandb does not start (No API key configured.")


def assert_refused(run: Run, what: str) -> None:
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.output
    assert what in errors[0]
    assert "Traceback" not in run.output
    assert "building" not in run.output


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_in_one_line(refused, what):
    assert refused[what].status == 2
    assert_refused(refused[what], what.format(here=refused[what].log_dir.parent))


@pytest.mark.exhaustive
def test_several_ranks_refuse_with_one_voice(tmp_path):
    flags, waits = "--data-path /nowhere/text", ["wait_for_the_first_rank"]
    run = train_all(tmp_path, {"run": flags}, ranks=2, data="", before=waits)["run"]
    assert run.status == 2
    assert_refused(run, "--data-path /nowhere/text")
    other = run.log_dir / "output.1.txt"
    assert not other.exists() or "error" not in other.read_text()  # it may end before it begins to write


@pytest.mark.exhaustive
def test_torchrun_ends_when_its_ranks_refuse(tmp_path):
    run = launch(tmp_path, "--data-path /nowhere/text", ranks=2, data="")
    assert run.status != 0
    assert "exitcode  : 2" in run.output
    assert "traceback : --data-path /nowhere/text: there is no file" in run.output  # torchrun's summary
    assert "To enable traceback see" not in run.output.split("Root Cause")[1]
    launchers_words = run.output[: run.output.index("torch/distributed/")]
    assert_refused(Run(run.status, launchers_words, run.log_dir), "--data-path /nowhere/text")


@pytest.mark.parametrize("sharded", ["", ", sharded"])
def test_a_resumed_run_trains_on_at_another_rate(other_schedules, sharded):
    plain, higher = (
        other_schedules[name].scalar("learning-rate") for name in ("same rate", f"higher rate{sharded}")
    )
    assert higher[5] == pytest.approx(2e-4)  # the cosine has ended
    assert {step: rate / plain[step] for step, rate in higher.items()} == pytest.approx({4: 2, 5: 2})
    assert other_schedules[f"higher rate{sharded}"].losses.keys() == {4, 5}


@pytest.mark.parametrize("sharded", ["", ", sharded"])
def test_a_resumed_run_trains_on_at_another_decoupled_rate(other_schedules, sharded):
    run = other_schedules[f"decoupled, higher rate{sharded}"]
    assert run.losses.keys() == {4, 5}
    assert run.scalar("learning-rate")[5] == pytest.approx(2e-4)  # not that of the embedding


def test_a_resumed_run_keeps_the_schedule_of_its_checkpoint(other_schedules):
    rates = other_schedules["rate of the checkpoint"].scalar("learning-rate")
    assert rates == pytest.approx({4: 1e-4, 5: 1e-4})  # of three steps, which have ended


@pytest.mark.parametrize("what", [name for name in RESUMED if name.startswith("--")])
def test_what_the_checkpoint_does_not_have_is_refused(other_schedules, what):
    assert other_schedules[what].status == 2
    assert_refused(other_schedules[what], what)


def test_each_line_of_the_log_has_the_loss_of_its_step(other_schedules):
    run = other_schedules["start "]
    printed = [float(loss) for loss in re.findall(r"lm loss: (\S+)", run.output)][:3]
    assert printed == pytest.approx(list(run.losses.values()), rel=1e-6)


def test_a_loss_that_is_not_a_number_ends_the_run_by_its_name(tmp_path):
    run = train_all(tmp_path, {"run": "--lr 1e30 --min-lr 1e30 --clip-grad 0"})["run"]
    assert run.status not in (0, 2)
    assert "TypeError" not in run.output
    assert "nan" in run.output.lower()


def test_ctrl_c_ends_a_run_quietly(tmp_path):
    run = Launched(tmp_path, "--train-iters 100000 --num-workers 1")
    run.wait_for("iteration        3/")
    run.send(signal.SIGINT)
    ended = run.wait()
    assert ended.status == 130
    assert "Traceback" not in ended.output
    assert {1, 2, 3} <= ended.losses.keys()  # what was logged is in its file


def test_megatrons_exit_signal_handler_still_saves(tmp_path):
    flags = f"--train-iters 100000 --exit-signal-handler --save {tmp_path}/saved --save-interval 100000"
    ended = train_all(tmp_path, {"run": flags}, before=["signal_iteration", 3, signal.SIGTERM])["run"]
    assert ended.status == 0, ended.output
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "3"
