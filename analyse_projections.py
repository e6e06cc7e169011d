"""Measure every filter: how often it fires, which class it prefers, how strongly, what it is needed for.

Run:    uv run analyse_projections.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_000.pth, outputs/activations.npz,
        outputs/projection_statistics.npz, outputs/projections.npz, data/stl10_binary/{train,test}_{X,y}.bin
Writes: outputs/filter_metrics.csv, outputs/class_metrics.csv, outputs/filter_metrics_untrained.csv,
        outputs/specialisation.csv, outputs/specialisation.png,
        outputs/ablation.csv, outputs/ablation_curves.csv, outputs/ablation_summary.csv, outputs/ablation.png,
        outputs/trust.csv, outputs/trust.png, outputs/probes.csv, outputs/probes.png

An activation is the strongest value of a filter in an image. All that is said about classes comes from
activations: a projection's non-zero pixels mostly measure the size of the receptive field and how much of it
the border cuts off.

Then the network itself is asked how far this can be trusted: how much of the specialisation was learned, what
is lost without a filter, whether a projection's strongest pixels drive the filter, and more so than those of
the plain gradient, what projections look like when weights are random, and what each layer tells of classes.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from CNN import CNN, LAYERS, Checkpoint, choose_device, load_checkpoint
from deconv import backpropagate, window_of
from deconv_full import (
    Projector,
    Units,
    by_class,
    class_selectivity,
    measure_activations,
    project_windows,
    top_images,
)
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
RANDOM_ORDERS = 1000  # orders in which all filters of conv4 are ablated at random
KEPT_SHARE = 0.25  # of a window's pixels: those that are kept, or deleted, to see what an activation needs
RANDOM_DRAWS = 3  # networks with random weights
NORM_IMAGES = 1_000  # training images that give batch norm of new weights its means and variances
PROBE_INPUTS = 1_024  # at most so many numbers of each of conv1 to conv3 go into its linear probe
PROBE_DECAYS = (0.001, 0.01, 0.1)  # weight decays to choose from

STATISTICS = ("nonzero_count", "mean", "variance", "max")  # of a projection
NEARLY_DEAD = 0.01  # an active filter is nearly dead if it fires on a smaller share of the test images
BLUR = 2.0  # pixels, standard deviation of the Gaussian for maps that are blurred
Arrays = Mapping[str, Array]


class Run(NamedTuple):
    """What every experiment needs; `source` is what titles say of network and images."""

    checkpoint: Checkpoint
    train: Split
    test: Split
    source: str
    outputs: Path
    resamplings: int  # bootstrap samples
    orders: int  # random orders of ablation
    draws: int  # networks with random weights
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
        save_table(self.outputs / f"{name}.csv", self.checkpoint, table, quiet=True)

    def save_figure(self, name: str, figure: Figure, title: str) -> None:
        """Write a figure as NAME.png; below its title stands what network and images it is of."""
        figure.suptitle(f"{title}\n{self.source}", fontsize=9)
        save_figure(self.outputs / f"{name}.png", figure, quiet=True)

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


def draw_intervals(ax: Axes, table: pd.DataFrame, x: str, series: str, line: str = "none") -> None:
    """Draw medians with their intervals, columns median, low and high, from left to right by `x`."""
    places = {name: place for place, name in enumerate(table[x].unique())}
    groups = list(table.groupby(series, sort=False))
    for number, (name, rows) in enumerate(groups):
        at = rows[x].map(places) + 0.14 * (number - (len(groups) - 1) / 2)
        reach = [rows["median"] - rows["low"], rows["high"] - rows["median"]]
        style: dict[str, Any] = {"linestyle": line, "marker": "osD^"[number], "markersize": 4, "capsize": 2}
        ax.errorbar(at, rows["median"], reach, label=str(name), linewidth=1.2, **style)
    ax.set_xticks(range(len(places)), list(places))
    sns.despine(ax=ax)


def rank_correlation(x: Array, y: Array) -> float:
    """Return Spearman's rank correlation of two arrays of one shape; pairs with a nan are left out."""
    both = pd.DataFrame({"x": x.ravel(), "y": y.ravel()})
    return float(both.corr("spearman").to_numpy()[0, 1])


# ---------------------------------------------------------------- how filters are used


def bootstrap_means(values: Array, run: Run) -> Array:
    """Return class means (samples, classes, filters) over images drawn with replacement within each class."""
    rng, means = np.random.default_rng(run.seed), []
    for label in range(len(run.names)):
        members = values[run.test.labels == label].astype(np.float64)
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


def tabulate_filters(
    maxima: Arrays, averages: Arrays, samples: Arrays, statistics: Arrays, run: Run
) -> pd.DataFrame:
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
        samples: By layer what `bootstrap_means` returns for the maxima.
        statistics: Of conv4's projections, by name, (projected images, filters).
        run: Labels, and what the intervals need.
    """
    tables, labels, classes = [], run.test.labels, len(run.names)
    for layer, stored in maxima.items():
        values = stored.astype(np.float64)
        means, dead = by_class(np.mean, values, labels, classes), (values == 0).all(axis=0)
        (preferred, runner_up), numbers = np.argsort(-means, 0, kind="stable")[:2], np.arange(values.shape[1])
        drawn = samples[layer]
        low, high = np.percentile(class_selectivity(drawn)[:, preferred, numbers], (2.5, 97.5), axis=0)
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
            "preferred_share": (drawn.argmax(axis=1) == preferred).mean(axis=0),
            "selectivity": class_selectivity(means)[preferred, numbers],
            "selectivity_low": low,
            "selectivity_high": high,
            "selectivity_space": class_selectivity(over_space).max(axis=0),
            "auc": area_under_roc(values, labels[:, None] == preferred),
        }
        columns |= {name: np.where(dead, np.nan, column) for name, column in of_class.items()}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def tabulate_classes(
    maxima: Arrays, samples: Arrays, statistics: Arrays, projected_labels: Array, run: Run
) -> pd.DataFrame:
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
        low, high = np.percentile(samples[layer], (2.5, 97.5), axis=0)
        columns |= {"activation_low": low.T.ravel(), "activation_high": high.T.ravel()}
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
        name: Of this one, to which the columns selectivity, activation_mean and prefers refer; the others
            are those of filter_metrics.csv.
    """
    conv4 = filters[filters["layer"] == "conv4"].set_index("filter")
    means, place = class_means(classes, names), list(names).index(name)
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


def describe_layers(filters: pd.DataFrame) -> Iterator[str]:
    """Say how many filters of each layer are dead and nearly dead, with medians over the active ones."""
    yield "layer   filters  dead  nearly dead  fires on  selectivity (over space)    AUC"
    for layer, rows in filters.groupby("layer"):
        dead = int(rows["dead"].sum())
        few = int((rows["activation_nonzero"] < NEARLY_DEAD).sum()) - dead
        share, *others = rows[["activation_nonzero", "selectivity", "selectivity_space", "auc"]].median()
        index, over_space, auc = others
        text = f"{layer}{len(rows):>10}{dead:>6}{few:>13}{share:>10.1%}{index:>13.3f}"
        yield f"{text}{f'({over_space:.3f})':>13}{auc:>7.3f}"


def describe_preferences(filters: pd.DataFrame) -> str:
    """Say of how many active filters of conv4 the preferred class is uncertain, or not that of its images."""
    active = filters[(filters["layer"] == "conv4") & ~filters["dead"]]
    uncertain = int((active["preferred_share"] < 0.9).sum())
    other = int((active["preferred_class"] != active["top_class"]).sum())
    return (
        f"preferred class: of {len(active)} active filters of conv4 {uncertain} prefer another in more than "
        f"10 % of samples;\n  of {other} the most frequent class among the nine strongest images is another"
    )


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


def pool_features(net: CNN, images: Array, most: int, doing: str) -> dict[str, Tensor]:
    """Average a network's pooled maps over regions, by layer (images, inputs).

    Over side x side regions, conv4 as the classifier sees it, the others with the largest side that divides
    the map and gives at most `most` inputs.
    """
    columns: list[Tensor] = []
    for start in tqdm(range(0, len(images), 50), doing, unit=" batches", disable=None):
        batch, parts = net.normalise(torch.from_numpy(images[start : start + 50])), []
        *maps, last = (pooled for pooled, _ in net.features(batch))
        for pooled in maps:
            filters, height = pooled.shape[1:3]
            divisors = (side for side in range(1, height + 1) if height % side == 0)
            sides = [side for side in divisors if side**2 * filters <= most]
            parts.append(F.adaptive_avg_pool2d(pooled, max(sides, default=1)).flatten(1))
        parts.append(net.average(last).flatten(1))
        # not put together at the end, which would need the memory twice
        columns = columns or [part.new_empty(len(images), part.shape[1]) for part in parts]
        for column, part in zip(columns, parts, strict=True):
            column[start : start + len(batch)] = part
    return dict(zip(LAYERS, columns, strict=True))


def compare_networks(tables: Mapping[str, pd.DataFrame], run: Run) -> pd.DataFrame:
    """Say how much of each layer's specialisation was learned: specialisation.csv.

    The untrained network is no blank: edges and colours of random filters differ between classes, too. The
    largest of 576 values in conv1 and of 9 in conv4 is not one quantity, so the index from averages over the
    map, which is, stands beside it.

    Args:
        tables: What `tabulate_filters` returned for the networks "trained" and "untrained".
        run: What the intervals need.

    Returns:
        For each metric and layer a row for each network, the median over its active filters, and one for
        "learned", the median of the difference trained - untrained over the filters that are active in both,
        each filter with its own start; with 95 % intervals over filters.
    """
    rows = []
    for metric in ("selectivity", "selectivity_space", "auc"):
        for layer in LAYERS:
            of_layer = {name: table[table["layer"] == layer] for name, table in tables.items()}
            values = {name: table[metric].to_numpy(np.float64) for name, table in of_layer.items()}
            values["learned"] = values["trained"] - values["untrained"]
            rows += [(metric, layer, name, *run.median(some)) for name, some in values.items()]
    return pd.DataFrame(rows, columns=["metric", "layer", "network", "median", "low", "high"])


def draw_specialisation(table: pd.DataFrame) -> Figure:
    """Draw `compare_networks`, layer by layer: both networks above, what was learned below."""
    fig, axes = plt.subplots(2, 3, figsize=(8, 4.4), sharex=True, layout="constrained")
    texts = {
        "selectivity": "selectivity of the\nstrongest activation",
        "selectivity_space": "selectivity of the map's\naverage",
        "auc": "area under the ROC curve\nof the strongest activation",
    }
    for (above, below), (metric, text) in zip(axes.T, texts.items(), strict=True):
        rows = table[table["metric"] == metric]
        draw_intervals(above, rows[rows["network"] != "learned"], "layer", "network")
        draw_intervals(below, rows[rows["network"] == "learned"], "layer", "network")
        below.axhline(0, color="0.5", linestyle=":", linewidth=1)
        above.set_title(text, fontsize=9)
    axes[0, 2].set_ylim(0.5, None)  # chance
    for ax in axes[0, :2]:
        ax.set_ylim(0, 1.1 * table.loc[table["metric"] != "auc", "high"].max())
    axes[0, 0].set_ylabel("median over filters")
    axes[1, 0].set_ylabel("trained - untrained,\nmedian over filters")
    axes[0, 0].legend(title="network; 95 % interval\nover filters", frameon=False, loc="upper left")
    return fig


# ---------------------------------------------------------------- ablation: what filters are needed for


class Linear(NamedTuple):
    """The logits of some images as a sum over the filters of conv4.

    Behind conv4 come an average and a linear layer, nothing else. So the logits are `base` plus the sum of
    the filters' parts, and ablating a filter takes its part away. This is exact.
    """

    parts: Tensor  # (filters, images, classes)
    base: Tensor  # the logits when all filters are ablated, (classes,)
    labels: Tensor  # of the images

    def without(self, ablated: Array) -> Tensor:
        """Return logits (conditions, images, classes); `ablated` (conditions, filters) says which are."""
        kept = torch.from_numpy(~ablated).to(self.parts)
        logits = kept @ self.parts.flatten(1)  # (conditions, images * classes)
        return cast(Tensor, logits.unflatten(1, self.parts.shape[1:]) + self.base)


def linear_parts(net: CNN, inputs: Tensor, level: Tensor, labels: Array) -> Linear:
    """Split logits into the filters' parts, counted from what an ablated filter is set to.

    Set to zero, a filter also takes away its mean, which shifts all logits. Set to its mean over the training
    images, it takes away only what it says of this image.

    Args:
        net: The network.
        inputs: What its classifier sees, (images, filters * head_size²).
        level: The same of ablated filters, (filters * head_size²,).
        labels: Of the images.
    """
    filters = net.config["filters"][-1]
    weights = net.classifier.weight.unflatten(1, (filters, -1))  # (classes, filters, regions)
    parts = torch.einsum("nfr,cfr->fnc", (inputs - level).unflatten(1, weights.shape[1:]), weights)
    return Linear(parts, net.classifier(level), torch.from_numpy(labels).to(inputs.device))


def ablate_each(linear: Linear) -> Array:
    """Return how far each image's cross-entropy rises when one filter is ablated, in nats, (images, filters).

    Accuracy is too coarse for a single filter: it counts the few images that tip over.
    """
    conditions, losses = np.eye(len(linear.parts) + 1, len(linear.parts), dtype=np.bool_), []
    for some in np.array_split(conditions, 8):
        logits, labels = linear.without(some), linear.labels.expand(len(some), -1)
        losses.append(F.cross_entropy(logits.mT, labels, reduction="none"))
    *ablated, whole = torch.cat(losses).cpu().numpy()  # the last ablates none
    return np.asarray(np.stack(ablated, axis=1) - whole[:, None])


def split_half(damage: Array, run: Run) -> Array:
    """Return how well filters' damage on one half of the images ranks like that on the other half.

    Rank correlation of damage (images, filters), mean over 20 random halves: of the damage to a class and to
    all. What correlates little with itself cannot correlate much with anything else.
    """
    rng, labels, correlations = np.random.default_rng(run.seed), run.test.labels, []
    for _ in range(20):
        places = pd.Series(rng.random(len(damage))).groupby(labels).rank()  # within each class
        half = (places % 2 == 0).to_numpy()
        halves = [by_class(np.mean, damage[of], labels[of], len(run.names)) for of in (half, ~half)]
        overall = [of.mean(axis=0) for of in halves]
        correlations.append((rank_correlation(*halves), rank_correlation(*overall)))
    return np.asarray(np.mean(correlations, axis=0))


def summarise_damage(
    damage: Array, predictors: Arrays, run: Run
) -> Iterator[tuple[str, float, float, float]]:
    """Yield quantities of damage (images, filters) with value and 95 % interval (nan for none).

    The preferred class of a filter stands apart: over all classes together, ranks mix what the filter drives
    with what it avoids. `predictors` may predict the damage to a class, (classes, filters), or to all,
    (filters,).
    """
    of_class = by_class(np.mean, damage, run.test.labels, len(run.names))
    preferred = predictors["selectivity"].argmax(axis=0)
    own = np.arange(len(run.names))[:, None] == preferred

    def correlation(x: Array, y: Array) -> tuple[float, float, float]:
        return run.bootstrap(lambda which: rank_correlation(x[..., which], y[..., which]), x.shape[-1])

    samples = bootstrap_means(damage, run)  # over images: of filters there are no others
    for text, where in (("its preferred class", own), ("each other class", ~own)):
        limits = np.percentile((samples * where).sum(axis=(1, 2)) / where.sum(), (2.5, 97.5))
        yield text, of_class[where].mean(), *limits
        for name, x in predictors.items():
            if x.ndim == 2:
                there = np.where(where, x, np.nan)
                yield f"{text}: rank correlation with {name}", *correlation(there, of_class)
    most = of_class.argmax(axis=0) == preferred
    share = run.bootstrap(lambda which: most[which].mean(), len(most))
    yield "share of filters that cost their preferred class most", *share
    for text, value in zip(("a class", "all classes"), split_half(damage, run), strict=True):
        yield f"{text}: split-half rank correlation", value, math.nan, math.nan
    for name, x in predictors.items():
        if x.ndim == 1:
            yield f"all classes: rank correlation with {name}", *correlation(x, of_class.mean(axis=0))


def ablate_in_order(linear: Linear, orders: Mapping[str, Array], level: str) -> pd.DataFrame:
    """Return rows of ablation_curves.csv: the accuracy with the first filters of some orders ablated.

    `orders` (orders, filters) by name, the random ones last. Of several orders of one name, mean and range of
    95 %. `below`: the share of random orders whose accuracy, averaged over the curve, is lower.
    """
    sizes = np.unique(np.linspace(0, len(linear.parts), 21).round().astype(np.int64))
    tables, averages = [], []
    for name, of_name in orders.items():
        bar = tqdm(of_name, f"ablation to {level}, {name}", unit=" orders", disable=None)
        # made beforehand: small pieces, kept, would fragment the memory
        curves = np.empty((len(of_name), len(sizes)))
        for curve, order in zip(curves, bar, strict=True):
            logits = linear.without(np.argsort(order) < sizes[:, None])
            curve[:] = (logits.argmax(dim=2) == linear.labels).float().mean(dim=1).cpu().numpy()
        low, high = np.percentile(curves, (2.5, 97.5), axis=0)
        columns = {"ablated": sizes, "accuracy": np.mean(curves, axis=0), "low": low, "high": high}
        tables.append(pd.DataFrame({"level": level, "order": name, **columns}))
        averages.append(np.mean(curves, axis=1))
    for table, average in zip(tables, averages, strict=True):
        table["below"] = (averages[-1] < average.mean()).mean()
    return pd.concat(tables)


def draw_ablation(damage: Array, index: Array, curves: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draw the rise of each class's loss without each filter, and the accuracy as more and more are ablated.

    damage and selectivity `index` are (classes, filters), filters without index are left out; `curves` is
    ablation_curves.csv.
    """
    known = np.flatnonzero(~np.isnan(index).any(axis=0))
    preferred = index[:, known].argmax(axis=0)
    order = np.lexsort((-index[preferred, known], preferred))
    rise = damage[:, known[order]]
    fig = plt.figure(figsize=(7.5, 6), layout="constrained")
    grid = fig.add_gridspec(2, 2, height_ratios=[1.1, 1])
    ax, left = fig.add_subplot(grid[0, :]), fig.add_subplot(grid[1, 0])
    right = fig.add_subplot(grid[1, 1], sharey=left)
    top = float(np.percentile(np.abs(rise), 99)) or 1
    options: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -top, "vmax": top, "interpolation": "nearest"}
    drawn = ax.imshow(rise, aspect="auto", extent=(0, len(known), len(names), 0), **options)
    fig.colorbar(drawn, ax=ax, pad=0.01, extend="both", label="rise of the loss (nats)")
    edges = np.searchsorted(preferred[order], np.arange(len(names) + 1))
    for number, (first, last) in enumerate(pairwise(edges.tolist())):
        ax.add_patch(Rectangle((first, number), last - first, 1, fill=False, edgecolor="0.2", linewidth=0.9))
    ax.set_yticks(np.arange(len(names)) + 0.5, list(names))
    ax.set_title("one filter set to its mean", fontsize=9)
    ax.set(xlabel="filters, by preferred class (framed), then falling selectivity", ylabel="class")
    for below, (level, of_level) in zip((left, right), curves.groupby("level", sort=False), strict=True):
        groups = of_level.groupby("order", sort=False)
        for (name, rows), style in zip(groups, ("-", "--", "-.", ":"), strict=True):
            (line,) = below.plot(rows["ablated"], 100 * rows["accuracy"], linestyle=style, label=name)
            band: dict[str, Any] = {"color": line.get_color(), "alpha": 0.25, "linewidth": 0}
            below.fill_between(rows["ablated"], 100 * rows["low"], 100 * rows["high"], **band)
        below.set(xlabel="number of filters ablated", ylim=(0, None), xlim=(0, None))
        below.set_title(f"more and more filters set to {level}", fontsize=9)
        sns.despine(ax=below)
    left.set_ylabel("accuracy (%)")
    left.legend(title="ablated first", frameon=False, fontsize=8, loc="lower left")
    return fig


def run_ablation(run: Run, inputs: Sequence[Tensor], filters: pd.DataFrame, classes: pd.DataFrame) -> str:
    """Ablate filters of conv4, one at a time and more and more; write tables and figure, return a finding.

    `inputs` is what the classifier sees of the training and of the test images; the tables are
    filter_metrics.csv and class_metrics.csv.
    """
    learned, seen = inputs
    index, labels, count = class_selectivity(class_means(classes, run.names)), run.test.labels, len(run.names)
    strength = filters.loc[filters["layer"] == "conv4", "activation_mean"].to_numpy()
    highest, rng = np.nan_to_num(index.max(axis=0)), np.random.default_rng(run.seed)
    keys = {"most selective": -highest, "least selective": highest, "strongest on average": -strength}
    orders = {name: np.argsort(key, kind="stable")[None] for name, key in keys.items()}
    orders[f"random ({run.orders:,} orders)"] = rng.permuted([np.arange(len(highest))] * run.orders, axis=1)
    rows = classes.loc[classes["layer"] == "conv4", ["filter", "class"]].assign(selectivity=index.T.ravel())
    every = pd.DataFrame({"filter": np.arange(len(highest)), "class": "all"})
    summary, curves = [], []
    levels = ("their means", "", learned.mean(dim=0)), ("zero", "_zero", 0 * learned[0])
    for level, suffix, values in levels:
        linear = linear_parts(run.net, seen, values, labels)
        to_class = [linear.parts[:, linear.labels == k, k].mean(dim=1) for k in range(count)]
        contribution = torch.stack(to_class).cpu().numpy()  # (classes, filters)
        predictors = {"selectivity": index, "contribution to the logit": contribution}
        predictors |= {"largest selectivity": index.max(axis=0), "mean activation": strength}
        damage = ablate_each(linear)
        summary += [(level, *entry) for entry in summarise_damage(damage, predictors, run)]
        rows[f"contribution{suffix}"] = contribution.T.ravel()
        rows[f"loss_added{suffix}"] = by_class(np.mean, damage, labels, count).T.ravel()
        every[f"loss_added{suffix}"] = damage.mean(axis=0)
        curves.append(ablate_in_order(linear, orders, level))
    run.save_table("ablation", pd.concat([rows, every]).sort_values("filter", kind="stable"))
    run.save_table("ablation_curves", pd.concat(curves))
    table = pd.DataFrame(summary, columns=["level", "quantity", "value", "low", "high"])
    run.save_table("ablation_summary", table)
    added = rows["loss_added"].to_numpy().reshape(-1, count).T
    figure = draw_ablation(added, index, pd.concat(curves), run.names)
    run.save_figure("ablation", figure, "What ablating filters of conv4 costs")
    value = table[table["level"] == "their means"].set_index("quantity")["value"]
    own, other, most, index = value.iloc[[0, 3, 6, 1]]
    return (
        f"ablation: set to its mean, a filter adds {own:.4f} nats to the loss of its preferred class, "
        f"{other:.4f} to each\n  other; {most:.0%} of the filters cost their preferred class most; rank "
        f"correlation of this cost with\n  the selectivity {index:.2f}"
    )


# ---------------------------------------------------------------- trust: what a projection shows


class TopUnits(NamedTuple):
    """The units of conv4 whose projections were drawn: those of each filter in its strongest images.

    Windows are (units, rows, columns); a window may reach beyond the image.
    """

    units: Units
    origin: Array  # row and column of the window's top left pixel in the image, (units, 2)
    inside: Array  # whether a place of the window lies inside the image
    magnitude: Array  # of the projection, float32
    envelope: Array  # mean over all units, each projection's sum being 1, (rows, columns)


def cut_windows(frames: Array, origins: Array, size: int) -> Array:
    """Cut a window of `size` pixels out of each of (units, rows, columns), 0 beyond them; `window_of`."""
    pairs = zip(frames, origins.tolist(), strict=True)
    return np.stack([window_of(frame[None], top, left, size, 0)[0] for frame, (top, left) in pairs])


def read_top_units(path: Path, checkpoint: Checkpoint) -> TopUnits:
    """Read the units of conv4 in projections.npz."""
    keys = [f"conv4_{key}" for key in ("image", "value", "position", "origin", "projection")]
    image, value, position, origin, projection = load_arrays(path, checkpoint, *keys)
    fires = np.nonzero(image >= 0)  # a filter that fires on fewer images leaves places empty
    row, column = position[fires].astype(np.int64).T
    units = Units(image[fires].astype(np.int64), fires[0], row, column, value[fires])
    magnitude, origin = np.abs(projection[fires]).sum(axis=1), origin[fires].astype(np.int64)
    places = origin[:, :, None] + np.arange(magnitude.shape[-1])
    down, right = ((places >= 0) & (places < IMAGE_SIZE)).swapaxes(0, 1)
    inside = down[:, :, None] & right[:, None]
    shares = magnitude / magnitude.sum(axis=(1, 2), keepdims=True)
    return TopUnits(units, origin, inside, magnitude, shares.sum(axis=0) / inside.sum(axis=0).clip(min=1))


def one_of_each(top: TopUnits, seed: int) -> Array:
    """Draw one unit of each filter: those of one filter are much alike and must not count as several."""
    shuffled = np.random.default_rng(seed).permutation(len(top.units.filter))
    _, first = np.unique(top.units.filter[shuffled], return_index=True)
    return shuffled[first]


def project_others(
    run: Run, top: TopUnits, which: Array, filters: Array, doing: str, net: CNN | None = None
) -> Array:
    """Project other `filters` at the places of units, perhaps through another network; return magnitudes.

    A place is one in the pooled map: the switch, and with it the window, may lie elsewhere in the pooling
    region. What lies outside the window of the unit that was there is left out.
    """
    image, _, row, column, _ = (entry[which] for entry in top.units)
    units = Units(image, filters, row, column, np.ones(len(which), np.float32))
    projector = Projector(net or run.net, len(LAYERS) - 1)
    windows, origins = project_windows(projector, run.test.images, units, doing)
    return cut_windows(np.abs(windows).sum(axis=1), top.origin[which] - origins, len(top.envelope))


def draw_others(run: Run, top: TopUnits, which: Array, rng: np.random.Generator) -> Array:
    """Project at the place of each unit a filter drawn from all others."""
    count, doing = run.net.config["filters"][-1], "other filters at the same place"
    drawn = (top.units.filter[which] + rng.integers(1, count, len(which))) % count
    return project_others(run, top, which, drawn, doing)


def score_pixels(run: Run, top: TopUnits, which: Array, rng: np.random.Generator) -> Arrays:
    """Score the pixels of units' windows: what is a filter said to look at? (units, rows, columns) each.

    By other ways back than the projection (`deconv.backpropagate`), as sums over RGB of absolute values, the
    gradient also blurred, since a mask with coarse grain keeps more of an image; by what knows nothing of the
    filter: the image's edges, likewise blurred and weighted as windows are on average, nearness to the
    window's centre, chance.
    """
    units, net, size = top.units, run.net, len(top.envelope)
    batch = net.normalise(torch.from_numpy(run.test.images[units.image[which]]))
    place = units.filter[which], units.row[which], units.column[which]
    back = [backpropagate(net, batch, len(LAYERS) - 1, *place, rule) for rule in ("gradient", "guided")]
    maps = {"gradient": back[0], "gradient x input": back[0] * batch, "guided backpropagation": back[1]}
    sums = {name: of.abs().sum(dim=1) for name, of in maps.items()}
    edges = torch.stack(torch.gradient(batch, dim=(2, 3))).abs().sum(dim=(0, 2))
    for name, of in (("gradient, blurred", sums["gradient"]), ("edges", edges)):
        sums[name] = gaussian_blur(of, [13, 13], [BLUR, BLUR])
    scores = {name: cut_windows(of.cpu().numpy(), top.origin[which], size) for name, of in sums.items()}
    scores["edges"] = scores["edges"] * top.envelope
    from_centre = np.arange(size) - (size - 1) / 2
    near = -np.hypot(from_centre[:, None], from_centre)
    return {
        **scores,
        "centre": np.tile(near, (len(which), 1, 1)),
        "random": rng.random((len(which), size, size)),
    }


def choose_pixels(score: Array, inside: Array, share: float) -> Array:
    """Return whether a pixel of the window is among the `share` with largest score inside the image."""
    chosen, count = np.zeros_like(inside), max(1, round(share * inside.sum()))
    chosen.flat[np.argsort(np.where(inside, -score, np.inf), axis=None, kind="stable")[:count]] = True
    return chosen


def surviving_shares(
    run: Run, top: TopUnits, units: Array, others: Array, share: float
) -> dict[str, pd.DataFrame]:
    """Return how much of each unit's activation survives when only some pixels stay, or all but these.

    Insertion and deletion (after Petsiuk et al. 2018, "RISE") at one size of the mask: the masked image, grey
    where it is masked, goes through the network again; the activation of the same filter at the same pooled
    position is divided by the original. `others` are what `draw_others` returned.

    Returns:
        Of the pixels "kept" and "deleted" a row for each unit, a column for each score of `score_pixels`.
    """
    rng, tables = np.random.default_rng(run.seed), []
    batches = (np.split(of, range(32, len(of), 32)) for of in (units, others))
    pairs = list(zip(*batches, strict=True))
    for which, others_here in tqdm(pairs, "faithfulness: masked images", unit=" batches", disable=None):
        batch = run.net.normalise(torch.from_numpy(run.test.images[top.units.image[which]]))
        place = np.arange(len(which)), *(entry[which] for entry in top.units[1:4])
        survived = {}
        scores = {"projection": top.magnitude[which], "other filter": others_here}
        scores |= score_pixels(run, top, which, rng)
        for name, of_all in scores.items():
            inside = zip(of_all, top.inside[which], strict=True)
            masks = np.stack([choose_pixels(*of_unit, share) for of_unit in inside])
            frames = cut_windows(masks, -top.origin[which], IMAGE_SIZE)
            kept = torch.from_numpy(frames[:, None]).to(batch.device)  # of all three channels
            for variant, mask in (("kept", kept), ("deleted", ~kept)):
                pooled = run.net.features(batch * mask)[-1][0].cpu().numpy()
                survived[variant, name] = pooled[place] / top.units.value[which]
        tables.append(pd.DataFrame(survived))
    table = pd.concat(tables, ignore_index=True)
    return {variant: pd.DataFrame(table[variant]) for variant in ("kept", "deleted")}


def draw_partners(top: TopUnits, drawn: Array, rng: np.random.Generator) -> Array:
    """Draw for each unit one of another filter in another image with the same window; itself if none is."""
    partners = []
    for k in drawn:
        different = (top.units.image != top.units.image[k]) & (top.units.filter != top.units.filter[k])
        others = np.flatnonzero((top.origin == top.origin[k]).all(axis=1) & different)
        partners.append(rng.choice(others) if others.size else k)
    return np.array(partners)


def compare_magnitudes(own: Array, other: Array, shared: Array) -> tuple[float, float]:
    """Return how alike two projections are: the rank correlation of magnitudes, and the partial one.

    The latter leaves out what both share with the envelope: projections are strong in the middle of any
    window. Arguments are magnitudes of the same pixels, and their envelope.
    """
    table = pd.DataFrame({"own": own, "other": other, "shared": shared}).corr("spearman").to_numpy()
    plain, of_own, of_other = table[0, 1], table[0, 2], table[1, 2]
    return plain, (plain - of_own * of_other) / math.sqrt((1 - of_own**2) * (1 - of_other**2))


def randomise_weights(run: Run, top: TopUnits, units: Array, images: Array) -> dict[str, Array]:
    """Compare projections with those of ever more random networks (Adebayo et al. 2018, section 3.1).

    Weights become random from conv4 downwards, and the network runs forward with them. A picture that stays
    the same shows the image and the architecture, not what was learned.

    Returns:
        For each condition `compare_magnitudes` of each unit, (draws, units, 2). Two conditions show how alike
        projections are anyway: those of another filter at the same place, and of another filter in another
        image with the same window (nan where there is none).
    """
    rng, alike = np.random.default_rng(run.seed), cast(dict[str, list[Array]], {})

    def compare(condition: str, windows: Array) -> None:
        pairs = zip(units, windows, strict=True)
        triples = [[of[top.inside[k]] for of in (top.magnitude[k], one, top.envelope)] for k, one in pairs]
        alike.setdefault(condition, []).append(np.array([compare_magnitudes(*of) for of in triples]))

    for draw in range(run.draws):
        compare("other filter, same place", draw_others(run, top, units, rng))
        partners = draw_partners(top, units, rng)
        compare("other filter, other image", top.magnitude[partners])
        alike["other filter, other image"][-1][partners == units] = np.nan
        for first in reversed(range(len(LAYERS))):
            net = copy.deepcopy(run.net)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.seed + 1 + draw)
                for block in net.blocks[first:]:
                    block.conv.reset_parameters()
                    block.bn.reset_parameters()
            recalibrate_batch_norm(net, first, images)
            name = LAYERS[-1] if first == len(LAYERS) - 1 else f"{LAYERS[-1]} to {LAYERS[first]}"
            doing = f"random weights: draw {draw + 1}, {name}"
            compare(name, project_others(run, top, units, top.units.filter[units], doing, net))
    return {condition: np.stack(draws) for condition, draws in alike.items()}


def draw_trust(trust: pd.DataFrame, share: float) -> Figure:
    """Draw medians with 95 % intervals: what survives of activations; how alike projections stay."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9), width_ratios=[1.6, 1], layout="constrained")
    masked = trust[trust["test"].isin(["kept", "deleted"])]
    texts = masked["condition"].str.replace("propagation", "prop.").str.replace(",? ", "\n", n=1, regex=True)
    masked = masked.assign(condition=texts)
    draw_intervals(left, masked, "condition", "test")
    left.tick_params(axis="x", labelsize=7)
    left.set(xlabel=f"what chooses {share:.0%} of the window's pixels", ylim=(0, None))
    left.set_ylabel("share of the activation that survives")
    left.legend(title="these pixels are", frameon=False)
    rows = trust[trust["test"] == "random weights, envelope taken out"]
    random = rows[rows["condition"].str.startswith("conv")]
    random = random.assign(blocks=random["condition"].str.replace(" to", "\nto"), variant="random weights")
    draw_intervals(right, random, "blocks", "variant", "-")
    others = rows[rows["condition"].str.startswith("other")]
    for value, text, line in zip(others["median"], others["condition"], ("--", ":"), strict=True):
        right.axhline(value, color="0.4", linestyle=line, linewidth=1, label=f"trained, {text}")
    right.set(xlabel="blocks with random weights", ylim=(min(0, rows["low"].min()), 1))
    right.set_ylabel("partial rank correlation with\nthe trained projection")
    right.legend(frameon=False, fontsize=8)
    return fig


def run_trust(run: Run, top: TopUnits, share: float, images: Array) -> tuple[str, str]:
    """Mask pixels and randomise weights; write table and figure, return two findings.

    Arguments as for the functions above.
    """
    units, rows = one_of_each(top, run.seed), []
    others = draw_others(run, top, units, np.random.default_rng(run.seed))

    def add(test: str, condition: str, values: Array) -> None:
        rows.append((test, condition, *run.median(values), int((~np.isnan(values)).sum())))

    for variant, table in surviving_shares(run, top, units, others, share).items():
        for name, values in table.items():
            add(variant, str(name), values.to_numpy())
            if name != "projection":
                add(f"{variant}, projection minus", str(name), (table["projection"] - values).to_numpy())
    for condition, draws in randomise_weights(run, top, units, images).items():
        for test, values in zip(("", ", envelope taken out"), np.moveaxis(draws, 2, 0), strict=True):
            add(f"random weights{test}", condition, values.mean(axis=0))  # units are resampled, not draws
            for number, of_draw in enumerate(values[: len(values) * (len(values) > 1)], start=1):
                add(f"random weights{test}, draw {number}", condition, of_draw)
    trust = pd.DataFrame(rows, columns=["test", "condition", "median", "low", "high", "n"])
    run.save_table("trust", trust)
    title = "Do projections of conv4 show what drives a filter, and what was learned?"
    run.save_figure("trust", draw_trust(trust, share), title)
    value = trust.set_index(["test", "condition"])["median"]
    names = "projection", "gradient", "other filter", "edges", "random"
    kept, deleted = (", ".join(f"{value[test, name]:.2f}" for name in names) for test in ("kept", "deleted"))
    alike = value["random weights, envelope taken out"]
    random, *other = (
        alike[name] for name in ("conv4 to conv1", "other filter, same place", "other filter, other image")
    )
    return (
        f"faithfulness: {share:.0%} of the pixels, chosen by {', '.join(names)}: alone they keep\n"
        f"  {kept} of the activation; without them {deleted} is left",
        f"random weights: partial rank correlation with the trained projections {random:.2f};\n"
        f"  of other filters at the same place {other[0]:.2f}, in other images {other[1]:.2f}",
    )


# ---------------------------------------------------------------- linear probes (Table 7 of the paper)


def probe(fit: Tensor, labels: Tensor, decay: float, on: Tensor) -> Tensor:
    """Return the classes `on` some features by a logistic regression that was fitted to others.

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
    return (on @ weights + bias).argmax(dim=1)


def mcnemar(one: Array, other: Array) -> float:
    """Return the two-sided p-value of McNemar's exact test for two classifiers on the same images.

    Only images on which one of them is right count; if neither is better, each of these is a coin's toss.
    `one` and `other` say which images each has right.
    """
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return float(min(1, 2 * tail / 2 ** (wins + losses)))


def probe_layers(
    run: Run, network: str, features: Sequence[Mapping[str, Tensor]], own: Array, decays: Sequence[float]
) -> list[tuple[Any, ...]]:
    """Return rows of probes.csv, one a layer of a network.

    The decay is chosen on a fifth of the training images, drawn by the seed; then all of them are used. p is
    that of McNemar's test against the trained network's own classifier.

    Args:
        run: What every experiment needs.
        network: Its name.
        features: What `pool_features` returned of the training and of the test images.
        own: Which test images the trained network classifies correctly.
        decays: To choose from.
    """
    labels, test_labels = (
        torch.from_numpy(of.labels).to(run.net.mean.device) for of in (run.train, run.test)
    )
    rows = []
    for layer in tqdm(LAYERS, f"probes, {network} network", unit=" layers", disable=None):
        train, test = (of[layer] for of in features)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed))
        held, rest = order[: len(order) // 5], order[len(order) // 5 :]
        guesses = [probe(train[rest], labels[rest], decay, train[held]) for decay in decays]
        decay = decays[int(np.argmax([(guess == labels[held]).sum().item() for guess in guesses]))]
        right = (probe(train, labels, decay, test) == test_labels).cpu().numpy()
        accuracy = right.mean()
        error = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test))  # normal interval
        entry = accuracy, accuracy - error, accuracy + error, mcnemar(right, own), train.shape[1], decay
        rows.append((layer, network, *entry))
    return rows


def describe_probes(probes: pd.DataFrame, own: float) -> str:
    """Say what the probes read; `own` is the accuracy of the network itself."""
    learned, raw = (" ".join(f"{share:.1%}" for share in probes["accuracy"][k : k + 4]) for k in (0, 4))
    return (
        f"probes of conv1 to conv4: {learned}, untrained {raw};\n  the network itself {own:.1%} "
        f"(conv4's probe differs with p = {probes['p'][len(LAYERS) - 1]:.2g})"
    )


def draw_probes(probes: pd.DataFrame, run: Run) -> Figure:
    """Draw the accuracy of the probes of each layer, trained and untrained, with 95 % intervals."""
    fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    percent = 100 * probes[["accuracy", "low", "high"]].rename(columns={"accuracy": "median"})
    draw_intervals(ax, probes[["layer", "network"]].join(percent), "layer", "network", "-")
    levels = {"the network itself": run.checkpoint.metrics["accuracy"], "chance": 1 / len(run.names)}
    for text, share in levels.items():
        ax.axhline(100 * share, color="0.3", linestyle=":", linewidth=1)
        ax.annotate(text, (0, 100 * share), xytext=(-12, 3), textcoords="offset points", fontsize=8)
    inputs = probes["inputs"][: len(LAYERS)]
    ax.set_xticks(range(4), [f"{layer}\n{n:,} inputs" for layer, n in zip(LAYERS, inputs, strict=True)])
    ax.set(ylabel="test accuracy of a\nlogistic regression (%)", ylim=(0, 100))
    ax.legend(title="features of the network", frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
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
    projected_labels, *stored = load_arrays(path, checkpoint, "labels", *STATISTICS)
    statistics = dict(zip(STATISTICS, stored, strict=True))
    top = read_top_units(OUTPUTS / "projections.npz", checkpoint)
    train, test = (load_split(checkpoint.dataset, DATA_DIR, split) for split in ("train", "test"))
    source = f"{TITLES[checkpoint.dataset]}, {len(test.labels):,} test images, {checkpoint.accuracy()}"
    run = Run(checkpoint, train, test, source, OUTPUTS, RESAMPLINGS, RANDOM_ORDERS, RANDOM_DRAWS, SEED)
    some = train.images[:NORM_IMAGES]
    untrained = load_untrained(CHECKPOINT.parent / "snapshots/epoch_000.pth", checkpoint, some)
    print(f"{source}, projections of {len(projected_labels):,}, torch {torch.__version__}")

    samples = {layer: bootstrap_means(values, run) for layer, values in maxima.items()}
    filters = tabulate_filters(maxima, averages, samples, statistics, run)
    classes = tabulate_classes(maxima, samples, statistics, projected_labels, run)
    del samples
    run.save_table("filter_metrics", filters)
    run.save_table("class_metrics", classes)

    tables, rows = {"trained": filters}, []
    for name, net in (("trained", run.net), ("untrained", untrained)):
        features = [pool_features(net, of.images, PROBE_INPUTS, f"{name} network") for of in (train, test)]
        if name == "trained":
            inputs = [of["conv4"] for of in features]  # what its classifier sees
            own = run.net.classifier(inputs[1]).argmax(dim=1).cpu().numpy() == test.labels
        else:
            measured = measure_activations(test.images, net, 50, "activations, untrained network")
            maxima, averages = ({k: measured[f"{k}_{kind}"] for k in LAYERS} for kind in ("max", "mean"))
            samples = {layer: bootstrap_means(values, run) for layer, values in maxima.items()}
            tables[name] = tabulate_filters(maxima, averages, samples, {}, run)
        rows += probe_layers(run, name, features, own, PROBE_DECAYS)
    del features
    columns = ["layer", "network", "accuracy", "low", "high", "p", "inputs", "decay"]
    probes = pd.DataFrame(rows, columns=columns)
    run.save_table("probes", probes)
    run.save_figure("probes", draw_probes(probes, run), "What a linear classifier reads from each layer")
    run.save_table("filter_metrics_untrained", tables["untrained"])
    specialisation = compare_networks(tables, run)
    run.save_table("specialisation", specialisation)
    title = "How much of the specialisation was learned"
    run.save_figure("specialisation", draw_specialisation(specialisation), title)

    findings = [
        *describe_layers(filters),
        describe_preferences(filters),
        run_ablation(run, inputs, filters, classes),
        *run_trust(run, top, KEPT_SHARE, some),
        describe_probes(probes, own.mean()),
    ]
    print("\n".join(findings))
    print(f"wrote filter_metrics, class_metrics, specialisation, ablation, trust and probes to {OUTPUTS}/")
    print("next: uv run heatmap.py")


if __name__ == "__main__":
    main()
