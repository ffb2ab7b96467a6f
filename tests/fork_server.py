"""Processes that need no second to import torch: forks of one that has imported it.

    done = fork_server.run("import sys; print(sys.argv)", "an argument")     # python -P -c TEXT ...
    done = fork_server.run(Path("train.py"), "--epochs", 1)                  # python train.py ...
    with fork_server.start(TEXT) as process: ...                             # while it runs
    ends = fork_server.run_ranks(4, Path("train.py"))                        # as torchrun has it

The server starts with the first of them. It has one thread, and leaves its main loop in each child,
whose program therefore runs, and ends, as that of any interpreter does. It has imported all of the
package too, and has replaced torch's kernels that draw random numbers, as the first shard that runs
does; with `bare=True` it has imported torch alone. What the import of torch does, or reads from the
environment, needs a new interpreter instead.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LIMIT = 100.0  # seconds, for what ends long before that unless it hangs

# ---- the side of the tests ----

_running: set[Process] = set()


@functools.cache
def _servers() -> tuple[socket.socket, socket.socket, Any]:
    """Where the one with the package takes requests, where the bare one does, and their stderr.

    Both end with this process.
    """
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    (full, full_end), (bare, bare_end) = pairs
    with full_end, bare_end:
        ends = [full_end.fileno(), bare_end.fileno()]
        server = subprocess.Popen(
            [sys.executable, "-P", __file__, *map(str, ends)],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            start_new_session=True,  # Ctrl-C at the terminal is for pytest
            # Otherwise numpy has threads from its import on, and they do not survive a fork.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def end() -> None:
        full.close()
        bare.close()
        server.wait()
        errors.close()

    atexit.register(end)
    return full, bare, errors


class Process:
    """A child of the server; see `start`.

    Attributes:
        pid: of the process, which is the leader of a process group.
        returncode: None as long as it runs; the number of a signal is negative.
    """

    def __init__(
        self, program: Path | str, arguments: tuple[object, ...], bare: bool, **more: Any
    ) -> None:
        is_file = isinstance(program, Path)
        request = {
            "file": str(program.absolute()) if is_file else None,
            "text": program.read_text() if is_file else program,
            "arguments": [*map(str, arguments)],
            **more,
        }
        self.returncode: int | None = None
        self._all_texts: list[str] = []  # when it has ended
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._read = 0  # characters of stdout that `readline` has returned
        self._channel, theirs = socket.socketpair()
        *servers, self._server_errors = _servers()
        with theirs, Path(os.devnull).open("rb") as nothing:
            files = [nothing, *self._files, theirs]
            message = json.dumps(request).encode()
            with contextlib.suppress(BrokenPipeError):  # it has failed: `_receive` says why
                socket.send_fds(servers[bare], [message], [f.fileno() for f in files])
        self.pid = self._receive()
        _running.add(self)

    def _receive(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            if not (part := self._channel.recv(1)):
                raise RuntimeError(f"the fork server has ended: {_text(self._server_errors)}")
            line += part
        return int(line)

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._texts()[0]

    @property
    def stderr(self) -> str:
        """What it has printed there so far."""
        return self._texts()[1]

    def _texts(self) -> list[str]:
        return self._all_texts or [_text(file) for file in self._files]

    def readline(self) -> str:
        """The next line that it prints; what there is of it if the process ends before."""
        end = time.monotonic() + LIMIT
        while True:
            has_ended = self.poll() is not None
            text, end_of_line, _ = self.stdout[self._read :].partition("\n")
            if end_of_line or has_ended:
                self._read += len(text + end_of_line)
                return text + end_of_line
            assert time.monotonic() < end, f"it prints no line: {self.stderr}"
            time.sleep(0.005)

    def poll(self) -> int | None:
        """The exit status, or None."""
        if self.returncode is None and select.select([self._channel], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float = LIMIT) -> int:
        """The exit status, as soon as it has ended; one that hangs is killed, and is an error."""
        if self.returncode is None and not select.select([self._channel], [], [], timeout)[0]:
            self.kill()
            self._end()
            raise TimeoutError(f"hung for {timeout} s\n{self.stdout}\n{self.stderr}")
        return self._end()

    def _end(self) -> int:
        if self.returncode is None:
            self.returncode = self._receive()
            self._channel.close()
            self._all_texts = self._texts()
            for file in self._files:
                file.close()
            _running.discard(self)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def interrupt(self) -> None:
        """Ctrl-C, as soon as its main thread sleeps, waiting for what the test has it wait for."""
        end = time.monotonic() + LIMIT
        stat = Path(f"/proc/{self.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "it never waits"
            time.sleep(0.005)
        self.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL, which its worker processes do not survive either."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._end()


def _text(file: Any) -> str:
    return os.pread(file.fileno(), 1 << 24, 0).decode()


def start(
    program: Path | str,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    warn: tuple[tuple[str, ...], ...] = (),
    bare: bool = False,
    quick_end: bool = False,
) -> Process:
    """Starts a program: that in a file, whose folder is searched for modules, or a text.

    Args:
        env: what its environment has in addition. PYTHONPATH and OMP_NUM_THREADS are heeded.
        cwd: the folder it runs in, other than this process's.
        warn: arguments of `warnings.filterwarnings`, of which a later one has precedence; for the
            option ``-W error``, ``("error",)``.
        bare: whether nothing of the package has been imported.
        quick_end: whether the process is gone when the program, its threads and what is registered
            for the exit have ended without an error. To take down an interpreter with torch in it
            takes a third of a second more, for each rank.
    """
    environment = {**os.environ, **(env or {})}
    return Process(
        program,
        arguments,
        bare,
        env=environment,
        cwd=str(cwd or Path.cwd()),
        warn=warn,
        quick_end=quick_end,
    )


def run(
    program: Path | str, *arguments: object, timeout: float = LIMIT, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; see `start`."""
    with start(program, *arguments, **more) as process:
        process.wait(timeout)
    return subprocess.CompletedProcess(
        [program, *arguments], process.wait(), process.stdout, process.stderr
    )


@contextlib.contextmanager
def ranks(
    world: int,
    program: Path | str,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    quick_end: bool = False,
) -> Iterator[list[Process]]:
    """Context in which `program` runs on so many ranks, in the environment that torchrun gives."""
    import torch.distributed as dist

    # The address of a store that is there already: no port is chosen that somebody takes meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                start(
                    program,
                    *arguments,
                    env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
                    quick_end=quick_end,
                )
            )
            for r in range(world)
        ]


def run_ranks(
    world: int, program: Path | str, *arguments: object, timeout: float = LIMIT, **more: Any
) -> list[Process]:
    """The ranks of `program` after their end, which has to be a good one; see `ranks`."""
    end = time.monotonic() + timeout
    with ranks(world, program, *arguments, **more) as started:
        left = {process._channel: process for process in started}
        while left and all(process.returncode in (None, 0) for process in started):
            ready = select.select([*left], [], [], end - time.monotonic())[0]
            assert ready, [process.stderr for process in started]
            for channel in ready:
                left.pop(channel).wait()
    assert not left and all(process.returncode == 0 for process in started), "\n".join(
        f"---- rank {rank}: {process.returncode}\n{process.stderr}"
        for rank, process in enumerate(started)
    )
    return started


def left_behind() -> list[int]:
    """Ends the processes that nobody has waited for; their numbers."""
    left = [*_running]
    for process in left:
        process.kill()
        process.wait()
    return [process.pid for process in left]


# ---- the server ----


def serve(requests: socket.socket) -> dict[str, Any]:
    """Forks a child for each request, and returns in the child what it is to run."""
    children: dict[int, socket.socket] = {}  # by process
    # A byte comes here when a child has ended. (Not every Python has `os.pidfd_open`.)
    ended, ends = os.pipe()
    os.set_blocking(ends, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ends, warn_on_full_buffer=False)
    while True:
        ready = select.select([requests, ended], [], [])[0]
        if ended in ready:
            os.read(ended, 4096)
            for pid in [*children]:
                _tell_if_ended(pid, children)
        if requests not in ready:
            continue
        message, files, *_ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:  # the tests have ended
            for pid in children:
                os.killpg(pid, signal.SIGKILL)
            sys.exit()
        channel = socket.socket(fileno=files.pop())
        threads = [*Path("/proc/self/task").iterdir()]
        assert len(threads) == 1, f"a fork would have one of these: {threads}"
        pid = os.fork()
        with contextlib.suppress(PermissionError):  # both do so: neither knows who comes first
            os.setpgid(pid, pid)
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, file in enumerate(files):
                os.dup2(file, number)
        for file in files:
            os.close(file)
        if pid == 0:
            for other in (*children.values(), channel, requests):
                other.close()
            os.close(ended)
            os.close(ends)
            return json.loads(message)
        children[pid] = channel
        channel.sendall(b"%d\n" % pid)


def _tell_if_ended(pid: int, children: dict[int, socket.socket]) -> None:
    # Looked at before it is waited for: until then the number is nobody else's.
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # those that it has started
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with children.pop(pid) as channel, contextlib.suppress(BrokenPipeError):
        channel.sendall(b"%d\n" % status)


def become(request: dict[str, Any]) -> None:
    """Makes this child what a new process would be."""
    import faulthandler
    import warnings

    import numpy as np
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    environment, file = request["env"], request["file"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    folders = [str(Path(file).parent)] if file else []
    sys.path[:0] = folders + [f for f in environment.get("PYTHONPATH", "").split(":") if f]
    sys.argv = [file or "-c", *request["arguments"]]
    np.random.seed()
    torch.default_generator.seed()  # Python's own is seeded after a fork
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for how in request["warn"]:
        warnings.filterwarnings(*how)


def leave_at_once(wanted: list[bool], sys: Any = sys, os: Any = os) -> None:
    """The last thing at the exit; by then the globals are those of the program."""
    if wanted:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    import atexit
    import gc

    _at_once: list[bool] = []
    atexit.register(leave_at_once, _at_once)  # the first: what others register comes before

    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import torch.distributed
    import torch.utils.data

    torch.optim.SGD([torch.zeros(1)])  # the first one imports torch's compiler
    _full, _bare = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    if not (_other := os.fork()):
        _bare.close()
        _requests = _full
        import torch_spheres
        from torch_spheres.runtime.rng import RandomSource

        for _name in torch_spheres.__all__:
            getattr(torch_spheres, _name)
        RandomSource(int).active()
    else:
        _full.close()
        _requests = _bare
    gc.collect()
    gc.freeze()  # else every child copies all of that, to look for garbage in it when it ends
    try:
        _request = serve(_requests)
    except SystemExit:  # the tests have ended
        if _other:
            os.waitpid(_other, 0)
        raise
    become(_request)
    _request["at_once"] = _at_once
    # From here on this is the program's own `__main__`, which lives until the interpreter ends.
    for _name in [name for name in globals() if not name.startswith("__") and name != "_request"]:
        del globals()[_name]
    __doc__ = None
    if _request["file"]:
        __file__ = _request["file"]
    else:
        del __file__
    exec(compile(_request["text"], _request["file"] or "<string>", "exec", dont_inherit=True))
    if _request["quick_end"]:  # a program that fails does not come here
        _request["at_once"].append(True)
