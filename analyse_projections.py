"""Measure every filter: how often it fires, which class it prefers, how strongly, what it is needed for.

Run:    uv run analyse_projections.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_000.pth, outputs/activations.npz,
        outputs/projection_statistics.npz, outputs/projections.npz, data/stl10_binary/{train,test}_{X,y}.bin
Writes: outputs/filter_metrics.csv, outputs/class_metrics.csv, outputs/metric_distributions.png,
        outputs/filter_metrics_untrained.csv, outputs/specialisation.png,
        outputs/ablation.csv, outputs/ablation.png, outputs/trust.csv, outputs/trust.png, outputs/probes.csv,
        outputs/probes.png

An activation is the strongest value of a filter in an image. All that is said about classes comes from
activations: a projection's non-zero pixels mostly measure the size of the receptive field and how much of it
the border cuts off.

Then the network itself is asked how far this can be trusted: how much of the specialisation was learned, what
is lost without a filter, what of an activation survives when only a projection's strongest pixels are left,
what projections look like when weights are random, and how much of the classes each layer holds.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from tqdm import tqdm

from CNN import CNN, LAYERS, Checkpoint, choose_device, load_checkpoint
from deconv import window_of
from deconv_full import Projector, Units, by_class, class_selectivity, project_windows, top_images
from load_data import (
    IMAGE_SIZE,
    TITLES,
    Array,
    Split,
    load_arrays,
    load_split,
    save_figure,
    save_table,
    set_style,
)

OUTPUTS = Path("outputs")  # where results go
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
RESAMPLINGS = 1000  # bootstrap samples behind an interval
SEED = 0  # of all that is drawn at random here
RANDOM_ORDERS = 10  # orders in which all filters of conv4 are ablated at random
KEPT_SHARE = 0.25  # of a window's pixels: those that are kept, or deleted, to see what an activation needs
RANDOMISED_UNITS = 200  # units whose projections are compared with those of random weights
NORM_IMAGES = 1_000  # training images that give batch norm of new weights its means and variances
PROBE_INPUTS = 1_024  # at most so many numbers of each of conv1 to conv3 go into its linear probe
PROBE_DECAYS = (0.001, 0.01, 0.1)  # weight decays to choose from

STATISTICS = ("nonzero_count", "mean", "variance", "max")  # of a projection
NEARLY_DEAD = 0.01  # an active filter is nearly dead if it fires on a smaller share of the test images
MEDIANS = {"estimator": "median", "errorbar": ("ci", 95), "seed": 0, "markersize": 4, "capsize": 0.08}
Arrays = Mapping[str, Array]


class Run(NamedTuple):
    """What every experiment needs; `source` is what titles say of network and images."""

    checkpoint: Checkpoint
    train: Split
    test: Split
    source: str
    outputs: Path
    resamplings: int
    seed: int

    @property
    def net(self) -> CNN:
        """The trained network."""
        return self.checkpoint.net

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return self.checkpoint.class_names

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table as NAME.csv."""
        save_table(self.outputs / f"{name}.csv", self.checkpoint, table)

    def save_figure(self, name: str, figure: Figure, title: str) -> None:
        """Write a figure as NAME.png; below its title stands what network and images it is of."""
        figure.suptitle(f"{title}\n{self.source}", fontsize=9)
        save_figure(self.outputs / f"{name}.png", figure)

    def bootstrap(self, statistic: Callable[[Array], Any], items: int) -> tuple[float, float, float]:
        """Return a statistic of the items at given places with its 95 % percentile interval (Efron 1979)."""
        rng = np.random.default_rng(self.seed)
        drawn = [statistic(rng.integers(items, size=items)) for _ in range(self.resamplings)]
        low, high = np.nanpercentile(drawn, (2.5, 97.5))
        return float(statistic(np.arange(items))), float(low), float(high)

    def median(self, values: Array) -> tuple[float, float, float]:
        """Return the median of the values that are numbers with its interval."""
        known = values[~np.isnan(values)]
        return self.bootstrap(lambda which: np.median(known[which]), len(known))


def rank_correlation(x: Array, y: Array) -> float:
    """Return Spearman's rank correlation of two arrays of one shape; pairs with a nan are left out."""
    both = pd.DataFrame({"x": x.ravel(), "y": y.ravel()})
    return float(both.corr("spearman").to_numpy()[0, 1])


# ---------------------------------------------------------------- how filters are used


def bootstrap_means(values: Array, run: Run) -> Array:
    """Return class means (samples, classes, filters) over images drawn with replacement within each class."""
    rng, means = np.random.default_rng(run.seed), []
    for label in range(len(run.names)):
        members = values[run.test.labels == label]
        n = len(members)
        means.append(rng.multinomial(n, np.full(n, 1 / n), run.resamplings) @ members / n)
    return np.stack(means, axis=1)


def area_under_roc(values: Array, members: Array) -> Array:
    """Return the probability that a filter fires more on an image of the class than on one of another class.

    Area under the receiver operating characteristic, from ranks (Mann-Whitney); a tie counts half. Gale et
    al. 2020 (arXiv 2007.01062) ask for it beside the index, which one strong image can carry. Pitfall: with
    ten classes 0.9 still means many false alarms, since nine tenths of the images are of other classes.

    Args:
        values: (images, filters).
        members: Whether an image is of the filter's class, (images, filters).
    """
    ranks, inside = pd.DataFrame(values).rank().to_numpy(), members.sum(axis=0)
    above = (ranks * members).sum(axis=0) - inside * (inside + 1) / 2
    return np.asarray(above / (inside * (len(values) - inside)))


def tabulate_filters(maxima: Arrays, averages: Arrays, statistics: Arrays, run: Run) -> pd.DataFrame:
    """Return filter_metrics.csv, one row a filter of every layer.

    activation_*: mean, population variance and share above zero of the filter's activations over the images.
    Of conv4's projections the means over all projected images, 0 where the filter does not fire (max: the
    largest). preferred_class is that of the largest mean activation, runner_up that of the second largest;
    in preferred_share of the bootstrap samples the former comes first. selectivity, with the limits of its
    95 % bootstrap interval over images, and auc are those for the preferred class, which is kept in all
    samples; selectivity_space is the same index of activations averaged over the map (Morcos et al.).
    top_class is the most frequent class of the nine strongest images, of several the preferred one. A dead
    filter has none of these.

    Args:
        maxima: By layer the strongest activation of each filter in each test image, (images, filters).
        averages: By layer the activation averaged over the map, likewise.
        statistics: Of conv4's projections, by name, (projected images, filters).
        run: Labels, and what the intervals need.
    """
    tables, labels, classes = [], run.test.labels, len(run.names)
    for layer, stored in maxima.items():
        values = stored.astype(np.float64)
        means, dead = by_class(np.mean, values, labels, classes), (values == 0).all(axis=0)
        (preferred, runner_up), numbers = np.argsort(-means, 0, kind="stable")[:2], np.arange(values.shape[1])
        samples = bootstrap_means(values, run)
        low, high = np.percentile(class_selectivity(samples)[:, preferred, numbers], (2.5, 97.5), axis=0)
        top = [np.bincount(labels[which[which >= 0]], minlength=classes) for which in top_images(stored, 9)]
        top_class = (np.array(top).T + 0.5 * (np.arange(classes)[:, None] == preferred)).argmax(axis=0)
        columns: dict[str, Any] = {"layer": layer, "filter": numbers, "dead": dead}
        columns["activation_mean"] = values.mean(axis=0)
        columns["activation_variance"] = values.var(axis=0)
        columns["activation_nonzero"] = (values > 0).mean(axis=0)
        for name, measured in statistics.items():
            reduce = np.max if name == "max" else np.mean
            columns[name] = reduce(measured.astype(np.float64), axis=0) if layer == "conv4" else np.nan
        names = {"preferred_class": preferred, "runner_up": runner_up, "top_class": top_class}
        for name, which in names.items():
            columns[name] = np.where(dead, None, np.array(run.names, object)[which])
        over_space = by_class(np.mean, averages[layer], labels, classes)
        of_class = {
            "preferred_share": (samples.argmax(axis=1) == preferred).mean(axis=0),
            "selectivity": class_selectivity(means)[preferred, numbers],
            "selectivity_low": low,
            "selectivity_high": high,
            "selectivity_space": class_selectivity(over_space).max(axis=0),
            "auc": area_under_roc(values, labels[:, None] == preferred),
        }
        columns |= {name: np.where(dead, np.nan, column) for name, column in of_class.items()}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def tabulate_classes(maxima: Arrays, statistics: Arrays, projected_labels: Array, run: Run) -> pd.DataFrame:
    """Return class_metrics.csv: one row a filter and class, means over the class's images (max: largest).

    activation_low and activation_high limit the 95 % bootstrap interval of the mean activation over images.

    Arguments as for `tabulate_filters`; `projected_labels` are those of the images of the statistics.
    """
    tables, names = [], run.names
    for layer, values in maxima.items():
        filters = values.shape[1]
        columns: dict[str, Any] = {"layer": layer, "filter": np.repeat(np.arange(filters), len(names))}
        columns["class"] = names * filters
        means = by_class(np.mean, values, run.test.labels, len(names))
        columns["activation_mean"] = means.T.ravel()  # (classes, filters) -> (filters * classes,)
        limits = np.percentile(bootstrap_means(values.astype(np.float64), run), (2.5, 97.5), axis=0)
        columns |= {
            f"activation_{of}": limit.T.ravel() for of, limit in zip(("low", "high"), limits, strict=True)
        }
        for name, measured in statistics.items() if layer == "conv4" else ():
            reduce = np.max if name == "max" else np.mean
            columns[name] = by_class(reduce, measured, projected_labels, len(names)).T.ravel()
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def class_means(classes: pd.DataFrame, names: Sequence[str]) -> Array:
    """Return conv4's mean activations (classes, filters) from class_metrics.csv."""
    rows = classes[classes["layer"] == "conv4"]
    table = rows.pivot(index="class", columns="filter", values="activation_mean")
    return table.loc[list(names)].to_numpy(np.float64)


def rank_filters(
    filters: pd.DataFrame, classes: pd.DataFrame, names: Sequence[str], name: str
) -> pd.DataFrame:
    """Order the active filters of conv4 by how well they stand for the class `name`.

    First come the filters that prefer the class, by selectivity. Where they are few, those that prefer
    another class follow, by their index for this one. Nearly dead filters come last: an index that rests on
    a handful of images is large by chance.

    Args:
        filters: filter_metrics.csv.
        classes: class_metrics.csv.
        names: Of all classes.
        name: Of this one, to which the columns selectivity, activation_mean and prefers refer.
    """
    conv4 = filters[filters["layer"] == "conv4"].set_index("filter")
    means, place = class_means(classes, names), list(names).index(name)
    columns = {
        "selectivity": class_selectivity(means)[place],
        "activation_mean": means[place],
        "prefers": conv4["preferred_class"] == name,
        "nearly_dead": conv4["activation_nonzero"] < NEARLY_DEAD,
    }
    ranking = pd.DataFrame(columns, index=conv4.index)[~conv4["dead"]].reset_index()
    order = ["nearly_dead", "prefers", "selectivity", "activation_mean", "filter"]
    return ranking.sort_values(order, ascending=[True, False, False, False, True], ignore_index=True)


def print_layers(filters: pd.DataFrame) -> None:
    """Print how many filters of each layer are dead and nearly dead, and medians over the active ones."""
    print("layer   filters  dead  nearly dead  selectivity    AUC  fires on")
    for layer, rows in filters.groupby("layer"):
        dead = int(rows["dead"].sum())
        few = int((rows["activation_nonzero"] < NEARLY_DEAD).sum()) - dead
        active = rows.loc[~rows["dead"], ["selectivity", "auc", "activation_nonzero"]]
        selectivity, auc, share = active.median()
        print(f"{layer}{len(rows):>10}{dead:>6}{few:>13}{selectivity:>13.3f}{auc:>7.3f}{share:>10.1%}")


def draw_distributions(filters: pd.DataFrame) -> Figure:
    """Draw how each metric of the activations is distributed over a layer's active filters."""
    texts = {
        "activation_mean": "mean activation",
        "activation_nonzero": "share of images it fires on",
        "selectivity": "class selectivity",
        "auc": "area under the ROC curve",
    }
    long = filters[~filters["dead"]].melt("layer", list(texts), "metric")
    options: dict[str, Any] = {"facet_kws": {"sharex": False}, "height": 2.4, "aspect": 0.9}
    grid = sns.displot(long, x="value", col="metric", hue="layer", kind="ecdf", **options)
    grid.set_titles("").set_ylabels("share of filters up to this value")
    for ax, text in zip(grid.axes.flat, texts.values(), strict=True):
        ax.set_xlabel(text)
    grid.figure.set_layout_engine("none")
    grid.figure.subplots_adjust(top=0.82)
    return grid.figure


# ---------------------------------------------------------------- how much of the specialisation was learned


def recalibrate_batch_norm(net: CNN, first: int, images: Array) -> CNN:
    """Give block `first` (0 for conv1) and all above batch norm's means and variances of the images.

    They are the average over batches of 100, as at the start of a training. With those of another network, or
    with 0 and 1, activations of new weights would be off scale.

    Args:
        net: Is changed and returned.
        first: Lowest block with new weights; those below stay as they are.
        images: Training images, uint8.
    """
    for block in net.blocks[first:]:
        block.train()
        block.bn.momentum = None  # the average of all batches counts, not the last ones most
    for batch in torch.from_numpy(images).split(100):
        net.features(net.normalise(batch))
    return net.eval()


def load_untrained(path: Path, checkpoint: Checkpoint, images: Array) -> CNN:
    """Return the network that training began with, batch norm's means and variances taken from the images."""
    start = load_checkpoint(path, checkpoint.net.mean.device)
    if start.settings != checkpoint.settings:
        raise SystemExit(f"{path} is of another training: run `uv run train_CNN.py` again")
    return recalibrate_batch_norm(start.net, 0, images)


def compare_networks(tables: Mapping[str, pd.DataFrame], run: Run) -> pd.DataFrame:
    """Say how much of each layer's specialisation was learned.

    The untrained network is no blank: edges and colours of random filters differ between classes, too.

    Args:
        tables: What `tabulate_filters` returned for the networks "trained" and "untrained".
        run: What the intervals need.

    Returns:
        For each layer and metric a row for each network, the median over its active filters, and one for
        "learned", the median of the difference trained - untrained over the filters that are active in both,
        each filter with its own start; with 95 % intervals over filters.
    """
    rows = []
    for layer in LAYERS:
        for metric in ("selectivity", "auc"):
            of_layer = {name: table[table["layer"] == layer] for name, table in tables.items()}
            values = {name: table[metric].to_numpy(np.float64) for name, table in of_layer.items()}
            values["learned"] = values["trained"] - values["untrained"]
            rows += [(layer, metric, name, *run.median(some)) for name, some in values.items()]
    return pd.DataFrame(rows, columns=["layer", "metric", "network", "median", "low", "high"])


def draw_specialisation(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw, layer by layer, how specialised the filters of both networks are, with medians and intervals."""
    both = pd.concat([table.assign(network=name) for name, table in tables.items()], ignore_index=True)
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    texts = {"selectivity": "class selectivity", "auc": "area under the ROC curve"}
    for ax, (metric, text) in zip(axes, texts.items(), strict=True):
        options: dict[str, Any] = {"data": both, "x": "layer", "y": metric, "hue": "network", "ax": ax}
        sns.violinplot(split=True, inner=None, linewidth=0, alpha=0.4, cut=0, legend=False, **options)
        point: dict[str, Any] = MEDIANS | {"dodge": 0.2, "linestyle": "none", "legend": ax is axes[0]}
        sns.pointplot(**point, **options)
        ax.axhline(0.5 if metric == "auc" else 0, color="0.5", linestyle=":", linewidth=1, zorder=0)
        ax.set(ylabel=text, xlabel="")
    axes[0].legend(title="median, 95 % interval", frameon=False, loc="upper left")
    sns.despine(fig)
    return fig


# ---------------------------------------------------------------- ablation: what filters are needed for


def pool_features(
    net: CNN, images: Array, most: int, doing: str
) -> tuple[list[Tensor], dict[str, Array], dict[str, Array]]:
    """Run the images through the network once; average its pooled maps over regions and find their maxima.

    Returns:
        For each layer (images, inputs): the map averaged over side x side regions, conv4 as the classifier
        sees it, the others with the largest side that divides the map and gives at most `most` inputs. Then
        by layer the strongest value of each filter in each image, and the mean of its map, (images, filters).
    """
    averages, maxima, means = list[list[Tensor]](), list[list[Tensor]](), list[list[Tensor]]()
    for batch in tqdm(torch.from_numpy(images).split(50), doing, unit=" batches", disable=None):
        *below, conv4 = (pooled for pooled, _ in net.features(net.normalise(batch)))
        small = [net.average(conv4)]
        for pooled in reversed(below):
            filters, rows = pooled.shape[1:3]
            sides = [side for side in range(1, rows + 1) if rows % side == 0 and side**2 * filters <= most]
            small.insert(0, F.adaptive_avg_pool2d(pooled, max(sides, default=1)))
        averages.append([part.flatten(1) for part in small])
        maxima.append([pooled.amax(dim=(2, 3)).cpu() for pooled in (*below, conv4)])
        means.append([pooled.mean(dim=(2, 3)).cpu() for pooled in (*below, conv4)])

    def by_layer(parts: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]

    strongest, mean = (
        {layer: part.numpy() for layer, part in zip(LAYERS, by_layer(parts), strict=True)}
        for parts in (maxima, means)
    )
    return by_layer(averages), strongest, mean


def contributions(net: CNN, averages: Tensor) -> Tensor:
    """Return what each filter of conv4 adds to the logits, (filters, images, classes).

    Behind conv4 come an average and a linear layer, nothing else: the logits are the bias plus the sum of the
    filters' contributions, and a filter whose pooled map is set to 0 takes its own away. This is exact.

    Args:
        net: The network.
        averages: What its classifier sees, (images, filters * head_size²).
    """
    filters = net.config["filters"][-1]
    weights = net.classifier.weight.unflatten(1, (filters, -1))  # (classes, filters, regions)
    return torch.einsum("nfr,cfr->fnc", averages.unflatten(1, (filters, -1)), weights)


def ablate_each(parts: Tensor, bias: Tensor, labels: Array, classes: int) -> tuple[Array, Array]:
    """Ablate one filter at a time.

    Args:
        parts: `contributions` (filters, images, classes).
        bias: Of the classifier.
        labels: Of the images.
        classes: Number of classes.

    Returns:
        Change of each class's accuracy (classes, filters) and of the accuracy over all images (filters,);
        negative where ablation does damage.
    """
    logits, truth = parts.sum(dim=0) + bias, torch.from_numpy(labels).to(parts.device)
    before = (logits.argmax(dim=1) == truth).cpu().numpy().astype(np.float64)
    right = [((logits - part).argmax(dim=1) == truth).cpu().numpy() for part in parts]
    change = np.stack(right, axis=1) - before[:, None]  # (images, filters)
    return by_class(np.mean, change, labels, classes), change.mean(axis=0)


def ablate_in_order(parts: Tensor, bias: Tensor, labels: Array, order: Array) -> Array:
    """Return the accuracy with the first 0, 1, ... and all filters of `order` ablated, (1 + filters,).

    Arguments as for `ablate_each`. Summed from the last, so that with all ablated the bias alone is left.
    """
    logits, curve = bias.expand(len(labels), -1).clone(), []
    for part in (0 * bias, *parts[order[::-1].copy()]):
        logits += part
        curve.append((logits.argmax(dim=1).cpu().numpy() == labels).mean())
    return np.array(curve[::-1])


def correlate_damage(changes: Array, overall: Array, index: Array, run: Run) -> None:
    """Print how selectivity and damage go together over filters (Morcos et al. 2018).

    For the changes of the classes' accuracies and the selectivity for each class, (classes, filters), and for
    the changes of the accuracy over all classes, (filters,), and the selectivity for the preferred class.
    """
    low, median, high = 100 * np.percentile(overall, (0, 50, 100))
    print(f"accuracy without one filter of conv4: {low:+.2f} to {high:+.2f} points, median {median:+.3f}")
    for text, x, y in (("a class", index, -changes), ("all classes", index.max(axis=0), -overall)):

        def statistic(which: Array, x: Array = x, y: Array = y) -> float:
            return rank_correlation(x[..., which], y[..., which])

        value, low, high = run.bootstrap(statistic, len(overall))
        print(f"selectivity and accuracy lost on {text}: {value:+.2f} ({low:+.2f} to {high:+.2f})")


def draw_ablation(changes: Array, index: Array, curves: Mapping[str, Array], names: Sequence[str]) -> Figure:
    """Draw the damage of ablating each filter to each class, and the accuracy as more and more are ablated.

    `changes` of accuracy and selectivity `index` are (classes, filters), filters without index are left out;
    curves (orders, 1 + filters) for each way of ordering: of several orders mean and range are drawn.
    """
    known = np.flatnonzero(~np.isnan(index).any(axis=0))
    preferred = index[:, known].argmax(axis=0)
    order = np.lexsort((-index[preferred, known], preferred))
    lost = -100 * changes[:, known[order]]
    fig = plt.figure(figsize=(7, 6), layout="constrained")
    ax, below = fig.subplots(2, 1, height_ratios=[1.15, 1])
    top = float(np.percentile(np.abs(lost), 99)) or 1
    options: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -top, "vmax": top, "interpolation": "nearest"}
    drawn = ax.imshow(lost, aspect="auto", extent=(0, len(known), len(names), 0), **options)
    fig.colorbar(drawn, ax=ax, pad=0.01, extend="both", label="accuracy lost (percentage points)")
    edges = np.searchsorted(preferred[order], np.arange(len(names) + 1))
    for number, (left, right) in enumerate(pairwise(edges.tolist())):
        ax.add_patch(Rectangle((left, number), right - left, 1, fill=False, edgecolor="0.2", linewidth=0.9))
    ax.set_yticks(np.arange(len(names)) + 0.5, list(names))
    ax.set(xlabel="ablated filter, by preferred class (framed), then falling selectivity", ylabel="class")
    for (name, curve), style in zip(curves.items(), ("-", "--", "-."), strict=True):
        (line,) = below.plot(100 * curve.mean(axis=0), linestyle=style, label=name)
        low, high = 100 * curve.min(axis=0), 100 * curve.max(axis=0)
        below.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.25, linewidth=0)
    below.set(xlabel="number of filters ablated", ylabel="accuracy (%)", ylim=(0, None), xlim=(0, None))
    below.legend(title="ablated first", frameon=False)
    sns.despine(ax=below)
    return fig


def run_ablation(run: Run, averages: Tensor, classes: pd.DataFrame, random_orders: int) -> None:
    """Ablate filters of conv4 one at a time, then more and more, in several orders; write table and figure.

    `averages` is what the classifier sees of the test images, `classes` class_metrics.csv.
    """
    parts = contributions(run.net, averages), run.net.classifier.bias, run.test.labels
    changes, overall = ablate_each(*parts, len(run.names))
    index = class_selectivity(class_means(classes, run.names))
    correlate_damage(changes, overall, index, run)
    rng, strongest = np.random.default_rng(run.seed), index.max(axis=0)
    orders = {"most selective": [np.argsort(-strongest, kind="stable")]}
    orders["least selective"] = [np.argsort(strongest, kind="stable")]
    text = f"random (mean and range of {random_orders})"
    orders[text] = [rng.permutation(len(overall)) for _ in range(random_orders)]
    curves = {name: np.stack([ablate_in_order(*parts, o) for o in every]) for name, every in orders.items()}
    rows = classes.loc[classes["layer"] == "conv4", ["filter", "class"]]  # a filter's classes in turn
    table = rows.assign(accuracy_change=changes.T.ravel(), selectivity=index.T.ravel())
    title = "What ablating filters of conv4 costs: one at a time, and more and more"
    run.save_table("ablation", table)
    run.save_figure("ablation", draw_ablation(changes, index, curves, run.names), title)


# ---------------------------------------------------------------- trust: what a projection shows


class TopUnits(NamedTuple):
    """The units of conv4 whose projections were drawn: those of each filter in its strongest images."""

    units: Units
    origin: Array  # row and column of the window's top left pixel in the image, (units, 2)
    magnitude: Array  # of the projection in the full frame, float32 (units, 96, 96)
    size: int  # rows and columns of the window

    def window(self, unit: int) -> tuple[slice, slice]:
        """Return the rows and columns of a unit's window inside the image."""
        top, left = self.origin[unit].tolist()
        return slice(max(top, 0), top + self.size), slice(max(left, 0), left + self.size)


def in_frames(windows: Array, origins: Array) -> Array:
    """Return magnitudes in the full frame (units, 96, 96) of windows (units, 3, rows, columns)."""
    magnitudes = zip(np.abs(windows).sum(axis=1, keepdims=True), origins.tolist(), strict=True)
    return np.stack([window_of(one, -top, -left, IMAGE_SIZE, 0)[0] for one, (top, left) in magnitudes])


def read_top_units(path: Path, checkpoint: Checkpoint) -> TopUnits:
    """Read the units of conv4 in projections.npz."""
    keys = [f"conv4_{key}" for key in ("image", "value", "position", "origin", "projection")]
    image, value, position, origin, projection = load_arrays(path, checkpoint, *keys)
    fires = np.nonzero(image >= 0)  # a filter that fires on fewer images leaves places empty
    row, column = position[fires].astype(np.int64).T
    units = Units(image[fires].astype(np.int64), fires[0], row, column, value[fires])
    frames = in_frames(projection[fires], origin[fires])
    return TopUnits(units, origin[fires], frames, projection.shape[-1])


def mask_pixels(top: TopUnits, unit: int, share: float, rng: np.random.Generator) -> Arrays:
    """Choose which pixels of a unit's image stay; the others become grey, 0 in normalised pixels.

    Returns:
        For each mask bool (96, 96), True where a pixel stays. Kept or deleted: `share` of the window's pixels
        inside the image, where the projection is strongest, nearest the window's centre, or at random.
    """
    window, masks = top.window(unit), {}
    down, right = np.arange(IMAGE_SIZE) - top.origin[unit][:, None] - (top.size - 1) / 2
    scores = {
        "projection": top.magnitude[unit],
        "centre": -np.hypot(down[:, None], right),
        "random": rng.random((IMAGE_SIZE, IMAGE_SIZE)),
    }
    for name, score in scores.items():
        inside, chosen = score[window], np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.bool_)
        strongest = np.argsort(-inside, axis=None, kind="stable")[: max(1, round(share * inside.size))]
        chosen[window].flat[strongest] = True
        masks[f"{name}, kept"], masks[f"{name}, deleted"] = chosen, ~chosen
    return masks


def surviving_shares(run: Run, top: TopUnits, share: float) -> pd.DataFrame:
    """Return how much of a unit's activation survives each of `mask_pixels`, mean over a filter's images.

    Insertion and deletion (after Petsiuk et al. 2018, "RISE") at one size of the mask: the masked image goes
    through the network again; the activation of the same filter at the same pooled position is divided by the
    original.

    Returns:
        A row for each filter that fires, a column for each mask.
    """
    rng, rows, units = np.random.default_rng(run.seed), [], top.units
    for start in tqdm(range(0, len(units.image), 64), "masked images", unit=" batches", disable=None):
        which = np.arange(start, min(start + 64, len(units.image)))
        batch = run.net.normalise(torch.from_numpy(run.test.images[units.image[which]]))
        masks = [mask_pixels(top, k, share, rng) for k in which.tolist()]
        place = units.filter[which], units.row[which], units.column[which]
        survived = {}
        for name in masks[0]:
            mask = torch.from_numpy(np.stack([mask[name] for mask in masks])[:, None]).to(batch.device)
            pooled = run.net.features(batch * mask)[-1][0].cpu().numpy()
            survived[name] = pooled[np.arange(len(which)), *place] / units.value[which]
        rows.append(pd.DataFrame(survived))
    return pd.concat(rows, ignore_index=True).groupby(units.filter).mean()


def draw_partners(top: TopUnits, drawn: Array, rng: np.random.Generator) -> Array:
    """Draw for each unit one of another filter in another image with the same window; itself if none is."""
    partners = []
    for k in drawn:
        different = (top.units.image != top.units.image[k]) & (top.units.filter != top.units.filter[k])
        others = np.flatnonzero((top.origin == top.origin[k]).all(axis=1) & different)
        partners.append(rng.choice(others) if others.size else k)
    return np.array(partners)


def randomise_weights(run: Run, top: TopUnits, count: int, images: Array) -> pd.DataFrame:
    """Compare projections with those of ever more random networks (Adebayo et al. 2018, section 3.1).

    Weights become random from conv4 downwards. A picture that stays the same shows the image and the
    architecture, not what was learned. Two variants: the random network runs forward itself, or the trained
    one does and keeps its switches, only the weights on the way down being random; what is left then is the
    switches' doing (Mahendran & Vedaldi 2016, "Salient deconvolutional networks"). `count` units are drawn.

    Returns:
        For each condition the rank correlation of each drawn unit's magnitudes with those of the trained
        network, over its window; the value every projection starts with is 1. Two show how alike projections
        are anyway: those of another filter at the same place, and of another filter in another image with the
        same window (nan where there is none). A place is one in the pooled map: the switch, and with it the
        window, may lie elsewhere in the pooling region when the forward network or the filter differs.
    """
    rng, trained, filters = np.random.default_rng(run.seed), run.net, run.net.config["filters"][-1]
    drawn = np.sort(rng.permutation(len(top.units.image))[:count])
    image, filter_, row, column, _ = (entry[drawn] for entry in top.units)
    units = Units(image, filter_, row, column, np.ones(len(drawn), np.float32))

    def correlate(frames: Array) -> list[float]:
        pairs = [(top.window(k), top.magnitude[k], frame) for k, frame in zip(drawn, frames, strict=True)]
        return [rank_correlation(magnitude[window], frame[window]) for window, magnitude, frame in pairs]

    def project(net: CNN, switches: CNN, units: Units, doing: str) -> list[float]:
        projector = Projector(net, len(LAYERS) - 1)
        return correlate(in_frames(*project_windows(projector, run.test.images, units, doing, switches)))

    partners = draw_partners(top, drawn, rng)
    elsewhere = units._replace(filter=(filter_ + rng.integers(1, filters, len(drawn))) % filters)
    alike = {
        "other filter, same place": project(trained, trained, elsewhere, "other filters"),
        "other filter, other image": np.where(partners == drawn, np.nan, correlate(top.magnitude[partners])),
    }
    for first in reversed(range(len(LAYERS))):
        net = copy.deepcopy(trained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed + 1)
            for block in net.blocks[first:]:
                block.conv.reset_parameters()
                block.bn.reset_parameters()
        recalibrate_batch_norm(net, first, images)
        name = LAYERS[-1] if first == len(LAYERS) - 1 else f"{LAYERS[-1]} to {LAYERS[first]}"
        alike[f"{name}, own switches"] = project(net, net, units, f"random {name}")
        alike[f"{name}, trained switches"] = project(net, trained, units, f"random {name}")
    return pd.DataFrame(alike)


def draw_trust(survived: pd.DataFrame, alike: pd.DataFrame, share: float) -> Figure:
    """Draw medians with 95 % intervals: what survives of activations; how alike projections stay."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
    style: dict[str, Any] = MEDIANS | {"hue": "variant", "markers": ["o", "s"], "dodge": 0.15}
    baselines, random = alike.iloc[:, :2], alike.iloc[:, 2:]
    for ax, table, line in ((left, survived, "none"), (right, random, "-")):
        long = table.melt(var_name="condition")
        long[["condition", "variant"]] = long["condition"].str.split(", ", expand=True)
        long["condition"] = long["condition"].str.replace(" to", "\nto")
        sns.pointplot(long, x="condition", y="value", ax=ax, linestyle=line, **style)
    left.set(xlabel=f"what chooses {share:.0%} of the window's pixels", ylim=(0, None))
    left.set(ylabel="share of the activation that survives")
    left.legend(title="these pixels are", frameon=False, bbox_to_anchor=(1, 1.05), loc="upper right")
    for (text, values), line in zip(baselines.items(), ("--", ":"), strict=True):
        label = f"no random weights,\n{text}"
        right.axhline(values.median(), color="0.4", linestyle=line, linewidth=1, label=label)
    right.set(xlabel="blocks with random weights", ylim=(0, 1))
    right.set_ylabel("rank correlation with\nthe trained projection")
    right.legend(frameon=False, fontsize=7, loc="lower left", ncols=2)
    sns.despine(fig)
    return fig


def run_trust(run: Run, top: TopUnits, share: float, count: int, images: Array) -> None:
    """Mask pixels and randomise weights; write table and figure. Arguments as for the functions above."""
    survived, alike = surviving_shares(run, top, share), randomise_weights(run, top, count, images)
    rows = []
    for test, table in (("masked pixels", survived), ("random weights", alike)):
        for condition, values in table.items():
            rows.append((test, condition, *run.median(values.to_numpy()), values.notna().sum()))
    trust = pd.DataFrame(rows, columns=["test", "condition", "median", "low", "high", "n"])
    print(trust.to_string(index=False, float_format="{:.3f}".format))
    title = "Do projections of conv4 show what drives a filter, and what was learned?"
    run.save_table("trust", trust)
    run.save_figure("trust", draw_trust(survived, alike, share), title)


# ---------------------------------------------------------------- linear probes (Table 7 of the paper)


def probe(fit: Tensor, labels: Tensor, decay: float, on: Tensor, on_labels: Tensor) -> float:
    """Return the accuracy `on` some features of a logistic regression that was fitted to others.

    Features are (images, inputs), standardised with mean and deviation of those it is fitted to. To the mean
    loss decay / 2 times the sum of squared weights is added: a convex problem for L-BFGS, started at zero.
    """
    centre, scale = fit.mean(dim=0), fit.std(dim=0, correction=0)
    fit, on = ((part - centre) / scale.where(scale > 0, 1) for part in (fit, on))
    weights = fit.new_zeros(fit.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = fit.new_zeros(weights.shape[1], requires_grad=True)
    # fewer than 100 steps leave the smaller decays short of their optimum
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(fit @ weights + bias, labels) + decay / 2 * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return float(((on @ weights + bias).argmax(dim=1) == on_labels).float().mean())


def run_probes(
    run: Run, features: Mapping[str, tuple[list[Tensor], list[Tensor]]], decays: Sequence[float]
) -> None:
    """Probe each layer of each network; write table and figure.

    `features` are those of the training and of the test images, as from `pool_features`. The decay is chosen
    on a fifth of the training images, drawn by the seed; then all of them are used.
    """
    truth = [torch.from_numpy(of.labels).to(run.net.mean.device) for of in (run.train, run.test)]
    rows = []
    for network, (learned, tested) in features.items():
        for layer, train, test in zip(LAYERS, learned, tested, strict=True):
            labels, test_labels = truth
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed))
            held, rest = order[: len(order) // 5], order[len(order) // 5 :]
            scores = [probe(train[rest], labels[rest], d, train[held], labels[held]) for d in decays]
            decay = decays[int(np.argmax(scores))]
            accuracy = probe(train, labels, decay, test, test_labels)
            error = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test))  # normal interval
            rows.append((layer, network, accuracy, accuracy - error, accuracy + error, train.shape[1], decay))
    probes = pd.DataFrame(rows, columns=["layer", "network", "accuracy", "low", "high", "inputs", "decay"])
    print(probes.to_string(index=False, float_format="{:.3f}".format))
    run.save_table("probes", probes)
    run.save_figure("probes", draw_probes(probes, run), "What a linear classifier reads from each layer")


def draw_probes(probes: pd.DataFrame, run: Run) -> Figure:
    """Draw the accuracy of the probes of each layer, trained and untrained, with 95 % intervals."""
    fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for (network, rows), style in zip(probes.groupby("network", sort=False), ("o-", "s--"), strict=True):
        accuracy, reach = 100 * rows["accuracy"], 100 * (rows["high"] - rows["accuracy"])
        ax.errorbar(range(4), accuracy, reach, fmt=style, capsize=2.5, label=str(network))
    levels = {"the network itself": run.checkpoint.metrics["accuracy"], "chance": 1 / len(run.names)}
    for text, share in levels.items():
        ax.axhline(100 * share, color="0.3", linestyle=":", linewidth=1)
        ax.annotate(text, (0, 100 * share), xytext=(-12, 3), textcoords="offset points", fontsize=8)
    inputs = probes["inputs"][: len(LAYERS)]
    ax.set_xticks(range(4), [f"{layer}\n{n:,} inputs" for layer, n in zip(LAYERS, inputs, strict=True)])
    ax.set(ylabel="test accuracy of a\nlogistic regression (%)", ylim=(0, 100))
    ax.legend(title="features of the network", frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    sns.despine(fig)
    return fig


def main() -> None:
    """Write the tables and figures, and say what they show and how far they can be trusted."""
    set_style()
    checkpoint = load_checkpoint(CHECKPOINT, choose_device(DEVICE))
    maxima, averages = (
        dict(zip(LAYERS, load_arrays(OUTPUTS / "activations.npz", checkpoint, *keys), strict=True))
        for keys in ([f"{layer}_{kind}" for layer in LAYERS] for kind in ("max", "mean"))
    )
    path = OUTPUTS / "projection_statistics.npz"
    projected_labels, *measured = load_arrays(path, checkpoint, "labels", *STATISTICS)
    statistics = dict(zip(STATISTICS, measured, strict=True))
    top = read_top_units(OUTPUTS / "projections.npz", checkpoint)
    train, test = (load_split(checkpoint.dataset, DATA_DIR, split) for split in ("train", "test"))
    source = f"{TITLES[checkpoint.dataset]}, {len(test.labels):,} test images, {checkpoint.accuracy()}"
    run, some = Run(checkpoint, train, test, source, OUTPUTS, RESAMPLINGS, SEED), train.images[:NORM_IMAGES]
    untrained = load_untrained(CHECKPOINT.parent / "snapshots/epoch_000.pth", checkpoint, some)
    print(f"{source}, projections of {len(projected_labels):,}, torch {torch.__version__}")

    filters = tabulate_filters(maxima, averages, statistics, run)
    classes = tabulate_classes(maxima, statistics, projected_labels, run)
    print_layers(filters)
    run.save_table("filter_metrics", filters)
    run.save_table("class_metrics", classes)
    title = "Distribution of each metric over the active filters"
    run.save_figure("metric_distributions", draw_distributions(filters), title)

    features, tables = {}, {"trained": filters}
    for name, net in (("trained", run.net), ("untrained", untrained)):
        learned, *_ = pool_features(net, train.images, PROBE_INPUTS, f"{name}, training images")
        tested, *strengths = pool_features(net, test.images, PROBE_INPUTS, f"{name}, test images")
        features[name] = learned, tested
    tables["untrained"] = tabulate_filters(strengths[0], strengths[1], {}, run)
    run.save_table("filter_metrics_untrained", tables["untrained"])
    print(compare_networks(tables, run).to_string(index=False, float_format="{:.3f}".format))
    title = "How much of the specialisation was learned"
    run.save_figure("specialisation", draw_specialisation(tables), title)

    run_ablation(run, features["trained"][1][-1], classes, RANDOM_ORDERS)
    run_trust(run, top, KEPT_SHARE, RANDOMISED_UNITS, some)
    run_probes(run, features, PROBE_DECAYS)
    print("next: uv run heatmap.py")


if __name__ == "__main__":
    main()
