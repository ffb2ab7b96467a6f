"""Random numbers inside a module belong to the shard, the step and the seed, not to a thread."""

from __future__ import annotations

import warnings

import pytest
import torch
from loop_support import at_each_concurrency
from reference import ShardSeeds, digest
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_spheres as ts


class Does(nn.Module):
    """What a function does; with a parameter, so that there is a backward."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.fn(self.w * x)


def filled(name, *args):
    return lambda x: x + getattr(torch.empty(x.shape), name)(*args)


def sampled(make):
    return lambda x: x + make(x.detach().abs() + 0.5).sample()


def attention(x):
    q = x.reshape(len(x), 2, 3)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).flatten(1)


def math_attention(x):
    with sdpa_kernel(SDPBackend.MATH):
        return attention(x)


def one(x, size=None):
    """A bit of everything random, as one column."""
    return x + torch.as_tensor(size).float()


D = torch.distributions
DRAWS = {
    "F.dropout": lambda x: F.dropout(x, 0.5),
    "F.dropout in place": lambda x: F.dropout(x.clone(), 0.5, inplace=True),
    "F.dropout2d": lambda x: F.dropout2d(x.reshape(-1, 3, 2, 1), 0.5).flatten(1),
    "F.dropout3d": lambda x: F.dropout3d(x.reshape(-1, 3, 2, 1, 1), 0.5).flatten(1),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "F.feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "F.rrelu": lambda x: F.rrelu(x, training=True),
    "F.gumbel_softmax": lambda x: F.gumbel_softmax(x, hard=True) + x,
    "F.fractional_max_pool2d": lambda x: F.fractional_max_pool2d(
        x.repeat(1, 6).reshape(-1, 1, 6, 6), 2, output_size=4
    ).flatten(1),
    "attention": attention,
    "attention, math": math_attention,
    "torch.rand": lambda x: x + torch.rand(x.shape),
    "torch.rand_like": lambda x: x + torch.rand_like(x),
    "torch.randn": lambda x: x + torch.randn(x.shape),
    "torch.randn, complex": lambda x: x + torch.randn(x.shape, dtype=torch.complex64).abs(),
    "torch.randn_like": lambda x: x + torch.randn_like(x),
    "torch.randint": lambda x: x + torch.randint(99, x.shape),
    "torch.randint_like": lambda x: x + torch.randint_like(x, 99),
    "torch.randperm": lambda x: x[:, torch.randperm(6)],
    "torch.bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "torch.binomial": lambda x: x + torch.binomial(torch.full_like(x, 9), torch.full_like(x, 0.5)),
    "torch.poisson": lambda x: x + torch.poisson(torch.full_like(x, 9)),
    "torch.normal": lambda x: x + torch.normal(0.0, 1.0, x.shape),
    "torch.normal of tensors": lambda x: x + torch.normal(x.detach(), 1.0),
    "torch.multinomial": lambda x: x + torch.multinomial(torch.ones(len(x), 30), 6),
    "torch.rand, out": lambda x: x + torch.rand(x.shape, out=torch.empty(x.shape)),
    "default_generator": lambda x: x + torch.rand(x.shape, generator=torch.default_generator),
    "uniform_": filled("uniform_"),
    "normal_": filled("normal_"),
    "bernoulli_": filled("bernoulli_", 0.5),
    "random_": filled("random_", 99),
    "exponential_": filled("exponential_"),
    "geometric_": filled("geometric_", 0.1),
    "cauchy_": filled("cauchy_"),
    "log_normal_": filled("log_normal_"),
    "nn.init": lambda x: x + nn.init.trunc_normal_(torch.empty(len(x), 6)),
    "Normal": sampled(lambda p: D.Normal(p, p)),
    "Gamma": sampled(lambda p: D.Gamma(p, p)),
    "Beta": sampled(lambda p: D.Beta(p, p)),
    "Dirichlet": sampled(D.Dirichlet),
    "Categorical": lambda x: one(x, D.Categorical(torch.ones(len(x), 6, 50)).sample()),
    "Poisson": sampled(lambda p: D.Poisson(9 * p)),
    "rsample": lambda x: D.Normal(x, 1.0).rsample(),
    "vmap": lambda x: torch.vmap(
        lambda row: row + torch.rand(6) + F.dropout(row, 0.5), randomness="different"
    )(x),
    "fork_rng": lambda x: x + forked(x),
    "a lazy state": lambda x: x + torch.rand(x.shape) + replayed(x),
}


def forked(x):
    with torch.random.fork_rng(devices=[]):
        first = torch.rand(x.shape)
    return first + 10 * torch.rand(x.shape)


def replayed(x):
    state = torch.get_rng_state()
    first = torch.rand(x.shape)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(x.shape), first)
    return first


MODULES = {
    "nn.LSTM": lambda: nn.LSTM(6, 4, 3, dropout=0.5, batch_first=True),
    "nn.GRU": lambda: nn.GRU(6, 4, 2, dropout=0.5, batch_first=True, bidirectional=True),
    "nn.RNN": lambda: nn.RNN(6, 4, 2, dropout=0.5, batch_first=True),
    "nn.MultiheadAttention": lambda: nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True),
    "nn.TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(
        6, 2, 8, dropout=0.5, batch_first=True
    ),
    "nn.TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(
        6, 2, 8, dropout=0.5, batch_first=True
    ),
}


class Sequences(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, x):
        steps = x[:, None].repeat(1, 4, 1)
        if isinstance(self.inner, nn.MultiheadAttention):
            return self.inner(steps, steps, steps)[0][:, 0]
        if isinstance(self.inner, nn.TransformerDecoderLayer):
            return self.inner(steps, steps)[:, 0]
        out = self.inner(steps)
        return out[0][:, -1] if isinstance(out, tuple) else out[:, 0]


X = torch.randn(36, 6, generator=torch.Generator().manual_seed(0))


def steps_of(make):
    """Two steps' outputs, and the bits of all: gradients, the default generator's next numbers."""

    def run(spheres):
        parallel = ts.SphereParallel(make(), spheres)
        outs, grads = [], []
        for _ in range(2):
            outs.append(parallel(X))
            parallel.zero_grad()
            outs[-1].sum().backward()
            grads += [p.grad for p in parallel.parameters()]
        return outs, digest([*outs, *grads, torch.rand(3)])

    return run


def in_plain_torch(make, shards=12):
    """The outputs of the same steps, of shards one after another; see `reference.ShardSeeds`."""
    torch.manual_seed(0)
    module = make()
    outs = []
    for _ in range(2):
        seeds, parts = ShardSeeds(), []
        for k, rows in enumerate(X.tensor_split(shards)):
            with seeds.of(k):
                parts.append(module(rows.clone()))
        seeds.leave()
        outs.append(torch.cat(parts).detach())
    return outs


MAKERS = {
    **{name: lambda fn=fn: Does(fn) for name, fn in DRAWS.items()},
    **{name: lambda make=make: Sequences(make()) for name, make in MODULES.items()},
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_numbers_at_every_concurrency_and_those_of_plain_torch(name):
    results = at_each_concurrency(steps_of(MAKERS[name]), 1, 2, 5, 12, 5)
    assert len({bits for _, bits in results}) == 1
    outs, _ = results[0]
    torch.testing.assert_close([out.detach() for out in outs], in_plain_torch(MAKERS[name]))
    assert not torch.equal(*outs), "another step, other numbers"


def test_shards_and_steps_draw_different_numbers():
    with ts.KissingSpheres(levels=3, concurrency=2) as spheres:
        parallel = ts.SphereParallel(Does(lambda x: torch.rand(x.shape)), spheres)
        drawn = torch.cat([parallel(torch.zeros(144, 5)) for _ in range(3)])
        assert len(drawn.flatten().unique()) > 2100  # of 2160 floats, few meet by chance


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_default_generator_advances_by_one_draw_if_any(mode):
    torch.manual_seed(0)
    with ts.KissingSpheres(concurrency=3) as spheres, mode():
        parallel = ts.SphereParallel(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), spheres)
        before = torch.get_rng_state()
        parallel.eval()(X)
        assert torch.equal(torch.get_rng_state(), before)
        parallel.train()(X)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        torch.randint(2**63 - 1, ())
        assert torch.equal(torch.get_rng_state(), after)


def test_only_in_backward():
    """A checkpoint or a hook may draw for the first time in the backward pass."""

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g + torch.rand(g.shape)

    def run(spheres):
        parallel = ts.SphereParallel(Does(Noisy.apply), spheres)
        parallel(X).sum().backward()
        return torch.stack([parallel.module.w.grad, torch.rand(())])

    results = at_each_concurrency(run, 1, 3, 12)
    assert all(torch.equal(r, results[0]) for r in results)


def test_a_saved_state_draws_the_same_again():
    with ts.KissingSpheres(concurrency=3) as spheres:
        parallel = ts.SphereParallel(nn.Dropout(0.5), spheres)
        parallel(X)
        state = torch.get_rng_state()
        first = [parallel(X) for _ in range(2)]
        torch.set_rng_state(state)
        again = [parallel(X) for _ in range(2)]
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[0], first[1])


def test_seeding_inside_a_module_seeds_the_shard_alone():
    def seeded(x):
        if x[0, 0] == X[3, 0]:  # the second shard
            torch.manual_seed(5)
        return x + torch.rand(x.shape)

    torch.manual_seed(0)
    with ts.KissingSpheres(concurrency=3) as spheres:
        before = torch.get_rng_state()
        plain = ts.SphereParallel(Does(lambda x: x + torch.rand(x.shape)), spheres)(X)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        out = ts.SphereParallel(Does(seeded), spheres)(X)
        assert torch.equal(torch.get_rng_state(), after)
    changed = (plain != out).any(1)
    assert changed.tolist() == [3 <= row < 6 for row in range(36)]
    numbers = torch.rand(3, 6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(out[3:6], X[3:6] + numbers)


def test_a_generator_of_its_own_is_refused():
    generator = torch.Generator()
    with ts.KissingSpheres() as spheres:
        for draw in (
            lambda x: x + torch.rand(x.shape, generator=generator),
            lambda x: x + torch.empty(x.shape).normal_(generator=generator),
            lambda x: x[:, torch.randperm(6, generator=generator)],
        ):
            with pytest.raises(RuntimeError, match=r"generator of its own.*Leave generator= out"):
                ts.SphereParallel(Does(draw), spheres)(X)


def test_draws_past_the_shards_are_warned_of():
    with ts.KissingSpheres() as spheres:
        model = Does(lambda x: x + torch.default_generator.seed() * 0)
        with pytest.warns(RuntimeWarning, match="not reproducible"):
            ts.SphereParallel(model, spheres)(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.rand(3)
            ts.SphereParallel(nn.Dropout(), spheres)(X)


def test_outside_of_shards_random_numbers_are_as_ever():
    with ts.KissingSpheres() as spheres:
        ts.SphereParallel(nn.Dropout(), spheres)(X)
        torch.manual_seed(3)
        first = torch.rand(4), F.dropout(torch.ones(9)), torch.get_rng_state()
        again = torch.Generator().manual_seed(3)
        assert torch.equal(first[0], torch.rand(4, generator=again))
        assert torch.initial_seed() == 3
        state = torch.get_rng_state()
        in_item = spheres.map(lambda _: torch.get_rng_state(), range(3))
        assert all(torch.equal(state, s) for s in in_item)
