"""GPTs trained under context parallelism through the user's command: the losses are those of one rank, and
the bytes that were counted are the bytes that were predicted."""

import pytest
from megatron_run import Runs
from selection import exhaustive
from test_s2_training import (
    FOUR_LAYERS,
    FROM,
    FULL_RECOMPUTE,
    PACKED,
    RICH,
    by_layer,
    documents,  # noqa: F401
)

LOG = "--log-throughput"
# Of the ten that one rank makes: a wrong gradient shows in the second loss, a wrong optimizer in the third.
THREE_STEPS = "--exit-interval 3"
GATHER, A2A = "--s2-cp-schedule gather", "--s2-cp-schedule a2a"
CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
SMALL_BATCH = "--micro-batch-size 1"
# Windows over several chunks, and chunks that are no whole number of blocks.
ODD = "--seq-length 120 --max-position-embeddings 120 --s2-attention --s2-block-size 32 --s2-vert-stride 2"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, documents) -> Runs:  # noqa: F811
    directory = tmp_path_factory.mktemp("one")
    start, odd = directory / "checkpoint", directory / "checkpoint-odd"
    return Runs(
        directory,
        {
            "start": f"{FOUR_LAYERS} {RICH} --train-iters 1 --save {start} --save-interval 1",
            "rich": f"{FROM} {start} {RICH}",
            "packed": f"{FROM} {start} {RICH} {PACKED}",
            "by layer": f"{FROM} {start} {by_layer(directory)}",
            "start odd": f"{FOUR_LAYERS} {ODD} --train-iters 1 --save {odd} --save-interval 1",
            "odd": f"{FROM} {odd} {ODD}",
        },
        data=documents,
    )


@pytest.fixture(scope="module")
def several_ranks(one_rank, tmp_path_factory, documents) -> dict[int, Runs]:  # noqa: F811
    """Runs by number of ranks. The word before the colon names the run of one rank that each is like."""
    directory, of_one_rank = tmp_path_factory.mktemp("several"), one_rank["rich"].log_dir.parent
    rich = f"{FROM} {of_one_rank / 'checkpoint'} {RICH} {LOG} {THREE_STEPS}"
    odd = f"{FROM} {of_one_rank / 'checkpoint-odd'} {ODD} {LOG} {THREE_STEPS}"
    packed, saved = f"{rich} {PACKED}", directory / "checkpoint"
    layers = f"{FROM} {of_one_rank / 'checkpoint'} {by_layer(of_one_rank)} {LOG} {THREE_STEPS}"
    pipeline, tensor = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2"
    runs = {
        2: {
            "rich: full recompute": f"{rich} {CP2} {GATHER} {FULL_RECOMPUTE}",
            "packed: a2a": f"{packed} {CP2} {A2A}",
            "by layer: gather": f"{layers} {CP2} {GATHER}",
            "by layer: a2a": f"{layers} {CP2} {A2A}",
            "odd: gather, distributed optimizer": f"{odd} {CP2} {GATHER} --use-distributed-optimizer",
            "saves": f"{rich} {CP2} --save {saved} --save-interval 3",
        },
        4: {
            "rich: tensor, a2a, core recompute": f"{rich} {CP2} {tensor} {A2A} "
            "--recompute-granularity selective",
            "rich: tensor, gather": f"{rich} {CP2} {tensor} {GATHER}",
            "rich: data, distributed optimizer": f"{rich} {CP2} {SMALL_BATCH} --use-distributed-optimizer",
            "packed: pipeline, gather": f"{packed} {CP2} {pipeline} {SMALL_BATCH} {GATHER}",
            "odd: a2a": f"{odd} {CP4} {A2A}",
            "odd: gather": f"{odd} {CP4} {GATHER}",
            "resumes": f"{FOUR_LAYERS} {RICH} {CP4} --load {saved}",
        },
    }
    return {
        ranks: Runs(directory / str(ranks), of_ranks, ranks=ranks, data=documents)
        for ranks, of_ranks in runs.items()
    }


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (2, "rich: full recompute"),
        (2, "packed: a2a"),
        (4, "rich: tensor, gather"),
        *exhaustive(
            (2, "odd: gather, distributed optimizer"),
            (2, "by layer: gather"),
            (2, "by layer: a2a"),
            (4, "rich: tensor, a2a, core recompute"),
            (4, "rich: data, distributed optimizer"),
            (4, "packed: pipeline, gather"),
            (4, "odd: a2a"),
            (4, "odd: gather"),
        ),
    ],
)
def test_several_ranks_train_as_one(several_ranks, one_rank, ranks, name):
    control = one_rank[name.split(":")[0]].losses  # first: its start saves what the other loads
    run = several_ranks[ranks][name]
    assert run.losses == pytest.approx({step: control[step] for step in range(1, 4)}, rel=1e-4)
    received, predicted = (run.scalar(f"s2-context-parallel/{what}") for what in ("received", "predicted"))
    assert min(received.values()) > 0
    assert received == predicted
    of_layers = [run.scalar(f"s2-context-parallel/received-layer-{layer}") for layer in range(1, 5)]
    assert received == {step: sum(of_layer[step] for of_layer in of_layers) for step in received}


@pytest.mark.exhaustive
def test_a_checkpoint_goes_on_at_another_context_parallel_size(several_ranks, one_rank):
    assert sorted(several_ranks[2]["saves"].losses) == [1, 2, 3]
    resumed = several_ranks[4]["resumes"].losses
    assert sorted(resumed) == [4, 5, 6]
    assert resumed == pytest.approx({n: one_rank["rich"].losses[n] for n in resumed}, rel=1e-4)
