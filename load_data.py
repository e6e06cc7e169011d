"""Read, check and download STL-10, or generate the stand-in `shapes`; read and write array files.

Run:    uv run load_data.py
Reads:  data/stl10_binary/{train,test}_{X,y}.bin, downloaded if they are missing
Writes: outputs/sample_images.png, what it downloads, and verified.txt beside the data

Every later stage takes its images from here, and the functions that write a file whole or not at all.
"""

import cmath
import errno
import glob
import hashlib
import io
import math
import os
import signal
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import STL10
from tqdm import tqdm

DATASET = "auto"  # "stl10", "shapes" (generated) or "auto": STL-10 if it can be had, else shapes
DATA_DIR = Path("data")  # holds the folder stl10_binary

# STL-10 as published
URL: str = STL10.url  # 2.6 GB, labelled files first
TIMEOUT = 15.0  # seconds without an answer after which the download is given up
FOLDER = "stl10_binary"
SIZE = 96  # rows and columns of an image
MD5: dict[str, str] = dict(STL10.train_list + STL10.test_list)
FILES = {  # name: (bytes, md5 sum)
    "train_X.bin": (5_000 * 3 * SIZE * SIZE, MD5["train_X.bin"]),
    "train_y.bin": (5_000, MD5["train_y.bin"]),
    "test_X.bin": (8_000 * 3 * SIZE * SIZE, MD5["test_X.bin"]),
    "test_y.bin": (8_000, MD5["test_y.bin"]),
}
EXTRAS = ("class_names.txt", "fold_indices.txt")  # kept if the archive brings them in time; folds need one
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
SUFFIXES = (".csv", ".npz", ".png", ".pth")  # of the files that the scripts write
AGAIN = "delete it and run again to download it anew"

# The generated stand-in: signed distance to the outline of a shape, negative inside, in units of its radius,
# at points x, y (polar: r, t in turns); approximate for the last four, the textures. Cut off beyond r = 1.
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
    """Images (images, 3, 96, 96) uint8, upright and row-major, and labels (images,) int64, 0 to 9."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Arrays(NamedTuple):
    """Arrays of an array file, by key, and what they were made from."""

    checkpoint_sha256: str
    dataset: str
    class_names: list[str]
    arrays: dict[str, NDArray[Any]]


class DownloadError(Exception):
    """STL-10 could not be downloaded; the text says why in one line."""


def check_numbers(lowest: float, highest: float = 1_000_000, **settings: Any) -> None:
    """Refuse settings, given by name, that are no number from `lowest` to `highest`.

    A whole `lowest`, 1, asks for whole numbers; 1.0 for any finite ones.

    Raises:
        SystemExit: If one is of another type or out of range.
    """
    whole = isinstance(lowest, int)
    kind = "a whole number" if whole else "a number"
    bounded = highest < math.inf
    limits = f"from {lowest:,.10g} to {highest:,.10g}" if bounded else f"of at least {lowest:,.10g}"
    for name, value in settings.items():
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (fits and lowest <= value <= highest and value < math.inf):
            raise SystemExit(f"{name} is {value!r}; expected {kind} {limits}")


def check_lists(lowest: float, highest: float = 1_000_000, **settings: Any) -> None:
    """Refuse settings, given by name, that are no list of one or more such numbers as `check_numbers` takes.

    Raises:
        SystemExit: If one is no list, or a number in it is refused.
    """
    for name, values in settings.items():
        if not isinstance(values, list | tuple | range) or not values:
            raise SystemExit(f"{name} is {values!r}; expected one or more numbers, as [1, 2] or [1]")
        check_numbers(lowest, highest, **{f"{name}[{place}]": value for place, value in enumerate(values)})


def check_paths(**settings: Any) -> list[Path]:
    """Return settings, given by name, as paths.

    Raises:
        SystemExit: If one is neither a path nor text.
    """
    for name, value in settings.items():
        if not isinstance(value, str | Path):
            raise SystemExit(f'{name} is {value!r}; expected a path, as Path("{name.lower()}")')
    return [Path(value) for value in settings.values()]


def require_file(path: Path, made_by: str) -> None:
    """Raise SystemExit if there is no such file; names `made_by`, the script that writes it."""
    if not path.is_file():
        found = "is no file: remove it and" if path.exists() else "not found:"
        raise SystemExit(f"{path} {found} run `uv run {made_by}` first")


def prepare_folders(setting: str, *folders: Path) -> None:
    """Make folders for results, and see before the work that files can be written there.

    Raises:
        SystemExit: If they cannot, or a folder has the name of a file; names the setting.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            problem = f"needs the folder {folder}, but no file can be written there: {error.strerror}"
            raise SystemExit(f"{setting} {problem}; mend that and run again") from None
        for path in folder.iterdir():
            if path.suffix in SUFFIXES and path.is_dir():
                raise SystemExit(f"{path} is a folder, expected a file or nothing: remove it and run again")


def check_file_name(suffix: str, **settings: Path) -> None:
    """Raise SystemExit if a setting, given by name, is no name for the kind of file that is written there."""
    for name, path in settings.items():
        if path.suffix != suffix:
            raise SystemExit(f"{name} is {str(path)!r}; expected a file name that ends in {suffix}")


def check_choice(dataset: str, *allowed: str) -> None:
    """Raise SystemExit if `dataset` is not one of those allowed."""
    if dataset not in allowed:
        raise SystemExit(f"DATASET is {dataset!r}; allowed are {', '.join(map(repr, allowed))}")


def class_names(dataset: str) -> list[str]:
    """Return the names of classes 0 to 9 of "stl10" or "shapes"."""
    check_choice(dataset, "stl10", "shapes")
    return list(STL10_CLASSES if dataset == "stl10" else SHAPES)


def title(dataset: str) -> str:
    """Return what figures and log lines call "stl10" or "shapes"."""
    check_choice(dataset, "stl10", "shapes")
    return "STL-10" if dataset == "stl10" else "generated shapes"


def find_dataset(dataset: str, data_dir: Path | str) -> str:
    """Return what the setting DATASET means here, "stl10" or "shapes"; download what is missing of STL-10.

    Generated images replace STL-10 only for "auto", only where no file of STL-10 is there, and with a notice.

    Raises:
        SystemExit: If the setting is unknown, a file is damaged, a folder is a file or a link to nothing, or
            STL-10 is asked for and cannot be had.
        OSError: If this machine's disk cannot take what is downloaded.
    """
    check_choice(dataset, "auto", "stl10", "shapes")
    if dataset == "shapes":
        return "shapes"
    folder = Path(data_dir) / FOLDER
    for part in (folder.parent, folder):
        if not part.is_dir() and (part.exists() or part.is_symlink()):
            raise SystemExit(f"{part} is no folder: remove it, or set DATA_DIR to where STL-10 is")
    present = [name for name in FILES if (folder / name).exists()]
    for name in present:
        check_file(folder / name)
    if len(present) == len(FILES):
        return "stl10"
    print(f"downloading STL-10 from {URL} to {folder}", flush=True)
    try:
        download(folder.parent, URL, TIMEOUT)
        return "stl10"
    except DownloadError as error:
        failed = f"STL-10 could not be downloaded from {URL} ({error})"
    by_hand = f"put {', '.join(FILES)} into {folder}"
    # Where one of the files has arrived, STL-10 can be had: go on with it rather than make do.
    if dataset == "stl10" or any((folder / name).exists() for name in FILES):
        raise SystemExit(f'{failed}: run again, {by_hand}, or set DATASET = "shapes"')
    rule = "!" * 100
    print(f"{rule}\n!!  {failed}.\n!!  THIS RUN USES GENERATED IMAGES, the set called shapes. To have STL-10")
    print(f"!!  {by_hand}\n!!  and run again.\n{rule}", flush=True)
    return "shapes"


def load_split(dataset: str, data_dir: Path | str, split: str) -> Split:
    """Read and check, or generate, the split "train" or "test" of "stl10" or "shapes".

    Raises:
        SystemExit: If a file is missing or damaged, or the labels do not fit the images.
    """
    check_choice(dataset, "stl10", "shapes")
    if dataset == "shapes":
        return generate_shapes(split)
    image_path, label_path = (Path(data_dir) / FOLDER / f"{split}_{kind}.bin" for kind in "Xy")
    check_file(image_path)
    check_file(label_path)
    # Each channel is stored column by column: (images, 3, columns, rows) -> (images, 3, rows, columns).
    stored = np.memmap(image_path, np.uint8, "r").reshape(-1, 3, SIZE, SIZE)
    images: NDArray[np.uint8] = np.ascontiguousarray(stored.transpose(0, 1, 3, 2))
    labels = np.fromfile(label_path, np.uint8).astype(np.int64) - 1  # 1 to 10 in the file
    if len(labels) != len(images):
        raise SystemExit(f"{label_path} has {len(labels):,} labels for {len(images):,} images: {AGAIN}")
    if labels.min() < 0 or labels.max() > 9:
        found = f"{labels.min() + 1} to {labels.max() + 1}"
        raise SystemExit(f"{label_path} has labels from {found}, expected 1 to 10: {AGAIN}")
    return Split(images, labels)


def check_file(path: Path) -> None:
    """Raise SystemExit unless `path` is the published file of STL-10: there, right in size and md5 sum.

    The sum is computed once: verified.txt beside the data tells of files unchanged since.
    """
    require_file(path, "load_data.py")
    (size, md5), stat = FILES[path.name], path.stat()
    if stat.st_size != size:
        raise SystemExit(f"{path} has {stat.st_size:,} bytes, expected {size:,}: {AGAIN}")
    record, entry = path.with_name("verified.txt"), f"{path.name} {size} {stat.st_mtime_ns} {md5}"
    verified = record.read_text(errors="replace").splitlines() if record.is_file() else []
    if entry in verified:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise SystemExit(f"{path} has the md5 sum {found}, expected {md5}: {AGAIN}")
    others = [line for line in verified if not line.startswith(f"{path.name} ")]
    with suppress(OSError), whole_file(record) as partial:  # read-only: the sum is computed every time
        partial.write_text("\n".join([*others, entry]))


@contextmanager
def plain_errors() -> Iterator[None]:
    """End what a user or a machine can cause in one line: Ctrl-C, a full disk, no permission, no memory.

    Figures only go to files, whatever MPLBACKEND says; a character that the terminal lacks is printed as "?".

    Raises:
        SystemExit: With that line.
    """
    try:
        plt.switch_backend("agg")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        yield
        if sys.stdout:
            sys.stdout.flush()  # here rather than at the end, where nobody would catch what it raises
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what was written is whole; run again") from None
    except BrokenPipeError:
        raise SystemExit("the output was closed before the end; run again with all of it shown") from None
    except OSError as error:
        where = error.filename2 or error.filename  # the former is what a partial file should have replaced
        where = f"{where}: " if where else ""
        raise SystemExit(f"{where}{error.strerror or error}; mend that and run again") from None
    except Exception as error:
        if not no_memory(error):
            raise
        raise SystemExit("out of memory: close other programs or lower BATCH_SIZE, and run again") from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending: Ctrl-C would only add a traceback
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:  # closed or full; Python would flush once more at the end and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def no_memory(error: Exception) -> bool:
    """Say whether an error means that memory ran out; torch says so of the CPU's in a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("DefaultCPUAllocator: ", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Give a path to write to; it is renamed to `path` if the block ends well and removed if it does not.

    The path is NAME.PROCESS.partial, so that two runs in one folder never rename each other's half file. What
    killed runs left of the same file is removed first: partial files whose process has ended, or that nobody
    has written to for a day.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        process = old.name.removeprefix(f"{path.name}.").removesuffix(".partial")
        with suppress(OSError):  # another run may have been faster
            idle = time.time() - old.stat().st_mtime  # seconds
            if process.isdecimal() and (idle > 86_400 or not is_running(int(process))):
                old.unlink()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG):  # a full disk, which the system reports without a name
            error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Say whether there is, or may be, a process of that number."""
    if os.name == "nt":  # Windows would end it rather than answer
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def open_archive(file: IO[bytes]) -> zipfile.ZipFile:
    """Open a zip archive that unpacks to no more than its own size, as those written here do.

    Raises:
        ValueError: If it unpacks to more.
        Exception: Others, if it is damaged or no archive.
    """
    archive = zipfile.ZipFile(file)
    if sum(member.file_size for member in archive.infolist()) > file.seek(0, os.SEEK_END):
        raise ValueError("unpacks to more than it holds")
    return archive


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it; a character that the font lacks is a box."""
    with whole_file(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(partial, format="png")
    plt.close(figure)


def download(data_dir: Path, url: str, timeout: float) -> None:
    """Read the published archive as a stream and stop as soon as the labelled files are out.

    Members may come in any order; only their names are used, never their paths. Files already there stay.

    Args:
        data_dir: Gets the folder stl10_binary.
        url: Of a gzip'd tar.
        timeout: Seconds for the connection and for each read.

    Raises:
        DownloadError: If it failed; files that were whole by then stay.
        OSError: If this machine's disk cannot take the files.
    """
    folder = data_dir / FOLDER
    missing, extras = ({name for name in names if not (folder / name).exists()} for names in (FILES, EXTRAS))
    bar = tqdm(total=sum(FILES[name][0] for name in missing), unit="B", unit_scale=True, disable=None)
    try:
        with bar, urllib.request.urlopen(url, timeout=timeout) as response:
            if response.headers.get_content_type() == "text/html":
                raise DownloadError("the answer is a web page, perhaps a proxy's, not the archive")
            with tarfile.open(fileobj=response, mode="r|gz") as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    bar.set_description(name if name.isprintable() else "")
                    content = archive.extractfile(member) if member.isreg() else None
                    if content and name in missing:
                        save_member(content, folder / name, bar)
                        missing.remove(name)
                    elif content and name in extras and member.size < 1_000_000:
                        with whole_file(folder / name) as partial:
                            partial.write_bytes(content.read())
                    if not missing:
                        return
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(str(error)) from None
    except DownloadError:
        raise
    except Exception as error:  # what comes from the net may be anything, and tarfile stumble over it
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or getattr(error, "filename", None) or no_memory(error):  # not the network, this machine
            raise
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise DownloadError(reason or type(error).__name__) from error
    raise DownloadError(f"the archive ended before {', '.join(sorted(missing))}")


def save_member(content: IO[bytes], path: Path, bar: "tqdm[Any]") -> None:
    """Write a member of the archive to `path`, or raise DownloadError if it is not the published file."""
    (size, md5), digest, written = FILES[path.name], hashlib.md5(), 0
    with whole_file(path) as partial:
        with partial.open("wb") as file:
            while written <= size and (block := content.read(1 << 20)):
                written += file.write(block)
                digest.update(block)
                bar.update(len(block))
        if (written, digest.hexdigest()) != (size, md5):
            raise DownloadError(f"{path.name} in the archive has the wrong size or md5 sum")


def generate_shapes(split: str) -> Split:
    """Draw the split "train" or "test" of the stand-in, always the same."""
    rng = np.random.default_rng(SHAPES_SEEDS[split])
    labels = rng.permutation(np.arange(SHAPES_IMAGES[split], dtype=np.int64) % len(SHAPES))
    names = list(SHAPES)
    return Split(np.stack([draw_image(names[label], rng) for label in labels]), labels)


def draw_image(shape: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one image (3, 96, 96): clutter, the shape, clutter, noise; random colour, place, size, angle."""
    # One is light and the other dark, which one is chance: no colour gives the class away.
    ground, colour = rng.permutation([0, 0.55])[:, None, None, None] + rng.uniform(0, 0.45, (2, 3, 1, 1))
    clutter, front = rng.choice(list(CLUTTER), 4).tolist(), rng.integers(3)
    grid = np.arange(SIZE, dtype=np.complex64) + 1j * np.arange(SIZE, dtype=np.float32)[:, None]
    canvas = np.broadcast_to(ground, (3, SIZE, SIZE)).astype(np.float32)
    for name in [*clutter[front:], shape, *clutter[:front]]:
        radius = rng.uniform(22, 40)  # pixels
        centre = complex(*rng.uniform(0.8 * radius, SIZE - 0.8 * radius, 2))  # column and row
        points = (grid - centre) * (cmath.exp(1j * rng.uniform(0, math.tau)) / radius)
        polar = abs(points), np.angle(points) / math.tau
        distance = (SHAPES | CLUTTER)[name](points.real, points.imag, *polar)
        if name == shape:
            distance = np.maximum(distance, abs(points) - 1)
        coverage = np.clip(0.5 - radius * distance, 0, 1)  # edges are smooth over one pixel
        paint = colour if name == shape else rng.random((3, 1, 1))
        canvas += coverage * (paint.astype(np.float32) - canvas)
    canvas += rng.standard_normal(canvas.shape, np.float32) * rng.uniform(0.02, 0.08)
    return (255 * canvas.clip(0, 1)).round().astype(np.uint8)


def mean_and_std(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Return mean and deviation of each channel of uint8 images, on a scale of 0 to 1, from exact sums."""
    counts = np.zeros((3, 256), np.int64)  # pixels of each value
    for image in images:
        counts += [np.bincount(channel.ravel(), minlength=256) for channel in image]
    values, pixels = np.arange(256), int(counts[0].sum())
    sums, squares = (counts @ values).tolist(), (counts @ values**2).tolist()
    std = [math.sqrt(pixels * q - s * s) / pixels / 255 for s, q in zip(sums, squares, strict=True)]
    return [s / pixels / 255 for s in sums], std


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 images (images, 3, rows, columns) as normalised float32 on the same device."""
    centre, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return images.float().div_(255).sub_(centre).div_(scale)


class Augmentation(NamedTuple):
    """How far training images are changed, each drawn anew for every image; flipping is always on.

    Attributes:
        shift: Pixels, at most, in each direction.
        zoom: Largest relative change of size and of aspect ratio.
        rotation: Degrees, at most.
        colour: Largest relative change of contrast and of saturation, largest shift of brightness in
            standard deviations.
        cutout: Side in pixels of a square that is set to the mean colour; 0 for none (DeVries & Taylor 2017).
    """

    shift: float = 0
    zoom: float = 0
    rotation: float = 0
    colour: float = 0
    cutout: int = 0


def augment(images: Tensor, strength: Augmentation, generator: torch.Generator) -> Tensor:
    """Flip, move, zoom, turn and recolour each image at random, and cut a square out of it.

    torchvision's transforms draw one change for a whole batch, or work image by image; here every image of a
    batch has its own, in one resampling and one mixing of colours.

    Args:
        images: Normalised, float32 (images, 3, rows, columns).
        strength: How far.
        generator: Where the random numbers come from; on the CPU, so that a seed means the same everywhere.
    """
    n, _, height, width = images.shape

    def uniform(limit: float, columns: int = 1) -> Tensor:
        return ((2 * torch.rand(columns, n, generator=generator) - 1) * limit).to(images.device)

    flip = uniform(1).sign()[0]
    size, aspect = torch.exp(uniform(math.log1p(strength.zoom), 2))
    (angle,) = uniform(math.radians(strength.rotation))
    right, down = uniform(2 * strength.shift / width, 2)  # the grid's unit is half a frame
    across, along = flip * size * aspect, size / aspect
    rows = [
        across * angle.cos(),
        -along * angle.sin(),
        right,
        across * angle.sin(),
        along * angle.cos(),
        down,
    ]
    where = F.affine_grid(torch.stack(rows, dim=1).view(n, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(images, where, padding_mode="reflection", align_corners=False)

    # contrast * (grey + saturation * (pixel - grey)) + brightness, grey being the mean of the three channels,
    # as one 3 x 3 matrix for each image: a third of the time of one operation after another
    contrast, saturation = 1 + uniform(strength.colour, 2)[:, :, None, None]
    own, grey = torch.eye(3, device=images.device), torch.full((3, 3), 1 / 3, device=images.device)
    mixing = contrast * (saturation * own + (1 - saturation) * grey)
    brightness = uniform(strength.colour)[0][:, None, None]
    images = torch.baddbmm(brightness, mixing, images.flatten(2)).view_as(images)

    if strength.cutout:
        centre = ((uniform(0.5, 2) + 0.5) * torch.tensor([[height], [width]], device=images.device)).long()
        distance = [
            (torch.arange(side, device=images.device) - c[:, None])
            for side, c in zip((height, width), centre, strict=True)
        ]
        inside = [(d >= -(strength.cutout // 2)) & (d < (strength.cutout + 1) // 2) for d in distance]
        images = images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)
    return images


def save_arrays(
    path: Path, *, checkpoint_sha256: str, dataset: str, class_names: list[str], **arrays: NDArray[Any]
) -> None:
    """Write arrays and what they were made from to an .npz file, whole or not at all."""
    made_from = {"checkpoint_sha256": checkpoint_sha256, "dataset": dataset, "class_names": class_names}
    with (
        whole_file(path) as partial,
        partial.open("wb") as file,
    ):  # given a path, numpy appends its own suffix
        np.savez(
            file, allow_pickle=False, **{key: np.array(text) for key, text in made_from.items()}, **arrays
        )


def load_arrays(path: Path, made_by: str, dtypes: Mapping[str, str]) -> Arrays:
    """Read the arrays named in `dtypes` (key: type) from an .npz file; the others stay on disk.

    Raises:
        SystemExit: If the file is missing, damaged or foreign; names `made_by`, the script that writes it.
    """
    path = Path(path)
    require_file(path, made_by)
    again = f"run `uv run {made_by}` again"
    made_from = ("checkpoint_sha256", "dataset", "class_names")
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with path.open("rb") as file, open_archive(file) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers written by Python 2; damage can look like that
            for key in (*made_from, *dtypes):
                if f"{key}.npy" not in archive.namelist():
                    raise SystemExit(f"{path} has no {key!r}: {again}")
                arrays[key] = read_array(archive, f"{key}.npy")
        texts = [arrays[key].tolist() for key in made_from if arrays[key].dtype.kind == "U"]
    except Exception as error:  # in a damaged file numpy's reader can stumble over nearly anything
        if no_memory(error):
            raise
        raise SystemExit(f"{path} is damaged or no array file of this project: {again}") from None
    for key, array in arrays.items():
        kind, expected = "text" if array.dtype.kind == "U" else str(array.dtype), dtypes.get(key, "text")
        if kind != expected:
            raise SystemExit(f"{path} has {key!r} of type {kind}, expected {expected}: {again}")
    sha256, dataset, names = texts
    for key in made_from:
        if arrays.pop(key).ndim != (key == "class_names"):
            raise SystemExit(f"{path} has {key!r} of another shape than expected: {again}")
    for text in (sha256, dataset, *names):
        if not text.isprintable():
            raise SystemExit(f"{path} has text that is not printable: {again}")
    return Arrays(sha256, dataset, names, arrays)


def read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """Read a member of an .npz file.

    Raises:
        ValueError: If its header claims more than is stored, before memory is taken for it.
        Exception: Others, if it is damaged.
    """
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0
        if version != (1, 0):  # of texts with characters
            read_header = np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if math.prod(shape) * dtype.itemsize > archive.getinfo(name).file_size:
            raise ValueError("claims more than is stored")
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def draw_samples(data: Split, names: list[str], heading: str) -> Figure:
    """Draw ten images of each class, one class a row; white where a class has not as many."""
    rows, columns = len(names), min(10, int(np.bincount(data.labels).max()))
    step = SIZE + 4  # pixels from one image to the next
    framed = np.full((rows, columns, 3, step, step), 255, np.uint8)
    for label in range(rows):
        chosen = np.flatnonzero(data.labels == label)[:columns]
        framed[label, : len(chosen), :, 2:-2, 2:-2] = data.images[chosen]
    # (rows of images, columns of images, 3, step, step) -> (rows, step, columns, step, 3) -> one sheet
    sheet = framed.transpose(0, 3, 1, 4, 2)
    fig, ax = plt.subplots(figsize=(8, 8), dpi=200, layout="constrained")
    ax.imshow(sheet.reshape(rows * step, columns * step, 3), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks(np.arange(rows) * step + step / 2, names)
    ax.set_title(heading)
    sns.despine(fig, left=True, bottom=True)
    return fig


def main() -> None:
    """Say what is there and draw ten images of each class."""
    sns.set_theme(context="paper", style="white", palette="colorblind")
    (data_dir,) = check_paths(DATA_DIR=DATA_DIR)
    dataset = find_dataset(DATASET, data_dir)
    train, test = (load_split(dataset, data_dir, split) for split in ("train", "test"))
    path = Path("outputs/sample_images.png")
    prepare_folders(path.name, path.parent)
    print(
        f"{title(dataset)}: {len(train.images):,} training and {len(test.images):,} test images, 3 x 96 x 96"
    )
    print(f"{'class':<12}{'training':>10}{'test':>10}")
    for label, name in enumerate(class_names(dataset)):
        print(f"{name:<12}{(train.labels == label).sum():>10,}{(test.labels == label).sum():>10,}")
    print(f"{'megabytes':<12}{train.images.nbytes / 1e6:>10.1f}{test.images.nbytes / 1e6:>10.1f}")
    for name, values in zip(("mean", "std"), mean_and_std(train.images), strict=True):
        print(f"{name:<12}{''.join(f'{value:10.4f}' for value in values)}  RGB, training images, 0 to 1")
    figure = draw_samples(train, class_names(dataset), f"{title(dataset)}: training images of each class")
    save_figure(figure, path)
    print(f"wrote {path}\nnext: uv run train_CNN.py")


if __name__ == "__main__":
    with plain_errors():
        main()
