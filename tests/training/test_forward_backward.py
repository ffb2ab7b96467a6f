"""`forward_backward`: the loss's gradients, shard by shard, and the memory that this saves."""

from __future__ import annotations

import collections
import threading
import warnings
import weakref

import pytest
import torch
from loop_support import assert_same_gradients, pair, soon
from torch import nn
from torch.nn import functional as F

import torch_spheres as ts

X = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize(("levels", "rows"), [(1, 50), (2, 50), (2, 5), (3, 50)])
def test_the_mean_loss_and_its_gradients(levels, rows):
    x, y = X[:rows], Y[:rows]
    with ts.KissingSpheres(levels, concurrency=3) as spheres:
        parallel, bare = pair(mlp(), spheres)
        for _ in range(2):  # the second one accumulates
            loss = parallel.forward_backward(F.cross_entropy, x, y)
            expected = F.cross_entropy(bare(x), y)
            expected.backward()
            torch.testing.assert_close(loss, expected.detach())
            assert loss.dim() == 0 and not loss.requires_grad
    assert_same_gradients(parallel, bare)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_sum_and_a_count_that_differs_between_shards(spheres, kind):
    words, targets = X.reshape(50, 6, 1), torch.randint(0, 2, (50, 6))
    targets[torch.rand(50, 6) < 0.5] = -100  # padding, ...
    targets[8:14] = -100  # and shards 2 and 3 have nothing else
    targets[0] = 1

    def counted(out, y):
        count = (y != -100).sum()
        loss = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum")
        return loss, count if kind == "tensor" else int(count)

    torch.manual_seed(3)
    parallel, bare = pair(nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2)), spheres)
    loss = parallel.forward_backward(counted, words, targets)
    expected = F.cross_entropy(bare(words).flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_same_gradients(parallel, bare)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x, scale=1.0, *, shift=None):
        out = self.layer(x) * scale
        return {"out": out if shift is None else out + shift}


@pytest.mark.parametrize(
    "inputs",
    [X, (X,), (X, torch.tensor(2.0)), {"x": X, "scale": 3.0}, {"x": X, "shift": X[:, :3]}],
    ids=["tensor", "tuple", "two", "dict", "keyword only"],
)
def test_inputs_and_targets_are_nested_as_in_forward(spheres, inputs):
    parallel, bare = pair(Named(), spheres)
    targets = {"y": Y, "weight": [X[:, 0].exp()], "name": "text"}

    def loss_fn(outputs, targets):
        assert targets["name"] == "text"
        losses = F.cross_entropy(outputs["out"], targets["y"], reduction="none")
        return (losses * targets["weight"][0]).mean()

    parallel.forward_backward(loss_fn, inputs, targets)
    if isinstance(inputs, dict):
        out = bare(**inputs)
    else:
        out = bare(*inputs) if isinstance(inputs, tuple) else bare(inputs)
    loss_fn(out, targets).backward()
    assert_same_gradients(parallel, bare)


def test_inputs_and_losses_with_gradients_of_their_own(spheres):
    """Of an embedding before the model; parameters of the loss are the caller's, not seen here."""
    parallel, bare = pair(mlp(), spheres)
    x = X.clone().requires_grad_()
    grads = []
    parallel.forward_backward(F.cross_entropy, x, Y)
    grads.append(x.grad)
    x.grad = None
    F.cross_entropy(bare(x), Y).backward()
    torch.testing.assert_close(grads[0], x.grad)


def test_hooks_clipping_and_frozen_parameters(spheres):
    seen = collections.Counter()
    parallel, bare = pair(mlp(), spheres)
    for net, module in ((parallel, parallel.module), (bare, bare)):
        module[0].bias.requires_grad_(False)
        module[2].weight.register_hook(lambda g: seen.update(["hook"]) or 2 * g)
        module[2].weight.register_post_accumulate_grad_hook(lambda p: seen.update(["after"]))
        if net is parallel:
            parallel.forward_backward(F.cross_entropy, X, Y)
        else:
            F.cross_entropy(bare(X), Y).backward()
    assert seen == {"hook": 2, "after": 2}
    assert_same_gradients(parallel, bare)
    assert torch.nn.utils.clip_grad_norm_(parallel.parameters(), 0.1) > 0


def test_buffers_and_random_numbers_are_those_of_forward(spheres):
    def train(step):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        parallel = ts.SphereParallel(model.double(), spheres)
        torch.manual_seed(1)
        for _ in range(2):
            step(parallel)
        return [*model.buffers(), *(p.grad for p in model.parameters()), torch.get_rng_state()]

    whole = train(lambda net: F.cross_entropy(net(X), Y).backward())
    by_shard = train(lambda net: net.forward_backward(F.cross_entropy, X, Y))
    torch.testing.assert_close(by_shard, whole)
    assert by_shard[2] == 2  # num_batches_tracked


@pytest.mark.parametrize(("levels", "concurrency"), [(2, 1), (2, 3), (3, 2)])
def test_only_running_shards_have_activations(levels, concurrency):
    alive, peak, lock = weakref.WeakSet(), [0], threading.Lock()

    class Saved:
        """What a hook packs: lives exactly as long as the graph needs it."""

        def __init__(self, tensor):
            self.tensor = tensor

    def pack(x):
        held = Saved(x.detach())  # (with its graph it would hold itself)
        with lock:
            alive.add(held)
            peak[0] = max(peak[0], len(alive))
        return held

    class Once(nn.Module):
        """Saves a single tensor: its output."""

        def forward(self, x):
            return x.exp()

    with ts.KissingSpheres(levels, concurrency=concurrency) as spheres:
        x = torch.zeros(spheres.leaves, 4, requires_grad=True)
        parallel = ts.SphereParallel(Once(), spheres)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            parallel.forward_backward(lambda out, y: out.mean(), x, x.detach())
            assert 1 <= peak[0] <= concurrency
            assert soon(lambda: not alive)
            peak[0] = 0
            out = parallel(x)
        assert peak[0] == len(alive) == spheres.leaves, "as opposed to forward alone"
        del out
        assert soon(lambda: not alive)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda out, y: out, ValueError, r"must return a scalar.*returned \(\d, 3\)"),
        (lambda out, y: None, ValueError, r"must return a scalar.*returned None"),
        (
            lambda out, y: (out.sum(),),
            ValueError,
            r"must return a scalar tensor, or \(sum, count\)",
        ),
        (lambda out, y: (out, len(y)), ValueError, r"or \(sum, count\).*returned \(\d, 3\)"),
        (lambda out, y: out.sum().item(), ValueError, "must return a scalar tensor"),
        (lambda out, y: out.detach().mean(), ValueError, "without a graph"),
        (
            lambda out, y: out.sum() if len(y) == 4 else (out.sum(), len(y)),
            ValueError,
            r"\(sum, count\) for some shards, a mean for others",
        ),
        (lambda out, y: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
    ids=["rows", "None", "tuple of one", "pair of rows", "float", "no graph", "mixed", "error"],
)
def test_losses_that_cannot_be_used(spheres, loss_fn, error, message):
    parallel = ts.SphereParallel(mlp().double(), spheres)
    with pytest.raises(error, match=message):
        parallel.forward_backward(loss_fn, X, Y)
    assert all(p.grad is None for p in parallel.parameters())
    parallel.forward_backward(F.cross_entropy, X, Y)
    assert len(parallel._engine.pool) <= spheres.concurrency


def test_an_error_in_the_loss_names_its_shard(spheres):
    parallel = ts.SphereParallel(mlp().double(), spheres)

    def picky(out, y):
        if y[0] == 7:
            raise ArithmeticError("seven")
        return out.mean()

    y = torch.arange(50)
    with pytest.raises(ArithmeticError) as caught:
        parallel.forward_backward(picky, X, torch.where(y == 18, 7, 0))
    assert caught.value.__notes__[0] == "in the loss of shard 4, rows 18 to 21 of the batch"


def test_what_it_says_at_the_call(spheres):
    parallel = ts.SphereParallel(mlp().double(), spheres)
    with pytest.raises(ValueError, match="inputs of 50 rows and targets of 49"):
        parallel.forward_backward(F.cross_entropy, X, Y[:49])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError, match="no gradients to compute"):
            parallel.forward_backward(F.cross_entropy, X, Y)
    with pytest.raises(ValueError, match="no tensor with rows"):
        parallel.forward_backward(lambda out, _: out.mean(), X, None)


# ---- losses that are no mean over rows ----


LABELS = torch.randint(0, 3, (48,), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.arange(48) % 5 + 1  # tokens of each row, of at most five


def tokens(out, y):
    """A mean over tokens that are no padding."""
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=-100)


def sum_and_tokens(out, y):
    mean_of = {"ignore_index": -100, "reduction": "sum"}
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), **mean_of), (y != -100).sum()


def contrastive(out, _y):
    return F.cross_entropy(out @ out.T, torch.arange(len(out)))


def padded():
    x = torch.randn(48, 5, 20, generator=torch.Generator().manual_seed(2))
    y = torch.randint(0, 3, (48, 5), generator=torch.Generator().manual_seed(3))
    y[torch.arange(5) >= LENGTHS[:, None]] = -100
    return x, y


@pytest.mark.parametrize(
    ("loss", "data", "match"),
    [
        (
            nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1, 10])),
            lambda: (torch.randn(48, 20), LABELS),
            r"no mean over rows.*Return \(sum, count\)",
        ),
        (
            nn.CrossEntropyLoss(reduction="sum"),
            lambda: (torch.randn(48, 20), LABELS),
            r"a sum over rows.*Return \(sum, count\)",
        ),
        (tokens, padded, r"no mean over rows.*tokens that are not padding"),
        (contrastive, lambda: (torch.randn(48, 20), LABELS), "looks across rows"),
        (
            lambda out, y: (F.cross_entropy(out, y, reduction="sum"), 3),
            lambda: (torch.randn(48, 20), LABELS),
            r"the counts of two shards do not add up",
        ),
        (
            lambda out, y: (contrastive(out, y) * len(y), len(y)),
            lambda: (torch.randn(48, 20), LABELS),
            r"the sums of two shards do not add up",
        ),
    ],
    ids=["class weights", "sum", "tokens", "contrastive", "a fixed count", "a pair across rows"],
)
def test_losses_that_are_put_together_as_others_are_told_once(spheres, loss, data, match):
    torch.manual_seed(0)
    parallel = ts.SphereParallel(nn.Linear(20, 3), spheres)
    with pytest.warns(UserWarning, match=match):
        parallel.forward_backward(loss, *data())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "loss_fn")
        parallel.forward_backward(loss, *data())


@pytest.mark.parametrize("which", ["mean", "tokens", "smoothed", "regression", "with dropout"])
def test_losses_that_are_right_hear_nothing(spheres, which):
    x, y = padded() if which == "tokens" else (torch.randn(48, 20), LABELS)
    losses = {
        "mean": F.cross_entropy,
        "tokens": sum_and_tokens,
        "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
        "regression": lambda out, y: F.mse_loss(out[:, 0], y.float()),
        "with dropout": lambda out, y: F.cross_entropy(F.dropout(out), y),
    }
    parallel = ts.SphereParallel(nn.Linear(20, 3), spheres)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "loss_fn")
        for _ in range(4):
            parallel.forward_backward(losses[which], x, y)


def test_padding_that_comes_later_is_told(spheres):
    x, y = padded()
    parallel = ts.SphereParallel(nn.Linear(20, 3), spheres)
    parallel.forward_backward(tokens, x, y.clamp(min=0))
    with pytest.warns(UserWarning, match="no mean over rows"):
        parallel.forward_backward(tokens, x, y)
