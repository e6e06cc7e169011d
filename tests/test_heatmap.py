from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import FAST, MakeNet
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import heatmap
import load_data
from analyse_projections import recalibrate_batch_norm
from CNN import CNN, load_checkpoint
from deconv import project_unit
from deconv_full import Units, measure_activations, strongest_of
from heatmap import Occlusion, change, square_positions
from load_data import Array, Split, load_split


def some_images(count: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 96, 96), np.uint8)


def lively(make_net: MakeNet) -> CNN:
    """A network most of whose filters fire."""
    return recalibrate_batch_norm(make_net(classes=3), 0, some_images(20))


def shown(figure: Figure, panel: int) -> Array:
    """What the last picture of a panel holds."""
    return np.asarray(figure.axes[panel].get_images()[-1].get_array())


class Results(NamedTuple):
    """What main() draws of the pipeline's results, by file name, and what it is made from."""

    figures: dict[str, Figure]
    net: CNN
    test: Split
    maxima: Array
    positions: Array

    def magnitude(self, image: Any, filter_: Any) -> Array:
        """Of the projection of the filter's strongest unit in an image, by deconv.py."""
        batch = self.net.normalise(torch.from_numpy(self.test.images[[image]]))
        place = self.positions[image, filter_].tolist()
        return np.asarray(project_unit(self.net, batch, 3, filter_, *place).abs().sum(dim=0))


@pytest.fixture(scope="module")
def results(pipeline: Path) -> Results:
    figures: dict[str, Figure] = {}

    def keep(path: Path, figure: Figure) -> None:
        figures[path.name] = figure
        plt.close(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pipeline)
        patch.setattr(load_data, "check_file", lambda path: None)  # as if these had been published
        for name, value in {**FAST[heatmap], "DEVICE": "cpu", "save_figure": keep}.items():
            patch.setattr(heatmap, name, value)
        heatmap.main()
        net, test = load_checkpoint(Path("outputs/CNN.pth")).net, load_split("stl10", Path("data"), "test")
        with np.load("outputs/activations.npz") as stored:
            return Results(figures, net, test, stored["conv4_max"], stored["conv4_position"])


def test_filters_stand_by_class_vehicles_first_then_by_falling_selectivity_without_the_dead() -> None:
    filters = pd.DataFrame({"dead": [False, False, True, False, False], "filter": range(5)})
    filters["preferred_class"] = ["bird", "car", None, "bird", "car"]
    filters["selectivity"] = [0.2, 0.5, np.nan, 0.9, 0.4]
    means = np.array([[4.0, 1, 0, 6, 1], [2, 2, 0, 3, 4]])  # of bird and car
    figure = heatmap.draw_class_filters(means, filters, ["bird", "car"], "")
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["car", "bird"]
    assert [text.get_text() for text in ax.texts] == ["1", "4", "3", "0"]
    of_car, of_bird = (np.asarray(image.get_array()) for image in ax.images)
    np.testing.assert_allclose(of_car, [[2 / 1.5, 4 / 2.5], [1 / 1.5, 1 / 2.5]])
    np.testing.assert_allclose(of_bird, [[3 / 4.5, 2 / 3], [6 / 4.5, 4 / 3]])
    frames: Any = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert [(*frame.get_xy(), frame.get_width()) for frame in frames] == [(0, 0, 2), (3, 1, 2)]
    plt.close(figure)


def test_sums_are_those_of_full_frame_projections(make_net: MakeNet) -> None:
    net, images = lively(make_net), some_images(5)
    measured = measure_activations(images, net, 5, "")
    image, filter_ = np.repeat(np.arange(5), 8), np.tile(np.arange(8), 5)
    units = strongest_of(measured["conv4_max"], measured["conv4_position"], image, filter_)
    magnitudes, signed = heatmap.sum_projections(images, net, units, filter_ % 3, "")
    batch, places = net.normalise(torch.from_numpy(images)), list(zip(*units[:4], strict=True))
    frames = np.stack([project_unit(net, batch[[k]], 3, *place).numpy() for k, *place in places])
    for group in range(3):
        of_group = frames[filter_ % 3 == group]
        expected, close = np.abs(of_group).sum(axis=(0, 1)), 1e-5 * float(magnitudes.max())
        assert expected.max() > 0.01
        np.testing.assert_allclose(magnitudes[group], expected, atol=close)
        np.testing.assert_allclose(signed[group], of_group.sum(axis=0), atol=close)


def test_filters_of_a_class_are_drawn_on_scales_of_their_own() -> None:
    frames = np.random.default_rng(0).random((2, 96, 96)) * np.array([1, 1e-3])[:, None, None]
    columns = {"filter": [5, 7], "selectivity": 0.5, "activation_mean": 0.1, "preferred_class": "ant"}
    columns |= {"preferred_share": 0.98, "top_class": ["ant", "bee"]}
    images, values = some_images(2)[:, None], np.array([[0.3], [0.4]])
    figure = heatmap.draw_class(pd.DataFrame(columns), frames, images, frames[:, None], values, "")
    for first, second in ((0, 3), (2, 5)):  # of three panels a row: the mean, and what lies over the image
        medians = [np.median(shown(figure, panel)) for panel in (first, second)]
        assert medians[0] == pytest.approx(medians[1], rel=0.05) and 0.4 < medians[0] < 0.6
    assert (shown(figure, 4) == images[1, 0].transpose(1, 2, 0)).all()
    assert figure.axes[3].get_ylabel().splitlines()[::3] == ["filter 7", "prefers ant in", "mostly bee"]
    plt.close(figure)


def test_a_class_page_shows_the_mean_of_all_its_images_and_its_strongest_images(results: Results) -> None:
    figure, members = results.figures["class_4_deer.png"], np.flatnonzero(results.test.labels == 4)
    for panel in (0, 7):  # seven in a row
        filter_ = int(figure.axes[panel].get_ylabel().split()[1])
        total = np.sum([results.magnitude(k, filter_) for k in members], axis=0)
        np.testing.assert_allclose(shown(figure, panel), total / total.max(), atol=1e-5)
        strongest = members[np.argsort(-results.maxima[members, filter_], kind="stable")]
        for k, image in enumerate(strongest):
            assert (shown(figure, panel + 1 + 2 * k) == results.test.images[image].transpose(1, 2, 0)).all()
            over, one = shown(figure, panel + 2 + 2 * k), results.magnitude(image, filter_)
            np.testing.assert_allclose(over * one.max(), one * over.max(), atol=1e-5)


def test_the_strongest_filters_of_the_first_image_of_a_class_are_summed(results: Results) -> None:
    for label in (0, 7):
        image = np.flatnonzero(results.test.labels == label)[0]
        strongest = np.argsort(-results.maxima[image], kind="stable")[:4]
        total = np.sum([results.magnitude(image, filter_) for filter_ in strongest], axis=0)
        np.testing.assert_allclose(shown(results.figures["images.png"], 3 * label + 1), total, atol=1e-4)


def test_the_strongest_filter_of_an_occluded_image_is_measured(results: Results) -> None:
    figure = results.figures["occlusion.png"]
    right = heatmap.first_correct(*results.test, results.net)
    for panel, image in zip(range(0, 99, 5), right, strict=False):
        filter_ = int(figure.axes[panel].get_ylabel().split()[2])
        assert filter_ == results.maxima[image].argmax()
        np.testing.assert_allclose(shown(figure, panel + 3), results.magnitude(image, filter_), atol=1e-4)


def test_there_is_a_page_for_each_class_and_each_figure_names_its_images(results: Results) -> None:
    titles = [" ".join(figure.get_suptitle().split()) for figure in results.figures.values()]
    assert len(titles) == 10 + 4 and all("test images of STL-10 (test acc" in title for title in titles)


def test_the_first_correct_image_is_chosen(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, images, net = np.arange(90) % 3, np.zeros((90, 3, 96, 96), np.uint8), make_net()
    images[labels == 0, 0] = 2  # never right
    images[labels == 1, 0] = np.repeat([0, 1], 15)[:, None, None]  # wrong up to image 43
    images[labels == 2, 0] = 2
    monkeypatch.setattr(net, "forward", lambda batch: torch.eye(3)[(255 * batch[:, 0, 0, 0]).round().long()])
    assert heatmap.first_correct(images, labels, net).tolist() == [46, 2]


def test_squares_are_cut_by_the_border() -> None:
    rows = [line.nonzero()[0].tolist() for line in square_positions(9, 31)]
    assert rows == [list(range(centre - 4, centre + 5)) for centre in (15, 46, 77)]
    assert square_positions(24, 2)[[0, -1]].sum(axis=1).tolist() == [13, 13]  # rows 0 to 12 and 83 to 95


def test_activity_drops_where_the_bright_patch_is_hidden() -> None:
    net = CNN((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), head_size=1).eval()
    for block in net.blocks:
        torch.nn.init.ones_(block.conv.weight)  # conv4 is the sum of the channels
    image = np.zeros((3, 96, 96), np.uint8)
    image[:, 40:48, 16:24] = 255
    covered = square_positions(8, 8)
    result = heatmap.occlusion_sensitivity(image, 0, (0, 41, 18), net.requires_grad_(False), covered)
    expected = np.ones((12, 12))
    expected[5, 2] = 0  # row 40 of the image, column 16
    np.testing.assert_allclose(result.activity, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.unit, expected, rtol=1e-5, atol=1e-5)


def test_occlusion_is_what_the_network_makes_of_a_grey_square(make_net: MakeNet) -> None:
    net, image, covered = lively(make_net), some_images(1)[0], square_positions(30, 24)
    net.mean.fill_(0.4)
    batch = net.normalise(torch.from_numpy(image[None]))
    maps = net.features(batch)[3][0][0]
    unit = np.unravel_index(int(maps.argmax()), maps.shape)
    result = heatmap.occlusion_sensitivity(image, 2, [int(k) for k in unit], net, covered)
    assert result.probability.sum(axis=2) == pytest.approx(1)
    for down, across in ((0, 2), (2, 0), (3, 3)):
        masked = batch * ~torch.from_numpy(covered[down][:, None] & covered[across])
        pooled = net.features(masked)[3][0][0]
        share = float(pooled[unit[0]].sum() / maps[unit[0]].sum())
        assert result.activity[down, across] == pytest.approx(share, rel=1e-4) != 1
        of_unit = pooled[tuple(unit)] / maps[tuple(unit)]
        assert result.unit[down, across] == pytest.approx(float(of_unit), rel=1e-4, abs=1e-5)
        expected = net(masked).softmax(dim=1)[0]
        assert result.probability[down, across] == pytest.approx(expected.tolist(), rel=1e-4)
        assert result.truth[down, across] == pytest.approx(float(expected[2]), rel=1e-4)
        assert result.taken[down, across] == (int(expected.argmax()) != 2)


def test_the_figure_of_occlusion_frames_the_square_and_names_the_classes() -> None:
    probability, unit = np.zeros((2, 2, 3)), np.array([[0.5, 0.25], [1, 0.75]])
    probability[..., 0], probability[1, 0, 2] = 0.4, 0.6
    results, names = [Occlusion(2 * unit, unit, probability, 2)], ["ant", "bee", "cow"]
    image, filter_, place = np.array([7]), np.array([5]), np.array([0])
    units = Units(image, filter_, place, place, np.array([1.5]))
    under = np.array([[[3.0, 4], [1, 2]]])  # most under the square at the upper right
    table = heatmap.tabulate_occlusion(results, units, under, names)
    assert table.to_numpy().tolist() == [[7, 5, "cow", 1.5, 0.5, 0.25, pytest.approx(1), "ant 75%"]]
    figure = heatmap.draw_occlusion(some_images(1), results, np.ones((1, 96, 96)), table, (24, 48), "")
    assert shown(figure, 1).tolist() == (2 * unit).tolist() and shown(figure, 2).tolist() == unit.tolist()
    assert shown(figure, 4).tolist() == [[0, 0], [0.6, 0]] and figure.axes[4].get_xlabel() == "ant 75%"
    frame: Any = figure.axes[0].patches[0]
    assert frame.get_xy() == (72 - 12, 24 - 12)  # column and row: the upper right square
    plt.close(figure)


def rectangle(top: int, bottom: int, left: int, right: int) -> Tensor:
    return F.pad(torch.ones(3, bottom - top, right - left), (left, 96 - right, top, 96 - bottom))


def test_changes_move_down_enlarge_about_the_centre_and_turn_clockwise() -> None:
    picture = rectangle(40, 48, 20, 24)
    torch.testing.assert_close(change(picture, shift=10), rectangle(50, 58, 20, 24))
    assert not change(rectangle(0, 5, 0, 96), shift=-8).any()  # what is left bare is grey
    bright = (change(rectangle(40, 48, 36, 40), zoom=2)[0] > 0.5).nonzero()
    assert bright.aminmax(dim=0)[0].tolist() == [32, 24] and bright.amax(dim=0).tolist() == [47, 31]
    turned = rectangle(20, 24, 48, 56)  # (row, column) to (column, 95 - row): the left goes up
    torch.testing.assert_close(change(picture, angle=90), turned, atol=1e-4, rtol=0)


def test_features_move_by_a_share_of_their_norm_and_not_in_an_unchanged_image(make_net: MakeNet) -> None:
    net, images, labels = lively(make_net), some_images(60), np.arange(60) % 3  # more than one batch
    batch = net.normalise(torch.from_numpy(images))
    down = torch.zeros_like(batch)
    down[:, :, 3:] = batch[:, :, :-3]
    before, after = net.features(batch), net.features(down)
    measured = heatmap.measure_invariance(net, images, labels, "shift", [0, 3])
    for k, name in ((0, "distance in conv1"), (3, "distance in conv4")):
        expected = (after[k][0] - before[k][0]).flatten(1).norm(dim=1) / before[k][0].flatten(1).norm(dim=1)
        np.testing.assert_allclose(measured[name][:, 1], expected, rtol=1e-3)
        assert expected.min() > 0.01 and measured[name][:, 0].max() < 1e-3
    for k, of in enumerate((batch, down)):
        shares = net(of).softmax(dim=1).numpy()
        truth = shares[np.arange(60), labels]
        np.testing.assert_allclose(measured["probability of the true class"][:, k], truth, rtol=1e-3)
        assert (measured["accuracy"][:, k] == (shares.argmax(axis=1) == labels)).all()
    for kind, unchanged in (("zoom", 1), ("angle", 0)):
        assert (
            heatmap.measure_invariance(net, images, labels, kind, [unchanged])["distance in conv4"].max()
            < 1e-3
        )


def test_examples_are_the_changed_images_and_means_have_normal_intervals(make_net: MakeNet) -> None:
    net, images, degrees = lively(make_net), some_images(2), list(range(-40, 50, 10))
    net.mean.fill_(0.4)
    curves = {
        kind: heatmap.measure_invariance(net, images, np.array([0, 2]), "shift", degrees)
        for kind in ("shift", "angle")
    }
    tables = [heatmap.tabulate_invariance(kind, degrees, of) for kind, of in curves.items()]
    row = tables[0].query("measure == 'distance in conv4' and degree == 40").iloc[0]
    one, other = curves["shift"]["distance in conv4"][:, -1]
    reach = 1.96 * abs(one - other) / 2  # deviation of two values over the root of two
    assert [row["mean"], row["low"], row["high"]] == pytest.approx(
        [(one + other) / 2 + x for x in (0, -reach, reach)]
    )
    drawn = dict.fromkeys(curves, degrees)
    figure = heatmap.draw_invariance(net, images, drawn, curves, pd.concat(tables), ["a", "b"])
    sheet = (
        shown(figure, 0).reshape(2, 96, 5, 96, 3).transpose(0, 2, 4, 1, 3).astype(int)
    )  # of -40, -20, ... 40
    np.testing.assert_allclose(sheet[:, 2], images, atol=1)
    np.testing.assert_allclose(sheet[:, 4, :, 40:], images[:, :, :56], atol=1)
    assert (abs(sheet[:, 4, :, :40] - 0.4 * 255) <= 1).all()  # grey is the mean colour
    lines: Any = [ax.lines[1].get_xydata() for ax in figure.axes[1:4]]
    values = [of[1] for of in list(curves["shift"].values())[:3]]
    np.testing.assert_allclose(lines, [list(zip(degrees, curve, strict=True)) for curve in values])
    plt.close(figure)


@pytest.mark.parametrize("name", ["filter_metrics", "class_metrics"])
def test_tables_that_are_missing_or_of_another_checkpoint_are_refused(pipeline_copy: Path, name: str) -> None:
    path = pipeline_copy / f"{name}.csv"
    pd.read_csv(path).assign(checkpoint="0" * 12).to_csv(path, index=False)
    with pytest.raises(SystemExit, match=f"^{path} was made from another checkpoint: run `uv run analyse_pr"):
        heatmap.main()
    path.unlink()
    with pytest.raises(SystemExit, match=rf"{path} not found: run `uv run analyse_projections.py` first$"):
        heatmap.main()
