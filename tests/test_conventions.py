"""Hold docstrings, README and settings to the code."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
STAGES = ("train_CNN.py", "deconv.py", "deconv_full.py", "analyse_projections.py", "heatmap.py")
SCRIPTS = ("CNN.py", "load_data.py", *STAGES)
SHARED = ("DATA_DIR", "DEVICE", "CHECKPOINT")  # the same name and value wherever they are needed


def tree(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text())


def settings(script: str) -> dict[str, str]:
    """UPPER_CASE names assigned at the top level, with the source of their values."""
    found = {}
    for node in tree(script).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if (
            isinstance(target, ast.Name)
            and target.id.isupper()
            and isinstance(node, ast.Assign | ast.AnnAssign)
        ):
            assert node.value is not None
            found[target.id] = ast.unparse(node.value)
    return found


def test_only_the_agreed_files_are_at_the_top() -> None:
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_says_how_it_is_run_what_it_reads_and_what_it_writes(script: str) -> None:
    docstring = ast.get_docstring(tree(script)) or ""
    assert f"Run:    uv run {script}" in docstring
    assert "Reads:  " in docstring and "Writes: " in docstring
    for name in re.findall(r"outputs/([\w/*.]+)", docstring):
        assert name.replace("*", "") and (name in README or name.split("*")[0] in README), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_main_reads_settings(script: str) -> None:
    names = set(settings(script)) & {
        *SHARED,
        *(
            "DATASET",
            "EPOCHS",
            "BATCH_SIZE",
            "SEED",
            "IMAGE",
            "N_TOP",
            "IMAGES_PER_CLASS",
            "CHUNK",
            "OUTPUTS",
        ),
        *("LEARNING_RATE", "FILTERS", "TOP_FILTERS", "TOP_IMAGES", "AUGMENTATION", "SNAPSHOTS", "N_FILTERS"),
    }
    for node in tree(script).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & names
            assert not used, f"{script}: {node.name} reads {used}"


def test_settings_have_the_names_and_values_that_readers_rely_on() -> None:
    found = {script: settings(script) for script in SCRIPTS}
    required = {"DATASET", "DATA_DIR", "EPOCHS", "BATCH_SIZE", "SEED", "DEVICE", "CHECKPOINT"}
    assert required <= set(found["train_CNN.py"])
    assert {"IMAGE", "LAYER"} <= set(found["deconv.py"])
    assert {"N_TOP", "IMAGES_PER_CLASS", "BATCH_SIZE"} <= set(found["deconv_full.py"])
    for name in SHARED:
        assert len({values[name] for values in found.values() if name in values}) == 1, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script: str) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in tree(script).body[1:]:
        assert isinstance(node, allowed), ast.unparse(node)
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"


def test_the_commands_of_the_readme_exist_and_name_each_other_in_order() -> None:
    commands = re.findall(r"^uv run (\S+\.py)$", README, re.MULTILINE)
    assert tuple(commands) == STAGES
    for script, following in pairwise(STAGES):
        assert f"next: uv run {following}" in (ROOT / script).read_text()
    for name in re.findall(r"uv run (?:python )?([\w/]+\.py)", README):
        assert (ROOT / name).is_file(), name


def test_every_picture_of_the_readme_is_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture
