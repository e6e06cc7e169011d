"""Draw what the filters of conv4 respond to, and a page in which every filter can be explored.

Run:    uv run heatmap.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_*.pth; outputs/activations.npz, outputs/projections.npz;
        outputs/filter_metrics.csv, outputs/class_metrics.csv, outputs/ablation.csv, outputs/trust.csv;
        data/stl10_binary/test_{X,y}.bin
Writes: outputs/heatmaps/class_filter_heatmap.png, outputs/heatmaps/class_*.png, outputs/heatmaps/images.png;
        outputs/heatmaps/occlusion.png, outputs/occlusion.csv;
        outputs/heatmaps/invariance.png, outputs/invariance.csv;
        outputs/explorer/index.html, outputs/explorer/conv*.webp, outputs/explorer/conv*/*.webp

The projection of a filter in an image starts from the unit with the filter's peak activation there. The
magnitude of a projection at a pixel is the sum over RGB of its absolute values, in normalised pixels.

Zeiler & Fergus (arXiv 1311.2901) change images in two ways to see what the network uses. A grey square
slides over them (Figure 7), and they are translated, scaled and rotated (Figure 5). The examples are test
images that are classified correctly; means over many images include mistakes. Grey is the mean colour of the
training images, which is 0 in normalised pixels.
"""

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import affine
from tqdm import tqdm

from analyse_projections import NEARLY_DEAD, class_means, class_selectivity
from CNN import CNN, IMAGE_SIZE, LAYERS, Checkpoint, atomic_write, choose_device, load_checkpoint, run_script
from deconv import PAGE_STYLE, class_colours, crop, displayed, page_json, robust_scale, text_colour_on
from deconv_full import (
    EVOLUTION_IMAGES,
    LEVELS,
    Projector,
    Units,
    project_evolution,
    project_units,
    read_snapshots,
    strongest_of,
)
from load_data import (
    TITLES,
    Array,
    Split,
    load_arrays,
    load_checkpoint_split,
    load_table,
    save_figure,
    save_table,
    set_style,
    shorten,
    tile,
    wilson_interval,
)

TOP_FILTERS = 4  # filters drawn of each class
TOP_IMAGES = 3  # images drawn of each filter: the images of the class with its highest peak activations
SUMMED_FILTERS = 16  # strongest filters of an image, whose projections are added up in images.png
OCCLUDER = 24  # pixels, side of the grey square that slides over an image: it hides a head or a wheel
OCCLUSION_STRIDE = 2  # pixels from one position of the square to the next
INVARIANCE_IMAGES = 5  # images in invariance.png, each of another class; the paper has 5
MEAN_IMAGES = 500  # images behind the means there, as many of each class, however they are classified
AMOUNTS: dict[str, list[float]] = {  # how far images are transformed
    "shift": [*range(-24, 25, 2)],  # pixels, down is positive
    "zoom": [1 + step / 20 for step in range(17)],  # factor
    "angle": [*range(0, 351, 10)],  # degrees clockwise
}
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds stl10_binary, or your own folders train and test
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
OUTPUTS = Path("outputs")  # where results go

VEHICLES = ("airplane", "car", "ship", "truck")  # drawn above the animals
FILTERS_PER_LINE = 60  # columns of class_filter_heatmap.png
MOST_CLASSES = 100  # in one figure: with more, figures become too large to be drawn
TRANSFORMATIONS = {  # arguments of `transform`, and what figures call them
    "shift": "translation (pixels)",
    "zoom": "scale (factor)",
    "angle": "rotation (degrees)",
}


class Inputs(NamedTuple):
    """What all figures are made from.

    Attributes:
        checkpoint: The network and what made it.
        test: The test images with their labels.
        maxima: Peak activation of each filter of conv4 in each test image, (images, filters).
        positions: Row and column of the peak in the pooled map, (images, filters, 2).
        filters: filter_metrics.csv.
        classes: class_metrics.csv.
        ablation: ablation.csv.
        trust: trust.csv.
        outputs: Folder of the results.
    """

    checkpoint: Checkpoint
    test: Split
    maxima: Array
    positions: Array
    filters: pd.DataFrame
    classes: pd.DataFrame
    ablation: pd.DataFrame
    trust: pd.DataFrame
    outputs: Path

    @property
    def net(self) -> CNN:
        """The trained network."""
        return self.checkpoint.net

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        return self.checkpoint.class_names

    @property
    def short_names(self) -> list[str]:
        """Names of the classes as figures show them, cut where they are long."""
        return [shorten(name) for name in self.names]

    @property
    def source(self) -> str:
        """What titles say of the images and of the network."""
        data = f"{len(self.test.images):,} test images of {TITLES[self.checkpoint.dataset]}"
        return f"{data} ({self.checkpoint.accuracy()})"

    def peak_units(self, image_indices: Array, filter_indices: Array) -> Units:
        """Return the unit with each filter's peak activation in each image, numbers (units,) each."""
        return strongest_of(self.maxima, self.positions, image_indices, filter_indices)

    def leaves_out(self, figure: str, one_class: bool = False) -> bool:
        """Return whether a figure of conv4 cannot be drawn; if so, print the reason in one line."""
        reason = ""
        if not one_class and len(self.names) > MOST_CLASSES:
            reason = f"{len(self.names):,} classes are too many for one figure"
        if not self.maxima.any():
            reason = "no filter of conv4 fires on any test image"
        if reason:
            print(f"{figure} is left out: {reason}", flush=True)
        return bool(reason)

    def save_figure(self, name: str, figure: Figure, title: str, caption: str = "") -> None:
        """Write a figure as heatmaps/NAME.png: above it title and source, below it how it is read."""
        figure.suptitle(f"{title}\n{self.source}", fontsize=9)
        if caption:
            width = int(16 * figure.get_figwidth())  # letters in a line: about 16 an inch
            figure.supxlabel(textwrap.fill(caption, width), fontsize=8)
        save_figure(self.outputs / "heatmaps" / f"{name}.png", figure)


def read_inputs(checkpoint: Checkpoint, data_dir: Path, outputs: Path) -> Inputs:
    """Read the test images and what earlier stages wrote of this checkpoint into `outputs`.

    Raises:
        SystemExit: If a file is missing, damaged or made from another checkpoint.
    """
    maxima, positions = load_arrays(outputs / "activations.npz", checkpoint, "conv4_max", "conv4_position")
    return Inputs(
        checkpoint=checkpoint,
        maxima=maxima,
        positions=positions,
        filters=load_table(outputs / "filter_metrics.csv", checkpoint),
        classes=load_table(outputs / "class_metrics.csv", checkpoint),
        ablation=load_table(outputs / "ablation.csv", checkpoint),
        trust=load_table(outputs / "trust.csv", checkpoint),
        test=load_checkpoint_split(checkpoint, data_dir, "test"),
        outputs=outputs,
    )


def remove_old(outputs: Path) -> None:
    """Remove what an earlier run of this script wrote: it may have had other classes or more filters."""
    figures = ("class_*.png", "images.png", "occlusion.png", "invariance.png")
    for pattern in (*(f"heatmaps/{name}" for name in figures), "occlusion.csv", "invariance.csv"):
        for path in outputs.glob(pattern):
            path.unlink()
    for path in [*outputs.glob("explorer/index.html"), *outputs.glob("explorer/**/*.webp")]:
        path.unlink()


def show(ax: Axes, picture: Array, title: str = "", **options: Any) -> AxesImage:
    """Show pixels below a title and without ticks; return what a colour bar is made for."""
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=8, pad=3)
    return ax.imshow(picture, interpolation="nearest", **options)


# ---------------------------------------------------------------- over all classes


class Group(NamedTuple):
    """Filters that prefer one class and stand side by side in a line of the heat map."""

    row: int  # of the preferred class
    filters: list[int]


def break_into_lines(groups: Sequence[Sequence[int]], columns: int) -> list[list[Group]]:
    """Break groups of filters, one a class, into lines of `columns` columns.

    One column stays empty after each group.
    """
    lines: list[list[Group]] = [[]]
    for row, filters in enumerate(groups):
        for start in range(0, len(filters), columns):
            part = list(filters[start : start + columns])
            used = sum(len(group.filters) + 1 for group in lines[-1])
            if used + len(part) > columns:
                lines.append([])
            lines[-1].append(Group(row, part))
    return lines


def draw_group(ax: Axes, relative: Array, group: Group, left: int) -> AxesImage:
    """Draw the columns of a group from column `left` on, frame the preferred class, number the filters."""
    rows = len(relative)
    width = len(group.filters)
    drawn = ax.imshow(
        relative[:, group.filters],
        aspect="auto",
        extent=(left, left + width, rows, 0),
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=0,
        vmax=2,
    )
    frame = Rectangle((left, group.row), width, 1, fill=False, edgecolor="black", linewidth=0.8)
    ax.add_patch(frame)
    for column, number in enumerate(group.filters, start=left):
        ax.text(column + 0.5, rows + 0.3, str(number), rotation=90, ha="center", va="top", fontsize=6)
    return drawn


def draw_class_filters(means: Array, filters: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draw classes x filters: mean peak activation on the class over the filter's mean of all classes.

    Args:
        means: What `class_means` returned, (classes, filters).
        filters: Rows of filter_metrics.csv for this layer; dead filters are left out.
        names: Names of the classes.
    """
    # vehicles, then animals
    order = sorted(range(len(names)), key=lambda label: names[label] not in VEHICLES)

    # the filters of a class in the order of `rank_filters`, nearly dead ones last
    active = filters[~filters["dead"]]
    active = active.assign(nearly_dead=active["activation_nonzero"] < NEARLY_DEAD)
    keys = ["nearly_dead", "selectivity", "activation_mean", "filter"]
    active = active.sort_values(keys, ascending=[True, False, False, True])
    groups = [active.loc[active["preferred_class"] == names[label], "filter"].tolist() for label in order]
    lines = break_into_lines(groups, FILTERS_PER_LINE)

    height = 1.1 + (0.11 * len(names) + 0.4) * len(lines)
    fig, axes = plt.subplots(len(lines), 1, figsize=(8.3, height), squeeze=False, layout="constrained")
    relative = (means / means.mean(axis=0).clip(min=1e-12))[order]
    for ax, line in zip(axes.flat, lines, strict=True):
        left = 0
        for group in line:
            drawn = draw_group(ax, relative, group, left)
            left += len(group.filters) + 1
        ax.set(xlim=(0, FILTERS_PER_LINE), ylim=(len(names), 0), xticks=[])
        ax.set_yticks(np.arange(len(names)) + 0.5, [shorten(names[label]) for label in order], fontsize=7)
        sns.despine(ax=ax, left=True, bottom=True)

    bar = fig.colorbar(drawn, ax=axes, location="bottom", aspect=50, shrink=0.6, pad=0.02, extend="max")
    bar.set_label("mean peak activation on the class / mean over all classes")
    return fig


def picture_all_classes(inputs: Inputs) -> None:
    """Write class_filter_heatmap.png: how each filter of conv4 responds to each class."""
    if inputs.leaves_out("class_filter_heatmap.png"):
        return
    conv4 = inputs.filters[inputs.filters["layer"] == "conv4"]
    figure = draw_class_filters(class_means(inputs.classes), conv4, inputs.names)
    caption = (
        "Each column is a filter, with its number below. Filters stand by their preferred class, the most "
        f"selective first; those that fire on less than {100 * NEARLY_DEAD:g} % of the test images come last "
        "in their class. The frame marks the preferred class, which by definition has the largest value of "
        "the column. "
        f"Dead filters, here {conv4['dead'].sum()}, are left out."
    )
    inputs.save_figure("class_filter_heatmap", figure, "Filters of conv4 over all classes", caption)


# ---------------------------------------------------------------- projections of many units, added up


class SummedProjections(NamedTuple):
    """Projections added up in the full frame."""

    magnitude: Array  # (..., 96, 96)
    signed: Array  # (..., 3, 96, 96)


def sum_projections(
    inputs: Inputs, image_indices: Array, filter_indices: Array, desc: str
) -> SummedProjections:
    """Project filters of conv4 in images and add up what stands along the last axis.

    `image_indices` and `filter_indices` are broadcast against each other, as in `maxima[images, filters]`: of
    shapes (50,) and (4, 1) they make four sums over 50 images, one for each filter. `desc` labels the
    progress bar.
    """
    image_indices, filter_indices = np.broadcast_arrays(image_indices, filter_indices)
    shape = image_indices.shape[:-1]
    units = inputs.peak_units(image_indices.ravel(), filter_indices.ravel())
    count = int(np.prod(shape))
    sums = np.arange(count).repeat(image_indices.shape[-1])  # to which sum each unit belongs

    magnitude = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE))
    signed = np.zeros((count, 3, IMAGE_SIZE, IMAGE_SIZE))
    projector = Projector(inputs.net, len(LAYERS) - 1)
    for indices, origins, windows in project_units(projector, inputs.test.images, units, desc):
        # a window holds the part inside the image: it starts at the border where the origin lies beyond
        for number, (top, left), window in zip(sums[indices], origins.clip(min=0), windows, strict=True):
            height, width, _ = window.shape
            rows = slice(top, top + height)
            columns = slice(left, left + width)
            magnitude[number, rows, columns] += np.abs(window).sum(axis=2)
            signed[number, :, rows, columns] += window.transpose(2, 0, 1)
    return SummedProjections(
        magnitude.reshape(*shape, IMAGE_SIZE, IMAGE_SIZE), signed.reshape(*shape, 3, IMAGE_SIZE, IMAGE_SIZE)
    )


# ---------------------------------------------------------------- in each class


def rank_filters(filters: pd.DataFrame, classes: pd.DataFrame, names: list[str], label: int) -> pd.DataFrame:
    """Order the active filters of conv4 by how well they stand for the class `label`.

    First come the filters that prefer the class, by selectivity. Where they are few, filters that prefer
    another class follow, by their selectivity for this one. Nearly dead filters come last: an index that
    rests on a handful of images is large by chance.

    Args:
        filters: filter_metrics.csv.
        classes: class_metrics.csv.
        names: Names of all classes.
        label: Number of the class.

    Returns:
        One row a filter. The columns selectivity, activation_mean and prefers refer to this class; the others
        are columns of filter_metrics.csv.
    """
    conv4 = filters[filters["layer"] == "conv4"].set_index("filter")
    means = class_means(classes)
    columns = {
        "selectivity": class_selectivity(means)[label],
        "activation_mean": means[label],
        "prefers": conv4["preferred_class"] == names[label],
        "nearly_dead": conv4["activation_nonzero"] < NEARLY_DEAD,
        **conv4[["preferred_class", "preferred_share", "top_class"]],
    }
    ranking = pd.DataFrame(columns, index=conv4.index)[~conv4["dead"]].reset_index()
    order = ["nearly_dead", "prefers", "selectivity", "activation_mean", "filter"]
    return ranking.sort_values(order, ascending=[True, False, False, False, True], ignore_index=True)


def describe_ranked(filter_row: Any) -> str:
    """Return what stands beside the row of a filter: its numbers, a row of `rank_filters`."""
    lines = [
        f"filter {filter_row.filter}",
        f"selectivity {filter_row.selectivity:.2f}",
        f"mean peak activation {filter_row.activation_mean:.2f}",
        f"prefers {shorten(filter_row.preferred_class)}",
        f"in {100 * filter_row.preferred_share:.0f} % of bootstrap samples",
    ]
    if str(filter_row.top_class) != str(filter_row.preferred_class):
        lines.append(f"top images: most often\n{shorten(filter_row.top_class)}")
    return "\n".join(lines)


def draw_class(ranking: pd.DataFrame, means: Array, images: Array, magnitudes: Array, peaks: Array) -> Figure:
    """Draw a class's top filters, one a row: mean magnitude, then pairs of image and projection laid over it.

    Each filter has a scale of its own, because what makes a filter weak is its gain, not what it shows.

    Args:
        ranking: What `rank_filters` says of these filters.
        means: Magnitude averaged over all images of the class, (filters, 96, 96).
        images: The images of the class with the highest peak activations, (filters, images, 3, 96, 96) uint8.
        magnitudes: Magnitudes of the projections in these images, (filters, images, 96, 96).
        peaks: Peak activations in these images, (filters, images).
    """
    count, per_filter = images.shape[:2]
    size = (2.4 + 2.5 * per_filter, 1.4 + 1.4 * count)
    fig, axes = plt.subplots(count, 1 + 2 * per_filter, figsize=size, squeeze=False, layout="constrained")
    colours = sns.color_palette("rocket", as_cmap=True)(np.linspace(0.3, 1, 256))
    colours[:, 3] = np.linspace(0, 1, 256) ** 0.6  # clear at zero, so that the image stays visible
    overlay = ListedColormap(colours)

    for k, filter_row in enumerate(ranking.itertuples()):
        title = "mean over the class" if k == 0 else ""
        largest = means[k].max() or 1  # 0 where the filter fires on no image of the class
        mean = show(axes[k, 0], means[k] / largest, title, cmap="mako", vmin=0, vmax=1)
        numbers = describe_ranked(filter_row)
        axes[k, 0].set_ylabel(numbers, rotation=0, ha="right", va="center", fontsize=8)
        scale = robust_scale(magnitudes[k])
        for i in range(per_filter):
            left, right = axes[k, 1 + 2 * i : 3 + 2 * i]
            picture = np.moveaxis(images[k, i], 0, 2)
            show(left, picture, f"peak activation {peaks[k, i]:.2f}")
            # under the projection: the image in grey, dimmed, since its brightest pixel is 255 of 400
            show(right, picture.mean(axis=2), cmap="gray", vmin=0, vmax=400)
            over = show(right, magnitudes[k, i] / scale, cmap=overlay, vmin=0, vmax=1)

    below: dict[str, Any] = {"location": "bottom", "pad": 0.02}
    fig.colorbar(mean, ax=axes[:, 0], aspect=10, label="mean magnitude\n(largest: 1)", **below)
    bar = fig.colorbar(over, ax=axes[:, 1:], aspect=40, shrink=0.6, extend="max", **below)
    bar.ax.set_facecolor("0.3")
    bar.set_label("magnitude of one projection (99.5th percentile of the row: 1)")
    return fig


def picture_class(inputs: Inputs, label: int, filter_count: int, image_count: int) -> None:
    """Write class_K_NAME.png: the top filters of a class and their projections in its images."""
    name = inputs.names[label]
    if inputs.leaves_out(f"the figure of {name}", one_class=True):
        return
    ranking = rank_filters(inputs.filters, inputs.classes, inputs.names, label).head(filter_count)
    filters = ranking["filter"].to_numpy()
    members = np.flatnonzero(inputs.test.labels == label)
    order = np.argsort(-inputs.maxima[members][:, filters], axis=0, kind="stable")
    top_images = members[order[:image_count]].T  # (filters, images)

    over_class = sum_projections(inputs, members, filters[:, None], f"{name}, all images")
    # each image by itself: a sum over a last axis of length 1
    single = sum_projections(inputs, top_images[:, :, None], filters[:, None, None], f"{name}, top images")

    figure = draw_class(
        ranking,
        over_class.magnitude / len(members),
        inputs.test.images[top_images],
        single.magnitude,
        inputs.maxima[top_images, filters[:, None]],
    )
    caption = (
        f"Left: the magnitude of a filter's projections, averaged over the {len(members):,} images of the "
        "class. Right: the images of the class with the filter's highest peak activations. Beside each image "
        "stands the magnitude of its projection, laid over it. Each filter has a scale of its own."
    )
    encoding = sys.getfilesystemencoding()
    possible = name.encode(encoding, "replace").decode(encoding)  # letters that file names can have here
    safe_name = re.sub(r"[^\w-]+", "_", possible)[:40]
    title = f"{inputs.short_names[label]}: top {len(filters)} filters of conv4"
    inputs.save_figure(f"class_{label}_{safe_name}", figure, title, caption)


# ---------------------------------------------------------------- in single images


def draw_images(images: Array, sums: SummedProjections, titles: Sequence[str]) -> Figure:
    """Draw images, two a row, each beside the summed magnitude and the signed sum of its projections.

    Args:
        images: uint8 (images, 3, 96, 96).
        sums: For each image the sum of its projections.
        titles: What stands above each image.
    """
    rows = -(-len(images) // 2)
    size = (8, 1.6 + 1.42 * rows)
    fig, axes = plt.subplots(rows, 6, figsize=size, squeeze=False, layout="constrained")
    panels = axes.reshape(-1, 3)
    for ax in panels[len(images) :].flat:
        ax.axis("off")

    coloured = displayed(sums.signed)
    scale = robust_scale(sums.magnitude)
    for k, title in enumerate(titles):
        first_row = k < 2
        left, middle, right = panels[k]
        show(left, np.moveaxis(images[k], 0, 2), title)
        above = "sum of magnitudes" if first_row else ""
        drawn = show(middle, sums.magnitude[k], above, cmap="mako", vmin=0, vmax=scale)
        show(right, coloured[k], "signed sum" if first_row else "")

    bar = fig.colorbar(drawn, ax=axes, location="bottom", aspect=40, pad=0.02, shrink=0.6, extend="max")
    bar.set_label("sum of magnitudes (normalised pixels)")
    return fig


def picture_images(inputs: Inputs, filter_count: int) -> None:
    """Write images.png: the first image of each class, and its strongest filters' projections added up."""
    if inputs.leaves_out("images.png"):
        return
    first = np.array([np.flatnonzero(inputs.test.labels == label)[0] for label in range(len(inputs.names))])
    maxima = inputs.maxima[first]  # (classes, filters)
    if not maxima.any():
        print("images.png is left out: no filter of conv4 fires in the first image of any class", flush=True)
        return
    strongest = np.argsort(-maxima, axis=1, kind="stable")[:, :filter_count]
    sums = sum_projections(inputs, first[:, None], strongest, "images")

    totals = maxima.sum(axis=1)
    summed = np.take_along_axis(maxima, strongest, axis=1).sum(axis=1)
    shares = 100 * summed[totals > 0] / totals[totals > 0]
    caption = (
        f"The projections of the {filter_count} filters of conv4 with the highest peak activations in an "
        f"image are added up. These filters have {shares.min():.0f} to {shares.max():.0f} % of the sum of "
        "all filters' peak activations in the image. In the signed sum grey is zero, with one scale for all."
    )
    figure = draw_images(inputs.test.images[first], sums, inputs.short_names)
    inputs.save_figure("images", figure, "First image of each class", caption)


# ---------------------------------------------------------------- occlusion (section 4.2, Figure 7)


def predict(net: CNN, images: Array) -> Array:
    """Return the class the network takes each image for, (images,)."""
    batches = torch.from_numpy(images).split(32)
    return np.concatenate([net(net.normalise(batch)).argmax(dim=1).cpu().numpy() for batch in batches])


def first_correct(predictions: Array, labels: Array) -> Array:
    """Return, for each class in turn, its first image that is classified correctly, if there is one."""
    correct_images = pd.Series(np.flatnonzero(predictions == labels))
    return correct_images.groupby(labels[correct_images]).first().to_numpy(np.int64)


class Occluder(NamedTuple):
    """A grey square that slides over an image; all in pixels.

    Its centres are `stride` pixels apart, the first one stride // 2 from the border. The border cuts squares
    that reach beyond it.
    """

    side: int
    stride: int

    @property
    def centres(self) -> Array:
        """Rows (columns alike) of the centres."""
        return np.arange(self.stride // 2, IMAGE_SIZE, self.stride)

    def covered(self) -> Array:
        """Return which rows (columns alike) the square covers at each position, (positions, 96)."""
        starts = self.centres[:, None] - self.side // 2
        pixels = np.arange(IMAGE_SIZE)
        return (pixels >= starts) & (pixels < starts + self.side)


class Occlusion(NamedTuple):
    """What the network makes of an image with the square at each position, arrays (down, across, ...)."""

    map_left: Array  # sum over the filter's map, as a share of the sum without the square
    unit_left: Array  # activation of the unit with the filter's peak, as a share of it without the square
    probability: Array  # of each class, (down, across, classes)
    label: int  # the true class


def occlusion_sensitivity(
    image: Array, label: int, unit: Sequence[int], net: CNN, covered: Array
) -> Occlusion:
    """Slide a grey square over an image; measure a filter of conv4, one of its units, and the classes.

    The paper measures the sum over a map (Figure 7), the one with the largest sum in the whole image. Here
    the filter is the one with the highest peak activation, because a projection shows one unit.

    Args:
        image: uint8 (3, 96, 96).
        label: Its class.
        unit: Filter, row and column in the pooled map.
        net: The network.
        covered: What `Occluder.covered` returned.
    """
    normalised = net.normalise(torch.from_numpy(image[None]))
    filter_index, row, column = unit
    pooled, _ = net.features(normalised)[-1]  # (1, filters, rows, columns)
    before = pooled[0, filter_index]  # (rows, columns)

    lines = torch.from_numpy(covered).to(normalised.device)
    map_left = []
    unit_left = []
    probabilities = []
    for rows in lines:  # one copy of the image for each position across
        squares = rows[None, :, None] & lines[:, None, :]  # (positions across, 96, 96)
        occluded = normalised.masked_fill(squares[:, None], 0)
        pooled, _ = net.features(occluded)[-1]  # (positions across, filters, rows, columns)
        maps = pooled[:, filter_index]
        map_left.append(maps.sum(dim=(1, 2)) / before.sum())
        # pooled: a neighbour in the pooling region may take over
        unit_left.append(maps[:, row, column] / before[row, column])
        probabilities.append(net.classify(pooled).softmax(dim=1))
    return Occlusion(
        map_left=torch.stack(map_left).cpu().numpy(),
        unit_left=torch.stack(unit_left).cpu().numpy(),
        probability=torch.stack(probabilities).cpu().numpy(),
        label=label,
    )


def describe_mistakes(occlusion: Occlusion, names: Sequence[str]) -> str:
    """Say which other classes come first, with the share of the positions: `dog 12 %, cat 3 %`."""
    winners = occlusion.probability.argmax(axis=2)
    shares = np.bincount(winners.ravel(), minlength=len(names)) / winners.size
    others = [label for label in np.argsort(-shares, kind="stable") if label != occlusion.label]
    return ", ".join(
        f"{names[label]} {100 * shares[label]:.0f} %" for label in others if shares[label] >= 0.005
    )


def tabulate_occlusion(occlusions: Sequence[Occlusion], units: Units, names: Sequence[str]) -> pd.DataFrame:
    """Return occlusion.csv, one row an image.

    Args:
        occlusions: What the square did to each image.
        units: The unit that was measured in each image.
        names: Names of the classes.
    """
    columns = {
        "image": units.image,  # index into the test split
        "filter": units.filter,  # the filter of conv4 with the highest peak activation
        "label": [names[occlusion.label] for occlusion in occlusions],  # the true class
        "activation": units.value,  # peak activation without the square
        # what the square leaves of the sum over the map and of the unit's activation, where it leaves least
        "lowest_map_left": [occlusion.map_left.min() for occlusion in occlusions],
        "lowest_unit_left": [occlusion.unit_left.min() for occlusion in occlusions],
        "taken_for": [describe_mistakes(occlusion, names) for occlusion in occlusions],
    }
    return pd.DataFrame(columns)


def mark_lowest(ax: Axes, unit_left: Array, occluder: Occluder) -> None:
    """Frame the square that leaves least of the unit's activation."""
    down, across = np.unravel_index(unit_left.argmin(), unit_left.shape)
    left = occluder.centres[across] - occluder.side / 2
    top = occluder.centres[down] - occluder.side / 2
    for colour, width in (("black", 2.2), ("white", 1.0)):  # visible on any image
        frame = Rectangle(
            (left, top), occluder.side, occluder.side, fill=False, edgecolor=colour, linewidth=width
        )
        ax.add_patch(frame)


def outline_mistakes(ax: Axes, occlusion: Occlusion, occluder: Occluder) -> None:
    """Outline the positions at which another class than the true one comes first."""
    mistaken = occlusion.probability.argmax(axis=2) != occlusion.label
    if mistaken.any():
        ax.contour(occluder.centres, occluder.centres, mistaken, levels=[0.5], colors="white", linewidths=1)


def draw_occlusion(
    images: Array, occlusions: Sequence[Occlusion], magnitudes: Array, table: pd.DataFrame, occluder: Occluder
) -> Figure:
    """Draw maps of an occluded image, one image a row (Figure 7 of the paper).

    Args:
        images: uint8 (images, 3, 96, 96).
        occlusions: What the square did to each image.
        magnitudes: Magnitude of the projection of each image's unit, (images, 96, 96).
        table: occlusion.csv.
        occluder: The square.
    """
    size = (8, 2.2 + 1.5 * len(images))
    fig, axes = plt.subplots(len(images), 5, figsize=size, squeeze=False, layout="constrained")
    whole: dict[str, Any] = {"extent": (0, IMAGE_SIZE, IMAGE_SIZE, 0)}
    # a value of a map stands for stride x stride pixels
    first = occluder.centres[0] - occluder.stride / 2
    last = occluder.centres[-1] + occluder.stride / 2
    maps: dict[str, Any] = {"extent": (first, last, last, first)}

    # Colours of shares are symmetric about 1. These and the magnitudes have one scale for all images.
    shares = np.array([(occlusion.map_left, occlusion.unit_left) for occlusion in occlusions])
    reach = abs(shares - 1).max()
    share: dict[str, Any] = {"cmap": "RdBu_r", "vmin": 1 - reach, "vmax": 1 + reach, **maps}
    magnitude: dict[str, Any] = {"cmap": "mako", "vmin": 0, "vmax": robust_scale(magnitudes), **whole}
    probability: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 1, **maps}

    for k, (occlusion, entry) in enumerate(zip(occlusions, table.itertuples(), strict=True)):
        row = axes[k]
        drawn = [
            show(row[0], np.moveaxis(images[k], 0, 2), **whole),
            show(row[1], occlusion.map_left, **share),
            show(row[2], occlusion.unit_left, **share),
            show(row[3], magnitudes[k], **magnitude),
            show(row[4], occlusion.probability[:, :, occlusion.label], **probability),
        ]
        mark_lowest(row[0], occlusion.unit_left, occluder)
        outline_mistakes(row[4], occlusion, occluder)
        name = f"{shorten(str(entry.label))}\nfilter {entry.filter}\npeak activation\n{entry.activation:.2f}"
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        mistakes = textwrap.fill(str(entry.taken_for), 26, max_lines=2, placeholder=" …")
        row[4].set_xlabel(mistakes, fontsize=7, labelpad=2)
    for ax in axes.flat:
        ax.set(xlim=(0, IMAGE_SIZE), ylim=(IMAGE_SIZE, 0))
    label_columns(fig, axes, drawn)
    return fig


def label_columns(fig: Figure, axes: Array, drawn: Sequence[AxesImage]) -> None:
    """Give each column of occlusion.png its title, and a colour bar for all but the first, the image."""
    columns = [
        ("image", ""),
        ("sum over the\nfilter's map", "share of the sum\nwithout a square"),
        ("activation of\nthe unit", "share of the activation\nwithout a square"),
        ("projection of\nthe unit", "magnitude\n(normalised pixels)"),
        ("probability of\nthe true class", "probability"),
    ]
    for k, (title, label) in enumerate(columns):
        axes[0, k].set_title(title, fontsize=8, pad=3)
        if label:
            bar = fig.colorbar(drawn[k], ax=axes[:, k], location="bottom", aspect=12, pad=0.01, shrink=0.9)
            bar.ax.tick_params(labelsize=7)
            bar.set_label(label, fontsize=8)


def run_occlusion(inputs: Inputs, correct_images: Array, occluder: Occluder) -> None:
    """Write occlusion.csv and occlusion.png.

    `correct_images` are the indices of the images, each of another class and classified correctly. Images in
    which no filter of conv4 fires are left out.
    """
    if inputs.leaves_out("occlusion.png"):
        return
    if not len(correct_images):
        print("occlusion.png is left out: no image is classified correctly")
        return
    image_indices = correct_images[inputs.maxima[correct_images].any(axis=1)]
    if not len(image_indices):
        print(
            "occlusion.png is left out: no filter of conv4 fires in the first correctly classified image of "
            "any class"
        )
        return

    images = inputs.test.images[image_indices]
    labels = inputs.test.labels[image_indices]
    units = inputs.peak_units(image_indices, inputs.maxima[image_indices].argmax(axis=1))
    covered = occluder.covered()
    occlusions = []
    for k in tqdm(range(len(image_indices)), "occlusion", disable=None):
        unit = [int(units.filter[k]), int(units.row[k]), int(units.column[k])]
        occlusions.append(occlusion_sensitivity(images[k], int(labels[k]), unit, inputs.net, covered))

    sums = sum_projections(inputs, units.image[:, None], units.filter[:, None], "projections")
    table = tabulate_occlusion(occlusions, units, inputs.names)
    save_table(inputs.outputs / "occlusion.csv", inputs.checkpoint, table)

    figure = draw_occlusion(images, occlusions, sums.magnitude, table, occluder)
    title = f"A grey square of {occluder.side} x {occluder.side} pixels slides over images"
    caption = (
        "The first correctly classified image of each class. Its filter is the one of conv4 with the highest "
        "peak activation, its unit the one with this peak. A map shows, at the centre of the square, what is "
        "left with the square there. Frame: the square that leaves least of the unit's activation. White "
        "outline: another class comes first; below the map stands the share of these positions."
    )
    inputs.save_figure("occlusion", figure, title, caption)


# ---------------------------------------------------------------- invariance (Figure 5)

MEASURES = {  # what is measured, and the titles of figures
    "distance in conv1": "distance\nin conv1",
    "distance in averaged conv4": "distance in conv4,\naveraged over regions",
    "probability of the true class": "probability of\nthe true class",
    "accuracy": "accuracy",
}


def transform(images: Tensor, shift: float = 0, zoom: float = 1, angle: float = 0) -> Tensor:
    """Translate, scale or rotate normalised images (..., 3, 96, 96); what is left bare is grey.

    Args:
        images: Normalised images.
        shift: Translation in pixels, down is positive.
        zoom: Factor of the scaling about the centre.
        angle: Degrees of the rotation about the centre, clockwise.
    """
    options: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "fill": [0.0, 0.0, 0.0]}
    translation = [0.0, float(shift)]
    shear = [0.0, 0.0]
    return cast(Tensor, affine(images, float(angle), translation, float(zoom), shear, **options))


def relative_distance(after: Tensor, before: Tensor) -> Tensor:
    """Return the Euclidean distance of two features, (images, ...), as a share of the norm of `before`."""
    distances: Tensor = (after - before).flatten(1).norm(dim=1)
    norms: Tensor = before.flatten(1).norm(dim=1)
    return distances / norms


def measure_invariance(net: CNN, split: Split, transformation: str, amounts: Sequence[float]) -> pd.DataFrame:
    """Measure how far features of images move when these are transformed (Figure 5 of the paper).

    The paper compares the features of the first layer and of a fully connected one. The only fully connected
    layer here is the classifier, so the second comparison is of its input: conv4 averaged over regions.

    Args:
        net: The network.
        split: Images and labels.
        transformation: One of `TRANSFORMATIONS`.
        amounts: How far the images are transformed, in the unit of the transformation.

    Returns:
        One row an image and amount: transformation; amount; image, a number from 0; and `MEASURES`: the
        distances between the features of the transformed and of the untransformed image, as shares of the
        norm of the second; the probability of the true class; 1 where that class comes first, else 0.
    """
    tables = []
    for start in range(0, len(split.images), 50):
        indices = np.arange(start, min(start + 50, len(split.images)))
        batch = net.normalise(torch.from_numpy(split.images[indices]))
        truth = torch.from_numpy(split.labels[indices]).to(batch.device)
        layers = net.features(batch)
        conv1_before, _ = layers[0]  # (images, filters, rows, columns)
        conv4_before, _ = layers[-1]
        for amount in amounts:
            layers = net.features(transform(batch, **{transformation: amount}))
            conv1, _ = layers[0]
            conv4, _ = layers[-1]
            probabilities = net.classify(conv4).softmax(dim=1)
            measured = {
                "distance in conv1": relative_distance(conv1, conv1_before),
                "distance in averaged conv4": relative_distance(
                    net.average(conv4), net.average(conv4_before)
                ),
                "probability of the true class": probabilities.gather(1, truth[:, None])[:, 0],
                "accuracy": (probabilities.argmax(dim=1) == truth).float(),
            }
            columns: dict[str, Any] = {"transformation": transformation, "amount": amount, "image": indices}
            for measure, values in measured.items():
                columns[measure] = values.cpu().numpy().astype(np.float64)
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True).sort_values(["image", "amount"], ignore_index=True)


def tabulate_invariance(measured: pd.DataFrame) -> pd.DataFrame:
    """Return rows of invariance.csv: mean over the images of each measure, with its 95 % interval.

    `measured` is what `measure_invariance` returned. The accuracy, a share, has an interval after Wilson, the
    other measures have a normal one. A distance is undefined, and left out, where the norm is 0.
    """
    values = measured.melt(["transformation", "amount", "image"], list(MEASURES), var_name="measure")
    groups = values.groupby(["transformation", "measure", "amount"], sort=False)["value"]
    table = pd.DataFrame({"mean": groups.mean(), "n": groups.count()})
    reach = 1.96 * groups.std(ddof=1) / table["n"] ** 0.5
    table["low"] = table["mean"] - reach
    table["high"] = table["mean"] + reach

    table = table.reset_index()[["transformation", "amount", "measure", "mean", "low", "high", "n"]]
    for row in table.index[table["measure"] == "accuracy"]:
        count = table.loc[row, "n"]
        correct = round(table.loc[row, "mean"] * count)
        table.loc[row, ["low", "high"]] = wilson_interval(correct, count)
    return table


def draw_examples(ax: Axes, net: CNN, images: Array, transformation: str, amounts: Sequence[float]) -> None:
    """Draw the images, one a row with a bar in its colour, transformed by five of the amounts."""
    chosen = np.linspace(0, len(amounts) - 1, 5).round().astype(int)
    drawn_amounts = [amounts[k] for k in chosen]
    normalised = net.normalise(torch.from_numpy(images))
    transformed = torch.stack(
        [transform(normalised, **{transformation: amount}) for amount in drawn_amounts], dim=1
    )
    pixels = (255 * (transformed * net.std + net.mean)).clamp(0, 255).byte().cpu().numpy()

    # (images, amounts, 3, rows, columns) -> one sheet (images * rows, amounts * columns, 3)
    sheet = pixels.transpose(0, 3, 1, 4, 2).reshape(len(images) * IMAGE_SIZE, -1, 3)
    ax.imshow(sheet, interpolation="nearest", extent=(0, len(chosen), len(images), 0))
    ax.set_xticks(np.arange(len(chosen)) + 0.5, [f"{amount:g}" for amount in drawn_amounts])
    for k in range(len(images)):
        ax.add_patch(Rectangle((-0.16, k + 0.04), 0.1, 0.92, color=f"C{k}", clip_on=False))


def draw_curves(ax: Axes, measure: str, curves: pd.DataFrame, means: pd.DataFrame) -> None:
    """Draw a measure over the amounts of one transformation: of each example, and the mean of many images.

    `curves` is what `measure_invariance` returned for the examples, `means` has the rows of
    `tabulate_invariance`. The accuracy of a single image says nothing, so there only the mean is drawn.
    """
    for number in curves["image"].unique() if measure != "accuracy" else ():
        curve = curves[curves["image"] == number]
        style = ("-", "--", "-.", ":")[number % 4]
        options: dict[str, Any] = {"color": f"C{number}", "linestyle": style, "linewidth": 0.9}
        ax.plot(curve["amount"], curve[measure], **options)
    rows = means[means["measure"] == measure]
    ax.plot(rows["amount"], rows["mean"], color="black", linewidth=1.6)
    ax.fill_between(rows["amount"], rows["low"], rows["high"], color="black", alpha=0.25, linewidth=0)


def draw_invariance(
    net: CNN, images: Array, example_curves: pd.DataFrame, means: pd.DataFrame, names: Sequence[str]
) -> Figure:
    """Draw the layout of the paper's Figure 5, one transformation a row, and means over many images.

    Args:
        net: The network.
        images: The examples, uint8 (images, 3, 96, 96).
        example_curves: What `measure_invariance` returned for them, all transformations.
        means: invariance.csv.
        names: What stands beside the examples.
    """
    transformations = list(example_curves["transformation"].unique())
    fig, axes = plt.subplots(
        len(transformations),
        5,
        figsize=(9.5, 1.2 + 1.95 * len(transformations)),
        squeeze=False,
        sharey="col",
        width_ratios=[1.15, 1, 1, 1, 1],
        layout="constrained",
    )
    for row, transformation in zip(axes, transformations, strict=True):
        curves = example_curves[example_curves["transformation"] == transformation]
        rows = means[means["transformation"] == transformation]
        draw_examples(row[0], net, images, transformation, list(curves["amount"].unique()))
        for ax, measure in zip(row[1:], MEASURES, strict=True):
            draw_curves(ax, measure, curves, rows)
        for ax in row:
            ax.set_xlabel(TRANSFORMATIONS[transformation], fontsize=8)
            ax.tick_params(labelsize=7)
            sns.despine(ax=ax)
        row[0].spines[:].set_visible(False)
        row[0].set_yticks(np.arange(len(names)) + 0.5, names)
        row[0].tick_params(axis="y", pad=10)

    for ax, title in zip(axes[0], ["examples", *MEASURES.values()], strict=True):
        ax.set_title(title, fontsize=9)
    for ax in axes[0, 1:]:  # the axes of a column share their limits
        ax.set_ylim(bottom=0)
    return fig


def run_invariance(
    inputs: Inputs, example_indices: Array, amounts: Mapping[str, Sequence[float]], mean_images: int
) -> None:
    """Write invariance.csv and invariance.png.

    Args:
        inputs: What all figures are made from.
        example_indices: Indices of the images that are drawn, classified correctly.
        amounts: How far the images are transformed, for each of `TRANSFORMATIONS`.
        mean_images: Number of the images behind the means, as many of each class, right or wrong; they are
            transformed by every other amount.
    """
    if not len(example_indices):
        print("invariance.png is left out: no image is classified correctly")
        return
    number_in_class = pd.Series(inputs.test.labels).groupby(inputs.test.labels).cumcount()
    many = np.flatnonzero(number_in_class < max(1, mean_images // len(inputs.names)))
    example_split = inputs.test.select(example_indices)
    example_curves = []
    tables = []
    for transformation, all_amounts in tqdm(amounts.items(), "invariance", disable=None):
        example_curves.append(measure_invariance(inputs.net, example_split, transformation, all_amounts))
        measured = measure_invariance(inputs.net, inputs.test.select(many), transformation, all_amounts[::2])
        tables.append(tabulate_invariance(measured))
    table = pd.concat(tables, ignore_index=True)
    save_table(inputs.outputs / "invariance.csv", inputs.checkpoint, table)

    names = [inputs.short_names[label] for label in example_split.labels]
    figure = draw_invariance(inputs.net, example_split.images, pd.concat(example_curves), table, names)
    title = f"{len(example_indices)} correctly classified images, translated, scaled and rotated"
    caption = (
        "Distance: Euclidean distance between the features of the transformed and of the untransformed "
        "image, as a share of the norm of the second. conv4 is averaged over regions, as the classifier sees "
        "it, because the paper compares a fully connected layer. Down and clockwise are positive. Coloured: "
        f"the examples. Black: mean of {len(many)} images, as many of each class, classified correctly or "
        "not, with its 95 % interval."
    )
    inputs.save_figure("invariance", figure, title, caption)


# ---------------------------------------------------------------- explorer: the pictures


class Examples(NamedTuple):
    """Images in which the filters of a layer were projected; arrays (filters, examples, ...)."""

    image: Array  # index into the test split, -1 for none
    value: Array  # peak activation there
    origin: Array  # row and column of the window's top left pixel, negative beyond the border
    projection: Array  # (filters, examples, 3, rows, columns)


class LayerExamples(NamedTuple):
    """What the pictures of a layer are made from."""

    top: Examples  # top-9 examples
    percentile: Examples  # percentile examples, level by level
    evolution: Array  # projections after each of several epochs, (filters, epochs, 3, rows, columns)


def read_examples(path: Path, checkpoint: Checkpoint, prefix: str) -> Examples:
    """Read the examples of a layer from projections.npz; `prefix` is `conv4` or `conv4_level`."""
    keys = [f"{prefix}_{field}" for field in Examples._fields]
    return Examples(*load_arrays(path, checkpoint, *keys))


def crop_patches(images: Array, image_indices: Array, origins: Array, size: int) -> Array:
    """Cut windows out of images, uint8 (n, size, size, 4); transparent beyond the border and for image -1."""
    patches = []
    for image_index, (top, left) in zip(image_indices, origins, strict=True):
        alpha = np.full((1, IMAGE_SIZE, IMAGE_SIZE), 255, np.uint8)
        frame = np.concatenate([images[image_index], alpha])
        if image_index < 0:
            frame[:] = 0
        patches.append(crop(frame, top, left, size, 0).transpose(1, 2, 0))
    return np.stack(patches)


def as_panels(projections: Array) -> Array:
    """Return projections (n, 3, rows, columns) on one scale as opaque uint8 (n, rows, columns, 4)."""
    colours = (255 * displayed(projections.astype(np.float32))).round().astype(np.uint8)
    return np.pad(colours, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=255)


def save_panels(path: Path, panels: Array, columns: int) -> None:
    """Write panels (n, rows, columns, 4) as one WebP picture, `columns` of them a row.

    With losses WebP halves the resolution of colours, which shows in small windows. Those are stored without
    losses, after rounding to multiples of 8, which halves the file.
    """
    options: dict[str, Any] = {"quality": 48}
    if panels.shape[2] < 32:
        panels = np.minimum((panels + np.uint16(4)) // 8 * 8, 255).astype(np.uint8)
        options = {"lossless": True}
    with atomic_write(path) as partial:
        Image.fromarray(tile(panels, columns, 0)).save(partial, "WEBP", **options)


def save_strips(folder: Path, layer: str, examples: LayerExamples, images: Array) -> None:
    """Write the pictures of a layer.

    LAYER/NNN.webp has two rows. Above are the projections of the filter's top-9 examples, of its percentile
    examples and of its highest peak activation after each epoch; below are the patches of the examples.
    LAYER.webp has the first projection of every filter, 16 a row, each above its patch.

    Args:
        folder: Where the pictures go.
        layer: Name of the layer.
        examples: What is drawn.
        images: The test images, uint8 (images, 3, 96, 96).
    """
    top = examples.top
    percentile = examples.percentile

    def draw_strip(n: int) -> Array:
        above = [as_panels(top.projection[n])]
        above += [as_panels(level) for level in np.split(percentile.projection[n], len(LEVELS))]
        above += [as_panels(after_epoch[None]) for after_epoch in examples.evolution[n]]
        projections = np.concatenate(above)

        image_indices = np.concatenate([top.image[n], percentile.image[n]])
        origins = np.concatenate([top.origin[n], percentile.origin[n]])
        patches = crop_patches(images, image_indices, origins, projections.shape[1])

        panels = np.concatenate([projections, patches])
        save_panels(folder / layer / f"{n:03d}.webp", panels, len(projections))
        return np.stack([projections[0], patches[0]])

    count = len(top.image)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        strips = pool.map(draw_strip, range(count))
        first = list(tqdm(strips, f"pictures of {layer}", count, disable=None))
    # (filters, 2, rows, columns, 4) -> each projection above its patch
    pairs = np.stack(first)
    save_panels(folder / f"{layer}.webp", pairs.reshape(count, -1, *pairs.shape[3:]), 16)


# ---------------------------------------------------------------- explorer: the numbers


class Histogram(NamedTuple):
    """How often a filter's peak activations fall into 24 bins from 0 to `largest`.

    There are two groups of images: images of the filter's preferred class, and all others.
    """

    images: list[int]  # in each group
    zeros: list[int]  # images of each group in which the filter does not fire; they are in no bin
    counts: list[Array]  # of each group, (24,)
    largest: float


def count_peaks(peaks: Array, prefers: Array) -> Histogram:
    """Count the peak activations of a filter in all images; `prefers` says which are of its class."""
    largest = float(max(peaks.max(), 1e-9))
    groups = [peaks[prefers], peaks[~prefers]]
    return Histogram(
        images=[len(group) for group in groups],
        zeros=[int(np.count_nonzero(group == 0)) for group in groups],
        counts=[np.histogram(group[group > 0], 24, (0, largest))[0] for group in groups],
        largest=largest,
    )


def find_similar(maxima: Array) -> list[list[tuple[int, float]]]:
    """Return for each filter the five filters whose peak activations correlate most with its own.

    `maxima` is (images, filters). Each filter comes with the coefficient, if that is positive.
    """
    with np.errstate(invalid="ignore"):  # a dead filter correlates with none
        correlation = np.nan_to_num(np.corrcoef(maxima.T), nan=-1)
    np.fill_diagonal(correlation, -1)
    nearest = np.argsort(-correlation, axis=1, kind="stable")[:, :5]
    similar = []
    for coefficients, indices in zip(correlation, nearest, strict=True):
        similar.append([(int(k), float(coefficients[k])) for k in indices if coefficients[k] > 0])
    return similar


def describe_filters(layer: str, maxima: Array, inputs: Inputs) -> pd.DataFrame:
    """Return what the page says of each filter of a layer, but for its pictures; one row a filter.

    `maxima` are the peak activations of the layer's filters in the test images, (images, filters).
    """
    filters = inputs.filters[inputs.filters["layer"] == layer].reset_index(drop=True)
    classes = inputs.classes[inputs.classes["layer"] == layer]
    count = len(filters)

    loss_increase: list[Any] = [None] * count
    if layer == LAYERS[-1]:
        loss_increase = list(inputs.ablation["loss_increase"].to_numpy().reshape(count, -1))
    histograms = []
    for number, name in enumerate(filters["preferred_class"]):
        prefers = np.array(inputs.names)[inputs.test.labels] == name  # a dead filter prefers none
        histograms.append(count_peaks(maxima[:, number], prefers)._asdict())
    means = classes[["activation_mean", "activation_low", "activation_high"]].to_numpy()
    columns: dict[str, Any] = {
        "means": list(means.reshape(count, -1, 3)),  # of each class, with both limits of the interval
        "loss_increase": loss_increase,  # of each class, then of all images
        "similar": find_similar(maxima),
        "histogram": histograms,
    }
    return filters.drop(columns="layer").assign(**columns)


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Return how many images of each class (rows) were taken for each class (columns)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def recognised(confusion: Array) -> list[tuple[float, float, float]]:
    """Return the share of each class's images that are recognised, with its 95 % interval."""
    shares = []
    for label, counts in enumerate(confusion):
        low, high = wilson_interval(counts[label], counts.sum())
        shares.append((counts[label] / counts.sum(), low, high))
    return shares


def write_layer(folder: Path, layer: str, inputs: Inputs, evolution: Array) -> dict[str, Any]:
    """Write the pictures of a layer and return what the page says of its filters.

    `evolution` are projections after each epoch, (filters, epochs, 3, rows, columns).
    """
    projections = inputs.outputs / "projections.npz"
    examples = LayerExamples(
        top=read_examples(projections, inputs.checkpoint, layer),
        percentile=read_examples(projections, inputs.checkpoint, f"{layer}_level"),
        evolution=evolution,
    )
    save_strips(folder, layer, examples, inputs.test.images)

    (maxima,) = load_arrays(inputs.outputs / "activations.npz", inputs.checkpoint, f"{layer}_max")
    table = describe_filters(layer, maxima, inputs)
    columns: dict[str, Any] = {
        "top_images": list(examples.top.image),
        "top_peaks": list(examples.top.value),
        "percentile_images": list(examples.percentile.image),
        "percentile_peaks": list(examples.percentile.value),
    }
    return {
        "size": examples.top.projection.shape[-1],  # rows of a window
        "columns": min(16, len(table)),  # panels in a row of LAYER.webp
        "filters": table.assign(**columns).to_dict("records"),
    }


def write_explorer(
    inputs: Inputs, snapshots: Sequence[Checkpoint], predictions: Array, evolution_images: int
) -> None:
    """Write explorer/index.html and its pictures. The page's words are in `EXPLORER`, its numbers come here.

    Args:
        inputs: What all figures are made from.
        snapshots: What `read_snapshots` returned.
        predictions: What `predict` returned for the test images.
        evolution_images: In so many of these each snapshot's highest peak activation is sought.
    """
    checkpoint = inputs.checkpoint
    outputs = inputs.outputs.expanduser()
    folder = outputs / "explorer"
    searched = inputs.test.images[:evolution_images]
    # as many filters as the widest layer has, so that all filters of every layer are projected
    widest = max(checkpoint.net.config["filters"])
    evolution = project_evolution(searched, snapshots, widest, batch_size=16)
    # pop frees the memory of a layer's projections once they are written
    layers = {layer: write_layer(folder, layer, inputs, evolution.pop(layer).projections) for layer in LAYERS}

    colours = class_colours(len(inputs.names))
    figures = sorted(path.relative_to(outputs).as_posix() for path in outputs.rglob("*.png"))
    confusion = confusion_matrix(inputs.test.labels, predictions, len(inputs.names))
    settings = {"checkpoint": checkpoint.sha256[:12], "epochs": checkpoint.epochs}
    facts = {
        "title": TITLES[checkpoint.dataset],
        "generated": checkpoint.dataset == "shapes",
        "accuracy": checkpoint.accuracy(),
        "classes": inputs.names,
        "colours": colours,  # of each class
        "text_colours": [text_colour_on(colour) for colour in colours],
        "labels": inputs.test.labels,
        "confusion": confusion,
        "recognised": recognised(confusion),  # of each class: share and interval
        "layers": layers,
        "nearly_dead": NEARLY_DEAD,
        "levels": LEVELS,  # of the percentile examples
        "epochs": [snapshot.epochs for snapshot in snapshots],
        "evolution_images": len(searched),
        "trust": inputs.trust.to_dict("records"),
        "live_page": (outputs / "deconv_live.html").is_file(),
        "run": settings | checkpoint.metrics | checkpoint.settings,
        "figures": [name for name in figures if not name.startswith("readme")],
    }
    with atomic_write(folder / "index.html") as partial:
        partial.write_text(EXPLORER.replace("__DATA__", page_json(facts)), encoding="utf-8")
    print(f"wrote {folder / 'index.html'}", flush=True)


def main() -> None:
    """Draw filters over all classes, in each class, in single images, in occluded and in transformed ones."""
    set_style()
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    snapshots = read_snapshots(CHECKPOINT.parent / "snapshots", checkpoint)
    inputs = read_inputs(checkpoint, DATA_DIR, OUTPUTS)
    print(f"drawing conv4 on {inputs.source} on {device}, torch {torch.__version__}")

    remove_old(OUTPUTS.expanduser())

    # what the filters respond to
    picture_all_classes(inputs)
    for label in range(len(inputs.names)):
        picture_class(inputs, label, TOP_FILTERS, TOP_IMAGES)
    picture_images(inputs, SUMMED_FILTERS)

    # what the network uses
    predictions = predict(inputs.net, inputs.test.images)
    correct_images = first_correct(predictions, inputs.test.labels)
    run_occlusion(inputs, correct_images, Occluder(OCCLUDER, OCCLUSION_STRIDE))
    run_invariance(inputs, correct_images[:INVARIANCE_IMAGES], AMOUNTS, MEAN_IMAGES)

    # every filter on one page
    write_explorer(inputs, snapshots, predictions, EVOLUTION_IMAGES)
    print(f"this was the last stage: open {OUTPUTS / 'explorer/index.html'}")


# ---------------------------------------------------------------- the page of the explorer

EXPLORER = (
    r"""<!DOCTYPE html><html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>Filter explorer</title>
<style>
"""
    + PAGE_STYLE
    + r"""header { display: flex; flex-wrap: wrap; gap: 2px 15px; border-bottom: 1px solid var(--line); }
header span { flex-grow: 1; }
@media (max-width: 700px) { header, main { padding: 10px 14px; } header span { flex-basis: 100%; } }

/* text */
h1 { font-size: 26px; line-height: 1.2; margin: 14px 0 4px; }
h2 { font-size: 16px; margin: 26px 0 2px; padding-top: 8px; border-top: 1px solid var(--line); }
h3 { font-size: 13px; margin: 16px 0 6px; }
p { max-width: 80ch; margin: 6px 0 12px; }
h1, h2, p, dd, .pair, .files a { overflow-wrap: anywhere; }
.soft, small, th, dt { color: var(--soft); font-weight: normal; font-size: inherit; }
.loud { background: #ffd54a; color: #000; font-weight: 600; padding: 8px; text-align: center; }
a { color: var(--link); }
a[aria-current] { color: inherit; font-weight: 600; }
[title] { text-decoration: underline dotted; text-underline-offset: 3px; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
h1:focus { outline: none; }
select, label { font: inherit; margin-right: 14px; }
select { max-width: min(260px, 100% - 14px); }
dl { display: grid; grid-template-columns: minmax(80px, max-content) 1fr; gap: 2px 16px; font-size: 14px;
  margin: 6px 0; }
dd { margin: 0; }
.files { columns: 250px; }
.files a { display: block; }
.chip { padding: 0 7px; border-radius: 9px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }

/* one panel of a picture that holds many, as its background; hatched where it is transparent */
.panel { display: block; aspect-ratio: 1; image-rendering: pixelated; background:
  var(--image) var(--x) var(--y) / var(--wide) var(--high) no-repeat,
  repeating-linear-gradient(45deg, var(--paper) 0 5px, var(--hatch) 5px 10px); }
.large .panel { image-rendering: auto; }

/* tiles, one a filter; the patch lies below the projection */
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 14px 10px; }
.tiles a { color: inherit; text-decoration: none; font-size: 12px; min-width: 0; }
.tiles div { display: flex; justify-content: space-between; gap: 4px; margin-top: 3px; }
.tiles a:is(:hover, :focus) .panel, .patches .panel { background-position: var(--x) var(--below), 0 0; }
.tiles .chip { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }

/* pairs of projection and patch, and single panels */
.pairs, .panels { display: grid; gap: 10px 20px; align-items: start; font-size: 12px;
  grid-template-columns: repeat(auto-fill, calc(2 * var(--p))); }
.panels { gap: 10px; grid-template-columns: repeat(auto-fill, var(--p)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; }
.pair > :last-child { grid-column: span 2; }

/* the table of classes, with bars */
table { border-collapse: collapse; width: 100%; max-width: 800px; font-size: 13px; }
th, td { text-align: left; padding: 2px 8px 2px 0; }
td { white-space: nowrap; }
.track { position: relative; width: 20vw; max-width: 110px; height: 11px; }
.track * { position: absolute; top: 1px; bottom: 1px; }
svg { max-width: 480px; font-size: 12px; fill: var(--soft); }

/* a filter's page: examples on the left, numbers on the right */
@media (min-width: 1180px) { .two { display: grid; grid-template-columns: 1fr 460px; gap: 0 40px; } }
@media (max-width: 700px) { .two { --p: var(--q) !important; }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); } }
</style><noscript>This page needs JavaScript; it loads nothing from elsewhere.</noscript>
<header></header><main></main>
<script id="data" type="application/json">__DATA__</script>
<script>
"use strict";
// ---- what Python measured, see write_explorer; no text of it is ever read as HTML
const data = JSON.parse(document.getElementById("data").textContent);
const layers = Object.keys(data.layers);
const deepest = layers.at(-1);
const main = document.querySelector("main");
const header = document.querySelector("header");

let tilesShown = { layer: "", numbers: [] };  // shown last, in this order; arrow keys follow it
let tilesQuery = "";  // how they were chosen, as in the address: "sort=auc&class=car"

// ---- numbers as text
const withCommas = (number) => number.toLocaleString("en");
const twoDecimals = (number) => number.toFixed(2);

function fourDigits(number) {
  if (Math.abs(number) >= 1000) return withCommas(Math.round(number));
  return String(Number(number.toPrecision(4)));
}

function percent(share) {
  const decimals = share > 0 && share < 0.0995 ? 1 : 0;
  return `${(100 * share).toFixed(decimals)} %`;
}

function nats(value) {  // with its sign, and no minus before 0.000
  const text = value.toFixed(3).replace("-0.000", "0.000");
  return value < 0.0005 ? text : `+${text}`;
}

// ---- the metrics: what the page calls them, what they mean; tiles are sorted by those that have a value
const METRICS = {
  filter: {
    label: "number",
    meaning: "The filter's number in its layer. The order has no meaning.",
    value: (filter) => -filter.filter,  // negated: tiles are sorted with the largest first
  },
  preferred_class: {
    label: "preferred class",
    meaning: "The class with the largest mean peak activation.",
    value: (filter) => -data.classes.indexOf(filter.preferred_class),  // negated, too
  },
  selectivity: {
    label: "selectivity",
    meaning: "The difference between the mean peak activation on the preferred class and on the other "
      + "classes, divided by the sum of the two. It is 0 if the filter fires alike on all classes, and 1 if "
      + "it fires on one class only.",
    value: (filter) => filter.selectivity,
    write: twoDecimals,
  },
  auc: {
    label: "AUC",
    meaning: "The probability that an image of the preferred class activates the filter more than an image "
      + "of another class does. For a class chosen beforehand, chance is 0.5.",
    value: (filter) => filter.auc,
    write: twoDecimals,
  },
  activation_mean: {
    label: "mean peak activation",
    meaning: "The mean over all test images of the filter's largest activation in each image.",
    value: (filter) => filter.activation_mean,
    write: twoDecimals,
  },
  activation_nonzero: {
    label: "fires on",
    meaning: "The share of the test images in which any activation of the filter is above zero.",
    value: (filter) => filter.activation_nonzero,
    write: percent,
  },
  loss_increase: {
    label: "loss increase",
    meaning: "The rise of the cross-entropy, in nats, under mean ablation: the filter's map is replaced by "
      + "its mean over the training images. It is negative if the network does better without the filter.",
    value: (filter) => filter.loss_increase && filter.loss_increase.at(-1),
    write: nats,
  },
  most_similar: {
    label: "most similar filter",
    meaning: "The filter of the same layer whose peak activations over the test images correlate most with "
      + "this filter's. With r = 1 both are equal up to scale.",
    value: (filter) => filter.similar.length ? filter.similar[0][1] : null,
    write: (r, filter) => `${filter.similar[0][0]} (r = ${twoDecimals(r)})`,
  },
  class_mean: {
    label: "class mean",
    meaning: "The mean over the test images of the class of the filter's largest activation in each image. "
      + "The line is its 95 % interval.",
  },
  projections: {
    label: "projections",
    meaning: "Statistics of a projection's magnitude, which is the sum over RGB of the absolute values in "
      + "normalised pixels. The mean is over the pixels above zero, the variance over the whole frame. The "
      + "number of pixels, the mean and the variance are averaged over the projected images, and are 0 "
      + "where the filter does not fire; the maximum is the largest of all images.",
  },
};

// ---- building blocks

// Children may be nested lists; null is left out.
function element(tag, attributes, ...children) {
  const isDrawing = ["svg", "path", "text"].includes(tag);
  const namespace = `http://www.w3.org/${isDrawing ? "2000/svg" : "1999/xhtml"}`;
  const node = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) {
    node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null));
  return node;
}

const heading = (...text) => element("h1", { tabindex: -1 }, text);
const paragraph = (...text) => element("p", {}, text);
const note = (...text) => element("p", { class: "soft" }, text);
const metricLabel = (key) => element("span", { title: METRICS[key].meaning }, METRICS[key].label);
const encodePath = (parts) => parts.map(encodeURIComponent).join("/");
const link = (parts, ...content) => element("a", { href: `#${encodePath(parts)}` }, content);

function section(title, text, ...content) {
  return [element("h2", {}, title), text ? note(text) : null, content];
}

function definitions(rows) {
  const entries = rows.map(([term, text]) => [element("dt", {}, term), element("dd", {}, text)]);
  return element("dl", {}, entries);
}

function tableRow(cells, tag = "td") {
  return element("tr", {}, cells.map((cell) => element(tag, {}, cell)));
}

// ---- classes have colours
const classColour = (name) => data.colours[data.classes.indexOf(name)];

function dot(name) {
  return [element("span", { class: "dot", style: `background:${classColour(name)}` }), name];
}

function chip(name) {
  const textColour = data.text_colours[data.classes.indexOf(name)];
  const style = `background:${classColour(name)};color:${textColour}`;
  return element("span", { class: "chip", style }, name);
}

// ---- panels of pictures

// A picture holds grid.rows x grid.columns panels; the one at (row, column) is shown.
function panel(file, grid, row, column, label) {
  // the position of a background is the share of what overhangs
  const position = (index, count) => count > 1 ? `${100 * index / (count - 1)}%` : "0%";
  const properties = {
    "--image": `url(${file})`,
    "--wide": `${100 * grid.columns}%`,
    "--high": `${100 * grid.rows}%`,
    "--x": position(column, grid.columns),
    "--y": position(row, grid.rows),
    "--below": position(row + 1, grid.rows),
  };
  const style = Object.entries(properties).map(([name, value]) => `${name}:${value}`).join(";");
  return element("span", { class: "panel", role: "img", "aria-label": label, style });
}

const isNearlyDead = (filter) => !filter.dead && filter.activation_nonzero < data.nearly_dead;

// Tiles of the filters called `numbers`, each with what `describe` says of it.
function tiles(layer, numbers, describe) {
  const { columns, filters, size } = data.layers[layer];
  const grid = { rows: 2 * Math.ceil(filters.length / columns), columns };

  const tile = (number) => {
    const filter = filters[number];
    const row = 2 * Math.floor(number / columns);
    let text = describe(filter);
    if (isNearlyDead(filter)) text = "nearly dead";
    if (filter.dead) text = "never fires";
    return link([layer, number],
      panel(`${layer}.webp`, grid, row, number % columns, `projection of filter ${number}`),
      element("div", {}, element("b", {}, number), filter.dead ? "dead" : chip(filter.preferred_class)),
      element("small", {}, text));
  };
  return element("div", { class: size < 30 ? "tiles" : "tiles large" }, numbers.map(tile));
}

// Projections and patches of examples; in the picture they start at `firstColumn`.
function pairs(file, grid, images, peaks, firstColumn) {
  const pair = (image, index) => {
    if (image < 0) return null;
    const name = data.classes[data.labels[image]];
    const label = `test image ${image}, ${name}`;
    return element("div", { class: "pair" },
      panel(file, grid, 0, firstColumn + index, `projection in ${label}`),
      panel(file, grid, 1, firstColumn + index, label),
      element("span", {}, element("b", {}, twoDecimals(peaks[index])), " ", dot(name),
        element("small", {}, ` image ${image}`)));
  };
  return element("div", { class: "pairs" }, images.map(pair));
}

// ---- numbers of one filter

// A bar chart in one line: bars are [from, to, style], on a scale of 0 to 1.
function track(bars) {
  const bar = ([from, to, style]) =>
    element("div", { style: `left:${100 * from}%;width:${100 * (to - from)}%;${style}` });
  return element("div", { class: "track" }, bars.map(bar));
}

// Mean peak activation on each class, and for the deepest layer the loss increase.
function classTable(filter) {
  const largestMean = Math.max(...filter.means.flat());
  const losses = filter.loss_increase;
  const largestLoss = losses ? Math.max(...losses.map(Math.abs)) || 1 : 1;

  const lossCells = (loss) => {
    const end = 0.5 + loss / largestLoss / 2;  // zero is in the middle
    const bar = [Math.min(0.5, end), Math.max(0.5, end), "background:var(--bar)"];
    const zero = [0.5, 0.51, "background:var(--ink)"];
    return [track([bar, zero]), nats(loss)];
  };

  const rows = data.classes.map((name, index) => {
    const [mean, low, high] = filter.means[index].map((value) => value / largestMean);
    const bar = [0, mean, `background:${classColour(name)}`];
    const interval = [low, high, "background:var(--ink);top:5px;bottom:5px"];
    const isPreferred = name === filter.preferred_class;
    const cells = [element(isPreferred ? "b" : "span", {}, dot(name)), track([bar, interval]),
      twoDecimals(filter.means[index][0])];
    return tableRow(losses ? [...cells, ...lossCells(losses[index])] : cells);
  });

  const head = ["class", metricLabel("class_mean"), ""];
  if (!losses) return element("table", {}, tableRow(head, "th"), rows);
  const all = ["all classes", "", "", ...lossCells(losses.at(-1))];
  head.push(metricLabel("loss_increase"), "");
  return element("table", {}, tableRow(head, "th"), rows, tableRow(all));
}

// Peak activations in images of the preferred class (outlined) and of all others.
function histogram(filter) {
  const { images, zeros, counts, largest } = filter.histogram;
  const shares = counts.map((group, g) => group.map((count) => count / images[g]));
  const highest = Math.max(...shares.flat());
  const steps = (heights) => {  // bins of 17 units from x = 40, up to 100 units above y = 112
    const bins = heights.map((height, bin) => `V${112 - 100 * height / highest}H${57 + 17 * bin}`);
    return `M40 112${bins.join("")}V112Z`;
  };
  const text = (x, y, content, anchor = "middle") =>
    element("text", { x, y, "text-anchor": anchor }, content);

  const colour = classColour(filter.preferred_class);
  const drawing = element("svg", { viewBox: "0 0 460 146", role: "img", "aria-label": "histogram" },
    element("path", { d: steps(shares[1]), fill: "var(--bar)", opacity: 0.6 }),
    element("path", { d: steps(shares[0]), fill: colour, "fill-opacity": 0.4, stroke: "var(--ink)" }),
    text(34, 20, percent(highest), "end"),
    text(34, 115, "0 %", "end"),
    text(40, 128, "0"),
    text(440, 128, twoDecimals(largest)),
    text(244, 143, "peak activation; height: share of the images"));
  const silent = zeros.map((count, g) => percent(count / images[g]));
  const others = `. Grey: the ${withCommas(images[1])} images of all other classes. Images in which the `
    + `filter does not fire are not drawn: ${silent[0]} and ${silent[1]} of them.`;
  const own = ["Outlined: the ", withCommas(images[0]), " images of ", dot(filter.preferred_class)];
  return [drawing, note(own, others)];
}

function metricList(filter) {
  const metric = (key) => [metricLabel(key), METRICS[key].write(METRICS[key].value(filter), filter)];
  const preferred = `${filter.preferred_class}, in ${percent(filter.preferred_share)} of the bootstrap `
    + `samples; the runner-up is ${filter.runner_up}. The most frequent class of the top images is `
    + `${filter.top_class}.`;
  let selectivity = twoDecimals(filter.selectivity);
  if (filter.selectivity_low !== null && filter.selectivity_high !== null) {  // null: there is no interval
    selectivity += ` (95 % interval ${twoDecimals(filter.selectivity_low)} to `
      + `${twoDecimals(filter.selectivity_high)})`;
  }
  const rows = [
    [metricLabel("preferred_class"), preferred],
    [metricLabel("selectivity"), selectivity],
    metric("auc"),
    metric("activation_nonzero"),
    metric("activation_mean"),
  ];
  if (filter.nonzero_count !== null) {
    const statistics = `${fourDigits(filter.nonzero_count)} pixels above zero; mean over such pixels `
      + `${fourDigits(filter.mean)}; variance over the whole frame ${fourDigits(filter.variance)}; `
      + `maximum ${fourDigits(filter.max)}`;
    rows.push([metricLabel("projections"), statistics]);
  }
  return definitions(rows);
}

// ---- the four views: a layer, a filter, a class, the run

function layerNote(layer) {
  const { filters, size } = data.layers[layer];
  const dead = filters.filter((filter) => filter.dead).length;
  const nearlyDead = filters.filter(isNearlyDead).length;
  return `Each of the ${filters.length} filters sees ${size} x ${size} pixels. ${dead} are dead, which means `
    + `that they fire on no test image; ${nearlyDead} are nearly dead and fire on less than `
    + `${fourDigits(100 * data.nearly_dead)} % of the ${withCommas(data.labels.length)} test images. A tile `
    + "shows the projection of the filter's highest activation; hover over it to see the image there.";
}

// A menu that puts its choice under `key` into the address.
function menu(layer, query, key, label, current, options) {
  const items = options.map(([value, text]) => element("option", { value }, text));
  const select = element("select", {}, items);
  select.value = current;
  select.onchange = () => {
    query.set(key, select.value);
    location.hash = `${layer}?${query}`;
  };
  return element("label", {}, label, select);
}

function layerView(layer) {
  const { filters } = data.layers[layer];
  const query = new URLSearchParams(tilesQuery);
  const measured = Object.keys(METRICS).filter((key) => METRICS[key].value);
  const sortable = measured.filter((key) => key !== "loss_increase" || filters[0].loss_increase);
  const sort = sortable.includes(query.get("sort")) ? query.get("sort") : "filter";
  const { label, value, write } = METRICS[sort];
  const wanted = query.get("class") || "";

  // largest first; dead filters and those without a value last
  const sortKey = (filter) => filter.dead || value(filter) === null ? -Infinity : value(filter);
  const chosen = filters.filter((filter) => !wanted || filter.preferred_class === wanted);
  chosen.sort((a, b) => sortKey(a) === sortKey(b) ? 0 : sortKey(b) - sortKey(a));
  tilesShown = { layer, numbers: chosen.map((filter) => filter.filter) };

  const describe = (filter) => {
    if (!write) return filter.dead ? "" : `selectivity ${twoDecimals(filter.selectivity)}`;
    return value(filter) === null ? "" : `${label} ${write(value(filter), filter)}`;
  };
  const grid = tiles(layer, tilesShown.numbers, describe);
  const patches = element("input", { type: "checkbox" });
  patches.onchange = () => grid.classList.toggle("patches", patches.checked);

  const classes = [["", "all classes"], ...data.classes.map((name) => [name, name])];
  return [
    heading(layer),
    note(layerNote(layer)),
    menu(layer, query, "sort", "Sort by ", sort, sortable.map((key) => [key, METRICS[key].label])),
    menu(layer, query, "class", "Show ", wanted, classes),
    element("label", {}, patches, " patches"),
    note(`${chosen.length} of ${filters.length} filters`, wanted ? ` that prefer ${wanted}` : "",
      ", sorted by ", metricLabel(sort)),
    grid,
  ];
}

function filterHeading(layer, number) {
  const filter = data.layers[layer].filters[number];
  const place = tilesShown.numbers.indexOf(number);
  const livePage = element("a", { href: `../deconv_live.html#${layer}/${number}` },
    "Try your own picture on this filter");
  const missing = data.live_page ? "" : " (uv run deconv.py writes that page)";
  const neighbour = (step, text) => {
    const other = tilesShown.numbers[place + step];
    return other === undefined ? "" : [link([layer, other], `${text}: ${other}`), " "];
  };
  return [
    heading(`${layer} / ${number} `, filter.dead ? "" : chip(filter.preferred_class)),
    note(neighbour(-1, "previous"), neighbour(1, "next"), "(arrow keys) ", link([layer], `all of ${layer}`),
      " (Escape). ", livePage, missing),
  ];
}

function filterPictures(layer, number) {
  const filter = data.layers[layer].filters[number];
  const file = `${layer}/${String(number).padStart(3, "0")}.webp`;
  const topCount = filter.top_images.length;
  const percentileCount = filter.percentile_images.length;
  const evolutionStart = topCount + percentileCount;
  const grid = { rows: 2, columns: evolutionStart + data.epochs.length };
  const perLevel = percentileCount / data.levels.length;

  const percentiles = data.levels.map((level, index) => {
    const start = index * perLevel;
    const images = filter.percentile_images.slice(start, start + perLevel);
    const peaks = filter.percentile_peaks.slice(start, start + perLevel);
    return [element("h3", {}, `${level}th percentile`), pairs(file, grid, images, peaks, topCount + start)];
  });
  const evolution = data.epochs.map((epoch, index) => element("div", {},
    panel(file, grid, 0, evolutionStart + index, `projection after epoch ${epoch}`), `epoch ${epoch}`));
  const top = "The test images with the highest peak activations. Each is shown by the projection of this "
    + "activation and, beside it, by the patch of the image; the activation stands below. Grey is zero, with "
    + "one scale for all.";
  const percentile = "Images near percentiles of the filter's peak activations above zero. Each level has a "
    + "scale of its own.";
  let development = `The highest peak activation in ${withCommas(data.evolution_images)} test images after `
    + "each epoch. Each projection has a scale of its own.";
  if (data.epochs.length === 1) {
    development += " There are no snapshots of this training: uv run train_CNN.py writes them.";
  }
  return element("div", {},
    section("Top examples", top, pairs(file, grid, filter.top_images, filter.top_peaks, 0)),
    section("Percentile examples", percentile, percentiles),
    section("How it developed", development, element("div", { class: "panels" }, evolution)));
}

function filterNumbers(layer, filter) {
  const coefficients = new Map(filter.similar);
  const similar = tiles(layer, [...coefficients.keys()],
    (other) => `r = ${twoDecimals(coefficients.get(other.filter))}`);
  return element("div", {},
    section("By class", "", classTable(filter)),
    section("Peak activations in the test images", "", histogram(filter)),
    section("In numbers", "", metricList(filter)),
    section("Similar filters", "r is the correlation of peak activations over the test images.", similar));
}

function filterView(layer, number) {
  const { filters, size } = data.layers[layer];
  const filter = filters[number];
  if (tilesShown.layer !== layer || !tilesShown.numbers.includes(number)) {
    tilesShown = { layer, numbers: filters.map((other) => other.filter) };
  }
  if (filter.dead) {
    const sentence = "This filter is dead: it fires on none of the test images.";
    return [filterHeading(layer, number), paragraph(sentence)];
  }
  // windows are about 152 pixels wide, on narrow screens 76; a pixel of theirs is a whole number of these
  const side = (most) => `${size * Math.max(1, Math.floor(most / size))}px`;
  const columns = element("div", { class: "two", style: `--p:${side(152)};--q:${side(76)}` },
    filterPictures(layer, number), filterNumbers(layer, filter));
  return [filterHeading(layer, number), columns];
}

function classSentence(index) {
  const counts = data.confusion[index];
  const total = counts.reduce((sum, count) => sum + count, 0);
  const others = data.classes.map((name, other) => ({ name, count: counts[other], other }));
  const mistaken = others.filter(({ count, other }) => count > 0 && other !== index);
  mistaken.sort((a, b) => b.count - a.count);
  const list = mistaken.map(({ name, count }) => `${name} (${count})`).join(", ");
  const [share, low, high] = data.recognised[index].map(percent);
  return `${withCommas(counts[index])} of ${withCommas(total)} test images are recognised (${share}, 95 % `
    + `interval ${low} to ${high}).${list ? ` The others are taken for ${list}.` : ""}`;
}

// Numbers of a layer's filters, largest value first; filters whose value is null are left out.
function sortByMetric(layer, value) {
  const filters = data.layers[layer].filters.filter((filter) => value(filter) !== null);
  filters.sort((a, b) => value(b) - value(a));
  return filters.map((filter) => filter.filter);
}

function classView(name) {
  const index = data.classes.indexOf(name);
  const loss = (filter) => filter.loss_increase[index];
  const needed = sortByMetric(deepest, loss).slice(0, 12);
  const preferring = [...layers].reverse().map((layer) => {
    const selectivity = (filter) => filter.preferred_class === name ? filter.selectivity : null;
    const numbers = sortByMetric(layer, selectivity);
    const text = numbers.length ? "The most selective come first." : "There are none.";
    const describe = (filter) => `selectivity ${twoDecimals(filter.selectivity)}`;
    return section(`Filters of ${layer} that prefer ${name}`, text, tiles(layer, numbers, describe));
  });
  return [
    paragraph(data.classes.map((other) => [link(["class", other], chip(other)), " "])),
    heading(name),
    paragraph(classSentence(index)),
    section("Needed most", `The filters of ${deepest} whose mean ablation raises the loss of ${name} most.`,
      tiles(deepest, needed, (filter) => `${nats(loss(filter))} nats`)),
    preferring,
  ];
}

// The row of trust.csv for a test and a condition; of several shares of the window, for the largest one.
function trustRow(test, condition) {
  const rows = data.trust.filter((row) => row.test === test && row.condition === condition);
  return rows.sort((a, b) => b.share - a.share)[0];
}

// How a projection is read, and how far it can be trusted.
function readingParagraphs() {
  const reading = "Grey is zero. Light and dark, and opposite colours, are opposite signs. A projection "
    + "shows what in one image an activation went back to, not what the filter responds to in general: "
    + "compare all examples. The pictures of this page are compressed, which blurs faint structure; the "
    + "pictures in deconv/ are not.";

  const kept = (condition) => trustRow("insertion", condition);
  const alike = (condition) => trustRow("partial rank correlation", condition);
  const projection = kept("projection");
  const chance = kept("chance");
  const edges = kept("edges x window profile");
  const otherFilter = kept("other filter, same window");
  const sameImage = alike("other filter, same window");
  const sameFilter = alike("same filter, other top-9 example");

  const isKnown = (row) => row !== undefined && row.median !== null;
  if (![projection, chance, edges, otherFilter, sameImage, sameFilter].every(isKnown)) {
    return [reading, "How far a projection can be trusted is not known, because trust.csv lacks a number."];
  }
  const caveat = " The second is lower also because the same pattern rarely lies at the same pixels of two "
    + "windows.";
  return [
    reading,
    `If only the ${percent(projection.share)} of a window that the projection ranks highest are kept, `
    + `${percent(projection.median)} of the unit's activation is left. If chance chooses them, `
    + `${percent(chance.median)} is left. These are medians over ${projection.n} units of conv4, each in one `
    + "of its filter's top examples.",
    "If the edges of the image choose them, weighted by the mean window profile, "
    + `${percent(edges.median)} is left. If another filter's projection in the same window does, `
    + `${percent(otherFilter.median)} is left.`,
    "The partial rank correlation of a filter's projection with another filter's projection in the same "
    + `window is ${twoDecimals(sameImage.median)}. Its correlation with the filter's own projection in `
    + `another of the top-9 examples is ${twoDecimals(sameFilter.median)}.`
    + (sameFilter.median < sameImage.median ? caveat : ""),
  ];
}

// A setting or a result of the training as text.
function factText(fact) {
  if (typeof fact === "number") return fourDigits(fact);
  if (Array.isArray(fact)) return fact.map(factText).join(", ");
  if (fact !== null && typeof fact === "object") {
    const entries = Object.entries(fact);
    return entries.map(([key, value]) => `${key}: ${factText(value)}`).join(", ");
  }
  return String(fact);
}

function runView() {
  const meanings = Object.values(METRICS).map(({ label, meaning }) => [label, meaning]);
  const facts = Object.entries(data.run).map(([key, fact]) => [key.replaceAll("_", " "), factText(fact)]);
  const figures = data.figures.map((name) =>
    element("a", { href: `../${encodePath(name.split("/"))}` }, name));
  return [
    heading("The run"),
    section("How to read a projection", "", readingParagraphs().map((text) => paragraph(text))),
    section("What the numbers mean", "", definitions(meanings)),
    section("Training", "", definitions(facts)),
    section("Other figures", "", element("div", { class: "files" }, figures)),
  ];
}

// ---- addresses: #conv4, #conv4/137, #conv4?sort=auc&class=car, #class/car, #run

function readAddress() {
  const [path, query] = location.hash.slice(1).split("?");
  const [first, second] = path.split("/").map(decodeURIComponent);
  const number = Number(second);
  if (first === "run") return { view: "run" };
  if (first === "class") {
    return { view: "class", name: data.classes.includes(second) ? second : data.classes[0] };
  }
  const layer = layers.includes(first) ? first : deepest;
  if (second && data.layers[layer].filters[number]) return { view: "filter", layer, number };
  return { view: "layer", layer, query };
}

function drawHeader(current) {
  const title = element("span", {}, `${data.title}, ${data.accuracy}`);
  const links = [...layers, "class", "run"].map((name) => link([name], name));
  header.replaceChildren(element("b", {}, "Filter explorer"), title, ...links);
  header.querySelector(`[href="#${current}"]`).setAttribute("aria-current", "page");
}

function show() {
  const { view, layer, number, name, query } = readAddress();
  if (view === "layer" && query !== undefined) tilesQuery = query;
  const views = {
    layer: () => layerView(layer),
    filter: () => filterView(layer, number),
    class: () => classView(name),
    run: runView,
  };
  const content = views[view]().flat(Infinity).filter((node) => node !== null);
  const before = main.dataset.filter;  // the filter's page that was shown until now, if it was one

  main.replaceChildren(...content);
  if (data.generated) {
    const warning = "Generated shapes, no photographs: they show that the code works, nothing more";
    main.prepend(element("div", { class: "loud" }, warning));
  }
  drawHeader(layer || view);
  document.title = `${main.querySelector("h1").textContent}, ${data.title}`;
  main.dataset.filter = view === "filter" ? `#${layer}/${number}` : "";

  // back among the tiles: to the filter one comes from
  const tile = view === "layer" && before && main.querySelector(`.tiles [href="${before}"]`);
  if (!tile) scrollTo(0, 0);
  (tile || main.querySelector("h1")).focus({ preventScroll: !tile });
}

addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  const { view, layer, number } = readAddress();
  if (view !== "filter" || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Escape") location.hash = layer;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const next = step && tilesShown.numbers[tilesShown.numbers.indexOf(number) + step];
  if (next !== undefined) location.hash = `${layer}/${next}`;
});
show();
</script>
</html>
"""
)


if __name__ == "__main__":
    run_script(main)
