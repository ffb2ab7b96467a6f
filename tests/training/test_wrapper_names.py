"""SphereParallel from outside: names, attributes and methods are those of the bare module."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import torch_spheres as ts

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


class Head(nn.Module):
    """What users put on their models."""

    config = "small"

    def __init__(self):
        super().__init__()
        self.fc, self.factor = nn.Linear(6, 2), 1

    @property
    def scale(self):
        return self.factor

    @scale.setter
    def scale(self, value):
        self.factor = value * 10

    def custom(self, more):
        return self.factor + more

    def forward(self, x: torch.Tensor, mask=None, *, labels=None):
        """What it computes."""
        return self.fc(x) * self.factor


def names_and_objects(module):
    listed = ("named_parameters", "named_buffers", "named_modules", "named_children")
    return {what: [(n, id(v)) for n, v in getattr(module, what)()] for what in listed}


def test_names_are_those_of_the_bare_module(spheres):
    parallel = ts.SphereParallel(net(), spheres)
    assert names_and_objects(parallel) == names_and_objects(parallel.module)
    assert list(parallel.state_dict()) == list(net().state_dict())
    assert [id(m) for m in parallel.modules()] == [id(m) for m in parallel.module.modules()]
    outer, bare = nn.ModuleDict({"net": parallel}), nn.ModuleDict({"net": net()})
    for what in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(outer, what)()] == [n for n, _ in getattr(bare, what)()]
    assert outer["net"] is parallel


def test_parts_by_name(spheres):
    parallel = ts.SphereParallel(net(), spheres)
    module = parallel.module
    assert parallel.get_submodule("0") is module[0] and parallel.get_submodule("") is parallel
    assert parallel.get_parameter("0.weight") is module[0].weight
    assert parallel.get_buffer("1.running_mean") is module[1].running_mean
    parallel.set_submodule("3", nn.Linear(4, 5))
    assert module[3].out_features == 5 and parallel(X).shape == (24, 5)


def test_a_moving_average_by_name(spheres):
    parallel, bare = ts.SphereParallel(net(), spheres), net()
    average = {name: p.detach().clone() for name, p in bare.named_parameters()}
    with torch.no_grad():
        for name, p in parallel.named_parameters():
            average[name].lerp_(p + 1, 0.5)
    for name, p in bare.named_parameters():
        torch.testing.assert_close(average[name], p + 0.5)
    of_both = [AveragedModel(model, use_buffers=True) for model in (parallel, bare)]
    assert [*of_both[0].state_dict()] == [*of_both[1].state_dict()]
    for averaged in of_both:
        for _ in range(2):
            averaged.update_parameters(bare)
    assert torch.allclose(of_both[0].eval()(X), of_both[1].eval()(X))


def train_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.eval()(X).square().sum().backward()
    optimizer.step()
    return optimizer


def assert_same_states(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1]["state"], expected[1]["state"])
    assert found[1]["param_groups"] == expected[1]["param_groups"]


@pytest.mark.parametrize("inside", [lambda m: m, nn.Sequential], ids=["alone", "in a larger one"])
def test_distributed_checkpoints_are_exchanged_with_the_bare_module(spheres, inside):
    parallel, bare = inside(ts.SphereParallel(net(), spheres)), inside(net())
    optimizers = train_step(parallel), train_step(bare)
    saved = get_state_dict(parallel, optimizers[0])
    expected = get_state_dict(bare, optimizers[1])
    assert_same_states(saved, expected)
    other = inside(net())
    optimizer = train_step(other)
    model_state, optimizer_state = copy.deepcopy(saved)
    set_state_dict(other, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert_same_states(get_state_dict(other, optimizer), saved)
    set_model_state_dict(parallel, get_model_state_dict(inside(net())))
    assert all(map(torch.equal, parallel.parameters(), inside(net()).parameters()))


def test_functional_call(spheres):
    parallel, bare = ts.SphereParallel(net(), spheres).eval(), net().eval()
    other = {k: torch.randn_like(v, requires_grad=True) for k, v in bare.named_parameters()}
    results = []
    for model in (parallel, bare):
        out = torch.func.functional_call(model, other, (X,))
        results.append([out, *torch.autograd.grad(out.sum(), [*other.values()])])
    torch.testing.assert_close(*results)
    everything = {**other, **dict(parallel.named_buffers())}
    torch.func.functional_call(parallel, everything, (X,), strict=True)
    assert all(map(torch.equal, parallel.parameters(), bare.parameters()))
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms.*bare model\.module"):
        torch.func.grad(lambda p: torch.func.functional_call(parallel, p, (X,)).sum())(other)


def test_modes_types_and_gradients(spheres):
    parallel = ts.SphereParallel(net(), spheres)
    module = parallel.module
    for mode in (False, True):
        assert parallel.train(mode) is parallel and parallel.training is mode
        assert [m.training for m in module.modules()] == [mode] * 5
    parallel.training = False
    assert not module.training and module[0].training  # as in plain torch
    assert parallel.half() is parallel and module[0].weight.dtype == torch.float16
    assert parallel.to(torch.float64) is parallel and module[1].running_mean.dtype == torch.float64
    assert parallel.float() is parallel
    nn.Sequential(parallel).to(torch.bfloat16).eval()
    assert module[3].weight.dtype == torch.bfloat16 and not module[3].training
    assert parallel.float().requires_grad_(False) is parallel
    assert not any(p.requires_grad for p in module.parameters())
    parallel.requires_grad_()(X).sum().backward()
    assert module[0].weight.grad is not None
    parallel.zero_grad()
    assert module[0].weight.grad is None


def test_apply_sees_the_bare_module(spheres):
    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)

    parallel = ts.SphereParallel(nn.Linear(3, 3), spheres)
    assert parallel.apply(init) is parallel
    assert torch.equal(parallel.weight, torch.ones(3, 3))


def test_overridden_methods_are_called(spheres):
    class Own(nn.RNN):
        def train(self, mode=True):
            return super().train(False)

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[f"{prefix}weight_ih_l0"] = state_dict.pop(f"{prefix}old")
            super()._load_from_state_dict(state_dict, prefix, *rest)

    parallel = ts.SphereParallel(Own(3, 4, batch_first=True), spheres)
    assert not parallel.train().training
    assert nn.Sequential(parallel).train()[0].module.training is False
    saved = {k.replace("weight_ih_l0", "old"): v + 1 for k, v in parallel.state_dict().items()}
    for model, prefix in ((parallel, ""), (nn.Sequential(parallel), "0.")):
        model.load_state_dict({prefix + k: v for k, v in saved.items()})
        assert torch.equal(parallel.weight_ih_l0, saved["old"])
    parallel.double()  # nn.RNN looks after its flat weights then
    out, _ = parallel(torch.ones(12, 5, 3).double())
    torch.testing.assert_close(out, parallel.module(torch.ones(12, 5, 3).double())[0])


def test_state_dict_hooks_run_wherever_they_were_registered(spheres):
    for register_on in (lambda p: p, lambda p: p.module):
        parallel, seen = ts.SphereParallel(net(), spheres), []
        target = register_on(parallel)
        target.register_state_dict_pre_hook(lambda *_, seen=seen: seen.append("save"))
        target.register_state_dict_post_hook(lambda *_, seen=seen: seen.append("saved"))
        target.register_load_state_dict_pre_hook(lambda *_, seen=seen: seen.append("load"))
        target.register_load_state_dict_post_hook(lambda *_, seen=seen: seen.append("loaded"))
        for model in (parallel, nn.ModuleList([parallel]), copy.deepcopy(parallel)):
            seen.clear()
            model.load_state_dict(model.state_dict())
            assert seen == ["save", "saved", "load", "loaded"]


def test_loading_assigns_inside_another_module_too(spheres):
    parallel = ts.SphereParallel(net(), spheres)
    for model, key in ((parallel, "0.weight"), (nn.Sequential(parallel), "0.0.weight")):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        assert parallel.module[0].weight.data_ptr() == state[key].data_ptr()
        parallel(X).sum().backward()
        assert parallel.module[0].weight.grad is not None


def test_hooks_on_the_wrapper_run_once_and_on_parts_in_each_shard(spheres):
    parallel, seen = ts.SphereParallel(net(), spheres), []
    parallel.register_forward_pre_hook(lambda m, args: seen.append((m, len(args[0]))))
    parallel.register_forward_hook(lambda m, args, out: seen.append((m, len(out))))
    parallel.register_full_backward_hook(lambda m, gi, go: seen.append((m, len(go[0]))))
    parallel.get_submodule("0").register_forward_hook(lambda m, a, out: seen.append(len(out)))
    parallel(X.clone().requires_grad_()).sum().backward()
    whole = [s for s in seen if s != 2]
    assert len(seen) - len(whole) == 12 and whole == 3 * [(parallel, 24)]


def test_attributes_and_methods_are_the_modules(spheres):
    module = Head()
    parallel = ts.SphereParallel(module, spheres)
    assert (parallel.config, parallel.scale, parallel.custom(2)) == ("small", 1, 3)
    parallel.scale = 3
    parallel.note = "new"
    assert (module.factor, module.note) == (30, "new") and "note" not in vars(parallel)
    del parallel.note
    assert not hasattr(module, "note") and not hasattr(parallel, "note")
    out = parallel(X)
    torch.testing.assert_close(out, module(X))
    assert {"custom", "fc", "gather", "spheres"} <= {*dir(parallel)}
    with pytest.raises(AttributeError, match="has no setter"):
        parallel.plan = "faster"
    with pytest.raises(AttributeError, match="module of a SphereParallel cannot be replaced"):
        parallel.module = Head()
    assert repr(parallel).startswith("SphereParallel(\n  (module): Head(\n    (fc): Linear")


def test_parts_are_replaced_and_added_through_the_wrapper(spheres):
    module = Head()
    parallel = ts.SphereParallel(module, spheres)
    parallel(X)
    parallel.fc = nn.Linear(6, 5)
    assert module.fc.out_features == 5 and parallel(X).shape == (24, 5)
    parallel.register_buffer("mean", torch.ones(1))
    parallel.weight = nn.Parameter(torch.ones(2))
    assert module.mean is parallel.mean and module.weight is parallel.weight
    assert {"weight", "mean", "fc.bias"} <= {*module.state_dict()}
    del parallel.fc
    assert not hasattr(module, "fc")


def test_lazy_modules(spheres):
    parallel = ts.SphereParallel(nn.LazyLinear(3), spheres)
    parallel(X).sum().backward()
    assert type(parallel.module) is nn.Linear and parallel.weight.shape == (3, 6)
    assert parallel.weight.grad is not None


def test_parametrizations_and_pruning_of_parts(spheres):
    parallel, bare = ts.SphereParallel(net(), spheres).eval(), net().eval()
    for model in (parallel, bare):
        parametrizations.weight_norm(model.get_submodule("0"))
        prune.l1_unstructured(model.get_submodule("3"), "weight", 0.5)
        model(X).square().sum().backward()
    assert list(parallel.state_dict()) == list(bare.state_dict())
    grads = [[p.grad for p in model.parameters()] for model in (parallel, bare)]
    torch.testing.assert_close(*grads)


def test_a_parametrization_of_the_wrapper_itself_is_refused(spheres):
    parallel = ts.SphereParallel(nn.Linear(6, 4), spheres)
    with pytest.raises(
        TypeError, match=r"class of a SphereParallel cannot be changed.*its \.module"
    ):
        parametrizations.weight_norm(parallel)
    parallel = ts.SphereParallel(nn.Linear(6, 4), spheres)
    bare = copy.deepcopy(parallel.module)
    for module in (parallel.module, bare):
        parametrizations.weight_norm(module)
    torch.testing.assert_close(parallel(X), bare(X))


def test_pruning_of_the_wrapper_itself_is_right_or_refused(spheres):
    """Its hook sets a tensor on the module that has a graph, once for the whole batch."""
    parallel, bare = ts.SphereParallel(nn.Linear(6, 4), spheres), nn.Linear(6, 4)
    parallel.load_state_dict(bare.state_dict())
    for model in (parallel, bare):
        prune.l1_unstructured(model, "weight", 0.5)
    bare(X).square().sum().backward()
    try:
        parallel(X).square().sum().backward()
    except (RuntimeError, ValueError, TypeError):
        return
    torch.testing.assert_close(parallel.weight_orig.grad, bare.weight_orig.grad)


def test_the_signature_of_forward_is_the_modules(spheres):
    parallel = ts.SphereParallel(Head(), spheres)
    copies = copy.deepcopy(parallel), pickle.loads(pickle.dumps(parallel))
    for model in (parallel, *copies):
        assert (
            str(inspect.signature(model.forward))
            == "(x: 'torch.Tensor', mask=None, *, labels=None)"
        )
        assert model.forward.__doc__ == "What it computes." and model.forward.__name__ == "forward"
        assert model.forward.__code__ is Head.forward.__code__
        assert model.forward.__annotations__ == {"x": "torch.Tensor"}
        torch.testing.assert_close(model.forward(X), parallel.module(X))
    with pytest.raises(AttributeError, match="'ParallelForward' object has no attribute 'spam'"):
        _ = parallel.forward.spam
    parallel.module.forward = lambda images: images  # it is looked up when somebody asks
    assert str(inspect.signature(parallel.forward)) == "(images)"
    copies[1].spheres.stop()


def test_a_subclass_may_have_a_forward_of_its_own(spheres):
    class Doubling(ts.SphereParallel):
        def forward(self, x):
            return super().forward(2 * x)

    parallel = Doubling(net().eval(), spheres)
    torch.testing.assert_close(parallel(X), parallel.module(2 * X))


def test_copies_have_registries_of_their_own(spheres):
    parallel = ts.SphereParallel(net(), spheres)
    for copied in (copy.deepcopy(parallel), pickle.loads(pickle.dumps(parallel))):
        assert names_and_objects(copied) == names_and_objects(copied.module)
        copied.append(nn.Linear(2, 7))
        assert len(copied.module) == 5 and len(parallel.module) == 4
        assert copied(X).shape == (24, 7)
        assert copied._engine.module is copied.module
    copied.spheres.stop()


def test_nobody_keeps_a_model_that_is_dropped(spheres):
    parallel = ts.SphereParallel(net(), spheres)
    parallel(X).sum().backward()
    seen = weakref.ref(parallel), weakref.ref(parallel.module)
    gc.disable()  # it goes at once, not when cycles are looked for
    try:
        del parallel
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_a_parallel_module_in_a_larger_one_is_found(spheres):
    """`modules()` does not show it."""
    outer = nn.Sequential(nn.Sequential(ts.SphereParallel(net(), spheres)))
    with pytest.raises(TypeError, match="has a SphereParallel in it"):
        ts.SphereParallel(outer, spheres)
