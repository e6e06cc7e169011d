import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

import heatmap
from analyse_projections import median_interval, spearman
from CNN import CNN, Checkpoint, load_checkpoint, save_checkpoint
from deconv import project_unit
from deconv_full import measure_activations
from load_data import Split, normalise, save_arrays

NAMES = ["a/b $x^$", "NA", "empty"]  # markup, a path separator, what pandas takes for nothing; no image
MEAN, STD = [0.45, 0.44, 0.41], [0.26, 0.25, 0.27]
DEAD = 3
Inputs = tuple[Split, Checkpoint, dict[str, NDArray[Any]]]


def save_network(seed: int) -> Checkpoint:
    torch.manual_seed(seed)
    net = CNN(filters=(4, 6, 8, 10), strides=(1, 1, 1, 1), head_size=1, classes=len(NAMES))
    net.blocks[3].bn.bias.data[DEAD] = -1000
    net.classifier.bias.data[2] = -1000  # no image has this class
    save_checkpoint(
        Path("outputs/CNN.pth"),
        net,
        dataset="shapes",
        class_names=NAMES,
        mean=MEAN,
        std=STD,
        seed=seed,
        epochs=1,
        metrics={"test_accuracy": 0.5},
    )
    return load_checkpoint(Path("outputs/CNN.pth"))


def write_tables(values: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    means = pd.DataFrame(values).groupby(labels).mean().reindex(range(2)).to_numpy()  # nan without images
    rest = means.min(axis=0)
    dead = np.asarray(values.max(axis=0) == 0)
    filters = pd.DataFrame({"layer": "conv4", "filter": np.arange(10), "dead": dead})
    filters["activation_mean"] = values.mean(axis=0)
    filters["activation_nonzero"] = (values > 0).mean(axis=0)
    filters["preferred_class"] = [
        None if d else NAMES[k]
        for d, k in zip(dead, np.nan_to_num(means, nan=-1).argmax(axis=0), strict=True)
    ]
    with np.errstate(invalid="ignore"):
        filters["selectivity"] = (means.max(axis=0) - rest) / (means.max(axis=0) + rest)
    classes = pd.DataFrame({"layer": "conv4", "filter": np.repeat(np.arange(10), 3), "class": NAMES * 10})
    classes["activation_mean"] = np.vstack([means, np.full(10, np.nan)]).T.ravel()
    filters.to_csv("outputs/filter_metrics.csv", index=False)
    classes.to_csv("outputs/class_metrics.csv", index=False)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> Inputs:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (7, 3, 96, 96), np.uint8), np.array([0, 1, 0, 1, 1, 0, 0]))
    monkeypatch.setattr(heatmap, "load_split", lambda *_: split)
    monkeypatch.setattr(heatmap, "DEVICE", "cpu")
    checkpoint = save_network(0)
    found = measure_activations(split.images, checkpoint, torch.device("cpu"), 4)
    save_arrays(
        Path("outputs/activations.npz"),
        checkpoint_sha256=checkpoint.sha256,
        dataset="shapes",
        class_names=NAMES,
        labels=split.labels,
        **found,
    )
    write_tables(found["conv4_max"], split.labels)
    return split, checkpoint, found


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> dict[str, Figure]:
    """What main() draws, by file name."""
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(heatmap, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    monkeypatch.setattr(heatmap, "TOP_FILTERS", 2)
    monkeypatch.setattr(heatmap, "SUMMED_FILTERS", 3)
    monkeypatch.setattr(heatmap, "OCCLUSION_STRIDE", 32)
    monkeypatch.setattr(heatmap, "OCCLUSION_STRIDE_MANY", 24)
    monkeypatch.setattr(heatmap, "SHIFTS", [-3, 0, 3])
    monkeypatch.setattr(heatmap, "ANGLES", [0, 90])
    with plt.rc_context():
        heatmap.main()
    plt.close("all")
    return drawn


def full_frame(inputs: Inputs, image: int, filter_: int) -> NDArray[np.float32]:
    split, checkpoint, found = inputs
    features = checkpoint.net.features(normalise(torch.from_numpy(split.images[image][None]), MEAN, STD))
    row, column = found["conv4_position"][image, filter_].tolist()
    return np.asarray(project_unit(checkpoint.net, features, 3, filter_, row, column))


def heading(figure: Figure) -> str:
    return figure.get_suptitle()


def refusal() -> str:
    with pytest.raises(SystemExit) as error:
        heatmap.main()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sums_equal_full_frame_projections_of_each_image(inputs: Inputs) -> None:
    split, checkpoint, found = inputs
    members = np.array([0, 2, 5, 6])
    groups = [heatmap.pairs(members, filter_) for filter_ in range(10)]
    magnitudes, signed = heatmap.sum_projections(
        split.images, checkpoint, torch.device("cpu"), found["conv4_position"], groups, 2, 3, "test"
    )
    expected = [[full_frame(inputs, image, filter_) for image in members] for filter_ in range(10)]
    assert sum(np.abs(frames).max() > 0 for frames in expected) > 3  # there is something to compare
    for number, frames in enumerate(expected):
        sums = np.sum(frames, axis=0), np.abs(frames).sum(axis=(0, 1))
        for got, right in zip((signed[number], magnitudes[number]), sums, strict=True):
            np.testing.assert_allclose(got, right, atol=1e-5 * np.abs(right).max())


def test_the_mean_map_of_a_class_is_its_average_magnitude(figures: dict[str, Figure], inputs: Inputs) -> None:
    panels = figures["class_1_NA.png"].axes[:8:7]  # of seven in a row, the left one
    assert [panel.get_ylabel().startswith("filter") for panel in panels] == [True, True]
    for panel in panels:
        filter_ = int(panel.get_ylabel().split()[1])
        frames = np.abs([full_frame(inputs, image, filter_) for image in (1, 3, 4)])
        expected = frames.sum(axis=1).mean(axis=0)
        shown = np.asarray(panel.images[0].get_array())
        np.testing.assert_allclose(shown, expected / expected.max(), atol=1e-5)
        assert panel.get_title().endswith(f"white: {expected.max():.2g}")


def test_file_names_hold_only_letters_digits_hyphens_and_underscores() -> None:
    assert heatmap.safe_name("../a b\\c$é-1_Z") == "_a_b_c_-1_Z"
    assert len(heatmap.safe_name("x" * 1000)) == 60


def test_filters_are_ordered_by_class_then_falling_selectivity_without_the_dead() -> None:
    table = pd.DataFrame(
        {
            "filter": [0, 1, 2, 3, 4],
            "dead": [False, False, True, False, False],
            "preferred_class": ["zebra", "ant", None, "zebra", "ant"],
            "selectivity": [0.2, 0.5, np.nan, 0.9, 0.5],
        }
    )
    assert heatmap.sort_filters(table, ["zebra", "ant"])["filter"].tolist() == [3, 0, 1, 4]


def test_class_filter_heatmap_shows_shares_of_each_living_filter(
    figures: dict[str, Figure], inputs: Inputs
) -> None:
    figure = figures["class_filter_heatmap.png"]
    assert "1 dead filters left out" in heading(figure)
    shares = np.ma.masked_invalid(np.asarray(figure.axes[1].images[0].get_array()))
    assert shares.shape == (3, 9)
    np.testing.assert_allclose(shares[:2].max(axis=0), 1)
    assert shares[2].mask.all()  # a class without images
    assert [text.get_text().split(" (")[0] for text in figure.axes[1].get_yticklabels()] == NAMES


def test_one_figure_a_class_that_has_images_and_each_names_its_data(
    figures: dict[str, Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"class_filter_heatmap.png", "class_0_a_b_x_.png", "class_1_NA.png", "images.png"}
    assert set(figures) == names | {"occlusion.png", "occlusion_correlation.png", "invariance.png"}
    assert all(
        "7 test images of generated shapes (test accuracy 50.0%)" in heading(figure)
        for figure in figures.values()
    )
    assert NAMES[0] in heading(figures["class_0_a_b_x_.png"])
    for figure in figures.values():
        figure.canvas.draw()  # names are not read as formulas, which here would raise


def test_dead_filters_are_never_among_the_top(figures: dict[str, Figure]) -> None:
    for name in ("class_0_a_b_x_.png", "class_1_NA.png"):
        rows = [ax.get_ylabel() for ax in figures[name].axes if ax.get_ylabel().startswith("filter")]
        assert len(rows) == 2
        assert not any(row.startswith(f"filter {DEAD}\n") for row in rows)


def test_the_run_says_what_is_skipped_and_that_it_is_the_last_stage(
    capsys: pytest.CaptureFixture[str], figures: dict[str, Figure]
) -> None:
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("drawing conv4 on 7 test images of generated shapes on cpu, torch ")
    assert "empty: no test images, nothing to draw" in lines
    assert any(line.startswith("occlusion: ") and "instead of 50" in line for line in lines)
    assert lines[-2:] == [
        "wrote outputs/heatmaps/invariance.png",
        "this was the last stage: look at the pictures in outputs/heatmaps/",
    ]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("CNN.pth", "train_CNN.py"),
        ("activations.npz", "deconv_full.py"),
        ("filter_metrics.csv", "analyse_projections.py"),
        ("class_metrics.csv", "analyse_projections.py"),
    ],
)
def test_a_missing_file_names_the_command_to_run(inputs: Inputs, name: str, command: str) -> None:
    path = Path("outputs") / name
    path.unlink()
    assert refusal() == f"{path} not found: run `uv run {command}` first"
    path.mkdir()
    assert refusal() == f"{path} is no file: remove it and run `uv run {command}` first"


def test_activations_of_another_checkpoint_are_refused(inputs: Inputs) -> None:
    save_network(1)
    assert "outputs/activations.npz is from another checkpoint or data set" in refusal()


def test_other_test_images_are_refused(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(inputs[0].images, 1 - inputs[0].labels)
    monkeypatch.setattr(heatmap, "load_split", lambda *_: split)
    assert "has other labels" in refusal()


def test_tables_that_do_not_fit_the_activations_are_refused(inputs: Inputs) -> None:
    path = Path("outputs/filter_metrics.csv")
    whole = path.read_text()
    for text in ("", "\0\xff", "layer,filter\n", whole[: len(whole) // 2], whole.replace("NA", "other")):
        path.write_text(text)
        assert "run `uv run analyse_projections.py` again" in refusal()
    write_tables(inputs[2]["conv4_max"] * np.float32(1.1), inputs[0].labels)
    assert "run `uv run analyse_projections.py` again" in refusal()


NUMBERS = ["TOP_FILTERS", "TOP_IMAGES", "SUMMED_FILTERS", "BATCH_SIZE", "CHUNK", "OCCLUDER", "RESAMPLINGS"]
NUMBERS += ["OCCLUSION_STRIDE", "OCCLUSION_STRIDE_MANY", "OCCLUDED_IMAGES", "OCCLUSION_BATCH"]
NUMBERS += ["INVARIANCE_IMAGES"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, value) for name in NUMBERS for value in (0, -1, 2.5, "many", None, True)),
        ("OCCLUSION_STRIDE_MANY", 49),
        *((name, 97) for name in ("OCCLUDER", "OCCLUSION_STRIDE", "OCCLUSION_STRIDE_MANY", "TOP_FILTERS")),
        ("TOP_IMAGES", 13),
        *((name, value) for name in ("SHIFTS", "ZOOMS", "ANGLES") for value in ([], "up", ["a"], 1.5, None)),
        *((name, value) for name in ("SHIFTS", "ANGLES") for value in ([float("nan")], [float("inf")])),
        *(("ZOOMS", value) for value in ([0], [-1], [101])),
        *((name, value) for name in ("OUTPUTS", "CHECKPOINT", "DATA_DIR") for value in (3, None)),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: object
) -> None:
    monkeypatch.setattr(heatmap, setting, value)
    shown = (
        f"{setting}[0] is {value[0]!r}" if isinstance(value, list) and value else f"{setting} is {value!r}"
    )
    assert refusal().startswith(f"{shown}; expected ")


FIRST = Path("outputs/activations.npz")
OTHER, IMPOSSIBLE = "does not fit the network or itself", "holds impossible values"


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        ("conv4_max", lambda values: values[:, 1:], OTHER),
        ("conv4_max", lambda values: values[1:], OTHER),
        ("conv4_max", lambda values: values[..., None], OTHER),
        ("conv4_max", lambda values: -values, IMPOSSIBLE),
        ("conv4_max", lambda values: values + np.float32(np.nan), IMPOSSIBLE),
        ("conv4_max", lambda values: values + np.float32(np.inf), IMPOSSIBLE),
        ("conv4_position", lambda values: values[..., :1], OTHER),
        ("conv4_position", lambda values: values[:, 1:], OTHER),
        ("conv4_position", lambda values: values * 0 + 6, IMPOSSIBLE),  # the map has 6 rows
        ("conv4_position", lambda values: values * 0 - 1, IMPOSSIBLE),
        ("labels", lambda values: values[1:], OTHER),
        ("labels", lambda values: values[:, None], OTHER),
    ],
)
def test_activations_that_cannot_be_right_are_refused(
    inputs: Inputs, key: str, change: Any, problem: str
) -> None:
    split, checkpoint, found = inputs
    arrays: dict[str, Any] = {"labels": split.labels, **found}
    arrays[key] = change(arrays[key])
    made_from: dict[str, Any] = {
        "checkpoint_sha256": checkpoint.sha256,
        "dataset": "shapes",
        "class_names": NAMES,
    }
    save_arrays(FIRST, **(made_from | arrays))
    assert refusal() == f"{FIRST} {problem}: run `uv run deconv_full.py` again"
    assert not Path("outputs/heatmaps").exists()
    save_arrays(FIRST, **(made_from | arrays | {key: arrays[key].astype(np.float64)}))
    assert f"has {key!r} of type float64, expected " in refusal()
    del arrays[key]
    save_arrays(FIRST, **(made_from | arrays))
    assert refusal() == f"{FIRST} has no {key!r}: run `uv run deconv_full.py` again"


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("filter_metrics", "layer", "conv3"),
        ("filter_metrics", "filter", 1.5),
        ("filter_metrics", "dead", "perhaps"),
        ("filter_metrics", "dead", True),
        ("filter_metrics", "preferred_class", ""),
        ("filter_metrics", "preferred_class", "=cmd()"),
        ("filter_metrics", "activation_mean", "text"),
        ("filter_metrics", "activation_mean", -1),
        ("filter_metrics", "activation_nonzero", 1.5),
        ("filter_metrics", "activation_nonzero", np.nan),
        ("filter_metrics", "selectivity", "text"),
        ("filter_metrics", "selectivity", 7),
        ("class_metrics", "layer", "conv1"),
        ("class_metrics", "filter", 0),
        ("class_metrics", "class", "other"),
        ("class_metrics", "activation_mean", np.nan),
    ],
)
def test_tables_with_a_wrong_column_are_refused(inputs: Inputs, name: str, column: str, value: Any) -> None:
    path = Path(f"outputs/{name}.csv")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    table.assign(**{column: value}).to_csv(path, index=False)
    assert refusal().endswith("do not belong to activations.npz: run `uv run analyse_projections.py` again")
    table.drop(columns=column).to_csv(path, index=False)
    assert refusal().endswith("do not belong to activations.npz: run `uv run analyse_projections.py` again")
    assert not Path("outputs/heatmaps").exists()


def test_a_layer_without_living_filters_is_refused(inputs: Inputs) -> None:
    split, checkpoint, found = inputs
    dead = {**found, "conv4_max": 0 * found["conv4_max"]}
    made_from: dict[str, Any] = {
        "checkpoint_sha256": checkpoint.sha256,
        "dataset": "shapes",
        "class_names": NAMES,
    }
    save_arrays(FIRST, **(made_from | dead | {"labels": split.labels}))
    write_tables(dead["conv4_max"], split.labels)
    assert refusal() == "no filter of conv4 fires on any test image: run `uv run train_CNN.py` again"


@pytest.mark.parametrize("count", [1, 2])
def test_one_test_image_goes_through(inputs: Inputs, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    split, checkpoint, found = inputs
    few = Split(split.images[:count], split.labels[:count])
    monkeypatch.setattr(heatmap, "load_split", lambda *_: few)
    for name, value in (("OCCLUSION_STRIDE", 48), ("OCCLUSION_STRIDE_MANY", 48), ("TOP_IMAGES", 9)):
        monkeypatch.setattr(heatmap, name, value)
    for name in ("SHIFTS", "ZOOMS", "ANGLES"):
        monkeypatch.setattr(heatmap, name, [1])
    with torch.no_grad():
        checkpoint.net.classifier.bias[0] = 1000  # the first image is classified correctly
    monkeypatch.setattr(heatmap, "load_checkpoint", lambda *_: checkpoint)
    arrays = {key: values[:count] for key, values in found.items()}
    made_from: dict[str, Any] = {
        "checkpoint_sha256": checkpoint.sha256,
        "dataset": "shapes",
        "class_names": NAMES,
    }
    save_arrays(FIRST, **(made_from | arrays | {"labels": few.labels}))
    write_tables(arrays["conv4_max"], few.labels)
    with plt.rc_context({"savefig.dpi": 20}):
        heatmap.main()
    assert len([*Path("outputs/heatmaps").glob("*.png")]) == 5 + count


def test_classes_whose_names_end_alike_in_a_file_name_have_files_of_their_own(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["../" + "x" * 300 + "$\\frac{$", "..\\" + "x" * 300 + "=cmd()", "empty"]
    checkpoint = inputs[1]._replace(class_names=names, measured_on="$\\frac$")
    monkeypatch.setattr(heatmap, "load_checkpoint", lambda *_: checkpoint)
    monkeypatch.setattr(heatmap, "correct_images", lambda *_: [np.empty(0, np.int64)] * 3)
    monkeypatch.setattr(heatmap, "TOP_FILTERS", 1)
    made_from: dict[str, Any] = {
        "checkpoint_sha256": checkpoint.sha256,
        "dataset": "shapes",
        "class_names": names,
    }
    save_arrays(FIRST, **(made_from | inputs[2] | {"labels": inputs[0].labels}))
    for path in (Path("outputs/filter_metrics.csv"), Path("outputs/class_metrics.csv")):
        table = pd.read_csv(path, keep_default_na=False)
        table.replace(dict(zip(NAMES, names, strict=True))).to_csv(path, index=False)
    with plt.rc_context({"savefig.dpi": 20}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name of 300 letters leaves a figure no room
        heatmap.main()
    files = sorted(path.name for path in Path("outputs/heatmaps").iterdir())
    assert files == [
        *(f"class_{k}__{'x' * 59}.png" for k in range(2)),
        "class_filter_heatmap.png",
        "images.png",
    ]
    assert {path.parent for path in Path().rglob("*.png")} == {Path("outputs/heatmaps")}


def test_a_single_degree_is_drawn_as_a_point() -> None:
    curves, examples = np.full((1, 3, 1), 0.5), np.zeros((1, 5, 3, 96, 96), np.float32)
    changes = dict.fromkeys(heatmap.CHANGES, heatmap.Change([5], curves, [5] * 5, examples))
    figure = heatmap.draw_invariance(changes, [0], NAMES, "")
    assert [line.get_marker() for ax in figure.axes for line in ax.lines] == ["."] * 9
    plt.close(figure)


def test_filters_of_a_class_are_drawn_on_scales_of_their_own() -> None:
    faint = np.random.default_rng(0).random((2, 96, 96)) * np.array([1, 1e-3])[:, None, None]
    ranking = pd.DataFrame({"filter": [0, 1], "selectivity": 0.5, "activation_mean": 0.1, "prefers": True})
    images, value = np.zeros((2, 1, 3, 96, 96), np.uint8), np.zeros((2, 1), np.float32)
    figure = heatmap.draw_class(ranking, faint, images, faint[:, None], value, "")
    for first, second in ((0, 3), (2, 5)):  # of three panels a row: the mean and what is laid over the image
        drawn = [np.asarray(figure.axes[p].get_images()[-1].get_array()) for p in (first, second)]
        assert np.allclose(np.median(drawn[0]), np.median(drawn[1]), rtol=0.05)
    assert [figure.axes[place].get_title().split()[-1] for place in (0, 3)] == ["1", "0.001"]
    plt.close(figure)


def test_a_filter_that_projects_nothing_is_drawn_without_a_warning() -> None:
    nothing = np.zeros((1, 96, 96))
    image = np.zeros((1, 1, 3, 96, 96), np.uint8)
    ranking = pd.DataFrame({"filter": [0], "selectivity": 0.5, "activation_mean": 0.1, "prefers": False})
    value = np.zeros((1, 1), np.float32)
    heatmap.draw_class(ranking, nothing, image, nothing[None], value, "").canvas.draw()
    heatmap.draw_images(image[0], nothing, np.zeros((1, 3, 96, 96)), ["x"], "").canvas.draw()
    plt.close("all")


CPU = torch.device("cpu")


def sum_network(pool: int) -> Checkpoint:
    """Its only filter of conv4 is the sum of the three channels, pooled once, where that is positive."""
    net = CNN((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (pool, 1, 1, 1), head_size=1, classes=2).eval()
    for block in net.blocks:
        torch.nn.init.ones_(block.conv.weight)
    return Checkpoint(
        net.requires_grad_(False), "shapes", ["a", "b"], [0.0] * 3, [1.0] * 3, 0, 1, {"test_accuracy": 1}, ""
    )


def test_occluded_copies_equal_squares_painted_by_hand_and_cut_by_the_border() -> None:
    side, stride = 9, 31
    covered = torch.from_numpy(heatmap.square_positions(side, stride))
    assert len(covered) == 3  # centres 15, 46, 77
    assert [line.nonzero().flatten().tolist() for line in covered] == [
        list(range(centre - 4, centre + 5)) for centre in (15, 46, 77)
    ]
    covered = torch.from_numpy(heatmap.square_positions(40, stride))
    image = torch.rand(3, 96, 96) + 1
    rows, columns = torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])
    copies = heatmap.occlude(image, covered[rows], covered[columns])
    for copy, r, c in zip(copies, rows.tolist(), columns.tolist(), strict=True):
        top, left = 15 + 31 * r - 20, 15 + 31 * c - 20
        for y in range(96):
            for x in range(96):
                hidden = top <= y < top + 40 and left <= x < left + 40
                assert torch.equal(copy[:, y, x], torch.zeros(3) if hidden else image[:, y, x])


def test_occluding_what_a_filter_cannot_see_leaves_its_activity() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (1, 3, 96, 96), np.uint8)
    covered = np.zeros((2, 96), bool)
    covered[0, 95] = covered[1, :50] = True  # pooling by 5 leaves the last row and column over
    found = heatmap.slide_square(image, np.array([0]), sum_network(5), CPU, covered, 3, "test")
    np.testing.assert_allclose(found.activity[0, 0], found.whole[0], rtol=1e-6)
    np.testing.assert_allclose(found.activity[0, :, 0], found.whole[0], rtol=1e-6)
    assert found.activity[0, 1, 1] < 0.9 * found.whole[0]


def test_the_drop_is_exactly_where_the_bright_patch_is() -> None:
    image = np.zeros((1, 3, 96, 96), np.uint8)
    image[:, :, 40:48, 16:24] = 255
    covered = heatmap.square_positions(8, 8)
    found = heatmap.slide_square(image, np.array([0]), sum_network(1), CPU, covered, 7, "test")
    expected = np.zeros((1, 12, 12))
    expected[0, 5, 2] = found.whole[0]
    np.testing.assert_allclose(found.whole, 3 * 64, rtol=1e-3)
    np.testing.assert_allclose(found.drop(), expected, rtol=1e-5)
    np.testing.assert_allclose(found.relative()[0, 5, 2], 0, atol=1e-6)
    magnitudes = image.sum(axis=1).astype(np.float64)
    np.testing.assert_allclose(heatmap.rank_correlations(found.drop(), magnitudes, covered), 1)
    assert np.isnan(heatmap.rank_correlations(found.drop(), 0 * magnitudes, covered)).all()


def test_a_filter_that_does_not_fire_has_no_share_and_no_correlation() -> None:
    image, covered = np.zeros((1, 3, 96, 96), np.uint8), heatmap.square_positions(32, 32)
    found = heatmap.slide_square(image, np.array([0]), sum_network(1), CPU, covered, 64, "test")
    assert np.isnan(found.relative()).all()
    assert np.isnan(heatmap.rank_correlations(found.drop(), np.ones((1, 96, 96)), covered)).all()
    label = np.array([0])
    figure = heatmap.draw_occlusion(image, found, np.zeros((1, 96, 96)), label, ["a", "b"], label, 32, 32, "")
    figure.canvas.draw()
    nothing = np.array([np.nan])
    assert np.isnan(median_interval(nothing, 1000, 0)).all()
    heatmap.draw_correlations(
        {"x": nothing, "y": nothing}, [median_interval(nothing, 1000, 0)] * 2, ""
    ).canvas.draw()
    plt.close("all")


def test_spearman_shares_ranks_among_ties() -> None:
    first, second = np.array([1, 2, 2, 4]), np.array([10, 300, 20, 4000])
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5)
    assert spearman(first, second) == pytest.approx(4.5 / 22.5**0.5)
    assert spearman(first, -second) == pytest.approx(-4.5 / 22.5**0.5)
    assert np.isnan(spearman(first, np.ones(4)))


def test_the_median_interval_holds_the_median_and_leaves_nan_out() -> None:
    values = np.array([np.nan, *np.random.default_rng(0).normal(0.3, 0.1, 50)])
    median, low, high = median_interval(values, 1000, 0)
    assert median == np.nanmedian(values)
    assert 0.2 < low < median < high < 0.4
    assert median_interval(np.array([0.5]), 1000, 0) == (0.5, 0.5, 0.5)


def test_images_are_taken_class_by_class_in_turn_and_the_control_is_the_next_that_fires() -> None:
    groups = [np.array([5, 9]), np.array([], np.int64), np.array([2, 3, 4])]
    assert heatmap.in_turn(groups, 4).tolist() == [5, 2, 9, 3]
    assert heatmap.in_turn(groups, 9).tolist() == [5, 2, 9, 3, 4]
    fires = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool)
    assert heatmap.next_firing(fires).tolist() == [2, 1, 0]


def test_only_correctly_classified_images_are_chosen(inputs: Inputs) -> None:
    split, checkpoint, _ = inputs
    guesses = checkpoint.net(normalise(torch.from_numpy(split.images), MEAN, STD)).argmax(dim=1).numpy()
    right = heatmap.correct_images(split.images, split.labels, checkpoint, CPU, 2, 1)
    expected = [np.flatnonzero((split.labels == k) & (guesses == k))[:2].tolist() for k in range(3)]
    assert [some.tolist() for some in right] == expected
    assert 0 < sum(map(len, expected)) < 7


def test_invariance_is_zero_for_the_unchanged_image_and_equals_a_direct_computation(inputs: Inputs) -> None:
    split, checkpoint, _ = inputs
    net, image = checkpoint.net, normalise(torch.from_numpy(split.images[:1]), MEAN, STD)[0]
    for kind, same in (("shift", 0.0), ("zoom", 1.0), ("angle", 0.0)):
        measured = heatmap.measure_invariance(net, image, 1, kind, [same])
        np.testing.assert_allclose(measured[:2], 0, atol=1e-4)
    down = torch.zeros_like(image)
    down[:, 3:] = image[:, :-3]
    before, after = net.features(image[None]), net.features(down[None])
    distances = [float((after[k][0] - before[k][0]).norm() / before[k][0].norm()) for k in (0, 3)]
    probability = float(net(down[None]).softmax(dim=1)[0, 1])
    measured = heatmap.measure_invariance(net, image, 1, "shift", [3.0])
    np.testing.assert_allclose(measured[:, 0], np.array([*distances, probability]), rtol=1e-3)
    assert min(distances) > 0.01


def test_the_map_of_the_most_probable_class_and_its_legend_name_the_right_classes() -> None:
    probability = np.zeros((1, 2, 2, 3), np.float32)
    probability[0, :, :, 0] = 0.4
    probability[0, 1, 0, 2] = 0.6
    ones = np.ones((1, 2, 2), np.float32)
    found = heatmap.Occlusion(np.ones(1, np.float32), ones, probability)
    image, magnitude = np.zeros((1, 3, 96, 96), np.uint8), np.ones((1, 96, 96))
    label, filters = np.array([2]), np.array([7])
    figure = heatmap.draw_occlusion(image, found, magnitude, label, NAMES, filters, 24, 48, "")
    axes = figure.axes[:5]
    assert np.asarray(axes[4].images[0].get_array()).tolist() == [[0, 0], [2, 0]]
    np.testing.assert_allclose(
        np.asarray(axes[3].images[0].get_array()), np.array([[0, 0], [0.6, 0]]), rtol=1e-6
    )
    legend = axes[4].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [NAMES[0], NAMES[2]]
    drawn = [axes[4].images[0].to_rgba(np.array([k]))[0, :3].tolist() for k in (0, 2)]
    assert drawn == [list(patch.get_facecolor()[:3]) for patch in legend.get_patches()]
    plt.close("all")


def test_a_network_that_is_never_right_leaves_these_figures_out(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heatmap, "correct_images", lambda *_: [np.empty(0, np.int64)] * 3)
    monkeypatch.setattr(heatmap, "save_figure", lambda *_: None)
    old = Path("outputs/heatmaps/occlusion.png")
    old.parent.mkdir()
    old.touch()
    with plt.rc_context():
        heatmap.main()
    plt.close("all")
    assert not old.exists()
    lines = capsys.readouterr().out.splitlines()
    assert f"{NAMES[1]}: no test image is classified correctly, none is occluded or changed" in lines
    assert lines[-2] == "nothing to occlude or change"
