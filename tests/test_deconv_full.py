import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeNet
from torch.utils._python_dispatch import TorchDispatchMode

import deconv
import deconv_full
from CNN import CNN, LAYERS, Checkpoint, frame_sizes, receptive_fields, save_checkpoint
from deconv_full import Projector, magnitude_statistics, top_images
from load_data import Split, normalise, plain_errors

CPU = torch.device("cpu")
CONFIGS: list[dict[str, Any]] = [
    {},
    {"kernel_sizes": (5, 3, 3, 3), "strides": (1, 1, 1, 1), "pool_sizes": (2, 2, 2, 2)},
    {"kernel_sizes": (3, 3, 3, 3), "strides": (2, 1, 1, 1), "pool_sizes": (2, 2, 2, 2), "head_size": 1},
    {"kernel_sizes": (7, 5, 3, 1), "strides": (1, 1, 1, 1), "pool_sizes": (3, 2, 2, 2)},
    {"kernel_sizes": (7, 5, 3, 3), "strides": (2, 2, 1, 1), "pool_sizes": (3, 1, 2, 2)},
    {"kernel_sizes": (1, 3, 5, 7), "strides": (1, 1, 1, 1), "pool_sizes": (4, 1, 2, 3)},
    {"kernel_sizes": (5, 5, 5, 3), "strides": (2, 1, 2, 1), "pool_sizes": (1, 3, 1, 4)},
]


def in_frame(projector: Projector, units: deconv_full.Units, n: int, window: torch.Tensor) -> torch.Tensor:
    """Put a window (rows, columns, 3) back into the full frame (3, 96, 96)."""
    rows, columns = projector.windows[int(units.row[n])][-1], projector.windows[int(units.column[n])][-1]
    frame = torch.zeros(3, 96, 96)
    frame[:, rows.start : rows.stop, columns.start : columns.stop] = window.permute(2, 0, 1)
    return frame


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer", range(4))
def test_windows_equal_the_plain_projection(make_net: MakeNet, config: Any, layer: int) -> None:
    net = make_net(seed=layer, **config)
    features = net.features(torch.randn(2, 3, 96, 96))
    projector = Projector(net, layer)
    masks, pooled = projector.masks(features), features[layer][0]
    _, filters, size, _ = pooled.shape
    corners = torch.tensor([0, size - 1, size * (size - 1), size * size - 1])
    for trial in range(2):
        places = (
            torch.randint(0, size * size, (2, filters))
            if trial
            else corners.repeat(2 * filters)[: 2 * filters]
        )
        units = projector.units(features, places.view(2, filters))
        for group in projector.groups(units, 3):
            some = units.take(group)
            for n, window in enumerate(projector.project(masks, some)):
                filter_, image = int(some.filter[n]), int(some.image[n])
                row, column = divmod(int(places.view(2, filters)[image, filter_]), size)
                alone = [
                    (maps[image : image + 1], switches[image : image + 1]) for maps, switches in features
                ]
                expected = deconv.project_unit(net, alone, layer, filter_, row, column)
                found = in_frame(projector, some, n, window)
                assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_each_unit_is_in_one_group_of_units_that_the_border_cuts_alike(make_net: MakeNet) -> None:
    net = make_net()
    projector = Projector(net, 3)
    size = projector.conv_sizes[3]
    row, column = torch.randint(0, size, (2, 500))
    units = deconv_full.Units(torch.zeros(500).long(), torch.zeros(500).long(), torch.ones(500), row, column)
    groups = list(projector.groups(units, 7))
    assert sorted(torch.cat(groups).tolist()) == list(range(500))
    for group in groups:
        assert len(group) <= 7
        for at in (row, column):
            cuts = {
                tuple((s.start - s.first, s.stop - s.first) for s in projector.windows[int(r)])
                for r in at[group]
            }
            assert len(cuts) == 1


def test_windows_lie_where_the_receptive_fields_do(make_net: MakeNet) -> None:
    for config in CONFIGS:
        net = make_net(**config)
        for layer, field in enumerate(receptive_fields(net)):
            projector = Projector(net, layer)
            for row, windows in enumerate(projector.windows):
                origin, seen = row * field.jump + field.start, windows[-1]
                assert projector.origin(row) == origin
                assert max(origin, 0) == seen.start
                assert seen.stop <= min(origin + field.size, 96)  # less where pooling left rows over


def test_top_images_are_different_strongest_first_and_ties_go_to_the_lower_index() -> None:
    values = np.array([[1, 0, 0], [3, 0, 2], [3, 0, 0], [2, 0, 2]], np.float32)
    assert top_images(values, 3).tolist() == [[1, 2, 3], [-1, -1, -1], [1, 3, -1]]
    assert top_images(values, 3).dtype == np.int32


def test_magnitude_statistics_by_hand() -> None:
    projections = torch.zeros(2, 2, 2, 3)
    projections[0, 0, 0] = torch.tensor([1.0, -2, 0])  # magnitude 3
    projections[0, 1, 1] = torch.tensor([0.0, 0, -1])  # magnitude 1
    count, mean, largest, variance = magnitude_statistics(projections, 16)[0].tolist()
    assert (count, mean, largest) == (2, 2, 3)
    assert variance == pytest.approx((9 + 1) / 16 - (4 / 16) ** 2)
    assert magnitude_statistics(projections, 16)[1].tolist() == [0, 0, 0, 0]


def make_checkpoint(net: CNN) -> Checkpoint:
    names = [f"class {k}" for k in range(10)]
    metrics = {"test_accuracy": 0.1}
    return Checkpoint(net, "stl10", names, [0.45] * 3, [0.25] * 3, 0, 0, metrics, "0" * 64)


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(1)
    return Split(rng.integers(0, 256, (12, 3, 96, 96)).astype(np.uint8), np.arange(12) % 10)


def test_activations_equal_those_of_single_images(make_net: MakeNet, split: Split) -> None:
    checkpoint = make_checkpoint(make_net())
    found = deconv_full.measure_activations(split.images, checkpoint, CPU, 5)
    for n, image in enumerate(split.images):
        batch = normalise(torch.from_numpy(image[None]), checkpoint.mean, checkpoint.std)
        for layer, (pooled, _) in zip(LAYERS, checkpoint.net.features(batch), strict=True):
            maps = pooled[0].numpy()
            assert found[f"{layer}_max"][n] == pytest.approx(maps.max(axis=(1, 2)), rel=1e-4, abs=1e-5)
            assert found[f"{layer}_mean"][n] == pytest.approx(maps.mean(axis=(1, 2)), rel=1e-4, abs=1e-5)
            assert found[f"{layer}_nonzero"][n] == pytest.approx((maps > 0).mean(axis=(1, 2)), abs=1e-3)
            rows, columns = found[f"{layer}_position"][n].T
            at_place = maps[np.arange(len(maps)), rows, columns]
            assert at_place == pytest.approx(maps.max(axis=(1, 2)), rel=1e-4, abs=1e-5)


def test_top_projections_patches_and_origins_are_those_of_the_plain_projection(
    make_net: MakeNet, split: Split
) -> None:
    checkpoint = make_checkpoint(make_net())
    activations = deconv_full.measure_activations(split.images, checkpoint, CPU, 5)
    found = deconv_full.project_top(split, checkpoint, activations, CPU, 9, 5, 4)
    conv_sizes = frame_sizes(checkpoint.net)[1]
    for k, layer in enumerate(LAYERS):
        for filter_, images in enumerate(found[f"{layer}_image"]):
            living = images[images >= 0]
            assert len(set(living)) == len(living)
            values = found[f"{layer}_value"][filter_]
            assert (np.diff(values) <= 0).all()
            for rank, image in enumerate(images):
                projection, patch, origin = (
                    found[f"{layer}_{name}"][filter_, rank] for name in ("projection", "patch", "origin")
                )
                if image < 0:
                    assert not projection.any() and not patch.any() and values[rank] == 0
                    continue
                batch = normalise(torch.from_numpy(split.images[[image]]), checkpoint.mean, checkpoint.std)
                features = checkpoint.net.features(batch)
                row, column = found[f"{layer}_position"][filter_, rank]
                plain = deconv.project_unit(
                    checkpoint.net, features, k, filter_, int(row), int(column)
                ).numpy()
                at_row, at_column = divmod(int(features[k][1][0, filter_, row, column]), conv_sizes[k])
                field = receptive_fields(checkpoint.net)[k]
                window = at_row * field.jump + field.start, at_column * field.jump + field.start
                assert tuple(origin) == window
                expected = deconv.window_of(plain, *window, field.size, 0)
                assert np.abs(projection - expected).max() <= 1e-4 * np.abs(plain).max()
                assert np.abs(plain).sum() == pytest.approx(
                    np.abs(expected).sum(), rel=1e-5
                )  # nothing outside
                assert (patch == deconv.window_of(split.images[image], *window, field.size, 0)).all()


def test_statistics_of_all_projections_equal_those_of_full_frames(make_net: MakeNet, split: Split) -> None:
    checkpoint = make_checkpoint(make_net())
    activations = deconv_full.measure_activations(split.images, checkpoint, CPU, 5)
    positions, chosen = activations["conv4_position"], np.array([7, 0, 3])
    threads = torch.get_num_threads()
    found = deconv_full.measure_projections(split.images, chosen, positions, checkpoint, CPU, 2, 4)
    assert torch.get_num_threads() == threads
    for n, image in enumerate(chosen):
        batch = normalise(torch.from_numpy(split.images[[image]]), checkpoint.mean, checkpoint.std)
        features = checkpoint.net.features(batch)
        for filter_ in range(8):
            row, column = positions[image, filter_].tolist()
            frame = deconv.project_unit(checkpoint.net, features, 3, filter_, row, column).numpy()
            magnitude = np.abs(frame.astype(np.float64)).sum(axis=0)
            above = magnitude[magnitude > 0]
            assert found["nonzero_count"][n, filter_] == pytest.approx(len(above), abs=2)
            assert found["mean"][n, filter_] == pytest.approx(above.mean() if len(above) else 0, rel=1e-3)
            assert found["max"][n, filter_] == pytest.approx(magnitude.max(), rel=1e-4)
            assert found["variance"][n, filter_] == pytest.approx(magnitude.var(), rel=1e-3, abs=1e-9)


def test_bfloat16_is_near_float32_and_no_other_arithmetic(make_net: MakeNet, split: Split) -> None:
    checkpoint = make_checkpoint(make_net())
    activations = deconv_full.measure_activations(split.images, checkpoint, CPU, 12)
    arguments = split.images, np.arange(12), activations["conv4_position"], checkpoint, CPU, 12, 32
    exact = deconv_full.measure_projections(*arguments)
    rounded = deconv_full.measure_projections(*arguments, precision=torch.bfloat16)
    for name in ("mean", "max"):
        fires = exact[name] > 0
        error = np.abs(rounded[name] - exact[name])[fires] / exact[name][fires]
        assert 0 < np.median(error) < 0.02


def test_results_of_a_stride_are_put_side_by_side() -> None:
    parts = torch.arange(2 * 3 * 4 * 2 * 2 * 3.0).view(2, 3, 4, 12)  # stride 2, three channels
    together = deconv_full.interleave(parts, 2)
    assert together.shape == (2, 6, 8, 3)
    for row, column, channel in ((0, 0, 0), (3, 5, 2), (5, 0, 1)):
        part = (row % 2 * 2 + column % 2) * 3 + channel
        assert together[1, row, column, channel] == parts[1, row // 2, column // 2, part]


def test_evolution_ends_in_the_top_projection_of_the_last_snapshot(make_net: MakeNet, split: Split) -> None:
    first, last = make_checkpoint(make_net(seed=1)), make_checkpoint(make_net(seed=2))
    found = deconv_full.project_evolution(split, [first, last], 3, CPU, 5, 4)
    activations = deconv_full.measure_activations(split.images, last, CPU, 5)
    top = deconv_full.project_top(split, last, activations, CPU, 1, 5, 4)
    for filters, layer in zip((5, 6, 7, 8), LAYERS, strict=True):
        numbers, projections = found[layer]
        assert numbers.tolist() == [0, (filters - 1) // 2, filters - 1]
        assert projections.shape[:3] == (3, 2, 3)
        assert (projections[:, 1] == top[f"{layer}_projection"][numbers, 0]).all()
        assert not np.array_equal(projections[:, 0], projections[:, 1])


def test_snapshots_of_another_training_are_not_taken(make_net: MakeNet) -> None:
    info: dict[str, Any] = {"dataset": "stl10", "class_names": list("abcdefghij"), "mean": [0.4] * 3}
    info |= {"std": [0.25] * 3, "seed": 0, "metrics": {"test_accuracy": 0.1}}
    folder = Path("outputs/snapshots")
    checkpoint = make_checkpoint(make_net(seed=2))
    assert deconv_full.read_snapshots(folder, checkpoint, CPU) == []
    for epoch in (1000, 200, 9):  # in the order of names 009, 1000, 200
        save_checkpoint(folder / f"epoch_{epoch:03d}.pth", make_net(seed=epoch), epochs=epoch, **info)
    assert deconv_full.read_snapshots(folder, checkpoint, CPU) == []
    ended = make_checkpoint(make_net(seed=1000))
    assert [s.epochs for s in deconv_full.read_snapshots(folder, ended, CPU)] == [9, 200, 1000]


def test_a_dead_filter_has_no_top_images_and_empty_statistics(make_net: MakeNet, split: Split) -> None:
    net = make_net()
    net.blocks[3].bn.weight[2], net.blocks[3].bn.bias[2] = 0, -1  # never above zero
    checkpoint = make_checkpoint(net)
    activations = deconv_full.measure_activations(split.images, checkpoint, CPU, 12)
    assert not activations["conv4_max"][:, 2].any() and not activations["conv4_position"][:, 2].any()
    found = deconv_full.project_top(split, checkpoint, activations, CPU, 9, 12, 32)
    assert (found["conv4_image"][2] == -1).all() and not found["conv4_projection"][2].any()
    positions = activations["conv4_position"]
    statistics = deconv_full.measure_projections(
        split.images, np.arange(12), positions, checkpoint, CPU, 12, 32
    )
    assert all(not statistics[name][:, 2].any() for name in statistics)


def test_the_first_images_of_each_class_are_chosen() -> None:
    labels = np.array([1, 0, 1, 1, 0, 2])
    assert deconv_full.first_of_each_class(labels, 2).tolist() == [0, 1, 2, 4, 5]
    assert deconv_full.first_of_each_class(labels, None).tolist() == list(range(6))


def test_settings_out_of_range_are_refused_before_any_work(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"outputs/CNN.pth not found: run `uv run train_CNN.py` first"):
        deconv_full.main()
    info: dict[str, Any] = {"mean": [0.4] * 3, "std": [0.25] * 3, "seed": 0, "epochs": 0}
    names = [f"class {k}" for k in range(10)]
    metrics = {"test_accuracy": 0.1}
    save_checkpoint(
        Path("outputs/CNN.pth"), make_net(), dataset="stl10", class_names=names, metrics=metrics, **info
    )
    for name, value, message in (
        ("N_TOP", 31, "N_TOP is 31; expected 1 to 30"),
        ("N_TOP", 0, "N_TOP is 0"),
        ("IMAGES_PER_CLASS", 0, "IMAGES_PER_CLASS is 0"),
        ("BATCH_SIZE", 0, "BATCH_SIZE is 0"),
        ("PRECISION", "half", "PRECISION is 'half'; expected float32 or bfloat16"),
        ("PRECISION", None, "PRECISION is None; expected float32 or bfloat16"),
        ("PRECISION", [1], r"PRECISION is \[1\]; expected float32 or bfloat16"),
        ("N_TOP", "nine", "N_TOP is 'nine'; expected a whole number from 1 to"),
        ("N_TOP", 9.0, "N_TOP is 9.0; expected a whole number from 1 to"),
        ("IMAGES_PER_CLASS", "all", r"IMAGES_PER_CLASS is 'all'; expected a whole number"),
        ("IMAGES_PER_CLASS", 1.5, r"IMAGES_PER_CLASS is 1.5; expected a whole number"),
        ("BATCH_SIZE", "32", "BATCH_SIZE is '32'; expected a whole number from 1 to"),
        ("CHUNK", 0, "CHUNK is 0; expected a whole number from 1 to"),
        ("CHUNK", True, "CHUNK is True; expected a whole number from 1 to"),
        ("EVOLUTION_FILTERS", -1, "EVOLUTION_FILTERS is -1; expected a whole number from 0 to"),
        ("EVOLUTION_IMAGES", 0, "EVOLUTION_IMAGES is 0; expected a whole number from 1 to"),
        ("FILTERS_PER_PAGE", 0, "FILTERS_PER_PAGE is 0; expected a whole number from 1 to 256"),
        ("FILTERS_PER_PAGE", 10_000, "FILTERS_PER_PAGE is 10000; expected a whole number from 1 to 256"),
        ("OUTPUTS", None, "OUTPUTS is None; expected a path"),
        ("DATA_DIR", 3, "DATA_DIR is 3; expected a path"),
        ("DEVICE", "abacus", "DEVICE is 'abacus'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(deconv_full, name, value)
            with pytest.raises(SystemExit, match=message):
                deconv_full.main()
    assert [path.name for path in Path("outputs").iterdir()] == ["CNN.pth"]


def test_an_interruption_ends_in_one_line_and_leaves_whole_files(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info: dict[str, Any] = {"mean": [0.4] * 3, "std": [0.25] * 3, "seed": 0, "epochs": 0}
    names = [f"class {k}" for k in range(10)]
    save_checkpoint(
        Path("outputs/CNN.pth"),
        make_net(),
        dataset="stl10",
        class_names=names,
        metrics={"test_accuracy": 0.1},
        **info,
    )

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(deconv_full, "project_top", interrupt)
    with pytest.raises(SystemExit, match="interrupted"), plain_errors():
        deconv_full.main()
    left = sorted(path.name for path in Path("outputs").rglob("*"))
    assert left == ["CNN.pth", "activations.npz", "deconv"]  # the folder of pages, empty


def save_untrained(path: Path, net: CNN) -> None:
    """Write a checkpoint of the tiny set with the weights as they are."""
    info: dict[str, Any] = {"mean": [0.4] * 3, "std": [0.25] * 3, "seed": 0, "epochs": 0}
    names, metrics = [f"class {k}" for k in range(10)], {"test_accuracy": 0.1}
    save_checkpoint(path, net, dataset="stl10", class_names=names, metrics=metrics, **info)


def test_a_damaged_snapshot_is_named_before_the_work_and_left_out(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deconv_full, "IMAGES_PER_CLASS", 1)
    monkeypatch.setattr(deconv_full, "draw_pages", lambda *_: [Path("page.png")])  # saves seconds
    for name in ("CNN.pth", "snapshots/epoch_001.pth", "snapshots/epoch_002.pth"):
        save_untrained(Path("outputs") / name, make_net())
    damaged, figure = Path("outputs/snapshots/epoch_001.pth"), Path("outputs/feature_evolution.png")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    figure.write_text("of an earlier training")
    deconv_full.main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("going on without snapshots: outputs/snapshots/epoch_001.pth is damaged")
    assert last == "next: uv run analyse_projections.py" and not figure.exists()


def test_a_network_whose_last_layer_is_dead_gives_whole_files(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = make_net()
    net.blocks[3].bn.weight.zero_()
    net.blocks[3].bn.bias.fill_(-1)
    save_untrained(Path("outputs/CNN.pth"), net)
    most = {"N_TOP": 30, "BATCH_SIZE": 1_000, "CHUNK": 100_000}
    for name, value in {**most, "IMAGES_PER_CLASS": 1_000}.items():  # more than a class has: all of it
        monkeypatch.setattr(deconv_full, name, value)
    deconv_full.main()
    out = capsys.readouterr().out
    assert "conv4:   8 filters, 8 dead, firing in 0.0% of images" in out and "0 projections of conv4" in out
    with np.load("outputs/projection_statistics.npz") as statistics:
        assert len(statistics["image"]) == 30 and not statistics["nonzero_count"].any()
    with np.load("outputs/projections.npz") as top:
        assert top["conv1_image"].shape == (5, 30) and (top["conv4_image"] == -1).all()


def test_ctrl_c_does_not_wait_for_queued_work(
    make_net: MakeNet, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def slow(projections: torch.Tensor, _: int) -> torch.Tensor:
        done.append(1)
        time.sleep(0.02)
        return torch.zeros(len(projections), 4)

    class Interrupted(ThreadPoolExecutor):
        def map(self, function: Any, *iterables: Any, **_: Any) -> Any:  # type: ignore[override]
            for arguments in zip(*iterables, strict=True):
                self.submit(function, *arguments)
            raise KeyboardInterrupt

    monkeypatch.setattr(deconv_full, "magnitude_statistics", slow)
    monkeypatch.setattr(deconv_full, "ThreadPoolExecutor", Interrupted)
    checkpoint, positions = make_checkpoint(make_net()), np.zeros((12, 8, 2), np.int16)
    with pytest.raises(KeyboardInterrupt):
        deconv_full.measure_projections(split.images, np.arange(12), positions, checkpoint, CPU, 12, 1)
    at_once = len(done)
    time.sleep(0.1)
    assert len(done) == at_once < 30  # of about 90


class Recorder(TorchDispatchMode):
    """Notes which operators make tensors on the device "meta", and of which types."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.made.add((str(func.overloadpacket), tensor.dtype))
        return result


@pytest.mark.parametrize("config", CONFIGS[:1] + CONFIGS[4:5])
def test_nothing_leaves_the_device_but_two_numbers_a_group_and_nothing_there_is_float64(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch, config: Any
) -> None:
    # The device "meta" computes shapes only and refuses to give a number out, so a copy to the CPU raises.
    numbers: list[int] = []

    def first_unit(_: torch.Tensor) -> int:
        numbers.append(0)
        return 0

    with monkeypatch.context() as patch, Recorder() as recorder, torch.device("meta"):
        patch.setattr(torch.Tensor, "__int__", first_unit)  # where the first unit of a group lies
        net = make_net(**config).to("meta")
        for layer in range(4):
            numbers.clear()
            features = net.features(torch.empty(7, 3, 96, 96))
            projector = Projector(net, layer)
            units = projector.units(features, torch.zeros(7, features[layer][0].shape[1], dtype=torch.int64))
            assert all(entry.is_meta for entry in units) and not numbers
            projections = projector.project(projector.masks(features), units)
            assert projections.is_meta and projections.shape[3] == 3
            assert len(numbers) == 2
            statistics = magnitude_statistics(projections, 96 * 96)
            assert statistics.is_meta and statistics.shape == (len(units.image), 4) and len(numbers) == 2
    assert "aten.convolution" in {name for name, _ in recorder.made}
    # Apple's GPUs have no float64, and torch's unpooling is not deterministic there or missing
    assert torch.float64 not in {dtype for _, dtype in recorder.made}
    assert not [name for name, _ in recorder.made if "unpool" in name]


def test_numbers_are_fetched_once_a_group_not_once_a_projection(
    make_net: MakeNet, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(make_net())
    activations = deconv_full.measure_activations(split.images, checkpoint, CPU, 12)
    counts: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        names = ("cpu", "numpy", "item", "tolist", "__int__", "__float__", "__bool__", "__index__")
        whole = {name: getattr(torch.Tensor, name) for name in names}
        for name in names:

            def counted(tensor: Any, *args: Any, name: str = name, **more: Any) -> Any:
                counts["fetched"] += 1
                return whole[name](tensor, *args, **more)

            patch.setattr(torch.Tensor, name, counted)
        groups = Projector.groups

        def counted_groups(*args: Any) -> Any:
            for group in groups(*args):
                counts["groups"] += 1
                counts["units"] += len(group)
                yield group

        patch.setattr(Projector, "groups", counted_groups)
        positions = activations["conv4_position"]
        deconv_full.measure_projections(split.images, np.arange(12), positions, checkpoint, CPU, 12, 10_000)
        assert counts["fetched"] <= 2 * counts["groups"] + 5 and counts["units"] > counts["groups"] + 5
        counts.clear()
        deconv_full.project_top(split, checkpoint, activations, CPU, 9, 12, 10_000)
        assert counts["fetched"] <= 7 * counts["groups"] + 20 < 2 * counts["units"]
