"""An unmodified `lightning.Trainer` around networks that run in shards.

Plain torch is the judge.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings(
    # Its advice on loaders and loggers, and a name that it has of torch's.
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
)


@pytest.fixture(scope="module")
def lightning():
    """Imported when a test runs, not when tests are collected: it takes seconds."""
    return pytest.importorskip("lightning", reason="not there for every Python and torch")


@pytest.fixture(scope="module")
def classifier(lightning):
    class Classifier(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net, self.seen = net, []

        def forward(self, x):
            return self.net(x)

        def loss(self, batch, name):
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            self.seen.append((name, loss.item()))
            self.log(name, loss)
            return loss

        def training_step(self, batch, batch_idx):
            return self.loss(batch, "train")

        def validation_step(self, batch, batch_idx):
            self.loss(batch, "validation")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Classifier


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def fit(lightning, model, folder):
    data = torch.Generator().manual_seed(1)
    x, y = torch.randn(60, 8, generator=data), torch.randint(0, 3, (60,), generator=data)
    loader = DataLoader(TensorDataset(x, y), 20)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, loader, loader)
    trainer.save_checkpoint(folder / "saved.ckpt")


MAKERS = {
    "wrapped inside": lambda kind, spheres: kind(ts.SphereParallel(network(), spheres)),
    "in place inside": lambda kind, spheres: kind(ts.parallelize_(network(), spheres)),
    "in place": lambda kind, spheres: ts.parallelize_(kind(network()), spheres),
}


@pytest.mark.parametrize("make", MAKERS)
def test_training_is_that_of_the_bare_network(spheres, tmp_path, lightning, classifier, make):
    model, bare, rows = MAKERS[make](classifier, spheres), classifier(network()), []
    part = model.get_submodule("net.0")
    part.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    fit(lightning, model, tmp_path)
    fit(lightning, bare, tmp_path / "bare")
    assert {*rows} == {1, 2}  # of twenty rows in twelve shards
    assert [name for name, _ in model.seen] == [name for name, _ in bare.seen]
    assert len(bare.seen) == 2 + 2 * (3 + 3)  # two batches of a check beforehand
    assert [loss for _, loss in model.seen] == pytest.approx([loss for _, loss in bare.seen])
    torch.testing.assert_close(model.state_dict(), bare.state_dict())
    # The checkpoint is one of the bare network's.
    loaded = classifier.load_from_checkpoint(tmp_path / "saved.ckpt", net=network())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    assert list(copy.deepcopy(model).state_dict()) == list(bare.state_dict())
