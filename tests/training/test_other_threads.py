"""What other threads draw at random while a model trains neither repeats nor skips."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loop_support import W
from torch import Tensor
from torch.nn import functional as F

import torch_spheres as ts
from torch_spheres.training.autotune import Plan
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.slow_warning import WatchedCall, _seconds_of_whole_batch

pytestmark = pytest.mark.filterwarnings("ignore:something drew random numbers:RuntimeWarning")
X = torch.ones(24, 4)


def watched(model: ts.SphereParallel) -> WatchedCall:
    arguments = CallArguments((X,), {})
    return WatchedCall(model._engine, arguments, Plan(12, 2), "forward", collective=False)


def test_passes_that_leave_no_trace_leave_the_numbers_of_other_threads():
    """Each forward and each loss has another thread draw, and waits for it."""
    drawn: list[Tensor] = []
    torch.manual_seed(3)
    with ThreadPoolExecutor(1) as other, ts.KissingSpheres(concurrency=2) as spheres:

        def forward(module: W, x: Tensor) -> Tensor:
            other.submit(lambda: drawn.append(torch.rand(2))).result()
            return module.n(x)

        def loss_fn(output: Tensor, y: Tensor) -> Tensor:
            other.submit(lambda: drawn.append(torch.rand(2))).result()
            return F.mse_loss(output, y)

        model = ts.SphereParallel(W(forward), spheres)
        for _ in range(3):
            model(X).sum().backward()
            model.forward_backward(loss_fn, X, X)
        model.eval()(X)
        model.suggest_shards(X, repeats=1)
        _seconds_of_whole_batch(watched(model), patience=1.0)
    # Initial weights, and so on, were drawn before.
    torch.manual_seed(3)
    W(forward)
    assert len(drawn) > 100
    expected = [torch.rand(2) for _ in drawn]
    assert [d.tolist() for d in drawn] == [e.tolist() for e in expected]


def test_what_a_measured_pass_draws_itself_is_put_back():
    with ts.KissingSpheres() as spheres:
        model = ts.SphereParallel(W(lambda module, x: F.dropout(module.n(x))), spheres)
        before = torch.get_rng_state()
        model.suggest_shards(X, repeats=1)
        _seconds_of_whole_batch(watched(model), patience=1.0)
        assert torch.equal(torch.get_rng_state(), before)
