import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import NeuronDeconvolution
from conftest import MakeNet
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

import deconv
from CNN import CNN, frame_sizes, receptive_fields, save_checkpoint

CONFIGS: list[dict[str, Any]] = [
    {"kernel_sizes": (5, 3, 3, 3), "pool_sizes": (2, 2, 2, 2)},
    {"strides": (2, 1, 1, 1), "pool_sizes": (2, 2, 1, 4)},
]


@pytest.fixture
def make_net(make_net: MakeNet) -> MakeNet:
    """As in conftest.py, with all filters at random: of maps that are handed on much projects to zero."""

    def make(*args: Any, **kwargs: Any) -> CNN:
        net = make_net(*args, **kwargs)
        for block in net.blocks:
            block.conv.reset_parameters()
        return net

    return make


class Rectified(torch.autograd.Function):
    """ReLU whose way back passes max(incoming signal, 0), whatever the sign on the way up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        return signal.clamp(min=0)


def by_autograd(
    net: CNN, image: Tensor, layer: int, unit: tuple[int, int, int], relu: Callable[..., Any]
) -> Tensor:
    """Value of a pooled unit x its derivative with respect to the pixels, (3, rows, columns)."""
    image = image.clone().requires_grad_()
    x = image
    for block in net.blocks[: layer + 1]:
        x, _ = block.pool(relu(block.bn(block.conv(x))))
    value = x[0, unit[0], unit[1], unit[2]]
    (gradient,) = torch.autograd.grad(value, image)
    return (value.detach() * gradient)[0]


def units_to_check(pooled: Tensor) -> list[tuple[int, int, int]]:
    """Active units of an image, (filter, row, column): some in the middle, some at each border."""
    last = pooled.shape[-1] - 1
    places = [(0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2), (0, last // 2)]
    found = []
    for row, column in places:
        filter_ = int(pooled[0, :, row, column].argmax())
        if pooled[0, filter_, row, column] > 0:
            found.append((filter_, row, column))
    assert len(found) >= 4
    return found


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer", range(4))
def test_projection_is_value_times_rectified_derivative(make_net: MakeNet, config: Any, layer: int) -> None:
    net, image = make_net(dtype=torch.float64, **config), torch.randn(1, 3, 96, 96, dtype=torch.float64)
    features = net.features(image)
    for unit in units_to_check(features[layer][0]):
        expected = by_autograd(net, image, layer, unit, Rectified.apply)
        assert deviation(deconv.project_unit(net, features, layer, *unit), expected) < 1e-10


@pytest.mark.parametrize("layer", range(4))
def test_projection_equals_captum_times_the_activation(make_net: MakeNet, layer: int) -> None:
    for config in CONFIGS:
        net, image = make_net(**config).requires_grad_(True), torch.randn(1, 3, 96, 96)
        with torch.no_grad():
            features = net.features(image)
        pooled, switches = features[layer]
        size = frame_sizes(net)[1][layer]
        captum = NeuronDeconvolution(net, net.blocks[layer].relu)
        for filter_, row, column in units_to_check(pooled):
            place = divmod(int(switches[0, filter_, row, column]), size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # captum announces its hooks
                expected = captum.attribute(image, (filter_, *place))[0] * pooled[0, filter_, row, column]
            with torch.no_grad():
                found = deconv.project_unit(net, features, layer, filter_, row, column)
            assert deviation(found, expected) < 1e-5


def test_hand_worked_projection_of_a_4_x_4_image() -> None:
    net = CNN(
        filters=(1, 1, 1, 1), kernel_sizes=(3, 1, 1, 1), strides=(1, 1, 1, 1), pool_sizes=(2, 1, 1, 1)
    ).eval()
    net.requires_grad_(False)
    block = net.blocks[0]
    block.conv.weight.zero_()
    block.conv.weight[0, 0, 1, 1], block.conv.weight[0, 0, 1, 2] = (
        2,
        1,
    )  # red: twice a pixel + the one to its right
    norm = block.bn
    assert norm.running_mean is not None and norm.running_var is not None
    norm.eps, norm.weight[0], norm.bias[0] = 0, 6, 2
    norm.running_mean[0], norm.running_var[0] = 1, 4  # y = 6 (z - 1) / 2 + 2 = 3 z - 1
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0] = torch.tensor([[2.0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 0]])
    # z = [[4, 0, 0, 0], [0, 2, 4, 0], [0, 0, 0, 0], [3, 6, 0, 0]]; the largest 3 z - 1 of each region: 11 at
    # (0, 0), 11 at (1, 2), 17 at (3, 1), none above zero at the lower right
    (pooled, switches), *_ = net.features(image)
    assert pooled[0, 0].tolist() == [[11, 11], [17, 0]]
    assert switches[0, 0, 0].tolist() == [0, 6] and switches[0, 0, 1, 0] == 13
    only = torch.zeros_like(pooled)
    only[0, 0, 1, 0] = 17
    projection = deconv.project(net, 0, only, [switches], image_size=4)[0]
    expected = torch.zeros(3, 4, 4)
    expected[0, 3, 1], expected[0, 3, 2] = 3 * 2 * 17, 3 * 1 * 17  # gain x weight x activation
    assert torch.equal(projection, expected)


def wrong_by(make_net: MakeNet, project: Callable[..., Tensor]) -> float:
    """Largest deviation, over some conv4 units, of a way to project from the right answer."""
    net, image = make_net(dtype=torch.float64), torch.randn(1, 3, 96, 96, dtype=torch.float64)
    features = net.features(image)
    worst = 0.0
    for unit in units_to_check(features[3][0]):
        expected = by_autograd(net, image, 3, unit, Rectified.apply)
        worst = max(worst, deviation(project(net, image, features, unit), expected))
    return worst


def plain(net: CNN, image: Tensor, features: Any, unit: tuple[int, int, int]) -> Tensor:
    return deconv.project_unit(net, features, 3, *unit)


def test_the_check_passes_the_right_projection(make_net: MakeNet) -> None:
    assert wrong_by(make_net, plain) < 1e-10


def test_the_check_fails_without_the_gain(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deconv, "gain_filters", lambda block: block.conv.weight)
    assert wrong_by(make_net, plain) > 0.1


def test_the_check_fails_with_a_bias(make_net: MakeNet, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.nn.functional.conv_transpose2d
    monkeypatch.setattr(
        torch.nn.functional, "conv_transpose2d", lambda *args, **rest: right(*args, **rest) + 0.01
    )
    assert wrong_by(make_net, plain) > 0.01


def test_the_check_fails_with_rectified_pixels(make_net: MakeNet) -> None:
    assert wrong_by(make_net, lambda *args: plain(*args).clamp(min=0)) > 0.1


def test_the_check_fails_with_the_ordinary_gradient(make_net: MakeNet) -> None:
    assert wrong_by(make_net, lambda net, image, _, unit: by_autograd(net, image, 3, unit, torch.relu)) > 0.1


def test_unpooling_puts_each_maximum_back_where_it_came_from() -> None:
    maps = torch.randn(2, 3, 9, 9)  # the last row and column fall outside the pooling regions
    pooled, switches = torch.nn.functional.max_pool2d(maps, 2, return_indices=True)
    unpooled = deconv.unpool(pooled, switches, 9)
    assert torch.equal(unpooled[unpooled != 0], maps[unpooled != 0])
    assert int((unpooled != 0).sum()) == pooled.numel()
    assert torch.equal(torch.nn.MaxUnpool2d(2)(pooled, switches, output_size=(9, 9)), unpooled)


def test_a_projection_is_zero_outside_the_receptive_field(make_net: MakeNet) -> None:
    net, image = make_net(), torch.randn(1, 3, 96, 96)
    features = net.features(image)
    for layer in range(4):
        for unit in deconv.project_strongest(net, features, layer, 8):
            outside = np.ones((96, 96), bool)
            outside[max(unit.top, 0) : unit.top + unit.size, max(unit.left, 0) : unit.left + unit.size] = (
                False
            )
            assert not unit.projection[:, outside].any()
            assert unit.projection.any()
            assert unit.size == receptive_fields(net)[layer].size


def test_strongest_units_are_one_a_filter_strongest_first() -> None:
    pooled = torch.zeros(1, 4, 2, 3)
    pooled[0, 2, 1, 0], pooled[0, 2, 0, 1], pooled[0, 0, 0, 2] = 5, 4, 7
    assert deconv.strongest_units(pooled, 6) == [(0, 0, 2), (2, 1, 0)]
    assert deconv.strongest_units(pooled, 1) == [(0, 0, 2)]


def test_grey_is_zero_and_one_scale_serves_all_panels() -> None:
    projections = np.zeros((2, 3, 5, 5), np.float32)
    projections[0, :, 0, 0], projections[1, :, 0, 0] = 1, -0.5
    shown = deconv.displayed(projections)
    assert shown.shape == (2, 5, 5, 3)
    assert (shown[:, 1:] == 0.5).all()
    assert shown[0, 0, 0, 0] == pytest.approx(1) and shown[1, 0, 0, 0] == pytest.approx(0.25)
    assert (deconv.displayed(np.zeros((3, 2, 2), np.float32)) == 0.5).all()


def test_a_window_over_the_border_is_filled_up() -> None:
    frame = np.arange(96 * 96, dtype=np.float32).reshape(1, 96, 96).repeat(3, axis=0)
    window = deconv.window_of(frame, -2, 93, 5, -1)
    assert window.shape == (3, 5, 5)
    assert (window[:, :2] == -1).all() and (window[:, :, 3:] == -1).all()
    assert window[0, 2:, :3].tolist() == frame[0, :3, 93:].tolist()


def save_random_checkpoint(net: CNN) -> None:
    names = [f"class {k}" for k in range(10)]
    info: dict[str, Any] = {
        "mean": [0.4] * 3,
        "std": [0.25] * 3,
        "seed": 0,
        "epochs": 0,
        "metrics": {"test_accuracy": 0.1},
    }
    save_checkpoint(Path("outputs/CNN.pth"), net, dataset="stl10", class_names=names, **info)


def test_main_draws_a_picture_file_of_any_shape(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_checkpoint(make_net())
    to_pil_image(torch.randint(0, 256, (3, 50, 130), dtype=torch.uint8)).save("my picture.png")
    monkeypatch.setattr(deconv, "IMAGE", "my picture.png")
    monkeypatch.setattr(deconv, "DEVICE", "cpu")
    deconv.main()
    out = capsys.readouterr().out
    assert out.startswith("projecting my picture.png") and out.endswith("next: uv run deconv_full.py\n")
    assert Path("outputs/deconv_image.png").stat().st_size > 10_000


def test_pictures_that_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"IMAGE is 'none.png'; no such file"):
        deconv.load_picture(Path("none.png"))
    Path("text.png").write_text("no picture")
    with pytest.raises(SystemExit, match=r"IMAGE is 'text.png', which cannot be read"):
        deconv.load_picture(Path("text.png"))
    # a PNG whose header claims 60,000 x 60,000 pixels
    to_pil_image(torch.zeros(3, 4, 4, dtype=torch.uint8)).save("bomb.png")
    content = bytearray(Path("bomb.png").read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = __import__("zlib").crc32(content[12:29]).to_bytes(4, "big")
    Path("bomb.png").write_bytes(content)
    with pytest.raises(SystemExit, match=r"IMAGE is 'bomb.png'.*pixels"):
        deconv.load_picture(Path("bomb.png"))


def loaded(picture: Image.Image, name: str = "picture.png", **options: Any) -> Any:
    picture.save(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = deconv.load_picture(Path(name))
    assert found.shape == (3, 96, 96) and found.dtype == np.uint8 and found.flags.c_contiguous
    return found


def test_pictures_of_every_kind_are_read() -> None:
    ramp = np.linspace(0, 255, 96).round().astype(np.uint8)[None].repeat(96, axis=0)  # dark left, light right
    grey = Image.fromarray(ramp)
    assert (loaded(grey) == ramp).all()
    assert (loaded(grey.convert("RGB")) == ramp).all()
    assert (loaded(Image.fromarray(ramp.astype(np.uint16) * 257)) == ramp).all()
    assert (loaded(grey.convert("RGBA")) == ramp).all()
    assert (loaded(grey.convert("1")) == np.asarray(grey.convert("1")) * 255).all()
    assert abs(loaded(grey.convert("CMYK"), "picture.jpg", quality=100).astype(int) - ramp).mean() < 2
    assert abs(loaded(grey, "picture.webp", lossless=True).astype(int) - ramp).max() < 2
    frames = [grey.convert("P"), Image.new("P", (96, 96))]
    assert (loaded(frames[0], "picture.gif", save_all=True, append_images=frames[1:]) == ramp).all()


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (96, 96), (10, 20, 30, 255))
    clear.paste((10, 20, 30, 0), (0, 0, 48, 96))
    expected = np.full((3, 96, 96), 255)
    expected[:, :, 48:] = np.array([10, 20, 30])[:, None, None]
    assert (loaded(clear) == expected).all()
    # a palette with a transparency for each colour, as many icons have
    palette = Image.fromarray(np.arange(96, dtype=np.uint8)[None].repeat(96, axis=0) // 48, "P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (loaded(palette, transparency=b"\x00\xff") == expected).all()
    assert (loaded(Image.new("L", (96, 96), 7), transparency=7) == 255).all()


def test_a_picture_is_turned_as_its_camera_says_and_its_centre_is_kept() -> None:
    pixels = np.zeros((96, 200, 3), np.uint8)
    pixels[:48, 52:148, 0] = 255  # red above the middle
    pixels[:, 52:60, 2] = 255  # blue at the left of the centre
    pixels[:, :40] = 99
    picture = Image.fromarray(pixels)
    assert (loaded(picture) == pixels[:, 52:148].transpose(2, 0, 1)).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    turned = loaded(picture, exif=exif)
    assert (turned == np.rot90(pixels[:, 52:148], -1).transpose(2, 0, 1)).all()


def test_a_large_picture_is_reduced_and_a_small_one_enlarged() -> None:
    assert abs(loaded(Image.new("RGB", (900, 300), (9, 99, 199))).mean((1, 2)) - [9, 99, 199]).max() < 1
    assert (loaded(Image.new("RGB", (1, 1), (9, 99, 199))) == np.array([9, 99, 199])[:, None, None]).all()


def test_a_checkpoint_of_fewer_classes_than_the_data_is_refused(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info: dict[str, Any] = {"mean": [0.4] * 3, "std": [0.25] * 3, "seed": 0, "epochs": 0}
    info |= {"dataset": "stl10", "class_names": ["a", "b"], "metrics": {"test_accuracy": 0.1}}
    save_checkpoint(Path("outputs/CNN.pth"), make_net(classes=2), **info)
    with pytest.raises(SystemExit, match=r"outputs/CNN.pth names 2 classes, the data have more"):
        deconv.main()


def test_image_may_be_a_number_of_numpy_and_paths_may_be_text(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_checkpoint(make_net())
    settings = {"IMAGE": np.int64(2), "LAYER": "conv1", "CHECKPOINT": "outputs/CNN.pth", "DATA_DIR": "data"}
    for name, value in {**settings, "FIGURE": "outputs/deconv_image.png"}.items():
        monkeypatch.setattr(deconv, name, value)
    deconv.main()
    assert Path("outputs/deconv_image.png").exists()


def test_settings_out_of_range_are_refused(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"outputs/CNN.pth not found"):
        deconv.main()
    save_random_checkpoint(make_net())
    for name, value, message in (
        ("IMAGE", 30, "IMAGE is 30; the test split has images 0 to 29"),
        ("IMAGE", -1, "IMAGE is -1"),
        ("LAYER", "conv5", "LAYER is 'conv5'"),
        ("IMAGE", True, "IMAGE is True; expected an index"),
        ("N_FILTERS", 0, "N_FILTERS is 0"),
        ("N_FILTERS", 31, "N_FILTERS is 31; expected a whole number from 1 to 30"),
        ("N_FILTERS", 2.5, "N_FILTERS is 2.5"),
        ("N_FILTERS", "6", "N_FILTERS is '6'"),
        ("N_FILTERS", True, "N_FILTERS is True"),
        ("DEVICE", "abacus", "DEVICE is 'abacus'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(deconv, name, value)
            with pytest.raises(SystemExit, match=message):
                deconv.main()
    assert not Path("outputs/deconv_image.png").exists()


def test_one_layer_of_one_test_image_can_be_drawn(
    make_net: MakeNet, tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_checkpoint(make_net())
    monkeypatch.setattr(deconv, "IMAGE", 3)
    monkeypatch.setattr(deconv, "LAYER", "conv2")
    deconv.main()
    out = capsys.readouterr().out
    assert "conv2: strongest filters" in out and "conv3" not in out
