"""The live display where there is no terminal, and what it cannot use."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
import torch
from system_support import eventually
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts
from torch_spheres.live import _Plain
from torch_spheres.watching.readings import Reading


def test_plain_lines_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    spheres = ts.KissingSpheres(concurrency=2)
    shown = spheres.live(file=file, plain_seconds=0.001, refresh_per_second=1000)
    with spheres, shown as live:
        live.update(samples=7)
        live.advance(3)
        spheres.map(abs, range(9))
        eventually(lambda: "9 items" in file.getvalue())
    assert "\x1b" not in file.getvalue()
    *_, last = file.getvalue().splitlines()
    assert re.fullmatch(
        r"spheres: 13 spheres, 2 of 12 leaves at once, running 0:\d\d:\d\d: 9 items \([\d,]+/s\), "
        r"10 samples \([\d,]+/s\), \d+ stolen, 0 queued, \d at work, \d+% busy",
        last,
    )


def test_the_first_line_has_rates() -> None:
    file = io.StringIO()
    face = _Plain(file, 1e6)
    with ts.KissingSpheres(levels=1) as spheres:
        face.show(spheres)
        assert file.getvalue() == ""
        spheres.map(abs, range(9))
        face._lines._next = 0  # its time has come
        face.show(spheres)
    match = re.search(r"running 0:\d\d:\d\d: 9 items \(([\d,]+)/s\)", file.getvalue())
    assert match and int(match[1].replace(",", "")) > 0


def test_a_short_run_prints_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ts.KissingSpheres(levels=1) as spheres, spheres.live():
        spheres.map(abs, range(9))
    assert capsys.readouterr() == ("", "")


def test_it_ends_though_the_spheres_ran_between_two_looks() -> None:
    spheres = ts.KissingSpheres(levels=1)
    with spheres.live(file=io.StringIO(), refresh_per_second=2) as live:
        spheres.start()
        spheres.stop()
        eventually(lambda: not live.active)
        live.close()
    with spheres.live(file=io.StringIO(), refresh_per_second=1000) as live:
        time.sleep(0.01)
        assert live.active  # what has stopped may start again
        spheres.start()
        spheres.stop()
        eventually(lambda: not live.active)


def test_ranks_but_the_first_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with ts.KissingSpheres(levels=1) as spheres, spheres.live() as live:
        assert not live.active
        live.advance(3)


@pytest.mark.parametrize("value", ["4", None, 0, -1, float("nan"), float("inf")])
def test_numbers_that_are_none(value: Any) -> None:
    spheres = ts.KissingSpheres(levels=1)
    for name in ("refresh_per_second", "plain_seconds"):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be .*{value!r}"):
            spheres.live(**{name: value})


@pytest.mark.parametrize("file", ["stderr", 2, b"x", io.BytesIO(), object()])
def test_files_that_are_none(file: Any) -> None:
    spheres = ts.KissingSpheres(levels=1)
    with pytest.raises(TypeError, match=r"file must be a text file, such as .*, or None"):
        spheres.live(file=file)
    with pytest.raises(TypeError, match="plain must be True, False or None, got 'no'"):
        spheres.live(plain="no")  # type: ignore[arg-type]


def test_samples_are_counted_or_told() -> None:
    with ts.KissingSpheres() as spheres:
        assert Reading.of(spheres).samples is None
        data = TensorDataset(torch.randn(50, 3))
        for _ in ts.wrap(DataLoader(data, batch_size=8), spheres):
            pass
        for _ in ts.wrap(DataLoader(data, batch_size=8, num_workers=2), spheres):
            pass
        assert Reading.of(spheres).samples == 100
        live = spheres.live()
        live.advance(3)
        live.advance()
        assert Reading.of(spheres).samples == 4
        live.update(samples=2)
        assert Reading.of(spheres).samples == 2
        for bad, error in ((-1, ValueError), (1.5, TypeError), ("3", TypeError)):
            with pytest.raises(error, match="samples must be"):
                live.advance(bad)  # type: ignore[arg-type]
