"""Time training steps: train_CNN's way beside the plain way on the same network.

Run:    uv run python tests/benchmarks/bench_training.py
Reads:  data/stl10_binary, or draws the generated shapes
Writes: nothing; prints a table

Plain: torchvision transforms on PIL images in a DataLoader, float32, default memory layout. The two take
turns; wall time on all cores, the loading of the batches included.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import train_CNN as script
from CNN import CNN, IMAGE_SIZE
from load_data import TITLES, Split, find_dataset, load_split, mean_and_std

ROUNDS = 5
STEPS = 12  # of each way in a round
WORKERS = (0, 2)  # of the plain way's DataLoader; the faster one counts


class Plain(Dataset[tuple[Tensor, int]]):
    """The training images one by one, each changed by torchvision as much as train_CNN changes it."""

    def __init__(self, split: Split):
        self.split = split
        strength = script.AUGMENTATION
        mean, std = mean_and_std(split.images)
        shift = strength.shift / IMAGE_SIZE  # share of the side
        hidden = (strength.cutout / IMAGE_SIZE) ** 2  # share of the image
        self.transform = v2.Compose(
            [
                v2.ToPILImage(),
                v2.RandomHorizontalFlip(),
                v2.RandomAffine(strength.rotation, (shift, shift), (1 - strength.zoom, 1 + strength.zoom)),
                v2.ColorJitter(strength.colour, strength.colour, strength.colour),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean.tolist(), std.tolist()),
                v2.RandomErasing(float(hidden > 0), (hidden, hidden), (1, 1)),
            ]
        )

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(torch.from_numpy(self.split.images[index])), int(self.split.labels[index])


def plain_steps(split: Split, config: dict[str, object], workers: int) -> Iterator[None]:
    """Train in the plain way, a step at a time."""
    net = CNN(**config)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(net.parameters(), script.LEARNING_RATE, weight_decay=script.WEIGHT_DECAY)
    while True:
        for images, labels in DataLoader(Plain(split), script.BATCH_SIZE, True, num_workers=workers):
            loss = F.cross_entropy(net(images), labels, label_smoothing=script.LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def trainer_settings() -> dict[str, Any]:
    """Return what train_CNN's trainer needs of the settings, for one epoch a round."""
    names = ["batch_size", "filter_rate", "learning_rate", "warm_up", "weight_decay", "label_smoothing"]
    settings = {name: getattr(script, name.upper()) for name in names}
    names = ["filters", "kernel_sizes", "strides", "pool_sizes", "head_size", "dropout"]
    network = {name: getattr(script, name.upper()) for name in names}
    augmentation = script.AUGMENTATION._asdict()
    return settings | {"network": network, "augmentation": augmentation, "epochs": ROUNDS + 1, "seed": 0}


def images_per_second(run: Callable[[], object]) -> float:
    """Return images per second of STEPS training steps, which `run` makes."""
    start = time.perf_counter()
    run()
    return STEPS * script.BATCH_SIZE / (time.perf_counter() - start)


def main() -> None:
    """Let both ways take turns and print medians and their ratio."""
    dataset = find_dataset(script.DATASET, script.DATA_DIR)
    split = load_split(dataset, script.DATA_DIR, "train")
    device = torch.device("cpu")
    precision = script.choose_precision(device)
    settings = trainer_settings()
    few = split.select(np.arange(STEPS * script.BATCH_SIZE))  # one epoch is one round
    trainer = script.Trainer(few, settings, device, precision)

    ways: dict[str, Callable[[], object]] = {f"train_CNN ({precision}, channels last)": trainer.epoch}
    for workers in WORKERS:
        steps = plain_steps(split, settings["network"], workers)
        ways[f"plain, {workers} workers"] = partial(lambda steps: [next(steps) for _ in range(STEPS)], steps)

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{TITLES[dataset]}, batches of {script.BATCH_SIZE}; images per second: median (min to max)")
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):  # the first round warms up
        for way, run in ways.items():
            rate = images_per_second(run)
            if number > 0:
                rates[way].append(rate)

    medians = {way: statistics.median(values) for way, values in rates.items()}
    for way, values in rates.items():
        print(f"{way:<45}{medians[way]:7.0f} ({min(values):.0f} to {max(values):.0f})")
    ours, *plain = medians.values()
    print(f"train_CNN is {ours / max(plain):.1f} times as fast as the faster plain way")


if __name__ == "__main__":
    main()
