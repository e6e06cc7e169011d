"""Measure every filter: how often it fires, which class it prefers, how strongly, what it is needed for.

Run:    uv run analyse_projections.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_000.pth, outputs/activations.npz,
        outputs/projection_statistics.npz, outputs/projections.npz, data/stl10_binary/{train,test}_{X,y}.bin
Writes: outputs/filter_metrics.csv, outputs/class_metrics.csv, outputs/filter_metrics_untrained.csv,
        outputs/specialisation.csv, outputs/specialisation.png,
        outputs/ablation.csv, outputs/ablation_summary.csv, outputs/ablation.png,
        outputs/trust.csv, outputs/trust.png, outputs/probes.csv, outputs/probes.png

Classes are compared by peak activations: the largest value of a filter's map in an image. The non-zero pixels
of a projection mostly measure the size of the receptive field and how much of it the border cuts off.

Four experiments follow, each in a section of its own: its numbers, its table, its figure.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from CNN import CNN, IMAGE_SIZE, LAYERS, Checkpoint, choose_device, load_checkpoint, run_script
from deconv import backpropagate, crop
from deconv_full import Arrays, Projector, Units, measure_activations, project_windows, top_images
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
)

OUTPUTS = Path("outputs")  # where results go
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"

# how the experiments are done
RESAMPLINGS = 1000  # bootstrap samples behind an interval
SEED = 0  # decides everything that is drawn at random here
NEARLY_DEAD = 0.01  # an active filter is nearly dead if it fires on a smaller share of the test images
NORM_IMAGES = 1_000  # training images that give batch norm of new weights its means and variances
PROBE_INPUTS = 1_024  # at most so many numbers of each of conv1 to conv3 go into its linear probe
PROBE_DECAYS = (0.001, 0.01, 0.1)  # weight decays to choose from
KEPT_SHARE = 0.25  # share of a window's pixels that is kept, or removed, to see what an activation needs
RANDOM_DRAWS = 3  # networks with random weights
BLUR = 2.0  # pixels, standard deviation of the Gaussian that blurs the edges
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
    source: str  # what figures say of the data set, the images and the accuracy
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
        """Write a figure as NAME.png, its source below the title."""
        figure.suptitle(f"{title}\n{self.source}", fontsize=9)
        save_figure(self.outputs / f"{name}.png", figure, quiet=True)


# ---------------------------------------------------------------- intervals, correlation, classes


class Interval(NamedTuple):
    """A value with the limits of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[[Array], Any], count: int) -> Interval:
    """Return statistic(indices) of all `count` items, with its 95 % percentile interval over resamplings."""
    rng = np.random.default_rng(SEED)
    samples = [statistic(rng.integers(count, size=count)) for _ in range(RESAMPLINGS)]
    low, high = np.nanpercentile(samples, (2.5, 97.5))
    return Interval(float(statistic(np.arange(count))), float(low), float(high))


def median(values: Array) -> Interval:
    """Return the median of the values that are not nan, with its bootstrap interval."""
    known = values[~np.isnan(values)]
    return bootstrap(lambda indices: np.median(known[indices]), len(known))


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


def rank_correlation(x: Array, y: Array) -> float:
    """Return Spearman's rank correlation of two arrays of one shape; pairs with a nan are left out."""
    pairs = pd.DataFrame({"x": x.ravel(), "y": y.ravel()})
    return float(pairs.corr("spearman").to_numpy()[0, 1])


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


def draw_intervals(ax: Axes, table: pd.DataFrame, x: str, series: str, line: str = "none") -> None:
    """Draw the columns median, low and high: a position for each value of `x`, a marker for each series."""
    positions = {name: position for position, name in enumerate(table[x].unique())}
    groups = list(table.groupby(series, sort=False))
    for number, (name, rows) in enumerate(groups):
        shift = 0.14 * (number - (len(groups) - 1) / 2)  # side by side
        ax.errorbar(
            x=rows[x].map(positions) + shift,
            y=rows["median"],
            yerr=[rows["median"] - rows["low"], rows["high"] - rows["median"]],
            label=str(name),
            linestyle=line,
            linewidth=1.2,
            marker="osD^"[number],
            markersize=4,
            capsize=2,
        )
    ax.set_xticks(range(len(positions)), list(positions))
    sns.despine(ax=ax)


# ---------------------------------------------------------------- how filters are used


class Tables(NamedTuple):
    """One row a filter, and one row a filter and class."""

    filters: pd.DataFrame
    classes: pd.DataFrame


def area_under_roc(values: Array, is_member: Array) -> Array:
    """Return how probably each filter fires more on an image of its class than on one of another class.

    This is the area under the receiver operating characteristic, from ranks (Mann-Whitney); a tie counts
    half. Gale et al. 2020 (arXiv 2007.01062) ask for it beside selectivity, which one strong image can carry.
    `values` and `is_member`, whether an image is of the filter's class, are (images, filters).
    """
    ranks = pd.DataFrame(values).rank().to_numpy()
    inside = is_member.sum(axis=0)
    outside = len(values) - inside
    pairs_won = (ranks * is_member).sum(axis=0) - inside * (inside + 1) / 2
    return np.asarray(pairs_won / (inside * outside))


def count_classes(images: Array, labels: Array, class_count: int) -> Array:
    """Count the classes among each filter's images, (filters, n), -1 for none; return (classes, filters)."""
    votes = np.zeros((class_count, len(images)))
    filters, _ = np.nonzero(images >= 0)
    np.add.at(votes, (labels[images[images >= 0]], filters), 1)
    return votes


def tabulate_filters(layer: str, peaks: Array, samples: Array, run: Run) -> pd.DataFrame:
    """Return one layer's rows of filter_metrics.csv from its peak activations, see `tabulate`.

    `peaks` are (images, filters), `samples` is what `bootstrap_means` makes of them.
    """
    names = np.array(run.names)
    labels = run.test.labels
    numbers = np.arange(peaks.shape[1])
    dead = (peaks == 0).all(axis=0)

    means = reduce_by_class(np.mean, peaks, labels, len(names))  # (classes, filters)
    preferred, runner_up = np.argsort(-means, axis=0, kind="stable")[:2]
    votes = count_classes(top_images(peaks, 9), labels, len(names))
    votes[preferred, numbers] += 0.5  # a tie goes to the preferred class
    selectivity = class_selectivity(means).max(axis=0)
    resampled = class_selectivity(samples)[:, preferred, numbers]  # (samples, filters)
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)

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
            "preferred_share": (samples.argmax(axis=1) == preferred).mean(axis=0),
            "selectivity": selectivity,
            "selectivity_low": low,
            "selectivity_high": high,
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


def tabulate(peaks: Mapping[str, Array], run: Run) -> Tables:
    """Describe every filter of every layer by its peak activations in the test images.

    Args:
        peaks: Peak activations (images, filters) of conv1 to conv4, by layer.
        run: Names the classes and labels the images.

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
            top_class: The most frequent class of its top-9 examples; a tie goes to the preferred class.
            preferred_share: Share of bootstrap samples in which the preferred class comes first.
            selectivity: See `class_selectivity`, for the preferred class.
            selectivity_low, selectivity_high: Limits of its 95 % bootstrap interval over images.
            auc: See `area_under_roc`, for the preferred class.

        One row a filter and class:
            layer, filter, class: The filter, and the name of the class.
            activation_mean: Mean of the filter's peak activations over the images of the class.
            activation_low, activation_high: Limits of its 95 % bootstrap interval over images.
    """
    filter_tables = []
    class_tables = []
    for layer in LAYERS:
        values = peaks[layer].astype(np.float64)
        samples = bootstrap_means(values, run.test.labels)
        filter_tables.append(tabulate_filters(layer, values, samples, run))
        class_tables.append(tabulate_classes(layer, values, samples, run))
    return Tables(pd.concat(filter_tables, ignore_index=True), pd.concat(class_tables, ignore_index=True))


def tabulate_projections(statistics: Mapping[str, Array], labels: Array, names: Sequence[str]) -> Tables:
    """Reduce the statistics of conv4's projections, (images, filters) each, to filters and to classes.

    `labels` are those of the projected images. Each of `STATISTICS` has a column of its name: the mean over
    the images of the mean, the variance and the count of non-zero pixels; of the maximum the largest.
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


def class_means(classes: pd.DataFrame) -> Array:
    """Return conv4's mean peak activations (classes, filters) from class_metrics.csv."""
    rows = classes[classes["layer"] == "conv4"]
    return rows["activation_mean"].to_numpy().reshape(-1, rows["class"].nunique()).T


def describe_layers(filters: pd.DataFrame) -> str:
    """Return a table of the layers: dead filters, medians over the active ones, how sure preferences are."""
    active = filters[~filters["dead"]]
    by_layer = active.groupby("layer")
    uncertain = active["preferred_share"] < 0.9
    disagrees = active["preferred_class"] != active["top_class"]
    table = pd.DataFrame(
        {
            "filters": filters.groupby("layer").size(),
            "dead": filters.groupby("layer")["dead"].sum(),
            "fires on": by_layer["activation_nonzero"].median(),
            "selectivity": by_layer["selectivity"].median(),
            "AUC": by_layer["auc"].median(),
            "uncertain": uncertain.groupby(active["layer"]).sum(),
            "top-9 differ": disagrees.groupby(active["layer"]).sum(),
        }
    )
    return (
        f"{table.round(3).rename_axis(None).to_string()}\n"
        "fires on: share of the test images; it, selectivity and AUC are medians over active filters\n"
        "uncertain: filters that prefer another class in more than 10 % of the bootstrap samples\n"
        "top-9 differ: filters whose top-9 examples are most often of another class than the preferred one"
    )


# ---------------------------------------------------------------- how much of the specialisation was learned


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


def recalibrate_batch_norm(net: CNN, first: int, images: Array) -> CNN:
    """Measure batch norm's means and variances anew, in block `first` (0 for conv1) and all blocks above.

    Batch norm of a trained network holds the statistics of its own maps. With other weights in the blocks
    below they would not fit, and activations would be off scale. Each is the average over batches of 100 of
    the training `images`.
    """
    for block in net.blocks[first:]:
        block.train()
        block.bn.momentum = None  # average all batches alike; by default the last ones count most
    for batch in torch.from_numpy(images).split(100):
        net.features(net.normalise(batch))
    return net.eval()


def compare_networks(trained: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """Return specialisation.csv: medians over the active filters of both networks, and of what was learned.

    The tables are filter_metrics.csv of the networks. "learned" is the difference trained - untrained of the
    filters that are active in both. The untrained network is no blank: edges and colours that its random
    filters see differ between classes, too. Layers are not to be compared with each other, since the largest
    of 576 values in conv1 and of 9 in conv4 are different quantities.
    """
    rows = []
    for metric in ("selectivity", "auc"):
        values = pd.DataFrame({"trained": trained[metric], "untrained": untrained[metric]}, dtype=np.float64)
        values["learned"] = values["trained"] - values["untrained"]
        for layer in LAYERS:
            layer_values = values[trained["layer"] == layer]
            rows += [(metric, layer, name, *median(layer_values[name].to_numpy())) for name in values]
    return pd.DataFrame(rows, columns=["metric", "layer", "network", "median", "low", "high"])


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

    axes[0, 0].set_ylim(0, 1.1 * table.loc[table["metric"] == "selectivity", "high"].max())
    axes[0, 1].set_ylim(0.5, None)  # chance
    axes[0, 0].set_ylabel("median over filters")
    axes[1, 0].set_ylabel("trained - untrained,\nmedian over filters")
    axes[0, 0].legend(title="network; 95 % interval\nover filters", frameon=False, loc="upper left")
    return fig


# ---------------------------------------------------------------- linear probes (Table 7 of the paper)


def pool_features(net: CNN, images: Array, desc: str) -> dict[str, Tensor]:
    """Average the pooled maps of a network over regions; return the probes' inputs (images, inputs) by layer.

    conv4 is averaged as the classifier sees it. The other layers are averaged over side x side regions, with
    the largest side that divides the map and gives at most PROBE_INPUTS inputs.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for batch in tqdm(torch.from_numpy(images).split(50), desc, unit=" batches", disable=None):
        for layer, (pooled, _) in zip(LAYERS, net.features(net.normalise(batch)), strict=True):
            regions = net.average(pooled) if layer == "conv4" else average_regions(pooled)
            parts[layer].append(regions.flatten(1))
    return {layer: torch.cat(batches) for layer, batches in parts.items()}


def average_regions(pooled: Tensor) -> Tensor:
    """Average maps (images, filters, rows, columns) over as many regions as PROBE_INPUTS allows."""
    filters, height = pooled.shape[1:3]
    sides = [side for side in range(1, height + 1) if height % side == 0]
    allowed = [side for side in sides if side**2 * filters <= PROBE_INPUTS]
    return F.adaptive_avg_pool2d(pooled, max(allowed, default=1))


def probe(fit: Tensor, labels: Tensor, decay: float, on: Tensor) -> Tensor:
    """Fit a logistic regression to the features `fit` of labelled images; return its classes for `on`.

    Features are (images, inputs), standardised by the mean and deviation of `fit`. The loss is the mean
    cross-entropy plus decay / 2 times the sum of squared weights: a convex problem, which L-BFGS solves from
    zero.
    """
    centre = fit.mean(dim=0)
    deviation = fit.std(dim=0, correction=0)
    scale = deviation.where(deviation > 0, 1)
    fit = (fit - centre) / scale
    on = (on - centre) / scale

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


def choose_decay(features: Tensor, labels: Tensor) -> float:
    """Return the decay whose probe is right most often on a fifth of the training images, held out for it."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(SEED))
    held_out = order[: len(order) // 5]
    rest = order[len(order) // 5 :]
    correct = []
    for decay in PROBE_DECAYS:
        predicted = probe(features[rest], labels[rest], decay, features[held_out])
        correct.append((predicted == labels[held_out]).sum().item())
    return PROBE_DECAYS[int(np.argmax(correct))]


def probe_layers(run: Run, network: str, features: Sequence[Mapping[str, Tensor]]) -> pd.DataFrame:
    """Return rows of probes.csv, one a layer, from `pool_features` of the training and of the test images.

    The decay is chosen on the training images alone, and the probe is then fitted to all of them.
    """
    device = run.net.mean.device
    train_labels = torch.from_numpy(run.train.labels).to(device)
    test_labels = torch.from_numpy(run.test.labels).to(device)
    rows = []
    for layer in tqdm(LAYERS, f"probes, {network} network", unit=" layers", disable=None):
        train, test = (split_features[layer] for split_features in features)
        decay = choose_decay(train, train_labels)
        correct = (probe(train, train_labels, decay, test) == test_labels).cpu().numpy()
        accuracy = correct.mean()
        error = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test))  # normal interval
        rows.append((layer, network, accuracy, accuracy - error, accuracy + error, train.shape[1], decay))
    return pd.DataFrame(rows, columns=["layer", "network", "accuracy", "low", "high", "inputs", "decay"])


def describe_probes(probes: pd.DataFrame, accuracy: float) -> str:
    """Return a table of the probes' accuracies; `accuracy` is that of the network itself."""
    table = probes.pivot(index="network", columns="layer", values="accuracy").rename_axis(None)
    table.loc["trained", "classifier"] = accuracy
    shown = table.rename_axis(None, axis=1).to_string(float_format="{:.1%}".format, na_rep="")
    return f"test accuracy of linear probes, beside the network's own classifier\n{shown}"


def draw_probes(probes: pd.DataFrame, accuracy: float, chance: float) -> Figure:
    """Draw the accuracy of the probes of each layer, trained and untrained, with 95 % intervals.

    `accuracy` is the network's own, `chance` that of guessing.
    """
    fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    percent = 100 * probes[["accuracy", "low", "high"]].rename(columns={"accuracy": "median"})
    draw_intervals(ax, probes[["layer", "network"]].join(percent), "layer", "network", "-")
    for label, share in (("the network itself", accuracy), ("chance", chance)):
        ax.axhline(100 * share, color="0.3", linestyle=":", linewidth=1)
        ax.annotate(label, (0, 100 * share), xytext=(-12, 3), textcoords="offset points", fontsize=8)

    inputs = probes["inputs"][: len(LAYERS)]
    ax.set_xticks(
        range(4), [f"{layer}\n{count:,} inputs" for layer, count in zip(LAYERS, inputs, strict=True)]
    )
    ax.set(ylabel="test accuracy of a\nlogistic regression (%)", ylim=(0, 100))
    ax.legend(title="features of the network", frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    return fig


# ---------------------------------------------------------------- ablation: what filters are needed for


class LogitParts(NamedTuple):
    """Logits split into what each filter of conv4 says of an image, and a base that is alike for all images.

    Behind conv4 come an average and a linear layer, nothing else, so logits = parts.sum(0) + base is exact,
    and ablating a filter takes its part away.
    """

    parts: Tensor  # (filters, images, classes)
    base: Tensor  # (classes,)


def split_logits(net: CNN, inputs: Tensor, means: Tensor) -> LogitParts:
    """Split the logits by filters of conv4.

    `inputs` (images, filters * regions) is what the classifier sees, `means` (filters * regions,) its mean
    over the training images. A part holds what a filter says beyond its mean: mean ablation leaves the mean.
    """
    # (classes, filters * regions) -> (classes, filters, regions)
    weights = net.classifier.weight.unflatten(1, (net.config["filters"][-1], -1))
    deviations = (inputs - means).unflatten(1, weights.shape[1:])  # (images, filters, regions)
    parts = torch.einsum("nfr,cfr->fnc", deviations, weights)
    return LogitParts(parts, net.classifier(means))


def measure_loss_increase(logits: LogitParts, labels: Tensor) -> Array:
    """Return the rise of each image's cross-entropy by the ablation of each filter, (images, filters), nats.

    Accuracy would be too coarse for a single filter: it counts the few images that tip over.
    """
    intact = logits.parts.sum(dim=0) + logits.base
    loss = F.cross_entropy(intact, labels, reduction="none")
    loss_without = [F.cross_entropy(intact - part, labels, reduction="none") for part in logits.parts]
    increase = torch.stack(loss_without, dim=1) - loss[:, None]
    return np.asarray(increase.cpu().numpy())


def measure_contributions(logits: LogitParts, labels: Tensor) -> Array:
    """Return each filter's part in the logit of each image's own class, (images, filters)."""
    images = torch.arange(len(labels))
    return np.asarray(logits.parts[:, images, labels].T.cpu().numpy())


def tabulate_ablation(increase: Array, contributions: Array, selectivity: Array, run: Run) -> pd.DataFrame:
    """Return ablation.csv: a row a filter and class, and after the classes a row for all of them together.

    filter, class: The filter of conv4; the name of the class, or "all".
    selectivity: See `class_selectivity`; empty for a dead filter, and for all classes.
    contribution: Mean of the filter's part in the logit of the class, over the class's test images.
    loss_increase: Mean rise of the cross-entropy by mean ablation, over the class's (or all) test images.

    `increase` and `contributions` are (images, filters), `selectivity` is (classes, filters).
    """
    numbers = np.arange(increase.shape[1])
    classes = len(run.names)
    class_rows = pd.DataFrame(
        {
            "filter": numbers.repeat(classes),
            "class": run.names * len(numbers),
            "selectivity": selectivity.T.ravel(),
            "contribution": reduce_by_class(np.mean, contributions, run.test.labels, classes).T.ravel(),
            "loss_increase": reduce_by_class(np.mean, increase, run.test.labels, classes).T.ravel(),
        }
    )
    overall_rows = pd.DataFrame({"filter": numbers, "class": "all", "loss_increase": increase.mean(axis=0)})
    return pd.concat([class_rows, overall_rows]).sort_values("filter", kind="stable", ignore_index=True)


def summarise_ablation(
    increase: Array,
    class_predictors: Mapping[str, Array],
    overall_predictors: Mapping[str, Array],
    labels: Array,
) -> pd.DataFrame:
    """Return ablation_summary.csv: mean loss increases and what predicts them, value and 95 % interval.

    The interval is over images for a mean loss increase, over filters for the rest. `class_predictors`
    (classes, filters) predict the loss increase of a class, `overall_predictors` (filters,) the mean over all
    images. A filter's preferred class is kept apart from the others, or ranks would mix what the filter
    drives with what it avoids. `increase` is (images, filters).
    """
    class_count = labels.max() + 1
    active = ~np.isnan(class_predictors["selectivity"]).any(axis=0)
    increase = increase[:, active]
    means = reduce_by_class(np.mean, increase, labels, class_count)  # (classes, filters)
    samples = bootstrap_means(increase, labels)
    preferred = class_predictors["selectivity"][:, active].argmax(axis=0)
    is_preferred = np.arange(class_count)[:, None] == preferred
    rows: dict[str, Interval] = {}

    def correlate(x: Array, y: Array) -> Interval:
        return bootstrap(lambda filters: rank_correlation(x[..., filters], y[..., filters]), x.shape[-1])

    for target, mask in (("its preferred class", is_preferred), ("each other class", ~is_preferred)):
        low, high = np.percentile(samples[:, mask].mean(axis=1), (2.5, 97.5))
        rows[target] = Interval(means[mask].mean(), low, high)
        for name, predictor in class_predictors.items():
            masked = np.where(mask, predictor[:, active], np.nan)
            rows[f"{target}: rank correlation with {name}"] = correlate(masked, means)

    hits_preferred = means.argmax(axis=0) == preferred
    share = bootstrap(lambda filters: hits_preferred[filters].mean(), len(hits_preferred))
    rows["share of filters that cost their preferred class most"] = share
    for name, predictor in overall_predictors.items():
        rows[f"all classes: rank correlation with {name}"] = correlate(predictor[active], means.mean(axis=0))
    return pd.DataFrame.from_dict(rows, "index", columns=Interval._fields).reset_index(names="quantity")


def draw_ablation(ablation: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draw the loss increase of each class by the ablation of each active filter, from ablation.csv."""
    rows = ablation[ablation["class"] != "all"]
    # (classes, filters)
    selectivity = rows["selectivity"].to_numpy().reshape(-1, len(names)).T
    increase = rows["loss_increase"].to_numpy().reshape(-1, len(names)).T

    # filters side by side that prefer the same class, the most selective first
    active = np.flatnonzero(~np.isnan(selectivity).any(axis=0))
    preferred = selectivity[:, active].argmax(axis=0)
    order = np.lexsort((-selectivity[:, active].max(axis=0), preferred))
    shown = increase[:, active[order]]

    fig, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    limit = float(np.percentile(np.abs(shown), 99)) or 1
    picture = ax.imshow(
        shown,
        aspect="auto",
        extent=(0, len(active), len(names), 0),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    fig.colorbar(picture, ax=ax, pad=0.01, extend="both", label="loss increase (nats)")

    widths = np.bincount(preferred, minlength=len(names))
    for row, (right, width) in enumerate(zip(widths.cumsum(), widths, strict=True)):
        ax.add_patch(Rectangle((right - width, row), width, 1, fill=False, edgecolor="0.2", linewidth=0.9))
    ax.set_yticks(np.arange(len(names)) + 0.5, [shorten(name) for name in names])
    ax.set(xlabel="filters, by preferred class (framed), then falling selectivity", ylabel="class")
    return fig


def describe_ablation(summary: pd.DataFrame) -> str:
    """Return a table of the findings of mean ablation."""
    shown = summary.set_index("quantity").rename_axis(None).to_string(float_format="{:.4f}".format)
    return f"mean ablation of one filter of conv4: loss increase in nats, with 95 % interval\n{shown}"


def run_ablation(
    run: Run, train_inputs: Tensor, test_inputs: Tensor, filters: pd.DataFrame, classes: pd.DataFrame
) -> str:
    """Ablate each filter of conv4; write tables and figure, return the findings.

    `train_inputs` and `test_inputs` are what the classifier sees, `filters` and `classes` the tables.
    """
    logits = split_logits(run.net, test_inputs, train_inputs.mean(dim=0))
    labels = torch.from_numpy(run.test.labels).to(test_inputs.device)
    increase = measure_loss_increase(logits, labels)
    contributions = measure_contributions(logits, labels)

    selectivity = class_selectivity(class_means(classes))
    mean_activation = filters.loc[filters["layer"] == "conv4", "activation_mean"].to_numpy()
    ablation = tabulate_ablation(increase, contributions, selectivity, run)
    contribution = reduce_by_class(np.mean, contributions, run.test.labels, len(run.names))
    summary = summarise_ablation(
        increase,
        {"selectivity": selectivity, "contribution to the logit": contribution},
        {"largest selectivity": selectivity.max(axis=0), "mean activation": mean_activation},
        run.test.labels,
    )
    run.save_table("ablation", ablation)
    run.save_table("ablation_summary", summary)
    figure = draw_ablation(ablation, run.names)
    run.save_figure("ablation", figure, "What mean ablation of a filter of conv4 costs each class")
    return describe_ablation(summary)


# ---------------------------------------------------------------- trust: what a projection shows


class Projected(NamedTuple):
    """Units of conv4 with their projections in windows (units, rows, columns) that may cross the border."""

    units: Units
    origin: Array  # row and column of the window's top left pixel in the image, (units, 2)
    inside: Array  # whether a place of the window lies inside the image
    magnitude: Array  # of the projection, float32
    envelope: Array  # mean of those whose window is inside the image there, each with the sum 1

    def select(self, which: Array) -> "Projected":
        """Return some of the units."""
        units = Units(*(entry[which] for entry in self.units))
        return Projected(units, self.origin[which], self.inside[which], self.magnitude[which], self.envelope)


def crop_windows(frames: Array, origins: Array, size: int) -> Array:
    """Cut a window of `size` pixels at its origin out of each frame (units, rows, columns), 0 outside."""
    pairs = zip(frames, origins.tolist(), strict=True)
    return np.stack([crop(frame[None], top, left, size, 0)[0] for frame, (top, left) in pairs])


def read_top_units(path: Path, checkpoint: Checkpoint) -> Projected:
    """Read the units of conv4 in projections.npz."""
    keys = [f"conv4_{key}" for key in ("image", "value", "position", "origin", "projection")]
    image, value, position, origin, projection = load_arrays(path, checkpoint, *keys)
    fires = np.nonzero(image >= 0)  # a filter that fires on fewer images leaves places empty
    row, column = position[fires].astype(np.int64).T
    units = Units(image[fires].astype(np.int64), fires[0], row, column, value[fires])
    magnitude, origin = np.abs(projection[fires]).sum(axis=1), origin[fires].astype(np.int64)
    whole = np.broadcast_to(True, (len(origin), IMAGE_SIZE, IMAGE_SIZE))
    inside = crop_windows(whole, origin, magnitude.shape[-1])
    shares = magnitude / magnitude.sum(axis=(1, 2), keepdims=True)
    return Projected(units, origin, inside, magnitude, shares.sum(axis=0) / inside.sum(axis=0).clip(min=1))


def one_of_each(filters: Array) -> Array:
    """Draw one unit of each filter: those of one filter are much alike and must not count as several."""
    shuffled = np.random.default_rng(SEED).permutation(len(filters))
    return shuffled[np.unique(filters[shuffled], return_index=True)[1]]


def project_others(run: Run, top: Projected, filters: Array, doing: str, net: CNN | None = None) -> Array:
    """Project other `filters` at the places of units, perhaps through another network; return magnitudes.

    The places are those in the pooled map; the switch, and with it the window, may lie elsewhere in the
    pooling region. What lies outside the units' own windows is left out.
    """
    units = top.units._replace(filter=filters, value=np.ones(len(filters), np.float32))
    projector = Projector(net or run.net, len(LAYERS) - 1)
    windows, origins = project_windows(projector, run.test.images, units, doing)
    return crop_windows(np.abs(windows).sum(axis=1), top.origin - origins, len(top.envelope))


def project_random_filters(run: Run, top: Projected, rng: np.random.Generator) -> Array:
    """Project at the place of each unit a filter drawn from all others."""
    count = run.net.config["filters"][-1]
    drawn = (top.units.filter + rng.integers(1, count, len(top.origin))) % count
    return project_others(run, top, drawn, "other filters at the same place")


def score_pixels(run: Run, top: Projected, rng: np.random.Generator) -> Arrays:
    """Score the pixels of units' windows, (units, rows, columns), in other ways than by the projection.

    By `deconv.backpropagate`, magnitudes summed over RGB. And by what knows nothing of the filter: the
    image's edges, blurred and times the envelope; nearness to the window's centre; chance.
    """
    net, size = run.net, len(top.envelope)
    image, filter_, row, column, _ = top.units
    batch = net.normalise(torch.from_numpy(run.test.images[image]))
    gradient, guided = (
        backpropagate(net, batch, len(LAYERS) - 1, filter_, row, column, rule)
        for rule in ("gradient", "guided")
    )
    maps = {"gradient": gradient, "guided backpropagation": guided}
    sums = {name: of.abs().sum(dim=1) for name, of in maps.items()}
    edges = torch.stack(torch.gradient(batch, dim=(2, 3))).abs().sum(dim=(0, 2))
    sums["edges"] = gaussian_blur(edges, [13, 13], [BLUR, BLUR])
    scores = {name: crop_windows(of.cpu().numpy(), top.origin, size) for name, of in sums.items()}
    scores["edges"] = scores["edges"] * top.envelope
    from_centre = np.arange(size) - (size - 1) / 2
    scores["centre"] = np.tile(-np.hypot(from_centre[:, None], from_centre), (len(image), 1, 1))
    return scores | {"random": rng.random((len(image), size, size))}


def topk_mask(scores: Array, inside: Array, share: float) -> Array:
    """Return whether a pixel is among the `share` of its window, inside the image, that score most."""
    order = np.where(inside, -scores, np.inf).reshape(len(scores), -1).argsort(axis=1, kind="stable")
    counts = np.maximum(1, np.round(share * inside.sum(axis=(1, 2))))
    return np.asarray((order.argsort(axis=1) < counts[:, None]).reshape(scores.shape))


def surviving_shares(run: Run, top: Projected, others: Array, share: float) -> dict[str, pd.DataFrame]:
    """Return how much of each unit's activation survives when only some pixels stay, or all but these.

    Insertion and deletion (after Petsiuk et al. 2018, "RISE") at one size of the mask: the image, grey where
    masked, goes through the network again; the activation of the same unit is divided by the original. For
    "kept" and "deleted" a row a unit, a column for what chose the pixels. `others`: of other filters.
    """
    rng, tables = np.random.default_rng(SEED), []
    batches = np.split(np.arange(len(others)), range(32, len(others), 32))
    for which in tqdm(batches, "faithfulness: masked images", unit=" batches", disable=None):
        some, survived = top.select(which), {}
        batch = run.net.normalise(torch.from_numpy(run.test.images[some.units.image]))
        scores = {"projection": some.magnitude, "other filter": others[which]}
        for name, score in (scores | score_pixels(run, some, rng)).items():
            frames = crop_windows(topk_mask(score, some.inside, share), -some.origin, IMAGE_SIZE)
            kept = torch.from_numpy(frames[:, None]).to(batch.device)  # of all three channels
            for variant, mask in (("kept", kept), ("deleted", ~kept)):
                pooled = run.net.features(batch * mask)[-1][0].cpu().numpy()
                survived[variant, name] = pooled[np.arange(len(which)), *some.units[1:4]] / some.units.value
        tables.append(pd.DataFrame(survived))
    table = pd.concat(tables, ignore_index=True)
    return {variant: pd.DataFrame(table[variant]) for variant in ("kept", "deleted")}


def draw_partners(top: Projected, one: Projected, rng: np.random.Generator) -> Array:
    """Draw for each of `one` a unit of another filter and image with the same window; -1 if none is."""
    partners = []
    for image, filter_, origin in zip(one.units.image, one.units.filter, one.origin, strict=True):
        different = (top.units.image != image) & (top.units.filter != filter_)
        others = np.flatnonzero((top.origin == origin).all(axis=1) & different)
        partners.append(rng.choice(others) if others.size else -1)
    return np.array(partners)


def compare_magnitudes(own: Array, other: Array, shared: Array) -> tuple[float, float]:
    """Return how alike two projections are: the rank correlation of magnitudes, and the partial one.

    The latter takes out what both share with the envelope: any window's middle is strong.
    """
    table = pd.DataFrame({"own": own, "other": other, "shared": shared}).corr("spearman").to_numpy()
    plain, of_own, of_other = table[0, 1], table[0, 2], table[1, 2]
    return plain, (plain - of_own * of_other) / math.sqrt((1 - of_own**2) * (1 - of_other**2))


def randomise_weights(run: Run, top: Projected, one: Projected, images: Array) -> dict[str, Array]:
    """Compare projections with those of ever more random networks (Adebayo et al. 2018, section 3.1).

    Weights become random from conv4 downwards, and the network runs forward with them. A picture that stays
    the same shows the image and the architecture, not what was learned. To compare with: projections of other
    filters at the same place, and in other images with the same window (nan where there is none).

    Returns:
        For each condition `compare_magnitudes` of each unit of `one`, (draws, units, 2).
    """
    rng, alike = np.random.default_rng(SEED), defaultdict[str, list[Any]](list)

    def compare(condition: str, windows: Array) -> None:
        pairs = zip(one.magnitude, windows, one.inside, strict=True)
        alike[condition].append([compare_magnitudes(a[m], b[m], top.envelope[m]) for a, b, m in pairs])

    for draw in range(RANDOM_DRAWS):
        compare("other filter, same place", project_random_filters(run, one, rng))
        partners = draw_partners(top, one, rng)
        there = (partners >= 0)[:, None, None]
        compare("other filter, other image", np.where(there, top.magnitude[partners], np.nan))
        for first in reversed(range(len(LAYERS))):
            net = copy.deepcopy(run.net)
            torch.manual_seed(SEED + 1 + draw)
            for block in reversed(net.blocks[first:]):  # from above: conv4 gets the same weights each time
                block.conv.reset_parameters()
                block.bn.reset_parameters()
            recalibrate_batch_norm(net, first, images)
            name = "conv4" if first == 3 else f"conv4 to {LAYERS[first]}"
            doing = f"random weights: draw {draw + 1}, {name}"
            compare(name, project_others(run, one, one.units.filter, doing, net))
    return {condition: np.array(draws) for condition, draws in alike.items()}


def draw_trust(trust: pd.DataFrame, share: float) -> Figure:
    """Draw medians with 95 % intervals: what survives of activations; how alike projections stay."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9), width_ratios=[1.6, 1], layout="constrained")
    masked = trust[trust["test"].isin(["kept", "deleted"])]
    texts = masked["condition"].str.replace("propagation", "prop.").str.replace(",? ", "\n", n=1, regex=True)
    draw_intervals(left, masked.assign(condition=texts), "condition", "test")
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


def run_trust(run: Run, top: Projected, images: Array) -> str:
    """Mask pixels and randomise weights; write table and figure, return the findings."""
    one, rows = top.select(one_of_each(top.units.filter)), []
    others = project_random_filters(run, one, np.random.default_rng(SEED))

    def add(test: str, condition: str, values: Array) -> None:
        rows.append((test, condition, *median(values), int((~np.isnan(values)).sum())))

    for variant, table in surviving_shares(run, one, others, KEPT_SHARE).items():
        for name, values in table.items():
            add(variant, str(name), values.to_numpy())
            if name != "projection":
                add(f"{variant}, projection minus", str(name), (table["projection"] - values).to_numpy())
    for condition, draws in randomise_weights(run, top, one, images).items():
        for test, values in zip(("", ", envelope taken out"), np.moveaxis(draws, 2, 0), strict=True):
            add(f"random weights{test}", condition, values.mean(axis=0))  # units are resampled, not draws
            for number, of_draw in enumerate(values, start=1):
                add(f"random weights{test}, draw {number}", condition, of_draw)
    trust = pd.DataFrame(rows, columns=["test", "condition", "median", "low", "high", "n"])
    run.save_table("trust", trust)
    title = "Do projections of conv4 show what drives a filter, and what was learned?"
    run.save_figure("trust", draw_trust(trust, KEPT_SHARE), title)
    value = trust.set_index(["test", "condition"])["median"]
    names = "projection", "gradient", "other filter", "edges", "random"
    kept, deleted = (", ".join(f"{value[test, name]:.2f}" for name in names) for test in ("kept", "deleted"))
    alike = value["random weights, envelope taken out"]
    other = alike["other filter, same place"], alike["other filter, other image"]
    return (
        f"faithfulness: {KEPT_SHARE:.0%} of the pixels, chosen by {', '.join(names)}: alone they keep\n"
        f"  {kept} of the activation; without them {deleted} is left\n"
        "random weights: partial rank correlation with the trained projections "
        f"{alike['conv4 to conv1']:.2f};\n"
        f"  of other filters at the same place {other[0]:.2f}, in other images {other[1]:.2f}"
    )


def main() -> None:
    """Write the tables and figures, and say what they show and how far they can be trusted."""
    set_style()
    checkpoint = load_checkpoint(CHECKPOINT, choose_device(DEVICE))
    keys = [f"{layer}_max" for layer in LAYERS]
    peaks = dict(zip(LAYERS, load_arrays(OUTPUTS / "activations.npz", checkpoint, *keys), strict=True))
    path = OUTPUTS / "projection_statistics.npz"
    projected_labels, *stored = load_arrays(path, checkpoint, "labels", *STATISTICS)
    statistics = dict(zip(STATISTICS, stored, strict=True))
    top = read_top_units(OUTPUTS / "projections.npz", checkpoint)
    train = load_checkpoint_split(checkpoint, DATA_DIR, "train")
    test = load_checkpoint_split(checkpoint, DATA_DIR, "test")
    source = f"{TITLES[checkpoint.dataset]}, {len(test.labels):,} test images, {checkpoint.accuracy()}"
    run = Run(checkpoint, train, test, source, OUTPUTS)
    print(f"{source}, projections of {len(projected_labels):,}, torch {torch.__version__}")
    norm_images = train.images[:NORM_IMAGES]
    untrained = recalibrate_batch_norm(load_start(CHECKPOINT, checkpoint), 0, norm_images)

    filters, classes = tabulate(peaks, run)
    projections = tabulate_projections(statistics, projected_labels, run.names)
    filters = filters.merge(projections.filters, how="left", on=["layer", "filter"])
    classes = classes.merge(projections.classes, how="left", on=["layer", "filter", "class"])
    activations = measure_activations(test.images, untrained, 50, "activations, untrained network")
    untrained_filters = tabulate({layer: activations[f"{layer}_max"] for layer in LAYERS}, run).filters
    run.save_table("filter_metrics", filters)
    run.save_table("class_metrics", classes)
    run.save_table("filter_metrics_untrained", untrained_filters)

    specialisation = compare_networks(filters, untrained_filters)
    run.save_table("specialisation", specialisation)
    title = "How much of the specialisation was learned"
    run.save_figure("specialisation", draw_specialisation(specialisation), title)

    features = [pool_features(run.net, split.images, "trained network") for split in (train, test)]
    train_inputs, test_inputs = (split_features["conv4"] for split_features in features)
    probes = probe_layers(run, "trained", features)
    features = [pool_features(untrained, split.images, "untrained network") for split in (train, test)]
    probes = pd.concat([probes, probe_layers(run, "untrained", features)], ignore_index=True)
    predicted = run.net.classifier(test_inputs).argmax(dim=1).cpu().numpy()
    run.save_table("probes", probes)
    figure = draw_probes(probes, checkpoint.metrics["accuracy"], 1 / len(run.names))
    run.save_figure("probes", figure, "What a linear classifier reads from each layer")

    print(describe_layers(filters))
    print(run_ablation(run, train_inputs, test_inputs, filters, classes))
    print(run_trust(run, top, norm_images))
    print(describe_probes(probes, (predicted == test.labels).mean()))
    print(f"wrote filter_metrics, class_metrics, specialisation, ablation, trust and probes to {OUTPUTS}/")
    print("next: uv run heatmap.py")


if __name__ == "__main__":
    run_script(main)
