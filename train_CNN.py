"""Train the network on the 5,000 labelled images of STL-10 and test it on the other 8,000.

Run:    uv run train_CNN.py
Reads:  data/stl10_binary/{train,test}_{X,y}.bin, which it downloads if they are missing; fold_indices.txt
        beside them for a fold
Writes: outputs/CNN.pth, outputs/snapshots/epoch_*.pth, outputs/training_log.csv,
        outputs/training_curves.png, outputs/confusion_matrix.png, outputs/conv1_filters.png

An interrupted run goes on from the last finished epoch when the script is started again with the same
settings. Until a training ends, outputs/training_state_*.pth keeps its state and the folder
outputs/training_state_* its snapshots, so that a finished network and its snapshots stay together. After a
change of the code, delete outputs/training_state_* first, because its name stands for the settings alone.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Collection
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

from CNN import (
    CNN,
    IMAGE_SIZE,
    LAYERS,
    choose_device,
    load_checkpoint,
    retry,
    run_script,
    save_checkpoint,
    save_content,
)
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
    shorten,
    stl10_folder,
    tile,
    wilson_interval,
)

# data
DATASET = "auto"  # "stl10", "folders" (your own), "shapes" (generated) or "auto": STL-10, else shapes
DATA_DIR = Path("data")  # holds stl10_binary, or train/CLASS and test/CLASS with pictures
TRAIN_ON = "all"  # "all"; "validation": a fifth of it is held out; "fold 0" to "fold 9": of STL-10 alone
# network
FILTERS = (48, 96, 192, 256)  # how many conv1 to conv4 have; the next three also hold a number for each layer
KERNEL_SIZES = (6, 3, 3, 3)  # each a multiple of its stride, so that a projection reaches all pixels alike
STRIDES = (2, 1, 1, 1)  # 2 in conv1 makes training several times faster
POOL_SIZES = (2, 2, 2, 2)  # rows and columns of a pooling region; 1 for none
HEAD_SIZE = 2  # conv4 is averaged over a grid of 2 x 2 regions, which overlap where 2 does not divide the map
DROPOUT = 0.3  # of the classifier's inputs
# training
EPOCHS = 60  # passes over the training images
SHAPES_EPOCHS = 30  # passes over the generated images, at most EPOCHS
BATCH_SIZE = 64  # images a step
FILTER_RATE = 0.03  # largest learning rate of Muon: how far it moves a filter, of norm 1, in a step
LEARNING_RATE = 3e-3  # largest learning rate of AdamW, which trains batch norm and the classifier
# OneCycleLR lets both rates rise from 1/25 of the largest and then fall to 1/250,000 of it, along cosines
WARM_UP = 0.15  # share of the training in which they rise, 0 to 1
WEIGHT_DECAY = 0.05  # of the classifier's weights, not of batch norm
LABEL_SMOOTHING = 0.1  # share of the target spread over all classes
AUGMENTATION = Augmentation(shift=12, zoom=0.25, rotation=10, colour=0.3, cutout=16)  # load_data.py says what
MEASURE_EVERY = 5  # epochs between measurements on the test images; 0: only at snapshots and at the end
SEED = 0  # weights, order of the images, augmentation and dropout
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
# files
CHECKPOINT = Path("outputs/CNN.pth")  # the other files go beside it
# epochs kept, as in the paper's Figure 4; 0, the start, always; an epoch beyond EPOCHS, as 64, does not occur
SNAPSHOTS = (1, 2, 5, 10, 20, 30, 40, 64)  # in the folder snapshots beside CHECKPOINT


Row = dict[str, float]  # of training_log.csv


# ---------------------------------------------------------------- data


class Data(NamedTuple):
    """What a training reads."""

    dataset: str  # "stl10", "folders" or "shapes"
    class_names: list[str]
    train: Split  # the images to train on
    measured: Split  # the images to measure on
    split: str  # "test" or "validation"
    fingerprints: dict[str, str]  # of all images of the splits "train" and "test"

    def describe_measured(self) -> str:
        """Return what is measured on, as logs and figures say it: `8,000 test images`."""
        return f"{len(self.measured.images):,} {self.split} images"


def read_data(dataset: str, data_dir: Path, train_on: str) -> Data:
    """Read the images that the settings DATASET, DATA_DIR and TRAIN_ON ask for.

    Raises:
        SystemExit: If the data set or the part of it cannot be had.
    """
    dataset = find_dataset(dataset, data_dir)
    if dataset != "stl10" and train_on.startswith("fold"):
        raise SystemExit(
            f"TRAIN_ON is {train_on!r}; only STL-10 has folds, not {TITLES[dataset]}: "
            "set it to 'all' or 'validation'"
        )
    names = class_names(dataset, data_dir)
    train = load_split(dataset, data_dir, "train")
    test = load_split(dataset, data_dir, "test")
    fingerprints = {"train": fingerprint(train, names), "test": fingerprint(test, names)}
    folds = stl10_folder(data_dir) / "fold_indices.txt"
    train, measured, split = part_of_training(train, test, train_on, folds)
    return Data(dataset, names, train, measured, split, fingerprints)


def part_of_training(train: Split, test: Split, train_on: str, folds: Path) -> tuple[Split, Split, str]:
    """Return the images to train on, the images to measure on and what these are called.

    `folds` is fold_indices.txt of the published archive: ten lines of 1,000 indices into the training split.

    Raises:
        SystemExit: If there is no such part, or the file that a fold needs is missing or damaged.
    """
    if train_on == "all":
        return train, test, "test"

    if train_on == "validation":  # the last fifth of each class is held out
        number_in_class = pd.Series(train.labels).groupby(train.labels).cumcount().to_numpy()
        class_size = np.bincount(train.labels)[train.labels]
        held_out = number_in_class >= class_size * 4 // 5
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


# ---------------------------------------------------------------- network and optimiser


def choose_precision(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it, else float32."""
    fast = False
    if device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # from torch 2.11 on
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def build_network(config: dict[str, Any]) -> CNN:
    """Return a new network, or raise SystemExit if it has not four layers or images do not fit through it."""
    try:
        net = CNN(**config)
        if len(net.blocks) != len(LAYERS):
            raise ValueError(f"each holds {len(net.blocks)} numbers, expected {len(LAYERS)}")
        net.eval()(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SystemExit(
            f"FILTERS, KERNEL_SIZES, STRIDES and POOL_SIZES make no network of four layers for images of "
            f"{IMAGE_SIZE} pixels: {str(error).splitlines()[0]} (HEAD_SIZE and DROPOUT can be the cause, too)"
        ) from None
    return net


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """Return a matrix with the singular vectors of the given one and more equal singular values.

    A Newton-Schulz step takes X to a X + b (X X') X + c (X X')^2 X. It leaves the singular vectors alone and
    makes a s + b s^3 + c s^5 of a singular value s, which lifts the small ones most. Three steps leave them
    apart: gradients end with singular values of 0.13 to 1.09, random matrices of 0.68 to 1.20. The
    coefficients are from Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural networks"), who
    take 5 steps.

    Args:
        matrix: The matrix, (rows, columns).
        steps: How many steps are taken.

    Returns:
        A matrix of the same shape.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.mT, steps).mT
    x = matrix / (matrix.norm() + 1e-7)

    # The plain form of a step is
    #     x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    # It multiplies x from the left by a polynomial P of the small matrix G = x x', and makes P G P of G. So
    # the polynomials of all steps are multiplied first, and the large matrix is multiplied once.
    gram = x @ x.mT
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    product = identity
    for _ in range(steps):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    return cast(Tensor, product @ x)


class Muon(torch.optim.Optimizer):
    """Move the filters of a layer in directions roughly orthogonal to each other (Jordan et al. 2024).

    Each filter is set back to norm 1 before a step. Batch norm makes its scale irrelevant, and this takes the
    place of weight decay; the deconvnet's paper renormalises filters, too (section 3). A step moves the
    filters of a layer, (filters, channels, rows, columns), by `lr` in the root mean square. The gradient has
    momentum with Nesterov's look-ahead. torch.optim.Muon takes no 4-D parameters.
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

                update = orthogonalise(ahead.flatten(1))  # (filters, channels * rows * columns)
                update *= len(filters) ** 0.5 / (update.norm() + 1e-7)  # 1 for each filter, in the RMS
                filters.div_(filters.flatten(1).norm(dim=1)[:, None, None, None])
                filters.sub_(update.view_as(filters), alpha=group["lr"])


# ---------------------------------------------------------------- training


def build_optimizers(net: CNN, settings: dict[str, Any]) -> tuple[Muon, torch.optim.AdamW]:
    """Return Muon for the convolutions, and AdamW for batch norm and the classifier.

    Raises:
        SystemExit: If the network has other parameters, which would stay as they are.
    """
    filters: list[Tensor] = []
    batch_norm: list[Tensor] = []
    for block in net.blocks:
        filters.append(block.conv.weight)
        batch_norm += block.bn.parameters()
    groups: list[dict[str, Any]] = [
        {"params": [net.classifier.weight], "weight_decay": settings["weight_decay"]},
        {"params": [*batch_norm, net.classifier.bias], "weight_decay": 0.0},
    ]
    muon = Muon(filters, settings["filter_rate"])
    adamw = torch.optim.AdamW(groups, settings["learning_rate"], betas=(0.9, 0.99))

    # a layer that somebody adds to CNN.py must not stay untrained unnoticed
    trained: set[int] = set()
    for group in muon.param_groups + adamw.param_groups:
        trained.update(id(parameter) for parameter in group["params"])
    parameters = net.named_parameters()
    untrained = [name for name, value in parameters if value.requires_grad and id(value) not in trained]
    if untrained:
        pronoun = "it" if len(untrained) == 1 else "them"
        raise SystemExit(f"no optimiser trains {', '.join(untrained)}: add {pronoun} in build_optimizers")
    return muon, adamw


class Result(NamedTuple):
    """What a network makes of some images."""

    loss: float  # mean cross-entropy in nats
    accuracy: float  # 0 to 1
    predictions: Tensor  # the predicted class of each image


class Trainer:
    """A training run: network, optimisers, schedules and random state, which can be stored and restored.

    Args:
        train: The images to train on.
        settings: The settings of this script under their names in small letters.
        device: Where the network is trained.
        precision: Precision of the forward and the backward pass; weights and optimisers stay in float32.

    Raises:
        SystemExit: If there is no epoch or no batch to train on, or the warm-up is no share of the training.
            `build_network` and `build_optimizers` name more reasons.
    """

    def __init__(self, train: Split, settings: dict[str, Any], device: torch.device, precision: torch.dtype):
        self.images = torch.from_numpy(train.images)
        self.labels = torch.from_numpy(train.labels)
        self.precision = precision
        self.epochs: int = settings["epochs"]
        self.batch_size: int = settings["batch_size"]
        self.smoothing = settings["label_smoothing"]
        self.augmentation = Augmentation(**settings["augmentation"])
        if self.epochs < 1:
            raise SystemExit(f"EPOCHS is {self.epochs}; a training takes at least 1")
        if self.batch_size < 1:
            raise SystemExit(f"BATCH_SIZE is {self.batch_size}; a batch has at least 1 image")
        if not 0 <= settings["warm_up"] <= 1:
            raise SystemExit(f"WARM_UP is {settings['warm_up']}; it is a share of the training, from 0 to 1")
        self.steps = len(self.images) // self.batch_size  # in an epoch
        if self.steps == 0:
            count = len(self.images)
            raise SystemExit(
                f"BATCH_SIZE is {self.batch_size}; there are only {count} training images: lower it"
            )

        torch.manual_seed(settings["seed"])  # weights and dropout
        self.generator = torch.Generator().manual_seed(settings["seed"])  # order and augmentation
        net = build_network(settings["network"])
        mean, std = mean_and_std(train.images)
        net.mean.copy_(torch.from_numpy(mean).view(3, 1, 1))
        net.std.copy_(torch.from_numpy(std).view(3, 1, 1))
        self.net = net.to(device).to(memory_format=torch.channels_last)

        self.optimizers = build_optimizers(self.net, settings)
        self.schedules = []
        total = self.epochs * self.steps + 1  # the schedule is asked once more after the last step
        # OneCycleLR divides by zero where the warm-up is exactly one step
        warm_up = float(settings["warm_up"]) if settings["warm_up"] * total > 1 else 0.0
        for optimizer in self.optimizers:
            rate = optimizer.defaults["lr"]
            self.schedules.append(OneCycleLR(optimizer, rate, total, pct_start=warm_up, cycle_momentum=False))

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
        order = order[: self.steps * self.batch_size]
        losses = []
        predictions = []
        for indices in order.split(self.batch_size):
            # normalise and augment the batch
            batch = augment(self.net.normalise(self.images[indices]), self.augmentation, self.generator)
            batch = batch.contiguous(memory_format=torch.channels_last)
            labels = self.labels[indices].to(device)

            # forward
            with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                logits = self.net(batch)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
            losses.append(F.cross_entropy(logits.detach().float(), labels).item())  # what is reported
            predictions.append(logits.argmax(dim=1).cpu())
            if not math.isfinite(losses[-1]):
                is_first = self.schedules[0].last_epoch == 0  # no weight has been changed
                advice = (
                    "look at the images in DATA_DIR" if is_first else "lower FILTER_RATE or LEARNING_RATE"
                )
                raise SystemExit(f"the loss of a batch is {losses[-1]}: {advice}")

            # backward and a step
            self.net.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
            if bar is not None:
                bar.update()

        predicted = torch.cat(predictions)
        accuracy = float((predicted == self.labels[order]).float().mean())
        return Result(float(np.mean(losses)), accuracy, predicted)

    def filter_rate(self) -> float:
        """Return the learning rate of the filters at the next step."""
        return float(self.schedules[0].get_last_lr()[0])

    def state(self) -> dict[str, Any]:
        """Return everything that decides how the training goes on."""
        device = self.net.mean.device
        state = {
            "net": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
        }
        if device.type != "cpu":  # dropout's numbers are drawn on the device
            device_module = getattr(torch, device.type)  # torch.cuda or torch.mps; their functions are alike
            state["device_random"] = device_module.get_rng_state(device)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned; its tensors are on the CPU."""
        device = self.net.mean.device
        self.net.load_state_dict(state["net"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        for schedule, stored in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(stored)
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        if device.type != "cpu":
            device_module = getattr(torch, device.type)
            device_module.set_rng_state(state["device_random"], device)


class Files(NamedTuple):
    """Where a training writes, and what its checkpoint and snapshots say beside the weights."""

    checkpoint: Path
    split: str  # on which images was measured
    facts: dict[str, Any]  # dataset, class_names and settings

    def state_path(self) -> Path:
        """Return where an interrupted training is kept; other settings have another file."""
        digest = hashlib.sha256(json.dumps(self.facts["settings"]).encode()).hexdigest()[:8]
        return self.checkpoint.with_name(f"training_state_{digest}.pth")

    def pending_snapshots(self) -> Path:
        """Return the folder of this training's snapshots until its end, when they replace earlier ones."""
        return self.state_path().with_suffix("")

    def save_network(self, path: Path, net: CNN, epoch: int, **metrics: float) -> None:
        """Write the network after an epoch, with what was measured."""
        save_checkpoint(path, net, epochs=epoch, metrics={"split": self.split, **metrics}, **self.facts)

    def save_snapshot(self, net: CNN, epoch: int, accuracy: float) -> None:
        """Write the network after an epoch into the folder of pending snapshots."""
        self.save_network(self.pending_snapshots() / f"epoch_{epoch:03d}.pth", net, epoch, accuracy=accuracy)

    def publish_snapshots(self) -> None:
        """Put this training's snapshots in the place of an earlier training's."""
        if self.pending_snapshots().is_dir():  # else they were published before an interruption
            folder = self.checkpoint.with_name("snapshots")
            if folder.exists():
                shutil.rmtree(folder)
            self.pending_snapshots().rename(folder)

    def refuse_folder(self) -> None:
        """Raise SystemExit if a folder is where the checkpoint goes."""
        if self.checkpoint.is_dir():
            raise SystemExit(
                f"CHECKPOINT is {str(self.checkpoint)!r}, a folder: name a file in it, such as "
                f"{str(self.checkpoint / 'CNN.pth')!r}"
            )

    def refuse_other_networks(self) -> None:
        """Raise SystemExit if another network lies in the folder, whose snapshots and log would be lost."""
        paths = sorted(self.checkpoint.parent.glob("*.pth"))
        others = [p.name for p in paths if p != self.checkpoint and not p.name.startswith("training_state_")]
        if others:
            raise SystemExit(
                f"{self.checkpoint.parent} holds {others[0]}, another network, whose snapshots, log and "
                "figures this training would replace: set CHECKPOINT to a file in another folder"
            )


def train(
    trainer: Trainer, measured: Split, files: Files, measure_every: int, snapshots: Collection[int]
) -> pd.DataFrame:
    """Train to the last epoch, from the first or from where an interrupted training stopped.

    Args:
        trainer: The training.
        measured: The images to measure on.
        files: Where snapshots and the state go.
        measure_every: Epochs between measurements, 0 for none; snapshots and the end are measured anyway.
        snapshots: Epochs after which the network is kept.

    Returns:
        The log: a row for each epoch, with the columns of `log_row`.

    Raises:
        SystemExit: If Ctrl-C is pressed; the state of the last finished epoch is kept.
    """
    rows = resume(files.state_path(), trainer)
    if not rows:
        files.save_snapshot(trainer.net, 0, accuracy=math.nan)
    print_head(files.split)
    total = trainer.epochs * trainer.steps
    bar = tqdm(total=total, initial=len(rows) * trainer.steps, unit=" steps", disable=None)
    start = time.perf_counter() - (rows[-1]["seconds"] if rows else 0)
    torch.backends.cudnn.allow_tf32 = True  # faster on NVIDIA's GPUs; `choose_device` says why nowhere else
    try:
        for epoch in range(len(rows) + 1, trainer.epochs + 1):
            trained = trainer.epoch(bar)

            # measuring draws no random numbers, so how often it happens does not change the training
            is_due = measure_every > 0 and epoch % measure_every == 0
            is_due = is_due or epoch in snapshots or epoch == trainer.epochs
            tested = evaluate(trainer.net, measured, trainer.precision) if is_due else None

            seconds = time.perf_counter() - start
            rows.append(log_row(epoch, trained, tested, trainer.filter_rate(), seconds))
            print_row(rows[-1])
            if epoch == 1:
                minutes = trainer.epochs * seconds / 60
                tqdm.write(f"all {trainer.epochs} epochs will take about {minutes:.0f} minutes")

            if tested and epoch in snapshots:
                files.save_snapshot(trainer.net, epoch, tested.accuracy)
            save_content({"rows": rows, **trainer.state()}, files.state_path())
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; run again to go on after epoch {len(rows)}") from None
    finally:
        torch.backends.cudnn.allow_tf32 = False
    bar.close()
    return pd.DataFrame(rows)


def resume(path: Path, trainer: Trainer) -> list[Row]:
    """Take up the interrupted training kept in `path`, if there is one, and return the rows of its log."""
    if not path.is_file():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        trainer.restore(state)
        rows: list[Row] = state["rows"]
    except Exception as error:  # what torch raises for a damaged file is of nearly any type
        raise SystemExit(
            f"{path} is damaged, or the code of the network has changed since ({type(error).__name__}): "
            "delete it and start anew"
        ) from None
    print(f"going on after epoch {len(rows)} of an interrupted training")
    return rows


def evaluate(net: CNN, data: Split, precision: torch.dtype = torch.float32, mirrored: bool = False) -> Result:
    """Measure the network in evaluation mode.

    Args:
        net: The network.
        data: Images and labels.
        precision: Precision of the forward pass.
        mirrored: Whether the logits are averaged over each image and its mirror image.

    Returns:
        Loss, accuracy and predicted classes.
    """
    net.eval()
    device = net.mean.device
    size = 50 if device.type == "cpu" else 500  # on a CPU 50 took half the time of 250, because of its cache
    all_labels = torch.from_numpy(data.labels)
    loss = 0.0
    predictions = []
    with torch.no_grad():
        for images, labels in zip(
            torch.from_numpy(data.images).split(size), all_labels.split(size), strict=True
        ):
            batch = net.normalise(images)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = net(batch)
                if mirrored:
                    logits = (logits + net(batch.flip(3))) / 2
            logits = logits.float().cpu()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            predictions.append(logits.argmax(dim=1))

    predicted = torch.cat(predictions)
    return Result(loss / len(all_labels), float((predicted == all_labels).float().mean()), predicted)


# ---------------------------------------------------------------- log, figures, terminal


def log_row(epoch: int, trained: Result, tested: Result | None, rate: float, seconds: float) -> Row:
    """Return a row of training_log.csv.

    - epoch: number of the epoch, from 1.
    - train_loss, train_accuracy: nats and 0 to 1, in training mode on the augmented images.
    - measured_loss, measured_accuracy: on the test or validation images; nan where it was not measured.
    - filter_rate: learning rate of the filters after the epoch.
    - seconds: since the start, interruptions left out.
    """
    return {
        "epoch": epoch,
        "train_loss": trained.loss,
        "train_accuracy": trained.accuracy,
        "measured_loss": tested.loss if tested else math.nan,
        "measured_accuracy": tested.accuracy if tested else math.nan,
        "filter_rate": rate,
        "seconds": seconds,
    }


def print_head(split: str) -> None:
    """Print the column heads of the rows that `print_row` prints."""
    print(
        f"epoch{'training loss':>15}{'training accuracy':>19}{f'{split} loss':>17}{f'{split} accuracy':>21}"
        f"{'learning rate':>15}{'time':>9}"
    )


def print_row(row: Row) -> None:
    """Print a row of the log in the terminal, above the progress bar."""
    measured = " " * 38
    if not math.isnan(row["measured_loss"]):
        measured = f"{row['measured_loss']:>17.4f}{percent(row['measured_accuracy']):>21}"
    tqdm.write(
        f"{row['epoch']:>5}{row['train_loss']:>15.4f}{percent(row['train_accuracy']):>19}{measured}"
        f"{row['filter_rate']:>15.2g}{row['seconds']:>7.0f} s"
    )
    sys.stdout.flush()


def percent(share: float, digits: int = 1) -> str:
    """Return a share as a text such as `82.0 %`."""
    return f"{100 * share:.{digits}f} %"


def draw_filters(filters: Array, heading: str) -> Figure:
    """Draw conv1's filters (filters, 3, rows, columns), each with its own scale; grey is zero."""
    scale = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    pictures = np.moveaxis(0.5 + filters / (2 * scale), 1, 3)  # (filters, rows, columns, 3)
    fig, ax = plt.subplots(figsize=(6, 0.3 + 0.74 * math.ceil(len(filters) / 8)), layout="constrained")
    ax.imshow(tile(pictures, 8, 1), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(heading, fontsize=9)
    return fig


def draw_curves(log: pd.DataFrame, split: str, heading: str) -> Figure:
    """Draw loss, accuracy and learning rate against epochs and minutes."""
    fig, (loss_ax, accuracy_ax, rate_ax) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    labels = {"train": "training images, augmented", "measured": f"{split} images"}
    for part, label in labels.items():
        rows = log.dropna(subset=f"{part}_loss")  # not measured after every epoch
        marker = "." if len(rows) < 20 else ""
        loss_ax.plot(rows["epoch"], rows[f"{part}_loss"], label=label, marker=marker)
        accuracy_ax.plot(rows["epoch"], 100 * rows[f"{part}_accuracy"], label=label, marker=marker)
    rate_ax.plot(log["epoch"], log["filter_rate"], color="0.3")
    loss_ax.set_ylabel("loss (nats)")
    accuracy_ax.set_ylabel("accuracy (%)")
    rate_ax.set_ylabel("learning rate of the filters")

    minutes_per_epoch = log["seconds"].iloc[-1] / 60 / len(log)
    scales = (lambda epochs: epochs * minutes_per_epoch, lambda minutes: minutes / minutes_per_epoch)
    for ax in (loss_ax, accuracy_ax, rate_ax):
        ax.set_xlabel("epoch")
        ax.secondary_xaxis("top", functions=scales).set_xlabel("minutes")

    fig.legend(handles=loss_ax.lines, loc="outside lower center", ncols=2, frameon=False)
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
    has_numbers = len(names) <= 15  # more would not fit into the cells
    style: dict[str, Any] = {"annot": has_numbers, "fmt": ".0f", "cmap": "mako_r", "vmin": 0, "vmax": 100}
    bar = {"label": "share of the true class (%)"}
    labels = [shorten(name) for name in names]
    sns.heatmap(share, square=True, xticklabels=labels, yticklabels=labels, cbar_kws=bar, ax=ax, **style)
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="predicted class", ylabel="true class", title=heading)
    return fig


def write_figures(files: Files, data: Data, log: pd.DataFrame, net: CNN, counts: Array) -> None:
    """Draw the training's curves, its confusion matrix `counts` and the filters of conv1."""
    title = TITLES[data.dataset]
    measured = data.describe_measured()
    seed = files.facts["settings"]["seed"]

    heading = f"{title}, {len(data.train.images):,} training and {measured}, seed {seed}"
    save_figure(files.checkpoint.with_name("training_curves.png"), draw_curves(log, data.split, heading))

    heading = f"{measured} of {title}, accuracy {percent(counts.trace() / counts.sum())}"
    figure = draw_confusion(counts, data.class_names, heading)
    save_figure(files.checkpoint.with_name("confusion_matrix.png"), figure)

    heading = f"filters of conv1, trained on {title}; grey is zero, each filter has its own scale"
    filters = net.blocks[0].conv.weight.detach().cpu().numpy()
    save_figure(files.checkpoint.with_name("conv1_filters.png"), draw_filters(filters, heading))


def report(counts: Array, names: list[str]) -> None:
    """Print accuracy of each class, worst confusions, and the accuracy with its 95 % interval (Wilson)."""
    print(f"{'class':<20}{'accuracy':>10}{'correct':>9}{'images':>8}")
    for name, row, correct in zip(names, counts, counts.diagonal(), strict=True):
        print(f"{shorten(name):<20}{percent(correct / max(row.sum(), 1)):>10}{correct:>9}{row.sum():>8}")

    wrong = counts - np.diag(counts.diagonal())
    for index in np.argsort(-wrong, axis=None, kind="stable")[:3]:
        true_class, predicted_class = divmod(int(index), len(names))
        if count := wrong[true_class, predicted_class]:
            true_name = shorten(names[true_class])
            print(f"{count} images of {true_name} were taken for {shorten(names[predicted_class])}")

    low, high = wilson_interval(counts.trace(), counts.sum())
    accuracy = percent(counts.trace() / counts.sum(), 2)
    print(f"accuracy {accuracy} (95 % interval {percent(low, 2)} to {percent(high, 2)})")


def finish(trainer: Trainer, data: Data, files: Files, log: pd.DataFrame) -> None:
    """Measure the trained network, write checkpoint, log and figures, and say what was found."""
    # in float32, the precision of every later stage
    final = evaluate(trainer.net, data.measured)
    mirrored = evaluate(trainer.net, data.measured, mirrored=True)
    seconds = float(log["seconds"].iloc[-1])

    files.save_network(
        files.checkpoint,
        trainer.net,
        trainer.epochs,
        accuracy=final.accuracy,
        loss=final.loss,
        seconds=seconds,
        accuracy_mirrored=mirrored.accuracy,
    )
    files.publish_snapshots()
    print(f"wrote {files.checkpoint} and, beside it, snapshots/")

    # the file is read again for its checksum, which the log holds
    checkpoint = load_checkpoint(files.checkpoint)
    save_table(files.checkpoint.with_name("training_log.csv"), checkpoint, log)
    counts = confusion_matrix(data.measured.labels, final.predictions.numpy(), len(data.class_names))
    write_figures(files, data, log, trainer.net, counts)
    retry(lambda: files.state_path().unlink(missing_ok=True), files.state_path())

    # Last, because printing can fail and must not cost the files: nobody reads the output any more, as after
    # `| head`; or main() is called without `run_script`, and the terminal cannot print a class name.
    report(counts, data.class_names)
    print(
        f"averaged over each image and its mirror image, at twice the cost: {percent(mirrored.accuracy, 2)}"
    )
    images = trainer.epochs * len(data.train.images)
    print(f"{images / seconds:,.0f} training images per second, measuring included")


def main() -> None:
    """Train, measure now and then, and write checkpoint, log and figures."""
    set_style()
    device = choose_device(DEVICE)
    precision = choose_precision(device)
    data = read_data(DATASET, DATA_DIR, TRAIN_ON)

    epochs = min(EPOCHS, SHAPES_EPOCHS) if data.dataset == "shapes" else EPOCHS
    network = {
        "filters": FILTERS,
        "kernel_sizes": KERNEL_SIZES,
        "strides": STRIDES,
        "pool_sizes": POOL_SIZES,
        "head_size": HEAD_SIZE,
        "dropout": DROPOUT,
        "classes": len(data.class_names),
    }
    settings: dict[str, Any] = {  # a run with the same settings goes on where this one is interrupted
        "network": network,
        "dataset": data.dataset,
        "data": {"folder": str(DATA_DIR), **data.fingerprints},
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
        f"training on {len(data.train.images):,} images of {TITLES[data.dataset]} for {epochs} epochs, "
        f"measuring on {data.describe_measured()}, on {device} in {settings['precision']}, "
        f"torch {torch.__version__}, seed {SEED}"
    )

    trainer = Trainer(data.train, settings, device, precision)
    facts = {"dataset": data.dataset, "class_names": data.class_names, "settings": settings}
    files = Files(Path(CHECKPOINT).expanduser(), data.split, facts)
    files.refuse_folder()
    files.refuse_other_networks()
    snapshots = np.atleast_1d(SNAPSHOTS).tolist()  # (5) is no tuple but 5
    log = train(trainer, data.measured, files, MEASURE_EVERY, snapshots)
    finish(trainer, data, files, log)
    print("next: uv run deconv.py")


if __name__ == "__main__":
    run_script(main)
