"""Define the network: four convolutional blocks with batch norm, max pooling, ReLU and dropout.

Run:    uv run CNN.py
Reads:  nothing
Writes: nothing; prints a table of the layers

Every later stage imports the network from here. The same file holds the geometry of its receptive fields, its
checkpoint, the choice of device, and the function that writes a file whole or not at all.
"""

import errno
import hashlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = ("conv1", "conv2", "conv3", "conv4")
IMAGE_SIZE = 96  # rows and columns of an image; fixed, because STL-10 and all geometry here have it

WRITE_ERRORS = (  # error numbers that say that a path cannot be written, whatever its content is
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


# ---------------------------------------------------------------- the network


class ConvBlock(nn.Module):
    """Convolution, batch norm, max pooling without overlap, and ReLU.

    The convolution has no bias, because batch norm subtracts the mean and a bias could change nothing. The
    padding turns a map of n rows into one of n / stride rows, unless the kernel is even and the stride is 1.

    The paper rectifies first and pools then (section 3). The maximum and the ReLU commute, so the values are
    the same in either order. In the order used here a switch points to the largest value whatever its sign;
    after a ReLU, a region in which nothing fires would be a tie of zeros with an arbitrary switch.
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
        """Return pooled activations (images, filters, rows, columns) without switches, which cost time."""
        return cast(Tensor, self.relu(F.max_pool2d(self.bn(self.conv(x)), self.pool_size)))

    def with_switches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled activations and switches, both (images, filters, rows, columns).

        A switch is the position of the maximum of a pooling region, counted in the map before pooling:
        row * (columns of that map) + column.
        """
        pooled, switches = self.pool(self.bn(self.conv(x)))
        return self.relu(pooled), switches


class ConvGeometry(NamedTuple):
    """Sizes of a block in pixels of the map they work on; rows and columns are alike."""

    kernel: int
    stride: int
    padding: int
    pool: int  # side of a pooling region


def conv_geometry(block: ConvBlock) -> ConvGeometry:
    """Return the sizes of a block's convolution and pooling; any object with `conv` and `pool` will do."""
    return ConvGeometry(
        kernel=block.conv.kernel_size[0],
        stride=block.conv.stride[0],
        padding=cast(int, block.conv.padding[0]),
        pool=cast(int, block.pool.kernel_size),
    )


class CNN(nn.Module):
    """Four `ConvBlock`s, dropout and a linear classifier on the average of `head_size` x `head_size` regions.

    Args:
        filters: How many filters conv1 to conv4 have.
        kernel_sizes: Rows and columns of each convolution's filters.
        strides: Stride of each convolution.
        pool_sizes: Rows and columns of each block's pooling regions; 1 leaves the maps as they are.
        head_size: The classifier sees conv4 averaged over this many rows and columns of regions; they overlap
            where they do not divide the map.
        dropout: Probability with which an input of the classifier is dropped in training.
        classes: Number of classes.

    Attributes:
        config: The arguments, from which a checkpoint rebuilds the network.
        mean: Mean of each channel of the training images, on a scale of 0 to 1, (3, 1, 1).
        std: Standard deviation of each channel, likewise.
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

        channels = (3, *filters[:-1])  # what each convolution reads
        arguments = zip(channels, filters, kernel_sizes, strides, pool_sizes, strict=True)
        blocks = nn.ModuleList(ConvBlock(*block_arguments) for block_arguments in arguments)
        self.blocks = cast(Sequence[ConvBlock], blocks)  # a ModuleList does not say what it holds
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(filters[-1] * head_size**2, classes)

        # buffers travel with the weights into the checkpoint, and are not trained
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images (images, 3, rows, columns) normalised, in float32, on the network's device.

        Raises:
            TypeError: If the images are of another type; they could be normalised already.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"the images are {images.dtype}, expected torch.uint8, 0 to 255")
        # the conversion from uint8 makes a copy, so that the steps in place leave the caller's images alone
        pixels = images.to(self.mean.device).float().div_(255)
        pixels = pixels.sub_(self.mean).div_(self.std)
        return pixels.contiguous(memory_format=torch.channels_last)  # convolutions are faster with it

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (images, classes) for normalised images (images, 3, rows, columns)."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.classify(x)

    def features(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (pooled activations, switches) of each layer, conv1 first, from one forward pass."""
        layers = []
        x = images
        for block in self.blocks:
            x, switches = block.with_switches(x)
            layers.append((x, switches))
        return layers

    def average(self, pooled: Tensor) -> Tensor:
        """Average the pooled maps of conv4 over head_size x head_size regions.

        The regions start at equal steps and are large enough to cover the map, so they overlap where
        head_size does not divide it. Where it does, adaptive pooling is the same; where it does not, adaptive
        pooling fails on Apple GPUs.
        """
        head_size = self.config["head_size"]
        strides = [side // head_size for side in pooled.shape[-2:]]
        kernels = [
            side - (head_size - 1) * stride for side, stride in zip(pooled.shape[-2:], strides, strict=True)
        ]
        # contiguous, because on Apple GPUs the gradient of channels-last maps is wrong (PyTorch issue 175190)
        return F.avg_pool2d(pooled.contiguous(), kernels, strides)

    def classify(self, pooled: Tensor) -> Tensor:
        """Return logits (images, classes) for the pooled maps of conv4."""
        logits = self.classifier(self.dropout(self.average(pooled).flatten(1)))
        return cast(Tensor, logits)


# ---------------------------------------------------------------- its geometry


class ReceptiveField(NamedTuple):
    """Where a unit of a convolution, before pooling, looks in the image; all in pixels.

    The unit at row r sees the rows from r * jump + start to r * jump + start + size - 1, and columns alike.
    Rows below 0 or beyond the image are padding.
    """

    size: int
    jump: int
    start: int


def receptive_fields(net: CNN) -> list[ReceptiveField]:
    """Return the receptive field of a unit of conv1 to conv4, from kernels, strides, paddings and pools.

    `size` is how many pixels a unit sees, and `jump` is the distance in the image between neighbouring units.
    The convolution adds (kernel - 1) jumps of its inputs to the size, starts `padding` of these jumps earlier
    and makes the jump `stride` times as large; the field is stored here. Pooling adds (pool - 1) of the new
    jumps to the size and makes the jump `pool` times as large.
    """
    fields = []
    size = 1  # an input of conv1 is a pixel
    jump = 1
    start = 0
    for block in net.blocks:
        geometry = conv_geometry(block)
        size += (geometry.kernel - 1) * jump
        start -= geometry.padding * jump
        jump *= geometry.stride
        fields.append(ReceptiveField(size, jump, start))

        size += (geometry.pool - 1) * jump
        jump *= geometry.pool
    return fields


class FrameSizes(NamedTuple):
    """Rows of the maps of each layer, conv1 first; columns are counted alike."""

    inputs: list[int]  # of what the convolution reads
    outputs: list[int]  # of what it makes, before pooling


def frame_sizes(net: CNN, image_size: int) -> FrameSizes:
    """Return the rows of each layer's input and output for an image of `image_size` rows."""
    inputs = []
    outputs = []
    rows = image_size
    for block in net.blocks:
        kernel, stride, padding, pool = conv_geometry(block)
        inputs.append(rows)
        outputs.append((rows + 2 * padding - kernel) // stride + 1)
        rows = outputs[-1] // pool
    return FrameSizes(inputs, outputs)


# ---------------------------------------------------------------- device, files, checkpoint


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" takes CUDA if it is there, then Apple's GPU, then the CPU.

    Every script calls this first, so here NVIDIA's GPUs are kept from computing convolutions in TF32, with 10
    bits of precision: projections would be off by more than the 1e-5 that they are held to. train_CNN.py
    allows TF32 while it trains.

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
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(present[0] if name == "auto" else name)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` if the block ends well; nothing is left behind otherwise.

    In `path` ~ is the home folder. Missing folders are made.

    Raises:
        SystemExit: If the disk is full, or the file may not be written or is open in another program.
    """
    path = Path(path).expanduser()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process has another one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        retry(lambda: partial.replace(path), path)
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        # where the folder should be there is a file or a dead link
        is_no_folder = error.errno in (errno.EEXIST, errno.ENOTDIR)
        reason = f"{path.parent} is no folder" if is_no_folder else error.strerror
        raise SystemExit(f"{path.absolute()} cannot be written: {reason}") from None
    finally:
        with suppress(OSError):  # the error above says more
            partial.unlink()


def retry(action: Callable[[], object], path: Path) -> None:
    """Replace or remove `path`, trying for two seconds, because on Windows a viewer may hold it open."""
    for _ in range(20):
        try:
            action()
            return
        except PermissionError:
            time.sleep(0.1)
    raise SystemExit(f"{path.absolute()} cannot be replaced: close the program that holds it and run again")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(); where it is interrupted, end with one line.

    An interruption is Ctrl-C, or a reader of the output that stops reading, as `| head` does. Letters that
    the terminal cannot show are replaced, because a class may have any name.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except BrokenPipeError:
        # Python flushes standard output once more at its end, which must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit("nobody reads the output any more: stopped") from None


class Checkpoint(NamedTuple):
    """A trained network and what made it.

    Attributes:
        net: The network, in evaluation mode, without gradients.
        dataset: "stl10", "folders" or "shapes".
        class_names: Names of the classes 0, 1, ...
        epochs: How many epochs were trained.
        settings: All that decided the training.
        metrics: accuracy (0 to 1) and others; `split` says on which images they were measured.
        sha256: Checksum of the file.
    """

    net: CNN
    dataset: str
    class_names: list[str]
    epochs: int
    settings: dict[str, Any]
    metrics: dict[str, Any]
    sha256: str

    def accuracy(self) -> str:
        """Return the accuracy as figures write it: `test accuracy 79.1 %`."""
        return f"{self.metrics['split']} accuracy {100 * self.metrics['accuracy']:.1f} %"


def save_checkpoint(path: str | Path, net: CNN, **facts: Any) -> None:
    """Write the network and the other entries of `Checkpoint` to `path`, whole or not at all.

    A network that torch.compile or DataParallel has wrapped is unwrapped first.
    """
    net = getattr(net, "_orig_mod", getattr(net, "module", net))
    weights = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    save_content({"state_dict": weights, "config": net.config, **facts}, path)


def save_content(content: dict[str, Any], path: str | Path) -> None:
    """Write what torch.save makes of `content` to `path`, whole or not at all."""
    buffer = io.BytesIO()  # in between, because torch hides the error of a full disk behind one of its own
    torch.save(content, buffer)
    with atomic_write(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint and rebuild its network. Nothing stored in the file is executed.

    Args:
        path: A file that train_CNN.py wrote.
        device: Where the network is put.

    Returns:
        The network, in evaluation mode, with the data set, class names, settings and metrics of its training.

    Raises:
        SystemExit: If the file is missing, damaged or foreign.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise SystemExit(
            f"{path.absolute()} not found: run `uv run train_CNN.py` first, or take the trained network that "
            "comes with this repository: `cp -r outputs/readme/trained/* outputs/`"
        )
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        net = CNN(**content["config"])
        net.load_state_dict(content["state_dict"])
        facts = {key: content[key] for key in Checkpoint._fields if key not in ("net", "sha256")}
    except Exception as error:  # what torch raises for a damaged file is of nearly any type
        is_snapshot = path.parent.name == "snapshots"
        advice = "delete it" if is_snapshot else "move it elsewhere and run `uv run train_CNN.py` again"
        raise SystemExit(
            f"{path} is damaged or no checkpoint of this network ({type(error).__name__}): {advice}"
        ) from None
    net = net.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    return Checkpoint(net=net, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **facts)


def main() -> None:
    """Print output shape, parameters and receptive field of each part of the default network."""
    net = CNN().eval()
    features = net.features(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))

    print(f"{'layer':<12}{'output shape':>16}{'parameters':>12}{'receptive field':>17}")
    for name, block, (pooled, _), field in zip(
        LAYERS, net.blocks, features, receptive_fields(net), strict=True
    ):
        shape = " x ".join(map(str, pooled.shape[1:]))
        parameters = sum(p.numel() for p in block.parameters())
        print(f"{name:<12}{shape:>16}{parameters:>12,}{f'{field.size} px':>17}")

    parameters = sum(p.numel() for p in net.classifier.parameters())
    print(f"{'classifier':<12}{net.classifier.out_features:>16}{parameters:>12,}{f'{IMAGE_SIZE} px':>17}")
    print(f"{'total':<12}{'':>16}{sum(p.numel() for p in net.parameters()):>12,}")
    print("A projection is drawn in a window: the receptive field of a unit before pooling.")
    print("This is the default network; the settings of train_CNN.py may make another.")


if __name__ == "__main__":
    run_script(main)
