"""Project one activation back to the pixels that caused it, in the plainest way.

Run:    uv run deconv.py
Reads:  outputs/CNN.pth, data/stl10_binary/test_{X,y}.bin or the picture IMAGE
Writes: outputs/deconv_image.png, outputs/deconv_image.npz

Zeiler & Fergus 2014, section 2.1: to see what a unit responds to, keep its activation, set all others of the
layer to zero, and go down layer by layer: unpool with the recorded switches, rectify, filter with the
transposed weights. `project` below is all of it, one full frame at a time; deconv_full.py does the same for
millions of units.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from CNN import (
    CNN,
    IMAGE_SIZE,
    LAYERS,
    Checkpoint,
    ConvBlock,
    FrameSizes,
    choose_device,
    conv_geometry,
    frame_sizes,
    load_checkpoint,
    receptive_fields,
    run_script,
)
from load_data import TITLES, Array, load_checkpoint_split, read_picture, save_arrays, save_figure, set_style

IMAGE: int | str | Path = 0  # index into the test split, or any picture (cropped and resized to 96 x 96)
LAYER = "all"  # "all", or one of "conv1", "conv2", "conv3", "conv4"
SHOW_FILTERS: str | list[int] = "strongest"  # or numbers of filters of the one layer, such as [3, 17]
N_FILTERS = 6  # how many of a layer's filters are drawn where the strongest are asked for
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
FIGURE = Path("outputs/deconv_image.png")  # what is written; the arrays go beside it, as deconv_*.npz

Color = tuple[float, float, float]  # red, green, blue from 0 to 1


# ---------------------------------------------------------------- the projection (section 2.1)


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
    """Project pooled maps of one layer back to pixels: unpool, rectify and filter, layer by layer.

    Where an image has a single colour, as in the black bars of some STL-10 images, all values of a pooling
    region are equal, whether pooling or the ReLU comes first. The switch is then the region's first position
    by convention, and signals that pass there draw stripes.

    Args:
        net: In evaluation mode: any object whose `blocks` have conv, bn, pool and relu, run in this order.
        layer: 0 for conv1 to 3 for conv4.
        pooled: What is to be seen, (images, filters, rows, columns): usually one activation, zero elsewhere.
        switches: The switches of each layer from conv1 up to `layer`, as `CNN.features` returns them.
        image_size: Rows and columns of the images.

    Returns:
        The signed projection (images, channels, rows, columns) in units of normalised pixels.

    Raises:
        ValueError: If images of this size would have switches of another shape.

    Example:
        A network of one's own needs blocks with these four parts.

        >>> from types import SimpleNamespace as Block
        >>> def make_block():
        ...     conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        ...     pool = torch.nn.MaxPool2d(2, return_indices=True)
        ...     return Block(conv=conv, bn=torch.nn.BatchNorm2d(1).eval(), pool=pool, relu=F.relu)
        >>> net = Block(blocks=[make_block(), make_block()])

        The way up records the switches. The way down starts from the maps of the second block.

        >>> x = torch.rand(1, 1, 8, 8)
        >>> switches = []
        >>> for block in net.blocks:
        ...     x, block_switches = block.pool(block.bn(block.conv(x)))
        ...     x = block.relu(x)
        ...     switches.append(block_switches)
        >>> project(net, 1, x, switches, (8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """
    rows = frame_sizes(net, image_size[0])
    columns = frame_sizes(net, image_size[1])
    check_switches(net, switches[: layer + 1], rows, columns)

    signal = pooled
    for k in reversed(range(layer + 1)):
        block = net.blocks[k]
        _, stride, padding, pool = conv_geometry(block)

        # Unpool: each value returns to the position of its region's maximum, all other positions are zero.
        # (images, filters, pooled rows, pooled columns) -> (images, filters, rows, columns)
        map_size = (rows.outputs[k], columns.outputs[k])
        signal = F.max_unpool2d(signal, switches[k], [pool, pool], output_size=map_size)

        # Rectify: only positive signals go further down. The pixels at the end are not rectified.
        signal = signal.clamp(min=0)

        # Filter with the transposed weights: each value lays down a copy of its filter, scaled by the value.
        # (images, filters, rows, columns) -> (images, channels, input rows, input columns)
        signal = F.conv_transpose2d(signal, fold_batch_norm(block), stride=stride)

        # Return to the frame of the block's input: the padding is cut off; what no filter reached is zero.
        missing_rows = rows.inputs[k] + padding - signal.shape[2]  # negative where there are too many
        missing_columns = columns.inputs[k] + padding - signal.shape[3]
        signal = F.pad(signal, (-padding, missing_columns, -padding, missing_rows))
    return signal


def check_switches(net: CNN, switches: Sequence[Tensor], rows: FrameSizes, columns: FrameSizes) -> None:
    """Raise ValueError unless the switches, conv1's first, have the shapes that images of this size give."""
    for k, layer_switches in enumerate(switches):
        pool = conv_geometry(net.blocks[k]).pool
        expected = (rows.outputs[k] // pool, columns.outputs[k] // pool)
        actual = tuple(layer_switches.shape[-2:])
        if actual != expected:
            image_size = (rows.inputs[0], columns.inputs[0])
            message = f"switches of conv{k + 1} are {actual}; images of {image_size} pixels have {expected}"
            raise ValueError(message)


def project_unit(net: CNN, image: Tensor, layer: int, filter_index: int, row: int, column: int) -> Tensor:
    """Project one unit of one image: keep its activation and set all others of its layer to zero.

    Args:
        net: A network in evaluation mode.
        image: One normalised image, (1, 3, rows, columns).
        layer: 0 for conv1 to 3 for conv4.
        filter_index: The unit's filter.
        row: The unit's row in the pooled map.
        column: The unit's column in the pooled map.

    Returns:
        The signed projection (3, rows, columns) in units of normalised pixels.
    """
    features = net.features(image)
    pooled = features[layer][0]
    switches = [layer_switches for _, layer_switches in features]

    only = torch.zeros_like(pooled)
    only[0, filter_index, row, column] = pooled[0, filter_index, row, column]
    return project(net, layer, only, switches, image.shape[-2:])[0]


# ---------------------------------------------------------------- the same by backpropagation


class Rectifier(torch.autograd.Function):
    """A ReLU whose way back follows one of three rules: "deconvnet", "gradient" or "guided"."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rule: str) -> Tensor:
        """Return max(values, 0)."""
        ctx.rule = rule
        ctx.fired = values > 0
        return values.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, None]:
        """Return the signal with zeros where the rule stops it.

        "deconvnet" stops negative signals, "gradient" stops the signal of every unit that did not fire on the
        way up, and "guided" stops both.
        """
        (signal,) = signals
        if ctx.rule in ("gradient", "guided"):
            signal = signal * ctx.fired
        if ctx.rule in ("deconvnet", "guided"):
            signal = signal.clamp(min=0)
        return signal, None


def backpropagate(
    net: CNN, images: Tensor, layer: int, filter_indices: Array, rows: Array, columns: Array, rule: str
) -> Tensor:
    """Send one activation of each image back to its pixels by backpropagation.

    The deconvnet, the gradient (Simonyan et al. 2014) and guided backpropagation (Springenberg et al. 2015)
    differ in the ReLU alone. With the rule "deconvnet" this is `project` by another way, for an activation
    of 1.

    Args:
        net: A network in evaluation mode.
        images: Normalised images, (images, 3, rows, columns).
        layer: 0 for conv1 to 3 for conv4.
        filter_indices: The filter of each image's unit, (images,).
        rows: The row of each image's unit in the pooled map, (images,).
        columns: Its column, likewise.
        rule: "deconvnet", "gradient" or "guided".

    Returns:
        What reaches the pixels, in the shape of the images.
    """
    pixels = images.detach().requires_grad_()
    with torch.enable_grad():
        x = pixels
        for block in net.blocks[: layer + 1]:
            x = F.max_pool2d(block.bn(block.conv(x)), block.pool_size)
            x = cast(Tensor, Rectifier.apply(x, rule))
        activations = x[torch.arange(len(images)), filter_indices, rows, columns]  # (images,)
        return torch.autograd.grad(activations.sum(), pixels)[0]


# ---------------------------------------------------------------- what is projected


class Picture(NamedTuple):
    """The image that is projected, and how figure and terminal call it."""

    pixels: Array  # uint8 (3, 96, 96)
    name: str
    class_name: str | None  # of a test image; None for a picture from a file


def choose_image(image: int | str | Path, checkpoint: Checkpoint, data_dir: Path) -> Picture:
    """Return the test image or the picture file that the setting IMAGE names.

    Raises:
        SystemExit: If there is no such test image or picture.
    """
    if not isinstance(image, int):
        return Picture(load_picture(image), Path(image).name, None)

    split = load_checkpoint_split(checkpoint, data_dir, "test")
    if not 0 <= image < len(split.images):
        raise SystemExit(f"IMAGE is {image}; the test split has images 0 to {len(split.images) - 1}")
    name = f"test image {image} of {TITLES[checkpoint.dataset]}"
    return Picture(split.images[image], name, checkpoint.class_names[split.labels[image]])


def load_picture(path: str | Path) -> Array:
    """Read a picture file, crop and resize it as `load_data.read_picture` does.

    Args:
        path: The file; ~ is the home folder.

    Returns:
        The picture, uint8 (3, 96, 96).

    Raises:
        SystemExit: If the file is missing or no picture.
    """
    setting = f"IMAGE is {str(path)!r}"
    if "://" in str(path):
        raise SystemExit(f"{setting}: download the picture first and give the path of the file")
    file = Path(path).expanduser()
    if file.is_dir():
        raise SystemExit(f"{setting}, which is a folder: give one of the pictures in it")
    if not file.is_file():
        folder = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise SystemExit(f"{setting}; no such file{folder}: give a picture or an index into the test split")
    try:
        return read_picture(file)
    except Exception as error:  # a damaged picture can raise nearly anything
        raise SystemExit(f"{setting}, which cannot be read as a picture: {error}") from None


def choose_layers(layer: str) -> list[int]:
    """Return the numbers of the layers that the setting LAYER names, 0 for conv1.

    Raises:
        SystemExit: If there is no such layer.
    """
    if layer == "all":
        return list(range(len(LAYERS)))
    if layer not in LAYERS:
        raise SystemExit(f"LAYER is {layer!r}; this network has {', '.join(LAYERS)}")
    return [LAYERS.index(layer)]


def choose_filters(setting: str | list[int], layers: list[int], filter_counts: list[int]) -> list[int] | None:
    """Return the filters that the setting SHOW_FILTERS lists, or None where it says "strongest".

    Filters can be listed for one layer only; `filter_counts` says how many each layer has.

    Raises:
        SystemExit: If the setting is neither, or a filter does not exist.
    """
    if setting == "strongest":
        return None

    allowed = "of one layer, set in LAYER"
    if len(layers) == 1:
        count = filter_counts[layers[0]]
        if isinstance(setting, list) and setting and set(setting) <= set(range(count)):
            return setting
        allowed = f"0 to {count - 1} of {LAYERS[layers[0]]}"
    raise SystemExit(f"SHOW_FILTERS is {setting!r}; allowed are 'strongest' and a list of filters {allowed}")


class Unit(NamedTuple):
    """One unit with its projection, as the figure shows it."""

    filter: int  # its number
    value: float  # activation
    row: int  # in the pooled map
    column: int
    top: int  # row of its window's top left pixel, negative where the window crosses the border
    left: int  # column likewise
    projection: Array  # (3, rows, columns) of the whole image, signed, in units of normalised pixels


def strongest_units(
    net: CNN, image: Tensor, layer: int, count: int, filters: Sequence[int] | None = None
) -> list[Unit]:
    """Return the strongest unit of each of some filters in one image, with its projection.

    The filters are `filters`, or else the `count` of the highest peak activation. A filter that does not fire
    is left out. The image is normalised, (1, 3, rows, columns).
    """
    pooled, switches = net.features(image)[layer]
    field = receptive_fields(net)[layer]
    map_columns = frame_sizes(net, image.shape[-1]).outputs[layer]

    # (1, filters, rows, columns) -> peak activation and its position in the flattened map, (filters,) each
    peaks, positions = pooled[0].flatten(1).max(dim=1)
    if filters is None:
        filters = peaks.argsort(descending=True, stable=True)[:count].tolist()
    firing = [filter_index for filter_index in filters if peaks[filter_index] > 0]

    units = []
    for filter_index in firing:
        row, column = divmod(int(positions[filter_index]), pooled.shape[-1])
        map_row, map_column = divmod(int(switches[0, filter_index, row, column]), map_columns)
        unit = Unit(
            filter=filter_index,
            value=float(peaks[filter_index]),
            row=row,
            column=column,
            top=map_row * field.jump + field.start,
            left=map_column * field.jump + field.start,
            projection=project_unit(net, image, layer, filter_index, row, column).cpu().numpy(),
        )
        units.append(unit)
    return units


def arrays_path(figure: str | Path) -> Path:
    """Return where the arrays behind a figure go: beside it, under a name that starts with "deconv_".

    Other stages write no arrays of such a name, so none of theirs is overwritten, whatever the figure is
    called.
    """
    figure = Path(figure)
    stem = figure.stem if figure.stem.startswith("deconv_") else f"deconv_{figure.stem}"
    return figure.with_name(f"{stem}.npz")


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


# ---------------------------------------------------------------- display


def robust_scale(values: Array) -> float:
    """Return the 99.5th percentile of the magnitudes above zero, which few outliers move; 1 for none."""
    magnitudes = np.abs(values[values != 0])
    return float(np.percentile(magnitudes, 99.5)) if magnitudes.size else 1.0


def displayed(projections: Array) -> Array:
    """Turn signed projections into pictures in which grey is zero.

    A value p becomes 0.5 + p / (2 m), where m is the `robust_scale` of all given values. Projections that are
    given together can therefore be compared.

    Args:
        projections: Signed values, (..., 3, rows, columns).

    Returns:
        The pictures, float32 from 0 to 1, (..., rows, columns, 3).
    """
    pictures = np.clip(0.5 + projections / (2 * robust_scale(projections)), 0, 1)
    return np.moveaxis(pictures, -3, -1).astype(np.float32)


def crop(frame: Array, top: int, left: int, size: int, outside: float) -> Array:
    """Crop the window of `size` pixels at (top, left) out of a frame (channels, rows, columns).

    The window may cross the border; `outside` fills what lies beyond it.
    """
    padded = np.pad(frame, ((0, 0), (size, size), (size, size)), constant_values=outside)
    # a view would keep the whole padded frame in memory
    return padded[:, top + size : top + 2 * size, left + size : left + 2 * size].copy()


def draw(image: Array, layers: dict[str, list[Unit]], field_sizes: Sequence[int], heading: str) -> Figure:
    """Draw, for each layer, the windows of its units in the image, their projections and the image there.

    The image is uint8 (3, 96, 96); `field_sizes` are the sizes of each layer's receptive field, in pixels.
    """
    pixels = image / 255
    columns = 2 + max(1, *(len(units) for units in layers.values()))
    fig = plt.figure(figsize=(1.15 * columns + 0.2, 2.45 * len(layers) + 0.5), layout="constrained")
    grid = fig.add_gridspec(2 * len(layers), columns)

    for k, (layer, units) in enumerate(layers.items()):
        size = field_sizes[k]
        colors = sns.color_palette("colorblind", len(units))

        # on the left, two rows and two columns large: the image with the windows
        whole = fig.add_subplot(grid[2 * k : 2 * k + 2, :2])
        note = "" if units else "\nno filter fires"
        whole.set_title(f"{layer}, receptive field {size} px{note}", fontsize=8)
        draw_windows(whole, pixels, units, size, colors)

        # then a column for each unit: its projection, and below it the image in the same window
        for number, (unit, color) in enumerate(zip(units, colors, strict=True), start=1):
            projection = crop(unit.projection, unit.top, unit.left, size, 0)
            patch = crop(pixels, unit.top, unit.left, size, 1)
            upper = fig.add_subplot(grid[2 * k, number + 1])
            lower = fig.add_subplot(grid[2 * k + 1, number + 1])
            draw_panel(upper, displayed(projection), color)
            draw_panel(lower, patch.transpose(1, 2, 0), color)
            upper.set_title(f"{number}: filter {unit.filter}\n{unit.value:.2f}", fontsize=7)

    fig.suptitle(heading, fontsize=9)
    return fig


def draw_windows(ax: Axes, pixels: Array, units: list[Unit], size: int, colors: Sequence[Color]) -> None:
    """Draw an image (3, rows, columns) from 0 to 1 with a numbered frame around each unit's window."""
    ax.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
    ax.set(xticks=[], yticks=[], xlim=(-0.5, IMAGE_SIZE - 0.5), ylim=(IMAGE_SIZE - 0.5, -0.5))
    for index, (unit, color) in enumerate(zip(units, colors, strict=True)):
        corner = (unit.left - 0.5, unit.top - 0.5)
        ax.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=color, linewidth=1.4))

        # the number stands on the upper edge; numbers stand side by side where large frames overlap
        x = max(unit.left, 0) + min(9 * index, max(size - 8, 0))
        y = max(unit.top, 7)
        box = {"boxstyle": "square,pad=0.15", "facecolor": color, "linewidth": 0}
        ax.text(x, y, str(index + 1), color="white", fontsize=6, va="bottom", clip_on=True, bbox=box)


def draw_panel(ax: Axes, picture: Array, color: Color) -> None:
    """Draw a picture (rows, columns, 3) from 0 to 1 in a coloured frame."""
    ax.imshow(picture, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color=color, linewidth=1.4)


def print_units(layers: dict[str, list[Unit]]) -> None:
    """Print the filters of each layer with their activations."""
    print(f"{'layer':<7}filters (activation)")
    for layer, units in layers.items():
        row = ", ".join(f"{unit.filter} ({unit.value:.2f})" for unit in units)
        print(f"{layer:<7}{row or 'none fires'}")


# ---------------------------------------------------------------- the live page


def page_json(content: Any) -> str:
    """Return JSON that can stand in a script of a page.

    Numbers have five digits, nan becomes null, and no `<` could end the script. `content` holds mappings,
    sequences, arrays, numbers and text.
    """
    return json.dumps(plain(content), separators=(",", ":")).replace("<", r"\u003c")


def plain(value: Any) -> Any:
    """Return a value, and whatever it holds, as the types that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def class_colours(count: int) -> list[str]:
    """Return a colour #rrggbb for each class, the same on every page; they repeat after ten."""
    return cast(list[str], sns.color_palette("colorblind", count).as_hex())


def text_colour_on(colour: str) -> str:
    """Return the text colour, black or white, that contrasts more with #rrggbb: 4.6 to 1 or more (WCAG 2)."""
    values = np.array(to_rgb(colour))
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return "#000" if luminance > 0.179 else "#fff"


def main() -> None:
    """Project one image's strongest units of each layer and draw them."""
    set_style()
    device = choose_device(DEVICE)
    layers = choose_layers(LAYER)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    net = checkpoint.net
    filters = choose_filters(SHOW_FILTERS, layers, net.config["filters"])
    picture = choose_image(IMAGE, checkpoint, DATA_DIR)
    title = TITLES[checkpoint.dataset]
    print(f"projecting {picture.name}, network trained on {title}, on {device}, torch {torch.__version__}")

    # what the network takes the image for
    batch = net.normalise(torch.from_numpy(picture.pixels[None]))  # (1, 3, 96, 96)
    probabilities = net(batch).softmax(dim=1)[0]
    probability, prediction = probabilities.max(dim=0)

    # the units and their projections
    units = {LAYERS[k]: strongest_units(net, batch, k, N_FILTERS, filters) for k in layers}
    print_units(units)

    # the figure and the arrays behind it
    truth = f", class {picture.class_name}" if picture.class_name else ""
    heading = (
        f"{picture.name}{truth}, predicted {checkpoint.class_names[int(prediction)]} "
        f"({100 * float(probability):.0f} %); network trained on {title}\n"
        "upper rows: projections with filter and activation; grey is zero, each panel has its own scale\n"
        "lower rows: the image in the same window, white beyond its border"
    )
    field_sizes = [receptive_fields(net)[k].size for k in layers]
    save_figure(Path(FIGURE), draw(picture.pixels, units, field_sizes, heading))
    save_arrays(arrays_path(FIGURE), checkpoint, image=picture.pixels, **as_arrays(units))
    print("next: uv run deconv_full.py")


if __name__ == "__main__":
    run_script(main)
