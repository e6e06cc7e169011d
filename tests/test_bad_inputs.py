"""Give every reader what a user can get wrong: each ends in one line that says so, and no file changes."""

import io
import os
import pickle
import random
import socket
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WriteSplit
from PIL import Image

import deconv
import load_data
from CNN import CNN, choose_device, layer_index, load_checkpoint, save_checkpoint
from load_data import find_dataset, load_arrays, load_split, plain_errors

VARIANTS = int(os.environ.get("VARIANTS", "200"))  # damaged files of each kind
CHECKPOINT, ARRAYS, PICTURE = Path("outputs/CNN.pth"), Path("outputs/activations.npz"), Path("picture.png")
DATA, FOLDER = Path("data"), Path("data/stl10_binary")
TYPES = {"labels": "int64", "values": "float32"}

Read = Callable[[], object]
Make = Callable[[WriteSplit], Read]  # makes a bad input in the empty working folder and returns what reads it


def read_checkpoint() -> object:
    return load_checkpoint(CHECKPOINT)


def read_arrays() -> object:
    return load_arrays(ARRAYS, "deconv_full.py", TYPES)


def read_picture() -> object:
    return deconv.load_picture(PICTURE)


# Checkpoints


@cache
def valid_content() -> dict[str, Any]:
    torch.manual_seed(0)
    path = Path("valid.pth")
    save_checkpoint(
        path,
        CNN(filters=(2, 2, 2, 2)),
        dataset="stl10",
        class_names=[f"class {k}" for k in range(10)],
        mean=[0.4] * 3,
        std=[0.2] * 3,
        seed=3,
        epochs=7,
        metrics={"test_accuracy": 0.5},
    )
    content: dict[str, Any] = torch.load(path, weights_only=True)
    path.unlink()
    return content


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def changed(**entries: Any) -> bytes:
    """A checkpoint with other entries."""
    return saved({**valid_content(), **entries})


def with_config(**config: Any) -> bytes:
    return changed(config={**valid_content()["config"], **config})


def with_weights(convert: Callable[[torch.Tensor], object], name: str = "classifier.weight") -> bytes:
    weights = valid_content()["state_dict"]
    return changed(state_dict=OrderedDict(weights, **{name: convert(weights[name])}))


class Call:
    """Pickled, it stands for the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def repacked(content: bytes, member: str, damage: Callable[[bytes], bytes], compress: bool = False) -> bytes:
    """A zip archive in which one member is another, with the checksum of what it is now."""
    stream, kind = io.BytesIO(), zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, damage(old.read(name)) if name.endswith(member) else old.read(name))
    return stream.getvalue()


def old_format(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def picture_bytes() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(stream, "PNG")
    return stream.getvalue()


def checkpoint(content: Callable[[], bytes]) -> Make:
    def make(_: WriteSplit) -> Read:
        CHECKPOINT.parent.mkdir()
        CHECKPOINT.write_bytes(content())
        return read_checkpoint

    return make


def no_file(path: Path, read: Read, folder: bool = False) -> Make:
    def make(_: WriteSplit) -> Read:
        if folder:
            path.mkdir(parents=True)
        return read

    return make


FOREIGN = "outputs/CNN.pth is damaged or no checkpoint of this project: delete it and run `uv run train_CNN"
UNFIT = "holds weights that do not fit the network it describes"
NAMES = "has no valid 'class_names'"
TEN = [f"class {k}" for k in range(10)]

CHECKPOINTS: dict[str, tuple[Make, str]] = {
    "is not there": (no_file(CHECKPOINT, read_checkpoint), "CNN.pth not found: run `uv run train_CNN.py`"),
    "is a folder": (no_file(CHECKPOINT, read_checkpoint, folder=True), "CNN.pth is no file: remove it"),
    **{
        name: (checkpoint(content), FOREIGN)
        for name, content in {
            "is empty": lambda: b"",
            "is text": lambda: b"no checkpoint\n" * 100,
            "is a picture": picture_bytes,
            "is cut in half": lambda: changed()[: len(changed()) // 2],
            "lacks its last byte": lambda: changed()[:-1],
            "begins with another byte": lambda: b"Q" + changed()[1:],
            "is a list": lambda: saved([1, 2]),
            "is a tensor": lambda: saved(torch.zeros(3)),
            "is in torch's format of 2019": lambda: old_format(valid_content()),
            "is a pickle that runs code": lambda: pickle.dumps(Call(Path.touch, Path("bang"))),
            "holds a pickle that runs code": lambda: saved({"format": Call(Path.touch, Path("bang"))}),
            "holds a pickle that runs torch's code": lambda: saved({"format": Call(torch.hub.load, "a")}),
            "holds a pickle that fills the memory": lambda: saved({"format": Call(bytearray, 10**10)}),
            "unpacks to many times its size": lambda: repacked(
                changed(), "data/0", lambda _: bytes(10**7), compress=True
            ),
            "has a tensor of more numbers than stored": lambda: repacked(
                changed(), "data.pkl", lambda pickled: pickled.replace(b"K\x96", b"K\x97", 1)
            ),
            "has weights on no device": lambda: with_weights(lambda value: value.to("meta")),
            "has a damaged pickle": lambda: repacked(changed(), "data.pkl", lambda pickled: pickled[:-40]),
        }.items()
    },
    **{
        name: (checkpoint(content), fragment)
        for name, (content, fragment) in {
            "has a later format": (lambda: changed(format=2), "format 2, expected 1"),
            "has a tensor for format": (lambda: changed(format=torch.ones(3)), "format Tensor, expected 1"),
            "has True for format": (lambda: changed(format=True), "format True, expected 1"),
            "has an endless number for format": (lambda: changed(format=10**400), "format 1000"),
            "has no weights": (lambda: changed(state_dict=None), "has no valid 'state_dict'"),
            "has a list for config": (lambda: changed(config=[1]), "has no valid 'config' (found [1]"),
            "has another data set": (lambda: changed(dataset="cifar"), "no valid 'dataset' (found 'cifar'"),
            "has a tensor for data set": (lambda: changed(dataset=torch.ones(2)), "no valid 'dataset'"),
            "has names that are one text": (lambda: changed(class_names="abcdefghij"), NAMES),
            "has no names": (lambda: changed(class_names=[]), NAMES),
            "has a name twice": (lambda: changed(class_names=["cat"] * 10), NAMES),
            "has a name that is a number": (lambda: changed(class_names=[*TEN[1:], 1]), NAMES),
            "has a name of two lines": (lambda: changed(class_names=[*TEN[1:], "a\nb"]), NAMES),
            "has a name with a null": (lambda: changed(class_names=[*TEN[1:], "a\0"]), NAMES),
            "has a name that moves the cursor": (lambda: changed(class_names=[*TEN[1:], "a\x1b[2J"]), NAMES),
            "has a name of half a character": (lambda: changed(class_names=[*TEN[1:], "\ud800"]), NAMES),
            "has a blank name": (lambda: changed(class_names=[*TEN[1:], "  "]), NAMES),
            "has a name of a page": (lambda: changed(class_names=[*TEN[1:], "a" * 61]), NAMES),
            "has a name too few": (lambda: changed(class_names=TEN[1:]), "names 9 classes for"),
            "has two means": (lambda: changed(mean=[0.4] * 2), "valid 'mean' (found [0.4, 0.4], expe"),
            "has a mean that is no number": (lambda: changed(mean=[0.4, 0.4, float("nan")]), "valid 'mean'"),
            "has a mean of 100": (lambda: changed(mean=[0.4, 0.4, 100.0]), "three numbers from 0 to 1"),
            "has a mean in text": (lambda: changed(mean=["0.4"] * 3), "has no valid 'mean'"),
            "has a tensor for mean": (lambda: changed(mean=torch.ones(3)), "'mean' (found Tensor, expected"),
            "has a deviation of 0": (lambda: changed(std=[0.2, 0.0, 0.2]), "'std' (found [0.2, 0.0, 0.2]"),
            "has a deviation below 0": (lambda: changed(std=[0.2, -0.2, 0.2]), "has no valid 'std'"),
            "has an infinite deviation": (lambda: changed(std=[0.2, float("inf"), 0.2]), "valid 'std'"),
            "has a seed in text": (lambda: changed(seed="0"), "has no valid 'seed'"),
            "has True for seed": (lambda: changed(seed=True), "'seed' (found True, expected a whole number)"),
            "has half an epoch": (lambda: changed(epochs=0.5), "has no valid 'epochs'"),
            "has a negative epoch": (lambda: changed(epochs=-1), "has no valid 'epochs'"),
            "has no metrics": (lambda: changed(metrics={}), "has no valid 'metrics'"),
            "has an accuracy in text": (lambda: changed(metrics={"test_accuracy": "0.5"}), "valid 'metrics'"),
            "has an accuracy that is no number": (
                lambda: changed(metrics={"test_accuracy": float("nan")}),
                "has no valid 'metrics'",
            ),
            "has an accuracy of 50": (lambda: changed(metrics={"test_accuracy": 50}), "from 0 to 1"),
            "has a metric that is a tensor": (
                lambda: changed(metrics={"test_accuracy": 0.5, "loss": torch.ones(2)}),
                "has no valid 'metrics'",
            ),
            "was measured on markup": (
                lambda: changed(measured_on=r"$\frac{"),
                "expected 'test' or 'held-out training'",
            ),
            "has a weight that is not finite": (
                lambda: with_weights(lambda value: value / 0, "classifier.bias"),
                "not finite",
            ),
            "has a variance below zero": (
                lambda: with_weights(lambda value: value - 2, "blocks.0.bn.running_var"),
                "negative variance",
            ),
        }.items()
    },
    **{
        name: (checkpoint(content), UNFIT)
        for name, content in {
            "has weights in 16 bits": lambda: with_weights(torch.Tensor.half),
            "has weights in 64 bits": lambda: with_weights(torch.Tensor.double),
            "has a list for a weight": lambda: with_weights(torch.Tensor.tolist),
            "has weights of another shape": lambda: with_weights(torch.t),
            "has a weight too many": lambda: changed(
                state_dict={**valid_content()["state_dict"], "more": torch.ones(1)}
            ),
            "has a billion filters": lambda: with_config(filters=[10**9] * 4),
            "has ten million filters": lambda: with_config(filters=[2, 2, 2, 10**7]),
            "has 10,000 filters": lambda: with_config(filters=[10_000] * 4),
            "has filters without end": lambda: with_config(filters=torch.ones(1).expand(10**12)),
            "has filters in text": lambda: with_config(filters="2222"),
            "has no filter": lambda: with_config(filters=[2, 2, 2, 0]),
            "has three layers": lambda: with_config(filters=[2, 2, 2]),
            "has True for a stride": lambda: with_config(strides=[2, 1, 1, True]),
            "has a stride of 0": lambda: with_config(strides=[2, 1, 1, 0]),
            "has an even kernel": lambda: with_config(kernel_sizes=[5, 3, 3, 4]),
            "pools more than there is": lambda: with_config(pool_sizes=[2, 2, 2, 96]),
            "has a dropout of 2": lambda: with_config(dropout=2.0),
            "has a dropout that is no number": lambda: with_config(dropout=float("nan")),
            "has a head without end": lambda: with_config(head_size=10**9),
            "has a billion classes": lambda: with_config(classes=10**9),
            "has a setting too many": lambda: with_config(surprise=1),
            "has a setting whose name is a number": lambda: changed(config={1: 2}),
            "has zeros without end for weights": lambda: changed(
                config={**valid_content()["config"], "classes": 10_000, "head_size": 96},
                state_dict={
                    **valid_content()["state_dict"],
                    "classifier.weight": torch.zeros(1).expand(10_000, 2 * 96**2),
                    "classifier.bias": torch.zeros(10_000),
                },
                class_names=[f"class {k}" for k in range(10_000)],
            ),
        }.items()
    },
}


# Array files


def valid_arrays(**arrays: Any) -> bytes:
    content: dict[str, Any] = {"checkpoint_sha256": "ab" * 32, "dataset": "stl10", "class_names": ["a", "b"]}
    content |= {"labels": np.arange(50), "values": np.ones((5, 6), np.float32)} | arrays
    stream = io.BytesIO()
    np.savez(stream, **{key: value for key, value in content.items() if value is not None})
    return stream.getvalue()


def header(shape: str, kind: str = "<i8") -> bytes:
    """An .npy file that claims much and holds 16 bytes."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(16)


def other_labels(content: bytes, compress: bool = False) -> bytes:
    return repacked(valid_arrays(), "labels.npy", lambda _: content, compress)


def array_file(content: Callable[[], bytes]) -> Make:
    def make(_: WriteSplit) -> Read:
        ARRAYS.parent.mkdir()
        ARRAYS.write_bytes(content())
        return read_arrays

    return make


def single_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.arange(3))
    return stream.getvalue()


DAMAGED = "outputs/activations.npz is damaged or no array file of this project: run `uv run deconv_full.py`"

ARRAY_FILES: dict[str, tuple[Make, str]] = {
    "is not there": (no_file(ARRAYS, read_arrays), "activations.npz not found: run `uv run deconv_full.py`"),
    "is a folder": (no_file(ARRAYS, read_arrays, folder=True), "activations.npz is no file: remove it"),
    **{
        name: (array_file(content), DAMAGED)
        for name, content in {
            "is empty": lambda: b"",
            "is text": lambda: b"no arrays\n" * 100,
            "is a single array": single_array,
            "is cut in half": lambda: valid_arrays()[: len(valid_arrays()) // 2],
            "lacks its last byte": lambda: valid_arrays()[:-1],
            "holds objects that run code": lambda: valid_arrays(
                labels=np.array(Call(Path.touch, Path("bang")), object)
            ),
            "is a pickle that runs code": lambda: pickle.dumps(Call(Path.touch, Path("bang"))),
            "claims a trillion labels": lambda: other_labels(header("(1000000000000,)")),
            "claims a billion labels": lambda: other_labels(header("(1000000000,)")),
            "claims a text of a billion characters": lambda: other_labels(header("()", "<U1000000000")),
            "claims fewer labels than none": lambda: other_labels(header("(-1, -2)")),
            "has a header that is no dict": lambda: other_labels(b"\x93NUMPY\x01\x00\x76\x00" + b"{('" * 40),
            "has a header of a later version": lambda: other_labels(b"\x93NUMPY\x09\x00" + bytes(200)),
            "unpacks to many times its size": lambda: other_labels(bytes(10**7), compress=True),
        }.items()
    },
    **{
        name: (array_file(content), fragment)
        for name, (content, fragment) in {
            "lacks labels": (lambda: valid_arrays(labels=None), "has no 'labels': run `uv run deconv"),
            "lacks the checkpoint": (lambda: valid_arrays(checkpoint_sha256=None), "no 'checkpoint_sha256'"),
            "has labels of another type": (lambda: valid_arrays(labels=np.ones(3)), "expected int64"),
            "has a number for data set": (lambda: valid_arrays(dataset=1), "'dataset' of type int64"),
            "has two data sets": (lambda: valid_arrays(dataset=["a", "b"]), "'dataset' of another shape"),
            "has one class name": (lambda: valid_arrays(class_names="a"), "'class_names' of another shape"),
            "has text of no characters": (
                lambda: repacked(valid_arrays(), "dataset.npy", lambda c: c[:-4] + b"\xff\xff\xff\x7f"),
                "not printable",
            ),
            "has a class name of two lines": (lambda: valid_arrays(class_names=["a\nb"]), "not printable"),
        }.items()
    },
}


# Data


def data(change: Callable[[], object], setting: str = "stl10") -> Make:
    def make(write_split: WriteSplit) -> Read:
        for split in ("train", "test"):
            write_split(split, np.zeros((2, 3, 96, 96)), np.array([1, 10]))
        change()
        return lambda: (
            load_split("stl10", DATA, "train") if setting == "split" else find_dataset(setting, DATA)
        )

    return make


def labels(*values: int) -> Make:
    def make(write_split: WriteSplit) -> Read:
        write_split("train", np.zeros((len(values), 3, 96, 96)), np.array(values))
        return lambda: load_split("stl10", DATA, "train")

    return make


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[], object]:
    return lambda: (FOLDER / name).write_bytes(change((FOLDER / name).read_bytes()))


def replace(path: Path, make: Callable[[Path], object]) -> Callable[[], object]:
    def change() -> None:
        for old in sorted(path.rglob("*"), reverse=True):
            old.rmdir() if old.is_dir() else old.unlink()
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)

    return change


def only(name: str) -> Callable[[], object]:
    def change() -> None:
        for path in FOLDER.iterdir():
            if path.name != name:
                path.unlink()

    return change


NO_FOLDER = "is no folder: remove it, or set DATA_DIR"
AGAIN = "delete it and run again"

DATA_FILES: dict[str, tuple[Make, str]] = {
    "lack a byte": (data(edit("train_X.bin", lambda c: c[:-1])), f"55,295 bytes, expected 55,296: {AGAIN}"),
    "have a byte more": (
        data(edit("train_X.bin", lambda c: c + b"?")),
        f"55,297 bytes, expected 55,296: {AGAIN}",
    ),
    "have another byte": (data(edit("test_X.bin", lambda c: b"\1" + c[1:])), "test_X.bin has the md5 sum"),
    "are empty": (data(edit("train_y.bin", lambda c: b"")), "train_y.bin has 0 bytes, expected 2"),
    "have label 0": (labels(5, 0), "train_y.bin has labels from 0 to 5, expected 1 to 10"),
    "have label 11": (labels(5, 11), "train_y.bin has labels from 5 to 11, expected 1 to 10"),
    "are one of four and no network": (data(only("test_X.bin")), "could not be downloaded"),
    "are one of four and no network, auto": (data(only("test_X.bin"), "auto"), "could not be downloaded"),
    "are not there": (data(replace(FOLDER, lambda path: None), "split"), "not found: run `uv run load_data"),
    "include a folder": (data(replace(FOLDER / "train_y.bin", Path.mkdir)), "train_y.bin is no file"),
    "are a dangling link": (
        data(replace(DATA, lambda path: path.symlink_to("gone")), "auto"),
        f"data {NO_FOLDER}",
    ),
    "are a file": (data(replace(DATA, Path.touch), "auto"), f"data {NO_FOLDER}"),
    "are a file in a folder": (data(replace(FOLDER, Path.touch), "auto"), f"stl10_binary {NO_FOLDER}"),
    "are called otherwise": (data(lambda: None, "cifar"), "DATASET is 'cifar'; allowed are"),
}


# Pictures, devices and other settings


def picture(content: Callable[[], bytes]) -> Make:
    def make(_: WriteSplit) -> Read:
        PICTURE.write_bytes(content())
        return read_picture

    return make


def sized(width: int, height: int) -> bytes:
    """A PNG that claims to have so many pixels."""
    content = bytearray(picture_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def truncated_jpeg() -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()[:5000]


def float_picture() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ones((20, 20), np.float32)).save(stream, "TIFF")
    return stream.getvalue()


def folder(make: Callable[[Path], object]) -> Make:
    def prepare(_: WriteSplit) -> Read:
        make(Path("results"))
        return lambda: load_data.prepare_folders("OUTPUTS", Path("results"), Path("results/deconv"))

    return prepare


def calls(function: Callable[..., object], *arguments: Any) -> Make:
    return lambda _: lambda: function(*arguments)


UNREADABLE = "IMAGE is 'picture.png', which cannot be read as a picture"

NO_IMAGES: list[Any] = [True, None, 1.0, np.float64(2), [0], b"picture.png"]
NO_DEVICES: list[Any] = [None, 0, True, 1.5, [], b"cpu", "", " cpu", "CPU", "cuda:99", "xpu", "meta", "cpu:1"]
NO_LAYERS: list[Any] = [None, 1, "conv0", "", ["conv1"]]

SETTINGS: dict[str, tuple[Make, str]] = {
    **{
        f"picture {name}": (picture(content), f"{UNREADABLE}: {reason}")
        for name, (content, reason) in {
            "is empty": (lambda: b"", "cannot identify"),
            "is text": (lambda: b"no picture", "cannot identify"),
            "is cut short": (lambda: picture_bytes()[:60], ""),
            "is a JPEG cut short": (truncated_jpeg, "image file is truncated"),
            "has 60,000 x 60,000 pixels": (lambda: sized(60_000, 60_000), ""),
            "has 9,000 x 9,000 pixels": (lambda: sized(9_000, 9_000), "9,000 x 9,000 pixels"),
            "is a thread": (lambda: sized(1, 50_000_000), "1 x 50,000,000 pixels"),
            "has no pixels": (lambda: sized(0, 0), ""),
            "has fractions": (float_picture, "more than 16 bits a channel"),
        }.items()
    },
    "folder of results is a file": (
        folder(Path.touch),
        "OUTPUTS needs the folder results, but no file can be",
    ),
    "folder of results is a dangling link": (
        folder(lambda path: path.symlink_to("gone")),
        "OUTPUTS needs the folder results, but no file can be written there: File exists; mend that and run",
    ),
    "folder of results is no place for files": (
        folder(lambda path: path.symlink_to("/proc/self")),
        "OUTPUTS needs the folder results, but no file can be written there",
    ),
    "folder of pages is a file": (
        folder(lambda path: [path.mkdir(), (path / "deconv").touch()]),  # type: ignore[func-returns-value]
        "OUTPUTS needs the folder results/deconv, but no file can be written there: File exists",
    ),
    "folder of results has a folder that is called like a table": (
        folder(lambda path: (path / "deconv" / "probes.csv").mkdir(parents=True)),
        "results/deconv/probes.csv is a folder, expected a file or nothing: remove it",
    ),
    "FIGURE is a checkpoint": (
        lambda _: lambda: load_data.check_file_name(".png", FIGURE=CHECKPOINT),
        "FIGURE is 'outputs/CNN.pth'; expected a file name that ends in .png",
    ),
    "picture is not there": (no_file(PICTURE, read_picture), "IMAGE is 'picture.png'; no such file"),
    "picture is a folder": (no_file(PICTURE, read_picture, folder=True), "IMAGE is 'picture.png'; no such"),
    "picture has no name": (calls(deconv.load_picture, Path()), "no such file"),
    "picture has an impossible name": (calls(deconv.load_picture, Path("a\0b")), "no such file"),
    **{
        f"IMAGE is {value!r}": (calls(deconv.check_image, value), f"IMAGE is {value!r}; expected an index")
        for value in NO_IMAGES
    },
    **{
        f"DEVICE is {name!r}": (calls(choose_device, name), f"DEVICE is {name!r}; this machine has")
        for name in NO_DEVICES
    },
    **{
        f"LAYER is {name!r}": (calls(layer_index, name), f"LAYER is {name!r}; this network has conv1")
        for name in NO_LAYERS
    },
}

TABLE = [
    pytest.param(make, fragment, id=f"{subject} {name}".strip())
    for subject, cases in (
        ("a checkpoint that", CHECKPOINTS),
        ("an array file that", ARRAY_FILES),
        ("data that", DATA_FILES),
        ("", SETTINGS),
    )
    for name, (make, fragment) in cases.items()
]


def all_files() -> dict[str, object]:
    """Every path below the working folder with its content; the record of sums already checked is none."""
    return {
        str(path): path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in Path().rglob("*")
        if path.name != "verified.txt"
    }


@contextmanager
def little_memory(limit: int = 1 << 30) -> Iterator[None]:
    """Let this process take no more than another gigabyte, where the system can do that."""
    if sys.platform != "linux":
        yield
        return
    import resource

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def one_line_of(read: Read) -> str:
    """The line in which `read` ends."""
    with warnings.catch_warnings(), pytest.raises(SystemExit) as caught, plain_errors():
        warnings.simplefilter("error")  # a warning would be a second line
        read()
    line = caught.value.code
    assert isinstance(line, str) and line.isprintable() and len(line) < 500
    return line


@pytest.mark.parametrize(("make", "fragment"), TABLE)
def test_a_bad_input_ends_in_one_line_and_changes_no_file(
    make: Make, fragment: str, write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # nobody listens there from here on
    monkeypatch.setattr(load_data, "URL", f"http://127.0.0.1:{port}/stl10_binary.tar.gz")
    monkeypatch.setenv("no_proxy", "*")
    read = make(write_split)
    before = all_files()
    with little_memory():
        assert fragment in one_line_of(read)
    assert all_files() == before


def test_the_good_inputs_that_the_bad_ones_are_made_from_are_read() -> None:
    ARRAYS.parent.mkdir()
    CHECKPOINT.write_bytes(changed())
    ARRAYS.write_bytes(valid_arrays())
    PICTURE.write_bytes(picture_bytes())
    with little_memory():
        read_checkpoint(), read_arrays(), read_picture()


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert or remove bytes, once or several times, or cut the rest off."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        place, length = rng.randrange(len(damaged) + 1), rng.randrange(1, 16)
        kind = rng.choice(("flip", "overwrite", "insert", "remove", "cut")[: 5 if rng.random() < 0.2 else 4])
        if kind == "flip":
            for byte in damaged[place : place + 1]:
                damaged[place] = byte ^ 1 << rng.randrange(8)
        else:
            end = {"insert": place, "cut": len(damaged)}.get(kind, place + length)
            damaged[place:end] = b"" if kind in ("remove", "cut") else rng.randbytes(length)
    return bytes(damaged)


@pytest.mark.parametrize("kind", ["checkpoint", "array file", "picture"])
def test_files_damaged_at_random_are_read_or_refused_in_one_line(kind: str) -> None:
    rng = random.Random(kind)
    members = {
        "checkpoint": ["data.pkl", "version", "byteorder"],
        "array file": ["labels.npy", "dataset.npy"],
    }
    content, path, read = {
        "checkpoint": (changed(), CHECKPOINT, read_checkpoint),
        "array file": (valid_arrays(), ARRAYS, read_arrays),
        "picture": (picture_bytes(), PICTURE, read_picture),
    }[kind]
    path.parent.mkdir(exist_ok=True)
    lines = 0
    for _ in range(VARIANTS):
        if kind in members and rng.random() < 0.7:  # past the checksums
            damaged = repacked(content, rng.choice(members[kind]), lambda member: damage(member, rng))
        else:
            damaged = damage(content, rng)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings(), little_memory():
                warnings.simplefilter("error")
                read()
        except SystemExit as end:
            assert isinstance(end.code, str) and end.code.isprintable() and len(end.code) < 500
            lines += 1
    print(f"{kind}: {VARIANTS} damaged, {lines} refused")
    assert lines > VARIANTS / 4
    assert [found for found in Path().rglob("*") if found.is_file()] == [path]


def test_a_class_name_may_be_markup_formula_or_path() -> None:
    names = [r"$\frac$", "<b>", "=cmd()", "../../etc", "a/b", "C:\\x", "%s{}", "日本", "é", "x" * 60]
    CHECKPOINT.parent.mkdir()
    CHECKPOINT.write_bytes(changed(class_names=names))
    assert load_checkpoint(CHECKPOINT).class_names == names


def test_a_checkpoint_may_be_named_in_text() -> None:
    CHECKPOINT.parent.mkdir()
    CHECKPOINT.write_bytes(changed())
    assert load_checkpoint(str(CHECKPOINT)).seed == 3
