"""What a forward, or Ctrl-C in it, does to settings of threads and to generators of the process."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_spheres as ts
from torch_spheres.training.engine import Engine


def test_a_forward_that_sets_the_number_of_threads_does_so_for_its_own_shard():
    """A sum over several threads has other bits; the next shard on that sphere began with them."""
    before = torch.get_num_threads()

    class Sets(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.1]))
            self.began = []

        def forward(self, x):
            self.began.append(torch.get_num_threads())
            torch.set_num_threads(4)
            return x * self.w

    try:
        for concurrency in (1, 3):
            with ts.KissingSpheres(concurrency=concurrency) as spheres:
                model = ts.SphereParallel(Sets(), spheres)
                for _ in range(3):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of the list
                        model(torch.ones(24, 2)).sum().backward()
                # (The comparison with the bare module, on this thread, is of other row counts.)
                assert model.module.began.count(1) >= 36
                other = ts.SphereParallel(Sets(), spheres)
                other.module.began = began = []
                with torch.no_grad():
                    spheres.map(lambda _: None, range(12))
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        other(torch.ones(24, 2))
                assert began.count(1) >= 12
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("source", ["python", "numpy"])
@pytest.mark.parametrize("how", ["forward", "forward_backward"])
def test_draws_from_other_generators_are_told_of_once(source, how):
    """Each shard draws, in the order in which threads come by: a run does not repeat."""

    class Drops(nn.Linear):
        def forward(self, x):
            drawn = random.random() if source == "python" else np.random.rand()
            return super().forward(x) * (drawn < 2)

    with (
        ts.KissingSpheres(concurrency=2) as spheres,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        model, quiet = (
            ts.SphereParallel(Drops(4, 2), spheres),
            ts.SphereParallel(nn.Linear(4, 2), spheres),
        )
        for each in (quiet, model, model):
            for _ in range(5):
                if how == "forward":
                    each(torch.ones(24, 4)).sum().backward()
                else:
                    each.forward_backward(F.mse_loss, torch.ones(24, 4), torch.ones(24, 2))
    told = [str(w.message) for w in caught if "each shard draws for itself" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith({"python": "Python's random", "numpy": "numpy.random"}[source])


def test_ctrl_c_leaves_grad_mode_as_it_was(monkeypatch):
    """It may come between two lines of `torch.no_grad`."""

    def interrupt(*_args, **_kwargs):
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    with ts.KissingSpheres(concurrency=1) as spheres:
        models = [
            ts.SphereParallel(nn.Linear(4, 2), spheres),
            ts.parallelize_(nn.Linear(4, 2), spheres),
        ]
        monkeypatch.setattr(Engine, "forward", interrupt)
        monkeypatch.setattr(Engine, "forward_backward", interrupt)
        calls = [lambda model=model: model(torch.ones(24, 4)) for model in models]
        calls.append(
            lambda: models[0].forward_backward(F.mse_loss, torch.ones(24, 4), torch.ones(24, 2))
        )
        for call in calls:
            with pytest.raises(KeyboardInterrupt):
                call()
            assert torch.is_grad_enabled()
