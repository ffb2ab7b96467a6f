"""Every Python snippet of the README and of docs/ runs as it stands; every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest

import torch_spheres

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, **{f"docs/{p.name}": p.read_text() for p in ROOT.glob("docs/*.md")}}
SNIPPETS = {
    f"{name} {n}": snippet
    for name, text in sorted(PAGES.items())
    for n, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    )
}


def test_there_are_snippets():
    assert len(SNIPPETS) >= 12 and len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(name, tmp_path):
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[name])
    if "tensorboard" in SNIPPETS[name]:
        pytest.importorskip("tensorboard")  # of the test extra; not there for every Python
    # (Without the GIL Python says so when a package, such as fontTools, turns it on.)
    # (torch 2.11's profiler has advice for whoever reads a cycle's events later.)
    warn = (
        ("error",),
        ("ignore", "The global interpreter lock"),
        ("ignore", "Warning: Profiler clears events"),
        ("ignore", "the shards of this model are so"),  # whether it comes depends on the machine
    )
    quiet = {"KINETO_LOG_LEVEL": "9"}  # torch's profiler tells when it begins
    done = fork_server.run(script, cwd=tmp_path, env=quiet, warn=warn)
    assert (done.returncode, done.stderr) == (0, "")


def test_imports_warn_of_nothing():
    options = ["-P", "-W", "error", "-W", "ignore:The global interpreter lock:RuntimeWarning"]
    command = [sys.executable, *options, "-c", "import torch_spheres"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "benchmarks/README.md"])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    names = re.findall(r"`((?:tests|examples|benchmarks|cpp|torch_spheres)/[\w./-]+)`", text)
    names += re.findall(r"\b(tools/\w+\.py)", text)
    names += re.findall(r"^pytest .*?(tests/[\w/]+\.py)", text, re.MULTILINE)
    for name in names:
        assert (ROOT / name).exists(), name


def anchors(text):
    """Of a page's headings, as GitHub makes them; docs/api.md also has one for each name."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_api_page_has_each_public_name_once():
    named = re.findall(r"^::: torch_spheres\.(\w+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert sorted(named) == sorted(torch_spheres.__all__)


def test_every_page_is_in_the_sites_navigation():
    listed = re.findall(r": ([\w/]+\.md)\b", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(["index.md", *(p.name for p in ROOT.glob("docs/*.md"))])


def test_the_site_asks_for_nothing_from_elsewhere():
    assert re.search(r"^  font: false", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    # Mermaid diagrams and formulas would be drawn by scripts of other servers.
    for page, text in PAGES.items():
        assert "```mermaid" not in text, page
        assert not re.search(r"!\[[^]]*\]\(https?:", text), page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    assert links or page != "README.md"
    for link in links:
        name, _, anchor = link.partition("#")
        target = folder / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", ["existing_loop.py", "wrap_loader.py"])
def test_example_runs(name):
    done = fork_server.run(ROOT / "examples" / name)
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout and "NO" not in done.stdout
