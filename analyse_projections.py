"""Measure every filter: how often it fires, which class it prefers, how strongly, what its projections hold.

Run:    uv run analyse_projections.py
Reads:  outputs/CNN.pth, outputs/activations.npz, outputs/projection_statistics.npz,
        outputs/projections.npz, data/stl10_binary/{train,test}_{X,y}.bin
Writes: outputs/filter_metrics.csv, outputs/class_metrics.csv, outputs/metric_distributions.png,
        outputs/selectivity.png, outputs/top_filters.png, outputs/filter_metrics_untrained.csv,
        outputs/specialisation.png, outputs/ablation.csv, outputs/ablation.png, outputs/trust.csv,
        outputs/trust.png, outputs/probes.csv, outputs/probes.png

An activation is the strongest value of a filter in an image. All that is said about classes comes from
activations: a projection's non-zero pixels mostly measure the size of the receptive field and how much of it
the border cuts off.

Then the network itself is asked how far this can be trusted: how much of the specialisation was there before
the first step of the training (see `compare_networks`), what it loses without a filter, what of an
activation survives when only a projection's strongest pixels are left, what projections look like when
weights are random, and how much of the classes each layer holds.
"""

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatterMathtext, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from CNN import (
    CNN,
    IMAGE_SIZE,
    LAYERS,
    Checkpoint,
    RegionAverage,
    choose_device,
    frame_sizes,
    load_checkpoint,
    receptive_fields,
)
from deconv import window_of
from deconv_full import Projector, Units, batches
from load_data import (
    Arrays,
    Split,
    check_lists,
    check_numbers,
    check_paths,
    load_arrays,
    load_split,
    normalise,
    plain_errors,
    prepare_folders,
    save_figure,
    title,
    whole_file,
)

OUTPUTS = Path("outputs")
RESAMPLINGS = 1000  # bootstrap samples behind an interval, and shuffled label sets behind a p-value
SEED = 0  # of all that is drawn at random here; random weights follow the training's seed
TOP_FILTERS = 10  # filters of conv4 shown for each class

# how far the numbers and pictures can be trusted
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
BATCH_SIZE = 64  # images at once; more costs memory, not time
CHUNK = 32  # projections at once; on a CPU they should fit its cache, on a GPU try 2048
RANDOM_ORDERS = 10  # orders in which all filters of conv4 are silenced at random
KEPT_SHARE = 0.25  # of a window's pixels: those that are kept, or deleted, to see what an activation needs
RANDOMISED_UNITS = 200  # units whose projections are compared with those of random weights
NORM_IMAGES = 1_000  # training images that give batch norm of new weights its means and variances
PROBE_INPUTS = 1_024  # about so many numbers of each layer go into its linear probe
PROBE_DECAYS = (0.001, 0.01, 0.1)  # weight decays to choose from
PROBE_STEPS = 100  # of L-BFGS, at most; fewer leave the smaller decays short of their optimum

# Fixed by definition, not settings
PROJECTED = LAYERS[-1]  # the layer whose projections were measured
STATISTICS = ("nonzero_count", "mean", "variance", "max")  # of a projection
COMPARED = {  # columns of filter_metrics.csv in which networks are compared, and what figures call them
    "selectivity": "class selectivity",
    "auc": "area under the ROC curve",
    "omega_squared": "omega squared: share of the\nvariance that the class explains",
    "significant": "share of filters above chance",
}
FALSE_DISCOVERIES = 0.05  # share of false ones among the filters of a layer that are called significant
NEARLY_DEAD = 0.01  # a living filter is nearly dead if it fires on a smaller share of the test images
AXES = {  # what figures call the columns of filter_metrics.csv
    "activation_mean": "activation: mean",
    "activation_variance": "activation: variance",
    "activation_nonzero": "activation: share of\nimages it fires on",
    "selectivity": "activation:\nclass selectivity",
    "nonzero_count": "projection:\nnumber of\nnon-zero pixels",
    "mean": "projection: mean of\nnon-zero pixels\n(normalised pixels)",
    "variance": "projection: variance\nof all pixels\n(normalised pixels²)",
    "max": "projection: largest\nin any image\n(normalised pixels)",
}


def read_measurements(folder: Path) -> tuple[Arrays, Arrays]:
    """Read and check activations.npz and projection_statistics.npz.

    Returns:
        Activations: labels int64 (images,) and, for each layer, conv{k}_max (images, filters). Statistics of
        conv4's projections: labels and image int64 (projected images,), the latter an index into the images
        of the former, and each of STATISTICS (projected images, filters). float64, no value negative.

    Raises:
        SystemExit: If a file is missing or damaged, or the two do not fit together.
    """
    made_by, paths = "deconv_full.py", (folder / "activations.npz", folder / "projection_statistics.npz")
    maxima = [f"{layer}_max" for layer in LAYERS]
    first = load_arrays(paths[0], made_by, {"labels": "int64"} | dict.fromkeys(maxima, "float32"))
    dtypes = {"labels": "int64", "image": "int64"} | dict.fromkeys(STATISTICS, "float32")
    second = load_arrays(paths[1], made_by, dtypes)

    def check(fits: object, problem: str) -> None:
        if not fits:
            raise SystemExit(f"{paths[0]} and {paths[1]} {problem}: run `uv run {made_by}` again")

    check(first.checkpoint_sha256 == second.checkpoint_sha256, "come from different checkpoints")
    check(first.dataset == second.dataset, "come from different data sets")
    check(first.class_names == second.class_names, "name different classes")
    labels, image = first.arrays["labels"], second.arrays["image"]
    check(labels.ndim == image.ndim == 1 and labels.size and image.size, "hold no list of images")
    check(((labels >= 0) & (labels < len(first.class_names))).all(), "hold labels of no class")
    check(((image >= 0) & (image < len(labels))).all(), "hold different images")
    check(np.array_equal(labels[image], second.arrays["labels"]), "label an image differently")
    filters = first.arrays[f"{PROJECTED}_max"].shape[1:]
    for arrays, keys, images in ((first.arrays, maxima, labels), (second.arrays, STATISTICS, image)):
        for key in keys:
            values, width = arrays[key], filters if key in STATISTICS else arrays[key].shape[1:]
            fits = values.ndim == 2 and values.size and values.shape == (len(images), *width)
            check(fits, f"do not fit: {key!r} has another shape")
            check(((values >= 0) & np.isfinite(values)).all(), f"hold impossible values in {key!r}")
            arrays[key] = values.astype(np.float64) + 0.0  # -0.0 becomes 0.0
    return first, second


def by_class(
    reduce: Callable[..., Any], values: NDArray[np.float64], labels: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """Reduce (images, filters) to (classes, filters) by np.mean or np.max; nan for a class without images."""
    empty, masks = np.full(values.shape[1], np.nan), [labels == label for label in range(classes)]
    return np.stack([reduce(values[mask], axis=0) if mask.any() else empty for mask in masks])


def class_selectivity(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the selectivity index of each filter for each class: (mu - mu_rest) / (mu + mu_rest).

    For the class that a filter prefers this is the class selectivity index of Morcos et al. 2018 ("On the
    importance of single directions for generalization"): 0 if the filter fires alike on all classes, 1 if on
    one only. They average a feature map over space; here its strongest value counts.

    Args:
        means: mu, mean activation of each filter on each class, (..., classes, filters), not negative; nan
            for a class without images. mu_rest is the mean of the other classes' mu.

    Returns:
        (..., classes, filters), -1 to 1; nan for a filter that never fires, or if there is no other class.
    """
    present = np.count_nonzero(~np.isnan(means), axis=-2, keepdims=True)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that is promised
        rest = (np.nansum(means, axis=-2, keepdims=True) - means) / (present - 1)
        return np.asarray((means - rest) / (means + rest))


def halves(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 or 1 for each image, in turn within each class, so that both halves hold all classes alike."""
    return np.asarray(pd.Series(labels).groupby(labels).cumcount() % 2, np.int64)


def prefer(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the class of the largest mean, ties to the lower: (..., classes, filters) to (..., filters)."""
    return np.asarray(np.where(np.isnan(means), -1, means).argmax(axis=-2))


def crossed_selectivity(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the selectivity index for a class chosen on one half of the images and measured on the other.

    The class whose mean happens to come out largest has, on the same images, too large an index: of ten equal
    means one is the largest by chance. On other images it has no such luck. Both ways round are averaged.

    Args:
        first: Class means on one half, (..., classes, filters).
        second: On the other half.

    Returns:
        (..., filters), -1 to 1; about 0 for a filter that answers to no class.
    """
    found = []
    for chosen, measured in ((first, second), (second, first)):
        index = np.take_along_axis(class_selectivity(measured), prefer(chosen)[..., None, :], axis=-2)
        found.append(index[..., 0, :])
    return np.asarray(np.mean(found, axis=0))


def bootstrap_means(
    values: NDArray[np.float64], labels: NDArray[np.int64], classes: int, count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return class means (count, classes, filters) over images drawn with replacement within each class."""
    means = np.full((count, classes, values.shape[1]), np.nan)
    for label in np.unique(labels):
        members = values[labels == label]
        n = len(members)
        means[:, label] = rng.multinomial(n, np.full(n, 1 / n), count) @ members / n
    return means


def shuffled_means(
    values: NDArray[np.float64], labels: NDArray[np.int64], classes: int, count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return class means (count, classes, filters) after shuffling the labels: how chance looks."""
    sizes = np.bincount(labels, minlength=classes)[:, None]
    single, parts = values.astype(np.float32), []
    for start in range(0, count, 50):  # 50 at a time bounds the memory
        shuffled = rng.permuted(np.tile(labels, (min(50, count - start), 1)), axis=1)
        member = (shuffled[:, None] == np.arange(classes)[:, None]).astype(np.float32)
        sums = member.reshape(len(member) * classes, len(labels)) @ single
        parts.append(sums.reshape(len(member), classes, values.shape[1]))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.concatenate(parts) / sizes, np.float64)


def adjusted(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjust p-values for the number of tests (Benjamini & Hochberg 1995); nan stays and does not count."""
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested])]
    scaled = p_values[order] * len(order) / np.arange(1, len(order) + 1)
    result = np.full(len(p_values), np.nan)
    result[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    return result


def area_under_roc(values: NDArray[np.float64], members: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the probability that a filter fires more on an image of the class than on one of another class.

    Area under the receiver operating characteristic, from ranks (Mann-Whitney); a tie counts half. Gale et
    al. 2020 (arXiv 2007.01062) ask for it beside the index, which one strong image can carry. Pitfall: with
    ten classes 0.9 still means many false alarms, since nine tenths of the images are of other classes.

    Args:
        values: (images, filters).
        members: Whether an image is of the filter's class, (images, filters).
    """
    ranks = pd.DataFrame(values).rank().to_numpy()
    inside = members.sum(axis=0)
    with np.errstate(invalid="ignore"):
        above = (ranks * members).sum(axis=0) - inside * (inside + 1) / 2
        return np.asarray(above / (inside * (len(values) - inside)))


def best_threshold(values: NDArray[np.float64], members: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the activation t at which hit rate - false-alarm rate of "value >= t" is largest (Youden 1950).

    Args:
        values: (images, filters).
        members: Whether an image is of the filter's class, (images, filters).
    """
    order = np.argsort(-values, axis=0)
    ordered, inside = np.take_along_axis(values, order, 0), np.take_along_axis(members, order, 0)
    hits, alarms = inside.cumsum(axis=0), (~inside).cumsum(axis=0)
    gain = hits / hits[-1].clip(min=1) - alarms / alarms[-1].clip(min=1)
    gain[:-1][ordered[:-1] == ordered[1:]] = -1  # a threshold cannot part equal values
    return np.asarray(np.take_along_axis(ordered, gain.argmax(axis=0)[None], 0)[0])


def detection(values: NDArray[np.float64], labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Return area under the ROC curve, hit rate and false-alarm rate of each filter as a detector of a class.

    Class and threshold are chosen on one half of the images and applied to the other; the two ways round are
    averaged. Gale et al. 2020: a filter may be selective and yet miss most of its class.
    """
    half, found = halves(labels), []
    if not half.any():  # no class has two images
        return np.full((3, values.shape[1]), np.nan)
    for chosen in (half == 0, half == 1):
        member = labels[:, None] == prefer(by_class(np.mean, values[chosen], labels[chosen], classes))
        fires = values[~chosen] >= best_threshold(values[chosen], member[chosen])
        inside = member[~chosen]
        with np.errstate(invalid="ignore"):
            hits = (fires & inside).sum(axis=0) / inside.sum(axis=0)
            alarms = (fires & ~inside).sum(axis=0) / (~inside).sum(axis=0)
        found.append((area_under_roc(values[~chosen], inside), hits, alarms))
    return np.asarray(np.mean(found, axis=0))


def omega_squared(
    values: NDArray[np.float64], labels: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """Return the share of the variance of each filter's activation that the class explains.

    (SS_between - (k - 1) MS_within) / (SS_total + MS_within) for k classes (Hays 1963). Eta squared,
    SS_between / SS_total, is above 0 even for noise; this is 0 on average and may come out negative. Pitfall:
    it asks for differences between classes, not for one class.
    """
    means = by_class(np.mean, values, labels, classes)
    sizes = np.bincount(labels, minlength=classes)[:, None]
    k = np.count_nonzero(sizes)
    total = ((values - values.mean(axis=0)) ** 2).sum(axis=0)
    between = np.nansum(sizes * (means - values.mean(axis=0)) ** 2, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        within = (total - between) / (len(values) - k)
        return np.asarray((between - (k - 1) * within) / (total + within))


def lifetime_sparseness(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how few images a filter answers to: 0 to all alike, 1 to a single one.

    (1 - mean(r)^2 / mean(r^2)) / (1 - 1 / n) over n images (Treves & Rolls 1991, in the form of Vinje &
    Gallant 2000). Pitfall: it knows no classes; a filter may be sparse and answer to no class at all.
    """
    n = len(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((1 - values.mean(axis=0) ** 2 / (values**2).mean(axis=0)) / (1 - 1 / n))


def top_precision(
    values: NDArray[np.float64], members: NDArray[np.bool_], count: int = 9
) -> NDArray[np.float64]:
    """Return the share of a filter's `count` strongest images that are of its class (Zhou et al. 2015).

    Pitfall (Gale et al. 2020): nine images of 8,000 say nothing about the other thousands.
    """
    strongest = np.argsort(-values, axis=0, kind="stable")[:count]
    return np.asarray(np.take_along_axis(members, strongest, 0).mean(axis=0))


def specialisation(
    values: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: int,
    resamplings: int,
    rng: np.random.Generator,
) -> dict[str, NDArray[Any]]:
    """Measure how far each filter of a layer specialises on a class, with intervals and a test.

    Args:
        values: Strongest activation of each filter in each image, (images, filters).
        labels: Class of each image.
        classes: Number of classes.
        resamplings: Bootstrap samples, and shuffled label sets.
        rng: Where the random numbers come from.

    Returns:
        Columns of filter_metrics.csv, (filters,) each: `selectivity` of `crossed_selectivity`, with the
        limits of its 95 % bootstrap interval over images (percentiles); `selectivity_same`, class and index
        from the same images, for comparison; what the functions above measure; `p_adjusted`, the share of
        shuffled label sets with at least that selectivity, adjusted for the filters of the layer. All nan for
        a dead filter.
    """
    half = halves(labels)
    parts = [(values[half == side], labels[half == side]) for side in (0, 1)]
    observed = crossed_selectivity(*(by_class(np.mean, *part, classes) for part in parts))
    drawn = crossed_selectivity(*(bootstrap_means(*part, classes, resamplings, rng) for part in parts))
    chance = crossed_selectivity(*(shuffled_means(*part, classes, resamplings, rng) for part in parts))
    means, dead = by_class(np.mean, values, labels, classes), (values == 0).all(axis=0)
    preferred = prefer(means)
    members = labels[:, None] == preferred
    auc, hit_rate, false_alarm_rate = detection(values, labels, classes)
    p_value = (1 + (chance >= observed).sum(axis=0)) / (1 + resamplings)
    columns = {
        "selectivity": observed,
        "selectivity_low": np.percentile(drawn, 2.5, axis=0),
        "selectivity_high": np.percentile(drawn, 97.5, axis=0),
        "selectivity_same": class_selectivity(means)[preferred, np.arange(values.shape[1])],
        "auc": auc,
        "hit_rate": hit_rate,
        "false_alarm_rate": false_alarm_rate,
        "omega_squared": omega_squared(values, labels, classes),
        "precision": top_precision(values, members),
        "sparseness": lifetime_sparseness(values),
        "p_adjusted": adjusted(np.where(dead | np.isnan(observed), np.nan, p_value)),
    }
    return {name: np.where(dead, np.nan, column) for name, column in columns.items()}


def tabulate_filters(
    activations: Arrays, statistics: Arrays | None, resamplings: int, seed: int
) -> pd.DataFrame:
    """Return filter_metrics.csv: one row a filter of every layer; without statistics, without their columns.

    activation_*: mean, population variance and share above zero of the filter's activations over the images.
    Of conv4's projections the means over all projected images (max: the largest). What `specialisation` says
    follows. A dead filter has neither preferred_class nor selectivity; with images of one class only, no
    filter has a selectivity.
    """
    tables, names, labels = [], activations.class_names, activations.arrays["labels"]
    for layer in LAYERS:
        values = activations.arrays[f"{layer}_max"]
        preferred, dead = prefer(by_class(np.mean, values, labels, len(names))), (values == 0).all(axis=0)
        columns: dict[str, Any] = {"layer": layer, "filter": np.arange(values.shape[1]), "dead": dead}
        columns["activation_mean"] = values.mean(axis=0)
        columns["activation_variance"] = values.var(axis=0)
        columns["activation_nonzero"] = (values > 0).mean(axis=0)
        if statistics:
            for key in STATISTICS:
                reduce = np.max if key == "max" else np.mean
                columns[key] = reduce(statistics.arrays[key], axis=0) if layer == PROJECTED else np.nan
        columns["preferred_class"] = [None if d else names[k] for d, k in zip(dead, preferred, strict=True)]
        columns |= specialisation(values, labels, len(names), resamplings, np.random.default_rng(seed))
        columns["significant"] = columns["p_adjusted"] < FALSE_DISCOVERIES  # never for nan
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def tabulate_classes(activations: Arrays, statistics: Arrays) -> pd.DataFrame:
    """Return class_metrics.csv: one row a filter and class, means over the class's images (max: largest).

    A class without images has rows without numbers.
    """
    tables, names = [], activations.class_names
    for layer in LAYERS:
        filters = activations.arrays[f"{layer}_max"].shape[1]
        number = np.repeat(np.arange(filters), len(names))
        columns: dict[str, Any] = {"layer": layer, "filter": number, "class": names * filters}
        sources = {"activation_mean": (activations, f"{layer}_max")}
        if layer == PROJECTED:
            sources |= {key: (statistics, key) for key in STATISTICS}
        for name, (source, key) in sources.items():
            reduce, labels = np.max if key == "max" else np.mean, source.arrays["labels"]
            reduced = by_class(reduce, source.arrays[key], labels, len(names))
            columns[name] = reduced.T.ravel()  # (classes, filters) -> (filters * classes,)
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def mean_table(class_metrics: pd.DataFrame, layer: str, names: Sequence[str]) -> NDArray[np.float64]:
    """Return a layer's mean activations (classes, filters); nan for a class without images."""
    rows = class_metrics[class_metrics["layer"] == layer]
    table = rows.pivot(index="class", columns="filter", values="activation_mean")
    return table.loc[list(names)].to_numpy(np.float64)


def rank_filters(
    filter_metrics: pd.DataFrame, class_metrics: pd.DataFrame, layer: str, class_name: str
) -> pd.DataFrame:
    """Order the living filters of a layer by how well they stand for a class; tables may come from files.

    First come the filters that prefer the class, by selectivity. Where they are few, those that prefer
    another class follow, by their index for this one. Nearly dead filters come last: an index that rests on
    a handful of images is large by chance. Ties: larger mean activation on the class, then lower number.

    Returns:
        Columns filter; selectivity, the index for this class, -1 to 1; activation_mean on this class; prefers
        and nearly_dead, bool; name, the number marked * if the filter prefers another class and ° if it is
        nearly dead. No rows if the class has no images.
    """
    filters = filter_metrics[filter_metrics["layer"] == layer].set_index("filter")
    rows = class_metrics[class_metrics["layer"] == layer]
    means = rows.pivot(index="class", columns="filter", values="activation_mean")
    index = pd.DataFrame(class_selectivity(means.to_numpy(np.float64)), means.index, means.columns)
    columns = {
        "selectivity": index.loc[class_name],
        "activation_mean": means.loc[class_name],
        "prefers": filters["preferred_class"] == class_name,
        "nearly_dead": filters["activation_nonzero"] < NEARLY_DEAD,
    }
    ranking = pd.DataFrame(columns)[~filters["dead"]].dropna(subset="activation_mean").reset_index()
    star, ring = np.where(ranking["prefers"], "", "*"), np.where(ranking["nearly_dead"], "°", "")
    ranking["name"] = ranking["filter"].astype(str) + star + ring
    order = ["nearly_dead", "prefers", "selectivity", "activation_mean", "filter"]
    return ranking.sort_values(order, ascending=[True, False, False, False, True], ignore_index=True)


def summarise_layers(filter_metrics: pd.DataFrame) -> pd.DataFrame:
    """Count the filters, dead and nearly dead ones of each layer; medians and share are over the living."""
    living = filter_metrics[~filter_metrics["dead"]]
    summary = pd.DataFrame(filter_metrics.groupby("layer")["dead"].agg(filters="size", dead="sum"))
    few = living[living["activation_nonzero"] < NEARLY_DEAD].groupby("layer").size()
    summary = summary.assign(nearly_dead=few.reindex(summary.index, fill_value=0))
    groups = living.groupby("layer")
    medians = groups[["selectivity", "selectivity_same", "auc", "activation_nonzero"]].median()
    return summary.join(medians).join(groups["significant"].mean())


def print_summary(summary: pd.DataFrame, rankings: Mapping[str, pd.DataFrame], count: int) -> None:
    """Print a line a layer of `summarise_layers` and, for each class, the first `count` of `rank_filters`."""
    print(
        f"{'layer':<8}{'filters':>8}{'dead':>6}{'nearly dead':>13}{'selectivity':>13}{'same images':>13}"
        f"{'AUC':>7}{'significant':>13}{'fires on':>10}"
    )
    for row in summary.itertuples():
        counts = f"{row.Index:<8}{row.filters:>8}{row.dead:>6}{row.nearly_dead:>13}"
        index = f"{row.selectivity:>13.3f}{row.selectivity_same:>13.3f}{row.auc:>7.3f}"
        print(f"{counts}{index}{row.significant:>13.1%}{row.activation_nonzero:>10.1%}")
    print(f"dead: fires on no image; nearly dead: on less than {NEARLY_DEAD:.0%}; of the living the median")
    print(
        "selectivity, 0 (all classes alike) to 1 (one class only), class chosen on one half of the images and"
    )
    print("index measured on the other, beside both from the same images; area under the ROC curve; share of")
    print(
        f"filters above chance (false discoveries {FALSE_DISCOVERIES:.0%}); share of images a filter fires on"
    )
    width = max(map(len, rankings)) + 2
    print(f"{'class':<{width}}{'preferred by':>12}{'selectivity':>16}  top filters of {PROJECTED}")
    for name, ranking in rankings.items():
        top = ranking.head(count)
        span = f"{top['selectivity'].max():.2f} to {top['selectivity'].min():.2f}" if len(top) else ""
        numbers = "".join(f"{cell:>6}" for cell in top["name"])
        print(f"{name:<{width}}{ranking['prefers'].sum():>12}{span:>16}{numbers}")
    print("* prefers another class, ° nearly dead; what is said about classes comes from activations:")
    print("a projection's non-zero pixels mostly measure the receptive field and what the border cuts off it")


def draw_distributions(filter_metrics: pd.DataFrame, heading: str) -> Figure:
    """Draw how each metric is distributed over a layer's living filters; logarithmic axes leave zeros out.

    Selectivity, counts and shares have linear axes, the rest logarithmic ones where the values differ enough.
    """
    living = filter_metrics[~filter_metrics["dead"]]
    fig, axes = plt.subplots(2, 4, figsize=(8, 5), sharey=True, dpi=200, layout="constrained")
    for ax, (key, label) in zip(axes.flat, AXES.items(), strict=True):
        linear = key in ("activation_nonzero", "selectivity", "nonzero_count")
        shown = living.loc[living[key].notna() if linear else living[key] > 0, ["layer", key]]
        for place, layer in enumerate(LAYERS):
            values = shown.loc[shown["layer"] == layer, key]
            if len(values):
                ax.ecdf(values, color=f"C{place}", label=layer)
        ax.set(xlabel=label, ylim=(0, 1.02))
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        decades = 0 if linear or shown.empty else math.log10(shown[key].max() / shown[key].min())
        small = shown[key].min() < 1e-4  # then only powers of ten have short names
        if decades > (2 if small else 0.7):  # over less, a logarithmic axis may hold no number to name
            ax.set_xscale("log")
            subs = (1,) if small or decades >= 2.2 else (1, 3) if decades >= 1.1 else (1, 2, 5)
            ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=4 if len(subs) == 1 else 9))
            powers = small or decades >= 3.5
            ax.xaxis.set_major_formatter(LogFormatterMathtext() if powers else "{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
    fig.legend(handles=axes[0, 0].lines, loc="outside lower center", ncols=len(LAYERS))
    fig.supylabel("share of filters up to this value", size="medium")
    fig.suptitle(heading, parse_math=False)
    sns.despine(fig)
    return fig


def draw_selectivity(filter_metrics: pd.DataFrame, summary: pd.DataFrame, heading: str) -> Figure:
    """Draw the selectivity of every living filter of each layer, with quartiles and median."""
    living = filter_metrics.dropna(subset="selectivity")
    few = living["activation_nonzero"] < NEARLY_DEAD
    spread = living["filter"] * 0.618 % 1 - 0.5  # golden ratio: even, and the same in every run
    place = living["layer"].map(LAYERS.index) + 0.6 * spread
    fig, ax = plt.subplots(figsize=(6.5, 4), dpi=200, layout="constrained")
    for which, marker, colour in ((~few, ".", "C0"), (few, "x", "C3")):
        ax.plot(place[which], living.loc[which, "selectivity"], marker, color=colour, alpha=0.6)
    groups = [living.loc[living["layer"] == layer, "selectivity"] for layer in LAYERS]
    black = {"color": "black", "linewidth": 2}
    ax.boxplot(groups, positions=range(len(LAYERS)), widths=0.7, medianprops=black, showfliers=False)
    counts = summary[["filters", "dead", "nearly_dead"]].itertuples(name=None)
    ticks = ["{}\n{} filters, {} dead,\n{} nearly dead (x)".format(*row) for row in counts]
    ax.set_xticks(range(len(LAYERS)), ticks)
    lowest = living["selectivity"].min()  # below 0: fires less on the class chosen on the other half
    ax.set(ylim=(None if lowest < 0 else 0, None), ylabel="class selectivity")
    ax.set_title(heading, parse_math=False)
    sns.despine(fig)
    return fig


def draw_top_filters(rankings: Mapping[str, pd.DataFrame], count: int, heading: str) -> Figure:
    """Draw the first `count` of `rank_filters` for each class, coloured by their selectivity for it."""
    size = 2 + 0.6 * count, 1.6 + 0.42 * len(rankings)
    fig, ax = plt.subplots(figsize=size, dpi=200, layout="constrained")
    tops = [ranking.head(count) for ranking in rankings.values()]
    index = np.array([top["selectivity"].reindex(range(count)) for top in tops])  # nan where there is none
    high = max(np.nanmax(index, initial=0), 0.1)
    image = ax.imshow(index, cmap="mako_r", vmin=0, vmax=high, aspect="auto", interpolation="nearest")
    for row, top in enumerate(tops):
        for column, (name, mean) in enumerate(zip(top["name"], top["activation_mean"], strict=True)):
            colour = "white" if index[row, column] > 0.4 * high else "black"
            ax.text(column, row, f"{name}\n{mean:.3g}", color=colour, ha="center", va="center", fontsize=7)
    ax.set_xticks(range(count), [str(column + 1) for column in range(count)])
    ax.set_yticks(range(len(rankings)), list(rankings), parse_math=False)
    marks = "number of the filter (* prefers another class, ° nearly dead), mean activation on the class"
    ax.set(xlabel=f"rank\n{marks}")
    ax.set_title(heading, parse_math=False)
    below = "min" if (index < 0).any() else "neither"  # below 0: fires less on this class than on the rest
    fig.colorbar(image, label="selectivity for the class", extend=below)
    return fig


# How far this can be trusted: the untrained network, ablation, masked pixels, random weights, linear probes


class TopUnits(NamedTuple):
    """The units of conv4 whose projections were drawn: those of each filter in its strongest images."""

    filter: NDArray[Any]  # its number, int64 (units,)
    image: NDArray[Any]  # index of the test image, int64 (units,)
    value: NDArray[Any]  # activation, float32 (units,)
    position: NDArray[Any]  # row and column in the pooled map, int64 (units, 2)
    origin: NDArray[Any]  # of the window: its top left pixel, negative beyond the border, int64 (units, 2)
    magnitude: NDArray[Any]  # of the projection, in the full frame, float32 (units, 96, 96)
    size: NDArray[Any]  # rows and columns of the window, int64 (units,)

    def take(self, which: NDArray[np.int64]) -> "TopUnits":
        """Return the units at the places `which`."""
        return TopUnits(*(entry[which] for entry in self))

    def window(self, unit: int) -> tuple[slice, slice]:
        """Return the rows and columns of a unit's window inside the image."""
        (top, left), size = self.origin[unit].tolist(), int(self.size[unit])
        return slice(max(top, 0), top + size), slice(max(left, 0), left + size)


def check_origin(path: Path, arrays: Arrays, checkpoint: Checkpoint) -> None:
    """Hold what an array file says of its making against the checkpoint.

    Raises:
        SystemExit: If it was made from another checkpoint or data set.
    """
    made_from = arrays.checkpoint_sha256, arrays.dataset, arrays.class_names
    if made_from != (checkpoint.sha256, checkpoint.dataset, checkpoint.class_names):
        raise SystemExit(f"{path} is from another checkpoint or data set: run `uv run deconv_full.py` again")


def read_top_units(folder: Path, activations: Arrays, checkpoint: Checkpoint, test: Split) -> TopUnits:
    """Read the units of conv4 in projections.npz; hold checkpoint, activations and test images together.

    Raises:
        SystemExit: If the file is missing or damaged, or something is from another checkpoint or data set.
    """
    path, again = folder / "projections.npz", "run `uv run deconv_full.py` again"
    types = {"image": "int32", "value": "float32", "position": "int16", "origin": "int16"}
    types = {f"{PROJECTED}_{key}": kind for key, kind in (types | {"projection": "float32"}).items()}
    found = load_arrays(path, "deconv_full.py", types)
    check_origin(folder / "activations.npz", activations, checkpoint)
    check_origin(path, found, checkpoint)
    if not np.array_equal(activations.arrays["labels"], test.labels):
        raise SystemExit(f"{folder / 'activations.npz'} has other labels: {again}")
    maxima, filters = activations.arrays[f"{PROJECTED}_max"], checkpoint.net.config["filters"]
    if [activations.arrays[f"{layer}_max"].shape[1] for layer in LAYERS] != filters:
        raise SystemExit(f"{folder / 'activations.npz'} has another number of filters: {again}")
    image, value, position, origin, projection = (found.arrays[key] for key in types)
    size, jump, start = receptive_fields(checkpoint.net)[-1]
    frame = frame_sizes(checkpoint.net)[1][-1]  # rows of conv4's map before pooling
    shapes = [(*image.shape, *rest) for rest in ((), (2,), (2,), (3, size, size))]
    if (
        image.ndim != 2
        or len(image) != filters[-1]
        or [array.shape for array in (value, position, origin, projection)] != shapes
        or not ((image >= -1) & (image < len(test.images))).all()
    ):
        raise SystemExit(f"{path} does not fit activations.npz: {again}")
    filter_, rank = np.nonzero(image >= 0)  # a filter that fires on fewer images leaves places empty
    row = (origin[filter_, rank].astype(np.int64) - start) / jump
    place = position[filter_, rank]
    if not (
        np.array_equal(value[filter_, rank], maxima[image[filter_, rank], filter_])
        and (value[filter_, rank] > 0).all()
        and ((place >= 0) & (place < frame // checkpoint.net.blocks[-1].pool_size)).all()
        and ((row >= 0) & (row < frame) & (row % 1 == 0)).all()
        and np.isfinite(projection).all()
    ):
        raise SystemExit(f"{path} holds impossible values or those of other activations: {again}")
    numbers, where, corner = (array[filter_, rank].astype(np.int64) for array in (image, position, origin))
    frames = np.zeros((len(filter_), IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for whole, f, r, (top, left) in zip(frames, filter_, rank, corner.tolist(), strict=True):
        whole[:] = np.abs(window_of(projection[f, r], -top, -left, IMAGE_SIZE, 0)).sum(axis=0)
    sizes = np.full(len(filter_), size)
    return TopUnits(filter_, numbers, value[filter_, rank], where, corner, frames, sizes)


def spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return the rank correlation of two arrays of one shape; equal values share the mean of their ranks.

    Places where either is nan are left out; nan if one is constant over the rest.
    """
    both = ~(np.isnan(first) | np.isnan(second))
    if both.sum() < 2:
        return np.nan
    x, y = (pd.Series(values[both]).rank().to_numpy(np.float64) for values in (first, second))
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else np.nan


def with_interval(
    statistic: Callable[[NDArray[np.int64]], float], items: int, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Return a statistic with its 95 % interval by the percentile bootstrap (Efron 1979).

    Args:
        statistic: Of the items at the places it is given.
        items: How many there are; without any, all is nan.
        resamples: How often as many items are drawn anew, with replacement.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(items, size=items)) for _ in range(resamples if items else 0)])
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist() if drawn.size else (np.nan, np.nan)
    return statistic(np.arange(items)) if items else np.nan, low, high


def median_interval(values: NDArray[np.float64], resamples: int, seed: int) -> tuple[float, float, float]:
    """Return the median of the values that are numbers with its interval, see `with_interval`."""
    known = values[~np.isnan(values)]
    return with_interval(lambda which: float(np.median(known[which])), len(known), resamples, seed)


def trust_row(
    test: str, condition: str, values: NDArray[np.float64], resamples: int, seed: int
) -> dict[str, str | float]:
    """Return a row of trust.csv: median of the values that are numbers, interval, how many they are."""
    numbers = dict(zip(("median", "low", "high"), median_interval(values, resamples, seed), strict=True))
    return {"test": test, "condition": condition, **numbers, "n": int((~np.isnan(values)).sum())}


def pool_features(
    images: NDArray[np.uint8], checkpoint: Checkpoint, device: torch.device, batch_size: int, inputs: int
) -> tuple[list[Tensor], dict[str, NDArray[np.float64]]]:
    """Run the images through the network once; average the pooled maps over regions and find their maxima.

    Returns:
        For each layer (images, about `inputs`): the map averaged over side x side regions, the side chosen so
        that layers of many and of few filters get as many numbers. At the end what the classifier sees,
        conv4's averages (images, filters * head_size²). Then conv{k}_max as in activations.npz, but float64:
        the strongest value of each filter in each image.
    """
    averages, maxima, net = list[list[Tensor]](), list[list[Tensor]](), checkpoint.net
    sides = [max(round((inputs / filters) ** 0.5), 1) for filters in net.config["filters"]]
    everything = np.arange(len(images))
    for _, features in batches(images, everything, checkpoint, device, batch_size, "features"):
        maps = [pooled for pooled, _ in features]
        small = [RegionAverage(min(s, m.shape[-1]))(m) for m, s in zip(maps, sides, strict=True)]
        averages.append([part.flatten(1) for part in (*small, net.average(maps[-1]))])
        maxima.append([pooled.amax(dim=(2, 3)).cpu() for pooled in maps])
    strongest = {}
    for layer, parts in zip(LAYERS, zip(*maxima, strict=True), strict=True):
        strongest[f"{layer}_max"] = torch.cat(parts).numpy().astype(np.float64) + 0.0
    return [torch.cat(parts) for parts in zip(*averages, strict=True)], strongest


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


def silence_each(
    parts: Tensor, bias: Tensor, labels: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Silence one filter at a time.

    Args:
        parts: `contributions` (filters, images, classes).
        bias: Of the classifier.
        labels: Of the images.
        classes: Number of classes.

    Returns:
        Change of each class's accuracy (classes, filters), nan for a class without images; change of the
        accuracy over all images (filters,). Negative where silencing does damage.
    """
    logits, truth = parts.sum(dim=0) + bias, torch.from_numpy(labels).to(parts.device)
    right = torch.stack([(logits - part).argmax(dim=1) == truth for part in (0 * bias, *parts)], dim=1)
    change = right.cpu().numpy().astype(np.float64)  # (images, 1 + filters); the first: nothing silenced
    change = change[:, 1:] - change[:, :1]
    return by_class(np.mean, change, labels, classes), change.mean(axis=0)


def silence_in_order(
    parts: Tensor, bias: Tensor, labels: NDArray[np.int64], order: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the accuracy with the first 0, 1, ... and all filters of `order` silenced, (1 + filters,).

    Arguments as for `silence_each`. Summed from the last, so that with all silenced the bias alone is left.
    """
    logits, found = bias.expand(len(labels), -1).clone(), []
    for part in (0 * bias, *parts[order[::-1].copy()]):
        logits += part
        found.append((logits.argmax(dim=1).cpu().numpy() == labels).mean())
    return np.array(found[::-1])


def top_pixels(scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.bool_]:
    """Return where the `count` largest scores are; ties go to the first."""
    chosen = np.zeros(scores.shape, np.bool_)
    chosen.flat[np.argsort(-scores, axis=None, kind="stable")[:count]] = True
    return chosen


def same_windows(units: TopUnits, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw for each unit another one, of another filter in another image, with the same window; -1: none."""
    drawn = np.full(len(units.image), -1)
    for k in range(len(drawn)):
        others = (units.origin == units.origin[k]).all(axis=1) & (units.image != units.image[k])
        candidates = np.flatnonzero(others & (units.filter != units.filter[k]))
        if candidates.size:
            drawn[k] = rng.choice(candidates)
    return drawn


def mask_pixels(
    units: TopUnits, unit: int, other: int, share: float, rng: np.random.Generator
) -> dict[str, NDArray[np.bool_]]:
    """Choose which pixels of a unit's image stay; the others become grey, 0 in normalised pixels.

    Args:
        units: All units.
        unit: Place of the one in question.
        other: Place of one with the same window, or -1.
        share: Of the window's pixels inside the image, how many are kept or deleted.
        rng: For pixels at random.

    Returns:
        For each mask (96, 96), True where a pixel stays. Kept or deleted: the strongest pixels of the unit's
        projection or of the other unit's, those nearest the window's centre, or as many at random; and the
        whole window or nothing kept.
    """
    rows, columns = window = units.window(unit)
    whole = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.bool_)
    whole[window] = True
    count = max(1, round(share * whole.sum()))
    down, right = np.arange(IMAGE_SIZE) - units.origin[unit][:, None] - (units.size[unit] - 1) / 2
    scores = {
        "projection": units.magnitude[unit],
        "other unit": units.magnitude[other],
        "centre": -np.hypot(down[:, None], right),
        "random": rng.random(whole.shape),
    }
    kept = {}
    for name, score in scores.items():
        chosen = np.zeros_like(whole)
        chosen[window] = top_pixels(score[rows, columns], count)
        kept[f"{name} kept"], kept[f"{name} deleted"] = chosen, ~chosen
    return kept | {"window kept": whole, "nothing kept": np.zeros_like(whole)}


def surviving_shares(
    images: NDArray[np.uint8],
    checkpoint: Checkpoint,
    units: TopUnits,
    share: float,
    device: torch.device,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """Return how much of a unit's activation survives each of `mask_pixels`, mean over a filter's images.

    The masked image goes through the network again; the activation of the same filter at the same pooled
    position is divided by the original. With the whole window kept it is at least 1: the pooled value is the
    largest of a region, and the unit that was largest sees nothing else. Where the masks of a unit need
    another one and there is none, nan.

    Returns:
        A row for each filter that fires, a column for each mask.
    """
    rng, rows = np.random.default_rng(seed), []
    others = same_windows(units, rng)
    with tqdm(total=len(others), desc="masked images", unit=" units", disable=None) as bar:
        for start in range(0, len(others), batch_size):
            which = np.arange(start, min(start + batch_size, len(others)))
            some = torch.from_numpy(images[units.image[which]]).to(device)
            batch = normalise(some, checkpoint.mean, checkpoint.std)
            masks = [mask_pixels(units, k, others[k], share, rng) for k in which.tolist()]
            found = {}
            for name in masks[0]:
                mask = torch.from_numpy(np.stack([mask[name] for mask in masks])[:, None]).to(device)
                masked = (batch * mask).contiguous(memory_format=torch.channels_last)
                pooled = checkpoint.net.features(masked)[-1][0].cpu().numpy()
                row, column = units.position[which].T
                survived = pooled[np.arange(len(which)), units.filter[which], row, column]
                found[name] = survived.astype(np.float64) / units.value[which]
                if "other" in name:
                    found[name][others[which] < 0] = np.nan
            rows.append(pd.DataFrame(found))
            bar.update(len(which))
    return pd.concat(rows, ignore_index=True).groupby(units.filter).mean() if rows else pd.DataFrame()


def settle_batch_norm(
    net: CNN, first: int, checkpoint: Checkpoint, images: NDArray[np.uint8], device: torch.device
) -> CNN:
    """Give block `first` (0 for conv1) and all above batch norm's means and variances of the images.

    They are the average over batches of 100, as at the start of a training. With those of another network, or
    with 0 and 1, activations of new weights would be off scale.

    Args:
        net: A new network; returned on `device`, in evaluation mode, without gradients.
        first: Lowest block with new weights; the others stay as they are.
        checkpoint: The trained network, with the mean and std of its training images.
        images: Training images, uint8.
        device: Where to compute.
    """
    net = net.eval().requires_grad_(False).to(device)
    for block in net.blocks[first:]:
        block.train()
        block.bn.momentum = None  # the average of all batches counts, not the last ones most
    some = np.arange(len(images) - (len(images) % 100 == 1))  # of a single image there may be no variance
    for _ in batches(images, some, checkpoint._replace(net=net), device, 100, "batch norm"):
        pass
    return net.eval()


def untrained(checkpoint: Checkpoint, images: NDArray[np.uint8], device: torch.device) -> CNN:
    """Return the network that training began with, batch norm's means and variances taken from the images."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(checkpoint.seed)
        net = CNN(**checkpoint.net.config)
    return settle_batch_norm(net, 0, checkpoint, images, device)


def randomised(
    checkpoint: Checkpoint, first: int, images: NDArray[np.uint8], device: torch.device, seed: int
) -> CNN:
    """Return the network with block `first` (0 for conv1) and all above at random; at 4 none is.

    All their filters are random: those that start as copies of the layer below (see CNN.py) would hand the
    trained layers on, and the trained filters may still resemble them, whatever the seed. Batch norm's
    weights go back to where they start, the classifier is new, blocks below `first` stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = CNN(**checkpoint.net.config)
        for block in net.blocks:
            block.conv.reset_parameters()
    for block, trained in zip(net.blocks[:first], checkpoint.net.blocks, strict=False):
        block.load_state_dict(trained.state_dict())
    return settle_batch_norm(net, first, checkpoint, images, device)


def without_copies(table: pd.DataFrame, config: Mapping[str, Any]) -> pd.DataFrame | None:
    """Return the rows of filters that did not start as copies of one below; None if none did, see CNN.py.

    Args:
        table: What `tabulate_filters` returned for an untrained network.
        config: Of the network.
    """
    if not config["partial_identity"]:
        return None
    below = dict(zip(LAYERS, (0, *config["filters"]), strict=False))  # conv1 has no layer below
    return table[table["filter"] >= table["layer"].map(below)]


Comparison = dict[tuple[str, str, str], tuple[float, float, float]]


def compare_networks(tables: Mapping[str, pd.DataFrame], resamplings: int, seed: int) -> Comparison:
    """Say how much of each layer's specialisation was learned.

    The untrained network is no blank: edges and colours of random filters differ between classes, too. What
    training added is what the trained network has beyond it.

    By default its conv2 to conv4 start as partial identity (see CNN.py). Their first filters, as many as the
    layer below has, are copies of that layer, pooled further; only the rest are random. A copy's strongest
    activation is that of the filter below less a constant, batch norm's mean, times another. So its AUC is
    that of the filter below, and its omega squared, unless the constant cuts some activations off at 0. Its
    selectivity is not: an index over means grows when something is taken off all of them. That is why all
    three are compared, and why the untrained network is counted without its copies as well.

    Args:
        tables: What `tabulate_filters` returned, by network: "trained", "untrained" and others.
        resamplings: How often filters are drawn anew for the intervals.
        seed: Of the draws.

    Returns:
        For each layer, metric of COMPARED and network: median over the living filters (of `significant` the
        mean) and the limits of its 95 % bootstrap interval. The network "learned" is trained less untrained
        over the filters that live in both, drawn in pairs: a filter keeps its number in training.
    """

    def interval(metric: str, *groups: NDArray[np.floating[Any]]) -> tuple[float, float, float]:
        centre: Callable[..., Any] = np.mean if metric == "significant" else np.median

        def statistic(which: NDArray[np.int64]) -> float:
            first, *other = (float(centre(values[which])) for values in groups)
            return first - sum(other)

        return with_interval(statistic, len(groups[0]), resamplings, seed)

    compared = {}
    for layer in LAYERS:
        for metric in COMPARED:
            found = {}
            for name, table in tables.items():
                living = table[(table["layer"] == layer) & ~table["dead"]].set_index("filter")
                found[name] = living[metric].dropna().astype(np.float64)
                compared[layer, metric, name] = interval(metric, found[name].to_numpy(np.float64))
            both = found["trained"].index.intersection(found["untrained"].index)
            pair = (found[name].loc[both].to_numpy(np.float64) for name in ("trained", "untrained"))
            compared[layer, metric, "learned"] = interval(metric, *pair)
    return compared


def print_comparison(compared: Comparison) -> None:
    """Print a line a layer of `compare_networks`."""
    networks = ("trained", "untrained")
    print(
        "how much of the specialisation was learned: medians over living filters, 95 % intervals over filters"
    )
    print(f"{'':<8}{'selectivity':<75}{'trained, untrained: AUC':<26}{'omega squared':<17}above chance")
    print("layer   " + "".join(f"{name:<25}" for name in (*networks, "learned")))
    for layer in LAYERS:
        cells = (compared[layer, "selectivity", name] for name in (*networks, "learned"))
        index = "".join("{:<25}".format("{:.3f} ({:.3f} to {:.3f})".format(*cell)) for cell in cells)
        rest = [compared[layer, key, name][0] for key in list(COMPARED)[1:] for name in networks]
        print(f"{layer:<8}{index}" + "{:>13.3f}, {:.3f}{:>13.3f}, {:.3f}{:>13.0%}, {:.0%}".format(*rest))


def draw_specialisation(tables: Mapping[str, pd.DataFrame], compared: Comparison, heading: str) -> Figure:
    """Draw, layer by layer, how specialised the filters of the networks are.

    Args:
        tables: By network; the first two are drawn as distributions, to the left and to the right.
        compared: What `compare_networks` returned for them.
        heading: Title.
    """
    fig, axes = plt.subplots(2, 2, figsize=(8, 6.4), dpi=200, layout="constrained")
    for ax, (metric, label) in zip(axes.flat, COMPARED.items(), strict=True):
        for k, (name, table) in enumerate(tables.items()):
            cells = [compared[layer, metric, name] for layer in LAYERS]
            rows = pd.DataFrame(cells, columns=["median", "low", "high"])
            draw_medians(ax, np.arange(4.0) + (-0.12, 0.12, 0.26)[k], rows, f"C{k}", "osD"[k], name)
            for place, layer in enumerate(LAYERS):
                values = table.loc[(table["layer"] == layer) & ~table["dead"], metric].dropna()
                if k < 2 and metric != "significant" and len(values):
                    options = {"showextrema": False, "side": ("low", "high")[k], "widths": 0.9}
                    for body in ax.violinplot([values], [place], **options)["bodies"]:
                        body.set(facecolor=f"C{k}", alpha=0.35, linewidth=0)
        ax.axhline(0.5 if metric == "auc" else 0, color="0.5", linestyle=":", linewidth=1, zorder=0)
        ax.set_xticks(range(4), LAYERS)
        ax.set(ylabel=label, xlim=(-0.5, 3.5))
    axes[1, 1].set(ylim=(-0.03, 1.05))
    fig.legend(handles=axes[0, 0].containers, loc="outside lower center", ncols=3, frameon=False)
    fig.suptitle(heading, fontsize=9, parse_math=False)
    sns.despine(fig)
    return fig


def project_magnitudes(
    images: NDArray[np.uint8],
    checkpoint: Checkpoint,
    units: TopUnits,
    switches: CNN,
    device: torch.device,
    batch_size: int,
    chunk: int,
) -> NDArray[np.float32]:
    """Project units of conv4, the value set to 1, and return magnitudes in the full frame (units, 96, 96).

    A projection is proportional to the value, so a unit that does not fire has one too.

    Args:
        images: Test images, uint8.
        checkpoint: Its network's weights are the way down.
        units: Which filter, image and pooled position.
        switches: The network that runs forward and says where the maxima were.
        device: Where to compute.
        batch_size: Images at once.
        chunk: Units at once.
    """
    projector = Projector(checkpoint.net, LAYERS.index(PROJECTED))
    frames, side = np.zeros_like(units.magnitude), projector.conv_sizes[-1]
    needed, forward = np.unique(units.image), checkpoint._replace(net=switches)
    for which, features in batches(images, needed, forward, device, batch_size, "projections"):
        entries = np.flatnonzero(np.isin(units.image, which))
        local = torch.from_numpy(np.searchsorted(which, units.image[entries])).to(device)
        filter_ = torch.from_numpy(units.filter[entries]).to(device)
        row, column = torch.from_numpy(units.position[entries]).to(device).T
        switch = features[-1][1][local, filter_, row, column]
        ones = torch.ones(len(entries), device=device)
        members, masks = Units(local, filter_, ones, switch // side, switch % side), projector.masks(features)
        for group in projector.groups(members, chunk):
            magnitudes = projector.project(masks, members.take(group)).abs().sum(dim=3).cpu().numpy()
            for number, magnitude in zip(group.tolist(), magnitudes, strict=True):
                inside = projector.inside(int(members.row[number]), int(members.column[number]))
                frames[entries[number], *inside] = magnitude
    return frames


def similarities(
    units: TopUnits, first: NDArray[np.float32], second: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return the rank correlation of two magnitudes (units, 96, 96) over each unit's own window.

    The window is that of the trained network. Another network's switch may lie elsewhere in the pooling
    region; where its window does not reach, its projection is 0.
    """
    windows = [units.window(k) for k in range(len(first))]
    return np.array([spearman(a[w], b[w]) for a, b, w in zip(first, second, windows, strict=True)])


def randomise_weights(
    train: NDArray[np.uint8],
    images: NDArray[np.uint8],
    checkpoint: Checkpoint,
    units: TopUnits,
    count: int,
    device: torch.device,
    batch_size: int,
    chunk: int,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """Compare projections with those of ever more random networks (Adebayo et al. 2018, section 3.1).

    Weights become random from conv4 downwards. A picture that stays the same shows the image and the
    architecture, not what was learned. Two variants: the random network runs forward itself, or the trained
    one does and keeps its switches, only the weights on the way down being random; what is left then is the
    switches' doing (Mahendran & Vedaldi 2016, "Salient deconvolutional networks"). The seed is not that of
    the training, whose first weights the trained ones still resemble.

    Args:
        train: Training images for `randomised`, uint8.
        images: Test images, uint8.
        checkpoint: The trained network.
        units: All units; `count` of them are drawn.
        count: How many, at most.
        device: Where to compute.
        batch_size: Images at once.
        chunk: Units at once.
        seed: Of the draws.

    Returns:
        `similarities` of each drawn unit, for each condition. Two show how alike projections are anyway: that
        of another filter in another image with the same window, and of another filter at the same place.
    """
    rng, trained = np.random.default_rng(seed), checkpoint.net
    drawn = np.sort(rng.permutation(len(units.image))[:count])
    others = same_windows(units, rng)[drawn]
    partners, units = units.magnitude[others], units.take(drawn)
    shift = rng.integers(1, max(trained.config["filters"][-1], 2), len(drawn))
    elsewhere = units._replace(filter=(units.filter + shift) % trained.config["filters"][-1])
    options = device, batch_size, chunk
    found = {
        "trained": project_magnitudes(images, checkpoint, units, trained, *options),
        "other filter, same place": project_magnitudes(images, checkpoint, elsewhere, trained, *options),
        "other filter, other image": np.where(others[:, None, None] < 0, np.nan, partners),
    }
    for first in reversed(range(len(LAYERS))):
        net = randomised(checkpoint, first, train, device, checkpoint.seed + 1)
        name = LAYERS[-1] if first == len(LAYERS) - 1 else f"{LAYERS[-1]} to {LAYERS[first]}"
        for switches, text in ((net, "own switches"), (trained, "trained switches")):
            changed = checkpoint._replace(net=net)
            found[f"{name} random, {text}"] = project_magnitudes(images, changed, units, switches, *options)
    return {name: similarities(units, units.magnitude, frames) for name, frames in found.items()}


def fit_probe(
    inputs: Tensor, labels: Tensor, classes: int, decay: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Fit a linear softmax by L-BFGS on all inputs at once, from zero: the problem is convex.

    Args:
        inputs: Standardised (images, inputs).
        labels: int64 (images,).
        classes: Number of classes.
        decay: Of the weights: decay / 2 times their sum of squares is added to the mean loss.
        steps: At most so many.

    Returns:
        Weights (inputs, classes) and bias (classes,).
    """
    weights = inputs.new_zeros(inputs.shape[1], classes, requires_grad=True)
    bias = inputs.new_zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(inputs @ weights + bias, labels) + decay / 2 * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weights.detach(), bias.detach()


def probe(
    train: Tensor,
    train_labels: NDArray[np.int64],
    test: Tensor,
    test_labels: NDArray[np.int64],
    classes: int,
    decays: Sequence[float],
    steps: int,
    seed: int,
) -> tuple[float, float]:
    """Return the test accuracy of a linear softmax on features, and its weight decay (paper, Table 7).

    Features are standardised with the training images' mean and deviation. The decay is chosen on a fifth of
    the training images, drawn by the seed; then all of them are used.
    """
    centre, scale = train.mean(dim=0), train.std(dim=0, correction=0)
    train, test = ((part - centre) / scale.where(scale > 0, 1) for part in (train, test))
    truth, test_truth = (torch.from_numpy(part).to(train.device) for part in (train_labels, test_labels))

    def accuracy(fit: Tensor, fit_truth: Tensor, decay: float, on: Tensor, on_truth: Tensor) -> float:
        weights, bias = fit_probe(fit, fit_truth, classes, decay, steps)
        right = (on @ weights + bias).argmax(dim=1) == on_truth
        return float(right.cpu().numpy().mean()) if len(right) else 0.0

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    scores = [accuracy(train[rest], truth[rest], decay, train[held], truth[held]) for decay in decays]
    best = decays[int(np.argmax(scores))]
    return accuracy(train, truth, best, test, test_truth), best


def print_correlations(
    changes: NDArray[np.float64],
    overall: NDArray[np.float64],
    selectivity: NDArray[np.float64],
    strongest: NDArray[np.float64],
    resamples: int,
    seed: int,
) -> None:
    """Print how selectivity and damage go together over filters; arguments as `silence_each` returns them.

    Args:
        changes: Of the classes' accuracies (classes, filters).
        overall: Of the accuracy (filters,).
        selectivity: For each class (classes, filters).
        strongest: For the preferred class (filters,).
        resamples: How often filters are drawn anew for the intervals.
        seed: Of the draws.
    """
    span = f"{100 * overall.min():+.2f} to {100 * overall.max():+.2f}, median {100 * np.median(overall):+.3f}"
    print(
        f"silencing one of {len(overall)} filters of {PROJECTED} changes accuracy by {span} percentage points"
    )
    pairs = {
        "for a class and that class's loss": (selectivity, -changes),
        "of a filter and the whole loss": (strongest, -overall),
    }
    for name, (x, y) in pairs.items():

        def statistic(which: NDArray[np.int64], x: Any = x, y: Any = y) -> float:
            return spearman(x[..., which], y[..., which])

        value, low, high = with_interval(statistic, len(overall), resamples, seed)
        text = f"rank correlation {value:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
        print(f"selectivity {name:<34}: {text}")
    print("0: selectivity does not tell which filters matter, 1: both rank alike (see Morcos et al. 2018)")


def tabulate_probes(
    features: Mapping[str, Sequence[Sequence[Tensor]]],
    train_labels: NDArray[np.int64],
    test_labels: NDArray[np.int64],
    classes: int,
    decays: Sequence[float],
    steps: int,
    seed: int,
) -> pd.DataFrame:
    """Return probes.csv, a row a layer and network, and print it with the weight decay that was chosen.

    Args:
        features: For each network those of the training and of the test images, as from `pool_features`.
        train_labels: Of the training images.
        test_labels: Of the test images.
        classes: Number of classes.
        decays: To choose from.
        steps: Of the optimiser, at most.
        seed: Of the held-out fifth.
    """
    rows: list[dict[str, str | float]] = []
    for network, (learned, tested) in features.items():
        for layer, train, test in zip(LAYERS, learned, tested, strict=False):
            accuracy, decay = probe(train, train_labels, test, test_labels, classes, decays, steps, seed)
            error = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test_labels))
            row = {"accuracy": accuracy, "low": accuracy - error, "high": accuracy + error}
            rows.append({"layer": layer, "network": network, **row, "inputs": train.shape[1]})
            print(f"linear probe of {layer}, {network:<10}{accuracy:>7.1%} +- {error:.1%}, decay {decay:g}")
    return pd.DataFrame(rows)


def draw_ablation(
    changes: NDArray[np.float64],
    selectivity: NDArray[np.float64],
    curves: Mapping[str, NDArray[np.float64]],
    names: Sequence[str],
    heading: str,
) -> Figure:
    """Draw the damage of silencing each filter to each class, and the accuracy as more and more are silenced.

    Args:
        changes: Of the classes' accuracies (classes, filters).
        selectivity: Of each filter for each class (classes, filters); filters without one are left out.
        curves: Accuracies (orders, 1 + filters) for each way of ordering; of several the range is drawn.
        names: Of the classes.
        heading: Title.
    """
    known = np.flatnonzero(~np.isnan(selectivity).all(axis=0))
    preferred = np.nanargmax(selectivity[:, known], axis=0)
    order = np.lexsort((-selectivity[preferred, known], preferred))
    shown = -100 * changes[:, known[order]]
    fig, (ax, below) = plt.subplots(
        2, 1, figsize=(7, 6), dpi=200, height_ratios=[1.15, 1], layout="constrained"
    )
    if shown.size:
        top = float(np.nanpercentile(np.abs(shown), 99)) or 1
        options: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -top, "vmax": top, "interpolation": "nearest"}
        drawn = ax.imshow(shown, aspect="auto", extent=(0, shown.shape[1], len(names), 0), **options)
        fig.colorbar(drawn, ax=ax, pad=0.01, extend="both", label="accuracy lost (percentage points)")
    edges = np.searchsorted(preferred[order], np.arange(len(names) + 1))
    for number, (left, right) in enumerate(pairwise(edges.tolist())):
        ax.add_patch(Rectangle((left, number), right - left, 1, fill=False, edgecolor="0.2", linewidth=0.9))
    ax.set_yticks(np.arange(len(names)) + 0.5, list(names), parse_math=False)
    ax.set(xlabel="silenced filter, by preferred class (framed), then falling selectivity", ylabel="class")
    for k, (name, curve) in enumerate(curves.items()):
        steps, mean = np.arange(curve.shape[1]), 100 * curve.mean(axis=0)
        below.plot(steps, mean, color=f"C{k}", linestyle=("-", "--", "-.")[k % 3], label=name)
        if len(curve) > 1:
            low, high = 100 * curve.min(axis=0), 100 * curve.max(axis=0)
            below.fill_between(steps, low, high, color=f"C{k}", alpha=0.25, linewidth=0)
    below.set(xlabel="number of filters silenced", ylabel="test accuracy (%)", ylim=(0, None), xlim=(0, None))
    entries = below.get_legend_handles_labels()
    fig.legend(*entries, title="silenced first", loc="outside lower center", ncols=len(curves), frameon=False)
    sns.despine(ax=below)
    fig.suptitle(heading, fontsize=9, parse_math=False)
    return fig


def draw_trust(trust: pd.DataFrame, share: float, heading: str) -> Figure:
    """Draw trust.csv: what survives of an activation under each mask; how alike projections stay.

    Args:
        trust: Rows of `trust_row`, of both tests.
        share: Of the window's pixels, how many were kept or deleted.
        heading: Title.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 4.2), dpi=200, layout="constrained")
    masks = trust[trust["test"] == "faithfulness"].set_index("condition")
    for k, kind in enumerate(("kept", "deleted")):
        rows = masks.reindex([f"{name} {kind}" for name in ("projection", "other unit", "centre", "random")])
        label = ("these kept, the rest grey", "these grey, the rest kept")[k]
        draw_medians(left, np.arange(4.0) + 0.16 * k - 0.08, rows, f"C{k}", "os"[k], label)
    for text in ("window kept", "nothing kept"):
        height = masks["median"].get(text, np.nan)
        left.axhline(height, color="0.5", linestyle=":", linewidth=1)
        left.annotate(text, (-0.45, height), xytext=(0, 2), textcoords="offset points", fontsize=8)
    left.set_xticks(range(4), ["its own\nprojection", "another\nunit's", "nearness\nto centre", "chance"])
    left.set(xlim=(-0.5, 3.5), ylim=(0, 1.1), ylabel="share of the activation that survives")
    left.set(xlabel=f"what chooses {share:.0%} of the window's pixels", title="masked pixels")
    options: dict[str, Any] = {"frameon": False, "fontsize": 8}
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower left", **options)

    alike = trust[trust["test"] == "randomisation"].set_index("condition")
    steps = [LAYERS[-1], *(f"{LAYERS[-1]} to {layer}" for layer in reversed(LAYERS[:-1]))]
    for k, text in enumerate(("trained switches", "own switches")):
        rows = alike.reindex(["trained", *(f"{step} random, {text}" for step in steps)])
        places = np.arange(5.0) + 0.06 * (2 * k - 1)
        draw_medians(right, places, rows, f"C{2 + k}", "D^"[k], f"random weights, {text}", line="-")
    for text, style in (("other filter, same place", "--"), ("other filter, other image", ":")):
        row = alike.loc[text]
        right.axhline(row["median"], color="0.4", linestyle=style, linewidth=1, label=f"trained, {text}")
        right.axhspan(row["low"], row["high"], color="0.4", alpha=0.15, linewidth=0)
    right.set_xticks(range(5), ["none", *(step.replace(" to ", "\nto ") for step in steps)])
    right.set(xlabel="blocks with random weights", ylim=(0, 1.1), title="random weights")
    right.set(ylabel="rank correlation with\nthe trained projection")
    fig.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, **options)
    right.tick_params(axis="x", labelsize=8)
    sns.despine(fig)
    fig.suptitle(heading, fontsize=9, parse_math=False)
    return fig


def draw_medians(
    ax: Axes,
    places: NDArray[np.float64],
    rows: pd.DataFrame,
    colour: str,
    marker: str,
    label: str,
    line: str = "",
) -> None:
    """Draw the column median of `rows` with the interval low to high."""
    median = rows["median"].to_numpy(np.float64)
    reach = np.abs(rows[["low", "high"]].to_numpy(np.float64).T - median)
    style: dict[str, Any] = {"fmt": marker + line, "markersize": 4, "capsize": 2.5, "linewidth": 1}
    ax.errorbar(places, median, yerr=reach, color=colour, label=label, **style)


def draw_probes(probes: pd.DataFrame, test_accuracy: float, chance: float, heading: str) -> Figure:
    """Draw the accuracy of the linear probes of each layer, trained and untrained, with 95 % intervals."""
    fig, ax = plt.subplots(figsize=(5, 3.4), dpi=200, layout="constrained")
    for k, (network, rows) in enumerate(probes.groupby("network", sort=False)):
        scaled = 100 * rows[["accuracy", "low", "high"]].rename(columns={"accuracy": "median"})
        draw_medians(ax, np.arange(4.0), scaled, f"C{k}", "os"[k], str(network), line=("-", "--")[k])
    for text, share in (("the network itself", test_accuracy), ("chance", chance)):
        ax.axhline(100 * share, color="0.3", linestyle=":", linewidth=1)
        ax.annotate(text, (0, 100 * share), xytext=(-12, 3), textcoords="offset points", fontsize=8)
    inputs = probes.drop_duplicates("layer")["inputs"]
    ticks = [f"{layer}\n{count:,} inputs" for layer, count in zip(LAYERS, inputs, strict=True)]
    ax.set_xticks(range(4), ticks)
    ax.set(ylabel="test accuracy of a linear softmax (%)", ylim=(0, 100), xlim=(-0.3, 3.3))
    ax.legend(title="features of the network", frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    ax.set_title(heading, fontsize=9, parse_math=False)
    sns.despine(fig)
    return fig


def write(folder: Path, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, Figure]) -> None:
    """Write tables as csv, and figures, by file name, and say so."""
    for name, table in tables.items():
        with whole_file(folder / name) as partial:
            table.to_csv(partial, index=False, lineterminator="\n")
        print(f"wrote {folder / name}")
    for name, figure in figures.items():
        save_figure(figure, folder / name)
        print(f"wrote {folder / name}", flush=True)


def main() -> None:
    """Write the tables and figures, and say what they show and how far they can be trusted."""
    sns.set_theme(context="paper", style="white", palette="colorblind")
    outputs, network, data_dir = check_paths(OUTPUTS=OUTPUTS, CHECKPOINT=CHECKPOINT, DATA_DIR=DATA_DIR)
    check_numbers(1, RESAMPLINGS=RESAMPLINGS, RANDOM_ORDERS=RANDOM_ORDERS, RANDOMISED_UNITS=RANDOMISED_UNITS)
    check_numbers(1, BATCH_SIZE=BATCH_SIZE, CHUNK=CHUNK)
    check_numbers(2, NORM_IMAGES=NORM_IMAGES)
    check_numbers(1, PROBE_INPUTS=PROBE_INPUTS, PROBE_STEPS=PROBE_STEPS)
    check_numbers(1, 100, TOP_FILTERS=TOP_FILTERS)
    check_numbers(0, 2**32 - 1, SEED=SEED)
    check_numbers(0.001, 1, KEPT_SHARE=KEPT_SHARE)
    check_lists(1e-9, PROBE_DECAYS=PROBE_DECAYS)
    activations, statistics = read_measurements(outputs)
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(network, device)
    train, test = (load_split(checkpoint.dataset, data_dir, split) for split in ("train", "test"))
    units = read_top_units(outputs, activations, checkpoint, test)
    prepare_folders("OUTPUTS", outputs)
    data = f"{title(activations.dataset)}, {len(activations.arrays['labels']):,} test images"
    source = f"{data}, {checkpoint.measured_on} accuracy {checkpoint.metrics['test_accuracy']:.1%}"
    projected = f"projections of {len(statistics.arrays['labels']):,}"
    filters = tabulate_filters(activations, statistics, RESAMPLINGS, SEED)
    classes = tabulate_classes(activations, statistics)
    summary, names = summarise_layers(filters), activations.class_names
    rankings = {name: rank_filters(filters, classes, PROJECTED, name) for name in names}
    print(f"{len(filters)} filters, {data}, {projected}, checkpoint {activations.checkpoint_sha256[:12]}")
    print_summary(summary, rankings, TOP_FILTERS)

    heading = f"Distribution of each metric over the living filters\n{source}, {projected}"
    figures = {"metric_distributions.png": draw_distributions(filters, heading)}
    heading = f"Class selectivity of filters: 0 all classes alike, 1 one class only\n{source}"
    figures["selectivity.png"] = draw_selectivity(filters, summary, heading)
    heading = f"Top filters of {PROJECTED} for each class\n{source}"
    figures["top_filters.png"] = draw_top_filters(rankings, TOP_FILTERS, heading)
    write(outputs, {"filter_metrics.csv": filters, "class_metrics.csv": classes}, figures)

    # how far all this can be trusted
    batch, some = (device, BATCH_SIZE), train.images[:NORM_IMAGES]
    start = checkpoint._replace(net=untrained(checkpoint, some, device))
    features, maxima = {}, {}
    for name, of in (("trained", checkpoint), ("untrained", start)):
        passed = [pool_features(part.images, of, *batch, PROBE_INPUTS) for part in (train, test)]
        features[name], maxima[name] = [found for found, _ in passed], passed[-1][1]

    before = activations._replace(arrays=maxima["untrained"] | {"labels": test.labels})
    tables = {"trained": filters, "untrained": tabulate_filters(before, None, RESAMPLINGS, SEED)}
    own = without_copies(tables["untrained"], checkpoint.net.config)
    if own is not None:
        tables["untrained, without copies of the layer below"] = own
    compared = compare_networks(tables, RESAMPLINGS, SEED)
    print_comparison(compared)

    net, (_, tested) = checkpoint.net, features["trained"]
    silenced = contributions(net, tested[-1]), net.classifier.bias, test.labels
    changes, overall = silence_each(*silenced, len(names))
    selectivity = class_selectivity(mean_table(classes, PROJECTED, names))
    strongest = pd.DataFrame(selectivity).max().to_numpy(np.float64)  # for the preferred class, nan if dead
    rng, everyone = np.random.default_rng(SEED), np.arange(len(overall))
    shuffled = [rng.permutation(everyone) for _ in range(RANDOM_ORDERS)]
    orders = {
        "most selective": [np.argsort(-strongest, kind="stable")],
        "least selective": [np.argsort(strongest, kind="stable")],
        f"at random (mean and range of {RANDOM_ORDERS})": shuffled,
    }
    curves = {
        name: np.stack([silence_in_order(*silenced, order) for order in every])
        for name, every in orders.items()
    }
    print_correlations(changes, overall, selectivity, strongest, RESAMPLINGS, SEED)

    survived = surviving_shares(test.images, checkpoint, units, KEPT_SHARE, *batch, SEED)
    alike = randomise_weights(some, test.images, checkpoint, units, RANDOMISED_UNITS, *batch, CHUNK, SEED)
    measured = [("faithfulness", str(name), survived[name].to_numpy(np.float64)) for name in survived]
    measured += [("randomisation", name, values) for name, values in alike.items()]
    trust = pd.DataFrame([trust_row(*entry, RESAMPLINGS, SEED) for entry in measured])
    print(trust.to_string(index=False, float_format="{:.3f}".format))

    probes = tabulate_probes(features, train.labels, test.labels, len(names), PROBE_DECAYS, PROBE_STEPS, SEED)

    written = {"filter_metrics_untrained.csv": tables["untrained"], "trust.csv": trust, "probes.csv": probes}
    rows = classes.loc[classes["layer"] == PROJECTED, ["filter", "class"]]  # a filter's classes in turn
    ablation = rows.assign(accuracy_change=changes.T.ravel(), selectivity=selectivity.T.ravel())
    written["ablation.csv"] = ablation
    heading = "How much of the specialisation was learned: the filters of each layer,"
    heading += f" median and 95 % interval\n{source}"
    figures = {"specialisation.png": draw_specialisation(tables, compared, heading)}
    heading = f"What silencing filters of {PROJECTED} costs: one at a time, and more and more\n{source}"
    figures["ablation.png"] = draw_ablation(changes, selectivity, curves, names, heading)
    heading = f"Do projections of {PROJECTED} show what drives a filter, and what was learned?\n{source}"
    figures["trust.png"] = draw_trust(trust, KEPT_SHARE, heading)
    heading = f"What a linear classifier reads from each layer\n{source}"
    figures["probes.png"] = draw_probes(probes, checkpoint.metrics["test_accuracy"], 1 / len(names), heading)
    write(outputs, written, figures)
    print("next: uv run heatmap.py")


if __name__ == "__main__":
    with plain_errors():
        main()
