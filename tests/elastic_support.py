"""Agents of torchrun that train examples/elastic_mnist.py, as on several machines."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fork_server

EXAMPLE = Path(__file__).parent.parent / "examples" / "elastic_mnist.py"


def free_port():
    """None of those that the kernel gives to whoever connects to something meanwhile."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(1024, first)
        with socket.socket() as found, contextlib.suppress(OSError):  # it is taken
            found.bind(("127.0.0.1", port))
            return port


def digest_alone(epochs):
    """The line that one process prints which nobody disturbs."""
    done = fork_server.run(EXAMPLE, "--epochs", epochs)
    assert done.returncode == 0, done.stderr
    return re.search(r"weights digest: \w+", done.stdout)[0]


def children(parent):
    """Processes that it has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


# torchrun, in the network namespace in that file if there is one. Its worker processes are forks of
# it, which have imported torch, rather than new interpreters.
AGENT = """
import ctypes, os, runpy, sys
from torch.distributed import run as torchrun
log, namespace = sys.argv[1:3]
written = os.open(log, os.O_WRONLY)
os.dup2(written, 1)
os.dup2(written, 2)
if namespace:
    libc, CLONE_NEWNET = ctypes.CDLL(None, use_errno=True), 0x40000000
    if libc.setns(os.open(namespace, os.O_RDONLY), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns", namespace)
def run_script(*arguments):
    sys.argv = [*arguments]
    runpy.run_path(arguments[0], run_name="__main__")
config, _, arguments = torchrun.config_from_args(torchrun.parse_args(sys.argv[3:]))
config.start_method = "fork"
torchrun.elastic_launch(config, run_script)(*arguments[1:])  # the first is an option of python
"""

# As a user has it, ready to start when a file is there.
HELD = """
import pathlib, sys, time
from torch.distributed.run import main
gate = pathlib.Path(sys.argv.pop(1))
while not gate.exists():
    time.sleep(0.02)
main()
"""

# The example, which stops after it has saved a step from N on, for as long as a file hold.N is
# there: what should come to a training that is under way does, however long it takes.
HOLDING = """
import pathlib, runpy, sys, time
import torch_spheres as ts
example, folder = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))
save = ts.save_checkpoint
def save_and_wait(path, *, step, **parts):
    save(path, step=step, **parts)
    while any(step >= int(hold.suffix[1:]) for hold in folder.glob("hold.*")):
        time.sleep(0.02)
ts.save_checkpoint = save_and_wait
sys.path.insert(0, str(pathlib.Path(example).parent))
runpy.run_path(example, run_name="__main__")
"""


class Agents:
    """One for each machine.

    Args:
        folder: for the checkpoint and the logs.
        endpoint: of the rendezvous: address and port, which the first has, and has to live; or a
            file's path.
        epochs: of 42 steps each.
        timeout: seconds, of the process group.
    """

    def __init__(self, folder, endpoint, epochs, timeout=60):
        self.folder, self.endpoint = folder, endpoint
        self.options = ["--epochs", str(epochs), "--timeout", str(timeout)]
        self.agents, self.logs = [], []
        self.script = folder / "holding.py"
        self.script.write_text(HOLDING)

    def start(self, address, interface="lo", namespace="", gate=None):
        """One more, at its own address, in the network namespace of that file.

        With the file `gate` it is a program of its own, as a user has it, and starts when that is
        there.
        """
        conf = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=5,"
        if ":" in self.endpoint:
            conf += f"is_host={not self.agents}".lower()
        else:
            conf += "store_type=file"
        options = [
            *("--nnodes=1:4", "--nproc-per-node=1", "--max-restarts=100", "--rdzv-backend=c10d"),
            *(f"--rdzv-endpoint={self.endpoint}", "--rdzv-id=mnist", "--monitor-interval=0.5"),
            *(f"--local-addr={address}", "--rdzv-conf", conf),
            *(str(self.script), str(EXAMPLE), str(self.folder)),
            *("--checkpoint", str(self.folder / "last.pt"), *self.options),
        ]
        environment = {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
        }
        log = self.folder / f"{len(self.agents)}.log"
        self.logs.append(log)
        with log.open("wb") as written:
            if gate:
                command = [sys.executable, "-P", "-c", HELD, str(gate), *options]
                environment = os.environ | environment
                agent = subprocess.Popen(command, stdout=written, stderr=written, env=environment)
            else:
                agent = fork_server.start(AGENT, log, namespace, *options, env=environment)
        self.agents.append(agent)

    def text(self):
        return "\n".join(f"---- {log.name}\n{log.read_text()}" for log in self.logs)

    def wait_for(self, pattern, log=None, seconds=120):
        """Until it is in one of the logs, or in that one."""
        end = time.monotonic() + seconds
        while True:
            text = self.text() if log is None else self.logs[log].read_text()
            if re.search(pattern, text, re.MULTILINE):
                return
            assert time.monotonic() < end, f"no {pattern!r}\n{self.text()}"
            time.sleep(0.05)

    def kill(self, number):
        """The machine is gone: the agent and its worker."""
        agent = self.agents[number]
        for pid in (agent.pid, *children(agent.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()

    def end(self):
        """All of them, whatever they are at."""
        for number, agent in enumerate(self.agents):
            if agent.poll() is None:
                self.kill(number)
