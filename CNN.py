"""Define the network: four convolutional blocks with batch norm, ReLU, max pooling and dropout.

Run:    uv run CNN.py
Reads:  nothing
Writes: nothing; prints a table of the layers

Every later stage imports the network from here, with the geometry of its receptive fields, the reading and
writing of its checkpoint and the choice of device.
"""

import hashlib
import io
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

LAYERS = ("conv1", "conv2", "conv3", "conv4")
IMAGE_SIZE = 96  # rows and columns of an STL-10 image
CHECKPOINT_FORMAT = 1  # raised whenever a checkpoint of an earlier version can no longer be read


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU and non-overlapping max pooling that records its switches.

    The convolution has no bias: batch norm subtracts the mean, so a bias could change nothing.

    Args:
        in_channels: Channels of the input.
        out_channels: Filters.
        kernel_size: Rows and columns of a filter, odd; the border is padded with kernel_size // 2 zeros.
        stride: Step of the convolution.
        pool_size: Rows and columns of a pooling region; 1 leaves the maps as they are.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, pool_size: int):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(pool_size, return_indices=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled activations and switches, both (images, filters, rows, columns).

        A switch is the place of the maximum in the map before pooling, row * columns of that map + column.
        """
        pooled, switches = self.pool(self.relu(self.bn(self.conv(x))))
        return pooled, switches

    def sizes(self) -> tuple[int, int, int]:
        """Return kernel size, stride and padding of the convolution."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        return kernel, stride, kernel // 2

    @property
    def pool_size(self) -> int:
        """Rows and columns of a pooling region."""
        return cast(int, self.pool.kernel_size)


class CNN(nn.Module):
    """Four `ConvBlock`s, dropout and a linear classifier on the average of `head_size` x `head_size` regions.

    Args:
        filters: Filters of conv1 to conv4.
        kernel_sizes: Kernel size of each convolution, odd.
        strides: Stride of each convolution.
        pool_sizes: Pooling size of each block.
        head_size: The classifier sees conv4 averaged over this many rows and columns of regions; they overlap
            where they do not divide the map.
        dropout: Probability with which an input of the classifier is dropped in training.
        classes: Number of classes.
        partial_identity: Whether the first filters of conv2 to conv4 start by handing their inputs on, one
            each; the others start at random (after Zagoruyko & Komodakis 2017, "DiracNets").
    """

    def __init__(
        self,
        filters: Sequence[int] = (48, 96, 192, 256),
        kernel_sizes: Sequence[int] = (5, 3, 3, 3),
        strides: Sequence[int] = (2, 1, 1, 1),
        pool_sizes: Sequence[int] = (2, 2, 2, 2),
        head_size: int = 2,
        dropout: float = 0.3,
        classes: int = 10,
        partial_identity: bool = True,
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            "filters": list(filters),
            "kernel_sizes": list(kernel_sizes),
            "strides": list(strides),
            "pool_sizes": list(pool_sizes),
            "head_size": head_size,
            "dropout": dropout,
            "classes": classes,
            "partial_identity": partial_identity,
        }
        inputs = (3, *filters[:-1])
        blocks = nn.ModuleList(
            ConvBlock(*sizes)
            for sizes in zip(inputs, filters, kernel_sizes, strides, pool_sizes, strict=True)
        )
        self.blocks = cast(Sequence[ConvBlock], blocks)  # a ModuleList does not say what it holds
        for block in self.blocks[1:] if partial_identity else ():
            nn.init.dirac_(block.conv.weight.detach()[: block.conv.in_channels])
        self.average = nn.AdaptiveAvgPool2d(head_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(filters[-1] * head_size**2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (images, classes) for normalised images (images, 3, rows, columns)."""
        x = images
        for block in self.blocks:
            x, _ = block(x)
        return self.classify(x)

    def features(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (pooled activations, switches) of each layer, conv1 first, from one forward pass."""
        layers, x = [], images
        for block in self.blocks:
            x, switches = block(x)
            layers.append((x, switches))
        return layers

    def classify(self, pooled: Tensor) -> Tensor:
        """Return logits (images, classes) for the pooled maps of conv4."""
        logits = self.classifier(self.dropout(self.average(pooled).flatten(1)))
        return cast(Tensor, logits)


class ReceptiveField(NamedTuple):
    """Where a unit of a convolution, before pooling, looks in the image.

    The unit at row r sees rows r * jump + start to r * jump + start + size - 1; columns alike. Rows below 0
    or beyond the image are padding.
    """

    size: int
    jump: int
    start: int


def receptive_fields(net: CNN) -> list[ReceptiveField]:
    """Return the receptive field of a unit of conv1 to conv4, in pixels, from kernels, strides and pools.

    Going up one convolution, a field grows by (kernel - 1) jumps and starts `padding` jumps earlier; pooling
    makes the next block's inputs `pool` jumps apart and as wide as a pooling region.
    """
    fields, size, jump, start = [], 1, 1, 0
    for block in net.blocks:
        kernel, stride, padding = block.sizes()
        size, start = size + (kernel - 1) * jump, start - padding * jump
        jump *= stride
        fields.append(ReceptiveField(size, jump, start))
        size, jump = size + (block.pool_size - 1) * jump, jump * block.pool_size
    return fields


def frame_sizes(net: CNN, image_size: int = IMAGE_SIZE) -> tuple[list[int], list[int]]:
    """Return, for each layer, the rows of the convolution's input and of its output before pooling."""
    inputs, outputs, size = [], [], image_size
    for block in net.blocks:
        kernel, stride, padding = block.sizes()
        inputs.append(size)
        outputs.append((size + 2 * padding - kernel) // stride + 1)
        size = outputs[-1] // block.pool_size
    return inputs, outputs


def layer_index(layer: str) -> int:
    """Return 0 for conv1 to 3 for conv4.

    Raises:
        SystemExit: If there is no such layer.
    """
    if layer not in LAYERS:
        raise SystemExit(f"LAYER is {layer!r}; this network has {', '.join(LAYERS)}")
    return LAYERS.index(layer)


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" takes CUDA, then Apple's GPU, then the CPU.

    Raises:
        SystemExit: If this machine has no such device.
    """
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    if name == "auto":
        return torch.device(present[0])
    try:
        device = torch.device(name)
        found = device.type in present and (
            device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
        )
    except RuntimeError:  # no name of a device
        found = False
    if not found:
        raise SystemExit(f'DEVICE is {name!r}; this machine has {", ".join(present)} (or "auto")')
    return device


class Checkpoint(NamedTuple):
    """A trained network and what made it; `measured_on` says on which images `metrics` was measured."""

    net: CNN
    dataset: str
    class_names: list[str]
    mean: list[float]
    std: list[float]
    seed: int
    epochs: int
    metrics: dict[str, float]
    sha256: str
    measured_on: str = "test"


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Write what torch.load shall read to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        stream = io.BytesIO()  # so that a full disk is an OSError
        torch.save(content, stream)
        partial.write_bytes(stream.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(
    path: Path,
    net: CNN,
    *,
    dataset: str,
    class_names: list[str],
    mean: list[float],
    std: list[float],
    seed: int,
    epochs: int,
    metrics: dict[str, float],
    measured_on: str = "test",
) -> None:
    """Write the network and what made it to `path`, whole or not at all."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "state_dict": {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()},
        "config": net.config,
        "dataset": dataset,
        "class_names": class_names,
        "mean": mean,
        "std": std,
        "seed": seed,
        "epochs": epochs,
        "metrics": metrics,
        "measured_on": measured_on,
    }
    save_whole(content, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint and rebuild its network in evaluation mode, on `device`, without gradients.

    Nothing stored in the file is executed: only tensors, text, numbers, lists and dicts are accepted.

    Raises:
        SystemExit: If the file is missing, damaged, foreign, or its weights do not fit the network it names.
    """
    if not path.is_file():
        raise SystemExit(f"{path} not found: run `uv run train_CNN.py` first")
    again = "delete it and run `uv run train_CNN.py` again"
    content_bytes = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the file's pickle protocol; the line below says enough
            content = torch.load(io.BytesIO(content_bytes), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{path} is damaged or no checkpoint of this project: {again}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != CHECKPOINT_FORMAT:
        raise SystemExit(f"{path} has checkpoint format {found}, expected {CHECKPOINT_FORMAT}: {again}")
    types: dict[str, type[object]] = {
        "state_dict": dict,
        "config": dict,
        "dataset": str,
        "class_names": list,
        "mean": list,
        "std": list,
        "seed": int,
        "epochs": int,
        "metrics": dict,
        "measured_on": str,
    }
    content.setdefault("measured_on", "test")
    for key, kind in types.items():
        if not isinstance(content.get(key), kind) or (
            key == "metrics" and "test_accuracy" not in content[key]
        ):
            raise SystemExit(f"{path} has no valid {key!r}: {again}")
    try:
        with torch.device("meta"):  # no memory is taken for what the file merely claims to hold
            net = CNN(**content["config"]).eval()
            net(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))  # sizes that no image can pass raise here
        net.load_state_dict(content["state_dict"], assign=True)
    except (RuntimeError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError):
        raise SystemExit(f"{path} holds weights that do not fit the network it describes: {again}") from None
    if not all(bool(value.isfinite().all()) for value in net.state_dict().values()):
        raise SystemExit(f"{path} holds weights that are not finite: {again}")
    if len(content["class_names"]) != net.classifier.out_features:
        raise SystemExit(f"{path} names {len(content['class_names'])} classes for another number: {again}")
    info = {key: content[key] for key in types if key not in ("state_dict", "config")}
    net = net.eval().requires_grad_(False).to(device)
    return Checkpoint(net=net, **info, sha256=hashlib.sha256(content_bytes).hexdigest())


def main() -> None:
    """Print layer, output shape, parameters and receptive field of each part of the network."""
    net = CNN().eval()
    with torch.no_grad():
        shapes = [
            tuple(pooled.shape[1:]) for pooled, _ in net.features(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
        ]
    fields = receptive_fields(net)
    print(f"{'layer':<12}{'output shape':>16}{'parameters':>12}{'receptive field':>17}")
    print(f"{'image':<12}{'3 x 96 x 96':>16}{0:>12,}{'1 px':>17}")
    for name, block, shape, field in zip(LAYERS, net.blocks, shapes, fields, strict=True):
        parameters = sum(p.numel() for p in block.parameters())
        print(f"{name:<12}{' x '.join(map(str, shape)):>16}{parameters:>12,}{f'{field.size} px':>17}")
    parameters = sum(p.numel() for p in net.classifier.parameters())
    print(f"{'classifier':<12}{net.classifier.out_features:>16}{parameters:>12,}{f'{IMAGE_SIZE} px':>17}")
    print(f"{'total':<12}{'':>16}{sum(p.numel() for p in net.parameters()):>12,}")
    print("The receptive field is that of a filter before pooling: the window its projections are drawn in.")


if __name__ == "__main__":
    main()
