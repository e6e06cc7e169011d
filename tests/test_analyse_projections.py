from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeNet, make_checkpoint, write_checkpoint
from torch import Tensor, nn

import analyse_projections as ap
from CNN import CNN, LAYERS, load_checkpoint
from deconv import project_unit, strongest_units
from deconv_full import Units, measure_activations, project_windows, strongest_of
from load_data import Array, Split, load_split

NAMES = ["dog", "cat", "ship"]  # not in alphabetical order


def some_images(count: int, size: int = 96) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)


def make_run(labels: Any, images: Array | None = None, net: CNN | None = None) -> ap.Run:
    checkpoint = make_checkpoint(net or CNN(filters=(2, 2, 2, 2), classes=3), class_names=NAMES)
    split = Split(some_images(len(labels), 1) if images is None else images, np.array(labels))
    return ap.Run(checkpoint, split, split, "some images", Path("outputs"), 200, 0)


def run_and_top(make_net: MakeNet, count: int) -> tuple[ap.Run, ap.TopUnits]:
    """A network most of whose filters fire, with their strongest units in images as deconv.py has them."""
    images = some_images(count)
    net = ap.recalibrate_batch_norm(make_net(classes=3), 0, images)
    batches = [net.normalise(torch.from_numpy(image[None])) for image in images]
    found = [(k, unit) for k, batch in enumerate(batches) for unit in strongest_units(net, batch, 3, 99)]
    measured = measure_activations(images, net, 50, "")
    places = np.array([(k, unit.filter) for k, unit in found]).T
    units = strongest_of(measured["conv4_max"], measured["conv4_position"], *places)
    origin = np.array([(unit.top, unit.left) for _, unit in found])
    magnitudes = np.array([np.abs(unit.projection).sum(axis=0) for _, unit in found])
    return make_run([0] * count, images, net), ap.TopUnits(units, origin, magnitudes, 75)


def same(one: nn.Module, other: nn.Module) -> list[bool]:
    """Whether each parameter and each statistic is the same in both, the counter of batches left out."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return [torch.equal(a, b) for (name, a), b in pairs if "num_batches" not in name]


def test_rank_correlation_with_ties_by_hand() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: products of deviations 2.25, squares 4.5 each
    x, y = np.array([[1, 2, 2], [9, np.nan, 5]]), np.array([[-7, 3, 2], [2, 1, np.nan]])
    assert ap.rank_correlation(x, y) == pytest.approx(2.25 / 4.5)
    assert ap.rank_correlation(x, -(x**3)) == pytest.approx(-1)


def test_bootstrap_intervals_are_as_wide_as_theory_says_and_medians_leave_nan_out() -> None:
    values, run = np.random.default_rng(0).standard_normal(400), make_run([0])._replace(resamplings=1000)
    value, low, high = run.bootstrap(lambda which: values[which].mean(), 400)
    assert value == values.mean() and low < value < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    value, low, high = run.median(np.array([4.0, np.nan, 2.0, 9.0]))
    assert (value, low, high) == (4, 2, 9)


def test_selectivity_by_hand() -> None:
    means = np.array([[2.0, 1, 0, 6], [0, 1, 0, 1], [0, 1, 0, 3]])  # of three classes: one only, alike, dead
    index = np.array([[1, 0, np.nan, 4 / 8], [-1, 0, np.nan, -3.5 / 5.5], [-1, 0, np.nan, -0.5 / 6.5]])
    stacked = np.stack([means, 3 * means[:, ::-1]])
    np.testing.assert_allclose(ap.class_selectivity(stacked), np.stack([index, index[:, ::-1]]))


def test_area_under_the_roc_curve_by_hand() -> None:
    values, members = np.array([[1.0], [2], [2], [3]]), np.array([[False], [True], [False], [True]])
    assert ap.area_under_roc(values, members) == [(1 + 0.5 + 1 + 1) / 4]  # 2 > 1, 2 = 2, 3 > 1, 3 > 2


def test_area_under_the_roc_curve_counts_pairs() -> None:
    rng = np.random.default_rng(7)
    values, members = rng.integers(0, 5, (40, 3)).astype(float), rng.random((40, 3)) < 0.3
    for k, area in enumerate(ap.area_under_roc(values, members)):
        inside, outside = values[members[:, k], k], values[~members[:, k], k]
        assert area == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside]))


def test_images_are_drawn_within_each_class() -> None:
    rng, labels = np.random.default_rng(5), np.repeat([2, 0, 1], [200, 3, 1])
    values = np.where(labels == 2, rng.normal(5, 1, 204), labels)[:, None]
    means = ap.bootstrap_means(values, make_run(labels)._replace(resamplings=2000))
    assert (means[:, :2, 0] == [0, 1]).all()  # a class keeps its images
    assert means[:, 2].mean() == pytest.approx(values[:200].mean(), abs=0.01)
    assert means[:, 2].std() == pytest.approx(values[:200].std() / 200**0.5, rel=0.05)


LABELS = [0, 1, 1, 1, 2]
STRENGTH = np.array([[4, 0, 5], [1, 0, 0], [1, 0, 0], [1, 0, 3], [3, 0, 5]], np.float32)  # filter 1 is dead
MAXIMA = {"conv3": STRENGTH, "conv4": STRENGTH}
PROJECTED = np.array([0, 1, 2, 2])  # classes of the images with projections
STATISTICS = {
    "mean": np.array([[1, 0, 2], [3, 0, 4], [1, 0, 0], [3, 0, 6]], np.float32),
    "max": np.array([[1, 0, 7], [5, 0, 2], [8, 0, 3], [2, 0, 1]], np.float32),
}


def test_the_table_of_filters_by_hand() -> None:
    table = ap.tabulate_filters(MAXIMA, STATISTICS, make_run(LABELS))
    conv3, conv4 = (table[table["layer"] == layer].reset_index() for layer in MAXIMA)
    expected = {
        "filter": [0, 1, 2],
        "dead": [0, 1, 0],
        "activation_mean": [2, 0, 2.6],  # over images
        "activation_variance": [8 / 5, 0, 25.2 / 5],
        "activation_nonzero": [1, 0, 0.6],
        "mean": [2, 0, 3],
        "max": [8, 0, 7],
        "selectivity": [(4 - 2) / (4 + 2), np.nan, (5 - 3) / (5 + 3)],  # each class counts once
        "auc": [1, np.nan, 3.5 / 4],
    }
    np.testing.assert_allclose(conv4[list(expected)].astype(float), np.array(list(expected.values())).T)
    assert conv4["preferred_class"].fillna("none").tolist() == ["dog", "none", "dog"]  # a tie: the first
    assert conv3[list(STATISTICS)].isna().all(axis=None) and conv3["auc"].equals(conv4["auc"])


def test_the_interval_of_the_selectivity_holds_it_and_a_dead_filter_has_none() -> None:
    table = ap.tabulate_filters({"conv1": STRENGTH}, {}, make_run(LABELS))
    low, value, high = (table[f"selectivity{end}"].to_numpy() for end in ("_low", "", "_high"))
    assert low[0] == pytest.approx(value[0]) and high[0] == pytest.approx(value[0])  # classes do not vary
    assert low[2] < value[2] < high[2] and np.isnan([low[1], high[1]]).all()


def test_the_table_of_classes_by_hand() -> None:
    table = ap.tabulate_classes(MAXIMA, STATISTICS, PROJECTED, make_run(LABELS))
    assert (
        table["class"].tolist() == NAMES * 6 and table["filter"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2
    )
    assert table["activation_mean"].tolist() == [4, 1, 3, 0, 0, 0, 5, 1, 5] * 2
    assert table["mean"][9:].tolist() == [1, 3, 2, 0, 0, 0, 2, 4, 3]
    assert table["max"][9:].tolist() == [1, 5, 8, 0, 0, 0, 7, 2, 3]
    assert table.loc[:8, list(STATISTICS)].isna().all(axis=None)
    assert ap.class_means(table, NAMES).tolist() == [[4, 0, 5], [1, 0, 1], [3, 0, 5]]


def test_filters_that_prefer_the_class_come_first_and_nearly_dead_ones_last() -> None:
    # filter 0 is dead; 1 prefers another class, yet its index for the first is above that of 2; 4 is as
    # selective as 3, and stronger; 5 is as 3; 7 fires on one image
    first, second, third = [0, 3, 2, 4, 8, 4, 1, 0], [0, 3.5, 1.8, 1, 2, 1, 5, 0], [0, 0, 1.8, 1, 2, 1, 5, 0]
    run = make_run(np.tile([0, 1, 2], 100))
    strength = np.tile([first, second, third], (100, 1))
    strength[0, 7] = 50
    filters = ap.tabulate_filters({"conv4": strength}, {}, run)
    classes = ap.tabulate_classes({"conv4": strength}, {}, run.test.labels, run)
    ranking = ap.rank_filters(filters, classes, NAMES, "dog")
    assert ranking["filter"].tolist() == [4, 3, 5, 2, 1, 6, 7]
    assert ranking["prefers"].tolist() == [True] * 4 + [False] * 2 + [True]
    index = [0.6, 0.6, 0.6, 0.2 / 3.8, 1.25 / 4.75, -4 / 6, 1]
    assert ranking["selectivity"].tolist() == pytest.approx(index)
    assert ranking["activation_mean"].tolist() == pytest.approx([8, 4, 4, 2, 3, 1, 0.5])


def test_the_summary_counts_dead_and_nearly_dead_filters_apart(capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"layer": "conv2", "dead": [True, False, False, False], "selectivity": [np.nan, 0.1, 0.2, 0.6]}
    share = {"activation_nonzero": [0, 0.0099, 0.01, 1], "auc": [np.nan, 0.5, 0.7, 0.9]}
    ap.print_layers(pd.DataFrame(columns | share))
    assert " ".join(capsys.readouterr().out.split()).endswith("conv2 4 1 1 0.200 0.700 1.0%")


def test_batch_norm_takes_the_average_over_batches_and_blocks_below_stay(make_net: MakeNet) -> None:
    net, old, images = make_net(), make_net(), some_images(150, 32)
    assert ap.recalibrate_batch_norm(net, 1, images) is net and not any(m.training for m in net.modules())
    assert all(same(net.blocks[0], old.blocks[0]))
    batches = []
    for batch in torch.from_numpy(images).split(100):
        x, _ = old.blocks[0](old.normalise(batch))
        for block in old.blocks[1:3]:
            maps = block.conv(x)
            x, _ = block.train()(x)  # normalised by the batch itself
        batches.append(torch.stack([maps.mean(dim=(0, 2, 3)), maps.var(dim=(0, 2, 3))]))
    statistics = [value for name, value in net.blocks[2].bn.named_buffers() if name.startswith("running")]
    torch.testing.assert_close(torch.stack(statistics), (batches[0] + batches[1]) / 2, rtol=1e-4, atol=1e-4)


def test_the_start_is_recalibrated_and_that_of_another_training_is_refused(make_net: MakeNet) -> None:
    start, path, images = make_net(3), Path("epoch_000.pth"), some_images(20, 32)
    write_checkpoint(start, path, settings={"seed": 4})
    checkpoint = make_checkpoint(make_net(), settings={"seed": 4})
    found = ap.load_untrained(path, checkpoint, images)
    assert all(same(found, ap.recalibrate_batch_norm(start, 0, images)))
    with pytest.raises(SystemExit, match=r"^epoch_000.pth is of another training: run `uv run train_CNN.py`"):
        ap.load_untrained(path, checkpoint._replace(settings={"seed": 5}), images)


def test_what_was_learned_is_the_median_of_the_differences_over_filters_active_in_both() -> None:
    layers, auc = pd.DataFrame({"layer": np.repeat(LAYERS, 5)}), np.tile([0.1, 0.2, 0.6, 0.7, 0.8], 4)
    trained = layers.assign(selectivity=[0.5, 0.7, 0.6, 0.9, np.nan] * 4, auc=auc + 0.2)
    untrained = layers.assign(selectivity=[np.nan, 0.1, 0.3, 0.2, 0.0] * 4, auc=auc)
    table = ap.compare_networks({"trained": trained, "untrained": untrained}, make_run([0]))
    found = table.query("layer == 'conv3' and metric == 'selectivity'")[["network", "median"]].to_numpy()
    expected = {"trained": 0.65, "untrained": 0.15, "learned": 0.6}  # of 0.6, 0.3 and 0.7
    assert dict(found) == pytest.approx(expected) and len(table) == 4 * 2 * 3
    learned = table.query("metric == 'auc' and network == 'learned'")
    np.testing.assert_allclose(learned[["median", "low", "high"]], 0.2)  # filters are drawn in pairs


def pooled_maps(net: CNN) -> tuple[Tensor, Tensor]:
    """Maps of conv4 in 40 images, and what its filters add to the logits."""
    pooled = 9 * torch.randn(40, 8, 3, 3, generator=torch.Generator().manual_seed(1)).double().clamp(min=0)
    return pooled, ap.contributions(net, net.average(pooled).flatten(1))


def ablated_right(net: CNN, pooled: Tensor, filters: Any, labels: Array) -> Array:
    """Whether the network is right with the pooled maps of these filters set to zero."""
    pooled = pooled.clone()
    pooled[:, filters] = 0
    return np.asarray(net.classify(pooled).argmax(dim=1).numpy() == labels, np.float64)


def test_contributions_add_up_to_the_logits(make_net: MakeNet) -> None:
    net = make_net(classes=3, dtype=torch.float64)
    pooled, parts = pooled_maps(net)
    torch.testing.assert_close(parts.sum(dim=0) + net.classifier.bias, net.classify(pooled))


def test_ablating_a_filter_is_setting_its_pooled_map_to_zero(make_net: MakeNet) -> None:
    net, labels = make_net(classes=3, dtype=torch.float64), np.arange(40) % 3
    pooled, parts = pooled_maps(net)
    changes, overall = ap.ablate_each(parts, net.classifier.bias, labels, 3)
    assert overall.shape == (8,) and np.ptp(overall) > 0
    for filter_ in range(8):
        gain = ablated_right(net, pooled, filter_, labels) - ablated_right(net, pooled, [], labels)
        assert overall[filter_] == pytest.approx(gain.mean())
        assert changes[:, filter_] == pytest.approx([gain[labels == label].mean() for label in range(3)])


def test_ablating_in_order_goes_from_the_network_to_the_class_of_the_bias(make_net: MakeNet) -> None:
    net, labels = make_net(classes=3, dtype=torch.float64), np.repeat(np.arange(3), (10, 13, 17))
    net.classifier.bias.copy_(torch.tensor([0.0, 2, 1]))
    pooled, parts = pooled_maps(net)
    order = np.array([3, 7, 0, 1, 2, 4, 5, 6])
    curve = ap.ablate_in_order(parts, net.classifier.bias, labels, order)
    assert curve[-1] == 13 / 40 and len(set(curve.tolist())) > 3
    assert curve.tolist() == [ablated_right(net, pooled, order[:n], labels).mean() for n in range(9)]


def test_damage_by_selective_filters_is_a_positive_correlation(capsys: pytest.CaptureFixture[str]) -> None:
    index = np.random.default_rng(0).uniform(0, 1, (3, 20))
    ap.correlate_damage(-index, -index.max(axis=0) / 100, index, make_run([0]))
    assert capsys.readouterr().out.count(": +1.00 (+1.00 to +1.00)") == 2


def test_filters_in_the_figure_of_ablation_stand_by_class_then_selectivity() -> None:
    index = np.array([[-0.5, 0.2, np.nan, 0.4, -0.1], [0.5, 0, np.nan, -0.1, 0.9]])  # filter 2 is dead
    changes, curve = np.arange(10.0).reshape(2, 5) / -100, np.full((1, 6), 0.3)
    figure = ap.draw_ablation(changes, index, {"a": curve, "b": curve, "c": curve}, ["x", "y"])
    shown: Any = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, [[3, 1, 4, 0], [8, 6, 9, 5]])  # points of accuracy that are lost
    plt.close(figure)


def test_the_table_of_ablation_is_that_of_the_test_images(pipeline: Path, tiny_stl10: Path) -> None:
    net, test = load_checkpoint(pipeline / "outputs/CNN.pth").net, load_split("stl10", tiny_stl10, "test")
    pooled = net.features(net.normalise(torch.from_numpy(test.images)))[-1][0]
    before, *after = (ablated_right(net, pooled, which, test.labels) for which in ([], *range(16)))
    gain = np.array(after) - before  # (filters, images)
    expected = np.stack([gain[:, test.labels == label].mean(axis=1) for label in range(10)], axis=1)
    table = pd.read_csv(pipeline / "outputs/ablation.csv")
    np.testing.assert_allclose(table["accuracy_change"], expected.ravel(), atol=1e-12)
    filters = pd.read_csv(pipeline / "outputs/filter_metrics.csv").query("layer == 'conv4'")
    np.testing.assert_allclose(table.groupby("filter")["selectivity"].max(), filters["selectivity"])


def test_windows_lie_in_the_full_frame_where_their_origin_says() -> None:
    windows, expected = np.zeros((2, 3, 4, 4), np.float32), np.zeros((2, 96, 96))
    windows[:, 0], windows[:, 2] = np.arange(16).reshape(4, 4), -2
    expected[0, :3, 93:] = [[6, 7, 8], [10, 11, 12], [14, 15, 16]]
    expected[1, 94:, :1] = [[5], [9]]
    frames = ap.in_frames(windows, np.array([[-1, 93], [94, -3]], np.int16))
    np.testing.assert_array_equal(frames, expected)


def test_top_units_are_projected_where_the_file_says(pipeline: Path, tiny_stl10: Path) -> None:
    checkpoint = load_checkpoint(pipeline / "outputs/CNN.pth")
    images, net = load_split("stl10", tiny_stl10, "test").images, checkpoint.net
    top = ap.read_top_units(pipeline / "outputs/projections.npz", checkpoint)
    stored = np.load(pipeline / "outputs/projections.npz")["conv4_image"]
    assert len(top.units.image) == (stored >= 0).sum() < stored.size  # some filters fire on fewer images
    for k in range(0, len(top.units.image), 25):
        image, filter_, row, column, value = (entry[k] for entry in top.units)
        batch = net.normalise(torch.from_numpy(images[[image]]))
        assert float(net.features(batch)[3][0][0, filter_, row, column]) == pytest.approx(value, rel=1e-5)
        magnitude = project_unit(net, batch, 3, filter_, row, column).abs().sum(dim=0).numpy()
        np.testing.assert_allclose(top.magnitude[k], magnitude, atol=1e-4 * magnitude.max())
        assert (magnitude[top.window(k)] > 0).sum() == (magnitude > 0).sum()


def test_masks_keep_the_right_number_of_the_right_pixels() -> None:
    rng, none = np.random.default_rng(0), np.zeros(1, int)
    window, magnitude = np.zeros((96, 96), bool), rng.random((1, 96, 96))
    window[:45, 21:] = True  # rows -30 to 44, columns 21 to 95; the centre is row 7, column 58
    top = ap.TopUnits(Units(none, none, none, none, none), np.array([[-30, 21]]), magnitude, 75)
    masks = ap.mask_pixels(top, 0, 0.3, rng)
    for name in ("projection", "centre", "random"):
        kept = masks[f"{name}, kept"]
        assert kept.sum() == round(0.3 * 45 * 75) and not (kept & ~window).any()
        assert (masks[f"{name}, deleted"] == ~kept).all()
    kept = masks["projection, kept"]
    assert magnitude[0][kept].min() > magnitude[0][window & ~kept].max()
    kept, distance = masks["centre, kept"], np.hypot(*np.ogrid[-7:89, -58:38])
    assert distance[kept].max() <= distance[window & ~kept].min()
    assert 0.2 < masks["random, kept"][:20, 21:].mean() < 0.4  # spread evenly


def test_what_survives_is_what_the_network_makes_of_the_masked_image(make_net: MakeNet) -> None:
    run, top = run_and_top(make_net, 10)
    assert len(top.units.image) > 64  # more than one batch
    shares, rng, rows = ap.surviving_shares(run, top, 0.25), np.random.default_rng(run.seed), []
    for k, (image, filter_, row, column, value) in enumerate(zip(*top.units, strict=True)):
        batch = run.net.normalise(torch.from_numpy(run.test.images[[image]]))
        masks = ap.mask_pixels(top, k, 0.25, rng)
        masked = torch.cat([batch * torch.from_numpy(mask) for mask in masks.values()])
        pooled = run.net.features(masked)[3][0][:, filter_, row, column].numpy()
        rows.append(dict(zip(masks, pooled / value, strict=True)))
    expected = pd.DataFrame(rows).groupby(top.units.filter).mean()
    pd.testing.assert_frame_equal(shares, expected, rtol=1e-3, atol=1e-4)


def test_an_activation_survives_whole_if_all_that_it_sees_is_kept(make_net: MakeNet) -> None:
    shares = ap.surviving_shares(*run_and_top(make_net, 3), 1.0)
    kept = shares[["projection, kept", "centre, kept", "random, kept"]].to_numpy()
    assert kept.min() > 1 - 1e-4 and (kept == kept[:, :1]).all()
    assert shares["projection, deleted"].median() < 0.9


def test_a_partner_is_of_another_filter_in_another_image_with_the_same_window() -> None:
    filter_, image = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2])
    units = Units(image, filter_, image, image, image)
    top = ap.TopUnits(units, np.array([[2, 2]] * 4 + [[2, 34]]), np.zeros((5, 96, 96)), 75)
    for seed in range(5):
        drawn = ap.draw_partners(top, np.array([0, 2, 3, 4]), np.random.default_rng(seed))
        assert drawn.tolist() == [3, 1, 0, 4]  # the last has none


def test_weights_become_random_from_the_top(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    (run, top), calls = run_and_top(make_net, 5), []

    def spy(projector: Any, images: Array, units: Units, doing: str, forward: CNN) -> tuple[Array, Array]:
        calls.append((projector.net, forward, units))
        return project_windows(projector, images, units, doing, forward)

    monkeypatch.setattr(ap, "project_windows", spy)
    state, before = torch.get_rng_state(), [value.clone() for value in run.net.state_dict().values()]
    alike = ap.randomise_weights(run, top, 99, run.train.images)  # 99: all of them
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, run.net.state_dict().values(), before))
    assert [str(name).split(", ")[1] for name in alike][2:] == ["own switches", "trained switches"] * 4
    (down, forward, elsewhere), *conditions = calls
    assert down is forward is run.net and (elsewhere.filter != top.units.filter).all()
    assert all((elsewhere[k] == top.units[k]).all() for k in (0, 2, 3))  # image, row and column
    for k, (down, forward, units) in enumerate(conditions):
        assert forward is (run.net if k % 2 else down) and (units.filter == top.units.filter).all()
        for number, (block, trained) in enumerate(zip(down.blocks, run.net.blocks, strict=True)):
            assert all(same(block, trained)) if number < 3 - k // 2 else not any(same(block, trained))
            assert block.bn.running_mean.all()  # recalibrated
    assert (alike.iloc[:, 2:].median() < 0.95).all()
    for k, value in enumerate(alike["other filter, other image"]):
        different = (top.units.filter != top.units.filter[k]) & (top.units.image != top.units.image[k])
        partners = np.flatnonzero((top.origin == top.origin[k]).all(axis=1) & different)
        inside = [top.magnitude[n][top.window(k)] for n in (*partners, k)]
        assert value in [ap.rank_correlation(one, inside[-1]) for one in inside[:-1]] or not partners.size


def test_trained_weights_leave_projections_alike(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    run, top = run_and_top(make_net, 3)
    for layer in (nn.Conv2d, nn.BatchNorm2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    monkeypatch.setattr(ap, "recalibrate_batch_norm", lambda net, first, images: net)
    alike = ap.randomise_weights(run, top, 10, run.train.images)
    assert alike.shape == (10, 10) and alike["other filter, same place"].median() < 0.95
    np.testing.assert_allclose(alike.iloc[:, 2:], 1, atol=1e-3)


def test_features_are_averages_of_regions_and_conv4_as_the_classifier_sees_it(make_net: MakeNet) -> None:
    net, images = make_net(classes=3, head_size=2), some_images(60)
    found, maxima = ap.pool_features(net, images, 125, "")
    # maps of 24, 12 and 6 rows; 5 x 5 regions of conv1 and 4 x 4 of conv3 would be few enough, but do not fit
    assert [part.shape for part in found] == [(60, 5 * 16), (60, 6 * 16), (60, 7 * 9), (60, 8 * 4)]
    batch = net.normalise(torch.from_numpy(images))
    regions = net.features(batch)[1][0].unfold(2, 3, 3).unfold(3, 3, 3).mean(dim=(4, 5))
    torch.testing.assert_close(found[1], regions.flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.classifier(found[3]), net(batch), rtol=1e-4, atol=1e-4)
    measured = measure_activations(images, net, 60, "")
    for layer in LAYERS:
        np.testing.assert_allclose(maxima[layer], measured[f"{layer}_max"], rtol=1e-4, atol=1e-5)


def separable(count: int, distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Features and labels of three classes, half of the images in class 0."""
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(count) % 4 % 3
    return torch.randn(count, 10, generator=generator) + distance * torch.eye(3, 10)[labels], labels


@pytest.mark.parametrize(
    ("distance", "decay", "low", "high"), [(9, 1e-3, 1, 1), (0, 1e-3, 0.3, 0.6), (9, 1e4, 0.5, 0.5)]
)
def test_a_probe_learns_what_there_is_and_under_a_strong_decay_the_bias_alone(
    distance: float, decay: float, low: float, high: float
) -> None:
    assert low <= ap.probe(*separable(200, distance, 0), decay, *separable(400, distance, 1)) <= high


def test_a_probe_does_not_depend_on_the_scale_of_its_inputs() -> None:
    (fit, labels), (on, on_labels) = separable(100, 2, 0), separable(300, 2, 1)
    plain = ap.probe(fit, labels, 0.1, on, on_labels)
    scales = torch.logspace(-3, 3, 10)
    fit, on = (torch.cat([part * scales + 7, torch.ones(len(part), 1)], dim=1) for part in (fit, on))
    assert plain == pytest.approx(ap.probe(fit, labels, 0.1, on, on_labels), abs=0.011) and 0.6 < plain < 1


def test_probes_choose_the_decay_on_training_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, scores = [], {0.1: 0.3, 0.2: 0.6, 0.4: 0.5}

    def spy(fit: Tensor, labels: Tensor, decay: float, on: Tensor, on_labels: Tensor) -> float:
        assert torch.equal(fit[:, 0] % 3, labels) and torch.equal(on[:, 0] % 3, on_labels)
        calls.append((fit[:, 0].tolist(), decay, on[:, 0].tolist()))
        return scores[decay]

    monkeypatch.setattr(ap, "probe", spy)
    train, test = torch.arange(20)[:, None], torch.arange(60, 70)[:, None]  # an image's number is its feature
    run = make_run(np.arange(20) % 3)
    run = run._replace(test=Split(run.test.images[:10], np.arange(60, 70) % 3))
    ap.run_probes(run, dict.fromkeys(("trained", "untrained"), ([train] * 4, [test] * 4)), list(scores))
    for start in range(0, len(calls), 4):
        for fit, _, held in calls[start : start + 3]:
            assert len(held) == 4 and sorted(fit + held) == list(range(20))
        assert calls[start + 3] == (list(range(20)), 0.2, list(range(60, 70)))
    table, error = pd.read_csv("outputs/probes.csv"), 1.96 * (0.6 * 0.4 / 10) ** 0.5
    assert table["layer"].tolist() == list(LAYERS) * 2 and (table["decay"] == 0.2).all()
    expected = [[0.6, 0.6 - error, 0.6 + error, 1]] * 8
    np.testing.assert_allclose(table[["accuracy", "low", "high", "inputs"]], expected)


def test_the_table_of_the_untrained_network_is_that_of_the_start(pipeline: Path, tiny_stl10: Path) -> None:
    train, test = (load_split("stl10", tiny_stl10, split).images for split in ("train", "test"))
    start, checkpoint = (
        pipeline / "outputs/snapshots/epoch_000.pth",
        load_checkpoint(pipeline / "outputs/CNN.pth"),
    )
    measured = measure_activations(test, ap.load_untrained(start, checkpoint, train), 50, "")
    means = np.concatenate([measured[f"{layer}_max"].mean(axis=0) for layer in LAYERS])
    table = pd.read_csv(pipeline / "outputs/filter_metrics_untrained.csv")
    np.testing.assert_allclose(table["activation_mean"], means, rtol=1e-4, atol=1e-5)


def test_a_run_with_the_same_seed_writes_the_same_tables(pipeline: Path, pipeline_copy: Path) -> None:
    tables = [path for path in pipeline_copy.glob("*.csv") if path.name != "training_log.csv"]
    for path in tables:
        path.unlink()
    ap.main()
    assert [path.read_bytes() for path in tables] == [(pipeline / path).read_bytes() for path in tables] != []


@pytest.mark.parametrize("name", ["activations.npz", "projection_statistics.npz", "projections.npz"])
def test_files_that_are_missing_or_of_another_checkpoint_are_refused(pipeline_copy: Path, name: str) -> None:
    path = pipeline_copy / name
    np.savez(path, **dict(np.load(path)) | {"checkpoint_sha256": np.array("0" * 64)})
    with pytest.raises(
        SystemExit, match=f"^{path} was made from another checkpoint: run `uv run deconv_full"
    ):
        ap.main()
    path.unlink()
    with pytest.raises(SystemExit, match=f"^{path} not found: run `uv run deconv_full.py` first$"):
        ap.main()
