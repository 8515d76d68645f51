"""Processes that are forks of one server, which has imported what the commands of this project import.

A start from nothing costs 9 s of CPU time, most of it for imports; a fork costs 0.1 s. `start` calls a
function in one. The commands of `write_commands` run Python in one: with the same words, environment, folder
and files; only what a module reads when it is imported has been read before. All test processes of one pytest
share the server, which ends with the last of them.

Run as a script, this file is the server, or such a command.
"""

import atexit
import os
import pickle
import runpy
import select
import selectors
import shlex
import shutil
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

OWN_PATH = sys.path[1:]
LENGTH, NUMBER = struct.Struct("!Q"), struct.Struct("!i")
HOLD = pickle.dumps(None)


class Fork:
    """A running fork. Its end is told by a connection, and comes when that is closed."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        (self.pid,) = NUMBER.unpack(_read(connection, NUMBER.size))
        self._status: int | None = None

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit status, negative for a signal; None if it still runs after this time."""
        if self._status is None and select.select([self._connection], [], [], seconds)[0]:
            (self._status,) = NUMBER.unpack(_read(self._connection, NUMBER.size))
            self._connection.close()
        return self._status

    def wait(self, seconds: float) -> int:
        """As `poll`, but a fork that takes longer is killed and raises TimeoutError."""
        if (status := self.poll(seconds)) is None:
            self._connection.close()
            raise TimeoutError(f"a fork still ran after {seconds:.0f} s")
        return status


def start(
    address: Path,
    module: str,
    function: str,
    *arguments,
    files: tuple[int, int, int],
    env: dict[str, str],
    folder: Path | None = None,
    path: list[str] | None = None,
    own_session: bool = False,
) -> Fork:
    """Calls a function of a module in a fork of the server.

    Args:
        address: the server's.
        module: its name.
        arguments: what the function is given; pickled.
        files: descriptors of stdin, stdout and stderr.
        env: the whole environment.
        folder: the current one; by default the caller's.
        path: `sys.path` there; by default that of an interpreter just started.
        own_session: whether it leads a session, so that signals to its group reach only what it starts.
    """
    call = (module, function, arguments, path, env, str(folder or Path.cwd()), own_session)
    return Fork(_send(address, pickle.dumps(call), files))


def hold(address: Path) -> socket.socket:
    """Lets the server run until the result is closed."""
    return _send(address, HOLD, (0, 1, 2))


def _send(address: Path, message: bytes, files: tuple[int, int, int]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(address))
    socket.send_fds(connection, [LENGTH.pack(len(message))], files)
    connection.sendall(message)
    return connection


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise RuntimeError("the process that forks has ended")
        data += part
    return data


class Server:
    """Forks a process for each call and tells its end, until nobody holds it and no fork runs.

    To be made and run on the only thread of its process.
    """

    def __init__(self, address: Path):
        self._selector = selectors.PollSelector()  # forks share no state of it
        self._holders, self._forks, self._was_held = 0, 0, False
        listener = socket.socket(socket.AF_UNIX)
        unready = address.with_suffix(".new")
        listener.bind(str(unready))
        listener.listen(64)
        unready.rename(address)  # whoever finds it can connect
        self._watch(listener, partial(self._accept, listener))

    def run(self) -> None:
        while self._holders or self._forks or not self._was_held:
            for key, _ in self._selector.select():
                if key.fd in self._selector.get_map():  # not closed by another of these
                    key.data()

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        length, files, *_ = socket.recv_fds(connection, LENGTH.size, 3)
        message = _read(connection, *LENGTH.unpack(length))
        if message == HOLD:
            self._was_held = True
            self._holders += 1
            self._watch(connection, partial(self._release, connection))
        elif pid := os.fork():
            connection.sendall(NUMBER.pack(pid))
            self._forks += 1
            process = os.pidfd_open(pid)
            self._watch(connection, partial(self._abandon, connection, pid))
            self._watch(process, partial(self._tell, connection, process, pid))
        else:
            for key in list(self._selector.get_map().values()):
                self._close(key.fileobj)
            connection.close()
            _become(files, *pickle.loads(message))
        for descriptor in files:
            os.close(descriptor)

    def _watch(self, file: socket.socket | int, on_ready: Callable[[], None]) -> None:
        self._selector.register(file, selectors.EVENT_READ, on_ready)

    def _close(self, file: socket.socket | int) -> None:
        self._selector.unregister(file)
        os.close(file) if isinstance(file, int) else file.close()

    def _release(self, holder: socket.socket) -> None:
        self._holders -= 1
        self._close(holder)

    def _abandon(self, connection: socket.socket, pid: int) -> None:
        """Whoever started the fork waits no longer."""
        self._selector.unregister(connection)
        os.kill(pid, signal.SIGKILL)

    def _tell(self, connection: socket.socket, process: int, pid: int) -> None:
        self._forks -= 1
        self._close(process)
        _, status = os.waitpid(pid, 0)
        if connection.fileno() in self._selector.get_map():
            connection.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
            self._selector.unregister(connection)
        connection.close()


def _become(files, module, function, arguments, path, env, folder, own_session) -> None:
    """What a fork does, to its end."""
    for place, descriptor in enumerate(files):
        os.dup2(descriptor, place)
        os.close(descriptor)
    if own_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = path or [*filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *OWN_PATH]
    status = _ended(lambda: getattr(import_module(module), function)(*arguments))
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def _ended(call: Callable[[], None]) -> int:
    """The status with which an interpreter would end that does this."""
    try:
        call()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    else:
        return 0
    return 1


def run_python(words: list[str]) -> None:
    """Does what `python WORDS` does; words are `[-u] [-P] SCRIPT …`, `-m MODULE …` or `-c PROGRAM …`."""
    sys.executable = shutil.which("python")
    safe_path = False
    while words[0] in ("-u", "-P"):
        safe_path |= words[0] == "-P"
        words = words[1:]
    what, *others = words
    if not safe_path:
        sys.path.insert(0, os.getcwd() if what in ("-m", "-c") else str(Path(what).resolve().parent))
    if what == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(what, run_name="__main__")


def write_commands(directory: Path, address: Path) -> None:
    """Writes `python` and `torchrun` that run in forks, to be put first on PATH."""
    client = shlex.join([sys.executable, "-S", "-E", __file__, str(address)])
    for name, words in {"python": "", "torchrun": "-m torch.distributed.run"}.items():
        (directory / name).write_text(f'#!/bin/sh\nexec {client} {words} "$@"\n')
        (directory / name).chmod(0o755)


def _main(place: str, *words: str) -> int:
    address = Path(place)
    if words:
        fork = start(address, "forks", "run_python", list(words), files=(0, 1, 2), env=dict(os.environ))
        while (status := fork.poll(60)) is None:
            pass
        return status if status >= 0 else 128 - status
    import forks
    import megatron_run

    megatron_run.import_all()
    forks.Server(address).run()
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
