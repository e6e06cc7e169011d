"""Draw what the filters of conv4 respond to: over all classes, in each class, in single images.

Run:    uv run heatmap.py
Reads:  outputs/CNN.pth, outputs/activations.npz, outputs/filter_metrics.csv, outputs/class_metrics.csv,
        data/stl10_binary/test_{X,y}.bin
Writes: outputs/heatmaps/class_filter_heatmap.png, outputs/heatmaps/class_*.png, outputs/heatmaps/images.png

The projection of a filter in an image starts from its strongest unit there. Its magnitude at a pixel is the
sum over RGB of absolute values, in units of normalised pixels.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from analyse_projections import by_class, rank_filters
from CNN import IMAGE_SIZE, LAYERS, Checkpoint, choose_device, load_checkpoint
from deconv import displayed
from deconv_full import Projector, batches
from load_data import load_arrays, load_split, plain_errors, save_figure, title

TOP_FILTERS = 4  # filters drawn of each class
TOP_IMAGES = 3  # images drawn of each filter: those of the class that drive it most
SUMMED_FILTERS = 16  # strongest filters of an image, whose projections are added up in images.png
BATCH_SIZE = 32  # images whose masks are held at once; more costs memory, not time
CHUNK = 32  # projections at once; on a CPU they should fit its cache, on a GPU try 2048
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
OUTPUTS = Path("outputs")  # where results go

LAYER = LAYERS[-1]  # not a setting: only conv4 has tables of its projections


def load_activations(path: Path, checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    """Read labels, conv4_max and conv4_position of activations.npz.

    Raises:
        SystemExit: If the file is missing, damaged, or made from another checkpoint or data set.
    """
    dtypes = {"labels": "int64", f"{LAYER}_max": "float32", f"{LAYER}_position": "int16"}
    found = load_arrays(path, "deconv_full.py", dtypes)
    made_from = found.checkpoint_sha256, found.dataset, found.class_names
    if made_from != (checkpoint.sha256, checkpoint.dataset, checkpoint.class_names):
        raise SystemExit(f"{path} is from another checkpoint or data set: run `uv run deconv_full.py` again")
    return found.arrays


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
        if not path.is_file():
            raise SystemExit(f"{path} not found: run `uv run analyse_projections.py` first")
    means = by_class(np.mean, values.astype(np.float64), labels, len(names))
    types = dict.fromkeys(("layer", "class", "preferred_class"), str) | {"dead": bool, "selectivity": float}
    try:  # a class may be called "NA": only an empty field is a missing one
        tables = [pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""]) for path in paths]
        filters, classes = (table[table["layer"] == LAYER] for table in tables)
        fits = (
            np.array_equal(filters["filter"], np.arange(values.shape[1]))
            and np.allclose(filters["activation_mean"], values.mean(axis=0, dtype=np.float64), rtol=1e-3)
            and np.allclose(mean_table(classes, names), means, rtol=1e-3, equal_nan=True)
            and set(filters["preferred_class"].dropna()) <= set(names)
            and {"activation_nonzero", "dead", "selectivity"} <= set(filters)
        )
    except (KeyError, ValueError, TypeError, OSError):
        fits = False
    if not fits:
        again = "run `uv run analyse_projections.py` again"
        raise SystemExit(f"{paths[0]} and {paths[1].name} do not belong to activations.npz: {again}")
    return filters, classes


def mean_table(class_metrics: pd.DataFrame, names: list[str]) -> NDArray[np.float64]:
    """Return the mean activations (classes, filters); nan for a class without images."""
    table = class_metrics.pivot(index="class", columns="filter", values="activation_mean")
    return table.loc[names].to_numpy(np.float64)


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
                inside = tuple(slice(*projector.windows[place][-1][1:]) for place in (r, c))
                magnitudes[g][inside] += np.abs(window).sum(axis=0)
                signed[g][:, *inside] += window
    return magnitudes, signed


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
    bar = fig.colorbar(drawn, ax=ax, pad=0.01)
    bar.set_label("mean activation on the class /\nfilter's largest class mean")
    fig.suptitle(heading, parse_math=False)
    return fig


def show(ax: Axes, picture: NDArray[Any], text: str = "", **options: Any) -> Any:
    """Show pixels, with `text` above and without ticks; returns what a colour bar is made for."""
    ax.set(xticks=[], yticks=[])
    ax.set_title(text, fontsize=8, pad=3, parse_math=False)
    return ax.imshow(picture, interpolation="nearest", **options)


def draw_class(
    means: NDArray[np.float64],
    images: NDArray[np.uint8],
    magnitudes: NDArray[np.float64],
    row_texts: Sequence[str],
    image_texts: Sequence[Sequence[str]],
    heading: str,
) -> Figure:
    """Draw a class's top filters, one a row: mean magnitude, then pairs of image and projection laid over it.

    Args:
        means: Magnitude averaged over all images of the class, (filters, 96, 96).
        images: That drive each filter most, uint8 (filters, images, 3, 96, 96).
        magnitudes: Of the projections in these images, (filters, images, 96, 96).
        row_texts: What is written beside each row.
        image_texts: What is written above each image.
        heading: Title.
    """
    filters, count = images.shape[:2]
    size = 2.4 + 2.5 * count, 1.4 + 1.4 * filters
    fig, axes = plt.subplots(
        filters, 1 + 2 * count, figsize=size, dpi=200, squeeze=False, layout="constrained"
    )
    # one scale, and a robust one: a few bright pixels shall not hide the others
    top = float(np.percentile(magnitudes[magnitudes > 0], 99.5)) if magnitudes.any() else 1.0
    colours = sns.color_palette("rocket", as_cmap=True)(np.linspace(0.3, 1, 256))
    colours[:, 3] = np.linspace(0, 1, 256) ** 0.6  # clear at zero, so that the image stays visible
    for k, row in enumerate(axes):
        text = "" if k else "mean over the class"
        mean = show(row[0], means[k], text, cmap="mako", vmin=0, vmax=float(means.max()) or 1.0)
        row[0].set_ylabel(row_texts[k], rotation=0, ha="right", va="center", parse_math=False)
        for i, (left, right) in enumerate(row[1:].reshape(-1, 2)):
            picture = np.moveaxis(images[k, i], 0, 2)
            show(left, picture, image_texts[k][i])
            show(right, picture.mean(axis=2), cmap="gray", vmin=0, vmax=400)  # 255 is the brightest: dimmed
            over = show(right, magnitudes[k, i], cmap=ListedColormap(colours), vmin=0, vmax=top)
    bar = fig.colorbar(mean, ax=axes[:, 0], location="bottom", aspect=10, pad=0.02)
    bar.set_label("mean magnitude\n(normalised pixels)")
    bar = fig.colorbar(over, ax=axes[:, 1:], location="bottom", aspect=40, pad=0.02, shrink=0.6, extend="max")
    bar.ax.set_facecolor("0.3")
    bar.set_label("magnitude of one projection (normalised pixels)")
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
    top = float(np.percentile(magnitudes[magnitudes > 0], 99.5)) if magnitudes.any() else 1.0  # robust
    for k, (left, middle, right) in enumerate(panels[: len(images)]):
        above = ("sum of magnitudes", "signed sum") if k < 2 else ("", "")
        show(left, np.moveaxis(images[k], 0, 2), texts[k])
        drawn = show(middle, magnitudes[k], above[0], cmap="mako", vmin=0, vmax=top)
        show(right, coloured[k], above[1])
    bar = fig.colorbar(drawn, ax=axes, location="bottom", aspect=40, pad=0.02, shrink=0.6, extend="max")
    bar.set_label("sum of magnitudes (normalised pixels); in the signed sum grey is zero, one scale for all")
    fig.suptitle(heading, parse_math=False)
    return fig


def main() -> None:
    """Draw the class x filter heatmap, one figure for each class, and the first image of each class."""
    sns.set_theme(context="paper", style="white", palette="colorblind")
    if min(TOP_FILTERS, TOP_IMAGES, SUMMED_FILTERS, BATCH_SIZE, CHUNK) < 1:
        raise SystemExit("TOP_FILTERS, TOP_IMAGES, SUMMED_FILTERS, BATCH_SIZE and CHUNK must be at least 1")
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    names, folder = checkpoint.class_names, OUTPUTS / "heatmaps"
    activations = load_activations(OUTPUTS / "activations.npz", checkpoint)
    values, positions = activations[f"{LAYER}_max"], activations[f"{LAYER}_position"]
    filter_metrics, class_metrics = read_tables(OUTPUTS, values, activations["labels"], names)
    images, labels = load_split(checkpoint.dataset, DATA_DIR, "test")
    if not np.array_equal(labels, activations["labels"]):
        raise SystemExit(f"{OUTPUTS / 'activations.npz'} has other labels: run `uv run deconv_full.py` again")
    living = sort_filters(filter_metrics, names)
    if living.empty:
        raise SystemExit(f"no filter of {LAYER} fires on any test image: run `uv run train_CNN.py` again")
    source = f"{len(images):,} test images of {title(checkpoint.dataset)}"
    print(f"drawing {LAYER} on {source} on {device}, torch {torch.__version__}")
    source += f" ({checkpoint.measured_on} accuracy {checkpoint.metrics['test_accuracy']:.1%})"

    path = folder / "class_filter_heatmap.png"
    heading = f"{LAYER} on {source}; {len(filter_metrics) - len(living)} dead filters left out"
    save_figure(draw_class_filters(mean_table(class_metrics, names), living, names, heading), path)
    print(f"wrote {path}", flush=True)

    for old in folder.glob("class_[0-9]*.png"):  # of a data set with other classes
        old.unlink()
    chosen, sums = [], []  # first image of each class; its summed magnitude and signed sum
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        ranking = rank_filters(filter_metrics, class_metrics, LAYER, name).head(TOP_FILTERS)
        if ranking.empty:
            print(f"{name}: no test images, nothing to draw")
            continue
        filters = ranking["filter"].to_numpy(np.int64)
        order = np.argsort(-values[members][:, filters], axis=0, kind="stable")[:TOP_IMAGES]
        top = members[order].T  # (filters, images)
        strongest = np.argsort(-values[members[0]], kind="stable")[:SUMMED_FILTERS]
        groups = [pairs(members, filter_) for filter_ in filters]
        groups += [pairs(image, filter_) for filter_, row in zip(filters, top, strict=True) for image in row]
        groups.append(pairs(members[0], strongest))
        magnitudes, signed = sum_projections(
            images, checkpoint, device, positions, groups, BATCH_SIZE, CHUNK, name
        )
        chosen.append(members[0])
        sums.append((magnitudes[-1], signed[-1]))

        n = len(filters)
        columns = ranking["selectivity"], ranking["activation_mean"], ranking["prefers"]
        row_texts = [
            f"filter {number}\nselectivity {selectivity:.2f}\nmean activation {mean:.2f}"
            + ("" if prefers else "\nprefers another class")
            for number, selectivity, mean, prefers in zip(filters, *columns, strict=True)
        ]
        image_texts = [[f"activation {value:.2f}" for value in row] for row in values[top, filters[:, None]]]
        panels = magnitudes[n:-1].reshape(*top.shape, IMAGE_SIZE, IMAGE_SIZE)
        heading = f"{name}: top {n} filters of {LAYER}, {len(members):,} of the {source}"
        figure = draw_class(
            magnitudes[:n] / len(members), images[top], panels, row_texts, image_texts, heading
        )
        path = folder / f"class_{label}_{safe_name(name)}.png"
        save_figure(figure, path)
        print(f"wrote {path}", flush=True)

    rising = np.sort(values[chosen], axis=1)
    shares = rising[:, -SUMMED_FILTERS:].sum(axis=1) / rising.sum(axis=1)
    heading = f"First image of each class, from the {source}.\nAdded up: projections of its {SUMMED_FILTERS}"
    heading += f" strongest filters of {LAYER}; of all filters'\nactivations, each at its strongest unit, "
    heading += f"they hold {shares.min():.0%} to {shares.max():.0%}"
    magnitudes, signed = (np.stack(parts) for parts in zip(*sums, strict=True))
    shown = [name for label, name in enumerate(names) if (labels == label).any()]
    save_figure(draw_images(images[chosen], magnitudes, signed, shown, heading), folder / "images.png")
    print(f"wrote {folder / 'images.png'}\nthis was the last stage: look at the pictures in {folder}/")


if __name__ == "__main__":
    with plain_errors():
        main()
