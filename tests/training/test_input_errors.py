"""Errors of a call, and of the constructor, that say what is the matter and the way out."""

from __future__ import annotations

import copy

import pytest
import torch
from judge import Calls
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import torch_spheres as ts

ROWS = 26
T = torch.randn(5, ROWS, 4)


@pytest.fixture(params=[1, 12], ids=["alone", "twelve at once"], scope="module")
def spheres(request):
    with ts.KissingSpheres(concurrency=request.param) as running:
        yield running


def test_a_shards_error_says_how_arguments_were_cut(spheres):
    class Images(nn.Module):
        def forward(self, images, sizes):
            return torch.stack([F.conv2d(i[None], torch.ones(2, 3, 3, 3)) for i in images])

    images = [torch.randn(3, 8, 8) for _ in range(5)]
    with pytest.raises(RuntimeError, match="3 channels") as caught:
        ts.SphereParallel(Images(), spheres)(images, sizes=torch.ones(3, 2))
    notes = [note for note in caught.value.__notes__ if "cut the arguments" in note]
    assert len(notes) == 1
    assert "images: 5 x (3, 8, 8) along dimension 0" in notes[0]
    assert "sizes: (3, 2) along dimension 0" in notes[0]
    assert "whole=" in notes[0]


class Held:
    def __init__(self, value):
        self.value = {"a": [value]}


def test_objects_that_hold_rows_are_refused(spheres):
    class Takes(nn.Linear):
        def forward(self, x, held):
            return super().forward(x)

    x = torch.randn(ROWS, 4)
    with pytest.raises(TypeError, match=r"'held' has a Held in it, whose \.value\['a'\]\[0\] is a"):
        ts.SphereParallel(Takes(4, 4), spheres)(x, Held(x))
    for held, options in ((Held(x), {"whole": ("held",)}), (Held(x[:2]), {}), (Held(3), {})):
        assert ts.SphereParallel(Takes(4, 4), spheres, **options)(x, held).shape == (ROWS, 4)


def test_tracing_is_refused(spheres):
    model, x = ts.SphereParallel(nn.Linear(4, 4), spheres), torch.randn(6, 4)
    for run in (
        lambda: torch.jit.trace(model, (x,)),
        lambda: torch.export.export(model, (x,), strict=False),
    ):
        with pytest.raises(RuntimeError, match=r"cannot be traced, exported .*trace model\.module"):
            run()
    assert model(x).shape == (6, 4)


def test_a_graph_for_tensorboard_is_refused(spheres, tmp_path, capsys):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with (
        tensorboard.SummaryWriter(tmp_path) as writer,
        pytest.raises(RuntimeError, match=r"add_graph\).*trace model\.module"),
    ):
        writer.add_graph(ts.SphereParallel(nn.Linear(4, 4), spheres), torch.randn(6, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(spheres, layout):
    nested = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=layout)
    with pytest.raises(TypeError, match=r"'input' has one of layout .*\(nested\); convert it"):
        ts.SphereParallel(nn.Linear(4, 4), spheres)(nested)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_forward_mode_is_refused(spheres, what):
    module, x = nn.Linear(4, 4), torch.randn(6, 4)
    model = ts.SphereParallel(module, spheres)
    with forward_ad.dual_level():
        if what == "input":
            x = forward_ad.make_dual(x, torch.ones_like(x))
        else:
            weight = module.weight.detach()
            del module.weight
            module.weight = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match=r"forward-mode AD.*bare model\.module"):
            model(x)


# ---- what the constructor checks ----


class Named(nn.Module):
    def forward(self, x, /, mask=None, *rest, gate=None):
        return x


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_dim": "x"}, TypeError, "batch_dim must be an integer, got 'x'"),
        ({"batch_dim": -1}, ValueError, "batch_dim must be at least 0, got -1"),
        ({"batch_dim": True}, TypeError, "batch_dim must be an integer, got True"),
        ({"batch_dim": {"x": "1"}}, TypeError, r"batch_dim\['x'\] must be an integer, got '1'"),
        ({"batch_dim": {0: 1}}, TypeError, "batch_dim must have names of arguments, got 0"),
        ({"batch_dim": {"xx": 1}}, ValueError, r"'xx', .* it has \['x', 'mask', 'rest', 'gate'\]"),
        ({"whole": "mask"}, TypeError, r"such as whole=\('mask',\), got 'mask'"),
        ({"whole": [1]}, TypeError, r"whole must be names of arguments.*got \[1\]"),
        ({"whole": ["masks"]}, ValueError, "'masks', which is no argument of"),
        ({"whole": ["x"], "batch_dim": {"x": 1}}, ValueError, r"\['x'\] are in batch_dim and in w"),
        ({"scalars": "max"}, ValueError, "scalars must be 'mean' or 'sum', got 'max'"),
    ],
)  # fmt: skip
def test_settings_are_checked(spheres, options, error, message):
    with pytest.raises(error, match=message):
        ts.SphereParallel(Named(), spheres, **options)


def test_any_name_is_taken_where_forward_takes_any(spheres):
    x, mask = torch.randn(ROWS, 4), torch.randn(3, 4)
    module = Calls(lambda s, x, mask: s.layer(x) * mask.sum())
    model = ts.SphereParallel(module, spheres, whole=("mask",))
    torch.testing.assert_close(model(x, mask=mask), module(x, mask=mask))
    model = ts.SphereParallel(module, spheres, whole=("args",))
    with pytest.raises(ValueError, match="found no tensor with rows"):
        model(x, mask)


def test_names_are_those_of_a_patched_forward(spheres):
    module = nn.Linear(4, 4)
    plain = module.forward

    def forward(x, table):
        return plain(x) * table.sum()

    module.forward = forward
    model = ts.SphereParallel(module, spheres, whole=("table",))
    x, table = torch.randn(ROWS, 4), torch.randn(3)
    torch.testing.assert_close(model(x, table), module(x, table))


def test_settings_are_copied_with_the_model(spheres):
    model = copy.deepcopy(ts.SphereParallel(nn.LSTM(4, 3), spheres, batch_dim=1))
    out, _ = model(T)
    torch.testing.assert_close(out, model.module(T)[0])


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (({"x": torch.ones(24, 4), "mask": torch.ones(12, 12)},), r"At \['mask'\].*of its own"),
        (([torch.ones(3, 8), torch.ones(4, 8)],), r"At \[1\].*stacked, or padded"),
    ],
)
def test_what_is_inside_a_list_or_dict_is_named(spheres, args, match):
    parallel = ts.SphereParallel(nn.Linear(4, 4), spheres)
    with pytest.raises(ValueError, match=match):
        parallel(*args)
