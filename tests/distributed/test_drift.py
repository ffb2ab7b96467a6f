"""Checksums of weights and of hyperparameters: what is compared between ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_spheres.distributed.drift import (
    OptimizerSteps,
    _checksum_by_sums,
    comparable_parameters,
    digests,
    first_difference,
    hyperparameters,
    is_due,
)

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn,
]  # fmt: skip


def of(value):
    return digests([("value", value)])["value"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 5000, 70_001])
def test_any_changed_bit_shows(dtype, count):
    raw = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(count)).to(dtype)
    before = of(raw)
    assert of(raw.clone()) == before
    for place in {0, count // 2, count - 1}:
        changed = raw.clone()
        as_bytes = (torch.view_as_real(changed) if dtype.is_complex else changed).reshape(-1)
        as_bytes = as_bytes.view(torch.uint8)
        as_bytes[place * changed.itemsize] ^= 1
        assert of(changed) != before


def test_wherever_a_tensor_begins_in_memory():
    memory = torch.randn(20_011)
    for begin in (0, 1, 3):
        view = memory[begin : begin + 20_000]
        assert of(view) == of(view.clone())
    table = torch.randn(300, 200)
    assert of(table.t()) == of(table.t().contiguous()) != of(table)
    assert of(torch.zeros(0)) == of(torch.zeros(0))


@pytest.mark.parametrize("checksum", [of, lambda t: _checksum_by_sums(t.reshape(-1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [20, 5000])
def test_values_that_have_changed_places_show(rows, dtype, checksum):
    table = torch.randn(rows, 8).to(dtype)
    assert checksum(table) == checksum(table.clone()) != checksum(table.flip(0))
    for here, there in ((0, 1), (0, rows - 1), (rows // 2, rows // 2 + 1), (rows - 2, rows - 1)):
        swapped = table.clone()
        swapped[[here, there]] = table[[there, here]]
        assert checksum(swapped) != checksum(table)


def test_what_is_compared():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.LazyLinear(4))
    assert [name for name, _ in comparable_parameters(module)] == [
        "0.weight", "0.bias", "1.weight", "1.bias",
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(module[0].parameters(), lr=torch.tensor(0.5))
    found = dict(hyperparameters([optimizer]))
    assert found["lr of AdamW, group 0"] == 0.5
    assert found["betas of AdamW, group 0"] == (0.9, 0.999)
    assert not any("params" in name for name in found)


def test_the_first_difference_is_named():
    assert first_difference([{"a": 1, "b": 2}, {"a": 1, "b": 2}]) is None
    assert first_difference([{"a": 1, "b": 2}, {"a": 1, "b": 3}]) == ("b", [2, 3])
    assert first_difference([{"a": 1}, {"a": 1, "c": 3}]) == ("c", ["nothing", 3])


def test_when_values_are_compared():
    assert [n for n in range(1, 300) if is_due(n)] == [2, 4, 8, 16, 32, 64, 128, 192, 256]


def test_steps_of_the_optimizers_of_a_module():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    steps = OptimizerSteps(module)
    mine, both = (
        torch.optim.SGD(module.parameters()),
        torch.optim.SGD([*module.parameters(), *other.parameters()]),
    )
    others = torch.optim.SGD(other.parameters())
    assert steps.calls_after_steps() == 0
    others.step()
    assert steps.calls_after_steps() == 0 and steps.optimizers == []
    mine.step()
    both.step()
    mine.step()
    assert steps.calls_after_steps() == 1 == steps.calls_after_steps()
    assert steps.optimizers == [mine, both]
    others.add_param_group({"params": list(module.parameters())})
    others.step()
    assert steps.calls_after_steps() == 2 and steps.optimizers == [others, mine, both]
    del mine
    assert len(steps.optimizers) == 2  # they are not kept
