"""Measure every filter: how often it fires, which class it prefers, how strongly, what it is needed for.

Run:    uv run analyse_projections.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_000.pth, outputs/activations.npz,
        outputs/projection_statistics.npz, outputs/projections.npz, data/stl10_binary/{train,test}_{X,y}.bin
Writes: outputs/filter_metrics.csv, outputs/class_metrics.csv, outputs/filter_metrics_untrained.csv,
        outputs/specialisation.csv, outputs/specialisation.png,
        outputs/ablation.csv, outputs/ablation_summary.csv, outputs/ablation.png,
        outputs/trust.csv, outputs/trust.png, outputs/probes.csv, outputs/probes.png

An activation is the strongest value of a filter in an image. Classes are compared by activations: a
projection's non-zero pixels mostly measure the size of the receptive field and how much the border cuts off.
Four experiments then ask how far this can be trusted; each has a section below.
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

from CNN import CNN, IMAGE_SIZE, LAYERS, Checkpoint, choose_device, load_checkpoint
from deconv import backpropagate, crop
from deconv_full import (
    Arrays,
    Projector,
    Units,
    by_class,
    class_selectivity,
    measure_activations,
    project_windows,
    top_images,
)
from load_data import (
    TITLES,
    Array,
    Split,
    load_arrays,
    load_checkpoint_split,
    save_figure,
    save_table,
    set_style,
)

OUTPUTS = Path("outputs")  # where results go
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"

# how the experiments are done
RESAMPLINGS = 1000  # bootstrap samples behind an interval
SEED = 0  # of all that is drawn at random here
KEPT_SHARE = 0.25  # of a window's pixels: those that are kept, or deleted, to see what an activation needs
RANDOM_DRAWS = 3  # networks with random weights
NORM_IMAGES = 1_000  # training images that give batch norm of new weights its means and variances
PROBE_INPUTS = 1_024  # at most so many numbers of each of conv1 to conv3 go into its linear probe
PROBE_DECAYS = (0.001, 0.01, 0.1)  # weight decays to choose from
STATISTICS: dict[str, Callable[..., Any]] = dict.fromkeys(("nonzero_count", "mean", "variance"), np.mean)
STATISTICS["max"] = np.max  # how a projection's statistics are put together over images
NEARLY_DEAD = 0.01  # an active filter is nearly dead if it fires on a smaller share of the test images
BLUR = 2.0  # pixels, standard deviation of the Gaussian that blurs the edges


class Run(NamedTuple):
    """The network and its images; `source` is what titles say of them."""

    checkpoint: Checkpoint
    train: Split
    test: Split
    source: str
    outputs: Path

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
        """Write a figure as NAME.png, its source below the title."""
        figure.suptitle(f"{title}\n{self.source}", fontsize=9)
        save_figure(self.outputs / f"{name}.png", figure, quiet=True)


Interval = tuple[float, float, float]  # value, lower and upper limit


def bootstrap(statistic: Callable[[Array], Any], items: int) -> Interval:
    """Return statistic(indices) of all items, and its 95 % percentile interval over items drawn anew."""
    rng = np.random.default_rng(SEED)
    drawn = [statistic(rng.integers(items, size=items)) for _ in range(RESAMPLINGS)]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return float(statistic(np.arange(items))), float(low), float(high)


def median(values: Array) -> Interval:
    """Return the median of the values that are numbers with its interval."""
    known = values[~np.isnan(values)]
    return bootstrap(lambda which: np.median(known[which]), len(known))


def draw_intervals(ax: Axes, table: pd.DataFrame, x: str, series: str, line: str = "none") -> None:
    """Draw the columns median, low and high, one place for each value of `x`, one marker for each series."""
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


def bootstrap_means(values: Array, labels: Array) -> Array:
    """Return class means (samples, classes, filters) over images drawn with replacement within each class."""
    rng, means = np.random.default_rng(SEED), []
    for label in np.unique(labels):
        members = values[labels == label].astype(np.float64)
        n = len(members)
        means.append(rng.multinomial(n, np.full(n, 1 / n), RESAMPLINGS) @ members / n)
    return np.stack(means, axis=1)


def area_under_roc(values: Array, members: Array) -> Array:
    """Return how probably each filter fires more on an image of its class than on one of another class.

    Area under the receiver operating characteristic, from ranks (Mann-Whitney); a tie counts half. Gale et
    al. 2020 (arXiv 2007.01062) ask for it beside the index, which one strong image can carry. `values` and
    `members`, whether an image is of the filter's class, are (images, filters).
    """
    ranks, inside = pd.DataFrame(values).rank().to_numpy(), members.sum(axis=0)
    above = (ranks * members).sum(axis=0) - inside * (inside + 1) / 2
    return np.asarray(above / (inside * (len(values) - inside)))


def tabulate(
    activations: Mapping[str, Array], statistics: Mapping[str, Array], projected_labels: Array, run: Run
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return filter_metrics.csv, one row a filter, and class_metrics.csv, one row a filter and class.

    activation_*: mean, population variance and share above zero of the filter's activations over the images,
    with 95 % bootstrap intervals over images. Of conv4's projections means over the projected images (max:
    the largest). preferred_class has the largest mean activation, runner_up the second largest; the former
    comes first in preferred_share of the bootstrap samples. selectivity and auc are for the preferred class.
    top_class: the most frequent class of the nine strongest images. Dead filters have none.

    `activations` are those of `measure_activations`; `statistics` of the projections are (images, filters),
    of images with `projected_labels`.
    """
    filter_tables, class_tables = [], []
    labels, names = run.test.labels, np.array(run.names)
    for layer in LAYERS:
        maxima = activations[f"{layer}_max"].astype(np.float64)
        numbers, dead = np.arange(maxima.shape[1]), (maxima == 0).all(axis=0)
        means, drawn = by_class(np.mean, maxima, labels, len(names)), bootstrap_means(maxima, labels)
        preferred, runner_up = np.argsort(-means, axis=0, kind="stable")[:2]
        top = [
            np.bincount(labels[which[which >= 0]], minlength=len(names)) for which in top_images(maxima, 9)
        ]
        top_class = (np.array(top).T + 0.5 * (np.arange(len(names))[:, None] == preferred)).argmax(axis=0)
        limits = np.percentile(class_selectivity(drawn)[:, preferred, numbers], (2.5, 97.5), axis=0)
        columns: dict[str, Any] = {"layer": layer, "filter": numbers, "dead": dead}
        columns["activation_mean"] = maxima.mean(axis=0)
        columns["activation_variance"] = maxima.var(axis=0)
        columns["activation_nonzero"] = (maxima > 0).mean(axis=0)
        for name, values in statistics.items():
            of_filter = STATISTICS[name](values.astype(np.float64), axis=0)
            columns[name] = of_filter if layer == "conv4" else np.nan
        columns |= {"preferred_class": names[preferred], "runner_up": names[runner_up]}
        columns["top_class"] = names[top_class]
        columns["preferred_share"] = (drawn.argmax(axis=1) == preferred).mean(axis=0)
        columns["selectivity"] = class_selectivity(means).max(axis=0)
        columns["selectivity_low"], columns["selectivity_high"] = limits
        columns["auc"] = area_under_roc(maxima, labels[:, None] == preferred)
        filter_tables.append(pd.DataFrame(columns))
        filter_tables[-1].loc[dead, "preferred_class":] = np.nan

        low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
        by_name = {"activation_mean": means, "activation_low": low, "activation_high": high}
        for name, values in statistics.items() if layer == "conv4" else ():
            by_name[name] = by_class(STATISTICS[name], values, projected_labels, len(names))
        columns = {"layer": layer, "filter": numbers.repeat(len(names)), "class": run.names * len(numbers)}
        columns |= {name: values.T.ravel() for name, values in by_name.items()}  # (classes, filters) ->
        class_tables.append(pd.DataFrame(columns))
    return pd.concat(filter_tables, ignore_index=True), pd.concat(class_tables, ignore_index=True)


def class_means(classes: pd.DataFrame) -> Array:
    """Return conv4's mean activations (classes, filters) from class_metrics.csv."""
    rows = classes[classes["layer"] == "conv4"]
    return rows["activation_mean"].to_numpy().reshape(-1, rows["class"].nunique()).T


def describe_layers(filters: pd.DataFrame) -> str:
    """Return dead filters of each layer, medians over the active ones, and how sure preferences are."""
    active = filters[~filters["dead"]]
    table = active.groupby("layer")[["activation_nonzero", "selectivity", "auc"]].median()
    table.insert(0, "dead", filters.groupby("layer")["dead"].sum())
    conv4 = active[active["layer"] == "conv4"]
    uncertain = (conv4["preferred_share"] < 0.9).sum()
    other = (conv4["preferred_class"] != conv4["top_class"]).sum()
    return (
        f"{table.round(3).to_string()}\npreferred class: of {len(conv4)} active filters of conv4 {uncertain} "
        f"prefer another in more than 10 % of samples;\n  of {other} the most frequent class among the nine "
        "strongest images is another"
    )


# ---------------------------------------------------------------- how much of the specialisation was learned


def recalibrate_batch_norm(net: CNN, first: int, images: Array) -> CNN:
    """Give block `first` (0 for conv1) and all above batch norm's means and variances of training images.

    With those of other weights activations would be off scale. They are averages over batches of 100.
    """
    for block in net.blocks[first:]:
        block.train()
        block.bn.momentum = None  # the average of all batches counts, not the last ones most
    for batch in torch.from_numpy(images).split(100):
        net.features(net.normalise(batch))
    return net.eval()


def pool_features(net: CNN, images: Array, doing: str) -> dict[str, Tensor]:
    """Average a network's pooled maps over regions, by layer (images, inputs).

    conv4 as the classifier sees it, the others over side x side regions, with the largest side that divides
    the map and gives at most PROBE_INPUTS inputs.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for batch in tqdm(torch.from_numpy(images).split(50), doing, unit=" batches", disable=None):
        for layer, (pooled, _) in zip(LAYERS, net.features(net.normalise(batch)), strict=True):
            filters, height = pooled.shape[1:3]
            sides = (s for s in range(2, height + 1) if height % s == 0 and s**2 * filters <= PROBE_INPUTS)
            side = max(sides, default=1)
            regions = net.average(pooled) if layer == "conv4" else F.adaptive_avg_pool2d(pooled, side)
            parts[layer].append(regions.flatten(1))
    return {layer: torch.cat(of_layer) for layer, of_layer in parts.items()}


def compare_networks(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return specialisation.csv: medians over the active filters of the networks, and of what was learned.

    "learned" is the difference trained - untrained of filters that are active in both. The untrained network
    is no blank: edges and colours of random filters differ between classes, too. The largest of 576 values in
    conv1 and of 9 in conv4 are different quantities.
    """
    rows = []
    for metric in ("selectivity", "auc"):
        for layer in LAYERS:
            of_layer = {name: table[table["layer"] == layer] for name, table in tables.items()}
            values = {name: table[metric].to_numpy(np.float64) for name, table in of_layer.items()}
            values["learned"] = values["trained"] - values["untrained"]
            rows += [(metric, layer, name, *median(some)) for name, some in values.items()]
    return pd.DataFrame(rows, columns=["metric", "layer", "network", "median", "low", "high"])


def draw_specialisation(table: pd.DataFrame) -> Figure:
    """Draw `compare_networks`, layer by layer: both networks above, what was learned below."""
    fig, axes = plt.subplots(2, 2, figsize=(6, 4.4), sharex=True, layout="constrained")
    texts = {
        "selectivity": "selectivity of the\nstrongest activation",
        "auc": "area under the ROC curve\nof the strongest activation",
    }
    for (above, below), (metric, text) in zip(axes.T, texts.items(), strict=True):
        rows = table[table["metric"] == metric]
        draw_intervals(above, rows[rows["network"] != "learned"], "layer", "network")
        draw_intervals(below, rows[rows["network"] == "learned"], "layer", "network")
        below.axhline(0, color="0.5", linestyle=":", linewidth=1)
        above.set_title(text, fontsize=9)
    axes[0, 0].set_ylim(0, 1.1 * table.loc[table["metric"] != "auc", "high"].max())
    axes[0, 1].set_ylim(0.5, None)  # chance
    axes[0, 0].set_ylabel("median over filters")
    axes[1, 0].set_ylabel("trained - untrained,\nmedian over filters")
    axes[0, 0].legend(title="network; 95 % interval\nover filters", frameon=False, loc="upper left")
    return fig


# ---------------------------------------------------------------- ablation: what filters are needed for


def linear_parts(net: CNN, inputs: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Split logits into parts (filters, images, classes) and a base (classes,): logits = parts.sum(0) + base.

    Behind conv4 come an average and a linear layer, nothing else, so this is exact: ablating a filter takes
    its part away. `inputs` (images, filters * regions) is what the classifier sees, `level` (filters *
    regions,) what ablated filters are set to. Set to zero, a filter also takes away its mean, which shifts
    all logits; set to its mean over the training images, it takes away only what it says of this image.
    """
    # (classes, filters * regions) -> (classes, filters, regions)
    weights = net.classifier.weight.unflatten(1, (net.config["filters"][-1], -1))
    parts = torch.einsum("nfr,cfr->fnc", (inputs - level).unflatten(1, weights.shape[1:]), weights)
    return parts, net.classifier(level)


def ablate_each(parts: Tensor, base: Tensor, labels: Tensor) -> Array:
    """Return how far each image's cross-entropy rises without each filter, in nats, (images, filters).

    Accuracy is too coarse for a single filter: it counts the few images that tip over.
    """
    whole = parts.sum(dim=0) + base
    before, *after = (F.cross_entropy(whole - part, labels, reduction="none") for part in (0 * whole, *parts))
    return np.asarray((torch.stack(after, dim=1) - before[:, None]).cpu().numpy())


def summarise_damage(
    damage: Array, of_class: Mapping[str, Array], of_all: Mapping[str, Array], labels: Array
) -> dict[str, Interval]:
    """Return ablation_summary.csv's quantities of damage (images, filters), value and 95 % interval.

    The interval is over images for mean damage, over filters for the rest, nan for none. Predictors
    `of_class` (classes, filters) predict the damage to a class, `of_all` (filters,) that to all images. A
    filter's preferred class stands apart, or ranks would mix what the filter drives with what it avoids.
    """
    known, count = ~np.isnan(of_class["selectivity"]).any(axis=0), labels.max() + 1  # none of dead filters
    damage, of_class = damage[:, known], {name: x[:, known] for name, x in of_class.items()}
    means, samples = by_class(np.mean, damage, labels, count), bootstrap_means(damage, labels)
    preferred, found = of_class["selectivity"].argmax(axis=0), dict[str, Interval]()
    own = np.arange(count)[:, None] == preferred

    def correlation(x: Array, y: Array) -> Interval:
        return bootstrap(lambda which: rank_correlation(x[..., which], y[..., which]), x.shape[-1])

    for text, where in (("its preferred class", own), ("each other class", ~own)):
        low, high = np.percentile(samples[:, where].mean(axis=1), (2.5, 97.5))
        found[text] = means[where].mean(), low, high
        for name, x in of_class.items():
            found[f"{text}: rank correlation with {name}"] = correlation(np.where(where, x, np.nan), means)
    most = means.argmax(axis=0) == preferred
    share = bootstrap(lambda which: most[which].mean(), len(most))
    found["share of filters that cost their preferred class most"] = share
    for name, x in of_all.items():
        found[f"all classes: rank correlation with {name}"] = correlation(x[known], means.mean(axis=0))
    return found


def draw_ablation(damage: Array, index: Array, names: Sequence[str]) -> Figure:
    """Draw the rise of each class's loss without each filter.

    damage and selectivity `index` are (classes, filters), filters without index are left out.
    """
    known = np.flatnonzero(~np.isnan(index).any(axis=0))
    preferred = index[:, known].argmax(axis=0)
    rise = damage[:, known[np.lexsort((-index[:, known].max(axis=0), preferred))]]
    fig, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    top = float(np.percentile(np.abs(rise), 99)) or 1
    options: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -top, "vmax": top, "interpolation": "nearest"}
    drawn = ax.imshow(rise, aspect="auto", extent=(0, len(known), len(names), 0), **options)
    fig.colorbar(drawn, ax=ax, pad=0.01, extend="both", label="loss increase (nats)")
    widths = np.bincount(preferred, minlength=len(names))
    for row, (end, width) in enumerate(zip(widths.cumsum(), widths, strict=True)):
        ax.add_patch(Rectangle((end - width, row), width, 1, fill=False, edgecolor="0.2", linewidth=0.9))
    ax.set_yticks(np.arange(len(names)) + 0.5, list(names))
    ax.set(xlabel="filters, by preferred class (framed), then falling selectivity", ylabel="class")
    return fig


def run_ablation(
    run: Run, learned: Tensor, seen: Tensor, filters: pd.DataFrame, classes: pd.DataFrame
) -> str:
    """Ablate filters of conv4, one at a time; write tables and figure, return a finding.

    `learned` and `seen` are what the classifier sees of the training and of the test images.
    """
    index, labels, names = class_selectivity(class_means(classes)), run.test.labels, run.names
    truth = torch.from_numpy(labels).to(seen.device)
    strength = filters.loc[filters["layer"] == "conv4", "activation_mean"].to_numpy()
    parts, base = linear_parts(run.net, seen, learned.mean(dim=0))
    own = parts[:, torch.arange(len(labels)), truth].T.cpu().numpy()  # in the logit of an image's class
    contribution, damage = by_class(np.mean, own, labels, len(names)), ablate_each(parts, base, truth)
    of_class = {"selectivity": index, "contribution to the logit": contribution}
    of_all = {"largest selectivity": index.max(axis=0), "mean activation": strength}
    entries = summarise_damage(damage, of_class, of_all, labels)
    rises = by_class(np.mean, damage, labels, len(names))
    missing = np.full((1, len(strength)), np.nan)
    rows = [*names, "all"]  # of these only what was lost
    columns: dict[str, Any] = {"filter": np.arange(len(strength)).repeat(len(rows))}
    columns["class"] = rows * len(strength)
    columns["selectivity"] = np.vstack([index, missing]).T.ravel()
    columns["contribution"] = np.vstack([contribution, missing]).T.ravel()
    columns["loss_increase"] = np.vstack([rises, damage.mean(axis=0)]).T.ravel()
    run.save_table("ablation", pd.DataFrame(columns))
    summary = [(name, *entry) for name, entry in entries.items()]
    table = pd.DataFrame(summary, columns=["quantity", "value", "low", "high"])
    run.save_table("ablation_summary", table)
    run.save_figure("ablation", draw_ablation(rises, index, names), "What ablating a filter of conv4 costs")
    value = table.set_index("quantity")["value"]
    most = value["share of filters that cost their preferred class most"]
    correlation = value["its preferred class: rank correlation with selectivity"]
    return (
        f"ablation: set to its mean, a filter adds {value['its preferred class']:.4f} nats to the loss of "
        f"its preferred class,\n  {value['each other class']:.4f} to each other; {most:.0%} of the filters "
        f"cost it most;\n  rank correlation of this cost with the selectivity {correlation:.2f}"
    )


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


# ---------------------------------------------------------------- linear probes (Table 7 of the paper)


def probe(fit: Tensor, labels: Tensor, decay: float, on: Tensor) -> Tensor:
    """Return the classes `on` some features by a logistic regression that was fitted to others.

    Features (images, inputs) are standardised as those of the fit. The loss is the mean cross-entropy plus
    decay / 2 times the sum of squared weights: a convex problem for L-BFGS, started at zero.
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


def probe_layers(run: Run, network: str, features: Sequence[Mapping[str, Tensor]]) -> list[tuple[Any, ...]]:
    """Return rows of probes.csv, one a layer, of `pool_features` of the training and of the test images.

    The decay is chosen on a fifth of the training images, drawn by the seed; then all of them are used.
    """
    labels, truth = (torch.from_numpy(of.labels).to(run.net.mean.device) for of in (run.train, run.test))
    rows = []
    for layer in tqdm(LAYERS, f"probes, {network} network", unit=" layers", disable=None):
        train, test = (of[layer] for of in features)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))
        held, rest = order[: len(order) // 5], order[len(order) // 5 :]
        guesses = [probe(train[rest], labels[rest], decay, train[held]) for decay in PROBE_DECAYS]
        decay = PROBE_DECAYS[int(np.argmax([(guess == labels[held]).sum().item() for guess in guesses]))]
        right = (probe(train, labels, decay, test) == truth).cpu().numpy()
        accuracy = right.mean()
        error = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test))  # normal interval
        entry = accuracy, accuracy - error, accuracy + error, train.shape[1], decay
        rows.append((layer, network, *entry))
    return rows


def describe_probes(probes: pd.DataFrame, own: float) -> str:
    """Say what the probes read; `own` is the accuracy of the network itself."""
    learned, raw = (" ".join(f"{share:.1%}" for share in probes["accuracy"][k : k + 4]) for k in (0, 4))
    return f"probes of conv1 to conv4: {learned}, untrained {raw};\n  the network itself {own:.1%}"


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
    keys = [f"{layer}_max" for layer in LAYERS]
    stored = load_arrays(OUTPUTS / "activations.npz", checkpoint, *keys)
    activations = dict(zip(keys, stored, strict=True))
    path = OUTPUTS / "projection_statistics.npz"
    projected_labels, *stored = load_arrays(path, checkpoint, "labels", *STATISTICS)
    statistics = dict(zip(STATISTICS, stored, strict=True))
    top = read_top_units(OUTPUTS / "projections.npz", checkpoint)
    train, test = (load_checkpoint_split(checkpoint, DATA_DIR, split) for split in ("train", "test"))
    source = f"{TITLES[checkpoint.dataset]}, {len(test.labels):,} test images, {checkpoint.accuracy()}"
    run = Run(checkpoint, train, test, source, OUTPUTS)
    print(f"{source}, projections of {len(projected_labels):,}, torch {torch.__version__}")
    path, some = CHECKPOINT.parent / "snapshots/epoch_000.pth", train.images[:NORM_IMAGES]
    start = load_checkpoint(path, checkpoint.net.mean.device)
    if start.settings != checkpoint.settings:
        raise SystemExit(f"{path} is of another training: run `uv run train_CNN.py` again")
    untrained = recalibrate_batch_norm(start.net, 0, some)

    filters, classes = tabulate(activations, statistics, projected_labels, run)
    activations = measure_activations(test.images, untrained, 50, "activations, untrained network")
    before, _ = tabulate(activations, {}, projected_labels, run)
    specialisation = compare_networks({"trained": filters, "untrained": before})
    run.save_table("filter_metrics", filters)
    run.save_table("class_metrics", classes)
    run.save_table("filter_metrics_untrained", before)
    run.save_table("specialisation", specialisation)
    title = "How much of the specialisation was learned"
    run.save_figure("specialisation", draw_specialisation(specialisation), title)

    features = [pool_features(run.net, of.images, "trained network") for of in (train, test)]
    learned, seen = (of["conv4"] for of in features)  # what the classifier sees
    own = run.net.classifier(seen).argmax(dim=1).cpu().numpy() == test.labels
    rows = probe_layers(run, "trained", features)
    features = [pool_features(untrained, of.images, "untrained network") for of in (train, test)]
    rows += probe_layers(run, "untrained", features)
    columns = ["layer", "network", "accuracy", "low", "high", "inputs", "decay"]
    probes = pd.DataFrame(rows, columns=columns)
    run.save_table("probes", probes)
    run.save_figure("probes", draw_probes(probes, run), "What a linear classifier reads from each layer")

    print(describe_layers(filters))
    print(run_ablation(run, learned, seen, filters, classes))
    print(run_trust(run, top, some))
    print(describe_probes(probes, own.mean()))
    print(f"wrote filter_metrics, class_metrics, specialisation, ablation, trust and probes to {OUTPUTS}/")
    print("next: uv run heatmap.py")


if __name__ == "__main__":
    main()
