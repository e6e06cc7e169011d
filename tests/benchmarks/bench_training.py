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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import train_CNN as settings
from CNN import CNN
from load_data import Split, find_dataset, load_split, mean_and_std, title

ROUNDS = 5
STEPS = 12  # of each way in a round, the first two untimed
WORKERS = (0, 2)  # of the plain way's DataLoader; the faster one counts


class Plain(Dataset[tuple[Tensor, int]]):
    """The training images one by one, each changed by torchvision as much as train_CNN changes it."""

    def __init__(self, split: Split, mean: list[float], std: list[float]):
        self.split = split
        strength = settings.AUGMENTATION
        shift, zoom, colour = strength.shift / 96, strength.zoom, strength.colour
        hidden = (strength.cutout / 96) ** 2  # share of the image
        self.transform = v2.Compose(
            [
                v2.ToPILImage(),
                v2.RandomHorizontalFlip(),
                v2.RandomAffine(strength.rotation, (shift, shift), (1 - zoom, 1 + zoom)),
                v2.ColorJitter(colour, colour, colour),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
                v2.RandomErasing(float(hidden > 0), (hidden, hidden), (1, 1)),
            ]
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its label."""
        return self.transform(torch.from_numpy(self.split.images[index])), int(self.split.labels[index])


def plain_steps(split: Split, mean: list[float], std: list[float], workers: int) -> Iterator[None]:
    """Train in the plain way, a step at a time."""
    net = CNN()
    optimizer = torch.optim.AdamW(
        net.parameters(), settings.LEARNING_RATE, weight_decay=settings.WEIGHT_DECAY
    )
    while True:
        for images, labels in DataLoader(
            Plain(split, mean, std), settings.BATCH_SIZE, True, num_workers=workers
        ):
            loss = F.cross_entropy(net(images), labels, label_smoothing=settings.LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def time_plain(steps: Iterator[None]) -> float:
    """Return images per second of a few steps."""
    for _ in range(2):
        next(steps)
    start = time.perf_counter()
    for _ in range(STEPS - 2):
        next(steps)
    return (STEPS - 2) * settings.BATCH_SIZE / (time.perf_counter() - start)


def time_ours(trainer: settings.Trainer, split: Split, mean: list[float], std: list[float]) -> float:
    """Return images per second of as many steps of train_CNN's loop."""
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    warm, timed = 2 * settings.BATCH_SIZE, (STEPS - 2) * settings.BATCH_SIZE
    trainer.epoch(images[:warm], labels[:warm], mean, std, settings.BATCH_SIZE)
    start = time.perf_counter()
    trainer.epoch(images[:timed], labels[:timed], mean, std, settings.BATCH_SIZE)
    return timed / (time.perf_counter() - start)


def main() -> None:
    """Let both ways take turns and print medians and their ratio."""
    dataset = find_dataset(settings.DATASET, settings.DATA_DIR)
    split = load_split(dataset, settings.DATA_DIR, "train")
    mean, std = mean_and_std(split.images)
    device = torch.device("cpu")
    precision = settings.choose_precision(device)
    chosen = {
        "seed": 0,
        "learning_rate": settings.LEARNING_RATE,
        "weight_decay": settings.WEIGHT_DECAY,
        "warm_up": settings.WARM_UP,
        "label_smoothing": settings.LABEL_SMOOTHING,
        "augmentation": settings.AUGMENTATION,
    }
    trainer = settings.Trainer(CNN().config, device, precision, STEPS * (ROUNDS + 1), chosen)
    ways: dict[str, Callable[[], float]] = {
        f"train_CNN ({precision}, channels last)": lambda: time_ours(trainer, split, mean, std)
    }
    for workers in WORKERS:
        steps = plain_steps(split, mean, std, workers)
        ways[f"plain, {workers} workers"] = lambda steps=steps: time_plain(steps)  # type: ignore[misc]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{title(dataset)}, batches of {settings.BATCH_SIZE}; images per second: median (min to max)")
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            rates[way].append(run())
    medians = {way: statistics.median(values) for way, values in rates.items()}
    for way, values in rates.items():
        print(f"{way:<45}{medians[way]:7.0f} ({min(values):.0f} to {max(values):.0f})")
    ours, *plain = medians.values()
    print(f"train_CNN is {ours / max(plain):.1f} times as fast as the faster plain way")


if __name__ == "__main__":
    main()
