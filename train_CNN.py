"""Train the network on the 5,000 labelled images of STL-10 and test it on the other 8,000.

Run:    uv run train_CNN.py
Reads:  data/stl10_binary/{train,test}_{X,y}.bin, which it downloads if they are missing; fold_indices.txt
        beside them for a fold
Writes: outputs/CNN.pth, outputs/snapshots/epoch_*.pth, outputs/training_log.csv,
        outputs/training_curves.png, outputs/confusion_matrix.png, outputs/conv1_filters.png

An interrupted run goes on from the last finished epoch, kept in outputs/training_state_*.pth, when the script
is started again with the same settings.
"""

import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from CNN import CNN, IMAGE_SIZE, atomic_write, choose_device, load_checkpoint, save_checkpoint
from load_data import (
    TITLES,
    Array,
    Augmentation,
    Split,
    augment,
    class_names,
    find_dataset,
    fingerprint,
    load_split,
    mean_and_std,
    save_figure,
    save_table,
    set_style,
    stl10_folder,
    tile,
)

# data
DATASET = "auto"  # "stl10", "folders" (your own), "shapes" (generated) or "auto": STL-10, else shapes
DATA_DIR = Path("data")  # holds stl10_binary, or train/CLASS and test/CLASS with pictures
TRAIN_ON = "all"  # "all"; "validation": 4,000 images, measured on the other 1,000; "fold 0" to "fold 9"
# network
FILTERS = (48, 96, 192, 256)  # of conv1 to conv4, as the three below
KERNEL_SIZES = (6, 3, 3, 3)  # each a multiple of its stride, so that a projection reaches all pixels alike
STRIDES = (2, 1, 1, 1)  # 2 in conv1 makes training several times faster
POOL_SIZES = (2, 2, 2, 2)  # rows and columns of a pooling region; 1 for none
HEAD_SIZE = 2  # the classifier sees conv4 averaged over 2 x 2 regions
DROPOUT = 0.3  # of the classifier's inputs
# training
EPOCHS = 60  # passes over the training images
SHAPES_EPOCHS = 30  # passes over the generated images, at most EPOCHS
BATCH_SIZE = 64  # images a step
FILTER_RATE = 0.03  # of Muon: how far a filter, of norm 1, moves in a step; largest, after the warm-up
LEARNING_RATE = 3e-3  # of AdamW, for batch norm and the classifier; likewise
WARM_UP = 0.15  # share of the training in which the learning rates rise; then they fall along a cosine
WEIGHT_DECAY = 0.05  # of the classifier's weights, not of batch norm
LABEL_SMOOTHING = 0.1  # share of the target spread over all classes
AUGMENTATION = Augmentation(shift=12, zoom=0.25, rotation=10, colour=0.3, cutout=16)  # load_data.py says what
MEASURE_EVERY = 5  # epochs between measurements on the test images, also made at snapshots and at the end
SEED = 0  # weights, order of the images, augmentation and dropout
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
# files
CHECKPOINT = Path("outputs/CNN.pth")  # the other files go beside it
SNAPSHOTS = (1, 2, 5, 10, 20, 30, 40, 64)  # epochs kept, those of the paper's Figure 4; 0, the start, always


Row = dict[str, float]  # of training_log.csv


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
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def part_of_training(train: Split, test: Split, train_on: str, folds: Path) -> tuple[Split, Split, str]:
    """Return the images to train on, the images to measure on and what these are called.

    `folds` is fold_indices.txt of the published archive: ten lines of 1,000 indices into the training split.

    Raises:
        SystemExit: If there is no such part, or the file that a fold needs is missing or damaged.
    """
    if train_on == "all":
        return train, test, "test"
    if train_on == "validation":  # the last fifth of each class
        place = pd.Series(train.labels).groupby(train.labels).cumcount()
        held_out = (place >= np.bincount(train.labels)[train.labels] * 4 // 5).to_numpy()
        return train.select(~held_out), train.select(held_out), "validation"
    if train_on not in [f"fold {number}" for number in range(10)]:
        raise SystemExit(f"TRAIN_ON is {train_on!r}; allowed are 'all', 'validation', 'fold 0' to 'fold 9'")
    try:
        indices = np.loadtxt(folds, dtype=np.int64, ndmin=2, encoding="utf-8-sig")
        if len(indices) != 10 or indices.min() < 0:
            raise ValueError(f"{len(indices)} lines, expected ten of indices")
        return train.select(indices[int(train_on[-1])]), test, "test"
    except (OSError, ValueError, IndexError) as error:
        raise SystemExit(
            f"{folds} cannot be read ({error}): take it from the published archive, or set TRAIN_ON to 'all'"
        ) from None


def build_network(config: dict[str, Any]) -> CNN:
    """Return a new network, or raise SystemExit if images do not fit through it."""
    try:
        net = CNN(**config)
        net.eval()(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    except (RuntimeError, ValueError) as error:
        raise SystemExit(
            f"FILTERS, KERNEL_SIZES, STRIDES and POOL_SIZES make no network of four layers for images of "
            f"{IMAGE_SIZE} pixels: {str(error).splitlines()[0]}"
        ) from None
    return net


def evaluate(net: CNN, data: Split, precision: torch.dtype = torch.float32, mirrored: bool = False) -> Result:
    """Measure the network in evaluation mode; `mirrored` averages logits with those of the mirror images."""
    net.eval()
    loss, predictions = 0.0, []
    size = 50 if net.mean.device.type == "cpu" else 500  # on a CPU 50 took half the time of 250: cache
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    with torch.no_grad():
        for some, truth in zip(images.split(size), labels.split(size), strict=True):
            batch = net.normalise(some)
            with torch.autocast(batch.device.type, precision, enabled=precision != torch.float32):
                logits = (net(batch) + net(batch.flip(3))) / 2 if mirrored else net(batch)
            logits = logits.float().cpu()
            loss += float(F.cross_entropy(logits, truth, reduction="sum"))
            predictions.append(logits.argmax(dim=1))
    predicted = torch.cat(predictions)
    return Result(loss / len(labels), float((predicted == labels).float().mean()), predicted)


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """Move a matrix's singular values roughly to 1 by Newton-Schulz steps, X -> (a + b X X' + c (X X')^2) X.

    Coefficients of Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural networks"). A step is
    a polynomial P of the small matrix G = X X': X -> P X makes G -> P G P, so the P are multiplied first and
    the large matrix once. They take 5 steps.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.mT, steps).mT
    x = matrix / (matrix.norm() + 1e-7)
    gram, identity = x @ x.mT, torch.eye(len(x), dtype=x.dtype, device=x.device)
    product = identity
    for _ in range(steps):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = polynomial @ product, polynomial @ gram @ polynomial
    return cast(Tensor, product @ x)


class Muon(torch.optim.Optimizer):
    """Move the filters of a layer in directions roughly orthogonal to each other (Jordan et al. 2024).

    Each filter is set back to norm 1 before a step: batch norm makes its scale irrelevant, and this takes the
    place of weight decay (the paper renormalises filters, too, section 3). A step moves the filters of a
    layer, (filters, channels, rows, columns), by `lr` in the root mean square; the gradient has momentum with
    Nesterov's look-ahead. torch.optim.Muon takes no 4-D parameters.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            for filters in group["params"]:
                velocity = self.state[filters].setdefault("momentum", torch.zeros_like(filters))
                velocity.lerp_(filters.grad, 1 - group["momentum"])
                ahead = filters.grad.lerp(velocity, group["momentum"])
                update = orthogonalise(ahead.flatten(1))
                update *= len(filters) ** 0.5 / (update.norm() + 1e-7)  # 1 a filter, in the RMS
                filters.div_(filters.flatten(1).norm(dim=1)[:, None, None, None])
                filters.sub_(update.view_as(filters), alpha=group["lr"])


class Trainer:
    """A training run: network, optimisers, schedules and random state, which can be stored and restored.

    `settings` has the constants above under their names in small letters. `precision` is that of the forward
    and backward pass; weights and optimisers stay in float32.
    """

    def __init__(self, train: Split, settings: dict[str, Any], device: torch.device, precision: torch.dtype):
        self.images, self.labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
        self.precision, self.batch_size = precision, settings["batch_size"]
        self.smoothing = settings["label_smoothing"]
        self.augmentation = Augmentation(**settings["augmentation"])
        torch.manual_seed(settings["seed"])
        self.generator = torch.Generator().manual_seed(settings["seed"])  # order and augmentation
        net = build_network(settings["network"])
        for buffer, values in zip((net.mean, net.std), mean_and_std(train.images), strict=True):
            buffer.copy_(torch.from_numpy(values).view(3, 1, 1))
        self.net = net.to(device).to(memory_format=torch.channels_last)
        filters = [block.conv.weight for block in self.net.blocks]
        of_batch_norm = [parameter for block in self.net.blocks for parameter in block.bn.parameters()]
        others: list[dict[str, Any]] = [
            {"params": [self.net.classifier.weight], "weight_decay": settings["weight_decay"]},
            {"params": [*of_batch_norm, self.net.classifier.bias], "weight_decay": 0.0},
        ]
        self.optimizers = (
            Muon(filters, settings["filter_rate"]),
            torch.optim.AdamW(others, settings["learning_rate"], betas=(0.9, 0.99)),
        )
        steps = settings["epochs"] * (len(self.images) // self.batch_size)
        self.schedules = [
            OneCycleLR(o, o.defaults["lr"], steps + 1, pct_start=settings["warm_up"], cycle_momentum=False)
            for o in self.optimizers
        ]

    def epoch(self, bar: "tqdm[Any] | None" = None) -> Result:
        """Train on every image once, in random order, the last incomplete batch left out; `bar` counts steps.

        Returns:
            Loss, without label smoothing, and accuracy in training mode on the augmented images.

        Raises:
            SystemExit: If the loss is not finite.
        """
        self.net.train()
        device = self.net.mean.device
        order = torch.randperm(len(self.images), generator=self.generator)
        order = order[: len(order) // self.batch_size * self.batch_size]
        losses, predictions = [], []
        for chosen in order.split(self.batch_size):
            batch = augment(self.net.normalise(self.images[chosen]), self.augmentation, self.generator)
            batch = batch.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                logits = self.net(batch)
            truth = self.labels[chosen].to(device)
            loss = F.cross_entropy(logits.float(), truth, label_smoothing=self.smoothing)
            losses.append(F.cross_entropy(logits.detach().float(), truth).item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"the loss is {losses[-1]}: lower FILTER_RATE or LEARNING_RATE")
            self.net.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
            if bar is not None:
                bar.update()
            predictions.append(logits.argmax(dim=1).cpu())
        predicted = torch.cat(predictions)
        accuracy = float((predicted == self.labels[order]).float().mean())
        return Result(float(np.mean(losses)), accuracy, predicted)

    def state(self) -> dict[str, Any]:
        """Return everything that decides how the training goes on."""
        return {
            "net": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.net.load_state_dict(state["net"])
        for name in ("optimizers", "schedules"):
            for part, stored in zip(getattr(self, name), state[name], strict=True):
                part.load_state_dict(stored)
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["cuda"])


def resume(path: Path, trainer: Trainer) -> list[Row]:
    """Take up the interrupted run kept in `path`, if there is one, and return the rows of its log."""
    if not path.is_file():
        return []
    try:
        state = torch.load(path, weights_only=True)
        trainer.restore(state)
        rows: list[Row] = state["rows"]
    except Exception as error:  # what torch raises for a damaged file is of nearly any type
        raise SystemExit(f"{path} is damaged ({type(error).__name__}): move it and start anew") from None
    print(f"going on after epoch {len(rows)} of an interrupted run")
    return rows


def log_row(epoch: int, learned: Result, measured: Result | None, rate: float, seconds: float) -> Row:
    """Print what an epoch brought and return it as a row of training_log.csv."""
    middle = f"{measured.loss:>17.4f}{measured.accuracy:>10.1%}" if measured else " " * 27
    line = f"{epoch:>5}{learned.loss:>16.4f}{learned.accuracy:>10.1%}{middle}{rate:>15.2g}{seconds:>7.0f} s"
    tqdm.write(line)  # above the progress bar
    sys.stdout.flush()
    loss, accuracy = (measured.loss, measured.accuracy) if measured else (math.nan, math.nan)
    row = {"epoch": epoch, "train_loss": learned.loss, "train_accuracy": learned.accuracy}
    row |= {"measured_loss": loss, "measured_accuracy": accuracy, "filter_rate": rate, "seconds": seconds}
    return row


def draw_filters(filters: Array, heading: str) -> Figure:
    """Draw conv1's filters (filters, 3, rows, columns), each with its own scale; grey is zero."""
    scale = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    pictures = np.moveaxis(0.5 + filters / (2 * scale), 1, 3)
    fig, ax = plt.subplots(figsize=(6, 0.3 + 0.74 * math.ceil(len(filters) / 8)), layout="constrained")
    ax.imshow(tile(pictures, 8, 1), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(heading, fontsize=9)
    return fig


def draw_curves(log: pd.DataFrame, split: str, heading: str) -> Figure:
    """Draw loss, accuracy and learning rate against epochs and minutes."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for ax, quantity, unit, scale in zip(axes, ("loss", "accuracy"), ("nats", "%"), (1, 100), strict=False):
        for part, name in (("train", "training images, augmented"), ("measured", f"{split} images")):
            values = scale * log.set_index("epoch")[f"{part}_{quantity}"].dropna()  # not measured every epoch
            ax.plot(values, label=name, marker="." if len(values) < 20 else "")
        ax.set(xlabel="epoch", ylabel=f"{quantity} ({unit})")
    axes[2].plot(log["epoch"], log["filter_rate"], color="0.3")
    axes[2].set(xlabel="epoch", ylabel="learning rate of the filters")
    per_epoch = log["seconds"].iloc[-1] / 60 / len(log)  # minutes
    for ax in axes:
        minutes = ax.secondary_xaxis("top", functions=(lambda e: e * per_epoch, lambda m: m / per_epoch))
        minutes.set_xlabel("minutes")
    fig.legend(handles=axes[0].lines, loc="outside lower center", ncols=2, frameon=False)
    sns.despine(fig, top=False)
    fig.suptitle(heading)
    return fig


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Count images of each true class (row) that were taken for each class (column)."""
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def draw_confusion(counts: Array, names: list[str], heading: str) -> Figure:
    """Draw the share of each true class's images that were taken for each class, in per cent."""
    share = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    fig, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    style: dict[str, Any] = {"annot": True, "fmt": ".0f", "cmap": "mako_r", "vmin": 0, "vmax": 100}
    bar = {"label": "share of the true class (%)"}
    sns.heatmap(share, square=True, xticklabels=names, yticklabels=names, cbar_kws=bar, ax=ax, **style)
    ax.tick_params(axis="x", rotation=45)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="predicted class", ylabel="true class", title=heading)
    return fig


def report(counts: Array, names: list[str]) -> None:
    """Print accuracy of each class, worst confusions, and the accuracy with its 95 % interval (normal)."""
    for name, row, right in zip(names, counts, counts.diagonal(), strict=True):
        print(f"  {name:<12}{right / max(row.sum(), 1):>7.1%}  ({right} of {row.sum()})")
    wrong = counts - np.diag(counts.diagonal())
    for place in np.argsort(-wrong, axis=None, kind="stable")[:3]:
        truth, guess = divmod(int(place), len(names))
        if wrong[truth, guess]:
            print(f"  {wrong[truth, guess]} images of {names[truth]} were taken for {names[guess]}")
    accuracy = counts.trace() / counts.sum()
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / counts.sum())
    print(f"accuracy {accuracy:.2%}, 95 % interval {accuracy - half:.2%} to {accuracy + half:.2%}")


def main() -> None:
    """Train, measure now and then, and write checkpoint, log and figures."""
    set_style()
    device, dataset = choose_device(DEVICE), find_dataset(DATASET, DATA_DIR)
    names, title, precision = class_names(dataset, DATA_DIR), TITLES[dataset], choose_precision(device)
    train, test = (load_split(dataset, DATA_DIR, split) for split in ("train", "test"))
    prints = {"train": fingerprint(train, names), "test": fingerprint(test, names)}
    folds = stl10_folder(DATA_DIR) / "fold_indices.txt"
    train, measured, split = part_of_training(train, test, TRAIN_ON, folds)
    count, measured_on = len(train.images), f"{len(measured.images):,} {split} images"
    epochs = min(EPOCHS, SHAPES_EPOCHS) if dataset == "shapes" else EPOCHS
    settings: dict[str, Any] = {  # with these a run that goes on is the run that was interrupted
        "network": {
            "filters": FILTERS,
            "kernel_sizes": KERNEL_SIZES,
            "strides": STRIDES,
            "pool_sizes": POOL_SIZES,
            "head_size": HEAD_SIZE,
            "dropout": DROPOUT,
            "classes": len(names),
        },
        "dataset": dataset,
        "data": {"folder": str(DATA_DIR), **prints},
        "train_on": TRAIN_ON,
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "filter_rate": FILTER_RATE,
        "learning_rate": LEARNING_RATE,
        "warm_up": WARM_UP,
        "weight_decay": WEIGHT_DECAY,
        "label_smoothing": LABEL_SMOOTHING,
        "augmentation": AUGMENTATION._asdict(),
        "seed": SEED,
        "device": str(device),
        "precision": str(precision).removeprefix("torch."),
        "torch": str(torch.__version__),  # its own type would not load
    }
    print(
        f"training on {count:,} images of {title} for {epochs} epochs, measuring on {measured_on}, "
        f"on {device} in {settings['precision']}, torch {torch.__version__}, seed {SEED}"
    )
    if count < BATCH_SIZE:
        raise SystemExit(f"BATCH_SIZE is {BATCH_SIZE}; there are only {count} training images: lower it")
    trainer = Trainer(train, settings, device, precision)
    facts = {"dataset": dataset, "class_names": names, "settings": settings}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    state_path = CHECKPOINT.expanduser().with_name(f"training_state_{digest}.pth")

    def save(name: str, epoch: int, **metrics: float) -> None:
        path, measures = CHECKPOINT.parent / name, {"split": split, **metrics}
        save_checkpoint(path, trainer.net, epochs=epoch, metrics=measures, **facts)

    # also of a run that goes on: another training may have been here since
    save("snapshots/epoch_000.pth", 0, accuracy=math.nan)
    rows = resume(state_path, trainer)
    print(f"epoch  training: loss  accuracy  {split:>10}: loss  accuracy  learning rate   time")
    steps = count // BATCH_SIZE
    bar = tqdm(total=epochs * steps, initial=len(rows) * steps, unit=" steps", disable=None)
    start = time.perf_counter() - (rows[-1]["seconds"] if rows else 0)
    try:
        for epoch in range(len(rows) + 1, epochs + 1):
            learned = trainer.epoch(bar)
            # measuring draws no random numbers, so how often it happens does not change the training
            due = epoch % MEASURE_EVERY == 0 or epoch in SNAPSHOTS or epoch == epochs
            tested = evaluate(trainer.net, measured, precision) if due else None
            rate, seconds = trainer.schedules[0].get_last_lr()[0], time.perf_counter() - start
            rows.append(log_row(epoch, learned, tested, float(rate), seconds))
            if epoch == 1:
                tqdm.write(f"all {epochs} epochs will take about {epochs * seconds / 60:.0f} minutes")
            if tested and epoch in SNAPSHOTS:
                save(f"snapshots/epoch_{epoch:03d}.pth", epoch, accuracy=tested.accuracy)
            with atomic_write(state_path) as partial:
                torch.save({"rows": rows, **trainer.state()}, partial)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; run again to go on after epoch {len(rows)}") from None
    bar.close()

    # once more in float32, the precision of every later stage
    final, mirrored = evaluate(trainer.net, measured), evaluate(trainer.net, measured, mirrored=True)
    counts = confusion_matrix(measured.labels, final.predictions.numpy(), len(names))
    report(counts, names)
    print(f"averaged with each image's mirror image, at twice the cost: {mirrored.accuracy:.2%}")
    seconds = rows[-1]["seconds"]
    print(f"{epochs * count / seconds:,.0f} training images per second, measuring included")
    metrics = {"accuracy": final.accuracy, "loss": final.loss, "seconds": seconds}
    save(CHECKPOINT.name, epochs, **metrics, accuracy_mirrored=mirrored.accuracy)
    print(f"wrote {CHECKPOINT} and, beside it, snapshots/")
    log = pd.DataFrame(rows)
    save_table(CHECKPOINT.with_name("training_log.csv"), load_checkpoint(CHECKPOINT), log)
    heading = f"{title}, {count:,} training and {measured_on}, seed {SEED}"
    save_figure(CHECKPOINT.with_name("training_curves.png"), draw_curves(log, split, heading))
    heading = f"{measured_on} of {title}, accuracy {final.accuracy:.1%}"
    save_figure(CHECKPOINT.with_name("confusion_matrix.png"), draw_confusion(counts, names, heading))
    filters = trainer.net.blocks[0].conv.weight.detach().cpu().numpy()
    heading = f"filters of conv1, each with its own scale, trained on {title}"
    save_figure(CHECKPOINT.with_name("conv1_filters.png"), draw_filters(filters, heading))
    state_path.unlink(missing_ok=True)
    print("next: uv run deconv.py")


if __name__ == "__main__":
    main()
