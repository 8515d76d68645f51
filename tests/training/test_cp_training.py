"""GPTs trained under context parallelism through the user's command: the losses are those of one rank, and
the bytes that were counted are the bytes that were predicted."""

from pathlib import Path

import pytest
from megatron_run import Run, train_all
from test_s2_training import FOUR_LAYERS, FROM, FULL_RECOMPUTE, PACKED, RICH, S2, documents  # noqa: F401

LOG = "--log-throughput"
# Of the ten that one rank makes: a wrong gradient shows in the second loss, a wrong optimizer in the third.
FIVE_STEPS = "--exit-interval 5"
CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
SMALL_BATCH = "--micro-batch-size 1"
# Windows over several chunks, and chunks that are no whole number of blocks.
ODD = "--seq-length 120 --max-position-embeddings 120 --s2-attention --s2-block-size 32 --s2-vert-stride 2"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, documents) -> dict[str, Run]:  # noqa: F811
    directory = tmp_path_factory.mktemp("one")
    start, odd = directory / "checkpoint", directory / "checkpoint-odd"
    return train_all(
        directory,
        {
            "start": f"{FOUR_LAYERS} {RICH} --train-iters 1 --save {start} --save-interval 1",
            "rich": f"{FROM} {start} {RICH}",
            "packed": f"{FROM} {start} {RICH} {PACKED}",
            "start odd": f"{FOUR_LAYERS} {ODD} --train-iters 1 --save {odd} --save-interval 1",
            "odd": f"{FROM} {odd} {ODD}",
        },
        data=documents,
    )


def runs_from(one_rank: dict[str, Run]) -> tuple[str, str, str]:
    directory = one_rank["rich"].log_dir.parent
    rich = f"{FROM} {directory / 'checkpoint'} {RICH} {LOG} {FIVE_STEPS}"
    return rich, f"{rich} {PACKED}", f"{FROM} {directory / 'checkpoint-odd'} {ODD} {LOG} {FIVE_STEPS}"


def saved(one_rank: dict[str, Run]) -> Path:
    return one_rank["rich"].log_dir.parent / "checkpoint-of-two-ranks"


@pytest.fixture(scope="module")
def two_ranks(one_rank, tmp_path_factory, documents) -> dict[str, Run]:  # noqa: F811
    rich, packed, odd = runs_from(one_rank)
    return train_all(
        tmp_path_factory.mktemp("two"),
        {
            "rich: gather": f"{rich} {CP2} --s2-cp-schedule gather",
            "rich: a2a": f"{rich} {CP2} --s2-cp-schedule a2a",
            "rich: auto": f"{rich} {CP2}",
            "rich: full recompute": f"{rich} {CP2} --s2-cp-schedule gather {FULL_RECOMPUTE}",
            "rich: core recompute": f"{rich} {CP2} --s2-cp-schedule gather --recompute-granularity selective",
            "rich: distributed optimizer": f"{rich} {CP2} --use-distributed-optimizer",
            "packed: gather": f"{packed} {CP2} --s2-cp-schedule gather",
            "packed: a2a": f"{packed} {CP2} --s2-cp-schedule a2a",
            "odd: gather": f"{odd} {CP2} --s2-cp-schedule gather",
            "saves": f"{rich} {CP2} --save {saved(one_rank)} --save-interval 5",
        },
        ranks=2,
        data=documents,
    )


@pytest.fixture(scope="module")
def four_ranks(one_rank, two_ranks, tmp_path_factory, documents) -> dict[str, Run]:  # noqa: F811
    rich, packed, odd = runs_from(one_rank)
    pipeline = "--pipeline-model-parallel-size 2"
    return train_all(
        tmp_path_factory.mktemp("four"),
        {
            "rich: gather": f"{rich} {CP4} --s2-cp-schedule gather",
            "rich: a2a": f"{rich} {CP4} --s2-cp-schedule a2a",
            "rich: pipeline, gather": f"{rich} {CP2} {pipeline} --s2-cp-schedule gather",
            "rich: pipeline, a2a": f"{rich} {CP2} {pipeline} --s2-cp-schedule a2a",
            "rich: tensor, gather": f"{rich} {CP2} --tensor-model-parallel-size 2 --s2-cp-schedule gather",
            "rich: tensor, a2a": f"{rich} {CP2} --tensor-model-parallel-size 2 --s2-cp-schedule a2a",
            "rich: data, distributed optimizer": f"{rich} {CP2} {SMALL_BATCH} --use-distributed-optimizer",
            "packed: gather": f"{packed} {CP4} --s2-cp-schedule gather",
            "packed: pipeline, gather": f"{packed} {CP2} {pipeline} {SMALL_BATCH} --s2-cp-schedule gather",
            "odd: a2a": f"{odd} {CP4} --s2-cp-schedule a2a",
            "resumes": f"{FOUR_LAYERS} {RICH} {CP4} --load {saved(one_rank)}",
        },
        ranks=4,
        data=documents,
    )


def assert_trains_as_one_rank(name: str, run: Run, one_rank: dict[str, Run]) -> None:
    control = one_rank[name.split(":")[0]].losses
    assert run.losses == pytest.approx({step: control[step] for step in range(1, 6)}, rel=1e-4)
    received, predicted = (run.scalar(f"s2-context-parallel/{what}") for what in ("received", "predicted"))
    assert min(received.values()) > 0
    assert received == predicted
    of_layers = [run.scalar(f"s2-context-parallel/received-layer-{layer}") for layer in range(1, 5)]
    assert received == {step: sum(of_layer[step] for of_layer in of_layers) for step in received}


@pytest.mark.parametrize(
    "name",
    [
        "rich: gather",
        "rich: a2a",
        "rich: auto",
        "rich: full recompute",
        "rich: core recompute",
        "rich: distributed optimizer",
        "packed: gather",
        "packed: a2a",
        "odd: gather",
    ],
)
def test_two_ranks_train_as_one(two_ranks, one_rank, name):
    assert_trains_as_one_rank(name, two_ranks[name], one_rank)


@pytest.mark.parametrize(
    "name",
    [
        "rich: gather",
        "rich: a2a",
        "rich: pipeline, gather",
        "rich: pipeline, a2a",
        "rich: tensor, gather",
        "rich: tensor, a2a",
        "rich: data, distributed optimizer",
        "packed: gather",
        "packed: pipeline, gather",
        "odd: a2a",
    ],
)
def test_four_ranks_train_as_one(four_ranks, one_rank, name):
    assert_trains_as_one_rank(name, four_ranks[name], one_rank)


def test_a_checkpoint_goes_on_at_another_context_parallel_size(two_ranks, four_ranks, one_rank):
    assert sorted(two_ranks["saves"].losses) == [1, 2, 3, 4, 5]
    resumed = four_ranks["resumes"].losses
    assert sorted(resumed) == [6, 7, 8, 9, 10]
    assert resumed == pytest.approx({n: one_rank["rich"].losses[n] for n in resumed}, rel=1e-4)
