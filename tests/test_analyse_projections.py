import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeNet, make_checkpoint
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import analyse_projections as ap
import deconv_full
import load_data
from CNN import CNN, LAYERS, Checkpoint, load_checkpoint
from deconv import project, project_unit
from deconv_full import Units, measure_activations, project_top
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


def run_and_windows(make_net: MakeNet, count: int) -> tuple[ap.Run, ap.Windows]:
    """A network most of whose filters fire, and one unit of each filter of conv4 in some images."""
    images = some_images(count)
    net = ap.recalibrate_batch_norm(make_net(classes=3), 0, images)
    top = project_top(images, net, measure_activations(images, net, 50, ""), count, 50)
    checkpoint = make_checkpoint(net)
    save_arrays(Path("top.npz"), checkpoint, **top)
    examples = ap.read_examples(Path("top.npz"), checkpoint)
    return make_run([0] * count, images, net), examples.select(ap.pick_units(examples.units.filter))


def ran(pipeline: Path, data: Path) -> tuple[Checkpoint, Split, Split]:
    train, test = (load_split("stl10", data, split) for split in ("train", "test"))
    return load_checkpoint(pipeline / "outputs/CNN.pth"), train, test


def same(one: nn.Module, other: nn.Module) -> list[bool]:
    """Whether each parameter and each statistic is the same in both, the counter of batches left out."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return [torch.equal(a, b) for (name, a), b in pairs if "num_batches" not in name]


def correlation_of_residuals(x: Array, y: Array, z: Array) -> float:
    """What a linear fit on z leaves of x and y, correlated: the partial correlation by its definition."""
    left = np.stack([values - np.polyval(np.polyfit(z, values, 1), z) for values in (x, y)])
    return float(np.corrcoef(left)[0, 1])


# ---------------------------------------------------------------- intervals, correlations, classes


def test_rank_correlation_with_ties_by_hand() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: products of deviations 2.25, squares 4.5 each
    x = np.array([[1.0, 2, 2, 9], [1, 2, 2, 9], [3, 3, 3, 3]])
    y = np.array([[-7.0, 3, 2, 2], [1, -8, -8, -729], [1, 2, 3, 4]])
    np.testing.assert_allclose(ap.rank_correlations(x, y), [2.25 / 4.5, -1, np.nan])


def test_correlations_leave_nan_out() -> None:
    x, y = np.random.default_rng(0).random((2, 3, 50))
    hidden = np.random.default_rng(1).random((3, 50)) < 0.3
    correlations = ap.correlate_rows(np.where(hidden, np.nan, x), np.where(hidden, np.nan, y))
    expected = [np.corrcoef(x[k][~hidden[k]], y[k][~hidden[k]])[0, 1] for k in range(3)]
    np.testing.assert_allclose(correlations, expected)
    ranks = ap.rank_rows(np.where(hidden, np.nan, x))
    assert (np.isnan(ranks) == hidden).all() and np.nanmax(ranks[0]) == (~hidden[0]).sum()


def test_what_two_values_share_with_a_third_alone_is_no_partial_correlation() -> None:
    shared, *noise = np.random.default_rng(0).standard_normal((4, 4000))
    x, y = shared + noise[0], shared + noise[1]
    pairs = (np.corrcoef(a, b)[0, 1] for a, b in ((x, y), (x, shared), (y, shared)))
    assert abs(ap.partial_correlation(*(np.array([value]) for value in pairs))[0]) < 0.05
    # the correlation of what a linear fit on z leaves of x and y
    z = shared + noise[2]
    pairs = (np.corrcoef(a, b)[0, 1] for a, b in ((x, y), (x, z), (y, z)))
    partial = ap.partial_correlation(*(np.array([value]) for value in pairs))
    assert partial[0] == pytest.approx(correlation_of_residuals(x, y, z))


def test_bootstrap_intervals_are_as_wide_as_theory_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ap, "RESAMPLINGS", 1000)
    values = np.random.default_rng(0).standard_normal(400)
    value, low, high = ap.bootstrap(lambda indices: values[indices].mean(axis=1), 400)
    assert value == pytest.approx(values.mean()) and low < value < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)


def test_medians_leave_nan_out_and_of_nothing_are_nan() -> None:
    assert ap.median(np.array([4.0, np.nan, 2.0, 9.0])) == (4, 2, 9)
    assert all(math.isnan(number) for number in ap.median(np.array([np.nan])))


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (5, 5), (3, 10), (400, 1000)])
def test_the_interval_of_a_share_holds_what_a_normal_test_does_not_reject(successes: int, count: int) -> None:
    share, low, high = ap.wilson(successes, count)
    assert share == successes / count and 0 <= low <= share <= high <= 1
    for limit in (low, high):  # at the limits the share is 1.96 standard deviations away
        if 0 < limit < 1:
            assert abs(share - limit) == pytest.approx(1.96 * (limit * (1 - limit) / count) ** 0.5)


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


# ---------------------------------------------------------------- the tables of filters and classes

LABELS = [0, 1, 1, 1, 2]
STRENGTH = np.array([[4, 0, 5], [1, 0, 0], [1, 0, 0], [1, 0, 3], [3, 0, 5]], np.float32)  # filter 1 is dead
PEAKS = dict.fromkeys(LAYERS, STRENGTH)
MEAN, MAX = [[1, 0, 2], [3, 0, 4], [1, 0, 0], [3, 0, 6]], [[1, 0, 7], [5, 0, 2], [8, 0, 3], [2, 0, 1]]
STATISTICS = {"mean": np.array(MEAN), "max": np.array(MAX)}  # in four images, of classes 0, 1, 2 and 2


def test_the_table_of_filters_by_hand() -> None:
    table = ap.tabulate(PEAKS, make_run(LABELS), 9).filters
    conv4 = table[table["layer"] == "conv4"].reset_index()
    columns = ["filter", "dead", "activation_mean", "activation_variance", "activation_nonzero"]
    rows: Any = [[0, 0, 2, 1.6, 1], [1, 1, 0, 0, 0], [2, 0, 2.6, 5.04, 0.6]]
    np.testing.assert_allclose(conv4[columns].astype(float), rows)
    index = [(4 - 2) / (4 + 2), np.nan, (5 - 3) / (5 + 3)]  # each class counts once
    low, high = conv4["selectivity_low"], conv4["selectivity_high"]
    np.testing.assert_allclose(conv4[["selectivity", "auc"]], np.array([index, [1, np.nan, 3.5 / 4]]).T)
    assert low[2] < index[2] < high[2] and [low[0], high[0]] == pytest.approx([index[0]] * 2)  # all alike
    assert np.isnan([low[1], high[1]]).all()
    names = conv4[["preferred_class", "runner_up", "top_class"]].fillna("none")
    # filter 0: nine strongest images hold three cats; filter 2: preferred ties with runner-up, in images too
    assert names.to_numpy().tolist() == [["dog", "ship", "cat"], ["none"] * 3, ["dog", "ship", "dog"]]
    assert conv4["preferred_share"].fillna(-1).tolist()[:2] == [1, -1]
    assert table.loc[table["layer"] == "conv1", "auc"].tolist()[0] == conv4["auc"][0]


def test_a_filter_that_fires_on_one_image_has_an_interval_over_the_samples_with_that_image() -> None:
    labels = np.repeat([0, 1, 2], 40)
    strength = np.zeros((120, 1), np.float32)
    strength[70] = 2  # of class 1
    table = ap.tabulate(dict.fromkeys(LAYERS, strength), make_run(labels), 9).filters
    row = table.iloc[-1]
    assert row["preferred_class"] == NAMES[1]
    assert (row["selectivity_low"], row["selectivity_high"]) == (1, 1)  # it fires on this class only
    # a sample of 40 images holds the one with a probability of 1 - (39 / 40) ** 40 = 0.64
    assert row["preferred_share"] == pytest.approx(0.64, abs=0.12)


def test_the_top_class_counts_as_many_images_as_projections_npz_holds() -> None:
    tables = [ap.tabulate(PEAKS, make_run(LABELS), n_top).filters for n_top in (1, 9)]
    assert [table["top_class"][0] for table in tables] == ["dog", "cat"]


def test_the_table_of_classes_by_hand() -> None:
    table = ap.tabulate(PEAKS, make_run(LABELS), 9).classes
    assert table["class"].tolist() == NAMES * 12
    assert table["filter"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 4
    assert table["activation_mean"].tolist() == [4, 1, 3, 0, 0, 0, 5, 1, 5] * 4
    assert ap.class_means(table).tolist() == [[4, 0, 5], [1, 0, 1], [3, 0, 5]]


def test_statistics_of_projections_by_hand() -> None:
    filters, classes = ap.tabulate_projections(STATISTICS, np.array([0, 1, 2, 2]), NAMES)
    assert filters[["mean", "max"]].to_numpy().tolist() == [[2, 8], [0, 0], [3, 7]]
    assert classes["mean"].tolist() == [1, 3, 2, 0, 0, 0, 2, 4, 3]
    assert classes["max"].tolist() == [1, 5, 8, 0, 0, 0, 7, 2, 3]
    assert classes["class"].tolist() == NAMES * 3


def test_filters_are_counted_by_layer() -> None:
    table = ap.tabulate(PEAKS, make_run(LABELS), 9).filters
    table.loc[0, ["activation_nonzero", "preferred_share"]] = [0.005, 0.8]
    counts = ap.count_filters(table).groupby("layer")["value"].apply(list)
    # filter 1 is dead, filter 0's top images are mostly of its second class
    assert counts["conv1"] == [3, 1, 1, 1, 1] and counts["conv4"] == [3, 1, 0, 0, 1]


# ---------------------------------------------------------------- networks, and what was learned


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


def test_images_for_batch_norm_are_of_all_classes_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ap, "NORM_IMAGES", 30)
    images = np.arange(300).reshape(-1, 1, 1, 1)  # an image's number is its only pixel
    drawn = ap.pick_norm_images(Split(images, np.repeat([0, 1, 2], 100))).ravel()
    assert len(np.unique(drawn)) == 30 and set(drawn // 100) == {0, 1, 2}


def test_one_pass_measures_peaks_and_what_the_classifier_sees(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images = make_net(classes=3, head_size=2), some_images(60)
    monkeypatch.setattr(ap, "PROBE_INPUTS", 125)
    measured = ap.measure_images(net, images, "")
    # maps of 24, 12 and 6 rows; 5 x 5 regions of conv1 and 4 x 4 of conv3 would be few enough, but do not fit
    shapes = [part.shape for part in measured.inputs.values()]
    assert shapes == [(60, 5 * 16), (60, 6 * 16), (60, 7 * 9), (60, 8 * 4)]
    batch = net.normalise(torch.from_numpy(images))
    regions = net.features(batch)[1][0].unfold(2, 3, 3).unfold(3, 3, 3).mean(dim=(4, 5))
    torch.testing.assert_close(measured.inputs["conv2"], regions.flatten(1), rtol=1e-4, atol=1e-5)
    own = ap.own_classifier(net)
    logits = measured.inputs["conv4"] @ own.weights.T + own.bias
    torch.testing.assert_close(logits, net(batch), rtol=1e-4, atol=1e-4)
    activations = measure_activations(images, net, 50, "")
    for layer in LAYERS:
        np.testing.assert_allclose(measured.peaks[layer], activations[f"{layer}_max"], rtol=1e-4, atol=1e-5)


def test_the_untrained_network_is_the_start_of_this_training(
    pipeline: Path, pipeline_copy: Path, tiny_stl10: Path
) -> None:
    (_, train, test), path = ran(pipeline, tiny_stl10), pipeline_copy / "snapshots/epoch_000.pth"
    start, old = (load_checkpoint(path).net for _ in range(2))
    ap.recalibrate_batch_norm(start, 0, ap.pick_norm_images(train))
    assert all(map(torch.equal, start.parameters(), old.parameters()))
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
    rows = table.query("layer == 'conv3' and metric == 'selectivity'").set_index("network")
    assert dict(rows["median"]) == pytest.approx({"trained": 0.65, "untrained": 0.15, "learned": 0.6})
    assert dict(rows["n"]) == {"trained": 4, "untrained": 4, "learned": 3}  # 0.6, 0.3, 0.7
    assert (table.query("metric == 'auc' and network == 'learned'")["median"] - 0.2).abs().max() < 1e-9


# ---------------------------------------------------------------- linear probes


def separable(count: int, distance: float, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 4 % 3  # half are of class 0
    noise = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return noise + distance * torch.eye(3, 10)[labels], labels


def zero(inputs: int = 10) -> ap.Linear:
    return ap.Linear(torch.zeros(3, inputs), torch.zeros(3))


@pytest.mark.parametrize(
    "case", [(9, 1e-3, 1, 1), (2, 0.1, 0.7, 0.99), (0, 1e-3, 0, 0.6), (9, 1e4, 0.5, 0.5)]
)
def test_a_probe_learns_what_there_is_and_under_a_strong_decay_only_the_bias(case: tuple[float, ...]) -> None:
    distance, decay, low, high = case
    (features, labels), (others, other_labels) = separable(200, distance, 0), separable(400, distance, 1)
    predicted, scales = (
        ap.fit_probe(features, labels, decay, zero()).predict(others),
        torch.logspace(-3, 3, 10),
    )
    assert low <= (predicted == other_labels).float().mean() <= high
    features, others = (torch.cat([x * scales + 7, torch.ones(len(x), 1)], dim=1) for x in (features, others))
    scaled = ap.fit_probe(features, labels, decay, zero(11)).predict(others)
    assert (scaled != predicted).float().mean() < 0.01  # standardised


def test_a_probe_reaches_the_same_solution_from_another_start() -> None:
    features, labels = separable(200, 2, 0)
    cold = ap.fit_probe(features, labels, 0.01, zero())
    warm = ap.fit_probe(features, labels, 0.01, ap.fit_probe(3 * features + 1, labels, 0.1, zero()))
    torch.testing.assert_close(warm.weights, cold.weights, atol=1e-3, rtol=1e-2)
    gradients = [part.clone().requires_grad_() for part in cold[:2]]
    scale = features.std(dim=0, correction=0)
    loss = cross_entropy(features @ gradients[0].T + gradients[1], labels)
    (loss + 0.005 * (gradients[0] * scale).square().sum()).backward()
    assert all(part.grad is not None and part.grad.abs().max() < 1e-4 for part in gradients)


def test_probes_choose_the_decay_on_training_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[float], float, float]] = []
    correct = {0.4: 2, 0.2: 3, 0.1: 1}  # of four

    class Spy(ap.Linear):
        def predict(self, features: Tensor) -> Tensor:
            assert len(features) == 4 and not set(features[:, 0].tolist()) & set(calls[-1][0])
            return features[:, 0] % 3 + (torch.arange(4) >= correct[self.decay])  # so many are right

    def spy(features: Tensor, labels: Tensor, decay: float, start: ap.Linear) -> ap.Linear:
        assert torch.equal(features[:, 0] % 3, labels)
        calls.append((features[:, 0].tolist(), decay, start.decay))
        return Spy(start.weights, start.bias, decay)

    monkeypatch.setattr(ap, "fit_probe", spy)
    monkeypatch.setattr(ap, "PROBE_DECAYS", tuple(correct))
    features = torch.arange(20.0)[:, None]  # an image's number is its feature
    assert ap.choose_probe(features, torch.arange(20) % 3, 3).decay == 0.2
    assert [len(call[0]) for call in calls] == [16, 16, 16, 20]
    starts = [call[2] for call in calls]
    assert math.isnan(starts[0]) and starts[1:] == [0.4, 0.2, 0.2]  # each from the one before


def test_the_table_of_probes_by_hand() -> None:
    # of the images 0 to 4 the probe says 0, 1, 2, 0, 0
    probe = ap.Linear(torch.eye(3), torch.zeros(3), 0.5)
    inputs = dict.fromkeys(LAYERS, torch.eye(5, 3))
    labels = np.array([0, 1, 1, 1, 2])
    probes = ap.tabulate_probes("untrained", dict.fromkeys(LAYERS, probe), inputs, labels)
    assert probes["layer"].tolist() == [*LAYERS] and (probes["accuracy"] == 2 / 5).all()
    assert set(probes["network"]) == {"untrained"}
    assert set(map(tuple, probes[["inputs", "decay", "n"]].to_numpy())) == {(3, 0.5, 5)}
    np.testing.assert_allclose(probes[["low", "high"]].iloc[0], ap.wilson(2, 5)[1:])


# ---------------------------------------------------------------- ablation


def some_network(train_inputs: Tensor, test_inputs: Tensor, filter_count: int) -> ap.NetworkResults:
    tables = ap.Tables(pd.DataFrame({"layer": ["conv4"] * filter_count}), pd.DataFrame())
    return ap.NetworkResults(tables, pd.DataFrame(), zero(), train_inputs, test_inputs)


def network_and_classifier(make_net: MakeNet) -> tuple[ap.NetworkResults, CNN, Array]:
    """What the classifier of a network sees of 9 training and 40 test images, and the labels of these."""
    net, generator = make_net(classes=3, dtype=torch.float64), torch.Generator().manual_seed(1)
    net.classifier.bias.copy_(torch.tensor([0.0, 2, 1]))
    inputs = net.average(9 * torch.randn(40, 8, 3, 3, generator=generator).double().clamp(min=0)).flatten(1)
    labels = np.repeat(np.arange(3), (10, 13, 17))
    return some_network(inputs[:9], inputs, 8), net, labels


def logits_without(net: CNN, inputs: Tensor, filter_index: int, means: Tensor) -> Tensor:
    """Logits with what the classifier sees of one filter replaced by its means."""
    replaced = inputs.clone().unflatten(1, (8, 4))
    replaced[:, filter_index] = means.view(8, 4)[filter_index]
    return net.classifier(replaced.flatten(1))  # type: ignore[no-any-return]


def test_mean_ablation_replaces_what_a_readout_sees_of_a_filter(make_net: MakeNet) -> None:
    network, net, labels = network_and_classifier(make_net)
    inputs, means = network.test_inputs, network.train_inputs.mean(dim=0)
    parts, base = ap.split_logits(ap.own_classifier(net), network)
    logits = net.classifier(inputs)
    torch.testing.assert_close(parts.sum(dim=0) + base, logits)
    truth = torch.from_numpy(labels)
    ablation = ap.ablate(ap.own_classifier(net), network, truth)
    for filter_index in range(8):
        without = logits_without(net, inputs, filter_index, means)
        before, after = (cross_entropy(x, truth, reduction="none") for x in (logits, without))
        np.testing.assert_allclose(ablation.loss_increase[:, filter_index], after - before, atol=1e-9)
        moved = (logits - without).numpy()
        np.testing.assert_allclose(ablation.contribution[:, filter_index], moved[np.arange(40), labels])
        against = moved - moved.mean(axis=1, keepdims=True)
        assert ablation.spread[filter_index] == pytest.approx(np.sqrt(np.mean(against**2)))
    assert np.ptp(ablation.loss_increase.mean(axis=0)) > 0.01


def test_a_filter_that_moves_all_logits_alike_has_no_spread_and_costs_nothing() -> None:
    inputs = torch.tensor([[1.0, 2], [3, 0], [2, 4], [0, 1], [4, 3]])
    readout = ap.Linear(torch.tensor([[5.0, 1], [5, 0], [5, 0]]), torch.zeros(3))
    ablation = ap.ablate(readout, some_network(inputs, inputs, 2), torch.tensor(LABELS))
    np.testing.assert_allclose(ablation.spread[0], 0, atol=1e-6)
    np.testing.assert_allclose(ablation.loss_increase[:, 0], 0, atol=1e-6)
    assert ablation.spread[1] > 0.1


# loss increases of filters 0 and 1 by image, filter 2 is dead; classes 0, 0, 1, 1, 2, 2
INCREASE = np.array([[1.0, 0, 0], [0, 0, 0], [0, -1, 0], [0, -1, 0], [0, 1, 0], [0, 1, 0]])
PEAK_MEANS = np.array([[9.0, 1, 0], [1, 2, 0], [3, 5, 0]])  # filter 0 prefers class 0, filter 1 class 2
ABLATION = ap.Ablation(INCREASE, 2 * INCREASE, np.array([0.5, 0.7, 0]))
SIX = np.array([0, 0, 1, 1, 2, 2])


def ablation_table() -> pd.DataFrame:
    return ap.tabulate_ablation(ABLATION, ap.class_selectivity(PEAK_MEANS), make_run(SIX))


def test_the_table_of_ablation_by_hand() -> None:
    table = ablation_table()
    assert table["filter"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert table["class"].tolist() == [*NAMES, "all"] * 3
    assert table["loss_increase"].tolist() == [0.5, 0, 0, 1 / 6, 0, -1, 1, 0, 0, 0, 0, 0]
    assert table["contribution"].fillna(7).tolist() == [1, 0, 0, 7, 0, -2, 2, 7, 0, 0, 0, 7]
    assert table["selectivity"][0] == (9 - 2) / (9 + 2) and table["selectivity"][3:4].isna().all()
    assert table["selectivity"][8:].isna().all()
    assert ap.values_by_filter(table, "loss_increase").tolist() == [[0.5, 0, 0], [0, -1, 1], [0, 0, 0]]


def test_mean_costs_and_hits_by_hand_without_the_dead_filter() -> None:
    costs = ap.average_costs(ABLATION, PEAK_MEANS, SIX, "a").set_index("name")
    assert costs.loc["loss increase of the preferred class: a", "value"] == (0.5 + 1) / 2
    assert costs.loc["loss increase of each other class: a", "value"] == (0 + 0 + 0 - 1) / 4
    assert costs.loc["size of the loss increase of each other class: a", "value"] == (0 + 0 + 0 + 1) / 4
    assert (costs["n"] == 2).all() and (costs["low"].dropna() <= costs["value"][:2]).all()
    hits, shuffled = ap.count_hits(ABLATION, PEAK_MEANS, SIX, "a").itertuples()
    assert (hits.value, hits.low, hits.high) == pytest.approx(tuple(100 * x for x in ap.wilson(2, 2)))
    # of the four pairs of a filter and a preferred class two name one class
    assert (shuffled.value, shuffled.n) == (50, 2)
    assert ap.count_hits(ABLATION, PEAK_MEANS[::-1], SIX, "a")["value"].tolist() == [0, 50]


def test_correlations_of_costs_keep_the_preferred_class_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    peak_means, spread = rng.random((3, 40)), rng.random(40)
    preferred = peak_means.argmax(axis=0)
    selectivity = ap.class_selectivity(peak_means)
    cost = np.where(np.arange(3)[:, None] == preferred, selectivity, -selectivity)  # opposite for the others
    table = ap.tabulate_ablation(
        ap.Ablation(cost, spread * np.ones((3, 1)), spread), selectivity, make_run([0, 1, 2])
    )
    rows = ap.correlate_costs(table, spread).set_index("name")
    value = rows["value"]
    assert value["loss increase of the preferred class, rank correlation with selectivity"] == pytest.approx(
        1
    )
    assert value["loss increase of each other class, rank correlation with selectivity"] == pytest.approx(-1)
    expected = ap.rank_correlations(spread[None], cost.mean(axis=0)[None])[0]
    assert value["loss increase of all classes, rank correlation with spread"] == pytest.approx(expected)
    largest = selectivity.max(axis=0)
    ranks = ap.rank_rows(np.stack([largest, cost.mean(axis=0), spread]))
    name = "loss increase of all classes, rank correlation with selectivity given the spread"
    assert value[name] == pytest.approx(correlation_of_residuals(*ranks))
    assert (rows["low"] <= rows["value"] + 1e-9).all() and (rows["n"] == 40).all()


def test_the_table_of_ablation_is_that_of_the_network_and_the_test_images(
    pipeline: Path, tiny_stl10: Path
) -> None:
    (net, *_), train, (images, labels, _) = ran(pipeline, tiny_stl10)
    learned, pooled = (
        net.features(net.normalise(torch.from_numpy(part)))[-1][0] for part in (train.images, images)
    )
    means, truth = net.average(learned).flatten(2).mean(dim=0), torch.from_numpy(labels)
    before = cross_entropy(net.classify(pooled), truth, reduction="none").numpy()
    expected = []
    for filter_index in range(16):
        averages = net.average(pooled).flatten(2)
        averages[:, filter_index] = means[filter_index]
        after = cross_entropy(net.classifier(averages.flatten(1)), truth, reduction="none").numpy()
        rise = after - before
        expected += [*(rise[labels == k].mean() for k in range(10)), rise.mean()]
    table = pd.read_csv(pipeline / "outputs/ablation.csv")
    np.testing.assert_allclose(table["loss_increase"], expected, atol=1e-5)
    filters = pd.read_csv(pipeline / "outputs/filter_metrics.csv")[-16:]  # conv4
    np.testing.assert_allclose(table.groupby("filter")["selectivity"].max(), filters["selectivity"])
    largest = np.load(pipeline / "outputs/projection_statistics.npz")["max"].max(axis=0)
    np.testing.assert_allclose(filters["max"], largest)


# ---------------------------------------------------------------- what a projection shows


def test_examples_are_projected_where_the_file_says(pipeline: Path, tiny_stl10: Path) -> None:
    (checkpoint, _, test), path = ran(pipeline, tiny_stl10), pipeline / "outputs/projections.npz"
    windows, net = ap.read_examples(path, checkpoint), checkpoint.net
    for k in range(0, len(windows.units.filter), 29):
        image, filter_index, row, column, value = (entry[k] for entry in windows.units)
        batch = net.normalise(torch.from_numpy(test.images[[image]]))
        pooled, switches = net.features(batch)[3]
        assert float(pooled[0, filter_index, row, column]) == pytest.approx(value, rel=1e-5)
        position = divmod(int(switches[0, filter_index, row, column]), 6)
        assert windows.map_positions[k].tolist() == list(position)
        magnitude = project_unit(net, batch, 3, filter_index, row, column).abs().sum(dim=0).numpy()
        frame = ap.to_frames(windows.magnitude[[k]], windows.origin[[k]])[0]
        np.testing.assert_allclose(frame, magnitude, atol=1e-4 * magnitude.max())
        inside = ap.crop_windows(np.ones((1, 96, 96)), windows.origin[[k]], len(windows.profile))[0]
        assert (windows.inside[k] == inside).all()


def test_filters_without_an_example_have_no_unit(pipeline: Path, tiny_stl10: Path) -> None:
    checkpoint, arrays = ran(pipeline, tiny_stl10)[0], dict(np.load(pipeline / "outputs/projections.npz"))
    arrays["conv4_image"][3] = -1  # as if filter 3 were dead, and filter 5 fired on one image only
    arrays["conv4_image"][5, 1:] = -1
    np.savez("some.npz", **arrays)
    units = ap.read_examples(Path("some.npz"), checkpoint).units
    assert set(units.filter) == {0, 1, 2, *range(4, 16)}
    assert units.image[units.filter == 5] == arrays["conv4_image"][5, 0]


def test_one_example_of_each_filter_is_drawn_and_another_as_its_partner() -> None:
    filters = np.repeat([0, 2, 5, 7], (9, 1, 2, 40))
    chosen = ap.pick_units(filters)
    assert filters[chosen].tolist() == [0, 2, 5, 7]
    partners = np.stack([ap.pick_partners(filters, chosen, draw, True) for draw in range(5)])
    assert (filters[partners] == filters[chosen]).all()
    assert (partners != chosen).tolist() == [[True, False, True, True]] * 5  # filter 2 has one example only
    assert len(set(partners[:, 3])) > 1  # draws differ
    others = np.stack([ap.pick_partners(filters, chosen, draw, False) for draw in range(5)])
    assert (filters[others] != filters[chosen]).all() and len(set(others[:, 3])) > 1


def test_other_examples_of_a_filter_are_compared_where_both_windows_lie_inside_the_image(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, windows = run_and_windows(make_net, 4)
    units = windows.units._replace(filter=np.array([0, 0, 1, *range(3, len(windows.units.filter))]))
    examples = windows._replace(units=units)
    monkeypatch.setattr(ap, "RANDOM_DRAWS", 1)
    compared = ap.compare_examples(examples, np.array([0, 2]))  # the second is the only one of filter 1
    assert compared["condition"].value_counts()["other filter, its top-9 example"] == 2
    compared = compared[compared["condition"] == "same filter, other top-9 example"]
    assert compared["unit"].tolist() == [0]
    inside = windows.inside[0] & windows.inside[1]
    assert not inside.all()
    values = [part[inside] for part in (windows.magnitude[0], windows.magnitude[1], windows.profile)]
    expected = correlation_of_residuals(*ap.rank_rows(np.stack(values)))
    assert compared["partial"].tolist() == pytest.approx([expected])


def test_the_window_profile_is_the_mean_over_windows_that_reach_a_pixel(make_net: MakeNet) -> None:
    _, windows = run_and_windows(make_net, 3)
    arrays = dict(np.load("top.npz"))
    fires = arrays["conv4_image"] >= 0
    magnitude = np.abs(arrays["conv4_projection"][fires]).sum(axis=1)
    size = magnitude.shape[-1]
    inside = ap.crop_windows(np.ones((len(magnitude), 96, 96)), arrays["conv4_origin"][fires], size) > 0
    shares = magnitude / magnitude.sum(axis=(1, 2))[:, None, None]
    for row, column in ((0, 0), (10, 70), (40, 40)):
        reached = inside[:, row, column]
        expected = shares[reached, row, column].mean() if reached.any() else 0
        assert windows.profile[row, column] == pytest.approx(expected)
    assert not windows.inside.all()


def test_other_units_are_projected_from_the_same_position_before_pooling(make_net: MakeNet) -> None:
    run, windows = run_and_windows(make_net, 4)
    net, units = run.net, windows.units
    others = units._replace(filter=(units.filter + 1) % 8, image=(units.image + 1) % 4)
    magnitudes = ap.project_elsewhere(run, net, windows, others, "")
    moved = 0
    for k in range(len(units.image)):
        image, filter_index, row, column, _ = (entry[k] for entry in others)
        features = net.features(net.normalise(torch.from_numpy(run.test.images[[image]])))
        only, switches = torch.zeros_like(features[3][0]), [switch.clone() for _, switch in features]
        only[0, filter_index, row, column] = 1
        position = int(windows.map_positions[k] @ [6, 1])  # in a map of six columns
        moved += int(switches[3][0, filter_index, row, column]) != position
        switches[3][0, filter_index, row, column] = position
        frame = project(net, 3, only, switches, (96, 96)).abs().sum(dim=1).numpy()
        expected = ap.crop_windows(frame, windows.origin[[k]], len(windows.profile))[0]
        np.testing.assert_allclose(magnitudes[k], expected, atol=1e-5 * max(expected.max(), 1e-3))
        assert expected.sum() == pytest.approx(frame.sum(), rel=1e-5)  # nothing lies outside the window
    assert moved  # at their own switch some would have another window


def test_other_numbers_are_drawn_evenly() -> None:
    drawn = ap.pick_others(np.full(6000, 2), 4, np.random.default_rng(0))
    assert np.bincount(drawn).tolist()[2] == 0 and min(np.bincount(drawn)[[0, 1, 3]]) > 1800


def test_scores_are_averaged_over_blocks_of_the_frame_inside_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ap, "IMAGE_SIZE", 5)
    monkeypatch.setattr(ap, "BLOCK", 2)
    scores = np.arange(25.0).reshape(1, 5, 5)
    inside = np.ones((1, 5, 5), np.bool_)
    inside[0, 0] = False
    means = ap.average_blocks(scores, inside)[0]
    assert means[1, :2].tolist() == [5.5] * 2  # of 5 and 6; 0 and 1 lie outside
    assert means[2, 2] == means[3, 3] == np.mean([12, 13, 17, 18])
    assert means[4, 4] == 24 and means[4, 0] == 20.5  # blocks that the frame cuts


def test_chosen_pixels_are_the_strongest_inside_the_image_and_so_many() -> None:
    rng, inside = np.random.default_rng(0), np.zeros((75, 75), np.bool_)
    inside[30:, :60] = True
    score = rng.random((75, 75))
    chosen, all_of_another = ap.topk_mask(np.stack([score, score]), np.stack([inside, inside | True]), 0.3)
    assert all_of_another.sum() == round(0.3 * 75**2)
    assert chosen.sum() == round(0.3 * 45 * 60) and not (chosen & ~inside).any()
    assert score[chosen].min() >= score[inside & ~chosen].max()
    tied = ap.topk_mask(np.zeros((1, 2, 4)), np.ones((1, 2, 4), np.bool_), 0.5)
    assert tied[0].tolist() == [[True] * 4, [False] * 4]


def test_pixels_are_scored_by_projection_gradients_edges_centre_and_chance(make_net: MakeNet) -> None:
    run, windows = run_and_windows(make_net, 3)
    other = np.random.default_rng(0).random(windows.magnitude.shape)
    scores = ap.score_pixels(run, windows, other)
    for k in range(len(windows.units.image)):
        image, filter_index, row, column, _ = (entry[k] for entry in windows.units)
        pixels = run.net.normalise(torch.from_numpy(run.test.images[[image]])).requires_grad_()
        run.net.features(pixels)[3][0][0, filter_index, row, column].backward()
        assert pixels.grad is not None
        gradient = pixels.grad.abs().sum(dim=1).numpy()[0]
        np.testing.assert_allclose(scores["gradient"][k], gradient, atol=1e-4 * gradient.max())
        edges = np.abs(np.gradient(pixels.detach().numpy()[0], axis=(1, 2))).sum((0, 1))
        edges = edges * ap.to_frames(windows.profile[None], windows.origin[[k]])[0]
        np.testing.assert_allclose(scores["edges x window profile"][k], edges, atol=1e-4 * edges.max())
        assert (scores["other filter, same window"][k] == ap.to_frames(other[[k]], windows.origin[[k]])).all()
        nearness = ap.crop_windows(scores["centre"][[k]], windows.origin[[k]], len(windows.profile))[0]
        nearest = np.unravel_index(np.where(windows.inside[k], nearness, -np.inf).argmax(), nearness.shape)
        assert windows.inside[k][nearest]
    blocks = scores["chance"].reshape(-1, 12, 8, 12, 8)
    assert (blocks == blocks[:, :, :1, :, :1]).all() and len(np.unique(blocks[0])) == 144


def test_an_activation_is_read_at_the_units_own_position_before_pooling(make_net: MakeNet) -> None:
    run, windows = run_and_windows(make_net, 4)
    images = run.net.normalise(torch.from_numpy(run.test.images[windows.units.image]))
    np.testing.assert_allclose(ap.activate(run.net, images, windows), windows.units.value, rtol=1e-4)
    other = images.flip(0)
    x = other
    for block in run.net.blocks[:3]:
        x = block(x)
    maps = run.net.blocks[3].bn(run.net.blocks[3].conv(x)).clamp(min=0)
    rows, columns = windows.map_positions.T
    expected = [float(maps[k, windows.units.filter[k], rows[k], columns[k]]) for k in range(len(images))]
    np.testing.assert_allclose(ap.activate(run.net, other, windows), expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_is_what_the_network_makes_of_the_masked_image(make_net: MakeNet) -> None:
    run, windows = run_and_windows(make_net, 4)
    other = np.random.default_rng(0).random(windows.magnitude.shape)
    masked = ap.mask_images(run, windows, other, (0.25, 0.5)).set_index(["method", "share", "unit"])
    for k in range(len(windows.units.image)):
        images = run.net.normalise(torch.from_numpy(run.test.images[windows.units.image[[k]]]))
        unit = windows._replace(
            units=windows.units.select(np.array([k])), map_positions=windows.map_positions[[k]]
        )
        inside = ap.to_frames(windows.inside[[k]], windows.origin[[k]])
        masks: dict[str, Array] = {}
        for method, score in (("projection", windows.magnitude), ("other filter, same window", other)):
            frame = ap.to_frames(score[[k]], windows.origin[[k]])
            chosen = ap.topk_mask(ap.average_blocks(frame, inside), inside, 0.25)
            masks[method] = chosen
            common = (chosen & masks["projection"]).sum()
            mask = torch.from_numpy(chosen)[:, None]
            row = masked.xs((method, 0.25, k))
            assert row["overlap"] == pytest.approx(common / chosen.sum())
            for test, image in (("insertion", images * mask), ("deletion", images * ~mask)):
                left = ap.activate(run.net, image, unit)[0] / windows.units.value[k]
                assert row[test] == pytest.approx(left, rel=1e-3, abs=1e-4)


def test_an_activation_stays_whole_if_all_that_it_sees_is_kept(make_net: MakeNet) -> None:
    run, windows = run_and_windows(make_net, 3)
    masked = ap.mask_images(run, windows, windows.magnitude, (1.0,))
    np.testing.assert_allclose(masked["insertion"], 1, rtol=1e-3)
    assert masked["deletion"].median() < 0.9


def test_differences_of_methods_are_paired() -> None:
    rows = [(0, "projection", 5.0), (1, "projection", 1.0), (2, "projection", 9.0)]
    rows += [(0, "centre", 4.0), (1, "centre", 2.0), (2, "centre", 3.0)]
    masked = pd.DataFrame(rows, columns=["unit", "method", "insertion"]).assign(share=0.1, deletion=0.0)
    masked["overlap"] = [1, 1, 1, 0.2, 0.4, 0.9]
    table = ap.tabulate_masks(masked).set_index(["test", "condition"])
    assert table.loc[("overlap", "centre"), "median"] == 0.4
    assert table.loc[("insertion", "projection"), "median"] == 5
    assert table.loc[("insertion difference", "projection minus centre"), "median"] == 1  # of 1, -1 and 6
    assert (table["n"] == 3).all() and len(table) == 7


def test_weights_become_random_from_the_top(make_net: MakeNet) -> None:
    net, images = make_net(), some_images(30)
    before = [value.clone() for value in net.state_dict().values()]
    draws = [dict(ap.randomise_weights(net, images, draw)) for draw in (0, 1)]
    assert all(map(torch.equal, net.state_dict().values(), before))
    names = ["random conv4", "random conv4 to conv3", "random conv4 to conv2", "random conv4 to conv1"]
    assert list(draws[0]) == names
    for count, random_net in enumerate(draws[0].values(), start=1):
        for number, (block, trained) in enumerate(zip(random_net.blocks, net.blocks, strict=True)):
            assert all(same(block, trained)) if number < 4 - count else not any(same(block, trained))
            assert block.bn.running_mean is not None and block.bn.running_mean.all()  # measured anew
    first, more, second = (
        draws[k][name].blocks[3].conv.weight for k, name in ((0, names[0]), (0, names[3]), (1, names[0]))
    )
    assert torch.equal(first, more) and not torch.equal(first, second)


def test_controls_differ_in_the_filter_the_image_or_both(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run, windows), calls = run_and_windows(make_net, 5), {}

    def spy(run: ap.Run, net: CNN, windows: ap.Windows, units: Units, desc: str) -> Array:
        calls[desc] = (net is run.net, units)
        return windows.magnitude

    monkeypatch.setattr(ap, "project_elsewhere", spy)
    conditions = [name for name, _ in ap.project_conditions(run, windows, run.train.images, 0)]
    assert conditions[:4] == [
        "edges of the image",
        "other filter, same window",
        "same filter, other image",
        "other filter, other image",
    ]
    units = windows.units
    for name, (is_trained, others) in calls.items():
        assert is_trained == ("random" not in name)
        assert (
            (others.filter != units.filter).all()
            if "other filter" in name
            else (others.filter == units.filter).all()
        )
        assert (
            (others.image != units.image).all()
            if "other image" in name
            else (others.image == units.image).all()
        )


def test_trained_weights_leave_projections_alike(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    run, windows = run_and_windows(make_net, 3)
    for layer in (nn.Conv2d, nn.BatchNorm2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    monkeypatch.setattr(ap, "recalibrate_batch_norm", lambda net, first, images: net)
    compared = ap.compare_projections(run, windows, run.train.images)
    medians = compared.groupby("condition")["partial"].median()
    assert medians["other filter, same window"] < 0.95
    for name in ("random conv4", "random conv4 to conv1"):
        assert medians[name] == pytest.approx(1, abs=1e-3)


def test_likeness_is_the_partial_rank_correlation_given_the_window_profile(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, windows = run_and_windows(make_net, 3)
    other = np.random.default_rng(0).random(windows.magnitude.shape) + windows.magnitude
    monkeypatch.setattr(ap, "project_conditions", lambda *arguments: [("other", other)])
    compared = ap.compare_projections(run, windows, run.train.images)
    for k in range(len(other)):
        inside = windows.inside[k]
        values = [part[inside] for part in (windows.magnitude[k], other[k], windows.profile)]
        expected = correlation_of_residuals(*ap.rank_rows(np.stack(values)))
        assert compared.loc[compared["unit"] == k, "partial"].tolist() == pytest.approx([expected] * 2)


def test_units_count_with_their_mean_over_draws() -> None:
    rows = [(0, 0, 0.1), (1, 0, 0.5), (2, 0, 0.6), (0, 1, 0.3), (1, 1, 0.1), (2, 1, np.nan)]
    compared = pd.DataFrame(rows, columns=["unit", "draw", "partial"]).assign(condition="random conv4")
    row = ap.tabulate_likeness(compared).iloc[0]
    assert row["median"] == pytest.approx(0.3)  # of 0.2, 0.3 and 0.6
    assert (row["lowest_draw"], row["highest_draw"], row["n"]) == (pytest.approx(0.2), 0.5, 3)


# ---------------------------------------------------------------- figures, texts, summary


def drawn_intervals(ax: Axes) -> list[tuple[str, list[float], list[float], list[float], list[float]]]:
    """Label, x, y and both ends of the bars of each series of error bars in a panel."""
    series = []
    for container in ax.containers:
        assert isinstance(container, ErrorbarContainer)
        points, _, (bars,) = container.lines
        ends = np.array(bars.get_segments())  # (bars, 2 ends, x and y)
        axis = 0 if np.ptp(ends[:, :, 0]) and not np.ptp(ends[:, :, 1], axis=1).any() else 1
        low, high = ends[:, 0, axis].tolist(), ends[:, 1, axis].tolist()
        x, y = (np.asarray(values).tolist() for values in points.get_data())
        series.append((str(container.get_label()), x, y, low, high))
    return series


def test_the_figure_of_specialisation_holds_the_numbers_of_its_table(pipeline: Path) -> None:
    table = pd.read_csv(pipeline / "outputs/specialisation.csv")
    fig = ap.draw_specialisation(table)
    panels = dict(
        zip([("selectivity", 0), ("auc", 0), ("selectivity", 1), ("auc", 1)], fig.axes, strict=True)
    )
    for (metric, lower), ax in panels.items():
        series = drawn_intervals(ax)
        assert [label for label, *_ in series] == (["learned"] if lower else ["trained", "untrained"])
        for label, _, y, low, high in series:
            rows = table[(table["metric"] == metric) & (table["network"] == label)]
            np.testing.assert_allclose([y, low, high], rows[["median", "low", "high"]].T)
    assert [tick.get_text() for tick in fig.axes[2].get_xticklabels()] == list(LAYERS)
    plt.close(fig)


def test_the_figure_of_probes_holds_the_numbers_of_its_table(pipeline: Path) -> None:
    table = pd.read_csv(pipeline / "outputs/probes.csv")
    fig = ap.draw_probes(table, 0.42, 0.1)
    (ax,) = fig.axes
    for label, _, y, low, high in drawn_intervals(ax):
        rows = table[table["network"] == label]
        np.testing.assert_allclose([y, low, high], 100 * rows[["accuracy", "low", "high"]].T)
    levels = [np.asarray(line.get_ydata()).tolist() for line in ax.lines if line.get_linestyle() == ":"]
    assert levels == [[42, 42], [10, 10]]
    plt.close(fig)


def test_the_figure_of_ablation_holds_the_numbers_of_its_tables() -> None:
    hits = pd.DataFrame({"name": [f"{ap.HITS}: {readout}" for readout in "ab"], "unit": "%"})
    hits = hits.assign(value=[62.0, 23.0], low=[57.0, 19.0], high=[68.0, 28.0])
    fig = ap.draw_ablation(ablation_table(), hits, 1 / 3)
    above, below = fig.axes[:2]
    # classes x active filters: filter 0 prefers dog, filter 1 ship
    assert np.asarray(above.images[0].get_array()).tolist() == [[0.5, 0], [0, -1], [0, 1]]
    frames = [(patch.get_x(), patch.get_y(), patch.get_width()) for patch in above.patches]  # type: ignore[attr-defined]
    assert frames == [(0, 0, 1), (1, 1, 0), (1, 2, 1)]
    assert [tick.get_text() for tick in above.get_yticklabels()] == NAMES
    ((_, x, _, low, high),) = drawn_intervals(below)
    assert (x, low, high) == ([62, 23], [57, 19], [68, 28])
    assert [tick.get_text() for tick in below.get_yticklabels()] == ["a", "b"]
    plt.close(fig)


def test_the_figure_of_trust_holds_the_numbers_of_its_table(pipeline: Path) -> None:
    trust = pd.read_csv(pipeline / "outputs/trust.csv")
    fig = ap.draw_trust(trust)
    for ax, test in zip(fig.axes, ("insertion", "deletion"), strict=False):
        series = drawn_intervals(ax)
        assert [label for label, *_ in series] == ["10 %", "25 %"]
        for label, x, _, low, high in series:
            rows = trust[(trust["test"] == test) & (trust["share"] == float(label[:2]) / 100)]
            np.testing.assert_allclose([x, low, high], 100 * rows[["median", "low", "high"]].T)
    rows = trust[trust["test"] == "partial rank correlation"]
    ((_, x, _, low, high),) = drawn_intervals(fig.axes[2])
    np.testing.assert_allclose([x, low, high], rows[["median", "low", "high"]].T)
    labels = [tick.get_text() for tick in fig.axes[2].get_yticklabels()]
    assert labels == rows["condition"].tolist()
    plt.close(fig)


def test_the_findings_say_the_numbers_of_the_tables(pipeline: Path) -> None:
    trust = pd.read_csv(pipeline / "outputs/trust.csv")
    lines = ap.describe_trust(trust).splitlines()
    found = [line.rsplit(maxsplit=4) for line in lines[2:9]] + [
        line.rsplit(maxsplit=5) for line in lines[11:]
    ]
    masked = trust[trust["test"].isin(["insertion", "deletion"])]
    expected = []
    for condition, rows in masked.groupby("condition", sort=False):
        expected.append([condition, *(f"{100 * value:.0f}" for value in rows["median"])])  # insertion first
    for row in trust[trust["test"] == "partial rank correlation"].to_dict("records"):
        numbers = [row[name] for name in ("median", "low", "high", "lowest_draw", "highest_draw")]
        expected.append([row["condition"], *(f"{value:.2f}" for value in numbers)])
    assert found == expected


def test_values_are_written_with_their_interval_and_the_decimals_of_their_unit() -> None:
    assert ap.format_value(0.254, 0.238, 0.2651, "rho") == "0.25 (0.24 to 0.27)"
    assert ap.format_value(82.04, 81.2, 82.9, "%") == "82.0 (81.2 to 82.9)"
    assert ap.format_value(-0.00001, math.nan, math.nan, "nats") == "0.0000"
    assert ap.format_value(7.0, math.nan, math.nan, "filters") == "7"
    assert ap.format_value(math.nan, math.nan, math.nan, "%") == ""


def some_summary(*values: float) -> pd.DataFrame:
    names = ["test accuracy", "dead filters", "dead filters"]
    table = pd.DataFrame({"name": names, "layer": ["", "conv1", "conv4"], "value": values})
    return table.assign(
        low=[80.0, np.nan, np.nan], high=[84.0, np.nan, np.nan], unit=["%", "filters", "filters"], n=9
    )


def test_the_summary_is_described_with_a_column_a_layer() -> None:
    lines = ap.describe_summary(some_summary(82.04, 0, 3)).splitlines()
    assert lines[0].split() == ["unit", "network", "conv1", "conv4"]
    assert lines[1].split() == ["test", "accuracy", "%", "82.0"]
    assert lines[2].split() == ["dead", "filters", "filters", "0", "3"]


def test_runs_stand_side_by_side_and_what_one_lacks_is_empty() -> None:
    table = ap.compare_runs({"a": some_summary(82, 0, 3), "b": some_summary(81, 1, 2)[:2]})
    assert table["name"].tolist() == ["test accuracy", "dead filters", "dead filters"]
    assert table["a"].tolist() == ["82.0 (80.0 to 84.0)", "0", "3"]
    assert table["b"].tolist() == ["81.0 (80.0 to 84.0)", "1", ""]
    assert table["apart"].tolist() == ["", "", ""]
    far = some_summary(70, 0, 3)
    far.loc[0, ["low", "high"]] = [69.0, 79.9]
    table = ap.compare_runs({"a": some_summary(82, 0, 3), "b": some_summary(82, 0, 3), "c": far})
    assert table["apart"].tolist() == ["yes", "", ""]
    assert "70.0 (69.0 to 79.9)" in ap.describe_comparison(table)


def test_another_runs_summary_is_read_as_it_was_written() -> None:
    run, summary = make_run(LABELS), some_summary(82.04, 0, math.nan)
    run.save_table("summary", summary)
    pd.testing.assert_frame_equal(ap.read_summary("outputs")[ap.SUMMARY], summary[ap.SUMMARY])
    Path("outputs/summary.csv").write_text("name,layer\n1,2\n")
    with pytest.raises(
        SystemExit, match=r"^outputs/summary.csv is damaged or not of this project \(KeyError\)"
    ):
        ap.read_summary(Path("outputs"))
    with pytest.raises(
        SystemExit, match=r"seed1/summary.csv not found: COMPARE_WITH names 'seed1', which must"
    ):
        ap.read_summary("seed1")


def test_the_summary_holds_the_numbers_of_the_tables(pipeline: Path, tiny_stl10: Path) -> None:
    outputs = pipeline / "outputs"
    summary = ap.read_summary(outputs).set_index(["name", "layer"])
    value = summary["value"]
    assert not summary.index.duplicated().any()
    probes = pd.read_csv(outputs / "probes.csv").set_index(["network", "layer"])["accuracy"]
    name = "test accuracy of a linear probe, untrained network"
    assert value[name, "conv2"] == pytest.approx(100 * probes["untrained", "conv2"])
    trust = pd.read_csv(outputs / "trust.csv").set_index(["test", "condition", "share"])["median"]
    name = "insertion difference, 25 % of the window: projection minus centre"
    expected = trust["insertion difference", "projection minus centre", 0.25]
    assert value[name, "conv4"] == pytest.approx(100 * expected)
    specialisation = pd.read_csv(outputs / "specialisation.csv").set_index(["metric", "network", "layer"])[
        "median"
    ]
    name = "auc, median over filters, trained - untrained"
    assert value[name, "conv3"] == pytest.approx(specialisation["auc", "learned", "conv3"])
    accuracy = load_checkpoint(outputs / "CNN.pth").metrics["accuracy"]
    assert value["test accuracy", ""] == pytest.approx(100 * accuracy)
    limits = summary.dropna(subset=["low"])
    assert (limits["low"] <= limits["value"] + 1e-9).all() and (
        limits["value"] <= limits["high"] + 1e-9
    ).all()


def test_a_run_is_compared_with_others(
    pipeline: Path, pipeline_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ap, "COMPARE_WITH", [pipeline / "outputs"])
    ap.main()
    table = pd.read_csv(pipeline_copy / "comparison.csv", keep_default_na=False)
    runs = ["outputs", str(pipeline / "outputs")]
    assert list(table.columns[2:]) == ["name", "layer", "unit", *runs, "apart"]
    assert not table["apart"].any()
    assert (table["outputs"] == table[str(pipeline / "outputs")]).all()  # the same seed, the same numbers
    assert table["outputs"].str.contains(" to ").sum() > 50
    assert str(pipeline / "outputs") in capsys.readouterr().out


# ---------------------------------------------------------------- runs


def test_a_run_with_the_same_seed_writes_the_same_tables(pipeline: Path, pipeline_copy: Path) -> None:
    tables = [path for path in pipeline_copy.glob("*.csv") if path.name != "training_log.csv"]
    ap.main()
    assert [path.read_bytes() for path in tables] == [(pipeline / path).read_bytes() for path in tables] != []


def test_shares_that_are_none_are_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ap, "MASKED_SHARES", (0.1, 25))
    with pytest.raises(
        SystemExit, match=r"^MASKED_SHARES is \(0.1, 25\); allowed are numbers between 0 and 1"
    ):
        ap.main()


def test_a_dead_conv4_leaves_figures_out_with_a_line_and_numbers_empty(
    pipeline_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pipeline_copy / "CNN.pth"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["blocks.3.bn.weight"].zero_()
    content["state_dict"]["blocks.3.bn.bias"].fill_(-1)
    torch.save(content, path)
    deconv_full.main()
    for name in ("trust.png", "ablation.png"):
        (pipeline_copy / name).unlink()
    capsys.readouterr()
    ap.main()
    printed = capsys.readouterr().out
    for name in ("trust.png", "ablation.png"):
        assert f"{name} is left out" in printed and not (pipeline_copy / name).exists()
    assert "nan" not in printed and len(pd.read_csv(pipeline_copy / "trust.csv")) == 0
    summary = ap.read_summary(pipeline_copy).set_index(["name", "layer"])["value"]
    assert summary["dead filters", "conv4"] == 16
    assert math.isnan(summary["selectivity, median over filters, trained network", "conv4"])
    assert math.isnan(summary["loss increase of the preferred class: the network's own classifier", "conv4"])


def test_one_test_image_a_class_is_enough(pipeline_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_data.load_split

    def first_of_each(dataset: str, folder: Path, split: str) -> Split:
        data = load(dataset, folder, split)
        return data if split == "train" else data.select(np.unique(data.labels, return_index=True)[1])

    path = pipeline_copy / "CNN.pth"
    content = torch.load(path, weights_only=True)
    monkeypatch.setattr(load_data, "load_split", first_of_each)
    few_images = first_of_each("stl10", Path("data"), "test")
    content["settings"]["data"]["test"] = load_data.fingerprint(few_images, list(load_data.STL10_CLASSES))
    torch.save(content, path)
    start = pipeline_copy / "snapshots/epoch_000.pth"
    torch.save(torch.load(start, weights_only=True) | {"settings": content["settings"]}, start)
    deconv_full.main()
    ap.main()
    summary = ap.read_summary(pipeline_copy).dropna(subset=["low"])
    shares = summary[summary["unit"] == "%"]
    accuracies = shares[shares["name"].str.contains("accuracy")]
    assert (accuracies["low"] >= 0).all() and (accuracies["high"] <= 100).all() and len(accuracies) > 8
