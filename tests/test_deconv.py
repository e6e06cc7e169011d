import doctest
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import NeuronDeconvolution, NeuronGradient, NeuronGuidedBackprop
from conftest import DEVICES, MakeNet, make_checkpoint, write_checkpoint
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

import deconv
from CNN import CNN, LAYERS, choose_device, load_checkpoint, receptive_fields
from load_data import Array, Split, load_split

CONFIGS: list[dict[str, Any]] = [  # even kernels, strides, rows that pooling or a stride leaves over
    {},
    {"pool_sizes": (2, 2, 1, 4)},
    {"strides": (1, 1, 1, 1)},
    {"kernel_sizes": (7, 5, 3, 1), "strides": (1, 1, 1, 1), "pool_sizes": (3, 2, 2, 2)},
    {"kernel_sizes": (7, 5, 3, 3), "strides": (2, 2, 1, 1), "pool_sizes": (3, 1, 2, 2)},
    {"kernel_sizes": (1, 3, 5, 7), "strides": (1, 1, 1, 1), "pool_sizes": (4, 1, 2, 3)},
    {"kernel_sizes": (5, 5, 5, 3), "strides": (2, 1, 2, 1), "pool_sizes": (1, 3, 1, 4)},
    {"kernel_sizes": (6, 4, 3, 3), "strides": (2, 2, 1, 1), "pool_sizes": (3, 1, 2, 2)},
    {"kernel_sizes": (4, 6, 3, 2), "strides": (1, 2, 1, 1), "pool_sizes": (3, 2, 2, 2)},
]


class Rectified(torch.autograd.Function):
    """ReLU whose way back passes max(incoming signal, 0), whatever the sign on the way up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        return signal.clamp(min=0)


def by_autograd(net: CNN, image: Tensor, layer: int, *unit: int, relu: Any = Rectified.apply) -> Tensor:
    """Value of a pooled unit x its derivative with respect to the pixels, (3, rows, columns)."""
    image = image.clone().requires_grad_()
    x = image
    for block in net.blocks[: layer + 1]:
        x = relu(block.pool(block.bn(block.conv(x)))[0])
    value = x[0][unit]
    (gradient,) = torch.autograd.grad(value, image)
    return (value.detach() * gradient)[0]


def units_to_check(pooled: Tensor) -> list[tuple[int, int, int]]:
    """Active units, (filter, row, column): the strongest at each corner, at a border and in the middle."""
    last_row = pooled.shape[-2] - 1
    last_column = pooled.shape[-1] - 1
    corners = [(0, 0), (0, last_column), (last_row, 0), (last_row, last_column)]
    positions = [*corners, (last_row // 2, last_column // 2), (0, last_column // 2)]
    strongest = [(int(pooled[0, :, row, column].argmax()), row, column) for row, column in positions]
    active = [unit for unit in strongest if pooled[0][unit] > 0]
    assert len(active) >= 4
    return active


def deviation(projection: Tensor, expected: Tensor) -> float:
    return float((projection - expected).abs().max() / expected.abs().max())


def wrong_by(net: CNN, image: Tensor, layer: int, way: Callable[..., Tensor] = deconv.project_unit) -> float:
    """Largest deviation, over some units, of a way to project from value x rectified derivative."""
    units = [(net, image, layer, *unit) for unit in units_to_check(net.features(image)[layer][0])]
    return max(deviation(way(*unit), by_autograd(*unit)) for unit in units)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer", range(4))
def test_a_projection_is_value_times_rectified_derivative(make_net: MakeNet, config: Any, layer: int) -> None:
    net = make_net(dtype=torch.float64, **config)
    assert wrong_by(net, torch.randn(1, 3, 96, 96, dtype=torch.float64), layer) < 1e-10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", range(4))
def test_a_projection_in_float32_is_exact_to_rounding_on_every_device(
    make_net: MakeNet, device: str, layer: int
) -> None:
    choose_device(device)  # settles how exactly this device counts
    exact = make_net().double()
    net = make_net().to(device)
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    for unit in units_to_check(exact.features(image)[layer][0]):
        projection = deconv.project_unit(net, image.float().to(device), layer, *unit).cpu()
        assert deviation(projection, by_autograd(exact, image, layer, *unit)) < 1e-5


@pytest.mark.parametrize("size", [(64, 81), (130, 96)])
def test_images_of_other_sizes_are_projected_too(make_net: MakeNet, size: tuple[int, int]) -> None:
    net = make_net(dtype=torch.float64)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    for layer in range(4):
        assert wrong_by(net, image, layer) < 1e-10


transpose = F.conv_transpose2d
project_unit = deconv.project_unit
with_bias = patch.object(F, "conv_transpose2d", lambda *args, **more: transpose(*args, **more) + 0.01)
WRONG: dict[str, Callable[..., Tensor]] = {
    "gain dropped": patch.object(deconv, "fold_batch_norm", lambda block: block.conv.weight)(project_unit),
    "bias added": with_bias(project_unit),
    "pixels rectified": lambda *unit: project_unit(*unit).clamp(min=0),
    "ordinary gradient": partial(by_autograd, relu=torch.relu),
}


@pytest.mark.parametrize("way", WRONG)
def test_a_wrong_projection_fails_the_check(make_net: MakeNet, way: str) -> None:
    net = make_net(dtype=torch.float64)
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    assert wrong_by(net, image, 3, WRONG[way]) > 0.01


@pytest.mark.parametrize("config", CONFIGS[:2])
@pytest.mark.parametrize("layer", range(4))
def test_a_projection_is_captums_times_the_activation(make_net: MakeNet, config: Any, layer: int) -> None:
    net = make_net(dtype=torch.float64, **config)
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    pooled, _ = net.features(image)[layer]
    captum = NeuronDeconvolution(net, net.blocks[layer].relu)
    for unit in units_to_check(pooled):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum announces its hooks
            expected = captum.attribute(image, unit)[0] * pooled[0][unit]
        assert deviation(deconv.project_unit(net, image, layer, *unit), expected) < 1e-10


def test_backpropagation_with_three_rules_equals_three_references(make_net: MakeNet) -> None:
    net = make_net(dtype=torch.float64)
    images = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    filters, rows, columns = np.array([[5, 0, 3], [0, 2, 1], [2, 1, 0]])
    references = {
        "deconvnet": NeuronDeconvolution,
        "gradient": NeuronGradient,
        "guided": NeuronGuidedBackprop,
    }
    for layer in (1, 3):
        gradients = deconv.backpropagate(net, images, layer, filters, rows, columns, "gradient")
        for rule, reference in references.items():
            maps = deconv.backpropagate(net, images, layer, filters, rows, columns, rule)
            attribution = reference(net, net.blocks[layer].relu)
            for k, unit in enumerate(zip(filters.tolist(), rows.tolist(), columns.tolist(), strict=True)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # captum announces its hooks
                    expected = attribution.attribute(images[k : k + 1].clone(), unit)
                if net.features(images[k : k + 1])[layer][0][0][unit] > 0:
                    torch.testing.assert_close(maps[k], expected[0], rtol=1e-9, atol=1e-12)
                    assert rule == "gradient" or (maps[k] - gradients[k]).abs().max() > 1e-6


def test_hand_worked_projection_of_a_4_x_4_image() -> None:
    sizes: dict[str, Any] = {"kernel_sizes": (3, 1, 1, 1), "strides": (1,) * 4, "pool_sizes": (2, 1, 1, 1)}
    net = CNN(filters=(1, 1, 1, 1), **sizes).eval().requires_grad_(False)
    conv = net.blocks[0].conv
    norm = net.blocks[0].bn
    conv.weight.zero_()
    conv.weight[0, 0, 1, 1:] = torch.tensor([2.0, 1])  # z: red, twice a pixel + the one to its right
    assert norm.running_mean is not None and norm.running_var is not None
    norm.eps = 0
    norm.weight[0] = 6
    norm.bias[0] = 2
    norm.running_mean[0] = 1
    norm.running_var[0] = 4  # y = 6 (z - 1) / 2 + 2 = 3 z - 1
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0] = torch.tensor([[2.0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 0]])
    # z = [[4, 0, 0, 0], [0, 2, 4, 0], [0, 0, 0, 0], [3, 6, 0, 0]]; the largest 3 z - 1 of each region: 11 at
    # (0, 0), 11 at (1, 2), 17 at (3, 1), none above zero at the lower right
    pooled, switches = net.features(image)[0]
    assert pooled[0, 0].tolist() == [[11, 11], [17, 0]]
    assert switches[0, 0, 0].tolist() == [0, 6] and switches[0, 0, 1, 0] == 13
    expected = torch.zeros(3, 4, 4)
    expected[0, 3, 1] = 3 * 2 * 17  # gain x weight x activation
    expected[0, 3, 2] = 3 * 1 * 17
    assert torch.equal(deconv.project_unit(net, image, 0, 0, 1, 0), expected)
    (unit,) = deconv.strongest_units(net, image, 0, 6)
    assert unit[:6] == (0, 17, 1, 0, 2, 0)  # its window begins at row 2, column 0
    assert (unit.projection == expected.numpy()).all()


def test_unpooling_puts_each_maximum_back_where_it_came_from() -> None:
    net = CNN((3, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (2, 1, 1, 1)).eval().requires_grad_(False)
    net.blocks[0].conv.weight.copy_(torch.eye(3)[:, :, None, None])  # conv1 hands the image on
    net.blocks[0].bn.eps = 0
    image = torch.rand(1, 3, 9, 9) + 0.1  # the last row and column fall outside the pooling regions
    pooled, switches = net.features(image)[0]
    projection = deconv.project(net, 0, pooled, [switches], (9, 9))
    kept = projection != 0
    assert torch.equal(projection[kept], image[kept]) and int(kept.sum()) == 3 * 4 * 4
    assert torch.equal(F.max_pool2d(projection, 2), pooled)


def test_switches_of_images_of_another_size_are_refused(make_net: MakeNet) -> None:
    net = make_net()
    features = net.features(torch.randn(1, 3, 64, 96))
    switches = [switches for _, switches in features]
    message = r"switches of conv1 are \(16, 24\); images of \(96, 96\) pixels have \(24, 24\)"
    with pytest.raises(ValueError, match=message):
        deconv.project(net, 3, features[3][0], switches, (96, 96))


@pytest.mark.parametrize("layer", range(4))
def test_a_projection_is_zero_outside_the_receptive_field(make_net: MakeNet, layer: int) -> None:
    net = make_net()
    size = receptive_fields(net)[layer].size
    units = deconv.strongest_units(net, torch.randn(1, 3, 96, 96), layer, 8)
    for unit in units:
        inside = np.zeros((96, 96), bool)
        inside[max(unit.top, 0) : unit.top + size, max(unit.left, 0) : unit.left + size] = True
        assert unit.projection.any() and not unit.projection[:, ~inside].any()
    assert units


def test_the_strongest_unit_of_each_firing_filter_is_taken_strongest_first(make_net: MakeNet) -> None:
    net = make_net()
    image = torch.randn(1, 3, 96, 96)
    net.blocks[1].bn.weight[2] = 0  # filter 2 of conv2 never fires
    net.blocks[1].bn.bias[2] = -1
    peaks = net.features(image)[1][0][0].amax(dim=(1, 2)).tolist()
    firing = sorted((-peak, number) for number, peak in enumerate(peaks) if peak > 0)
    units = deconv.strongest_units(net, image, 1, 6)
    assert [(-unit.value, unit.filter) for unit in units] == firing and 2 not in [u.filter for u in units]
    assert [unit.filter for unit in deconv.strongest_units(net, image, 1, 2)] == [f for _, f in firing[:2]]


def test_grey_is_zero_and_one_scale_that_outliers_do_not_set_serves_all_panels() -> None:
    values = np.array([0] * 9_000 + [-1] * 500 + [2] * 499 + [1_000.0])  # zeros do not count
    assert deconv.robust_scale(values) == 2 and deconv.robust_scale(np.zeros(5)) == 1
    projections = np.zeros((2, 3, 100, 100))
    projections[0] = values.reshape(100, 100)
    projections[1, :, 0, 0] = 1
    shown = deconv.displayed(projections)
    assert shown.shape == (2, 100, 100, 3) and (shown[0, :90] == 0.5).all() and shown[1, 0, 0, 0] == 0.75
    assert shown[0, -1, [0, -2, -1], 0].tolist() == [1, 1, 1] and shown[0, 90, 0, 0] == 0.25


def test_a_window_over_the_border_is_filled_up() -> None:
    frame = np.arange(96 * 96).reshape(1, 96, 96).repeat(3, axis=0)
    window = deconv.crop(frame, -2, 93, 5, -1)
    assert window.shape == (3, 5, 5) and (window[:, :2] == -1).all() and (window[:, :, 3:] == -1).all()
    assert (window[:, 2:, :3] == frame[:, :3, 93:]).all()
    assert (deconv.crop(frame, 40, 50, 5, -1) == frame[:, 40:45, 50:55]).all()


def test_the_figure_shows_fields_projections_and_patches_and_says_where_nothing_fires() -> None:
    image = np.random.default_rng(0).integers(0, 255, (3, 96, 96)).astype(np.uint8)
    projection = np.zeros((3, 96, 96), np.float32)
    projection[0, 0, 0] = 2
    unit = deconv.Unit(filter=7, value=1.5, row=0, column=0, top=-2, left=-1, projection=projection)
    figure = deconv.draw(image, {"conv1": [unit], "conv2": []}, [5, 15], "heading")
    plt.close(figure)
    whole, panel, patch, without = figure.axes
    assert whole.get_title() == "conv1, receptive field 5 px" and panel.get_title() == "1: filter 7\n1.50"
    assert without.get_title() == "conv2, receptive field 15 px\nno filter fires" and not without.patches
    (frame,) = whole.patches
    assert isinstance(frame, Rectangle)
    assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == (-1.5, -2.5, 5, 5)
    shown, pixels = (np.asarray(ax.images[0].get_array()) for ax in (panel, patch))
    assert shown[2, 1].tolist() == [1, 0.5, 0.5] and (shown == 0.5).sum() == 74  # grey but for one value
    assert (pixels[:2] == 1).all() and (pixels[:, :1] == 1).all()  # white outside
    assert pixels[2:, 1:] == pytest.approx(image[:, :3, :4].transpose(1, 2, 0) / 255)


def loaded(picture: Image.Image, name: str = "picture.png", **options: Any) -> Array:
    picture.save(name, **options)
    pixels = deconv.load_picture(name)
    assert pixels.shape == (3, 96, 96) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    return pixels.astype(int)


RAMP = np.linspace(0, 255, 96).round().astype(np.uint8)[None].repeat(96, axis=0)  # dark left, light right
GREY = Image.fromarray(RAMP)
PICTURES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "grey": (GREY, "png", {}),
    "16 bits": (Image.fromarray(RAMP.astype(np.uint16) * 257), "png", {}),
    "12 of 16 bits used": (Image.fromarray(RAMP.astype(np.uint16) * 16), "png", {}),
    "real numbers": (Image.fromarray(RAMP.astype(np.float32) * 1_000), "tiff", {}),
    "ten times as large": (GREY.resize((960, 960), Image.Resampling.NEAREST), "png", {}),
    "CMYK": (GREY.convert("CMYK"), "jpg", {"quality": 100}),
    "first of two frames": (GREY, "gif", {"save_all": True, "append_images": [Image.new("L", (96, 96))]}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_kind_are_read(name: str) -> None:
    picture, ending, options = PICTURES[name]
    difference = abs(loaded(picture, f"picture.{ending}", **options) - RAMP)
    assert difference.mean() < 2 if name in ("CMYK", "ten times as large") else not difference.any()


def test_what_is_transparent_is_white() -> None:
    expected = np.full((3, 96, 96), 255)
    expected[:, :, 48:] = np.array([10, 20, 30])[:, None, None]
    clear = Image.new("RGBA", (96, 96), (10, 20, 30, 255))
    clear.paste((10, 20, 30, 0), (0, 0, 48, 96))
    assert (loaded(clear) == expected).all()
    # a palette with a transparency for each colour, as many icons have
    palette = Image.fromarray(np.arange(96, dtype=np.uint8)[None].repeat(96, axis=0) // 48, "P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (loaded(palette, transparency=b"\x00\xff") == expected).all()
    assert (loaded(Image.new("L", (96, 96), 7), transparency=7) == 255).all()


def test_a_picture_is_turned_as_its_camera_says_and_its_centre_is_kept() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 200, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    assert (loaded(picture) == pixels[:, 52:148].transpose(2, 0, 1)).all()
    exif[0x0112] = 6  # orientation: lies on its left side
    assert (loaded(picture, exif=exif) == np.rot90(pixels[:, 52:148], -1).transpose(2, 0, 1)).all()


def test_a_missing_file_a_folder_and_a_file_that_is_no_picture_are_refused() -> None:
    with pytest.raises(SystemExit, match=f"IMAGE is 'none.png'; no such file in {Path.cwd()}: give"):
        deconv.load_picture("none.png")
    Path("text.png").write_text("no picture")
    with pytest.raises(SystemExit, match=r"IMAGE is 'text.png', which cannot be read as a picture"):
        deconv.load_picture("text.png")
    Path("folder").mkdir()
    with pytest.raises(SystemExit, match=r"^IMAGE is 'folder', which is a folder: give one of the pictures"):
        deconv.load_picture(Path("folder"))
    with pytest.raises(SystemExit, match=r"^IMAGE is 'https://a.org/b.png': download the picture first"):
        deconv.load_picture("https://a.org/b.png")


def test_the_example_in_the_docstring_holds() -> None:
    finder = doctest.DocTestFinder()
    (example,) = finder.find(
        deconv.project, "project", globs={"torch": torch, "F": F, "project": deconv.project}
    )
    assert len(example.examples) >= 6 and doctest.DocTestRunner().run(example).failed == 0


@pytest.fixture
def figures(make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """A checkpoint and data for `main`; the figures it would have written."""
    net = make_net()
    net.classifier.weight.zero_()
    net.classifier.bias.copy_(torch.eye(10)[3])  # class 3, with e / (e + 9) = 23 %
    write_checkpoint(net)
    Image.new("RGB", (130, 50), (9, 99, 199)).save("my picture.png")
    written: list[Figure] = []
    monkeypatch.setattr(deconv, "save_figure", lambda _, figure: written.append(figure))
    monkeypatch.setattr(deconv, "DEVICE", "cpu")
    yield written
    plt.close("all")


@pytest.mark.parametrize(
    ("image", "layers", "heading"),
    [
        (3, ["conv2"], "test image 3 of STL-10, class class 4, predicted class 3 (23 %); "),
        ("my picture.png", LAYERS, "my picture.png, predicted class 3 (23 %); "),
        (Path("my picture.png"), ["conv1"], "my picture.png, predicted class 3 (23 %); "),
    ],
)
def test_main_draws_the_chosen_layers_of_a_test_image_or_a_picture(
    figures: list[Figure], monkeypatch: pytest.MonkeyPatch, image: Any, layers: Any, heading: str
) -> None:
    monkeypatch.setattr(deconv, "IMAGE", image)
    monkeypatch.setattr(deconv, "LAYER", layers[0] if len(layers) == 1 else "all")
    deconv.main()
    titles = [ax.get_title().split(",")[0] for ax in figures[0].axes]
    assert [title for title in titles if title in LAYERS] == list(layers)
    assert figures[0].get_suptitle().startswith(heading)


def test_chosen_filters_are_drawn_and_their_arrays_kept(
    figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(Path("outputs/CNN.pth"))
    images = load_split("stl10", Path("data"), "test").images
    for name, value in (("IMAGE", 3), ("LAYER", "conv3"), ("SHOW_FILTERS", [6, 3])):
        monkeypatch.setattr(deconv, name, value)
    deconv.main()
    assert [ax.get_title()[:11] for ax in figures[0].axes if ": filter" in ax.get_title()] == [
        "1: filter 6", "2: filter 3",
    ]  # fmt: skip
    arrays = np.load("outputs/deconv_image.npz")
    assert arrays["conv3_filter"].tolist() == [6, 3] and (arrays["image"] == images[3]).all()
    batch = checkpoint.net.normalise(torch.from_numpy(images[[3]]))
    pooled = checkpoint.net.features(batch)[2][0][0].numpy()
    for k, number in enumerate([6, 3]):
        row, column = arrays["conv3_position"][k].tolist()
        assert arrays["conv3_value"][k] == pooled[number, row, column] == pooled[number].max()
        expected = deconv.project_unit(checkpoint.net, batch, 2, number, row, column)
        np.testing.assert_array_equal(arrays["conv3_projection"][k], expected)
        top, left = arrays["conv3_origin"][k]
        rows, columns = np.nonzero(arrays["conv3_projection"][k].any(axis=0))
        size = receptive_fields(checkpoint.net)[2].size
        assert top <= rows.min() and rows.max() < top + size and left <= columns.min()


def test_a_picture_is_projected_without_the_data_set_but_a_test_image_is_not(
    figures: list[Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deconv, "DATA_DIR", Path("elsewhere"))
    with pytest.raises(SystemExit, match="elsewhere"):
        deconv.main()
    assert not figures
    monkeypatch.setattr(deconv, "IMAGE", "my picture.png")
    deconv.main()
    assert figures and deconv.LIVE_PAGE.is_file()
    assert "the live page is without test images: " in capsys.readouterr().out


def test_a_picture_of_ones_own_test_set_is_called_by_its_file() -> None:
    images = np.zeros((2, 3, 96, 96), np.uint8)
    test = Split(images, np.array([1, 0]), np.array(["b/one.png", "a/two.png"]))
    checkpoint = make_checkpoint(CNN(classes=2), dataset="folders", class_names=["a", "b"])
    picture = deconv.choose_image(1, checkpoint, test)
    assert picture.name == "test image 1 of your pictures, a/two.png" and picture.class_name == "a"


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize(
    ("layer", "chosen", "allowed"),
    [
        ("all", [1], "of one layer, set in LAYER"),
        ("conv3", "weakest", "0 to 6 of conv3"),
        ("conv3", [], "0 to 6 of conv3"),
        ("conv3", [7], "0 to 6 of conv3"),
    ],
)
def test_filters_that_do_not_exist_are_refused(
    monkeypatch: pytest.MonkeyPatch, layer: str, chosen: Any, allowed: str
) -> None:
    monkeypatch.setattr(deconv, "LAYER", layer)
    monkeypatch.setattr(deconv, "SHOW_FILTERS", chosen)
    message = f"SHOW_FILTERS is {chosen!r}; allowed are 'strongest' and a list of filters {allowed}"
    with pytest.raises(SystemExit, match=re.escape(message)):
        deconv.main()


@pytest.mark.usefixtures("figures")
def test_the_arrays_overwrite_no_other_stages_whatever_the_figure_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("outputs/projections.npz").write_text("of deconv_full.py")
    for name, value in (("FIGURE", "outputs/projections.png"), ("CHECKPOINT", "outputs/CNN.pth")):
        monkeypatch.setattr(deconv, name, value)
    deconv.main()
    assert Path("outputs/projections.npz").read_text() == "of deconv_full.py"
    assert "conv4_value" in np.load("outputs/deconv_projections.npz")
    assert deconv.arrays_path(Path("outputs/deconv_image.png")) == Path("outputs/deconv_image.npz")


def test_a_network_of_which_no_filter_fires_is_drawn(make_net: MakeNet, figures: list[Figure]) -> None:
    net = make_net()
    for block in net.blocks:
        block.bn.weight.zero_()
        block.bn.bias.fill_(-1)
    write_checkpoint(net)
    deconv.main()
    assert [ax.get_title().split("\n")[1] for ax in figures[0].axes] == ["no filter fires"] * 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("IMAGE", 30, "IMAGE is 30; the test split has images 0 to 29"),
        ("IMAGE", -1, "IMAGE is -1; the test split has images 0 to 29"),
        ("LAYER", "conv5", "LAYER is 'conv5'; this network has conv1, conv2, conv3, conv4"),
    ],
)
def test_settings_out_of_range_are_refused(
    figures: list[Figure], monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
) -> None:
    monkeypatch.setattr(deconv, name, value)
    with pytest.raises(SystemExit, match=message):
        deconv.main()
    assert not figures
