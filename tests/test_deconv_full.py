import hashlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import DEVICES, MakeNet, WriteSplit, make_checkpoint, write_checkpoint
from test_deconv import CONFIGS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import deconv
import deconv_full
import load_data
from CNN import CNN, LAYERS, choose_device, frame_sizes, receptive_fields
from deconv_full import (
    Projector,
    Units,
    UnitTensors,
    magnitude_statistics,
    measure_activations,
    project_units,
    project_windows,
)
from load_data import Array

IMAGES = np.random.default_rng(1).integers(0, 256, (12, 3, 96, 96)).astype(np.uint8)


def features_of(net: CNN, image: int) -> list[tuple[Tensor, Tensor]]:
    return net.features(net.normalise(torch.from_numpy(IMAGES[[image]])))


def as_units(entries: Any) -> Units:
    """Units of some rows (image, filter, row, column, value)."""
    table = np.array(entries, np.float64).reshape(-1, 5)
    image, filter_, row, column = table[:, :4].T.astype(np.int64)
    return Units(image, filter_, row, column, table[:, 4].astype(np.float32))


def active_units(net: CNN, layer: int, images: list[int], random: int) -> Units:
    """Units of the strongest filter at the corners and at random places of some images, in random order."""
    rng = np.random.default_rng(layer)
    entries = []
    for image in images:
        pooled = features_of(net, image)[layer][0][0]
        last = pooled.shape[-1] - 1
        positions = [[0, 0], [0, last], [last, 0], [last, last]]
        positions += rng.integers(0, last + 1, (random, 2)).tolist()
        for row, column in positions:
            number = int(pooled[:, row, column].argmax())
            entries.append((image, number, row, column, float(pooled[number, row, column])))
    return as_units(rng.permutation(entries))


def plain(net: CNN, layer: int, *unit: Any) -> Array:
    """The projection of one unit (image, filter, row, column) by deconv.py, in the full frame."""
    image, *position = (int(number) for number in unit)
    batch = net.normalise(torch.from_numpy(IMAGES[[image]]))
    return np.asarray(deconv.project_unit(net, batch, layer, *position).numpy())


def in_frame(window: Array, origin: Array) -> Array:
    """Put a window (3, size, size) back into the full frame (3, 96, 96), beyond which it must be zero."""
    size = window.shape[-1]
    top, left = origin + size
    frame = np.zeros((3, 96 + 2 * size, 96 + 2 * size), np.float32)
    frame[:, top : top + size, left : left + size] = window
    inside = frame[:, size:-size, size:-size]
    assert np.count_nonzero(inside) == np.count_nonzero(window)
    return inside


def assert_equal(projection: Array, expected: Array, share: float = 1e-5) -> None:
    assert np.abs(projection - expected).max() <= share * np.abs(expected).max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", range(4))
def test_windows_in_float32_equal_the_plain_projection_in_float64_on_every_device(
    make_net: MakeNet, device: str, layer: int
) -> None:
    choose_device(device)  # settles how exactly this device counts
    units = active_units(make_net(), layer, [3, 8], 20)
    windows, origins = project_windows(Projector(make_net().to(device), layer), IMAGES, units, "")
    exact = make_net().double()
    for n, (image, *unit) in enumerate(zip(*units[:4], strict=True)):
        batch = torch.from_numpy(IMAGES[[image]]).double() / 255
        expected = deconv.project_unit(exact, batch, layer, *map(int, unit))
        assert_equal(in_frame(windows[n], origins[n]), expected.numpy())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer", range(4))
def test_windows_put_back_into_the_frame_equal_the_plain_projection(
    make_net: MakeNet, config: Any, layer: int
) -> None:
    net = make_net(seed=layer, **config)
    units = active_units(net, layer, [3, 8], 6)
    windows, origins = project_windows(Projector(net, layer, 1), IMAGES, units, "")
    for n, unit in enumerate(zip(*units[:4], strict=True)):
        assert_equal(in_frame(windows[n], origins[n]), plain(net, layer, *unit))
    assert windows.any(axis=(1, 2, 3)).mean() > 0.5


def test_many_units_in_any_order_come_back_at_their_own_place(make_net: MakeNet) -> None:
    net = make_net()
    units = active_units(net, 1, [11, 2, 5, 0, 7], 40)  # more of a kind than are projected at once
    passes: list[int] = []
    net.blocks[0].conv.register_forward_hook(lambda _, images, __: passes.append(len(images[0])))
    windows, origins = project_windows(Projector(net, 1, 3), IMAGES, units, "")
    assert sorted(passes) == [2, 3]  # each image once, three at most at a time
    field = receptive_fields(net)[1]
    for n, (image, filter_, row, column) in enumerate(zip(*units[:4], strict=True)):
        switch = int(features_of(net, image)[1][1][0, filter_, row, column])
        assert origins[n].tolist() == [at * field.jump + field.start for at in divmod(switch, 24)]
        assert_equal(in_frame(windows[n], origins[n]), plain(net, 1, image, filter_, row, column))


def test_what_is_kept_of_each_projection_comes_with_its_index_and_origin(make_net: MakeNet) -> None:
    net = make_net()
    units = active_units(net, 1, [1, 6, 9], 60)
    projector = Projector(net, 1, 2)
    windows, all_origins = project_windows(projector, IMAGES, units, "")
    yielded = []
    for batch in project_units(projector, IMAGES, units, "", lambda part: part.abs().amax(dim=(1, 2, 3))):
        assert (batch.kept == np.abs(windows[batch.indices]).max(axis=(1, 2, 3))).all()
        assert (batch.origins == all_origins[batch.indices]).all()
        yielded += batch.indices.tolist()
    assert sorted(yielded) == list(range(len(units.image)))


@pytest.mark.parametrize("layer", range(4))
def test_a_position_before_pooling_that_is_the_units_own_switch_changes_nothing(
    make_net: MakeNet, layer: int
) -> None:
    projector = Projector(make_net(), layer, 2)
    units = active_units(projector.net, layer, [3, 8, 0], 6)
    windows, origins = project_windows(projector, IMAGES, units, "")
    positions = projector.map_positions(origins)
    forced_windows, forced_origins = project_windows(projector, IMAGES, units, "", map_positions=positions)
    assert (forced_windows == windows).all() and (forced_origins == origins).all()


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("other_network", [False, True])
def test_another_filter_or_network_is_projected_in_the_window_of_a_given_unit(
    make_net: MakeNet, layer: int, other_network: bool
) -> None:
    projector = Projector(make_net(), layer, 2)
    units = active_units(projector.net, layer, [3, 8], 8)
    _, origins = project_windows(projector, IMAGES, units, "")

    # the next filter of this network, or of another one, at the place of the given unit
    net = make_net(seed=9) if other_network else projector.net
    positions = projector.map_positions(origins)
    filters = (units.filter + 1) % net.config["filters"][layer]
    values = np.arange(1, len(filters) + 1, dtype=np.float32)
    others = units._replace(filter=filters, value=values)
    windows, other_origins = project_windows(
        Projector(net, layer, 2), IMAGES, others, "", map_positions=positions
    )
    assert (other_origins == origins).all()

    moved = 0
    for n, (image, filter_index, row, column) in enumerate(zip(*others[:4], strict=True)):
        features = features_of(net, image)
        switches = [layer_switches.clone() for _, layer_switches in features]
        map_size = frame_sizes(net, 96).outputs[layer]
        switch = int(positions[n] @ [map_size, 1])
        moved += int(switches[layer][0, filter_index, row, column] != switch)
        switches[layer][0, filter_index, row, column] = switch
        only = torch.zeros_like(features[layer][0])
        only[0, filter_index, row, column] = float(values[n])
        expected = deconv.project(net, layer, only, switches, (96, 96))[0]
        assert_equal(in_frame(windows[n], origins[n]), expected.numpy())
    assert moved > len(filters) // 4  # the filter's own switch was another one


def test_results_of_a_stride_are_put_side_by_side() -> None:
    parts = torch.arange(2 * 3 * 4 * 16.0).view(2, 3, 4, 16)  # stride 2, three channels, four to fill up
    together = deconv_full.interleave(parts, 2, 3)
    assert together.shape == (2, 6, 8, 3)
    for row, column, channel in ((0, 0, 0), (3, 4, 2), (5, 0, 1), (2, 7, 0)):
        part = (row % 2 * 2 + column % 2) * 3 + channel
        assert together[1, row, column, channel] == parts[1, row // 2, column // 2, part]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


ONE_EACH = as_units([(image, 0, 5, 5, 1) for image in range(12)])  # one unit of each image


def test_a_gpu_has_all_the_operators_and_no_tensor_is_left_on_the_cpu() -> None:
    # fake tensors have shapes and devices but no values; torch refuses to mix their devices
    def numbers(*values: int) -> Tensor:
        return torch.tensor(values, device="cuda")

    with FakeTensorMode():
        with torch.device("cuda"):
            net = CNN().eval().requires_grad_(False)
        features = net.features(net.normalise(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)))
        projector = Projector(net, 3)
        units = UnitTensors(
            image=numbers(0, 1, 1),
            filter=numbers(0, 1, 255),
            value=torch.ones(3, device="cuda"),
            map_row=numbers(5, 5, 5),
            map_column=numbers(4, 4, 4),
        )
        windows = projector.project(projector.masks(features), units, 5, 4)
        measured = magnitude_statistics(windows)
        devices = {tensor.device for tensor in (windows, measured, net.classify(features[-1][0]))}
        assert devices == {torch.device("cuda", 0)}
        assert windows.shape == (3, 96 - (16 * 5 - 30), 96 - (16 * 4 - 30), 3)  # jumps of 16 pixels from -30


@pytest.fixture
def visible_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars as in a terminal; pytest hides them otherwise."""

    def make_bar(*args: Any, **options: Any) -> Any:
        return tqdm(*args, **{**options, "disable": False, "file": io.StringIO()})

    monkeypatch.setattr(deconv_full, "tqdm", make_bar)


@pytest.mark.usefixtures("three_threads", "visible_bar")
@pytest.mark.parametrize("end", ["reached", "failed", "abandoned", "interrupted"])
@pytest.mark.parametrize("whole_windows", [False, True])
def test_torch_has_its_threads_back_at_the_end_and_no_work_goes_on(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch, end: str, whole_windows: bool
) -> None:
    errors = {"failed": IndexError, "abandoned": ValueError, "interrupted": KeyboardInterrupt}
    calls: list[int] = []
    project = Projector.project

    def slow(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            threading.Event().wait(0.1)
        if end == "failed":
            raise IndexError
        return project(*args)

    def stop(*_: Any) -> Any:
        raise errors[end]

    monkeypatch.setattr(Projector, "project", slow)
    if end in ("abandoned", "interrupted"):  # in the loop that takes the results
        monkeypatch.setattr(np, "maximum", stop)

    def consume() -> None:
        projector = Projector(make_net(), 0, 1)
        if whole_windows:
            project_windows(projector, IMAGES, ONE_EACH, "")
        else:
            for _ in project_units(projector, IMAGES, ONE_EACH, ""):
                np.maximum(0, 0)

    raised = pytest.raises(errors[end]) if end in errors else nullcontext()
    with raised as error:  # while the error is known, its traceback holds on to the frames of the loop
        consume()
    with ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 3
    assert (len(calls) == 12) == (end == "reached"), error


@pytest.mark.usefixtures("three_threads")
def test_a_gpu_works_in_the_calling_thread_on_groups_of_few_different_sizes(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    projector = Projector(make_net(), 1, 1)
    units = active_units(projector.net, 1, [11, 2, 5, 0, 7], 40)
    windows, origins = project_windows(projector, IMAGES, units, "")

    projector.device_type = "mps"  # this machine's CPU stands for an Apple GPU
    projector.batch_size = deconv_full.images_at_once(1, "mps")
    sizes: list[int] = []
    threads: set[threading.Thread] = set()
    passes: list[int] = []
    project = Projector.project

    def spy(self: Projector, masks: Any, group: UnitTensors, row: int, column: int) -> Tensor:
        sizes.append(len(group.image))
        threads.add(threading.current_thread())
        return project(self, masks, group, row, column)

    monkeypatch.setattr(Projector, "project", spy)
    projector.net.blocks[0].conv.register_forward_hook(lambda _, images, __: passes.append(len(images[0])))
    gpu_windows, gpu_origins = project_windows(projector, IMAGES, units, "")
    assert passes == [5] and threads == {threading.main_thread()}
    assert set(sizes) <= {1, 2, 4, 8, 16, 32, 64, 128, 256} and max(sizes) > deconv_full.CPU_GROUP
    assert (gpu_origins == origins).all()
    assert_equal(gpu_windows, windows)
    assert [deconv_full.images_at_once(16, device) for device in ("cpu", "cuda", "mps")] == [16, 256, 256]


def test_equal_values_are_grouped_and_groups_filled_up_to_a_power_of_two() -> None:
    groups = deconv_full.group_equal(np.array([7, 3, 7, 7, 3, 7, 9]), limit=3)
    assert [group.tolist() for group in groups] == [[1, 4], [0, 2, 3], [5], [6]]
    padded = [deconv_full.pad_to_power_of_two(group).tolist() for group in groups]
    assert padded == [[1, 4], [0, 2, 3, 3], [5], [6]]


@pytest.mark.usefixtures("three_threads")
def test_each_thread_takes_batches_of_its_own_and_works_alone(make_net: MakeNet) -> None:
    together = threading.Barrier(3, timeout=20)
    counts = []

    def reduce(projections: Tensor) -> Tensor:
        together.wait()  # until three threads are here
        counts.append(torch.get_num_threads())
        return projections[:, 0, 0]

    assert len(list(project_units(Projector(make_net(), 0, 1), IMAGES, ONE_EACH, "", reduce))) == 12
    assert counts == [1] * 12


def test_activations_equal_those_of_single_images(make_net: MakeNet) -> None:
    net = make_net()
    activations = measure_activations(IMAGES, net, 5, "")
    for image in range(len(IMAGES)):
        for layer, (pooled, _) in zip(LAYERS, features_of(net, image), strict=True):
            maps = pooled[0].numpy()
            maxima = pytest.approx(maps.max(axis=(1, 2)), rel=1e-4, abs=1e-5)
            assert activations[f"{layer}_max"][image] == maxima
            rows, columns = activations[f"{layer}_position"][image].T
            assert maps[np.arange(len(maps)), rows, columns] == maxima
            mean = pytest.approx(maps.mean(axis=(1, 2)), rel=1e-4, abs=1e-5)
            assert activations[f"{layer}_mean"][image] == mean
            share = pytest.approx((maps > 0).mean(axis=(1, 2)), abs=1e-3)
            assert activations[f"{layer}_nonzero"][image] == share


def test_top_images_are_different_strongest_first_and_ties_go_to_the_lower_index() -> None:
    values = np.array([[1, 0, 0], [3, 0, 2], [3, 0, 0], [2, 0, 2]], np.float32)
    top = deconv_full.top_images(values, 3)
    assert top.tolist() == [[1, 2, 3], [-1, -1, -1], [1, 3, -1]] and top.dtype == np.int32


def test_percentile_examples_lie_near_their_percentile_and_are_others_than_the_top_images() -> None:
    values = np.zeros((201, 3), np.float32)
    values[:, 0] = np.random.default_rng(0).permutation(201)  # fires on 200 images, with 1 to 200
    values[:11, 1] = np.arange(11) + 1  # on 11; the third filter is dead
    top = deconv_full.top_images(values, 9)
    chosen = deconv_full.percentile_images(values, top)
    levels = values[chosen[0], 0].reshape(4, 3)
    assert (np.diff(levels) < 0).all() and len(np.unique(levels)) == 12
    # percentile 99 is 198.01, but 192 to 200 are the strongest; 90 is 180.1, 75 is 150.25, 50 is 100.5
    for level, low, high in zip(levels, (183, 174, 145, 96), (191, 186, 155, 105), strict=True):
        assert low <= level.min() and level.max() <= high
    assert chosen[1:].tolist() == [[1, 0, *[-1] * 10], [-1] * 12]
    assert (chosen == deconv_full.percentile_images(values, top)).all()


@pytest.mark.parametrize("prefix", ["", "level_"])
def test_top_projections_patches_and_origins_are_those_of_the_plain_projection(
    make_net: MakeNet, prefix: str
) -> None:
    net = make_net()
    net.blocks[3].bn.weight[2] = 0  # filter 2 of conv4 is dead
    net.blocks[3].bn.bias[2] = -1
    activations = measure_activations(IMAGES, net, 1, "")
    top = deconv_full.project_top(IMAGES, net, activations, 4, 1)
    for k, layer in enumerate(LAYERS):
        size = receptive_fields(net)[k].size
        peaks = activations[f"{layer}_max"]
        names = ("image", "value", "position", "origin", "projection", "patch")
        arrays = [top[f"{layer}_{prefix}{name}"] for name in names]
        images = deconv_full.top_images(peaks, 4)
        if prefix:
            images = deconv_full.percentile_images(peaks, images)
        assert (arrays[0] == images).all()
        for number, rank in np.ndindex(arrays[0].shape):
            image, value, position, origin, projection, patch = (array[number, rank] for array in arrays)
            if image < 0:
                assert not any(array[number, rank].any() for array in arrays[1:])
                continue
            assert value == peaks[image, number]
            assert (position == activations[f"{layer}_position"][image, number]).all()
            expected = plain(net, k, image, number, *position)
            # float16 has 11 binary digits, fewer below 6e-5
            assert_equal(in_frame(projection, origin), expected, 1e-3 if prefix else 1e-5)
            top_row, left = origin
            assert (patch == deconv.crop(IMAGES[image], top_row, left, size, 0)).all()
    assert (top[f"conv4_{prefix}image"][2] == -1).all() and (top[f"conv1_{prefix}image"] >= 0).any()


def test_a_page_shows_projections_in_grey_and_patches_white_beyond_the_border() -> None:
    projection = np.zeros((2, 1, 3, 3, 3))
    projection[0, 0, :, 2, 0] = -7
    projection[1, 0, 0, 0, 0] = 1
    patch = np.zeros((2, 1, 3, 3, 3), np.uint8)
    patch[0, 0, :, 1, 1] = 51
    top: dict[str, Array] = {"conv2_projection": projection, "conv2_patch": patch}
    top["conv2_origin"] = np.array([[[-1, 94]], [[0, 0]]])
    figure = deconv_full.draw_page(top, "conv2", [0, 1], ["filter 0: this", "filter 1: that"], "heading")
    plt.close(figure)
    first, second, *_ = figure.axes
    assert (first.get_title(), second.get_title()) == ("filter 0: this", "filter 1: that")
    shown = np.asarray(first.images[0].get_array())
    assert (shown == shown[:, :, :1]).all()
    assert shown[1:4, 1:4, 0].tolist() == [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0.5, 0.5]]
    assert shown[1:4, 8:11, 0] == pytest.approx(np.array([[1, 1, 1], [0, 0.2, 1], [0, 0, 1]]))
    around = shown.copy()
    around[1:4, 1:4] = 1
    around[1:4, 8:11] = 1
    assert (around == 1).all() and shown.shape == (5, 12, 3)  # white around both, and a gap of two
    assert np.asarray(second.images[0].get_array())[1, 1].tolist() == [1, 0.5, 0.5]  # a scale of its own


def test_of_conv1_one_projection_stands_for_nine() -> None:
    rng = np.random.default_rng(0)
    projection = np.zeros((1, 9, 3, 2, 2))
    projection[0] = rng.standard_normal((3, 2, 2)) * np.arange(9, 0, -1)[:, None, None, None]
    top: dict[str, Array] = {"conv1_projection": projection, "conv1_origin": np.full((1, 9, 2), 40)}
    top["conv1_origin"][0, :2] = -1  # the border cuts the first two
    top["conv1_patch"] = rng.integers(0, 256, (1, 9, 3, 2, 2), np.uint8)
    figure = deconv_full.draw_page(top, "conv1", [0], ["filter 0: this\nthat"], "heading")
    plt.close(figure)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    expected = deconv.displayed(projection[0])[2]
    assert shown.shape == (10, 10 + 2 + 10, 3) and figure.axes[0].get_title() == "filter 0: this\nthat"
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        block = shown[1 + 3 * row : 4 + 3 * row, 1 + 3 * column : 4 + 3 * column]
        assert (block == expected[row, column].astype(np.float32)).all()


def test_titles_count_the_most_frequent_class_of_the_top_images() -> None:
    labels = np.array([0, 1, 1, 1])
    top: dict[str, Array] = {
        "conv2_image": np.array([[0, 3, 2], [-1, -1, -1], [0, 1, -1]]),
        "conv2_value": np.array([[3.0, 2, 1], [0, 0, 0], [4, 2, 0]]),
    }
    assert deconv_full.title_filters(top, "conv2", labels, ["ant", "bee"]) == [
        "filter 0: 2 of 3 bee, peak 3.00",
        "filter 1: dead",
        "filter 2: 1 of 2 ant, peak 4.00",  # a tie goes to the class that is first
    ]
    top = {name.replace("2", "1"): values for name, values in top.items()}
    assert (
        deconv_full.title_filters(top, "conv1", labels, ["ant", "bee"])[0]
        == "filter 0: 2 of 3 bee\npeak 3.00"
    )


def test_pages_of_an_earlier_network_go(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deconv_full, "draw_page", lambda *_: plt.figure())
    folder = Path("deconv")
    folder.mkdir()
    for name in ("conv1_filters_096_to_099.png", "mine.png"):
        (folder / name).touch()
    with np.load(pipeline / "outputs/projections.npz") as top:
        deconv_full.draw_pages(dict(top), dict.fromkeys(LAYERS, [""] * 16), "heading", 3, folder)
    ranges = ((1, 0, 3), *((2, k, k + 2) for k in (0, 3)), (3, 0, 2), (3, 3, 5), (3, 6, 7))
    ranges += tuple((4, k, min(k + 2, 15)) for k in range(0, 16, 3))
    pages = [f"conv{k}_filters_{first:03d}_to_{last:03d}.png" for k, first, last in ranges]
    assert sorted(path.name for path in folder.iterdir()) == [*pages, "mine.png"]


def test_the_evolution_ends_in_the_top_projections_of_the_last_network(make_net: MakeNet) -> None:
    first = make_checkpoint(make_net(seed=1), epochs=1)
    last = make_checkpoint(make_net(seed=2), epochs=3)
    evolution = deconv_full.project_evolution(IMAGES, [first, last], 3, 5)
    top = deconv_full.project_top(IMAGES, last.net, measure_activations(IMAGES, last.net, 5, ""), 1, 5)
    for filters, layer in zip((5, 6, 7, 8), LAYERS, strict=True):
        numbers, image, projections = evolution[layer]
        assert numbers.tolist() == [0, (filters - 1) // 2, filters - 1]
        assert projections.shape[:3] == (3, 2, 3)
        assert_equal(projections[:, 1], top[f"{layer}_projection"][numbers, 0])
        strongest = top[f"{layer}_image"][numbers, 0]
        assert (image[:, 1] == np.maximum(strongest, 0)).all() and image.shape == (3, 2)  # 0 where none fires
        assert not np.array_equal(projections[:, 0], projections[:, 1])
    figure = deconv_full.draw_evolution(evolution, [1, 3], "heading")
    plt.close(figure)
    changes = [len(ax.collections[0].get_paths()) for ax in figure.axes]
    images = [layer_evolution.image for layer_evolution in evolution.values()]
    assert changes == [int((image[:, 0] != image[:, 1]).sum()) for image in images]
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == ["1", "3"]
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["0", "3", "7"]


def test_snapshots_of_another_training_or_a_longer_one_are_not_taken(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_net()
    folder = Path("outputs/snapshots")
    settings = make_checkpoint(net).settings
    for epochs, seed in ((0, 0), (1, 0), (2, 7), (20, 0), (30, 0), (40, 0)):
        path = folder / f"epoch_{epochs:03d}.pth"
        write_checkpoint(net, path, epochs=epochs, settings=settings | {"seed": seed})
    checkpoint = make_checkpoint(net, epochs=30)
    taken = deconv_full.read_snapshots(folder, checkpoint)
    assert [snapshot.epochs for snapshot in taken] == [1, 20, 30] and taken[-1] is checkpoint
    assert deconv_full.read_snapshots(Path("none"), checkpoint) == [checkpoint]
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert len(deconv_full.read_snapshots(Path("~/outputs/snapshots"), checkpoint)) == 3


def test_magnitude_statistics_by_hand() -> None:
    projections = torch.zeros(2, 2, 2, 3)
    projections[0, 0, 0] = torch.tensor([1.0, -2, 0])  # magnitude 3
    projections[0, 1, 1] = torch.tensor([0.0, 0, -1])  # magnitude 1
    statistics = deconv_full.magnitude_statistics(projections)
    count, mean, largest, variance = statistics[0].tolist()
    assert (count, mean, largest) == (2, 2, 3)
    assert variance == pytest.approx((9 + 1) / 96**2 - (4 / 96**2) ** 2)
    assert statistics[1].tolist() == [0, 0, 0, 0]


def test_statistics_of_all_projections_equal_those_of_full_frames(make_net: MakeNet) -> None:
    net = make_net()
    chosen = np.array([7, 0, 3])
    activations = measure_activations(IMAGES, net, 1, "")
    statistics = deconv_full.measure_projections(IMAGES, chosen, activations, net, 2)
    fires = activations["conv4_max"][chosen] > 0
    assert 0 < fires.sum() < fires.size
    for n, filter_ in np.ndindex(fires.shape):
        position = activations["conv4_position"][chosen[n], filter_]
        frame = plain(net, 3, chosen[n], filter_, *position).astype(np.float64)
        magnitude = np.abs(frame).sum(axis=0)
        above = magnitude[magnitude > 0]
        expected = above.mean() if len(above) else 0, magnitude.max(), magnitude.var()
        assert statistics["nonzero_count"][n, filter_] == pytest.approx(len(above), abs=2)
        measured = [statistics[name][n, filter_] for name in ("mean", "max", "variance")]
        assert measured == pytest.approx(expected, rel=1e-3, abs=0)


def test_files_of_a_run_agree_with_each_other(pipeline: Path) -> None:
    outputs = pipeline / "outputs"
    names = ("activations", "projections", "projection_statistics")
    activations, top, statistics = (dict(np.load(outputs / f"{name}.npz")) for name in names)
    digest = hashlib.sha256((outputs / "CNN.pth").read_bytes()).hexdigest()
    assert {str(arrays["checkpoint_sha256"]) for arrays in (activations, top, statistics)} == {digest}
    for layer in LAYERS:
        maxima = activations[f"{layer}_max"]
        assert (top[f"{layer}_value"] == -np.sort(-maxima, axis=0)[:9].T).all()
        assert ((activations[f"{layer}_nonzero"] > 0) == (maxima > 0)).all()
    image = statistics["image"]
    labels = activations["labels"]
    assert (labels == np.fromfile(pipeline / "data/stl10_binary/test_y.bin", np.uint8) - 1).all()
    first_two = [np.flatnonzero(labels == label)[:2] for label in range(10)]
    assert (image == np.sort(np.concatenate(first_two))).all()
    assert (statistics["labels"] == labels[image]).all()
    fires = activations["conv4_max"][image] > 0
    assert ((statistics["nonzero_count"] > 0) == fires).all() and fires.any() and not fires.all()
    pages = sorted(path.name for path in (outputs / "deconv").iterdir())
    assert len(pages) == 5 and pages[-1] == "conv4_filters_008_to_015.png"


def test_a_damaged_snapshot_only_needs_deleting(make_net: MakeNet) -> None:
    checkpoint = make_checkpoint(make_net())
    path = Path("outputs/snapshots/epoch_001.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    with pytest.raises(SystemExit, match=f"^{path} is damaged .* delete it; the other snapshots suffice$"):
        deconv_full.read_snapshots(path.parent, checkpoint)


@pytest.mark.parametrize("n_top", [1, 4])
def test_main_with_one_image_a_class_paths_as_text_and_every_filter_dead(
    make_net: MakeNet, write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch, n_top: int
) -> None:
    for split in ("train", "test"):
        write_split(split, IMAGES[:10], np.arange(10) + 1)
    net = make_net()
    if n_top == 4:
        for block in net.blocks:
            block.bn.weight.zero_()
            block.bn.bias.fill_(-1)
    write_checkpoint(net)
    settings = {"CHECKPOINT": "outputs/CNN.pth", "OUTPUTS": "outputs", "DATA_DIR": "data", "DEVICE": "cpu"}
    for name, value in {**settings, "N_TOP": n_top, "EVOLUTION_FILTERS": 2}.items():
        monkeypatch.setattr(deconv_full, name, value)
    monkeypatch.setattr(load_data, "DPI", 30)
    deconv_full.main()
    with np.load("outputs/projections.npz") as top:
        for layer, filters in zip(LAYERS, (5, 6, 7, 8), strict=True):
            assert top[f"{layer}_image"].shape == (filters, n_top)
            assert (top[f"{layer}_image"] >= 0).any() == top[f"{layer}_projection"].any() == (n_top == 1)
    assert len(list(Path("outputs/deconv").iterdir())) == 4


def test_main_of_a_network_whose_last_layer_is_dead(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = make_net()
    net.blocks[3].bn.weight.zero_()
    net.blocks[3].bn.bias.fill_(-1)
    write_checkpoint(net)
    for name, value in {"DEVICE": "cpu", "N_TOP": 40, "EVOLUTION_FILTERS": 2}.items():
        monkeypatch.setattr(deconv_full, name, value)
    monkeypatch.setattr(load_data, "DPI", 30)
    deconv_full.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("projecting 26 filters over 30 test images of STL-10 on cpu, torch ")
    assert "conv4 8 8 0.0 % of images, on average" in [" ".join(line.split()) for line in lines]
    assert any(line.startswith("0 projections of conv4 in ") for line in lines)
    assert lines[-1] == "next: uv run analyse_projections.py"
    with np.load("outputs/projections.npz") as top:
        assert top["conv4_patch"].shape == (8, 30, 3, 76, 76) and (top["conv4_image"] == -1).all()
    with np.load("outputs/projection_statistics.npz") as statistics:
        assert len(statistics["image"]) == 30 and not statistics["nonzero_count"].any()
