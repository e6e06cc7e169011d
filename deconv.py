"""Project one activation back to the pixels that caused it, in the plainest way.

Run:    uv run deconv.py
Reads:  outputs/CNN.pth, data/stl10_binary/test_{X,y}.bin or the picture IMAGE
Writes: outputs/deconv_image.png, outputs/deconv_image.npz

Zeiler & Fergus 2014, section 2.1: to see what a unit responds to, keep its activation, set all others of the
layer to zero, and go down layer by layer: unpool with the recorded switches, rectify, filter with the
transposed weights. `project` below is all of it, one full frame at a time; deconv_full.py does the same for
millions of units.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from CNN import (
    CNN,
    IMAGE_SIZE,
    LAYERS,
    ConvBlock,
    choose_device,
    conv_geometry,
    frame_sizes,
    load_checkpoint,
    receptive_fields,
)
from load_data import TITLES, Array, load_checkpoint_split, read_picture, save_arrays, save_figure, set_style

IMAGE: int | str = 0  # index into the test split, or the path of any picture (cropped and resized to 96 x 96)
LAYER = "all"  # "all", or one of "conv1", "conv2", "conv3", "conv4"
FILTERS: str | list[int] = "strongest"  # or numbers of filters of the one layer, such as [3, 17]
N_FILTERS = 6  # strongest filters drawn of each layer
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
FIGURE = Path("outputs/deconv_image.png")  # what is written; the arrays go beside it


def fold_batch_norm(block: ConvBlock) -> Tensor:
    """Return the filters with batch norm's gain folded in, (filters, channels, rows, columns).

    In evaluation mode batch norm multiplies filter f by gain_f = weight_f / sqrt(variance_f + eps), whatever
    the data. It is part of the filter that is transposed; batch norm's offsets add nothing to a projection.
    """
    bn = block.bn
    gain = bn.weight / torch.sqrt(cast(Tensor, bn.running_var) + bn.eps)
    return block.conv.weight * gain[:, None, None, None]


def project(
    net: CNN, layer: int, pooled: Tensor, switches: Sequence[Tensor], image_size: Sequence[int]
) -> Tensor:
    """Project pooled maps of one layer back to pixels (section 2.1).

    Args:
        net: In evaluation mode: any object whose `blocks` have conv, bn, pool and relu, run in this order.
        layer: 0 for conv1 to 3 for conv4.
        pooled: (images, filters, rows, columns), what is to be seen; usually one activation, zero elsewhere.
        switches: Of each layer from conv1 up to `layer`, as `CNN.features` returns them for the images.
        image_size: Rows and columns of the images.

    Returns:
        Signed projection (images, channels, rows, columns) in units of normalised pixels.

    Raises:
        ValueError: If images of that size have other switches.

    Example:
        >>> from types import SimpleNamespace as Block
        >>> convs = [torch.nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(2)]
        >>> bn, pool = torch.nn.BatchNorm2d(1).eval(), torch.nn.MaxPool2d(2, return_indices=True)
        >>> net = Block(blocks=[Block(conv=conv, bn=bn, pool=pool, relu=F.relu) for conv in convs])
        >>> x, switches = torch.rand(1, 1, 8, 8), []
        >>> for block in net.blocks:
        ...     x, switch = block.pool(block.bn(block.conv(x)))
        ...     x, switches = block.relu(x), [*switches, switch]
        >>> project(net, 1, x, switches, (8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """
    (input_rows, map_rows), (input_columns, map_columns) = (frame_sizes(net, side) for side in image_size)
    for k, found in enumerate(switches[: layer + 1]):
        *_, pool = conv_geometry(net.blocks[k])
        expected = map_rows[k] // pool, map_columns[k] // pool
        if found.shape[-2:] != expected:
            text = f"switches of conv{k + 1} are {tuple(found.shape[-2:])}"
            raise ValueError(f"{text}; images of {tuple(image_size)} pixels have {expected}")
    signal = pooled
    for k in reversed(range(layer + 1)):
        _, stride, padding, pool = conv_geometry(net.blocks[k])
        map_size = map_rows[k], map_columns[k]
        signal = F.max_unpool2d(signal, switches[k], [pool] * 2, output_size=map_size)
        signal = signal.clamp(min=0)  # rectify; the pixels at the end are not rectified
        signal = F.conv_transpose2d(signal, fold_batch_norm(net.blocks[k]), stride=stride)
        # to the frame of the input: what lies in the padding goes; what no filter reached is zero
        below, right = input_rows[k] + padding - signal.shape[2], input_columns[k] + padding - signal.shape[3]
        signal = F.pad(signal, (-padding, right, -padding, below))
    return signal


def project_unit(net: CNN, image: Tensor, layer: int, filter_: int, row: int, column: int) -> Tensor:
    """Project one unit of one image: its activation kept, all others of its layer set to zero.

    The image is normalised, (1, 3, rows, columns); `layer` is 0 for conv1 to 3 for conv4; `row` and `column`
    are those of the pooled map. The projection is (3, rows, columns), as that of `project`.
    """
    features = net.features(image)
    pooled, switches = features[layer][0], [switches for _, switches in features]
    only = torch.zeros_like(pooled)
    only[0, filter_, row, column] = pooled[0, filter_, row, column]
    return project(net, layer, only, switches, image.shape[-2:])[0]


class Rectifier(torch.autograd.Function):
    """A ReLU with three ways back: `deconvnet`, `gradient` and `guided`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rule: str) -> Tensor:
        """Return max(values, 0)."""
        ctx.rule, ctx.fired = rule, values > 0
        return values.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, None]:
        """Pass the signal: positive ones, those of units that fired, or what satisfies both."""
        (signal,) = signals
        if ctx.rule in ("gradient", "guided"):
            signal = signal * ctx.fired
        if ctx.rule in ("deconvnet", "guided"):
            signal = signal.clamp(min=0)
        return signal, None


def backpropagate(
    net: CNN, images: Tensor, layer: int, filter_: Array, row: Array, column: Array, rule: str
) -> Tensor:
    """Send one activation of each image back to its pixels by backpropagation.

    The deconvnet, the gradient (Simonyan et al. 2014) and guided backpropagation (Springenberg et al. 2015)
    differ in the ReLU alone, by `rule`: "deconvnet", "gradient" or "guided". With "deconvnet" this is
    `project` by another way, for an activation of 1.

    The images are normalised, (images, 3, rows, columns), and the result has their shape; `layer` is 0 for
    conv1 to 3 for conv4; filter, row and column in the pooled map are those of each image's unit, (images,).
    """
    with torch.enable_grad():
        x = pixels = images.detach().requires_grad_()
        for block in net.blocks[: layer + 1]:
            x = F.max_pool2d(block.bn(block.conv(x)), block.pool_size)
            x = cast(Tensor, Rectifier.apply(x, rule))
        units = x[torch.arange(len(images)), filter_, row, column]
        return torch.autograd.grad(units.sum(), pixels)[0]


def load_picture(name: str) -> Array:
    """Read the picture file IMAGE, see `load_data.read_picture`: uint8 (3, 96, 96).

    Raises:
        SystemExit: If the file is missing or no picture.
    """
    path = Path(name).expanduser()
    if "://" in name:
        raise SystemExit(f"IMAGE is {name!r}: download the picture first and give the path of the file")
    if not path.is_file():
        there = f"no such file in {Path.cwd()}" if not path.is_absolute() else "no such file"
        raise SystemExit(f"IMAGE is {name!r}; {there}: give a picture or an index into the test split")
    try:
        return read_picture(path)
    except Exception as error:  # a damaged picture can raise nearly anything
        raise SystemExit(f"IMAGE is {name!r}, which cannot be read as a picture: {error}") from None


class Unit(NamedTuple):
    """One unit with its projection, as the figure shows it."""

    filter: int  # its number
    value: float  # activation
    row: int  # in the pooled map
    column: int
    top: int  # row of its receptive field's top left pixel, negative where the field crosses the border
    left: int  # column likewise
    projection: Array  # (3, rows, columns) of the whole image, signed, in units of normalised pixels


def strongest_units(
    net: CNN, image: Tensor, layer: int, count: int, filters: Sequence[int] | None = None
) -> list[Unit]:
    """Return the strongest unit of each of `filters`, or of the `count` that an image drives most.

    Filters that do not fire at all are left out.
    """
    pooled, switches = net.features(image)[layer]
    field, (_, outputs) = receptive_fields(net)[layer], frame_sizes(net, image.shape[-1])
    values, places = pooled[0].flatten(1).max(dim=1)
    units = []
    strongest = values.argsort(descending=True, stable=True)[:count].tolist()
    for filter_ in strongest if filters is None else filters:
        if values[filter_] > 0:
            row, column = divmod(int(places[filter_]), pooled.shape[-1])
            at_row, at_column = divmod(int(switches[0, filter_, row, column]), outputs[layer])
            top, left = at_row * field.jump + field.start, at_column * field.jump + field.start
            projection = project_unit(net, image, layer, filter_, row, column).cpu().numpy()
            units.append(Unit(filter_, float(values[filter_]), row, column, top, left, projection))
    return units


def as_arrays(layers: dict[str, list[Unit]]) -> dict[str, Array]:
    """Return filter, value, position, origin and projection of each layer's units, for deconv_image.npz."""
    arrays = {}
    for layer, units in layers.items():
        arrays[f"{layer}_filter"] = np.array([unit.filter for unit in units], np.int64)
        arrays[f"{layer}_value"] = np.array([unit.value for unit in units], np.float32)
        arrays[f"{layer}_position"] = np.array([(unit.row, unit.column) for unit in units], np.int16)
        arrays[f"{layer}_origin"] = np.array([(unit.top, unit.left) for unit in units], np.int16)
        arrays[f"{layer}_projection"] = np.array([unit.projection for unit in units], np.float32)
    return arrays


def robust_scale(values: Array) -> float:
    """Return the 99.5th percentile of the magnitudes above zero, which few outliers move; 1 for none."""
    magnitudes = np.abs(values[values != 0])
    return float(np.percentile(magnitudes, 99.5)) if magnitudes.size else 1.0


def displayed(projections: Array) -> Array:
    """Map signed projections (..., 3, rows, columns) to [0, 1], (..., rows, columns, 3); grey is zero.

    A value p becomes 0.5 + p / (2 m); the `robust_scale` m is one for all, so that panels can be compared.
    """
    shown = np.clip(0.5 + projections / (2 * robust_scale(projections)), 0, 1)
    return np.moveaxis(shown, -3, -1).astype(np.float32)


def crop(frame: Array, top: int, left: int, size: int, outside: float) -> Array:
    """Cut the window of `size` pixels at (top, left) out of a frame (channels, rows, columns).

    The window may cross the border; `outside` fills what lies beyond it.
    """
    padded = np.pad(frame, ((0, 0), (size, size), (size, size)), constant_values=outside)
    # a view would keep the whole padded frame in memory
    return padded[:, top + size : top + 2 * size, left + size : left + 2 * size].copy()


def draw(image: Array, layers: dict[str, list[Unit]], field_sizes: Sequence[int], heading: str) -> Figure:
    """Draw, for each layer, where its strongest units look, their projections and the patches under them.

    The image is uint8 (3, 96, 96); `field_sizes` are those of each layer's receptive field, in pixels.
    """
    pixels = image / 255
    columns = 2 + max(1, *(len(units) for units in layers.values()))
    fig = plt.figure(figsize=(1.15 * columns + 0.2, 2.45 * len(layers) + 0.5), layout="constrained")
    grid = fig.add_gridspec(2 * len(layers), columns)
    for k, ((layer, units), field) in enumerate(zip(layers.items(), field_sizes, strict=True)):
        whole = fig.add_subplot(grid[2 * k : 2 * k + 2, :2])
        whole.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
        whole.set(xticks=[], yticks=[], xlim=(-0.5, IMAGE_SIZE - 0.5), ylim=(IMAGE_SIZE - 0.5, -0.5))
        nothing = "" if units else "\nno filter fires"
        whole.set_title(f"{layer}, receptive field {field} px{nothing}", fontsize=8)
        colors = sns.color_palette("colorblind", len(units))
        for column, (unit, color) in enumerate(zip(units, colors, strict=True), start=2):
            corner = unit.left - 0.5, unit.top - 0.5
            whole.add_patch(Rectangle(corner, field, field, fill=False, edgecolor=color, linewidth=1.4))
            # on the upper edge; side by side where large frames lie on each other
            at = max(unit.left, 0) + min(9 * (column - 2), max(field - 8, 0)), max(unit.top, 7)
            number: dict[str, Any] = {"color": "white", "fontsize": 6, "va": "bottom", "clip_on": True}
            box = {"boxstyle": "square,pad=0.15", "facecolor": color, "linewidth": 0}
            whole.text(*at, str(column - 1), bbox=box, **number)
            panel = displayed(crop(unit.projection, unit.top, unit.left, field, 0))
            patch = crop(pixels, unit.top, unit.left, field, 1).transpose(1, 2, 0)
            for row, picture in enumerate((panel, patch)):
                ax = fig.add_subplot(grid[2 * k + row, column])
                ax.imshow(picture, interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set(color=color, linewidth=1.4)
                if row == 0:
                    ax.set_title(f"{column - 1}: filter {unit.filter}\n{unit.value:.2f}", fontsize=7)
    fig.suptitle(heading, fontsize=9)
    return fig


def main() -> None:
    """Project one image's strongest units of each layer and draw them."""
    set_style()
    if LAYER not in ("all", *LAYERS):
        raise SystemExit(f"LAYER is {LAYER!r}; this network has {', '.join(LAYERS)}")
    chosen = [k for k, layer in enumerate(LAYERS) if LAYER in ("all", layer)]
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    net, title = checkpoint.net, TITLES[checkpoint.dataset]
    if isinstance(IMAGE, int):
        split = load_checkpoint_split(checkpoint, DATA_DIR, "test")
        if not 0 <= IMAGE < len(split.images):
            raise SystemExit(f"IMAGE is {IMAGE}; the test split has images 0 to {len(split.images) - 1}")
        image, name = split.images[IMAGE], f"test image {IMAGE} of {title}"
        truth = f", class {checkpoint.class_names[split.labels[IMAGE]]}"
    else:
        image, name, truth = load_picture(IMAGE), Path(IMAGE).name, ""
    print(f"projecting {name}, network trained on {title}, on {device}, torch {torch.__version__}")
    batch = net.normalise(torch.from_numpy(image[None]))
    probabilities = net(batch).softmax(dim=1)[0]
    guess = checkpoint.class_names[int(probabilities.argmax())]
    numbers, count = FILTERS if isinstance(FILTERS, list) else None, net.config["filters"][chosen[0]]
    if FILTERS != "strongest" and (len(chosen) > 1 or not numbers or not set(numbers) <= set(range(count))):
        which = f"0 to {count - 1} of {LAYER}" if len(chosen) == 1 else "of one layer, set in LAYER"
        raise SystemExit(f"FILTERS is {FILTERS!r}; allowed are 'strongest' and a list of filters {which}")
    layers = {LAYERS[k]: strongest_units(net, batch, k, N_FILTERS, numbers) for k in chosen}
    for layer, units in layers.items():
        texts = ", ".join(f"{unit.filter} ({unit.value:.2f})" for unit in units)
        print(f"{layer}: filters {texts or 'none fires'}")
    which = "the strongest" if numbers is None else "the chosen"
    heading = f"{name}{truth}, predicted {guess} ({float(probabilities.max()):.0%}); network trained on "
    heading += f"{title}\nabove: projections of {which} filters with their activations, each with its own "
    heading += "scale; grey is zero. below: the image there, white outside"
    fields = [receptive_fields(net)[k].size for k in chosen]
    save_figure(FIGURE, draw(image, layers, fields, heading))
    save_arrays(FIGURE.with_suffix(".npz"), checkpoint, image=image, **as_arrays(layers))
    print("next: uv run deconv_full.py")


if __name__ == "__main__":
    main()
