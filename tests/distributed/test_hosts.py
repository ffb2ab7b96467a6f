"""Several hosts: network namespaces with addresses of their own, one of which is cut off."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from pathlib import Path

import pytest
from elastic_support import Agents, digest_alone

EPOCHS = 4
IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def ip(*arguments):
    subprocess.run([IP, *map(str, arguments)], check=True, capture_output=True, text=True)


class Hosts:
    """Namespaces that are joined by a bridge: 10.77.0.1, 10.77.0.2, ...."""

    def __init__(self, count):
        self.tag = secrets.token_hex(2)  # others may have namespaces of their own
        self.bridge, self.names = f"b{self.tag}", [f"h{self.tag}{k}" for k in range(count)]
        self.addresses = [f"10.77.0.{k + 1}" for k in range(count)]

    def __enter__(self):
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self):
        ip("netns", "add", self.bridge)  # the bridge too is nobody else's business
        ip("-n", self.bridge, "link", "add", "switch", "type", "bridge")
        ip("-n", self.bridge, "link", "set", "switch", "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("netns", "add", name)
            ip(
                "-n",
                self.bridge,
                "link",
                "add",
                name,
                "type",
                "veth",
                "peer",
                "eth0",
                "netns",
                name,
            )
            ip("-n", self.bridge, "link", "set", name, "master", "switch", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def namespace(self, number):
        return Path("/var/run/netns", self.names[number])

    def cut(self, number):
        ip("-n", self.bridge, "link", "set", self.names[number], "down")

    def __exit__(self, *_):
        for name in (*self.names, self.bridge):
            subprocess.run([IP, "netns", "del", name], check=False, capture_output=True)


def why_not():
    """Why there can be no namespaces here, or nothing."""
    if IP is None:
        return "there is no `ip` (iproute2)"
    try:
        with Hosts(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


@pytest.mark.timeout(300)
def test_a_host_is_cut_off(tmp_path):
    """The link is gone, and nobody is told: the others find out within the timeout, and go on."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(3) as hosts:
        agents = Agents(tmp_path, f"{hosts.addresses[0]}:29400", EPOCHS, timeout=5)
        try:
            for k in range(3):
                agents.start(hosts.addresses[k], "eth0", hosts.namespace(k))
            agents.wait_for(r"rank 0 of 3 goes on")
            agents.wait_for(r"^step 40:")
            hosts.cut(2)
            agents.wait_for(r"rank 0 of 2 goes on from step [1-9]")
            agents.wait_for(r"weights digest: \w+")
            assert re.findall(r"weights digest: \w+", agents.text()) == [digest_alone(EPOCHS)]
            assert re.search("RankError: .* failed on rank", agents.text()), agents.text()
        finally:
            agents.end()
