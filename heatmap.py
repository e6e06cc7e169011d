"""Draw what the filters of conv4 respond to: over all classes, in each class, in single and changed images.

Run:    uv run heatmap.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_*.pth, outputs/activations.npz, outputs/projections.npz,
        outputs/filter_metrics.csv, outputs/class_metrics.csv; outputs/ablation.csv, outputs/trust.csv if they
        are there; data/stl10_binary/test_{X,y}.bin
Writes: outputs/heatmaps/class_filter_heatmap.png, outputs/heatmaps/class_*.png, outputs/heatmaps/images.png,
        outputs/heatmaps/occlusion.png, outputs/heatmaps/invariance.png, outputs/occlusion.csv,
        outputs/invariance.csv,
        outputs/explorer/index.html, outputs/explorer/conv*.webp, outputs/explorer/conv*/*.webp

The projection of a filter in an image starts from its strongest unit there. Its magnitude at a pixel is the
sum over RGB of absolute values, in units of normalised pixels.

Zeiler & Fergus 2014 change images in two ways to see what the network uses: a grey square slides over them
(section 4.2), and they are moved, enlarged and turned (Figure 5). Both are done here on test images that are
classified correctly. Grey is the mean colour of the training images, 0 in normalised pixels.
"""

import json
import re
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
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import affine
from tqdm import tqdm

from analyse_projections import class_means, rank_correlation, rank_filters
from CNN import CNN, LAYERS, Checkpoint, choose_device, load_checkpoint
from deconv import displayed, robust_scale, window_of
from deconv_full import (
    LEVELS,
    Projector,
    Units,
    project_evolution,
    project_units,
    read_snapshots,
    strongest_of,
)
from load_data import (
    IMAGE_SIZE,
    TITLES,
    Array,
    Split,
    atomic_write,
    lay_out,
    load_arrays,
    load_split,
    load_table,
    save_figure,
    save_table,
    set_style,
)

TOP_FILTERS = 4  # filters drawn of each class
TOP_IMAGES = 3  # images drawn of each filter: those of the class that drive it most
SUMMED_FILTERS = 16  # strongest filters of an image, whose projections are added up in images.png
OCCLUDER = 24  # pixels, side of the grey square that slides over an image: it hides a head or a wheel
OCCLUSION_STRIDE = 2  # pixels from one position of the square to the next
INVARIANCE_IMAGES = 5  # images in invariance.png, each of another class; the paper has 5
MEAN_IMAGES = 500  # images behind the means there, as many of each class, however they are classified
DEGREES: dict[str, list[float]] = {  # how far they are changed
    "shift": [*range(-24, 25, 2)],  # pixels, down is positive
    "zoom": [1 + k / 20 for k in range(17)],  # factor
    "angle": [*range(0, 351, 10)],  # degrees clockwise
}
EVOLUTION_IMAGES = 1000  # test images in which each snapshot's strongest activation is sought, for explorer/
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
OUTPUTS = Path("outputs")  # where results go

VEHICLES = ("airplane", "car", "ship", "truck")  # drawn above the animals
FILTERS_PER_LINE = 60  # columns of class_filter_heatmap.png
CHANGES = {  # arguments of `change`, and what figures call them
    "shift": "vertical shift (pixels)",
    "zoom": "scale (factor)",
    "angle": "rotation (degrees)",
}


def show(ax: Axes, picture: Array, text: str = "", **options: Any) -> Any:
    """Show pixels, with `text` above and without ticks; returns what a colour bar is made for."""
    ax.set(xticks=[], yticks=[])
    ax.set_title(text, fontsize=8, pad=3)
    return ax.imshow(picture, interpolation="nearest", **options)


# ---------------------------------------------------------------- over all classes


def draw_class_filters(means: Array, filters: pd.DataFrame, names: Sequence[str], heading: str) -> Figure:
    """Draw classes x filters: mean activation on the class over the filter's mean of all classes.

    Args:
        means: What `class_means` returned, (classes, filters).
        filters: Rows of filter_metrics.csv; dead filters are left out.
        names: Of the classes.
        heading: Title.
    """
    order = sorted(
        range(len(names)), key=lambda label: names[label] not in VEHICLES
    )  # vehicles, then animals
    active = filters[~filters["dead"]].sort_values("selectivity", ascending=False)
    groups = [active.loc[active["preferred_class"] == names[label], "filter"].tolist() for label in order]
    lines: list[list[tuple[int, list[int]]]] = [[]]  # (row of the preferred class, its filters), side by side
    for row, group in enumerate(groups):
        for start in range(0, len(group), FILTERS_PER_LINE):
            part = group[start : start + FILTERS_PER_LINE]
            if sum(len(others) + 1 for _, others in lines[-1]) + len(part) > FILTERS_PER_LINE:
                lines.append([])
            lines[-1].append((row, part))
    size = 8.3, 1.1 + (0.11 * len(names) + 0.4) * len(lines)
    fig, axes = plt.subplots(len(lines), 1, figsize=size, squeeze=False, layout="constrained")
    relative = (means / means.mean(axis=0).clip(min=1e-12))[order]
    for ax, line in zip(axes.flat, lines, strict=True):
        left = 0
        for row, part in line:
            extent = left, left + len(part), len(names), 0
            options: dict[str, Any] = {"vmin": 0, "vmax": 2, "cmap": "RdBu_r", "interpolation": "nearest"}
            drawn = ax.imshow(relative[:, part], aspect="auto", extent=extent, **options)
            ax.add_patch(Rectangle((left, row), len(part), 1, fill=False, edgecolor="black", linewidth=0.8))
            for place, number in enumerate(part):
                style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "top", "fontsize": 6}
                ax.text(left + place + 0.5, len(names) + 0.3, str(number), **style)
            left += len(part) + 1
        ax.set(xlim=(0, FILTERS_PER_LINE), ylim=(len(names), 0), xticks=[])
        ax.set_yticks(np.arange(len(names)) + 0.5, [names[label] for label in order], fontsize=7)
        sns.despine(ax=ax, left=True, bottom=True)
    bar = fig.colorbar(drawn, ax=axes, location="bottom", aspect=50, shrink=0.6, pad=0.02, extend="max")
    bar.set_label("mean activation on the class / mean over all classes")
    fig.suptitle(heading)
    return fig


# ---------------------------------------------------------------- in each class and in single images


def sum_projections(images: Array, net: CNN, units: Units, group: Array, doing: str) -> tuple[Array, Array]:
    """Project units of conv4 and add the projections up, group by group.

    Args:
        images: uint8 (images, 3, 96, 96).
        net: The network.
        units: What is projected.
        group: Number of each unit's group, 0, 1, ...
        doing: Label of the progress bar.

    Returns:
        Sum of magnitudes (groups, 96, 96), and signed sum (groups, 3, 96, 96).
    """
    groups = int(group.max()) + 1
    magnitudes = np.zeros((groups, IMAGE_SIZE, IMAGE_SIZE))
    signed = np.zeros((groups, 3, IMAGE_SIZE, IMAGE_SIZE))
    for which, origins, windows in project_units(Projector(net, len(LAYERS) - 1), images, units, doing):
        for number, (top, left), window in zip(group[which], origins.clip(min=0), windows, strict=True):
            height, width, _ = window.shape
            inside = slice(top, top + height), slice(left, left + width)
            magnitudes[number, *inside] += np.abs(window).sum(axis=2)
            signed[number, :, *inside] += window.transpose(2, 0, 1)
    return magnitudes, signed


def draw_class(
    ranking: pd.DataFrame, means: Array, images: Array, magnitudes: Array, values: Array, heading: str
) -> Figure:
    """Draw a class's top filters, one a row: mean magnitude, then pairs of image and projection laid over it.

    Each filter has a scale of its own: a filter's gain, not what it shows, makes it weak.

    Args:
        ranking: What `rank_filters` says of these filters, with their columns of filter_metrics.csv.
        means: Magnitude averaged over all images of the class, (filters, 96, 96).
        images: That drive each filter most, uint8 (filters, images, 3, 96, 96).
        magnitudes: Of the projections in these images, (filters, images, 96, 96).
        values: Strongest activations there, (filters, images).
        heading: Title.
    """
    filters, count = images.shape[:2]
    size = 2.4 + 2.5 * count, 1.4 + 1.4 * filters
    panels = 1 + 2 * count  # in a row
    fig, axes = plt.subplots(filters, panels, figsize=size, squeeze=False, layout="constrained")
    colours = sns.color_palette("rocket", as_cmap=True)(np.linspace(0.3, 1, 256))
    colours[:, 3] = np.linspace(0, 1, 256) ** 0.6  # clear at zero, so that the image stays visible
    style: dict[str, Any] = {"vmin": 0, "vmax": 1}
    for k, (row, of_filter) in enumerate(zip(axes, ranking.itertuples(), strict=True)):
        mean = show(
            row[0], means[k] / means[k].max(), "" if k else "mean over the class", cmap="mako", **style
        )
        text = f"filter {of_filter.filter}\nselectivity {of_filter.selectivity:.2f}\n"
        text += f"mean activation {of_filter.activation_mean:.2f}\nprefers {of_filter.preferred_class}"
        text += f" in\n{of_filter.preferred_share:.0%} of samples"
        if str(of_filter.top_class) != str(of_filter.preferred_class):
            text += f"\nnine strongest images:\nmostly {of_filter.top_class}"
        row[0].set_ylabel(text, rotation=0, ha="right", va="center")
        top = robust_scale(magnitudes[k])
        for i, (left, right) in enumerate(row[1:].reshape(-1, 2)):
            picture = np.moveaxis(images[k, i], 0, 2)
            show(left, picture, f"activation {values[k, i]:.2f}")
            show(right, picture.mean(axis=2), cmap="gray", vmin=0, vmax=400)  # 255 is the brightest: dimmed
            over = show(right, magnitudes[k, i] / top, cmap=ListedColormap(colours), **style)
    below: dict[str, Any] = {"location": "bottom", "pad": 0.02}
    fig.colorbar(mean, ax=axes[:, 0], aspect=10, label="mean magnitude\n(largest: 1)", **below)
    bar = fig.colorbar(over, ax=axes[:, 1:], aspect=40, shrink=0.6, extend="max", **below)
    bar.ax.set_facecolor("0.3")
    bar.set_label("magnitude of one projection (99.5th percentile of the row: 1)")
    fig.suptitle(heading)
    return fig


def draw_images(
    images: Array, magnitudes: Array, signed: Array, texts: Sequence[str], heading: str
) -> Figure:
    """Draw images, two a row, each beside the summed magnitude and the signed sum of its projections.

    Args:
        images: uint8 (images, 3, 96, 96).
        magnitudes: (images, 96, 96)
        signed: (images, 3, 96, 96)
        texts: What is written above each image.
        heading: Title.
    """
    rows = -(-len(images) // 2)
    size = 8, 1.6 + 1.42 * rows
    fig, axes = plt.subplots(rows, 6, figsize=size, squeeze=False, layout="constrained")
    panels, coloured, top = axes.reshape(-1, 3), displayed(signed), robust_scale(magnitudes)
    for ax in panels[len(images) :].flat:
        ax.axis("off")
    for k, (left, middle, right) in enumerate(panels[: len(images)]):
        show(left, np.moveaxis(images[k], 0, 2), texts[k])
        drawn = show(
            middle, magnitudes[k], "" if k > 1 else "sum of magnitudes", cmap="mako", vmin=0, vmax=top
        )
        show(right, coloured[k], "" if k > 1 else "signed sum")
    bar = fig.colorbar(drawn, ax=axes, location="bottom", aspect=40, pad=0.02, shrink=0.6, extend="max")
    bar.set_label("sum of magnitudes (normalised pixels); in the signed sum grey is zero, one scale for all")
    fig.suptitle(heading)
    return fig


# ---------------------------------------------------------------- occlusion (section 4.2)


def first_correct(images: Array, labels: Array, net: CNN) -> Array:
    """Return, for each class in turn, its first image that is classified correctly, if there is one."""
    chosen = []
    for label in np.unique(labels):
        for which in np.array_split(np.flatnonzero(labels == label), 20):
            guesses = net(net.normalise(torch.from_numpy(images[which]))).argmax(dim=1).cpu().numpy()
            if (guesses == label).any():
                chosen.append(which[guesses == label][0])
                break
    return np.array(chosen, np.int64)


def square_positions(side: int, stride: int) -> Array:
    """Return which rows (columns alike) of the image a square covers at each of its positions.

    Its centres are `stride` pixels apart, the first one stride // 2 from the border. The border cuts squares
    that reach beyond it.

    Returns:
        (positions, 96)
    """
    starts = np.arange(stride // 2, IMAGE_SIZE, stride)[:, None] - side // 2
    pixels = np.arange(IMAGE_SIZE)
    return (pixels >= starts) & (pixels < starts + side)


class Occlusion(NamedTuple):
    """What the network makes of an image with a grey square at each position, (down, across) each."""

    activity: Array  # sum over the filter's map, as a share of that without the square
    unit: Array  # activation of the filter's strongest unit, likewise
    probability: Array  # of each class, (down, across, classes)
    label: int  # the true class

    @property
    def truth(self) -> Array:
        """Return the probability of the true class."""
        return self.probability[:, :, self.label]

    @property
    def taken(self) -> Array:
        """Return whether another class comes first."""
        return np.asarray(self.probability.argmax(axis=2) != self.label)


def occlusion_sensitivity(
    image: Array, label: int, unit: Sequence[int], net: CNN, covered: Array
) -> Occlusion:
    """Slide a grey square over an image; measure a filter of conv4, its strongest unit, and the classes.

    The paper measures the sum over the map (Figure 6 of the ECCV version); the projection shows one unit.

    Args:
        image: uint8 (3, 96, 96).
        label: Its class.
        unit: Filter, row and column in the pooled map.
        net: The network.
        covered: What `square_positions` returned.
    """
    whole, (filter_, row, column) = net.normalise(torch.from_numpy(image[None])), unit
    lines, found = torch.from_numpy(covered).to(whole.device), []
    before = net.features(whole)[-1][0][0, filter_]
    for rows in lines:  # one copy of the image for each place across
        squares = rows[None, :, None] & lines[:, None, :]  # (places across, 96, 96)
        pooled = net.features(whole.masked_fill(squares[:, None], 0))[-1][0]
        maps = pooled[:, filter_]
        shares = maps.sum(dim=(1, 2)) / before.sum(), maps[:, row, column] / before[row, column]
        found.append((*shares, net.classify(pooled).softmax(dim=1)))
    activity, of_unit, probability = (torch.stack(of).cpu().numpy() for of in zip(*found, strict=True))
    return Occlusion(activity, of_unit, probability, label)


def tabulate_occlusion(
    occlusions: Sequence[Occlusion], units: Units, under: Array, names: Sequence[str]
) -> pd.DataFrame:
    """Return occlusion.csv, one row an image.

    activity and unit: the lowest share that a square leaves. correlation: over the square's positions, of the
    unit's loss with the projection's magnitude `under` the square (ranks). taken_for: the classes that come
    first instead of the true one, with the share of positions.
    """
    rows = []
    for k, found in enumerate(occlusions):
        shares = np.bincount(found.probability.argmax(axis=2).ravel(), minlength=len(names)) / found.unit.size
        others = [other for other in np.argsort(-shares, kind="stable") if other != found.label]
        entry = found.activity.min(), found.unit.min(), rank_correlation(1 - found.unit, under[k])
        texts = [f"{names[other]} {shares[other]:.0%}" for other in others if shares[other] >= 0.005]
        rows.append(
            (*(of[k] for of in units[:2]), names[found.label], units.value[k], *entry, ", ".join(texts))
        )
    columns = ["image", "filter", "label", "activation", "activity", "unit", "correlation", "taken_for"]
    return pd.DataFrame(rows, columns=columns)


def draw_occlusion(
    images: Array,
    occlusions: Sequence[Occlusion],
    magnitudes: Array,
    table: pd.DataFrame,
    square: Sequence[int],
    heading: str,
) -> Figure:
    """Draw maps of an occluded image, one image a row (Figure 6 of the paper's ECCV version).

    Args:
        images: uint8 (images, 3, 96, 96).
        occlusions: What `occlusion_sensitivity` returned for them.
        magnitudes: Of the units' projections, (images, 96, 96).
        table: What `tabulate_occlusion` returned.
        square: Its side, and the pixels from one position to the next.
        heading: Title.
    """
    size, (side, stride) = (8, 1.7 + 1.5 * len(images)), square
    fig, axes = plt.subplots(len(images), 5, figsize=size, squeeze=False, layout="constrained")
    above = ["image, square", "activity of its\nstrongest filter", "activation of its\nstrongest unit"]
    above += ["projection of\nthis unit", "probability of\nthe true class"]
    top, reach = robust_scale(magnitudes), max(abs(found.activity - 1).max() for found in occlusions)
    centres = np.arange(len(occlusions[0].unit)) * stride + stride // 2
    first, last = centres[0] - stride / 2, centres[-1] + stride / 2
    whole: dict[str, Any] = {"extent": (0, IMAGE_SIZE, IMAGE_SIZE, 0)}
    maps: dict[str, Any] = {"extent": (first, last, last, first)}  # a value stands for stride x stride pixels
    for k, (row, found, of_image) in enumerate(zip(axes, occlusions, table.itertuples(), strict=True)):
        texts = [""] * 5 if k else above
        lowest = np.unravel_index(found.unit.argmin(), found.unit.shape)
        corner = [centres[place] - side / 2 for place in reversed(lowest)]
        show(row[0], np.moveaxis(images[k], 0, 2), texts[0], **whole)
        for colour, width in (("black", 2.2), ("white", 1.0)):
            style: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": width}
            row[0].add_patch(Rectangle((corner[0], corner[1]), side, side, **style))
        name = f"{of_image.label}\nfilter {of_image.filter}\nactivation {of_image.activation:.2f}"
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": 1 - reach, "vmax": 1 + reach}
        activity = show(row[1], found.activity, texts[1], **scale, **maps)
        unit = show(row[2], found.unit, texts[2], cmap="RdBu_r", vmin=0, vmax=2, **maps)
        projection = show(row[3], magnitudes[k], texts[3], cmap="mako", vmin=0, vmax=top, **whole)
        probability = show(row[4], found.truth, texts[4], cmap="viridis", vmin=0, vmax=1, **maps)
        if of_image.taken_for:
            row[4].contour(centres, centres, found.taken, levels=[0.5], colors="white", linewidths=1)
            row[4].set_xlabel(of_image.taken_for, fontsize=7, labelpad=2)
        for ax in row:
            ax.set(xlim=(0, IMAGE_SIZE), ylim=(IMAGE_SIZE, 0))
    below: dict[str, Any] = {"location": "bottom", "aspect": 12, "pad": 0.01, "shrink": 0.9}
    units = ["share of that\nwithout a square"] * 2 + ["magnitude\n(normalised pixels)"]
    units.append("probability; outlined:\nanother class comes first")
    for column, drawn in enumerate((activity, unit, projection, probability), start=1):
        bar = fig.colorbar(drawn, ax=axes[:, column], **below)
        bar.ax.tick_params(labelsize=7)
        bar.set_label(units[column - 1], fontsize=8)
    fig.suptitle(heading)
    return fig


# ---------------------------------------------------------------- invariance (Figure 5)


def change(image: Tensor, shift: float = 0, zoom: float = 1, angle: float = 0) -> Tensor:
    """Move, enlarge or turn normalised images (..., 3, 96, 96) about the centre; what is left bare is grey.

    Args:
        image: What is changed.
        shift: Pixels downwards.
        zoom: Factor.
        angle: Degrees clockwise.
    """
    options: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "fill": [0.0, 0.0, 0.0]}
    place = [0.0, float(shift)]
    return cast(Tensor, affine(image, float(angle), place, float(zoom), [0.0, 0.0], **options))


MEASURES = ("distance in conv1", "distance in conv4", "probability of the true class", "accuracy")


def measure_invariance(
    net: CNN, images: Array, labels: Array, kind: str, degrees: Sequence[float]
) -> dict[str, Array]:
    """Measure how far features of images move when these are changed (Figure 5 of the paper).

    Args:
        net: The network, in evaluation mode.
        images: uint8 (images, 3, 96, 96).
        labels: Their classes.
        kind: One of `CHANGES`.
        degrees: How far they are changed.

    Returns:
        (images, degrees) for each of `MEASURES`: Euclidean distance between the pooled maps of the changed
        and the unchanged image, as a share of the norm of the latter; probability of the true class; 1 where
        the image is classified correctly.
    """
    found: dict[str, list[Array]] = {name: [] for name in MEASURES}
    for start in range(0, len(images), 50):
        batch = net.normalise(torch.from_numpy(images[start : start + 50]))
        truth = torch.from_numpy(labels[start : start + 50]).to(batch.device)
        whole, columns = net.features(batch), []
        for degree in degrees:
            features = net.features(change(batch, **{kind: degree}))
            distances = [
                (features[k][0] - whole[k][0]).flatten(1).norm(dim=1) / whole[k][0].flatten(1).norm(dim=1)
                for k in (0, -1)
            ]
            shares = net.classify(features[-1][0]).softmax(dim=1)
            of_truth = shares.gather(1, truth[:, None])[:, 0]
            columns.append(torch.stack([*distances, of_truth, (shares.argmax(dim=1) == truth).float()]))
        for name, values in zip(MEASURES, torch.stack(columns, dim=2).cpu().numpy(), strict=True):
            found[name].append(values.astype(np.float64))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def tabulate_invariance(kind: str, degrees: Sequence[float], measured: Mapping[str, Array]) -> pd.DataFrame:
    """Return rows of invariance.csv: mean over the images with its 95 % interval (normal)."""
    tables = []
    for name, values in measured.items():
        mean, reach = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / len(values) ** 0.5
        columns = {"kind": kind, "degree": degrees, "measure": name, "mean": mean}
        columns |= {"low": mean - reach, "high": mean + reach, "n": len(values)}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def draw_examples(ax: Axes, net: CNN, images: Array, kind: str, degrees: Sequence[float]) -> None:
    """Draw the images, one a row with a bar in its colour, changed by five of the degrees."""
    shown = [degrees[k] for k in np.linspace(0, len(degrees) - 1, 5).round().astype(int)]
    normalised = net.normalise(torch.from_numpy(images))
    changed = torch.stack([change(normalised, **{kind: degree}) for degree in shown], dim=1)
    pixels = (255 * (changed * net.std + net.mean)).clamp(0, 255).byte().cpu().numpy()
    # (images, examples, 3, rows, columns) -> one sheet
    sheet = pixels.transpose(0, 3, 1, 4, 2).reshape(len(images) * IMAGE_SIZE, -1, 3)
    ax.imshow(sheet, interpolation="nearest", extent=(0, len(shown), len(images), 0))
    ax.set_xticks(np.arange(len(shown)) + 0.5, [f"{degree:g}" for degree in shown])
    ax.set_yticks([])
    for k in range(len(images)):
        ax.add_patch(Rectangle((-0.16, k + 0.04), 0.1, 0.92, color=f"C{k}", clip_on=False))


def draw_invariance(
    net: CNN,
    images: Array,
    degrees: Mapping[str, Sequence[float]],
    curves: Mapping[str, Mapping[str, Array]],
    table: pd.DataFrame,
    names: Sequence[str],
) -> Figure:
    """Draw the layout of the paper's Figure 5, one kind of change a row, and means over many images.

    Args:
        net: The network.
        images: Of the examples, uint8 (images, 3, 96, 96).
        degrees: How far they are changed, by kind.
        curves: Of the examples, what `measure_invariance` returned, by kind.
        table: invariance.csv.
        names: Of the examples.
    """
    size, widths = (9, 0.9 + 1.95 * len(curves)), [1.15, 1, 1, 1, 1]
    layout: dict[str, Any] = {"sharey": "col", "width_ratios": widths, "layout": "constrained"}
    fig: Figure
    fig, axes = plt.subplots(len(curves), 5, figsize=size, squeeze=False, **layout)
    for row, (kind, measured) in zip(axes, curves.items(), strict=True):
        draw_examples(row[0], net, images, kind, degrees[kind])
        for ax, (name, values) in zip(row[1:], measured.items(), strict=True):
            for k, curve in enumerate(values if name != "accuracy" else ()):
                style = ("-", "--", "-.", ":")[k % 4]
                ax.plot(degrees[kind], curve, color=f"C{k}", linestyle=style, linewidth=0.9, label=names[k])
            rows = table[(table["kind"] == kind) & (table["measure"] == name)]
            ax.plot(
                rows["degree"],
                rows["mean"],
                color="black",
                linewidth=1.6,
                label=f"mean of {rows['n'].iloc[0]} images",
            )
            ax.fill_between(rows["degree"], rows["low"], rows["high"], color="black", alpha=0.25, linewidth=0)
        for ax in row:
            ax.set_xlabel(CHANGES[kind], fontsize=8)
            ax.tick_params(labelsize=7)
            sns.despine(ax=ax)
        row[0].spines[:].set_visible(False)
    texts = "examples", "distance in conv1\n(share of the norm)", "distance in conv4\n(share of the norm)"
    for ax, text in zip(axes[0], (*texts, "probability of\nthe true class", "accuracy"), strict=True):
        ax.set_title(text, fontsize=9)
    for ax in axes[0, 1:]:  # of a column, which shares them
        ax.set_ylim(bottom=0)
    fig.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return fig


# ---------------------------------------------------------------- explorer: every filter on one page


def as_pixels(pictures: Array) -> Array:
    """Return pictures (n, rows, columns, 3) from 0 to 1 as opaque uint8 (n, rows, columns, 4)."""
    return np.pad((255 * pictures).round().astype(np.uint8), [(0, 0)] * 3 + [(0, 1)], constant_values=255)


def cut_patches(images: Array, image: Array, origins: Array, size: int) -> Array:
    """Cut windows out of images, uint8 (n, size, size, 4); transparent beyond the border and for image -1."""
    opaque, patches = np.full((1, IMAGE_SIZE, IMAGE_SIZE), 255, np.uint8), []
    for n, (top, left) in zip(image, origins, strict=True):
        frame = np.concatenate([images[n], opaque]) * np.uint8(n >= 0)
        patches.append(window_of(frame, top, left, size, 0).transpose(1, 2, 0))
    return np.stack(patches)


def save_panels(path: Path, panels: Array, columns: int) -> None:
    """Write panels (n, rows, columns, 4) as one WebP picture, `columns` of them a row.

    With losses WebP halves the resolution of colours, which shows in small windows. Those are stored without,
    after rounding to multiples of 8, which halves the file.
    """
    small = panels.shape[2] < 32
    if small:
        panels = np.minimum((panels + np.uint16(4)) // 8 * 8, 255).astype(np.uint8)
    options: dict[str, Any] = {"lossless": True} if small else {"quality": 55}
    with atomic_write(path) as partial:
        Image.fromarray(lay_out(panels, columns, 0)).save(partial, "WEBP", **options)


def draw_filters(
    folder: Path, layer: str, examples: Mapping[str, Array], developed: Array, images: Array
) -> None:
    """Write the pictures of a layer.

    LAYER/NNN.webp has two rows of panels. Above: projections of the filter's strongest images, of weaker
    ones, and of its strongest activation after some epochs; each level and each epoch has its own scale.
    Below: the patches of the former two. LAYER.webp has the first projection of every filter, 16 a row, each
    above its patch.

    Args:
        folder: Where they go.
        layer: Its name.
        examples: Of `deconv_full.project_top`, without the name of the layer.
        developed: Projections after each epoch as pixels, (filters, epochs, rows, columns, 4).
        images: uint8 (images, 3, 96, 96).
    """

    def draw(n: int) -> Array:
        levels = np.split(examples["level_projection"][n].astype(np.float32), len(LEVELS))
        shown = [displayed(part) for part in (examples["projection"][n], *levels)]
        above = np.concatenate([as_pixels(np.concatenate(shown)), developed[n]])
        which, origins = (
            np.concatenate([examples[key][n], examples[f"level_{key}"][n]]) for key in ("image", "origin")
        )
        below = cut_patches(images, which, origins, above.shape[1])
        save_panels(folder / layer / f"{n:03d}.webp", np.concatenate([above, below]), len(above))
        return np.concatenate([above[0], below[0]])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        numbers = range(len(developed))
        first = list(tqdm(pool.map(draw, numbers), f"pictures of {layer}", len(numbers), disable=None))
    save_panels(folder / f"{layer}.webp", np.stack(first), 16)


def describe_filters(
    layer: str, maxima: Array, labels: Array, names: Sequence[str], tables: Mapping[str, pd.DataFrame]
) -> list[dict[str, Any]]:
    """Return what the page says of each filter of a layer, but for its pictures.

    Its row of filter_metrics.csv; `means` of each class with both limits; `lost`, the accuracy of each class
    and of all that ablation costs (conv4); `similar`, the five filters whose activations correlate most with
    its own, and the coefficients. Of the images of the preferred class and of the others: `images`, how many;
    `zeros`, on how many it does not fire; `counts` in 24 bins from 0 to `largest` of those on which it does.

    Args:
        layer: Its name.
        maxima: Strongest activation of each filter in each test image, (images, filters).
        labels: Of the images.
        names: Of the classes.
        tables: filter, class and ablation, the latter only if there is one.
    """
    filters, classes = (table[table["layer"] == layer] for table in (tables["filter"], tables["class"]))
    means = classes[["activation_mean", "activation_low", "activation_high"]].to_numpy()
    lost = (
        tables["ablation"]["accuracy_lost"].to_numpy() if layer == "conv4" and "ablation" in tables else None
    )
    with np.errstate(invalid="ignore"):  # a dead filter correlates with none
        correlation = np.nan_to_num(np.corrcoef(maxima.T), nan=-1)
    np.fill_diagonal(correlation, -1)
    described = cast(list[dict[str, Any]], filters.drop(columns="layer").to_dict("records"))
    for n, (of_filter, own) in enumerate(zip(described, maxima.T, strict=True)):
        nearest = np.argsort(-correlation[n], kind="stable")[:5]
        prefers = labels == (-1 if of_filter["dead"] else names.index(of_filter["preferred_class"]))
        groups, largest = (own[prefers], own[~prefers]), max(own.max(), 1e-9)
        of_filter["means"] = means.reshape(len(described), len(names), 3)[n]
        of_filter["lost"] = None if lost is None else lost.reshape(len(described), -1)[n]
        of_filter["similar"] = [(k, correlation[n, k]) for k in nearest if correlation[n, k] > 0]
        of_filter |= {"images": [len(group) for group in groups], "largest": largest}
        of_filter["zeros"] = [np.count_nonzero(group == 0) for group in groups]
        of_filter["counts"] = [np.histogram(group[group > 0], 24, (0, largest))[0] for group in groups]
    return described


def as_json(content: Any) -> str:
    """Return JSON that can stand inside a page: numbers with five digits, null for nan, no < that ends it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(of_key) for key, of_key in value.items()}
        if isinstance(value, list | tuple | np.ndarray):
            return [plain(item) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float):
            return float(f"{value:.5g}") if np.isfinite(value) else None
        return value

    return json.dumps(plain(content), separators=(",", ":")).replace("<", r"\u003c")


def write_explorer(
    outputs: Path, checkpoint: Checkpoint, snapshots: Sequence[Checkpoint], test: Split, evolution_images: int
) -> None:
    """Write explorer/index.html and its pictures.

    Args:
        outputs: Folder with the files of the earlier stages.
        checkpoint: The network.
        snapshots: What `read_snapshots` returned.
        test: Test images and labels.
        evolution_images: In how many of them each snapshot's strongest activation is sought.
    """
    folder, names, net = outputs / "explorer", checkpoint.class_names, checkpoint.net
    for old in [*folder.glob("index.html"), *folder.rglob("*.webp")]:  # of a network with more filters
        old.unlink()
    files = {"filter": "filter_metrics", "class": "class_metrics", "ablation": "ablation", "trust": "trust"}
    paths = {name: outputs / f"{file}.csv" for name, file in files.items()}
    needed = "filter", "class"
    tables = {n: load_table(path, checkpoint) for n, path in paths.items() if n in needed or path.is_file()}

    developed: dict[str, list[Array]] = {layer: [] for layer in LAYERS}
    for snapshot in snapshots:
        found = project_evolution(test.images[:evolution_images], [snapshot], max(net.config["filters"]), 32)
        for layer, (_, projections) in found.items():
            shown = [displayed(projection) for projection in projections[:, 0]]
            developed[layer].append(as_pixels(np.stack(shown)))
    layers = {}
    for layer, after in developed.items():
        (maxima,) = load_arrays(outputs / "activations.npz", checkpoint, f"{layer}_max")
        keys = [
            f"{prefix}{k}" for prefix in ("", "level_") for k in ("image", "value", "origin", "projection")
        ]
        arrays = load_arrays(outputs / "projections.npz", checkpoint, *(f"{layer}_{key}" for key in keys))
        examples = dict(zip(keys, arrays, strict=True))
        draw_filters(folder, layer, examples, np.stack(after, axis=1), test.images)
        filters = describe_filters(layer, maxima, test.labels, names, tables)
        for n, of_filter in enumerate(filters):
            for name, prefix in (("top", ""), ("levels", "level_")):
                pairs = examples[f"{prefix}image"][n], examples[f"{prefix}value"][n]
                of_filter[name] = list(zip(*pairs, strict=True))
        layers[layer] = {"size": after[0].shape[1], "columns": min(16, len(filters)), "filters": filters}

    confusion = np.zeros((len(names), len(names)), np.int64)
    for which in np.array_split(np.arange(len(test.labels)), -(-len(test.labels) // 32)):
        guesses = net(net.normalise(torch.from_numpy(test.images[which]))).argmax(dim=1).cpu().numpy()
        np.add.at(confusion, (test.labels[which], guesses), 1)
    figures = sorted(str(path.relative_to(outputs)) for path in outputs.rglob("*.png"))
    facts = {
        "title": TITLES[checkpoint.dataset],
        "generated": checkpoint.dataset == "shapes",
        "classes": names,
        "colours": sns.color_palette("colorblind", len(names)).as_hex(),
        "labels": test.labels,
        "accuracy": checkpoint.accuracy(),
        "epochs": [snapshot.epochs for snapshot in snapshots],
        "evolution_images": len(test.images[:evolution_images]),
        "levels": LEVELS,
        "layers": layers,
        "confusion": confusion,
        "trust": tables["trust"].to_dict("records") if "trust" in tables else None,
        "run": {"epochs": checkpoint.epochs, **checkpoint.metrics, **checkpoint.settings},
        "figures": [name for name in figures if not name.startswith("readme")],
    }
    with atomic_write(folder / "index.html") as partial:
        partial.write_text(EXPLORER.replace("__DATA__", as_json(facts)), encoding="utf-8")
    print(f"wrote {folder / 'index.html'}")


def main() -> None:
    """Draw filters over all classes, in each class, in single images, in occluded and in changed ones."""
    set_style()
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    net, names, folder = checkpoint.net, checkpoint.class_names, OUTPUTS / "heatmaps"
    maxima, positions = load_arrays(OUTPUTS / "activations.npz", checkpoint, "conv4_max", "conv4_position")
    filters, classes = (
        load_table(OUTPUTS / f"{name}_metrics.csv", checkpoint) for name in ("filter", "class")
    )
    images, labels = load_split(checkpoint.dataset, DATA_DIR, "test")
    source = f"{len(images):,} test images of {TITLES[checkpoint.dataset]}"
    print(f"drawing conv4 on {source} on {device}, torch {torch.__version__}")
    source += f" ({checkpoint.accuracy()})"

    # over all classes
    conv4 = filters[filters["layer"] == "conv4"]
    heading = f"conv4 on {source}; {conv4['dead'].sum()} dead filters left out"
    figure = draw_class_filters(class_means(classes, names), conv4, names, heading)
    save_figure(folder / "class_filter_heatmap.png", figure)

    # in each class
    sums, shown = [], []
    for label, name in enumerate(names):
        ranking = rank_filters(filters, classes, names, name).head(TOP_FILTERS)
        ranking = ranking.merge(conv4[["filter", "preferred_class", "preferred_share", "top_class"]])
        members, chosen = np.flatnonzero(labels == label), ranking["filter"].to_numpy()
        order = np.argsort(-maxima[members][:, chosen], axis=0, kind="stable")[:TOP_IMAGES]
        top = members[order].T  # (filters, images)
        strongest = np.argsort(-maxima[members[0]], kind="stable")[:SUMMED_FILTERS]
        # groups: each filter over the whole class; each filter in each of its top images; the first image
        n, m = len(chosen), top.size
        image = np.concatenate([np.tile(members, n), top.ravel(), np.full(len(strongest), members[0])])
        filter_ = np.concatenate([np.repeat(chosen, len(members)), np.repeat(chosen, m // n), strongest])
        sizes = [len(members)] * n + [1] * m + [len(strongest)]
        group = np.repeat(np.arange(n + m + 1), sizes)
        units = strongest_of(maxima, positions, image, filter_)
        magnitudes, signed = sum_projections(images, net, units, group, name)
        sums.append((magnitudes[-1], signed[-1]))
        shown.append(members[0])
        panels = magnitudes[n:-1].reshape(*top.shape, IMAGE_SIZE, IMAGE_SIZE)
        heading = f"{name}: top {n} filters of conv4, {len(members):,} of the {source}"
        values = maxima[top, chosen[:, None]]
        figure = draw_class(ranking, magnitudes[:n] / len(members), images[top], panels, values, heading)
        save_figure(folder / f"class_{label}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}.png", figure)

    # in single images
    rising = np.sort(maxima[shown], axis=1)
    shares = rising[:, -SUMMED_FILTERS:].sum(axis=1) / rising.sum(axis=1)
    heading = f"First image of each class, from the {source}.\nAdded up: projections of its {SUMMED_FILTERS}"
    heading += " strongest filters of conv4; of all filters'\nactivations, each at its strongest unit, "
    heading += f"they hold {shares.min():.0%} to {shares.max():.0%}"
    magnitudes, signed = (np.stack(parts) for parts in zip(*sums, strict=True))
    save_figure(folder / "images.png", draw_images(images[shown], magnitudes, signed, names, heading))

    # in occluded images
    right = first_correct(images, labels, net)
    units = strongest_of(maxima, positions, right, maxima[right].argmax(axis=1))
    covered = square_positions(OCCLUDER, OCCLUSION_STRIDE)
    occlusions = [
        occlusion_sensitivity(images[n], int(labels[n]), (f, row, column), net, covered)
        for n, f, row, column, _ in tqdm(zip(*units, strict=True), "occlusion", len(right), disable=None)
    ]
    magnitudes, _ = sum_projections(images, net, units, np.arange(len(right)), "projections")
    table = tabulate_occlusion(occlusions, units, covered @ magnitudes @ covered.T, names)
    save_table(OUTPUTS / "occlusion.csv", checkpoint, table)
    heading = f"A grey square of {OCCLUDER} x {OCCLUDER} pixels slides over the first correctly classified"
    heading += f" image of each class,\n{len(right)} of the {source}. Strongest filter: of conv4; its\n"
    heading += "activity: sum over its map. Frame: the square that takes most of the unit's activation"
    square = OCCLUDER, OCCLUSION_STRIDE
    figure = draw_occlusion(images[right], occlusions, magnitudes, table, square, heading)
    save_figure(folder / "occlusion.png", figure)

    # in images that are moved, enlarged and turned
    place = pd.Series(labels).groupby(labels).cumcount()  # of an image in its class
    moved, many = right[:INVARIANCE_IMAGES], np.flatnonzero(place < MEAN_IMAGES // len(names))
    curves, tables = {}, []
    for kind, degrees in tqdm(DEGREES.items(), "invariance", disable=None):
        curves[kind] = measure_invariance(net, images[moved], labels[moved], kind, degrees)
        measured = measure_invariance(net, images[many], labels[many], kind, degrees[::2])
        tables.append(tabulate_invariance(kind, degrees[::2], measured))
    table = pd.concat(tables, ignore_index=True)
    save_table(OUTPUTS / "invariance.csv", checkpoint, table)
    figure = draw_invariance(
        net, images[moved], DEGREES, curves, table, [names[label] for label in labels[moved]]
    )
    heading = f"{len(moved)} correctly classified of the {source}, moved, enlarged and turned.\n"
    heading += f"Black: mean of {len(many)} images, as many of each class, with its 95 % interval"
    figure.suptitle(heading)
    save_figure(folder / "invariance.png", figure)

    # every filter on one page
    snapshots = read_snapshots(CHECKPOINT.parent / "snapshots", checkpoint)
    write_explorer(OUTPUTS, checkpoint, snapshots, Split(images, labels), EVOLUTION_IMAGES)
    print(f"this was the last stage: open {OUTPUTS / 'explorer/index.html'}")


# ---------------------------------------------------------------- the page of the explorer

EXPLORER = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Filter explorer</title>
<style>
:root { color-scheme: light dark; --paper: #fbfaf6; --ink: #1d1c1a; --soft: #5c5952; --line: #d8d3c6;
  --hatch: #e4dfd2; --link: #0b5796; --bar: #9a9484; }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #e9e6df; --soft: #aaa69b;
  --line: #3b3933; --hatch: #2d2b27; --link: #8fc4f2; --bar: #77725f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
header, main { max-width: 1520px; margin: auto; padding: 10px 20px; }
header { display: flex; flex-wrap: wrap; gap: 2px 18px; border-bottom: 1px solid var(--line); }
header span { color: var(--soft); margin-right: auto; }
h1 { font-size: 26px; line-height: 1.2; margin: 14px 0 4px; outline: none; }
h2 { font-size: 16px; margin: 26px 0 2px; padding-top: 8px; border-top: 1px solid var(--line); }
h3 { font-size: 13px; margin: 16px 0 6px; }
p { max-width: 80ch; margin: 6px 0 12px; }
.soft, small, th { color: var(--soft); font-weight: normal; font-size: inherit; }
.loud { background: #ffd54a; color: #000; font-weight: 600; padding: 8px; text-align: center; }
a { color: var(--link); text-underline-offset: 3px; }
a[aria-current] { color: var(--ink); font-weight: 600; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
select, label { font: inherit; margin-right: 14px; }
.chip { display: inline-block; padding: 0 7px; border-radius: 9px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }
.panel { display: block; aspect-ratio: 1; image-rendering: pixelated; background:
  var(--image) var(--x) var(--y) / var(--wide) var(--high) no-repeat,
  repeating-linear-gradient(45deg, var(--paper) 0 5px, var(--hatch) 5px 10px); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 114px)); gap: 14px 10px; }
.tile { color: inherit; text-decoration: none; font-size: 12px; }
.tile:hover .panel, .tile:focus .panel, .patches .panel { background-position: var(--x) var(--below), 0 0; }
.tile div { display: flex; justify-content: space-between; margin-top: 3px; }
.large .panel { image-rendering: auto; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, calc(2 * var(--p))); gap: 10px 20px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; font-size: 12px; }
.pair > :last-child { grid-column: span 2; }
.grown { display: grid; grid-template-columns: repeat(auto-fill, var(--p)); gap: 10px; font-size: 12px; }
table { border-collapse: collapse; width: 100%; max-width: 760px; font-size: 13px; }
th, td { text-align: left; padding: 2px 8px 2px 0; }
.own { font-weight: 600; }
.track { position: relative; width: 110px; height: 11px; }
.track * { position: absolute; top: 1px; bottom: 1px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 14px; margin: 6px 0; }
dd { margin: 0; overflow-wrap: anywhere; }
dt { color: var(--soft); }
[title] { text-decoration: underline dotted; text-underline-offset: 3px; }
svg { display: block; width: 100%; max-width: 480px; font-size: 12px; fill: var(--soft); }
@media (min-width: 1180px) { .two { display: grid; grid-template-columns: 1fr 460px; gap: 0 40px; } }
@media (max-width: 700px) { header, main { padding: 10px 14px; } .two { --p: var(--q) !important; } }
</style>
<noscript>This page needs JavaScript; it loads nothing from elsewhere.</noscript>
<header></header>
<main></main>
<script id="data" type="application/json">__DATA__</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent), layers = Object.keys(data.layers);
const main = document.querySelector("main"), header = document.querySelector("header");
let order = {}, query = "";  // tiles last shown, which arrow keys follow, and how they were chosen

// ---- what numbers mean: name, definition, value of a filter (largest first), how it is written
const count = (v) => v.toLocaleString("en"), two = (v) => v.toFixed(2);
const four = (v) => count(Number(v.toPrecision(4))), share = (v) => `${(100 * v).toFixed(v < 0.0995 ? 1 : 0)} %`;
const points = (v) => (v < 0 ? "" : "+") + (100 * v).toFixed(2);
const METRICS = {
  filter: ["number", "Its place in the network", (f) => -f.filter, (v) => -v],
  preferred_class: ["preferred class", "Class of the largest mean activation",
    (f) => -data.classes.indexOf(f.preferred_class), (v) => data.classes[-v]],
  selectivity: ["selectivity", "(mean activation on the preferred class - mean of the other classes' means) "
    + "/ their sum; 0: fires alike on all classes, 1: on one only", (f) => f.selectivity, two],
  auc: ["AUC", "Area under the ROC curve: how often a random image of the preferred class drives it more than "
    + "one of another class; 0.5 is chance", (f) => f.auc, two],
  activation_mean: ["mean activation", "Mean over all test images of its activation: its strongest value in an "
    + "image", (f) => f.activation_mean, two],
  activation_nonzero: ["fires on", "Share of the test images with an activation above zero",
    (f) => f.activation_nonzero, share],
  lost: ["points lost", "Percentage points of accuracy lost when its map is replaced by its mean over the "
    + "training images; negative: gained", (f) => f.lost && f.lost.at(-1), points],
  twin: ["twin", "Largest correlation of its activations over the test images with those of another filter of "
    + "the layer; near 1 the two are duplicates", (f) => f.similar.length ? f.similar[0][1] : null, two],
};
const few = (f) => !f.dead && f.activation_nonzero < 0.01;  // nearly dead

// ---- building blocks; text is never read as HTML
function el(tag, attributes, ...children) {
  const inSvg = ["svg", "path", "text"].includes(tag);
  const node = document.createElementNS(`http://www.w3.org/${inSvg ? "2000/svg" : "1999/xhtml"}`, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined));
  return node;
}
const soft = (...text) => el("p", { class: "soft" }, ...text);
const section = (title, note, ...content) => [el("h2", {}, title), soft(note), ...content];
const link = (parts, ...text) => el("a", { href: `#${parts.map(encodeURIComponent).join("/")}` }, ...text);
const list = (rows) => el("dl", {}, rows.map(([name, text, title]) => [
  el("dt", {}, el("span", title ? { title } : {}, name)), el("dd", {}, text)]));
const row = (cells, attributes = {}, tag = "td") => el("tr", attributes, cells.map((cell) => el(tag, {}, cell)));
const colour = (name) => data.colours[data.classes.indexOf(name)];
const named = (name) => [el("span", { class: "dot", style: `background:${colour(name)}` }), name];
function chip(name) {  // in black or white, whichever contrasts more: 4.6 to 1 at least
  const [r, g, b] = [1, 3, 5].map((k) => parseInt(colour(name).slice(k, k + 2), 16) / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const ink = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
  return el("span", { class: "chip", style: `background:${colour(name)};color:${ink}` }, name);
}
function panel(file, columns, rows, column, line, text) {  // one of columns x rows panels of a picture
  const at = (k, n) => n > 1 ? `${100 * k / (n - 1)}%` : 0;
  return el("span", { class: "panel", role: "img", "aria-label": text, style: `--image:url(${file});`
    + `--wide:${100 * columns}%;--high:${100 * rows}%;--x:${at(column, columns)};--y:${at(line, rows)};`
    + `--below:${at(line + 1, rows)}` });
}
function tiles(layer, numbers, note) {
  const { columns, filters, size } = data.layers[layer], rows = 2 * Math.ceil(filters.length / columns);
  return el("div", { class: size < 30 ? "tiles" : "tiles large" }, numbers.map((n) => {
    const f = filters[n], text = f.dead ? "never fires" : few(f) ? "nearly dead" : note(f), node = link([layer, n],
      panel(`${layer}.webp`, columns, rows, n % columns, 2 * Math.floor(n / columns), `projection of filter ${n}`),
      el("div", {}, el("b", {}, n), f.dead ? "dead" : chip(f.preferred_class)), el("small", {}, text));
    node.className = "tile";
    return node;
  }));
}

// ---- the four views
function layerView(layer) {
  const wanted = new URLSearchParams(query), name = wanted.get("class") || "", all = data.layers[layer].filters;
  const by = METRICS[wanted.get("sort")] ? wanted.get("sort") : "filter", [label, title, value, write] = METRICS[by];
  const key = (f) => f.dead || value(f) === null ? -1e9 : value(f);
  const shown = all.filter((f) => !name || f.preferred_class === name).sort((a, b) => key(b) - key(a));
  const choose = (what, text, now, options) => {
    const select = el("select", {}, options.map(([v, t]) => el("option", { value: v }, t)));
    select.value = now;
    select.onchange = () => { wanted.set(what, select.value); location.hash = `${layer}?${wanted}`; };
    return el("label", {}, text, select);
  };
  const sorts = Object.entries(METRICS).filter(([k]) => k !== "lost" || all[0].lost).map(([k, m]) => [k, m[0]]);
  order = { layer, numbers: shown.map((f) => f.filter) };
  const box = el("input", { type: "checkbox" }), grid = tiles(layer, order.numbers, (f) => value(f) === null ? ""
    : ["filter", "preferred_class"].includes(by) ? `selectivity ${two(f.selectivity)}`
      : `${label} ${write(value(f))}` + (by === "twin" ? `, ${f.similar[0][0]}` : ""));
  box.onchange = () => grid.classList.toggle("patches", box.checked);
  return [el("h1", { tabindex: -1 }, layer), soft(`${all.length} filters that see ${data.layers[layer].size} pixels; `
    + `${all.filter((f) => f.dead).length} dead, ${all.filter(few).length} nearly dead (firing on less than 1 % of `
    + `${count(data.labels.length)} test images). Tiles: projection of the strongest activation; hover for the patch.`),
  choose("sort", "Sort by ", by, sorts),
  choose("class", "Show ", name, [["", "all classes"], ...data.classes.map((c) => [c, c])]),
  el("label", {}, box, " patches"), el("p", { id: "shown", class: "soft" }, `${shown.length} of ${all.length} filters`
    + `${name && ` that prefer ${name}`}, sorted by `, el("span", { title }, label), "; dead ones last."), grid];
}
function pairs(file, columns, examples, first) {
  return el("div", { class: "pairs" }, examples.map(([image, value], k) => {
    const name = data.classes[data.labels[image]];
    return image < 0 ? null : el("div", { class: "pair" },
      panel(file, columns, 2, first + k, 0, `projection in test image ${image}, activation ${two(value)}`),
      panel(file, columns, 2, first + k, 1, `patch of test image ${image}, ${name}`),
      el("span", {}, el("b", {}, two(value)), " ", named(name), el("small", {}, ` image ${image}`)));
  }));
}
function classTable(f) {
  const top = Math.max(...f.means.flat()), losses = f.lost || [], most = Math.max(...losses.map(Math.abs)) || 1;
  const bar = (left, width, style) => el("div", { style: `left:${left}%;width:${width}%;${style}` });
  const track = (...bars) => el("div", { class: "track" }, ...bars);
  const lost = (v) => f.lost ? [track(bar(50 + Math.min(0, 50 * v / most), 50 * Math.abs(v) / most,
    "background:var(--bar)"), bar(50, 0, "border-left:1px solid")), points(v)] : [];
  return el("table", {}, row(["class", el("span", { title: "Line: 95 % interval" }, "mean activation"), "",
    ...f.lost ? [el("span", { title: METRICS.lost[1] }, "points lost without it"), ""] : []], {}, "th"),
  data.classes.map((name, k) => row([named(name), track(bar(0, 100 * f.means[k][0] / top, `background:${colour(name)}`),
    bar(100 * f.means[k][1] / top, 100 * (f.means[k][2] - f.means[k][1]) / top, "top:5px;bottom:5px;background:var(--ink)")),
  two(f.means[k][0]), ...lost(losses[k])], name === f.preferred_class ? { class: "own" } : {})),
  f.lost && row(["all", "", "", ...lost(losses.at(-1))]));
}
function histogram(f) {
  const shares = f.counts.map((counts, g) => counts.map((c) => c / f.images[g])), top = Math.max(...shares.flat());
  const steps = ([...v]) => "M40 112" + v.map((y, k) => `V${112 - 100 * y / top}H${57 + 17 * k}`).join("") + "V112Z";
  const text = (x, y, t, anchor = "middle") => el("text", { x, y, "text-anchor": anchor }, t);
  return [el("svg", { viewBox: "0 0 460 146", role: "img", "aria-label": "histogram of its activations" },
    el("path", { d: steps(shares[1]), fill: "var(--bar)", opacity: 0.6 }),
    el("path", { d: steps(shares[0]), fill: colour(f.preferred_class), "fill-opacity": 0.4, stroke: "var(--ink)" }),
    text(34, 20, share(top), "end"), text(34, 115, "0 %", "end"), text(40, 128, "0"), text(448, 128, two(f.largest)),
    text(244, 143, "activation; share of the images of each group")),
  soft(...named(f.preferred_class), " outlined, the other classes grey. Zero, and not drawn, on "
    + f.zeros.map((z, g) => `${count(z)} of ${count(f.images[g])}`).join(" and ") + ".")];
}
function filterView(layer, n) {
  const { filters, size } = data.layers[layer], f = filters[n], file = `${layer}/${String(n).padStart(3, "0")}.webp`;
  if (order.layer !== layer || !order.numbers.includes(n)) order = { layer, numbers: filters.map((g) => g.filter) };
  const [before, after] = [-1, 1].map((step) => order.numbers[order.numbers.indexOf(n) + step]);
  const top = f.top.length, start = top + f.levels.length, columns = start + data.epochs.length;
  const each = f.levels.length / data.levels.length, pixels = (most) => size * Math.floor(Math.max(1, most / size));
  const metric = (key) => [METRICS[key][0], METRICS[key][3](METRICS[key][2](f)), METRICS[key][1]];
  const head = [el("h1", { tabindex: -1 }, `${layer} / ${n} `, f.dead ? "" : chip(f.preferred_class)), soft(
    before === undefined ? "" : link([layer, before], `previous: ${before}`), " ",
    after === undefined ? "" : link([layer, after], `next: ${after}`), " (arrow keys), ", link([layer], `all of ${layer}`), " (Escape)")];
  if (f.dead) return [...head, el("p", {}, "Dead: it fires on none of the test images.")];
  return [...head, el("div", { class: "two", style: `--p:${pixels(152)}px;--q:${pixels(76)}px` }, el("div", {},
    section("Strongest activations", `In ${top} different test images: projection and patch, ${size} x ${size} pixels. `
      + "Grey is zero, one scale for all.", pairs(file, columns, f.top, 0)),
    section("Weaker ones", "Drawn near percentiles of the images on which it fires; a scale for each level.",
      data.levels.map((level, k) => [el("h3", {}, `${level}th percentile`),
        pairs(file, columns, f.levels.slice(k * each, (k + 1) * each), top + k * each)])),
    section("How it developed", `Strongest activation in ${count(data.evolution_images)} test images after each epoch, `
      + "each with a scale of its own." + (data.epochs.length > 1 ? "" : " uv run train_CNN.py adds earlier epochs."),
    el("div", { class: "grown" }, data.epochs.map((epoch, k) => el("div", {},
      panel(file, columns, 2, start + k, 0, `projection after epoch ${epoch}`), `epoch ${epoch}`))))),
  el("div", {}, section("By class", f.lost || layer !== layers.at(-1) ? "" : "uv run analyse_projections.py adds ablation.",
    classTable(f)), section("Activations on the test images", "", histogram(f)), section("In numbers", "", list([
    ["preferred class", `${f.preferred_class} (stays so in ${share(f.preferred_share)} of bootstrap samples), then `
      + `${f.runner_up}; most frequent in its ${top} images: ${f.top_class}`, METRICS.preferred_class[1]],
    ["selectivity", `${two(f.selectivity)} (95 % interval ${two(f.selectivity_low)} to ${two(f.selectivity_high)}); `
      + `${two(f.selectivity_space)} with activations averaged over the map`, METRICS.selectivity[1]],
    metric("auc"), metric("activation_nonzero"), metric("activation_mean"),
    ...f.nonzero_count === null ? [] : [["projections", `${four(f.nonzero_count)} pixels above zero; magnitude: mean `
      + `${four(f.mean)}, variance ${four(f.variance)}, largest ${four(f.max)} normalised pixels`,
    "Magnitude: sum over RGB of absolute values. Mean: over pixels above zero; variance: over the image"]]])),
  section("Filters that fire alike", "Correlation of activations over the test images.", tiles(layer,
    f.similar.map(([k]) => k), (g) => `r = ${two(f.similar.find(([k]) => k === g.filter)[1])}`))))];
}
function classView(name) {
  const k = data.classes.indexOf(name), counts = data.confusion[k], all = counts.reduce((a, b) => a + b);
  const wrong = data.classes.map((c, j) => [counts[j], c]).filter(([n, c]) => n && c !== name).sort((a, b) => b[0] - a[0]);
  const harm = data.layers[layers.at(-1)].filters.filter((f) => f.lost).sort((a, b) => b.lost[k] - a.lost[k]);
  return [el("p", {}, data.classes.map((c) => [link(["class", c], chip(c)), " "])), el("h1", { tabindex: -1 }, name),
    el("p", {}, `${share(counts[k] / all)} of ${count(all)} test images are recognised. Mistaken for `
      + `${wrong.map(([n, c]) => `${c} (${n})`).join(", ") || "nothing"}.`),
    harm.length ? section("Needed most", `Filters of ${layers.at(-1)} whose ablation costs it most percentage points.`,
      tiles(layers.at(-1), harm.slice(0, 12).map((f) => f.filter), (f) => `${points(f.lost[k])} points`)) : [],
    [...layers].reverse().map((layer) => section(`Filters of ${layer} that prefer it`, "By selectivity.", tiles(layer,
      data.layers[layer].filters.filter((f) => f.preferred_class === name).sort((a, b) => b.selectivity - a.selectivity)
        .map((f) => f.filter), (f) => `selectivity ${two(f.selectivity)}`)))];
}
function runView() {
  const trust = data.trust || [], write = (v) => typeof v === "number" ? four(v) : v === null || typeof v !== "object"
    ? String(v) : Object.entries(v).map(([key, of]) => `${key} ${write(of)}`).join(", ");
  const median = (test, of) => (([r]) => r ? two(r.median) : "?")(trust.filter((r) => r.test === test && r.condition === of));
  const test = "random weights, envelope taken out";
  return [el("h1", { tabindex: -1 }, "The run"), el("p", {}, `${data.run.epochs} epochs on ${data.title}, ${data.accuracy}.`),
    section("How to read a projection", "", el("p", {}, "Grey is zero, light and dark are opposite signs. It shows what in "
      + "this one image an activation went back to, not what the filter responds to in general: compare all of them."),
    trust.length ? [el("p", {}, "It points at what matters, up to a point: the quarter of a window's pixels where it is "
      + `strongest keeps ${median("kept", "projection")} of an activation of ${layers.at(-1)} alive (median); a quarter chosen by `
      + `the gradient keeps ${median("kept", "gradient")}, the middle ${median("kept", "centre")}, chance ${median("kept", "random")}.`),
    el("p", {}, "It does not show only what was learned: through random weights, projections have a rank correlation of "
      + `${median(test, "conv4 to conv1, own switches")} with the trained ones, those of other filters in other images `
      + `${median(test, "other filter, other image")} (what all windows share taken out).`),
    el("details", {}, el("summary", {}, "all numbers (trust.csv)"), el("table", {}, row(["test", "condition", "median",
      "95 % interval", "units"], {}, "th"), trust.filter((r) => !r.test.includes("draw")).map((r) => row([r.test, r.condition,
      two(r.median), `${two(r.low)} to ${two(r.high)}`, r.n]))))]
      : el("p", {}, "How far to trust it is not measured yet: uv run analyse_projections.py adds it.")),
    section("What the numbers mean", "", list(Object.values(METRICS))),
    section("Training", "", list(Object.entries(data.run).map(([key, v]) => [key.replaceAll("_", " "), write(v)]))),
    section("Other figures", "", data.figures.map((name) => [el("a", { href: `../${encodeURI(name)}` }, name), " "]))];
}

// ---- addresses (#conv4, #conv4/137, #conv4?sort=auc&class=car, #class/car, #run) and keys
function show() {
  const [path, search] = location.hash.slice(1).split("?"), [view, item] = path.split("/").map(decodeURIComponent);
  const layer = layers.includes(view) ? view : layers.at(-1), n = Number(item), last = main.dataset.filter;
  const one = ["class", "run"].includes(view) ? view : item && data.layers[layer].filters[n] ? "filter" : "layer";
  query = one === "layer" && search !== undefined ? search : query;
  main.replaceChildren(...{ layer: () => layerView(layer), filter: () => filterView(layer, n), run: runView,
    class: () => classView(data.classes.includes(item) ? item : data.classes[0]) }[one]().flat(9));
  header.replaceChildren(el("b", {}, "Filter explorer"), el("span", {}, `${data.title}, ${data.accuracy}`),
    ...layers.map((name) => link([name], name)), link(["class", data.classes[0]], "classes"), link(["run"], "run"));
  header.children[layers.includes(layer) && one in { layer: 0, filter: 0 } ? 2 + layers.indexOf(layer)
    : one === "class" ? 6 : 7].setAttribute("aria-current", "page");
  if (data.generated) main.prepend(el("div", { class: "loud" }, "Generated shapes, no photographs: they show that the code works"));
  document.title = `${main.querySelector("h1").textContent}, ${data.title}`;
  main.dataset.filter = one === "filter" ? `#${layer}/${n}` : "";
  const back = one === "layer" && last && main.querySelector(`.tile[href="${last}"]`);
  if (!back) scrollTo(0, 0);
  (back || main.querySelector("h1")).focus({ preventScroll: !back });
}
addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  const [layer, n] = main.dataset.filter.slice(1).split("/"), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!n || event.altKey || event.ctrlKey || event.metaKey) return;
  const next = step && order.numbers[order.numbers.indexOf(Number(n)) + step];
  if (event.key === "Escape") location.hash = layer;
  else if (next !== undefined) location.hash = `${layer}/${next}`;
});
show();
</script>
</html>
"""


if __name__ == "__main__":
    main()
