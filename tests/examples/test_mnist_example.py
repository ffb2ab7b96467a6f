"""The MNIST trainer and its reader of IDX files."""

from __future__ import annotations

import gzip
import re
import signal
import struct
import time
from collections import Counter
from pathlib import Path

import fork_server
import mnist_data
import numpy as np
import pytest
import torch
import trace_support

TRAINER = Path(__file__).parents[2] / "examples" / "mnist.py"


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, compress=False, train=20, test=10):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            path = folder / f"{name}-{kind}-ubyte{'.gz' if compress else ''}"
            data = idx(array)
            path.write_bytes(gzip.compress(data) if compress else data)


def run(*arguments):
    # Whether plain torch would be faster depends on the machine; test_advice.py looks for it.
    slow = "ignore", "the shards of this model are so"
    return fork_server.run(TRAINER, *arguments, warn=(("error",), slow))


def digest(output):
    return re.search(r"weights digest: (\w+)", output).group(1)


# ---- data ----


def test_embedded_digits_are_a_fixed_stratified_split():
    torch.manual_seed(1)
    data = mnist_data.load_mnist(None)
    assert data.train_x.shape == (4000, 1, 28, 28) and data.train_x.dtype == torch.float32
    assert torch.bincount(data.train_y).tolist() == [400] * 10
    assert torch.bincount(data.test_y).tolist() == [100] * 10
    assert abs(data.train_x.mean()) < 0.05 and abs(data.train_x.std() - 1) < 0.05
    torch.manual_seed(2)
    again = mnist_data.load_mnist(None)
    assert all(torch.equal(a, b) for a, b in zip(data, again, strict=True))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("layout", [".", "MNIST/raw"])
def test_idx_files_in_every_layout(tmp_path, layout, compress):
    write_mnist(tmp_path / layout, compress)
    data = mnist_data.load_mnist(tmp_path)
    assert data.train_x.shape == (20, 1, 28, 28) and data.test_y.tolist() == list(range(10))
    pixels = (data.train_x * mnist_data.STD + mnist_data.MEAN) * 255
    expected = np.random.default_rng(0).integers(0, 256, (20, 28, 28))
    assert np.array_equal(pixels.round().numpy()[:, 0], expected)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte; looked for .*MNIST/raw"):
        mnist_data.load_mnist(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"abc", "3 bytes, too short"),
        ("train-images-idx3-ubyte", idx(np.zeros(3)) + bytes(20), "magic number 0x00000801"),
        ("train-images-idx3-ubyte", idx(np.zeros((20, 28, 27))), r"shape \(28, 27\)"),
        ("train-images-idx3-ubyte", idx(np.zeros((20, 28, 28)))[:-1], "header says 15696"),
        ("train-labels-idx1-ubyte", idx(np.zeros(19)), "20 train images, but 19 labels"),
        ("t10k-labels-idx1-ubyte.gz", b"\x1f\x8b broken", "cannot be read"),
    ],
)
def test_broken_files_are_named_with_what_was_found(tmp_path, name, content, message):
    write_mnist(tmp_path)
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        mnist_data.load_mnist(tmp_path)
    assert str(tmp_path) in str(caught.value)


# ---- trainer ----


def test_it_learns():
    done = run("--epochs", 3)
    assert done.returncode == 0, done.stderr
    assert "epoch" not in done.stderr  # no bar where it cannot be redrawn
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"test accuracy: 0\.\d\d\d\d", last)
    assert float(last.split()[-1]) >= 0.9
    assert len(re.findall(r"^epoch \d+: loss \S+, accuracy \S+$", done.stdout, re.MULTILINE)) == 3
    assert "busiest" in done.stdout and "level 1" in done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder, train=150, test=30)
    return folder


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_same_weights_every_time_and_at_every_concurrency(small, levels):
    arguments = ("--data", small, "--levels", levels, "--batch-size", 50, "--epochs", 1)
    digests = set()
    for concurrency in (1, 1, 2, 5) if levels == 2 else (1, 5):  # the first twice
        done = run(*arguments, "--concurrency", concurrency)
        assert done.returncode == 0, done.stderr
        digests.add(digest(done.stdout))
    assert len(digests) == 1
    if levels == 2:
        assert digest(run(*arguments, "--seed", 1).stdout) not in digests


def test_a_trace_of_the_last_epoch(small, tmp_path):
    path = tmp_path / "run.json"
    arguments = ("--data", small, "--batch-size", 50, "--epochs", 2, "--shards", 12)
    done = run(*arguments, "--trace", path)
    assert done.returncode == 0, done.stderr
    assert f"{path}: the last epoch's training, 0 events lost" in done.stdout
    data = trace_support.load(path)
    tracks = trace_support.check_file(data)
    assert {"sphere root", "sphere 0", "sphere 11"} <= set(tracks)
    names = Counter(event["name"] for event in data["traceEvents"])
    for shard in range(12):
        # Three batches of 50: those of the first epoch are not there.
        assert names[f"forward {shard}"] == names[f"backward {shard}"] == 3
    assert digest(done.stdout) == digest(run(*arguments).stdout)


def test_a_picture_of_the_run(small, tmp_path):
    path = tmp_path / "rings.svg"
    done = run("--data", small, "--batch-size", 50, "--epochs", 1, "--plot", path)
    assert done.returncode == 0, done.stderr
    assert f"{path}: what the spheres did" in done.stdout
    picture = path.read_text()
    # A wedge, a rim and a label for each sphere.
    for gid in ("spheres", "states", *(f"label {sphere}" for sphere in range(13))):
        assert f'<g id="{gid}">' in picture


def test_steps_are_compared_with_plain_ones(small):
    done = run("--data", small, "--batch-size", 48, "--epochs", 1, "--compare", "--shards", 2)
    assert done.returncode == 0, done.stderr
    line = r"^a step of 48 rows takes \S+ ms in plain PyTorch and \S+ ms in 2 shards, \d+\.\d\dx of"
    assert re.search(line, done.stdout, re.MULTILINE)


def test_plain_runs_without_spheres(small):
    done = run("--data", small, "--plain", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "level 1" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("test accuracy: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "4"], "'4'|4"),
        (["--epochs", "0"], "got '0'"),
        (["--batch-size", "-1"], "'-1'|-1"),
        (["--concurrency", "x"], "got 'x'"),
        (["--seed", str(2**63)], "64 bits, got '9223372036854775808'"),
        (["--data", "/nowhere"], "no such folder: /nowhere"),
        (["--trace", "/nowhere/run.json"], "no such folder: /nowhere"),
        (["--plot", "/nowhere/run.png"], "no such folder: /nowhere"),
        (["--plot", "run"], "must end in .png, .svg or .pdf, got 'run'"),
        (["--shards", "5"], "must divide 12, the leaves of --levels 2, got 5"),
        (["--levels", "1", "--shards", "2"], "must divide 1, the leaves of --levels 1, got 2"),
        (["--compare", "--plain"], "--plain has none"),
        (["--shards", "6", "--plain"], "--plain cuts nothing"),
        (["--plot", "run.png", "--plain"], "no spheres to draw with --plain"),
        (["--trace", "run.json", "--plain"], "nothing to trace with --plain"),
    ],
)
def test_bad_arguments(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr) and "Traceback" not in done.stderr


def test_bad_data_is_one_line(tmp_path):
    done = run("--data", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("mnist.py: no train-images") and "Traceback" not in done.stderr


def test_ctrl_c_is_one_line_and_leaves_a_picture(small, tmp_path):
    path = tmp_path / "rings.svg"
    arguments = ["--data", small, "--batch-size", 50, "--epochs", 100_000, "--plot", path]
    with fork_server.start(TRAINER, *arguments) as process:
        assert process.readline().startswith("epoch 1")
        process.interrupt()  # in the middle of training
        assert process.wait() == 130
    assert process.stdout.splitlines()[-1] == f"{path}: what the spheres did" and path.exists()
    assert process.stderr.splitlines()[-1] == "interrupted" and "Traceback" not in process.stderr


def test_a_second_ctrl_c_does_not_lose_the_files(small, tmp_path):
    path, trace = tmp_path / "rings.svg", tmp_path / "run.json"
    arguments = ["--data", small, "--batch-size", 50, "--epochs", 100_000, "--plot", path]
    with fork_server.start(TRAINER, *arguments, "--trace", trace) as process:
        assert process.readline().startswith("epoch 1")
        process.interrupt()
        time.sleep(0.05)  # the first one has been seen; writing both files takes longer
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert path.read_text().rstrip().endswith("</svg>")
    assert "interrupted" in process.stderr and "Traceback" not in process.stderr
