"""Specification of what the optimizers of a rank share: the budgets, what is folded into the update, when
gradients leave, and when rates are measured again."""

import math
import threading
from multiprocessing.queues import Queue
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from waiting import PATIENCE

from megatron_s2.offload import manager, session
from megatron_s2.offload.adam import AdamWSettings
from megatron_s2.offload.manager import OffloadManager, leaves_late
from megatron_s2.offload.model import Rates
from megatron_s2.offload.node import Node
from megatron_s2.offload.optimizer import OffloadedAdamW
from megatron_s2.offload.queues import AwaitedOnce, ThreadBackend
from megatron_s2.offload.session import OffloadError
from megatron_s2.offload.settings import OffloadSettings
from megatron_s2.offload.trace import read_trace

RATES = Rates(cpu=1e9, gpu=1e10, h2d=1e10, d2h=1e10)
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def offload(monkeypatch):
    """Of settings; says nothing of this machine's rates."""
    made = []

    def one(logged=None, **settings) -> OffloadManager:
        log = [].append if logged is None else logged.append
        made.append(OffloadManager(OffloadSettings(**settings), 0, log))
        return made[-1]

    monkeypatch.setattr(manager, "cached_rates", lambda hardware, node, remeasure: RATES)
    yield one
    for run in made:
        run.close()


def distributed(
    run: OffloadManager, *sizes: int, overlap: bool = False, eps: float = 1e-8, **ddp
) -> SimpleNamespace:
    """What `register` reads of a distributed optimizer, over a matrix of each size, whole on this rank."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1, size)) for size in sizes])
    model.config = SimpleNamespace(gtp_weight_remat_size=1, expert_gtp_weight_remat_size=1)
    shards = [p.detach().view(-1) for p in model]
    config = {"overlap_grad_reduce": overlap, "num_distributed_optimizer_instances": 1}
    return SimpleNamespace(
        optimizer=OffloadedAdamW(
            [{"params": shards}], run.open_session, run.gradient_scale, **ADAM | {"eps": eps}
        ),
        ddp_config=SimpleNamespace(**config | {"reduce_scatter_with_fp32_accumulation": False} | ddp),
        model_chunks=[model],
        model_param_group_index_map={p: (0, n) for n, p in enumerate(model)},
        _get_model_param_range_map=lambda p: {"param": SimpleNamespace(start=0, end=p.numel())},
    )


def node_of(ranks: int, exchange=None) -> Node:
    """Of so many ranks, of which this one is the first."""
    return Node(0, (frozenset({0}),) * ranks, exchange or (lambda value: [value] * ranks))


def bucket_group(model, handle=None) -> SimpleNamespace:
    for p in model:
        p.main_grad = torch.full_like(p, 0.5)
    return SimpleNamespace(buckets=[SimpleNamespace(params_list=list(model))], grad_reduce_handle=handle)


def test_budgets_are_shared_by_size(offload):
    run = offload(gpu_fraction=0.0, subgroup_size=64, gpu_budget=12 * 64 * 10)
    small, large = distributed(run, 64 * 10), distributed(run, 64 * 40)
    for one in (small, large):
        run.register(one)
    run.begin_step()
    tiers = [one.optimizer.executor.plan.tiers for one in (small, large)]
    assert [(t.gpu, t.host) for t in tiers] == [(64 * 2, 64 * 8), (64 * 8, 64 * 32)]


def test_a_budget_that_cannot_hold_the_state_is_refused_when_the_first_step_begins(offload):
    run = offload(gpu_fraction=0.0, host_budget=1000)
    run.register(distributed(run, 640))
    with pytest.raises(OffloadError, match=r"--s2-offload-host-budget-gb 1e-06: the host must hold 0.000 GB"):
        run.begin_step()


def test_all_ranks_count_what_there_was_before_any_took_its_part(offload, monkeypatch):
    monkeypatch.setattr(manager, "available_bytes", lambda: 2 * 16 * 640 * 3 + 10)
    run = OffloadManager(OffloadSettings(gpu_fraction=0.0), 0, detect_node=lambda: node_of(3))
    first, second, third = (distributed(run, 640) for _ in range(3))
    for one in (first, second, third):
        run.register(one)
        if one is not third:
            one.optimizer.build()
    with pytest.raises(OffloadError, match=r"for each of 3 ranks, and this machine has 0\.000 GB left"):
        third.optimizer.build()
    run.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_is_adamw_of_the_folded_gradients(offload, overlap):
    run = offload(gpu_fraction=0.5, subgroup_size=64)
    one = distributed(run, 640, 100, overlap=overlap, eps=1.0)  # far above the gradients: factors show
    run.register(one)
    run.begin_step()
    run.gradients_reduced(bucket_group(one.model_chunks[0]))
    run.set_loss_scale(8.0)
    run.set_loss_scale(2.0)  # of another optimizer, which did not scale the loss
    run.set_token_scale(torch.tensor(0.25))
    assert run.grad_norm(64.0) == 2.0
    run.set_clipping(1.0, 2.0)
    one.optimizer.step()
    expected = torch.nn.Parameter(torch.ones(740))
    expected.grad = torch.full((740,), 0.5 / 8 * 0.25 / (2.0 + 1e-6))
    torch.optim.AdamW([expected], **ADAM | {"eps": 1.0}).step()
    got = torch.cat([p.detach().view(-1) for p in one.model_chunks[0]])
    torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=0)


def test_what_was_folded_is_forgotten_with_the_next_step(offload):
    run = offload(gpu_fraction=0.0)
    run.set_loss_scale(8.0)
    run.set_clipping(1.0, 4.0)
    run.begin_step()
    assert run.gradient_scale() == 1.0 and run.grad_norm(3.0) == 3.0


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_skips_the_step(offload, capsys, norm):
    run = offload(gpu_fraction=0.0)
    one = distributed(run, 640)
    run.register(one)
    for clip in (norm, 0.5):
        run.begin_step()
        run.gradients_reduced(bucket_group(one.model_chunks[0]))
        run.set_clipping(1.0, clip)
        one.optimizer.step()
        if clip is norm:
            assert torch.equal(one.model_chunks[0][0], torch.ones(1, 640))
            assert one.optimizer.step_count == 0
            assert "norm of the gradients is not finite; the step is skipped" in capsys.readouterr().err
    assert one.optimizer.step_count == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_reduction_that_writes_its_result_with_each_wait_does_so_once(offload, fraction):
    """As gloo's do: what is changed after Megatron's wait must stay."""

    class Rewriting:
        def wait(self):
            matrix.main_grad.fill_(0.5)

    run = offload(gpu_fraction=fraction, subgroup_size=64)
    one = distributed(run, 640, overlap=True)
    run.register(one)
    run.begin_step()
    (matrix,) = one.model_chunks[0]
    group = bucket_group([matrix], Rewriting())
    matrix.main_grad.zero_()
    run.gradients_reduced(group)
    group.grad_reduce_handle.wait()
    matrix.main_grad.fill_(7.0)
    one.optimizer.step()
    assert torch.equal(matrix.main_grad, torch.full((1, 640), 7.0))


def test_the_gradients_of_a_bucket_share_one_mark(offload, monkeypatch):
    run = offload(gpu_fraction=0.0)
    one = distributed(run, 640, 100, 64, 200)
    run.register(one)
    run.begin_step()
    marks = []
    mark = AwaitedOnce(None)
    monkeypatch.setattr(ThreadBackend, "mark", lambda self, after=None: marks.append(mark) or mark)
    run.gradients_reduced(bucket_group(one.model_chunks[0]))
    assert len(marks) == 1
    one.optimizer.step()
    assert one.optimizer.step_count == 1


def test_gradients_of_a_step_that_does_not_happen_are_dropped(offload):
    run = offload(gpu_fraction=0.0)
    one = distributed(run, 640)
    run.register(one)
    for _ in range(3):
        run.begin_step()
        run.gradients_reduced(bucket_group(one.model_chunks[0]))
    one.optimizer.step()
    assert one.optimizer.step_count == 1


@pytest.mark.parametrize(("ddp", "flag"), [
    ({"num_distributed_optimizer_instances": 2}, "--num-distributed-optimizer-instances"),
    ({"reduce_scatter_with_fp32_accumulation": True}, "--ddp-reduce-scatter-with-fp32-accumulation"),
])  # fmt: skip
def test_where_only_megatron_knows_the_end_of_a_reduction_gradients_leave_with_the_step(offload, ddp, flag):
    logged = []
    run = offload(logged, gpu_fraction=0.0)
    one = distributed(run, 640, overlap=True, **ddp)
    run.register(one)
    run.begin_step()
    assert f"gradients leave after backward ({flag})" in logged[0]
    run.gradients_reduced(bucket_group(one.model_chunks[0]))
    with pytest.raises(ValueError, match="shard of 640 elements: has no gradient"):
        one.optimizer.step()


def test_gradients_that_leave_during_backward_are_reported(offload):
    logged = []
    run = offload(logged, gpu_fraction=0.0)
    run.register(distributed(run, 640, overlap=True))
    run.begin_step()
    assert "gradients leave during backward" in logged[0]


@pytest.mark.parametrize(
    "mark", ["sequence_parallel", "average_gradients_across_tp_domain", "shared_embedding"]
)
def test_what_is_reduced_again_leaves_late(mark):
    matrix = torch.nn.Parameter(torch.zeros(4, 4))
    assert not leaves_late("decoder.layers.0.mlp.linear_fc1.weight", matrix)
    assert leaves_late("embedding.position_embeddings.weight", matrix)
    assert leaves_late("decoder.layers.0.input_layernorm.weight", torch.nn.Parameter(torch.zeros(4)))
    setattr(matrix, mark, True)
    assert leaves_late("decoder.layers.0.mlp.router.weight", matrix)


def test_auto_takes_the_best_fraction_and_says_what_it_expects(offload):
    logged = []
    run = offload(logged, subgroup_size=64)
    run.register(distributed(run, 64 * 100))
    run.begin_step()
    plan = run._optimizers[0].executor.plan
    assert 0.1 < plan.fraction < 0.9
    assert f"the GPU updates {plan.fraction:.1%}" in logged[0]
    assert "gradients leave after backward (no --overlap-grad-reduce)" in logged[0]
    assert "predicted:" in logged[0]


def test_drifting_steps_are_measured_and_planned_again(offload, monkeypatch):
    logged, seconds = [], iter([])
    run = offload(logged, subgroup_size=64)
    one = distributed(run, 64 * 100)
    run.register(one)
    run.begin_step()
    executor = one.optimizer.executor
    before = executor.plan.fraction
    slow_cpu = Rates(cpu=1e6, gpu=1e10, h2d=1e10, d2h=1e10)
    monkeypatch.setattr(executor, "step", lambda settings, scale: None)
    monkeypatch.setattr(manager, "cached_rates", lambda hardware, node, remeasure: remeasure and slow_cpu)
    monkeypatch.setattr(session.time, "perf_counter", lambda: next(seconds))
    for took, drifts in ((1.0, False), (1.1, False), (2.0, True)):
        seconds = iter([0.0, took] * 100)
        for _ in range(100):
            one.optimizer.build().step([AdamWSettings(1e-3)], 1.0)
            run.begin_step()
        assert (executor.plan.fraction != before) == drifts
    assert executor.plan.fraction > 0.9
    assert "optimizer steps drifted; rates measured again, the GPU now updates" in logged[-1]


@pytest.mark.parametrize("peer_drifts", [False, True])
def test_all_ranks_of_a_node_measure_again_when_one_has_drifted(monkeypatch, peer_drifts):
    """Even with optimizers that do not step: one without parameters, and one that is a stub."""
    asked, measured = [], []

    def exchange(value):
        asked.append(value)
        return [value, peer_drifts]

    monkeypatch.setattr(manager, "cached_rates", lambda hardware, node, remeasure: measured.append(remeasure))
    run = OffloadManager(OffloadSettings(), 0, detect_node=lambda: node_of(2, exchange))
    run.register(distributed(run))
    run.register(SimpleNamespace(optimizer=None))
    for _ in range(100):
        assert not asked and measured == [False]
        for _ in range(2):
            run.begin_step()
    assert asked == [False] and measured == [False] + [True] * peer_drifts
    run.close()


def test_ranks_use_the_cores_that_their_launcher_bound_them_to(monkeypatch):
    threads, build = [], session.Executor

    def note(*args):
        threads.append(args[5])
        return build(*args)

    monkeypatch.setattr(session, "Executor", note)
    cores = tuple(frozenset(range(14 * n, 14 * n + 14)) for n in range(8))
    for given in (None, 3):
        settings = OffloadSettings(gpu_fraction=0.0, cpu_threads=given)
        run = OffloadManager(settings, 0, detect_node=lambda: Node(0, cores, lambda value: [value] * 8))
        run.register(distributed(run, 640))
        run.begin_step()
        run.close()
    assert threads == [14, 3]


def test_the_trace_holds_what_was_predicted_and_measured(offload, tmp_path):
    run = offload(gpu_fraction=0.5, subgroup_size=64, trace=str(tmp_path / "trace.json"))
    one = distributed(run, 640)
    run.register(one)
    run.begin_step()
    run.gradients_reduced(bucket_group(one.model_chunks[0]))
    one.optimizer.step()
    timelines = read_trace(tmp_path / "trace.json")
    assert set(timelines) == {"predicted", "measured"}
    assert {event.queue for event in timelines["measured"]} == {"h2d", "d2h", "cpu", "gpu"}


def test_state_is_read_and_written_under_megatrons_names(offload):
    run = offload(gpu_fraction=0.0)
    one = distributed(run, 640, 100)
    run.register(one)
    inner = one.optimizer
    shard = inner.param_groups[0]["params"][1]
    state = inner.state[shard]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq", "master_param"]
    assert torch.equal(state["master_param"], torch.ones(100))
    state["exp_avg"], state["step"] = torch.arange(100.0), torch.tensor(7.0)
    assert torch.equal(inner.state[shard]["exp_avg"], torch.arange(100.0))
    assert inner.state[inner.param_groups[0]["params"][0]]["step"] == 7
    with pytest.raises(ValueError, match="exp_avg: must have 100 elements, not 3"):
        state["exp_avg"] = torch.zeros(3)
    with pytest.raises(TypeError, match="cannot be removed"):
        del state["exp_avg"]


@pytest.fixture
def save_queue(monkeypatch):
    """A queue as that of Megatron's persistent worker for asynchronous saves, and its feeder's errors."""
    errors = SimpleQueue()
    monkeypatch.setattr(Queue, "_on_queue_feeder_error", lambda self, error, item: errors.put(error))
    queue = torch.multiprocessing.get_context("spawn").JoinableQueue()
    yield queue, errors
    queue.close()


def copies_of_state(run: OffloadManager) -> dict[str, torch.Tensor]:
    """What a checkpoint takes of a parameter whose state differs between elements."""
    one = distributed(run, 640)
    run.register(one)
    state = one.optimizer.state[one.optimizer.param_groups[0]["params"][0]]
    for n, name in enumerate(("exp_avg", "exp_avg_sq", "master_param")):
        state[name] = torch.arange(640.0) + 1000 * n
    return dict(state)


def test_a_checkpoints_copies_reach_a_process_that_already_runs(offload, save_queue):
    queue, errors = save_queue
    copies = copies_of_state(offload(gpu_fraction=0.5, subgroup_size=64, gpu_budget=12 * 64 * 2))
    queue.put(copies)
    arrived = queue.get(timeout=PATIENCE)
    assert arrived.keys() == copies.keys() and errors.empty()
    assert all(torch.equal(arrived[name], x) for name, x in copies.items())


def test_copies_of_state_on_nvme_do_not_and_the_save_would_never_end(offload, save_queue, tmp_path):
    """Why `--use-persistent-ckpt-worker` is refused with `--s2-offload-nvme-dir`: the copies are in files
    without a name, the queue drops them, and Megatron's `join` of it at the end would not return."""
    queue, errors = save_queue
    on_nvme = {"subgroup_size": 64, "host_budget": 16 * 64 * 5, "nvme_dirs": (str(tmp_path),)}
    queue.put(copies_of_state(offload(gpu_fraction=0.5, **on_nvme)))
    assert isinstance(errors.get(timeout=PATIENCE), OSError) and queue.empty()
    joining = threading.Thread(target=queue.join)
    joining.start()
    joining.join(0.5)
    assert joining.is_alive()
    queue.task_done()
    joining.join(PATIENCE)
    assert not joining.is_alive()


def test_nothing_is_allocated_before_it_is_needed(offload):
    run = offload(gpu_fraction=0.0)
    one = distributed(run, 640)
    run.register(one)
    assert one.optimizer._session is None
    with torch.no_grad():
        one.model_chunks[0][0].fill_(3)
    one.optimizer.update_fp32_param_by_new_param()
    assert one.optimizer._session is None
    run.begin_step()
    shard = one.optimizer.param_groups[0]["params"][0]
    assert torch.equal(one.optimizer.state[shard]["master_param"], torch.full((640,), 3.0))
    with torch.no_grad():
        one.model_chunks[0][0].fill_(4)
    one.optimizer.update_fp32_param_by_new_param()
    assert torch.equal(one.optimizer.state[shard]["master_param"], torch.full((640,), 4.0))


def test_a_rank_without_parameters_steps_along(offload):
    run = offload(gpu_fraction=0.0)
    one = distributed(run)
    run.register(one)
    run.begin_step()
    one.optimizer.step()
    assert one.optimizer.step_count == 1
