"""Where checkpoints may be written, who may read them, and files that are no whole ones."""

from __future__ import annotations

import os
import random
import stat
import warnings

import pytest
import torch
from checkpoint_support import SMALL, names
from loader_support import flat
from torch import nn

import torch_spheres as ts
from torch_spheres.checkpoint import load_checkpoint, save_checkpoint


def test_paths(tmp_path):
    assert load_checkpoint(tmp_path / "none.pt", model=SMALL) is None
    assert load_checkpoint(tmp_path / "nowhere" / "none.pt", model=SMALL) is None
    save_checkpoint(tmp_path / "new" / "folder" / "last.pt", step=1, model=SMALL)
    assert load_checkpoint(tmp_path / "new" / "folder" / "last.pt", model=SMALL) == 1
    for folder in (tmp_path, f"{tmp_path}/other/", ""):
        with pytest.raises(IsADirectoryError, match="a checkpoint is a file, not a folder"):
            save_checkpoint(folder, model=SMALL)
    with pytest.raises(IsADirectoryError):
        load_checkpoint(tmp_path, model=SMALL)
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path / "new" / "folder" / "last.pt" / "below.pt", model=SMALL)
    with pytest.raises(OSError, match="name too long"):
        save_checkpoint(tmp_path / ("n" * 300), model=SMALL)
    os.mkfifo(tmp_path / "new" / "pipe")
    with pytest.raises(OSError, match="would replace what is no file"):
        save_checkpoint(tmp_path / "new" / "pipe", model=SMALL)
    assert (tmp_path / "new" / "pipe").is_fifo()
    assert names(tmp_path) == ["new"]
    (tmp_path / "link.pt").symlink_to("new/folder/last.pt")
    save_checkpoint(tmp_path / "link.pt", step=2, model=SMALL)  # takes the place of the link
    assert load_checkpoint(tmp_path / "new" / "folder" / "last.pt", model=SMALL) == 1
    assert load_checkpoint(tmp_path / "link.pt", model=SMALL) == 2


def test_who_may_read_it(tmp_path):
    path, before = tmp_path / "last.pt", os.umask(0o027)
    try:
        save_checkpoint(path, model=SMALL)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640  # as of any file that is made
        path.chmod(0o604)
        save_checkpoint(path, model=SMALL)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_files_that_are_no_whole_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, step=1, model=SMALL)
    whole, before = path.read_bytes(), flat(SMALL.state_dict())
    sizes = [0, 1, 2, 100, *range(200, len(whole), 997), len(whole) - 1]
    noise = random.Random(0)
    parts = [whole[:size] for size in sizes] + [noise.randbytes(size) for size in (5, 500, 5000)]
    for part in parts:
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"last.pt is no whole checkpoint; was it copied in"):
            load_checkpoint(path, model=SMALL)
    torch.save(SMALL, path)
    with pytest.raises(ValueError, match=r"is no whole checkpoint.*\(UnpicklingError\)"):
        load_checkpoint(path, model=SMALL)
    for value, message in (({"epoch": 1}, r"\['epoch'\]"), ([1], "list")):
        torch.save(value, path)
        with pytest.raises(ValueError, match=rf"not what checkpoint_state.* made: {message}"):
            load_checkpoint(path, model=SMALL)
    assert flat(SMALL.state_dict()) == before


def test_any_bytes_are_one_error_with_the_path(tmp_path):
    """Not what pickle, zip files or struct make of them."""
    model, random_ = nn.Linear(2, 2), random.Random(0)
    path = tmp_path / "file.pt"
    ts.save_checkpoint(path, model=model)
    whole = path.read_bytes()
    for k in range(300):
        junk = random_.randbytes(random_.randrange(200))
        if k % 3 == 1:
            junk = whole[: random_.randrange(len(whole))]
        elif k % 3 == 2:
            junk = b"\x80\x02" + junk
        path.write_bytes(junk)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"file\.pt is no whole"):
            warnings.simplefilter("ignore")
            ts.load_checkpoint(path, model=model)
    torch.save(torch.ones(2), path)
    with pytest.raises(ValueError, match=r"file\.pt: not what .*: Tensor"):
        ts.load_checkpoint(path, model=model)
