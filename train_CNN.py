"""Train the network on the 5,000 labelled images of STL-10 and test it on the other 8,000.

Run:    uv run train_CNN.py
Reads:  data/stl10_binary/{train,test}_{X,y}.bin, which it downloads if they are missing; fold_indices.txt
        beside them for a fold
Writes: outputs/CNN.pth, outputs/snapshots/epoch_*.pth, outputs/training_log.csv,
        outputs/training_curves.png, outputs/confusion_matrix.png

An interrupted run goes on from the last finished epoch, kept in outputs/training_state.pth, when the script
is started again with the same settings.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from CNN import CNN, IMAGE_SIZE, choose_device, read_whole, save_checkpoint, save_whole
from load_data import (
    Augmentation,
    Split,
    augment,
    check_file_name,
    check_numbers,
    check_paths,
    class_names,
    find_dataset,
    load_split,
    mean_and_std,
    no_memory,
    normalise,
    plain_errors,
    prepare_folders,
    save_figure,
    title,
    whole_file,
)

# data
DATASET = "auto"  # "stl10", "shapes" (generated) or "auto": STL-10 if it can be had, else shapes
DATA_DIR = Path("data")  # holds the folder stl10_binary
TRAIN_ON = "all"  # "all"; "validation": 4,000 images, measured on the other 1,000; "fold 0" to "fold 9"
# network
FILTERS = (48, 96, 192, 256)  # of conv1 to conv4, as the three below
KERNEL_SIZES = (5, 3, 3, 3)  # odd
STRIDES = (2, 1, 1, 1)  # 2 in conv1 makes training several times faster
POOL_SIZES = (2, 2, 2, 2)  # a layer without pooling covers projections with a grid of dots
HEAD_SIZE = 2  # the classifier sees conv4 averaged over 2 x 2 regions
DROPOUT = 0.3  # of the classifier's inputs
PARTIAL_IDENTITY = True  # conv2 to conv4 start with filters that hand their inputs on; False: all at random
# training
EPOCHS = 50  # passes over the training images
SHAPES_EPOCHS = 8  # passes over the generated images, at most EPOCHS
BATCH_SIZE = 64  # images a step
LEARNING_RATE = 3e-3  # of AdamW; largest, after the warm-up
WARM_UP = 0.15  # share of the training in which the learning rate rises; then it falls along a cosine
WEIGHT_DECAY = 0.05  # of filters and the classifier's weights, not of batch norm
LABEL_SMOOTHING = 0.1  # share of the target spread over all classes
AUGMENTATION = Augmentation(shift=12, zoom=0.25, rotation=10, colour=0.3, cutout=16)  # load_data.py says what
MEASURE_EVERY = 5  # epochs between measurements on the test images, also made at snapshots and at the end
SEED = 0  # weights, order of the images, augmentation and dropout
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
# files
CHECKPOINT = Path("outputs/CNN.pth")  # the other files go beside it
SNAPSHOTS = (1, 2, 5, 10, 20, 30, 40, 64)  # epochs kept, those of the paper's Figure 4

FOLDS = {f"fold {number}": number for number in range(10)}  # what TRAIN_ON calls the published folds


class Result(NamedTuple):
    """What a network makes of some images: mean loss in nats, accuracy from 0 to 1, predicted classes."""

    loss: float
    accuracy: float
    predictions: Tensor


def choose_precision(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if fast else torch.float32


def part_of_training(split: Split, test: Split, train_on: str, folds: Path) -> tuple[Split, Split]:
    """Return the images to train on and the images to measure on.

    Args:
        split: The training split.
        test: The test split.
        train_on: "all", "validation" or one of `FOLDS`.
        folds: fold_indices.txt of the published archive: ten lines of 1,000 indices into the training split.

    Raises:
        SystemExit: If the file that a fold needs is missing or damaged.
    """
    if train_on == "all":
        return split, test
    if train_on == "validation":  # the last fifth of each class
        held_out = np.zeros(len(split.labels), bool)
        for label in np.unique(split.labels):
            members = np.flatnonzero(split.labels == label)
            held_out[members[len(members) * 4 // 5 :]] = True
        return select(split, np.flatnonzero(~held_out)), select(split, np.flatnonzero(held_out))
    return select(split, read_folds(folds, len(split.labels))[FOLDS[train_on]]), test


def read_folds(path: Path, images: int) -> NDArray[np.int64]:
    """Return the training images of each fold, (folds, images of a fold).

    Args:
        path: fold_indices.txt of the published archive.
        images: In the training split.

    Raises:
        SystemExit: If the file is missing or damaged, or there are not as many images.
    """
    mend = "take it from the published archive, or set TRAIN_ON to all"
    if not path.is_file():
        raise SystemExit(f"{path} not found: {mend}")
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()]
    try:
        folds = np.array(lines, dtype=np.int64)
    except (ValueError, OverflowError):  # no whole numbers, or lines of different length
        folds = np.empty(0, np.int64)
    if folds.ndim != 2 or len(folds) != len(FOLDS) or folds.size == 0:
        raise SystemExit(f"{path} is damaged, expected {len(FOLDS)} lines of equally many indices: {mend}")
    if folds.min() < 0 or folds.max() >= images or not np.diff(np.sort(folds)).all():
        raise SystemExit(
            f"{path} has indices from {folds.min()} to {folds.max()}, expected different ones in each line, "
            f"from 0 to {images - 1:,}: {mend}"
        )
    return folds


def select(split: Split, places: NDArray[np.int64]) -> Split:
    """Return the images and labels at `places`."""
    return Split(split.images[places], split.labels[places])


def evaluate(
    net: CNN,
    images: Tensor,
    labels: Tensor,
    mean: list[float],
    std: list[float],
    precision: torch.dtype,
    mirrored: bool = False,
) -> Result:
    """Measure the network in evaluation mode, then put it back into the mode it was in.

    Args:
        net: The network.
        images: uint8 (images, 3, rows, columns) on the network's device.
        labels: int64 (images,).
        mean: Of each channel, on a scale of 0 to 1.
        std: Likewise.
        precision: Of the arithmetic.
        mirrored: Average the logits of each image with those of its mirror image.
    """
    was_training = net.training
    net.eval()
    losses, predictions = torch.zeros((), dtype=torch.float64), []
    size = 50 if images.device.type == "cpu" else 500  # on a CPU 50 took half the time of 250: cache
    with torch.no_grad():
        for batch, truth in zip(images.split(size), labels.split(size), strict=True):
            batch = normalise(batch, mean, std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(batch.device.type, precision, enabled=precision != torch.float32):
                logits = (net(batch) + net(batch.flip(3))) / 2 if mirrored else net(batch)
            losses += F.cross_entropy(logits.float(), truth, reduction="sum").cpu().double()
            predictions.append(logits.argmax(dim=1))
    net.train(was_training)
    predicted = torch.cat(predictions)
    return Result(float(losses) / len(labels), float((predicted == labels).float().mean()), predicted.cpu())


class Trainer:
    """A training run: network, optimiser, schedule and random state, which can be stored and restored.

    Args:
        config: Arguments of `CNN`.
        device: Where to train.
        precision: Of the forward and backward pass; weights and optimiser stay in float32.
        steps: Optimiser steps of the whole run.
        settings: The other settings of the run, for optimiser, schedule and loss.
    """

    def __init__(
        self,
        config: dict[str, Any],
        device: torch.device,
        precision: torch.dtype,
        steps: int,
        settings: dict[str, Any],
    ):
        torch.manual_seed(settings["seed"])
        self.generator = torch.Generator().manual_seed(settings["seed"])  # order and augmentation
        self.net = CNN(**config).to(device).to(memory_format=torch.channels_last)
        self.device, self.precision = device, precision
        self.smoothing, self.augmentation = settings["label_smoothing"], settings["augmentation"]
        decayed = [p for p in self.net.parameters() if p.ndim > 1]
        others = [p for p in self.net.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings["learning_rate"],
            betas=(0.9, 0.99),
        )
        # a warm-up of just one step would make the schedule divide by its length, zero: it has none then
        warm_up = 0.0 if math.isclose(settings["warm_up"] * (steps + 1), 1) else settings["warm_up"]
        self.schedule = OneCycleLR(
            self.optimizer,
            settings["learning_rate"],
            total_steps=steps + 1,
            pct_start=float(warm_up),  # a whole number is refused
            cycle_momentum=False,  # betas stay
        )

    def epoch(
        self, images: Tensor, labels: Tensor, mean: list[float], std: list[float], batch_size: int
    ) -> Result:
        """Train on every image once, in random order, the last incomplete batch left out.

        Args:
            images: uint8 (images, 3, rows, columns).
            labels: int64 (images,).
            mean: Of each channel, on a scale of 0 to 1.
            std: Likewise.
            batch_size: Images a step.

        Returns:
            Loss and accuracy in training mode on the augmented images, as they were seen.

        Raises:
            SystemExit: If the loss is not finite.
        """
        self.net.train()
        order = torch.randperm(len(images), generator=self.generator)
        order = order[: len(images) // batch_size * batch_size]
        total, predictions = torch.zeros((), dtype=torch.float64), []
        for step, chosen in enumerate(tqdm(order.split(batch_size), unit="step", leave=False, disable=None)):
            batch = normalise(images[chosen].to(self.device), mean, std)
            batch = augment(batch, self.augmentation, self.generator).contiguous(
                memory_format=torch.channels_last
            )
            truth = labels[chosen].to(self.device)
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                logits = self.net(batch)
            loss = F.cross_entropy(logits.float(), truth, label_smoothing=self.smoothing)
            if not math.isfinite(loss.item()):
                epoch = self.schedule.last_epoch // (len(order) // batch_size) + 1
                raise SystemExit(
                    f"the loss is {loss.item()} in epoch {epoch}, step {step}, learning rate "
                    f"{self.schedule.get_last_lr()[0]:.3g}: lower LEARNING_RATE or WEIGHT_DECAY"
                )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
            predictions.append(logits.argmax(dim=1).cpu())
        predicted = torch.cat(predictions)
        accuracy = float((predicted == labels[order]).float().mean())
        return Result(float(total) / (len(order) // batch_size), accuracy, predicted)

    def state(self) -> dict[str, Any]:
        """Return everything that decides how the training goes on."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["random"].cpu())
        if state["cuda"]:
            torch.cuda.set_rng_state_all([random.cpu() for random in state["cuda"]])


def resume(
    path: Path, settings: dict[str, Any], start: Callable[[], Trainer]
) -> tuple[Trainer, list[dict[str, float]]]:
    """Return a trainer and the rows of the epochs behind it, none if it starts anew, and say which.

    Args:
        path: training_state.pth; there is one only while a training is unfinished.
        settings: A run that had others is not taken up.
        start: Makes the trainer.
    """
    if path.is_file():
        try:
            state, _ = read_whole(path)
            if state["settings"] == json.dumps(settings):
                trainer, rows = start(), [dict(row) for row in state["rows"]]
                trainer.restore(state)
                print(f"going on after epoch {int(rows[-1]['epoch'])} of an interrupted run")
                return trainer, rows
            kept = path.with_name("training_state_before.pth")
            count = len(state["rows"])
            path.replace(kept)
            print(f"an interrupted run of {count} epochs had other settings: starting anew; to go on with it")
            print(f"later, set its settings again and rename {kept} to {path.name}")
        except Exception as error:  # what does not fit can be found in as many ways as there are entries
            if isinstance(error, OSError) or no_memory(error):
                raise
            print(f"{path} cannot be read: starting anew")
    return start(), []


def draw_curves(log: pd.DataFrame, measured: str, heading: str) -> Figure:
    """Draw loss, accuracy and learning rate of each epoch; `measured` says on which images."""
    training = "training images, augmented (the loss: with smoothed labels)"
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), dpi=200, layout="constrained")
    for ax, quantity, label in zip(axes, ("loss", "accuracy"), ("loss (nats)", "accuracy (%)"), strict=False):
        scale = 100 if quantity == "accuracy" else 1
        for part, name in (("train", training), ("test", f"{measured} images")):
            values = log[["epoch", f"{part}_{quantity}"]].dropna()  # not every epoch is measured
            marker = "." if part == "test" or len(values) < 3 else ""
            ax.plot(values["epoch"], scale * values[f"{part}_{quantity}"], label=name, marker=marker)
        ax.set(xlabel="epoch", ylabel=label)
    axes[2].plot(log["epoch"], log["learning_rate"], color="0.3", marker="." if len(log) < 3 else "")
    axes[2].set(xlabel="epoch", ylabel="learning rate at the end")
    axes[2].ticklabel_format(axis="y", scilimits=(0, 0))
    fig.legend(handles=axes[0].lines, loc="outside lower center", ncols=2, frameon=False)
    sns.despine(fig)
    fig.suptitle(heading)
    return fig


def confusion_matrix(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Count images of each true class (row) that were taken for each class (column)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def draw_confusion(counts: NDArray[np.int64], names: list[str], heading: str) -> Figure:
    """Draw the share of each true class's images that were taken for each class, in per cent."""
    share = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    fig, ax = plt.subplots(figsize=(6, 5), dpi=200, layout="constrained")
    sns.heatmap(
        share,
        annot=True,
        fmt=".0f",
        cmap="mako_r",
        vmin=0,
        vmax=100,
        square=True,
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": "share of the true class (%)"},
        ax=ax,
    )
    ax.tick_params(axis="x", rotation=45)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="predicted class", ylabel="true class", title=heading)
    return fig


def report(counts: NDArray[np.int64], names: list[str]) -> None:
    """Print accuracy of each class, worst confusions, and the accuracy with its 95 % interval (normal)."""
    for name, row, right in zip(names, counts, counts.diagonal(), strict=True):
        print(f"  {name:<12}{right / max(row.sum(), 1):>7.1%}  ({right} of {row.sum()})")
    wrong = counts - np.diag(counts.diagonal())
    for place in np.argsort(-wrong, axis=None, kind="stable")[:3]:
        truth, guess = divmod(int(place), len(names))
        print(f"  {wrong[truth, guess]} images of {names[truth]} were taken for {names[guess]}")
    images = counts.sum()
    accuracy = counts.trace() / images
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / images)
    print(f"accuracy {accuracy:.2%}, 95 % interval {accuracy - half:.2%} to {accuracy + half:.2%}")


def check_settings(settings: dict[str, Any], snapshots: object) -> None:
    """Refuse settings that make no sense, before anything is downloaded or computed.

    Args:
        settings: Under their names in small letters; `config` holds the arguments of `CNN`.
        snapshots: The setting SNAPSHOTS.

    Raises:
        SystemExit: If one is of the wrong type or out of range, or the network cannot be built.
    """
    config, augmentation = settings["config"], settings["augmentation"]
    for lowest, highest, *names in (  # a whole number first: the setting is one, too
        (1, 1_000_000, "epochs", "shapes_epochs", "measure_every"),
        (2, 1_000_000, "batch_size"),  # batch norm needs two
        (0, 2**32 - 1, "seed"),
        (1e-9, math.inf, "learning_rate"),
        (0.0, math.inf, "weight_decay"),
        (0.0, 1, "warm_up", "label_smoothing"),
    ):
        check_numbers(lowest, highest, **{name.upper(): settings[name] for name in names})
    if not isinstance(augmentation, Augmentation):
        raise SystemExit(f"AUGMENTATION is {augmentation!r}; expected Augmentation(...)")
    most = Augmentation(shift=IMAGE_SIZE, zoom=9, rotation=180, colour=1, cutout=IMAGE_SIZE)
    for name, highest in most._asdict().items():
        lowest = 0 if name == "cutout" else 0.0
        check_numbers(lowest, highest, **{f"AUGMENTATION.{name}": getattr(augmentation, name)})
    if settings["train_on"] not in ("all", "validation", *FOLDS):
        expected = 'expected "all", "validation" or "fold 0" to "fold 9"'
        raise SystemExit(f"TRAIN_ON is {settings['train_on']!r}; {expected}")
    if not isinstance(snapshots, tuple | list | set | range):
        raise SystemExit(f"SNAPSHOTS is {snapshots!r}; expected epochs in brackets, as (10, 20) or (10,)")
    for epoch in snapshots:
        check_numbers(1, **{"an epoch in SNAPSHOTS": epoch})
    with torch.device("meta"):  # shapes only
        try:
            net = CNN(**config).eval()
        except ValueError as error:  # begins with the argument's name, the setting's in small letters
            name, problem = str(error).split(" ", 1)
            raise SystemExit(f"{name.upper()} {problem}") from None
        try:
            net(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
        except (RuntimeError, ValueError) as error:
            raise SystemExit(
                f"KERNEL_SIZES, STRIDES and POOL_SIZES make no network of four layers for images of "
                f"{IMAGE_SIZE} pixels: {str(error).splitlines()[0]}"
            ) from None


def main() -> None:
    """Train, measure now and then, and write checkpoint, log and figures."""
    sns.set_theme(context="paper", style="white", palette="colorblind")
    settings: dict[str, Any] = {
        "config": {
            "filters": FILTERS,
            "kernel_sizes": KERNEL_SIZES,
            "strides": STRIDES,
            "pool_sizes": POOL_SIZES,
            "head_size": HEAD_SIZE,
            "dropout": DROPOUT,
            "partial_identity": PARTIAL_IDENTITY,
        },
        "train_on": TRAIN_ON,
        "epochs": EPOCHS,
        "shapes_epochs": SHAPES_EPOCHS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "warm_up": WARM_UP,
        "weight_decay": WEIGHT_DECAY,
        "label_smoothing": LABEL_SMOOTHING,
        "augmentation": AUGMENTATION,
        "measure_every": MEASURE_EVERY,
        "seed": SEED,
    }
    check_settings(settings, SNAPSHOTS)
    checkpoint, data_dir = check_paths(CHECKPOINT=CHECKPOINT, DATA_DIR=DATA_DIR)
    check_file_name(".pth", CHECKPOINT=checkpoint)
    device = choose_device(DEVICE)
    dataset = find_dataset(DATASET, data_dir)
    epochs = EPOCHS if dataset == "stl10" else min(EPOCHS, SHAPES_EPOCHS)
    train, test = (load_split(dataset, data_dir, split) for split in ("train", "test"))
    train, test = part_of_training(train, test, TRAIN_ON, data_dir / "stl10_binary" / "fold_indices.txt")
    if len(train.images) < BATCH_SIZE:
        raise SystemExit(f"BATCH_SIZE is {BATCH_SIZE}; there are only {len(train.images):,} training images")
    names, (mean, std) = class_names(dataset), mean_and_std(train.images)
    settings["config"]["classes"] = len(names)
    precision = choose_precision(device)
    # with these a run that goes on is the run that was interrupted
    settings |= {"dataset": dataset, "mean": mean, "precision": str(precision), "device": str(device)}
    settings["torch"] = torch.__version__
    measured = "held-out training" if TRAIN_ON == "validation" else "test"
    print(
        f"training on {len(train.images):,} images of {title(dataset)}, "
        f"measuring on {len(test.images):,} {measured} images, "
        f"on {device} in {str(precision).removeprefix('torch.')}, torch {torch.__version__}, seed {SEED}"
    )
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    test_images, test_labels = (
        torch.from_numpy(test.images).to(device),
        torch.from_numpy(test.labels).to(device),
    )
    steps = epochs * (len(images) // BATCH_SIZE)
    state_path, snapshots = checkpoint.with_name("training_state.pth"), checkpoint.parent / "snapshots"
    prepare_folders("CHECKPOINT", checkpoint.parent, snapshots)
    trainer, rows = resume(
        state_path, settings, lambda: Trainer(settings["config"], device, precision, steps, settings)
    )

    def save(path: Path, metrics: dict[str, float]) -> None:
        save_checkpoint(
            path,
            trainer.net,
            dataset=dataset,
            class_names=names,
            mean=mean,
            std=std,
            seed=SEED,
            epochs=len(rows),
            metrics=metrics,
            measured_on=measured,
        )

    print(
        f"{'epoch':>5}{'train loss':>12}{'accuracy':>10}"
        f"{'test loss':>12}{'accuracy':>10}{'rate':>10}{'time':>9}"
    )
    before = rows[-1]["seconds"] if rows else 0.0
    start = time.perf_counter()
    kept = len(rows)  # epochs from whose end a run can go on
    try:
        while len(rows) < epochs:
            epoch = len(rows) + 1
            learned = trainer.epoch(images, labels, mean, std, BATCH_SIZE)
            # evaluation draws no random numbers, so how often it happens does not change the training
            due = epoch % MEASURE_EVERY == 0 or epoch in SNAPSHOTS or epoch == epochs
            tested = (
                evaluate(trainer.net, test_images, test_labels, mean, std, precision)
                if due
                else Result(math.nan, math.nan, torch.empty(0))
            )
            row = {
                "epoch": epoch,
                "train_loss": learned.loss,
                "train_accuracy": learned.accuracy,
                "test_loss": tested.loss,
                "test_accuracy": tested.accuracy,
                "learning_rate": float(trainer.schedule.get_last_lr()[0]),
                "seconds": before + time.perf_counter() - start,
            }
            rows.append(row)
            print(
                f"{epoch:>5}{learned.loss:>12.4f}{learned.accuracy:>10.1%}"
                + (f"{tested.loss:>12.4f}{tested.accuracy:>10.1%}" if due else " " * 22)
                + f"{row['learning_rate']:>10.2g}{row['seconds']:>7.0f} s",
                flush=True,
            )
            if epoch == 1:
                for old in snapshots.glob("epoch_*.pth"):  # of an earlier run, whose CNN.pth stays to the end
                    old.unlink(missing_ok=True)
            if epoch in SNAPSHOTS or epoch == epochs:
                save(snapshots / f"epoch_{epoch:03d}.pth", {"test_accuracy": tested.accuracy})
            save_whole({"settings": json.dumps(settings), "rows": rows, **trainer.state()}, state_path)
            kept = epoch
    except KeyboardInterrupt:
        again = f"{kept} finished epochs are kept: run again to go on" if kept else "no finished epoch yet"
        raise SystemExit(f"interrupted in epoch {kept + 1}; {again}") from None

    # once more in float32, the precision of every later stage
    arguments = trainer.net, test_images, test_labels, mean, std, torch.float32
    final, mirrored = evaluate(*arguments), evaluate(*arguments, mirrored=True)
    counts = confusion_matrix(test.labels, final.predictions.numpy(), len(names))
    report(counts, names)
    print(f"averaged with each image's mirror image, at twice the cost: {mirrored.accuracy:.2%}")
    seconds = rows[-1]["seconds"]
    print(f"{epochs * len(images) / seconds:,.0f} training images per second, testing included")
    metrics = {"test_accuracy": final.accuracy, "test_loss": final.loss, "seconds": seconds}
    # only now, so that what lies beside CNN.pth always belongs to it
    save(checkpoint, {**metrics, "test_accuracy_mirrored": mirrored.accuracy})
    log = pd.DataFrame(rows)
    with whole_file(checkpoint.with_name("training_log.csv")) as partial:
        log.to_csv(partial, index=False)
    heading = (
        f"{title(dataset)}, {len(images):,} training and {len(test_labels):,} {measured} images, seed {SEED}"
    )
    save_figure(draw_curves(log, measured, heading), checkpoint.with_name("training_curves.png"))
    heading = f"{len(test_labels):,} {measured} images of {title(dataset)}, accuracy {final.accuracy:.1%}"
    save_figure(draw_confusion(counts, names, heading), checkpoint.with_name("confusion_matrix.png"))
    state_path.unlink(missing_ok=True)  # a second run in the same folder may have been faster
    print(
        f"wrote {checkpoint} and, beside it, snapshots/, training_log.csv, training_curves.png, "
        "confusion_matrix.png"
    )
    print("next: uv run deconv.py")


if __name__ == "__main__":
    with plain_errors():
        main()
