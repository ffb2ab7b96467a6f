"""How the package is laid out: who imports whom, what importing costs, and how long things get."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import fork_server
import pytest

import torch_spheres as ts

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch_spheres"
FILES = sorted(PACKAGE.rglob("*.py"))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    return subprocess.run(
        [*command, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (None, "", 0),
        ("runtime/openmp.py", "import torch_spheres.training.module", 1),
        ("reduction/partition.py", "from torch_spheres.distributed import group", 1),
        ("observe/table.py", "from torch_spheres.data.loader import wrap", 1),
        ("observe/table.py", "from torch_spheres.reduction import tree_sum", 1),
        ("data/fetch.py", "import torch_spheres.training.replica", 1),
        ("checkpoint.py", "from torch_spheres.training.module import SphereParallel", 1),
    ],
)
def test_a_planted_import_breaks_the_contract(tmp_path, file, line, broken):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        PACKAGE, tmp_path / "torch_spheres", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if file is not None:
        with (tmp_path / "torch_spheres" / file).open("a") as planted:
            planted.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert f"{broken} broken" in done.stdout, done.stdout + done.stderr
    assert (done.returncode != 0) == bool(broken)


def test_no_modules_import_each_other_in_a_circle():
    spec = importlib.util.spec_from_file_location("graph", ROOT / "tools" / "import_graph.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}
    graph = {
        name: {n for other in tool.imports_of(f) for n in (other, f"{other}.__init__")} & {*names}
        for name, f in names.items()
    }
    assert sum(map(len, graph.values())) > 200
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("torch_spheres", "torch torch_spheres.runtime.pool"),
        ("torch_spheres.reduction.tree_sum", "torch_spheres.training matplotlib"),
        ("torch_spheres.runtime.pool", "torch_spheres.reduction torch_spheres.observe"),
        ("torch_spheres.distributed.group", "torch_spheres.training torch_spheres.data"),
        ("torch_spheres.training.module", "torch_spheres.data torch_spheres.observe"),
        ("torch_spheres.data.loader", "torch_spheres.training torch_spheres.observe"),
        ("torch_spheres.spheres", "torch_spheres.training torch_spheres.data matplotlib rich"),
        ("torch_spheres.checkpoint", "torch_spheres.training torch_spheres.data"),
    ],
)
def test_importing_a_package_imports_nothing_above_it(module, without):
    code = f"""
        import sys, {module}
        loaded = [name for name in {without.split()} if name in sys.modules]
        assert not loaded, loaded
    """
    code = textwrap.dedent(code)
    if all(name.startswith("torch_spheres.") for name in without.split()):
        done = fork_server.run(code, bare=True)
    else:  # which the fork server has
        command = [sys.executable, "-P", "-c", code]  # (-P: the installed package)
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_in_any_order():
    """However a name is reached first: a module of the same name would hide a function."""
    code = """
        import random, torch_spheres as ts
        from torch_spheres.prepare_training import prepare
        names = [*ts.__all__]
        random.shuffle(names)
        for name in names:
            value = getattr(ts, name)
            assert type(value).__name__ != "module", name
        assert set(names) <= set(dir(ts))
        from torch_spheres import *
        assert prepare is ts.prepare
    """
    done = fork_server.run(textwrap.dedent(code), bare=True)
    assert done.returncode == 0, done.stderr


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="module 'torch_spheres' has no attribute 'Spheres'"):
        ts.Spheres  # noqa: B018


# ---- lengths ----

FUNCTION, FILE, CLASS = 60, 400, 250


def lengths(kinds: tuple[type[ast.AST], ...]) -> dict[str, int]:
    found = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, kinds):
                assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                assert node.end_lineno is not None
                place = f"{file.relative_to(PACKAGE)}: {node.name}"
                found[place] = node.end_lineno - node.lineno + 1
    return found


def test_no_function_is_longer_than_a_page():
    long = {k: n for k, n in lengths((ast.FunctionDef,)).items() if n > FUNCTION}
    assert not long


def test_no_class_does_more_than_one_thing():
    long = {k: n for k, n in lengths((ast.ClassDef,)).items() if n > CLASS}
    assert not long


def test_no_file_is_longer_than_can_be_read_at_a_sitting():
    count = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in FILES}
    assert not {file: n for file, n in count.items() if n > FILE}
