"""Outputs without dimensions are means or sums; what is neither is told of. What rounding is."""

from __future__ import annotations

import warnings

import pytest
import torch
from judge import Calls, judged, parallel
from torch import nn
from torch.nn import functional as F

import torch_spheres as ts
from torch_spheres.training.rounding import differs

X = torch.randn(26, 5, 4, generator=torch.Generator().manual_seed(0))


def told(model, *args, calls=1, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            model(*args, **kwargs)
    return [w for w in caught if "of the module" in str(w.message)]


# ---- scalars ----


def test_scalars_are_means_or_sums(spheres):
    x = X[:, 0]
    judged(Calls(lambda s, x: (s.layer(x) ** 2).mean()), spheres, (x,))
    judged(Calls(lambda s, x: (s.layer(x) ** 2).sum()), spheres, (x,), scalars="sum")
    judged(
        Calls(lambda s, x: {"loss": (s.layer(x) ** 2).sum(), "rows": torch.tensor(len(x))}),
        spheres, (x,), scalars="sum",
    )  # fmt: skip
    for fn in (lambda s, x: s.vector[0] * 2, lambda s, x: s.layer(x).mean() + s.vector.sum()):
        judged(Calls(fn), spheres, (x,))


def test_numbers_and_flags_without_dimensions(spheres):
    """They have no mean: what is the same for all shards comes back as it is."""
    fixed = parallel(lambda s, x: (s.layer(x), torch.tensor(5), torch.tensor(True)), spheres)
    _, number, flag = fixed(X[:, 0])
    assert number.dtype == torch.int64 and number == 5
    assert flag.dtype == torch.bool and flag
    x = torch.arange(96.0).reshape(48, 2).cos()
    for fn in (lambda s, x: x.argmax(), lambda s, x: x[0, 0] > 0):
        model = parallel(fn, spheres)
        with warnings.catch_warnings(), pytest.raises(ValueError, match="differs from shard to"):
            warnings.simplefilter("ignore")  # it is told as well that they are no sum
            model(x)


SCALARS = {
    "a sum taken for a mean": (
        lambda s, x: s.layer(x).sum(), "mean", "is a sum over rows, .*scalars='sum'",
    ),
    "a mean taken for a sum": (
        lambda s, x: s.layer(x).mean(), "sum", "is a mean over rows, .*scalars='mean'",
    ),
    "a weight taken for a sum": (
        lambda s, x: s.vector[0] * 1, "sum", "is a mean over rows, .*scalars='mean'",
    ),
    "a mean over something else": (
        lambda s, x: s.layer(x)[x > 0.7].mean(), "mean", "neither the .*forward_backward",
    ),
    "a deviation": (lambda s, x: s.layer(x).std(), "mean", "neither the mean nor the sum"),
    "a maximum": (lambda s, x: x.max(), "sum", "neither the mean nor the sum"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_that_are_something_else_are_told(spheres, name):
    fn, scalars, message = SCALARS[name]
    model = parallel(fn, spheres, scalars=scalars)
    with pytest.warns(UserWarning, match=f"output 0 of the module has no dimensions.*{message}"):
        model(X[:, 0])
    assert told(model, X[:, 0]) == []


class Counted(nn.Module):
    """As Hugging Face's models: the loss is divided by the whole batch's count if it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x, labels=None, num_items_in_batch=None):
        logits = self.layer(x)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits, labels, reduction=reduction)
        return {"loss": loss / (num_items_in_batch or 1), "logits": logits}


@pytest.mark.parametrize("count", [None, 26, torch.tensor(26)], ids=str)
@pytest.mark.parametrize("scalars", ["mean", "sum"])
def test_losses_that_are_divided_by_the_batchs_count(spheres, count, scalars):
    x, labels = X[:, 0], torch.arange(26) % 4
    kwargs = {"labels": labels, "num_items_in_batch": count}
    if count is None and scalars == "sum":
        with pytest.warns(UserWarning, match="scalars='mean'"):
            ts.SphereParallel(Counted(), spheres, scalars="sum")(x, **kwargs)
    else:
        judged(Counted(), spheres, (x,), kwargs, scalars=scalars)


def test_a_count_that_the_model_does_not_use_changes_nothing(spheres):
    """The comparison shows that the loss is a mean all the same."""

    class Ignores(nn.Linear):
        def forward(self, x, num_items_in_batch=None):
            del num_items_in_batch
            return super().forward(x).square().mean()

    judged(Ignores(4, 4), spheres, (X[:, 0],), {"num_items_in_batch": 26})


class Tokens(nn.Linear):
    """As heads of Hugging Face's models: a mean over tokens, which may ignore the count."""

    def __init__(self, divides):
        super().__init__(4, 3)
        self.divides = divides

    def forward(self, x, labels, num_items_in_batch=None):
        out = super().forward(x).flatten(0, 1)
        if self.divides and num_items_in_batch is not None:
            return F.cross_entropy(out, labels.flatten(), reduction="sum") / num_items_in_batch
        return F.cross_entropy(out, labels.flatten())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("padding", ["none", "in the first rows", "in others"])
@pytest.mark.parametrize("divides", [False, True])
def test_whether_a_head_divides_by_the_count_does_not_depend_on_the_batch(
    spheres, divides, padding, as_tensor
):
    """It is asked with another count."""
    torch.manual_seed(0)
    model = Tokens(divides)
    x, labels = X, torch.randint(0, 3, X.shape[:2])
    if padding != "none":
        labels[slice(0, 3) if padding == "in the first rows" else slice(9, 12), 2:] = -100
    count = int((labels != -100).sum())
    parallel = ts.SphereParallel(model, spheres)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            given = torch.tensor(count) if as_tensor else count
            loss = parallel(x, labels, num_items_in_batch=given)
    pieces = [*zip(x.tensor_split(12), labels.tensor_split(12), strict=True)]
    if divides:
        expected = model(x, labels, num_items_in_batch=count)
    else:  # the mean of the shards', which is the batch's if all rows have as many tokens
        expected = sum(model(a, b) * len(a) / len(x) for a, b in pieces)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("when", ["later", "elsewhere", "hardly"])
def test_a_mean_over_tokens_is_told_when_it_shows(spheres, when):
    """In a batch to come, in rows that are not the first, in losses that are nearly the same."""
    torch.manual_seed(0)
    model = Tokens(False)
    if when == "hardly":
        with torch.no_grad():
            model.weight.mul_(0.01)
    x, labels = torch.randn(48, 5, 4), torch.randint(0, 3, (48, 5))
    labels_with_padding = labels.clone()
    if when == "elsewhere":
        labels_with_padding[20:26, 1:] = -100
    else:
        labels_with_padding[torch.arange(5) > torch.arange(48)[:, None] % 7] = -100
    parallel = ts.SphereParallel(model, spheres)
    if when == "later":
        parallel(x, labels)
    with pytest.warns(UserWarning, match="tokens that are not padding"):
        torch.stack([parallel(x, labels_with_padding) for _ in range(4)])


def test_means_over_rows_hear_nothing_in_any_call(spheres):
    parallel = ts.SphereParallel(Tokens(False), spheres)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "output 0")
        for _ in range(9):
            parallel(torch.randn(48, 5, 4), torch.randint(0, 3, (48, 5)))


# ---- rounding ----


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0001], False),
        ([1.0, 2.0], [1.0, 2.01], True),
        ([1e-3, 2e3], [2e-3, 2e3], False),
        ([float("nan"), 1.0], [float("nan"), 1.0], False),
        ([float("nan"), 1.0], [1.0, 1.0], True),
        ([float("inf")], [float("inf")], False),
        ([], [], False),
        ([1e-9], [2e-9], False),
        ([1e-3], [2e-3], True),
        ([1.0, -1e9, -1e9], [1.5, -1e9, -1e9], True),  # masked
        ([1.0, 3e4, 3e4], [1.00001, 3e4, 3e4], False),
    ],
)
def test_what_is_rounding(a, b, expected):
    assert differs(torch.tensor(a), torch.tensor(b), torch.finfo(torch.float32).eps) == expected


def test_rounding_of_other_types():
    eps = torch.finfo(torch.float32).eps
    half = torch.finfo(torch.bfloat16).eps
    assert differs(torch.tensor([1, 2]), torch.tensor([1, 3]), eps)
    assert not differs(torch.tensor([1, 2]), torch.tensor([1, 3]), half), "ties fall either way"
    assert not differs(torch.tensor([1.0]), torch.tensor([1.05]), half)
    assert differs(torch.ones(2), torch.ones(3), eps)
    one = torch.tensor([1.0], dtype=torch.float64)
    assert differs(one, one + 1e-6, torch.finfo(torch.float64).eps)
