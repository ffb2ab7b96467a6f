"""The README as the site's first page, and the charts of `benchmarks/` beside it.

mkdocs reads one folder, `docs/`. The README and the charts stay where GitHub and the benchmarks
want them; these hooks, which `mkdocs.yml` names, add them to the site. Links between the README and
the pages are written for GitHub and are changed here.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README as `index.md`, and the charts."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for chart in sorted((ROOT / "benchmarks").glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{chart.name}", abs_src_path=str(chart)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Has links to files above `docs/` lead to where `on_files` has put them."""
    return markdown.replace("](../README.md", "](index.md").replace(
        "](../benchmarks/", "](benchmarks/"
    )
