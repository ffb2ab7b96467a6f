"""Draws who imports whom in the package: docs/import_graph.svg, an arrow for each pair of packages.

    python tools/import_graph.py           # writes docs/import_graph.svg
    python tools/import_graph.py --check   # fails if the drawing is not of this tree
    python tools/import_graph.py --text    # prints the pairs of packages instead

Imports that only type checkers see are left out. The drawing has the packages as boxes, in the
layers of pyproject.toml's contract, with the number of their modules. An arrow's title says how
many modules of one import how many of the other.
"""

from __future__ import annotations

import argparse
import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TARGET = ROOT / "torch_spheres", ROOT / "docs" / "import_graph.svg"
# Rows of boxes, from what users see to what imports nothing.
ROWS = [
    ["prepare_training"],
    ["spheres", "checkpoint"],
    ["observe", "training", "data"],
    ["distributed"],
    ["reduction"],
    ["runtime"],
    ["errors", "_compat", "_core"],
]
WIDTH, HEIGHT, GAP_X, GAP_Y = 150, 40, 60, 42
INK, PAPER, LINE = "#1f2933", "#eef3f8", "#7b8794"


def package_of(module: str) -> str:
    """The part of the package that a dotted name belongs to; nothing for others."""
    parts = module.split(".")
    if parts[0] != "torch_spheres" or len(parts) < 2:
        return ""
    return "_compat" if parts[1].startswith("_comp") else parts[1]


def imports_of(file: Path) -> set[str]:
    """The modules of this package that a file imports when it is run."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                visit(branch)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT / inner.replace(".", "/")).with_suffix(".py").exists()
                found.add(inner if is_module or node.module == "torch_spheres" else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return {name for name in found if name.startswith("torch_spheres.")}


def graph() -> tuple[dict[str, int], dict[tuple[str, str], tuple[int, int]]]:
    """Modules of each part, and for each pair how many of one import how many of the other."""
    sizes: dict[str, int] = defaultdict(int)
    pairs: dict[tuple[str, str], tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        part = package_of(name)
        if not part or part == "__init__":
            continue
        sizes[part] += 1
        for other in imports_of(file):
            target = package_of(other)
            if target and target != part:
                importing, imported = pairs[part, target]
                importing.add(name)
                imported.add(other)
    sizes["_core"] = 1
    return dict(sizes), {pair: (len(a), len(b)) for pair, (a, b) in sorted(pairs.items())}


def drawing() -> str:
    """The picture, as SVG."""
    sizes, pairs = graph()
    columns = max(map(len, ROWS))
    width = columns * (WIDTH + GAP_X) + GAP_X
    height = len(ROWS) * (HEIGHT + GAP_Y) + GAP_Y
    centre: dict[str, tuple[float, float]] = {}
    boxes, lines = [], []
    for r, row in enumerate(ROWS):
        left = (width - len(row) * (WIDTH + GAP_X) + GAP_X) / 2
        for c, name in enumerate(row):
            x, y = left + c * (WIDTH + GAP_X), GAP_Y + r * (HEIGHT + GAP_Y)
            centre[name] = x + WIDTH / 2, y + HEIGHT / 2
            count = sizes.get(name, 0)
            label = name if count <= 1 else f"{name} ({count} modules)"
            boxes.append(
                f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
                f'fill="{PAPER}" stroke="{INK}"/>'
                f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 4:g}">{label}</text>'
            )
    for (source, target), (importing, imported) in pairs.items():
        (x1, y1), (x2, y2) = centre[source], centre[target]
        down = 1 if y2 > y1 else -1
        y1, y2 = y1 + down * HEIGHT / 2, y2 - down * (HEIGHT / 2 + 4)
        lines.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{LINE}" '
            f'stroke-width="{min(4, 0.6 + importing / 8):.2g}" marker-end="url(#arrow)">'
            f"<title>{importing} modules of {source} import {imported} of {target}</title></line>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle">\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" '
        f'fill="{LINE}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join([*lines, *boxes])
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the saved drawing")
    parser.add_argument("--text", action="store_true", help="print the pairs")
    options = parser.parse_args()
    if options.text:
        for (source, target), (importing, imported) in graph()[1].items():
            print(f"{source} -> {target}: {importing} modules import {imported}")
        return
    if not options.check:
        TARGET.write_text(drawing())
    elif not TARGET.exists() or TARGET.read_text() != drawing():
        raise SystemExit(f"{TARGET} is not of this tree: run python tools/import_graph.py")


if __name__ == "__main__":
    main()
