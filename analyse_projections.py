"""Measure every filter: how often it fires, which class it prefers, how strongly, what its projections hold.

Run:    uv run analyse_projections.py
Reads:  outputs/activations.npz, outputs/projection_statistics.npz
Writes: outputs/filter_metrics.csv, outputs/class_metrics.csv, outputs/metric_distributions.png,
        outputs/selectivity.png, outputs/top_filters.png

An activation is the strongest value of a filter in an image. All that is said about classes comes from
activations: a projection's non-zero pixels mostly measure the size of the receptive field and how much of it
the border cuts off.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from CNN import LAYERS
from load_data import Arrays, load_arrays, plain_errors, save_figure, title, whole_file

OUTPUTS = Path("outputs")
RESAMPLINGS = 1000  # bootstrap samples behind an interval, and shuffled label sets behind a p-value
SEED = 0  # of resampling and shuffling
TOP_FILTERS = 10  # filters of conv4 shown for each class

# Fixed by definition, not settings
PROJECTED = LAYERS[-1]  # the layer whose projections were measured
STATISTICS = ("nonzero_count", "mean", "variance", "max")  # of a projection
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
        index: NDArray[np.float64] = (means - rest) / (means + rest)
    return index


def halves(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 or 1 for each image, in turn within each class, so that both halves hold all classes alike."""
    half = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        half[members] = np.arange(len(members)) % 2
    return half


def prefer(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the class of the largest mean, ties to the lower: (..., classes, filters) to (..., filters)."""
    preferred: NDArray[np.int64] = np.where(np.isnan(means), -1, means).argmax(axis=-2)
    return preferred


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
    values: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: int,
    count: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Return class means (count, classes, filters) over images drawn with replacement within each class."""
    means = np.full((count, classes, values.shape[1]), np.nan)
    for label in np.unique(labels):
        members = values[labels == label]
        n = len(members)
        means[:, label] = rng.multinomial(n, np.full(n, 1 / n), count) @ members / n
    return means


def shuffled_means(
    values: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: int,
    count: int,
    rng: np.random.Generator,
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
    best: NDArray[np.float64] = np.take_along_axis(ordered, gain.argmax(axis=0)[None], 0)[0]
    return best


def detection(
    values: NDArray[np.float64], labels: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return area under the ROC curve, hit rate and false-alarm rate of each filter as a detector of a class.

    Class and threshold are chosen on one half of the images and applied to the other; the two ways round are
    averaged. Gale et al. 2020: a filter may be selective and yet miss most of its class.
    """
    half, found = halves(labels), []
    if not half.any():  # no class has two images
        return (np.full(values.shape[1], np.nan),) * 3
    for chosen in (half == 0, half == 1):
        preferred = prefer(by_class(np.mean, values[chosen], labels[chosen], classes))
        member = labels[:, None] == preferred
        fires = values[~chosen] >= best_threshold(values[chosen], member[chosen])
        inside = member[~chosen]
        with np.errstate(invalid="ignore"):
            hits = (fires & inside).sum(axis=0) / inside.sum(axis=0)
            alarms = (fires & ~inside).sum(axis=0) / (~inside).sum(axis=0)
        found.append((area_under_roc(values[~chosen], inside), hits, alarms))
    auc, hit_rate, alarm_rate = np.mean(found, axis=0)
    return auc, hit_rate, alarm_rate


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
        share: NDArray[np.float64] = (between - (k - 1) * within) / (total + within)
    return share


def lifetime_sparseness(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how few images a filter answers to: 0 to all alike, 1 to a single one.

    (1 - mean(r)^2 / mean(r^2)) / (1 - 1 / n) over n images (Treves & Rolls 1991, in the form of Vinje &
    Gallant 2000). Pitfall: it knows no classes; a filter may be sparse and answer to no class at all.
    """
    n = len(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        share: NDArray[np.float64] = (1 - values.mean(axis=0) ** 2 / (values**2).mean(axis=0)) / (1 - 1 / n)
    return share


def top_precision(
    values: NDArray[np.float64], members: NDArray[np.bool_], count: int = 9
) -> NDArray[np.float64]:
    """Return the share of a filter's `count` strongest images that are of its class (Zhou et al. 2015).

    Pitfall (Gale et al. 2020): nine images of 8,000 say nothing about the other thousands.
    """
    strongest = np.argsort(-values, axis=0, kind="stable")[:count]
    precision: NDArray[np.float64] = np.take_along_axis(members, strongest, 0).mean(axis=0)
    return precision


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


def tabulate_filters(activations: Arrays, statistics: Arrays, resamplings: int, seed: int) -> pd.DataFrame:
    """Return filter_metrics.csv: one row a filter of every layer.

    activation_*: mean, population variance and share above zero of the filter's activations over the images.
    Of conv4's projections the means over all projected images (max: the largest). What `specialisation` says
    follows. A dead filter has neither preferred_class nor selectivity; with images of one class only, no
    filter has a selectivity.
    """
    tables, names = [], activations.class_names
    for layer in LAYERS:
        values = activations.arrays[f"{layer}_max"]
        means = by_class(np.mean, values, activations.arrays["labels"], len(names))
        preferred, number = prefer(means), np.arange(values.shape[1])
        columns: dict[str, Any] = {"layer": layer, "filter": number, "dead": (values == 0).all(axis=0)}
        columns["activation_mean"] = values.mean(axis=0)
        columns["activation_variance"] = values.var(axis=0)
        columns["activation_nonzero"] = (values > 0).mean(axis=0)
        for key in STATISTICS:
            reduce = np.max if key == "max" else np.mean
            columns[key] = reduce(statistics.arrays[key], axis=0) if layer == PROJECTED else np.nan
        names_or_none = [
            None if dead else names[k] for dead, k in zip(columns["dead"], preferred, strict=True)
        ]
        columns["preferred_class"] = names_or_none
        rng = np.random.default_rng(seed)
        columns |= specialisation(values, activations.arrays["labels"], len(names), resamplings, rng)
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
    medians = living.groupby("layer")[
        ["selectivity", "selectivity_same", "auc", "activation_nonzero"]
    ].median()
    shares = living.groupby("layer")["significant"].mean()
    summary = summary.assign(nearly_dead=few.reindex(summary.index, fill_value=0))
    return summary.join(medians).join(shares)


def print_summary(summary: pd.DataFrame, rankings: Mapping[str, pd.DataFrame], count: int) -> None:
    """Print a line a layer of `summarise_layers` and, for each class, the first `count` of `rank_filters`."""
    print(
        f"{'layer':<8}{'filters':>8}{'dead':>6}{'nearly dead':>13}{'selectivity':>13}{'same images':>13}",
        end="",
    )
    print(f"{'AUC':>7}{'significant':>13}{'fires on':>10}")
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
    """Draw how each metric is distributed over a layer's living filters; logarithmic axes leave zeros out."""
    living = filter_metrics[~filter_metrics["dead"]]
    fig, axes = plt.subplots(2, 4, figsize=(8, 5), sharey=True, dpi=200, layout="constrained")
    for ax, (key, label) in zip(axes.flat, AXES.items(), strict=True):
        linear = key in ("activation_nonzero", "selectivity", "nonzero_count")
        for place, layer in enumerate(LAYERS):
            values = living.loc[living["layer"] == layer, key]
            values = values[values >= 0] if linear else values[values > 0]
            if len(values):
                ax.ecdf(values, color=f"C{place}", label=layer)
        ax.set(xlabel=label, ylim=(0, 1.02))
        if ax.lines and not linear:
            ax.set_xscale("log")
            low, high = ax.get_xlim()
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 12 * low else (1, 3)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
    fig.legend(handles=axes[0, 0].lines, loc="outside lower center", ncols=len(LAYERS))
    fig.supylabel("share of filters up to this value", size="medium")
    fig.suptitle(heading)
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
    ax.set_xticks(
        range(len(LAYERS)), ["{}\n{} filters, {} dead,\n{} nearly dead (x)".format(*row) for row in counts]
    )
    ax.set(ylim=(0, None), ylabel="class selectivity", title=heading)
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
    ax.set(xlabel=f"rank\n{marks}", title=heading)
    below = "min" if (index < 0).any() else "neither"  # below 0: fires less on this class than on the rest
    fig.colorbar(image, label="selectivity for the class", extend=below)
    return fig


def main() -> None:
    """Write both tables and the figures, and say what they show."""
    sns.set_theme(context="paper", style="white", palette="colorblind")
    activations, statistics = read_measurements(OUTPUTS)
    data = f"{title(activations.dataset)}, {len(activations.arrays['labels']):,} test images"
    projected = f"projections of {len(statistics.arrays['labels']):,}"
    filters, classes = (
        tabulate_filters(activations, statistics, RESAMPLINGS, SEED),
        tabulate_classes(activations, statistics),
    )
    summary, names = summarise_layers(filters), activations.class_names
    rankings = {name: rank_filters(filters, classes, PROJECTED, name) for name in names}
    print(f"{len(filters)} filters, {data}, {projected}, checkpoint {activations.checkpoint_sha256[:12]}")
    print_summary(summary, rankings, TOP_FILTERS)

    for name, table in (("filter_metrics.csv", filters), ("class_metrics.csv", classes)):
        with whole_file(OUTPUTS / name) as partial:
            table.to_csv(partial, index=False, lineterminator="\n")
        print(f"wrote {OUTPUTS / name}")
    heading = f"Distribution of each metric over the living filters\n{data}, {projected}"
    figures = {"metric_distributions.png": draw_distributions(filters, heading)}
    heading = f"Class selectivity of filters: 0 all classes alike, 1 one class only\n{data}"
    figures["selectivity.png"] = draw_selectivity(filters, summary, heading)
    heading = f"Top filters of {PROJECTED} for each class\n{data}"
    figures["top_filters.png"] = draw_top_filters(rankings, TOP_FILTERS, heading)
    for name, figure in figures.items():
        save_figure(figure, OUTPUTS / name)
        print(f"wrote {OUTPUTS / name}")
    print("next: uv run heatmap.py")


if __name__ == "__main__":
    with plain_errors():
        main()
