"""Loaders of other classes, and what frameworks make of a wrapped one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Rows(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.tensor(float(index))


def rows_of(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_made_as_a_data_loader_is(spheres, workers):
    options = {"batch_size": 5, "num_workers": workers, "drop_last": True}
    loader = ts.SphereLoader(Rows(), spheres=spheres, **options)
    assert loader.spheres is spheres and isinstance(loader, DataLoader)
    assert rows_of(loader) == rows_of(DataLoader(Rows(), **options))
    again = type(loader)(loader.dataset, 4)
    assert rows_of(again) == rows_of(DataLoader(Rows(), 4)) and again.spheres is not spheres
    state_of = iter(loader)
    next(state_of)
    assert loader.state_dict()["tasks"] == 1
    with pytest.raises(TypeError, match="spheres must be a KissingSpheres, got int"):
        ts.SphereLoader(Rows(), spheres=3)
    with pytest.raises(ValueError, match=r"needs a DataLoader with num_workers > 0"):
        ts.SphereLoader(Rows(), workers="process")
    with pytest.raises(ValueError, match="batch_size"):
        ts.SphereLoader(Rows(), batch_size=-3)


def rebuilt_from_its_attributes(loader, batches):
    """As ignite's DeterministicEngine makes a loader with other batches."""
    left_out = ("batch_size", "sampler", "drop_last", "batch_sampler", "dataset_kind")
    names = [n for n in vars(loader) if not n.startswith("_") and n not in left_out]
    return type(loader)(batch_sampler=batches, **{n: getattr(loader, n) for n in names})


class Named(DataLoader):
    """A class of the user's."""

    def __init__(self, *args, name="none", **kwargs):
        super().__init__(*args, **kwargs)
        self.name = name


@pytest.mark.parametrize("kind", [DataLoader, Named])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_rebuilt_keeps_its_spheres_and_settings(spheres, kind, workers):
    loader = ts.wrap(kind(Rows(), 6, num_workers=workers), spheres, copy_dataset=True)
    batches = BatchSampler(SequentialSampler(range(24)), 8, drop_last=False)
    again = rebuilt_from_its_attributes(loader, batches)
    assert type(again) is type(loader) and again.spheres is spheres and again.copy_dataset is True
    assert rows_of(again) == rows_of(DataLoader(Rows(), 8))


def test_another_number_of_workers(spheres):
    plain = DataLoader(Rows(), 6)
    for workers in (0, 1, 3):
        loader = ts.wrap(plain, spheres, num_workers=workers)
        assert loader.num_workers == workers and rows_of(loader) == rows_of(plain)
    fewer = DataLoader(Rows(), 6, num_workers=3, persistent_workers=True, timeout=60)
    assert rows_of(ts.wrap(fewer, spheres, num_workers=0)) == rows_of(plain)
    assert plain.num_workers == 0 and fewer.num_workers == 3
    with pytest.raises(ValueError, match="num_workers must be at least 0, got -1"):
        ts.wrap(plain, spheres, num_workers=-1)
    with pytest.raises(ValueError, match="give the DataLoader that many itself"):
        ts.wrap(plain, spheres, num_workers=2, workers="process")


def test_accelerate_is_told_of_and_its_loaders_take_spheres_inside(spheres):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    plain = DataLoader(Rows(), 6)
    with pytest.warns(UserWarning, match=r"without the spheres: prepare the plain DataLoader"):
        accelerator.prepare(ts.wrap(plain, spheres))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Accelerate")
        prepared = accelerator.prepare(plain)
    with pytest.raises(ValueError, match=r"Accelerate's, around a DataLoader.*base_dataloader"):
        ts.wrap(prepared, spheres)
    prepared.base_dataloader = ts.wrap(prepared.base_dataloader, spheres)  # as it says
    assert rows_of(prepared) == rows_of(plain)
    assert prepared.base_dataloader.stats().batches == 4


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")
def test_loaders_that_make_their_iterators_themselves(spheres):
    class Own(DataLoader):
        def _get_iterator(self):
            return iter([1, 2, 3])

    with pytest.raises(ValueError, match=r"Own makes its iterators itself.*wrap that"):
        ts.wrap(Own(Rows()), spheres)

    class Pipeline:  # as webdataset's WebLoader
        pipeline = ()

    with pytest.raises(TypeError, match=r"got Pipeline.*webdataset.*wrap\(DataLoader"):
        ts.wrap(Pipeline(), spheres)


@pytest.mark.parametrize("what", ["predict", "overfit"])
def test_lightning_rebuilds_a_wrapped_loader(spheres, what, tmp_path):
    """With another sampler: for predictions, and to overfit a few batches."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.n, self.seen = nn.Linear(1, 1), []

        def training_step(self, batch, _):
            self.seen.append(batch[0].flatten().tolist())
            return self.n(batch[0]).square().mean()

        def predict_step(self, batch, _):
            return batch[0].flatten()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = TensorDataset(torch.arange(24.0)[:, None])
    loader = ts.wrap(DataLoader(data, 6, shuffle=what == "overfit", num_workers=2), spheres)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        overfit_batches=2 if what == "overfit" else 0,
    )  # fmt: skip
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if what == "predict":
            assert torch.cat(trainer.predict(net, loader)).tolist() == [*range(24)]
        else:
            trainer.fit(net, loader)
            assert net.seen == [
                [*range(6)],
                [*range(6, 12)],
            ]  # without a shuffle, as Lightning has it
