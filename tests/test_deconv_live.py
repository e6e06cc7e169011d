import base64
import html
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from conftest import NEEDS_CHROMIUM, make_checkpoint, random_net, run_in_page
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

from CNN import CNN, Checkpoint, load_checkpoint
from deconv import Picture, backpropagate, class_colours, page_json, text_colour_on, write_live_page
from load_data import STL10_CLASSES, Array, load_checkpoint_split, read_picture

RULES = ("deconvnet", "gradient", "guided")
SQUARE = {"top": -3, "left": 70, "side": 12}  # crosses the border
NAMES = ["</script><b>", "../x", "a&b=c#d?e/f%", "\"'`${1}", "cat", "dog", "cow"]


def luminance(colour: str) -> float:
    values = np.array(to_rgb(colour))
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_text_on_class_colours_is_readable() -> None:
    for colour in class_colours(10):
        low, high = sorted((luminance(colour), luminance(text_colour_on(colour))))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert text_colour_on("#ffffff") == "#000" and text_colour_on("#000000") == "#fff"


def test_json_in_a_page_is_never_read_as_html() -> None:
    content = {"</script><b>": ["<!--", np.nan, np.float32(1 / 3), np.int64(7), np.bool_(True), None]}
    encoded = page_json(content)
    assert "<" not in encoded
    assert json.loads(encoded) == {"</script><b>": ["<!--", None, 0.33333, 7, True, None]}


class Example(NamedTuple):
    """A page, what is in it, and what its script computed."""

    checkpoint: Checkpoint
    pixels: Array  # the first picture, uint8 (3, 96, 96)
    units: list[list[int]]  # layer, filter, row and column of three units of each layer
    answer: dict[str, Any]
    dropped: Array  # the picture that was dropped, as Python reads it


def three_units(pooled: Tensor) -> list[list[int]]:
    """The strongest unit of a layer, a middling one and the first one that fires: filter, row and column."""
    firing = pooled.nonzero()  # (units, 3)
    by_value = firing[pooled[pooled > 0].argsort()]
    return [by_value[-1].tolist(), by_value[len(by_value) // 2].tolist(), firing[0].tolist()]


# a script that is added to the page: what the page computes, and what it shows after each action of a visitor
SCRIPT = """
const encode = (values) => {
    const bytes = Array.from(new Uint8Array(values.buffer), (value) => String.fromCharCode(value));
    return btoa(bytes.join(""));
};
const answer = { shown: {} };
for (const [name, input] of [["whole", image], ["covered", cover(image, SQUARE)]]) {
    const pass = forward(input);
    const projections = UNITS.map(([layer, filter, row, column]) => RULES.map((rule) =>
        encode(project(pass, { layer, filter, row, column }, rule).at(-1).filtered)));
    const maps = pass.layers.map(({ pooled }) => encode(pooled));
    answer[name] = { projections, maps, logits: encode(pass.logits) };
}
const wait = () => new Promise((resolve) => setTimeout(resolve, 1));
const until = async (done) => {
    while (!done()) {
        forward(image);  // real work, because the clock of this browser runs on while a picture is decoded
        await wait();
    }
};
const press = (node, key) => node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const drop = (name, base64) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytesOf(base64)], name));
    dispatchEvent(new DragEvent("drop", { dataTransfer }));
};
const note = async (name) => {
    await wait();
    const tiles = [...page.tiles.children];
    answer.shown[name] = {
        answer: page.answer.textContent,
        classes: [...page.classes.rows].map((row) => row.cells[0].textContent),
        shares: [...page.classes.rows].map((row) => row.cells[2].textContent),
        probabilities: now.probabilities,
        order: tiles.map((tile) => tile.filter),
        current: tiles.filter((tile) => tile.querySelector("[aria-current]")).map((tile) => tile.filter),
        unit: page.name.textContent,
        activation: page.activation.rows[0].cells[2].textContent,
        way: page.way.innerText,
        square,
        message: page.message.textContent,
        tooWide: document.documentElement.scrollWidth > innerWidth,
    };
};
await note("start");
location.hash = "#conv2/3";
await note("address");
press(document.body, "ArrowRight");
await note("next");
location.hash = "#conv3/1/2/0";
await note("cell");
page.map.querySelector("[aria-current]").focus();
press(document.activeElement, "ArrowRight");
await note("right");
press(document.activeElement, "ArrowDown");
await note("down");
location.hash = "#conv3";  // its strongest unit
await note("strongest");
press(page.picture, "ArrowLeft");  // lays the square on the window
await until(() => now !== whole);
await note("laid");
const first = now;
press(page.picture, "ArrowLeft");
await until(() => now !== first);
await note("covered");
press(page.picture, "Escape");
await note("uncovered");
page.rules.elements.rule[1].click();
await note("gradient");
drop("notes <b>.txt", btoa("no picture"));
await until(() => page.message.textContent);
await note("no picture");
const before = whole;
drop("sky <b>.png", PICTURE);
await until(() => whole !== before);
await note("dropped");
answer.pixels = encode(shown.pixels);
answer.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
answer.links = [...document.querySelectorAll("[href]")].map((node) => node.getAttribute("href"));
answer.generated = !page.generated.hidden;
document.body.replaceChildren(JSON.stringify(answer));
"""


def write_page(path: Path, checkpoint: Checkpoint, pixels: Array) -> list[list[int]]:
    """Write a page that begins with a picture; return three units of each layer that fire in it."""
    write_live_page(path, checkpoint, [Picture(pixels, "noise <i>", None)], "explorer/index.html")
    net = checkpoint.net
    units = []
    for layer, (pooled, _) in enumerate(net.features(net.normalise(torch.from_numpy(pixels[None])))):
        units += [[layer, *unit] for unit in three_units(pooled[0])]
    return units


def visit(page: Path, units: list[list[int]], picture: Path) -> dict[str, Any]:
    """Return what the script finds."""
    content = base64.b64encode(picture.read_bytes()).decode()
    values = {"SQUARE": SQUARE, "UNITS": units, "RULES": RULES, "PICTURE": content}
    constants = "".join(f"const {name} = {json.dumps(value)};" for name, value in values.items())
    document = run_in_page(page, constants + SCRIPT)
    return dict(json.loads(html.unescape(document.split("<body>")[1].split("</body>")[0])))


def paint_picture(path: Path) -> None:
    """Write a picture that is wider than high and partly transparent."""
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (12, 20, 4), np.uint8))
    small.resize((300, 180), Image.Resampling.BICUBIC).save(path)


def other_net() -> CNN:
    """A network of another geometry, with batch norms that fit to noise, so that most filters fire."""
    sizes: dict[str, Any] = {"kernel_sizes": (5, 5, 5, 5), "strides": (1, 1, 1, 1)}
    net = random_net(**sizes, pool_sizes=(2, 2, 1, 2), head_size=1, classes=7)
    for block in net.blocks:
        block.bn.momentum = None  # plain means
        block.bn.reset_running_stats()
    noise = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (4, 3, 96, 96), np.uint8))
    net.train()(net.normalise(noise))
    return net.eval()


@pytest.fixture(scope="module", params=["pipeline", "other geometry"])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    if request.param == "pipeline":
        pipeline: Path = request.getfixturevalue("pipeline")
        checkpoint = load_checkpoint(pipeline / "outputs/CNN.pth")
    else:
        checkpoint = make_checkpoint(other_net(), class_names=NAMES, dataset="shapes")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96), np.uint8)
    folder = tmp_path_factory.mktemp("live")
    paint_picture(folder / "sky.png")
    units = write_page(folder / "live.html", checkpoint, pixels)
    answer = visit(folder / "live.html", units, folder / "sky.png")
    return Example(checkpoint, pixels, units, answer, read_picture(folder / "sky.png"))


def decode(content: str, *shape: int) -> Array:
    """What the page computed, (rows, columns, channels) -> (channels, rows, columns)."""
    values = np.frombuffer(base64.b64decode(content), "<f4")
    return values.reshape(shape).transpose(2, 0, 1) if shape else values


def assert_close(values: Array, expected: Tensor) -> None:
    """To 1e-4 of the largest value."""
    largest = float(expected.abs().max())
    assert largest > 0
    np.testing.assert_allclose(values, expected.numpy(), rtol=0, atol=1e-4 * largest)


def inputs(example: Example) -> dict[str, Tensor]:
    """The normalised picture, whole and covered, in float64."""
    net = example.checkpoint.net
    whole = net.normalise(torch.from_numpy(example.pixels[None])).double()
    covered = whole.clone()
    covered[:, :, 0:9, 70:82] = 0
    return {"whole": whole, "covered": covered}


def in_float64(net: CNN) -> CNN:
    copy = CNN(**net.config).double()
    copy.load_state_dict(net.state_dict())
    return copy.eval().requires_grad_(False)


@NEEDS_CHROMIUM
@pytest.mark.parametrize("name", ["whole", "covered"])
def test_the_page_computes_the_same_maps_and_logits(example: Example, name: str) -> None:
    net = in_float64(example.checkpoint.net)
    batch = inputs(example)[name]
    for content, (pooled, _) in zip(example.answer[name]["maps"], net.features(batch), strict=True):
        channels, rows, columns = pooled[0].shape
        assert_close(decode(content, rows, columns, channels), pooled[0])
    assert_close(decode(example.answer[name]["logits"]), net(batch)[0])


@NEEDS_CHROMIUM
@pytest.mark.parametrize("name", ["whole", "covered"])
@pytest.mark.parametrize("rule", RULES)
def test_the_page_projects_the_same_under_each_rule(example: Example, name: str, rule: str) -> None:
    net = in_float64(example.checkpoint.net)
    batch = inputs(example)[name]
    features = net.features(batch)
    for unit, by_rule in zip(example.units, example.answer[name]["projections"], strict=True):
        layer, filter_index, row, column = unit
        value = features[layer][0][0, filter_index, row, column]
        indices = (np.array([filter_index]), np.array([row]), np.array([column]))
        expected = value * backpropagate(net, batch, layer, *indices, rule)[0]
        values = decode(by_rule[RULES.index(rule)], 96, 96, 3)
        if value > 0:
            assert_close(values, expected)
        else:
            assert not values.any()


def probabilities(example: Example, batch: Tensor) -> list[float]:
    logits = in_float64(example.checkpoint.net)(batch)[0]
    return cast(list[float], logits.softmax(dim=0).tolist())


def peaks(example: Example, layer: int) -> Array:
    """Peak activation of each filter in the first picture."""
    net = example.checkpoint.net
    batch = net.normalise(torch.from_numpy(example.pixels[None]))
    return net.features(batch)[layer][0][0].amax(dim=(1, 2)).numpy()


@NEEDS_CHROMIUM
def test_classes_stand_by_their_probability(example: Example) -> None:
    expected = probabilities(example, inputs(example)["whole"])
    start = example.answer["shown"]["start"]
    names = example.checkpoint.class_names
    order = sorted(range(len(names)), key=lambda label: -expected[label])
    assert start["classes"] == [names[label] for label in order]
    assert start["probabilities"] == pytest.approx(expected, rel=1e-4)
    assert start["shares"][0] == f"{100 * expected[order[0]]:.0f} %"
    assert start["answer"].startswith(f"noise <i>: the network says {names[order[0]]}, ")


@NEEDS_CHROMIUM
def test_tiles_stand_by_peak_activation_and_the_address_chooses_one(example: Example) -> None:
    shown = example.answer["shown"]
    order = np.argsort(-peaks(example, 3), kind="stable").tolist()
    assert shown["start"]["order"] == order and shown["start"]["current"] == order[:1]
    order = np.argsort(-peaks(example, 1), kind="stable").tolist()
    assert shown["address"]["order"] == order and shown["address"]["current"] == [3]
    assert shown["address"]["activation"] == f"{peaks(example, 1)[3]:.2f}"
    following = order[min(order.index(3) + 1, len(order) - 1)]
    assert shown["next"]["current"] == [following]  # after the right arrow


@NEEDS_CHROMIUM
def test_arrow_keys_move_in_the_map(example: Example) -> None:
    positions = {"cell": "row 2, column 0", "right": "row 2, column 1", "down": "row 3, column 1"}
    for name, position in positions.items():
        unit = example.answer["shown"][name]["unit"]
        assert unit.startswith(f"One unit: conv3 / 1, {position}, activation ")


@NEEDS_CHROMIUM
def test_an_arrow_key_moves_the_square_by_four_pixels(example: Example) -> None:
    squares = [example.answer["shown"][name]["square"] for name in ("laid", "covered")]
    assert squares[1] == {**squares[0], "left": squares[0]["left"] - 4} and squares[0]["side"] == 24


@NEEDS_CHROMIUM
def test_probabilities_and_activation_follow_the_square(example: Example) -> None:
    shown = example.answer["shown"]["covered"]
    net = in_float64(example.checkpoint.net)
    batch = inputs(example)["whole"]
    maps = net.features(batch)[2][0][0]
    filter_index, row, column = np.unravel_index(int(maps.argmax()), maps.shape)
    before = float(maps[filter_index, row, column])

    square = shown["square"]
    rows = slice(max(0, square["top"]), square["top"] + 24)
    columns = slice(max(0, square["left"]), square["left"] + 24)
    batch[:, :, rows, columns] = 0
    after = float(net.features(batch)[2][0][0, filter_index, row, column])
    name = f"One unit: conv3 / {filter_index}, row {row}, column {column}, activation {after:.2f}"
    assert shown["unit"] == name and shown["activation"] == f"{after:.2f} (was {before:.2f})"
    assert shown["probabilities"] == pytest.approx(probabilities(example, batch), rel=1e-4)
    assert shown["probabilities"] != pytest.approx(
        example.answer["shown"]["start"]["probabilities"], rel=1e-3
    )


@NEEDS_CHROMIUM
def test_escape_takes_the_square_away(example: Example) -> None:
    shown = example.answer["shown"]
    assert shown["uncovered"]["square"] is None
    assert shown["uncovered"]["probabilities"] == shown["start"]["probabilities"]


@NEEDS_CHROMIUM
def test_the_way_down_shows_every_step_of_the_chosen_rule(example: Example) -> None:
    shown = example.answer["shown"]
    steps = shown["uncovered"]["way"].splitlines()
    # from conv3 to the pixels
    assert (steps.count("unpooled"), steps.count("rectified"), steps.count("filtered")) == (3, 3, 2)
    assert "the pixels" in steps
    assert shown["uncovered"]["way"] != shown["gradient"]["way"]


@NEEDS_CHROMIUM
def test_a_dropped_picture_is_read_and_classified_as_by_python(example: Example) -> None:
    assert example.dropped.std() > 20
    pixels = np.frombuffer(base64.b64decode(example.answer["pixels"]), np.uint8).reshape(96, 96, 3)
    assert np.abs(pixels.transpose(2, 0, 1).astype(int) - example.dropped).max() <= 1
    batch = example.checkpoint.net.normalise(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()))
    shown = example.answer["shown"]["dropped"]
    assert shown["probabilities"] == pytest.approx(probabilities(example, batch.double()), rel=1e-4)
    assert shown["answer"].startswith("sky <b>.png: ") and shown["message"] == ""


@NEEDS_CHROMIUM
def test_a_file_that_is_no_picture_gets_one_line_and_the_page_goes_on(example: Example) -> None:
    shown = example.answer["shown"]["no picture"]
    assert shown["message"] == "notes <b>.txt is no picture that the browser can read."
    assert shown["answer"] == example.answer["shown"]["uncovered"]["answer"]


@NEEDS_CHROMIUM
def test_the_page_requests_nothing_and_links_to_the_explorer_alone(example: Example) -> None:
    assert example.answer["requests"] == []
    elsewhere = {link for link in example.answer["links"] if not link.startswith("#")}
    assert {link.split("#")[0] for link in elsewhere} == {"data:,", "explorer/index.html"}
    assert "explorer/index.html#conv3/1" in elsewhere


@NEEDS_CHROMIUM
def test_the_page_fits_a_narrow_window_and_calls_generated_shapes_generated(example: Example) -> None:
    assert not any(shown["tooWide"] for shown in example.answer["shown"].values())
    assert example.answer["generated"] == (example.checkpoint.dataset == "shapes")


TRAINED = Path(__file__).resolve().parent.parent / "outputs/readme/trained"
NEEDS_TRAINED = pytest.mark.skipif(
    not (TRAINED / "CNN.pth").is_file(), reason="no trained network is shipped"
)
STL10 = TRAINED.parents[2] / "data/stl10_binary"
NEEDS_STL10 = pytest.mark.skipif(not (STL10 / "test_X.bin").is_file(), reason="STL-10 is not in data/")


@NEEDS_TRAINED
def test_the_trained_network_that_is_shipped_loads() -> None:
    checkpoint = load_checkpoint(TRAINED / "CNN.pth")
    assert checkpoint.dataset == "stl10" and checkpoint.class_names == list(STL10_CLASSES)
    assert checkpoint.net.config == CNN().config
    untrained = load_checkpoint(TRAINED / "snapshots/epoch_000.pth")
    assert untrained.epochs == 0 and untrained.settings == checkpoint.settings


@NEEDS_TRAINED
@NEEDS_STL10
def test_the_trained_network_that_is_shipped_has_the_accuracy_it_claims() -> None:
    checkpoint = load_checkpoint(TRAINED / "CNN.pth")
    images, labels, _ = load_checkpoint_split(checkpoint, STL10.parent, "test")
    correct = 0
    for start in range(0, len(images), 250):
        batch = checkpoint.net.normalise(torch.from_numpy(images[start : start + 250]))
        predictions = checkpoint.net(batch).argmax(dim=1).numpy()
        correct += int((predictions == labels[start : start + 250]).sum())
    assert correct / len(images) == pytest.approx(checkpoint.metrics["accuracy"], abs=0.001)
