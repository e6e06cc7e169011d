from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeNet, make_checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import analyse_projections as ap
from CNN import CNN, LAYERS, Checkpoint, load_checkpoint
from deconv import project, project_unit
from deconv_full import Units, measure_activations, project_top, project_windows
from load_data import Array, Split, load_split, save_arrays

NAMES = ["dog", "cat", "ship"]  # not in alphabetical order


def some_images(count: int, size: int = 96) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)


def make_run(labels: Any, images: Array | None = None, net: CNN | None = None) -> ap.Run:
    checkpoint = make_checkpoint(net or CNN(filters=(2, 2, 2, 2), classes=3), class_names=NAMES)
    split = Split(some_images(len(labels), 1) if images is None else images, np.array(labels))
    return ap.Run(checkpoint, split, split, "some images", Path("outputs"))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ap, "RESAMPLINGS", 200)
    monkeypatch.setattr(ap, "RANDOM_DRAWS", 2)


def run_and_top(make_net: MakeNet, count: int) -> tuple[ap.Run, ap.Projected]:
    """A network most of whose filters fire, and the strongest unit of each in some images."""
    images = some_images(count)
    net = ap.recalibrate_batch_norm(make_net(classes=3), 0, images)
    top = project_top(images, net, measure_activations(images, net, 50, ""), count, 50)
    checkpoint = make_checkpoint(net)
    save_arrays(Path("top.npz"), checkpoint, **top)
    return make_run([0] * count, images, net), ap.read_top_units(Path("top.npz"), checkpoint)


def ran(pipeline: Path, data: Path) -> tuple[Checkpoint, Split, Split]:
    train, test = (load_split("stl10", data, split) for split in ("train", "test"))
    return load_checkpoint(pipeline / "outputs/CNN.pth"), train, test


def same(one: nn.Module, other: nn.Module) -> list[bool]:
    """Whether each parameter and each statistic is the same in both, the counter of batches left out."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return [torch.equal(a, b) for (name, a), b in pairs if "num_batches" not in name]


def test_rank_correlation_with_ties_by_hand() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: products of deviations 2.25, squares 4.5 each
    x, y = np.array([[1, 2, 2], [9, np.nan, 5]]), np.array([[-7, 3, 2], [2, 1, np.nan]])
    assert ap.rank_correlation(x, y) == pytest.approx(2.25 / 4.5)
    assert ap.rank_correlation(x, -(x**3)) == pytest.approx(-1)


def test_bootstrap_intervals_are_as_wide_as_theory_says_and_medians_leave_nan_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ap, "RESAMPLINGS", 1000)
    values = np.random.default_rng(0).standard_normal(400)
    value, low, high = ap.bootstrap(lambda which: values[which].mean(), 400)
    assert value == values.mean() and low < value < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert ap.median(np.array([4.0, np.nan, 2.0, 9.0])) == (4, 2, 9)


def test_selectivity_by_hand() -> None:
    means = np.array([[2.0, 1, 0, 6], [0, 1, 0, 1], [0, 1, 0, 3]])  # of three classes: one only, alike, dead
    index = np.array([[1, 0, np.nan, 4 / 8], [-1, 0, np.nan, -3.5 / 5.5], [-1, 0, np.nan, -0.5 / 6.5]])
    stacked = np.stack([means, 3 * means[:, ::-1]])
    np.testing.assert_allclose(ap.class_selectivity(stacked), np.stack([index, index[:, ::-1]]))


def test_area_under_the_roc_curve_counts_pairs_and_half_of_ties() -> None:
    rng = np.random.default_rng(7)
    values, members = rng.integers(0, 5, (40, 3)).astype(float), rng.random((40, 3)) < 0.3
    for k, area in enumerate(ap.area_under_roc(values, members)):
        inside, outside = values[members[:, k], k], values[~members[:, k], k]
        assert area == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside]))


def test_images_are_drawn_within_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ap, "RESAMPLINGS", 2000)
    rng, labels = np.random.default_rng(5), np.repeat([2, 0, 1], [200, 3, 1])
    values = np.where(labels == 2, rng.normal(5, 1, 204), labels)[:, None]
    means = ap.bootstrap_means(values, labels)
    assert (means[:, :2, 0] == [0, 1]).all()  # a class keeps its images
    assert means[:, 2].mean() == pytest.approx(values[:200].mean(), abs=0.01)
    assert means[:, 2].std() == pytest.approx(values[:200].std() / 200**0.5, rel=0.05)


LABELS = [0, 1, 1, 1, 2]
STRENGTH = np.array([[4, 0, 5], [1, 0, 0], [1, 0, 0], [1, 0, 3], [3, 0, 5]], np.float32)  # filter 1 is dead
PEAKS = dict.fromkeys(LAYERS, STRENGTH)
MEAN, MAX = [[1, 0, 2], [3, 0, 4], [1, 0, 0], [3, 0, 6]], [[1, 0, 7], [5, 0, 2], [8, 0, 3], [2, 0, 1]]
STATISTICS = {"mean": np.array(MEAN), "max": np.array(MAX)}  # in four images, of classes 0, 1, 2 and 2


def tables_of(peaks: dict[str, Array], labels: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    tables = ap.tabulate(peaks, make_run(labels))
    projections = ap.tabulate_projections(STATISTICS, np.array([0, 1, 2, 2]), NAMES)
    filters = tables.filters.merge(projections.filters, "left", ["layer", "filter"])
    return filters, tables.classes.merge(projections.classes, "left", ["layer", "filter", "class"])


def test_the_table_of_filters_by_hand() -> None:
    table, _ = tables_of(PEAKS, LABELS)
    conv3, conv4 = (table[table["layer"] == layer].reset_index() for layer in LAYERS[2:])
    columns = ["filter", "dead", "activation_mean", "activation_variance", "activation_nonzero"]
    rows: Any = [[0, 0, 2, 1.6, 1, 2, 8], [1, 1, 0, 0, 0, 0, 0], [2, 0, 2.6, 5.04, 0.6, 3, 7]]
    np.testing.assert_allclose(conv4[[*columns, "mean", "max"]].astype(float), rows)
    index = [(4 - 2) / (4 + 2), np.nan, (5 - 3) / (5 + 3)]  # each class counts once
    low, high = conv4["selectivity_low"], conv4["selectivity_high"]
    np.testing.assert_allclose(conv4[["selectivity", "auc"]], np.array([index, [1, np.nan, 3.5 / 4]]).T)
    assert low[2] < index[2] < high[2] and [low[0], high[0]] == pytest.approx([index[0]] * 2)  # all alike
    assert np.isnan([low[1], high[1]]).all()
    names = conv4[["preferred_class", "runner_up", "top_class"]].fillna("none")
    # filter 0: nine strongest images hold three cats; filter 2: preferred ties with runner-up, in images too
    assert names.to_numpy().tolist() == [["dog", "ship", "cat"], ["none"] * 3, ["dog", "ship", "dog"]]
    assert conv4["preferred_share"].fillna(-1).tolist()[:2] == [1, -1]
    assert conv3[list(STATISTICS)].isna().all(axis=None) and conv3["auc"].equals(conv4["auc"])


def test_the_table_of_classes_by_hand() -> None:
    _, table = tables_of(PEAKS, LABELS)
    assert table["class"].tolist() == NAMES * 12
    assert table["filter"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 4
    assert table["activation_mean"].tolist() == [4, 1, 3, 0, 0, 0, 5, 1, 5] * 4
    assert table["mean"][27:].tolist() == [1, 3, 2, 0, 0, 0, 2, 4, 3]
    assert table["max"][27:].tolist() == [1, 5, 8, 0, 0, 0, 7, 2, 3]
    assert table.loc[:26, list(STATISTICS)].isna().all(axis=None)
    assert ap.class_means(table).tolist() == [[4, 0, 5], [1, 0, 1], [3, 0, 5]]


def test_batch_norm_takes_the_average_over_batches_and_blocks_below_stay(make_net: MakeNet) -> None:
    net, old, images = make_net(), make_net(), some_images(150, 32)
    assert ap.recalibrate_batch_norm(net, 1, images) is net and not any(m.training for m in net.modules())
    assert all(same(net.blocks[0], old.blocks[0]))
    batches = [old.features(old.normalise(batch))[0][0] for batch in torch.from_numpy(images).split(100)]
    maps = [old.blocks[1].conv(batch) for batch in batches]
    statistics = [torch.stack([part.mean(dim=(0, 2, 3)), part.var(dim=(0, 2, 3))]) for part in maps]
    found = [value for name, value in net.blocks[1].bn.named_buffers() if name.startswith("running")]
    torch.testing.assert_close(torch.stack(found), (statistics[0] + statistics[1]) / 2, rtol=1e-4, atol=1e-4)
    assert not any(same(net.blocks[3].bn, old.blocks[3].bn)[2:])


def test_the_untrained_network_is_the_start_of_this_training(
    pipeline: Path, pipeline_copy: Path, tiny_stl10: Path
) -> None:
    (_, train, test), path = ran(pipeline, tiny_stl10), pipeline_copy / "snapshots/epoch_000.pth"
    start, old = (load_checkpoint(path).net for _ in range(2))
    ap.recalibrate_batch_norm(start, 0, train.images)
    assert all(map(torch.equal, start.parameters(), old.parameters()))
    assert not any(same(start.blocks[3].bn, old.blocks[3].bn)[2:])
    measured = measure_activations(test.images, start, 50, "")
    means = np.concatenate([measured[f"{layer}_max"].mean(axis=0) for layer in LAYERS])
    table = pd.read_csv(pipeline_copy / "filter_metrics_untrained.csv")
    np.testing.assert_allclose(table["activation_mean"], means, rtol=1e-4, atol=1e-5)
    stored = torch.load(path, weights_only=True)
    torch.save(stored | {"settings": {}}, path)
    with pytest.raises(SystemExit, match=f"^{path} is of another training: run `uv run train_CNN.py` again$"):
        ap.main()


def test_what_was_learned_is_the_median_of_the_differences_over_filters_active_in_both() -> None:
    layers, auc = pd.DataFrame({"layer": np.repeat(LAYERS, 5)}), np.tile([0.1, 0.2, 0.6, 0.7, 0.8], 4)
    trained = layers.assign(selectivity=[0.5, 0.7, 0.6, 0.9, np.nan] * 4, auc=auc + 0.2)
    untrained = layers.assign(selectivity=[np.nan, 0.1, 0.3, 0.2, 0.0] * 4, auc=auc)
    table = ap.compare_networks(trained, untrained)
    found = table.query("layer == 'conv3' and metric == 'selectivity'")[["network", "median"]].to_numpy()
    assert dict(found) == pytest.approx({"trained": 0.65, "untrained": 0.15, "learned": 0.6})  # 0.6, 0.3, 0.7
    np.testing.assert_allclose(table.query("metric == 'auc' and network == 'learned'").iloc[:, 3:], 0.2)


def net_and_maps(make_net: MakeNet) -> tuple[CNN, Tensor, Array]:
    """A network, maps of conv4 in 40 images, and their labels."""
    net, generator = make_net(classes=3, dtype=torch.float64), torch.Generator().manual_seed(1)
    net.classifier.bias.copy_(torch.tensor([0.0, 2, 1]))
    pooled = 9 * torch.randn(40, 8, 3, 3, generator=generator).double().clamp(min=0)
    return net, pooled, np.repeat(np.arange(3), (10, 13, 17))


def logits_without(net: CNN, pooled: Tensor, filters: Any, level: Tensor) -> Tensor:
    """Logits with what the classifier sees of these filters set to a level, (filters, regions)."""
    averages = net.average(pooled).flatten(2)
    averages[:, filters] = level[filters]
    return net.classifier(averages.flatten(1))  # type: ignore[no-any-return]


def test_ablation_sets_what_the_classifier_sees_of_a_filter_to_its_mean(make_net: MakeNet) -> None:
    net, pooled, labels = net_and_maps(make_net)
    inputs = net.average(pooled).flatten(1)
    level = inputs[:9].mean(dim=0)
    logits, truth = ap.split_logits(net, inputs, level), torch.from_numpy(labels)
    torch.testing.assert_close(logits.parts.sum(dim=0) + logits.base, net.classify(pooled))
    damage = ap.measure_loss_increase(logits, truth)
    before = net.classify(pooled)
    for filter_ in range(8):
        after = logits_without(net, pooled, [filter_], level.view(8, -1))
        rise = [cross_entropy(of, truth, reduction="none") for of in (after, before)]
        np.testing.assert_allclose(damage[:, filter_], rise[0] - rise[1], atol=1e-9)
    assert np.ptp(damage.mean(axis=0)) > 0.01


def test_damage_is_summarised_by_hand() -> None:
    dead = np.nan  # the third filter is
    index = np.array([[0.9, 0.1, dead], [0.1, 0.2, dead], [0.3, 0.5, dead]])
    damage = np.array([[1.0, 0, 0], [0, 0, 0], [0, -1, 0], [0, -1, 0], [0, 1, 0], [0, 1, 0]])  # 0 and 2
    table = ap.summarise_ablation(damage, {"selectivity": index}, {}, np.array([0, 0, 1, 1, 2, 2]))
    rows = table.set_index("quantity")["value"]
    assert rows["its preferred class"] == (0.5 + 1) / 2
    assert rows["each other class"] == (0 + 0 + 0 - 1) / 4
    assert rows["share of filters that cost their preferred class most"] == 1
    # other classes: indices 0.1, 0.3, 0.1, 0.2, damage 0, 0, 0, -1; ranks 1.5, 4, 1.5, 3 and 3, 3, 3, 1
    expected = -0.5 * 2 / ((1 + 1 + 2.25 + 0.25) * 3) ** 0.5
    assert rows["each other class: rank correlation with selectivity"] == pytest.approx(expected)


def test_tables_are_those_of_the_network_and_the_test_images(pipeline: Path, tiny_stl10: Path) -> None:
    (net, *_), train, (images, labels) = ran(pipeline, tiny_stl10)
    learned, pooled = (
        net.features(net.normalise(torch.from_numpy(of)))[-1][0] for of in (train.images, images)
    )
    level, truth = net.average(learned).flatten(2).mean(dim=0), torch.from_numpy(labels)
    table, count = pd.read_csv(pipeline / "outputs/ablation.csv"), 16
    before, *after = (
        cross_entropy(logits_without(net, pooled, which, level), truth, reduction="none").numpy()
        for which in ([], *([f] for f in range(count)))
    )
    expected = [[*(row[labels == k].mean() for k in range(10)), row.mean()] for row in after - before]
    np.testing.assert_allclose(table["loss_increase"], np.ravel(expected), atol=1e-5)
    assert table["class"][10::11].eq("all").all()
    filters = pd.read_csv(pipeline / "outputs/filter_metrics.csv")[-count:]  # those of conv4
    np.testing.assert_allclose(table.groupby("filter")["selectivity"].max(), filters["selectivity"])
    largest = np.load(pipeline / "outputs/projection_statistics.npz")["max"].max(axis=0)
    np.testing.assert_allclose(filters["max"], largest)


def test_top_units_are_projected_where_the_file_says(pipeline: Path, tiny_stl10: Path) -> None:
    (checkpoint, _, test), path = ran(pipeline, tiny_stl10), pipeline / "outputs/projections.npz"
    arrays = dict(np.load(path))
    arrays["conv4_image"][3, 5:] = -1  # as if filter 3 fired on five images only
    np.savez("some.npz", **arrays)
    top, net = ap.read_top_units(Path("some.npz"), checkpoint), checkpoint.net
    assert len(top.units.image) == (arrays["conv4_image"] >= 0).sum() and (top.units.filter == 3).sum() == 5
    for k in range(0, len(top.units.image), 25):
        image, filter_, row, column, value = (entry[k] for entry in top.units)
        batch = net.normalise(torch.from_numpy(test.images[[image]]))
        assert float(net.features(batch)[3][0][0, filter_, row, column]) == pytest.approx(value, rel=1e-5)
        magnitude = project_unit(net, batch, 3, filter_, row, column).abs().sum(dim=0).numpy()
        frame = ap.crop_windows(top.magnitude[[k]], -top.origin[[k]], 96)[0]
        np.testing.assert_allclose(frame, magnitude, atol=1e-4 * magnitude.max())
        inside = ap.crop_windows(np.ones((1, 96, 96)), top.origin[[k]], len(top.envelope))[0]
        assert (top.inside[k] == inside).all()
    drawn = ap.one_of_each(top.units.filter)
    assert top.units.filter[drawn].tolist() == np.unique(top.units.filter).tolist()


def test_the_envelope_is_the_mean_over_windows_that_reach_a_place(make_net: MakeNet) -> None:
    _, top = run_and_top(make_net, 3)
    shares = top.magnitude / top.magnitude.sum(axis=(1, 2))[:, None, None]
    for row, column in ((0, 0), (10, 70), (40, 40)):
        inside = top.inside[:, row, column]
        expected = shares[inside, row, column].mean() if inside.any() else 0
        assert top.envelope[row, column] == pytest.approx(expected)
    assert not top.inside.all()


def test_chosen_pixels_are_the_strongest_inside_the_image_and_so_many() -> None:
    rng, inside = np.random.default_rng(0), np.zeros((75, 75), np.bool_)
    inside[30:, :60] = True
    score = rng.random((75, 75))
    chosen, all_of_another = ap.topk_mask(np.stack([score, score]), np.stack([inside, inside | True]), 0.3)
    assert all_of_another.sum() == round(0.3 * 75**2)
    assert chosen.sum() == round(0.3 * 45 * 60) and not (chosen & ~inside).any()
    assert score[chosen].min() >= score[inside & ~chosen].max()


def test_pixels_are_scored_by_projection_gradients_edges_centre_and_chance(make_net: MakeNet) -> None:
    run, top = run_and_top(make_net, 3)
    which = np.arange(0, len(top.units.image), 4)
    scores = ap.score_pixels(run, top.select(which), np.random.default_rng(0))
    assert list(scores) == ["gradient", "guided backpropagation", "edges", "centre", "random"]
    size = len(top.envelope)
    from_centre = np.arange(-6, 7)
    kernel = np.exp(-0.5 * (from_centre / ap.BLUR) ** 2)
    kernel = kernel[:, None] * kernel / kernel.sum() ** 2

    def blurred(frame: Array) -> Array:
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(frame, 6, "reflect"), (13, 13))
        return np.asarray((windows * kernel).sum(axis=(2, 3)))

    for k, unit in enumerate(which):
        image, filter_, row, column, _ = (entry[unit] for entry in top.units)
        pixels = run.net.normalise(torch.from_numpy(run.test.images[[image]])).requires_grad_()
        run.net.features(pixels)[3][0][0, filter_, row, column].backward()
        assert pixels.grad is not None
        expected = {"gradient": pixels.grad.abs().sum(dim=1).numpy()[0]}
        expected["edges"] = blurred(np.abs(np.gradient(pixels.detach().numpy()[0], axis=(1, 2))).sum((0, 1)))
        for name, frame in expected.items():
            window = ap.crop_windows(frame[None], top.origin[[unit]], size)[0]
            window = window * (top.envelope if name == "edges" else 1)
            np.testing.assert_allclose(scores[name][k], window, atol=1e-4 * window.max())
    assert np.unravel_index(scores["centre"][0].argmax(), (size, size)) == ((size - 1) // 2,) * 2


def test_other_filters_are_projected_at_the_place_of_a_unit(make_net: MakeNet) -> None:
    run, top = run_and_top(make_net, 4)
    which, net = ap.one_of_each(top.units.filter), run.net
    filters = (top.units.filter[which] + 1) % 8
    others = ap.project_others(run, top.select(which), filters, "")
    for k, unit in enumerate(which):
        image, _, row, column, _ = (entry[unit] for entry in top.units)
        features = net.features(net.normalise(torch.from_numpy(run.test.images[[image]])))
        only = torch.zeros_like(features[3][0])
        only[0, filters[k], row, column] = 1
        switches = [switch for _, switch in features]
        frame = project(net, 3, only, switches, (96, 96)).abs().sum(dim=1).numpy()
        expected = ap.crop_windows(frame, top.origin[[unit]], len(top.envelope))[0]
        np.testing.assert_allclose(others[k], expected, atol=1e-5 * expected.max())


def test_what_survives_is_what_the_network_makes_of_the_masked_image(make_net: MakeNet) -> None:
    run, top = run_and_top(make_net, 4)
    units, others = np.arange(40) % 8, np.random.default_rng(0).random((40, *top.envelope.shape))
    survived = ap.surviving_shares(run, top.select(units), others, 0.25)
    for k, unit in enumerate(units):
        image, filter_, row, column, value = (entry[unit] for entry in top.units)
        batch = run.net.normalise(torch.from_numpy(run.test.images[[image]]))
        for name, score in (("projection", top.magnitude[unit]), ("other filter", others[k])):
            chosen = ap.topk_mask(score[None], top.inside[[unit]], 0.25)
            mask = torch.from_numpy(ap.crop_windows(chosen, -top.origin[[unit]], 96))
            for variant, masked in (("kept", batch * mask), ("deleted", batch * ~mask)):
                share = float(run.net.features(masked)[3][0][0, filter_, row, column]) / value
                assert survived[variant][name][k] == pytest.approx(share, rel=1e-3, abs=1e-4)


def test_an_activation_survives_whole_if_all_that_it_sees_is_kept(make_net: MakeNet) -> None:
    run, top = run_and_top(make_net, 3)
    one = top.select(ap.one_of_each(top.units.filter))
    survived = ap.surviving_shares(run, one, one.magnitude, 1.0)
    np.testing.assert_allclose(survived["kept"], 1, rtol=1e-3)
    assert survived["deleted"]["projection"].median() < 0.9


def test_two_projections_alike_by_the_envelope_alone_have_no_partial_correlation() -> None:
    rng = np.random.default_rng(0)
    shared, *noise = rng.standard_normal((4, 4000))
    plain, partial = ap.compare_magnitudes(shared + noise[0], shared + noise[1], shared)
    assert plain == pytest.approx(0.5, abs=0.05) and abs(partial) < 0.05
    assert min(ap.compare_magnitudes(noise[0], noise[0] ** 3, shared + noise[1])) > 0.99  # ranks count


def test_weights_become_random_from_the_top(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    (run, top), calls = run_and_top(make_net, 5), []

    def spy(projector: Any, images: Array, units: Units, doing: str) -> tuple[Array, Array]:
        calls.append((projector.net, units))
        return project_windows(projector, images, units, doing)

    monkeypatch.setattr(ap, "project_windows", spy)
    before = [value.clone() for value in run.net.state_dict().values()]
    every = np.arange(len(top.units.image))
    alike = ap.randomise_weights(run, top, top, run.train.images)
    assert all(map(torch.equal, run.net.state_dict().values(), before))
    names = [name for name in alike if name.startswith("conv")]
    assert names == ["conv4", "conv4 to conv3", "conv4 to conv2", "conv4 to conv1"]
    assert len(calls) == 2 * 5  # two draws
    for k, (net, units) in enumerate(calls):
        random = k % 5  # blocks
        assert (net is run.net) == (random == 0)
        assert (
            (units.filter == top.units.filter).all() if random else (units.filter != top.units.filter).all()
        )
        assert all((units[n] == top.units[n]).all() for n in (0, 2, 3))  # image, row and column
        for number, (block, trained) in enumerate(zip(net.blocks, run.net.blocks, strict=True)):
            assert all(same(block, trained)) if number < 4 - random else not any(same(block, trained))
            assert block.bn.running_mean.all()  # recalibrated
    first, more, second = (calls[k][0].blocks[3].conv.weight for k in (1, 2, 6))
    assert torch.equal(first, more) and not torch.equal(first, second)
    assert all(values.shape == (2, len(every), 2) for values in alike.values())
    assert all(np.median(alike[name]) < 0.95 for name in names)
    others = alike["other filter, other image"][0, :, 0]
    assert 0 < np.isnan(others).sum() < len(others)
    for k, value in enumerate(others):
        different = (top.units.filter != top.units.filter[k]) & (top.units.image != top.units.image[k])
        partners = np.flatnonzero((top.origin == top.origin[k]).all(axis=1) & different)
        inside = top.inside[k]
        ranks = [ap.rank_correlation(top.magnitude[n][inside], top.magnitude[k][inside]) for n in partners]
        assert np.isclose(value, ranks).any() if ranks else np.isnan(value)


def test_trained_weights_leave_projections_alike(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    run, top = run_and_top(make_net, 3)
    for layer in (nn.Conv2d, nn.BatchNorm2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    monkeypatch.setattr(ap, "recalibrate_batch_norm", lambda net, first, images: net)
    one = top.select(ap.one_of_each(top.units.filter))
    alike = ap.randomise_weights(run, top, one, run.train.images)
    assert np.median(alike["other filter, same place"][..., 0]) < 0.95
    for name in ("conv4", "conv4 to conv1"):
        np.testing.assert_allclose(alike[name], 1, atol=1e-3)


def test_features_are_averages_of_regions_and_conv4_as_the_classifier_sees_it(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images = make_net(classes=3, head_size=2), some_images(60)
    monkeypatch.setattr(ap, "PROBE_INPUTS", 125)
    found = list(ap.pool_features(net, images, "").values())
    # maps of 24, 12 and 6 rows; 5 x 5 regions of conv1 and 4 x 4 of conv3 would be few enough, but do not fit
    assert [part.shape for part in found] == [(60, 5 * 16), (60, 6 * 16), (60, 7 * 9), (60, 8 * 4)]
    batch = net.normalise(torch.from_numpy(images))
    regions = net.features(batch)[1][0].unfold(2, 3, 3).unfold(3, 3, 3).mean(dim=(4, 5))
    torch.testing.assert_close(found[1], regions.flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.classifier(found[3]), net(batch), rtol=1e-4, atol=1e-4)


def separable(count: int, distance: float, seed: int) -> tuple[Tensor, Tensor]:
    generator, labels = (
        torch.Generator().manual_seed(seed),
        torch.arange(count) % 4 % 3,
    )  # half are of class 0
    return torch.randn(count, 10, generator=generator) + distance * torch.eye(3, 10)[labels], labels


@pytest.mark.parametrize(
    "case", [(9, 1e-3, 1, 1), (2, 0.1, 0.7, 0.99), (0, 1e-3, 0, 0.6), (9, 1e4, 0.5, 0.5)]
)
def test_a_probe_learns_what_there_is_and_under_a_strong_decay_only_the_bias(case: tuple[float, ...]) -> None:
    distance, decay, low, high = case
    (fit, labels), (on, on_labels) = separable(200, distance, 0), separable(400, distance, 1)
    guess, scales = ap.probe(fit, labels, decay, on), torch.logspace(-3, 3, 10)
    assert low <= (guess == on_labels).float().mean() <= high
    fit, on = (torch.cat([part * scales + 7, torch.ones(len(part), 1)], dim=1) for part in (fit, on))
    assert (ap.probe(fit, labels, decay, on) != guess).float().mean() < 0.01  # standardised


def test_probes_choose_the_decay_on_training_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, right = [], {0.1: 1, 0.2: 3, 0.4: 2}  # of four

    def spy(fit: Tensor, labels: Tensor, decay: float, on: Tensor) -> Tensor:
        assert torch.equal(fit[:, 0] % 3, labels)
        calls.append((fit[:, 0].tolist(), decay, on[:, 0].tolist()))
        return on[:, 0] % 3 + (torch.arange(len(on)) >= right[decay])  # so many are right

    monkeypatch.setattr(ap, "probe", spy)
    run = make_run(np.arange(20) % 3)._replace(test=Split(some_images(10, 1), np.arange(60, 70) % 3))
    # an image's number is its feature
    pooled = [torch.arange(20.0)[:, None], torch.arange(60.0, 70)[:, None]]
    features = [dict.fromkeys(LAYERS, of) for of in pooled]
    monkeypatch.setattr(ap, "PROBE_DECAYS", list(right))
    rows = ap.probe_layers(run, "trained", features).itertuples(index=False, name=None)
    for start in range(0, len(calls), 4):
        for fit, _, held in calls[start : start + 3]:
            assert len(held) == 4 and sorted(fit + held) == list(range(20))
        assert calls[start + 3] == (list(range(20)), 0.2, list(range(60, 70)))
    error = 1.96 * (0.3 * 0.7 / 10) ** 0.5
    for layer, row in zip(LAYERS, rows, strict=True):
        assert row[:2] == (layer, "trained") and row[5:] == (1, 0.2)
        assert row[2:5] == pytest.approx((0.3, 0.3 - error, 0.3 + error))


def test_a_run_with_the_same_seed_writes_the_same_tables(pipeline: Path, pipeline_copy: Path) -> None:
    tables = [path for path in pipeline_copy.glob("*.csv") if path.name != "training_log.csv"]
    ap.main()
    assert [path.read_bytes() for path in tables] == [(pipeline / path).read_bytes() for path in tables] != []


@pytest.mark.parametrize("name", ["activations.npz", "projection_statistics.npz", "projections.npz"])
def test_files_that_are_missing_or_of_another_checkpoint_are_refused(pipeline_copy: Path, name: str) -> None:
    path = pipeline_copy / name
    np.savez(path, **dict(np.load(path)) | {"checkpoint_sha256": np.array("0" * 64)})
    with pytest.raises(SystemExit, match=f"^{path} was made from another checkpoint: run `uv run deconv_f"):
        ap.main()
    path.unlink()
    with pytest.raises(SystemExit, match=f"^{path.absolute()} not found: run `uv run deconv_full.py` first$"):
        ap.main()
