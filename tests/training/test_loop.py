"""The loop that was there before: whatever it does around the model goes on working."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from loop_support import assert_same_gradients, assert_same_weights, pair
from torch import nn
from torch.nn import functional as F

import torch_spheres as ts

X = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(1))


def mlp(width: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, width))


def test_clipping_and_steps_give_the_weights_of_the_bare_module(spheres):
    for net in (pair_of := pair(mlp(), spheres)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(X), Y).backward()
            assert torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
            optimizer.step()
    assert_same_weights(*pair_of)


def contrastive(out):
    out = F.normalize(out)
    return F.cross_entropy(out @ out.T / 0.1, torch.arange(len(out)).roll(1))


@pytest.mark.parametrize(
    "loss_of",
    [
        contrastive,
        lambda out: (out - out.mean(0)).pow(2).sum().sqrt(),
        lambda out: out[out[:, 0].argsort()[:7]].sum(),  # rows of some shards only
        lambda out: out[3].sum() + 2 * out[-1].max(),
    ],
    ids=["contrastive", "spread", "topk", "two rows"],
)
def test_losses_over_the_whole_batch(spheres, loss_of):
    parallel, bare = pair(mlp(), spheres)
    for net in (parallel, bare):
        loss_of(net(X)).backward()
    assert_same_gradients(parallel, bare)


def test_the_output_is_part_of_a_larger_graph(spheres):
    torch.manual_seed(3)
    before, after = nn.Linear(6, 6).double(), nn.Linear(3, 1).double()
    parallel, bare = pair(mlp(), spheres)
    grads = []
    for net in (parallel, bare):
        out = net(before(X))
        out += 1  # in place, as on any output
        after(out.relu_()).sum().backward()
        grads.append([p.grad.clone() for p in (*before.parameters(), *after.parameters())])
        before.zero_grad()
        after.zero_grad()
    torch.testing.assert_close(*grads)
    assert_same_gradients(parallel, bare)


def test_two_calls_before_one_backward(spheres):
    parallel, bare = pair(mlp(), spheres)
    for net in (parallel, bare):
        F.cosine_embedding_loss(net(X), net(X.flip(0)), torch.ones(50)).backward()
    assert_same_gradients(parallel, bare)


def test_accumulation_over_parts_is_the_larger_batch(spheres):
    parallel, bare = pair(mlp(), spheres)
    F.cross_entropy(bare(X), Y).backward()
    with parallel.no_sync():
        (F.cross_entropy(parallel(X[:30]), Y[:30]) * 0.6).backward()
    (F.cross_entropy(parallel(X[30:]), Y[30:]) * 0.4).backward()
    assert_same_gradients(parallel, bare)


def test_two_models_on_one_hierarchy_play_gan(spheres):
    class Critic(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def play(generator, critic):
        noise = torch.Generator().manual_seed(4)
        make = torch.optim.SGD(generator.parameters(), lr=0.1, momentum=0.5)
        judge = torch.optim.Adam(critic.parameters(), lr=0.01)
        for _ in range(2):
            fake = generator(torch.randn(50, 6, generator=noise, dtype=torch.float64))
            judge.zero_grad()
            (critic(fake.detach()).exp().mean() - critic(X).mean()).backward()
            judge.step()
            make.zero_grad()
            critic.requires_grad_(False)
            (-critic(fake).mean()).backward()
            critic.requires_grad_(True)
            make.step()

    torch.manual_seed(5)
    generator, bare_generator = pair(mlp(6), spheres)
    critic, bare_critic = pair(Critic(), spheres)
    critic.eval()  # batch statistics of a shard are not those of the batch
    bare_critic.eval()
    play(generator, critic)
    play(bare_generator, bare_critic)
    assert_same_weights(generator, bare_generator)
    assert_same_weights(critic, bare_critic)


def test_freezing_while_a_graph_is_pending(spheres):
    parallel, bare = pair(mlp(), spheres)
    for net in (parallel, bare):
        first = net(X)
        next(iter(net.parameters())).requires_grad_(False)
        second = net(2 * X)
        (first + second).sum().backward()
        net.requires_grad_(True)
    assert_same_gradients(parallel, bare)
    assert next(iter(parallel.parameters())).grad is None


def test_closures(spheres):
    parallel, bare = pair(mlp(), spheres)
    for net in (parallel, bare):
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3, line_search_fn="strong_wolfe")

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(X), Y)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
    mine, other = parallel.state_dict(), bare.state_dict()
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_grad_scaler_skips_and_steps(spheres):
    model = mlp()
    parallel = ts.SphereParallel(model, spheres)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model.state_dict())

    def step(x):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(parallel(x), Y)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), 100.0)
        scaler.step(optimizer)
        scaler.update()

    bad = X.float()
    bad[20] = float("inf")  # in one shard
    step(bad)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert scaler.get_scale() == 512
    step(X.float())
    plain = copy.deepcopy(model)
    plain.load_state_dict(before)
    F.cross_entropy(plain(X.float()), Y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-4, atol=1e-6)


def test_an_average_of_the_weights(spheres):
    """`swa_utils.AveragedModel` copies the model, averages it, and runs it to set buffers."""
    parallel = ts.SphereParallel(nn.Sequential(mlp(), nn.BatchNorm1d(3)).double(), spheres)
    average = torch.optim.swa_utils.AveragedModel(parallel)
    with torch.no_grad():
        for p in parallel.parameters():
            p.add_(2)
    average.update_parameters(parallel)
    average.update_parameters(parallel)
    torch.testing.assert_close(list(average.module.parameters()), list(parallel.parameters()))
    torch.optim.swa_utils.update_bn([X, X], average)
    assert average.module.module[1].num_batches_tracked == 2
    assert parallel.module[1].num_batches_tracked == 0


def test_saving_and_loading_exchange_files_with_the_bare_module(spheres):
    parallel, bare = pair(nn.Sequential(mlp(), nn.BatchNorm1d(3)), spheres)
    parallel(X).sum().backward()
    file = io.BytesIO()
    torch.save(parallel.state_dict(), file)
    file.seek(0)
    bare.load_state_dict(torch.load(file))
    assert_same_weights(parallel, bare)
    with torch.no_grad():
        bare[0][0].weight.zero_()
    parallel.load_state_dict(bare.state_dict())
    assert torch.equal(parallel.eval()(X), bare.eval()(X))
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.running_mean"'):
        parallel.load_state_dict({k: v for k, v in bare.state_dict().items() if "mean" not in k})
    parallel.load_state_dict(bare.state_dict(), assign=True)
    assert torch.equal(parallel(X), bare(X))


def test_saving_and_loading_the_whole_model(spheres):
    parallel = ts.SphereParallel(mlp().double(), spheres)
    file = io.BytesIO()
    torch.save(parallel, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), parallel(X))
    outer = nn.ModuleList([loaded])  # its keys are still the bare module's
    outer.load_state_dict(nn.ModuleList([mlp().double()]).state_dict())
    loaded.spheres.stop()


def test_what_a_newcomer_gets_wrong_or_right(spheres):
    model = mlp()
    parallel = ts.SphereParallel(model, spheres)
    assert list(map(id, parallel.parameters())) == list(map(id, model.parameters()))
    assert parallel.to(torch.float64) is parallel
    assert parallel(X).dtype == model[0].weight.dtype == torch.float64
    model.note = "attributes are the module's"
    assert parallel.note == model.note
    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'notes'"):
        _ = parallel.notes
    with pytest.raises(TypeError, match="wrap the bare module"):
        ts.SphereParallel(parallel, spheres)
    with pytest.raises(TypeError, match="has a DataParallel in it"):
        ts.SphereParallel(nn.Sequential(nn.DataParallel(model)), spheres)


def test_stopped_spheres_say_so_and_can_be_started_again():
    made = ts.KissingSpheres().start()
    made.stop()
    parallel = ts.SphereParallel(mlp().double(), made)
    with pytest.raises(ts.StoppedError, match=r"the spheres are not running; call start\(\)"):
        parallel(X)
    with made.start():
        out = parallel(X)
    with pytest.raises(ts.StoppedError, match="the spheres are not running"):
        out.sum().backward()
