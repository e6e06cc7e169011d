import io
import math
import os
import re
import shutil
import socket
import sys
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from conftest import MakeNet, WriteSplit, make_checkpoint
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from PIL import Image, ImageOps

import load_data
from CNN import Checkpoint
from load_data import Augmentation, Split, find_dataset, load_arrays, load_split, load_table

DATA, FOLDER = Path("data"), Path("data/stl10_binary")
Serve = Callable[[bytes], None]
LABELLED = ("test_X.bin", "test_y.bin", "train_X.bin", "train_y.bin")


def error_of(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_images_come_out_upright_and_labels_from_0_to_9(write_split: WriteSplit) -> None:
    images = np.zeros((2, 3, 96, 96), np.uint8)
    images[0, 0, 0, :] = 255  # red top row
    images[0, 2, :, 0] = 100  # blue left column
    write_split("train", images, np.array([1, 10]))
    stored = (FOLDER / "train_X.bin").read_bytes()
    assert stored[:193:96] == b"\xff" * 3 and stored[1] == 0  # a column comes before the next
    split = load_split("stl10", DATA, "train")
    assert (split.images == images).all() and split.images.flags.c_contiguous
    assert split.labels.tolist() == [0, 9] and split.labels.dtype == np.int64


def test_the_published_files_have_their_sizes_md5_sums_and_order_of_classes() -> None:
    sizes = {"train_X.bin": 138_240_000, "train_y.bin": 5_000, "test_X.bin": 221_184_000, "test_y.bin": 8_000}
    assert {name: size for name, (size, _) in load_data.FILES.items()} == sizes
    assert load_data.FILES["test_y.bin"][1] == "36f9794fa4beb8a2c72628de14fa638e"
    assert load_data.class_names("stl10", Path("data"))[::9] == ["airplane", "truck"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train_X.bin", lambda c: c[:-1], "has 1,105,919 bytes, expected 1,105,920"),
        ("train_y.bin", lambda c: c + b"?", "has 41 bytes, expected 40"),
        ("train_X.bin", lambda c: bytes([c[0] ^ 1]) + c[1:], r"has the md5 sum \w{32}, expected \w{32}"),
    ],
)
def test_a_file_that_is_not_the_published_one_is_refused_and_left_alone(
    tiny_stl10: Path, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = FOLDER / name
    path.write_bytes(damage(path.read_bytes()))
    before = contents(FOLDER)
    error = error_of(load_split, "stl10", tiny_stl10, "train")
    assert re.match(rf"{path} {message}: move it elsewhere and run `uv run load_data.py`", error)
    assert "delete" not in error and contents(FOLDER) == before


def test_a_missing_file_names_the_command(tiny_stl10: Path) -> None:
    (FOLDER / "test_y.bin").unlink()
    expected = f"{(FOLDER / 'test_y.bin').absolute()} not found: run `uv run load_data.py` first"
    assert error_of(load_split, "stl10", tiny_stl10, "test") == expected


def test_auto_and_stl10_take_what_is_there_and_an_unknown_data_set_is_refused(
    tiny_stl10: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [find_dataset(name, tiny_stl10) for name in ("auto", "stl10", "shapes")]
    assert chosen == ["stl10", "stl10", "shapes"] and capsys.readouterr().out == ""
    expected = "DATASET is 'cifar'; allowed are 'auto', 'stl10', 'folders', 'shapes'"
    assert error_of(find_dataset, "cifar", tiny_stl10) == expected


def test_mean_and_std_agree_with_a_second_computation() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 96, 96), np.uint8)
    images[:, 1] //= 3
    mean, std = load_data.mean_and_std(images)
    pixels = images.astype(np.float64) / 255
    assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_mean_and_std_of_more_images_than_are_counted_at_a_time() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1001, 3, 2, 2), np.uint8)
    assert_allclose(load_data.mean_and_std(images)[0], images.mean((0, 2, 3)) / 255, rtol=1e-12)


def test_a_channel_that_is_the_same_everywhere_has_a_deviation_of_one_grey_level() -> None:
    images = np.full((4, 3, 8, 8), 77, np.uint8)
    images[::2, 2] = 0
    mean, std = load_data.mean_and_std(images)
    assert_allclose(mean, [77 / 255, 77 / 255, 77 / 510], rtol=1e-12)
    assert_allclose(std, [1 / 255, 1 / 255, 77 / 510], rtol=1e-9)


@pytest.fixture(scope="module")
def shapes() -> Iterator[list[Split]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_data, "SHAPES_IMAGES", {"train": 600, "test": 300})
        yield [load_split("shapes", DATA, split) for split in ("train", "test")]


def test_generated_images_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_data, "SHAPES_IMAGES", {"test": 20})
    first, again = (load_split("shapes", DATA, "test") for _ in range(2))
    assert (first.images == again.images).all() and (first.labels == again.labels).all()


def test_generated_classes_are_balanced_and_no_image_comes_twice(shapes: list[Split]) -> None:
    images, labels, _ = shapes[0]
    assert images.shape == (600, 3, 96, 96) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [60] * 10 and (np.diff(labels) < 0).any()
    assert len({image.tobytes() for split in shapes for image in split.images}) == 900


def test_mean_colour_does_not_give_the_generated_class_away(shapes: list[Split]) -> None:
    train, test = (split.images.mean((2, 3)) / 255 for split in shapes)
    labels = shapes[0].labels
    centres = np.stack([train[labels == label].mean(0) for label in range(10)])
    nearest = ((test[:, None] - centres) ** 2).sum(-1).argmin(1)
    weights = np.linalg.lstsq(np.c_[train, np.ones(600)], np.eye(10)[labels], rcond=None)[0]
    linear = (np.c_[test, np.ones(300)] @ weights).argmax(1)
    for guess in (nearest, linear):
        assert (guess == shapes[1].labels).mean() < 0.17  # chance is 0.10 with a deviation of 0.017


def changed(images: torch.Tensor, seed: int = 0, **strength: Any) -> torch.Tensor:
    return load_data.augment(images, Augmentation(**strength), torch.Generator().manual_seed(seed))


def test_augmentation_of_no_strength_flips_or_leaves_alone() -> None:
    images = torch.randn(64, 3, 32, 32)
    kept, flipped = ((changed(images) - x).abs().amax((1, 2, 3)) < 1e-5 for x in (images, images.flip(3)))
    assert (kept ^ flipped).all() and 10 < int(kept.sum()) < 54


def test_augmentation_differs_between_images_and_repeats_with_the_seed() -> None:
    images = torch.randn(1, 3, 32, 32).expand(8, 3, 32, 32)
    first, again, other = (changed(images, seed, shift=4, rotation=10, colour=0.2) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({float(image.sum()) for image in first}) == 8


def moved(**strength: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where 200 images have a spot that was 12 rows below and 20 columns beside the centre."""
    place = torch.arange(-32, 33.0)
    rows, columns = place[:, None], place
    spot = torch.exp(-((rows - 12) ** 2 + (columns - 20) ** 2) / 8).expand(200, 3, 65, 65)
    images = changed(spot, **strength)[:, 0]
    mass = images.sum((1, 2))
    return (images * rows).sum((1, 2)) / mass, ((images * columns).sum((1, 2)) / mass).abs()  # flipped or not


def test_a_shift_moves_by_no_more_than_its_pixels() -> None:
    rows, columns = moved(shift=5)
    for shift in (rows - 12, columns - 20):
        assert 4.5 < float(shift.max()) < 5.02 and -5.02 < float(shift.min()) < -4.5


def test_a_rotation_keeps_the_distance_and_turns_by_no_more_than_its_degrees() -> None:
    rows, columns = moved(rotation=15)
    torch.testing.assert_close(rows.hypot(columns), torch.full((200,), math.hypot(12, 20)), rtol=2e-3, atol=0)
    turn = torch.rad2deg(torch.atan2(rows, columns)) - math.degrees(math.atan2(12, 20))
    assert 14 < float(turn.max()) < 15.1 and -15.1 < float(turn.min()) < -14


def test_a_zoom_changes_size_and_aspect_by_no_more_than_its_share() -> None:
    rows, columns = moved(zoom=0.25)
    size, aspect = (rows / 12 * columns / 20).sqrt(), (columns / 20 / (rows / 12)).sqrt()
    for factor in (size, aspect):
        assert 1.23 < float(factor.max()) < 1.255 and 1.23 < float(1 / factor.min()) < 1.255


def test_colours_are_changed_by_contrast_saturation_and_brightness_as_by_hand() -> None:
    black_white_red = torch.tensor([[0.0, 0, 0], [1, 1, 1], [3, 0, 0]])[:, None, :, None, None]
    given = black_white_red.expand(3, 100, 3, 4, 4)
    brightness, bright, reddish = (changed(images, colour=0.3)[:, :, 1, 1] for images in given)
    contrast = bright - brightness
    for values in (brightness, contrast):  # of an image, the same for all channels
        torch.testing.assert_close(values, values[:, :1].expand(100, 3))
    saturation = (reddish[:, 0] - reddish[:, 1]) / contrast[:, 0] / 3
    by_hand = contrast * (1 + saturation[:, None] * torch.tensor([2.0, -1, -1])) + brightness  # grey is 1
    torch.testing.assert_close(reddish, by_hand)
    for deviation in (brightness[:, 0], contrast[:, 0] - 1, saturation - 1):
        assert 0.25 < float(deviation.max()) < 0.301 and -0.301 < float(deviation.min()) < -0.25


def test_cutout_blanks_one_square_of_each_image() -> None:
    blanked = (changed(torch.ones(100, 3, 32, 32), cutout=8) == 0).all(dim=1)
    rows, columns = blanked.any(dim=2).sum(dim=1), blanked.any(dim=1).sum(dim=1)
    assert torch.equal(blanked.sum(dim=(1, 2)), rows * columns)
    assert int(rows.max()) == int(columns.max()) == 8
    assert int(rows.min()) >= 4 <= int(columns.min())  # a quarter stays if the centre is in a corner


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Takes what a server at `URL` sends, of ten million bytes that it announces."""
    given = [b""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "10000000")
            self.end_headers()
            self.wfile.write(given[-1])

    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(load_data, "URL", f"http://127.0.0.1:{server.server_port}/stl10_binary.tar.gz")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield given.append
        server.shutdown()
        thread.join()


@pytest.fixture
def members(tiny_stl10: Path) -> dict[str, bytes]:
    """The labelled members of the archive in the published order; data/stl10_binary is gone."""
    labelled = contents(FOLDER)
    shutil.rmtree(tiny_stl10)
    return {name: labelled[name] for name in LABELLED}


def packed(members: dict[str, bytes], folder: str = "stl10_binary") -> bytes:
    """Return an archive that was cut off in the midst of a member behind these."""
    buffer = io.BytesIO()
    rest = {"unlabeled_X.bin": np.random.default_rng(1).bytes(200_000)}  # incompressible
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, content in (members | rest).items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()[:-100_000]


@pytest.mark.parametrize("folder", ["stl10_binary", "../.."])
def test_a_download_stops_as_soon_as_the_labelled_files_are_out_and_writes_nowhere_else(
    serve: Serve, members: dict[str, bytes], folder: str
) -> None:
    serve(packed(members, folder))
    assert find_dataset("auto", DATA) == "stl10"
    assert contents(FOLDER) == members
    assert [path for path in Path().rglob("*") if path.is_file() and path.parent != FOLDER] == []


def test_a_cut_connection_leaves_whole_files_only_and_the_next_run_goes_on(
    serve: Serve, members: dict[str, bytes]
) -> None:
    serve(packed(members)[:-500_000])  # in the midst of train_X.bin
    assert "run again" in error_of(find_dataset, "auto", DATA)
    assert contents(FOLDER) == {name: members[name] for name in LABELLED[:2]}
    serve(packed(members))
    assert find_dataset("stl10", DATA) == "stl10" and contents(FOLDER) == members


def test_a_member_with_another_md5_sum_is_not_kept(serve: Serve, members: dict[str, bytes]) -> None:
    serve(packed(members | {"train_X.bin": members["train_X.bin"][:-1] + b"?"}))
    assert "train_X.bin in the archive has the wrong md5 sum" in error_of(find_dataset, "stl10", DATA)
    assert set(contents(FOLDER)) == set(LABELLED[:2])


@pytest.fixture(params=["refused", "timed out"])
def dead_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Nobody listens, or nobody answers."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(load_data, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(load_data, "URL", f"http://127.0.0.1:{taken.getsockname()[1]}/archive.tar.gz")
        closing = threading.Timer(5, taken.close)  # ends a wait that has no limit, with another error
        closing.start() if request.param == "timed out" else taken.close()
        yield request.param
        closing.cancel()


def test_a_dead_host_gives_generated_shapes_with_a_notice_unless_stl10_is_asked_for(
    dead_host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_dataset("auto", DATA) == "shapes"
    notice = capsys.readouterr().out
    assert notice.count("\n") >= 6 and "THIS RUN USES GENERATED IMAGES" in notice
    for text in (notice, error_of(find_dataset, "stl10", DATA)):
        assert all(part in text for part in (load_data.URL, str(FOLDER), *LABELLED, dead_host))
    assert contents(DATA) == {}


@pytest.mark.parametrize("dead_host", ["refused"], indirect=True)
@pytest.mark.parametrize("name", LABELLED)
def test_shapes_are_never_mixed_in_where_a_file_of_stl10_is(dead_host: str, name: str) -> None:
    FOLDER.mkdir(parents=True)
    (FOLDER / name).write_bytes(b"kept")
    assert load_data.URL in error_of(find_dataset, "auto", DATA)
    assert contents(FOLDER) == {name: b"kept"}


@pytest.fixture
def made(make_net: MakeNet) -> Checkpoint:
    return make_checkpoint(make_net(), dataset="shapes", sha256="123456789012" + "a" * 52)


ARRAYS, TABLE = Path("outputs/activations.npz"), Path("outputs/filter_metrics.csv")
LABELS, ROWS = np.arange(5000), pd.DataFrame({"filter": [0, 1], "auc": [0.5, np.nan]}, index=[7, 9])


def save_both(made: Checkpoint) -> None:
    load_data.save_arrays(ARRAYS, made, labels=LABELS, maxima=np.ones((5, 2), np.float32))
    load_data.save_table(TABLE, made, ROWS)


def both_errors(made: Checkpoint) -> list[str]:
    return [error_of(load_arrays, ARRAYS, made, "labels"), error_of(load_table, TABLE, made)]


def test_arrays_and_tables_come_back_and_say_what_made_them(made: Checkpoint) -> None:
    save_both(made)
    maxima, labels = load_arrays(ARRAYS, made, "maxima", "labels")
    assert (labels == LABELS).all() and labels.dtype == LABELS.dtype
    assert maxima.shape == (5, 2) and maxima.dtype == np.float32
    pd.testing.assert_frame_equal(load_table(TABLE, made), ROWS.reset_index(drop=True))
    assert TABLE.read_text().splitlines()[1] == "123456789012,shapes,0,0.5"
    assert str(np.load(ARRAYS)["checkpoint_sha256"]) == made.sha256
    assert set(contents(Path("outputs"))) == {ARRAYS.name, TABLE.name}


NAMES = ["001", "1e5", "True", "NA", "nan", "None", "null", "a, b", 'say "x"', " dog "]


def test_class_names_in_tables_come_back_as_the_text_they_are(made: Checkpoint) -> None:
    table = pd.DataFrame({"filter": range(10), "class": NAMES, "preferred_class": [*NAMES[1:], None]})
    load_data.save_table(TABLE, made, table)
    loaded = load_table(TABLE, made)
    assert loaded["class"].tolist() == NAMES and loaded["preferred_class"].tolist()[:9] == NAMES[1:]
    assert loaded["preferred_class"].isna().tolist() == [False] * 9 + [True]  # a dead filter has none
    assert loaded["filter"].dtype == np.int64


def test_missing_arrays_and_tables_name_the_command(made: Checkpoint) -> None:
    stages = {ARRAYS: "deconv_full.py", TABLE: "analyse_projections.py"}
    assert both_errors(made) == [
        f"{path.absolute()} not found: run `uv run {stage}` first" for path, stage in stages.items()
    ]


def test_arrays_and_tables_of_another_checkpoint_are_refused(made: Checkpoint) -> None:
    save_both(made)
    for error in both_errors(made._replace(sha256="0" * 64)):
        assert re.match(r"outputs/\S+ was made from another checkpoint: run `uv run \w+.py` again$", error)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy leaves a damaged file open
def test_damaged_and_foreign_arrays_and_tables_are_refused(made: Checkpoint) -> None:
    save_both(made)
    whole = ARRAYS.read_bytes()
    flipped = bytearray(whole)
    flipped[20_000] ^= 1
    foreign = io.BytesIO()
    np.savez(foreign, checkpoint_sha256=np.array(made.sha256), labels=np.array([Path()], object))
    expected = r"outputs/\S+ is damaged or not of this project \(\w+\): run `uv run \w+.py`$"
    for content in (b"", b"\xff\xfetext\n", whole[:9999], flipped, b"a,b\n1,2\n", foreign.getvalue()):
        ARRAYS.write_bytes(content)
        TABLE.write_bytes(content)
        for error in both_errors(made):
            assert re.match(expected, error)


def test_pictures_are_laid_out_row_by_row_on_white() -> None:
    pictures = np.stack([np.full((2, 3, 3), grey, np.float32) for grey in (0.1, 0.2, 0.3)])
    sheet = load_data.tile(pictures, 2, 1)[..., 0]
    expected = np.ones((7, 9), np.float32)
    expected[1:3, 1:4], expected[1:3, 5:8], expected[4:6, 1:4] = 0.1, 0.2, 0.3
    assert (sheet == expected).all()


def test_the_sheet_of_samples_has_one_row_a_class_with_its_name(tiny_stl10: Path) -> None:
    data, names = load_split("stl10", tiny_stl10, "train"), load_data.class_names("stl10", tiny_stl10)
    (ax,) = load_data.draw_samples(data, names, "heading").axes
    plt.close()
    assert [tick.get_text() for tick in ax.get_yticklabels()] == names
    first_truck = data.images[np.flatnonzero(data.labels == 9)[0]].transpose(1, 2, 0) / 255
    assert_allclose(np.asarray(ax.images[0].get_array())[904:1000, 4:100], first_truck)


def test_main_says_what_is_there_and_whether_it_is_generated(
    tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load_data, "SHAPES_IMAGES", {"train": 20, "test": 10})
    for setting, first in (("auto", "STL-10: 40 training and 30 test"), ("shapes", "generated shapes: 20 ")):
        monkeypatch.setattr(load_data, "DATASET", setting)
        before = plt.get_fignums()
        load_data.main()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(first) and plt.get_fignums() == before
        assert lines[-2:] == ["wrote outputs/sample_images.png", "next: uv run train_CNN.py"]
        assert contents(Path("outputs"))["sample_images.png"].startswith(b"\x89PNG")


def test_files_beside_the_folder_and_the_home_folder_are_found(
    tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_split("stl10", tiny_stl10, "test").images
    (tiny_stl10 / load_data.FOLDER).rename("home")  # now they lie in the folder itself
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for data_dir in (Path("home"), Path("~/home")):
        assert find_dataset("auto", data_dir) == "stl10"
        assert (load_split("stl10", data_dir, "test").images == expected).all()


def test_the_archive_in_the_data_folder_is_unpacked_and_a_damaged_one_is_no_reason_for_shapes(
    tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    expected, archive = load_split("stl10", tiny_stl10, "train").images, Path("data/stl10_binary.tar.gz")
    with tarfile.open(archive, "w:gz") as members:
        members.add(tiny_stl10 / "stl10_binary", "stl10_binary")
    shutil.rmtree(tiny_stl10 / "stl10_binary")
    assert find_dataset("auto", tiny_stl10) == "stl10"
    assert (load_split("stl10", tiny_stl10, "train").images == expected).all()
    assert "reading STL-10 from data/stl10_binary.tar.gz" in capsys.readouterr().out
    shutil.rmtree(tiny_stl10 / "stl10_binary")
    archive.write_bytes(archive.read_bytes()[:5_000])
    assert error_of(find_dataset, "auto", tiny_stl10).startswith(
        "STL-10 could not be unpacked from data/stl10_b"
    )


@pytest.fixture
def folders() -> Path:
    """Two pictures of each of three classes, without loss, and one that is none."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("zebra", "ant", "a & b"):
            folder = Path("data") / split / name
            folder.mkdir(parents=True)
            for ending in ("png", "BMP"):
                Image.fromarray(rng.integers(0, 256, (96, 130, 3), np.uint8)).save(folder / f"one.{ending}")
    Path("data/train/ant/broken.jpg").write_text("no picture")
    Path("data/train/ant/notes.txt").write_text("no picture either")
    return Path("data")


def test_pictures_in_folders_are_a_data_set(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_dataset("folders", folders) == "folders"
    names = load_data.class_names("folders", folders)
    assert names == ["a & b", "ant", "zebra"]
    for split in ("train", "test"):
        data = load_split("folders", folders, split)
        assert data.images.shape == (6, 3, 96, 96) and np.bincount(data.labels).tolist() == [2, 2, 2]
        for label, name in enumerate(names):
            expected = {
                np.asarray(Image.open(path))[:, 17:113].transpose(2, 0, 1).tobytes()
                for path in (folders / split / name).glob("one.*")
            }
            assert {image.tobytes() for image in data.images[data.labels == label]} == expected
        for image, file in zip(data.images, data.files, strict=True):  # names as CLASS/NAME
            stored = np.asarray(Image.open(folders / split / file))
            assert (image == stored[:, 17:113].transpose(2, 0, 1)).all()
    out = capsys.readouterr().out
    assert "data/train/ant/broken.jpg cannot be read as a picture and is left out" in out
    assert "1 of 7 pictures in data/train were left out" in out


def write_grey(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (96, 96), grey).save(path)


def greys(data: Split) -> dict[int, list[int]]:
    """Return the grey level of each image, by label."""
    levels = data.images[:, 0, 0, 0]
    return {int(label): sorted(levels[data.labels == label].tolist()) for label in np.unique(data.labels)}


def write_folders(names: list[str], count: int = 2) -> list[str]:
    """Write pictures of one grey each into data/train and data/test; return the names of the classes."""
    for split in ("train", "test"):
        for label, name in enumerate(names):
            for number in range(count):
                write_grey(DATA / split / name / f"{number}.png", 100 * label + number)
    return load_data.class_names("folders", DATA)


def test_the_first_pictures_are_of_all_classes_and_always_the_same() -> None:
    names = write_folders(["a", "b"], 20)
    first, again = (load_data.read_folders(DATA / "train", names) for _ in range(2))
    assert set(first.labels[:10].tolist()) == {0, 1}
    assert (first.images == again.images).all() and (first.labels == again.labels).all()
    assert greys(first) == {0: list(range(20)), 1: list(range(100, 120))}


def test_what_notebooks_and_file_managers_hide_is_neither_class_nor_picture() -> None:
    write_folders(["a", "b"])
    for split in ("train", "test"):
        write_grey(DATA / split / ".ipynb_checkpoints/0.png", 7)
        write_grey(DATA / split / "a/@eaDir/0.png", 7)
        write_grey(DATA / split / "a/.hidden.png", 7)
        write_grey(DATA / split / "a/.trash/0.png", 7)
        write_grey(DATA / split / "__MACOSX/a/0.png", 7)
    assert load_data.class_names("folders", DATA) == ["a", "b"]
    assert greys(load_split("folders", DATA, "train")) == {0: [0, 1], 1: [100, 101]}


def test_a_folder_with_the_name_of_a_picture_is_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(["a", "b"])
    write_grey(DATA / "train/a/more.png/0.png", 5)
    assert greys(load_split("folders", DATA, "train")) == {0: [0, 1, 5], 1: [100, 101]}
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["jfif", "gif", "tga", "jpe", "JPG", "avif"])
def test_every_suffix_that_pillow_reads_is_a_picture(suffix: str) -> None:
    if f".{suffix.lower()}" not in Image.registered_extensions():
        pytest.skip("this Pillow does not read it")
    write_folders(["a", "b"])
    write_grey(DATA / f"train/a/picture.{suffix}", 200)
    levels = greys(load_split("folders", DATA, "train"))[0]
    assert len(levels) == 3 and abs(levels[2] - 200) <= 3


def test_other_files_are_counted_in_one_line_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(["a", "b"])
    for name in ("1.heic", "2.HEIC", "notes.txt", "README", "deeper/3.heic"):
        path = DATA / "train/b" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    load_split("folders", DATA, "train")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("data/train/b: 5 other files left out: .heic 3, ")
    assert ".txt 1" in line and "no suffix 1" in line


def test_links_to_folders_are_followed_but_not_in_a_circle() -> None:
    write_folders(["a", "b"])
    write_grey(Path("elsewhere/0.png"), 9)
    (DATA / "train/a/link").symlink_to(Path("elsewhere").absolute())
    (DATA / "train/a/up").symlink_to(Path("data/train/a").absolute())
    (DATA / "train/a/link/back").symlink_to(Path("elsewhere").absolute())
    shutil.move(DATA / "train/b", "b")
    (DATA / "train/b").symlink_to(Path("b").absolute())
    assert greys(load_split("folders", DATA, "train")) == {0: [0, 1, 9], 1: [100, 101]}


def test_a_folder_that_cannot_be_read_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(["a", "b"])
    right = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder.name == "b":
            raise PermissionError(13, "Permission denied")
        return right(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    expected = "the folder data/train/b cannot be read: Permission denied"
    assert error_of(load_split, "folders", DATA, "train") == expected


def test_one_name_in_two_encodings_is_one_class() -> None:
    write_folders(["a", "K\u00e4se"])
    (DATA / "test/K\u00e4se").rename(DATA / "test/Ka\u0308se")  # as macOS stores it
    assert load_data.class_names("folders", DATA) == ["K\u00e4se", "a"]
    assert greys(load_split("folders", DATA, "test")) == {0: [100, 101], 1: [0, 1]}
    write_grey(DATA / "test/K\u00e4se/0.png", 1)
    assert "two folders called 'K\u00e4se': merge them" in error_of(load_split, "folders", DATA, "test")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems store names as Unicode")
def test_a_name_that_is_no_utf_8_can_be_drawn_and_printed() -> None:
    write_folders(["a", "b"])
    for split in ("train", "test"):
        (DATA / split / "b").rename(DATA / split / os.fsdecode(b"K\xe4se"))  # Latin-1
    names = load_data.class_names("folders", DATA)
    assert names == ["K\ufffdse", "a"]
    assert len(load_split("folders", DATA, "test").labels) == 4
    figure = load_data.draw_samples(load_split("folders", DATA, "test"), names, "classes")
    load_data.save_figure("samples.png", figure)


def test_names_that_look_alike_are_told_apart_in_the_error() -> None:
    write_folders(["dog", "cat"])
    (DATA / "test/dog").rename(DATA / "test/dog ")
    assert error_of(load_split, "folders", DATA, "train").endswith("they differ in 'dog', 'dog '")


@pytest.fixture
def trained(make_net: MakeNet) -> Checkpoint:
    """Return the checkpoint of a training on data/train and data/test."""
    names = write_folders(["ant", "bee", "cat"])
    checksums = {
        split: load_data.fingerprint(load_split("folders", DATA, split), names) for split in ("train", "test")
    }
    settings = {"data": {"folder": "data", **checksums}}
    return make_checkpoint(make_net(), dataset="folders", class_names=names, settings=settings)


def rename_class() -> None:
    for split in ("train", "test"):
        (DATA / split / "ant").rename(DATA / split / "dog")  # now the last


def remove_class() -> None:
    for split in ("train", "test"):
        shutil.rmtree(DATA / split / "ant")


CHANGES: dict[str, Callable[[], object]] = {
    "a class renamed": rename_class,
    "a picture exchanged": lambda: write_grey(DATA / "test/bee/0.png", 55),
    "a picture added": lambda: write_grey(DATA / "test/bee/9.png", 55),
    "a picture removed": lambda: (DATA / "test/bee/0.png").unlink(),
    "a class added": lambda: write_folders(["dog"]),
    "a class removed": remove_class,
    "a class removed from one": lambda: shutil.rmtree(DATA / "train/ant"),
    "another folder": lambda: DATA.rename("other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_changed_since_the_training_are_refused_with_both_folders_named(
    trained: Checkpoint, change: str
) -> None:
    assert len(load_data.load_checkpoint_split(trained, "data", "test").labels) == 6
    CHANGES[change]()
    error = error_of(load_data.load_checkpoint_split, trained, "data", "test")
    assert "DATA_DIR = 'data'" in error and (f"{Path.cwd()}/data" in error or "data/train and" in error)


def test_a_folder_that_was_moved_with_its_pictures_is_as_good(trained: Checkpoint) -> None:
    DATA.rename("moved")
    assert len(load_data.load_checkpoint_split(trained, "moved", "test").labels) == 6


def test_folders_that_make_no_data_set_are_refused(folders: Path) -> None:
    for path in (folders / "train/ant").glob("*.*"):
        path.unlink()
    expected = "data/train has no picture of 'ant': put some there, or remove the class"
    assert error_of(load_split, "folders", folders, "train") == expected
    (folders / "train/ant").rmdir()
    expected = "data/train and data/test must hold the same classes; they differ in 'ant'"
    assert error_of(load_split, "folders", folders, "train") == expected
    for split, name in (("test", "ant"), ("test", "zebra"), ("train", "zebra")):
        shutil.rmtree(folders / split / name)
    expected = r"the classes in data/train are \['a & b'\]; put a folder there for each of two or more"
    assert re.match(expected, error_of(load_split, "folders", folders, "train"))
    shutil.rmtree(folders / "test")
    assert error_of(load_split, "folders", folders, "train").startswith(
        f"{Path.cwd()}/data/test not found: put"
    )


def pixels_of(values: Any, name: str) -> Any:
    """Save values as a picture of one channel and return what is read of it, one channel (96, 96)."""
    Image.fromarray(np.asarray(values)).save(name)
    red, green, blue = load_data.read_picture(name)
    assert (red == green).all() and (red == blue).all()
    return red


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.01), (0.0, 1e30), (0.0, 200.0), (-1.0, 1.0), (-3.0, -1.0)])
def test_floats_of_any_range_are_read_with_the_largest_in_white(low: float, high: float) -> None:
    values = np.full((96, 96), low, np.float32)
    values[:, 48:] = high
    pixels = pixels_of(values, "picture.tif")
    assert (pixels[:, :48] == 0).all() and (pixels[:, 48:] == 255).all()


def test_what_is_no_finite_number_in_a_picture_spoils_nothing_else() -> None:
    values = np.full((96, 96), 0.5, np.float32)
    values[:, 48:] = 1
    values[0, :3] = [np.nan, np.inf, -np.inf]
    pixels = pixels_of(values, "picture.tif")
    assert (pixels[1:, :48] == 127).all() and (pixels[1:, 48:] == 255).all()
    assert pixels[0, :3].tolist() == [0, 255, 0]


def test_pictures_of_16_bits_keep_their_grey_levels() -> None:
    values = np.arange(96 * 96, dtype=np.uint16).reshape(96, 96) * 7
    expected = (255.0 * values / values.max()).astype(np.uint8)
    assert (pixels_of(values, "picture.png") == expected).all()


def test_black_pictures_are_black() -> None:
    assert (pixels_of(np.zeros((96, 96), np.float32), "picture.tif") == 0).all()


def test_a_picture_with_damaged_exif_is_read_as_it_lies() -> None:
    grey = np.arange(96 * 96, dtype=np.uint8).reshape(96, 96)
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x12"  # cut off in the midst of the first entry
    Image.fromarray(grey).save("picture.png", exif=exif)
    with pytest.raises(Exception, match=r".*"), Image.open("picture.png") as file:
        ImageOps.exif_transpose(file)
    assert (load_data.read_picture("picture.png") == grey).all()


def test_a_photograph_of_200_megapixels_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 200 x 100 is then as large as 180 million
    Image.new("RGB", (200, 100), "red").save("picture.png")
    assert load_data.read_picture(Path("picture.png"))[:, 0, 0].tolist() == [255, 0, 0]


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    right = ImageOps.fit

    def fit(picture: Image.Image, *arguments: Any) -> Image.Image:
        sizes.append(picture.size)
        return right(picture, *arguments)

    grid = np.linspace(0, 20, 1600)
    wave = 127 + 60 * np.sin(grid)[:, None] + 60 * np.cos(grid)
    picture = Image.fromarray(wave.astype(np.uint8)).convert("RGB")
    expected = np.asarray(right(picture, (96, 96), Image.Resampling.BILINEAR)).astype(float)
    picture.save("picture.jpg", quality=95)
    monkeypatch.setattr(ImageOps, "fit", fit)
    pixels = load_data.read_picture("picture.jpg").transpose(1, 2, 0)
    assert sizes == [(400, 400)]
    assert abs(pixels - expected).max() <= 2


@pytest.mark.parametrize("name", ["US$ and A$", "$_$", r"$\frac$"])
def test_dollars_in_a_name_are_dollars_in_a_figure(name: str) -> None:
    with mpl.rc_context():
        load_data.set_style()
        figure, ax = plt.subplots()
        ax.set_title(name)
        assert not ax.title.get_parse_math()
        load_data.save_figure("figure.png", figure)
    assert Path("figure.png").is_file()


@pytest.fixture
def style() -> Iterator[None]:
    with mpl.rc_context():
        load_data.set_style()
        yield


def test_letters_of_other_scripts_take_an_installed_font_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = font_manager.FontEntry(name="WenQuanYi Zen Hei")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [entry])
    with mpl.rc_context():
        load_data.set_style()
        assert mpl.rcParams["font.family"] == ["sans-serif", "WenQuanYi Zen Hei"]


def test_letters_that_no_font_has_are_said_once_and_other_warnings_stay(
    style: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_data.report_missing_letters.cache_clear()
    for _ in range(2):
        figure, ax = plt.subplots()
        ax.set_title("\U00010a00 and \U00010a01")  # Kharoshthi
        load_data.save_figure("figure.png", figure, quiet=True)
    sns.heatmap([[1]], xticklabels=["\U00010a00"], ax=plt.subplots()[1])  # draws before it is saved
    plt.close()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "letters that no font here has" in out
    right = Figure.savefig

    def savefig(*arguments: Any, **settings: Any) -> None:
        warnings.warn("something else", stacklevel=1)
        right(*arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.warns(UserWarning, match="something else"):
        load_data.save_figure("figure.png", plt.figure(), quiet=True)


def test_names_in_figures_are_short_and_stand_in_legends(style: None) -> None:
    assert load_data.shorten("truck") == "truck"
    assert load_data.shorten("x" * 200) == "x" * 19 + "\u2026"
    assert load_data.shorten("a\nb\t c") == "a b c"
    figure, ax = plt.subplots()
    ax.plot([0, 1], label=load_data.shorten("_hidden"))
    assert [text.get_text().strip() for text in ax.legend().texts] == ["_hidden"]
    plt.close(figure)


def test_shares_have_intervals_after_wilson_that_stay_between_0_and_1() -> None:
    # Newcombe 1998, Table I
    assert load_data.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert load_data.wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_long_names_leave_room_for_the_sheet_of_samples(tiny_stl10: Path, style: None) -> None:
    data = load_split("stl10", tiny_stl10, "train")
    figure = load_data.draw_samples(data, [f"{label}{'x' * 200}" for label in range(10)], "heading")
    load_data.save_figure("figure.png", figure)
    assert figure.axes[0].get_position().width > 0.2


def test_figures_look_the_same_whatever_the_users_settings_are() -> None:
    with mpl.rc_context():
        load_data.set_style()
        expected = dict(mpl.rcParams)
        mpl.rcParams.update({"text.usetex": True, "axes.facecolor": "red", "font.size": 30})
        load_data.set_style()
        assert dict(mpl.rcParams) == expected
