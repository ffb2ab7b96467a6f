"""Programs under `python -m torch_spheres.top`."""

from __future__ import annotations

import sys
from typing import Any

from terminal import Program, script

TOP = [sys.executable, "-P", "-m", "torch_spheres.top"]
HEADER = """
import os, signal, subprocess, sys, threading, time
def told():
    assert sys.stdin.readline() == "go\\n"
"""
SPHERES = HEADER + "import torch_spheres as ts\n"


def watched(text: str, *options: str, header: str = SPHERES, **more: Any) -> Program:
    return Program([*TOP, *options, "--", *script(header + text)], **more)
