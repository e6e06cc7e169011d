"""Define the network: four convolutional blocks with batch norm, max pooling, ReLU and dropout.

Run:    uv run CNN.py
Reads:  nothing
Writes: nothing; prints a table of the layers

Every later stage imports the network from here, with the geometry of its receptive fields, the reading and
writing of its checkpoint and the choice of device.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = ("conv1", "conv2", "conv3", "conv4")


class ConvBlock(nn.Module):
    """Convolution, batch norm, non-overlapping max pooling and ReLU.

    The convolution has no bias: batch norm subtracts the mean, so a bias could change nothing. It is padded
    so that a map of n rows becomes one of n / stride rows, unless its kernel is even and its stride 1. The
    paper rectifies, then pools; maximum and ReLU commute, so the values are the same, but here a switch is
    the place of the largest value whatever its sign. After a ReLU a region in which nothing fires is a tie of
    zeros, whose switch would be arbitrary.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, pool_size: int):
        super().__init__()
        padding = (kernel_size - stride + 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(pool_size, return_indices=True)
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        """Return pooled activations (images, filters, rows, columns); without switches, which cost time."""
        return cast(Tensor, self.relu(F.max_pool2d(self.bn(self.conv(x)), self.pool_size)))

    def with_switches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled activations and switches, both (images, filters, rows, columns).

        A switch is the place of the maximum in the map before pooling, row * columns of that map + column.
        """
        pooled, switches = self.pool(self.bn(self.conv(x)))
        return self.relu(pooled), switches


def sizes(block: ConvBlock) -> tuple[int, int, int, int]:
    """Return kernel size, stride and padding of a block's convolution, and the side of its pooling regions.

    Any object with conv and pool will do.
    """
    conv, pool = block.conv, block.pool
    return conv.kernel_size[0], conv.stride[0], cast(int, conv.padding[0]), cast(int, pool.kernel_size)


class CNN(nn.Module):
    """Four `ConvBlock`s, dropout and a linear classifier on the average of `head_size` x `head_size` regions.

    Args:
        filters: Filters of conv1 to conv4.
        kernel_sizes: Rows and columns of each convolution's filters.
        strides: Stride of each convolution.
        pool_sizes: Rows and columns of each block's pooling regions; 1 leaves the maps as they are.
        head_size: The classifier sees conv4 averaged over this many rows and columns of regions; they overlap
            where they do not divide the map.
        dropout: Probability with which an input of the classifier is dropped in training.
        classes: Number of classes.

    Attributes:
        config: The arguments, from which a checkpoint rebuilds the network.
        mean, std: Of each channel of the training images, on a scale of 0 to 1, (3, 1, 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        filters: Sequence[int] = (48, 96, 192, 256),
        kernel_sizes: Sequence[int] = (6, 3, 3, 3),
        strides: Sequence[int] = (2, 1, 1, 1),
        pool_sizes: Sequence[int] = (2, 2, 2, 2),
        head_size: int = 2,
        dropout: float = 0.3,
        classes: int = 10,
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
        }
        inputs = (3, *filters[:-1])
        sizes = zip(inputs, filters, kernel_sizes, strides, pool_sizes, strict=True)
        blocks = nn.ModuleList(ConvBlock(*of_block) for of_block in sizes)
        self.blocks = cast(Sequence[ConvBlock], blocks)  # a ModuleList does not say what it holds
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(filters[-1] * head_size**2, classes)
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images (images, 3, rows, columns) normalised, float32, on the network's device."""
        pixels = images.to(self.mean.device).float().div_(255).sub_(self.mean).div_(self.std)
        return pixels.contiguous(memory_format=torch.channels_last)  # convolutions are faster with it

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (images, classes) for normalised images (images, 3, rows, columns)."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.classify(x)

    def features(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (pooled activations, switches) of each layer, conv1 first, from one forward pass."""
        layers, x = [], images
        for block in self.blocks:
            x, switches = block.with_switches(x)
            layers.append((x, switches))
        return layers

    def average(self, pooled: Tensor) -> Tensor:
        """Average the pooled maps of conv4 over head_size x head_size regions."""
        strides = [side // self.config["head_size"] for side in pooled.shape[-2:]]
        kernels = [
            side - (self.config["head_size"] - 1) * stride
            for side, stride in zip(pooled.shape[-2:], strides, strict=True)
        ]
        return F.avg_pool2d(pooled, kernels, strides)  # adaptive pooling fails on Apple GPUs

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
        kernel, stride, padding, pool = sizes(block)
        size, start = size + (kernel - 1) * jump, start - padding * jump
        jump *= stride
        fields.append(ReceptiveField(size, jump, start))
        size, jump = size + (pool - 1) * jump, jump * pool
    return fields


def frame_sizes(net: CNN, image_size: int) -> tuple[list[int], list[int]]:
    """Return, for each layer, the rows of the convolution's input and of its output before pooling.

    For an image of `image_size` rows; columns alike.
    """
    inputs, outputs, size = [], [], image_size
    for block in net.blocks:
        kernel, stride, padding, pool = sizes(block)
        inputs.append(size)
        outputs.append((size + 2 * padding - kernel) // stride + 1)
        size = outputs[-1] // pool
    return inputs, outputs


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
        present += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if name != "auto" and name not in present:
        raise SystemExit(f'DEVICE is {name!r}; this machine has {", ".join(present)} (or "auto")')
    return torch.device(present[0] if name == "auto" else name)


class Checkpoint(NamedTuple):
    """A trained network and what made it.

    Attributes:
        net: In evaluation mode, without gradients.
        dataset: "stl10", "folders" or "shapes".
        class_names: Of classes 0, 1, ...
        epochs: How many were trained.
        settings: All that decided the training.
        metrics: accuracy (0 to 1) and others; split says on which images they were measured.
        sha256: Of the file.
    """

    net: CNN
    dataset: str
    class_names: list[str]
    epochs: int
    settings: dict[str, Any]
    metrics: dict[str, Any]
    sha256: str

    def accuracy(self) -> str:
        """Return the accuracy as figures write it: `test accuracy 79.1%`."""
        return f"{self.metrics['split']} accuracy {self.metrics['accuracy']:.1%}"


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Write tensors, text, numbers, lists and dicts to `path`, whole or not at all."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    torch.save(content, partial)
    partial.replace(path)


def save_checkpoint(path: Path, net: CNN, **facts: Any) -> None:
    """Write the network and the other entries of `Checkpoint` to `path`, whole or not at all.

    A network that torch.compile or DataParallel has wrapped is unwrapped.
    """
    net = getattr(net, "_orig_mod", getattr(net, "module", net))
    weights = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    save_whole({"state_dict": weights, "config": net.config, **facts}, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint and rebuild its network on `device`. Nothing stored in the file is executed.

    Raises:
        SystemExit: If the file is missing, damaged or foreign.
    """
    path = path.expanduser()
    if not path.is_file():
        raise SystemExit(f"{path.absolute()} not found: run `uv run train_CNN.py` first")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        net = CNN(**content["config"])
        net.load_state_dict(content["state_dict"])
        facts = {key: content[key] for key in Checkpoint._fields if key not in ("net", "sha256")}
    except Exception as error:  # what torch raises for a damaged file is of nearly any type
        raise SystemExit(
            f"{path} is damaged or no checkpoint of this network ({type(error).__name__}): "
            "move it elsewhere and run `uv run train_CNN.py` again"
        ) from None
    net = net.eval().requires_grad_(False).to(device)
    return Checkpoint(net=net, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **facts)


def main() -> None:
    """Print output shape, parameters and receptive field of each part of the default network."""
    from load_data import IMAGE_SIZE  # here, so that `import CNN` loads nothing but torch

    net = CNN().eval()
    layers = net.features(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    print(f"{'layer':<12}{'output shape':>16}{'parameters':>12}{'receptive field':>17}")
    for name, block, (pooled, _), field in zip(
        LAYERS, net.blocks, layers, receptive_fields(net), strict=True
    ):
        shape = " x ".join(map(str, pooled.shape[1:]))
        parameters = sum(p.numel() for p in block.parameters())
        print(f"{name:<12}{shape:>16}{parameters:>12,}{f'{field.size} px':>17}")
    parameters = sum(p.numel() for p in net.classifier.parameters())
    print(f"{'classifier':<12}{net.classifier.out_features:>16}{parameters:>12,}{f'{IMAGE_SIZE} px':>17}")
    print(f"{'total':<12}{'':>16}{sum(p.numel() for p in net.parameters()):>12,}")
    print("The receptive field is that of a filter before pooling: the window its projections are drawn in.")


if __name__ == "__main__":
    main()
