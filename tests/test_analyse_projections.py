import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

import analyse_projections
from analyse_projections import (
    TopUnits,
    adjusted,
    area_under_roc,
    best_threshold,
    class_selectivity,
    compare_networks,
    contributions,
    crossed_selectivity,
    draw_distributions,
    draw_selectivity,
    draw_top_filters,
    halves,
    lifetime_sparseness,
    mask_pixels,
    omega_squared,
    pool_features,
    probe,
    project_magnitudes,
    randomise_weights,
    randomised,
    rank_filters,
    read_measurements,
    read_top_units,
    same_windows,
    silence_each,
    silence_in_order,
    similarities,
    spearman,
    specialisation,
    summarise_layers,
    surviving_shares,
    tabulate_classes,
    tabulate_filters,
    top_pixels,
    top_precision,
    trust_row,
    untrained,
    with_interval,
)
from CNN import CNN, LAYERS, Checkpoint, frame_sizes, receptive_fields
from deconv import project_unit, window_of
from deconv_full import measure_activations, top_images
from load_data import Arrays, Split, load_arrays, normalise, save_arrays

OUTPUTS = Path("outputs")
NAMES = ["cat, tabby", "$dog$_2", "ship"]
FIRST, SECOND = OUTPUTS / "activations.npz", OUTPUTS / "projection_statistics.npz"
THIRD = OUTPUTS / "projections.npz"
STATISTICS = ["nonzero_count", "mean", "variance", "max"]
METRICS = ["activation_mean", "activation_variance", "activation_nonzero"]
SPECIALISATION = ["selectivity", "selectivity_low", "selectivity_high", "selectivity_same", "auc"]
SPECIALISATION += ["hit_rate", "false_alarm_rate", "omega_squared", "precision", "sparseness", "p_adjusted"]
FILTER_COLUMNS = ["layer", "filter", "dead", *METRICS, *STATISTICS, "preferred_class", *SPECIALISATION]
FILTER_COLUMNS += ["significant"]
CLASS_COLUMNS = ["layer", "filter", "class", "activation_mean", *STATISTICS]

Values = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyse_projections, "RESAMPLINGS", 20)
    monkeypatch.setitem(plt.rcParams, "savefig.dpi", 20)


def activations() -> Values:
    """40 images of 3 classes of different size; 4 to 7 filters a layer, the first of each dead."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(3), (20, 12, 8)))
    values: Values = {"labels": labels.astype(np.int64)}
    for k, layer in enumerate(LAYERS):
        means = rng.lognormal(0, 0.3 + 0.3 * k, (3, 4 + k))
        strength = rng.gamma(2.0, means[labels]) - 0.5
        strength[:, 0] = 0
        values[f"{layer}_max"] = strength.clip(0).astype(np.float32)
    return values


def statistics(values: Values, image: NDArray[np.int64] | None = None) -> Values:
    rng = np.random.default_rng(1)
    image = np.arange(1, len(values["labels"]), 2) if image is None else image
    strength = values["conv4_max"][image]
    drawn = {key: (strength * rng.uniform(1, 9, strength.shape)).astype(np.float32) for key in STATISTICS}
    return {"labels": values["labels"][image], "image": image.astype(np.int64), **drawn}


def projections(first: Values) -> Values:
    """Top units as projections.npz has them, at random places; the network of `stand_in` fits the sizes."""
    rng = np.random.default_rng(2)
    image = top_images(first["conv4_max"], 9)
    value = np.where(image < 0, 0, first["conv4_max"][image, np.arange(len(image))[:, None]])
    found: Values = {
        "image": image,
        "value": value.astype(np.float32),
        "position": rng.integers(0, 3, (*image.shape, 2)).astype(np.int16),
        "origin": rng.choice(np.array([-30, 2, 34], np.int16), (*image.shape, 2)),
        "projection": rng.standard_normal((*image.shape, 3, 75, 75), np.float32),
    }
    return {f"conv4_{key}": values for key, values in found.items()}


def save(first: Values, second: Values, names: list[str] = NAMES) -> None:
    for path, arrays in ((FIRST, first), (SECOND, second), (THIRD, projections(first))):
        save_arrays(path, checkpoint_sha256="a1" * 32, dataset="shapes", class_names=names, **arrays)


def tables(
    strength: list[list[float]], labels: list[int], names: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables for a network whose four layers all have the activations `strength`, (images, filters)."""
    values = {f"{layer}_max": np.array(strength, np.float32) for layer in LAYERS}
    first = {"labels": np.array(labels), **values}
    save(first, statistics(first, np.arange(len(labels))), names)
    measured = read_measurements(OUTPUTS)
    return tabulate_filters(*measured, 20, 0), tabulate_classes(*measured)


def refusal() -> str:
    with pytest.raises(SystemExit) as caught:
        analyse_projections.main()
    message = str(caught.value)
    assert "\n" not in message
    assert not [*OUTPUTS.glob("*.csv"), *OUTPUTS.glob("*.png")]
    return message


def test_selectivity_worked_out_by_hand() -> None:
    means = np.array([[6.0, 1.0, 2.0], [1.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    expected = [
        [(6 - 2) / (6 + 2), 0, 1],
        [(1 - 4.5) / (1 + 4.5), 0, -1],
        [(3 - 3.5) / (3 + 3.5), 0, -1],
    ]
    np.testing.assert_allclose(class_selectivity(means), expected, rtol=1e-14)


def test_selectivity_leaves_classes_without_images_out() -> None:
    means = np.array([[6.0], [np.nan], [2.0]])
    np.testing.assert_array_equal(class_selectivity(means), [[0.5], [np.nan], [-0.5]])


def test_means_over_classes_count_each_class_once_however_many_images_it_has() -> None:
    # class means 4, 1, 3; mean of the other classes' means (1 + 3) / 2, not the mean of their images 1.5
    strength = [[4.0], [1.0], [1.0], [1.0], [3.0]]
    filters, classes = tables(strength, [0, 1, 1, 1, 2], NAMES)
    assert filters["selectivity_same"].tolist() == pytest.approx([(4 - 2) / (4 + 2)] * 4)
    assert filters["activation_mean"].tolist() == [2.0] * 4
    assert classes["activation_mean"].tolist() == [4.0, 1.0, 3.0] * 4


def test_ties_of_the_preferred_class_go_to_the_lower_index() -> None:
    filters, _ = tables([[1.0, 2.0], [5.0, 2.0], [5.0, 2.0]], [0, 1, 2], NAMES)
    assert filters["preferred_class"].tolist() == ["$dog$_2", "cat, tabby"] * 4


def test_variance_is_that_of_the_population() -> None:
    filters, _ = tables([[1.0], [2.0], [6.0], [0.0]], [0, 1, 2, 2], NAMES)
    mean = (1 + 2 + 6 + 0) / 4
    assert (
        filters["activation_variance"][0]
        == ((1 - mean) ** 2 + (2 - mean) ** 2 + (6 - mean) ** 2 + mean**2) / 4
    )
    assert filters["activation_nonzero"][0] == 0.75


def test_filter_metrics_agree_with_a_plain_loop() -> None:
    first = activations()
    second = statistics(first)
    save(first, second)
    table = tabulate_filters(*read_measurements(OUTPUTS), 20, 0)
    rows = {(row["layer"], row["filter"]): row for row in table.to_dict("records")}
    assert len(rows) == len(table) == 4 + 5 + 6 + 7
    for layer in LAYERS:
        for number, column in enumerate(first[f"{layer}_max"].astype(np.float64).T):
            row = rows[layer, number]
            assert row["activation_mean"] == pytest.approx(sum(column) / len(column))
            assert row["activation_variance"] == pytest.approx(np.mean(column**2) - np.mean(column) ** 2)
            assert row["activation_nonzero"] == sum(value > 0 for value in column) / len(column)
            assert row["dead"] == (number == 0)
            for key in STATISTICS:
                if layer != "conv4":
                    assert np.isnan(row[key])
                else:
                    reduced = (
                        max(second[key][:, number]) if key == "max" else sum(second[key][:, number]) / 20
                    )
                    assert row[key] == pytest.approx(reduced)


def test_class_metrics_agree_with_a_plain_loop() -> None:
    first = activations()
    second = statistics(first)
    save(first, second)
    table = tabulate_classes(*read_measurements(OUTPUTS))
    assert len(table) == (4 + 5 + 6 + 7) * 3
    for row in table.to_dict("records"):
        layer, number, label = row["layer"], row["filter"], NAMES.index(row["class"])
        of_class = [
            v for v, found in zip(first[f"{layer}_max"], first["labels"], strict=True) if found == label
        ]
        assert row["activation_mean"] == pytest.approx(sum(v[number] for v in of_class) / len(of_class))
        for key in STATISTICS:
            of_class = [v for v, found in zip(second[key], second["labels"], strict=True) if found == label]
            column = [v[number] for v in of_class]
            if layer == "conv4":
                assert row[key] == pytest.approx(max(column) if key == "max" else sum(column) / len(column))
            else:
                assert np.isnan(row[key])


def test_halves_hold_every_class_alike() -> None:
    labels = np.array([2, 0, 0, 2, 0, 1, 2, 0])
    assert halves(labels).tolist() == [0, 0, 1, 1, 0, 0, 0, 1]


def test_crossed_selectivity_by_hand() -> None:
    first = np.array([[6.0], [1.0], [2.0]])  # prefers the first class
    second = np.array([[3.0], [5.0], [1.0]])  # prefers the second
    on_second = (3 - 3) / (3 + 3)  # index of the first class there
    on_first = (1 - 4) / (1 + 4)
    assert crossed_selectivity(first, second) == pytest.approx([(on_second + on_first) / 2])


def test_noise_has_no_crossed_selectivity_while_the_same_images_flatter_it() -> None:
    rng = np.random.default_rng(3)
    values, labels = rng.gamma(1.0, 1.0, (400, 300)), np.arange(400) % 10
    found = specialisation(values, labels, 10, 99, rng)
    assert abs(found["selectivity"].mean()) < 0.03 < 0.1 < found["selectivity_same"].mean()
    assert (found["selectivity_low"] < 0).mean() > 0.9
    assert (found["p_adjusted"] < 0.05).mean() < 0.02
    assert abs(found["omega_squared"].mean()) < 0.002
    assert abs(found["auc"].mean() - 0.5) < 0.01


def test_a_filter_that_knows_its_class_is_significant_and_detects_it() -> None:
    rng = np.random.default_rng(4)
    labels = np.arange(400) % 10
    values = rng.uniform(0, 1, (400, 2))
    values[labels == 3, 0] += 2  # the first filter fires above 2 on class 3 and below 1 elsewhere
    found = specialisation(values, labels, 10, 99, rng)
    assert found["auc"][0] == found["precision"][0] == 1
    assert found["hit_rate"][0] >= 0.8  # the threshold is the least of one half; some of the other lie below
    assert found["false_alarm_rate"][0] == 0
    assert found["p_adjusted"][0] == pytest.approx(2 * 0.01)  # none of 99 reaches it; two filters are tested
    expected = (2.5 - 0.5) / (2.5 + 0.5)
    assert found["selectivity"][0] == pytest.approx(expected, abs=0.03)
    assert found["selectivity_low"][0] < found["selectivity"][0] < found["selectivity_high"][0]
    assert found["p_adjusted"][1] > 0.05


def test_bootstrap_intervals_have_the_width_of_the_standard_error() -> None:
    rng = np.random.default_rng(5)
    values, labels = rng.normal(5, 1, (400, 1)), np.repeat([0, 1], 200)
    means = analyse_projections.bootstrap_means(values, labels, 3, 4000, rng)
    assert means.shape == (4000, 3, 1) and np.isnan(means[:, 2]).all()
    assert means[:, 0].mean() == pytest.approx(values[:200].mean(), abs=0.01)
    assert means[:, 0].std() == pytest.approx(values[:200].std() / np.sqrt(200), rel=0.05)


def test_shuffled_labels_keep_the_class_sizes_and_the_total() -> None:
    rng = np.random.default_rng(6)
    values, labels = rng.uniform(0, 1, (30, 2)), np.repeat([0, 1, 3], (20, 4, 6))
    means = analyse_projections.shuffled_means(values, labels, 4, 120, rng)
    assert means.shape == (120, 4, 2) and np.isnan(means[:, 2]).all()
    total = 20 * means[:, 0] + 4 * means[:, 1] + 6 * means[:, 3]
    np.testing.assert_allclose(total, np.tile(values.sum(axis=0), (120, 1)), rtol=1e-5)
    assert means[:, 1, 0].std() > 0.05  # they are shuffled


def test_adjusted_p_values_by_hand() -> None:
    found = adjusted(np.array([0.04, np.nan, 0.01, 0.03, 0.5]))
    # four tests: 0.01 * 4 / 1; 0.03 * 4 / 2 = 0.06, but 0.04 * 4 / 3 = 0.0533 is smaller; 0.5 * 4 / 4
    assert found == pytest.approx([0.16 / 3, np.nan, 0.04, 0.16 / 3, 0.5], nan_ok=True)


def test_area_under_the_curve_counts_pairs_and_half_of_ties() -> None:
    rng = np.random.default_rng(7)
    values = rng.integers(0, 5, (40, 3)).astype(float)
    members = rng.random((40, 3)) < 0.3
    for k, found in enumerate(area_under_roc(values, members)):
        inside, outside = values[members[:, k], k], values[~members[:, k], k]
        pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
        assert found == pytest.approx(np.mean(pairs))


def test_the_best_threshold_is_found_by_trying_all() -> None:
    rng = np.random.default_rng(8)
    values, members = rng.integers(0, 9, (50, 20)).astype(float), rng.random((50, 20)) < 0.3

    def gain(k: int, t: float) -> float:
        fires = values[:, k] >= t
        return float(fires[members[:, k]].mean() - fires[~members[:, k]].mean())

    for k, found in enumerate(best_threshold(values, members)):
        assert gain(k, found) == pytest.approx(max(gain(k, t) for t in values[:, k]))


def test_omega_squared_by_hand() -> None:
    values, labels = np.array([[1.0], [3.0], [5.0], [7.0]]), np.array([0, 0, 1, 1])
    # grand mean 4, class means 2 and 6: SS_total 20, SS_between 16, MS_within (20 - 16) / 2 = 2
    assert omega_squared(values, labels, 3) == pytest.approx([(16 - 1 * 2) / (20 + 2)])


def test_sparseness_is_one_for_a_single_image_and_zero_for_all_alike() -> None:
    values = np.array([[1.0, 3.0, 0.0], [0.0, 3.0, 0.0], [0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    assert lifetime_sparseness(values) == pytest.approx([1, 0, (1 - 0.25 / 0.5) / 0.75])


def test_precision_counts_the_strongest_images_of_the_class() -> None:
    values = np.array([[5.0], [4.0], [3.0], [3.0], [1.0]])
    members = np.array([[True], [False], [False], [True], [True]])
    assert top_precision(values, members, 3) == pytest.approx([1 / 3])  # the tie goes to the lower index


def test_dead_filters_are_not_nearly_dead_and_one_in_a_hundred_is_not_nearly_dead() -> None:
    strength = np.zeros((300, 4))
    strength[:2, 1] = strength[:3, 2] = strength[:, 3] = 1  # 2, 3 and 300 of 300 images
    filters, _ = tables(strength.tolist(), [0, 1, 2] * 100, NAMES)
    summary = summarise_layers(filters)
    assert summary.index.tolist() == list(LAYERS)
    counts = {key: summary[key].tolist() for key in ("filters", "dead", "nearly_dead")}
    assert counts == {"filters": [4] * 4, "dead": [1] * 4, "nearly_dead": [1] * 4}
    assert summary["activation_nonzero"].tolist() == [0.01] * 4  # median of 2, 3 and 300 out of 300


def test_top_filters_prefer_the_class_then_others_follow_and_nearly_dead_ones_come_last() -> None:
    means = {  # of the classes, for each filter
        0: (0, 0, 0),  # dead
        1: (3, 3.5, 0),  # prefers another, yet its index for the first class is above that of filter 2
        2: (2, 1.8, 1.8),
        3: (4, 1, 1),
        4: (8, 2, 2),  # as selective as filter 3, and stronger
        5: (4, 1, 1),  # as filter 3
        6: (1, 5, 5),
    }
    strength = np.array(list(means.values()), dtype=float).T[[0, 1, 2] * 100]  # (300, 7)
    strength = np.concatenate([strength, np.zeros((300, 1))], axis=1)
    strength[0, 7] = 50  # filter 7: one image of the first class
    filters, classes = tables(strength.tolist(), [0, 1, 2] * 100, NAMES)
    ranking = rank_filters(filters, classes, "conv3", NAMES[0])
    assert ranking["filter"].tolist() == [4, 3, 5, 2, 1, 6, 7]
    assert ranking["name"].tolist() == ["4", "3", "5", "2", "1*", "6*", "7°"]
    assert ranking["selectivity"].tolist() == pytest.approx(
        [0.6, 0.6, 0.6, 0.2 / 3.8, 1.25 / 4.75, -4 / 6, 1]
    )
    assert ranking["activation_mean"].tolist() == pytest.approx([8, 4, 4, 2, 3, 1, 0.5])


def test_filters_rank_the_same_from_the_files() -> None:
    first = activations()
    save(first, statistics(first))
    measured = read_measurements(OUTPUTS)
    made = tabulate_filters(*measured, 20, 0), tabulate_classes(*measured)
    for table, path in zip(made, ("filters.csv", "classes.csv"), strict=True):
        table.to_csv(path, index=False)
    for layer in LAYERS:
        for name in NAMES:
            expected = rank_filters(*made, layer, name)
            found = rank_filters(pd.read_csv("filters.csv"), pd.read_csv("classes.csv"), layer, name)
            pd.testing.assert_frame_equal(found, expected)
            assert len(expected) == len(first[f"{layer}_max"][0]) - 1  # all that live


def test_a_run_writes_what_it_says_and_the_same_again(capsys: pytest.CaptureFixture[str]) -> None:
    first = activations()
    first["conv1_max"][:, 0] = -0.0
    save(first, statistics(first))
    analyse_projections.main()
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "22 filters, generated shapes, 40 test images, projections of 20, checkpoint a1a1a1a1a1a1"
    )
    assert lines[2].split()[:4] == ["conv1", "4", "1", "0"]
    assert lines[-1] == "next: uv run heatmap.py"
    written = [line.removeprefix("wrote ") for line in lines if line.startswith("wrote ")]
    assert set(map(Path, written)) == set(OUTPUTS.iterdir()) - {FIRST, SECOND, THIRD}
    assert len(written) == 13
    for path in written:
        assert path.endswith(".csv") or Path(path).read_bytes().startswith(b"\x89PNG")
        assert path in str(analyse_projections.__doc__)
    assert not plt.get_fignums()
    before = {path: path.read_bytes() for path in OUTPUTS.iterdir()}
    analyse_projections.main()
    assert {path: path.read_bytes() for path in OUTPUTS.iterdir()} == before

    filters, classes = pd.read_csv(OUTPUTS / "filter_metrics.csv"), pd.read_csv(OUTPUTS / "class_metrics.csv")
    assert filters.columns.tolist() == FILTER_COLUMNS
    assert classes.columns.tolist() == CLASS_COLUMNS
    assert filters["dead"].dtype == bool
    assert filters["filter"].dtype == classes["filter"].dtype == np.int64
    numbers = [*METRICS, *STATISTICS, *SPECIALISATION]
    assert set(filters[numbers].dtypes) == set(classes[CLASS_COLUMNS[3:]].dtypes) == {np.dtype(np.float64)}
    assert set(classes["class"]) == set(NAMES)

    # a dead filter has neither class nor selectivity, and a minus never stands before zero
    text = (OUTPUTS / "filter_metrics.csv").read_text()
    assert text.splitlines()[1] == "conv1,0,True,0.0,0.0,0.0" + "," * 17 + "False"
    assert text.splitlines()[1 + 4 + 5 + 6] == "conv4,0,True" + ",0.0" * 7 + "," * 13 + "False"
    assert not re.search(r"-0\.0[,\n]", text + (OUTPUTS / "class_metrics.csv").read_text())
    assert '"cat, tabby"' in text


def test_a_layer_without_living_filters_goes_through(capsys: pytest.CaptureFixture[str]) -> None:
    first = activations()
    for layer in ("conv2", "conv4"):
        first[f"{layer}_max"][:] = 0
    save(first, statistics(first))
    analyse_projections.main()
    assert capsys.readouterr().out.splitlines()[3].split()[:5] == ["conv2", "5", "5", "0", "nan"]
    filters = pd.read_csv(OUTPUTS / "filter_metrics.csv")
    assert filters.loc[filters["layer"] == "conv4", ["preferred_class", "selectivity"]].isna().all(axis=None)
    classes = pd.read_csv(OUTPUTS / "class_metrics.csv")
    assert rank_filters(filters, classes, "conv4", NAMES[0])["filter"].tolist() == []


def test_a_network_without_living_filters_goes_through() -> None:
    first = activations()
    for layer in LAYERS:
        first[f"{layer}_max"][:] = 0
    save(first, statistics(first))
    analyse_projections.main()
    assert pd.read_csv(OUTPUTS / "filter_metrics.csv")["dead"].all()


def test_a_data_set_of_one_class_leaves_selectivity_empty() -> None:
    first = activations()
    first["labels"][:] = 0
    save(first, statistics(first), NAMES[:1])
    analyse_projections.main()
    filters, classes = pd.read_csv(OUTPUTS / "filter_metrics.csv"), pd.read_csv(OUTPUTS / "class_metrics.csv")
    assert filters["selectivity"].isna().all()
    assert set(filters.loc[~filters["dead"], "preferred_class"]) == {NAMES[0]}
    ranking = rank_filters(filters, classes, "conv4", NAMES[0])
    assert ranking["activation_mean"].is_monotonic_decreasing
    assert len(ranking) == 6


def test_classes_without_images_have_rows_without_numbers_and_no_top_filters() -> None:
    filters, classes = tables([[1.0, 2.0], [3.0, 0.0]], [1, 1], NAMES)
    assert filters["selectivity"].isna().all()
    assert set(filters["preferred_class"]) == {NAMES[1]}
    assert classes["activation_mean"].tolist()[:3] == pytest.approx([np.nan, 2, np.nan], nan_ok=True)
    assert classes["max"].notna().equals((classes["class"] == NAMES[1]) & (classes["layer"] == "conv4"))
    assert len(rank_filters(filters, classes, "conv1", NAMES[0])) == 0
    assert len(rank_filters(filters, classes, "conv1", NAMES[1])) == 2


def test_one_image_goes_through() -> None:
    first = {key: values[:1] for key, values in activations().items()}
    save(first, statistics(first, np.array([0])))
    analyse_projections.main()
    assert pd.read_csv(OUTPUTS / "filter_metrics.csv")["activation_variance"].eq(0).all()


def test_class_names_are_drawn_as_they_are_written() -> None:
    first = activations()
    save(first, statistics(first))
    measured = read_measurements(OUTPUTS)
    tables = tabulate_filters(*measured, 20, 0), tabulate_classes(*measured)
    figure = draw_top_filters({name: rank_filters(*tables, "conv4", name) for name in NAMES}, 10, "heading")
    figure.canvas.draw()
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == NAMES
    assert not any(label.get_parse_math() for label in labels)
    assert len(figure.axes[0].texts) == 3 * 6  # six living filters, four places stay empty
    plt.close(figure)


@pytest.mark.parametrize("decades", [0.01, 0.3, 0.69, 0.71, 1.2, 1.9, 2.05, 2.5, 4.0, 5.0, 9.0, 20.0])
@pytest.mark.parametrize("lowest", [0.7, 9.3, 2.2e-7])
def test_axes_of_distributions_have_numbers_that_do_not_touch(decades: float, lowest: float) -> None:
    first = activations()
    save(first, statistics(first))
    filters = tabulate_filters(*read_measurements(OUTPUTS), 20, 0)
    for key in ("activation_variance", "mean", "variance"):
        filters[key] = lowest * 10 ** (decades * np.linspace(0, 1, len(filters)))
    figure = draw_distributions(filters, "heading")
    figure.canvas.draw()
    for ax in figure.axes:
        low, high = sorted(ax.get_xlim())
        ticks = [tick for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [tick.label1.get_window_extent() for tick in ticks]
        assert len(boxes) >= 2, ax.get_xlabel()
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), ax.get_xlabel()
    plt.close(figure)


def test_filters_below_zero_are_shown_in_the_figures_of_selectivity() -> None:
    first = activations()
    save(first, statistics(first))
    filters = tabulate_filters(*read_measurements(OUTPUTS), 20, 0)
    filters.loc[filters["layer"] == "conv1", "selectivity"] = -0.25
    figure = draw_selectivity(filters, summarise_layers(filters), "heading")
    assert figure.axes[0].get_ylim()[0] < -0.25
    plt.close(figure)
    figure = draw_distributions(filters, "heading")
    drawn = next(ax for ax in figure.axes if "selectivity" in ax.get_xlabel())
    assert np.min(drawn.lines[0].get_xdata()) == -0.25
    plt.close(figure)


@pytest.mark.parametrize("missing", [FIRST, SECOND, THIRD])
def test_a_missing_file_names_the_command(missing: Path) -> None:
    first = activations()
    save(first, statistics(first))
    missing.unlink()
    assert refusal() == f"{missing} not found: run `uv run deconv_full.py` first"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"checkpoint_sha256": "b2" * 32}, "come from different checkpoints"),
        ({"dataset": "stl10"}, "come from different data sets"),
        ({"class_names": ["cat", "dog", "ship"]}, "name different classes"),
    ],
)
def test_files_of_different_runs_are_refused(changed: dict[str, Any], problem: str) -> None:
    first = activations()
    save(first, statistics(first))
    content: dict[str, Any] = {"checkpoint_sha256": "a1" * 32, "dataset": "shapes", "class_names": NAMES}
    save_arrays(SECOND, **(content | changed | statistics(first)))
    assert refusal() == f"{FIRST} and {SECOND} {problem}: run `uv run deconv_full.py` again"


@pytest.mark.parametrize(
    ("file", "key", "change"),
    [
        (0, "conv2_max", lambda values: values[:-1]),
        (0, "conv2_max", lambda values: values[:, :0]),
        (0, "conv2_max", lambda values: values[:, :, None]),
        (0, "conv4_max", lambda values: values[:, :-1]),
        (0, "conv3_max", lambda values: values - 1),
        (0, "conv3_max", lambda values: values * np.float32(np.nan)),
        (0, "labels", lambda values: values[:-1]),
        (0, "labels", lambda values: values + 1),
        (0, "labels", lambda values: values[:, None]),
        (1, "labels", lambda values: values[::-1]),
        (1, "labels", lambda values: values[:-1]),
        (1, "image", lambda values: values + 1),
        (1, "image", lambda values: values - 2),
        (1, "image", lambda values: values[:0]),
        (1, "mean", lambda values: values[:, :-1]),
        (1, "mean", lambda values: values[:-1]),
        (1, "max", lambda values: values * np.float32(np.inf)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(file: int, key: str, change: Any) -> None:
    first = activations()
    files = first, statistics(first)
    with np.errstate(invalid="ignore"):
        files[file][key] = change(files[file][key])
    save(*files)
    message = refusal()
    assert message.startswith(f"{FIRST} and {SECOND} ")
    assert message.endswith(": run `uv run deconv_full.py` again")


# How far it can be trusted

CPU = torch.device("cpu")
MakeNet = Callable[..., CNN]


@pytest.fixture
def make_net(make_net: MakeNet) -> MakeNet:
    """As the fixture of all tests, but no filter starts as a copy of the layer below."""

    def make(seed: int = 0, **options: Any) -> CNN:
        net = make_net(seed, **options)
        for block in net.blocks:
            block.conv.reset_parameters()
        return net

    return make


def checkpoint_of(net: CNN, names: list[str] = NAMES) -> Checkpoint:
    return Checkpoint(net, "shapes", names, [0.4] * 3, [0.3] * 3, 5, 1, {"test_accuracy": 0.5}, "a1" * 32)


def some_images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 96, 96), np.uint8)


def stand_in_split(dataset: str, folder: Path, split: str) -> Split:
    """Images that the measurements of `save` would have come from."""
    labels = load_arrays(FIRST, "", {"labels": "int64"}).arrays["labels"]
    return Split(some_images(len(labels), len(split)), labels)


def stand_in_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """The checkpoint that they would have come from."""
    names = load_arrays(FIRST, "", {}).class_names
    torch.manual_seed(0)
    net = CNN(filters=(4, 5, 6, 7), classes=len(names)).eval().requires_grad_(False)
    return checkpoint_of(net, names)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyse_projections, "load_split", stand_in_split)
    monkeypatch.setattr(analyse_projections, "load_checkpoint", stand_in_checkpoint)
    for name, value in (("DEVICE", "cpu"), ("RANDOMISED_UNITS", 4), ("PROBE_STEPS", 5)):
        monkeypatch.setattr(analyse_projections, name, value)
    monkeypatch.setattr(analyse_projections, "PROBE_INPUTS", 20)


def units_of(checkpoint: Checkpoint, images: NDArray[np.uint8]) -> TopUnits:
    """The strongest unit of each filter of conv4 in each image, projected by the plain deconv.py."""
    net, found = checkpoint.net, []
    field, side = receptive_fields(net)[3], frame_sizes(net)[1][3]
    for number, image in enumerate(images):
        batch = normalise(torch.from_numpy(image[None]), checkpoint.mean, checkpoint.std)
        features = net.features(batch)
        pooled, switches = features[3]
        for filter_, values in enumerate(pooled[0]):
            row, column = divmod(int(values.argmax()), values.shape[-1])
            value = float(values[row, column])
            if value > 0:
                corner = [
                    at * field.jump + field.start
                    for at in divmod(int(switches[0, filter_, row, column]), side)
                ]
                magnitude = project_unit(net, features, 3, filter_, row, column).abs().sum(dim=0).numpy()
                found.append((filter_, number, value, (row, column), corner, magnitude, field.size))
    return TopUnits(*(np.array(entry) for entry in zip(*found, strict=True)))


def test_silencing_by_linear_algebra_is_zeroing_the_pooled_map(make_net: MakeNet) -> None:
    net = make_net(classes=3, head_size=2, dtype=torch.float64)
    pooled = torch.randn(40, 8, 3, 3, generator=torch.manual_seed(1)).double().clamp(min=0)
    labels = np.arange(40) % 2  # no image of the third class
    parts, bias = contributions(net, net.average(pooled).flatten(1)), net.classifier.bias
    before = net.classify(pooled)
    torch.testing.assert_close(parts.sum(dim=0) + bias, before)
    changes, overall = silence_each(parts, bias, labels, 3)
    assert len(overall) == 8 and np.isnan(changes[2]).all() and np.abs(overall).max() > 0
    for filter_ in range(8):
        zeroed = pooled.clone()
        zeroed[:, filter_] = 0
        after = net.classify(zeroed)
        torch.testing.assert_close(parts.sum(dim=0) + bias - parts[filter_], after)
        gain = (after.argmax(dim=1).numpy() == labels) * 1.0 - (before.argmax(dim=1).numpy() == labels)
        assert overall[filter_] == pytest.approx(gain.mean())
        for label in range(2):
            assert changes[label, filter_] == pytest.approx(gain[labels == label].mean())


def test_silencing_in_order_goes_from_the_network_to_the_class_of_the_bias(make_net: MakeNet) -> None:
    net = make_net(classes=3)
    net.classifier.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    pooled = 20 * torch.randn(40, 8, 3, 3, generator=torch.manual_seed(1)).clamp(min=0)
    labels, order = np.repeat(np.arange(3), (10, 13, 17)), np.array([3, 7, 0, 1, 2, 4, 5, 6])
    parts, bias = contributions(net, net.average(pooled).flatten(1)), net.classifier.bias
    curve = silence_in_order(parts, bias, labels, order)
    assert len(curve) == 9 and curve[-1] == 13 / 40 and len(set(curve.tolist())) > 3
    for count in (0, 1, 2, 5):
        zeroed = pooled.clone()
        zeroed[:, order[:count].copy()] = 0
        assert curve[count] == (net.classify(zeroed).argmax(dim=1).numpy() == labels).mean()


def test_rank_correlation_with_ties_worked_out_by_hand() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: products of deviations 2.25, squares 4.5 each
    x, y = np.array([1, 2, 2, 9, np.nan, 5]), np.array([-7, 3, 2, 2, 1, np.nan])
    assert spearman(x, y) == pytest.approx(2.25 / 4.5)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    assert np.isnan(spearman(x, 0 * x)) and np.isnan(spearman(x[:1], y[:1]))


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    value, low, high = with_interval(lambda which: float(values[which].mean()), 400, 1000, 0)
    assert value == values.mean() and low < value < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert np.isnan(with_interval(lambda which: 1.0, 0, 10, 0)).all()
    row = trust_row("a test", "a condition", np.array([4.0, np.nan, 2.0, 9.0]), 50, 0)
    assert row["median"] == 4 and row["n"] == 3 and 2 <= float(row["low"]) < float(row["high"]) <= 9


def test_top_pixels_are_the_largest_and_ties_go_to_the_first() -> None:
    found = top_pixels(np.array([[1.0, 5.0, 3.0], [3.0, 0.0, 3.0]]), 3)
    assert found.tolist() == [[False, True, True], [True, False, False]]


def test_masks_keep_the_right_number_of_the_right_pixels() -> None:
    rng = np.random.default_rng(0)
    magnitude = np.zeros((2, 96, 96), np.float32)
    magnitude[:, :45, 21:] = rng.random((2, 45, 75))
    none, corner = np.zeros(2, int), np.array([[-30, 21]] * 2)
    units = TopUnits(
        none, none, none, corner, corner, magnitude, none + 75
    )  # rows 0 to 44, columns 21 to 95; the centre is row 7, column 58
    window, count = np.zeros((96, 96), bool), round(0.3 * 45 * 75)
    window[:45, 21:] = True
    masks = mask_pixels(units, 0, 1, 0.3, rng)
    assert (masks["window kept"] == window).all() and not masks["nothing kept"].any()
    for name in ("projection", "other unit", "centre", "random"):
        kept = masks[f"{name} kept"]
        assert kept.sum() == count and not (kept & ~window).any()
        assert (masks[f"{name} deleted"] == ~kept).all()
    for k, name in enumerate(("projection", "other unit")):
        kept = masks[f"{name} kept"]
        assert magnitude[k][kept].min() > magnitude[k][window & ~kept].max()
    distance = np.hypot(*np.meshgrid(np.arange(96) - 7, np.arange(96) - 58, indexing="ij"))
    kept = masks["centre kept"]
    assert distance[kept].max() <= distance[window & ~kept].min() and kept[7, 58]
    assert 0.2 < masks["random kept"][:20, 21:].mean() < 0.4  # spread evenly


def test_another_unit_of_the_same_window_is_of_another_filter_in_another_image() -> None:
    filter_, image = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2])
    origin = np.array([[2, 2]] * 4 + [[2, 34]])
    units = TopUnits(filter_, image, image, origin, origin, image, image)
    drawn = [same_windows(units, np.random.default_rng(seed)) for seed in range(5)]
    assert all(row.tolist() == [3, 2, 1, 0, -1] for row in drawn)


def test_an_activation_survives_whole_if_all_that_it_sees_is_kept(make_net: MakeNet) -> None:
    checkpoint, images = checkpoint_of(make_net(classes=3)), some_images(4)
    units = units_of(checkpoint, images)
    options = checkpoint, units, 0.4, CPU, 5, 0
    shares = surviving_shares(images, *options)
    assert shares.index.tolist() == sorted(set(units.filter.tolist()))
    assert shares["window kept"].between(1 - 1e-4, 5).all()
    assert (shares["random kept"] - 1).abs().max() > 1e-3
    # the window being the whole image, everything is kept and the same unit is read
    whole = units._replace(origin=units.origin * 0 - 100, size=units.size * 0 + 300)
    shares = surviving_shares(images, checkpoint, whole, 1.0, CPU, 64, 0)
    for name in ("window kept", "projection kept", "random kept", "centre kept"):
        np.testing.assert_allclose(shares[name], 1, rtol=1e-4)
    np.testing.assert_allclose(shares["projection deleted"], shares["nothing kept"])


def test_what_survives_is_what_a_masked_image_gives(make_net: MakeNet) -> None:
    checkpoint, images = checkpoint_of(make_net(classes=3)), some_images(3)
    units = units_of(checkpoint, images).take(np.array([4]))
    shares = surviving_shares(images, checkpoint, units, 0.25, CPU, 64, 0)
    rows, columns = units.window(0)
    inside = units.magnitude[0][rows, columns]
    small = units.magnitude[0] < np.sort(inside.ravel())[-round(0.25 * inside.size)]
    batch = normalise(torch.from_numpy(images[units.image]), checkpoint.mean, checkpoint.std)
    batch[0][:, torch.from_numpy(small)] = 0
    row, column = units.position[0]
    expected = checkpoint.net.features(batch)[-1][0][0, units.filter[0], row, column] / units.value[0]
    assert shares["projection kept"].item() == pytest.approx(float(expected), rel=1e-4)
    assert shares["other unit kept"].isna().all()  # there is no other


def test_random_weights_come_from_the_top_and_leave_lower_blocks_alone(make_net: MakeNet) -> None:
    checkpoint, images = checkpoint_of(make_net(classes=3)), some_images(30)
    before = {key: value.clone() for key, value in checkpoint.net.state_dict().items()}
    for first in range(5):
        net = randomised(checkpoint, first, images, CPU, 1)
        assert not net.training and not any(module.training for module in net.modules())
        for k, (block, trained) in enumerate(zip(net.blocks, checkpoint.net.blocks, strict=True)):
            same = [
                torch.equal(value, trained.state_dict()[key]) for key, value in block.state_dict().items()
            ]
            assert all(same) if k < first else not any(same)
            if k >= first:
                centre = block.conv.weight[:, :, 1, 1]
                assert k == 0 or (centre.diagonal().abs() < 0.5).all()  # no copy of the layer below
                assert (block.bn.weight == 1).all() and (block.bn.bias == 0).all()
        if first < 4:  # the maps are on the scale that batch norm is for
            maps = normalise(torch.from_numpy(images), checkpoint.mean, checkpoint.std)
            for block in net.blocks[:first]:
                maps = block(maps)[0]
            block = net.blocks[first]
            normed = block.bn(block.conv(maps))
            torch.testing.assert_close(
                normed.mean(dim=(0, 2, 3)), torch.zeros(normed.shape[1]), atol=1e-4, rtol=0
            )
            torch.testing.assert_close(
                normed.std(dim=(0, 2, 3)), torch.ones(normed.shape[1]), atol=1e-2, rtol=0
            )  # a little less than 1 where the maps vary as little as batch norm's eps
    assert all(torch.equal(value, before[key]) for key, value in checkpoint.net.state_dict().items())


def test_the_untrained_network_is_the_one_of_the_seed_and_the_same_every_time(make_net: MakeNet) -> None:
    checkpoint, images = checkpoint_of(make_net(classes=3)), some_images(8)
    torch.manual_seed(99)
    first = untrained(checkpoint, images, CPU)
    following = torch.rand(1)
    second = untrained(checkpoint, images, CPU)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    torch.manual_seed(99)
    assert following == torch.rand(1)  # random numbers elsewhere do not change
    torch.manual_seed(checkpoint.seed)
    new = CNN(**checkpoint.net.config)
    for name, value in new.named_parameters():
        assert torch.equal(value, first.get_parameter(name)), name


def test_a_last_batch_of_one_image_whose_map_is_a_point_is_left_out(make_net: MakeNet) -> None:
    net = make_net(pool_sizes=(4, 4, 3, 1), classes=3)
    assert frame_sizes(net)[1][-1] == 1
    checkpoint, images = checkpoint_of(net), some_images(101)
    first, second = (untrained(checkpoint, some, CPU).state_dict() for some in (images, images[:100]))
    assert all(map(torch.equal, first.values(), second.values()))


def test_magnitudes_are_those_of_the_plain_projection(make_net: MakeNet) -> None:
    checkpoint, images = checkpoint_of(make_net(classes=3)), some_images(3)
    units, other = units_of(checkpoint, images), make_net(seed=7, classes=3)
    found = project_magnitudes(images, checkpoint, units, checkpoint.net, CPU, 2, 3)
    np.testing.assert_allclose(found * units.value[:, None, None], units.magnitude, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(similarities(units, units.magnitude, found), 1, atol=1e-3)
    elsewhere = project_magnitudes(images, checkpoint, units, other, CPU, 2, 3)
    assert np.median(similarities(units, units.magnitude, elsewhere)) < 0.95


def test_similarity_is_that_of_ranks_within_the_units_own_window() -> None:
    rng = np.random.default_rng(0)
    first = rng.random((1, 96, 96), np.float32)
    entry = np.zeros(1, int)
    units = TopUnits(entry, entry, entry, np.zeros((1, 2), int), np.array([[-5, 40]]), first, entry + 75)
    second = np.exp(first)
    second[0, 70:] = second[0, :, :40] = -rng.random()  # outside rows 0 to 69 and columns 40 to 95
    assert similarities(units, first, second).tolist() == pytest.approx([1])
    second[0, 69, 40:] = 0
    assert similarities(units, first, second)[0] < 1 - 1e-6


def test_random_weights_change_projections_and_trained_ones_do_not(make_net: MakeNet) -> None:
    checkpoint, images = checkpoint_of(make_net(classes=3)), some_images(6)
    units = units_of(checkpoint, images)
    found = randomise_weights(images, images, checkpoint, units, 12, CPU, 4, 8, 0)
    assert len(found) == 3 + 4 * 2 and {len(values) for values in found.values()} == {12}
    np.testing.assert_allclose(found.pop("trained"), 1, atol=1e-3)
    assert all(np.nanmedian(values) < 0.95 for values in found.values())
    same = found["conv4 random, own switches"] != found["conv4 random, trained switches"]
    assert same.any()


def test_a_probe_learns_what_can_be_learned_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, test_labels = np.arange(300) % 3, np.arange(900) % 3
    noise, test_noise = (torch.randn(len(part), 20, generator=generator) for part in (labels, test_labels))
    options = test_labels, 3, (0.001, 0.1), 50, 0
    accuracy, _ = probe(noise, labels, test_noise, *options)
    assert abs(accuracy - 1 / 3) < 0.08
    ways = 1e3 * torch.randn(3, 20, generator=generator)  # standardised, whatever the scale
    accuracy, decay = probe(
        1e3 * noise + 3 * ways[labels], labels, 1e3 * test_noise + 3 * ways[test_labels], *options
    )
    assert accuracy > 0.99 and decay in (0.001, 0.1)


def test_a_probe_does_not_depend_on_the_scale_of_its_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(200) % 2
    inputs = torch.randn(200, 30, generator=generator) + 0.5 * torch.from_numpy(labels)[:, None]
    scales = torch.logspace(-3, 3, 30)
    scaled = torch.cat([inputs * scales + 7, torch.zeros(200, 1)], dim=1)  # and one that never changes
    found = [
        probe(part[:100], labels[:100], part[100:], labels[100:], 2, (0.1,), 50, 0)[0]
        for part in (inputs, scaled)
    ]
    assert found[0] == pytest.approx(found[1], abs=0.021) and found[0] > 0.8


def test_the_decay_of_a_probe_is_chosen_on_images_that_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(200) % 2  # little to learn, and more inputs than images: a small decay learns by heart
    inputs = torch.randn(200, 300, generator=generator)
    inputs[:, :40] += 0.6 * torch.from_numpy(labels)[:, None]
    assert probe(inputs, labels, inputs, labels, 2, (1e-5, 1.0), 50, 0)[1] == 1.0


def test_pooled_features_are_averages_of_about_as_many_regions_in_every_layer(make_net: MakeNet) -> None:
    checkpoint, images = checkpoint_of(make_net(classes=3, head_size=3)), some_images(5)
    found, maxima = pool_features(images, checkpoint, CPU, 2, 60)
    assert [part.shape for part in found] == [(5, 5 * 9), (5, 6 * 9), (5, 7 * 9), (5, 8 * 9), (5, 8 * 9)]
    batch = normalise(torch.from_numpy(images), checkpoint.mean, checkpoint.std)
    pooled = checkpoint.net.features(batch)[1][0]  # 12 x 12 into 3 x 3 regions
    torch.testing.assert_close(
        found[1].view(5, 6, 3, 3),
        pooled.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5)),
        rtol=1e-4,
        atol=1e-5,
    )
    logits = checkpoint.net.classifier(found[-1])
    torch.testing.assert_close(logits, checkpoint.net(batch), rtol=1e-4, atol=1e-4)
    measured = measure_activations(images, checkpoint, CPU, 2)
    for layer in LAYERS:
        np.testing.assert_array_equal(maxima[f"{layer}_max"], measured[f"{layer}_max"])


def metrics(strength: NDArray[Any], labels: NDArray[np.int64]) -> pd.DataFrame:
    """The table of a network without projections whose four layers have the activations `strength`."""
    values = {f"{layer}_max": strength.astype(np.float64) for layer in LAYERS}
    return tabulate_filters(Arrays("", "shapes", NAMES, {"labels": labels} | values), None, 99, 0)


def test_filters_that_learned_a_class_are_told_from_noise() -> None:
    rng, labels = np.random.default_rng(9), np.arange(600) % 3
    noise = rng.gamma(2.0, 1.0, (600, 40))
    knows = np.where(labels[:, None] == np.arange(40) % 3, 1.0, 0.0) + 1e-3 * noise
    tables = {"trained": metrics(knows, labels), "untrained": metrics(noise, labels)}
    compared = compare_networks(tables, 200, 0)
    for layer in LAYERS:
        found = {name: compared[layer, "selectivity", name] for name in ("trained", "untrained", "learned")}
        assert found["trained"][0] == pytest.approx(1, abs=0.01)
        assert found["untrained"][1] < 0.03 and found["untrained"][2] > -0.03
        assert found["learned"][0] == pytest.approx(found["trained"][0] - found["untrained"][0])
        assert found["learned"][1] > 0.9
        assert compared[layer, "auc", "trained"] == (1, 1, 1)
        assert compared[layer, "auc", "untrained"][0] == pytest.approx(0.5, abs=0.02)
        assert compared[layer, "omega_squared", "trained"][0] > 0.99
        assert abs(compared[layer, "omega_squared", "untrained"][0]) < 0.01
        assert compared[layer, "significant", "trained"][0] == 1
        assert compared[layer, "significant", "untrained"][0] < 0.1


def test_networks_are_compared_over_living_filters_by_number() -> None:
    columns = {"layer": "conv2", "filter": range(5), "significant": [True, True, True, False, False]}
    trained = pd.DataFrame(columns | {"dead": [False, False, False, False, True]})
    trained["selectivity"] = trained["auc"] = trained["omega_squared"] = [0.5, 0.7, 0.6, 0.9, np.nan]
    untrained = trained.assign(dead=[True, False, False, False, False], significant=[False] * 4 + [True])
    for key in ("selectivity", "auc", "omega_squared"):
        untrained[key] = [np.nan, 0.1, 0.3, 0.2, 0.0]
    compared = compare_networks({"trained": trained, "untrained": untrained}, 50, 0)
    assert compared["conv2", "selectivity", "trained"][0] == pytest.approx(0.65)  # of 0.5, 0.6, 0.7, 0.9
    assert compared["conv2", "selectivity", "untrained"][0] == pytest.approx(0.15)  # of 0, 0.1, 0.2, 0.3
    assert compared["conv2", "selectivity", "learned"][0] == pytest.approx(0.7 - 0.2)  # filters 1, 2 and 3
    assert compared["conv2", "significant", "trained"][0] == 0.75
    assert compared["conv2", "significant", "untrained"][0] == 0.25
    assert np.isnan(compared["conv3", "auc", "learned"]).all()  # no filters at all


def test_the_interval_of_what_was_learned_draws_filters_in_pairs() -> None:
    rng = np.random.default_rng(0)
    start = pd.DataFrame({"layer": "conv1", "filter": np.arange(200), "dead": False, "significant": True})
    for key in ("selectivity", "auc", "omega_squared"):
        start[key] = rng.random(200)
    end = start.assign(selectivity=start["selectivity"] + 0.2)
    compared = compare_networks({"trained": end, "untrained": start}, 50, 0)
    assert compared["conv1", "selectivity", "learned"] == pytest.approx((0.2, 0.2, 0.2))


def test_the_first_filters_of_the_untrained_network_are_copies_of_the_layer_below(make_net: MakeNet) -> None:
    checkpoint, images = checkpoint_of(make_net(classes=3)), some_images(24)
    net = untrained(checkpoint, images, CPU)
    _, maxima = pool_features(images, checkpoint._replace(net=net), CPU, 6, 20)
    labels, above = np.arange(24) % 3, list(zip(LAYERS, net.blocks, strict=True))
    for (below, _), (layer, block) in pairwise(above):
        filters = maxima[f"{below}_max"].shape[1]
        norm = block.bn
        assert norm.running_mean is not None and norm.running_var is not None
        mean, deviation = norm.running_mean[:filters], (norm.running_var[:filters] + norm.eps).sqrt()
        expected = (maxima[f"{below}_max"] - mean.numpy()) / deviation.numpy()
        copies = maxima[f"{layer}_max"][:, :filters]
        np.testing.assert_allclose(copies, expected.clip(0), rtol=1e-3, atol=1e-4)
        assert (np.abs(maxima[f"{layer}_max"][:, filters:] - expected[:, :1]) > 1e-2).any(axis=0).all()
        assert (expected > 0).all()  # nothing is cut off: the same images in the same order
        upper, lower = (metrics(strength, labels)["auc"] for strength in (copies, maxima[f"{below}_max"]))
        np.testing.assert_allclose(upper, lower)


def test_the_table_of_the_untrained_network_is_that_of_its_activations() -> None:
    first = activations()
    save(first, statistics(first))
    analyse_projections.main()
    table = pd.read_csv(OUTPUTS / "filter_metrics_untrained.csv")
    assert table.columns.tolist() == [name for name in FILTER_COLUMNS if name not in STATISTICS]
    assert table.groupby("layer").size().tolist() == [4, 5, 6, 7]
    checkpoint = stand_in_checkpoint(Path(), CPU)
    train, test = (stand_in_split("", Path(), split) for split in ("train", "test"))
    start = checkpoint._replace(net=untrained(checkpoint, train.images, CPU))
    measured = measure_activations(test.images, start, CPU, 7)
    for layer in LAYERS:
        found = table[table["layer"] == layer]
        np.testing.assert_allclose(found["activation_mean"], measured[f"{layer}_max"].mean(axis=0), rtol=1e-5)
    trained = pd.read_csv(OUTPUTS / "filter_metrics.csv")
    assert not np.allclose(trained["activation_mean"], table["activation_mean"])


def test_top_units_lie_where_the_file_says_and_empty_places_are_left_out() -> None:
    first = activations()
    first["conv4_max"][5:, 2] = 0  # fires on at most five images
    save(first, statistics(first))
    measured, test = read_measurements(OUTPUTS)[0], Split(some_images(40), first["labels"])
    net = CNN(filters=(4, 5, 6, 7), classes=3)
    units = read_top_units(OUTPUTS, measured, checkpoint_of(net), test)
    top = projections(first)
    assert len(units.image) == (top["conv4_image"] >= 0).sum() < 6 * 9
    assert 0 not in units.filter and units.value.min() > 0
    for k in (0, 20, 40):
        (place,) = np.argwhere(
            (top["conv4_image"] == units.image[k]) & (np.arange(7)[:, None] == units.filter[k])
        )
        magnitude = np.abs(top["conv4_projection"][tuple(place)]).sum(axis=0)
        origin = top["conv4_origin"][tuple(place)].tolist()
        there = window_of(np.ones((1, 96, 96)), origin[0], origin[1], 75, 0)[0]
        np.testing.assert_array_equal(
            window_of(units.magnitude[k][None], origin[0], origin[1], 75, 0)[0], magnitude * there
        )
        assert units.magnitude[k].sum() == pytest.approx((magnitude * there).sum(), rel=1e-5)
        assert units.value[k] == first["conv4_max"][units.image[k], units.filter[k]]


def test_tables_of_trust_have_their_rows_and_columns() -> None:
    first = activations()
    save(first, statistics(first))
    analyse_projections.main()
    ablation, trust, probes = (
        pd.read_csv(OUTPUTS / f"{name}.csv") for name in ("ablation", "trust", "probes")
    )
    assert ablation.columns.tolist() == ["filter", "class", "accuracy_change", "selectivity"]
    assert ablation["class"].tolist() == NAMES * 7
    classes = pd.read_csv(OUTPUTS / "class_metrics.csv")
    of_filter = classes[(classes["layer"] == "conv4") & (classes["filter"] == 3)]["activation_mean"]
    expected = class_selectivity(of_filter.to_numpy()[:, None])[:, 0]
    assert ablation.loc[ablation["filter"] == 3, "selectivity"].tolist() == pytest.approx(expected.tolist())
    assert ablation.loc[ablation["filter"] == 0, "selectivity"].isna().all()  # dead
    assert trust.columns.tolist() == ["test", "condition", "median", "low", "high", "n"]
    assert trust["test"].value_counts().to_dict() == {"randomisation": 11, "faithfulness": 10}
    known = trust[trust["n"] > 0]
    assert len(known) > 15 and ((known["low"] <= known["median"]) & (known["median"] <= known["high"])).all()
    assert probes.columns.tolist() == ["layer", "network", "accuracy", "low", "high", "inputs"]
    assert probes["layer"].tolist() == [*LAYERS, *LAYERS]
    assert probes["network"].tolist() == ["trained"] * 4 + ["untrained"] * 4
    width = 2 * 1.96 * np.sqrt(probes["accuracy"] * (1 - probes["accuracy"]) / 40)
    np.testing.assert_allclose(probes["high"] - probes["low"], width)


WRONG = "holds impossible values or those of other activations"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"checkpoint_sha256": "b2" * 32}, "is from another checkpoint or data set"),
        ({"dataset": "stl10"}, "is from another checkpoint or data set"),
        ({"conv4_image": np.full((7, 9), 40, np.int32)}, "does not fit activations.npz"),
        ({"conv4_origin": np.zeros((7, 8, 2), np.int16)}, "does not fit activations.npz"),
        ({"conv4_projection": np.zeros((7, 9, 3, 35, 35), np.float32)}, "does not fit activations.npz"),
        ({"conv4_image": np.full((7, 9), -2, np.int32)}, "does not fit activations.npz"),
        ({"conv4_image": np.zeros(63, np.int32)}, "does not fit activations.npz"),
        ({"conv4_image": np.ones((7, 9), np.int32)}, WRONG),  # other images have other values
        ({"conv4_value": np.ones((7, 9), np.float32)}, WRONG),
        ({"conv4_value": np.full((7, 9), np.nan, np.float32)}, WRONG),
        ({"conv4_position": np.full((7, 9, 2), 3, np.int16)}, WRONG),  # the map has 3 rows
        ({"conv4_position": np.full((7, 9, 2), -1, np.int16)}, WRONG),
        ({"conv4_origin": np.full((7, 9, 2), -29, np.int16)}, WRONG),  # a unit's is -30, -14, ... or 50
        ({"conv4_origin": np.full((7, 9, 2), 66, np.int16)}, WRONG),
        ({"conv4_projection": np.full((7, 9, 3, 75, 75), np.inf, np.float32)}, WRONG),
    ],
)
def test_projections_of_another_run_are_refused(changed: dict[str, Any], problem: str) -> None:
    first = activations()
    save(first, statistics(first))
    content: dict[str, Any] = {"checkpoint_sha256": "a1" * 32, "dataset": "shapes", "class_names": NAMES}
    save_arrays(THIRD, **(content | projections(first) | changed))
    assert refusal() == f"{THIRD} {problem}: run `uv run deconv_full.py` again"


def test_another_checkpoint_and_other_labels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first = activations()
    save(first, statistics(first))
    other = checkpoint_of(CNN(filters=(4, 5, 6, 7), classes=3))._replace(sha256="c3" * 32)
    with monkeypatch.context() as patch:
        patch.setattr(analyse_projections, "load_checkpoint", lambda path, device: other)
        text = f"{FIRST} is from another checkpoint or data set: run `uv run deconv_full.py` again"
        assert refusal() == text
    labels = Split(some_images(40), (first["labels"] + 1) % 3)
    monkeypatch.setattr(analyse_projections, "load_split", lambda *names: labels)
    assert refusal() == f"{FIRST} has other labels: run `uv run deconv_full.py` again"


def test_another_number_of_filters_than_the_networks_is_refused() -> None:
    first = activations()
    first["conv2_max"] = first["conv2_max"][:, 1:]
    save(first, statistics(first))
    assert refusal() == f"{FIRST} has another number of filters: run `uv run deconv_full.py` again"


def test_files_without_a_key_or_of_another_type_are_refused() -> None:
    first = activations()
    second = statistics(first)
    for path, arrays in ((FIRST, first), (SECOND, second), (THIRD, projections(first))):
        for key, values in arrays.items():
            save(first, second)
            made_from = {"checkpoint_sha256": "", "dataset": "shapes", "class_names": NAMES}
            content: dict[str, Any] = {name: arrays[name] for name in arrays if name != key}
            save_arrays(path, **(made_from | content))
            assert refusal() == f"{path} has no {key!r}: run `uv run deconv_full.py` again"
            content[key] = values.astype(np.float16)
            save_arrays(path, **(made_from | content))
            assert f"{path} has {key!r} of type float16, expected" in refusal()
        path.write_bytes(path.read_bytes()[:1000])
        assert refusal().startswith(f"{path} is damaged")


@pytest.mark.parametrize("top", [1, 12])
def test_any_number_of_top_images_will_do(top: int) -> None:
    first = activations()
    save(first, statistics(first))
    whole = projections(first)
    if top == 1:
        cut = {key: values[:, :1] for key, values in whole.items()}
    else:
        cut = {key: np.concatenate([values, values[:, :3]], axis=1) for key, values in whole.items()}
    made_from: dict[str, Any] = {"checkpoint_sha256": "a1" * 32, "dataset": "shapes", "class_names": NAMES}
    save_arrays(THIRD, **(made_from | cut))
    units = read_top_units(
        OUTPUTS,
        read_measurements(OUTPUTS)[0],
        stand_in_checkpoint(Path(), CPU),
        stand_in_split("", Path(), "test"),
    )
    assert len(units.image) == (cut["conv4_image"] >= 0).sum() == 6 * top


NUMBERS = ["RESAMPLINGS", "RANDOM_ORDERS", "RANDOMISED_UNITS", "BATCH_SIZE", "CHUNK", "NORM_IMAGES"]
NUMBERS += ["PROBE_INPUTS", "PROBE_STEPS", "TOP_FILTERS"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, value) for name in NUMBERS for value in (0, -1, 2.5, "many", None, True, 10**400)),
        ("NORM_IMAGES", 1),
        *(("SEED", value) for value in (-1, 0.5, "zero", 2**63)),
        *(("KEPT_SHARE", value) for value in (0, 2, -0.1, float("nan"), "a quarter", [0.25])),
        *(("PROBE_DECAYS", value) for value in ((), (0,), (-1,), ("a",), 0.1, float("inf"), "0.1", None)),
        *((name, value) for name in ("OUTPUTS", "CHECKPOINT", "DATA_DIR") for value in (None, 3)),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: object
) -> None:
    monkeypatch.setattr(analyse_projections, setting, value)
    shown = f"{setting} is {value!r}"
    if isinstance(value, tuple | list) and len(value) == 1 and setting == "PROBE_DECAYS":
        shown = f"{setting}[0] is {value[0]!r}"
    assert refusal().startswith(f"{shown}; expected ")


def test_settings_say_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyse_projections, "KEPT_SHARE", 2)
    assert refusal() == "KEPT_SHARE is 2; expected a number from 0.001 to 1"
    monkeypatch.setattr(analyse_projections, "KEPT_SHARE", 1)
    monkeypatch.setattr(analyse_projections, "BATCH_SIZE", 0)
    assert refusal() == "BATCH_SIZE is 0; expected a whole number from 1 to 1,000,000"
    monkeypatch.setattr(analyse_projections, "BATCH_SIZE", 1)
    monkeypatch.setattr(analyse_projections, "PROBE_DECAYS", [])
    assert refusal() == "PROBE_DECAYS is []; expected one or more numbers, as [1, 2] or [1]"
    monkeypatch.setattr(analyse_projections, "PROBE_DECAYS", [0.1, -1])
    assert refusal() == "PROBE_DECAYS[1] is -1; expected a number from 1e-09 to 1,000,000"


STRANGE = ["=cmd()|' /C calc'!A0", "$\\frac{$ ../../x", "x" * 300]


def test_strange_class_names_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    first = activations()
    save(first, statistics(first), STRANGE)
    strange = stand_in_checkpoint(Path(), CPU)._replace(measured_on="$\\frac$")
    monkeypatch.setattr(analyse_projections, "load_checkpoint", lambda *_: strange)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name of 300 letters leaves a figure no room
        analyse_projections.main()
    assert pd.read_csv(OUTPUTS / "class_metrics.csv")["class"].tolist() == STRANGE * 22
    assert all(path.parent == OUTPUTS for path in Path().rglob("*.*"))


def test_filters_that_start_as_copies_are_left_out_only_where_there_are_any() -> None:
    filters = (1, 3, 3, 4)
    layer = np.repeat(np.array(LAYERS), filters)
    number = np.concatenate([np.arange(count) for count in filters])
    table = pd.DataFrame({"layer": layer, "filter": number})
    own = analyse_projections.without_copies(table, {"filters": filters, "partial_identity": True})
    assert own is not None
    kept = list(own.itertuples(index=False, name=None))
    assert kept == [("conv1", 0), ("conv2", 1), ("conv2", 2), ("conv4", 3)]
    assert analyse_projections.without_copies(table, {"filters": filters, "partial_identity": False}) is None
