"""Project one activation back to the pixels that caused it, in the plainest way.

Run:    uv run deconv.py
Reads:  outputs/CNN.pth, data/stl10_binary/test_{X,y}.bin or the picture IMAGE
Writes: outputs/deconv_image.png

Zeiler & Fergus 2014, section 2.1: to see what a unit responds to, keep its activation, set all others of the
layer to zero, and go down layer by layer: unpool with the recorded switches, rectify, filter with the
transposed weights. `project` below is all of it, one full frame at a time; deconv_full.py does the same for
millions of units.
"""

import warnings
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
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from CNN import (
    CNN,
    IMAGE_SIZE,
    LAYERS,
    ConvBlock,
    choose_device,
    frame_sizes,
    layer_index,
    load_checkpoint,
    receptive_fields,
)
from load_data import (
    check_file_name,
    check_numbers,
    check_paths,
    load_split,
    no_memory,
    normalise,
    plain_errors,
    prepare_folders,
    save_figure,
    title,
)

IMAGE: int | str = 0  # index into the test split, or the path of any picture (resized and cropped to 96 x 96)
LAYER = "all"  # "all", or one of "conv1", "conv2", "conv3", "conv4"
N_FILTERS = 6  # strongest filters drawn of each layer, 1 to 30
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
FIGURE = Path("outputs/deconv_image.png")  # what is written


def gain_filters(block: ConvBlock) -> Tensor:
    """Return the filters with batch norm's gain absorbed, (filters, channels, rows, columns).

    In evaluation mode batch norm multiplies filter f by gain_f = weight_f / sqrt(variance_f + eps), whatever
    the data. It is part of the filter that is transposed; batch norm's offsets add nothing to a projection.
    """
    bn = block.bn
    gain = bn.weight / torch.sqrt(cast(Tensor, bn.running_var) + bn.eps)
    return block.conv.weight * gain[:, None, None, None]


def unpool(pooled: Tensor, switches: Tensor, size: int) -> Tensor:
    """Put each pooled value back where its maximum was, zero elsewhere (section 2.1, "Unpooling").

    Args:
        pooled: (images, filters, rows, columns).
        switches: Of the same shape: place of each maximum in the map before pooling.
        size: Rows and columns of that map.

    Returns:
        (images, filters, size, size)
    """
    images, filters, _, _ = pooled.shape
    flat = pooled.new_zeros(images, filters, size * size)
    return flat.scatter(2, switches.flatten(2), pooled.flatten(2)).view(images, filters, size, size)


def project(
    net: CNN, layer: int, pooled: Tensor, switches: Sequence[Tensor], image_size: int = IMAGE_SIZE
) -> Tensor:
    """Project pooled maps of one layer back to pixels (section 2.1).

    Args:
        net: The network, in evaluation mode.
        layer: 0 for conv1 to 3 for conv4.
        pooled: (images, filters, rows, columns), what is to be seen; usually one activation, zero elsewhere.
        switches: Of each layer from conv1 up to `layer`, as `CNN.features` returns them for the images.
        image_size: Rows and columns of the images.

    Returns:
        Signed projection (images, 3, image_size, image_size) in units of normalised pixels.
    """
    input_sizes, conv_sizes = frame_sizes(net, image_size)
    signal = pooled
    for k in reversed(range(layer + 1)):
        block = net.blocks[k]
        kernel, stride, padding = block.sizes()
        signal = unpool(signal, switches[k], conv_sizes[k])
        signal = signal.clamp(min=0)  # rectify; the pixels at the end are not rectified
        # a stride may leave rows that no filter reached last; without them the frame would come out smaller
        unreached = (input_sizes[k] + 2 * padding - kernel) % stride
        signal = F.conv_transpose2d(
            signal, gain_filters(block), stride=stride, padding=padding, output_padding=unreached
        )
    return signal


def project_unit(
    net: CNN, features: Sequence[tuple[Tensor, Tensor]], layer: int, filter_: int, row: int, column: int
) -> Tensor:
    """Project one unit of one image: its activation kept, all others of its layer set to zero.

    Args:
        net: The network, in evaluation mode.
        features: What `net.features` returned for one image.
        layer: 0 for conv1 to 3 for conv4.
        filter_: Index of the filter.
        row: Row of the unit in the pooled map.
        column: Column of the unit in the pooled map.

    Returns:
        (3, rows, columns) of the image, in units of normalised pixels, signed.
    """
    pooled = features[layer][0]
    only = torch.zeros_like(pooled)
    only[0, filter_, row, column] = pooled[0, filter_, row, column]
    return project(net, layer, only, [switches for _, switches in features], IMAGE_SIZE)[0]


def check_image(image: object) -> int | Path:
    """Return the setting IMAGE as an index or a path.

    Raises:
        SystemExit: If it is neither.
    """
    if isinstance(image, str | Path):
        return Path(image)
    if isinstance(image, int | np.integer) and not isinstance(image, bool):
        return int(image)
    raise SystemExit(f"IMAGE is {image!r}; expected an index into the test split or the path of a picture")


def load_picture(path: Path) -> NDArray[np.uint8]:
    """Read a picture file, crop the centre to a square and resize it to 96 pixels: uint8 (3, 96, 96).

    The picture is turned as its camera says (EXIF), put on white where it is transparent, and of an animation
    the first frame is taken.

    Raises:
        SystemExit: If the file is missing, no picture, or so large that decoding it could fill the memory.
    """
    given = f"IMAGE is {str(path)!r}"
    if not path.is_file():
        raise SystemExit(f"{given}; no such file: give a picture file or an index into the test split")
    try:
        with warnings.catch_warnings(), Image.open(path) as file:  # reads no more than the header
            warnings.simplefilter("ignore")  # what matters of it raises below
            width, height = file.size
            if width * height > 50_000_000 or max(width, height) > 100 * min(width, height):
                raise ValueError(
                    f"{width:,} x {height:,} pixels: crop it to under 50 million, sides under 1:100"
                )
            picture = ImageOps.exif_transpose(file)
            side = min(width, height)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.crop((left, top, left + side, top + side))
            if square.mode.startswith("I;16"):  # 16 bits a pixel; convert() would cut them off at 255
                square = Image.fromarray((np.asarray(square) >> 8).astype(np.uint8))
            elif square.mode in ("I", "F"):
                raise ValueError("more than 16 bits a channel: save it with 8")
            if square.has_transparency_data:
                square = square.convert("RGBA")
                square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
            square = square.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    except Exception as error:  # a damaged picture can raise nearly anything
        if no_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(f"{given}, which cannot be read as a picture: {reason}") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # (rows, columns, 3) -> (3, ...)


def strongest_units(pooled: Tensor, count: int) -> list[tuple[int, int, int]]:
    """Return (filter, row, column) of the strongest unit of each of the `count` strongest filters.

    Args:
        pooled: Pooled maps of one image, (1, filters, rows, columns).
        count: How many; filters that do not fire at all are left out.
    """
    _, filters, _, columns = pooled.shape
    values, places = pooled[0].flatten(1).max(dim=1)
    best = values.argsort(descending=True, stable=True)[: min(count, filters)]
    return [(int(f), int(places[f]) // columns, int(places[f]) % columns) for f in best if values[f] > 0]


class Unit(NamedTuple):
    """One unit with its projection, as the figure shows it.

    Attributes:
        filter: Index of the filter.
        value: Activation.
        top: Row of the top left pixel of its receptive field, negative where the field crosses the border.
        left: Column likewise.
        size: Rows and columns of the receptive field.
        projection: (3, rows, columns) of the whole image, signed, in units of normalised pixels.
    """

    filter: int
    value: float
    top: int
    left: int
    size: int
    projection: NDArray[np.float32]


def project_strongest(
    net: CNN, features: Sequence[tuple[Tensor, Tensor]], layer: int, count: int
) -> list[Unit]:
    """Project the strongest unit of each of the `count` filters of a layer that one image drives most."""
    pooled, switches = features[layer]
    field, conv_size = receptive_fields(net)[layer], frame_sizes(net)[1][layer]
    units = []
    for filter_, row, column in strongest_units(pooled, count):
        projection = project_unit(net, features, layer, filter_, row, column).cpu().numpy()
        at_row, at_column = divmod(int(switches[0, filter_, row, column]), conv_size)
        top, left = at_row * field.jump + field.start, at_column * field.jump + field.start
        value = float(pooled[0, filter_, row, column])
        units.append(Unit(filter_, value, top, left, field.size, projection))
    return units


def robust_scale(values: NDArray[Any]) -> float:
    """Return the 99.5th percentile of the magnitudes above zero, which few outliers move; 1 for none."""
    magnitudes = np.abs(values[values != 0])
    return float(np.percentile(magnitudes, 99.5)) if magnitudes.size else 1.0


def displayed(projections: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map signed projections to [0, 1] for display: grey is zero, 0.5 + p / (2 m).

    Args:
        projections: (..., 3, rows, columns); m, their `robust_scale`, is one for all, so that panels shown
            together can be compared.

    Returns:
        (..., rows, columns, 3)
    """
    shown: NDArray[np.float32] = np.clip(0.5 + projections / (2 * robust_scale(projections)), 0, 1).astype(
        np.float32
    )
    return np.moveaxis(shown, -3, -1)


def window_of(frame: NDArray[Any], top: int, left: int, size: int, outside: float) -> NDArray[Any]:
    """Cut the window of `size` pixels at (top, left) out of a frame (3, rows, columns).

    The window may cross the border; `outside` fills what lies beyond it.
    """
    padded = np.pad(frame, ((0, 0), (size, size), (size, size)), constant_values=outside)
    return padded[:, top + size : top + 2 * size, left + size : left + 2 * size]


def draw(image: NDArray[np.uint8], layers: dict[str, list[Unit]], columns: int, heading: str) -> Figure:
    """Draw, for each layer, where its strongest units look, their projections and the patches under them.

    Args:
        image: uint8 (3, 96, 96).
        layers: For each layer's name its units, strongest first.
        columns: Units a layer at most.
        heading: Title of the figure.
    """
    pixels = (image / 255).astype(np.float32)
    fig = plt.figure(
        figsize=(1.15 * (columns + 2) + 0.2, 2.45 * len(layers) + 0.5), dpi=200, layout="constrained"
    )
    axes = fig.subplots(2 * len(layers), columns + 2, squeeze=False)
    for ax in axes.ravel():
        ax.axis("off")
    for pair, (layer, units) in zip(axes.reshape(len(layers), 2, -1), layers.items(), strict=True):
        spec = pair[0, 0].get_subplotspec().get_gridspec()
        row = pair[0, 0].get_subplotspec().rowspan.start
        whole = fig.add_subplot(spec[row : row + 2, :2])
        whole.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
        whole.set(xticks=[], yticks=[], xlim=(-0.5, IMAGE_SIZE - 0.5), ylim=(IMAGE_SIZE - 0.5, -0.5))
        whole.set_title(f"{layer}, receptive field {units[0].size if units else 0} px", fontsize=8)
        if not units:
            continue
        panels = displayed(
            np.stack([window_of(unit.projection, unit.top, unit.left, unit.size, 0) for unit in units])
        )
        colors = sns.color_palette("bright", len(units))
        for unit, panel, color, (upper, lower) in zip(units, panels, colors, pair.T[2:], strict=False):
            frame = Rectangle(
                (unit.left - 0.5, unit.top - 0.5), unit.size, unit.size, fill=False, ec=color, lw=1.4
            )
            whole.add_patch(frame)
            patch = window_of(pixels, unit.top, unit.left, unit.size, 1).transpose(1, 2, 0)
            for ax, picture in ((upper, panel), (lower, patch)):
                ax.imshow(picture, interpolation="nearest")
                ax.axis("on")
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set(color=color, linewidth=1.4)
            upper.set_title(f"filter {unit.filter}\n{unit.value:.2f}", fontsize=7)
    fig.suptitle(heading, fontsize=9, parse_math=False)
    return fig


def main() -> None:
    """Project one image's strongest units of each layer and draw them."""
    sns.set_theme(context="paper", style="white", palette="colorblind")
    chosen = LAYERS if LAYER == "all" else (LAYERS[layer_index(LAYER)],)
    check_numbers(1, 30, N_FILTERS=N_FILTERS)
    checkpoint_path, data_dir, figure = check_paths(CHECKPOINT=CHECKPOINT, DATA_DIR=DATA_DIR, FIGURE=FIGURE)
    check_file_name(".png", FIGURE=figure)
    wanted = check_image(IMAGE)
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(checkpoint_path, device)
    if isinstance(wanted, int):
        split = load_split(checkpoint.dataset, data_dir, "test")
        if not 0 <= wanted < len(split.images):
            raise SystemExit(f"IMAGE is {wanted}; the test split has images 0 to {len(split.images) - 1}")
        if split.labels.max() >= len(checkpoint.class_names):
            classes = f"{checkpoint_path} names {len(checkpoint.class_names)} classes, the data have more"
            raise SystemExit(f"{classes}: run `uv run train_CNN.py` again")
        image = split.images[wanted]
        name = f"test image {wanted} of {title(checkpoint.dataset)}"
        truth = f", class {checkpoint.class_names[split.labels[wanted]]}"
    else:
        image, name, truth = load_picture(wanted), wanted.name, ""
    prepare_folders("FIGURE", figure.parent)
    print(
        f"projecting {name}, {', '.join(chosen)}, network trained on {title(checkpoint.dataset)}, "
        f"on {device}, torch {torch.__version__}"
    )
    net = checkpoint.net
    batch = normalise(torch.from_numpy(image[None]).to(device), checkpoint.mean, checkpoint.std)
    features = net.features(batch)
    probabilities = net.classify(features[-1][0]).softmax(dim=1)[0]
    guess = checkpoint.class_names[int(probabilities.argmax())]
    found = {layer: project_strongest(net, features, LAYERS.index(layer), N_FILTERS) for layer in chosen}
    for layer, units in found.items():
        print(
            f"{layer}: strongest filters " + ", ".join(f"{unit.filter} ({unit.value:.2f})" for unit in units)
        )
    heading = f"{name}{truth}, predicted {guess} ({float(probabilities.max()):.0%}); network trained on "
    heading += f"{title(checkpoint.dataset)}\nabove: projections of the strongest filters, with number and "
    heading += "activation; grey is zero. below: the image there, white outside"
    save_figure(draw(image, found, N_FILTERS, heading), figure)
    print(f"wrote {figure}\nnext: uv run deconv_full.py")


if __name__ == "__main__":
    with plain_errors():
        main()
