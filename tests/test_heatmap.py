import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
import torch.nn.functional as F
from conftest import FAST, FILTERS, MakeNet, make_checkpoint
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

import heatmap
import load_data
from analyse_projections import Run, recalibrate_batch_norm, tabulate
from CNN import CNN, LAYERS, load_checkpoint
from deconv import crop, displayed, project_unit
from deconv_full import Units, measure_activations, strongest_of
from heatmap import Occlusion, change, square_positions
from load_data import STL10_CLASSES, Array, Split, load_split


def some_images(count: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 96, 96), np.uint8)


def lively(make_net: MakeNet) -> CNN:
    """A network most of whose filters fire."""
    return recalibrate_batch_norm(make_net(classes=3), 0, some_images(20))


def shown(figure: Figure, panel: int) -> Array:
    """What the last picture of a panel holds."""
    return np.asarray(figure.axes[panel].get_images()[-1].get_array())


def load_test(folder: Path) -> Split:
    """The test split of the pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_data, "check_file", lambda path: None)  # as if these had been published
        return load_split("stl10", folder / "data", "test")


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
        patch.setattr(load_data, "check_file", lambda path: None)
        patch.setattr(heatmap, "write_explorer", lambda *_: None)
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


def test_filters_that_prefer_the_class_come_first_and_nearly_dead_ones_last() -> None:
    # 0 is dead; 1 prefers another class, yet has a higher index than 2; 4 is as selective as 3, and stronger;
    # 5 is as 3; 7 fires on two images
    first, second, third = [0, 3, 2, 4, 8, 4, 1, 0], [0, 3.5, 1.8, 1, 2, 1, 5, 0], [0, 0, 1.8, 1, 2, 1, 5, 0]
    labels, strength = np.tile([0, 1, 2], 100), np.tile([first, second, third], (100, 1))
    strength[[0, 3], 7] = 25
    activations = {f"{layer}_{kind}": strength for layer in LAYERS for kind in ("max", "mean")}
    names, test = ["dog", "cat", "ship"], Split(some_images(1), labels)
    run = Run(make_checkpoint(CNN(), class_names=names), test, test, "", Path())
    filters, classes = tabulate(activations, {}, labels, run)
    ranking = heatmap.rank_filters(filters, classes, names, "dog")
    assert ranking["filter"].tolist() == [4, 3, 5, 2, 1, 6, 7]
    assert ranking["prefers"].tolist() == [True] * 4 + [False] * 2 + [True]
    assert ranking["selectivity"].tolist() == pytest.approx([0.6, 0.6, 0.6, 1 / 19, 5 / 19, -2 / 3, 1])
    assert ranking["activation_mean"].tolist() == pytest.approx([8, 4, 4, 2, 3, 1, 0.5])


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
    assert figure.axes[3].get_ylabel().splitlines()[::3] == ["filter 7", "prefers ant in", "most often bee"]
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
    right = heatmap.first_correct(heatmap.predict(results.net, results.test.images), results.test.labels)
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
    assert heatmap.first_correct(heatmap.predict(net, images), labels).tolist() == [46, 2]


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


def test_the_figure_of_occlusion_frames_the_square_and_names_the_classes() -> None:
    probability, unit = np.zeros((2, 2, 3)), np.array([[0.5, 0.25], [1, 0.75]])
    probability[..., 0], probability[1, 0, 2] = 0.4, 0.6
    results, names = [Occlusion(2 * unit, unit, probability, 2)], ["ant", "bee", "cow"]
    image, filter_, place = np.array([7]), np.array([5]), np.array([0])
    units = Units(image, filter_, place, place, np.array([1.5]))
    under = np.array([[[3.0, 4], [1, 2]]])  # most under the square at the upper right
    table = heatmap.tabulate_occlusion(results, units, under, names)
    assert table.to_numpy().tolist() == [[7, 5, "cow", 1.5, 0.5, 0.25, pytest.approx(1), "ant 75%"]]
    figure = heatmap.draw_occlusion(some_images(1), results, np.ones((1, 96, 96)), table, (24, 48))
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
    found = heatmap.measure_invariance(net, images, labels, "shift", [0, 3])
    measured = dict(zip(heatmap.MEASURES, found, strict=True))
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
        assert heatmap.measure_invariance(net, images, labels, kind, [unchanged])[:2].max() < 1e-3


def test_examples_are_the_changed_images_and_means_have_normal_intervals(make_net: MakeNet) -> None:
    net, images, degrees = lively(make_net), some_images(2), list(range(-40, 50, 10))
    net.mean.fill_(0.4)
    curves = {
        kind: heatmap.measure_invariance(net, images, np.array([0, 2]), "shift", degrees)
        for kind in ("shift", "angle")
    }
    tables = [heatmap.tabulate_invariance(kind, degrees, of) for kind, of in curves.items()]
    row = tables[0].query("measure == 'distance in conv4' and degree == 40").iloc[0]
    one, other = curves["shift"][1, :, -1]
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
    values = curves["shift"][:3, 1]
    np.testing.assert_allclose(lines, [list(zip(degrees, curve, strict=True)) for curve in values])
    plt.close(figure)


@pytest.mark.parametrize("name", ["filter_metrics", "class_metrics"])
def test_tables_that_are_missing_or_of_another_checkpoint_are_refused(pipeline_copy: Path, name: str) -> None:
    path = pipeline_copy / f"{name}.csv"
    pd.read_csv(path).assign(checkpoint="0" * 12).to_csv(path, index=False)
    with pytest.raises(SystemExit, match=f"^{path} was made from another checkpoint: run `uv run analyse_pr"):
        heatmap.main()
    path.unlink()
    with pytest.raises(
        SystemExit, match=rf"^{path.absolute()} not found: run `uv run analyse_projections.py` first$"
    ):
        heatmap.main()


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


def test_a_strip_holds_projections_above_and_patches_below(pipeline: Path) -> None:
    folder, test = pipeline / "outputs", load_test(pipeline)
    stored = np.load(folder / "projections.npz")
    for layer, count in zip(LAYERS, FILTERS, strict=True):
        assert len(list((folder / "explorer" / layer).iterdir())) == count
        size = stored[f"{layer}_patch"].shape[-1]
        for n in (0, count - 1):
            with Image.open(folder / f"explorer/{layer}/{n:03d}.webp") as strip:
                assert strip.size == ((9 + 12 + 2) * size, 2 * size)  # two snapshots
                pixels = np.asarray(strip.convert("RGBA")).astype(int)
            panels = pixels.reshape(2, size, -1, size, 4).swapaxes(1, 2)  # (rows, columns, size, size, 4)
            top = 255 * displayed(stored[f"{layer}_projection"][n])
            third = 255 * displayed(stored[f"{layer}_level_projection"][n, 6:9].astype(np.float32))
            assert_alike(panels[0, :9, ..., :3], top, size)
            assert_alike(panels[0, 15:18, ..., :3], third, size)
            assert (panels[0, ..., 3] == 255).all()
            for place, image in (
                (1, stored[f"{layer}_image"][n, 1]),
                (12, stored[f"{layer}_level_image"][n, 3]),
            ):
                key = f"{layer}_origin" if place < 9 else f"{layer}_level_origin"
                patch, inside = panels[1, place], np.zeros((size, size), bool)
                if image >= 0:
                    row, column = stored[key][n, place % 9]
                    expected = crop(test.images[image], row, column, size, 0).transpose(1, 2, 0)
                    inside = crop(np.ones((1, 96, 96), bool), row, column, size, 0)[0]
                    assert_alike(patch[inside][:, :3], expected[inside], size)
                assert ((patch[..., 3] == 255) == inside).all()


def test_the_page_holds_the_values_of_the_tables(pipeline: Path) -> None:
    outputs = pipeline / "outputs"
    page, tables = embedded(outputs / "explorer/index.html"), {}
    for name in ("filter_metrics", "class_metrics", "ablation"):
        tables[name] = pd.read_csv(outputs / f"{name}.csv")
    close: dict[str, Any] = {"rel": 1e-4, "abs": 1e-9, "nan_ok": True}
    for layer, count in zip(LAYERS, FILTERS, strict=True):
        filters = page["layers"][layer]["filters"]
        rows = tables["filter_metrics"].query(f"layer == '{layer}'").to_dict("records")
        assert len(filters) == count
        for of_filter, row in zip(filters, rows, strict=True):
            assert of_filter["preferred_class"] == (None if row["dead"] else row["preferred_class"])
            for name in (
                "filter",
                "selectivity",
                "selectivity_low",
                "auc",
                "activation_mean",
                "nonzero_count",
            ):
                value = np.nan if of_filter[name] is None else of_filter[name]
                assert value == pytest.approx(row[name], **close), name
            means = tables["class_metrics"].query(f"layer == '{layer}' and filter == {row['filter']}")
            columns = ["activation_mean", "activation_low", "activation_high"]
            np.testing.assert_allclose(of_filter["means"], means[columns], rtol=1e-4)
            lost = tables["ablation"].query(f"filter == {row['filter']}")["loss_increase"]
            assert of_filter["lost"] == (pytest.approx(lost.tolist(), **close) if layer == "conv4" else None)


def test_activations_are_counted_and_correlated_by_hand() -> None:
    values = np.array([[0.0, 3, 0], [24, 0, 0], [12, 0, 0], [0.5, 1, 0]], np.float32)
    columns = {"layer": "conv2", "filter": range(3), "dead": [False, False, True]}
    filters = pd.DataFrame({**columns, "preferred_class": ["b", "a", None]})
    classes = pd.DataFrame({"layer": "conv2", "activation_mean": np.arange(6.0)})
    tables = {"filter": filters, "class": classes.assign(activation_low=0.0, activation_high=9.0)}
    first, second, dead = heatmap.explain_filters("conv2", values, np.array([0, 1, 1, 0]), ["a", "b"], tables)
    assert first["images"] == [2, 2] and first["zeros"] == [0, 1] and first["largest"] == 24
    own, others = first["counts"]
    assert own.nonzero()[0].tolist() == [12, 23] and others.nonzero()[0].tolist() == [0]  # bins of width 1
    assert second["images"] == [2, 2] and second["zeros"] == [0, 2]
    assert first["similar"] == second["similar"] == dead["similar"] == []  # one falls where the other rises
    assert first["means"].tolist() == [[0, 0, 9], [1, 0, 9]] and first["lost"] is None
    copies = heatmap.explain_filters(
        "conv2", values[:, [0, 0, 2]], np.array([0, 1, 1, 0]), ["a", "b"], tables
    )
    assert copies[0]["similar"] == [(1, pytest.approx(1))] and copies[1]["similar"] == [(0, pytest.approx(1))]


def test_text_on_class_colours_is_readable() -> None:
    def luminance(colour: str) -> float:
        values = np.array(to_rgb(colour))
        return float(np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ weights)

    weights = np.array([0.2126, 0.7152, 0.0722])
    for colour in sns.color_palette("colorblind", 10).as_hex():
        low, high = sorted((luminance(colour), luminance(heatmap.readable_on(colour))))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert heatmap.readable_on("#ffffff") == "#000" and heatmap.readable_on("#000000") == "#fff"


def test_json_in_the_page_is_never_read_as_html() -> None:
    content = {"</script><b>": ["<!--", np.nan, np.float32(1 / 3), np.int64(7), np.bool_(True), None]}
    text = heatmap.as_json(content)
    assert "<" not in text and json.loads(text) == {"</script><b>": ["<!--", None, 0.33333, 7, True, None]}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")


def browse(page: Path, *visits: str) -> list[str]:
    """Open a page, visit addresses in it ("#run") or press keys ("Escape"); return what it showed after each.

    Nothing may be written to the console, and all that is loaded or linked must be a file beside the page.
    """
    copy = page.with_name("copy.html")
    script = """<script>(async () => {
        const shown = [];
        for (const visit of VISITS) {
            if (visit.startsWith("#")) location.hash = visit;
            else document.body.dispatchEvent(new KeyboardEvent("keydown", { key: visit, bubbles: true }));
            await new Promise((resolve) => setTimeout(resolve, 100));
            shown.push(main.cloneNode(true));
            if (main.scrollWidth > innerWidth) console.error("too wide");
        }
        document.body.replaceChildren(...shown);
    })();</script>"""
    copy.write_text(page.read_text() + script.replace("VISITS", json.dumps(visits)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    options += [
        "--window-size=500,800",
        "--virtual-time-budget=9000",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    command = [str(CHROMIUM), *options, copy.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    _, *shown = done.stdout.split("<main")
    assert len(shown) == len(visits)
    for link in re.findall(r'(?:src|href)="([^"#]+)', done.stdout) + re.findall(r"url\(([^)]+)", done.stdout):
        assert link == "data:," or (page.parent / unquote(link)).is_file(), link
    return shown


@NEEDS_CHROMIUM
def test_the_page_works_in_a_browser(pipeline: Path) -> None:
    shutil.copytree(pipeline / "outputs", "outputs", copy_function=shutil.copyfile)
    table = pd.read_csv("outputs/filter_metrics.csv").query("layer == 'conv4'")
    table = table.sort_values("selectivity", ascending=False, kind="stable", na_position="last")
    order = table["filter"].tolist()
    alive = order[1]
    keys = "ArrowLeft", "ArrowRight", "Escape"
    layers = [f"#{layer}" for layer in LAYERS]
    last = f"#conv4?sort=selectivity&class={table['preferred_class'].iloc[0]}"
    visits = [*layers, "#conv4?sort=selectivity", f"#conv4/{alive}", *keys, last, "#class/bird", "#run"]
    shown = browse(Path("outputs/explorer/index.html"), *visits)
    for layer, count, document in zip(LAYERS, FILTERS, shown, strict=False):
        assert re.findall(rf'href="#{layer}/(\d+)"', document) == [str(n) for n in range(count)]
    by_selectivity, one, before, after, back, of_class, bird, run = shown[4:]
    for document in (by_selectivity, back):
        assert re.findall(r'href="#conv4/(\d+)"', document) == [str(n) for n in order]
    assert f">conv4 / {alive} <" in one and f"url(conv4/{alive:03d}.webp)" in one
    assert f">conv4 / {order[0]} <" in before and f">conv4 / {alive} <" in after  # in the order of the tiles
    own = table.loc[table["preferred_class"] == table["preferred_class"].iloc[0], "filter"]
    assert re.findall(r'href="#conv4/(\d+)"', of_class) == [str(n) for n in own]
    assert ">bird</h1>" in bird and "are recognised" in bird and ">The run</h1>" in run


@NEEDS_CHROMIUM
def test_names_of_classes_do_no_harm_in_the_page(pipeline: Path) -> None:
    shutil.copytree(pipeline / "outputs", "outputs", copy_function=shutil.copyfile)
    page, names = Path("outputs/explorer/index.html"), ["</script><b>", "../x", "a&b=c#d?e/f%", "\"'`${1}"]
    text = page.read_text()
    for name, evil in zip(STL10_CLASSES, names, strict=False):
        text = text.replace(f'"{name}"', heatmap.as_json(evil))
    page.write_text(text.replace('"generated":false', '"generated":true'))
    for name, document in zip(
        names, browse(page, *(f"#class/{quote(name, safe='')}" for name in names)), strict=True
    ):
        assert f">{html.escape(name, quote=False)}</h1>" in document and "<b>&" not in document
        assert "Generated shapes, no photographs" in document


def test_a_page_without_what_is_optional_says_how_to_get_it(pipeline_copy: Path) -> None:
    for name in ("ablation.csv", "trust.csv"):
        (pipeline_copy / name).unlink()
    shutil.rmtree(pipeline_copy / "snapshots")
    (pipeline_copy / "explorer/conv4/999.webp").touch()  # of a network with more filters
    checkpoint = load_checkpoint(pipeline_copy / "CNN.pth")
    test = load_split("stl10", Path("data"), "test")
    guesses = heatmap.predict(checkpoint.net, test.images)
    heatmap.write_explorer(pipeline_copy, checkpoint, [checkpoint], test, guesses, 9)
    page = embedded(pipeline_copy / "explorer/index.html")
    notes = page["notes"]
    assert page["layers"]["conv4"]["filters"][0]["lost"] is None
    assert (
        "uv run analyse_projections.py" in notes["ablation"] and "uv run train_CNN.py" in notes["evolution"]
    )
    assert "uv run analyse_projections.py" in notes["reading"][-1]
    assert len(list((pipeline_copy / "explorer/conv4").iterdir())) == FILTERS[-1]
