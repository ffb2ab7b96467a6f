"""Private names of PyTorch's: `_compat.py` has them all, and what happens without each."""

from __future__ import annotations

import importlib.util
import itertools
import pkgutil
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fork_server
import pytest
import torch
from reference import digest
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

import torch_spheres as ts
from torch_spheres import _compat, _core
from torch_spheres.distributed.group import Ranks

SOURCE = Path(ts.__file__).parent
RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))

# What releases do not have, of those that have been tried; each has a public alternative.
ABSENT = {
    "torch._C._ensureCUDADeviceGuardSet": lambda: RELEASE < (2, 11),
    "torch.utils.data._utils.worker._RNG": lambda: RELEASE < (2, 13),
    "torch.Tensor.__dlpack_c_exchange_api__": lambda: RELEASE < (2, 10),
}


@pytest.mark.parametrize("api", _compat.LOOKED_UP, ids=lambda api: api.path)
def test_this_torch_has_it(api):
    """Fails for what a new release of torch has taken away; nobody else needs to find out."""
    expected = not ABSENT.get(api.path, lambda: False)()
    assert api.found == expected, api.without or f"{api.needed_by} would refuse"
    assert bool(api.needed_by) != bool(api.without), "it is needed, or there is an alternative"


def test_a_module_has_nothing_else():
    """A new kind of hook would not be shared with the replicas."""
    known = {*_compat.FORWARD_HOOKS, *_compat.OTHER_HOOKS, "_parameters", "_buffers", "_modules"}
    assert set(vars(nn.Module())) - known == {"training", "_is_full_backward_hook"}


def test_what_the_compiler_leaves_on_a_module():
    whole = torch.compile(nn.Linear(2, 2))
    part = nn.Linear(2, 2)
    assert _compat.is_compiled(whole) and not _compat.is_compiled(part)
    part.compile()
    assert _compat.is_compiled(part)
    copied = nn.Linear(2, 2)
    _compat.compile_as(part, copied)
    assert _compat.is_compiled(copied)


# ---- without it ----


def compat_without(*paths: str):
    """A second `_compat`, for which torch lacks some names; the warnings of its import."""
    spec = importlib.util.spec_from_file_location("compat_without", SOURCE / "_compat.py")
    module = importlib.util.module_from_spec(spec)
    parts = [path.rpartition(".") for path in paths]
    without = [(pkgutil.resolve_name(holder), name) for holder, _, name in parts]

    def get(value, name, *default):
        if any(value is holder and name == gone for holder, gone in without):
            if default:
                return default[0]
            raise AttributeError(name)
        return getattr(value, name, *default)

    module.getattr = get  # instead of the builtin: some of torch's objects keep their attributes
    sys.modules["compat_without"] = module  # its dataclasses look there
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            spec.loader.exec_module(module)
    finally:
        del sys.modules["compat_without"]
    return module, [str(w.message) for w in caught]


def looked_up(needed: bool):
    found = [a for a in _compat.LOOKED_UP if a.path.startswith("torch.") and a.found]
    return [a for a in found if bool(a.needed_by) == needed]


@pytest.mark.parametrize("api", looked_up(needed=True), ids=lambda api: api.path)
def test_without_what_is_needed_importing_warns_and_the_feature_refuses(api):
    compat, said = compat_without(api.path)
    for feature in compat._FEATURES:
        gone = compat.missing(feature)
        assert (api.path in gone) == (feature in api.needed_by)
        if not gone:
            compat.require(feature)
            continue
        assert any(api.path in text and feature in text for text in said)
        with pytest.raises(
            RuntimeError, match=r"torch .* does not have .*use another version"
        ) as e:
            compat.require(feature)
        assert api.path in str(e.value) and feature in str(e.value)


@pytest.mark.parametrize("api", looked_up(needed=False), ids=lambda api: api.path)
def test_without_what_has_an_alternative_nobody_is_told(api):
    compat, said = compat_without(api.path)
    assert said == []
    assert all(compat.missing(f) == [] for f in compat._FEATURES)


USES = {
    _compat.PARALLEL: [lambda _: ts.SphereParallel(nn.Linear(2, 2))],
    _compat.LOADER: [lambda _: ts.wrap(DataLoader([1, 2]))],
    _compat.RANKS: [lambda _: Ranks(None)],
    _compat.CHECKPOINT: [
        lambda _: ts.checkpoint_state(),
        lambda _: ts.restore_checkpoint_state({}),
        lambda path: ts.save_checkpoint(path),
        lambda path: ts.load_checkpoint(path),
    ],
}


@pytest.mark.parametrize("feature", USES)
def test_features_refuse(feature, monkeypatch, tmp_path):
    if feature == _compat.CHECKPOINT:
        ts.save_checkpoint(tmp_path / "last.pt")
    monkeypatch.setitem(_compat._MISSING, feature, ["torch._gone"])
    for use in USES[feature]:
        with pytest.raises(RuntimeError, match=r"torch\._gone"):
            use(tmp_path / "last.pt")


WITHOUT_ANY = """
import importlib.util, sys, warnings, torch, torch.utils._pytree
root = importlib.util.find_spec("torch_spheres").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("torch_spheres._compat", root + "/_compat.py")
def get(value, name, *default):
    # (Not the iterator's: it is torch's that shows them.)
    if name.startswith("_") or name in ("DispatchKeySet", "get_worker_info"):
        raise AttributeError(name)
    return getattr(value, name, *default)
compat = importlib.util.module_from_spec(spec)
compat.getattr, compat.hasattr = get, lambda value, name: False
sys.modules["torch_spheres._compat"] = compat
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    spec.loader.exec_module(compat)
    told = [str(w.message) for w in caught]
    import torch_spheres as ts
assert len(told) == len(caught) == 4, caught
assert ts.tree_sum([torch.ones(2)] * 12).tolist() == [12, 12]
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
with ts.KissingSpheres() as spheres:
    assert spheres.map(abs, [-1]) == [1]
    hook = ts.GradientHook(optimizer, spheres)
    hook.add(0, [torch.ones(1, 1), torch.ones(1)])
    optimizer.step()
for feature in (ts.SphereParallel, lambda _: ts.wrap(torch.utils.data.DataLoader([1]))):
    try:
        feature(model)
    except RuntimeError as error:
        print(error)
"""


def test_a_torch_without_any_of_them_is_imported_with_warnings():
    done = fork_server.run(WITHOUT_ANY, bare=True)
    assert (done.returncode, done.stderr) == (0, "")
    parallel, loader = done.stdout.splitlines()
    assert "torch._C._jit_get_all_schemas" in parallel and "SphereParallel needs" in parallel
    assert "DataLoader's iterator._sampler_iter" in loader and "wrap() needs" in loader


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_importing_under_another_default_device(device):
    code = (
        f"import torch; torch.set_default_device('{device}')\n"
        "from torch_spheres import _compat, SphereParallel, wrap\n"
        "assert all(api.found for api in _compat.LOOKED_UP if api.needed_by)\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = fork_server.run(code, bare=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- the alternatives give the same ----

ALTERNATIVES = [
    ("torch.autograd.Variable._execution_engine.run_backward", "_run_backward"),
    ("torch._C._autograd._get_current_graph_task_keep_graph", "keeps_graph"),
    ("torch._C._ensureCUDADeviceGuardSet", "_set_cuda_guard"),
    ("torch._disable_dynamo", "disable_compiler"),
    ("torch._C._functorch.is_functorch_wrapped_tensor", "is_functorch_wrapped"),
    ("torch.utils.data._utils.pin_memory.pin_memory", "pin_memory"),
    ("torch.utils.data._utils.worker._RNG", "_RNG"),
    ("torch.Tensor.__dlpack_c_exchange_api__", "dlpack_exchange"),
    ("torch.autograd.profiler._is_profiler_enabled", "profiler_is_on"),
    ("torch.autograd.forward_ad._current_level", "forward_ad_is_on"),
]


def test_each_alternative_is_tried():
    assert {path for path, _ in ALTERNATIVES} == {
        a.path for a in _compat.LOOKED_UP if not a.needed_by
    }


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.layers(x))


class Noisy(Dataset):
    """Rows with noise of each of the worker's generators."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        rng = get_worker_info().rng
        x = torch.randn(8, generator=rng.torch_generator)
        return x * rng.random_generator.random() + rng.numpy_generator.rand(), index % 2


def train():
    """What steps of training, with batches of two kinds of loaders, come to."""
    torch.manual_seed(0)
    model = Net()
    rows = TensorDataset(torch.randn(96, 8), torch.randint(0, 2, (96,)))
    with ts.KissingSpheres(2, concurrency=3) as spheres:
        parallel = ts.SphereParallel(model, spheres)
        optimizer = torch.optim.AdamW(model.parameters())
        gathered = ts.wrap(DataLoader(rows, 48, shuffle=True), spheres)
        sampled = ts.wrap(DataLoader(Noisy(), 48, shuffle=True, num_workers=2), spheres)
        out = []
        for x, y in itertools.chain(gathered, sampled):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(parallel(x), y)
            loss.backward()
            optimizer.step()
            parallel.forward_backward(nn.functional.cross_entropy, x, y)
            out += [x, y, loss.detach()]
        return digest([*out, *model.state_dict().values(), torch.get_rng_state()])


@pytest.fixture
def alternative(monkeypatch, request):
    path, name = request.param
    expected = train()
    if path in {a.path for a in looked_up(needed=False)}:  # else it is the alternative already
        compat, _ = compat_without(path)
        assert name != "profiler_is_on" or compat.profiler_is_on()
        monkeypatch.setattr(_compat, name, getattr(compat, name))
        if name == "dlpack_exchange":
            _core.read_tensors_by(None)
    yield expected
    _core.read_tensors_by(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


@pytest.mark.parametrize("alternative", ALTERNATIVES, indirect=True, ids=lambda a: a[0])
def test_the_alternative_has_the_same_bits(alternative):
    assert train() == alternative


ALL_ALTERNATIVES = """
import sys, test_compat
gone = {path for path, _ in test_compat.ALTERNATIVES}
for name in [name for name in sys.modules if name.startswith("torch_spheres")]:
    if name != "torch_spheres._core":  # which registers types, once
        del sys.modules[name]
sys.modules["torch_spheres._compat"] = test_compat.compat_without(*gone)[0]
del sys.modules["test_compat"]
import test_compat
assert {a.path for a in test_compat._compat.LOOKED_UP if not a.found} == gone
print(test_compat.train())
"""


def test_all_alternatives_at_once():
    """From the import on: some are used there."""
    tests = {"PYTHONPATH": str(Path(__file__).parent)}
    done = fork_server.run(ALL_ALTERNATIVES, env=tests, warn=(("ignore",),), bare=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == train()


def test_pinning_without_torchs_function():
    class Pins:
        def pin_memory(self):
            return "pinned"

    compat, _ = compat_without("torch.utils.data._utils.pin_memory.pin_memory")
    batch = {"a": [Pins(), 1], "b": (Pins(), "text")}
    assert compat.pin_memory(batch, "cuda") == {"a": ["pinned", 1], "b": ("pinned", "text")}


def test_threads_that_are_not_ours_are_answered_by_torch(monkeypatch):
    """A later torch has workers in threads of its own, with a worker info for each."""
    worker = types.ModuleType("worker")
    exec(
        "import threading\n"
        "_worker_info = 'of the process'\n"
        "_thread_local_worker_info = threading.local()\n"
        "def get_worker_info():\n"
        "    return getattr(_thread_local_worker_info, 'info', _worker_info)\n",
        vars(worker),
    )
    imported_before = worker.get_worker_info
    monkeypatch.setattr(_compat, "_worker", worker)
    here = threading.local()
    here.info = None
    _compat.answer_worker_info(here)
    _compat.answer_worker_info(here)  # of a second loader
    assert imported_before() == "of the process"
    here.info = "ours"
    assert imported_before() == "ours"
    here.info = None

    def in_a_thread_of_torchs():
        here.info = None
        worker._thread_local_worker_info.info = "of torch's thread"
        return imported_before()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(in_a_thread_of_torchs).result() == "of torch's thread"
    assert imported_before() == "of the process"
