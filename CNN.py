"""Define the network: four convolutional blocks with batch norm, ReLU, max pooling and dropout.

Run:    uv run CNN.py
Reads:  nothing
Writes: nothing; prints a table of the layers

Every later stage imports the network from here, with the geometry of its receptive fields, the reading and
writing of its checkpoint and the choice of device.
"""

import hashlib
import io
import pickletools
import reprlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from load_data import no_memory, open_archive, plain_errors, require_file, whole_file

LAYERS = ("conv1", "conv2", "conv3", "conv4")
IMAGE_SIZE = 96  # rows and columns of an STL-10 image
CHECKPOINT_FORMAT = 1  # raised whenever a checkpoint of an earlier version can no longer be read
MEASURED_ON = ("test", "held-out training")  # images on which a checkpoint's metrics can have been measured
STORED = ("torch._utils _rebuild_tensor_v2", "collections OrderedDict")  # what pickled tensors are built by


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


class RegionAverage(nn.AdaptiveAvgPool2d):
    """Average square maps over side x side regions, which overlap where the map's size is no multiple."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return (images, filters, side, side) for maps (images, filters, rows, columns)."""
        uneven = maps.shape[-1] % cast(int, self.output_size) > 0
        if uneven and maps.device.type == "mps":  # torch cannot do that on an Apple GPU
            return super().forward(maps.cpu()).to(maps.device)
        return super().forward(maps)


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

    Raises:
        ValueError: If a size is out of range, before any memory is taken.
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
        check_sizes("filters", filters, 10_000)
        check_sizes("kernel_sizes", kernel_sizes, IMAGE_SIZE)
        check_sizes("strides", strides, IMAGE_SIZE)
        check_sizes("pool_sizes", pool_sizes, IMAGE_SIZE)
        check_sizes("head_size", head_size, IMAGE_SIZE, 1)
        check_sizes("classes", classes, 10_000, 1)
        if any(kernel % 2 == 0 for kernel in kernel_sizes):
            raise ValueError(f"kernel_sizes is {kernel_sizes!r}; expected odd numbers")
        if not (is_number(dropout) and 0 <= dropout <= 1):
            raise ValueError(f"dropout is {dropout!r}; expected a number from 0 to 1")
        if not isinstance(partial_identity, bool):
            raise ValueError(f"partial_identity is {partial_identity!r}; expected True or False")
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
        self.average = RegionAverage(head_size)
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


def is_number(value: object) -> bool:
    """Say whether `value` is an int or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_sizes(name: str, sizes: object, highest: int, count: int = len(LAYERS)) -> None:
    """Raise ValueError unless `sizes` are `count` whole numbers, a bare one if one, from 1 to `highest`."""
    numbers = sizes if isinstance(sizes, list | tuple) and count > 1 else [sizes]
    if len(numbers) != count or not all(type(size) is int and 1 <= size <= highest for size in numbers):
        expected = "a whole number" if count == 1 else f"{count} whole numbers"
        raise ValueError(f"{name} is {sizes!r}; expected {expected} from 1 to {highest:,}")


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
        SystemExit: If this machine has no such device, or the name is no text.
    """
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    if name == "auto":
        return torch.device(present[0])
    try:
        device = torch.device(name if isinstance(name, str) else "")  # a bare number would be taken for a GPU
        count = torch.cuda.device_count() if device.type == "cuda" else 1
        found = device.type in present and (device.index or 0) < count
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
    """Write what `read_whole` shall read to `path`, whole or not at all."""
    stream = io.BytesIO()  # so that a full disk is an OSError
    torch.save(content, stream)
    with whole_file(path) as partial:
        partial.write_bytes(stream.getvalue())


def read_whole(path: Path) -> tuple[dict[str, Any], str]:
    """Read what `save_whole` wrote: the content, tensors on the CPU, and the sha256 of the file.

    Nothing stored in the file is executed, and no more memory is taken than a few times the file's size:
    only plain tensors, text, numbers, lists, tuples and dicts are accepted.

    Raises:
        ValueError: If the file is damaged or nothing that `save_whole` writes.
        OSError: If there is no such file or it cannot be read.
    """
    found = path.read_bytes()
    try:
        with open_archive(io.BytesIO(found)) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.lower().endswith(".pkl")]
        for opcode, argument, _ in (step for pickled in pickles for step in pickletools.genops(pickled)):
            storage = str(argument).startswith("torch ") and str(argument).endswith("Storage")
            if "GLOBAL" in opcode.name and argument not in STORED and not storage:
                raise ValueError(f"{argument} is not called")  # torch would let bytearray(10**10) pass
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the file's pickle protocol; the line below says enough
            content = torch.load(io.BytesIO(found), map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("no dict")
    except Exception as error:  # in a damaged file torch's unpickler can stumble over nearly anything
        if no_memory(error):
            raise
        raise ValueError(f"{path} is damaged or was not written by this project") from error
    return content, hashlib.sha256(found).hexdigest()


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


def is_text(value: object, longest: int = 60) -> bool:
    """Say whether `value` is text that can be drawn in one line: neither empty nor long, all printable."""
    return isinstance(value, str) and 0 < len(value.strip()) <= len(value) <= longest and value.isprintable()


def are_names(value: object) -> bool:
    """Say whether `value` is a list of different names that can be drawn."""
    return isinstance(value, list) and all(map(is_text, value)) and 0 < len(value) == len(set(value))


def are_three(value: object, lowest: float) -> bool:
    """Say whether `value` is a list of three numbers from `lowest` to 1, one for each channel."""
    return (
        isinstance(value, list) and len(value) == 3 and all(is_number(v) and lowest <= v <= 1 for v in value)
    )


def are_metrics(value: object) -> bool:
    """Say whether `value` holds numbers by name, among them test_accuracy from 0 to 1."""
    if not isinstance(value, dict) or not all(is_text(k) and is_number(v) for k, v in value.items()):
        return False
    return bool(0 <= value.get("test_accuracy", -1) <= 1)


# What a checkpoint must hold: key: (what is expected, whether a value is that)
ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "state_dict": ("tensors by name", lambda value: isinstance(value, dict)),
    "config": ("the arguments of CNN by name", lambda value: isinstance(value, dict)),
    "dataset": ("'stl10' or 'shapes'", lambda value: isinstance(value, str) and value in ("stl10", "shapes")),
    "class_names": ("different names, each of 1 to 60 printable characters", are_names),
    "mean": ("three numbers from 0 to 1", lambda value: are_three(value, 0)),
    "std": ("three numbers from 1e-06 to 1", lambda value: are_three(value, 1e-6)),
    "seed": ("a whole number", lambda value: type(value) is int),
    "epochs": ("a whole number from 0", lambda value: type(value) is int and value >= 0),
    "metrics": ("numbers by name, with a 'test_accuracy' from 0 to 1", are_metrics),
    "measured_on": (
        " or ".join(map(repr, MEASURED_ON)),
        lambda value: isinstance(value, str) and value in MEASURED_ON,
    ),
}


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint and rebuild its network in evaluation mode, on `device`, without gradients.

    Raises:
        SystemExit: If the file is missing, damaged, foreign, or its weights do not fit the network it names.
    """
    path = Path(path)
    require_file(path, "train_CNN.py")
    again = "delete it and run `uv run train_CNN.py` again"
    try:
        content, sha256 = read_whole(path)
    except ValueError:
        raise SystemExit(f"{path} is damaged or no checkpoint of this project: {again}") from None
    version = content.get("format")
    if type(version) is not int or version != CHECKPOINT_FORMAT:
        found = reprlib.repr(version) if isinstance(version, int | None) else type(version).__name__
        raise SystemExit(f"{path} has checkpoint format {found}, expected {CHECKPOINT_FORMAT}: {again}")
    content.setdefault("measured_on", "test")
    for key, (expected, is_valid) in ENTRIES.items():
        if not is_valid(content.get(key)):
            plain = isinstance(content.get(key), str | int | float | list | None)
            found = reprlib.repr(content.get(key)) if plain else type(content.get(key)).__name__
            found = " ".join(found.split()) if key in content else "nothing"
            raise SystemExit(f"{path} has no valid {key!r} (found {found}, expected {expected}): {again}")
    net = rebuild(content["config"], content["state_dict"])
    if net is None:
        raise SystemExit(f"{path} holds weights that do not fit the network it describes: {again}")
    for name, value in net.state_dict().items():
        if not value.isfinite().all() or (name.endswith("running_var") and value.min() < 0):
            raise SystemExit(f"{path} holds weights that are not finite, or a negative variance: {again}")
    if len(content["class_names"]) != net.classifier.out_features:
        raise SystemExit(f"{path} names {len(content['class_names'])} classes for another number: {again}")
    info = {key: content[key] for key in ENTRIES if key not in ("state_dict", "config")}
    net = net.eval().requires_grad_(False).to(device)
    return Checkpoint(net=net, **info, sha256=sha256)


def rebuild(config: dict[str, Any], weights: dict[str, Any]) -> CNN | None:
    """Return the network that `config` describes with these weights, or None if they do not fit together.

    No memory is taken for what a file merely claims to hold: the network is built without any, and weights
    must be contiguous, so that they are no larger than what is stored of them.
    """
    try:
        with torch.device("meta"):
            net = CNN(**config).eval()
            net(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))  # sizes that no image can pass raise here
    except (RuntimeError, TypeError, ValueError):
        return None
    expected = net.state_dict()
    fit = weights.keys() == expected.keys() and all(
        isinstance(value, Tensor)
        and (value.shape, value.dtype, value.layout)
        == (expected[name].shape, expected[name].dtype, torch.strided)
        and value.is_contiguous()
        for name, value in weights.items()
    )
    if fit:
        net.load_state_dict(weights, assign=True)
    return net if fit else None


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
    with plain_errors():
        main()
