"""Distributions that a module returns are put together, with their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributions as dists
from judge import Calls, judged
from torch import nn

import torch_spheres as ts

ROWS = 26  # uneven: two shards of three rows
X = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[1, 12], ids=["alone", "twelve at once"], scope="module")
def spheres(request):
    with ts.KissingSpheres(concurrency=request.param) as running:
        yield running


ACTIONS = torch.arange(ROWS) % 4
POSITIVE = X.abs() + 0.1
UNIT = X.sigmoid()


def normal(s, x):
    return dists.Normal(s.layer(x), s.vector[0])


DISTRIBUTIONS: dict[str, tuple[Any, Any]] = {
    "categorical": (lambda s, x: dists.Categorical(logits=s.layer(x)), ACTIONS),
    "of probabilities": (lambda s, x: dists.Categorical(s.layer(x).softmax(1)), ACTIONS),
    "one-hot": (
        lambda s, x: dists.OneHotCategorical(logits=s.layer(x)),
        torch.eye(4)[ACTIONS],
    ),
    "bernoulli": (lambda s, x: dists.Bernoulli(logits=s.layer(x)), (X > 0).float()),
    "normal": (normal, X),
    "one scale": (lambda s, x: dists.Normal(s.layer(x), s.layer.bias.exp()), X),
    "independent": (lambda s, x: dists.Independent(normal(s, x), 1), X),
    "multivariate": (
        lambda s, x: dists.MultivariateNormal(
            s.layer(x), scale_tril=torch.diag(s.layer.bias.exp())
        ),
        X,
    ),
    "a covariance for each": (
        lambda s, x: dists.MultivariateNormal(s.layer(x), torch.diag_embed(s.layer(x).exp())),
        X,
    ),
    # (The identity, because rounding, which differs between processors, is large without it.)
    "one covariance": (
        lambda s, x: dists.MultivariateNormal(s.layer(x), s.matrix @ s.matrix.T + torch.eye(4)),
        X,
    ),
    "low rank": (
        lambda s, x: dists.LowRankMultivariateNormal(
            s.layer(x), s.layer(x)[..., None], s.layer(x).exp()
        ),
        X,
    ),
    "mixture": (
        lambda s, x: dists.MixtureSameFamily(dists.Categorical(logits=s.layer(x)), normal(s, x)),
        X[:, 0],
    ),
    "one mixture": (
        lambda s, x: dists.MixtureSameFamily(
            dists.Categorical(logits=s.layer.bias.expand(len(x), 4)), normal(s, x)
        ),
        X[:, 0],
    ),
    "transformed": (
        lambda s, x: dists.TransformedDistribution(
            normal(s, x),
            [dists.TanhTransform(cache_size=1), dists.AffineTransform(0.5, s.vector[1])],
        ),
        0.5 + 0.2 * UNIT,
    ),
    "inverse": (
        lambda s, x: dists.TransformedDistribution(
            dists.LogNormal(s.layer(x), 1.0), [dists.ExpTransform().inv]
        ),
        X,
    ),
    "log-normal": (lambda s, x: dists.LogNormal(s.layer(x), s.vector[0]), POSITIVE),
    "relaxed": (
        lambda s, x: dists.RelaxedOneHotCategorical(s.vector[0], logits=s.layer(x)),
        X.softmax(1),
    ),
    "gamma": (lambda s, x: dists.Gamma(s.layer(x).exp(), 1.0), POSITIVE),
    "dirichlet": (lambda s, x: dists.Dirichlet(s.layer(x).exp()), X.softmax(1)),
    "beta": (lambda s, x: dists.Beta(s.layer(x).exp(), 2.0), UNIT),
    "uniform": (lambda s, x: dists.Uniform(s.layer(x) - 9, 9.0), UNIT),
    "student": (lambda s, x: dists.StudentT(s.vector[0] + 2, s.layer(x)), X),
    "poisson": (lambda s, x: dists.Poisson(s.layer(x).exp()), ACTIONS[:, None]),
    "negative binomial": (
        lambda s, x: dists.NegativeBinomial(3.0, logits=s.layer(x)),
        ACTIONS[:, None],
    ),
    "von Mises": (lambda s, x: dists.VonMises(s.layer(x), 1.0), UNIT),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(spheres, name):
    fn, value = DISTRIBUTIONS[name]
    for rows in (ROWS, 24):
        one = judged(Calls(fn), spheres, (X[:rows],), look=lambda d, n=rows: d.log_prob(value[:n]))
        plain = fn(Calls(fn), X[:rows])
        plain.log_prob(value[:rows])
        assert type(one) is type(plain)
        assert one.batch_shape == plain.batch_shape
        assert one.event_shape == plain.event_shape
        assert repr(one) == repr(plain)
        torch.manual_seed(3)
        ours = one.sample()
        torch.manual_seed(3)
        torch.testing.assert_close(ours, plain.sample())


@pytest.mark.parametrize(
    "name", ["normal", "independent", "multivariate", "transformed", "relaxed"]
)
def test_gradients_through_samples(spheres, name):
    def look(distribution):
        torch.manual_seed(5)
        return distribution.rsample()

    judged(Calls(DISTRIBUTIONS[name][0]), spheres, (X,), look=look)


def test_divergences_know_the_types(spheres):
    def fn(s, x):
        return {"prior": dists.Normal(torch.zeros(4), torch.ones(4)), "posterior": normal(s, x)}

    def look(out):
        return dists.kl_divergence(out["posterior"], out["prior"])

    out = judged(Calls(fn), spheres, (X,), look=look)
    assert out["prior"].batch_shape == (4,)


def test_a_distribution_as_an_input_is_cut(spheres):
    class LogProb(nn.Linear):
        def forward(self, x, prior):
            return prior.log_prob(super().forward(x))

    prior = dists.Independent(dists.Normal(X, torch.ones(())), 1)
    module = LogProb(4, 4)
    out = ts.SphereParallel(module, spheres)(X, prior)
    torch.testing.assert_close(out, module(X, prior))


def test_forward_backward_sees_the_shards_distribution(spheres):
    model, plain = ts.SphereParallel(Calls(normal), spheres), Calls(normal)
    loss = model.forward_backward(lambda d, y: -d.log_prob(y).mean(), X, X)
    expected = -plain(X).log_prob(X).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(model.module.layer.weight.grad, plain.layer.weight.grad)
    torch.testing.assert_close(model.module.vector.grad, plain.vector.grad)
