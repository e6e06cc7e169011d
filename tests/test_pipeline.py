"""Run all stages in order on a tiny set in the real layout, and hold their files to the README's table."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import analyse_projections
import deconv
import deconv_full
import heatmap
import load_data
import train_CNN

ROOT = Path(__file__).resolve().parent.parent
FILTERS = (4, 6, 8, 256)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder outputs/ after a full run on 40 generated training and 30 test images stored as STL-10."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(load_data, "SHAPES_IMAGES", {"train": 40, "test": 30})
        patch.setattr(load_data, "FILES", {})
        Path("data/stl10_binary").mkdir(parents=True)
        for split in ("train", "test"):
            images, labels = load_data.generate_shapes(split)
            for kind, array in (("X", images.transpose(0, 1, 3, 2)), ("y", labels.astype(np.uint8) + 1)):
                path = Path(f"data/stl10_binary/{split}_{kind}.bin")
                path.write_bytes(array.tobytes())
                load_data.FILES[path.name] = (
                    path.stat().st_size,
                    hashlib.md5(array.tobytes()).hexdigest(),
                )
        for script in (train_CNN, deconv, deconv_full, analyse_projections, heatmap):
            patch.setattr(script, "DEVICE", "cpu")
        patch.setattr(train_CNN, "EPOCHS", 2)
        patch.setattr(train_CNN, "BATCH_SIZE", 16)
        patch.setattr(train_CNN, "FILTERS", FILTERS)
        patch.setattr(deconv_full, "IMAGES_PER_CLASS", 2)
        patch.setattr(heatmap, "OCCLUSION_STRIDE", 16)
        patch.setattr(heatmap, "OCCLUSION_STRIDE_MANY", 24)
        patch.setattr(analyse_projections, "RESAMPLINGS", 20)
        for script in (load_data, train_CNN, deconv, deconv_full, analyse_projections, heatmap):
            script.main()
    yield folder / "outputs"


def check(path: Path, expected: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content}
    assert set(arrays) == set(expected) | {"checkpoint_sha256", "dataset", "class_names"}
    for name, (shape, dtype) in expected.items():
        assert (arrays[name].shape, str(arrays[name].dtype)) == (shape, dtype), name
    assert str(arrays["dataset"]) == "stl10" and len(arrays["class_names"]) == 10
    return arrays


def test_activations_have_every_key_shape_and_type(outputs: Path) -> None:
    expected: dict[str, tuple[tuple[int, ...], str]] = {"labels": ((30,), "int64")}
    for k, filters in enumerate(FILTERS, start=1):
        expected |= {f"conv{k}_{name}": ((30, filters), "float32") for name in ("max", "mean", "nonzero")}
        expected[f"conv{k}_position"] = ((30, filters, 2), "int16")
    arrays = check(outputs / "activations.npz", expected)
    for k in range(1, 5):
        assert ((arrays[f"conv{k}_nonzero"] > 0) == (arrays[f"conv{k}_max"] > 0)).all()


def test_projections_have_every_key_shape_and_type(outputs: Path) -> None:
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    config = torch.load(outputs / "CNN.pth", weights_only=True)["config"]
    size, jump = 1, 1
    for k, filters in enumerate(FILTERS, start=1):
        size += (config["kernel_sizes"][k - 1] - 1) * jump
        jump *= config["strides"][k - 1]
        expected |= {
            f"conv{k}_image": ((filters, 9), "int32"),
            f"conv{k}_value": ((filters, 9), "float32"),
            f"conv{k}_position": ((filters, 9, 2), "int16"),
            f"conv{k}_origin": ((filters, 9, 2), "int16"),
            f"conv{k}_projection": ((filters, 9, 3, size, size), "float32"),
            f"conv{k}_patch": ((filters, 9, 3, size, size), "uint8"),
        }
        size += (config["pool_sizes"][k - 1] - 1) * jump
        jump *= config["pool_sizes"][k - 1]
    arrays = check(outputs / "projections.npz", expected)
    activations = np.load(outputs / "activations.npz")
    assert (arrays["conv4_value"][:, 0] == activations["conv4_max"].max(axis=0)).all()


def test_projection_statistics_have_every_key_shape_and_type(outputs: Path) -> None:
    names = ("nonzero_count", "mean", "max", "variance")
    expected: dict[str, tuple[tuple[int, ...], str]] = {name: ((20, 256), "float32") for name in names}
    arrays = check(
        outputs / "projection_statistics.npz",
        {**expected, "labels": ((20,), "int64"), "image": ((20,), "int64")},
    )
    assert np.bincount(arrays["labels"]).tolist() == [2] * 10
    activations = np.load(outputs / "activations.npz")
    fires = activations["conv4_max"][arrays["image"]] > 0
    assert ((arrays["nonzero_count"] > 0) == fires).all()


def test_all_array_files_name_the_checkpoint_they_came_from(outputs: Path) -> None:
    digest = hashlib.sha256((outputs / "CNN.pth").read_bytes()).hexdigest()
    for name in ("activations", "projections", "projection_statistics"):
        assert str(np.load(outputs / f"{name}.npz")["checkpoint_sha256"]) == digest


def test_tables_have_their_rows_and_columns(outputs: Path) -> None:
    filters = pd.read_csv(outputs / "filter_metrics.csv")
    assert list(filters.columns) == [
        *("layer", "filter", "dead", "activation_mean", "activation_variance", "activation_nonzero"),
        *("nonzero_count", "mean", "variance", "max", "preferred_class", "selectivity"),
        *("selectivity_low", "selectivity_high", "selectivity_same", "auc", "hit_rate"),
        *("false_alarm_rate", "omega_squared", "precision", "sparseness", "p_adjusted", "significant"),
    ]
    assert filters.groupby("layer").size().tolist() == list(FILTERS)
    untrained = pd.read_csv(outputs / "filter_metrics_untrained.csv")
    measured = ["nonzero_count", "mean", "variance", "max"]  # of projections: there are none of this network
    assert list(untrained.columns) == [name for name in filters.columns if name not in measured]
    assert untrained.groupby("layer").size().tolist() == list(FILTERS)
    classes = pd.read_csv(outputs / "class_metrics.csv")
    columns = ["layer", "filter", "class", "activation_mean", "nonzero_count", "mean", "variance", "max"]
    assert list(classes.columns) == columns
    assert len(classes) == 10 * sum(FILTERS)
    assert classes.loc[classes["layer"] != "conv4", "mean"].isna().all()
    assert filters.loc[filters["layer"] == "conv4", "nonzero_count"].notna().all()


def test_the_readme_names_every_file_and_no_other(outputs: Path) -> None:
    rows = re.findall(r"^\| ([^|]+) \| \w+\.py \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = [name for row in rows for name in row.split(", ")]
    patterns = {re.sub(r"NNN|\{k\}|K_NAME", "*", name) for name in names} - {"training_state.pth"}
    files = {str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file()}
    assert not [name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)]
    assert not [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in files)]


def test_every_figure_is_there_and_nothing_half_written(outputs: Path) -> None:
    names = {str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file()}
    figures = {"sample_images", "training_curves", "confusion_matrix", "deconv_image", "metric_distributions"}
    figures |= {"selectivity", "top_filters", "heatmaps/class_filter_heatmap", "heatmaps/images"}
    figures |= {f"heatmaps/class_{k}_{name}" for k, name in enumerate(load_data.STL10_CLASSES)}
    figures |= {f"deconv/conv4_filters_{k:03d}_to_{k + 31:03d}" for k in range(0, 256, 32)}
    figures |= {"deconv/conv1_filters_000_to_003", "feature_evolution", "heatmaps/occlusion"}
    figures |= {"heatmaps/occlusion_correlation", "heatmaps/invariance"}
    figures |= {"specialisation", "ablation", "trust", "probes"}
    assert {f"{name}.png" for name in figures} <= names
    assert not [name for name in names if "partial" in name or "state" in name]
    for name in figures:
        assert (outputs / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("deconv.py", "outputs/CNN.pth not found: run `uv run train_CNN.py` first"),
        ("deconv_full.py", "outputs/CNN.pth not found: run `uv run train_CNN.py` first"),
        ("analyse_projections.py", "outputs/activations.npz not found: run `uv run deconv_full.py` first"),
        ("heatmap.py", "outputs/CNN.pth not found: run `uv run train_CNN.py` first"),
    ],
)
def test_a_script_without_its_input_ends_with_one_line_and_status_1(script: str, message: str) -> None:
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True, env={**os.environ})
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message + "\n")
    assert list(Path().iterdir()) == []


def test_files_of_another_checkpoint_are_refused(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("outputs")
    folder.mkdir()
    for name in (
        "CNN.pth",
        "activations.npz",
        "projection_statistics.npz",
        "filter_metrics.csv",
        "class_metrics.csv",
    ):
        (folder / name).write_bytes((outputs / name).read_bytes())
    content = torch.load(folder / "CNN.pth", weights_only=True)
    torch.save({**content, "seed": 1}, folder / "CNN.pth")
    with pytest.raises(SystemExit, match=r"outputs/activations.npz .*another checkpoint"):
        heatmap.main()
    with np.load(folder / "activations.npz") as found:
        arrays = dict(found)
    arrays["checkpoint_sha256"] = np.array("0" * 64)
    np.savez(folder / "activations.npz", **arrays)
    with pytest.raises(SystemExit, match="different checkpoints"):
        analyse_projections.main()
