"""SphereParallel: what goes in and comes out, and what it follows of the module.

The bits are in test_bits.py.
"""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from loop_support import soon
from reference import digest
from torch import nn
from torch.nn import functional as F
from zoo import cnn

import torch_spheres as ts


def test_gradients_are_those_of_plain_torch_up_to_rounding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).double()
    plain = copy.deepcopy(model)
    x, y = torch.randn(100, 20).double(), torch.randint(0, 3, (100,))
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(model, spheres)
        F.cross_entropy(parallel(x), y).backward()
        F.cross_entropy(plain(x), y).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
        # A second backward accumulates, as ever.
        once = [p.grad.clone() for p in model.parameters()]
        with parallel.no_sync():
            F.cross_entropy(parallel(x), y).backward()
        for p, g in zip(model.parameters(), once, strict=True):
            assert torch.equal(p.grad, g + g)


def test_autograd_grad_hooks_and_clipping_see_complete_gradients():
    model = nn.Linear(4, 2)
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(model, spheres)
        x = torch.randn(24, 4)
        seen = []
        model.weight.register_hook(lambda g: seen.append(g.clone()))
        parallel(x).square().sum().backward()
        assert len(seen) == 1 and torch.equal(seen[0], model.weight.grad)
        (again,) = torch.autograd.grad(parallel(x).square().sum(), [model.weight])
        assert torch.equal(again, model.weight.grad)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0


def test_inputs_outputs_and_their_gradients():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, pair, *, scale, tag):
            a, rest = pair
            out = self.w * (a + rest["b"]) * scale
            return {"out": out, "rows": torch.arange(len(a)), "loss": out.mean(), "tag": tag}

    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(Nested(), spheres)
        a, b = torch.randn(31, 3, requires_grad=True), torch.randn(31, 3)
        scale = torch.tensor(3.0, requires_grad=True)
        with pytest.warns(UserWarning, match="output 1 of the module is not the same"):
            result = parallel((a, {"b": b}), scale=scale, tag="x")  # the rows' numbers
        torch.testing.assert_close(result["out"], 6 * (a + b))
        assert result["tag"] == "x"
        assert len(result["rows"]) == 31 and not result["rows"].requires_grad
        torch.testing.assert_close(result["loss"], result["out"].mean())  # weighted by rows
        result["loss"].backward()
        torch.testing.assert_close(a.grad, torch.full_like(a, 6 / a.numel()))
        torch.testing.assert_close(scale.grad, (2 * (a + b)).mean().detach())


def test_evaluation_runs_on_the_spheres_without_a_graph():
    model = cnn().eval()
    x = torch.randn(40, 1, 12, 12)
    before = digest(list(model.buffers()))
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(model, spheres)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                out = parallel(x)
                assert not out.requires_grad
                torch.testing.assert_close(out, model(x))
        assert spheres.stats().items_run == 24
    assert digest(list(model.buffers())) == before


def test_mode_freezing_and_loading_are_followed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(model, spheres)
        x = torch.randn(36, 4)
        parallel(x).sum().backward()
        model[0].bias.requires_grad_(False)
        model.zero_grad()
        parallel.eval()
        tracked = model[1].num_batches_tracked.item()
        parallel(x).sum().backward()
        assert model[0].bias.grad is None and model[0].weight.grad is not None
        assert model[1].num_batches_tracked.item() == tracked == 1
        parallel.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
        assert torch.equal(parallel(x), torch.zeros(36, 4))
        model.to(torch.float64)
        assert parallel(x.double()).dtype == torch.float64


def test_state_dict_has_the_bare_keys_also_inside_another_module():
    model = cnn()
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(model, spheres)
        assert parallel.state_dict().keys() == model.state_dict().keys()
        outer, bare = nn.ModuleDict({"net": parallel}), nn.ModuleDict({"net": cnn()})
        assert outer.state_dict().keys() == bare.state_dict().keys()
        outer.load_state_dict(bare.state_dict())
        assert torch.equal(model[0].weight, bare["net"][0].weight)


@pytest.mark.usefixtures("no_comparison")
def test_shards_and_their_gradients_start_at_aligned_storage():
    """Kernels choose their path by it, and so their bits."""
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(x.data_ptr() % 64)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad.data_ptr() % 64)
            return grad

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(7))

        def forward(self, x):
            return Looks.apply(x) * self.w

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(7))

        def forward(self, x):
            return Looks.apply(x * self.w)

    x = torch.randn(50, 7)  # rows of 28 bytes
    with ts.KissingSpheres() as spheres:
        ts.SphereParallel(Model(), spheres)(x)
        assert seen == [0] * 12
        out = ts.SphereParallel(Last(), spheres)(x)
        seen.clear()
        out.backward(torch.randn(50, 7))
        assert seen == [0] * 12


def test_weights_are_shared_not_copied():
    model = nn.Linear(1000, 1000)
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(model, spheres)
        parallel(torch.randn(12, 1000)).sum().backward()
        assert 0 < len(parallel._engine.pool) <= spheres.concurrency
        for replica in parallel._engine.pool._idle:
            assert replica.module.weight.data_ptr() == model.weight.data_ptr()


def test_graphs_are_freed_after_backward():
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(nn.Linear(4, 2), spheres)
        loss = parallel(torch.randn(24, 4)).sum()
        call = weakref.ref(loss.grad_fn.next_functions[0][0].call)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        del loss
        assert soon(lambda: call() is None)


def test_autocast_reaches_the_shards():
    model = nn.Linear(8, 8)
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(model, spheres)
        with torch.autocast("cpu", torch.bfloat16):
            out = parallel(torch.randn(24, 8))
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert model.weight.grad.dtype == torch.float32


def test_an_error_in_the_model_comes_back_whole():
    class Broken(nn.Module):
        def forward(self, x):
            if x[0, 0] == 5:
                raise ValueError("five")
            return x

    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(Broken(), spheres)
        with pytest.raises(ValueError, match="five") as caught:
            parallel(torch.arange(12.0)[:, None])
        notes = caught.value.__notes__
        assert notes[0] == "in the forward of shard 5, rows 5 to 5 of the batch"
        assert "work item 5 (5) on sphere" in notes[-1]
        assert torch.equal(parallel(torch.zeros(12, 1)), torch.zeros(12, 1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(5)), "There are 4 rows, .* but .* of shape \\(5,\\), 5"),
        ((torch.tensor(1.0),), "no tensor with rows"),
        ((torch.zeros(0, 2),), "0 rows"),
    ],
)
def test_inputs_that_cannot_be_split(args, message):
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(nn.Identity(), spheres)
        with pytest.raises(ValueError, match=message):
            parallel(*args)


def test_constructor_errors():
    with pytest.raises(TypeError, match="got int"):
        ts.SphereParallel(3)
    with pytest.raises(TypeError, match="got str"):
        ts.SphereParallel(nn.Identity(), "spheres")
    with pytest.raises(TypeError, match="True or False, got 'no'"):
        ts.SphereParallel(nn.Identity(), reproducible="no")
    with pytest.raises(TypeError, match="SphereParallel in it"):
        ts.SphereParallel(nn.Sequential(ts.SphereParallel(nn.Identity())))


def double(_module, _args, output):
    return 2 * output


def test_copy_and_pickle():
    with ts.KissingSpheres(levels=2, concurrency=3) as spheres:
        parallel = ts.SphereParallel(nn.Linear(2, 2), spheres).eval()
        parallel.register_forward_hook(double)
        other = copy.deepcopy(parallel)
        assert other.spheres is spheres and not other.training
        assert len(other._forward_hooks) == 1
        assert other.module.weight is not parallel.module.weight
        x = torch.randn(24, 2)
        parallel(x).sum().backward()
        assert other.module.weight.grad is None and torch.equal(other(x), parallel(x))
        torch.testing.assert_close(other(x), 2 * other.module(x))
        loaded = pickle.loads(pickle.dumps(parallel))
        assert (loaded.spheres.levels, loaded.spheres.concurrency) == (2, 3)
        assert torch.equal(loaded(x), parallel(x)) and not loaded.training
        loaded.spheres.stop()
