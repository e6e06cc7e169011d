import os

os.environ["MPLBACKEND"] = "Agg"  # before matplotlib is imported

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import load_data
from CNN import CNN

WriteSplit = Callable[[str, NDArray[Any], NDArray[Any]], None]


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # plain_errors ignores what follows a first one


@pytest.fixture
def write_split(monkeypatch: pytest.MonkeyPatch, empty_folder: None) -> WriteSplit:
    """Writes upright images and labels 1 to 10 in the published layout, as if they had been published."""
    monkeypatch.setattr(load_data, "FILES", {})

    def write(split: str, images: NDArray[Any], labels: NDArray[Any]) -> None:
        folder = Path("data/stl10_binary")
        folder.mkdir(parents=True, exist_ok=True)
        columns_first = images.astype(np.uint8).transpose(0, 1, 3, 2)
        for kind, content in (("X", columns_first.tobytes()), ("y", labels.astype(np.uint8).tobytes())):
            (folder / f"{split}_{kind}.bin").write_bytes(content)
            load_data.FILES[f"{split}_{kind}.bin"] = (len(content), hashlib.md5(content).hexdigest())

    return write


@pytest.fixture
def tiny_stl10(write_split: WriteSplit) -> Path:
    """An STL-10 of 40 training and 30 test images in data/stl10_binary; returns data.

    Class k (0 to 9) has a bright square of 16 pixels at row 10 + 50 (k // 5), column 2 + 19 (k % 5).
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 30)):
        labels = rng.permutation(np.arange(count) % 10)
        images = rng.integers(0, 100, (count, 3, 96, 96))
        for image, label in zip(images, labels, strict=True):
            top, left = 10 + 50 * (label // 5), 2 + 19 * (label % 5)
            image[:, top : top + 16, left : left + 16] = rng.integers(180, 256, (3, 1, 1))
        write_split(split, images, labels + 1)
    return Path("data")


MakeNet = Callable[..., CNN]


@pytest.fixture
def make_net() -> MakeNet:
    """Builds a small network in evaluation mode whose batch norms do something, with gains of both signs."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> CNN:
        torch.manual_seed(seed)
        net = CNN(**{"filters": (5, 6, 7, 8), **config}).to(dtype)
        for block in net.blocks:
            block.conv.reset_parameters()  # no copies of the layer below: hardly any would fire
            norm = block.bn
            assert norm.running_mean is not None and norm.running_var is not None
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.3, 2)
        return net.eval().requires_grad_(False)

    return make
