"""What goes into a call: which dimension the batch is, what is cut, and what is refused."""

from __future__ import annotations

import collections
import collections.abc
import copy
import types
from collections import deque

import numpy as np
import pytest
import torch
from judge import Calls, judged
from torch import nn
from torch.nn import functional as F

import torch_spheres as ts

ROWS = 26  # uneven: two shards of three rows
X = torch.randn(ROWS, 5, 4, generator=torch.Generator().manual_seed(0))
T = X.transpose(0, 1).contiguous()  # time-major


@pytest.fixture(params=[1, 12], ids=["alone", "twelve at once"], scope="module")
def spheres(request):
    with ts.KissingSpheres(concurrency=request.param) as running:
        yield running


# ---- time-major layers ----


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers(spheres, kind, batch_first):
    torch.manual_seed(0)
    rnn = kind(4, 3, 2, batch_first=batch_first, bidirectional=True)
    if batch_first:
        judged(rnn, spheres, (X,))
    else:
        judged(rnn, spheres, (T,), batch_dim=1)
        judged(rnn, spheres, (T,), batch_dim={"input": 1})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_carried_states_have_the_batch_in_another_dimension(spheres, kind):
    torch.manual_seed(0)
    rnn = kind(4, 3, 2, batch_first=True)
    state = torch.randn(2, ROWS, 3)
    hx = (state, 2 * state) if kind is nn.LSTM else state
    for args, kwargs in (((X, hx), {}), ((X,), {"hx": hx})):
        judged(rnn, spheres, args, kwargs, batch_dim={"hx": 1})
    with pytest.raises(ValueError, match=r"'hx' has a tensor of shape \(2, 26, 3\), 2 along"):
        ts.SphereParallel(rnn, spheres)(X, hx)


def test_states_are_carried_from_call_to_call(spheres):
    torch.manual_seed(0)
    plain = nn.LSTM(4, 4, 2, batch_first=True)
    model = ts.SphereParallel(copy.deepcopy(plain), spheres, batch_dim={"hx": 1})
    ours = theirs = None
    for step in range(3):
        x = X[:, step : step + 2]
        out, ours = model(x) if ours is None else model(x, ours)
        expected, theirs = plain(x, theirs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_layers(spheres, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
    padding = torch.zeros(ROWS, 5, dtype=torch.bool)
    padding[::3, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    if batch_first:
        judged(
            layer, spheres, (X, causal), {"src_key_padding_mask": padding.float() * -9.0},
            whole=("src_mask",),
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"'src_mask'.*\(5, 5\), 5 along .*whole=\('src_mask'"):
            ts.SphereParallel(layer, spheres)(X, causal)
    else:
        judged(
            layer, spheres, (T, causal), {"src_key_padding_mask": padding.float() * -9.0},
            batch_dim={"src": 1}, whole=["src_mask"],
        )  # fmt: skip
        judged(layer, spheres, (T,), batch_dim=1)
        with pytest.raises(ValueError, match="'src_key_padding_mask' has a tensor of shape"):
            ts.SphereParallel(layer, spheres, batch_dim=1)(T, src_key_padding_mask=padding)


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention(spheres, batch_first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    x, dims = (X, 0) if batch_first else (T, {"query": 1, "key": 1, "value": 1})
    judged(attention, spheres, (x, x, x), batch_dim=dims)  # the weights have the batch first
    judged(attention, spheres, (x, x, x), {"need_weights": False}, batch_dim=dims)
    mask = torch.randn(5, 5)
    judged(attention, spheres, (x, x, x), {"attn_mask": mask}, batch_dim=dims, whole=("attn_mask",))


def test_a_gradient_for_what_every_shard_has(spheres):
    """The sum over the shards, as for a tensor without dimensions."""
    scale, x = torch.rand(4) + 0.5, torch.randn(ROWS, 4)

    class Scaled(nn.Linear):
        def forward(self, x, scale, *more):
            return super().forward(x) * scale

    judged(Scaled(4, 4), spheres, (x, scale), whole=("scale",))
    judged(Scaled(4, 4), spheres, (x,), {"scale": scale}, whole=("scale",))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_along_any_dimension(spheres, dim):
    x = torch.randn(ROWS, 3, 4).movedim(0, dim)

    def fn(s, x):
        return s.layer(x.movedim(dim, 0)).movedim(0, dim)

    judged(Calls(fn), spheres, (x,), batch_dim=dim)
    expected = [ROWS // 12 + (k < ROWS % 12) for k in range(12)]
    seen = []
    model = ts.SphereParallel(
        Calls(lambda s, x: seen.append(x) or fn(s, x)), spheres, batch_dim=dim
    )
    model(x)
    assert sorted(t.shape[dim] for t in seen[:12]) == sorted(expected)
    assert all(t.is_contiguous() and t.data_ptr() % 64 == 0 for t in seen[:12])


def test_forward_backward_cuts_targets_along_batch_dim(spheres):
    torch.manual_seed(0)
    plain = nn.LSTM(4, 3)
    model = ts.SphereParallel(copy.deepcopy(plain), spheres, batch_dim=1)

    def loss_fn(output, target):
        return F.mse_loss(output[0], target)

    for target in (torch.randn(5, ROWS, 3), torch.randn(ROWS)):
        if target.dim() == 1:

            def loss_fn(output, target):
                return F.mse_loss(output[0][-1, :, 0], target)

        model.zero_grad()
        plain.zero_grad()
        loss = model.forward_backward(loss_fn, T, target)
        expected = loss_fn(plain(T), target)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    named = ts.SphereParallel(copy.deepcopy(plain), spheres, batch_dim={"input": 1})
    loss = named.forward_backward(loss_fn, T, torch.randn(ROWS))  # targets along dimension 0
    assert loss.isfinite()


# ---- squares ----


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x, mask=None, *, gate=None):
        y = self.attention(x, x, x, attn_mask=mask)[0]
        return y if gate is None else y * gate.sum(1)[:, None, None]


def test_a_square_mask_is_refused_until_it_is_said(spheres):
    x, mask = torch.randn(5, 5, 4), torch.randn(5, 5)
    model = ts.SphereParallel(Masked(), spheres)
    with pytest.raises(
        ValueError, match=r"argument 'mask' has shape \(5, 5\), .*whole=\('mask',\)"
    ):
        model(x, mask)
    with pytest.raises(ValueError, match=r"batch_dim=\{'gate': 0\}"):
        model(x, gate=mask)
    assert model(torch.randn(7, 3, 4)).shape == (7, 3, 4)  # the model goes on
    judged(Masked(), spheres, (x, mask), whole=("mask",))
    judged(Masked(), spheres, (x,), {"gate": mask}, batch_dim={"gate": 0})


def test_a_batch_that_is_a_square_is_cut(spheres):
    judged(nn.Linear(4, 4), spheres, (torch.randn(4, 4),))


def test_what_was_once_no_square_may_be_one_later(spheres):
    """A mask over positions would have been refused: so padded batches do not fail by chance."""
    model = ts.SphereParallel(Masked(), spheres)
    x = torch.randn(6, 3, 4)
    model(x, gate=torch.ones(6, 5))
    torch.testing.assert_close(model(x, gate=torch.ones(6, 6)), 6 * model(x), rtol=1e-4, atol=1e-5)


# ---- sequences ----


class Captions(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x, captions, extra=None):
        lengths = torch.tensor([len(c) if isinstance(c, str) else int(c) for c in captions])
        assert extra is None or len(extra) in (2, 3), "every shard has all of it"
        return self.w * x * lengths[:, None]


TEXTS = ["a" * (i % 7) for i in range(ROWS)]
LENGTHS = [i % 7 for i in range(ROWS)]
SEQUENCES = {
    "captions": TEXTS,
    "lengths": LENGTHS,
    "tuple": tuple(TEXTS),
    "deque": deque(TEXTS),
    "range": range(ROWS),
    "numpy": np.array(LENGTHS),
    "numpy strings": np.array(TEXTS),
}


@pytest.mark.parametrize("captions", SEQUENCES.values(), ids=SEQUENCES)
def test_a_sequence_as_long_as_the_batch_is_cut_if_it_is_said(spheres, captions):
    x = torch.randn(ROWS, 4)
    kind = type(captions).__name__
    with pytest.raises(
        ValueError,
        match=rf"'captions' is a {kind} of 26 elements, .*batch_dim=\{{'captions': 0\}}\).*whole=",
    ):
        ts.SphereParallel(Captions(), spheres)(x, captions)
    model = ts.SphereParallel(Captions(), spheres, batch_dim={"captions": 0})
    torch.testing.assert_close(model(x, captions), Captions()(x, captions))
    torch.testing.assert_close(model(x, captions=captions), Captions()(x, captions))
    with pytest.raises(ValueError, match="there are 26 rows and 25 elements"):
        model(x, captions=[*captions][:-1])


def test_sequences_inside_of_an_argument(spheres):
    class Batch(nn.Module):
        def forward(self, batch):
            sizes = torch.tensor([len(c) for c in batch["captions"]])
            assert len(batch["sizes"]) == 2
            return batch["x"] * sizes[:, None]

    batch = {"x": torch.randn(ROWS, 4), "captions": TEXTS, "sizes": (3, 4)}
    with pytest.raises(ValueError, match=r"captions.* is a list of 26 elements"):
        ts.SphereParallel(Batch(), spheres)(batch)
    model = ts.SphereParallel(Batch(), spheres, batch_dim={"batch": 0})
    torch.testing.assert_close(model(batch), Batch()(batch))


def test_a_sequence_that_every_shard_needs(spheres):
    class Scales(nn.Module):
        def forward(self, x, scales):
            return x * sum(scales)

    x = torch.randn(ROWS, 4)
    model = ts.SphereParallel(Scales(), spheres, whole=("scales",))
    torch.testing.assert_close(model(x, LENGTHS), x * sum(LENGTHS))
    # One that was no longer than that is what it is, whatever batch comes later.
    model = ts.SphereParallel(Scales(), spheres)
    for rows in (ROWS, 3, 2):
        torch.testing.assert_close(model(x[:rows], (2, 3)), 5 * x[:rows])
    with pytest.raises(ValueError, match="'scales' is a tuple of 2 elements"):
        ts.SphereParallel(Scales(), spheres)(x[:2], (2, 3))
    assert ts.SphereParallel(Scales(), spheres)(x[:1], (3,)).shape == (1, 4), "one row, one shard"


def test_sizes_are_no_rows(spheres):
    class Sized(nn.Module):
        def forward(self, x, size, name):
            return x.expand(-1, *size[1:]) * len(name)

    x = torch.randn(2, 1)
    assert ts.SphereParallel(Sized(), spheres)(x, torch.Size([2, 4]), "ab").shape == (2, 4)


@pytest.mark.usefixtures("no_comparison")
def test_targets_without_tensors_are_cut(spheres):
    x = torch.randn(ROWS, 4)
    seen = []

    def loss_fn(output, target):
        seen.append(len(target["texts"]))
        assert len(target["texts"]) == len(output) == len(target["y"])
        return (output - target["y"]).square().mean()

    model = ts.SphereParallel(nn.Linear(4, 4), spheres)
    model.forward_backward(loss_fn, x, {"y": x, "texts": TEXTS})
    assert sum(seen) == ROWS


# ---- mappings ----


class Shared(collections.abc.MutableMapping):
    """Whose copies share what they hold."""

    def __init__(self, values):
        self.values_ = values

    def __getitem__(self, key):
        return self.values_[key]

    def __setitem__(self, key, value):
        self.values_[key] = value

    def __delitem__(self, key):
        del self.values_[key]

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


def test_mappings_that_cannot_be_copied_are_refused_and_left_alone(spheres):
    x = torch.randn(24, 4)
    batch = Shared({"x": x})
    model = ts.SphereParallel(Calls(lambda s, batch: s.layer(batch["x"])), spheres)
    with pytest.raises(TypeError, match=r"copy\.copy\(\) gives no copy.*use a dict"):
        model(batch)
    assert batch["x"] is x
    frozen = types.MappingProxyType({"x": x})
    assert torch.equal(model(frozen), model({"x": x}))
    assert torch.equal(model(collections.UserDict({"x": x})), model({"x": x}))
