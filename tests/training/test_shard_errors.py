"""Errors inside shards: the same object, with where it was; and nothing is broken afterwards."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loop_support import W, no_graph_left_behind, soon
from reference import digest
from torch import nn

import torch_spheres as ts
from torch_spheres.training.sharded_call import ShardedCall

X = torch.arange(50.0)[:, None].repeat(1, 4) / 50


class PlannedError(Exception):
    pass


@pytest.fixture
def plan():
    """Where which error is to be raised; not in the module, of which each shard has a copy."""
    PLAN.clear()
    yield PLAN
    PLAN.clear()


PLAN: dict[str, BaseException] = {}


class Fails(nn.Module):
    """Raises what is planned, in the forward or the backward of the shard with a certain row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        out = self.norm(self.layer(x))
        if not (x[:, 0] == X[23, 0]).any():
            return out
        if "forward" in PLAN:
            raise PLAN["forward"]
        return Raises.apply(out)


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if "backward" in PLAN:
            raise PLAN["backward"]
        return g


def step(parallel, way):
    if way == "forward_backward":
        return parallel.forward_backward(lambda out, y: (out * y).mean(), X, X)
    loss = (parallel(X) * X).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("way", ["backward", "forward_backward"])
def test_the_same_object_with_notes_and_a_model_that_goes_on(spheres, plan, way, where):
    parallel, other = (ts.SphereParallel(Fails(), spheres) for _ in range(2))
    for _ in range(3):
        plan[where] = error = PlannedError("here")
        with pytest.raises(PlannedError, match="here") as caught:
            step(parallel, way)
        assert caught.value is error
        names = [entry.name for entry in caught.traceback]
        assert names[-1] == where and "step" in names
        assert error.__notes__[0] == f"in the {where} of shard 5, rows 22 to 25 of the batch"
        if where == "forward":
            assert "x: (50, 4) along dimension 0" in error.__notes__[1]
        assert "raised by work item" in error.__notes__[-1] and "on sphere" in error.__notes__[-1]
        assert all(p.grad is None for p in parallel.parameters())
        assert len(parallel._engine.pool) <= spheres.concurrency
    if where == "forward" or way == "forward_backward":
        assert digest(list(parallel.buffers())) == digest(list(other.buffers())), "not merged"
    plan.clear()
    parallel.load_state_dict(other.state_dict())
    results = []
    for net in (parallel, other):
        loss = step(net, way)
        results.append(digest([loss, *net.buffers(), *(p.grad for p in net.parameters())]))
    assert results[0] == results[1]
    assert spheres.map(abs, range(-3, 0)) == [3, 2, 1]


def test_several_shards_fail_at_once(spheres):
    class AllFail(nn.Module):
        def forward(self, x):
            meet.wait(20)
            raise PlannedError(str(x[0, 0].item()))

    meet = threading.Barrier(3)
    parallel = ts.SphereParallel(AllFail(), spheres)
    with pytest.raises(PlannedError) as caught:
        parallel(X)
    assert sum(note.startswith("also: PlannedError") for note in caught.value.__notes__) == 2
    assert len(parallel._engine.pool) == 3


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_comes_out_as_well(spheres, plan, kind):
    parallel = ts.SphereParallel(Fails(), spheres)
    for way in ("backward", "forward_backward"):
        plan["forward"] = kind()
        with pytest.raises(kind):
            step(parallel, way)
        plan.clear()
        step(parallel, way)
        assert len(parallel._engine.pool) <= spheres.concurrency


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("way", ["backward", "forward_backward"])
def test_nothing_of_a_failed_call_is_kept(spheres, plan, way, where):
    parallel = ts.SphereParallel(Fails(), spheres)
    plan[where] = PlannedError("here")
    with no_graph_left_behind(), pytest.raises(PlannedError):
        try:
            step(parallel, way)
        finally:
            plan.clear()  # it has the error, which has the frames


class Writes(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.add_(0)
        return super().forward(x)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(4)

    def forward(self, x):
        raise RuntimeError("before it is initialised")


@pytest.mark.parametrize("module", [Writes(4, 4), Lazy()], ids=["writes", "lazy"])
@pytest.mark.parametrize("way", ["backward", "forward_backward"])
def test_nothing_of_a_refused_call_is_kept(spheres, way, module):
    def calls():
        return sum(issubclass(type(o), ShardedCall) for o in gc.get_objects())

    parallel = ts.SphereParallel(module, spheres)
    gc.collect()
    before = calls()
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match=r"wrote to its parameters|before it is initialised"):
            step(parallel, way)
        assert soon(lambda: calls() <= before)
    finally:
        gc.enable()


def test_a_loss_that_fails_leaves_no_graph_behind(spheres):
    parallel = ts.SphereParallel(Fails(), spheres)
    out = parallel(X)
    with pytest.raises(RuntimeError, match="size of tensor"):
        (out - torch.ones(3)).sum().backward()
    call = weakref.ref(out.grad_fn.call)
    del out
    assert soon(lambda: call() is None)
    step(parallel, "backward")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_script_modules_are_refused(spheres):
    with pytest.raises(TypeError, match=r"RecursiveScriptModule in it.*torch\.compile"):
        ts.SphereParallel(nn.Sequential(torch.jit.script(nn.Linear(2, 2))), spheres)


def test_distributed_data_parallel_belongs_outside(spheres):
    inner = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(inner)  # (a whole one would need a process group)
    with pytest.raises(TypeError, match=r"has a DistributedDataParallel in it.*around the Sphere"):
        ts.SphereParallel(nn.Sequential(inner), spheres)


def test_calls_from_inside_the_spheres_say_so(spheres):
    parallel = ts.SphereParallel(nn.Linear(4, 4), spheres)
    with pytest.raises(RuntimeError, match="from inside a work item"):
        spheres.map(lambda _: parallel(X), range(1))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("where", ["forward", "loss"])
def test_a_parallel_model_inside_another_one(spheres, in_place, where):
    """On the same spheres, which it would wait for; on others it is plain torch."""

    def outer_of(inner):
        teacher = ts.parallelize_(inner, spheres) if in_place else ts.SphereParallel(inner, spheres)
        if where == "forward":
            return W(lambda s, x: s.n(x) + teacher(x)), nn.functional.mse_loss
        return W(lambda s, x: s.n(x)), lambda out, y: (out - teacher(y)).square().mean()

    outer, loss = outer_of(nn.Linear(4, 4))
    parallel = ts.SphereParallel(outer, spheres)
    with pytest.raises(
        RuntimeError, match=r"a parallel model is called inside .* spheres of its own"
    ):
        parallel.forward_backward(loss, X, X)
    with ts.KissingSpheres(concurrency=2) as others:
        parallel = ts.SphereParallel(outer, others)
        torch.manual_seed(0)
        parallel.forward_backward(loss, X, X)
        found = [p.grad.clone() for p in outer.parameters()]
    outer.zero_grad()
    loss(outer(X), X).backward()
    for p, grad in zip(outer.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_random_numbers_of_a_parallel_model_inside_another_one():
    """Are the outer shard's, whichever thread comes first."""
    found = []
    for concurrency in (1, 3, 12):
        with ts.KissingSpheres(concurrency=concurrency) as mine, ts.KissingSpheres() as others:
            inner = ts.SphereParallel(nn.Dropout(), others)
            outer = ts.SphereParallel(W(lambda s, x, inner=inner: inner(x)), mine)
            torch.manual_seed(0)
            found.append(torch.stack([outer(X) for _ in range(3)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_two_threads_train_two_models_on_the_same_spheres(spheres):
    def train(model):
        parallel = ts.SphereParallel(copy.deepcopy(model), spheres)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            parallel(X).square().mean().backward()
            optimizer.step()
        return digest(list(parallel.parameters()))

    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2)]
    alone = [train(model) for model in models]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(train, models)) == alone
