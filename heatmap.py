"""Draw what the filters of conv4 respond to, and a page in which every filter can be explored.

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
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import affine
from tqdm import tqdm

from analyse_projections import NEARLY_DEAD, class_means, rank_correlation
from CNN import CNN, IMAGE_SIZE, LAYERS, Checkpoint, atomic_write, choose_device, load_checkpoint
from deconv import crop, displayed, robust_scale
from deconv_full import (
    LEVELS,
    Projector,
    Units,
    class_selectivity,
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
    tile,
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

    `means` is what `class_means` returned, (classes, filters); dead `filters` of filter_metrics.csv are left
    out.
    """
    # vehicles, then animals
    order = sorted(range(len(names)), key=lambda label: names[label] not in VEHICLES)
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


def rank_filters(filters: pd.DataFrame, classes: pd.DataFrame, names: list[str], name: str) -> pd.DataFrame:
    """Order the active filters of conv4 by how well they stand for the class `name`.

    First come the filters that prefer the class, by selectivity. Where they are few, those that prefer
    another class follow, by their index for this one. Nearly dead filters come last: an index that rests on
    a handful of images is large by chance.

    `filters` is filter_metrics.csv, `classes` class_metrics.csv, `names` those of all classes. The columns
    selectivity, activation_mean and prefers refer to the class, the others are those of filter_metrics.csv.
    """
    conv4 = filters[filters["layer"] == "conv4"].set_index("filter")
    means, place = class_means(classes), names.index(name)
    columns = {
        "selectivity": class_selectivity(means)[place],
        "activation_mean": means[place],
        "prefers": conv4["preferred_class"] == name,
        "nearly_dead": conv4["activation_nonzero"] < NEARLY_DEAD,
        **conv4[["preferred_class", "preferred_share", "top_class"]],
    }
    ranking = pd.DataFrame(columns, index=conv4.index)[~conv4["dead"]].reset_index()
    order = ["nearly_dead", "prefers", "selectivity", "activation_mean", "filter"]
    return ranking.sort_values(order, ascending=[True, False, False, False, True], ignore_index=True)


def sum_projections(images: Array, net: CNN, units: Units, group: Array, doing: str) -> tuple[Array, Array]:
    """Project units of conv4; return sum of magnitudes (groups, 96, 96) and signed sum (groups, 3, 96, 96).

    `group` is the number of each unit's group, 0, 1, ...; `doing` labels the progress bar.
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

    `ranking` is what `rank_filters` says of these filters; `means`, (filters, 96, 96), the magnitude averaged
    over all images of the class; `images`, uint8 (filters, images, 3, 96, 96), those that drive each filter
    most; `magnitudes`, (filters, images, 96, 96), of the projections there; `values`, (filters, images),
    strongest activations there.
    """
    filters, count = images.shape[:2]
    size = 2.4 + 2.5 * count, 1.4 + 1.4 * filters
    fig, axes = plt.subplots(filters, 1 + 2 * count, figsize=size, squeeze=False, layout="constrained")
    colours = sns.color_palette("rocket", as_cmap=True)(np.linspace(0.3, 1, 256))
    colours[:, 3] = np.linspace(0, 1, 256) ** 0.6  # clear at zero, so that the image stays visible
    style: dict[str, Any] = {"vmin": 0, "vmax": 1}
    for k, (row, of_filter) in enumerate(zip(axes, ranking.itertuples(), strict=True)):
        above = "" if k else "mean over the class"
        mean = show(row[0], means[k] / means[k].max(), above, cmap="mako", **style)
        text = f"filter {of_filter.filter}\nselectivity {of_filter.selectivity:.2f}\n"
        text += f"mean activation {of_filter.activation_mean:.2f}\nprefers {of_filter.preferred_class}"
        text += f" in\n{of_filter.preferred_share:.0%} of bootstrap samples"
        if str(of_filter.top_class) != str(of_filter.preferred_class):
            text += f"\nnine strongest images:\nmost often {of_filter.top_class}"
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


def draw_images(images: Array, magnitudes: Array, signed: Array, texts: list[str], heading: str) -> Figure:
    """Draw images, two a row, each beside the summed magnitude and the signed sum of its projections.

    Images are uint8 (images, 3, 96, 96), below `texts`; magnitudes (images, 96, 96), signed sums as images.
    """
    rows = -(-len(images) // 2)
    fig, axes = plt.subplots(rows, 6, figsize=(8, 1.6 + 1.42 * rows), squeeze=False, layout="constrained")
    panels, coloured, top = axes.reshape(-1, 3), displayed(signed), robust_scale(magnitudes)
    for ax in panels[len(images) :].flat:
        ax.axis("off")
    for k, (left, middle, right) in enumerate(panels[: len(images)]):
        above = ("sum of magnitudes", "signed sum") if k < 2 else ("", "")
        show(left, np.moveaxis(images[k], 0, 2), texts[k])
        drawn = show(middle, magnitudes[k], above[0], cmap="mako", vmin=0, vmax=top)
        show(right, coloured[k], above[1])
    bar = fig.colorbar(drawn, ax=axes, location="bottom", aspect=40, pad=0.02, shrink=0.6, extend="max")
    bar.set_label("sum of magnitudes (normalised pixels); in the signed sum grey is zero, one scale for all")
    fig.suptitle(heading)
    return fig


# ---------------------------------------------------------------- occlusion (section 4.2)


def predict(net: CNN, images: Array) -> Array:
    """Return the class the network takes each image for, (images,)."""
    batches = torch.from_numpy(images).split(32)
    return np.concatenate([net(net.normalise(batch)).argmax(dim=1).cpu().numpy() for batch in batches])


def first_correct(guesses: Array, labels: Array) -> Array:
    """Return, for each class in turn, its first image that is classified correctly, if there is one."""
    right = pd.Series(np.flatnonzero(guesses == labels))
    return right.groupby(labels[right]).first().to_numpy(np.int64)


def square_positions(side: int, stride: int) -> Array:
    """Return which rows (columns alike) of the image a square covers at each position, (positions, 96).

    Its centres are `stride` pixels apart, the first one stride // 2 from the border. The border cuts squares
    that reach beyond it.
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


def occlusion_sensitivity(
    image: Array, label: int, unit: Sequence[int], net: CNN, covered: Array
) -> Occlusion:
    """Slide a grey square over an image; measure a filter of conv4, its strongest unit, and the classes.

    The paper measures the sum over the map (Figure 6 of the ECCV version); the projection shows one unit.
    The image is uint8 (3, 96, 96), `label` its class, `unit` filter, row and column in the pooled map,
    `covered` what `square_positions` returned.
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
        texts = [f"{names[other]} {shares[other]:.0%}" for other in others if shares[other] >= 0.005]
        measured = found.activity.min(), found.unit.min(), rank_correlation(1 - found.unit, under[k])
        unit = units.image[k], units.filter[k], names[found.label], units.value[k]
        rows.append((*unit, *measured, ", ".join(texts)))
    columns = ["image", "filter", "label", "activation", "activity", "unit", "correlation", "taken_for"]
    return pd.DataFrame(rows, columns=columns)


def draw_occlusion(
    images: Array, occlusions: list[Occlusion], magnitudes: Array, table: pd.DataFrame, square: Sequence[int]
) -> Figure:
    """Draw maps of an occluded image, one image a row (Figure 6 of the paper's ECCV version).

    Images are uint8 (images, 3, 96, 96), magnitudes those of the units' projections, (images, 96, 96);
    `table` is occlusion.csv, `square` the side of the square and the pixels from one position to the next.
    """
    size, (side, stride) = (8, 1.7 + 1.5 * len(images)), square
    fig, axes = plt.subplots(len(images), 5, figsize=size, squeeze=False, layout="constrained")
    above = ["image, square", "activity of its\nstrongest filter", "activation of its\nstrongest unit"]
    above += ["projection of\nthis unit", "probability of\nthe true class"]
    shares = np.array([(found.activity, found.unit) for found in occlusions])
    top, reach = robust_scale(magnitudes), abs(shares - 1).max()
    centres = np.arange(len(occlusions[0].unit)) * stride + stride // 2
    first, last = centres[0] - stride / 2, centres[-1] + stride / 2
    whole: dict[str, Any] = {"extent": (0, IMAGE_SIZE, IMAGE_SIZE, 0)}
    maps: dict[str, Any] = {"extent": (first, last, last, first)}  # a value stands for stride x stride pixels
    for k, (row, found, of_image) in enumerate(zip(axes, occlusions, table.itertuples(), strict=True)):
        texts = [""] * 5 if k else above
        down, across = np.unravel_index(found.unit.argmin(), found.unit.shape)
        corner = centres[across] - side / 2, centres[down] - side / 2
        show(row[0], np.moveaxis(images[k], 0, 2), texts[0], **whole)
        for colour, width in (("black", 2.2), ("white", 1.0)):
            row[0].add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=width))
        name = f"{of_image.label}\nfilter {of_image.filter}\nactivation {of_image.activation:.2f}"
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": 1 - reach, "vmax": 1 + reach}
        activity = show(row[1], found.activity, texts[1], **scale, **maps)
        unit = show(row[2], found.unit, texts[2], **scale, **maps)
        projection = show(row[3], magnitudes[k], texts[3], cmap="mako", vmin=0, vmax=top, **whole)
        truth, taken = found.probability[:, :, found.label], found.probability.argmax(axis=2) != found.label
        probability = show(row[4], truth, texts[4], cmap="viridis", vmin=0, vmax=1, **maps)
        if taken.any():
            row[4].contour(centres, centres, taken, levels=[0.5], colors="white", linewidths=1)
            row[4].set_xlabel(of_image.taken_for, fontsize=7, labelpad=2)
        for ax in row:
            ax.set(xlim=(0, IMAGE_SIZE), ylim=(IMAGE_SIZE, 0))
    below: dict[str, Any] = {"location": "bottom", "aspect": 12, "pad": 0.01, "shrink": 0.9}
    units = ["share of that\nwithout a square"] * 2 + ["magnitude\n(normalised pixels)"]
    units.append("probability; outlined, with\nshare: another comes first")
    for column, drawn in enumerate((activity, unit, projection, probability), start=1):
        bar = fig.colorbar(drawn, ax=axes[:, column], **below)
        bar.ax.tick_params(labelsize=7)
        bar.set_label(units[column - 1], fontsize=8)
    return fig


# ---------------------------------------------------------------- invariance (Figure 5)


def change(image: Tensor, shift: float = 0, zoom: float = 1, angle: float = 0) -> Tensor:
    """Move normalised images (..., 3, 96, 96) down, enlarge or turn them clockwise about the centre.

    In pixels, a factor, degrees. What is left bare is grey.
    """
    options: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "fill": [0.0, 0.0, 0.0]}
    place = [0.0, float(shift)]
    return cast(Tensor, affine(image, float(angle), place, float(zoom), [0.0, 0.0], **options))


MEASURES = ("distance in conv1", "distance in conv4", "probability of the true class", "accuracy")


def measure_invariance(net: CNN, images: Array, labels: Array, kind: str, degrees: Sequence[float]) -> Array:
    """Measure how far features of images move when these are changed (Figure 5 of the paper).

    Images are uint8; `kind` is one of `CHANGES`, `degrees` how far they are changed. Returns `MEASURES`,
    (measures, images, degrees): Euclidean distance between the pooled maps of the changed and the unchanged
    image, as a share of the norm of the latter; probability of the true class; 1 where that comes first.
    """
    found = []
    for start in range(0, len(images), 50):
        batch = net.normalise(torch.from_numpy(images[start : start + 50]))
        truth = torch.from_numpy(labels[start : start + 50]).to(batch.device)
        whole, columns = net.features(batch), []
        for degree in degrees:
            features, distances = net.features(change(batch, **{kind: degree})), []
            for (before, _), (after, _) in ((whole[0], features[0]), (whole[-1], features[-1])):
                distances.append((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1))
            shares = net.classify(features[-1][0]).softmax(dim=1)
            of_truth = shares.gather(1, truth[:, None])[:, 0]
            columns.append(torch.stack([*distances, of_truth, (shares.argmax(dim=1) == truth).float()]))
        found.append(torch.stack(columns, dim=2).cpu().numpy().astype(np.float64))
    return np.concatenate(found, axis=1)


def tabulate_invariance(kind: str, degrees: Sequence[float], measured: Array) -> pd.DataFrame:
    """Return rows of invariance.csv: mean over the images with its 95 % interval (normal)."""
    tables = []
    for name, values in zip(MEASURES, measured, strict=True):
        mean, reach = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / len(values) ** 0.5
        table = pd.DataFrame({"kind": kind, "degree": degrees, "measure": name, "mean": mean})
        tables.append(table.assign(low=mean - reach, high=mean + reach, n=len(values)))
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
    curves: Mapping[str, Array],
    table: pd.DataFrame,
    names: Sequence[str],
) -> Figure:
    """Draw the layout of the paper's Figure 5, one kind of change a row, and means over many images.

    `images`, uint8, `names` and `curves`, what `measure_invariance` returned by kind, are those of the
    examples, changed by `degrees`; `table` is invariance.csv.
    """
    size, widths = (9, 0.9 + 1.95 * len(curves)), [1.15, 1, 1, 1, 1]
    layout: dict[str, Any] = {"sharey": "col", "width_ratios": widths, "layout": "constrained"}
    fig: Figure
    fig, axes = plt.subplots(len(curves), 5, figsize=size, squeeze=False, **layout)
    for row, (kind, measured) in zip(axes, curves.items(), strict=True):
        draw_examples(row[0], net, images, kind, degrees[kind])
        for ax, name, values in zip(row[1:], MEASURES, measured, strict=True):
            for k, curve in enumerate(values if name != "accuracy" else ()):
                style = ("-", "--", "-.", ":")[k % 4]
                ax.plot(degrees[kind], curve, color=f"C{k}", linestyle=style, linewidth=0.9, label=names[k])
            rows = table[(table["kind"] == kind) & (table["measure"] == name)]
            text = f"mean of {rows['n'].iloc[0]} images"
            ax.plot(rows["degree"], rows["mean"], color="black", linewidth=1.6, label=text)
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

METRICS = {  # what the page calls them, and what they are
    "filter": ("number", "Its place in the layer; it means nothing"),
    "preferred_class": ("preferred class", "Class of the largest mean activation"),
    "selectivity": (
        "selectivity",
        "(mean on preferred class - mean of the others) / their sum; 0: alike on all, 1: on one only",
    ),
    "auc": (
        "AUC",
        "How often an image of the preferred class drives it more than one of another; 0.5: chance",
    ),
    "activation_mean": ("mean activation", "Over all test images, of its strongest value in each"),
    "class_mean": ("mean activation", "Over the test images of the class; line: 95 % interval"),
    "activation_nonzero": ("fires on", "Share of the test images with an activation above zero"),
    "lost": (
        "loss added",
        "Rise of the cross-entropy (nats) when its map is set to its training mean; negative: better without",
    ),
    "twin": (
        "twin",
        "Filter whose activations over the test images correlate most with its own; r = 1: a copy",
    ),
    "projections": (
        "projections",
        "Magnitude (RGB summed) in normalised pixels: means over images; the largest of all",
    ),
}


def crop_patches(images: Array, image: Array, origins: Array, size: int) -> Array:
    """Cut windows out of images, uint8 (n, size, size, 4); transparent beyond the border and for image -1."""
    opaque, patches = np.full((1, IMAGE_SIZE, IMAGE_SIZE), 255, np.uint8), []
    for n, (top, left) in zip(image, origins, strict=True):
        frame = np.concatenate([images[n], opaque]) * np.uint8(n >= 0)
        patches.append(crop(frame, top, left, size, 0).transpose(1, 2, 0))
    return np.stack(patches)


def save_panels(path: Path, panels: Array, columns: int) -> None:
    """Write panels (n, rows, columns, 4) as one WebP picture, `columns` of them a row.

    With losses WebP halves the resolution of colours, which shows in small windows. Those are stored without,
    after rounding to multiples of 8, which halves the file.
    """
    small = panels.shape[2] < 32
    if small:
        panels = np.minimum((panels + np.uint16(4)) // 8 * 8, 255).astype(np.uint8)
    options: dict[str, Any] = {"lossless": True} if small else {"quality": 48}
    with atomic_write(path) as partial:
        Image.fromarray(tile(panels, columns, 0)).save(partial, "WEBP", **options)


def as_panels(projections: Array, groups: int) -> Array:
    """Return projections (filters, n, 3, rows, columns) as opaque uint8 (filters, n, rows, columns, 4).

    The n of a filter are split into `groups` of equal size, each with a scale of its own.
    """
    filters, n, _, *sides = projections.shape
    pixels = np.full((filters, n, *sides, 4), 255, np.uint8)
    for of_filter, shown in zip(projections, pixels, strict=True):
        parts = np.split(of_filter.astype(np.float32), groups)
        shown[..., :3] = (255 * np.concatenate([displayed(part) for part in parts])).round()
    return pixels


def save_strips(
    folder: Path, layer: str, panels: Sequence[Array], image: Array, origin: Array, images: Array
) -> None:
    """Write the pictures of a layer.

    LAYER/NNN.webp has two rows. Above: projections of the filter's strongest images, of weaker ones and of
    its strongest activation after some epochs (`panels`, of `as_panels`); below: the patches of the former
    two. LAYER.webp has the first projection of every filter, 16 a row, each above its patch.

    Of the former two, `image`, (filters, n), is the index into `images`, uint8 (images, 3, 96, 96), or -1 for
    none; `origin`, (filters, n, 2), row and column of the window's top left pixel.
    """

    def draw(n: int) -> Array:
        above = np.concatenate([part[n] for part in panels])
        below = crop_patches(images, image[n], origin[n], above.shape[1])
        save_panels(folder / layer / f"{n:03d}.webp", np.concatenate([above, below]), len(above))
        return np.concatenate([above[0], below[0]])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        drawn = pool.map(draw, range(len(image)))
        first = list(tqdm(drawn, f"pictures of {layer}", len(image), disable=None))
    save_panels(folder / f"{layer}.webp", np.stack(first), 16)


def explain_filters(
    layer: str, maxima: Array, labels: Array, names: Sequence[str], tables: Mapping[str, pd.DataFrame]
) -> list[dict[str, Any]]:
    """Return what the page says of each filter of a layer, but for its pictures.

    Its row of filter_metrics.csv; `means` of each class with both limits; `lost`, what ablation adds to the
    loss of each class and of all (conv4); `similar`, the five filters whose activations correlate most with
    its own, and the coefficients. Of the images of the preferred class and of the others: `images`, how many;
    `zeros`, on how many it does not fire; `counts` in 24 bins from 0 to `largest` of those on which it does.

    `maxima`, (images, filters), is the strongest activation of each filter in each test image; `labels` are
    those of the images; `tables`: filter, class and ablation, the latter only if there is one.
    """
    filters, classes = (table[table["layer"] == layer] for table in (tables["filter"], tables["class"]))
    means = classes[["activation_mean", "activation_low", "activation_high"]].to_numpy()
    lost: Any = [None] * len(filters)
    if layer == "conv4" and "ablation" in tables:
        lost = tables["ablation"]["loss_increase"].to_numpy().reshape(len(filters), -1)
    with np.errstate(invalid="ignore"):  # a dead filter correlates with none
        correlation = np.nan_to_num(np.corrcoef(maxima.T), nan=-1)
    np.fill_diagonal(correlation, -1)
    described = cast(list[dict[str, Any]], filters.drop(columns="layer").to_dict("records"))
    for n, (of_filter, own) in enumerate(zip(described, maxima.T, strict=True)):
        nearest = np.argsort(-correlation[n], kind="stable")[:5]
        prefers = labels == (-1 if of_filter["dead"] else names.index(of_filter["preferred_class"]))
        groups, largest = (own[prefers], own[~prefers]), max(own.max(), 1e-9)
        of_filter |= {"means": means.reshape(len(described), len(names), 3)[n], "lost": lost[n]}
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


def readable_on(colour: str) -> str:
    """Return the text colour, black or white, that contrasts more with #rrggbb: 4.6 to 1 or more (WCAG 2)."""
    values = np.array(to_rgb(colour))
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return "#000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#fff"


def explain_layer(filters: Sequence[Mapping[str, Any]], size: int, images: int) -> str:
    """Return what stands above the tiles of a layer's filters, which see `size` pixels."""
    dead = sum(of_filter["dead"] for of_filter in filters)
    few = sum(of_filter["activation_nonzero"] < NEARLY_DEAD for of_filter in filters) - dead
    return (
        f"Each of {len(filters)} filters sees {size} x {size} pixels. {dead} are dead (never fire), {few} "
        f"nearly dead (fire on less than {NEARLY_DEAD:.0%} of {images:,} test images). A tile shows a "
        "filter's strongest activation, projected; hover to see the image there."
    )


def explain_reading(trust: pd.DataFrame | None) -> list[str]:
    """Return three sentences on what a projection shows and does not, with the numbers of trust.csv."""
    reading = (
        "Grey is zero; light and dark, and opposite colours, are opposite signs. A projection shows what in "
        "one image an activation went back to, not what the filter responds to in general: compare all. "
        "Compression blurs faint structure here; the pictures in deconv/ have all of it."
    )
    if trust is None:
        return [reading, "How far to trust it is not measured yet: uv run analyse_projections.py adds it."]
    value = trust.set_index(["test", "condition"])["median"]
    kept = value["kept"].map("{:.0%}".format)
    alike = value["random weights, envelope taken out"]
    return [
        reading,
        "It points at what matters, up to a point: the quarter of a window's pixels where it is strongest "
        f"keeps {kept['projection']} of an activation of conv4 alive (median); a quarter chosen by the "
        f"gradient {kept['gradient']}, by another filter's projection at the same place "
        f"{kept['other filter']}, by chance {kept['random']}. The image's edges, which know no filter, keep "
        f"{kept['edges']}: smooth masks keep more.",
        "How much of it was learned: projections through random weights have a rank correlation of "
        f"{alike['conv4 to conv1']:.2f} with the trained ones, those of other filters at the same place "
        f"{alike['other filter, same place']:.2f}, in other images {alike['other filter, other image']:.2f}, "
        "what all windows have in common taken out.",
    ]


def explain_classes(guesses: Array, labels: Array, names: Sequence[str]) -> list[str]:
    """Return, for each class, how many test images are recognised and what the others are taken for."""
    texts = []
    for label in range(len(names)):
        counts = np.bincount(guesses[labels == label], minlength=len(names))
        wrong = [k for k in np.argsort(-counts, kind="stable") if counts[k] and k != label]
        mistaken = ", ".join(f"{names[k]} ({counts[k]})" for k in wrong) or "nothing"
        share = f"{counts[label]:,} of {counts.sum():,} test images ({counts[label] / counts.sum():.0%})"
        texts.append(f"{share} are recognised. Mistaken for {mistaken}.")
    return texts


def write_explorer(
    outputs: Path,
    checkpoint: Checkpoint,
    snapshots: Sequence[Checkpoint],
    test: Split,
    guesses: Array,
    evolution_images: int,
) -> None:
    """Write explorer/index.html and its pictures into `outputs`, where the files of the earlier stages are.

    `snapshots` is what `read_snapshots` returned, `guesses` what `predict` returned for the test images. Each
    snapshot's strongest activation is sought in the first `evolution_images` of these.
    """
    outputs, names = outputs.expanduser(), checkpoint.class_names
    folder = outputs / "explorer"
    for old in [*folder.glob("index.html"), *folder.rglob("*.webp")]:  # of a network with more filters
        old.unlink()
    tables = {name: load_table(outputs / f"{name}_metrics.csv", checkpoint) for name in ("filter", "class")}
    for name in ("ablation", "trust"):  # what the page can do without
        if (outputs / f"{name}.csv").is_file():
            tables[name] = load_table(outputs / f"{name}.csv", checkpoint)

    some = test.images[:evolution_images]
    evolution = project_evolution(some, snapshots, max(checkpoint.net.config["filters"]), 16)
    layers = {}
    for layer in LAYERS:
        (maxima,) = load_arrays(outputs / "activations.npz", checkpoint, f"{layer}_max")
        path, keys = outputs / "projections.npz", ("projection", "image", "value", "origin")
        top, *strongest = load_arrays(path, checkpoint, *(f"{layer}_{key}" for key in keys))
        lower, *weaker = load_arrays(path, checkpoint, *(f"{layer}_level_{key}" for key in keys))
        image, value, origin = (np.concatenate(pair, axis=1) for pair in zip(strongest, weaker, strict=True))
        panels = [as_panels(top, 1), as_panels(lower, len(LEVELS))]
        panels.append(as_panels(evolution.pop(layer).projections, len(snapshots)))  # a scale for each
        n_top, size = top.shape[1], top.shape[-1]
        del top, lower  # large
        save_strips(folder, layer, panels, image, origin, test.images)
        filters = explain_filters(layer, maxima, test.labels, names, tables)
        for of_filter, *examples in zip(filters, image, value, strict=True):
            pairs = list(zip(*examples, strict=True))
            of_filter |= {"top": pairs[:n_top], "levels": pairs[n_top:]}
        note = explain_layer(filters, size, len(maxima))
        layers[layer] = {"size": size, "columns": min(16, len(filters)), "note": note, "filters": filters}

    colours = sns.color_palette("colorblind", len(names)).as_hex()
    figures = sorted(path.relative_to(outputs).as_posix() for path in outputs.rglob("*.png"))
    run = {"epochs": checkpoint.epochs, **checkpoint.metrics, **checkpoint.settings}
    run["checkpoint"] = checkpoint.sha256[:12]
    for key, fact in run.items():
        run[key] = f"{fact:.4g}" if isinstance(fact, float) else re.sub("[{}']", "", str(fact))
    missing = "" if "ablation" in tables else "uv run analyse_projections.py adds what ablation costs."
    later = "" if len(snapshots) > 1 else " No snapshots of this training: uv run train_CNN.py writes them."
    notes = {
        "generated": "Generated shapes, no photographs: they show that the code works, nothing more",
        "strongest": "Projection and patch in the test images that drive it most, with its activation. "
        "Grey is zero; one scale for all.",
        "weaker": "In images near percentiles of its activations above zero; a scale for each level.",
        "evolution": f"Strongest activation in {len(some):,} test images after each epoch; each has a "
        f"scale of its own.{later}",
        "ablation": missing,
        "needed": "Filters of conv4 whose ablation adds most to the loss of the class.",
        "classes": explain_classes(guesses, test.labels, names),
        "reading": explain_reading(tables.get("trust")),
    }
    facts = {
        "title": TITLES[checkpoint.dataset],
        "generated": checkpoint.dataset == "shapes",
        "accuracy": checkpoint.accuracy(),
        "classes": names,
        "colours": colours,
        "inks": [readable_on(colour) for colour in colours],
        "labels": test.labels,
        "epochs": [snapshot.epochs for snapshot in snapshots],
        "levels": LEVELS,
        "layers": layers,
        "metrics": METRICS,
        "notes": notes,
        "run": [(key.replace("_", " "), text) for key, text in run.items()],
        "figures": [name for name in figures if not name.startswith("readme")],
    }
    with atomic_write(folder / "index.html") as partial:
        partial.write_text(EXPLORER.replace("__DATA__", as_json(facts)), encoding="utf-8")
    print(f"wrote {folder / 'index.html'}", flush=True)


def main() -> None:
    """Draw filters over all classes, in each class, in single images, in occluded and in changed ones."""
    set_style()
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    net, names, folder = checkpoint.net, checkpoint.class_names, OUTPUTS / "heatmaps"
    snapshots = read_snapshots(CHECKPOINT.parent / "snapshots", checkpoint)
    maxima, positions = load_arrays(OUTPUTS / "activations.npz", checkpoint, "conv4_max", "conv4_position")
    filters = load_table(OUTPUTS / "filter_metrics.csv", checkpoint)
    classes = load_table(OUTPUTS / "class_metrics.csv", checkpoint)
    images, labels = load_checkpoint_split(checkpoint, DATA_DIR, "test")
    source = f"{len(images):,} test images of {TITLES[checkpoint.dataset]}"
    print(f"drawing conv4 on {source} on {device}, torch {torch.__version__}")
    source += f" ({checkpoint.accuracy()})"

    # over all classes
    conv4 = filters[filters["layer"] == "conv4"]
    heading = f"Filters of conv4, by preferred class, most selective first\n{source}, "
    heading += f"{conv4['dead'].sum()} dead filters left out\n"
    heading += "framed: the preferred class, by definition the largest value of its column"
    figure = draw_class_filters(class_means(classes), conv4, names, heading)
    save_figure(folder / "class_filter_heatmap.png", figure)

    # in each class
    sums, shown = [], []
    for label, name in enumerate(names):
        ranking = rank_filters(filters, classes, names, name).head(TOP_FILTERS)
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
    guesses = predict(net, images)
    right = first_correct(guesses, labels)
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
    figure = draw_occlusion(images[right], occlusions, magnitudes, table, square)
    figure.suptitle(heading)
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
    texts = [names[label] for label in labels[moved]]
    figure = draw_invariance(net, images[moved], DEGREES, curves, table, texts)
    heading = f"{len(moved)} correctly classified of the {source}, moved, enlarged and turned.\n"
    heading += f"Black: mean of {len(many)} images, as many of each class, right or wrong, "
    heading += "with its 95 % interval"
    figure.suptitle(heading)
    save_figure(folder / "invariance.png", figure)

    # every filter on one page
    write_explorer(OUTPUTS, checkpoint, snapshots, Split(images, labels), guesses, EVOLUTION_IMAGES)
    print(f"this was the last stage: open {OUTPUTS / 'explorer/index.html'}")


# ---------------------------------------------------------------- the page of the explorer

EXPLORER = r"""<!DOCTYPE html><html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>Filter explorer</title>
<style>
:root { color-scheme: light dark; --paper: #fbfaf6; --ink: #1d1c1a; --soft: #5c5952; --line: #d8d3c6;
  --hatch: #e4dfd2; --link: #0b5796; --bar: #a29c8c; }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #e9e6df; --soft: #aaa69b;
  --line: #3b3933; --hatch: #2d2b27; --link: #8fc4f2; --bar: #77725f; } }
body, body * { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
header, main { max-width: 1520px; margin: auto; padding: 10px 20px; }
header { display: flex; flex-wrap: wrap; gap: 2px 15px; border-bottom: 1px solid var(--line); }
header span { flex-grow: 1; }
h1 { font-size: 26px; line-height: 1.2; margin: 14px 0 4px; }
h2 { font-size: 16px; margin: 26px 0 2px; padding-top: 8px; border-top: 1px solid var(--line); }
h3 { font-size: 13px; margin: 16px 0 6px; } dl { margin: 6px 0; } p { max-width: 80ch; margin: 6px 0 12px; }
.soft, small, th, dt { color: var(--soft); font-weight: normal; font-size: inherit; }
.loud { background: #ffd54a; color: #000; font-weight: 600; padding: 8px; text-align: center; }
a { color: var(--link); } a[aria-current] { color: inherit; font-weight: 600; }
[title] { text-decoration: underline dotted; text-underline-offset: 3px; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; } h1:focus { outline: none; }
select, label { font: inherit; margin-right: 14px; }
.files { columns: 250px; } .files a { display: block; overflow-wrap: anywhere; }
.chip { padding: 0 7px; border-radius: 9px; } .large .panel { image-rendering: auto; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }
.panel { display: block; aspect-ratio: 1; image-rendering: pixelated; background:
  var(--image) var(--x) var(--y) / var(--wide) var(--high) no-repeat,
  repeating-linear-gradient(45deg, var(--paper) 0 5px, var(--hatch) 5px 10px); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 14px 10px; }
.tiles a { color: inherit; text-decoration: none; font-size: 12px; }
.tiles div { display: flex; justify-content: space-between; margin-top: 3px; }
.tiles a:is(:hover, :focus) .panel, .patches .panel { background-position: var(--x) var(--below), 0 0; }
.pairs, .panels { display: grid; gap: 10px 20px; font-size: 12px;
  grid-template-columns: repeat(auto-fill, calc(2 * var(--p))); }
.panels { gap: 10px; grid-template-columns: repeat(auto-fill, var(--p)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; } .pair > :last-child { grid-column: span 2; }
table { border-collapse: collapse; width: 100%; max-width: 800px; font-size: 13px; }
th, td { text-align: left; padding: 2px 8px 2px 0; } td { white-space: nowrap; }
.track { position: relative; width: 20vw; max-width: 110px; height: 11px; }
.track * { position: absolute; top: 1px; bottom: 1px; }
dl { display: grid; grid-template-columns: minmax(80px, max-content) 1fr; gap: 2px 16px; font-size: 14px; }
dd { margin: 0; overflow-wrap: anywhere; } svg { max-width: 480px; font-size: 12px; fill: var(--soft); }
@media (min-width: 1180px) { .two { display: grid; grid-template-columns: 1fr 460px; gap: 0 40px; } }
@media (max-width: 700px) { header, main { padding: 10px 14px; } .two { --p: var(--q) !important; }
  header span { flex-basis: 100%; } .pairs { grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); } }
</style><noscript>This page needs JavaScript; it loads nothing from elsewhere.</noscript>
<header></header><main></main>
<script id="data" type="application/json">__DATA__</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent), layers = Object.keys(data.layers);
const [main, header] = ["main", "header"].map((tag) => document.querySelector(tag)), deepest = layers.at(-1);
let order = {}, query = "";  // tiles last shown, which arrow keys follow, and how they were chosen

const count = (v) => v.toLocaleString("en"), two = (v) => v.toFixed(2);
const four = (v) => Math.abs(v) < 1000 ? String(Number(v.toPrecision(4))) : count(Math.round(v));
const share = (v) => `${(100 * v).toFixed(v && v < 0.0995 ? 1 : 0)} %`;
const nats = (v) => (v < 0.0005 ? "" : "+") + v.toFixed(3).replace("-0.000", "0.000");
const SORTS = {  // what tiles are sorted by, largest first, and how it is written
  filter: [(f) => -f.filter], preferred_class: [(f) => -data.classes.indexOf(f.preferred_class)],
  selectivity: [(f) => f.selectivity, two], auc: [(f) => f.auc, two],
  activation_mean: [(f) => f.activation_mean, two], activation_nonzero: [(f) => f.activation_nonzero, share],
  lost: [(f) => f.lost && f.lost.at(-1), nats],
  twin: [(f) => f.similar.length ? f.similar[0][1] : null, (v, f) => `${f.similar[0][0]} (r ${two(v)})`],
};
const nearlyDead = (f) => !f.dead && f.activation_nonzero < 0.01;
// ---- building blocks; text is never read as HTML
function el(tag, attributes, ...children) {
  const space = ["svg", "path", "text"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const node = document.createElementNS(`http://www.w3.org/${space}`, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat(9).filter((child) => child !== null));
  return node;
}
const h1 = (...text) => el("h1", { tabindex: -1 }, text);
const soft = (...text) => el("p", { class: "soft" }, text);
const section = (title, note, ...content) => [el("h2", {}, title), note ? soft(note) : null, content];
const link = (parts, ...text) => el("a", { href: `#${parts.map(encodeURIComponent).join("/")}` }, text);
const metric = (key) => el("span", { title: data.metrics[key][1] }, data.metrics[key][0]);
const list = (rows) => el("dl", {}, rows.map(([name = "", text = ""]) =>
  [el("dt", {}, name), el("dd", {}, text)]));
const row = (cells, tag = "td") =>
  el("tr", {}, cells.flat().filter((cell) => cell !== null).map((cell) => el(tag, {}, cell)));
const colour = (name) => data.colours[data.classes.indexOf(name)];
const dot = (name) => [el("span", { class: "dot", style: `background:${colour(name)}` }), name];
const chip = (name) => el("span", { class: "chip", style: `background:${colour(name)};color:`
  + data.inks[data.classes.indexOf(name)] }, name);
function panel(file, [columns, rows], [column, line], text) {  // one of the panels of a picture
  const at = (k, n) => n > 1 ? `${100 * k / (n - 1)}%` : 0;
  return el("span", { class: "panel", role: "img", "aria-label": text, style: `--image:url(${file});`
    + `--wide:${100 * columns}%;--high:${100 * rows}%;--x:${at(column, columns)};--y:${at(line, rows)};`
    + `--below:${at(line + 1, rows)}` });
}
function tiles(layer, numbers, note) {
  const { columns, filters, size } = data.layers[layer], rows = 2 * Math.ceil(filters.length / columns);
  return el("div", { class: size < 30 ? "tiles" : "tiles large" }, numbers.map((n) => {
    const f = filters[n], place = [n % columns, 2 * Math.floor(n / columns)];
    const text = f.dead ? "never fires" : nearlyDead(f) ? "nearly dead" : note(f);
    return link([layer, n], panel(`${layer}.webp`, [columns, rows], place, `projection of filter ${n}`),
      el("div", {}, el("b", {}, n), f.dead ? "dead" : chip(f.preferred_class)), el("small", {}, text));
  }));
}
function pairs(file, grid, examples, first) {  // projections and patches
  return el("div", { class: "pairs" }, examples.filter(([image]) => image >= 0).map(([image, value], k) => {
    const name = data.classes[data.labels[image]], text = `test image ${image}, ${name}`;
    return el("div", { class: "pair" },
      panel(file, grid, [first + k, 0], `projection in ${text}`), panel(file, grid, [first + k, 1], text),
      el("span", {}, el("b", {}, two(value)), " ", dot(name), el("small", {}, ` image ${image}`)));
  }));
}
function classTable(f) {
  const top = Math.max(...f.means.flat()), most = Math.max(...(f.lost || []).map(Math.abs)) || 1;
  const bar = (from, to, style) =>
    el("div", { style: `left:${100 * from}%;width:${100 * (to - from)}%;background:${style}` });
  const track = (...bars) => el("div", { class: "track" }, bars);
  const lost = (v, at = 0.5 + v / most / 2) => [track(bar(Math.min(0.5, at), Math.max(0.5, at), "var(--bar)"),
    bar(0.5, 0.51, "var(--ink)")), nats(v)];
  const rows = data.classes.map((name, k) => {
    const [mean, low, high] = f.means[k].map((v) => v / top), own = name === f.preferred_class;
    const bars = track(bar(0, mean, colour(name)), bar(low, high, "var(--ink);top:5px;bottom:5px"));
    return row([el(own ? "b" : "span", {}, dot(name)), bars, two(f.means[k][0]), f.lost && lost(f.lost[k])]);
  });
  return el("table", {}, row(["class", metric("class_mean"), "", f.lost && [metric("lost"), ""]], "th"), rows,
    f.lost && row(["all", "", "", lost(f.lost.at(-1))]));
}
function histogram(f) {
  const shares = f.counts.map((counts, g) => counts.map((n) => n / f.images[g]));
  const top = Math.max(...shares.flat()), steps = (v) =>
    `M40 112${v.map((y, k) => `V${112 - 100 * y / top}H${57 + 17 * k}`).join("")}V112Z`;
  const text = (x, y, t, anchor = "middle") => el("text", { x, y, "text-anchor": anchor }, t);
  const zeros = f.zeros.map((n, g) => share(n / f.images[g])), own = colour(f.preferred_class);
  return [el("svg", { viewBox: "0 0 460 146", role: "img", "aria-label": "histogram of its activations" },
    el("path", { d: steps(shares[1]), fill: "var(--bar)", opacity: 0.6 }),
    el("path", { d: steps(shares[0]), fill: own, "fill-opacity": 0.4, stroke: "var(--ink)" }),
    text(34, 20, share(top), "end"), text(34, 115, "0 %", "end"), text(40, 128, "0"),
    text(440, 128, two(f.largest)), text(244, 143, "activation; share of the images of each group")),
  soft(dot(f.preferred_class), ` outlined (${count(f.images[0])} images), all others grey `
    + `(${count(f.images[1])}). Not drawn: zero, on ${zeros.join(" and ")} of them.`)];
}
// ---- the four views
function layerView(layer) {
  const { filters } = data.layers[layer], wanted = new URLSearchParams(query), lost = filters[0].lost;
  const by = wanted.get("sort") in SORTS ? wanted.get("sort") : "filter", [value, write] = SORTS[by];
  const name = wanted.get("class") || "", sorts = Object.keys(SORTS).filter((k) => k !== "lost" || lost);
  const key = (f) => f.dead || value(f) === null ? -1e9 : value(f);
  const shown = filters.filter((f) => !name || f.preferred_class === name).sort((a, b) => key(b) - key(a));
  order = { layer, numbers: shown.map((f) => f.filter) };
  const note = (f) => !write ? `selectivity ${two(f.selectivity)}` : value(f) === null ? ""
    : `${data.metrics[by][0]} ${write(value(f), f)}`;
  const grid = tiles(layer, order.numbers, note), box = el("input", { type: "checkbox" });
  box.onchange = () => grid.classList.toggle("patches", box.checked);
  const choose = (what, text, now, options) => {
    const select = el("select", {}, options.map(([v, t]) => el("option", { value: v }, t)));
    select.value = now;
    select.onchange = () => { wanted.set(what, select.value); location.hash = `${layer}?${wanted}`; };
    return el("label", {}, text, select);
  };
  return [h1(layer), soft(data.layers[layer].note),
    choose("sort", "Sort by ", by, sorts.map((k) => [k, data.metrics[k][0]])),
    choose("class", "Show ", name, [["", "all classes"], ...data.classes.map((c) => [c, c])]),
    el("label", {}, box, " patches"), soft(`${shown.length} of ${filters.length} filters`
      + `${name && ` that prefer ${name}`}, sorted by `, metric(by)), grid];
}
function filterView(layer, n) {
  const { filters, size } = data.layers[layer], f = filters[n], top = f.top.length, alike = f.similar;
  const listed = order.layer === layer && order.numbers.includes(n);
  if (!listed) order = { layer, numbers: filters.map((g) => g.filter) };
  const near = (step, text) => ((k) => k === undefined ? "" : link([layer, k], `${text}: ${k}`))(
    order.numbers[order.numbers.indexOf(n) + step]);
  const head = [h1(`${layer} / ${n} `, f.dead ? "" : chip(f.preferred_class)), soft(near(-1, "previous"), " ",
    near(1, "next"), " (arrow keys) ", link([layer], `all of ${layer}`), " (Escape)")];
  if (f.dead) return [head, el("p", {}, "Dead: it fires on none of the test images.")];
  const start = top + f.levels.length, grid = [start + data.epochs.length, 2];
  const file = `${layer}/${String(n).padStart(3, "0")}.webp`;
  const each = f.levels.length / data.levels.length, value = (k) => [metric(k), SORTS[k][1](SORTS[k][0](f))];
  const pixels = (most) => `${size * Math.max(1, Math.floor(most / size))}px`;  // all stay equally large
  return [head, el("div", { class: "two", style: `--p:${pixels(152)};--q:${pixels(76)}` }, el("div", {},
    section("Strongest activations", data.notes.strongest, pairs(file, grid, f.top, 0)),
    section("Weaker ones", data.notes.weaker, data.levels.map((level, k) => [
      el("h3", {}, `${level}th percentile`),
      pairs(file, grid, f.levels.slice(k * each, (k + 1) * each), top + k * each)])),
    section("How it developed", data.notes.evolution, el("div", { class: "panels" },
      data.epochs.map((epoch, k) => el("div", {},
        panel(file, grid, [start + k, 0], `projection after epoch ${epoch}`), `epoch ${epoch}`))))),
  el("div", {}, section("By class", layer === deepest ? data.notes.ablation : "", classTable(f)),
    section("Activations on the test images", "", histogram(f)), section("In numbers", "", list([
      [metric("preferred_class"), `${f.preferred_class} (in ${share(f.preferred_share)} of samples), then `
        + `${f.runner_up}; most frequent in its ${top} images: ${f.top_class}`],
      [metric("selectivity"), `${two(f.selectivity)} (95 % interval ${two(f.selectivity_low)} to `
        + `${two(f.selectivity_high)})`],
      value("auc"), value("activation_nonzero"), value("activation_mean"),
      f.nonzero_count === null ? [] : [metric("projections"), `${four(f.nonzero_count)} non-zero pixels; `
        + `mean ${four(f.mean)}, variance ${four(f.variance)}, largest ${four(f.max)}`]])),
    section("Filters that fire alike", "Correlation of activations over the test images.",
      tiles(layer, alike.map(([k]) => k), (g) => `r = ${two(new Map(alike).get(g.filter))}`))))];
}
function classView(name) {
  const k = data.classes.indexOf(name), by = (value, most, note) => (layer) => tiles(layer,
    data.layers[layer].filters.filter((f) => value(f) !== null).sort((a, b) => value(b) - value(a))
      .slice(0, most).map((f) => f.filter), note);
  const lost = by((f) => f.lost && f.lost[k], 12, (f) => `loss ${nats(f.lost[k])}`);
  const own = by((f) => f.preferred_class === name ? f.selectivity : null, 999,
    (f) => `selectivity ${two(f.selectivity)}`);
  return [el("p", {}, data.classes.map((c) => [link(["class", c], chip(c)), " "])), h1(name),
    el("p", {}, data.notes.classes[k]),
    section("Needed most", data.notes.ablation || data.notes.needed, lost(deepest)),
    [...layers].reverse().map((layer) =>
      section(`Filters of ${layer} that prefer it`, "By selectivity.", own(layer)))];
}
function runView() {
  const figures = data.figures.map((name) => [el("a", { href: `../${encodeURI(name)}` }, name)]);
  const reading = data.notes.reading.map((text) => el("p", {}, text));
  return [h1("The run"), section("How to read a projection", "", reading),
    section("What the numbers mean", "", list(Object.values(data.metrics))),
    section("Training", "", list(data.run)),
    section("Other figures", "", el("div", { class: "files" }, figures))];
}
// ---- addresses (#conv4, #conv4/137, #conv4?sort=auc&class=car, #class/car, #run) and keys
function show() {
  const [path, search] = location.hash.slice(1).split("?"), last = main.dataset.filter;
  const [view, item] = path.split("/").map(decodeURIComponent), n = Number(item);
  const layer = layers.includes(view) ? view : deepest, known = item && data.layers[layer].filters[n];
  const one = ["class", "run"].includes(view) ? view : known ? "filter" : "layer";
  if (one === "layer" && search !== undefined) query = search;
  const views = { layer: () => layerView(layer), filter: () => filterView(layer, n), run: runView,
    class: () => classView(data.classes.includes(item) ? item : data.classes[0]) };
  main.replaceChildren(...views[one]().flat(9).filter((node) => node !== null));
  if (data.generated) main.prepend(el("div", { class: "loud" }, data.notes.generated));
  header.replaceChildren(el("b", {}, "Filter explorer"), el("span", {}, `${data.title}, ${data.accuracy}`));
  for (const name of [...layers, "class", "run"]) header.append(link([name], name));
  const here = one === "class" || one === "run" ? one : layer;
  header.querySelector(`[href="#${here}"]`).setAttribute("aria-current", "page");
  document.title = `${main.querySelector("h1").textContent}, ${data.title}`;
  main.dataset.filter = one === "filter" ? `#${layer}/${n}` : "";
  const back = one === "layer" && last && main.querySelector(`.tiles [href="${last}"]`);
  if (!back) scrollTo(0, 0);
  (back || main.querySelector("h1")).focus({ preventScroll: !back });
}
addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  const [layer, n] = main.dataset.filter.slice(1).split("/");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
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
