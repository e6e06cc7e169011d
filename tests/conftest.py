"""Fixtures: an empty folder for each test, small networks, and one run of the whole pipeline for all."""

import os

os.environ["MPLBACKEND"] = "Agg"  # before matplotlib is imported

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch

import analyse_projections
import deconv
import deconv_full
import heatmap
import load_data
import train_CNN
from CNN import CNN, Checkpoint, save_checkpoint
from load_data import Array

DEVICES = ["cpu"]  # and this machine's GPU
if torch.cuda.is_available():
    DEVICES.append("cuda")
if torch.backends.mps.is_available():
    DEVICES.append("mps")

STAGES = (train_CNN, deconv, deconv_full, analyse_projections, heatmap)
FILTERS = (4, 6, 8, 16)  # of the pipeline's network
FAST: dict[Any, dict[str, Any]] = {  # settings of the pipeline's run
    train_CNN: {"EPOCHS": 2, "BATCH_SIZE": 16, "FILTERS": FILTERS, "SNAPSHOTS": (1,)},
    deconv_full: {"IMAGES_PER_CLASS": 2, "FILTERS_PER_PAGE": 8, "EVOLUTION_FILTERS": 2},
    analyse_projections: {"RESAMPLINGS": 20, "RANDOM_DRAWS": 2},
    heatmap: {"OCCLUSION_STRIDE": 24, "TOP_FILTERS": 2, "SUMMED_FILTERS": 4, "MEAN_IMAGES": 20},
}

MakeNet = Callable[..., CNN]
WriteSplit = Callable[[str, Array, Array], None]


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test starts in an empty folder."""
    monkeypatch.chdir(tmp_path)


def write_binary(split: str, images: Array, labels: Array) -> None:
    """Write upright images and labels 1 to 10 in the published layout, as if they had been published."""
    folder = Path("data/stl10_binary")
    folder.mkdir(parents=True, exist_ok=True)
    columns_first = images.astype(np.uint8).transpose(0, 1, 3, 2)
    for kind, content in (("X", columns_first.tobytes()), ("y", labels.astype(np.uint8).tobytes())):
        (folder / f"{split}_{kind}.bin").write_bytes(content)
        load_data.FILES[f"{split}_{kind}.bin"] = (len(content), hashlib.md5(content).hexdigest())


def write_tiny_stl10() -> None:
    """Write an STL-10 of 40 training and 30 test images.

    Class k (0 to 9) has a bright square of 16 pixels at row 10 + 50 (k // 5), column 2 + 19 (k % 5).
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 30)):
        labels = rng.permutation(np.arange(count) % 10)
        images = rng.integers(0, 100, (count, 3, 96, 96))
        for image, label in zip(images, labels, strict=True):
            top, left = 10 + 50 * (label // 5), 2 + 19 * (label % 5)
            image[:, top : top + 16, left : left + 16] = rng.integers(180, 256, (3, 1, 1))
        write_binary(split, images, labels + 1)


@pytest.fixture
def write_split(monkeypatch: pytest.MonkeyPatch, empty_folder: None) -> WriteSplit:
    """See `write_binary`."""
    monkeypatch.setattr(load_data, "FILES", {})
    return write_binary


@pytest.fixture
def tiny_stl10(write_split: WriteSplit) -> Path:
    """See `write_tiny_stl10`; returns the folder data."""
    write_tiny_stl10()
    return Path("data")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which all stages have run in order on the tiny STL-10; tests only read it."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch, mpl.rc_context():
        patch.setattr(load_data, "DPI", 30)
        patch.chdir(folder)
        patch.setattr(load_data, "FILES", {})
        write_tiny_stl10()
        for script in STAGES:
            patch.setattr(script, "DEVICE", "cpu")
            for name, value in FAST.get(script, {}).items():
                patch.setattr(script, name, value)
        for script in (load_data, *STAGES):
            script.main()
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o444)
    yield folder


@pytest.fixture
def pipeline_copy(pipeline: Path, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of the pipeline in this test's own folder, to be damaged or made again; returns outputs."""
    shutil.copytree(pipeline / "outputs", "outputs", copy_function=shutil.copyfile)
    for script in STAGES:
        monkeypatch.setattr(script, "DEVICE", "cpu")
        for name, value in FAST.get(script, {}).items():
            monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(load_data, "DPI", 30)
    return Path("outputs")


def random_net(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> CNN:
    """Return a small network in evaluation mode whose batch norms do something, with gains of both signs."""
    torch.manual_seed(seed)
    net = CNN(**{"filters": (5, 6, 7, 8), **config}).to(dtype)
    for block in net.blocks:
        norm = block.bn
        assert norm.running_mean is not None and norm.running_var is not None
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.3, 2)
    return net.eval().requires_grad_(False)


@pytest.fixture
def make_net() -> MakeNet:
    """See `random_net`."""
    return random_net


def describe_data() -> dict[str, str]:
    """Return what train_CNN.py stores of the tiny STL-10; empty checksums where there is none."""
    checksums = {"train": "", "test": ""}
    if Path("data/stl10_binary/test_y.bin").is_file():
        for split in checksums:
            data = load_data.load_split("stl10", Path("data"), split)
            checksums[split] = load_data.fingerprint(data, list(load_data.STL10_CLASSES))
    return {"folder": "data", **checksums}


def make_checkpoint(net: CNN, **facts: Any) -> Checkpoint:
    """Return a checkpoint of a network that was never trained."""
    given: dict[str, Any] = {
        "dataset": "stl10",
        "class_names": [f"class {k}" for k in range(10)],
        "epochs": 3,
    }
    given |= {
        "settings": {"seed": 0, "data": describe_data()},
        "metrics": {"split": "test", "accuracy": 0.1},
        "sha256": "0" * 64,
    }
    return Checkpoint(net=net, **(given | facts))


def write_checkpoint(net: CNN, path: Path = Path("outputs/CNN.pth"), **facts: Any) -> None:
    """Write a checkpoint of a network that was never trained."""
    given = make_checkpoint(net, **facts)._asdict()
    del given["net"], given["sha256"]
    save_checkpoint(path, net, **given)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")


def run_in_page(page: Path, script: str) -> str:
    """Open a copy of a page with one more script, which may wait; return what the document then holds.

    Nothing may be written to the console.
    """
    copy = page.with_name(f"copy_of_{page.name}")
    copy.write_text(f"{page.read_text()}<script>(async () => {{{script}}})();</script>")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--enable-logging=stderr",
        "--dump-dom",
        "--window-size=500,800",
        "--virtual-time-budget=30000",
        f"--user-data-dir={page.parent / 'profile'}",
        copy.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout
