import html
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import FAST, FILTERS, NEEDS_CHROMIUM, MakeNet, make_checkpoint, run_in_page
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

import heatmap
import load_data
from analyse_projections import Run, recalibrate_batch_norm, tabulate
from CNN import CNN, LAYERS, load_checkpoint
from deconv import crop, displayed, page_json, project_unit
from deconv_full import Units, measure_activations
from heatmap import Inputs, Occluder, Occlusion, transform
from load_data import STL10_CLASSES, Array, Split


def some_images(count: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 96, 96), np.uint8)


def lively(make_net: MakeNet) -> CNN:
    """A network most of whose filters fire."""
    return recalibrate_batch_norm(make_net(classes=3), 0, some_images(20))


def make_inputs(net: CNN, test: Split, filters: pd.DataFrame | None = None) -> Inputs:
    """What figures are made from, with a network's own activations and without tables but filter_metrics."""
    measured = measure_activations(test.images, net, 5, "")
    nothing = pd.DataFrame()
    return Inputs(
        checkpoint=make_checkpoint(net, class_names=["a", "b", "c"]),
        test=test,
        maxima=measured["conv4_max"],
        positions=measured["conv4_position"],
        filters=nothing if filters is None else filters,
        classes=nothing,
        ablation=nothing,
        trust=nothing,
        outputs=Path("outputs"),
    )


def shown(figure: Figure, panel: int) -> Array:
    """What the last picture of a panel holds."""
    return np.asarray(figure.axes[panel].get_images()[-1].get_array())


def number_in(label: str) -> int:
    """The number of the filter that the text beside a row names."""
    match = re.search(r"filter (\d+)", label)
    assert match
    return int(match[1])


class Drawn(NamedTuple):
    """What main() draws of the pipeline's results, by file name, and what it is made from."""

    figures: dict[str, Figure]
    inputs: Inputs

    def magnitude(self, image_index: Any, filter_index: Any) -> Array:
        """The magnitude of a projection from the peak activation, by deconv.py."""
        batch = self.inputs.net.normalise(torch.from_numpy(self.inputs.test.images[[image_index]]))
        row, column = self.inputs.positions[image_index, filter_index].tolist()
        projection = project_unit(self.inputs.net, batch, 3, filter_index, row, column)
        return np.asarray(projection.abs().sum(dim=0))


@pytest.fixture(scope="module")
def drawn(pipeline: Path) -> Drawn:
    figures: dict[str, Figure] = {}

    def keep(path: Path, figure: Figure) -> None:
        figures[path.name] = figure
        plt.close(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pipeline)
        patch.setattr(load_data, "check_file", lambda path: None)  # as if these had been published
        patch.setattr(heatmap, "write_explorer", lambda *_: None)
        patch.setattr(heatmap, "remove_old", lambda _: None)
        patch.setattr(heatmap, "save_table", lambda *_: None)
        for name, value in {**FAST[heatmap], "DEVICE": "cpu", "save_figure": keep}.items():
            patch.setattr(heatmap, name, value)
        heatmap.main()
        checkpoint = load_checkpoint("outputs/CNN.pth")
        return Drawn(figures, heatmap.read_inputs(checkpoint, pipeline / "data", pipeline / "outputs"))


# ---------------------------------------------------------------- classes and single images


def test_filters_stand_by_class_vehicles_first_then_by_falling_selectivity_without_the_dead() -> None:
    # 2 is dead; 5 is nearly dead; 6 is as selective as 0, and stronger
    filters = pd.DataFrame(
        {
            "filter": range(7),
            "dead": [False, False, True, False, False, False, False],
            "preferred_class": ["bird", "car", None, "bird", "car", "car", "bird"],
            "selectivity": [0.2, 0.5, np.nan, 0.9, 0.4, 1.0, 0.2],
            "activation_mean": [3.0, 1.5, 0, 4.5, 2.5, 0.1, 8],
            "activation_nonzero": [0.5, 0.5, 0, 0.01, 0.5, 0.0099, 0.5],
        }
    )
    means = np.array([[4.0, 1, 0, 6, 1, 0, 10], [2, 2, 0, 3, 4, 0.2, 6]])  # of bird and car
    figure = heatmap.draw_class_filters(means, filters, ["bird", "car"])
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["car", "bird"]
    assert [label.get_text() for label in ax.texts] == ["1", "4", "5", "3", "6", "0"]
    car, bird = (np.asarray(image.get_array()) for image in ax.images)
    np.testing.assert_allclose(car, [[2 / 1.5, 4 / 2.5, 2], [1 / 1.5, 1 / 2.5, 0]])
    np.testing.assert_allclose(bird, [[3 / 4.5, 6 / 8, 2 / 3], [6 / 4.5, 10 / 8, 4 / 3]])
    frames: Any = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert [(*frame.get_xy(), frame.get_width()) for frame in frames] == [(0, 0, 3), (4, 1, 3)]
    plt.close(figure)


def test_groups_of_filters_fill_lines_and_long_ones_are_broken() -> None:
    lines = heatmap.break_into_lines([[7, 8], [], [1, 2, 3, 4, 5, 6], [9]], 4)
    groups = [[(group.row, group.filters) for group in line] for line in lines]
    # 7, 8 and an empty column leave no room for four; 5, 6 and an empty column leave one for 9
    assert groups == [[(0, [7, 8])], [(2, [1, 2, 3, 4])], [(2, [5, 6]), (3, [9])]]


def test_filters_that_prefer_the_class_come_first_and_nearly_dead_ones_last() -> None:
    # 0 is dead; 1 prefers another class, yet has a higher index than 2; 4 is as selective as 3, and stronger;
    # 5 is as 3; 7 fires on two images
    peaks_by_class: Any = [[0, 3, 2, 4, 8, 4, 1, 0], [0, 3.5, 1.8, 1, 2, 1, 5, 0], [0, 0, 1.8, 1, 2, 1, 5, 0]]
    peaks = np.tile(peaks_by_class, (100, 1))
    peaks[[0, 3], 7] = 25
    labels = np.tile([0, 1, 2], 100)
    names = ["dog", "cat", "ship"]
    test = Split(some_images(1), labels)
    run = Run(make_checkpoint(CNN(), class_names=names), test, test, "", Path())
    filters, classes = tabulate(dict.fromkeys(LAYERS, peaks), run, 9)
    ranking = heatmap.rank_filters(filters, classes, names, 0)
    assert ranking["filter"].tolist() == [4, 3, 5, 2, 1, 6, 7]
    assert ranking["prefers"].tolist() == [True] * 4 + [False] * 2 + [True]
    assert ranking["selectivity"].tolist() == pytest.approx([0.6, 0.6, 0.6, 1 / 19, 5 / 19, -2 / 3, 1])
    assert ranking["activation_mean"].tolist() == pytest.approx([8, 4, 4, 2, 3, 1, 0.5])


def test_sums_are_sums_of_full_frame_projections_along_the_last_axis(make_net: MakeNet) -> None:
    inputs = make_inputs(lively(make_net), Split(some_images(5), np.zeros(5, np.int64)))
    filters = np.array([[1, 2, 5], [3, 0, 6]])
    images = np.array([4, 0, 2])  # filter 1 in image 4, filter 2 in image 0, ...
    sums = heatmap.sum_projections(inputs, images, filters, "")
    batch = inputs.net.normalise(torch.from_numpy(inputs.test.images))
    close = 1e-5 * float(sums.magnitude.max())
    for k, numbers in enumerate(filters):
        frames = []
        for image, number in zip(images, numbers, strict=True):
            row, column = inputs.positions[image, number].tolist()
            frames.append(project_unit(inputs.net, batch[[image]], 3, int(number), row, column).numpy())
        magnitude = np.abs(frames).sum(axis=(0, 1))
        assert magnitude.max() > 0.01
        np.testing.assert_allclose(sums.magnitude[k], magnitude, atol=close)
        np.testing.assert_allclose(sums.signed[k], np.sum(frames, axis=0), atol=close)


def test_filters_of_a_class_are_drawn_on_scales_of_their_own() -> None:
    frames = np.random.default_rng(0).random((2, 96, 96)) * np.array([1, 1e-3])[:, None, None]
    ranking = pd.DataFrame(
        {
            "filter": [5, 7],
            "selectivity": 0.5,
            "activation_mean": 0.1,
            "preferred_class": "ant",
            "preferred_share": 0.98,
            "top_class": ["ant", "bee"],
        }
    )
    images = some_images(2)[:, None]
    figure = heatmap.draw_class(ranking, frames, images, frames[:, None], np.array([[0.3], [0.4]]))
    for first, second in ((0, 3), (2, 5)):  # of three panels a row: the mean, and what lies over the image
        medians = [np.median(shown(figure, panel)) for panel in (first, second)]
        assert medians[0] == pytest.approx(medians[1], rel=0.05) and 0.4 < medians[0] < 0.6
    assert (shown(figure, 4) == images[1, 0].transpose(1, 2, 0)).all()
    labels = [figure.axes[panel].get_ylabel() for panel in (0, 3)]
    assert [number_in(label) for label in labels] == [5, 7]
    assert ["bee" in label for label in labels] == [False, True]  # where the top images are of another class
    plt.close(figure)


def test_a_class_page_shows_the_mean_of_all_its_images_and_its_strongest_images(drawn: Drawn) -> None:
    figure = drawn.figures["class_4_deer.png"]
    members = np.flatnonzero(drawn.inputs.test.labels == 4)
    for panel in (0, 7):  # seven in a row
        number = number_in(figure.axes[panel].get_ylabel())
        total = np.sum([drawn.magnitude(image, number) for image in members], axis=0)
        np.testing.assert_allclose(shown(figure, panel), total / total.max(), atol=1e-5)
        strongest = members[np.argsort(-drawn.inputs.maxima[members, number], kind="stable")]
        for k, image in enumerate(strongest):
            picture = drawn.inputs.test.images[image].transpose(1, 2, 0)
            assert (shown(figure, panel + 1 + 2 * k) == picture).all()
            over = shown(figure, panel + 2 + 2 * k)
            magnitude = drawn.magnitude(image, number)
            np.testing.assert_allclose(over * magnitude.max(), magnitude * over.max(), atol=1e-5)


def test_the_strongest_filters_of_the_first_image_of_a_class_are_summed(drawn: Drawn) -> None:
    for label in (0, 7):
        image = np.flatnonzero(drawn.inputs.test.labels == label)[0]
        strongest = np.argsort(-drawn.inputs.maxima[image], kind="stable")[:4]
        total = np.sum([drawn.magnitude(image, number) for number in strongest], axis=0)
        np.testing.assert_allclose(shown(drawn.figures["images.png"], 3 * label + 1), total, atol=1e-4)


def test_there_is_a_page_for_each_class_and_each_figure_names_its_images(drawn: Drawn) -> None:
    titles = [figure.get_suptitle() for figure in drawn.figures.values()]
    assert len(titles) == 10 + 4
    assert all("30 test images of STL-10" in title for title in titles)


# ---------------------------------------------------------------- occlusion


def test_the_strongest_filter_of_an_occluded_image_is_measured(drawn: Drawn) -> None:
    figure = drawn.figures["occlusion.png"]
    test = drawn.inputs.test
    correct = heatmap.first_correct(heatmap.predict(drawn.inputs.net, test.images), test.labels)
    for panel, image in zip(range(0, 99, 5), correct, strict=False):
        number = number_in(figure.axes[panel].get_ylabel())
        assert number == drawn.inputs.maxima[image].argmax()
        np.testing.assert_allclose(shown(figure, panel + 3), drawn.magnitude(image, number), atol=1e-4)


def test_the_first_correct_image_is_chosen(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(90) % 3
    images = np.zeros((90, 3, 96, 96), np.uint8)
    images[labels == 0, 0] = 2  # never right
    images[labels == 1, 0] = np.repeat([0, 1], 15)[:, None, None]  # wrong up to image 43
    images[labels == 2, 0] = 2
    net = make_net()
    monkeypatch.setattr(net, "forward", lambda batch: torch.eye(3)[(255 * batch[:, 0, 0, 0]).round().long()])
    assert heatmap.first_correct(heatmap.predict(net, images), labels).tolist() == [46, 2]


def test_squares_are_cut_by_the_border() -> None:
    rows = [line.nonzero()[0].tolist() for line in Occluder(9, 31).covered()]
    assert rows == [list(range(centre - 4, centre + 5)) for centre in (15, 46, 77)]
    assert Occluder(24, 2).covered()[[0, -1]].sum(axis=1).tolist() == [13, 13]  # rows 0 to 12 and 83 to 95


def test_less_is_left_where_the_bright_patch_is_hidden() -> None:
    net = CNN((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), head_size=1).eval()
    for block in net.blocks:
        torch.nn.init.ones_(block.conv.weight)  # conv4 is the sum of the channels
    image = np.zeros((3, 96, 96), np.uint8)
    image[:, 40:48, 16:24] = 255
    covered = Occluder(8, 8).covered()
    occlusion = heatmap.occlusion_sensitivity(image, 0, (0, 41, 18), net.requires_grad_(False), covered)
    expected = np.ones((12, 12))
    expected[5, 2] = 0  # row 40 of the image, column 16
    np.testing.assert_allclose(occlusion.map_left, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(occlusion.unit_left, expected, rtol=1e-5, atol=1e-5)


def test_occlusion_is_what_the_network_makes_of_a_grey_square(make_net: MakeNet) -> None:
    net = lively(make_net)
    net.mean.fill_(0.4)
    image = some_images(1)[0]
    covered = Occluder(30, 24).covered()
    batch = net.normalise(torch.from_numpy(image[None]))
    maps = net.features(batch)[3][0][0]
    unit = np.unravel_index(int(maps.argmax()), maps.shape)
    occlusion = heatmap.occlusion_sensitivity(image, 2, [int(k) for k in unit], net, covered)
    assert occlusion.probability.sum(axis=2) == pytest.approx(1)
    for down, across in ((0, 2), (2, 0), (3, 3)):
        masked = batch * ~torch.from_numpy(covered[down][:, None] & covered[across])
        pooled = net.features(masked)[3][0][0]
        map_left = float(pooled[unit[0]].sum() / maps[unit[0]].sum())
        assert occlusion.map_left[down, across] == pytest.approx(map_left, rel=1e-4) != 1
        unit_left = float(pooled[tuple(unit)] / maps[tuple(unit)])
        assert occlusion.unit_left[down, across] == pytest.approx(unit_left, rel=1e-4, abs=1e-5)
        probability = net(masked).softmax(dim=1)[0].tolist()
        assert occlusion.probability[down, across] == pytest.approx(probability, rel=1e-4)


def test_the_figure_of_occlusion_frames_the_square_and_names_the_classes() -> None:
    unit_left = np.array([[0.5, 0.25], [1, 0.75]])
    probability = np.zeros((2, 2, 3))
    probability[..., 0] = 0.4
    probability[1, 0, 2] = 0.6
    occlusions = [Occlusion(2 * unit_left, unit_left, probability, 2)]
    zero = np.array([0])
    units = Units(image=np.array([7]), filter=np.array([5]), row=zero, column=zero, value=np.array([1.5]))
    table = heatmap.tabulate_occlusion(occlusions, units, ["ant", "bee", "cow"])
    assert table.to_numpy().tolist() == [[7, 5, "cow", 1.5, 0.5, 0.25, "ant 75 %"]]
    figure = heatmap.draw_occlusion(some_images(1), occlusions, np.ones((1, 96, 96)), table, Occluder(24, 48))
    assert shown(figure, 1).tolist() == (2 * unit_left).tolist()
    assert shown(figure, 2).tolist() == unit_left.tolist()
    assert shown(figure, 4).tolist() == [[0, 0], [0.6, 0]]
    assert figure.axes[4].get_xlabel() == "ant 75 %"
    frame: Any = figure.axes[0].patches[0]
    assert frame.get_xy() == (72 - 12, 24 - 12)  # column and row: the upper right square
    plt.close(figure)


# ---------------------------------------------------------------- invariance


def rectangle(top: int, bottom: int, left: int, right: int) -> Tensor:
    return F.pad(torch.ones(3, bottom - top, right - left), (left, 96 - right, top, 96 - bottom))


def test_images_are_translated_down_scaled_about_the_centre_and_rotated_clockwise() -> None:
    picture = rectangle(40, 48, 20, 24)
    torch.testing.assert_close(transform(picture, shift=10), rectangle(50, 58, 20, 24))
    assert not transform(rectangle(0, 5, 0, 96), shift=-8).any()  # what is left bare is grey
    bright = (transform(rectangle(40, 48, 36, 40), zoom=2)[0] > 0.5).nonzero()
    assert bright.amin(dim=0).tolist() == [32, 24] and bright.amax(dim=0).tolist() == [47, 31]
    rotated = rectangle(20, 24, 48, 56)  # (row, column) to (column, 95 - row): the left goes up
    torch.testing.assert_close(transform(picture, angle=90), rotated, atol=1e-4, rtol=0)


def test_features_move_by_a_share_of_their_norm_and_not_in_an_unchanged_image(make_net: MakeNet) -> None:
    net = lively(make_net)
    split = Split(some_images(60), np.arange(60) % 3)  # more than one batch
    batch = net.normalise(torch.from_numpy(split.images))
    down = torch.zeros_like(batch)
    down[:, :, 3:] = batch[:, :, :-3]
    before = net.features(batch)
    after = net.features(down)
    measured = heatmap.measure_invariance(net, split, "shift", [0, 3])
    unchanged = measured[measured["amount"] == 0]
    changed = measured[measured["amount"] == 3]
    assert changed["image"].tolist() == list(range(60))
    # the first layer by its map; the last by what the classifier sees, 2 x 2 regions
    first = [layers[0][0].flatten(1) for layers in (before, after)]
    last = [F.adaptive_avg_pool2d(layers[3][0], 2).flatten(1) for layers in (before, after)]
    for (old, new), measure in ((first, "distance in conv1"), (last, "distance in averaged conv4")):
        expected = (new - old).norm(dim=1) / old.norm(dim=1)
        np.testing.assert_allclose(changed[measure], expected, rtol=1e-3)
        assert expected.min() > 0.01 and unchanged[measure].max() < 1e-3
    for rows, images in ((unchanged, batch), (changed, down)):
        probabilities = net(images).softmax(dim=1).numpy()
        truth = probabilities[np.arange(60), split.labels]
        np.testing.assert_allclose(rows["probability of the true class"], truth, rtol=1e-3)
        assert (rows["accuracy"] == (probabilities.argmax(axis=1) == split.labels)).all()
    for transformation, amount in (("zoom", 1), ("angle", 0)):
        table = heatmap.measure_invariance(net, split, transformation, [amount])
        assert table[["distance in conv1", "distance in averaged conv4"]].to_numpy().max() < 1e-3


def test_examples_are_the_transformed_images_and_means_have_normal_intervals(make_net: MakeNet) -> None:
    net = lively(make_net)
    net.mean.fill_(0.4)
    images = some_images(2)
    amounts = list(range(-40, 50, 10))
    curves = heatmap.measure_invariance(net, Split(images, np.array([0, 2])), "shift", amounts)
    means = heatmap.tabulate_invariance(curves)
    row = means.query("measure == 'distance in conv1' and amount == 40").iloc[0]
    first, second = curves.query("amount == 40")["distance in conv1"]
    reach = 1.96 * abs(first - second) / 2  # deviation of two values over the root of two
    assert row["mean"] == pytest.approx((first + second) / 2)
    assert [row["low"], row["high"]] == pytest.approx([row["mean"] - reach, row["mean"] + reach])

    figure = heatmap.draw_invariance(net, images, curves, means, ["_a", "$b$"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["_a", "$b$"]
    sheet = shown(figure, 0).reshape(2, 96, 5, 96, 3)  # of -40, -20, ... 40
    sheet = sheet.transpose(0, 2, 4, 1, 3).astype(int)  # (images, amounts, 3, rows, columns)
    np.testing.assert_allclose(sheet[:, 2], images, atol=1)
    np.testing.assert_allclose(sheet[:, 4, :, 40:], images[:, :, :56], atol=1)
    assert (abs(sheet[:, 4, :, :40] - 0.4 * 255) <= 1).all()  # grey is the mean colour
    second_image = curves[curves["image"] == 1]
    for ax, measure in zip(figure.axes[1:4], heatmap.MEASURES, strict=False):
        line: Any = ax.lines[1].get_xydata()
        np.testing.assert_allclose(line, second_image[["amount", measure]])
    plt.close(figure)


def test_the_accuracy_of_changed_images_has_an_interval_after_wilson() -> None:
    curves = pd.DataFrame({"transformation": "shift", "amount": 2, "image": range(20)})
    for measure in heatmap.MEASURES:
        curves[measure] = 1.0
    means = heatmap.tabulate_invariance(curves)
    row = means[means["measure"] == "accuracy"].iloc[0]
    assert [row["low"], row["high"]] == pytest.approx([1 - 0.1611, 1], abs=1e-4)


# ---------------------------------------------------------------- what cannot be drawn


def test_figures_of_images_are_left_out_with_a_line_if_no_image_is_right(
    make_net: MakeNet, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(lively(make_net), Split(some_images(3), np.arange(3)))
    nothing = np.array([], np.int64)
    heatmap.run_occlusion(inputs, nothing, Occluder(24, 24))
    heatmap.run_invariance(inputs, nothing, {"shift": [0]}, 3)
    assert capsys.readouterr().out.splitlines() == [
        "occlusion.png is left out: no image is classified correctly",
        "invariance.png is left out: no image is classified correctly",
    ]
    assert not list(Path().iterdir())


def test_figures_of_images_are_left_out_with_a_line_if_no_filter_fires_in_the_images_they_show(
    make_net: MakeNet, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(lively(make_net), Split(some_images(4), np.array([0, 1, 2, 0])))
    inputs.maxima[:3] = 0
    assert inputs.maxima.any()
    heatmap.picture_images(inputs, 4)
    heatmap.run_occlusion(inputs, np.arange(3), Occluder(24, 24))
    assert capsys.readouterr().out.splitlines() == [
        "images.png is left out: no filter of conv4 fires in the first image of any class",
        "occlusion.png is left out: no filter of conv4 fires in the first correctly classified image of any "
        "class",
    ]
    assert not list(Path().iterdir())


def test_figures_of_conv4_are_left_out_with_a_line_if_none_of_its_filters_fires(
    make_net: MakeNet, capsys: pytest.CaptureFixture[str]
) -> None:
    net = lively(make_net)
    net.blocks[3].bn.weight.zero_()
    net.blocks[3].bn.bias.fill_(-1)
    inputs = make_inputs(net, Split(some_images(3), np.arange(3)))
    heatmap.picture_all_classes(inputs)
    heatmap.picture_class(inputs, 0, 4, 3)
    heatmap.picture_images(inputs, 4)
    heatmap.run_occlusion(inputs, np.arange(3), Occluder(24, 24))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("no filter of conv4 fires on any test image" in line for line in lines)
    assert not list(Path().iterdir())
    heatmap.run_invariance(inputs, np.arange(3), {"shift": [0, 2, 4]}, 3)
    table = pd.read_csv("outputs/invariance.csv")
    undefined = table[table["measure"] == "distance in averaged conv4"]
    assert undefined["n"].eq(0).all() and undefined[["mean", "low", "high"]].isna().to_numpy().all()
    assert table.loc[table["measure"] == "distance in conv1", "n"].eq(3).all()


def test_figures_with_a_row_a_class_are_left_out_with_a_line_if_there_are_too_many(
    make_net: MakeNet, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(lively(make_net), Split(some_images(3), np.arange(3)))
    names = [f"class {k}" for k in range(501)]
    inputs = inputs._replace(checkpoint=inputs.checkpoint._replace(class_names=names))
    heatmap.picture_all_classes(inputs)
    heatmap.picture_images(inputs, 4)
    heatmap.run_occlusion(inputs, np.arange(3), Occluder(24, 24))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("501 classes" in line for line in lines)
    heatmap.run_invariance(inputs, np.arange(3), {"shift": [0, 2, 4]}, 100)  # at least one image of each
    assert pd.read_csv("outputs/invariance.csv")["n"].eq(3).all()


def test_a_filter_that_fires_on_no_image_of_a_class_is_drawn_without_a_warning() -> None:
    ranking = pd.DataFrame(
        {
            "filter": [5],
            "selectivity": -1.0,
            "activation_mean": 0.0,
            "preferred_class": "x" * 200,
            "preferred_share": 0.98,
            "top_class": "y" * 200,
        }
    )
    zero = np.zeros((1, 96, 96))
    figure = heatmap.draw_class(ranking, zero, some_images(1)[:, None], zero[:, None], np.zeros((1, 1)))
    assert not shown(figure, 0).any() and not shown(figure, 2).any()
    assert max(len(line) for line in figure.axes[0].get_ylabel().splitlines()) < 50  # long names are cut
    plt.close(figure)


def test_what_an_earlier_run_wrote_of_other_classes_and_more_filters_goes() -> None:
    old = [
        Path("heatmaps/class_7_zebra.png"),
        Path("heatmaps/occlusion.png"),
        Path("occlusion.csv"),
        Path("explorer/index.html"),
        Path("explorer/conv4.webp"),
        Path("explorer/conv4/999.webp"),
    ]
    kept = [Path("heatmaps/of_my_own.png"), Path("trust.csv"), Path("deconv/conv4_filters_000_to_015.png")]
    for path in old + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    heatmap.remove_old(Path())
    assert {path for path in Path().rglob("*.*") if path.is_file()} == set(kept)


# ---------------------------------------------------------------- the explorer


def embedded(page: Path) -> dict[str, Any]:
    """The JSON in a page, as a browser finds it: up to the first thing that ends a script."""
    data = page.read_text().split('type="application/json">')[1].split("</script")[0]
    return dict(json.loads(data))


def assert_alike(shown: Array, expected: Array, size: int) -> None:
    """Small windows are stored as multiples of 8; large ones are blurred, colour more than brightness."""
    if size < 32:
        assert np.abs(shown - expected).max() <= 5
    else:
        assert np.corrcoef(shown.mean(axis=-1).ravel(), expected.mean(axis=-1).ravel())[0, 1] > 0.7


def read_strip(path: Path, size: int) -> Array:
    """The panels of a filter's picture, (2, columns, size, size, 4)."""
    with Image.open(path) as strip:
        assert strip.size == ((9 + 12 + 2) * size, 2 * size)  # two snapshots
        pixels = np.asarray(strip.convert("RGBA")).astype(int)
    return pixels.reshape(2, size, -1, size, 4).swapaxes(1, 2)


@pytest.mark.parametrize(("layer", "count"), list(zip(LAYERS, FILTERS, strict=True)))
def test_a_strip_holds_projections_above_and_patches_below(drawn: Drawn, layer: str, count: int) -> None:
    outputs = drawn.inputs.outputs
    stored = np.load(outputs / "projections.npz")
    size = stored[f"{layer}_patch"].shape[-1]
    assert len(list((outputs / "explorer" / layer).iterdir())) == count
    for number in (0, count - 1):
        above, below = read_strip(outputs / f"explorer/{layer}/{number:03d}.webp", size)
        top = 255 * displayed(stored[f"{layer}_projection"][number])
        third_level = 255 * displayed(stored[f"{layer}_level_projection"][number, 6:9].astype(np.float32))
        assert_alike(above[:9, ..., :3], top, size)
        assert_alike(above[15:18, ..., :3], third_level, size)
        assert (above[..., 3] == 255).all()
        for column, prefix, k in ((1, layer, 1), (12, f"{layer}_level", 3)):
            image = stored[f"{prefix}_image"][number, k]
            inside = np.zeros((size, size), bool)
            if image >= 0:
                top_row, left = stored[f"{prefix}_origin"][number, k]
                patch = crop(drawn.inputs.test.images[image], top_row, left, size, 0).transpose(1, 2, 0)
                inside = crop(np.ones((1, 96, 96), bool), top_row, left, size, 0)[0]
                assert_alike(below[column][inside][:, :3], patch[inside], size)
            assert ((below[column, ..., 3] == 255) == inside).all()


@pytest.mark.parametrize(("layer", "count"), list(zip(LAYERS, FILTERS, strict=True)))
def test_the_page_holds_the_values_of_the_tables(drawn: Drawn, layer: str, count: int) -> None:
    filters = embedded(drawn.inputs.outputs / "explorer/index.html")["layers"][layer]["filters"]
    metrics = drawn.inputs.filters.query("layer == @layer").to_dict("records")
    classes = drawn.inputs.classes.query("layer == @layer")
    close: dict[str, Any] = {"rel": 1e-4, "abs": 1e-9, "nan_ok": True}
    assert len(filters) == count
    for shown_filter, row in zip(filters, metrics, strict=True):
        assert shown_filter["preferred_class"] == (None if row["dead"] else row["preferred_class"])
        for name in ("filter", "selectivity", "selectivity_low", "auc", "activation_mean", "nonzero_count"):
            value = np.nan if shown_filter[name] is None else shown_filter[name]
            assert value == pytest.approx(row[name], **close), name
        means = classes[classes["filter"] == row["filter"]]
        columns = ["activation_mean", "activation_low", "activation_high"]
        np.testing.assert_allclose(shown_filter["means"], means[columns], rtol=1e-4)
        ablation = drawn.inputs.ablation
        losses = ablation.loc[ablation["filter"] == row["filter"], "loss_increase"].tolist()
        expected = pytest.approx(losses, **close) if layer == "conv4" else None
        assert shown_filter["loss_increase"] == expected


def test_the_page_knows_which_images_are_taken_for_which_class(drawn: Drawn) -> None:
    page = embedded(drawn.inputs.outputs / "explorer/index.html")
    confusion = np.array(page["confusion"])
    test = drawn.inputs.test
    predictions = heatmap.predict(drawn.inputs.net, test.images)
    assert confusion.sum(axis=1).tolist() == [3] * 10
    assert confusion[2, 5] == np.count_nonzero((test.labels == 2) & (predictions == 5))
    assert np.trace(confusion) == np.count_nonzero(predictions == test.labels)
    for label, (share, low, high) in enumerate(page["recognised"]):
        assert share == pytest.approx(confusion[label, label] / 3, abs=1e-4)
        assert 0 <= low <= share <= high <= 1


def test_peak_activations_are_counted_by_hand() -> None:
    peaks = np.array([0, 24, 12, 0.5], np.float32)
    histogram = heatmap.count_peaks(peaks, np.array([False, True, True, False]))
    assert histogram.images == [2, 2] and histogram.zeros == [0, 1] and histogram.largest == 24
    own, others = histogram.counts
    assert own.nonzero()[0].tolist() == [12, 23] and others.nonzero()[0].tolist() == [0]  # bins of width 1


def test_similar_filters_fire_on_the_same_images() -> None:
    first = np.array([0, 24, 12, 0.5])
    second = np.array([3.0, 0, 0, 1])  # falls where the first one rises
    dead = np.zeros(4)
    assert heatmap.find_similar(np.stack([first, second, dead], axis=1)) == [[], [], []]
    similar = heatmap.find_similar(np.stack([first, 2 * first, dead], axis=1))
    assert [[number for number, _ in filters] for filters in similar] == [[1], [0], []]
    assert similar[0][0][1] == pytest.approx(1)


def test_a_run_without_snapshots_has_one_epoch(pipeline_copy: Path) -> None:
    checkpoint = load_checkpoint(pipeline_copy / "CNN.pth")
    inputs = heatmap.read_inputs(checkpoint, Path("data"), pipeline_copy)
    heatmap.write_explorer(inputs, [checkpoint], heatmap.predict(inputs.net, inputs.test.images), 9)
    page = embedded(pipeline_copy / "explorer/index.html")
    assert page["epochs"] == [2] and page["evolution_images"] == 9
    assert len(list((pipeline_copy / "explorer/conv4").iterdir())) == FILTERS[-1]


# ---------------------------------------------------------------- the explorer in a browser


def browse(page: Path, *visits: str) -> list[str]:
    """Open a page, visit addresses in it ("#run") or press keys ("Escape"); return what it showed after each.

    Nothing may be written to the console, and all that is loaded or linked must be a file beside the page.
    """
    script = """
        const shown = [];
        for (const visit of VISITS) {
            if (visit.startsWith("#")) location.hash = visit;
            else document.body.dispatchEvent(new KeyboardEvent("keydown", { key: visit, bubbles: true }));
            await new Promise((resolve) => setTimeout(resolve, 100));
            shown.push(main.cloneNode(true));
            if (main.scrollWidth > innerWidth) console.error(`${visit} is too wide`);
        }
        document.body.replaceChildren(...shown);
    """
    document = run_in_page(page, script.replace("VISITS", json.dumps(visits)))
    _, *documents = document.split("<main")
    assert len(documents) == len(visits)
    links = re.findall(r'(?:src|href)="([^"#]+)', document) + re.findall(r"url\(([^)]+)", document)
    for link in links:
        assert link == "data:," or (page.parent / unquote(link)).is_file(), link
    return documents


def linked_filters(document: str, layer: str) -> list[int]:
    """The filters that a view links to, in order."""
    return [int(number) for number in re.findall(rf'href="#{layer}/(\d+)"', document)]


@pytest.fixture
def page(pipeline: Path) -> Path:
    """The pipeline's page with all that it links to, to be changed."""
    shutil.copytree(pipeline / "outputs", "outputs", copy_function=shutil.copyfile)
    Path("outputs/deconv_live.html").touch()
    return Path("outputs/explorer/index.html")


def change(page: Path, **facts: Any) -> None:
    """Write the page again with other facts."""
    page.write_text(heatmap.EXPLORER.replace("__DATA__", page_json(embedded(page) | facts)))


@NEEDS_CHROMIUM
def test_the_page_works_in_a_browser(page: Path) -> None:
    table = pd.read_csv("outputs/filter_metrics.csv").query("layer == 'conv4'")
    table = table.sort_values("selectivity", ascending=False, kind="stable", na_position="last")
    order = table["filter"].tolist()
    preferred = table["preferred_class"].iloc[0]
    visits = [
        *(f"#{layer}" for layer in LAYERS),
        "#conv4?sort=selectivity",
        f"#conv4/{order[1]}",
        "ArrowLeft",
        "ArrowRight",
        "Escape",
        f"#conv4?sort=selectivity&class={preferred}",
        "#class/bird",
        "#run",
    ]
    documents = browse(page, *visits)
    for layer, count, document in zip(LAYERS, FILTERS, documents, strict=False):
        assert linked_filters(document, layer) == list(range(count))
    by_selectivity, second, before, after, back, one_class, bird, run = documents[4:]
    assert linked_filters(by_selectivity, "conv4") == linked_filters(back, "conv4") == order
    assert f">conv4 / {order[1]} <" in second and f"url(conv4/{order[1]:03d}.webp)" in second
    # arrow keys follow the order of the tiles
    assert f">conv4 / {order[0]} <" in before and f">conv4 / {order[1]} <" in after
    prefers = table.loc[table["preferred_class"] == preferred, "filter"]
    assert linked_filters(one_class, "conv4") == prefers.tolist()
    assert ">bird</h1>" in bird and ">The run</h1>" in run


@NEEDS_CHROMIUM
def test_names_of_classes_do_no_harm_in_the_page(page: Path) -> None:
    names = ["</script><b>", "../x", "a&b=c#d?e/f%", "\"'`${1}", "$_$ <i>", "x" * 200]
    new_names = dict(zip(STL10_CLASSES, names, strict=False))
    layers = embedded(page)["layers"]
    for layer in layers.values():
        for shown_filter in layer["filters"]:
            for key in ("preferred_class", "runner_up", "top_class"):
                shown_filter[key] = new_names.get(shown_filter[key], shown_filter[key])
    change(page, classes=[new_names.get(name, name) for name in STL10_CLASSES], layers=layers, generated=True)
    addresses = [f"#class/{quote(name, safe='')}" for name in names]
    filters = [f"#conv4/{number}" for number in range(FILTERS[-1])]
    documents = browse(page, *addresses, *filters, f"#conv4?class={quote(names[-1])}", "#conv3")
    for name, document in zip(names, documents, strict=False):
        assert f">{html.escape(name, quote=False)}</h1>" in document and "<b>&" not in document
    assert all("Generated shapes, no photographs" in document for document in documents)


@NEEDS_CHROMIUM
def test_figures_are_linked_whatever_their_files_are_called(page: Path) -> None:
    names = ["deconv/what?.png", "cat #1.png", "50 %.png", "a&b.png"]
    for name in names:
        (Path("outputs") / name).touch()
    change(page, figures=names)
    (document,) = browse(page, "#run")  # which opens every link
    assert all(f">{html.escape(name)}</a>" in document for name in names)


@NEEDS_CHROMIUM
def test_a_filter_is_linked_to_the_live_page_and_the_command_that_writes_it(page: Path) -> None:
    change(page, live_page=True)
    (with_page,) = browse(page, "#conv3/2")
    change(page, live_page=False)
    (without,) = browse(page, "#conv3/2")
    for document in (with_page, without):
        assert 'href="../deconv_live.html#conv3/2"' in document
    assert "uv run deconv.py" in without and "uv run deconv.py" not in with_page


@NEEDS_CHROMIUM
def test_a_filter_whose_selectivity_has_no_interval_is_shown_without_one(page: Path) -> None:
    layers = embedded(page)["layers"]
    with_interval, without = [entry for entry in layers["conv4"]["filters"] if not entry["dead"]][:2]
    with_interval |= {"selectivity": 0.987, "selectivity_low": 0.876, "selectivity_high": 0.998}
    without |= {"selectivity": 0.987, "selectivity_low": None, "selectivity_high": None}
    change(page, layers=layers)
    documents = browse(page, *(f"#conv4/{entry['filter']}" for entry in (with_interval, without)))
    assert "<dd>0.99 (95 % interval 0.88 to 1.00)</dd>" in documents[0]
    assert "<dd>0.99</dd>" in documents[1]


@NEEDS_CHROMIUM
def test_the_page_quotes_the_numbers_of_the_table_of_trust(page: Path) -> None:
    rows: list[dict[str, Any]] = []
    medians = {
        ("insertion", "projection"): 0.594,
        ("insertion", "chance"): 0.136,
        ("insertion", "edges x window profile"): 0.582,
        ("insertion", "other filter, same window"): 0.487,
        ("partial rank correlation", "other filter, same window"): 0.574,
        ("partial rank correlation", "same filter, other top-9 example"): 0.118,
    }
    table = pd.read_csv("outputs/trust.csv")
    named = set(zip(table["test"], table["condition"], strict=True))  # by analyse_projections.py
    assert set(medians) <= named
    for (test, condition), value in medians.items():
        entry = {"test": test, "condition": condition, "n": 251}
        if test == "insertion":  # of two shares the page quotes the larger one
            rows.append({**entry, "share": 0.1, "median": value / 2})
            rows.append({**entry, "share": 0.25, "median": value})
        else:
            rows.append({**entry, "share": None, "median": value})
    change(page, trust=rows)
    (document,) = browse(page, "#run")
    paragraphs = [re.findall(r"[\d.]+\d", text) for text in re.findall(r"<p>(.*?)</p>", document)]
    assert paragraphs[1:4] == [["25", "59", "14", "251"], ["58", "49"], ["0.57", "0.12"]]
    rows[-1]["median"] = 0.9
    change(page, trust=rows)
    (other_way_round,) = browse(page, "#run")
    assert "0.57" in other_way_round and "0.90" in other_way_round
    assert "The second is lower" in document and "The second is lower" not in other_way_round
    rows[-1]["median"] = None
    change(page, trust=rows)
    assert "lacks a number" in browse(page, "#run")[0]
