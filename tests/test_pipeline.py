"""Hold the files of a whole run, and what happens when a stage runs too early, to the README's table."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FILTERS, STAGES
from PIL import Image

import analyse_projections
import heatmap
from CNN import load_checkpoint, receptive_fields
from load_data import STL10_CLASSES, Array

ROOT = Path(__file__).resolve().parent.parent
TRUST_ROWS = 2 * 2 * 13 + 2 * 6 + 10  # tests x shares x methods and differences, overlaps, correlations
Shapes = dict[str, tuple[tuple[int, ...], str]]


def check(path: Path, expected: Shapes) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content}
    assert set(arrays) == set(expected) | {"checkpoint_sha256", "dataset"}
    for name, (shape, dtype) in expected.items():
        assert (arrays[name].shape, str(arrays[name].dtype)) == (shape, dtype), name
    assert str(arrays["dataset"]) == "stl10"
    digest = sha256((path.parent / "CNN.pth").read_bytes()).hexdigest()
    assert str(arrays["checkpoint_sha256"]) == digest
    return arrays


def test_checkpoint_and_snapshots_hold_what_made_them(pipeline: Path) -> None:
    content = torch.load(pipeline / "outputs/CNN.pth", weights_only=True)
    keys = {"state_dict", "config", "settings", "dataset", "class_names", "epochs", "metrics"}
    assert set(content) == keys
    assert content["class_names"] == list(STL10_CLASSES) and content["epochs"] == 2
    assert content["config"]["filters"] == list(FILTERS)
    assert content["metrics"]["split"] == "test" and 0 <= content["metrics"]["accuracy"] <= 1
    for epoch in (0, 1):
        snapshot = load_checkpoint(pipeline / f"outputs/snapshots/epoch_{epoch:03d}.pth")
        assert snapshot.epochs == epoch and snapshot.settings == content["settings"]


def test_activations_have_every_key_shape_and_type(pipeline: Path) -> None:
    expected: Shapes = {"labels": ((30,), "int64")}
    for k, filters in enumerate(FILTERS, start=1):
        expected |= {f"conv{k}_{name}": ((30, filters), "float32") for name in ("max", "mean", "nonzero")}
        expected[f"conv{k}_position"] = ((30, filters, 2), "int16")
    arrays = check(pipeline / "outputs/activations.npz", expected)
    for k in range(1, 5):
        assert ((arrays[f"conv{k}_nonzero"] > 0) == (arrays[f"conv{k}_max"] > 0)).all()


def test_projections_have_every_key_shape_and_type(pipeline: Path) -> None:
    net = load_checkpoint(pipeline / "outputs/CNN.pth").net
    expected: Shapes = {}
    for k, (filters, field) in enumerate(zip(FILTERS, receptive_fields(net), strict=True), start=1):
        for prefix, n, dtype in (("", 9, "float32"), ("level_", 12, "float16")):
            window = (filters, n, 3, field.size, field.size)
            of_layer: Shapes = {"image": ((filters, n), "int32"), "value": ((filters, n), "float32")}
            of_layer |= {name: ((filters, n, 2), "int16") for name in ("position", "origin")}
            of_layer |= {"projection": (window, dtype), "patch": (window, "uint8")}
            expected |= {f"conv{k}_{prefix}{name}": value for name, value in of_layer.items()}
    arrays = check(pipeline / "outputs/projections.npz", expected)
    activations = np.load(pipeline / "outputs/activations.npz")
    assert (arrays["conv4_value"][:, 0] == activations["conv4_max"].max(axis=0)).all()


def test_projection_statistics_have_every_key_shape_and_type(pipeline: Path) -> None:
    names = ("nonzero_count", "mean", "max", "variance")
    expected: Shapes = {name: ((20, FILTERS[-1]), "float32") for name in names}
    expected |= {name: ((20,), "int64") for name in ("labels", "image")}
    arrays = check(pipeline / "outputs/projection_statistics.npz", expected)
    assert np.bincount(arrays["labels"]).tolist() == [2] * 10  # the first two images of each class
    fires = np.load(pipeline / "outputs/activations.npz")["conv4_max"][arrays["image"]] > 0
    assert ((arrays["nonzero_count"] > 0) == fires).all()


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        (
            "filter_metrics",
            sum(FILTERS),
            "layer filter dead activation_mean activation_variance activation_nonzero nonzero_count mean "
            "variance max preferred_class runner_up top_class preferred_share selectivity selectivity_low "
            "selectivity_high auc",
        ),
        (
            "filter_metrics_untrained",
            sum(FILTERS),
            "layer filter dead activation_mean activation_variance activation_nonzero preferred_class "
            "runner_up top_class preferred_share selectivity selectivity_low selectivity_high "
            "auc",
        ),
        (
            "class_metrics",
            10 * sum(FILTERS),
            "layer filter class activation_mean activation_low activation_high nonzero_count mean variance "
            "max",
        ),
        ("specialisation", 24, "metric layer network median low high n"),
        ("ablation", 11 * FILTERS[-1], "filter class selectivity contribution loss_increase"),
        ("trust", TRUST_ROWS, "test share condition median low high lowest_draw highest_draw n"),
        ("summary", 3 + 4 * 5 + 24 + 8 + 9 + 6 + 5 + TRUST_ROWS, "name layer value low high unit n"),
        ("occlusion", -1, "image filter label activation lowest_map_left lowest_unit_left taken_for"),
        ("invariance", 4 * (13 + 9 + 18), "transformation amount measure mean low high n"),
        ("probes", 8, "layer network accuracy low high inputs decay n"),
        (
            "training_log",
            2,
            "epoch train_loss train_accuracy measured_loss measured_accuracy filter_rate seconds",
        ),
    ],
)
def test_tables_name_their_checkpoint_and_have_their_columns(
    pipeline: Path, name: str, rows: int, columns: str
) -> None:
    table = pd.read_csv(pipeline / f"outputs/{name}.csv", dtype={"checkpoint": str})
    assert list(table.columns[:2]) == ["checkpoint", "dataset"]
    assert set(table.columns[2:]) == set(columns.split())
    assert len(table) == rows or rows == -1  # as many as classes of which an image is classified correctly
    digest = sha256((pipeline / "outputs/CNN.pth").read_bytes()).hexdigest()
    assert set(table["checkpoint"]) == {digest[:12]} and set(table["dataset"]) == {"stl10"}


def test_every_figure_is_a_picture_that_is_not_empty(pipeline: Path) -> None:
    figures = list((pipeline / "outputs").rglob("*.png"))
    assert len(figures) > 25
    for path in figures:
        with Image.open(path) as picture:
            assert len(picture.convert("L").resize((64, 64)).getcolors() or []) > 8, path


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_run_too_early_ends_with_one_line_and_writes_nothing(stage: Any) -> None:
    with pytest.raises(SystemExit, match=rf"^{Path.cwd()}/outputs/CNN.pth not found: .*train_CNN.py"):
        stage.main()
    assert not list(Path().iterdir())


def test_an_error_goes_to_stderr_in_one_line_with_status_1() -> None:
    script = ROOT / "heatmap.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env={**os.environ})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{Path.cwd()}/outputs/CNN.pth not found: ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")


def test_files_of_another_checkpoint_are_refused(pipeline_copy: Path) -> None:
    content = torch.load(pipeline_copy / "CNN.pth", weights_only=True)
    torch.save({**content, "epochs": 3}, pipeline_copy / "CNN.pth")
    for stage in (analyse_projections, heatmap):
        with pytest.raises(SystemExit, match=r"activations.npz was made from another checkpoint"):
            stage.main()
