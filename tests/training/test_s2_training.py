"""S2 GPTs through the user's command: equal to stock Megatron where they must be, and to themselves under
every parallel layout, precision, recomputation and interruption."""

import signal
from pathlib import Path

import numpy as np
import pytest
from megatron_run import MOCK_DATA, STEPS, Run, Runs, assert_same_losses, train_all, train_until_killed
from selection import exhaustive

from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file

# Eight blocks per sequence, a window of two, so that most of the past is seen through the shards.
S2 = "--s2-attention --s2-block-size 16 --s2-local-blocks 2 --s2-vert-stride 3"
# Everything S2 has at once: sinks of both kinds, a dense head, a dense layer, one stride per KV head.
RICH = f"{S2} 4 --s2-sink-blocks 1 --s2-num-dense-heads 1 --s2-dense-layers 2 --s2-learnable-sink"
FOUR_LAYERS = "--num-layers 4"
# Runs that should agree start from the same saved weights: pipeline stages draw theirs from their own seeds.
FROM = f"{FOUR_LAYERS} --finetune --no-load-optim --no-load-rng --load"
ONE_KV_HEAD = "--num-query-groups 1"
# Every other layer has two experts, and each token goes to one of them.
EXPERTS = "--num-experts 2 --moe-layer-freq 2 --moe-router-topk 1 --moe-router-pre-softmax"
PACKED = "--dataloader-inter-document-masking"
SIX_STEPS = "--train-iters 6 --save-interval 2"
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> str:
    """Data flags for documents of 3 to 100 tokens, a few per sequence, each ending with the eod token."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("documents") / "short"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    random = np.random.Generator(np.random.PCG64(7))
    for _ in range(400):
        length = int(random.integers(3, 100))
        words = (random.integers(0, 50) + np.arange(length - 1) * random.integers(1, 4)) % 250
        builder.add_document([*words, 254], [length])
    builder.finalize(f"{prefix}.idx")
    return f"--data-path {prefix} --split 100,0,0 --eval-iters 0"


def by_layer(directory: Path) -> str:
    """Flags of a pattern file in this directory: another pattern for each layer, with window-only heads."""
    layers = [
        {"local_blocks": 2, "sink_blocks": 1, "strides": [0, 3]},
        {"dense": True},
        {"local_blocks": 3, "strides": [0, 0]},
        {"local_blocks": 1, "strides": [1, 2], "sink_blocks": 2},
    ]
    path = directory / "pattern.json"
    if not path.exists():
        write_pattern_file(path, S2Settings(4, 2, 16, layers=layers))
    return f"--s2-attention --s2-pattern-file {path} --s2-learnable-sink"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("one")
    start, shared, experts, saved, sharded = (
        directory / f"checkpoint-{name}" for name in ("start", "shared", "experts", "whole", "whole-sharded")
    )
    return Runs(
        directory,
        {
            "start": f"{FOUR_LAYERS} {RICH} --train-iters 1 --save {start} --save-interval 1",
            "rich": f"{FROM} {start} {RICH}",
            "core recompute": f"{FROM} {start} {RICH} --recompute-granularity selective",
            "full recompute": f"{FROM} {start} {RICH} {FULL_RECOMPUTE}",
            "bf16": f"{FROM} {start} {RICH} --bf16",
            "start shared": f"{FOUR_LAYERS} {ONE_KV_HEAD} {S2} --train-iters 1 --save {shared} "
            "--save-interval 1",
            "one KV head": f"{FROM} {shared} {ONE_KV_HEAD} {S2}",
            "start experts": f"{FOUR_LAYERS} {EXPERTS} {RICH} --train-iters 1 --save {experts} "
            "--save-interval 1",
            "experts": f"{FROM} {experts} {EXPERTS} {RICH}",
            "stock": "",
            "stride 1": f"{S2.replace('stride 3', 'stride 1')}",
            "dense layers": f"{S2} --s2-dense-layers 1,2",
            "stride 3": S2,
            "spec": "--spec user_specs small_s2",
            "by layer": f"{FROM} {start} {by_layer(directory)}",
            "reference": f"{S2} --s2-backend reference",
            "whole": f"{RICH} {SIX_STEPS} --save {saved}",
            "whole-sharded": f"{RICH} {SIX_STEPS} --use-distributed-optimizer --save {sharded}",
        },
    )


def checkpoint(one_rank: Runs, name: str) -> Path:
    """What the run that saves it has saved."""
    return one_rank["start" if name == "start" else f"start {name}"].log_dir.parent / f"checkpoint-{name}"


@pytest.fixture(scope="module")
def two_ranks(one_rank, tmp_path_factory) -> Runs:
    start = checkpoint(one_rank, "start")
    shared, experts = (start.with_name(f"checkpoint-{name}") for name in ("shared", "experts"))
    pipeline = "--pipeline-model-parallel-size 2"
    return Runs(
        tmp_path_factory.mktemp("two"),
        {
            "tensor": f"{FROM} {start} {RICH} --tensor-model-parallel-size 2",
            "pipeline": f"{FROM} {start} {RICH} {pipeline}",
            "interleaved": f"{FROM} {start} {RICH} {pipeline} --num-layers-per-virtual-pipeline-stage 1",
            "uneven pipeline": f"{FROM} {start} {RICH} {pipeline} --decoder-first-pipeline-num-layers 3",
            "by layer, tensor": f"{FROM} {start} {by_layer(start.parent)} --tensor-model-parallel-size 2",
            "by layer, pipeline": f"{FROM} {start} {by_layer(start.parent)} {pipeline}",
            "data": f"{FROM} {start} {RICH} --use-distributed-optimizer",
            "data, every rank the whole optimizer": f"{FROM} {start} {RICH}",
            "experts": f"{FROM} {experts} {EXPERTS} {RICH}",
            "tensor, one KV head": f"{FROM} {shared} {ONE_KV_HEAD} {S2} --tensor-model-parallel-size 2",
            "data bf16": f"{FROM} {start} {RICH} --use-distributed-optimizer --bf16",
        },
        ranks=2,
    )


@pytest.mark.parametrize("dense", ["stride 1", *exhaustive("dense layers")])
def test_a_dense_pattern_trains_as_stock_megatron(one_rank, dense):
    assert_same_losses(one_rank[dense], one_rank["stock"], relative=1e-5)


def test_a_sparse_pattern_does_not(one_rank):
    assert one_rank["stride 3"].losses != pytest.approx(one_rank["stock"].losses, rel=1e-4)
    assert one_rank["stride 3"].losses[STEPS] < one_rank["stride 3"].losses[1] - 0.2


def test_the_torch_backend_trains_as_the_reference(one_rank):
    assert_same_losses(one_rank["stride 3"], one_rank["reference"], relative=1e-5)


def test_a_spec_alone_brings_s2_into_a_stock_command_line(one_rank):
    assert one_rank["spec"].losses == one_rank["stride 3"].losses


@pytest.mark.parametrize(
    "layout",
    [
        "tensor",
        "interleaved",
        "data",
        *exhaustive("pipeline", "uneven pipeline", "data, every rank the whole optimizer"),
    ],
)
def test_two_ranks_train_as_one(two_ranks, one_rank, layout):
    assert_same_losses(two_ranks[layout], one_rank["rich"], relative=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_two_ranks_train_a_pattern_for_each_layer_as_one(two_ranks, one_rank, layout):
    control = one_rank["by layer"]
    assert control.losses != pytest.approx(one_rank["rich"].losses, rel=1e-4)
    assert_same_losses(two_ranks[f"by layer, {layout}"], control, relative=1e-4)


@pytest.mark.exhaustive
def test_ranks_that_share_a_kv_head_give_it_one_pattern(two_ranks, one_rank):
    control = one_rank["one KV head"]  # first: its start saves what the other loads
    assert_same_losses(two_ranks["tensor, one KV head"], control, relative=1e-4)


def test_mixtures_of_experts_learn(one_rank):
    assert one_rank["experts"].losses[STEPS] < one_rank["experts"].losses[1] - 0.2


@pytest.mark.exhaustive
def test_two_ranks_train_mixtures_of_experts_as_one(two_ranks, one_rank):
    control = one_rank["experts"]  # first: its start saves what the other loads
    assert_same_losses(two_ranks["experts"], control, relative=1e-4)


@pytest.mark.parametrize("recompute", ["core recompute", "full recompute"])
def test_recomputation_changes_nothing(one_rank, recompute):
    assert one_rank[recompute].losses == one_rank["rich"].losses


def test_bf16_follows_fp32(one_rank):
    assert_same_losses(one_rank["bf16"], one_rank["rich"], relative=1e-2)


@pytest.mark.exhaustive
def test_two_ranks_train_in_bf16_as_one(one_rank, two_ranks):
    assert_same_losses(two_ranks["data bf16"], one_rank["bf16"], relative=1e-3)


def test_packed_documents_see_only_themselves(documents, tmp_path):
    runs = train_all(
        tmp_path,
        {
            "masked": "--reset-attention-mask --reset-position-ids",
            "packed": f"{PACKED} {S2.replace('stride 3', 'stride 1')}",
            "sparse": f"{PACKED} {S2}",
            "sparse reference": f"{PACKED} {S2} --s2-backend reference",
        },
        data=documents,
    )
    assert_same_losses(runs["packed"], runs["masked"], relative=1e-5)
    assert_same_losses(runs["sparse"], runs["sparse reference"], relative=1e-5)
    assert runs["sparse"].losses != runs["packed"].losses


@pytest.fixture(scope="module")
def packed_runs(one_rank, documents, tmp_path_factory) -> dict[str, Run]:
    directory = tmp_path_factory.mktemp("packed")
    packed = f"{FROM} {checkpoint(one_rank, 'start')} {RICH} {PACKED} --exit-interval 3"
    control = {"one rank": packed, "recompute": f"{packed} {FULL_RECOMPUTE}"}
    layouts = {
        "tensor": f"{packed} --tensor-model-parallel-size 2",
        "pipeline": f"{packed} --pipeline-model-parallel-size 2 --micro-batch-size 1",
        "data": packed,
    }
    return {
        **train_all(directory / "one", control, data=documents),
        **train_all(directory / "two", layouts, data=documents, ranks=2),
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_two_ranks_train_on_packed_documents_as_one(packed_runs, layout):
    assert len(packed_runs["one rank"].losses) == 3
    assert packed_runs[layout].losses == pytest.approx(packed_runs["one rank"].losses, rel=1e-4)


@pytest.mark.exhaustive
def test_recomputation_on_packed_documents_changes_nothing(packed_runs):
    assert packed_runs["recompute"].losses == packed_runs["one rank"].losses


@pytest.mark.parametrize("run", ["whole-sharded", *exhaustive("whole")])
def test_a_killed_run_goes_on_bit_for_bit_from_its_last_save(one_rank, tmp_path, run):
    whole, saved = one_rank[run], tmp_path / "checkpoint"
    again = f"{RICH} {SIX_STEPS} --save {saved} --load {saved}"
    again += " --use-distributed-optimizer" if run == "whole-sharded" else ""
    assert train_until_killed(tmp_path / "killed", again, "signal_iteration", 5, signal.SIGKILL)
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "4"
    rest = {step: loss for step, loss in whole.losses.items() if step > 4}
    assert sorted(rest) == [5, 6]
    assert train_all(tmp_path, {"resumed": again})["resumed"].losses == rest


def test_the_startup_table_says_what_was_replaced(one_rank):
    lines = one_rank["rich"].output.splitlines()
    table = lines[lines.index("S2 attention (arXiv 2407.17678)") :]
    assert " ".join(table[1].split()) == "core attention S2 in 3 of 4 layers"
    assert " ".join(table[2].split()) == "dense layers 2"
    assert "block 16, window 2 (32 tokens), stride 3 1, sinks 1, dense heads 1" in table[3]
    assert any("set for S2: --no-create-attention-mask-in-dataloader" in line for line in table[:12])


REFUSED = {
    "--s2-block-size 48: must be a power of two >= 16": f"{S2} --s2-block-size 48",
    "--s2-local-blocks 0: must be >= 1": f"{S2} --s2-local-blocks 0",
    "--s2-vert-stride -1: must be >= 0": f"{S2} --s2-vert-stride -1",
    "--s2-pattern-file /no.json: there is no such file": "--s2-attention --s2-pattern-file /no.json",
    "--s2-phases (-1, 0): must be >= 0": f"{S2} --s2-phases -1 0",
    "--s2-dense-layers 3: must be between 1 and the 2 layers": f"{S2} --s2-dense-layers 1,3",
    "argument --s2-dense-layers: invalid layer numbers value: 'first'": f"{S2} --s2-dense-layers first",
    "--seq-length 128: must be at least one block (--s2-block-size 256)": f"{S2} --s2-block-size 256",
    "--s2-vert-stride: needs --s2-attention": "--s2-vert-stride 3",
    "--position-embedding-type relative: must be another with --s2-attention": f"{S2} "
    "--position-embedding-type relative",
    "--multi-latent-attention: must not be set with --s2-attention": f"{S2} --multi-latent-attention",
    "--flash-decode: must not be set with --s2-attention": f"{S2} --flash-decode",
    "--seq-length 128: must be a multiple of 2 * --context-parallel-size = 6": f"{S2} "
    "--context-parallel-size 3",
    "--context-parallel-size 2: must be 1 with --dataloader-inter-document-masking": f"{PACKED} "
    "--context-parallel-size 2",
    "--spec: must not be set with --s2-attention": f"{S2} --spec user_specs small_s2",
    "--load /nowhere/run": f"{S2} --load /nowhere/run",
    "--data-path /nowhere/text": f"{S2} --data-path /nowhere/text",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, Run]:
    runs = {
        f"run-{i}": flags if "--data-path" in flags else f"{MOCK_DATA} {flags}"
        for i, flags in enumerate(REFUSED.values())
    }
    finished = train_all(tmp_path_factory.mktemp("refused"), runs, data="")
    return dict(zip(REFUSED, finished.values()))


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_built(refused, message):
    run = refused[message]
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.output
    assert errors[0].startswith(f"error: {message}")
    assert run.status == 2
    assert "Traceback" not in run.output
    assert "building" not in run.output
