"""Private names of PyTorch's are used in `_compat.py` and nowhere else in the package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import torch_spheres as ts
from torch_spheres import _compat

SOURCE = Path(ts.__file__).parent


def private_uses(path: Path, own: set[str]) -> list[str]:
    """Names with an underscore that are imported from torch, or looked for on what is not ours."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("torch.")]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if not names[0].startswith("torch.") and node.attr in own:
                continue
            if not names[0].startswith("torch."):
                names = [node.attr]
        else:
            continue
        private = [n for n in names if any(is_private(part) for part in n.split("."))]
        found += [f"{path.relative_to(SOURCE)}:{node.lineno}: {name}" for name in private]
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of_our_own() -> set[str]:
    own = {"_compat", "_core"}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return own


PYTHONS_OWN = {"_getframe", "_lru_cache_wrapper", "_slotnames"}


def test_no_other_module_uses_private_names_of_torch():
    listed = {a.path.split(".")[-1] for a in _compat.LOOKED_UP if not a.path.startswith("torch.")}
    own = names_of_our_own() | listed | PYTHONS_OWN
    paths = [p for p in SOURCE.rglob("*.py") if p.name != "_compat.py"]
    assert len(paths) > 20
    assert [use for path in paths for use in private_uses(path, own)] == []


def test_private_names_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from torch._C import x\nimport torch._dynamo\ntorch.ops._y()\ntensor._cdata2\n"
        "from torch.overrides import _z\nself._own\n"
    )
    lines = {int(use.split(":")[1]) for use in private_uses(bad, {"_own"})}
    assert lines == {1, 2, 3, 4, 5}
