"""Draw what the filters of conv4 respond to: over all classes, in each class, in single and changed images.

Run:    uv run heatmap.py
Reads:  outputs/CNN.pth, outputs/activations.npz, outputs/filter_metrics.csv, outputs/class_metrics.csv,
        data/stl10_binary/test_{X,y}.bin
Writes: outputs/heatmaps/class_filter_heatmap.png, outputs/heatmaps/class_*.png, outputs/heatmaps/images.png,
        outputs/heatmaps/occlusion.png, outputs/heatmaps/occlusion_correlation.png,
        outputs/heatmaps/invariance.png

The projection of a filter in an image starts from its strongest unit there. Its magnitude at a pixel is the
sum over RGB of absolute values, in units of normalised pixels.

Zeiler & Fergus 2014 change images in two ways to see what the network uses: a grey square slides over them
(section 4.2), and they are moved, enlarged and turned (Figure 5). Both are done here on test images that are
classified correctly. Grey is the mean colour of the training images, 0 in normalised pixels.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
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
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import affine
from tqdm import tqdm

from analyse_projections import by_class, check_origin, mean_table, median_interval, rank_filters, spearman
from CNN import CNN, IMAGE_SIZE, LAYERS, Checkpoint, choose_device, frame_sizes, load_checkpoint
from deconv import displayed, robust_scale
from deconv_full import Projector, batches
from load_data import (
    check_lists,
    check_numbers,
    check_paths,
    load_arrays,
    load_split,
    normalise,
    plain_errors,
    prepare_folders,
    require_file,
    save_figure,
    title,
)

TOP_FILTERS = 4  # filters drawn of each class
TOP_IMAGES = 3  # images drawn of each filter: those of the class that drive it most
SUMMED_FILTERS = 16  # strongest filters of an image, whose projections are added up in images.png
OCCLUDER = 24  # pixels, side of the grey square that slides over an image: it hides a head or a wheel
OCCLUSION_STRIDE = 2  # pixels from one position of the square to the next in occlusion.png
OCCLUSION_STRIDE_MANY = 6  # pixels likewise for occlusion_correlation.png, where many images are occluded
OCCLUDED_IMAGES = 50  # images in occlusion_correlation.png
RESAMPLINGS = 10_000  # bootstrap samples behind the intervals of their medians
OCCLUSION_BATCH = 64  # occluded copies of an image that pass the network at once
INVARIANCE_IMAGES = 5  # images in invariance.png, each of another class; the paper has 5, at most 10
SHIFTS = range(-24, 25, 2)  # pixels by which they are moved, down is positive
ZOOMS = [1 + k / 20 for k in range(17)]  # factors by which they are enlarged
ANGLES = range(0, 351, 10)  # degrees by which they are turned clockwise
BATCH_SIZE = 32  # images whose masks are held at once; more costs memory, not time
CHUNK = 32  # projections at once; on a CPU they should fit its cache, on a GPU try 2048
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
OUTPUTS = Path("outputs")  # where results go

LAYER = LAYERS[-1]  # not a setting: only conv4 has tables of its projections
# Ten colours that stay apart for the colour-blind (Petroff 2021, "Accessible color sequences"), one a class
CLASS_COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
CHANGES = {  # arguments of `change`, and what figures call them
    "shift": "vertical shift (pixels)",
    "zoom": "scale (factor)",
    "angle": "rotation (degrees)",
}


def load_activations(
    path: Path, checkpoint: Checkpoint
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int16]]:
    """Read labels, strongest activations of conv4 (images, filters) and their places (images, filters, 2).

    Raises:
        SystemExit: If the file is missing, damaged, or made from another checkpoint or data set.
    """
    dtypes = {"labels": "int64", f"{LAYER}_max": "float32", f"{LAYER}_position": "int16"}
    found, again = load_arrays(path, "deconv_full.py", dtypes), "run `uv run deconv_full.py` again"
    check_origin(path, found, checkpoint)
    labels, values, positions = (found.arrays[key] for key in dtypes)
    shape = labels.size, checkpoint.net.config["filters"][-1]
    if (labels.ndim, values.shape, positions.shape) != (1, shape, (*shape, 2)):
        raise SystemExit(f"{path} does not fit the network or itself: {again}")
    side = frame_sizes(checkpoint.net)[1][-1] // checkpoint.net.blocks[-1].pool_size
    possible = (values >= 0) & np.isfinite(values) & ((positions >= 0) & (positions < side)).all(axis=2)
    if not possible.all():
        raise SystemExit(f"{path} holds impossible values: {again}")
    return labels, values, positions


def read_tables(
    folder: Path, values: NDArray[np.float32], labels: NDArray[np.int64], names: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the rows of conv4 of filter_metrics.csv and class_metrics.csv.

    The tables do not say what they were made from, so their mean activations are held against `values`.

    Args:
        folder: Holds both.
        values: Strongest activation of each filter in each image, (images, filters).
        labels: Of the images.
        names: Of the classes.

    Raises:
        SystemExit: If a table is missing, damaged or made from other activations.
    """
    paths = folder / "filter_metrics.csv", folder / "class_metrics.csv"
    for path in paths:
        require_file(path, "analyse_projections.py")
    means = by_class(np.mean, values.astype(np.float64), labels, len(names))
    types = dict.fromkeys(("layer", "class", "preferred_class"), str) | {"dead": bool, "filter": int}
    types |= dict.fromkeys(("activation_mean", "activation_nonzero", "selectivity"), float)
    try:  # a class may be called "NA": only an empty field is a missing one
        tables = [pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""]) for path in paths]
        filters, classes = (table[table["layer"] == LAYER] for table in tables)
        fits = (
            np.array_equal(filters["filter"], np.arange(values.shape[1]))
            and np.allclose(filters["activation_mean"], values.mean(axis=0, dtype=np.float64), rtol=1e-3)
            and np.allclose(mean_table(classes, LAYER, names), means, rtol=1e-3, equal_nan=True)
            and np.array_equal(filters["dead"], (values == 0).all(axis=0))
            and set(filters.loc[~filters["dead"], "preferred_class"]) <= set(names)
            and filters["activation_nonzero"].between(0, 1).all()
            and not (filters["selectivity"].abs() > 1).any()
        )
    except (KeyError, ValueError, TypeError, OSError):
        fits = False
    if not fits:
        again = "run `uv run analyse_projections.py` again"
        raise SystemExit(f"{paths[0]} and {paths[1].name} do not belong to activations.npz: {again}")
    return filters, classes


def sort_filters(filter_metrics: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return the rows of living filters by preferred class, ordered as `names`, then falling selectivity."""
    living = filter_metrics[~filter_metrics["dead"]]
    living = living.assign(preferred_class=pd.Categorical(living["preferred_class"], names))
    order = ["preferred_class", "selectivity", "filter"]
    return living.sort_values(order, ascending=[True, False, True], ignore_index=True)


def safe_name(name: str) -> str:
    """Return `name` as part of a file name: short, and only letters, digits, '-' and '_'."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]


def pairs(images: ArrayLike, filters: ArrayLike) -> NDArray[np.int64]:
    """Return (pairs, 2) of image and filter, either of which may be one for all."""
    return np.column_stack(np.broadcast_arrays(images, filters))


def sum_projections(
    images: NDArray[np.uint8],
    checkpoint: Checkpoint,
    device: torch.device,
    positions: NDArray[np.int16],
    groups: Sequence[NDArray[np.int64]],
    batch_size: int,
    chunk: int,
    doing: str,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project conv4's filters from their strongest units and add the projections up, group by group.

    Args:
        images: uint8 (images, 3, 96, 96).
        checkpoint: The network, with the mean and std of its training images.
        device: Where to compute.
        positions: Row and column of the strongest unit in conv4's pooled map, (images, filters, 2).
        groups: `pairs` of what is to be added up.
        batch_size: Images at once.
        chunk: Projections at once.
        doing: Label of the progress bar.

    Returns:
        Sum of magnitudes (groups, 96, 96), and signed sum (groups, 3, 96, 96).
    """
    magnitudes = np.zeros((len(groups), IMAGE_SIZE, IMAGE_SIZE))
    signed = np.zeros((len(groups), 3, IMAGE_SIZE, IMAGE_SIZE))
    projector = Projector(checkpoint.net, LAYERS.index(LAYER))
    image, filter_ = np.concatenate(groups).T
    group = np.repeat(np.arange(len(groups)), [len(members) for members in groups])
    needed = np.unique(image)
    for batch, features in batches(images, needed, checkpoint, device, batch_size, doing):
        entries = np.flatnonzero(np.isin(image, batch))
        _, filters, _, columns = features[-1][0].shape
        row, column = np.moveaxis(positions[batch].astype(np.int64), 2, 0)
        wanted = np.searchsorted(batch, image[entries]) * filters + filter_[entries]
        units = projector.units(features, torch.from_numpy(row * columns + column).to(device))
        units = units.take(torch.from_numpy(wanted).to(device))
        masks = projector.masks(features)
        for some in projector.groups(units, chunk):
            windows = projector.project(masks, units.take(some)).permute(0, 3, 1, 2).cpu().numpy()
            where = group[entries[some.cpu().numpy()]], units.row[some].tolist(), units.column[some].tolist()
            for g, r, c, window in zip(*where, windows, strict=True):
                inside = projector.inside(r, c)
                magnitudes[g][inside] += np.abs(window).sum(axis=0)
                signed[g][:, *inside] += window
    return magnitudes, signed


def correct_images(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    checkpoint: Checkpoint,
    device: torch.device,
    count: int,
    batch_size: int,
) -> list[NDArray[np.int64]]:
    """Return, for each class, the first `count` images that are classified correctly; fewer if there are not.

    Args:
        images: uint8 (images, 3, 96, 96).
        labels: Of the images.
        checkpoint: The network, with the mean and std of its training images.
        device: Where to compute.
        count: Images a class at most.
        batch_size: Images at once.
    """
    found = []
    for label in range(len(checkpoint.class_names)):
        right = np.empty(0, np.int64)
        members = np.flatnonzero(labels == label)
        for start in range(0, len(members), batch_size):
            if len(right) >= count:
                break
            which = members[start : start + batch_size]
            batch = normalise(torch.from_numpy(images[which]).to(device), checkpoint.mean, checkpoint.std)
            guesses = checkpoint.net(batch.contiguous(memory_format=torch.channels_last)).argmax(dim=1)
            right = np.concatenate([right, which[guesses.cpu().numpy() == label]])
        found.append(right[:count])
    return found


def in_turn(groups: Sequence[NDArray[np.int64]], count: int) -> NDArray[np.int64]:
    """Return the first entry of each group, then the second of each, and so on, `count` in all at most."""
    rounds = [g[k] for k in range(max(map(len, groups))) for g in groups if k < len(g)]
    return np.array(rounds[:count], np.int64)


def square_positions(side: int, stride: int) -> NDArray[np.bool_]:
    """Return which rows (columns alike) of the image a square covers at each of its positions.

    Its centres are `stride` pixels apart, the first one stride // 2 from the border. The border cuts squares
    that reach beyond it.

    Returns:
        (positions, 96)
    """
    starts = np.arange(stride // 2, IMAGE_SIZE, stride)[:, None] - side // 2
    pixels = np.arange(IMAGE_SIZE)
    return (pixels >= starts) & (pixels < starts + side)


def occlude(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return one copy of an image for each square, grey where the square is.

    Args:
        image: Normalised, (3, 96, 96).
        rows: Which rows each square covers, bool (squares, 96).
        columns: Which columns likewise.

    Returns:
        (squares, 3, 96, 96)
    """
    return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class Occlusion(NamedTuple):
    """What the network makes of images with a grey square at each position (section 4.2 of the paper).

    The activity of a filter is the sum over its pooled map.
    """

    whole: NDArray[np.float32]  # activity without a square, (images,)
    activity: NDArray[np.float32]  # with the square there, (images, positions down, positions across)
    probability: NDArray[np.float32]  # of each class, (images, positions down, positions across, classes)

    def drop(self) -> NDArray[np.float32]:
        """Return the activity that is lost to the square, (images, positions down, positions across).

        What is below 1e-5 of the whole activity is rounding and becomes 0, so that its ranks are ties.
        """
        whole = self.whole[:, None, None]
        lost = whole - self.activity
        return np.where(np.abs(lost) > 1e-5 * whole, lost, np.float32(0))

    def relative(self) -> NDArray[np.float32]:
        """Return the activity as a share of that without a square; nan where the filter does not fire."""
        whole = np.where(self.whole > 0, self.whole, np.nan).astype(np.float32)
        return self.activity / whole[:, None, None]


def slide_square(
    images: NDArray[np.uint8],
    filters: NDArray[np.int64],
    checkpoint: Checkpoint,
    device: torch.device,
    covered: NDArray[np.bool_],
    batch_size: int,
    doing: str,
) -> Occlusion:
    """Slide a grey square over images and measure one filter of conv4 in each, and the probabilities.

    Args:
        images: uint8 (images, 3, 96, 96), at least one.
        filters: Filter that is measured in each.
        checkpoint: The network, with the mean and std of its training images.
        device: Where to compute.
        covered: What `square_positions` returned.
        batch_size: Occluded copies at once.
        doing: Label of the progress bar.
    """
    net, n = checkpoint.net, len(covered)
    lines = torch.from_numpy(covered).to(device)
    row, column = torch.arange(n * n, device=device) // n, torch.arange(n * n, device=device) % n
    normalised = normalise(torch.from_numpy(images).to(device), checkpoint.mean, checkpoint.std)
    pairs_of = zip(normalised, filters.tolist(), strict=True)
    whole, activity, probability = [], [], []
    for image, filter_ in tqdm(pairs_of, doing, len(images), unit=" images", disable=None):
        pooled = net.features(image[None])[-1][0]
        whole.append(pooled[0, filter_].sum().cpu())
        for rows, columns in zip(row.split(batch_size), column.split(batch_size), strict=True):
            copies = occlude(image, lines[rows], lines[columns])
            pooled = net.features(copies.contiguous(memory_format=torch.channels_last))[-1][0]
            activity.append(pooled[:, filter_].sum(dim=(1, 2)).cpu())
            probability.append(net.classify(pooled).softmax(dim=1).cpu())
    shape = len(images), n, n
    return Occlusion(
        torch.stack(whole).numpy(),
        torch.cat(activity).view(shape).numpy(),
        torch.cat(probability).view(*shape, -1).numpy(),
    )


def next_firing(fires: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return, for each image, the next one in the list, which is a ring, in which its filter fires as well.

    Args:
        fires: Whether the filter of image j fires in image i, (images i, images j).

    Returns:
        (images,); the image itself where there is no other.
    """
    n = len(fires)
    rings = [(np.arange(1, n) + j) % n for j in range(n)]
    return np.array([next((i for i in ring if fires[i, j]), j) for j, ring in enumerate(rings)], np.int64)


def rank_correlations(
    drops: NDArray[np.float32], magnitudes: NDArray[np.float64], covered: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return, for each image, how well the activity drops where a projection shows structure.

    Spearman's correlation, over the positions of the square, between the drop in activity and the
    projection's magnitude summed over the pixels that the square covers there. Positions overlap, so they are
    no independent samples: one image gives one number, and its spread is taken over images.

    Args:
        drops: (images, positions down, positions across)
        magnitudes: Of the projections, (images, 96, 96).
        covered: What `square_positions` returned.

    Returns:
        (images,), -1 to 1; nan where the projection is zero or nothing drops.
    """
    lines = covered.astype(np.float64)
    sums = lines @ magnitudes @ lines.T
    return np.array([spearman(drop, total) for drop, total in zip(drops, sums, strict=True)], np.float64)


def change(image: Tensor, shift: float = 0, zoom: float = 1, angle: float = 0) -> Tensor:
    """Move, enlarge or turn normalised images (..., 3, 96, 96) about the centre; what is left bare is grey.

    Args:
        image: What is changed.
        shift: Pixels downwards.
        zoom: Factor.
        angle: Degrees clockwise.
    """
    changed = affine(
        image,
        angle=float(angle),
        translate=[0.0, float(shift)],
        scale=float(zoom),
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=[0.0, 0.0, 0.0],
    )
    return cast(Tensor, changed)


def measure_invariance(
    net: CNN, image: Tensor, label: int, kind: str, degrees: Sequence[float]
) -> NDArray[np.float64]:
    """Measure how far features of an image move when it is changed (Figure 5 of the paper).

    Args:
        net: The network, in evaluation mode.
        image: Normalised, (3, 96, 96).
        label: Its class.
        kind: One of `CHANGES`.
        degrees: How far it is changed.

    Returns:
        (3, degrees): Euclidean distance between the pooled maps of conv1 of the changed and the unchanged
        image, as a share of the norm of the unchanged ones (nan if that is zero); that of conv4; probability
        of `label`.
    """
    copies = torch.stack([image, *(change(image, **{kind: degree}) for degree in degrees)])
    features = net.features(copies)
    rows = []
    for pooled in (features[0][0], features[-1][0]):
        flat = pooled.flatten(1).cpu().double()  # an Apple GPU knows no float64
        norm = flat[0].norm()
        rows.append((flat[1:] - flat[0]).norm(dim=1) / torch.where(norm > 0, norm, torch.nan))
    rows.append(net.classify(features[-1][0]).softmax(dim=1)[1:, label].cpu().double())
    return torch.stack(rows).numpy()


class Change(NamedTuple):
    """What one kind of `change` does to some images."""

    degrees: Sequence[float]  # how far they are changed
    curves: NDArray[np.float64]  # what `measure_invariance` finds, (images, 3, degrees)
    shown: Sequence[float]  # five of the degrees
    examples: NDArray[np.float32]  # the images after these, for display: (images, 5, 3, 96, 96), 0 to 1


def change_images(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    checkpoint: Checkpoint,
    device: torch.device,
    kind: str,
    degrees: Sequence[float],
) -> Change:
    """Change images in one of the `CHANGES`, measure what the network makes of it and keep some to show."""
    normalised = normalise(torch.from_numpy(images).to(device), checkpoint.mean, checkpoint.std)
    curves = [
        measure_invariance(checkpoint.net, image, int(label), kind, degrees)
        for image, label in zip(normalised, labels, strict=True)
    ]
    shown = [degrees[k] for k in np.linspace(0, len(degrees) - 1, 5).round().astype(int)]
    changed = torch.stack([change(normalised.cpu(), **{kind: degree}) for degree in shown], dim=1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoint.mean, checkpoint.std))
    return Change(degrees, np.stack(curves), shown, (changed * std + mean).clamp(0, 1).numpy())


def draw_class_filters(
    means: NDArray[np.float64], living: pd.DataFrame, names: Sequence[str], heading: str
) -> Figure:
    """Draw classes x filters: mean activation as a share of the filter's largest; above it the selectivity.

    Args:
        means: What `mean_table` returned.
        living: What `sort_filters` returned.
        names: Of the classes.
        heading: Title.
    """
    shown = means[:, living["filter"].to_numpy(np.int64)]
    sizes = [int((living["preferred_class"] == name).sum()) for name in names]
    edges = np.cumsum([0, *sizes])
    fig, (top, ax) = plt.subplots(
        2, 1, figsize=(8, 4), dpi=200, sharex=True, height_ratios=[1, 4], layout="constrained"
    )
    top.stairs(living["selectivity"].to_numpy(np.float64), fill=True, color="0.5")
    top.set(ylim=(0, 1), ylabel="selectivity")
    shares = np.ma.masked_invalid(shown / np.nanmax(shown, axis=0))
    extent = (0, len(living), len(names), 0)
    drawn = ax.imshow(
        shares, "viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent
    )
    for number, (left, size) in enumerate(zip(edges, sizes, strict=False)):
        top.axvline(left, color="0.3", linewidth=0.5)
        ax.axvline(left, color="white", linewidth=0.8)
        ax.add_patch(Rectangle((left, number), size, 1, fill=False, edgecolor="white", linewidth=1.8))
    texts = [f"{name} ({size})" for name, size in zip(names, sizes, strict=True)]
    ax.set_yticks(np.arange(len(names)) + 0.5, texts, parse_math=False)
    ax.set(xlabel="living filters, by preferred class (how many prefer it), then falling selectivity")
    fig.colorbar(drawn, ax=ax, pad=0.01, label="mean activation on the class /\nfilter's largest class mean")
    fig.suptitle(heading, parse_math=False)
    return fig


def show(ax: Axes, picture: NDArray[Any], text: str = "", **options: Any) -> Any:
    """Show pixels, with `text` above and without ticks; returns what a colour bar is made for."""
    ax.set(xticks=[], yticks=[])
    ax.set_title(text, fontsize=8, pad=3, parse_math=False)
    return ax.imshow(picture, interpolation="nearest", **options)


def draw_class(
    ranking: pd.DataFrame,
    means: NDArray[np.float64],
    images: NDArray[np.uint8],
    magnitudes: NDArray[np.float64],
    values: NDArray[np.float32],
    heading: str,
) -> Figure:
    """Draw a class's top filters, one a row: mean magnitude, then pairs of image and projection laid over it.

    Each filter has a scale of its own, written above: a filter's gain, not what it shows, makes it weak.

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
    fig, axes = plt.subplots(filters, panels, figsize=size, dpi=200, squeeze=False, layout="constrained")
    colours = sns.color_palette("rocket", as_cmap=True)(np.linspace(0.3, 1, 256))
    colours[:, 3] = np.linspace(0, 1, 256) ** 0.6  # clear at zero, so that the image stays visible
    for k, (row, of_filter) in enumerate(zip(axes, ranking.itertuples(), strict=True)):
        largest, top = float(means[k].max()) or 1.0, robust_scale(magnitudes[k])
        text = f"{'' if k else 'mean over the class'}\nwhite: {largest:.2g}"
        mean = show(row[0], means[k] / largest, text, cmap="mako", vmin=0, vmax=1)
        text = f"filter {of_filter.filter}\nselectivity {of_filter.selectivity:.2f}\n"
        text += f"mean activation {of_filter.activation_mean:.2f}"
        text += "" if of_filter.prefers else "\nprefers another class"
        row[0].set_ylabel(text, rotation=0, ha="right", va="center")
        for i, (left, right) in enumerate(row[1:].reshape(-1, 2)):
            picture = np.moveaxis(images[k, i], 0, 2)
            show(left, picture, f"activation {values[k, i]:.2f}")
            show(right, picture.mean(axis=2), cmap="gray", vmin=0, vmax=400)  # 255 is the brightest: dimmed
            relative, text = magnitudes[k, i] / top, "" if i else f"white: {top:.2g}"
            over = show(right, relative, text, cmap=ListedColormap(colours), vmin=0, vmax=1)
    bar = fig.colorbar(mean, ax=axes[:, 0], location="bottom", aspect=10, pad=0.02)
    bar.set_label("mean magnitude\n(share of white)")
    bar = fig.colorbar(over, ax=axes[:, 1:], location="bottom", aspect=40, pad=0.02, shrink=0.6, extend="max")
    bar.ax.set_facecolor("0.3")
    bar.set_label("magnitude of one projection (share of white, which is written above in normalised pixels)")
    fig.suptitle(heading, parse_math=False)
    return fig


def draw_images(
    images: NDArray[np.uint8],
    magnitudes: NDArray[np.float64],
    signed: NDArray[np.float64],
    texts: Sequence[str],
    heading: str,
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
    fig, axes = plt.subplots(rows, 6, figsize=size, dpi=200, squeeze=False, layout="constrained")
    panels, coloured = axes.reshape(-1, 3), displayed(signed.astype(np.float32))
    for ax in panels[len(images) :].flat:
        ax.axis("off")
    top = robust_scale(magnitudes)
    for k, (left, middle, right) in enumerate(panels[: len(images)]):
        above = ("sum of magnitudes", "signed sum") if k < 2 else ("", "")
        show(left, np.moveaxis(images[k], 0, 2), texts[k])
        drawn = show(middle, magnitudes[k], above[0], cmap="mako", vmin=0, vmax=top)
        show(right, coloured[k], above[1])
    bar = fig.colorbar(drawn, ax=axes, location="bottom", aspect=40, pad=0.02, shrink=0.6, extend="max")
    bar.set_label("sum of magnitudes (normalised pixels); in the signed sum grey is zero, one scale for all")
    fig.suptitle(heading, parse_math=False)
    return fig


def draw_occlusion(
    images: NDArray[np.uint8],
    found: Occlusion,
    magnitudes: NDArray[np.float64],
    labels: NDArray[np.int64],
    names: Sequence[str],
    filters: NDArray[np.int64],
    side: int,
    stride: int,
    heading: str,
) -> Figure:
    """Draw the paper's maps of an occluded image, one image a row (Figure 6 of the ECCV version).

    Args:
        images: uint8 (images, 3, 96, 96).
        found: What `slide_square` returned for them.
        magnitudes: Of the filters' projections, (images, 96, 96).
        labels: Of the images.
        names: Of the classes.
        filters: The filter of each image.
        side: Of the square, in pixels.
        stride: Pixels from one position to the next.
        heading: Title.
    """
    rows, size = len(images), IMAGE_SIZE
    fig, axes = plt.subplots(
        rows, 5, figsize=(8, 1.7 + 1.36 * rows), dpi=200, squeeze=False, layout="constrained"
    )
    # a value stands for the stride x stride pixels around the centre of its square
    first = stride // 2 - stride / 2
    last = first + stride * found.activity.shape[1]
    where, whole = (first, last, last, first), (0, size, size, 0)
    relative, best = found.relative(), found.probability.argmax(axis=3)
    top = robust_scale(magnitudes)
    colours = ListedColormap([CLASS_COLOURS[k % len(CLASS_COLOURS)] for k in range(len(names))])
    above = ["image, square", "activity of its\nstrongest filter", "projection of\nthis filter"]
    above += ["probability of\nthe true class", "most probable\nclass"]
    for k, row in enumerate(axes):
        column_texts = [""] * 5 if k else above
        show(row[0], np.moveaxis(images[k], 0, 2), column_texts[0], extent=whole)
        text = f"{names[labels[k]]}\nfilter {filters[k]}\nactivity {found.whole[k]:.2f}"
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
        lowest = np.unravel_index(found.activity[k].argmin(), found.activity[k].shape)
        top_left = [place * stride + stride // 2 - side // 2 for place in reversed(lowest)]
        for colour, width in (("black", 2.2), ("white", 1.0)):
            frame = Rectangle(tuple(top_left), side, side, fill=False, edgecolor=colour, linewidth=width)
            row[0].add_patch(frame)
        options = {"vmin": 0, "extent": where}
        activity = show(row[1], relative[k], column_texts[1], cmap="RdBu_r", vmax=2, **options)
        projection = show(row[2], magnitudes[k], column_texts[2], cmap="mako", vmin=0, vmax=top, extent=whole)
        true_class = found.probability[k, :, :, labels[k]]
        probability = show(row[3], true_class, column_texts[3], cmap="viridis", vmax=1, **options)
        show(row[4], best[k], column_texts[4], cmap=colours, vmax=len(names), **options)
        for ax in row:
            ax.set(xlim=(0, size), ylim=(size, 0))
    bars = (
        (activity, "share of the activity\nwithout the square", "max"),
        (projection, "magnitude\n(normalised pixels)", "max"),
        (probability, "probability", "neither"),
    )
    below: dict[str, Any] = {"location": "bottom", "aspect": 12, "pad": 0.01, "shrink": 0.9}
    for column, (drawn, text, extend) in enumerate(bars, start=1):
        bar = fig.colorbar(drawn, ax=axes[:, column], extend=extend, **below)
        bar.ax.tick_params(labelsize=7)
        bar.set_label(text, fontsize=8)
    handles = [Patch(color=colours(int(label)), label=names[label]) for label in np.unique(best)]
    style: dict[str, Any] = {"frameon": False, "handlelength": 1, "columnspacing": 1, "labelspacing": 0.3}
    style |= {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02), "ncols": 2 if len(handles) > 5 else 1}
    legend = axes[-1, 4].legend(handles=handles, fontsize=7, **style)
    legend.set_in_layout(False)  # it stands beside the colour bars, which make room for it
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    fig.suptitle(heading, parse_math=False)
    return fig


def draw_correlations(
    values: Mapping[str, NDArray[np.float64]], medians: Sequence[tuple[float, float, float]], heading: str
) -> Figure:
    """Draw distributions, one a row: a point an image, the median with its 95 % bootstrap interval.

    Args:
        values: Rank correlations by what is written beside the row; nan is left out.
        medians: Of each row what `median_interval` returned.
        heading: Title.
    """
    fig, ax = plt.subplots(figsize=(8, 1.1 + 1.0 * len(values)), dpi=200, layout="constrained")
    ax.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    colours = sns.color_palette("colorblind", len(values))
    rows = zip(values.values(), medians, colours, strict=True)
    for row, (some, (median, low, high), colour) in enumerate(rows):
        known = np.sort(some[~np.isnan(some)])
        # neighbours in rank lie on different heights, so that few points hide each other
        heights = row - 0.3 + 0.07 * (np.arange(known.size) * 2 % 5)
        ax.plot(known, heights, "o", color=colour, markersize=3.5, markeredgewidth=0, alpha=0.8)
        reach = [[median - low], [high - median]]
        ax.errorbar(median, row + 0.16, xerr=reach, fmt="D", color="0.15", capsize=3)
        note = f"median {median:.2f} ({low:.2f} to {high:.2f}), {known.size} images"
        place = min(max(median, -0.65), 0.65) if known.size else 0.0
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate(note, (place, row + 0.25), ha="center", va="top", fontsize=8, bbox=box)
    ax.set_yticks(range(len(values)), list(values))
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(-1, 1), ylim=(len(values) - 0.45, -0.5))
    ax.set_xlabel("rank correlation between drop in activity and magnitude under the square")
    sns.despine(fig, left=True)
    fig.suptitle(heading, parse_math=False)
    return fig


def draw_invariance(
    changes: Mapping[str, Change], labels: Sequence[int], names: Sequence[str], heading: str
) -> Figure:
    """Draw the layout of the paper's Figure 5, one kind of change a row: examples, distances, probability.

    Args:
        changes: By kind, one of `CHANGES`.
        labels: Of the images.
        names: Of the classes.
        heading: Title.
    """
    size, widths = (8, 0.9 + 1.95 * len(changes)), [1.15, 1, 1, 1]
    fig, axes = plt.subplots(
        len(changes), 4, figsize=size, dpi=200, sharey="col", width_ratios=widths, layout="constrained"
    )
    above = "examples", "distance in conv1", "distance in conv4", "probability of\nthe true class"
    colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in labels]
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    for number, (row, (kind, found)) in enumerate(zip(axes, changes.items(), strict=True)):
        images, columns = found.examples.shape[:2]
        # (images, examples, 3, rows, columns) -> one sheet
        sheet = found.examples.transpose(0, 3, 1, 4, 2).reshape(images * IMAGE_SIZE, -1, 3)
        row[0].imshow(sheet, interpolation="nearest", extent=(0, columns, images, 0), aspect="equal")
        row[0].set_xticks(np.arange(columns) + 0.5, [f"{degree:g}" for degree in found.shown])
        row[0].set_yticks([])
        for k, colour in enumerate(colours):
            row[0].add_patch(Rectangle((-0.16, k + 0.04), 0.1, 0.92, color=colour, clip_on=False))
            options = {"color": colour, "linestyle": styles[k % len(styles)], "label": names[labels[k]]}
            options["marker"] = "." if len(found.degrees) == 1 else ""
            for ax, curve in zip(row[1:], found.curves[k], strict=True):
                ax.plot(found.degrees, curve, **options)
        for ax, text in zip(row, above, strict=True):
            ax.set(xlabel=CHANGES[kind])
            ax.set_title("" if number else text, fontsize=9)
            ax.tick_params(labelsize=7)
        for ax in row[1:]:
            ax.margins(x=0)
            sns.despine(ax=ax)
    for ax in axes[:, 1:3].flat:
        ax.set_ylim(bottom=0)
        ax.set_ylabel("share of the norm", fontsize=8)
    axes[0, 3].set(ylim=(0, 1.02))  # shared, as all of a column
    handles = axes[0, 1].get_lines()
    legend = fig.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, handlelength=3)
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    fig.suptitle(heading, parse_math=False)
    return fig


def main() -> None:
    """Draw filters over all classes, in each class, in single images, in occluded and in changed ones."""
    sns.set_theme(context="paper", style="white", palette="colorblind")
    outputs, network, data_dir = check_paths(OUTPUTS=OUTPUTS, CHECKPOINT=CHECKPOINT, DATA_DIR=DATA_DIR)
    check_numbers(1, 30, TOP_FILTERS=TOP_FILTERS)
    check_numbers(1, 12, TOP_IMAGES=TOP_IMAGES)
    check_numbers(1, SUMMED_FILTERS=SUMMED_FILTERS, BATCH_SIZE=BATCH_SIZE, CHUNK=CHUNK)
    check_numbers(1, OCCLUDED_IMAGES=OCCLUDED_IMAGES, OCCLUSION_BATCH=OCCLUSION_BATCH)
    check_numbers(1, INVARIANCE_IMAGES=INVARIANCE_IMAGES, RESAMPLINGS=RESAMPLINGS)
    check_numbers(1, IMAGE_SIZE, OCCLUDER=OCCLUDER, OCCLUSION_STRIDE=OCCLUSION_STRIDE)
    check_numbers(1, IMAGE_SIZE // 2, OCCLUSION_STRIDE_MANY=OCCLUSION_STRIDE_MANY)  # over one place: no rank
    check_lists(-1000.0, 1000, SHIFTS=SHIFTS, ANGLES=ANGLES)
    check_lists(0.01, 100, ZOOMS=ZOOMS)
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(network, device)
    names, folder = checkpoint.class_names, outputs / "heatmaps"
    labels, values, positions = load_activations(outputs / "activations.npz", checkpoint)
    filter_metrics, class_metrics = read_tables(outputs, values, labels, names)
    images, expected = load_split(checkpoint.dataset, data_dir, "test")
    if not np.array_equal(labels, expected):
        raise SystemExit(f"{outputs / 'activations.npz'} has other labels: run `uv run deconv_full.py` again")
    living = sort_filters(filter_metrics, names)
    if living.empty:
        raise SystemExit(f"no filter of {LAYER} fires on any test image: run `uv run train_CNN.py` again")
    prepare_folders("OUTPUTS", outputs, folder)
    source = f"{len(images):,} test images of {title(checkpoint.dataset)}"
    print(f"drawing {LAYER} on {source} on {device}, torch {torch.__version__}")
    source += f" ({checkpoint.measured_on} accuracy {checkpoint.metrics['test_accuracy']:.1%})"
    last_line = f"this was the last stage: look at the pictures in {folder}/"

    def save(figure: Figure, name: str) -> None:
        save_figure(figure, folder / name)
        print(f"wrote {folder / name}", flush=True)

    project = partial(
        sum_projections, images, checkpoint, device, positions, batch_size=BATCH_SIZE, chunk=CHUNK
    )

    # over all classes
    heading = f"{LAYER} on {source}; {len(filter_metrics) - len(living)} dead filters left out"
    means = mean_table(class_metrics, LAYER, names)
    save(draw_class_filters(means, living, names, heading), "class_filter_heatmap.png")

    # in each class
    for old in folder.glob("class_[0-9]*.png"):  # of a data set with other classes
        old.unlink()
    chosen, sums = [], []  # first image of each class; its summed magnitude and signed sum
    for label, name in enumerate(names):
        ranking = rank_filters(filter_metrics, class_metrics, LAYER, name).head(TOP_FILTERS)
        if ranking.empty:
            print(f"{name}: no test images, nothing to draw")
            continue
        members, filters = np.flatnonzero(labels == label), ranking["filter"].to_numpy(np.int64)
        order = np.argsort(-values[members][:, filters], axis=0, kind="stable")[:TOP_IMAGES]
        top = members[order].T  # (filters, images)
        strongest = np.argsort(-values[members[0]], kind="stable")[:SUMMED_FILTERS]
        groups = [pairs(members, filter_) for filter_ in filters]
        groups += [pairs(image, filter_) for filter_, row in zip(filters, top, strict=True) for image in row]
        magnitudes, signed = project([*groups, pairs(members[0], strongest)], doing=name)
        chosen.append(members[0])
        sums.append((magnitudes[-1], signed[-1]))
        means, panels = magnitudes[: len(filters)] / len(members), magnitudes[len(filters) : -1]
        panels = panels.reshape(*top.shape, IMAGE_SIZE, IMAGE_SIZE)
        heading = f"{name}: top {len(filters)} filters of {LAYER}, {len(members):,} of the {source}"
        figure = draw_class(ranking, means, images[top], panels, values[top, filters[:, None]], heading)
        save(figure, f"class_{label}_{safe_name(name)}.png")

    # in single images
    rising = np.sort(values[chosen], axis=1)
    shares = rising[:, -SUMMED_FILTERS:].sum(axis=1) / rising.sum(axis=1)
    heading = f"First image of each class, from the {source}.\nAdded up: projections of its {SUMMED_FILTERS}"
    heading += f" strongest filters of {LAYER}; of all filters'\nactivations, each at its strongest unit, "
    heading += f"they hold {shares.min():.0%} to {shares.max():.0%}"
    magnitudes, signed = (np.stack(parts) for parts in zip(*sums, strict=True))
    shown = [names[label] for label in labels[chosen]]
    save(draw_images(images[chosen], magnitudes, signed, shown, heading), "images.png")

    # in occluded images
    share = -(-OCCLUDED_IMAGES // len(names))  # images a class, rounded up
    right = correct_images(images, labels, checkpoint, device, share, BATCH_SIZE)
    for label, name in enumerate(names):
        if (labels == label).any() and not right[label].size:
            print(f"{name}: no test image is classified correctly, none is occluded or changed")
    first, many = in_turn([some[:1] for some in right], len(names)), in_turn(right, OCCLUDED_IMAGES)
    if not first.size:
        for name in ("occlusion", "occlusion_correlation", "invariance"):
            (folder / f"{name}.png").unlink(missing_ok=True)  # of another checkpoint
        print(f"nothing to occlude or change\n{last_line}")
        return
    filters, covered = values[first].argmax(axis=1), square_positions(OCCLUDER, OCCLUSION_STRIDE)
    found = slide_square(images[first], filters, checkpoint, device, covered, OCCLUSION_BATCH, "occlusion")
    magnitudes, _ = project([pairs(*of) for of in zip(first, filters, strict=True)], doing="projections")
    heading = f"A grey square of {OCCLUDER} x {OCCLUDER} pixels slides over the first correctly classified"
    heading += f" image of each class,\n{len(first)} of the {source}. Strongest filter: of {LAYER};\n"
    heading += "its activity: sum over its map. Frame: the square where the activity is lowest"
    what = images[first], found, magnitudes, labels[first], names, filters
    save(draw_occlusion(*what, OCCLUDER, OCCLUSION_STRIDE, heading), "occlusion.png")

    if len(many) < OCCLUDED_IMAGES:
        print(f"occlusion: {len(many)} images instead of {OCCLUDED_IMAGES}, no more are classified correctly")
    filters, covered = values[many].argmax(axis=1), square_positions(OCCLUDER, OCCLUSION_STRIDE_MANY)
    found = slide_square(images[many], filters, checkpoint, device, covered, OCCLUSION_BATCH, "occlusion")
    others = next_firing(values[many][:, filters] > 0)
    groups = [pairs(*of) for some in (many, many[others]) for of in zip(some, filters, strict=True)]
    magnitudes, _ = project(groups, doing="projections")
    magnitudes[len(many) :][others == np.arange(len(many))] = 0  # no other image to compare with
    own, control = (rank_correlations(found.drop(), some, covered) for some in np.split(magnitudes, 2))
    compared = {"own projection": own, "another image's": control, "difference": own - control}
    medians = [median_interval(some, RESAMPLINGS, 0) for some in compared.values()]
    print("rank correlation between drop in activity and magnitude under the square, median over images:")
    for (text, some), median in zip(compared.items(), medians, strict=True):
        print(f"  {text:<16}" + "{:6.2f}  (95 % interval {:.2f} to {:.2f})".format(*median))
        if missing := int(np.isnan(some).sum()):
            print(f"  {'':<16}without {missing} of {len(some)} images: nothing drops or nothing is projected")
    heading = f"Does a filter's activity drop where its projection shows structure? {len(many)} of the\n"
    heading += f"{source}; square of {OCCLUDER} x {OCCLUDER} pixels,\n{len(covered)} x {len(covered)} "
    heading += f"positions; strongest filter of {LAYER}; a point is an image, the bar a 95 % interval"
    beside = {"the image's\nown projection": own, "the same filter's\nprojection of\nanother image": control}
    save(draw_correlations(beside, medians[:2], heading), "occlusion_correlation.png")

    # in images that are moved, enlarged and turned
    moved = first[:INVARIANCE_IMAGES]
    changes = {
        kind: change_images(images[moved], labels[moved], checkpoint, device, kind, list(degrees))
        for kind, degrees in (("shift", SHIFTS), ("zoom", ZOOMS), ("angle", ANGLES))
    }
    heading = f"{len(moved)} of the {source},\nmoved, enlarged and turned: distance of their features from "
    heading += "those of\nthe unchanged image, as a share of the norm"
    save(draw_invariance(changes, labels[moved].tolist(), names, heading), "invariance.png")
    print(last_line)


if __name__ == "__main__":
    with plain_errors():
        main()
