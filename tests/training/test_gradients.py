"""GradientHook: gradients computed by hand on the spheres, summed before the step."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import existing_loop
import pytest
import torch
from reference import one_thread, tree
from torch import nn

import torch_spheres as ts


def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def grads_like(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


@pytest.fixture
def spheres():
    with ts.KissingSpheres() as running:
        yield running


@pytest.mark.parametrize("concurrency", [1, 2, 5, 12])
def test_the_example_gives_the_weights_of_sequential_accumulation(concurrency):
    with one_thread():
        before = existing_loop.before()
        assert existing_loop.same_bits(before, existing_loop.after(concurrency))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_step_sums_what_was_added_in_the_tree(levels):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with ts.KissingSpheres(levels) as spheres:
        hook = ts.GradientHook(optimizer, spheres)
        all_grads = [grads_like(model, k) for k in range(spheres.leaves)]
        expected = [
            p.detach() - tree([g[i] for g in all_grads]) for i, p in enumerate(model.parameters())
        ]
        spheres.map(lambda k: hook.add(k, all_grads[k]), range(spheres.leaves))
        optimizer.step()
        for p, value in zip(model.parameters(), expected, strict=True):
            assert torch.equal(p, value)


def test_absent_shards_and_unused_parameters_are_left_out(spheres):
    model = linear()
    hook = ts.GradientHook(torch.optim.SGD(model.parameters(), lr=1.0), spheres)
    given = {k: grads_like(model, k) for k in (1, 4, 5, 11)}
    given[4][1] = None
    for k, grads in given.items():
        hook.add(k, grads)
    hook.reduce()
    for i, p in enumerate(model.parameters()):
        shards = [given[k][i] if k in given else None for k in range(12)]
        assert torch.equal(p.grad, tree(shards))
    # What nobody gave stays None.
    model.zero_grad()
    hook.add(0, [grads_like(model, 0)[0], None])
    hook.reduce()
    assert model.weight.grad is not None and model.bias.grad is None


def test_reduce_accumulates_like_backward(spheres):
    model = linear()
    hook = ts.GradientHook(torch.optim.SGD(model.parameters(), lr=1.0), spheres)
    total = None
    for step in range(3):
        shards = [grads_like(model, 100 * step + k) for k in range(12)]
        for k in range(12):
            hook.add(k, shards[k])
        hook.reduce()
        part = tree([s[0] for s in shards])
        total = part if total is None else total + part
    assert torch.equal(model.weight.grad, total)
    hook.reduce()  # nothing new
    assert torch.equal(model.weight.grad, total)


def test_gradients_by_name_and_without_the_frozen(spheres):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    hook = ts.GradientHook(torch.optim.SGD(model.parameters(), lr=1.0), spheres)
    trainable = [p for p in model.parameters() if p.requires_grad]
    hook.add(3, [torch.ones_like(p) for p in trainable])
    hook.add(7, {trainable[0]: torch.ones_like(trainable[0])})
    hook.reduce()
    assert model[0].weight.grad is None
    assert torch.equal(model[1].weight.grad, torch.full((2, 2), 2.0))
    assert torch.equal(model[1].bias.grad, torch.ones(2))


def test_many_threads_add_at_once(spheres):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = ts.GradientHook(optimizer, spheres)
    for _ in range(50):
        optimizer.zero_grad()
        shards = [grads_like(model, k) for k in range(12)]
        gate = threading.Barrier(12)

        def add(k, gate=gate, shards=shards):
            gate.wait()
            hook.add(k, shards[k])

        threads = [threading.Thread(target=add, args=(k,)) for k in range(12)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        optimizer.step()
        assert torch.equal(model.weight.grad, tree([s[0] for s in shards]))


def test_two_hooks_share_the_spheres(spheres):
    models = [linear(), linear()]
    hooks = [ts.GradientHook(torch.optim.SGD(m.parameters(), lr=1.0), spheres) for m in models]
    for _ in range(5):
        hooks[0].add(2, grads_like(models[0], 2))
        for k in range(12):
            hooks[1].add(k, grads_like(models[1], k))
        hooks[1].reduce()
        hooks[0].reduce()


def test_restarted_spheres_do_not_confuse_the_hook():
    model = linear()
    spheres = ts.KissingSpheres().start()
    hook = ts.GradientHook(torch.optim.SGD(model.parameters(), lr=1.0), spheres)
    hook.add(0, grads_like(model, 0))
    spheres.stop()
    spheres.start()
    hook.add(1, grads_like(model, 1))
    hook.reduce()
    assert torch.equal(model.bias.grad, grads_like(model, 0)[1] + grads_like(model, 1)[1])
    model.zero_grad()
    hook.add(0, grads_like(model, 0))
    spheres.stop()
    hook.reduce()  # on this thread
    assert torch.equal(model.bias.grad, grads_like(model, 0)[1])


def test_remove(spheres):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hook = ts.GradientHook(optimizer, spheres)
    hook.add(0, grads_like(model, 0))
    hook.remove()
    hook.remove()
    optimizer.step()
    assert model.weight.grad is None
    assert not optimizer._optimizer_step_pre_hooks


def test_a_hook_nobody_holds_works_and_goes_with_the_optimizer(spheres):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gone = weakref.ref(ts.GradientHook(optimizer, spheres))
    gc.collect()
    assert gone() is not None
    del optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("shard", "error"),
    [(-1, ValueError), (12, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)],
)
def test_bad_shards(spheres, shard, error):
    model = linear()
    hook = ts.GradientHook(torch.optim.SGD(model.parameters(), lr=1.0), spheres)
    with pytest.raises(error, match=repr(shard)):
        hook.add(shard, grads_like(model, 0))


def test_bad_gradients(spheres):
    model = linear()
    hook = ts.GradientHook(torch.optim.SGD(model.parameters(), lr=1.0), spheres)
    w, b = grads_like(model, 0)
    with pytest.raises(ValueError, match="3 gradients, but the optimizer has 2 parameters"):
        hook.add(0, [w, b, b])
    with pytest.raises(ValueError, match=r"gradient 1 is torch.float32 \(4,\)"):
        hook.add(0, [w, torch.zeros(4)])
    with pytest.raises(ValueError, match=r"gradient 0 is torch\.float64"):
        hook.add(0, [w.double(), b])
    with pytest.raises(TypeError, match=r"gradient 0 must be a tensor or None, got 3"):
        hook.add(0, [3, b])
    with pytest.raises(ValueError, match="not a parameter"):
        hook.add(0, {b: b})
    hook.add(0, [w, b])
    with pytest.raises(RuntimeError, match=r"shard 0 was added already.*reduce\(\)"):
        hook.add(0, [w, b])


def test_constructor_errors(spheres):
    optimizer = torch.optim.SGD(linear().parameters(), lr=1.0)
    with pytest.raises(TypeError, match="got Linear"):
        ts.GradientHook(optimizer, linear())
    with pytest.raises(TypeError, match="got int"):
        ts.GradientHook(3, spheres)


def test_an_optimizer_of_another_model_is_told():
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    with ts.KissingSpheres() as spheres:
        parallel = ts.SphereParallel(model, spheres)
        with pytest.warns(UserWarning, match="none of the model's parameters"):
            ts.GradientHook(torch.optim.SGD(other.parameters(), lr=0.1), parallel)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ts.GradientHook(torch.optim.SGD(model.parameters(), lr=0.1), parallel)
