"""Runs tiny Megatron trainings for tests: the real command, or several configurations in one process group.

`launch` starts what a user starts and gives back its exit status and output. A start costs 9 s (imports), so
tests that only compare losses train with `Runs` or `train_all`, whose ranks are forks of one process that has
imported everything (`forks.py`); `call_in_fork` calls any function in such a fork. Losses come from the
tensorboard files, as the float32 values Megatron computed.
"""

import atexit
import fcntl
import json
import logging
import multiprocessing
import os
import pickle
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import forks
from forks import Fork, hold, start, write_commands
from waiting import PATIENCE, wait_until

ROOT = Path(__file__).parent.parent
PRETRAIN = ROOT / "scripts" / "pretrain_gpt.py"

# Small enough that its steps take half a second; no dropout, so that runs which should agree can.
STEPS = 6
TINY = f"""
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --seq-length 128 --max-position-embeddings 128 --attention-dropout 0 --hidden-dropout 0 --seed 1234
    --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --lr 1e-3 --min-lr 1e-4
    --lr-decay-style cosine --eval-iters 1 --eval-interval 1000 --log-interval 1 --num-workers 0
    --tokenizer-type NullTokenizer --vocab-size 255
"""
MODERN = """
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights
"""
MOCK_DATA = "--mock-data"
IMPORTED_BY_A_TRAINING = (
    "megatron_arguments",
    "megatron_s2.pretrain",
    "megatron_s2.training.forward_step",
    "megatron_s2.layers.specs",
    "megatron_s2.training.cpu_runtime",
    "megatron.core.datasets.helpers",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.libraries",
    "megatron.core.tokenizers.text.models",
    "megatron.training",
    "torch._dynamo",
    "torch.utils.tensorboard",
)


@dataclass(frozen=True)
class Run:
    """A finished training: its exit status, everything it printed, and where it logged."""

    status: int
    output: str
    log_dir: Path

    def scalar(self, tag: str) -> dict[int, float]:
        """What the run logged under a tensorboard tag, by iteration."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.log_dir))
        events.Reload()
        return {event.step: event.value for event in events.Scalars(tag)}

    @property
    def losses(self) -> dict[int, float]:
        """The training loss of each iteration."""
        return self.scalar("lm loss")


class Launched:
    """A training that runs now, in forks: the user's command on the tiny flags and `flags`."""

    def __init__(
        self, log_dir: Path, flags: str = "", ranks: int = 1, model: str = MODERN, data: str = MOCK_DATA
    ):
        self._log_dir = log_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        self._output = log_dir / "output.txt"
        with self._output.open("w") as output:
            self._process = start_command(_command(log_dir, flags, ranks, model, data), output, output)

    def wait_for(self, text: str) -> None:
        """Waits until the output contains `text`; RuntimeError, with the output, if the run ends first."""
        wait_until(lambda: text in self._output.read_text() or self._process.poll() is not None)
        if text not in self._output.read_text():
            raise RuntimeError(f"no {text!r} in the output:\n{self._output.read_text()}")

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to every process of the run, as a terminal does."""
        os.killpg(self._process.pid, number)

    def wait(self) -> Run:
        """Waits for the end; a run that takes longer is killed and raises TimeoutError."""
        return Run(self._process.wait(PATIENCE), self._output.read_text(), self._log_dir)


def launch(
    log_dir: Path,
    flags: str = "",
    ranks: int = 1,
    model: str = MODERN,
    data: str = MOCK_DATA,
    from_nothing: bool = False,
) -> Run:
    """Runs the user's command to its end, in forks or started from nothing. Of a flag that occurs twice, the
    later value counts."""
    if not from_nothing:
        return Launched(log_dir, flags, ranks, model, data).wait()
    command = [sys.executable, *_command(log_dir, flags, ranks, model, data)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=_environment(),
        text=True,
        timeout=PATIENCE,
    )
    return Run(done.returncode, done.stdout, log_dir)


def run_command(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs `python WORDS` in a fork; what it returns has text, as from `subprocess.run`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = start_command(words, out, err, cwd).wait(PATIENCE)
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(words, status, *texts)


def start_command(words: Sequence[object], out: IO, err: IO, cwd: Path = ROOT) -> Fork:
    """Starts `python WORDS` as a fork that leads a session of its own."""
    files = (os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno())
    env = environment_of_forks()
    try:
        words = [str(word) for word in words]
        return start(
            _server(), "forks", "run_python", words, files=files, env=env, folder=cwd, own_session=True
        )
    finally:
        os.close(files[0])


def environment_of_forks() -> dict[str, str]:
    """An environment in which the commands `python` and `torchrun` run in forks."""
    environment = _environment()
    return environment | {"PATH": f"{_server().parent}:{environment['PATH']}"}


def train_all(
    log_dir: Path,
    runs: Mapping[str, str],
    ranks: int = 1,
    model: str = MODERN,
    data: str = MOCK_DATA,
    before: Sequence = (),
) -> dict[str, Run]:
    """Runs the tiny configuration once per entry of `runs` (name: flags), in order, in one group of ranks.

    A run may load what an earlier one saved. Each must end well or be refused for its input; any other end
    raises RuntimeError with the output. `before` names a function of `interventions.py` to call first in each
    rank, and what to give it.
    """
    _train(log_dir, runs, ranks, model, data, before)
    return {name: _finished(log_dir / name) for name in runs}


class Runs(Mapping[str, Run]):
    """Runs of the tiny configuration by name, each trained when a test first asks for it.

    Before a run is trained, so is the one that saves the checkpoint which it loads.

    Args:
        directory: where each run gets a directory of its name.
        flags: flags of each run.
        how: arguments of `train_all` that all runs have in common.
    """

    def __init__(self, directory: Path, flags: Mapping[str, str], **how):
        self._directory, self._flags, self._how = directory, flags, how
        self._trained: dict[str, Run] = {}

    def __getitem__(self, name: str) -> Run:
        if name not in self._trained:
            loaded = _value_of("--load", self._flags[name])
            for other, flags in self._flags.items():
                if loaded and other != name and _value_of("--save", flags) == loaded:
                    self[other]
            self._trained |= train_all(self._directory, {name: self._flags[name]}, **self._how)
        return self._trained[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._flags)

    def __len__(self) -> int:
        return len(self._flags)


def _value_of(flag: str, flags: str) -> str | None:
    words = shlex.split(flags)
    return words[words.index(flag) + 1] if flag in words else None


def train_until_killed(log_dir: Path, flags: str, killer: str, *given: float) -> bool:
    """Runs the tiny configuration on one rank after a function of `interventions.py` has been called with
    `given`; whether it killed the run. Any other bad end raises RuntimeError with the output."""
    status = _train(log_dir.parent, {log_dir.name: flags}, 1, MODERN, MOCK_DATA, [killer, *given])
    killed = status == -signal.SIGKILL
    if not killed:
        _finished(log_dir)
    return killed


@dataclass(frozen=True)
class Called:
    """A function's end: what it returned, and what it printed."""

    returned: object
    out: str
    err: str


def call_in_fork(module: str, function: str, *arguments) -> Called:
    """Calls a function of a module on one thread, in a process that ends with it and costs no imports: what
    the call leaves of Megatron's global state is gone. A bad end raises RuntimeError with the output."""
    with tempfile.TemporaryDirectory() as directory:
        call = Path(directory) / "call.pickle"
        call.write_bytes(pickle.dumps((sys.path, module, function, arguments)))
        _in_fork("megatron_run", "_call", call, call.parent)
        return _ended(call.parent, f"{module}.{function}")


def _ended(folder: Path, name: str) -> Called:
    out, err = ((folder / name).read_text() for name in ("out.txt", "err.txt"))
    returned = folder / "returned.pickle"
    if not returned.exists():
        raise RuntimeError(f"{name} did not end well:\n{_last_lines(out)}\n{_last_lines(err)}")
    return Called(pickle.loads(returned.read_bytes()), out, err)


def call_on_ranks(ranks: int, module: str, function: str, *arguments) -> list[Called]:
    """`call_in_fork` in a process of each rank, as a launcher starts them; the ends of all, by rank."""
    with tempfile.TemporaryDirectory() as directory:
        call = Path(directory) / "call.pickle"
        call.write_bytes(pickle.dumps((sys.path, module, function, arguments)))
        _in_fork("megatron_run", "_call_group", call, ranks)
        return [_ended(call.parent / str(rank), f"{module}.{function}") for rank in range(ranks)]


def _train(
    log_dir: Path, runs: Mapping[str, str], ranks: int, model: str, data: str, before: Sequence
) -> int:
    """Returns how the first rank ended."""
    log_dir.mkdir(parents=True, exist_ok=True)
    jobs = [
        {"log_dir": str(log_dir / name), "flags": _words(log_dir / name, TINY, model, data, flags)}
        for name, flags in runs.items()
    ]
    job_file = log_dir / "jobs.json"
    job_file.write_text(json.dumps({"jobs": jobs, "before": before}))
    return _in_fork("megatron_run", "_run_group", job_file, ranks)


def _finished(run_dir: Path) -> Run:
    status = run_dir / "status.txt"
    if not status.exists():
        printed = [_last_lines(file.read_text()) for file in sorted(run_dir.glob("output*.txt"))]
        raise RuntimeError("\n".join([f"run {run_dir.name!r} did not end", *printed]))
    return Run(int(status.read_text()), (run_dir / "output.txt").read_text(), run_dir)


def assert_same_losses(run: Run, control: Run, relative: float) -> None:
    """All iterations, and every loss within `relative` of the control's."""
    import pytest

    assert len(control.losses) == STEPS
    assert run.losses == pytest.approx(control.losses, rel=relative)


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-40:])


def _words(log_dir: Path, *flags: str) -> list[str]:
    return ["--tensorboard-dir", str(log_dir), *shlex.split(" ".join(flags))]


def _command(log_dir: Path, flags: str, ranks: int, model: str, data: str) -> list[str]:
    """What `python` is given."""
    words = [str(PRETRAIN), *_words(log_dir, TINY, model, data, flags)]
    if ranks > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    return words


def _environment() -> dict[str, str]:
    """One thread per rank: several ranks share few cores, and waiting threads would slow each other down.

    Where `CI` is set, transformers would log into the log of a training, too.
    """
    left_out = ("RANK", "WORLD_SIZE", "CI")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "MEGATRON_S2_CACHE": _cache()}


@cache
def _cache() -> str:
    """Rates of this machine are measured for these tests, and forgotten; the operators of the CPU stay."""
    from megatron_s2.kernels.torch_native import library

    folder = tempfile.TemporaryDirectory(prefix="megatron-s2-rates-")
    atexit.register(folder.cleanup)
    with suppress(OSError, RuntimeError):  # no compiler
        compiled = library()
        Path(folder.name, compiled.name).symlink_to(compiled)
    return folder.name


@cache
def _server() -> Path:
    """The address of the server of forks, which runs until all test processes of this pytest have ended;
    beside it lie the commands that run in its forks."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"s2-tests-{run[:16]}"  # addresses have at most 107 characters
    folder.mkdir(exist_ok=True)
    address = folder / "server"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            held, process = hold(address), None
        except (FileNotFoundError, ConnectionRefusedError):
            address.unlink(missing_ok=True)
            write_commands(folder, address)
            process = subprocess.Popen(
                [sys.executable, forks.__file__, address], cwd=ROOT, env=_environment()
            )
            wait_until(lambda: address.exists() or process.poll() is not None)
            held = hold(address)
    atexit.register(_let_go, held, process, folder)
    return address


def _let_go(held: socket.socket, server: subprocess.Popen | None, folder: Path) -> None:
    held.close()
    if server:
        server.wait()
        shutil.rmtree(folder)


def _in_fork(module: str, function: str, *arguments) -> int:
    """The exit status of a fork that calls a function."""
    files, path = (0, 1, 2), [str(Path(__file__).parent), *sys.path]
    fork = start(_server(), module, function, *arguments, files=files, env=_environment(), path=path)
    return fork.wait(2 * PATIENCE)


def import_all() -> None:
    """Imports what a training imports; a run before the fork would leave threads behind."""
    from megatron_s2.training.patches import quiet_known_warnings

    hide_transformer_engine_without_gpu()
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("error", category=category, module="megatron_s2")
    quiet_known_warnings()
    for module in IMPORTED_BY_A_TRAINING:
        import_module(module)
    # Importing megatron.training has set up the log of a training, on what was stdout then. Other commands do
    # not have it, and it goes to what is stdout when something is logged.
    logging.root.setLevel(logging.WARNING)
    for handler in logging.root.handlers:
        handler.stream = SimpleNamespace(
            write=lambda text: sys.stdout.write(text), flush=lambda: sys.stdout.flush()
        )
    _save_without_another_process()


def hide_transformer_engine_without_gpu() -> None:
    """Lets Megatron in this process not find it, as the training command does."""
    import torch

    from megatron_s2.training.patches import hide_transformer_engine

    if not torch.cuda.is_available():
        hide_transformer_engine()


def _save_without_another_process() -> None:
    """What a rank wrote of a checkpoint goes through a queue, which Megatron puts into a process of its own
    that imports everything again. Only a save in the background (`--async-save`) needs that."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _end_together(group: list[multiprocessing.Process]) -> None:
    """Waits for all; kills those that are left when one fails or the time is over."""
    deadline, failed = time.monotonic() + PATIENCE, False
    running = list(group)
    while running and not failed:
        wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
        failed = time.monotonic() > deadline or any(process.exitcode for process in running)
        running = [process for process in running if process.exitcode is None]
    for process in running:
        process.kill()
    for process in group:
        process.join()


def _run_group(job_file: Path, ranks: int) -> None:
    """All ranks of `train_all`; ends as the first of them."""
    if ranks == 1:
        return _run_jobs(0, job_file)
    sys.exit(_fork_ranks(ranks, _run_jobs, job_file))


def _fork_ranks(ranks: int, function: Callable, *arguments) -> int:
    """Calls `function(rank, *arguments)` in a process of each rank; the exit status of the first."""
    fork, port = multiprocessing.get_context("fork"), _free_port()
    group = [
        fork.Process(target=_as_rank, args=(rank, ranks, port, function, *arguments)) for rank in range(ranks)
    ]
    for process in group:
        process.start()
    _end_together(group)
    return group[0].exitcode


def _as_rank(rank: int, ranks: int, port: int, function: Callable, *arguments) -> None:
    """Calls a function in the environment that torchrun would set."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    addresses = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (places | addresses).items()}
    function(rank, *arguments)


def _run_jobs(rank: int, job_file: Path) -> None:
    """One rank of `train_all`: the jobs one after another, each with its output in a file of its own."""
    from megatron_s2.pretrain import train

    logging.root.setLevel(logging.INFO)
    work = json.loads(job_file.read_text())
    if work["before"]:
        name, *given = work["before"]
        getattr(import_module("interventions"), name)(*given)
    for job in work["jobs"]:
        log_dir = Path(job["log_dir"])
        log_dir.mkdir(exist_ok=True)
        with (log_dir / ("output.txt" if rank == 0 else f"output.{rank}.txt")).open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 0
            try:
                train(job["flags"])
            except SystemExit as ended:
                status = ended.code or 0
            sys.stdout.flush()
        if not status:
            _require_no_threads()
        _forget_run()
        if rank == 0:
            (log_dir / "status.txt").write_text(str(status))
    sys.exit(status)  # a refusal of the last ends the group, as a launcher does


def _require_no_threads() -> None:
    """One that outlives its training may be in C++ code when the interpreter ends, which aborts then."""
    if left := [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]:
        raise RuntimeError(f"threads left by the training: {left}")


def _call_group(call: Path, ranks: int) -> None:
    """All ranks of `call_on_ranks`."""
    sys.exit(_fork_ranks(ranks, _call_as_rank, call))


def _call_as_rank(rank: int, call: Path) -> None:
    folder = call.parent / str(rank)
    folder.mkdir()
    _call(call, folder)


def _call(call: Path, folder: Path) -> None:
    """The process of `call_in_fork`, or of a rank of `call_on_ranks`; what is left of it lies in `folder`."""
    import torch

    for name, descriptor in {"out.txt": 1, "err.txt": 2}.items():
        with (folder / name).open("w") as output:
            os.dup2(output.fileno(), descriptor)
    torch.set_num_threads(1)
    sys.path[:], module, function, arguments = pickle.loads(call.read_bytes())
    returned = getattr(import_module(module), function)(*arguments)
    sys.stdout.flush()
    (folder / "returned.pickle").write_bytes(pickle.dumps(returned))


def _forget_run() -> None:
    """Puts Megatron's module-level state back to what it was before a run; the process group stays."""
    from megatron.training import training

    training.destroy_global_state()
