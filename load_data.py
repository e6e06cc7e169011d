"""Read, check and download STL-10, read pictures of one's own, or generate the stand-in `shapes`.

Run:    uv run load_data.py
Reads:  data/stl10_binary/{train,test}_{X,y}.bin, downloaded if they are missing; or the pictures
        data/{train,test}/CLASS/*
Writes: outputs/sample_images.png, and what it downloads

Every later stage takes its images from here, and the functions that read and write array files, tables and
figures. In all paths ~ is the home folder.
"""

import cmath
import errno
import gc
import hashlib
import json
import math
import os
import tarfile
import unicodedata
import urllib.request
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import STL10
from tqdm import tqdm

from CNN import IMAGE_SIZE, Checkpoint, atomic_write, run_script

Array = NDArray[Any]  # docstrings say shape and type

# for this script alone; train_CNN.py has its own
DATASET = "auto"  # "stl10", "folders" (your own), "shapes" (generated) or "auto": STL-10, else shapes
DATA_DIR = Path("data")  # holds the folder stl10_binary, or the folders train and test

# STL-10 as published
URL: str = STL10.url  # 2.6 GB; the labelled files are the first eighth
TIMEOUT = 15.0  # seconds without an answer after which the download is given up
FOLDER = "stl10_binary"
MD5: dict[str, str] = dict(STL10.train_list + STL10.test_list)
FILES = {  # name: (bytes, md5 sum)
    "train_X.bin": (5_000 * 3 * IMAGE_SIZE**2, MD5["train_X.bin"]),
    "train_y.bin": (5_000, MD5["train_y.bin"]),
    "test_X.bin": (8_000 * 3 * IMAGE_SIZE**2, MD5["test_X.bin"]),
    "test_y.bin": (8_000, MD5["test_y.bin"]),
}
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
TITLES = {"stl10": "STL-10", "folders": "your pictures", "shapes": "generated shapes"}  # in figures and logs
HIDDEN = (".", "@eaDir", "__MACOSX")  # beginnings of names of hidden files, which are no pictures of the user
DPI = 200  # of figures
FONTS = (  # that have Chinese, Japanese or Korean letters, on Linux, Windows and macOS
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans JP",
    "Noto Sans SC",
    "Noto Sans KR",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "IPAGothic",
    "NanumGothic",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
)
# Columns of text, whose class names may look like numbers, truth values or nothing: 001, 1e5, True, NA, null
TEXT_COLUMNS = ("checkpoint", "dataset", "class", "preferred_class", "runner_up", "top_class", "taken_for")

# The generated stand-in. A function returns the signed distance of points to the outline of a shape, negative
# inside, in units of its radius. x and y are a point's coordinates, r and t its polar ones, t in turns.
# The distance is exact near straight edges and circles. It is approximate near corners, for the blob and for
# the last four shapes, the textures. All shapes are cut off beyond r = 1.
SHAPES: dict[str, Callable[..., Any]] = {
    "disc": lambda x, y, r, t: r - 0.9,
    "ring": lambda x, y, r, t: abs(r - 0.72) - 0.2,
    "square": lambda x, y, r, t: np.maximum(abs(x), abs(y)) - 0.7,
    "triangle": lambda x, y, r, t: r * np.cos(math.tau / 3 * (3 * t % 1 - 0.5)) - 0.5,
    "cross": lambda x, y, r, t: np.maximum(np.minimum(abs(x), abs(y)) - 0.25, r - 0.9),
    "star": lambda x, y, r, t: r * np.cos(math.tau / 5 * (abs(5 * t % 1 - 0.5) - 1)) - 0.31,
    "stripes": lambda x, y, r, t: np.sin(15 * x) / 15,
    "checker": lambda x, y, r, t: np.sin(8 * x) * np.sin(8 * y) / 8,
    "dots": lambda x, y, r, t: (0.5 - np.cos(14 * x) - np.cos(14 * y)) / 14,
    "spiral": lambda x, y, r, t: np.sin(15 * r + math.tau * t) / 15,
}
CLUTTER: dict[str, Callable[..., Any]] = {
    "blob": lambda x, y, r, t: np.hypot(x, 2 * y) - 0.3,
    "line": lambda x, y, r, t: np.maximum(abs(x) - 2, abs(y) - 0.04),
}
SHAPES_IMAGES = {"train": 2_000, "test": 1_000}
SHAPES_SEEDS = {"train": 1, "test": 2}


class Split(NamedTuple):
    """The images of a split.

    Attributes:
        images: uint8 (images, 3, rows, columns), upright.
        labels: int64 (images,), 0 to classes - 1.
        files: The file of each image as CLASS/NAME, for the user's own pictures; empty for other data sets.
    """

    images: Array
    labels: Array
    files: Array = np.array([], np.str_)

    def select(self, indices: Array) -> "Split":
        """Return the images at `indices`, which may also be a boolean mask."""
        files = self.files[indices] if len(self.files) else self.files
        return Split(self.images[indices], self.labels[indices], files)


class DownloadError(Exception):
    """STL-10 could not be downloaded; the text says why in one line."""


# ---------------------------------------------------------------- which data set, and where it is


def class_names(dataset: str, data_dir: str | Path) -> list[str]:
    """Return the names of the classes, 0, 1, ..., of "stl10", "folders" or "shapes".

    Raises:
        SystemExit: If the folders are missing, their classes are not the same, or fewer than two.
    """
    if dataset != "folders":
        return list(STL10_CLASSES if dataset == "stl10" else SHAPES)

    train = list(class_folders(Path(data_dir).expanduser() / "train"))
    test = list(class_folders(Path(data_dir).expanduser() / "test"))
    if train != test:
        differing = ", ".join(map(repr, sorted(set(train) ^ set(test))))
        raise SystemExit(
            f"{data_dir}/train and {data_dir}/test must hold the same classes; they differ in {differing}"
        )
    if len(train) < 2:
        raise SystemExit(
            f"the classes in {data_dir}/train are {train}; put a folder there for each of two or more"
        )
    return train


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the folders in `folder` by the names of the classes, sorted.

    Raises:
        SystemExit: If `folder` is not there, or two of its folders have the same name but for the encoding.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder.absolute()} not found: put pictures into {folder}/CLASS/ for each class")
    folders: dict[str, Path] = {}
    for path in list_folder(folder):
        if path.is_dir():
            name = composed(path.name)
            if name in folders:
                raise SystemExit(f"{folder} holds two folders called {name!r}: merge them")
            folders[name] = path
    return folders


def composed(name: str) -> str:
    """Return a folder's name as text that can be drawn and printed.

    It is Unicode's NFC, because macOS and others may store Käse as Ka¨se. Bytes that are no UTF-8, as an
    archive from another system can bring, become the replacement character.
    """
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def list_folder(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name, without what file managers and notebooks hide there."""
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(HIDDEN)]
    except OSError as error:
        raise SystemExit(f"the folder {folder} cannot be read: {error.strerror}") from None
    return sorted(paths, key=lambda path: composed(path.name))


def walk(folder: Path, entered: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and in the folders below it; links to folders are followed.

    `entered` are the folders above; a link back to one of them would have no end and is left out.
    """
    entered = (*entered, folder.resolve())
    for path in list_folder(folder):
        if not path.is_dir():
            yield path
        elif path.resolve() not in entered:
            yield from walk(path, entered)


def stl10_folder(data_dir: str | Path) -> Path:
    """Return the folder of STL-10's files: stl10_binary in `data_dir`, or `data_dir` if one lies there."""
    data_dir = Path(data_dir).expanduser()
    return data_dir if any((data_dir / name).exists() for name in FILES) else data_dir / FOLDER


def find_dataset(dataset: str, data_dir: str | Path) -> str:
    """Return what the setting DATASET means here, never "auto"; unpack or download what is missing of STL-10.

    Generated images replace STL-10 only for "auto", only where no file of STL-10 is there, and with a notice.

    Raises:
        SystemExit: If the setting is unknown, or STL-10 is asked for and cannot be had.
    """
    if dataset not in ("auto", *TITLES):
        raise SystemExit(f"DATASET is {dataset!r}; allowed are 'auto', {str(list(TITLES))[1:-1]}")
    if dataset in ("folders", "shapes"):
        return dataset
    folder = stl10_folder(data_dir)
    if all((folder / name).exists() for name in FILES):
        return "stl10"

    # an archive on disk is unpacked; without one, STL-10 is downloaded
    archives = [parent / PurePosixPath(URL).name for parent in (Path(data_dir).expanduser(), folder)]
    archive = next((path for path in archives if path.is_file()), None)
    failure = obtain_stl10(folder, archive)
    if not failure:
        return "stl10"

    # where one of the files or the archive is, STL-10 can be had, and shapes would be a surprise
    by_hand = f"put {', '.join(FILES)} into {folder}"
    if dataset == "stl10" or archive or any((folder / name).exists() for name in FILES):
        raise SystemExit(f'{failure}: run again, {by_hand}, or set DATASET = "shapes"')
    rule = "!" * 100
    print(
        f"{rule}\n!!  {failure}.\n!!  THIS RUN USES GENERATED IMAGES, the set called shapes. To have STL-10"
    )
    print(f"!!  {by_hand}\n!!  and run again.\n{rule}", flush=True)
    return "shapes"


def obtain_stl10(folder: Path, archive: Path | None) -> str:
    """Unpack `archive`, or download STL-10 if it is None; return "", or why that failed, in one line."""
    source = archive or URL
    print(f"reading STL-10 from {source} to {folder}", flush=True)
    try:
        download(folder, archive)
    except DownloadError as error:
        verb = "unpacked" if archive else "downloaded"
        return f"STL-10 could not be {verb} from {source} ({error})"
    return ""


def load_split(dataset: str, data_dir: str | Path, split: str) -> Split:
    """Read and check, or generate, a split of a data set.

    Args:
        dataset: "stl10", "folders" or "shapes".
        data_dir: The folder that holds the data.
        split: "train" or "test".

    Returns:
        Images and labels; of the user's own pictures the files, too.

    Raises:
        SystemExit: If a file of STL-10 is missing or is not the published one; if a folder is missing or
            cannot be read, the classes of both splits differ, or a class has no picture.
    """
    if dataset == "shapes":
        return generate_shapes(split)
    if dataset == "folders":
        return read_folders(Path(data_dir).expanduser() / split, class_names(dataset, data_dir))

    image_path = stl10_folder(data_dir) / f"{split}_X.bin"
    label_path = stl10_folder(data_dir) / f"{split}_y.bin"
    check_file(image_path)
    check_file(label_path)
    # Each channel is stored column by column: (images, 3, columns, rows) -> (images, 3, rows, columns).
    stored = np.memmap(image_path, np.uint8, "r").reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
    labels = np.fromfile(label_path, np.uint8).astype(np.int64) - 1  # 1 to 10 in the file
    return Split(np.ascontiguousarray(stored.transpose(0, 1, 3, 2)), labels)


def fingerprint(data: Split, names: list[str]) -> str:
    """Return the sha256 of a split: its class names, labels and pixels, in their order."""
    digest = hashlib.sha256(json.dumps(names).encode())
    digest.update(np.ascontiguousarray(data.labels).data)
    digest.update(np.ascontiguousarray(data.images).data)
    return digest.hexdigest()


def load_checkpoint_split(checkpoint: Checkpoint, data_dir: str | Path, split: str) -> Split:
    """Read a split and make sure that it is the one the checkpoint's training read.

    Args:
        checkpoint: What `load_checkpoint` returned; its settings hold the `fingerprint` of both splits.
        data_dir: The folder that holds the data.
        split: "train" or "test".

    Returns:
        Images and labels.

    Raises:
        SystemExit: If the data are missing or damaged, or have changed since the training.
    """
    trained_on = checkpoint.settings["data"]
    try:
        names = class_names(checkpoint.dataset, data_dir)
        data = load_split(checkpoint.dataset, data_dir, split)
    except SystemExit as error:
        raise SystemExit(
            f"{error}; the network was trained with DATA_DIR = {trained_on['folder']!r}"
        ) from None
    if fingerprint(data, names) != trained_on[split]:
        here = Path(data_dir).expanduser().absolute()
        raise SystemExit(
            f"the {split} images in {here} are not those that the network was trained with, which were read "
            f"from DATA_DIR = {trained_on['folder']!r}: set DATA_DIR to that folder as it was, or run "
            "`uv run train_CNN.py` again"
        )
    return data


# ---------------------------------------------------------------- reading STL-10 and pictures


def check_file(path: Path) -> None:
    """Raise SystemExit unless `path` is the published file of STL-10: there, right in size and md5 sum."""
    if not path.is_file():
        raise SystemExit(f"{path.absolute()} not found: run `uv run load_data.py` first")
    size, md5 = FILES[path.name]
    advice = "move it elsewhere and run `uv run load_data.py`, which downloads it anew"
    if path.stat().st_size != size:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, expected {size:,}: {advice}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != md5:
        raise SystemExit(f"{path} has the md5 sum {digest}, expected {md5}: {advice}")


def read_picture(path: str | Path) -> Array:
    """Read a picture, crop its centre to a square and resize it to 96 x 96 pixels.

    Args:
        path: A file of any format that Pillow reads, of any size. The picture is turned as its camera says
            (EXIF) and put on white where it is transparent. A grey picture of 16 or 32 bits is scaled so that
            its brightest value becomes white. Pillow itself reduces colours of 16 bits to 8.

    Returns:
        The picture, uint8 (3, 96, 96).

    Raises:
        Exception: If the file is no picture or damaged; what Pillow raises then is of nearly any type.
    """
    Image.MAX_IMAGE_PIXELS = None  # a large photograph of the user's own is no attack
    with Image.open(path) as file:
        # a large JPEG is decoded at an eighth, a quarter or half of its size, several times as fast
        file.draft(None, (4 * IMAGE_SIZE, 4 * IMAGE_SIZE))
        try:
            picture = ImageOps.exif_transpose(file)
        except Exception:  # where the EXIF data are damaged, of nearly any type; the picture may be sound
            picture = file
        if picture.mode.startswith(("I", "F")):  # 16 or 32 bits; convert() would cut them off at 255
            picture = Image.fromarray(to_grey_levels(np.asarray(picture, np.float64)))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        square = ImageOps.fit(picture.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # (rows, columns, 3) -> (3, ...)


def to_grey_levels(values: Array) -> Array:
    """Scale a picture's values to 0 to 255, so that the largest becomes white and 0 becomes black.

    Where there are negative values, the smallest becomes black instead. What is not a number becomes black,
    and infinity counts as the largest finite value.
    """
    finite = values[np.isfinite(values)]
    low = finite.min(initial=0)  # at most 0
    high = finite.max(initial=low)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    levels: Array = 255 * (values - low) / max(high - low, np.finfo(np.float64).tiny)
    return levels.astype(np.uint8)


def read_folders(folder: Path, names: list[str]) -> Split:
    """Read the pictures in folder/NAME/ and the folders below; say what is left out.

    The pictures are shuffled, always in the same way, so that the first of them are of all classes.

    Raises:
        SystemExit: If a class has no picture.
    """
    pictures = []
    for label, path in enumerate(class_folders(folder).values()):
        pictures += [(picture, label) for picture in find_pictures(path)]

    images = []
    labels = []
    files = []
    for path, label in tqdm(pictures, f"reading {folder}", unit=" pictures", disable=None):
        try:
            images.append(read_picture(path))
            labels.append(label)
            files.append(composed(path.relative_to(folder).as_posix()))
        except Exception as error:  # what Pillow raises for a damaged picture is of nearly any type
            tqdm.write(f"{path} cannot be read as a picture and is left out: {error}")

    if skipped := len(pictures) - len(images):
        print(f"{skipped} of {len(pictures):,} pictures in {folder} were left out")
    if empty := ", ".join(repr(name) for label, name in enumerate(names) if label not in labels):
        raise SystemExit(f"{folder} has no picture of {empty}: put some there, or remove the class")
    order = np.random.default_rng(0).permutation(len(images))
    return Split(np.stack(images), np.array(labels, np.int64), np.array(files)).select(order)


def find_pictures(folder: Path) -> list[Path]:
    """Return the files that are pictures by their suffix; print one line on the others."""
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    paths = list(walk(folder))
    pictures = [path for path in paths if path.suffix.lower() in readable]
    if len(pictures) < len(paths):
        others = Counter(p.suffix.lower() or "no suffix" for p in paths if p.suffix.lower() not in readable)
        counts = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common())
        print(f"{folder}: {len(paths) - len(pictures)} other files left out: {counts}")
    return pictures


# ---------------------------------------------------------------- the download


def download(folder: Path, archive: Path | None) -> None:
    """Write the missing files to `folder`; stream `archive`, or URL if None, no further than needed.

    Raises:
        DownloadError: If it failed; files that were whole by then stay.
    """
    missing = {name for name in FILES if not (folder / name).exists()}
    bar = tqdm(total=sum(FILES[name][0] for name in missing), unit="B", unit_scale=True, disable=None)
    try:
        with (
            bar,
            archive.open("rb") if archive else urllib.request.urlopen(URL, timeout=TIMEOUT) as stream,
            tarfile.open(fileobj=stream, mode="r|gz") as members,
        ):
            for member in members:
                name = PurePosixPath(member.name).name  # never its path: it could lead out of the folder
                content = members.extractfile(member)
                if content and name in missing:
                    save_member(content, folder / name, bar)
                    missing.remove(name)
                if not missing:
                    return
    except (OSError, EOFError, HTTPException, tarfile.TarError, zlib.error) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES):
            raise  # this machine's fault, not the network's
        raise DownloadError(" ".join(str(error).split())) from error
    raise DownloadError(f"the archive ended before {', '.join(sorted(missing))}")


def save_member(content: IO[bytes], path: Path, bar: "tqdm[Any]") -> None:
    """Write a member of the archive to `path`, or raise DownloadError if it is not the published file."""
    digest = hashlib.md5()
    with atomic_write(path) as partial:
        with partial.open("wb") as file:
            while block := content.read(1 << 20):
                bar.update(file.write(block))
                digest.update(block)
        if digest.hexdigest() != FILES[path.name][1]:
            raise DownloadError(f"{path.name} in the archive has the wrong md5 sum")


# ---------------------------------------------------------------- generated shapes


def generate_shapes(split: str) -> Split:
    """Draw the split "train" or "test" of the stand-in, always the same."""
    rng = np.random.default_rng(SHAPES_SEEDS[split])
    labels = rng.permutation(np.arange(SHAPES_IMAGES[split], dtype=np.int64) % len(SHAPES))
    return Split(np.stack([draw_image(list(SHAPES)[label], rng) for label in labels]), labels)


def draw_image(shape: str, rng: np.random.Generator) -> Array:
    """Draw one image (3, 96, 96): clutter, the shape, clutter, noise; random colour, place, size, angle."""
    # Shape and ground differ in a random direction of colour space, so no colour gives the class away, and
    # conv1 must see edges between any two colours. With light shapes on dark ground its filters stayed noisy.
    ground = rng.random((3, 1, 1))
    direction = rng.standard_normal((3, 1, 1))
    # One channel differs by 0.5, the others by less. A channel that leaves 0 to 1 comes back in at the other
    # end (% 1), where a difference of 0.5 is one of 0.5 again.
    shape_colour = (ground + 0.5 * direction / abs(direction).max()) % 1

    # four pieces of clutter, some behind the shape and up to two in front of it
    clutter = rng.choice(list(CLUTTER), 4).tolist()
    in_front = rng.integers(3)
    layers = [*clutter[in_front:], shape, *clutter[:in_front]]

    # a point of the plane is a complex number: column + i * row
    grid = np.arange(IMAGE_SIZE, dtype=np.complex64) + 1j * np.arange(IMAGE_SIZE, dtype=np.float32)[:, None]
    canvas = np.broadcast_to(ground, (3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    for name in layers:
        radius = rng.uniform(22, 40)  # pixels
        centre = complex(*rng.uniform(0.8 * radius, IMAGE_SIZE - 0.8 * radius, 2))
        turn = cmath.exp(1j * rng.uniform(0, math.tau))
        points = (grid - centre) * (turn / radius)
        turns = np.angle(points) / math.tau
        distance = (SHAPES | CLUTTER)[name](points.real, points.imag, abs(points), turns)
        if name == shape:
            distance = np.maximum(distance, abs(points) - 1)
        coverage = np.clip(0.5 - radius * distance, 0, 1)  # edges are smooth over one pixel
        colour = shape_colour if name == shape else rng.random((3, 1, 1))
        canvas += coverage * (colour.astype(np.float32) - canvas)

    canvas += rng.standard_normal(canvas.shape, np.float32) * rng.uniform(0.05, 0.1)
    return (255 * canvas.clip(0, 1)).round().astype(np.uint8)


# ---------------------------------------------------------------- normalisation and augmentation


def mean_and_std(images: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation of each channel of uint8 images, on a scale of 0 to 1, (3,) each.

    The standard deviation is at least one grey level, so that a channel that is the same in all pixels can be
    divided by it.
    """
    # a channel's histogram says how often each of the 256 grey levels occurs; bincount takes 8 bytes a pixel,
    # so it counts some images at a time
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 500):
        for channel in range(3):
            pixels = images[start : start + 500, channel].ravel()
            counts[channel] += np.bincount(pixels, minlength=256)

    shares = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256) / 255
    mean = shares @ levels
    variance = shares @ levels**2 - mean**2
    return mean, np.sqrt(np.maximum(variance, 1 / 255**2))


class Augmentation(NamedTuple):
    """How far training images are changed at most, drawn anew for every image.

    Half of the images are flipped, always. For classes that a mirror image would change, such as letters,
    remove `flip` from `x_scale` in `warp`.
    """

    shift: float = 0  # pixels in each direction
    zoom: float = 0  # change of size and of aspect ratio: 0.25 makes a side 0.64 to 1.56 times as long
    rotation: float = 0  # degrees
    colour: float = 0  # change of contrast and saturation (relative) and brightness (in standard deviations)
    cutout: int = 0  # side in pixels of a square set to the mean colour; 0 for none (DeVries & Taylor 2017)


def augment(images: Tensor, strength: Augmentation, generator: torch.Generator) -> Tensor:
    """Change each image of a batch at random: flip and warp it, recolour it, cut a square out of it.

    Every image has changes of its own. torchvision's transforms draw one change for a whole batch, or work
    image by image, which is slower.

    Args:
        images: Normalised images, float32 (images, 3, rows, columns).
        strength: How far they are changed at most.
        generator: Draws the changes; it is on the CPU, so that a seed means the same on every device.

    Returns:
        The changed images, of the same shape.
    """
    images = warp(images, strength, generator)
    images = recolour(images, strength.colour, generator)
    return cut_out(images, strength.cutout, generator) if strength.cutout else images


def draw_uniform(limit: float, draws: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw numbers from -limit to limit, (draws, images), on the device of the images."""
    numbers = torch.rand(draws, len(images), generator=generator)
    return ((2 * numbers - 1) * limit).to(images.device)


def warp(images: Tensor, strength: Augmentation, generator: torch.Generator) -> Tensor:
    """Flip half of the images; scale, rotate and translate all, in one resampling.

    Beyond the border the image is continued by its mirror image. See `augment` for the arguments.
    """
    count, _, _, width = images.shape
    # what is drawn has one number for each image, (images,)
    flip = draw_uniform(1, 1, images, generator).sign()[0]  # -1 or 1
    # `stretch` is the square root of the aspect ratio
    size, stretch = torch.exp(draw_uniform(math.log1p(strength.zoom), 2, images, generator))
    angle = draw_uniform(math.radians(strength.rotation), 1, images, generator)[0]
    # affine_grid measures positions in half frames from the centre
    right, down = draw_uniform(2 * strength.shift / width, 2, images, generator)

    # a matrix for each image: from a position in the new image to the position where its colour is taken
    #   ( cos  -sin ) ( x_scale     0    ) ( x )     ( right )
    #   ( sin   cos ) (    0     y_scale ) ( y )  +  ( down  )
    x_scale = flip * size * stretch
    y_scale = size / stretch
    cos = angle.cos()
    sin = angle.sin()
    entries = [x_scale * cos, -y_scale * sin, right, x_scale * sin, y_scale * cos, down]
    matrices = torch.stack(entries, dim=1).view(count, 2, 3)  # six entries (images,) -> (images, 2, 3)
    positions = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, positions, padding_mode="reflection", align_corners=False)


def recolour(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change contrast, saturation and brightness of each image by at most `strength`.

    A pixel, its three channels, becomes contrast * (grey + saturation * (pixel - grey)) + brightness, where
    grey is the mean of the three. This is one 3 x 3 matrix and one offset for each image, which takes a third
    of the time of one operation after another.
    """
    # (draws, images) -> (images, 1, 1) each
    contrast, saturation = 1 + draw_uniform(strength, 2, images, generator)[:, :, None, None]
    brightness = draw_uniform(strength, 1, images, generator)[0][:, None, None]

    identity = torch.eye(3, device=images.device)
    to_grey = torch.full((3, 3), 1 / 3, device=images.device)
    matrices = contrast * (saturation * identity + (1 - saturation) * to_grey)  # (images, 3, 3)
    pixels = images.flatten(2)  # (images, 3, rows, columns) -> (images, 3, pixels)
    return torch.baddbmm(brightness, matrices, pixels).view_as(images)


def cut_out(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square of `side` pixels in each image to 0, the mean colour (DeVries & Taylor 2017).

    Its centre is anywhere in the image, so the border cuts some squares off.
    """
    height, width = images.shape[2:]
    shares = draw_uniform(0.5, 2, images, generator) + 0.5  # (2, images), 0 to 1, of height and of width
    centres = shares * torch.tensor([[height], [width]], device=images.device)
    top, left = (centres.long() - side // 2)[:, :, None]  # (images, 1) each

    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + side)  # (images, rows)
    in_columns = (columns >= left) & (columns < left + side)
    squares = in_rows[:, :, None] & in_columns[:, None, :]  # (images, rows, columns)
    return images.masked_fill(squares[:, None], 0)


# ---------------------------------------------------------------- array files, tables and figures


def save_arrays(path: str | Path, checkpoint: Checkpoint, **arrays: Array) -> None:
    """Write arrays, with the checkpoint and the data set they were made from, to an .npz file."""
    origin = {"checkpoint_sha256": np.array(checkpoint.sha256), "dataset": np.array(checkpoint.dataset)}
    with atomic_write(path) as partial, partial.open("wb") as file:  # given a path, numpy appends a suffix
        np.savez(file, allow_pickle=False, **origin, **arrays)
    print(f"wrote {path}", flush=True)


def load_arrays(path: str | Path, checkpoint: Checkpoint, *keys: str) -> list[Array]:
    """Read the arrays called `keys` from an .npz file that deconv_full.py made from this checkpoint.

    Raises:
        SystemExit: If the file is missing, damaged, foreign or made from another checkpoint.
    """
    path = Path(path).expanduser()
    advice = "run `uv run deconv_full.py`"
    if not path.is_file():
        raise SystemExit(f"{path.absolute()} not found: {advice} first")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            sha256 = str(stored["checkpoint_sha256"])
            arrays = [stored[key] for key in keys]
    except Exception as error:  # what numpy raises for a damaged file is of nearly any type
        raise SystemExit(
            f"{path} is damaged or not of this project ({type(error).__name__}): {advice}"
        ) from None
    if sha256 != checkpoint.sha256:
        raise SystemExit(f"{path} was made from another checkpoint: {advice} again")
    return arrays


def save_table(path: str | Path, checkpoint: Checkpoint, table: pd.DataFrame, quiet: bool = False) -> None:
    """Write a table as csv; its first columns name the checkpoint and the data set it was made from."""
    origin = {"checkpoint": checkpoint.sha256[:12], "dataset": checkpoint.dataset}
    table = table.assign(**origin)[[*origin, *table.columns]]
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")
    if not quiet:
        print(f"wrote {path}", flush=True)


def load_table(path: str | Path, checkpoint: Checkpoint) -> pd.DataFrame:
    """Read a table that analyse_projections.py made from this checkpoint, without its first two columns.

    Raises:
        SystemExit: If the file is missing, no table or made from another checkpoint.
    """
    path = Path(path).expanduser()
    advice = "run `uv run analyse_projections.py`"
    if not path.is_file():
        raise SystemExit(f"{path.absolute()} not found: {advice} first")
    try:
        dtypes = dict.fromkeys(TEXT_COLUMNS, str)
        table = pd.read_csv(path, dtype=dtypes, keep_default_na=False, na_values=[""])
        matches = (table["checkpoint"] == checkpoint.sha256[:12]).all()
    except (ValueError, KeyError) as error:  # pandas' parser and Unicode errors are ValueErrors
        raise SystemExit(
            f"{path} is damaged or not of this project ({type(error).__name__}): {advice}"
        ) from None
    if not matches:
        raise SystemExit(f"{path} was made from another checkpoint: {advice} again")
    return table.drop(columns=["checkpoint", "dataset"])


def save_figure(path: str | Path, figure: Figure, quiet: bool = False) -> None:
    """Write a figure as PNG and close it."""
    with atomic_write(path) as partial, warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*missing from font")
        figure.savefig(partial, format="png", pil_kwargs={"compress_level": 1})  # half the time, 9 % larger
    for warning in caught:
        if "missing from font" in str(warning.message):
            report_missing_letters()
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    plt.close(figure)
    gc.collect()  # because a figure is part of a reference cycle and its pixels would stay in memory
    if not quiet:
        print(f"wrote {path}", flush=True)


@cache  # so that it is said once
def report_missing_letters() -> None:
    """Say what to do about letters that no font has, in the place of a warning for each letter and figure."""
    print("figures show boxes for letters that no font here has: install one that has them, as Noto Sans CJK")


def set_style() -> None:
    """Give all figures one look, whatever the user's matplotlib settings are; draw to files only."""
    plt.switch_backend("agg")
    plt.rcdefaults()
    warnings.filterwarnings("ignore", ".*missing from font")  # `save_figure` says it once
    installed = {font.name for font in font_manager.fontManager.ttflist}
    style = {
        "figure.dpi": DPI,
        "font.family": ["sans-serif", *(name for name in FONTS if name in installed)],
        "text.parse_math": False,  # the dollars of a class called US$ are no formula
    }
    sns.set_theme(context="paper", style="white", palette="colorblind", rc=style)


def shorten(name: str, letters: int = 20) -> str:
    """Return a class name as figures show it: cut where it is long, and never beginning with _.

    matplotlib leaves labels that begin with _ out of a legend.
    """
    name = " ".join(name.split())
    name = name if len(name) <= letters else f"{name[: letters - 1]}…"
    return f" {name}" if name.startswith("_") else name


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share after Wilson (1927), which stays between 0 and 1."""
    z = 1.96
    share = correct / count
    centre = share + z**2 / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max((centre - reach) / scale, 0.0), min((centre + reach) / scale, 1.0)  # rounding can lead beyond


def tile(pictures: Array, per_row: int, gap: int) -> Array:
    """Lay out pictures (n, rows, columns, channels), values 0 to 1, on white, `per_row` to a row.

    They are `gap` pixels apart.
    """
    count, height, width, channels = pictures.shape
    per_row = min(per_row, count)
    rows = -(-count // per_row)  # rounded up
    sheet = np.ones((rows * (height + gap) + gap, per_row * (width + gap) + gap, channels), pictures.dtype)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, per_row)
        top = gap + row * (height + gap)
        left = gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def draw_samples(data: Split, names: list[str], heading: str) -> Figure:
    """Draw up to ten images of each class, one class a row."""
    columns = min(10, *np.bincount(data.labels).tolist())
    rows = [np.flatnonzero(data.labels == label)[:columns] for label in range(len(names))]
    pictures = np.moveaxis(data.images[np.concatenate(rows)], 1, 3) / 255  # (images, rows, columns, 3)

    fig, ax = plt.subplots(figsize=(8, 8), layout="constrained")
    ax.imshow(tile(pictures, columns, 4), interpolation="nearest")
    step = IMAGE_SIZE + 4  # pixels from one image to the next
    ax.set_yticks(np.arange(len(names)) * step + step / 2, [shorten(name) for name in names])
    ax.set(xticks=[], title=heading)
    sns.despine(fig, left=True, bottom=True)
    return fig


def main() -> None:
    """Say what is there and draw ten images of each class."""
    set_style()
    dataset = find_dataset(DATASET, DATA_DIR)
    names = class_names(dataset, DATA_DIR)
    title = TITLES[dataset]
    train = load_split(dataset, DATA_DIR, "train")
    test = load_split(dataset, DATA_DIR, "test")

    print(f"{title}: {len(train.images):,} training and {len(test.images):,} test images, 3 x 96 x 96")
    print(f"{'class':<20}{'training':>10}{'test':>10}")
    for label, name in enumerate(names):
        print(f"{shorten(name):<20}{(train.labels == label).sum():>10,}{(test.labels == label).sum():>10,}")
    print(
        f"{'channel':<20}{'red':>10}{'green':>10}{'blue':>10}  of the training images, on a scale of 0 to 1"
    )
    for statistic, values in zip(("mean", "std"), mean_and_std(train.images), strict=True):
        print(f"{statistic:<20}" + "".join(f"{value:10.4f}" for value in values))

    figure = draw_samples(train, names, f"{title}: training images of each class")
    save_figure("outputs/sample_images.png", figure)
    following = "deconv.py" if Path("outputs/CNN.pth").exists() else "train_CNN.py"
    print(f"next: uv run {following}")


if __name__ == "__main__":
    run_script(main)
