"""What a module's parameters and buffers may be, and what hooks on them see."""

from __future__ import annotations

import collections
import copy
import threading

import pytest
import torch
from loop_support import assert_same_gradients, assert_same_weights, pair
from reference import aligned, one_thread, tree
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import torch_spheres as ts

X = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Choosy(nn.Module):
    """Uses one of its layers, or none for some shards."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.which = 0

    def forward(self, x):
        out = self.layers[self.which](x)
        return out + self.layers[2](x) if x[0, 0] > 0.5 else out


def test_unused_parameters_have_no_gradient(spheres):
    torch.manual_seed(0)
    parallel, bare = pair(Choosy(), spheres)
    for which in (0, 1):
        parallel.module.which = bare.which = which
        parallel.zero_grad()
        bare.zero_grad()
        parallel(X).square().sum().backward()
        for rows in X.tensor_split(12):  # what is used depends on a shard's first row
            bare(rows).square().sum().backward()
        assert_same_gradients(parallel, bare)
        assert bare.layers[1 - which].weight.grad is None and bare.layers[2].weight.grad is not None


def test_frozen_and_unfrozen_between_steps(spheres):
    parallel, bare = pair(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), spheres)
    for trainable in (True, False, True):
        for net, module in ((parallel, parallel.module), (bare, bare)):
            module[0].requires_grad_(trainable)
            net.zero_grad()
            net(X).square().sum().backward()
            assert (module[0].weight.grad is not None) == trainable
        assert_same_gradients(parallel, bare)
    parallel.requires_grad_(False)
    assert not parallel(X).requires_grad
    x = X.clone().requires_grad_()
    parallel(x).sum().backward()  # adversarial examples, saliency
    assert x.grad is not None and parallel.module[1].bias.grad.abs().sum() > 0


def test_tied_parameters_have_one_gradient(spheres):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, words):
            return self.head(self.embed(words).tanh())

    parallel, bare = pair(Tied(), spheres)
    words = torch.arange(40).reshape(20, 2) % 10
    for net in (parallel, bare):
        net(words).logsumexp(-1).sum().backward()
    assert len(list(parallel.parameters())) == 1
    assert_same_gradients(parallel, bare)


def test_a_layer_that_is_added_later(spheres):
    nets = pair(nn.Sequential(nn.Linear(6, 6)), spheres)
    torch.manual_seed(1)
    head = nn.Linear(6, 2).double()
    for net, module in zip(nets, (nets[0].module, nets[1]), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(X).sum().backward()
        optimizer.step()
        module.append(copy.deepcopy(head))
        optimizer.add_param_group({"params": module[1].parameters(), "lr": 0.2})
        optimizer.zero_grad()
        assert net(X).shape == (50, 2)
        net(X).square().sum().backward()
        optimizer.step()
        module[0] = nn.Identity()  # taken out again
        assert torch.equal(net(X), net.module[1](X) if net is nets[0] else module[1](X))
    assert_same_weights(*nets)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm"],
)
def test_parametrized_layers(spheres, wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    parallel, bare = ts.SphereParallel(copy.deepcopy(model), spheres), model
    for layer in (parallel.module[2], bare[2]):
        torch.manual_seed(1)
        wrap(layer)
    for _ in range(3):
        for net in (parallel, bare):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
        assert_same_gradients(parallel, bare)
        assert_same_weights(parallel, bare)  # and spectral_norm's buffers


def test_cached_parametrizations(spheres):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = parametrizations.weight_norm(nn.Linear(6, 6))

        def forward(self, x):
            with parametrize.cached():
                return self.layer(self.layer(x))

    parallel, bare = pair(Twice(), spheres)
    for net in (parallel, bare):
        net(X).square().sum().backward()
        with parametrize.cached():
            net(X).square().sum().backward()
    assert_same_gradients(parallel, bare)
    assert not parametrize._cache


def test_sparse_gradients(spheres):
    parallel, bare = pair(nn.Embedding(10, 3, sparse=True), spheres)
    words = torch.arange(40).reshape(20, 2) % 7
    for net in (parallel, bare):
        net(words).square().sum().backward()
    assert parallel.module.weight.grad.is_sparse
    torch.testing.assert_close(parallel.module.weight.grad.to_dense(), bare.weight.grad.to_dense())


def test_complex_parameters(spheres):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128))

        def forward(self, x):
            return (x.to(self.w.dtype) @ self.w).abs()

    model = Complex()
    parallel = ts.SphereParallel(copy.deepcopy(model), spheres)
    for net in (parallel, model):
        net(X).square().sum().backward()
    assert_same_gradients(parallel, model)


def test_lazy_parameters_are_made_in_the_first_call(spheres):
    def lazy():
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))

    model = lazy()
    model(X.float())
    parallel = ts.SphereParallel(lazy(), spheres)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    parallel(X.float()).sum().backward()
    assert type(parallel.module[0]) is nn.Linear
    torch.testing.assert_close(list(parallel.parameters()), list(model.parameters()))
    assert parallel.module[1].num_batches_tracked == 1
    optimizer.step()
    assert not torch.equal(parallel.module[0].weight, model[0].weight)


def test_an_error_while_lazy_parameters_are_made_leaves_the_mode_alone(spheres):
    parallel = ts.SphereParallel(nn.Sequential(nn.LazyLinear(4), nn.Linear(5, 2)), spheres)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        parallel(torch.ones(24, 3))
    assert all(module.training for module in parallel.modules())


def test_hooks_on_parameters_run_once_with_the_sum(spheres):
    parallel, bare = pair(nn.Linear(6, 2), spheres)
    seen = collections.defaultdict(list)
    threads = set()
    for net, p in ((parallel, parallel.module.weight), (bare, bare.weight)):

        def halve(g, net=net):
            seen[net].append(g.clone())
            threads.add(threading.current_thread())
            return g / 2

        def step(p, net=net):  # an optimizer in the backward pass
            seen[net].append(p.grad.clone())
            with torch.no_grad():
                p -= 0.1 * p.grad
            p.grad = None

        p.register_hook(halve)
        p.register_post_accumulate_grad_hook(step)
        net(X).square().sum().backward()
        assert len(seen[net]) == 2 and p.grad is None
    torch.testing.assert_close(seen[parallel], seen[bare])
    assert_same_weights(parallel, bare)
    assert threads == {threading.current_thread()}


def test_hooks_on_modules_run_in_every_shard(spheres):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double()
    parallel = ts.SphereParallel(model, spheres)
    # (No defaultdict: two threads may make an entry each.)
    names = ("pre", "forward", "kwargs", "back", "backward", "whole")
    rows = {name: [] for name in names}
    handles = [
        model[1].register_forward_pre_hook(lambda m, a: rows["pre"].append(len(a[0]))),
        model[1].register_forward_hook(lambda m, a, out: rows["forward"].append(len(out))),
        model[1].register_forward_hook(
            lambda m, a, k, out: rows["kwargs"].append(len(out)), with_kwargs=True
        ),
        model[1].register_full_backward_pre_hook(lambda m, g: rows["back"].append(len(g[0]))),
        model[1].register_full_backward_hook(lambda m, i, o: rows["backward"].append(len(i[0]))),
        parallel.register_forward_hook(lambda m, a, out: rows["whole"].append(len(out))),
    ]
    parallel(X).sum().backward()
    whole = rows.pop("whole")
    assert whole == [50]
    for name, seen in rows.items():
        assert sorted(seen) == [4] * 10 + [5] * 2, name
    rows.clear()
    for handle in handles:
        handle.remove()
    parallel(X).sum().backward()
    assert not rows


def test_hooks_on_modules_may_change_what_flows(spheres):
    parallel, bare = pair(nn.Sequential(nn.Linear(6, 4), nn.Tanh()), spheres)
    for net, module in ((parallel, parallel.module), (bare, bare)):
        module[0].register_forward_hook(lambda m, a, out: 2 * out)
        module[1].register_full_backward_hook(lambda m, i, o: (3 * i[0],))
        net(X).sum().backward()
    assert_same_gradients(parallel, bare)


def test_batch_norm_has_the_mean_of_the_shards_statistics(spheres):
    parallel, bare = pair(nn.BatchNorm1d(6, momentum=0.3), spheres)
    for _ in range(2):
        means, variances = [], []
        for rows in X.tensor_split(12):
            shard = copy.deepcopy(bare)
            with one_thread():
                shard(aligned(rows))
            means.append(shard.running_mean)
            variances.append(shard.running_var)
        parallel(X)
        bare.running_mean.copy_(tree(means) / 12)
        bare.running_var.copy_(tree(variances) / 12)
        bare.num_batches_tracked += 1
        for mine, other in zip(parallel.buffers(), bare.buffers(), strict=True):
            assert torch.equal(mine, other)
    assert parallel.module.num_batches_tracked == 2


def test_buffers_of_fewer_shards_and_other_kinds(spheres):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
            self.register_buffer("seen", torch.zeros(2, dtype=torch.bool), persistent=False)
            self.register_buffer("absent", None)

        def forward(self, x):
            self.rows += len(x)
            self.mean = 0.5 * self.mean + x.mean()  # assigned, not written to
            self.seen[int(x[0, 0] > 2)] = True
            return x

    model = Counting()
    parallel = ts.SphereParallel(model, spheres)
    mean = model.mean
    with (
        pytest.warns(UserWarning, match=r"different numbers in the buffer Counting\.seen"),
        pytest.warns(UserWarning, match=r"in the buffer Counting\.rows something else"),
    ):
        parallel(torch.arange(5.0, dtype=torch.float64)[:, None])
    assert model.rows == 1 and model.mean == 2 and model.seen.tolist() == [True, False]
    assert model.mean is mean and model.absent is None
    parallel.eval()(torch.arange(24.0, dtype=torch.float64)[:, None])
    assert model.rows == 3 and model.mean == 1 + 11.5


def test_attributes_that_change_in_place_are_followed(spheres):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"scales": [1.0, 2.0]}

        def forward(self, x):
            return x * sum(self.config["scales"])

    parallel = ts.SphereParallel(Scaled(), spheres)
    assert torch.equal(parallel(X), 3 * X)
    parallel.module.config["scales"][0] = 5.0
    assert torch.equal(parallel(X), 7 * X)


def test_double_backward_says_what_to_do(spheres):
    parallel = ts.SphereParallel(nn.Linear(6, 1).double(), spheres)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*bare model\.module"):
        torch.autograd.grad(parallel(x).sum(), x, create_graph=True)
    (g,) = torch.autograd.grad(parallel.module(x).tanh().sum(), x, create_graph=True)
    g.square().sum().backward()


def test_a_second_backward_needs_retain_graph(spheres):
    parallel, bare = pair(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.0)), spheres)
    losses = [net(X).square().sum() for net in (parallel, bare)]
    for loss in losses:
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(parallel, bare)
    with pytest.raises(RuntimeError, match=r"second time.*retain_graph=True"):
        losses[0].backward()


def test_a_forward_that_writes_to_parameters_says_so(spheres):
    class Teacher(nn.Module):
        """Averages its weights in the forward, as momentum encoders do."""

        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            with torch.no_grad():
                self.teacher.weight.lerp_(self.student.weight, 0.1)
            return self.student(x) - self.teacher(x)

    parallel = ts.SphereParallel(Teacher().double(), spheres)
    for call in (parallel, lambda x: parallel.forward_backward(lambda out, y: out.mean(), x, x)):
        with pytest.raises(RuntimeError, match=r"wrote to its parameters \['teacher.weight'\]"):
            call(X)


def test_weights_that_changed_since_the_forward_are_noticed(spheres):
    parallel = ts.SphereParallel(nn.Linear(6, 2).double(), spheres)
    out = parallel(X.clone().requires_grad_())
    with torch.no_grad():
        parallel.module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
