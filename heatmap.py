"""Draw what the filters of conv4 respond to: over all classes, in each class, in single and changed images.

Run:    uv run heatmap.py
Reads:  outputs/CNN.pth, outputs/activations.npz, outputs/filter_metrics.csv, outputs/class_metrics.csv,
        data/stl10_binary/test_{X,y}.bin
Writes: outputs/heatmaps/class_filter_heatmap.png, outputs/heatmaps/class_*.png, outputs/heatmaps/images.png,
        outputs/heatmaps/occlusion.png, outputs/heatmaps/invariance.png

The projection of a filter in an image starts from its strongest unit there. Its magnitude at a pixel is the
sum over RGB of absolute values, in units of normalised pixels.

Zeiler & Fergus 2014 change images in two ways to see what the network uses: a grey square slides over them
(section 4.2), and they are moved, enlarged and turned (Figure 5). Both are done here on test images that are
classified correctly. Grey is the mean colour of the training images, 0 in normalised pixels.
"""

import re
from collections.abc import Mapping, Sequence
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
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import affine
from tqdm import tqdm

from analyse_projections import class_means, rank_filters
from CNN import CNN, LAYERS, choose_device, load_checkpoint
from deconv import displayed, robust_scale
from deconv_full import Projector, Units, project_units, strongest_of
from load_data import IMAGE_SIZE, TITLES, Array, load_arrays, load_split, load_table, save_figure, set_style

TOP_FILTERS = 4  # filters drawn of each class
TOP_IMAGES = 3  # images drawn of each filter: those of the class that drive it most
SUMMED_FILTERS = 16  # strongest filters of an image, whose projections are added up in images.png
OCCLUDER = 24  # pixels, side of the grey square that slides over an image: it hides a head or a wheel
OCCLUSION_STRIDE = 2  # pixels from one position of the square to the next
INVARIANCE_IMAGES = 5  # images in invariance.png, each of another class; the paper has 5
SHIFTS = range(-24, 25, 2)  # pixels by which they are moved, down is positive
ZOOMS = [1 + k / 20 for k in range(17)]  # factors by which they are enlarged
ANGLES = range(0, 351, 10)  # degrees by which they are turned clockwise
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
OUTPUTS = Path("outputs")  # where results go

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
    """Draw classes x filters: mean activation as a share of the filter's largest; above it the selectivity.

    Args:
        means: What `class_means` returned, (classes, filters).
        filters: Rows of filter_metrics.csv; dead filters are left out.
        names: Of the classes.
        heading: Title.
    """
    active = filters[~filters["dead"]]
    active = active.assign(preferred_class=pd.Categorical(active["preferred_class"], list(names)))
    active = active.sort_values(["preferred_class", "selectivity"], ascending=[True, False])
    sizes = active["preferred_class"].value_counts(sort=False).tolist()
    fig, (top, ax) = plt.subplots(
        2, 1, figsize=(8, 4), sharex=True, height_ratios=[1, 4], layout="constrained"
    )
    top.stairs(active["selectivity"].to_numpy(np.float64), fill=True, color="0.5")
    top.set(ylim=(0, 1), ylabel="selectivity")
    shares = (means / means.max(axis=0).clip(min=1e-12))[:, active["filter"]]
    options: dict[str, Any] = {"vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    drawn = ax.imshow(shares, "viridis", extent=(0, len(active), len(names), 0), **options)
    for number, (left, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        ax.axvline(left, color="white", linewidth=0.8)
        ax.add_patch(Rectangle((left, number), size, 1, fill=False, edgecolor="white", linewidth=1.8))
    texts = [f"{name} ({size})" for name, size in zip(names, sizes, strict=True)]
    ax.set_yticks(np.arange(len(names)) + 0.5, texts)
    ax.set(xlabel="active filters, by preferred class (how many prefer it), then falling selectivity")
    fig.colorbar(drawn, ax=ax, pad=0.01, label="mean activation on the class /\nfilter's largest class mean")
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
        ranking: What `rank_filters` says of these filters.
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
        text += f"mean activation {of_filter.activation_mean:.2f}"
        text += "" if of_filter.prefers else "\nprefers another class"
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
    """What the network makes of an image with a grey square at each position.

    The activity of a filter is the sum over its pooled map.
    """

    whole: float  # activity without a square
    activity: Array  # with the square there, (positions down, positions across)
    probability: Array  # of each class, (positions down, positions across, classes)


def occlusion_sensitivity(image: Array, filter_: int, net: CNN, covered: Array) -> Occlusion:
    """Slide a grey square over an image and measure one filter of conv4, and the probabilities.

    Args:
        image: uint8 (3, 96, 96).
        filter_: Filter that is measured.
        net: The network.
        covered: What `square_positions` returned.
    """
    whole, n = net.normalise(torch.from_numpy(image[None])), len(covered)
    lines = torch.from_numpy(covered).to(whole.device)
    activity, probability = [], []
    for rows in lines:  # one copy of the image for each place across
        squares = rows[None, :, None] & lines[:, None, :]  # (places across, 96, 96)
        pooled = net.features(whole.masked_fill(squares[:, None], 0))[-1][0]
        activity.append(pooled[:, filter_].sum(dim=(1, 2)))
        probability.append(net.classify(pooled).softmax(dim=1))
    return Occlusion(
        float(net.features(whole)[-1][0][0, filter_].sum()),
        torch.stack(activity).cpu().numpy(),
        torch.stack(probability).cpu().numpy().reshape(n, n, -1),
    )


def draw_occlusion(
    images: Array,
    occlusions: Sequence[Occlusion],
    magnitudes: Array,
    texts: Sequence[str],
    labels: Array,
    names: Sequence[str],
    side: int,
    stride: int,
    heading: str,
) -> Figure:
    """Draw the paper's maps of an occluded image, one image a row (Figure 6 of the ECCV version).

    Args:
        images: uint8 (images, 3, 96, 96).
        occlusions: What `occlusion_sensitivity` returned for them.
        magnitudes: Of the filters' projections, (images, 96, 96).
        texts: What is written beside each image.
        labels: Of the images.
        names: Of the classes.
        side: Of the square, in pixels.
        stride: Pixels from one position to the next.
        heading: Title.
    """
    size = 8, 1.7 + 1.36 * len(images)
    fig, axes = plt.subplots(len(images), 5, figsize=size, squeeze=False, layout="constrained")
    # a value stands for the stride x stride pixels around the centre of its square
    first = stride // 2 - stride / 2
    last = first + stride * len(occlusions[0].activity)
    where, whole = (first, last, last, first), (0, IMAGE_SIZE, IMAGE_SIZE, 0)
    colours = ListedColormap(sns.color_palette("colorblind", len(names)))
    above = ["image, square", "activity of its\nstrongest filter", "projection of\nthis filter"]
    above += ["probability of\nthe true class", "most probable\nclass"]
    top, winners = robust_scale(magnitudes), [found.probability.argmax(axis=2) for found in occlusions]
    for k, (row, found) in enumerate(zip(axes, occlusions, strict=True)):
        column_texts = [""] * 5 if k else above
        show(row[0], np.moveaxis(images[k], 0, 2), column_texts[0], extent=whole)
        row[0].set_ylabel(texts[k], rotation=0, ha="right", va="center", fontsize=8)
        lowest = np.unravel_index(found.activity.argmin(), found.activity.shape)
        top_left = [int(place) * stride + stride // 2 - side // 2 for place in reversed(lowest)]
        for colour, width in (("black", 2.2), ("white", 1.0)):
            style: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": width}
            row[0].add_patch(Rectangle((top_left[0], top_left[1]), side, side, **style))
        options: dict[str, Any] = {"vmin": 0, "extent": where}
        activity = show(
            row[1], found.activity / found.whole, column_texts[1], cmap="RdBu_r", vmax=2, **options
        )
        projection = show(row[2], magnitudes[k], column_texts[2], cmap="mako", vmin=0, vmax=top, extent=whole)
        true_class = found.probability[:, :, labels[k]]
        probability = show(row[3], true_class, column_texts[3], cmap="viridis", vmax=1, **options)
        show(row[4], winners[k], column_texts[4], cmap=colours, vmax=len(names), **options)
        for ax in row:
            ax.set(xlim=(0, IMAGE_SIZE), ylim=(IMAGE_SIZE, 0))
    below: dict[str, Any] = {"location": "bottom", "aspect": 12, "pad": 0.01, "shrink": 0.9}
    units = ["share of the activity\nwithout the square", "magnitude\n(normalised pixels)", "probability"]
    for column, drawn in enumerate((activity, projection, probability), start=1):
        bar = fig.colorbar(drawn, ax=axes[:, column], **below)
        bar.ax.tick_params(labelsize=7)
        bar.set_label(units[column - 1], fontsize=8)
    handles = [Patch(color=colours(int(label)), label=names[label]) for label in np.unique(winners)]
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02), "ncols": 2}
    style = {"frameon": False, "handlelength": 1, "columnspacing": 1, "labelspacing": 0.3, "fontsize": 7}
    legend = axes[-1, 4].legend(handles=handles, **place, **style)
    legend.set_in_layout(False)  # it stands beside the colour bars, which make room for it
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


class Change(NamedTuple):
    """What one kind of `change` does to some images."""

    degrees: Sequence[float]  # how far they are changed
    curves: Array  # what `measure_invariance` returns, (images, 3, degrees)
    shown: Sequence[float]  # five of the degrees
    examples: Array  # the images after these: (images, 5, 3, 96, 96)


def measure_invariance(net: CNN, image: Tensor, label: int, kind: str, degrees: Sequence[float]) -> Array:
    """Measure how far features of an image move when it is changed (Figure 5 of the paper).

    Args:
        net: The network, in evaluation mode.
        image: Normalised, (3, 96, 96).
        label: Its class.
        kind: One of `CHANGES`.
        degrees: How far it is changed.

    Returns:
        (3, degrees): Euclidean distance between the pooled maps of conv1 of the changed and the unchanged
        image, as a share of the norm of the unchanged ones; that of conv4; probability of `label`.
    """
    copies = torch.stack([image, *(change(image, **{kind: degree}) for degree in degrees)])
    features = net.features(copies)
    rows = []
    for pooled in (features[0][0], features[-1][0]):
        flat = pooled.flatten(1)
        rows.append((flat[1:] - flat[0]).norm(dim=1) / flat[0].norm())
    rows.append(net.classify(features[-1][0]).softmax(dim=1)[1:, label])
    return torch.stack(rows).cpu().numpy().astype(np.float64)


def change_images(images: Array, labels: Array, net: CNN, kind: str, degrees: Sequence[float]) -> Change:
    """Change images in one of the `CHANGES`, measure what the network makes of it and keep some to show."""
    normalised = net.normalise(torch.from_numpy(images))
    pairs = zip(normalised, labels.tolist(), strict=True)
    curves = [measure_invariance(net, image, label, kind, degrees) for image, label in pairs]
    shown = [degrees[k] for k in np.linspace(0, len(degrees) - 1, 5).round().astype(int)]
    changed = torch.stack([change(normalised, **{kind: degree}) for degree in shown], dim=1)
    examples = (255 * (changed * net.std + net.mean)).clamp(0, 255).byte()
    return Change(degrees, np.stack(curves), shown, examples.cpu().numpy())


def draw_invariance(changes: Mapping[str, Change], texts: Sequence[str], heading: str) -> Figure:
    """Draw the layout of the paper's Figure 5, one kind of change a row: examples, distances, probability.

    Args:
        changes: By kind, one of `CHANGES`.
        texts: Names of the images.
        heading: Title.
    """
    size, widths = (8, 0.9 + 1.95 * len(changes)), [1.15, 1, 1, 1]
    fig, axes = plt.subplots(
        len(changes), 4, figsize=size, sharey="col", width_ratios=widths, layout="constrained"
    )
    above = "examples", "distance in conv1", "distance in conv4", "probability of\nthe true class"
    for number, (row, (kind, found)) in enumerate(zip(axes, changes.items(), strict=True)):
        images, columns = found.examples.shape[:2]
        # (images, examples, 3, rows, columns) -> one sheet
        sheet = found.examples.transpose(0, 3, 1, 4, 2).reshape(images * IMAGE_SIZE, -1, 3)
        row[0].imshow(sheet, interpolation="nearest", extent=(0, columns, images, 0))
        row[0].set_xticks(np.arange(columns) + 0.5, [f"{degree:g}" for degree in found.shown])
        row[0].set_yticks([])
        for k, text in enumerate(texts):
            line: dict[str, Any] = {
                "color": f"C{k}",
                "linestyle": ("-", "--", "-.", ":")[k % 4],
                "label": text,
            }
            row[0].add_patch(Rectangle((-0.16, k + 0.04), 0.1, 0.92, color=f"C{k}", clip_on=False))
            for ax, curve in zip(row[1:], found.curves[k], strict=True):
                ax.plot(found.degrees, curve, **line)
        for ax, text in zip(row, above, strict=True):
            ax.set(xlabel=CHANGES[kind])
            ax.set_title("" if number else text, fontsize=9)
            ax.tick_params(labelsize=7)
            sns.despine(ax=ax)
    for ax in axes[:, 1:3].flat:
        ax.set_ylabel("share of the norm", fontsize=8)
    for ax in axes[0, 1:]:  # of a column, which shares them
        ax.set_ylim(bottom=0)
    fig.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    fig.suptitle(heading)
    return fig


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
    strongest, covered = maxima[right].argmax(axis=1), square_positions(OCCLUDER, OCCLUSION_STRIDE)
    occlusions = [
        occlusion_sensitivity(images[k], f, net, covered)
        for k, f in zip(tqdm(right, "occlusion", unit=" images", disable=None), strongest, strict=True)
    ]
    units = strongest_of(maxima, positions, right, strongest)
    magnitudes, _ = sum_projections(images, net, units, np.arange(len(right)), "projections")
    heading = f"A grey square of {OCCLUDER} x {OCCLUDER} pixels slides over the first correctly classified"
    heading += f" image of each class,\n{len(right)} of the {source}. Strongest filter: of conv4;\n"
    heading += "its activity: sum over its map. Frame: the square where the activity is lowest"
    entries = zip(labels[right], strongest, occlusions, strict=True)
    texts = [f"{names[label]}\nfilter {f}\nactivity {found.whole:.2f}" for label, f, found in entries]
    square = OCCLUDER, OCCLUSION_STRIDE
    figure = draw_occlusion(
        images[right], occlusions, magnitudes, texts, labels[right], names, *square, heading
    )
    save_figure(folder / "occlusion.png", figure)

    # in images that are moved, enlarged and turned
    moved = right[:INVARIANCE_IMAGES]
    changes = {
        kind: change_images(images[moved], labels[moved], net, kind, list(degrees))
        for kind, degrees in (("shift", SHIFTS), ("zoom", ZOOMS), ("angle", ANGLES))
    }
    heading = f"{len(moved)} of the {source},\nmoved, enlarged and turned: distance of their features from "
    heading += "those of\nthe unchanged image, as a share of the norm"
    texts = [names[label] for label in labels[moved]]
    save_figure(folder / "invariance.png", draw_invariance(changes, texts, heading))
    print(f"this was the last stage: look at the pictures in {folder}/")


if __name__ == "__main__":
    main()
