import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

import analyse_projections
from analyse_projections import (
    adjusted,
    area_under_roc,
    best_threshold,
    class_selectivity,
    crossed_selectivity,
    draw_top_filters,
    halves,
    lifetime_sparseness,
    omega_squared,
    rank_filters,
    read_measurements,
    specialisation,
    summarise_layers,
    tabulate_classes,
    tabulate_filters,
    top_precision,
)
from CNN import LAYERS
from load_data import save_arrays

OUTPUTS = Path("outputs")
NAMES = ["cat, tabby", "$dog$_2", "ship"]
FIRST, SECOND = OUTPUTS / "activations.npz", OUTPUTS / "projection_statistics.npz"
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


def save(first: Values, second: Values, names: list[str] = NAMES) -> None:
    for path, arrays in ((FIRST, first), (SECOND, second)):
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
    assert set(map(Path, written)) == set(OUTPUTS.iterdir()) - {FIRST, SECOND}
    assert len(written) == 5
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


@pytest.mark.parametrize("missing", [FIRST, SECOND])
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
