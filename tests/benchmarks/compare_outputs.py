"""Run all stages of two checkouts on the same tiny data set and compare every file they write.

Run:    uv run python tests/benchmarks/compare_outputs.py FOLDER_A FOLDER_B

A change that only makes the code more readable leaves every weight, array and number as it was. Each
checkout runs with the settings of its own tests/conftest.py, in an empty folder and its own process. Then,
file by file:

- Checkpoints: every tensor must be equal.
- Arrays (npz): every array must be equal, key by key.
- Tables (csv): every column must be equal. Columns are paired by name; what is left over is listed.
- Pictures (png, webp): the share of differing pixels is printed. Texts may differ, so this is for the eye.

Columns and arrays that name the checkpoint are left out, because its checksum covers its settings, too. The
exit status is 1 if a tensor, an array or a number differs.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

IGNORED = {"checkpoint", "checkpoint_sha256", "seconds"}

# What each checkout runs: the stages in order, as its tests do.
RUN = """
import os, sys
os.environ["MPLBACKEND"] = "Agg"
checkout = sys.argv[1]
sys.path[:0] = [checkout, checkout + "/tests"]
import conftest, load_data
load_data.DPI = 60
load_data.FILES = {}
conftest.write_tiny_stl10()
for script in conftest.STAGES:
    script.DEVICE = "cpu"
    for name, value in conftest.FAST.get(script, {}).items():
        setattr(script, name, value)
for script in (load_data, *conftest.STAGES):
    script.main()
"""


def compare_checkpoints(a: Path, b: Path) -> Iterator[str]:
    """Yield a line for each tensor that differs."""
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (a, b)]
    for name in sorted(set(states[0]) | set(states[1])):
        if name not in states[0] or name not in states[1]:
            yield f"{name} is in one of them only"
        elif not torch.equal(states[0][name], states[1][name]):
            yield f"{name} differs"


def compare_arrays(a: Path, b: Path) -> Iterator[str]:
    """Yield a line for each array that differs."""
    with np.load(a) as first, np.load(b) as second:
        for name in sorted((set(first) | set(second)) - IGNORED):
            if name not in first or name not in second:
                yield f"{name} is in one of them only"
            elif first[name].dtype != second[name].dtype or not np.array_equal(first[name], second[name]):
                yield f"{name} differs"


def compare_tables(a: Path, b: Path) -> Iterator[str]:
    """Yield a line for each column that differs; numbers may differ by one in the 12th digit."""
    first, second = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (a, b))
    if len(first) != len(second):
        yield f"{len(first)} and {len(second)} rows"
        return
    for name in sorted((set(map(str, first)) | set(map(str, second))) - IGNORED):
        if name not in first or name not in second:
            yield f"column {name} is in one of them only"
        elif not (first[name] == second[name]).all():
            numbers = [pd.to_numeric(table[name], errors="coerce") for table in (first, second)]
            close = np.isclose(numbers[0], numbers[1], rtol=1e-12, atol=0, equal_nan=True)
            if numbers[0].isna().all() or not close.all():
                yield f"column {name} differs"


def compare_pictures(a: Path, b: Path) -> Iterator[str]:
    """Yield one line if pixels differ: their share, or the sizes if these differ."""
    first, second = (np.asarray(Image.open(path).convert("RGBA")).astype(int) for path in (a, b))
    if first.shape != second.shape:
        yield f"note: {first.shape[:2]} and {second.shape[:2]} pixels"
    elif (first != second).any():
        yield f"note: {(first != second).any(axis=2).mean():.2%} of the pixels differ"


COMPARE: dict[str, Callable[[Path, Path], Iterator[str]]] = {
    ".pth": compare_checkpoints,
    ".npz": compare_arrays,
    ".csv": compare_tables,
    ".png": compare_pictures,
    ".webp": compare_pictures,
}


def main() -> None:
    """Run both checkouts, print what differs and end with status 1 if a number does."""
    if len(sys.argv) != 3:
        raise SystemExit("give two checkouts: compare_outputs.py FOLDER_A FOLDER_B")
    folders = []
    for checkout in sys.argv[1:]:
        folder = Path(tempfile.mkdtemp())
        print(f"{checkout} runs in {folder}", flush=True)
        command = [sys.executable, "-c", RUN, str(Path(checkout).absolute())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        folders.append(folder / "outputs")

    files = [{path.relative_to(f): path for path in f.rglob("*") if path.is_file()} for f in folders]
    differences = 0
    for name in sorted(set(files[0]) | set(files[1])):
        if name not in files[0] or name not in files[1]:
            lines = [f"is only in {sys.argv[1 if name in files[0] else 2]}"]
        elif name.suffix in COMPARE:
            lines = list(COMPARE[name.suffix](files[0][name], files[1][name]))
        else:  # the page of the explorer: its words and its data are compared by the tests
            lines = []
        for line in lines:
            print(f"{name}: {line}")
        differences += sum(not line.startswith("note") for line in lines)
    print(f"{len(set(files[0]) & set(files[1]))} files compared, {differences} differences")
    raise SystemExit(1 if differences else 0)


if __name__ == "__main__":
    main()
