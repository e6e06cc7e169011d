import errno
import gzip
import io
import os
import pickle
import random
import re
import shutil
import socket
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

import load_data
from load_data import DownloadError, download, find_dataset, load_arrays, load_split, save_arrays

FOLDER = Path("data/stl10_binary")
LABELLED = ["test_X.bin", "test_y.bin", "train_X.bin", "train_y.bin"]
TEXTS = {"class_names.txt": b"airplane\nbird\n", "fold_indices.txt": b"0 1 2\n"}


def error_of(function: Any, *arguments: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def no_half_files() -> bool:
    return not list(Path().rglob("*.partial"))


# Reading


def test_images_come_out_upright(write_split: Any) -> None:
    image = np.zeros((1, 3, 96, 96), np.uint8)
    image[0, 0, 0, :] = 255  # red top row
    image[0, 2, :, 0] = 100  # blue left column
    write_split("train", image, np.array([1]))
    images = load_split("stl10", Path("data"), "train").images
    assert (images == image).all()
    assert images.flags.c_contiguous
    assert images.dtype == np.uint8


def test_labels_are_shifted_to_0_to_9(tiny_stl10: Path) -> None:
    labels = load_split("stl10", tiny_stl10, "train").labels
    stored = np.fromfile(FOLDER / "train_y.bin", np.uint8)
    assert labels.dtype == np.int64
    assert (labels + 1 == stored).all()
    assert np.bincount(labels).tolist() == [4] * 10


def test_each_class_of_the_tiny_set_has_its_square_where_it_was_put(tiny_stl10: Path) -> None:
    images, labels = load_split("stl10", tiny_stl10, "test")
    for image, label in zip(images, labels, strict=True):
        top, left = 10 + 50 * (label // 5), 2 + 19 * (label % 5)
        assert image[:, top : top + 16, left : left + 16].min() >= 180


def test_the_published_files_have_their_sizes_and_md5_sums() -> None:
    sizes = {"train_X.bin": 138_240_000, "train_y.bin": 5_000, "test_X.bin": 221_184_000, "test_y.bin": 8_000}
    assert {name: size for name, (size, _) in load_data.FILES.items()} == sizes
    assert load_data.FILES["test_y.bin"][1] == "36f9794fa4beb8a2c72628de14fa638e"
    assert load_data.URL.endswith("/stl10_binary.tar.gz")


def test_a_short_file_is_refused_and_left_alone(tiny_stl10: Path) -> None:
    path = FOLDER / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-1])
    before = contents(FOLDER)
    expected = f"{path} has 1,105,919 bytes, expected 1,105,920: delete it and run again to download it anew"
    assert error_of(load_split, "stl10", tiny_stl10, "train") == expected
    for setting in ("auto", "stl10"):
        assert error_of(find_dataset, setting, tiny_stl10) == expected
    assert contents(FOLDER) == before


def test_a_wrong_byte_is_refused_and_left_alone(tiny_stl10: Path) -> None:
    path = FOLDER / "test_X.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    for setting in ("auto", "stl10"):
        assert re.match(
            rf"{path} has the md5 sum \w+, expected \w+: delete", error_of(find_dataset, setting, tiny_stl10)
        )
    assert path.read_bytes() == content


@pytest.mark.parametrize("label", [0, 11])
def test_a_label_out_of_range_is_refused(write_split: Any, label: int) -> None:
    write_split("train", np.zeros((2, 3, 96, 96)), np.array([5, label]))
    message = error_of(load_split, "stl10", Path("data"), "train")
    assert re.search(r"train_y.bin has labels from \d+ to \d+, expected 1 to 10", message)


def test_another_number_of_labels_than_images_is_refused(write_split: Any) -> None:
    write_split("train", np.zeros((2, 3, 96, 96)), np.array([5]))
    assert "train_y.bin has 1 labels for 2 images" in error_of(load_split, "stl10", Path("data"), "train")


def test_the_md5_sum_is_remembered_and_computed_again_when_the_file_changes(tiny_stl10: Path) -> None:
    load_split("stl10", tiny_stl10, "test")
    path = FOLDER / "test_X.bin"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load_split(
        "stl10", tiny_stl10, "test"
    )  # size and time are as they were: taken for the file that was checked
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "md5 sum" in error_of(load_split, "stl10", tiny_stl10, "test")


def test_data_are_read_where_the_md5_sum_cannot_be_remembered(tiny_stl10: Path) -> None:
    (FOLDER / "verified.txt").mkdir()  # stands for a folder that cannot be written to
    assert find_dataset("auto", tiny_stl10) == "stl10"
    assert len(load_split("stl10", tiny_stl10, "test").images) == 30
    assert no_half_files()


def test_a_record_of_garbage_is_no_harm(tiny_stl10: Path) -> None:
    (FOLDER / "verified.txt").write_bytes(b"\xff\x00{[")
    assert find_dataset("auto", tiny_stl10) == "stl10"


def test_a_missing_file_names_the_command(tiny_stl10: Path) -> None:
    (FOLDER / "test_y.bin").unlink()
    expected = f"{FOLDER / 'test_y.bin'} not found: run `uv run load_data.py` first"
    assert error_of(load_split, "stl10", tiny_stl10, "test") == expected


@pytest.mark.parametrize("function", [find_dataset, load_split, load_data.title, load_data.class_names])
def test_an_unknown_data_set_is_refused_with_the_allowed_values(function: Any) -> None:
    arguments = {find_dataset: (Path("data"),), load_split: (Path("data"), "train")}.get(function, ())
    assert re.match(
        r"DATASET is 'cifar'; allowed are .*'stl10', 'shapes'$", error_of(function, "cifar", *arguments)
    )


def test_class_names_are_those_of_the_published_order() -> None:
    assert load_data.class_names("stl10")[::9] == ["airplane", "truck"]
    assert len(set(load_data.class_names("stl10"))) == len(set(load_data.class_names("shapes"))) == 10
    assert load_data.title("stl10") == "STL-10"
    assert load_data.title("shapes") == "generated shapes"


# Arithmetic


def test_mean_and_std_agree_with_a_second_computation() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 96, 96), np.uint8)
    images[:, 1] //= 3
    mean, std = load_data.mean_and_std(images)
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)
    assert {type(value) for value in mean + std} == {float}


def test_normalised_images_have_mean_0_and_deviation_1() -> None:
    images = np.random.default_rng(0).integers(0, 200, (7, 3, 96, 96), np.uint8)
    given = torch.from_numpy(images)
    normalised = load_data.normalise(given, *load_data.mean_and_std(images))
    assert normalised.dtype == torch.float32
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-5
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert given.dtype == torch.uint8


# Generated shapes


@pytest.fixture(scope="module")
def shapes() -> Iterator[dict[str, load_data.Split]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_data, "SHAPES_IMAGES", {"train": 600, "test": 300})
        yield {split: load_data.generate_shapes(split) for split in ("train", "test")}


def test_generated_images_are_the_same_each_time(
    shapes: dict[str, load_data.Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_data, "SHAPES_IMAGES", {"train": 600, "test": 300})
    again = load_split("shapes", Path("data"), "test")
    assert (again.images == shapes["test"].images).all()
    assert (again.labels == shapes["test"].labels).all()


def test_generated_classes_are_balanced_and_in_random_order(shapes: dict[str, load_data.Split]) -> None:
    images, labels = shapes["train"]
    assert images.shape == (600, 3, 96, 96)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [60] * 10
    assert (np.diff(labels) < 0).any()


def test_no_generated_image_comes_twice(shapes: dict[str, load_data.Split]) -> None:
    assert len({image.tobytes() for split in shapes.values() for image in split.images}) == 900


def test_mean_colour_does_not_give_the_generated_class_away(shapes: dict[str, load_data.Split]) -> None:
    train, test = (split.images.mean((2, 3)) / 255 for split in shapes.values())
    labels = shapes["train"].labels
    centres = np.stack([train[labels == label].mean(0) for label in range(10)])
    nearest = ((test[:, None] - centres) ** 2).sum(-1).argmin(1)
    weights = np.linalg.lstsq(np.c_[train, np.ones(600)], np.eye(10)[labels], rcond=None)[0]
    linear = (np.c_[test, np.ones(300)] @ weights).argmax(1)
    for guess in (nearest, linear):
        assert (guess == shapes["test"].labels).mean() < 0.17  # chance is 0.10 with a deviation of 0.017


# Download


class Server(ThreadingHTTPServer):
    """Sends `body`, or only its first `cut` bytes, in small pieces, and counts what it sent.

    `redirect` is an address to go to instead; with `hang` the connection stays open after the cut until set.
    """

    body, content_type, sent, status = b"", "application/x-gzip", 0, 200
    cut: int | None = None
    redirect: str | None = None
    hang: threading.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/stl10_binary.tar.gz"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        if self.path != "/stl10_binary.tar.gz":
            return self.send_error(404)
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            return self.end_headers()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.send_response(server.status)
        self.send_header("Content-Type", server.content_type)
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        body = server.body[: server.cut]
        try:
            for start in range(0, len(body), 1 << 14):
                server.sent += self.connection.send(body[start : start + (1 << 14)])
        except OSError:
            pass  # the client has what it wants
        if server.hang:
            server.hang.wait(30)
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(load_data, "URL", server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def members(tiny_stl10: Path) -> dict[str, bytes]:
    """The members of the archive in the published order; data/stl10_binary is gone."""
    labelled = contents(FOLDER)
    shutil.rmtree("data")
    unlabelled = np.random.default_rng(1).bytes(12_000_000)  # incompressible
    return {name: labelled[name] for name in LABELLED} | {"unlabeled_X.bin": unlabelled} | TEXTS


def packed(members: dict[str, bytes], folder: str = "stl10_binary/") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        directory = tarfile.TarInfo("stl10_binary")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, content in members.items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_download_stops_as_soon_as_the_labelled_files_are_out(
    server: Server, members: dict[str, bytes]
) -> None:
    server.body = packed(members)
    needed = len(packed({name: members[name] for name in LABELLED}))
    download(Path("data"), server.url, 5)
    assert contents(FOLDER) == {name: members[name] for name in LABELLED}
    # Besides what is needed, the buffers of the two sockets were filled, and no more.
    assert server.sent < needed + 5_000_000 < len(server.body) - 5_000_000


def test_a_download_finds_the_labelled_files_behind_the_others(
    server: Server, members: dict[str, bytes]
) -> None:
    server.body = packed(dict(reversed(members.items())))
    download(Path("data"), server.url, 5)
    assert contents(FOLDER) == {name: members[name] for name in LABELLED} | TEXTS


def test_auto_and_stl10_download_what_is_missing(server: Server, members: dict[str, bytes]) -> None:
    server.body = packed(members)
    assert find_dataset("auto", Path("data")) == "stl10"
    (FOLDER / "test_y.bin").unlink()
    assert find_dataset("stl10", Path("data")) == "stl10"
    assert len(load_split("stl10", Path("data"), "test").labels) == 30


def test_a_cut_connection_leaves_whole_files_only(server: Server, members: dict[str, bytes]) -> None:
    server.body = packed(members)
    server.cut = len(packed({"test_X.bin": members["test_X.bin"]})) + 300_000  # in the midst of train_X.bin
    with pytest.raises(DownloadError):
        download(Path("data"), server.url, 5)
    assert contents(FOLDER) == {name: members[name] for name in ("test_X.bin", "test_y.bin")}
    # STL-10 can evidently be had: "auto" does not make do with shapes, and the next run goes on.
    assert "run again" in error_of(find_dataset, "auto", Path("data"))
    server.cut = None
    assert find_dataset("auto", Path("data")) == "stl10"


def test_an_archive_without_one_of_the_files_is_named(server: Server, members: dict[str, bytes]) -> None:
    del members["train_y.bin"]
    server.body = packed(members)
    with pytest.raises(DownloadError, match=r"^the archive ended before train_y\.bin$"):
        download(Path("data"), server.url, 5)


@pytest.mark.parametrize("damage", [lambda content: content[:-1] + b"?", lambda content: content + b"?"])
def test_a_member_with_another_md5_sum_or_size_is_not_kept(
    server: Server, members: dict[str, bytes], damage: Any
) -> None:
    server.body = packed(members | {"train_X.bin": damage(members["train_X.bin"])})
    with pytest.raises(DownloadError, match=r"train_X\.bin in the archive has the wrong size or md5 sum"):
        download(Path("data"), server.url, 5)
    assert set(contents(FOLDER)) == {"test_X.bin", "test_y.bin"}


def test_an_interrupted_download_leaves_whole_files_only(
    server: Server, members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(tqdm):  # type: ignore[type-arg]
        total_sent = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.total_sent += int(n or 0)
            if self.total_sent > len(members["test_X.bin"]) + 100:
                assert list(FOLDER.glob("*.partial"))
                raise KeyboardInterrupt
            return None

    server.body = packed(members)
    monkeypatch.setattr(load_data, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(Path("data"), server.url, 5)
    assert set(contents(FOLDER)) == {"test_X.bin", "test_y.bin"}


def test_a_web_page_instead_of_the_archive_is_named(server: Server) -> None:
    server.body, server.content_type = b"<html>Log in to the network</html>", "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="web page"):
        download(Path("data"), server.url, 5)
    server.content_type = "application/x-gzip"
    with pytest.raises(DownloadError, match="not a gzip file"):
        download(Path("data"), server.url, 5)
    assert not FOLDER.exists()


def test_a_missing_page_is_named(server: Server) -> None:
    with pytest.raises(DownloadError, match="404"):
        download(Path("data"), server.url + ".gone", 5)


def test_hostile_members_write_nothing_outside_the_folder(server: Server, members: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            link = tarfile.TarInfo("stl10_binary/train_X.bin")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
        for folder, names in (("../../", ["evil.txt", *LABELLED[:2]]), ("/", [*LABELLED[2:]])):
            for name in names:
                info = tarfile.TarInfo(folder + name)
                info.size = len(members.get(name, b""))
                archive.addfile(info, io.BytesIO(members.get(name, b"")))
    server.body = buffer.getvalue()
    download(Path("data"), server.url, 5)
    assert contents(FOLDER) == {name: members[name] for name in LABELLED}
    assert not any(path.is_symlink() for path in FOLDER.iterdir())
    assert not list(Path("..").rglob("evil.txt"))
    assert not Path("/train_X.bin").exists()


def test_devices_and_second_members_of_a_name_are_left_alone(
    server: Server, members: dict[str, bytes]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            device = tarfile.TarInfo("stl10_binary/test_X.bin")
            device.type, device.devmajor, device.devminor = kind, 1, 5
            archive.addfile(device)
        for name in ("test_X.bin", "test_X.bin", *LABELLED[1:]):
            content = members[name] if name not in contents(FOLDER) else b"evil"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    server.body = buffer.getvalue()
    download(Path("data"), server.url, 5)
    assert contents(FOLDER) == {name: members[name] for name in LABELLED}


def test_what_is_there_already_is_not_replaced(server: Server, members: dict[str, bytes]) -> None:
    own = {"fold_indices.txt": b"my own folds", "test_y.bin": members["test_y.bin"]}
    FOLDER.mkdir(parents=True)
    for name, content in own.items():
        (FOLDER / name).write_bytes(content)
    server.body = packed(dict(reversed((members | {"test_y.bin": b"evil"}).items())))
    download(Path("data"), server.url, 5)
    assert contents(FOLDER) == {name: members[name] for name in LABELLED} | TEXTS | own


def test_a_server_that_stops_in_the_middle_is_given_up(server: Server, members: dict[str, bytes]) -> None:
    server.body = packed(members)
    server.cut = len(packed({"test_X.bin": members["test_X.bin"]})) + 300_000
    server.hang = threading.Event()
    try:
        with pytest.raises(DownloadError, match="timed out"):
            download(Path("data"), server.url, 0.5)
    finally:
        server.hang.set()
    assert contents(FOLDER) == {name: members[name] for name in ("test_X.bin", "test_y.bin")}


def test_an_address_that_has_moved_is_followed_but_not_in_circles(
    server: Server, members: dict[str, bytes]
) -> None:
    server.redirect = server.url
    with pytest.raises(DownloadError, match="redirect"):
        download(Path("data"), server.url, 5)
    server.redirect = Path("/etc/passwd").as_uri()
    with pytest.raises(DownloadError, match="not allowed"):
        download(Path("data"), server.url, 5)
    server.body = packed(members)
    with Server(("127.0.0.1", 0), Handler) as moved:
        moved.redirect, server.redirect = server.url, None
        thread = threading.Thread(target=moved.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        download(Path("data"), moved.url, 5)
        moved.shutdown()
        thread.join()
    assert contents(FOLDER) == {name: members[name] for name in LABELLED}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"busy", 503, "503"),
        (b"", 200, "not a gzip file"),
        (b"<html>Log in to the network</html>", 200, "not a gzip file"),
        (gzip.compress(b"no archive " * 1000), 200, "invalid header"),
        (gzip.compress(bytes(20_000)), 200, "the archive ended before test_X.bin, test_y.bin, train_X.bin"),
        (gzip.compress(np.random.default_rng(0).bytes(5000))[:-2000], 200, ""),
        (gzip.compress(b"x" * 600)[:-30] + b"\xff" * 40, 200, ""),
    ],
    ids=["503", "nothing", "a page as a file", "no tar", "zeros", "cut gzip", "damaged gzip"],
)
def test_an_answer_that_is_no_archive_ends_in_one_line(
    server: Server, members: dict[str, bytes], body: bytes, status: int, reason: str
) -> None:
    server.body, server.status, server.content_type = body, status, "application/octet-stream"
    message = error_of(find_dataset, "stl10", Path("data"))
    assert (
        message.startswith(f"STL-10 could not be downloaded from {server.url} ({reason}") or reason in message
    )
    assert "run again, put" in message
    assert not FOLDER.exists() and no_half_files()


def test_archives_damaged_at_random_end_in_one_line(
    members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {name: members[name][:700] for name in LABELLED}
    whole = gzip.decompress(packed(small))
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.choices(range(512 * rng.randrange(1, 8)), k=rng.choice((1, 3, 30))):
            damaged[place] = rng.randrange(256)
        answer = io.BytesIO(gzip.compress(damaged, 1))
        answer.headers = Message()  # type: ignore[attr-defined]
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, answer=answer, **__: answer)
        with pytest.raises(DownloadError) as caught:
            download(Path("data"), "http://127.0.0.1", 5)
        assert "\n" not in str(caught.value)
    assert {path.name for path in Path().rglob("*")} <= {"data", "stl10_binary"}


@pytest.mark.parametrize(
    "full", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "no", "x")]
)
def test_a_disk_that_takes_nothing_is_no_reason_for_generated_images(
    server: Server, members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, full: OSError
) -> None:
    def refuse(*_: Any) -> Any:
        raise full

    monkeypatch.setattr(load_data, "save_member", refuse)
    server.body = packed(members)
    with plain_errors_end_in(r"(No space left on device|x: no); mend that and run again"):
        find_dataset("auto", Path("data"))
    assert not contents(FOLDER)


@contextmanager
def plain_errors_end_in(line: str) -> Iterator[None]:
    with pytest.raises(SystemExit, match=f"^{line}$"), load_data.plain_errors():
        yield


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture
def dead_host(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("no_proxy", "*")
    url = f"http://127.0.0.1:{closed_port()}/stl10_binary.tar.gz"
    monkeypatch.setattr(load_data, "URL", url)
    return url


def test_auto_takes_generated_shapes_with_a_notice_when_the_host_is_dead(
    dead_host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_dataset("auto", Path("data")) == "shapes"
    notice = capsys.readouterr().out
    assert notice.count("\n") >= 6
    assert "GENERATED" in notice
    assert dead_host in notice
    assert "refused" in notice
    assert not Path("data").exists()


def test_stl10_never_falls_back_when_the_host_is_dead(dead_host: str) -> None:
    message = error_of(find_dataset, "stl10", Path("data"))
    assert all(text in message for text in (dead_host, str(FOLDER), '"shapes"', "refused"))


def test_auto_does_not_fall_back_while_some_files_are_there(dead_host: str, tiny_stl10: Path) -> None:
    (FOLDER / "train_X.bin").unlink()
    before = contents(FOLDER)
    assert dead_host in error_of(find_dataset, "auto", tiny_stl10)
    assert contents(FOLDER).items() >= before.items()


def test_a_host_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(DownloadError, match="timed out"),
    ):
        download(Path("data"), f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.2)


def test_shapes_asks_nobody(dead_host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_dataset("shapes", Path("data")) == "shapes"
    assert capsys.readouterr().out == ""


# Array files

PATH = Path("outputs/activations.npz")
MADE_FROM: dict[str, Any] = {
    "checkpoint_sha256": "ab12",
    "dataset": "shapes",
    "class_names": ["disc", "ring"],
}
DAMAGED = f"{PATH} is damaged or no array file of this project: run `uv run deconv_full.py` again"


def reading_error(**dtypes: str) -> str:
    return error_of(load_arrays, PATH, "deconv_full.py", dtypes)


def test_arrays_come_back_as_they_were_written() -> None:
    labels, maxima = np.arange(5), np.ones((5, 2), np.float32)
    save_arrays(PATH, **MADE_FROM, labels=labels, maxima=maxima)
    read = load_arrays(PATH, "deconv_full.py", {"labels": "int64"})
    assert read[:3] == ("ab12", "shapes", ["disc", "ring"])
    assert list(read.arrays) == ["labels"]
    assert (read.arrays["labels"] == labels).all()
    assert [type(text) for text in (*read[:2], *read.class_names)] == [str] * 4
    assert no_half_files()


def test_missing_arrays_name_the_command() -> None:
    assert reading_error() == f"{PATH} not found: run `uv run deconv_full.py` first"


def test_an_array_file_without_a_key_is_refused() -> None:
    save_arrays(PATH, **MADE_FROM)
    assert reading_error(labels="int64") == f"{PATH} has no 'labels': run `uv run deconv_full.py` again"
    np.savez(PATH, labels=np.arange(3))
    assert "has no 'checkpoint_sha256'" in reading_error(labels="int64")


def test_an_array_of_another_type_is_refused() -> None:
    save_arrays(PATH, **MADE_FROM, labels=np.arange(5, dtype=np.int32))
    expected = f"{PATH} has 'labels' of type int32, expected int64: run `uv run deconv_full.py` again"
    assert reading_error(labels="int64") == expected
    np.savez(PATH, checkpoint_sha256=np.array("ab"), dataset=np.array(1.5), class_names=np.array(["a"]))
    assert "has 'dataset' of type float64, expected text" in reading_error()


def test_damaged_foreign_and_pickled_array_files_are_refused() -> None:
    save_arrays(PATH, **MADE_FROM, labels=np.arange(5000))
    whole = PATH.read_bytes()
    flipped = bytearray(whole)
    flipped[-5000] ^= 1
    single = io.BytesIO()
    np.save(single, np.arange(3))
    for content in (b"", b"hello", whole[: len(whole) // 2], flipped, pickle.dumps([1]), single.getvalue()):
        PATH.write_bytes(content)
        assert reading_error(labels="int64") == DAMAGED


def test_pickled_objects_are_not_executed() -> None:
    PATH.parent.mkdir()

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("executed"),)

    made_from: dict[str, Any] = {key: np.array(value) for key, value in MADE_FROM.items()}
    np.savez(PATH, **made_from, labels=np.array(Evil(), object))
    assert reading_error(labels="int64") == DAMAGED
    assert not Path("executed").exists()


def test_an_array_that_is_not_asked_for_is_not_read() -> None:
    save_arrays(PATH, **MADE_FROM, labels=np.arange(5), big=np.zeros(5000))
    content = bytearray(PATH.read_bytes())
    content[-5000] ^= 1  # in the midst of big
    PATH.write_bytes(content)
    assert len(load_arrays(PATH, "deconv_full.py", {"labels": "int64"}).arrays["labels"]) == 5
    assert reading_error(big="float64") == DAMAGED


def test_an_interrupted_write_leaves_the_earlier_file(monkeypatch: pytest.MonkeyPatch) -> None:
    save_arrays(PATH, **MADE_FROM, labels=np.arange(5))
    before = PATH.read_bytes()

    def interrupted(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_arrays(PATH, **MADE_FROM, labels=np.arange(9))
    assert contents(PATH.parent) == {PATH.name: before}


# Whole files and plain errors


def test_two_processes_write_one_file_without_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("outputs/a.txt")
    with load_data.whole_file(path) as first:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)  # stands for another run
            with load_data.whole_file(path) as second:
                first.write_text("first")
                second.write_text("second")
                assert first != second and "partial" in first.name and "partial" in second.name
            assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert contents(Path("outputs")) == {"a.txt": b"first"}


def test_only_left_over_partial_files_of_the_same_file_are_removed() -> None:
    parent, old = os.getppid(), time.time() - 100_000
    kept = [
        f"a.txt.{parent}.partial",
        "b.txt.999999999.partial",
        "a.txt.mine.partial",
        "a.txt.1",
        *(["a.txt.1.partial"] if parent != 1 else []),  # in a container the parent may be process 1
    ]
    gone = ["a.txt.999999999.partial", "a.txt.99999999999999999999.partial"]
    for name in kept + gone:
        Path(name).touch()
    os.utime("a.txt.mine.partial", (old, old))
    with load_data.whole_file("a.txt") as partial:
        partial.touch()
    assert sorted(contents(Path())) == sorted([*kept, "a.txt"])
    os.utime(f"a.txt.{parent}.partial", (old, old))
    with load_data.whole_file("a.txt") as partial:
        partial.touch()
    assert sorted(contents(Path())) == sorted([*kept[1:], "a.txt"])


def test_memory_that_runs_out_ends_in_one_line() -> None:
    line = "out of memory: close other programs or lower BATCH_SIZE, and run again"
    with plain_errors_end_in(line):
        torch.empty(10**15)
    with plain_errors_end_in(line):
        np.empty(10**15)
    with plain_errors_end_in(line):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="size"), load_data.plain_errors():
        torch.ones(2) + torch.ones(3)  # a mistake of ours stays one


def test_a_file_in_the_place_of_a_folder_and_a_folder_in_that_of_a_file_end_in_one_line() -> None:
    Path("outputs").touch()
    with plain_errors_end_in("outputs: .*; mend that and run again"), load_data.whole_file("outputs/a.txt"):
        pass
    Path("figures/a.png").mkdir(parents=True)
    line = "figures/a.png: Is a directory; mend that and run again"
    with plain_errors_end_in(line), load_data.whole_file("figures/a.png") as partial:
        partial.touch()
    assert no_half_files()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_told_with_the_file_that_did_not_fit(number: int) -> None:
    line = f"outputs/a.txt: {os.strerror(number)}; mend that and run again"
    with plain_errors_end_in(line), load_data.whole_file("outputs/a.txt") as partial:
        partial.write_text("half")
        raise OSError(number, os.strerror(number))
    assert contents(Path("outputs")) == {}


def test_a_figure_with_characters_that_the_font_lacks_is_written_without_a_warning() -> None:
    figure = plt.figure(figsize=(1, 1))
    figure.suptitle("日本")
    load_data.save_figure(figure, Path("outputs/a.png"))  # a warning would fail the test
    assert contents(Path("outputs"))["a.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("closed", "line"),
    [
        (True, "the output was closed before the end; run again with all of it shown"),
        (False, "No space left on device; mend that and run again"),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nobody_takes_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, closed: bool, line: str
) -> None:
    def output() -> TextIO:
        if not closed:
            return Path("/dev/full").open("w")
        reader, writer = os.pipe()
        os.close(reader)
        return os.fdopen(writer, "w")

    for count in (1, 100_000):  # kept back to the end, or written in between
        with output() as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with plain_errors_end_in(line):
                for _ in range(count):
                    print("line")
            stream.flush()  # as Python does at the end: no second complaint, which would change the status
        with output() as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with plain_errors_end_in("another reason"):
                print("line")
                raise SystemExit("another reason")
            stream.flush()


# The script


def test_main_reports_and_draws_the_real_layout(tiny_stl10: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_data.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "STL-10: 40 training and 30 test images, 3 x 96 x 96"
    assert lines[-2:] == ["wrote outputs/sample_images.png", "next: uv run train_CNN.py"]
    assert Path("outputs/sample_images.png").read_bytes().startswith(b"\x89PNG")
    assert no_half_files()
    assert not plt.get_fignums()


def test_main_says_generated_where_the_images_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load_data, "DATASET", "shapes")
    monkeypatch.setattr(load_data, "SHAPES_IMAGES", {"train": 20, "test": 10})
    load_data.main()
    assert capsys.readouterr().out.startswith("generated shapes: 20 training and 10 test images")
    assert Path("outputs/sample_images.png").exists()


def test_a_class_without_images_has_a_white_row(write_split: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        write_split(split, np.zeros((5, 3, 96, 96)), np.array([3, 3, 3, 9, 9]))
    load_data.main()
    assert re.search(r"airplane +0 +0\n", capsys.readouterr().out)
    data, names = load_split("stl10", Path("data"), "train"), load_data.class_names("stl10")
    figure = load_data.draw_samples(data, names, "heading")
    sheet = figure.axes[0].images[0].get_array()
    assert sheet is not None and sheet.shape == (1000, 300, 3)
    assert (sheet[:200] == 255).all() and (sheet[202:298, 2:98] == 0).all()
    assert (sheet[802:898, 102:198] == 0).all() and (sheet[800:900, 200:] == 255).all()
    plt.close(figure)


def test_the_sheet_has_one_row_a_class_with_its_name(tiny_stl10: Path) -> None:
    data, names = load_split("stl10", tiny_stl10, "train"), load_data.class_names("stl10")
    figure = load_data.draw_samples(data, names, "STL-10: heading")
    (ax,) = figure.axes
    sheet = ax.images[0].get_array()
    assert sheet is not None
    assert sheet.shape == (1000, 400, 3)  # four images of each class
    first_truck = data.images[np.flatnonzero(data.labels == 9)[0]]
    assert (sheet[902:998, 2:98] == first_truck.transpose(1, 2, 0)).all()
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert ax.get_title() == "STL-10: heading"
    plt.close(figure)
