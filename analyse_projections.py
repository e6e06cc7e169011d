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
from load_data import Arrays, load_arrays, save_figure, title, whole_file

OUTPUTS = Path("outputs")
TOP_FILTERS = 10  # filters of conv4 shown for each class

# Fixed by definition, not settings
PROJECTED = LAYERS[-1]  # the layer whose projections were measured
STATISTICS = ("nonzero_count", "mean", "variance", "max")  # of a projection
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
        means: mu, mean activation of each filter on each class, (classes, filters), not negative; nan for a
            class without images. mu_rest is the mean of the other classes' mu, however many images they have.

    Returns:
        (classes, filters), -1 to 1; nan for a filter that never fires, or if there is no other class.
    """
    present = np.count_nonzero(~np.isnan(means), axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that is promised
        rest = (np.nansum(means, axis=0) - means) / (present - 1)
        index: NDArray[np.float64] = (means - rest) / (means + rest)
    return index


def tabulate_filters(activations: Arrays, statistics: Arrays) -> pd.DataFrame:
    """Return filter_metrics.csv: one row a filter of every layer.

    activation_*: mean, population variance and share above zero of the filter's activations over the images.
    Of conv4's projections the means over all projected images (max: the largest). A dead filter has neither
    preferred_class nor selectivity; with images of one class only, no filter has a selectivity.
    """
    tables, names = [], activations.class_names
    for layer in LAYERS:
        values = activations.arrays[f"{layer}_max"]
        means = by_class(np.mean, values, activations.arrays["labels"], len(names))
        preferred, number = np.nanargmax(means, axis=0), np.arange(values.shape[1])  # ties: the lower class
        columns: dict[str, Any] = {"layer": layer, "filter": number, "dead": (values == 0).all(axis=0)}
        columns["activation_mean"] = values.mean(axis=0)
        columns["activation_variance"] = values.var(axis=0)
        columns["activation_nonzero"] = (values > 0).mean(axis=0)
        for key in STATISTICS:
            reduce = np.max if key == "max" else np.mean
            columns[key] = reduce(statistics.arrays[key], axis=0) if layer == PROJECTED else np.nan
        columns["preferred_class"] = np.where(columns["dead"], None, np.array(names, dtype=object)[preferred])
        columns["selectivity"] = class_selectivity(means)[preferred, number]
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
    """Count the filters, dead and nearly dead ones of each layer; take medians over the living, if any."""
    living = filter_metrics[~filter_metrics["dead"]]
    summary = pd.DataFrame(filter_metrics.groupby("layer")["dead"].agg(filters="size", dead="sum"))
    few = living[living["activation_nonzero"] < NEARLY_DEAD].groupby("layer").size()
    medians = living.groupby("layer")[["selectivity", "activation_nonzero"]].median()
    return summary.assign(nearly_dead=few.reindex(summary.index, fill_value=0)).join(medians)


def print_summary(summary: pd.DataFrame, rankings: Mapping[str, pd.DataFrame], count: int) -> None:
    """Print a line a layer of `summarise_layers` and, for each class, the first `count` of `rank_filters`."""
    print(f"{'layer':<8}{'filters':>8}{'dead':>6}{'nearly dead':>13}{'selectivity':>13}{'fires on':>10}")
    for row in summary.itertuples():
        counts = f"{row.Index:<8}{row.filters:>8}{row.dead:>6}{row.nearly_dead:>13}"
        print(f"{counts}{row.selectivity:>13.3f}{row.activation_nonzero:>10.1%}")
    print(f"dead: fires on no image; nearly dead: on less than {NEARLY_DEAD:.0%}; of the living the median")
    print("selectivity, 0 (all classes alike) to 1 (one class only), and share of images a filter fires on")
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
    filters, classes = tabulate_filters(activations, statistics), tabulate_classes(activations, statistics)
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
    main()
