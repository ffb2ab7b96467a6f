"""What the caller's thread has set, the shards see; and what cannot follow says so."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections import Counter

import pytest
import torch
import torch._dynamo
from loop_support import assert_same_gradients, pair
from reference import digest
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import graph
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torch_spheres as ts

pytestmark = pytest.mark.usefixtures("no_comparison")
X = torch.randn(36, 8, generator=torch.Generator().manual_seed(0))


class Sees(nn.Module):
    """Keeps what a function returns in each shard's forward."""

    def __init__(self, look):
        super().__init__()
        self.look = look
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.look()
        return self.w * x


def seen_by_shards(spheres, look, block):
    seen = Counter()
    parallel = ts.SphereParallel(Sees(lambda: seen.update([look()])), spheres)
    with block:
        parallel(X)
    inside = set(seen)
    assert seen.total() == 12 and len(inside) == 1
    seen.clear()
    parallel(X)
    assert set(seen) != inside, "what was set is gone after the block"
    return inside.pop()


def autocast_state():
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def default_device():
    return torch.get_default_device().type, torch.empty(1).device.type


@pytest.mark.parametrize(
    ("look", "block", "expected"),
    [
        (torch.is_grad_enabled, torch.no_grad(), False),
        (torch.is_inference_mode_enabled, torch.inference_mode(), True),
        (autocast_state, torch.autocast("cpu", torch.float16), (True, torch.float16)),
        (default_device, torch.device("meta"), ("meta", "meta")),
    ],
    ids=["no_grad", "inference_mode", "autocast", "default device"],
)
def test_modes_reach_the_shards_and_end_with_their_block(spheres, look, block, expected):
    assert seen_by_shards(spheres, look, block) == expected


def test_set_default_device_reaches_the_shards(spheres):
    seen = Counter()
    parallel = ts.SphereParallel(Sees(lambda: seen.update([default_device()])), spheres)
    try:
        torch.set_default_device("meta")
        parallel(X)
    finally:
        torch.set_default_device(None)
    assert seen == {("meta", "meta"): 12}
    parallel(X)
    assert seen[("cpu", "cpu")] == 12


def test_default_dtype_reaches_the_shards(spheres):
    seen = Counter()
    parallel = ts.SphereParallel(Sees(lambda: seen.update([torch.ones(1).dtype])), spheres)
    try:
        torch.set_default_dtype(torch.float64)
        parallel(X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == {torch.float64: 12}


@pytest.mark.parametrize("concurrency", [1, 3])
def test_context_variables_reach_the_shards(concurrency):
    """torch's compiler keeps its configuration in some."""
    mine = contextvars.ContextVar("mine", default="default")
    seen = Counter()

    class Looks(nn.Module):
        def forward(self, x):
            seen.update([("forward", mine.get(), torch._dynamo.config.recompile_limit)])
            x.register_hook(lambda g: seen.update([("backward", mine.get())]))
            return x * 2

    with ts.KissingSpheres(concurrency=concurrency) as spheres:
        parallel = ts.SphereParallel(Looks(), spheres)
        mine.set("forward's")
        with torch._dynamo.config.patch(recompile_limit=77):
            out = parallel(X.clone().requires_grad_())
        mine.set("backward's")
        out.sum().backward()
    assert seen == {("forward", "forward's", 77): 12, ("backward", "backward's"): 12}


def test_function_and_dispatch_modes_reach_the_shards(spheres):
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    # Not a Counter: hashes of operators run Python code, in the middle of an addition.
    seen = []
    parallel = ts.SphereParallel(nn.Linear(8, 8), spheres)
    with Functions(), Operators():
        out = parallel(X)
    counts = Counter(seen)
    assert counts[nn.functional.linear] == counts[torch.ops.aten.addmm.default] == 12
    seen.clear()
    out.sum().backward()
    assert not seen, "the block has ended"
    with Operators():
        parallel(X).sum().backward()
    counts = Counter(seen)
    assert counts[torch.ops.aten.addmm.default] == counts[torch.ops.aten.mm.default] == 12


class LockedFlopCounter(FlopCounterMode):
    """torch's own adds up without a lock, and may lose what two threads count at once."""

    lock = threading.Lock()

    def _count_flops(self, *args):
        with self.lock:
            return super()._count_flops(*args)


def test_flops_are_counted(spheres):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    counts = []
    for net in (model, ts.SphereParallel(model, spheres)):
        with LockedFlopCounter(display=False) as counter:
            net(X).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_saved_tensor_hooks_reach_the_shards(spheres):
    seen = []

    def pack(x):
        seen.append("pack")
        return x.clone() * 2

    def unpack(x):
        seen.append("unpack")
        return x / 2

    parallel, bare = pair(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), spheres)
    for net in (parallel, bare):
        with graph.saved_tensors_hooks(pack, unpack):
            out = net(X.double())
        packed = len(seen)
        assert seen == ["pack"] * packed and packed >= (12 if net is parallel else 1)
        seen.clear()
        out.sum().backward()
        assert seen == ["unpack"] * packed
        seen.clear()
        with graph.save_on_cpu():
            net(X.double()).sum().backward()
    assert_same_gradients(parallel, bare)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_anomaly_mode_finds_the_shard(spheres):
    class Root(nn.Module):
        def forward(self, x):
            return (x.relu() * 0).sqrt() * 0

    with torch.autograd.detect_anomaly():
        out = ts.SphereParallel(Root(), spheres)(X.clone().requires_grad_())
        with pytest.raises(RuntimeError, match=r"'SqrtBackward0' returned nan values") as caught:
            out.sum().backward()
    assert any("in the backward of shard" in note for note in caught.value.__notes__)


def test_autocast_computes_what_the_bare_module_does():
    """On one leaf the very same; the backward runs outside of the block, as usual."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = self.low(x)
            with torch.autocast("cpu", enabled=False):
                return self.high(x.float())

    torch.manual_seed(0)
    model = Mixed()
    prints = []
    for levels in (0, 1, 2):
        net = copy.deepcopy(model)
        with ts.KissingSpheres(max(1, levels), concurrency=3) as spheres:
            run = ts.SphereParallel(net, spheres) if levels else net
            with torch.autocast("cpu", torch.bfloat16):
                out = run(X)
            out.square().sum().backward()
        prints.append(digest([out, *(p.grad for p in net.parameters())]))
        grads = [p.grad for p in net.parameters()]
        if levels == 0:
            bare = grads
        torch.testing.assert_close(grads, bare, rtol=0.02, atol=0.02)
    assert prints[0] == prints[1]


def test_autocast_gives_the_output_the_dtype_and_the_weights_their_own(spheres):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    bare = copy.deepcopy(model)
    for net in (ts.SphereParallel(model, spheres), bare):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(X)
            loss = nn.functional.cross_entropy(out, torch.zeros(36, dtype=torch.int64))
        assert out.dtype == torch.bfloat16
        loss.backward()
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.01)


def test_evaluation_runs_in_parallel_without_a_graph(spheres):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()).eval()
    parallel = ts.SphereParallel(model, spheres)
    before = digest(list(model.buffers()))
    for mode in (torch.no_grad, torch.inference_mode):
        items = spheres.stats().items_run
        with mode():
            out = parallel(X)
            assert out.is_inference() == (mode is torch.inference_mode)
            torch.testing.assert_close(out, model(X))
        assert spheres.stats().items_run == items + 12
    assert digest(list(model.buffers())) == before


def test_a_model_made_in_inference_mode(spheres):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        parallel = ts.SphereParallel(model, spheres)
        for _ in range(2):
            parallel.train()(X)
            torch.testing.assert_close(parallel.eval()(X), model(X))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        parallel(X.clone().requires_grad_())


def test_a_profiler_of_all_threads_shows_the_shards(spheres):
    parallel = ts.SphereParallel(nn.Linear(8, 8), spheres)
    everything = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everything) as profiler:
        parallel(X).sum().backward()
        parallel.forward_backward(lambda out, y: out.mean(), X, X)
    names = Counter(event.name for event in profiler.events())
    for k in range(12):
        assert names[f"SphereParallel shard {k} forward"] == 2
        assert names[f"SphereParallel shard {k} backward"] == 2
        assert names[f"SphereParallel shard {k} loss"] == 1
    assert names["aten::addmm"] == 24


@pytest.mark.parametrize(
    "transform",
    [
        lambda net: torch.vmap(net)(X[None]),
        lambda net: torch.func.grad(lambda x: net(x).sum())(X),
        lambda net: torch.func.jvp(net, (X,), (X,)),
        lambda net: torch.func.vjp(net, X),
        lambda net: torch.func.jacrev(net)(X),
    ],
    ids=["vmap", "grad", "jvp", "vjp", "jacrev"],
)
def test_transforms_around_the_model_are_refused(spheres, transform):
    parallel = ts.SphereParallel(nn.Linear(8, 8), spheres)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms.*bare model\.module"):
        transform(parallel)


def test_transforms_inside_the_model_work(spheres):
    class Forces(nn.Module):
        """The gradient of an energy with respect to the input."""

        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            by_func = torch.func.vmap(torch.func.grad(lambda row: self.energy(row).sum()))(x)
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                (by_autograd,) = torch.autograd.grad(self.energy(y).sum(), y, create_graph=True)
            return by_func + by_autograd

    parallel, bare = pair(Forces(), spheres)
    for net in (parallel, bare):
        net(X.double()).square().sum().backward()
    assert_same_gradients(parallel, bare)


def test_functional_call_with_other_parameters(spheres):
    parallel, bare = pair(nn.Linear(8, 2), spheres)
    grads = []
    for net in (parallel, bare):
        fast = {k: (2 * p.detach()).requires_grad_() for k, p in net.named_parameters()}
        for _ in range(2):
            torch.func.functional_call(net, fast, (X.double(),)).square().sum().backward()
        grads.append([p.grad for p in fast.values()])
    torch.testing.assert_close(*grads)
    assert parallel.module.weight.grad is None


def test_checkpoints_around_the_model(spheres):
    parallel, bare = pair(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0), nn.Tanh()), spheres)
    for net in (parallel, bare):
        x = X.double().requires_grad_()
        checkpoint(net, x, use_reentrant=True).square().sum().backward()
    assert_same_gradients(parallel, bare)
    with pytest.raises(NotImplementedError, match="checkpoint inside the module"):
        checkpoint(parallel, X.double(), use_reentrant=False)
