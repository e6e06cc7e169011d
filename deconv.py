"""Project one activation back to the pixels that caused it, in the plainest way.

Run:    uv run deconv.py
Reads:  outputs/CNN.pth, data/stl10_binary/test_{X,y}.bin or the picture IMAGE
Writes: outputs/deconv_image.png, outputs/deconv_image.npz, outputs/deconv_live.html

Zeiler & Fergus 2014, section 2.1: to see what a unit responds to, keep its activation, set all others of the
layer to zero, and go down layer by layer: unpool with the recorded switches, rectify, filter with the
transposed weights. `project` below is all of it, on whole images; deconv_full.py does the same for
millions of units.

outputs/deconv_live.html is a page that holds the network and a `project` of its own in JavaScript. It opens
from disk in a browser, and answers for any picture and any unit.
"""

import base64
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
    atomic_write,
    choose_device,
    conv_geometry,
    frame_sizes,
    load_checkpoint,
    receptive_fields,
    run_script,
)
from load_data import (
    TITLES,
    Array,
    Split,
    load_checkpoint_split,
    read_picture,
    save_arrays,
    save_figure,
    set_style,
    shorten,
)

IMAGE: int | str | Path = 0  # index into the test split, or any picture (cropped and resized to 96 x 96)
LAYER = "all"  # "all", or one of "conv1", "conv2", "conv3", "conv4"
SHOW_FILTERS: str | list[int] = "strongest"  # or numbers of filters of the one layer, such as [3, 17]
N_FILTERS = 6  # how many of a layer's filters are drawn where the strongest are asked for
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds stl10_binary, or your own folders train and test
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
FIGURE = Path("outputs/deconv_image.png")  # what is written; the arrays go beside it, as deconv_*.npz
LIVE_PAGE = Path("outputs/deconv_live.html")  # the page in which any picture and any unit can be tried

Color = tuple[float, float, float]  # red, green, blue from 0 to 1


# ---------------------------------------------------------------- the projection (section 2.1)


def fold_batch_norm(block: ConvBlock) -> Tensor:
    """Return the filters with batch norm's gain folded in, (filters, channels, rows, columns).

    In evaluation mode batch norm is gain * x + offset, with gain_f = weight_f / sqrt(variance_f + eps) for
    filter f, whatever the data. The way down transposes the linear part, filter and gain. The offset does not
    depend on the input, so it adds nothing to a projection.
    """
    bn = block.bn
    gain = bn.weight / torch.sqrt(cast(Tensor, bn.running_var) + bn.eps)
    return block.conv.weight * gain[:, None, None, None]


def project(
    net: CNN, layer: int, pooled: Tensor, switches: Sequence[Tensor], image_size: Sequence[int]
) -> Tensor:
    """Project pooled maps of one layer back to pixels: unpool, rectify and filter, layer by layer.

    There is a known artefact. Where an image has a single colour, as in the black bars of some STL-10 images,
    all values of a pooling region are equal, and the switch is the region's first position by convention.
    Signals pass there and draw stripes.

    Args:
        net: In evaluation mode: any object whose `blocks` have conv, bn and pool, run in this order. The ReLU
            comes last on the way up, and on the way down it is the step "rectify".
        layer: 0 for conv1 to 3 for conv4.
        pooled: What is to be seen, (images, filters, rows, columns): usually one activation, zero elsewhere.
        switches: The switches of each layer from conv1 up to `layer`, as `CNN.features` returns them.
        image_size: Rows and columns of the images.

    Returns:
        The signed projection (images, channels, rows, columns) in units of normalised pixels.

    Raises:
        ValueError: If images of this size would have switches of another shape.

    Example:
        A network of one's own needs blocks with these parts.

        >>> from types import SimpleNamespace
        >>> def make_block():
        ...     conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        ...     pool = torch.nn.MaxPool2d(2, return_indices=True)
        ...     return SimpleNamespace(conv=conv, bn=torch.nn.BatchNorm2d(1).eval(), pool=pool)
        >>> net = SimpleNamespace(blocks=[make_block(), make_block()])

        The way up records the switches. The way down starts from the maps of the second block.

        >>> x = torch.rand(1, 1, 8, 8)
        >>> switches = []
        >>> for block in net.blocks:
        ...     x, block_switches = block.pool(block.bn(block.conv(x)))
        ...     x = F.relu(x)
        ...     switches.append(block_switches)
        >>> project(net, 1, x, switches, (8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """
    row_sizes = frame_sizes(net, image_size[0])
    column_sizes = frame_sizes(net, image_size[1])
    check_switches(net, switches[: layer + 1], row_sizes, column_sizes)

    signal = pooled
    for k in reversed(range(layer + 1)):
        block = net.blocks[k]
        kernel, stride, padding, pool = conv_geometry(block)

        # Unpool: each value returns to the position of its region's maximum, all other positions are zero.
        # (images, filters, pooled rows, pooled columns) -> (images, filters, rows, columns)
        map_size = (row_sizes.outputs[k], column_sizes.outputs[k])
        signal = F.max_unpool2d(signal, switches[k], [pool, pool], output_size=map_size)

        # Rectify: only positive signals go further down. The pixels at the end are not rectified.
        signal = signal.clamp(min=0)

        # Filter with the transposed weights: each value lays down a copy of its filter, scaled by the value.
        # (images, filters, rows, columns) -> (images, channels, input rows, input columns)
        # On the way up the last step of a stride can end before the padded input does (never in the default
        # network). Without output_padding, so many rows or columns would be missing here.
        left_over = [(sizes.inputs[k] + 2 * padding - kernel) % stride for sizes in (row_sizes, column_sizes)]
        signal = F.conv_transpose2d(
            signal, fold_batch_norm(block), stride=stride, padding=padding, output_padding=left_over
        )
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
        """Return the signal with zeros where the rule stops it; the rule itself has no gradient.

        "deconvnet" stops negative signals, "gradient" stops the signal of every unit that did not fire on the
        way up, and "guided" stops both.
        """
        (signal,) = signals  # torch hands over one for each output
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
    differ in the ReLU alone. With the rule "deconvnet", the result times the activation is what `project`
    makes.

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


def load_test_split(image: int | str | Path, checkpoint: Checkpoint, data_dir: Path) -> Split:
    """Return the test split; an empty one, with a notice, if it cannot be read and IMAGE is a picture file.

    Raises:
        SystemExit: If the split cannot be read and IMAGE is an index into it.
    """
    try:
        return load_checkpoint_split(checkpoint, data_dir, "test")
    except SystemExit as reason:
        if isinstance(image, int):
            raise
        print(f"the live page is without test images: {reason}")
        return Split(np.zeros((0, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8), np.zeros(0, np.int64))


def choose_image(image: int | str | Path, checkpoint: Checkpoint, test: Split) -> Picture:
    """Return the test image or the picture file that the setting IMAGE names.

    Raises:
        SystemExit: If there is no such test image or picture.
    """
    if not isinstance(image, int):
        return Picture(load_picture(image), Path(image).name, None)
    if not 0 <= image < len(test.images):
        raise SystemExit(f"IMAGE is {image}; the test split has images 0 to {len(test.images) - 1}")
    name = f"test image {image} of {TITLES[checkpoint.dataset]}"
    if len(test.files):
        name += f", {test.files[image]}"
    return Picture(test.images[image], name, checkpoint.class_names[test.labels[image]])


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
    """Return the 99.5th percentile of the magnitudes above zero, which outliers hardly change; 1 for none."""
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


# ---------------------------------------------------------------- what the pages share


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


# ---------------------------------------------------------------- the live page


def encode(values: Array | Tensor, dtype: str = "<f4") -> str:
    """Return the bytes of an array in base64, by default as float32, which the page computes in."""
    return base64.b64encode(np.asarray(values, dtype, order="C").tobytes()).decode()


def describe_block(net: CNN, layer: int) -> dict[str, Any]:
    """Return what the page needs to compute a layer: geometry, filters and offsets.

    In evaluation mode batch norm makes gain * x + offset of what a filter gives. The gain is folded into the
    filters as in `fold_batch_norm`; the offset is bias - mean * gain.
    """
    block = net.blocks[layer]
    geometry = conv_geometry(block)
    sizes = frame_sizes(net, IMAGE_SIZE)

    bn = block.bn
    gain = bn.weight / torch.sqrt(cast(Tensor, bn.running_var) + bn.eps)
    offsets = bn.bias - cast(Tensor, bn.running_mean) * gain

    # (filters, channels, rows, columns) -> (filters, rows, columns, channels)
    filters = fold_batch_norm(block).permute(0, 2, 3, 1)
    return {
        "name": LAYERS[layer],
        **geometry._asdict(),
        "filters": filters.shape[0],
        "channels": filters.shape[3],
        "input_rows": sizes.inputs[layer],
        "map_rows": sizes.outputs[layer],
        "pooled_rows": sizes.outputs[layer] // geometry.pool,
        "field": receptive_fields(net)[layer]._asdict(),
        "weights": encode(filters.cpu()),
        "offsets": encode(offsets.cpu()),
    }


def classifier_weights(net: CNN) -> Tensor:
    """Return the weight of each unit of conv4 in each logit, (classes, rows, columns, filters).

    Averaging regions and the linear layer are one linear map together, and its derivative is the map itself.
    """
    rows = frame_sizes(net, IMAGE_SIZE).outputs[-1] // conv_geometry(net.blocks[-1]).pool
    pooled = torch.zeros(1, net.config["filters"][-1], rows, rows, device=net.mean.device)
    # (1, classes, 1, filters, rows, columns)
    derivative = cast(Tensor, torch.autograd.functional.jacobian(net.classify, pooled))
    return derivative[0, :, 0].permute(0, 2, 3, 1)


def first_of_each_class(checkpoint: Checkpoint, test: Split) -> list[Picture]:
    """Return the first test image of each class."""
    _, indices = np.unique(test.labels, return_index=True)
    return [choose_image(index, checkpoint, test) for index in indices.tolist()]


def write_live_page(
    path: str | Path, checkpoint: Checkpoint, pictures: Sequence[Picture], explorer: str
) -> None:
    """Write a page that holds the network and projects any unit in any picture.

    Args:
        path: The page.
        checkpoint: Its network and what made it.
        pictures: The pictures to begin with; the first one is shown.
        explorer: Where the filter explorer is, as seen from the page.
    """
    net = checkpoint.net
    samples = [
        # (3, rows, columns) -> (rows, columns, 3)
        {
            "name": picture.name,
            "truth": picture.class_name or "",
            "pixels": encode(picture.pixels.transpose(1, 2, 0), "u1"),
        }
        for picture in pictures
    ]
    content = {
        "title": TITLES[checkpoint.dataset],
        "generated": checkpoint.dataset == "shapes",
        "accuracy": checkpoint.accuracy(),
        "classes": checkpoint.class_names,
        "colours": class_colours(len(checkpoint.class_names)),
        "ramp": (255 * np.array(sns.color_palette("mako", 64))).round().astype(int),  # of magnitudes
        "explorer": explorer,
        "image_size": IMAGE_SIZE,
        "samples": samples,
        "mean": encode(net.mean.cpu()),
        "std": encode(net.std.cpu()),
        "blocks": [describe_block(net, layer) for layer in range(len(LAYERS))],
        "classifier": encode(classifier_weights(net).cpu()),
        "bias": encode(net.classifier.bias.cpu()),
    }
    with atomic_write(path) as partial:
        partial.write_text(LIVE.replace("__DATA__", page_json(content)), encoding="utf-8")
    print(f"wrote {path}", flush=True)


def main() -> None:
    """Project one image's strongest units of each layer, draw them, and write the live page."""
    set_style()
    device = choose_device(DEVICE)
    layers = choose_layers(LAYER)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    net = checkpoint.net
    filters = choose_filters(SHOW_FILTERS, layers, net.config["filters"])
    test = load_test_split(IMAGE, checkpoint, DATA_DIR)
    picture = choose_image(IMAGE, checkpoint, test)
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
    truth = f", class {shorten(picture.class_name)}" if picture.class_name else ""
    heading = (
        f"{picture.name}{truth}, predicted {shorten(checkpoint.class_names[int(prediction)])} "
        f"({100 * float(probability):.0f} %); network trained on {title}\n"
        "upper rows: projections with filter and activation; grey is zero, each panel has its own scale\n"
        "lower rows: the image in the same window, white beyond its border"
    )
    field_sizes = [receptive_fields(net)[k].size for k in layers]
    save_figure(Path(FIGURE), draw(picture.pixels, units, field_sizes, heading))
    save_arrays(arrays_path(FIGURE), checkpoint, image=picture.pixels, **as_arrays(units))

    # the page for any other image and unit
    samples = [sample for sample in first_of_each_class(checkpoint, test) if sample.name != picture.name]
    write_live_page(LIVE_PAGE, checkpoint, [picture, *samples], "explorer/index.html")
    print("next: uv run deconv_full.py")


# ---------------------------------------------------------------- the template of the live page

PAGE_STYLE = r"""/* colours */
:root { color-scheme: light dark; --paper: #fbfaf6; --ink: #1d1c1a; --soft: #5c5952; --line: #d8d3c6;
  --hatch: #e4dfd2; --link: #0b5796; --bar: #a29c8c; }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #e9e6df; --soft: #aaa69b;
  --line: #3b3933; --hatch: #2d2b27; --link: #8fc4f2; --bar: #77725f; } }
body, body * { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
header, main { max-width: 1520px; margin: auto; padding: 10px 20px; }
td:first-child { max-width: 120px; overflow: hidden; text-overflow: ellipsis; }
"""  # of this page and of the explorer: colours, light and dark, and the frame of the page

LIVE = (
    r"""<!DOCTYPE html><html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,"><title>Live deconvnet</title>
<style>
"""
    + PAGE_STYLE
    + r"""/* the picture on the left, the layers on the right */
header, nav { display: flex; flex-wrap: wrap; gap: 2px 15px; }
header { border-bottom: 1px solid var(--line); }
header span { flex-grow: 1; }
@media (min-width: 1000px) { main { display: grid; grid-template-columns: 318px minmax(0, 1fr); gap: 0 40px; }
  #left { position: sticky; top: 0; max-height: 100vh; overflow-y: auto; align-self: start; padding: 3px; }
  .loud { grid-column: span 2; } }
/* text */
h1 { font-size: inherit; margin: 0; }
h3 { font-size: 13px; margin: 8px 0 2px; }
h2 { font-size: 16px; margin: 22px 0 2px; padding-top: 8px; border-top: 1px solid var(--line); }
h2:first-child { margin-top: 4px; padding: 0; border: 0; }
p { max-width: 80ch; margin: 6px 0 10px; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: 13px; }
.loud { background: #ffd54a; color: #000; font-weight: 600; padding: 8px; text-align: center; }
a { color: var(--link); }
[aria-current] { color: inherit; font-weight: 600; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
input, button, label, video { font: inherit; max-width: 100%; margin: 0 8px 4px 0; vertical-align: middle; }
label { display: inline-block; }
/* the picture and what may be tried on it */
canvas { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; background:
  repeating-linear-gradient(45deg, var(--paper) 0 5px, var(--hatch) 5px 10px); }
figure { margin: 0; }
#samples { display: grid; grid-template-columns: repeat(auto-fill, 48px); gap: 4px; margin: 6px 0; }
#samples button { padding: 1px; margin: 0; border: 2px solid transparent; background: none; }
#samples [aria-pressed=true] { border-color: var(--link); }
#picture { position: relative; width: 288px; margin-bottom: 6px; overflow: hidden; cursor: crosshair; }
@media (min-width: 1000px) and (max-height: 950px) { #picture { width: 212px; } }  /* the bars are in sight */
#picture.covered { touch-action: none; }
#picture div { position: absolute; pointer-events: none; }
#frame { outline: 2px solid #000; outline-offset: -3px; border: 1px solid #fff; }
/* bars */
table { border-collapse: collapse; width: 100%; max-width: 420px; font-size: 13px; }
td { padding: 1px 8px 1px 0; white-space: nowrap; }
td:last-child { text-align: right; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }
.track { position: relative; min-width: 90px; height: 11px; }
.track div { height: 100%; }
.track i { position: absolute; top: -2px; bottom: -2px; width: 3px; background: var(--ink); }
/* tiles, the panels of a unit, its map, the way down */
#tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 10px; padding: 5px;
  max-height: 320px; overflow-y: auto; position: relative; border: 1px solid var(--line); font-size: 12px; }
#tiles a:first-child { display: block; color: inherit; text-decoration: none; }
#tiles span { display: flex; justify-content: space-between; }
#tiles [aria-current] canvas { outline: 3px solid var(--link); }
#panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; max-width: 950px; }
#map { display: grid; gap: 1px; }
#map button { margin: 0; padding: 0; border: 0; min-width: 0; aspect-ratio: 1; font-size: 10px;
  color: inherit; overflow: hidden; }
#map [aria-current] { outline: 2px solid; }
#way { display: flex; flex-wrap: wrap; gap: 14px 20px; }
#way div { display: grid; grid-template-columns: repeat(3, 84px); gap: 6px; align-content: start; }
#way h3 { grid-column: span 3; margin: 0; }
#way figcaption { font-size: 12px; }
@media (max-width: 700px) { header, main { padding: 10px 14px; } header span { flex-basis: 100%; }
  #left { margin-bottom: 22px; }
  #panels { grid-template-columns: 1fr 1fr; } }
</style><noscript>This page needs JavaScript; it loads nothing from elsewhere.</noscript>
<header><h1>Live deconvnet</h1><span id="source"></span><a href="#about">About</a>
  <a id="explorer">Filter explorer</a></header>
<main><div class="loud" id="generated" hidden>Generated shapes, no photographs: they show that the code works,
  nothing more</div>
<section id="left"><h2>Picture</h2><div id="samples"></div>
  <label class="soft">Or choose, drop or paste one <input type="file" id="file" accept="image/*"></label>
  <button id="camera" hidden>Camera</button><video id="video" muted playsinline hidden></video>
  <p id="message" role="alert"></p>
  <div id="picture" tabindex="0" role="group" aria-label="Picture. Arrow keys move a grey square over it, with
    Shift by one pixel; Escape takes it away."><canvas id="pixels" role="img"></canvas><div id="frame"></div>
    <div id="square"></div></div>
  <label><input type="checkbox" id="cover">Cover with a grey square: drag it, or use the arrow keys</label>
  <label class="soft">Its side <input type="range" id="side" min="4" max="64" step="4" value="24"></label>
  <p id="answer" role="status"></p><table id="classes"></table><h3>Activation of the unit</h3>
  <table id="activation"></table></section>
<section><h2>One layer at a time</h2><nav id="layers"></nav><p class="soft" id="note"></p>
  <div id="tiles"></div><h2 id="name"></h2>
  <p><span id="silent">This unit does not fire here: its projections are empty. </span><a id="more">What else
    activates this filter</a></p><div id="panels"></div>
  <p class="soft">The three projections differ in one thing: what a ReLU lets pass on the way down. The
    deconvnet passes positive signals. The gradient passes the signals of units that fired on the way up.
    Guided backpropagation passes what satisfies both. Grey is zero; each projection has its own scale.</p>
  <h2>The map of this filter</h2><p class="soft">Click any unit, or move with the arrow keys. Where
    the map is large, a value shows when the pointer rests on it.</p>
  <div id="map"></div>
  <h2>The way down</h2><p class="soft">This is section 2.1 and Figure 1 of Zeiler &amp; Fergus (2014). The
    activation of the unit is kept, all others of its layer are set to zero. Then each layer takes three
    steps. <b>Unpool</b>: each value returns to the position of its region's maximum, where its switch points.
    <b>Rectify</b>: only signals that the ReLU lets pass go further down. <b>Filter</b>: each value lays down
    a copy of its filter, scaled by the value. Drawn is the magnitude, summed over the channels; each picture
    has a scale of its own.</p>
  <form id="rules"><label><input type="radio" name="rule" value="deconvnet" checked>deconvnet</label>
    <label><input type="radio" name="rule" value="gradient">gradient</label>
    <label><input type="radio" name="rule" value="guided">guided backpropagation</label></form>
  <div id="way"></div>
  <h2 id="about">About</h2><p>The network was trained on <span id="training"></span>. It knows no other
    classes, and calls every picture one of them.</p>
  <p>A projection shows from which pixels of this picture one activation came. Light and dark, and opposite
    colours, are opposite signs. It does not show what the filter responds to in general: compare other
    pictures, or its nine strongest images in the explorer. It does not show how much these pixels matter to
    the network: cover them and see.</p>
  <p class="soft">A picture is cropped to its centre square and resized to 96 x 96 pixels as deconv.py does
    it, to about one level of 255. Larger differences are possible above 4 megapixels, because the browser
    then shrinks the picture first, and in 16-bit pictures. Pictures stay on this computer. The explorer shows
    what else activates a filter; <code>uv run heatmap.py</code> writes it.</p></section></main>
<script id="data" type="application/json">__DATA__</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const size = data.image_size;  // rows and columns of a picture
const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const numbersOf = (text) => new Float32Array(bytesOf(text).buffer);

// ---- the way up; maps are flat arrays, (rows, columns, channels)
function readsOf(kernel, stride, padding, inputRows, outputRows) {  // what each output position reads
  return Array.from({ length: outputRows ** 2 }, (_, output) => {
    const reads = [];
    for (let tap = 0; tap < kernel ** 2; tap++) {
      const row = Math.floor(output / outputRows) * stride - padding + Math.floor(tap / kernel);
      const column = (output % outputRows) * stride - padding + (tap % kernel);
      const inside = Math.min(row, column) >= 0 && Math.max(row, column) < inputRows;
      if (inside) reads.push({ tap, input: row * inputRows + column });  // the others are padding
    }
    return reads;
  });
}

const [mean, deviation, bias, classifier] = [data.mean, data.std, data.bias, data.classifier].map(numbersOf);
const blocks = data.blocks.map((block) => {
  const { kernel, stride, padding, pool, filters, input_rows, map_rows, pooled_rows } = block;
  const weights = numbersOf(block.weights);  // (filters, rows, columns, channels), with batch norm's gain
  const inputs = weights.length / filters;
  // (rows, columns, channels, filters), so that the innermost loop of convolve reads one number after another
  const filtersLast = weights.map((_, k) => weights[(k % filters) * inputs + Math.floor(k / filters)]);
  const reads = readsOf(kernel, stride, padding, input_rows, map_rows);
  const regions = readsOf(pool, pool, 0, map_rows, pooled_rows);
  return { ...block, weights, filtersLast, reads, regions, offsets: numbersOf(block.offsets) };
});

function normalise(pixels) {  // 0 to 255, (rows, columns, 3)
  return Float32Array.from(pixels, (value, k) => (value / 255 - mean[k % 3]) / deviation[k % 3]);
}

function cover(image, { top, left, side }) {  // with grey: zero is the mean of the training images
  const covered = image.slice();
  const first = Math.max(0, left);
  const end = Math.min(size, left + side);
  for (let row = Math.max(0, top); row < Math.min(size, top + side); row++) {
    covered.fill(0, 3 * (row * size + first), 3 * (row * size + end));
  }
  return covered;
}

function convolve(input, { reads, channels, filters, filtersLast, offsets }) {
  const map = new Float32Array(reads.length * filters);
  for (let position = 0; position < reads.length; position++) {
    const output = position * filters;
    map.set(offsets, output);
    for (const read of reads[position]) {
      for (let channel = 0; channel < channels; channel++) {
        const value = input[read.input * channels + channel];
        if (value === 0) continue;  // half of them, after a ReLU
        const first = (read.tap * channels + channel) * filters;
        for (let filter = 0; filter < filters; filter++) {
          map[output + filter] += value * filtersLast[first + filter];
        }
      }
    }
  }
  return map;
}

function pool(map, { regions, filters }) {
  const pooled = new Float32Array(regions.length * filters);
  const switches = new Int32Array(pooled.length);  // where in the flat map, filters included, the maximum is
  for (let k = 0; k < pooled.length; k++) {
    const places = regions[Math.floor(k / filters)].map((read) => read.input * filters + (k % filters));
    switches[k] = places.reduce((best, place) => (map[place] > map[best] ? place : best));
    pooled[k] = Math.max(map[switches[k]], 0);  // ReLU
  }
  return { map, pooled, switches };
}

function forward(image) {  // normalised
  const layers = [];
  let input = image;
  for (const block of blocks) {
    layers.push(pool(convolve(input, block), block));
    input = layers.at(-1).pooled;
  }
  const logits = bias.map((value, k) =>
    input.reduce((sum, activation, unit) => sum + activation * classifier[k * input.length + unit], value));
  const odds = Array.from(logits, (logit) => Math.exp(logit - Math.max(...logits)));
  const sum = odds.reduce((total, value) => total + value);
  return { layers, logits, probabilities: odds.map((value) => value / sum) };
}

// ---- the way down: `project` of deconv.py, and the other rules of its `backpropagate` times the activation
function unpool(signal, switches, { map_rows, filters }) {  // each value to its switch, all others are zero
  const unpooled = new Float32Array(map_rows ** 2 * filters);
  for (let k = 0; k < signal.length; k++) {
    if (signal[k] !== 0) unpooled[switches[k]] = signal[k];
  }
  return unpooled;
}

function rectify(signal, map, rule) {
  const rectified = new Float32Array(signal.length);
  for (let place = 0; place < signal.length; place++) {
    if (signal[place] === 0) continue;
    const signPasses = signal[place] > 0 || rule === "gradient";
    const unitPasses = map[place] > 0 || rule === "deconvnet";  // whether it fired on the way up
    if (signPasses && unitPasses) rectified[place] = signal[place];
  }
  return rectified;
}

// The transposed convolution: each value goes back to the inputs that its position read on the way up.
function filterDown(signal, { reads, kernel, channels, filters, weights, input_rows }) {
  const result = new Float32Array(input_rows ** 2 * channels);
  for (let place = 0; place < signal.length; place++) {
    const value = signal[place];
    if (value === 0) continue;
    const filter = place % filters;
    for (const read of reads[Math.floor(place / filters)]) {
      const first = (filter * kernel ** 2 + read.tap) * channels;
      const target = read.input * channels;
      for (let channel = 0; channel < channels; channel++) {
        result[target + channel] += value * weights[first + channel];
      }
    }
  }
  return result;
}

function project({ layers }, unit, rule = "deconvnet") {  // returns all steps; the last ends in the pixels
  const place = placeOf(unit);
  let signal = new Float32Array(layers[unit.layer].pooled.length);
  signal[place] = layers[unit.layer].pooled[place];  // this activation is kept, all others are zero
  const steps = [];
  for (let layer = unit.layer; layer >= 0; layer--) {
    const unpooled = unpool(signal, layers[layer].switches, blocks[layer]);
    const rectified = rectify(unpooled, layers[layer].map, rule);
    const filtered = filterDown(rectified, blocks[layer]);
    steps.push({ layer, unpooled, rectified, filtered });
    signal = filtered;
  }
  return steps;
}

function placeOf({ layer, filter, row, column }) {  // of a unit in the pooled maps
  return (row * blocks[layer].pooled_rows + column) * blocks[layer].filters + filter;
}

function strongest({ layers }, layer, filter) {  // unit of a filter
  const { filters, pooled_rows } = blocks[layer];
  const map = Array.from({ length: pooled_rows ** 2 }, (_, k) => layers[layer].pooled[k * filters + filter]);
  const value = Math.max(...map);
  const position = map.indexOf(value);
  return { layer, filter, value, row: Math.floor(position / pooled_rows), column: position % pooled_rows };
}

function windowOf({ layers }, unit) {  // the pixels that a unit sees through its switch
  const { filters, map_rows, field } = blocks[unit.layer];
  const position = Math.floor(layers[unit.layer].switches[placeOf(unit)] / filters);
  const top = Math.floor(position / map_rows) * field.jump + field.start;
  return { top, left: (position % map_rows) * field.jump + field.start, side: field.size };
}

// ---- pictures
function shrink(pixels, rows, columns, start, side) {  // (rows, columns, 4) -> (96, rows, 4), as Pillow does
  const scale = side / size;
  const reach = Math.max(scale, 1);
  return Uint8ClampedArray.from({ length: 4 * size * rows }, (_, k) => {
    const row = Math.floor(k / 4) % rows;
    const centre = start + (Math.floor(k / (4 * rows)) + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - reach + 0.5));
    const last = Math.min(columns, Math.floor(centre + reach + 0.5));
    let sum = 0;
    let weights = 0;
    for (let column = first; column < last; column++) {
      const weight = 1 - Math.abs(column + 0.5 - centre) / reach;
      weights += weight;
      sum += weight * pixels[4 * (row * columns + column) + (k % 4)];
    }
    return sum / weights;
  });
}

function readSquare(source, width, height) {  // the centre square, (96, 96, 3)
  const smaller = Math.min(1, Math.sqrt(4e6 / (width * height)));  // browsers limit the size of a canvas
  const [rows, columns] = [height, width].map((side) => Math.max(1, Math.round(side * smaller)));
  const canvas = el("canvas", { width: columns, height: rows });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";  // where the picture is transparent
  context.fillRect(0, 0, columns, rows);
  context.drawImage(source, 0, 0, columns, rows);
  const { data: pixels } = context.getImageData(0, 0, columns, rows);
  const side = Math.min(rows, columns);
  const narrow = shrink(pixels, rows, columns, (columns - side) / 2, side);
  return shrink(narrow, size, rows, (rows - side) / 2, side).filter((_, k) => k % 4 < 3);
}

async function readPicture(file) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };  // turned as EXIF says
  const bitmap = await createImageBitmap(file, options).catch(() => null);
  page.message.textContent = bitmap ? "" : `${file?.name ?? "This"} is no picture that the browser can read.`;
  if (bitmap) show({ name: file.name, pixels: readSquare(bitmap, bitmap.width, bitmap.height) });
}

// ---- drawing; text is never read as HTML
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
const two = (value) => value.toFixed(2);
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const clamp = (value, most) => Math.min(most, Math.max(0, value));
const picture = (text) => el("canvas", { role: "img", "aria-label": text });
const figure = (canvas, ...lines) => el("figure", {}, canvas,
  el("figcaption", {}, ...lines.flatMap((line) => [line, el("br", {})])));

function paint(canvas, rows, colour) {  // colour(k): red, green and blue of pixel k, 0 to 255; nothing: clear
  const image = new ImageData(rows, rows);
  for (let k = 0; k < rows ** 2; k++) {
    const pixel = colour(k);
    if (!pixel) continue;
    for (let channel = 0; channel < 3; channel++) image.data[4 * k + channel] = pixel[channel];
    image.data[4 * k + 3] = 255;
  }
  canvas.width = rows;
  canvas.height = rows;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
function paintWindow(canvas, { top, left, side }, frame, outside) {  // of a frame (rows, columns, 3)
  return paint(canvas, side, (k) => {
    const row = top + Math.floor(k / side);
    const column = left + (k % side);
    const place = 3 * (row * size + column);
    const inside = Math.min(row, column) >= 0 && Math.max(row, column) < size;
    return inside ? frame.subarray(place, place + 3) : outside;
  });
}
function robustScale(values) {  // the 99.5th percentile of the magnitudes above zero
  const magnitudes = values.filter((value) => value !== 0).map(Math.abs).sort();
  return magnitudes[Math.floor(0.995 * (magnitudes.length - 1))] || 1;
}
function paintProjection(canvas, area, projection, scale) {
  const grey = 127.5;  // zero
  const levels = projection.map((value) => grey + (grey * value) / scale);
  return paintWindow(canvas, area, levels, [grey, grey, grey]);
}
function paintMagnitude(canvas, rows, signal) {  // summed over the channels
  const channels = signal.length / rows ** 2;
  const sums = new Float32Array(rows ** 2);
  for (let position = 0; position < rows ** 2; position++) {
    for (let channel = 0; channel < channels; channel++) {
      sums[position] += Math.abs(signal[position * channels + channel]);
    }
  }
  const scale = (data.ramp.length - 1) / (Math.max(...sums) || 1);
  return paint(canvas, rows, (k) => data.ramp[Math.round(scale * sums[k])]);
}
function bar(name, colour, value, before, text) {  // value and before are 0 to 1
  const dot = el("span", { class: "dot", style: `background:${colour}` });
  const level = el("div", { style: `background:${colour};width:${100 * value}%` });
  const mark = square ? el("i", { style: `left:${99 * before}%` }) : "";
  return el("tr", {}, el("td", { title: name }, dot, name),
    el("td", {}, el("div", { class: "track" }, level, mark)), el("td", {}, text));
}
function lay(node, { top, left, side }) {  // over the picture
  const [x, y, width] = [left, top, side].map((value) => `${(100 * value) / size}%`);
  Object.assign(node.style, { left: x, top: y, width, height: width });
}

// ---- what is shown
const names = data.blocks.map((block) => block.name);
const rules = { deconvnet: "deconvnet", gradient: "gradient", guided: "guided backpropagation" };
let shown;  // the picture: name, truth and pixels
let image;  // normalised
let whole;  // what `forward` finds in it
let square = null;  // top, left and side
let now;  // what `forward` finds with the square over the picture
let order;  // the strongest unit of each filter of the layer, strongest first
let unit;

function show(chosen) {
  shown = chosen;
  image = normalise(shown.pixels);
  whole = forward(image);
  order = null;
  paintWindow(page.pixels, { top: 0, left: 0, side: size }, shown.pixels);
  page.pixels.setAttribute("aria-label", shown.name);
  for (const button of page.samples.children) button.setAttribute("aria-pressed", button.sample === shown);
  choose();
  look();
}
function choose() {  // the unit in the address: #conv4, #conv4/137 or #conv4/137/2/0
  const [name, ...numbers] = location.hash.slice(1).split("/");
  const layer = names.includes(name) ? names.indexOf(name) : unit ? unit.layer : names.length - 1;
  if (order?.[0].layer !== layer) showTiles(layer);
  const [filter, row, column] = numbers.map(Number);
  const cells = [...Array(blocks[layer].pooled_rows).keys()];
  unit = { ...(order.find((peak) => peak.filter === filter) || order[0]) };
  if (cells.includes(row) && cells.includes(column)) Object.assign(unit, { row, column });
  for (const tile of page.tiles.children) {
    const current = tile.filter === unit.filter;
    tile.firstChild.toggleAttribute("aria-current", current);
    tile.firstChild.tabIndex = current ? 0 : -1;  // one stop for the Tab key; arrow keys lead on
    if (current) reveal(tile);
  }
}
function reveal({ offsetTop, offsetHeight }) {  // scrolls the tiles, but not the page
  const { scrollTop, clientHeight } = page.tiles;
  page.tiles.scrollTop = Math.max(offsetTop + offsetHeight - clientHeight, Math.min(scrollTop, offsetTop));
}
function look() {  // at the picture, with the square where there is one
  now = square ? forward(cover(image, square)) : whole;
  page.square.hidden = !square;
  page.cover.checked = Boolean(square);
  page.picture.classList.toggle("covered", square);
  const best = now.probabilities.indexOf(Math.max(...now.probabilities));
  const name = shown.truth ? `${shown.name} (${shown.truth})` : shown.name;
  page.answer.textContent = `${name}: the network says ${data.classes[best]}, `
    + `${percent(now.probabilities[best])}`;
  const ranking = [...data.classes.keys()].sort((a, b) => whole.probabilities[b] - whole.probabilities[a]);
  page.classes.replaceChildren(...ranking.map((k) => bar(data.classes[k], data.colours[k],
    now.probabilities[k], whole.probabilities[k], percent(now.probabilities[k]))));
  showUnit();
}
async function showTiles(layer) {
  const { name, filters, field } = data.blocks[layer];
  const begun = [...Array(filters).keys()].map((filter) => strongest(whole, layer, filter));
  order = begun.sort((a, b) => b.value - a.value);
  const firing = order.filter((peak) => peak.value > 0);
  page.layers.replaceChildren(...names.map((other) => el("a", { href: `#${other}` }, other)));
  page.layers.children[layer].setAttribute("aria-current", "page");
  page.note.textContent = `${filters} filters, strongest in this picture first; `
    + `${filters - firing.length} do not fire. A tile is the projection of a filter's strongest unit in its `
    + `window of ${field.size} x ${field.size} pixels, with its number and its activation. Click one, or end `
    + `the address of the page with #${name}/42. What else activates a filter is in the explorer, which `
    + "uv run heatmap.py writes.";
  page.tiles.replaceChildren(...order.map(({ filter, value }) => {
    const caption = el("span", {}, el("b", {}, filter), two(value));
    const tile = el("a", { href: `#${name}/${filter}` }, el("canvas", {}), caption);
    const more = el("a", { href: `${data.explorer}#${name}/${filter}`, tabindex: -1 }, "explorer");
    return Object.assign(el("div", {}, tile, more), { filter });
  }));
  let paused = performance.now();
  for (const [k, peak] of firing.entries()) {
    if (performance.now() > paused + 50) {
      await new Promise((resolve) => setTimeout(resolve));  // the page stays usable
      paused = performance.now();
    }
    if (order !== begun) return;  // another layer or picture was chosen
    const projection = project(whole, peak).at(-1).filtered;
    const canvas = page.tiles.children[k].querySelector("canvas");
    paintProjection(canvas, windowOf(whole, peak), projection, robustScale(projection));
  }
}
function showUnit() {
  const { name } = data.blocks[unit.layer];
  const [value, before] = [now, whole].map((pass) => pass.layers[unit.layer].pooled[placeOf(unit)]);
  const filter = `${name} / ${unit.filter}`;
  page.name.textContent = `One unit: ${filter}, row ${unit.row}, column ${unit.column}, `
    + `activation ${two(value)}`;
  page.silent.hidden = value > 0;
  page.more.href = `${data.explorer}#${name}/${unit.filter}`;
  const most = Math.max(order[0].value, value) || 1;
  page.activation.replaceChildren(bar(filter, "var(--bar)", value / most, before / most,
    square ? `${two(value)} (was ${two(before)})` : two(value)));
  const area = windowOf(now, unit);
  lay(page.frame, area);
  unit.scales ??= Object.keys(rules).map((rule) => robustScale(project(whole, unit, rule).at(-1).filtered));
  const projections = Object.entries(rules).map(([rule, text], k) => {
    const projection = project(now, unit, rule).at(-1).filtered;
    return figure(paintProjection(picture(`projection: ${text}`), area, projection, unit.scales[k]), text);
  });
  const patch = paintWindow(picture("the picture in the window"), area, shown.pixels);
  page.panels.replaceChildren(figure(patch, square ? "the picture there, uncovered" : "the picture there"),
    ...projections);
  showMap();
  showWay();
}
function showMap() {
  const rows = blocks[unit.layer].pooled_rows;
  const most = order.find((peak) => peak.filter === unit.filter).value || 1;
  const focused = page.map.contains(document.activeElement);
  page.map.style.gridTemplateColumns = `repeat(${rows}, minmax(0, ${Math.min(40, 480 / rows)}px))`;
  page.map.replaceChildren(...Array.from({ length: rows ** 2 }, (_, position) => {
    const cell = { ...unit, row: Math.floor(position / rows), column: position % rows };
    const value = now.layers[unit.layer].pooled[placeOf(cell)];
    const title = `row ${cell.row}, column ${cell.column}: ${two(value)}`;
    const share = 45 * clamp(value / most, 1);  // of the link's colour; the number stays readable
    const style = `background:color-mix(in srgb, var(--link) ${share}%, var(--paper))`;
    const button = el("button", { title, style, tabindex: -1 }, rows > 12 ? "" : two(value));
    button.onclick = () => go(cell);
    return button;
  }));
  const current = page.map.children[unit.row * rows + unit.column];
  current.setAttribute("aria-current", "true");
  current.tabIndex = 0;
  if (focused) current.focus();
}
function showWay() {
  const step = (text, rows, signal) => {
    const nonzero = signal.filter((value) => value !== 0).length;
    return figure(paintMagnitude(picture(text), rows, signal), text,
      `${rows} x ${rows} x ${signal.length / rows ** 2}`, `${nonzero} not 0`);
  };
  const steps = project(now, unit, page.rules.elements.rule.value);
  page.way.replaceChildren(...steps.map(({ layer, unpooled, rectified, filtered }) => {
    const { name, map_rows, input_rows } = data.blocks[layer];
    const result = layer ? "filtered" : "the pixels";
    return el("div", {}, el("h3", {}, name), step("unpooled", map_rows, unpooled),
      step("rectified", map_rows, rectified), step(result, input_rows, filtered));
  }));
}

// ---- addresses, keys, pointer, files
function go({ layer, filter, row, column }) {
  location.replace(`#${[names[layer], filter, row, column].filter((part) => part !== undefined).join("/")}`);
}
let waiting;
function moveSquare(row, column) {  // its centre, in pixels of the picture
  const side = Number(page.side.value);
  const [top, left] = [row, column].map((centre) => Math.round(clamp(centre, size) - side / 2));
  square = { top, left, side };
  lay(page.square, square);
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(look);  // of several moves only the last
}
function nudge(down, right) {  // without a square, one is laid on the window
  const { top, left, side } = square || windowOf(now, unit);
  moveSquare(top + side / 2 + down, left + side / 2 + right);
}
function uncover() {
  square = null;
  look();
}
function pointAt({ clientX, clientY }) {
  const { top, left, width } = page.picture.getBoundingClientRect();
  moveSquare((size * (clientY - top)) / width, (size * (clientX - left)) / width);
}
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest?.("input")) return;
  if (event.key === "Escape") uncover();
  if (!ARROWS[event.key]) return;
  const [down, right] = ARROWS[event.key];
  const next = order[order.findIndex((peak) => peak.filter === unit.filter) + right];
  if (event.target === page.picture) {
    const pixels = square ? (event.shiftKey ? 1 : 4) : 0;
    nudge(pixels * down, pixels * right);
  } else if (page.map.contains(event.target)) {
    const last = blocks[unit.layer].pooled_rows - 1;
    go({ ...unit, row: clamp(unit.row + down, last), column: clamp(unit.column + right, last) });
  } else if (right && next) {
    go({ layer: unit.layer, filter: next.filter });
  } else return;
  event.preventDefault();
});
addEventListener("hashchange", () => {
  if (location.hash === "#about") return;
  const focused = page.tiles.contains(document.activeElement);
  choose();
  if (focused) page.tiles.querySelector("[aria-current]").focus();
  showUnit();
});
page.picture.onclick = pointAt;
page.picture.onpointermove = (event) => {
  if (event.buttons && (square || event.pointerType === "mouse")) pointAt(event);
};
page.cover.onchange = () => (page.cover.checked ? nudge(0, 0) : uncover());
page.side.oninput = () => square && nudge(0, 0);
page.rules.onchange = showWay;
page.file.onchange = () => readPicture(page.file.files[0]);
addEventListener("paste", (event) => readPicture(event.clipboardData.files[0]));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  readPicture(event.dataTransfer.files[0]);
});
page.camera.hidden = !navigator.mediaDevices;
page.camera.onclick = async () => {
  const { video, camera, message } = page;
  if (video.hidden) {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true }).catch(() => null);
    message.textContent = video.srcObject ? "" : "There is no camera that this page may use.";
    if (!video.srcObject) return;
    await video.play();
  } else {
    show({ name: "camera", pixels: readSquare(video, video.videoWidth, video.videoHeight) });
    for (const track of video.srcObject.getTracks()) track.stop();
  }
  video.hidden = !video.hidden;
  camera.textContent = video.hidden ? "Camera" : "Take the picture";
};
page.generated.hidden = !data.generated;
page.source.textContent = `${data.title}, ${data.accuracy}`;
page.training.textContent = page.source.textContent;
page.explorer.href = data.explorer;
page.square.style.background = `rgb(${mean.map((value) => 255 * value).join(" ")})`;
page.samples.append(...data.samples.map(({ name, truth, pixels }) => {
  const sample = { name, truth, pixels: bytesOf(pixels) };
  const canvas = paintWindow(picture(`${name}, ${truth}`), { top: 0, left: 0, side: size }, sample.pixels);
  const button = el("button", {}, canvas);
  button.onclick = () => show(sample);
  return Object.assign(button, { sample });
}));
show(page.samples.firstChild.sample);
</script>
</html>
"""
)


if __name__ == "__main__":
    run_script(main)
