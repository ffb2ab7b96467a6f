"""`parallelize_`: the model stays what it is, and has the bits of SphereParallel."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import types
import weakref

import fork_server
import pytest
import torch
from loop_support import assert_same_gradients
from rank_output import printed
from reference import digest
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset
from zoo import cnn

import torch_spheres as ts

X = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.factor = nn.Linear(6, 2).double(), 2

    def forward(self, x, mask=None, *, labels=None):
        """What it computes."""
        return self.fc(x).tanh() * self.factor


def items_run(spheres, work):
    before = spheres.stats().items_run
    work()
    return spheres.stats().items_run - before


def test_the_bits_are_those_of_sphere_parallel(spheres):
    x, y = torch.randn(50, 1, 12, 12), torch.randint(0, 10, (50,))

    def train(make):
        torch.manual_seed(0)
        bare = nn.Sequential(cnn(), nn.Dropout(0.3))
        model = make(bare)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return digest([*losses, *bare.parameters(), *bare.buffers()])

    in_place = train(lambda m: ts.parallelize_(m, spheres))
    assert in_place == train(lambda m: ts.SphereParallel(m, spheres))


def test_the_model_stays_what_it_is(spheres):
    model, bare = Net(), Net()
    names = [n for n, _ in model.named_modules()], list(model.state_dict())
    assert ts.parallelize_(model, spheres) is model
    assert type(model) is Net
    assert names == ([n for n, _ in model.named_modules()], list(model.state_dict()))
    assert str(inspect.signature(model.forward)) == "(x, mask=None, *, labels=None)"
    assert model.forward.__doc__ == "What it computes."
    engine = model.forward.engine
    assert (engine.spheres, engine.reproducible, engine.plan) == (spheres, True, None)
    bare.load_state_dict(model.state_dict())
    assert items_run(spheres, lambda: model(X).sum().backward()) == 24
    bare(X).sum().backward()
    assert_same_gradients(model, bare)


def test_it_follows_the_model(spheres):
    model, bare = ts.parallelize_(Net(), spheres), Net()
    bare.load_state_dict(model.state_dict())
    for change in (
        lambda m: setattr(m, "factor", 5),
        lambda m: setattr(m, "fc", nn.Linear(6, 3)),
        lambda m: nn.init.normal_(m.fc.bias),
        nn.Module.double,
        lambda m: parametrizations.weight_norm(m.fc),
        lambda m: m.fc.requires_grad_(False),
        nn.Module.eval,
    ):
        for net in (model, bare):
            torch.manual_seed(0)
            change(net)
        x = X.to(bare.fc.bias.dtype)
        torch.testing.assert_close(model(x), bare(x))
    assert not model(X).requires_grad


def test_hooks_on_the_model_run_once_and_on_parts_in_each_shard(spheres):
    model, seen = ts.parallelize_(Net(), spheres), []
    model.register_forward_pre_hook(lambda m, args: seen.append((m, len(args[0]))))
    model.register_forward_hook(lambda m, args, out: seen.append((m, len(out))))
    model.register_full_backward_hook(lambda m, gi, go: seen.append((m, len(go[0]))))
    model.fc.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    for _ in range(2):
        seen.clear()
        model(X.clone().requires_grad_()).sum().backward()
        whole = [s for s in seen if s != 2]
        assert len(seen) - len(whole) == 12 and whole == 3 * [(model, 24)]


def test_a_forward_that_was_set_before_runs_in_the_shards_and_comes_back(spheres):
    model, rows = Net(), []

    def patched(self, x):
        rows.append(len(x))
        return Net.forward(self, x) + 1

    bare = copy.deepcopy(model)
    model.forward = types.MethodType(patched, model)
    before = vars(model)["forward"]
    ts.parallelize_(model, spheres)
    assert str(inspect.signature(model.forward)) == "(x)"
    out = model(X)
    assert rows.count(2) >= 12  # and what is compared in advance
    out.sum().backward()
    (bare(X) + 1).sum().backward()
    assert_same_gradients(model, bare)
    model.forward.remove()
    assert vars(model)["forward"] is before and items_run(spheres, lambda: model(X)) == 0


def test_the_way_back(spheres):
    model = ts.parallelize_(Net(), spheres)
    forward = model.forward
    forward.remove()
    assert "forward" not in vars(model) and items_run(spheres, lambda: model(X)) == 0
    with pytest.raises(RuntimeError, match="is another one by now"):
        forward.remove()
    assert items_run(spheres, lambda: ts.parallelize_(model, spheres)(X)) == 12
    del model.forward  # as of any attribute
    assert items_run(spheres, lambda: model(X)) == 0
    assert items_run(spheres, lambda: ts.SphereParallel(model, spheres)(X)) == 12


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
@pytest.mark.parametrize("inside", [lambda m: m, nn.Sequential])
def test_copies_are_parallelized_too(spheres, copied, inside):
    model = ts.parallelize_(Net(), spheres)
    outer = inside(model)
    outer(X)
    other = copied(outer)
    net = other if other is not outer and isinstance(other, Net) else other[0]
    theirs = net.forward.engine.spheres
    assert (theirs is spheres) == (copied is copy.deepcopy)
    assert (theirs.levels, theirs.concurrency) == (2, 3)
    with torch.no_grad():
        net.fc.weight.add_(1)
    out = other(X)
    assert items_run(theirs, lambda: other(X)) == 12
    assert not torch.equal(out, outer(X))
    out.sum().backward()
    assert net.fc.weight.grad is not None and model.fc.weight.grad is None
    if theirs is not spheres:
        theirs.stop()


def test_nobody_keeps_a_model_that_is_dropped(spheres):
    model = ts.parallelize_(Net(), spheres)
    model(X).sum().backward()
    forward, seen = model.forward, weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="the model of this forward is gone"):
        forward(X)


def test_a_part_of_a_larger_model(spheres):
    model = nn.Sequential(ts.parallelize_(Net(), spheres), nn.Linear(2, 1).double())
    bare = copy.deepcopy(model)
    bare[0].forward.remove()
    for net in (model, bare):
        net(X).sum().backward()
    assert_same_gradients(model, bare)
    assert items_run(spheres, lambda: model(X)) == 12


def test_the_fastest_way_may_be_the_whole_batch(spheres):
    """Then the model's own forward runs, and what it sets is set on the model."""

    class Noting(Net):
        def forward(self, x):
            if len(x) == 24:
                self.rows = 24
            return super().forward(x)

    model = ts.parallelize_(Noting(), spheres, reproducible=False)
    model(X).sum().backward()  # the first way that is measured
    assert model.rows == 24
    while model.forward.engine.plan is None:
        model(X).sum().backward()
    assert model.forward.engine.plan_costs


def test_compiled_code_around_runs_the_shards(spheres):
    model = ts.parallelize_(Net(), spheres)
    expected = model(X)
    for around in (torch.compile(model, backend="eager"), nn.Sequential(model, nn.Identity())):
        if isinstance(around, nn.Sequential):
            around.compile(backend="eager")
        around(X)
        assert items_run(spheres, lambda around=around: around(X)) == 12
        assert torch.equal(around(X), expected)
    model.compile(backend="eager")
    assert torch.equal(model(X), expected)
    assert items_run(spheres, lambda: model(X)) == 12


@pytest.mark.parametrize("make", [ts.parallelize_, ts.SphereParallel])
def test_autocast_that_accelerate_puts_around_the_forward(spheres, make):
    model = make(Net(), spheres)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    original = model.forward
    model._original_forward = original
    model.forward = types.MethodType(
        torch.autocast("cpu", torch.bfloat16)(original.__func__), model
    )
    assert str(inspect.signature(model.forward)) == "(x, mask=None, *, labels=None)"
    assert items_run(spheres, lambda: model(X)) == 12
    other = copy.deepcopy(model)  # whose forward has to be its own
    with torch.no_grad():
        other.fc.weight.zero_()
    out = other(X)
    assert items_run(spheres, lambda: other(X)) == 12
    torch.testing.assert_close(out, (other.fc.bias.tanh() * 2).expand(24, 2))
    ts.GradientHook(optimizer, model).remove()
    with pytest.raises(TypeError, match="in it, which runs in parallel already"):
        ts.parallelize_(model, spheres)


def test_the_hook_takes_a_parallelized_model(spheres):
    model = ts.parallelize_(Net(), spheres)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = ts.GradientHook(optimizer, model)
    bare = Net()
    bare.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(bare.parameters(), lr=0.1)
    for net, opt in ((model, optimizer), (bare, plain)):
        net(X).sum().backward()
        opt.step()
    torch.testing.assert_close(model.state_dict(), bare.state_dict())
    hook.remove()


RANK = """
import torch, torch.distributed as dist, torch_spheres as ts
from torch import nn
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())  # rank 0's weights are everybody's
model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 3))
torch.manual_seed(0)
x, y = torch.randn(48, 5), torch.randint(0, 3, (48,))
with ts.KissingSpheres(concurrency=1) as spheres:
    ts.parallelize_(model, spheres)
    mine = next(iter(ts.SphereBatchSampler(range(48), 48, spheres=spheres)))
    nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
    try:
        ts.parallelize_(nn.LazyLinear(3), spheres)
    except ValueError as error:
        assert "each rank's rows; call it once before parallelize_" in str(error), error
    else:
        assert dist.get_world_size() == 1
print([round(p.grad.double().square().sum().item(), 5) for p in model.parameters()])
dist.destroy_process_group()
"""


def test_any_number_of_processes_shares_a_batch():
    seen = {printed(r.stdout) for world in (1, 3) for r in fork_server.run_ranks(world, RANK)}
    assert len(seen) == 1 and "[0." in seen.pop()


def test_checkpoints_are_exchanged_with_the_bare_model(spheres, tmp_path):
    model, bare = ts.parallelize_(Net(), spheres), Net()
    path = tmp_path / "train.pt"
    ts.save_checkpoint(path, step=3, model=model)
    assert ts.load_checkpoint(path, model=bare) == 3
    torch.testing.assert_close(bare.state_dict(), model.state_dict())
    parallel = ts.SphereParallel(Net(), spheres)
    ts.load_checkpoint(path, model=parallel)
    ts.save_checkpoint(path, step=4, model=parallel)
    assert ts.load_checkpoint(path, model=ts.parallelize_(Net(), spheres)) == 4


def test_mistakes(spheres):
    model = ts.parallelize_(Net(), spheres)
    refused = "runs in parallel already and does not work inside another parallel module"
    for wrong in (model, nn.Sequential(model), ts.SphereParallel(Net(), spheres)):
        for make in (ts.parallelize_, ts.SphereParallel):
            with pytest.raises(TypeError, match=refused):
                make(wrong, spheres)
    with pytest.raises(TypeError, match=r"model\.forward\.remove\(\) takes off"):
        ts.parallelize_(model, spheres)  # a cell of a notebook that is run again
    with pytest.raises(TypeError, match="has a DataParallel in it"):
        ts.parallelize_(nn.Sequential(nn.DataParallel(Net())), spheres)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(X), 12)
    with pytest.raises(TypeError, match=refused):
        ts.prepare(model, optimizer, loader)
    with pytest.raises(TypeError, match=r"parallelize_\(\) was called on, or a KissingSpheres"):
        ts.GradientHook(optimizer, Net())
    with pytest.raises(TypeError, match="the Net is compiled as a whole"):
        compiled = Net()
        compiled.compile(backend="eager")
        ts.parallelize_(compiled, spheres)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        ts.parallelize_(3)
    with pytest.raises(TypeError, match="spheres must be a KissingSpheres, got str"):
        ts.parallelize_(Net(), "spheres")
    with pytest.raises(TypeError, match="True or False, got 'no'"):
        ts.parallelize_(Net(), spheres, reproducible="no")
