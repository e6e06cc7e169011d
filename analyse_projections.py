"""Measure every filter: how often it fires, which class it prefers, how strongly, what it is needed for.

Run:    uv run analyse_projections.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_000.pth, outputs/activations.npz,
        outputs/projection_statistics.npz, outputs/projections.npz, data/stl10_binary/{train,test}_{X,y}.bin,
        and summary.csv in the folders of COMPARE_WITH
Writes: outputs/filter_metrics.csv, outputs/class_metrics.csv, outputs/filter_metrics_untrained.csv,
        outputs/specialisation.csv, outputs/specialisation.png, outputs/probes.csv, outputs/probes.png,
        outputs/ablation.csv, outputs/ablation.png,
        outputs/trust.csv, outputs/trust.png, outputs/summary.csv; and comparison.csv, if there is a run to
        compare with

Classes are compared by peak activations: the largest value of a filter's map in an image. The non-zero pixels
of a projection mostly measure the size of the receptive field and how much of it the border cuts off.

The experiments follow one another, each in a section of its own: its numbers, its table, its figure.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from tqdm import tqdm

from CNN import CNN, IMAGE_SIZE, LAYERS, Checkpoint, choose_device, load_checkpoint, run_script
from deconv import backpropagate, crop
from deconv_full import Projector, Units, project_windows, top_images
from load_data import (
    TITLES,
    Array,
    Split,
    load_arrays,
    load_checkpoint_split,
    save_figure,
    save_table,
    set_style,
    shorten,
    wilson_interval,
)

OUTPUTS = Path("outputs")  # where results go
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds stl10_binary, or your own folders train and test
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
MASKED_SHARES = (0.10, 0.25)  # shares of a window's pixels that are kept or removed in masked images
COMPARE_WITH: list[Path] = []  # outputs of other runs, to stand beside this one: [Path("outputs_seed1")]

# how the experiments are done
SEED = 0  # decides everything that is drawn at random here
RESAMPLINGS = 1000  # bootstrap samples behind an interval
NEARLY_DEAD = 0.01  # an active filter is nearly dead if it fires on a smaller share of the test images
NORM_IMAGES = 500  # training images that give batch norm of new weights its means and variances
NORM_BATCH = 100  # of them at once; means and variances are averaged over such batches
PROBE_INPUTS = 1_024  # at most so many numbers of each of conv1 to conv3 go into its linear probe
PROBE_DECAYS = (0.1, 0.01, 0.001)  # weight decays to choose from; each fit starts from the one before
PROBE_STEPS = 100  # of L-BFGS at most; with fewer the smaller decays stay short of their optimum
BLOCK = 8  # pixels, side of the blocks in which the frame is kept or removed
BATCH = 50  # images that pass through a network at once
RANDOM_DRAWS = 3  # networks with random weights, and draws of other filters and images
STATISTICS: dict[str, Callable[..., Any]] = {  # of projections, and how each is reduced over images
    "nonzero_count": np.mean,
    "mean": np.mean,
    "variance": np.mean,
    "max": np.max,
}


class Run(NamedTuple):
    """The trained network, its images, and where results go."""

    checkpoint: Checkpoint
    train: Split
    test: Split
    source: str  # what headings say of the data set, the images and the accuracy
    outputs: Path

    @property
    def net(self) -> CNN:
        """The trained network."""
        return self.checkpoint.net

    @property
    def names(self) -> list[str]:
        """Names of the classes 0, 1, ..."""
        return self.checkpoint.class_names

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table as NAME.csv."""
        save_table(self.outputs / f"{name}.csv", self.checkpoint, table, quiet=True)

    def save_figure(self, name: str, figure: Figure, title: str) -> None:
        """Write a figure as NAME.png below a title."""
        figure.suptitle(title, fontsize=9)
        save_figure(self.outputs / f"{name}.png", figure, quiet=True)


# ---------------------------------------------------------------- intervals, correlations, classes


class Interval(NamedTuple):
    """A value with the limits of its 95 % interval; nan where there is nothing to measure."""

    value: float
    low: float
    high: float


def to_percent(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose shares, 0 to 1, and their limits are in per cent."""
    numbers = [name for name in ("value", "median", "low", "high") if name in table]
    return table.assign(**{name: 100 * table[name] for name in numbers})


def random_stream(purpose: str) -> np.random.Generator:
    """Return random numbers for one purpose, independent of those for another."""
    return np.random.default_rng([SEED, *purpose.encode()])


def percentile_limits(samples: Array) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of the samples that are not nan; nan if there are none."""
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def bootstrap(statistic: Callable[[Array], Array], count: int) -> Interval:
    """Return a statistic of all `count` items, with its 95 % percentile interval over resampled items.

    `statistic` is given indices (samples, count) and returns a value for each sample.
    """
    if count == 0:
        return Interval(math.nan, math.nan, math.nan)
    resampled = np.random.default_rng(SEED).integers(count, size=(RESAMPLINGS, count))
    (value,) = statistic(np.arange(count)[None])
    return Interval(float(value), *percentile_limits(statistic(resampled)))


def median(values: Array) -> Interval:
    """Return the median of the values that are not nan, with its bootstrap interval."""
    known = values[~np.isnan(values)]
    return bootstrap(lambda indices: np.median(known[indices], axis=1), len(known))


def wilson(successes: int, count: int) -> Interval:
    """Return the share of successes with Wilson's 95 % interval, which stays within 0 to 1."""
    if count == 0:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(successes / count, *wilson_interval(successes, count))


def bootstrap_means(values: Array, labels: Array) -> Array:
    """Resample the images of each class and return the class means of each sample.

    `values` are (images, filters), the result is (samples, classes, filters).
    """
    rng = np.random.default_rng(SEED)
    means = []
    for label in np.unique(labels):
        members = values[labels == label].astype(np.float64)
        count = len(members)
        # how often each image is drawn, (samples, images)
        draws = rng.multinomial(count, np.full(count, 1 / count), RESAMPLINGS)
        means.append(draws @ members / count)
    return np.stack(means, axis=1)


def rank_rows(values: Array) -> Array:
    """Rank the values of each row, ties by their mean rank; nan stays nan."""
    return np.asarray(pd.DataFrame(values).rank(axis=1).to_numpy())


def correlate_rows(x: Array, y: Array) -> Array:
    """Return Pearson's correlation of each row of x with the same row of y, nan if either is constant.

    Both have their nan, which are left out, at the same positions.
    """
    x = x - np.nanmean(x, axis=1, keepdims=True)
    y = y - np.nanmean(y, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        correlation = np.nansum(x * y, axis=1) / np.sqrt(np.nansum(x**2, axis=1) * np.nansum(y**2, axis=1))
    return np.asarray(correlation)


def rank_correlations(x: Array, y: Array) -> Array:
    """Return Spearman's rank correlation of each row of x with the same row of y."""
    return correlate_rows(rank_rows(x), rank_rows(y))


def partial_correlation(xy: Array, xz: Array, yz: Array) -> Array:
    """Return the correlation of x and y given z, from the correlations of the pairs; nan where undefined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))


def correlate_given(x: Array, y: Array, z: Array) -> Array:
    """Return the partial correlation of each row of x with the same row of y, given the same row of z."""
    return partial_correlation(correlate_rows(x, y), correlate_rows(x, z), correlate_rows(y, z))


def reduce_by_class(reduce: Callable[..., Any], values: Array, labels: Array, class_count: int) -> Array:
    """Reduce (images, filters) to (classes, filters) by np.mean or np.max."""
    groups = [values[labels == label].astype(np.float64) for label in range(class_count)]
    return np.stack([reduce(group, axis=0) for group in groups])


def class_selectivity(means: Array) -> Array:
    """Return the selectivity of each filter for each class: (mu - mu_rest) / (mu + mu_rest).

    mu is a filter's mean activation on the class, mu_rest the mean of mu over the other classes. The result
    lies between -1 and 1: 0 if the filter fires alike on all classes, 1 if it fires on this class only; nan
    if it never fires. For the preferred class this is the index of Morcos et al. 2018 ("On the importance of
    single directions for generalization"), who average a map over space; here its largest value counts.

    `means` are mu, (..., classes, filters); the result has the same shape.
    """
    others = means.shape[-2] - 1
    rest = (means.sum(axis=-2, keepdims=True) - means) / others
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that is promised
        return np.asarray((means - rest) / (means + rest))


def draw_intervals(
    ax: Axes, table: pd.DataFrame, category: str, series: str | None = None, horizontal: bool = False
) -> None:
    """Draw the columns median, low and high: a position for each category, a marker for each series.

    Without `series` there is one series.
    """
    positions = {name: position for position, name in enumerate(table[category].unique())}
    groups = list(table.groupby(series, sort=False)) if series else [("all", table)]
    for number, (name, rows) in enumerate(groups):
        shift = 0.14 * (number - (len(groups) - 1) / 2)  # side by side
        position = rows[category].map(positions) + shift
        reach = [rows["median"] - rows["low"], rows["high"] - rows["median"]]
        style: dict[str, Any] = {"label": str(name), "marker": "osD^"[number % 4], "markersize": 4}
        style |= {"linestyle": "none", "capsize": 2}
        if horizontal:
            ax.errorbar(rows["median"], position, xerr=reach, **style)
        else:
            ax.errorbar(position, rows["median"], yerr=reach, **style)

    axis = ax.yaxis if horizontal else ax.xaxis
    axis.set_ticks(range(len(positions)), list(positions))
    if horizontal:
        ax.set_ylim(len(positions) - 0.5, -0.5)  # the first on top
    sns.despine(ax=ax)


# ---------------------------------------------------------------- one pass over the images


class Measured(NamedTuple):
    """What one pass of a network over some images measures, by layer."""

    peaks: dict[str, Array]  # peak activations, float32 (images, filters)
    inputs: dict[str, Tensor]  # inputs of the linear probes, (images, inputs)


def average_regions(pooled: Tensor) -> Tensor:
    """Average maps (images, filters, rows, columns) over as many regions as PROBE_INPUTS allows.

    There are side x side of them, with the largest side that divides the map.
    """
    filters, height = pooled.shape[1:3]
    sides = [side for side in range(1, height + 1) if height % side == 0]
    allowed = [side for side in sides if side**2 * filters <= PROBE_INPUTS]
    return F.adaptive_avg_pool2d(pooled, max(allowed, default=1))


def measure_images(net: CNN, images: Array, desc: str) -> Measured:
    """Pass uint8 images (images, 3, 96, 96) through a network once and measure all layers.

    conv4 is averaged for the probes as the classifier sees it, the other layers by `average_regions`.
    """
    peaks: dict[str, Array] = {}
    inputs: dict[str, Tensor] = {}
    starts = range(0, len(images), BATCH)
    for start in tqdm(starts, desc, unit=" batches", disable=None):
        batch = slice(start, start + BATCH)
        x = net.normalise(torch.from_numpy(images[batch]))
        for layer, block in zip(LAYERS, net.blocks, strict=True):
            x = block(x)
            regions = net.average(x) if layer == "conv4" else average_regions(x)
            if start == 0:  # filled in place, because joining many small arrays would fragment the memory
                peaks[layer] = np.empty((len(images), x.shape[1]), np.float32)
                inputs[layer] = x.new_empty(len(images), regions[0].numel())
            peaks[layer][batch] = x.amax(dim=(2, 3)).cpu().numpy()
            inputs[layer][batch] = regions.flatten(1)
    return Measured(peaks, inputs)


def load_start(path: Path, checkpoint: Checkpoint) -> CNN:
    """Read the network before its first step of training, beside the checkpoint at `path`.

    Raises:
        SystemExit: If it is missing or of another training.
    """
    snapshot = path.parent / "snapshots/epoch_000.pth"
    start = load_checkpoint(snapshot, checkpoint.net.mean.device)
    if start.settings != checkpoint.settings:
        raise SystemExit(f"{snapshot} is of another training: run `uv run train_CNN.py` again")
    return start.net


def pick_norm_images(train: Split) -> Array:
    """Pick NORM_IMAGES training images at random, whatever order the data set has."""
    order = random_stream("batch norm").permutation(len(train.labels))
    return train.images[order[:NORM_IMAGES]]


def recalibrate_batch_norm(net: CNN, first: int, images: Array) -> CNN:
    """Measure batch norm's means and variances anew, in block `first` (0 for conv1) and all blocks above.

    Batch norm of a trained network holds the statistics of its own maps. With other weights in the blocks
    below they would not fit, and activations would be off scale. Each mean and each variance is the average
    over batches of the training `images`. Batch norm of these blocks must be fresh: its average would go on
    otherwise. The network itself is changed, and returned.
    """
    for block in net.blocks[first:]:
        block.train()
        block.bn.momentum = None  # average all batches alike; by default the last ones count most
    for batch in torch.from_numpy(images).split(NORM_BATCH):
        x = net.normalise(batch)
        for block in net.blocks:
            x = block(x)
    return net.eval()


# ---------------------------------------------------------------- how filters are used


class Tables(NamedTuple):
    """One row a filter, and one row a filter and class."""

    filters: pd.DataFrame
    classes: pd.DataFrame


def area_under_roc(values: Array, is_member: Array) -> Array:
    """Return how probably each filter fires more on an image of its class than on one of another class.

    This is the area under the receiver operating characteristic, from ranks (Mann-Whitney); a tie counts
    half. Gale et al. 2020 (arXiv 2007.01062) recommend measures of signal detection such as this one, because
    selectivity alone can be misleadingly high: a few strong images can carry it.
    `values` and `is_member`, whether an image is of the filter's class, are (images, filters).
    """
    ranks = pd.DataFrame(values).rank().to_numpy()
    members = is_member.sum(axis=0)
    others = len(values) - members
    pairs_won = (ranks * is_member).sum(axis=0) - members * (members + 1) / 2
    return np.asarray(pairs_won / (members * others))


def count_classes(images: Array, labels: Array, class_count: int) -> Array:
    """Count the classes among each filter's images, (filters, n), -1 for none; return (classes, filters)."""
    votes = np.zeros((class_count, len(images)))
    filters, _ = np.nonzero(images >= 0)
    np.add.at(votes, (labels[images[images >= 0]], filters), 1)
    return votes


def tabulate_filters(layer: str, peaks: Array, samples: Array, run: Run, n_top: int) -> pd.DataFrame:
    """Return one layer's rows of filter_metrics.csv from its peak activations, see `tabulate`.

    `peaks` are (images, filters), `samples` is what `bootstrap_means` makes of them.
    """
    names = np.array(run.names)
    labels = run.test.labels
    numbers = np.arange(peaks.shape[1])
    dead = (peaks == 0).all(axis=0)

    means = reduce_by_class(np.mean, peaks, labels, len(names))  # (classes, filters)
    preferred, runner_up = np.argsort(-means, axis=0, kind="stable")[:2]
    votes = count_classes(top_images(peaks, n_top), labels, len(names))
    votes[preferred, numbers] += 0.5  # a tie goes to the preferred class
    selectivity = class_selectivity(means).max(axis=0)
    resampled = class_selectivity(samples)[:, preferred, numbers]  # (samples, filters)
    limits = np.array([percentile_limits(values) for values in resampled.T])
    # the preferred class of each sample; -1 where no image on which the filter fires was drawn
    first = np.where(samples.any(axis=1), samples.argmax(axis=1), -1)

    table = pd.DataFrame(
        {
            "layer": layer,
            "filter": numbers,
            "dead": dead,
            "activation_mean": peaks.mean(axis=0),
            "activation_variance": peaks.var(axis=0),
            "activation_nonzero": (peaks > 0).mean(axis=0),
            "preferred_class": names[preferred],
            "runner_up": names[runner_up],
            "top_class": names[votes.argmax(axis=0)],
            "preferred_share": (first == preferred).mean(axis=0),
            "selectivity": selectivity,
            "selectivity_low": limits[:, 0],
            "selectivity_high": limits[:, 1],
            "auc": area_under_roc(peaks, labels[:, None] == preferred),
        }
    )
    table.loc[dead, "preferred_class":] = np.nan
    return table


def tabulate_classes(layer: str, peaks: Array, samples: Array, run: Run) -> pd.DataFrame:
    """Return one layer's rows of class_metrics.csv, see `tabulate`; arguments as for `tabulate_filters`."""
    means = reduce_by_class(np.mean, peaks, run.test.labels, len(run.names))  # (classes, filters)
    low, high = np.percentile(samples, (2.5, 97.5), axis=0)
    return pd.DataFrame(
        {
            "layer": layer,
            "filter": np.arange(peaks.shape[1]).repeat(len(run.names)),
            "class": run.names * peaks.shape[1],
            "activation_mean": means.T.ravel(),
            "activation_low": low.T.ravel(),
            "activation_high": high.T.ravel(),
        }
    )


def tabulate(peaks: Mapping[str, Array], run: Run, n_top: int) -> Tables:
    """Describe every filter of every layer by its peak activations in the test images.

    Args:
        peaks: Peak activations (images, filters) of conv1 to conv4, by layer.
        run: Names the classes and labels the images.
        n_top: Number of images that count for top_class.

    Returns:
        The tables filter_metrics.csv and class_metrics.csv without the columns of `tabulate_projections`.

        One row a filter; of a dead filter the columns from preferred_class on are empty:
            layer, filter: conv1 to conv4, and the filter's number in its layer.
            dead: Whether it fires on no image.
            activation_mean: Mean of its peak activations over the images.
            activation_variance: Population variance of the same.
            activation_nonzero: Share of the images on which it fires.
            preferred_class: The class of the largest mean peak activation.
            runner_up: The class of the second largest.
            top_class: The most frequent class of the `n_top` images of its highest peak activations; a tie
                goes to the preferred class.
            preferred_share: Share of bootstrap samples in which the preferred class comes first.
            selectivity: See `class_selectivity`, for the preferred class.
            selectivity_low, selectivity_high: Limits of its 95 % bootstrap interval over images.
            auc: See `area_under_roc`, for the preferred class.

        The preferred class is chosen on the same images, and the intervals hold it fixed. So a filter that
        is indifferent to classes has a selectivity above 0 and an auc above 0.5, most of all if it fires on
        few images. The untrained network's filters are chosen alike: compare with them.

        One row a filter and class:
            layer, filter, class: The filter, and the name of the class.
            activation_mean: Mean of the filter's peak activations over the images of the class.
            activation_low, activation_high: Limits of its 95 % bootstrap interval over images.
    """
    # images are resampled once for the filters of all layers, because drawing them takes most of the time
    all_samples = bootstrap_means(np.concatenate([peaks[layer] for layer in LAYERS], axis=1), run.test.labels)
    ends = np.cumsum([peaks[layer].shape[1] for layer in LAYERS])

    filter_tables = []
    class_tables = []
    for layer, samples in zip(LAYERS, np.split(all_samples, ends[:-1], axis=2), strict=True):
        values = peaks[layer].astype(np.float64)
        filter_tables.append(tabulate_filters(layer, values, samples, run, n_top))
        class_tables.append(tabulate_classes(layer, values, samples, run))
    return Tables(pd.concat(filter_tables, ignore_index=True), pd.concat(class_tables, ignore_index=True))


def tabulate_projections(statistics: Mapping[str, Array], labels: Array, names: Sequence[str]) -> Tables:
    """Reduce the statistics of conv4's projections, (images, filters) each, to filters and to classes.

    `labels` belong to the projected images. Each of `STATISTICS` has a column of its name. Over images the
    mean, the variance and the count of non-zero pixels are averaged; of the maxima the largest counts.
    """
    filter_count = statistics["mean"].shape[1]
    by_filter: dict[str, Any] = {"layer": "conv4", "filter": np.arange(filter_count)}
    by_class: dict[str, Any] = {
        "layer": "conv4",
        "filter": np.arange(filter_count).repeat(len(names)),
        "class": list(names) * filter_count,
    }
    for name, values in statistics.items():
        by_filter[name] = STATISTICS[name](values.astype(np.float64), axis=0)
        by_class[name] = reduce_by_class(STATISTICS[name], values, labels, len(names)).T.ravel()
    return Tables(pd.DataFrame(by_filter), pd.DataFrame(by_class))


def read_peaks(path: Path, checkpoint: Checkpoint) -> dict[str, Array]:
    """Read the peak activations (images, filters) of each layer from activations.npz."""
    arrays = load_arrays(path, checkpoint, *(f"{layer}_max" for layer in LAYERS))
    return dict(zip(LAYERS, arrays, strict=True))


def read_statistics(path: Path, checkpoint: Checkpoint) -> Tables:
    """Read projection_statistics.npz and reduce it to filters and classes, see `tabulate_projections`."""
    labels, *arrays = load_arrays(path, checkpoint, "labels", *STATISTICS)
    return tabulate_projections(dict(zip(STATISTICS, arrays, strict=True)), labels, checkpoint.class_names)


def class_means(classes: pd.DataFrame) -> Array:
    """Return conv4's mean peak activations (classes, filters) from class_metrics.csv."""
    rows = classes[classes["layer"] == "conv4"]
    return rows["activation_mean"].to_numpy().reshape(-1, rows["class"].nunique()).T


def count_filters(filters: pd.DataFrame) -> pd.DataFrame:
    """Return rows of summary.csv: for each layer, how many filters are dead and how sure preferences are."""
    rows = []
    for layer, table in filters.groupby("layer"):
        active = table[~table["dead"]]
        is_uncertain = active["preferred_share"] < 0.9
        differs = active["preferred_class"] != active["top_class"]
        counts = {
            "filters": len(table),
            "dead filters": table["dead"].sum(),
            "nearly dead filters": (active["activation_nonzero"] < NEARLY_DEAD).sum(),
            "filters that prefer another class in over 10 % of the bootstrap samples": is_uncertain.sum(),
            "filters whose top examples are most often of another class than the preferred": differs.sum(),
        }
        rows += [(name, layer, count, len(table)) for name, count in counts.items()]
    return pd.DataFrame(rows, columns=["name", "layer", "value", "n"]).assign(unit="filters")


def run_filters(run: Run, tables: Tables, projections: Tables) -> pd.DataFrame:
    """Write filter_metrics.csv and class_metrics.csv of the trained network; return rows of summary.csv."""
    filters = tables.filters.merge(projections.filters, how="left", on=["layer", "filter"])
    classes = tables.classes.merge(projections.classes, how="left", on=["layer", "filter", "class"])
    run.save_table("filter_metrics", filters)
    run.save_table("class_metrics", classes)
    return count_filters(filters)


# ---------------------------------------------------------------- how much of the specialisation was learned


def compare_networks(trained: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """Return specialisation.csv: medians over the active filters of both networks, and of what was learned.

    metric: selectivity or auc; layer: conv1 to conv4.
    network: trained, untrained, or learned: the difference trained - untrained of the filters that are active
        in both.
    median, low, high: Median over filters, with a 95 % bootstrap interval over filters.
    n: Number of filters.

    The tables are filter_metrics.csv of the networks. The untrained network is no blank: edges and colours
    that its random filters see differ between classes, too. Layers are not to be compared with each other,
    since the largest of 576 values in conv1 and of 9 in conv4 are different quantities.
    """
    rows = []
    for metric in ("selectivity", "auc"):
        values = pd.DataFrame({"trained": trained[metric], "untrained": untrained[metric]}, dtype=np.float64)
        values["learned"] = values["trained"] - values["untrained"]
        for layer in LAYERS:
            layer_values = values[trained["layer"] == layer]
            for name in values:
                interval = median(layer_values[name].to_numpy())
                rows.append((metric, layer, name, *interval, layer_values[name].count()))
    return pd.DataFrame(rows, columns=["metric", "layer", "network", "median", "low", "high", "n"])


def draw_specialisation(table: pd.DataFrame) -> Figure:
    """Draw `compare_networks`, layer by layer: both networks above, what was learned below."""
    fig, axes = plt.subplots(2, 2, figsize=(6, 4.4), sharex=True, layout="constrained")
    titles = {"selectivity": "selectivity", "auc": "area under the ROC curve"}
    for column, (metric, title) in enumerate(titles.items()):
        rows = table[table["metric"] == metric]
        is_difference = rows["network"] == "learned"
        draw_intervals(axes[0, column], rows[~is_difference], "layer", "network")
        draw_intervals(axes[1, column], rows[is_difference], "layer", "network")
        axes[0, column].set_title(title, fontsize=9)
        axes[1, column].axhline(0, color="0.5", linestyle=":", linewidth=1)

    axes[0, 0].set_ylim(0, None)
    axes[0, 1].set_ylim(0.5, None)  # chance
    axes[0, 0].set_ylabel("median over filters")
    axes[1, 0].set_ylabel("trained - untrained,\nmedian over filters")
    axes[0, 0].legend(title="network; 95 % interval\nover filters", frameon=False, loc="upper left")
    return fig


def run_specialisation(run: Run, trained: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """Compare filter_metrics.csv of both networks; write tables and figure, return rows of summary.csv."""
    table = compare_networks(trained, untrained)
    run.save_table("filter_metrics_untrained", untrained)
    run.save_table("specialisation", table)
    title = f"How much of the specialisation was learned\n{run.source}"
    run.save_figure("specialisation", draw_specialisation(table), title)

    names = {"trained": "trained network", "untrained": "untrained network", "learned": "trained - untrained"}
    name = table["metric"] + ", median over filters, " + table["network"].map(names)
    return table.assign(name=name, value=table["median"], unit="")


# ---------------------------------------------------------------- linear probes (Table 7 of the paper)


class Linear(NamedTuple):
    """A linear classifier that reads features: a probe, or the network's own. Both are called readouts.

    It is stored as torch.nn.Linear stores its own: logits = features @ weights.T + bias.
    """

    weights: Tensor  # (classes, inputs)
    bias: Tensor  # (classes,)
    decay: float = math.nan  # weight decay with which it was fitted

    def predict(self, features: Tensor) -> Tensor:
        """Return the most probable class of each image, (images,)."""
        return F.linear(features, self.weights, self.bias).argmax(dim=1)


def fit_probe(features: Tensor, labels: Tensor, decay: float, start: Linear) -> Linear:
    """Fit a logistic regression to the features (images, inputs) of labelled images.

    Features are standardised. The loss is the mean cross-entropy plus decay / 2 times the sum of squared
    weights: a convex problem, whose solution L-BFGS approaches in at most `PROBE_STEPS` steps. A `start` near
    the solution saves steps.
    """
    centre = features.mean(dim=0)
    deviation = features.std(dim=0, correction=0)
    scale = deviation.where(deviation > 0, 1)
    standardised = (features - centre) / scale

    # the start, for standardised features
    weights = (start.weights * scale).requires_grad_()
    bias = (start.bias + start.weights @ centre).requires_grad_()
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        cross_entropy = F.cross_entropy(F.linear(standardised, weights, bias), labels)
        value = cross_entropy + decay / 2 * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)

    # for features as they are
    raw_weights = weights.detach() / scale
    return Linear(raw_weights, bias.detach() - raw_weights @ centre, decay)


def choose_probe(features: Tensor, labels: Tensor, class_count: int) -> Linear:
    """Fit a probe to all training images, with the decay that is best on a fifth of them, held out for it."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(SEED))
    held_out = order[: len(order) // 5].to(features.device)
    rest = order[len(order) // 5 :].to(features.device)

    probe = Linear(features.new_zeros(class_count, features.shape[1]), features.new_zeros(class_count))
    candidates = []
    correct = []
    for decay in PROBE_DECAYS:
        probe = fit_probe(features[rest], labels[rest], decay, start=probe)
        candidates.append(probe)
        correct.append(int((probe.predict(features[held_out]) == labels[held_out]).sum()))
    best = candidates[int(np.argmax(correct))]
    return fit_probe(features, labels, best.decay, start=best)


class NetworkResults(NamedTuple):
    """What the experiments need to know of the trained, or of the untrained, network."""

    tables: Tables
    probes: pd.DataFrame  # rows of probes.csv
    readout: Linear  # the probe of conv4
    train_inputs: Tensor  # what a readout of conv4 sees of the training images, (images, inputs)
    test_inputs: Tensor  # likewise of the test images


def measure_accuracy(classifier: Linear, features: Tensor, labels: Array) -> Interval:
    """Return the share of images whose class a classifier recognises, with its 95 % interval (Wilson)."""
    predicted = classifier.predict(features).cpu().numpy()
    return wilson(int((predicted == labels).sum()), len(labels))


def own_classifier(net: CNN) -> Linear:
    """Return the network's own classifier, which reads conv4 as the probe of conv4 does."""
    return Linear(net.classifier.weight, net.classifier.bias)


def tabulate_probes(
    name: str, probes: Mapping[str, Linear], inputs: Mapping[str, Tensor], labels: Array
) -> pd.DataFrame:
    """Return a network's rows of probes.csv from its probes and their inputs in test images, by layer.

    layer, network: Where the features are from; network is trained or untrained.
    accuracy, low, high: Share of the test images that the probe recognises, with its 95 % interval (Wilson).
    inputs: How many numbers the probe reads of an image.
    decay: Weight decay of the probe, chosen on training images alone.
    n: Number of test images.
    """
    rows = []
    for layer, probe in probes.items():
        accuracy = measure_accuracy(probe, inputs[layer], labels)
        rows.append((layer, name, *accuracy, inputs[layer].shape[1], probe.decay, len(labels)))
    columns = ["layer", "network", "accuracy", "low", "high", "inputs", "decay", "n"]
    return pd.DataFrame(rows, columns=columns)


def measure_network(
    run: Run, net: CNN, name: str, n_top: int, peaks: Mapping[str, Array] | None = None
) -> NetworkResults:
    """Pass all images through a network once; make its tables and its probes.

    `peaks` are its peak activations in the test images where activations.npz has them, so that the tables
    agree with that file bit by bit. `n_top` is as for `tabulate`.

    Only conv4's inputs are kept, because the inputs of all layers would fill the memory.
    """
    print(f"measuring the {name} network", flush=True)
    train = measure_images(net, run.train.images, f"{name} network, training images")
    test = measure_images(net, run.test.images, f"{name} network, test images")
    tables = tabulate(peaks or test.peaks, run, n_top)

    labels = torch.from_numpy(run.train.labels).to(net.mean.device)
    layers = tqdm(LAYERS, f"{name} network, probes", unit=" layers", disable=None)
    probes = {layer: choose_probe(train.inputs[layer], labels, len(run.names)) for layer in layers}
    return NetworkResults(
        tables=tables,
        probes=tabulate_probes(name, probes, test.inputs, run.test.labels),
        readout=probes["conv4"],
        train_inputs=train.inputs["conv4"],
        test_inputs=test.inputs["conv4"],
    )


def draw_probes(probes: pd.DataFrame, accuracy: float, chance: float) -> Figure:
    """Draw the accuracy of the probes of each layer, trained and untrained, with 95 % intervals.

    `accuracy` is the network's own, `chance` the share that guessing gets right.
    """
    fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    draw_intervals(ax, to_percent(probes.assign(median=probes["accuracy"])), "layer", "network")
    for label, share in (("the network itself", accuracy), ("chance", chance)):
        ax.axhline(100 * share, color="0.3", linestyle=":", linewidth=1)
        ax.annotate(label, (0, 100 * share), xytext=(-12, 3), textcoords="offset points", fontsize=8)

    inputs = probes.drop_duplicates("layer").set_index("layer")["inputs"]
    ax.set_xticks(range(len(inputs)), [f"{layer}\n{count:,} inputs" for layer, count in inputs.items()])
    ax.set(ylabel="test accuracy of a\nlogistic regression (%)", ylim=(0, 100))
    ax.legend(title="features of the network", frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    return fig


def run_probes(run: Run, probes: pd.DataFrame, accuracy: float) -> pd.DataFrame:
    """Write probes.csv of both networks and its figure; return rows of summary.csv.

    `accuracy` is the accuracy of the network's own classifier, to compare with.
    """
    run.save_table("probes", probes)
    title = f"What a linear classifier reads from each layer\n{run.source}"
    run.save_figure("probes", draw_probes(probes, accuracy, 1 / len(run.names)), title)

    name = "test accuracy of a linear probe, " + probes["network"] + " network"
    return to_percent(probes.assign(name=name, value=probes["accuracy"], unit="%"))


# ---------------------------------------------------------------- ablation: what filters are needed for

HITS = "filters whose ablation hurts their preferred class most"
SHUFFLED = "preferred classes shuffled"


class Ablation(NamedTuple):
    """What the mean ablation of each filter of conv4 does to the test images, seen by one readout."""

    loss_increase: Array  # rise of each image's cross-entropy in nats, (images, filters)
    contribution: Array  # what the filter adds to the logit of the image's class beyond its mean, likewise
    spread: Array  # how much the filter moves the logits against each other, (filters,)


def split_logits(readout: Linear, network: NetworkResults) -> tuple[Tensor, Tensor]:
    """Split a readout's logits of the test images into what each filter of conv4 says, and the rest.

    Returns parts (filters, images, classes) and a base (classes,). A readout is linear, so logits =
    parts.sum(0) + base is exact. A part holds what a filter says beyond its mean over the training images, so
    mean ablation of the filter takes its part away.
    """
    mean_inputs = network.train_inputs.mean(dim=0)
    deviations = network.test_inputs - mean_inputs
    filter_count = int((network.tables.filters["layer"] == "conv4").sum())
    inputs_by_filter = deviations.unflatten(1, (filter_count, -1))  # (images, filters, regions)
    weights = readout.weights.unflatten(1, (filter_count, -1))  # (classes, filters, regions)
    parts = torch.einsum("nfr,cfr->fnc", inputs_by_filter, weights)
    return parts, F.linear(mean_inputs, readout.weights, readout.bias)


def ablate(readout: Linear, network: NetworkResults, labels: Tensor) -> Ablation:
    """Replace each filter of conv4 by its mean, one at a time.

    The loss says more than accuracy, which for a single filter counts the few images that tip over. `spread`
    is a standard deviation over images and classes. It leaves out what moves all logits of an image alike,
    because that does not change the probabilities.
    """
    parts, base = split_logits(readout, network)
    logits = parts.sum(dim=0) + base
    loss = F.cross_entropy(logits, labels, reduction="none")
    loss_without = [F.cross_entropy(logits - part, labels, reduction="none") for part in parts]
    loss_increase = torch.stack(loss_without, dim=1) - loss[:, None]

    images = torch.arange(len(labels), device=labels.device)
    contribution = parts[:, images, labels].T
    against_each_other = parts - parts.mean(dim=2, keepdim=True)
    spread = against_each_other.square().mean(dim=(1, 2)).sqrt()
    return Ablation(*(values.cpu().numpy() for values in (loss_increase, contribution, spread)))


def tabulate_ablation(ablation: Ablation, selectivity: Array, run: Run) -> pd.DataFrame:
    """Return ablation.csv: a row a filter and class, and after the classes a row for all of them together.

    filter, class: The filter of conv4; the name of the class, or "all".
    selectivity: See `class_selectivity`, (classes, filters); empty for a dead filter, and for all classes.
    contribution: What the filter adds to the logit of the class beyond its mean over the training images;
        mean over the class's test images.
    loss_increase: Mean rise of the cross-entropy by mean ablation, over the class's (or all) test images.
    """
    numbers = np.arange(selectivity.shape[1])
    labels = run.test.labels
    class_count = len(run.names)
    class_rows = pd.DataFrame(
        {
            "filter": numbers.repeat(class_count),
            "class": run.names * len(numbers),
            "selectivity": selectivity.T.ravel(),
            "contribution": reduce_by_class(np.mean, ablation.contribution, labels, class_count).T.ravel(),
            "loss_increase": reduce_by_class(np.mean, ablation.loss_increase, labels, class_count).T.ravel(),
        }
    )
    overall = ablation.loss_increase.mean(axis=0)
    overall_rows = pd.DataFrame({"filter": numbers, "class": "all", "loss_increase": overall})
    return pd.concat([class_rows, overall_rows]).sort_values("filter", kind="stable", ignore_index=True)


def values_by_filter(ablation: pd.DataFrame, column: str) -> Array:
    """Return a column of ablation.csv as (filters, classes), without the rows for all classes."""
    rows_per_filter = len(ablation) // ablation["filter"].nunique()
    return np.asarray(ablation[column].to_numpy().reshape(-1, rows_per_filter)[:, :-1])


def preferred_classes(peak_means: Array) -> tuple[Array, Array]:
    """Return which filters are active, and the preferred class of each, from `class_means`."""
    return np.any(peak_means, axis=0), np.asarray(np.argmax(peak_means, axis=0))


def average_costs(ablation: Ablation, peak_means: Array, labels: Array, readout: str) -> pd.DataFrame:
    """Return rows of summary.csv: mean loss increase of a filter's preferred class and of each other class.

    The means are over active filters, the 95 % bootstrap intervals over images. On the other classes rises
    and falls cancel, so there is the mean size of the loss increase, too; it has no interval, because noise
    makes sizes larger. `peak_means` are the `class_means` (classes, filters), `readout` is a name.
    """
    class_count = len(peak_means)
    active, preferred = preferred_classes(peak_means)
    is_preferred = np.arange(class_count)[:, None] == preferred  # (classes, filters)
    means = reduce_by_class(np.mean, ablation.loss_increase, labels, class_count)
    samples = bootstrap_means(ablation.loss_increase, labels)  # (samples, classes, filters)
    rows = []
    for classes, mask in (("the preferred class", is_preferred), ("each other class", ~is_preferred)):
        counted = mask & active
        interval = Interval(math.nan, math.nan, math.nan)
        if counted.any():
            low, high = np.percentile(samples[:, counted].mean(axis=1), (2.5, 97.5))
            interval = Interval(means[counted].mean(), low, high)
        rows.append((f"loss increase of {classes}: {readout}", *interval, "nats", active.sum()))
        if mask is not is_preferred:
            size = np.abs(means[counted]).mean() if counted.any() else math.nan
            name = f"size of the loss increase of {classes}: {readout}"
            rows.append((name, size, math.nan, math.nan, "nats", active.sum()))
    return pd.DataFrame(rows, columns=["name", *Interval._fields, "unit", "n"])


def count_hits(ablation: Ablation, peak_means: Array, labels: Array, readout: str) -> pd.DataFrame:
    """Return rows of summary.csv: in how many active filters ablation hurts the preferred class most.

    The interval is Wilson's. Beside it stands the share that is expected if the preferred classes are
    shuffled among the filters. `readout` is a name.
    """
    class_count = len(peak_means)
    active, preferred = preferred_classes(peak_means)
    count = int(active.sum())
    loss_increase = reduce_by_class(np.mean, ablation.loss_increase, labels, class_count)
    hurt_most = loss_increase.argmax(axis=0)
    hits = wilson(int((active & (hurt_most == preferred)).sum()), count)

    # a filter and a preferred class that is drawn from all filters': how often do both name one class?
    shuffled = math.nan
    if count:
        share_hurt = np.bincount(hurt_most[active], minlength=class_count) / count
        share_preferred = np.bincount(preferred[active], minlength=class_count) / count
        shuffled = float(share_hurt @ share_preferred)
    rows = [
        (f"{HITS}: {readout}", *hits, count),
        (f"{HITS}: {readout}, {SHUFFLED}", shuffled, math.nan, math.nan, count),
    ]
    return to_percent(pd.DataFrame(rows, columns=["name", *Interval._fields, "n"]).assign(unit="%"))


def correlate_samples(x: Array, y: Array) -> Interval:
    """Return the rank correlation of x and y, (filters,) or (filters, classes), bootstrapped over filters."""

    def correlate(indices: Array) -> Array:
        shape = (len(indices), -1)
        return rank_correlations(x[indices].reshape(shape), y[indices].reshape(shape))

    return bootstrap(correlate, len(x))


def correlate_costs(ablation: pd.DataFrame, spread: Array) -> pd.DataFrame:
    """Return rows of summary.csv: rank correlations of loss increases with what might predict them.

    They are over active filters, or over pairs of an active filter and an other class; the intervals are over
    filters. A filter's preferred class is kept apart from the others, because preferred classes have high
    values of both and pooled ranks would show that alone. A filter that moves the logits more costs more,
    whatever class it prefers. So a partial correlation says what selectivity tells beyond the `spread`
    (filters,) of what the filter adds to the logits.
    """
    active = ~np.isnan(values_by_filter(ablation, "selectivity")).any(axis=1)
    selectivity = values_by_filter(ablation, "selectivity")[active]  # (filters, classes)
    loss_increase = values_by_filter(ablation, "loss_increase")[active]
    overall = ablation.groupby("filter")["loss_increase"].last().to_numpy()[active]  # the row "all"
    spread = spread[active]
    largest = selectivity.max(axis=1)
    is_preferred = selectivity.argmax(axis=1)[:, None] == np.arange(selectivity.shape[1])

    def others(values: Array) -> Array:  # (filters, classes - 1)
        return np.asarray(values[~is_preferred].reshape(len(values), selectivity.shape[1] - 1))

    def given_spread(indices: Array) -> Array:
        return correlate_given(*(rank_rows(values[indices]) for values in (largest, overall, spread)))

    preferred_cost = loss_increase[is_preferred]
    other_cost = others(loss_increase)
    intervals = {
        "the preferred class, rank correlation with selectivity": correlate_samples(largest, preferred_cost),
        "each other class, rank correlation with selectivity": correlate_samples(
            others(selectivity), other_cost
        ),
        "all classes, rank correlation with selectivity": correlate_samples(largest, overall),
        "all classes, rank correlation with spread": correlate_samples(spread, overall),
        "all classes, rank correlation with selectivity given the spread": bootstrap(
            given_spread, len(overall)
        ),
    }
    rows = [(f"loss increase of {name}", *value) for name, value in intervals.items()]
    table = pd.DataFrame(rows, columns=["name", *Interval._fields])
    return table.assign(unit="rho", n=active.sum())


def draw_ablation(ablation: pd.DataFrame, hits: pd.DataFrame, chance: float) -> Figure:
    """Draw ablation.csv and, below, the share of filters whose ablation hurts their preferred class most.

    Above: the loss increase of each class (rows) by each active filter (columns). `hits` are the rows of
    `count_hits` for each readout; `chance` is the share if the class were picked at random.
    """
    names = ablation["class"].unique()[:-1]  # the last is "all"
    selectivity = values_by_filter(ablation, "selectivity")  # (filters, classes)
    loss_increase = values_by_filter(ablation, "loss_increase")

    # filters side by side that prefer the same class, the most selective first
    active = np.flatnonzero(~np.isnan(selectivity).any(axis=1))
    preferred = selectivity[active].argmax(axis=1)
    order = np.lexsort((-selectivity[active].max(axis=1), preferred))
    shown = loss_increase[active[order]].T

    ratios = [4, 1]
    fig, (above, below) = plt.subplots(2, 1, figsize=(7.5, 4.6), height_ratios=ratios, layout="constrained")
    limit = float(np.percentile(np.abs(shown), 99)) or 1
    corners = (0, len(active), len(names), 0)
    colours: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    picture = above.imshow(shown, aspect="auto", extent=corners, interpolation="nearest", **colours)
    fig.colorbar(picture, ax=above, pad=0.01, extend="both", label="loss increase (nats)")
    widths = np.bincount(preferred, minlength=len(names))
    for row, (right, width) in enumerate(zip(widths.cumsum(), widths, strict=True)):
        above.add_patch(Rectangle((right - width, row), width, 1, fill=False, edgecolor="0.2", linewidth=0.9))
    above.set_yticks(np.arange(len(names)) + 0.5, [shorten(name) for name in names])
    above.set(xlabel="filters, by preferred class (framed), then falling selectivity", ylabel="class")

    hits = hits[~hits["name"].str.endswith(SHUFFLED)]
    readouts = hits["name"].str.removeprefix(f"{HITS}: ")
    shares = hits.assign(readout=readouts, median=hits["value"])
    draw_intervals(below, shares, "readout", horizontal=True)
    below.axvline(100 * chance, color="0.5", linestyle=":", linewidth=1)
    below.set(xlabel=f"{HITS} (%); dotted: a class picked at random", xlim=(0, 100))
    return fig


def run_ablation(run: Run, trained: NetworkResults, untrained: NetworkResults) -> pd.DataFrame:
    """Ablate each filter of conv4; write table and figure, return rows of summary.csv.

    What a filter is needed for belongs to the readout, too: any fitted readout gives weight to a filter that
    fires more on a class. So the network's own classifier is compared with a probe on the same features, and
    with a probe on the untrained network's features: the baseline, which needs no training of the network.
    """
    labels = torch.from_numpy(run.test.labels).to(run.net.mean.device)
    peak_means = class_means(trained.tables.classes)
    network_ablation = ablate(own_classifier(run.net), trained, labels)
    table = tabulate_ablation(network_ablation, class_selectivity(peak_means), run)
    run.save_table("ablation", table)

    ablations = {
        "the network's own classifier": (network_ablation, trained),
        "probe on trained features": (ablate(trained.readout, trained, labels), trained),
        "probe on untrained features": (ablate(untrained.readout, untrained, labels), untrained),
    }
    costs = []
    hits = []
    for readout, (ablation, network) in ablations.items():
        means = class_means(network.tables.classes)
        costs.append(average_costs(ablation, means, run.test.labels, readout))
        hits.append(count_hits(ablation, means, run.test.labels, readout))

    correlations = correlate_costs(table, network_ablation.spread)
    if table["selectivity"].isna().all():
        print("no filter of conv4 fires: ablation.png is left out")
    else:
        figure = draw_ablation(table, pd.concat(hits), 1 / len(run.names))
        run.save_figure("ablation", figure, f"What mean ablation of a filter of conv4 costs\n{run.source}")
    return pd.concat([*costs, *hits, correlations]).assign(layer="conv4")


# ---------------------------------------------------------------- what a projection shows
#
# Insertion and deletion (Petsiuk et al. 2018, at single shares of the window instead of the area under the
# curve over all shares): do the pixels of a projection matter to its unit?
# Sanity check by weight randomisation (Adebayo et al. 2018, section 3.1): what of a projection was learned?
# Both look at one unit of each filter of conv4, in the unit's own window.


class Windows(NamedTuple):
    """Units of conv4 with the magnitudes of their projections in their windows, (units, rows, columns).

    There may be several units of a filter: `pick_units` chooses one, `pick_partners` another.
    """

    units: Units
    map_positions: Array  # row and column of each unit in the map before pooling, (units, 2)
    origin: Array  # row and column of the window's top left pixel in the image, (units, 2)
    inside: Array  # whether a pixel of the window lies inside the image; windows may cross the border
    magnitude: Array  # of the projection, float32
    profile: Array  # mean window profile (rows, columns)

    def select(self, indices: Array) -> "Windows":
        """Return the units at `indices`, with the same profile."""
        return Windows(
            units=self.units.select(indices),
            map_positions=self.map_positions[indices],
            origin=self.origin[indices],
            inside=self.inside[indices],
            magnitude=self.magnitude[indices],
            profile=self.profile,
        )


def crop_windows(frames: Array, origins: Array, size: int) -> Array:
    """Crop a window of `size` pixels at its origin out of each frame (units, rows, columns), 0 outside."""
    windows = np.zeros((len(frames), size, size), frames.dtype)
    for window, frame, (top, left) in zip(windows, frames, origins.tolist(), strict=True):
        window[:] = crop(frame[None], top, left, size, 0)[0]
    return windows


def to_frames(windows: Array, origins: Array) -> Array:
    """Put windows (units, rows, columns) into frames of the image's size, 0 elsewhere.

    Seen from the window's top left pixel the frame begins at minus the origin: the same crop with the roles
    exchanged.
    """
    return crop_windows(windows, -origins, IMAGE_SIZE)


def read_examples(path: Path, checkpoint: Checkpoint) -> Windows:
    """Read the top-9 examples of all filters of conv4 from projections.npz.

    Each example's magnitudes are scaled to the sum 1. The mean window profile is their mean at each pixel of
    the window, over the examples in which that pixel lies inside the image.
    """
    keys = [f"conv4_{key}" for key in ("image", "value", "position", "origin", "projection")]
    image, value, position, origin, projection = load_arrays(path, checkpoint, *keys)
    fires = image >= 0  # a filter that fires on fewer images leaves the rest empty
    filters, _ = np.nonzero(fires)
    row, column = position[fires].astype(np.int64).T
    origin = origin[fires].astype(np.int64)
    magnitude = np.abs(projection[fires]).sum(axis=1)

    whole = np.broadcast_to(True, (len(filters), IMAGE_SIZE, IMAGE_SIZE))
    inside = crop_windows(whole, origin, magnitude.shape[-1])
    shares = magnitude / magnitude.sum(axis=(1, 2), keepdims=True)
    return Windows(
        units=Units(image[fires].astype(np.int64), filters, row, column, value[fires]),
        map_positions=Projector(checkpoint.net, len(LAYERS) - 1).map_positions(origin),
        origin=origin,
        inside=inside,
        magnitude=magnitude,
        profile=shares.sum(axis=0) / inside.sum(axis=0).clip(min=1),
    )


def pick_units(filters: Array) -> Array:
    """Pick one example of each active filter at random, since examples of one filter are not independent.

    `filters` are the filters of the examples; the result are indices of examples, by rising filter.
    """
    shuffled = random_stream("examples").permutation(len(filters))
    _, first = np.unique(filters[shuffled], return_index=True)
    return np.asarray(shuffled[first])


def pick_partners(filters: Array, chosen: Array, draw: int, same_filter: bool) -> Array:
    """Pick at random for each of the `chosen` examples another example, of the same or of another filter.

    An example that has none is its own partner. `filters` and the result are as for `pick_units`.
    """
    rng = random_stream(f"partners {draw} {same_filter}")
    partners = []
    for example in chosen:
        is_same = filters == filters[example]
        others = np.flatnonzero(is_same if same_filter else ~is_same)
        others = others[others != example]
        partners.append(rng.choice(others) if len(others) else example)
    return np.array(partners, np.int64)


def project_elsewhere(run: Run, net: CNN, windows: Windows, units: Units, desc: str) -> Array:
    """Project other units, perhaps through another network, in the same windows; return magnitudes.

    The same window means that both projections start from the same position before pooling.
    """
    # the start is 1, because the activation can be 0 here; ranks do not depend on it
    ones = np.ones(len(units.image), np.float32)
    projections, _ = project_windows(
        Projector(net, len(LAYERS) - 1),
        run.test.images,
        units._replace(value=ones),
        desc,
        map_positions=windows.map_positions,
    )
    return np.asarray(np.abs(projections).sum(axis=1))


def pick_others(numbers: Array, count: int, rng: np.random.Generator) -> Array:
    """Pick for each number another one at random from 0 to count - 1, if there is another."""
    # steps of 1 to count - 1 never lead back to the number
    return (numbers + rng.integers(1, max(count, 2), len(numbers))) % count


# -------------------------------- insertion and deletion


def average_blocks(scores: Array, in_window: Array) -> Array:
    """Average scores over blocks of the frame, BLOCK x BLOCK pixels.

    So fine and coarse scores choose equally coarse pixels, and no method gains by its grain. A block counts
    with its pixels `in_window`. Both arrays, and the result, are frames (units, rows, columns).
    """
    starts = np.arange(0, IMAGE_SIZE, BLOCK)

    def sum_blocks(frames: Array) -> Array:  # (units, rows, columns) -> (units, blocks down, blocks across)
        return np.add.reduceat(np.add.reduceat(frames, starts, axis=1), starts, axis=2)

    counts = sum_blocks(in_window.astype(np.int64)).clip(min=1)
    means = sum_blocks(np.where(in_window, scores, 0)) / counts
    block = np.arange(IMAGE_SIZE) // BLOCK  # of each row or column
    return np.asarray(means[:, block[:, None], block])


def topk_mask(scores: Array, in_window: Array, share: float) -> Array:
    """Return which pixels are among the `share` of their window that score highest; ties in reading order.

    All arrays are (units, rows, columns); only pixels `in_window` are counted and chosen.
    """
    order = np.where(in_window, -scores, np.inf).reshape(len(scores), -1).argsort(axis=1, kind="stable")
    wanted = np.maximum(1, np.round(share * in_window.sum(axis=(1, 2))))
    mask = np.zeros(order.shape, np.bool_)
    np.put_along_axis(mask, order, np.arange(order.shape[1]) < wanted[:, None], axis=1)
    return mask.reshape(scores.shape)


def edge_strength(images: Tensor) -> Array:
    """Return how much each pixel differs from its neighbours, (images, 3, rows, columns) -> without the 3."""
    differences = torch.stack(torch.gradient(images, dim=(2, 3)))  # down and right, (2, images, 3, ...)
    return np.asarray(differences.abs().sum(dim=(0, 2)).cpu().numpy())


def nearness(size: int) -> Array:
    """Return how near each pixel of a window (size, size) is to its centre: minus the distance."""
    distance = np.arange(size) - (size - 1) / 2
    return np.asarray(-np.hypot(distance[:, None], distance))


def backpropagate_units(net: CNN, images: Tensor, units: Units, rule: str) -> Array:
    """Return the magnitudes of `deconv.backpropagate` for one unit of each image, (images, rows, columns)."""
    magnitudes = []
    for batch in np.split(np.arange(len(images)), range(BATCH, len(images), BATCH)):
        indices = (units.filter[batch], units.row[batch], units.column[batch])
        signed = backpropagate(net, images[batch], len(LAYERS) - 1, *indices, rule)
        magnitudes.append(signed.abs().sum(dim=1).cpu().numpy())
    return np.concatenate(magnitudes)


def score_pixels(run: Run, windows: Windows, other_filter: Array) -> dict[str, Array]:
    """Score the pixels of the frame for each unit, (units, rows, columns), by several methods.

    They are the projection; the magnitudes of two other rules of `deconv.backpropagate`; the image's edges
    times the mean window profile, which know no filter, and of the network only where in a window its
    projections are strong on average; the projection of another filter in the same window (magnitudes
    `other_filter`); nearness to the window's centre; and chance, a random number for each block. Scores
    outside a unit's window mean nothing.
    """
    units = windows.units
    count = len(units.image)
    images = run.net.normalise(torch.from_numpy(run.test.images[units.image]))

    def in_frames(window: Array) -> Array:  # the same window for all units
        return to_frames(np.tile(window, (count, 1, 1)), windows.origin)

    blocks = math.ceil(IMAGE_SIZE / BLOCK)
    chance = random_stream("chance").random((count, blocks, blocks))
    chance = chance.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)
    return {
        "projection": to_frames(windows.magnitude, windows.origin),
        "guided backpropagation": backpropagate_units(run.net, images, units, "guided"),
        "gradient": backpropagate_units(run.net, images, units, "gradient"),
        "edges x window profile": edge_strength(images) * in_frames(windows.profile),
        "other filter, same window": to_frames(other_filter, windows.origin),
        "centre": in_frames(nearness(len(windows.profile))),
        "chance": chance[:, :IMAGE_SIZE, :IMAGE_SIZE],
    }


def activate(net: CNN, images: Tensor, windows: Windows) -> Array:
    """Return the activation of each image's unit at the unit's own position before pooling.

    The pooled activation would not do: where the unit falls silent, a neighbour could take over.
    """
    filters = windows.units.filter
    row, column = windows.map_positions.T
    last = net.blocks[-1]
    activations = []
    for batch in np.split(np.arange(len(images)), range(BATCH, len(images), BATCH)):
        x = images[batch]
        for block in net.blocks[:-1]:
            x = block(x)
        maps = last.bn(last.conv(x))
        values = maps[np.arange(len(batch)), filters[batch], row[batch], column[batch]]
        activations.append(values.clamp(min=0).cpu().numpy())
    return np.concatenate(activations)


def mask_images(run: Run, windows: Windows, other_filter: Array, shares: Sequence[float]) -> pd.DataFrame:
    """Keep only the pixels of a window that score highest, or remove them; grey stands for the rest.

    Returns a row a unit, method and share: insertion and deletion, the activation of the unit in the masked
    image divided by its activation in the image; overlap, the share of the chosen pixels that the projection
    chooses, too.
    """
    images = run.net.normalise(torch.from_numpy(run.test.images[windows.units.image]))
    in_window = to_frames(windows.inside, windows.origin)
    scores = score_pixels(run, windows, other_filter)
    by_projection = {
        share: topk_mask(average_blocks(scores["projection"], in_window), in_window, share)
        for share in shares
    }
    tables = []
    for method in tqdm(scores, "insertion and deletion", unit=" methods", disable=None):
        averaged = average_blocks(scores[method], in_window)
        for share in shares:
            mask = topk_mask(averaged, in_window, share)
            common = (mask & by_projection[share]).sum(axis=(1, 2))
            kept = torch.from_numpy(mask)[:, None].to(images.device)
            columns = {
                "unit": np.arange(len(images)),
                "method": method,
                "share": share,
                "insertion": activate(run.net, images * kept, windows) / windows.units.value,
                "deletion": activate(run.net, images * ~kept, windows) / windows.units.value,
                "overlap": common / mask.sum(axis=(1, 2)),
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def tabulate_masks(masked: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of trust.csv for masked images: what is left, paired differences, and overlaps."""
    rows = []
    methods = masked["method"].unique()
    for test in ("insertion", "deletion", "overlap"):
        for share in masked["share"].unique():
            values = masked[masked["share"] == share].pivot(index="unit", columns="method", values=test)
            for method in methods if test != "overlap" else methods[methods != "projection"]:
                rows.append((test, share, method, *median(values[method].to_numpy())))
                if test != "overlap" and method != "projection":
                    differences = (values["projection"] - values[method]).to_numpy()
                    name = f"projection minus {method}"
                    rows.append((f"{test} difference", share, name, *median(differences)))
    table = pd.DataFrame(rows, columns=["test", "share", "condition", "median", "low", "high"])
    return table.assign(n=masked["unit"].nunique())


# -------------------------------- controls in the same window, and random weights


def randomise_weights(net: CNN, images: Array, draw: int) -> Iterator[tuple[str, CNN]]:
    """Yield ever more random copies of a network with their names: conv4 random, then conv4 and conv3, ...

    A layer has the same random weights in all copies. They are drawn on the CPU, so that every device has the
    same. Batch norm is measured anew with the training `images`.
    """
    for first in reversed(range(len(LAYERS))):
        random_net = copy.deepcopy(net).cpu()
        torch.manual_seed(SEED + 1 + draw)
        for block in reversed(random_net.blocks[first:]):
            block.conv.reset_parameters()
            block.bn.reset_parameters()
        name = "random conv4" if first == len(LAYERS) - 1 else f"random conv4 to {LAYERS[first]}"
        yield name, recalibrate_batch_norm(random_net.to(net.mean.device), first, images)


def pick_other_filters(windows: Windows, draw: int) -> Units:
    """Give each unit another filter that is active, but need not fire in that unit's image and window.

    `windows` holds one unit of each active filter. Value, row and column stay the unit's own;
    `project_elsewhere` replaces them.
    """
    units = windows.units
    count = len(units.filter)
    others = pick_others(np.arange(count), count, random_stream(f"other filters {draw}"))
    return units._replace(filter=units.filter[others])


def project_conditions(
    run: Run, windows: Windows, norm_images: Array, draw: int
) -> Iterator[tuple[str, Array]]:
    """Yield the names of the controls and of the random networks, with magnitudes in the same windows.

    The first is no projection but the image's own edges. They are the same in every draw, so only draw 0 has
    them.
    """
    units = windows.units
    if draw == 0:
        images = run.net.normalise(torch.from_numpy(run.test.images[units.image]))
        size = windows.magnitude.shape[-1]
        yield "edges of the image", crop_windows(edge_strength(images), windows.origin, size)

    other_filter = pick_other_filters(windows, draw)
    rng = random_stream(f"other images {draw}")
    other_image = pick_others(units.image, len(run.test.images), rng)
    controls = {
        "other filter, same window": other_filter,
        "same filter, other image": units._replace(image=other_image),
        "other filter, other image": other_filter._replace(image=other_image),
    }
    for name, others in controls.items():
        yield name, project_elsewhere(run, run.net, windows, others, f"draw {draw + 1}, {name}")
    for name, random_net in randomise_weights(run.net, norm_images, draw):
        yield name, project_elsewhere(run, random_net, windows, units, f"draw {draw + 1}, {name}")


def rank_pixels(magnitudes: Array, inside: Array) -> Array:
    """Rank the pixels of each window that are `inside` the image, (units, rows, columns) -> (units, pixels).

    Pixels outside have no rank (nan).
    """
    known = np.where(inside, magnitudes, np.nan)
    return rank_rows(known.reshape(len(known), -1))


def compare_projections(run: Run, windows: Windows, norm_images: Array) -> pd.DataFrame:
    """Compare the magnitudes of the units' projections with others in the same windows.

    Returns a row a unit, condition and draw: the partial rank correlation (Spearman's) given the mean window
    profile, because all projections are strong in the middle of their window.
    """
    inside = windows.inside
    ranks = rank_pixels(windows.magnitude, inside)
    profile = rank_pixels(np.broadcast_to(windows.profile, inside.shape), inside)
    tables = []
    for draw in range(RANDOM_DRAWS):
        for condition, magnitudes in project_conditions(run, windows, norm_images, draw):
            columns = {
                "unit": np.arange(len(ranks)),
                "condition": condition,
                "draw": draw,
                "partial": correlate_given(ranks, rank_pixels(magnitudes, inside), profile),
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def compare_examples(examples: Windows, chosen: Array) -> pd.DataFrame:
    """Compare magnitudes of the `chosen` examples with other top-9 examples, of the same or other filters.

    This is stricter than another image drawn at random, on which the filter may not even fire: both units
    fire strongly, each in the window of its own. The pixels that are inside the image in both are compared,
    pixel by pixel: the same pattern a few pixels further counts as another one. An example without a partner
    is left out. The rows are as in `compare_projections`.
    """
    conditions = {"same filter, other top-9 example": True, "other filter, its top-9 example": False}
    tables = []
    for draw in range(RANDOM_DRAWS):
        for condition, same_filter in conditions.items():
            partners = pick_partners(examples.units.filter, chosen, draw, same_filter)
            compared = np.flatnonzero(partners != chosen)
            windows = examples.select(chosen[compared])
            others = examples.select(partners[compared])
            inside = windows.inside & others.inside

            ranks = rank_pixels(windows.magnitude, inside)
            other_ranks = rank_pixels(others.magnitude, inside)
            profile = rank_pixels(np.broadcast_to(examples.profile, inside.shape), inside)
            columns = {
                "unit": compared,
                "condition": condition,
                "draw": draw,
                "partial": correlate_given(ranks, other_ranks, profile),
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def tabulate_likeness(compared: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of trust.csv for the correlations; each unit counts with its mean over the draws."""
    rows = []
    for condition in compared["condition"].unique():
        chosen = compared[compared["condition"] == condition]
        values = chosen.pivot(index="unit", columns="draw", values="partial")
        means = values.mean(axis=1)
        draws = values.median()
        rows.append((condition, *median(means.to_numpy()), draws.min(), draws.max(), means.count()))
    columns = ["condition", "median", "low", "high", "lowest_draw", "highest_draw", "n"]
    return pd.DataFrame(rows, columns=columns).assign(test="partial rank correlation")


# -------------------------------- one table and one figure of both


def percentage(share: float) -> str:
    """Return a share as texts write it: `25 %`."""
    return f"{100 * share:g} %"


def draw_trust(trust: pd.DataFrame) -> Figure:
    """Draw trust.csv: what is left of activations in masked images; how alike projections are."""
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
    titles = {"insertion": "insertion: only these pixels kept", "deletion": "deletion: these pixels removed"}
    for ax, (test, title) in zip(axes, titles.items(), strict=False):
        rows = to_percent(trust[trust["test"] == test])
        rows = rows.assign(share=rows["share"].map(percentage))
        draw_intervals(ax, rows, "condition", "share", horizontal=True)
        ax.set_title(title, fontsize=9)
        ax.set(xlabel="activation left (%)", xlim=(-3, None))  # a marker at 0 is whole
    axes[1].set_yticklabels([])
    handles, labels = axes[0].get_legend_handles_labels()
    shares = [f"{label} of the window" for label in labels]
    fig.legend(handles, shares, loc="outside lower left", ncols=len(shares), frameon=False)

    likeness = trust[trust["test"] == "partial rank correlation"]
    draw_intervals(axes[2], likeness, "condition", horizontal=True)
    axes[2].axvline(0, color="0.5", linestyle=":", linewidth=1)
    axes[2].set_title("likeness to the unit's projection", fontsize=9)
    axes[2].set(xlabel="partial rank correlation", xlim=(None, 1))
    return fig


def describe_trust(trust: pd.DataFrame) -> str:
    """Return trust.csv as two small tables: insertion and deletion, and likeness."""
    masked = to_percent(trust[trust["test"].isin(["insertion", "deletion"])])
    masked["label"] = masked["test"] + " " + masked["share"].map(percentage)
    left = masked.pivot(index="condition", columns="label", values="median")
    left = left.loc[masked["condition"].unique(), masked["label"].unique()]
    likeness = trust[trust["test"] == "partial rank correlation"].set_index("condition")
    likeness = likeness[["median", "low", "high", "lowest_draw", "highest_draw"]]
    return (
        f"activation left in masked images (%), medians over {masked['n'].max()} units of conv4\n"
        f"{left.rename_axis(index=None, columns=None).to_string(float_format='{:.0f}'.format)}\n"
        "partial rank correlation with the unit's own projection\n"
        f"{likeness.rename_axis(index=None).to_string(float_format='{:.2f}'.format)}"
    )


def summarise_trust(trust: pd.DataFrame) -> pd.DataFrame:
    """Return the medians of trust.csv as rows of summary.csv; shares of an activation are in %."""
    is_share = trust["share"].notna()
    shares = to_percent(trust[is_share])
    window_part = ", " + shares["share"].map(percentage) + " of the window: "
    shares = shares.assign(
        name=shares["test"] + window_part + shares["condition"],
        unit=np.where(shares["test"].str.endswith("difference"), "points", "%"),
    )
    correlations = trust[~is_share]
    name = correlations["test"] + " with the unit's projection: " + correlations["condition"]
    rows = pd.concat([shares, correlations.assign(name=name, unit="rho")])
    return rows.assign(layer="conv4", value=rows["median"])


def run_trust(run: Run, examples: Windows, norm_images: Array, shares: Sequence[float]) -> pd.DataFrame:
    """Mask images and compare projections; write trust.csv and its figure, return rows of summary.csv.

    test: insertion, deletion; insertion difference, deletion difference, which are paired; overlap, the share
        of a method's pixels that the projection chooses, too; or partial rank correlation.
    share: How much of the window is kept or removed; empty for correlations.
    condition: What chose the pixels; or what the unit's projection is compared with.
    median, low, high: Over units, with a 95 % bootstrap interval over units.
    lowest_draw, highest_draw: The smallest and the largest median of the `RANDOM_DRAWS` draws.
    n: Number of units.
    """
    columns = ["test", "share", "condition", "median", "low", "high", "lowest_draw", "highest_draw", "n"]
    if not len(examples.inside):
        print("no filter of conv4 fires: trust.csv has no rows, trust.png is left out")
        run.save_table("trust", pd.DataFrame(columns=columns))
        return pd.DataFrame()

    print("masking images, and comparing projections with controls", flush=True)
    chosen = pick_units(examples.units.filter)
    windows = examples.select(chosen)
    others = pick_other_filters(windows, draw=0)
    other_filter = project_elsewhere(run, run.net, windows, others, "other filters, same windows")
    masks = tabulate_masks(mask_images(run, windows, other_filter, shares))
    compared = [compare_examples(examples, chosen), compare_projections(run, windows, norm_images)]
    likeness = tabulate_likeness(pd.concat(compared))
    trust = pd.concat([masks, likeness], ignore_index=True)[columns]
    run.save_table("trust", trust)
    title = (
        "Do projections of conv4 show what drives a unit, and what was learned?\n"
        f"medians over {len(windows.inside)} units, one of each active filter, with 95 % intervals; "
        f"{TITLES[run.checkpoint.dataset]}, {run.checkpoint.accuracy()}"
    )
    run.save_figure("trust", draw_trust(trust), title)
    print(describe_trust(trust))
    return summarise_trust(trust)


# ---------------------------------------------------------------- summary, and comparison with other runs

SUMMARY = ["name", "layer", "value", "low", "high", "unit", "n"]  # columns of summary.csv
# decimals of numbers in texts, by unit
DECIMALS = {"%": 1, "points": 1, "nats": 4, "filters": 0, "epochs": 0, "rho": 2, "": 3}


def summarise_network(run: Run, accuracy: Interval) -> pd.DataFrame:
    """Return rows of summary.csv: epochs; test accuracy, alone and averaged over image and mirror image.

    train_CNN.py has measured the average; it is left out if that was on other images.
    """
    count = len(run.test.labels)
    rows = [("test accuracy", *accuracy)]
    metrics = run.checkpoint.metrics
    if metrics["split"] == "test" and "accuracy_mirrored" in metrics:
        averaged = wilson(round(metrics["accuracy_mirrored"] * count), count)
        rows.append(("test accuracy, averaged over the image and its mirror image", *averaged))
    table = pd.DataFrame(rows, columns=["name", *Interval._fields])
    accuracies = to_percent(table.assign(unit="%", n=count))
    epochs = pd.DataFrame({"name": ["epochs of training"], "value": run.checkpoint.epochs, "unit": "epochs"})
    return pd.concat([epochs, accuracies]).assign(layer="")


def read_summary(folder: str | Path) -> pd.DataFrame:
    """Read summary.csv of another run, with its data set, from its folder of outputs.

    Raises:
        SystemExit: If there is none, or it is damaged.
    """
    path = Path(folder).expanduser() / "summary.csv"
    hint = f"COMPARE_WITH names {str(folder)!r}, which must hold the outputs of analyse_projections.py"
    if not path.is_file():
        raise SystemExit(f"{path.absolute()} not found: {hint}")
    try:
        numbers = ["value", "low", "high"]
        table = pd.read_csv(path, keep_default_na=False, na_values={column: [""] for column in numbers})
        return table[["dataset", *SUMMARY]].astype(dict.fromkeys(numbers, float))
    except (ValueError, KeyError) as error:  # ValueError includes pandas' parser and Unicode errors
        reason = type(error).__name__
        raise SystemExit(f"{path} is damaged or not of this project ({reason}): {hint}") from None


def format_value(value: float, low: float, high: float, unit: str) -> str:
    """Return a value with its interval as texts show it: `0.25 (0.24 to 0.26)`; nothing for nan."""
    if math.isnan(value):
        return ""
    decimals = DECIMALS[unit]

    def write(number: float) -> str:
        return f"{round(number, decimals) + 0:.{decimals}f}"  # + 0: no -0.0

    return write(value) if math.isnan(low) else f"{write(value)} ({write(low)} to {write(high)})"


def describe_summary(summary: pd.DataFrame) -> str:
    """Return the values of rows of summary.csv as a small table: a row a quantity, a column a layer."""
    values = zip(summary["value"], summary["unit"], strict=True)
    cells = [format_value(value, math.nan, math.nan, unit) for value, unit in values]
    table = summary.assign(cell=cells).pivot(index=["name", "unit"], columns="layer", values="cell")
    table = table.loc[summary["name"].unique()].fillna("").reset_index()
    width = table["name"].str.len().max()
    table["name"] = table["name"].str.ljust(width)
    return str(table.rename(columns={"name": " " * width, "": "network"}).to_string(index=False))


def compare_runs(summaries: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return comparison.csv: a row a quantity, a column a run, `value (low to high)` as text.

    name, layer, unit: As in summary.csv. A quantity that a run lacks is empty.
    apart: "yes" if the interval of another run does not overlap the interval of the first one.
    """
    indexed = {name: table.set_index(["name", "layer", "unit"]) for name, table in summaries.items()}
    columns = []
    for run_name, summary in summaries.items():
        rows = summary[["value", "low", "high", "unit"]].itertuples(index=False)
        columns.append(
            pd.Series([format_value(*row) for row in rows], indexed[run_name].index, name=run_name)
        )
    comparison = pd.concat(columns, axis=1, sort=False).fillna("")

    first, *others = (table[["low", "high"]].reindex(comparison.index) for table in indexed.values())
    is_apart = pd.Series(False, comparison.index)
    for other in others:
        is_apart |= (other["low"] > first["high"]) | (other["high"] < first["low"])
    return comparison.assign(apart=np.where(is_apart, "yes", "")).reset_index()


def describe_comparison(comparison: pd.DataFrame) -> str:
    """Return the rows of comparison.csv on the network as a whole, and those whose intervals lie apart."""
    shown = comparison[(comparison["layer"] == "") | (comparison["apart"] == "yes")]
    return (
        "runs side by side: the network, and quantities whose intervals do not overlap; all: comparison.csv\n"
        f"{shown.drop(columns='apart').to_string(index=False)}"
    )


def main() -> None:
    """Measure filters and projections; write the tables and figures, and one summary of all."""
    set_style()
    if not all(0 < share < 1 for share in MASKED_SHARES):
        raise SystemExit(
            f"MASKED_SHARES is {MASKED_SHARES}; allowed are numbers between 0 and 1: 0.1 is 10 %"
        )
    summaries = {str(folder): read_summary(folder) for folder in COMPARE_WITH}
    checkpoint = load_checkpoint(CHECKPOINT, choose_device(DEVICE))
    for folder, other in summaries.items():
        if (other["dataset"] != checkpoint.dataset).any():
            print(f"{folder} is of another data set: {other['dataset'].iloc[0]}, not {checkpoint.dataset}")
    start = load_start(CHECKPOINT, checkpoint)
    peaks = read_peaks(OUTPUTS / "activations.npz", checkpoint)
    projections = read_statistics(OUTPUTS / "projection_statistics.npz", checkpoint)
    examples = read_examples(OUTPUTS / "projections.npz", checkpoint)
    (conv4_images,) = load_arrays(OUTPUTS / "projections.npz", checkpoint, "conv4_image")  # (filters, N_TOP)
    train = load_checkpoint_split(checkpoint, DATA_DIR, "train")
    test = load_checkpoint_split(checkpoint, DATA_DIR, "test")
    source = f"{TITLES[checkpoint.dataset]}, {len(test.labels):,} test images, {checkpoint.accuracy()}"
    run = Run(checkpoint, train, test, source, OUTPUTS)
    print(f"analysing {source}, on {run.net.mean.device}, torch {torch.__version__}")

    # one pass of each network over each split; then its tables and probes
    n_top = conv4_images.shape[1]
    norm_images = pick_norm_images(train)
    trained = measure_network(run, run.net, "trained", n_top, peaks)
    untrained = measure_network(run, recalibrate_batch_norm(start, 0, norm_images), "untrained", n_top)

    # the experiments
    accuracy = measure_accuracy(own_classifier(run.net), trained.test_inputs, test.labels)
    parts = [
        summarise_network(run, accuracy),
        run_filters(run, trained.tables, projections),
        run_specialisation(run, trained.tables.filters, untrained.tables.filters),
        run_probes(run, pd.concat([trained.probes, untrained.probes]), accuracy.value),
        run_ablation(run, trained, untrained),
    ]
    print(describe_summary(pd.concat(parts)))
    parts.append(run_trust(run, examples, norm_images, MASKED_SHARES))

    summary = pd.concat(parts, ignore_index=True)[SUMMARY]
    run.save_table("summary", summary)
    if summaries:
        comparison = compare_runs({str(OUTPUTS): summary} | summaries)
        run.save_table("comparison", comparison)
        print(describe_comparison(comparison))
    print(f"wrote summary and other tables, and figures, to {OUTPUTS}/")
    print("next: uv run heatmap.py")


if __name__ == "__main__":
    run_script(main)
