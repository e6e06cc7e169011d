"""Hold docstrings, README, METHOD and settings to the code."""

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import write_checkpoint

from CNN import CNN

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "outputs/readme/METHOD.md").read_text(encoding="utf-8")
TEXTS = ("README.md", "outputs/readme/METHOD.md", "outputs/readme/RESULTS.md")
STAGES = ("train_CNN.py", "deconv.py", "deconv_full.py", "analyse_projections.py", "heatmap.py")
SCRIPTS = ("CNN.py", "load_data.py", *STAGES)
SHARED = ("DATA_DIR", "DEVICE", "CHECKPOINT")  # the same name and value wherever they are needed


def tree(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text())


def constants(script: str) -> dict[str, str]:
    """UPPER_CASE names assigned at the top level, with the source of their values."""
    values = {}
    for node in tree(script).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id.isupper():
                values[target.id] = ast.unparse(node.value)
    return values


def settings(script: str) -> set[str]:
    """Constants in the first block of assignments, one a line with its comment: those that users edit."""
    lines, names = (ROOT / script).read_text().splitlines(), set[str]()
    for line in lines:
        match = re.match(r"([A-Z][A-Z_]+)(: [^=]+)? = ", line)
        if match:
            names.add(match[1])
        elif names and not line.strip():
            return names  # fixed values, after a blank line, are no settings
    return names


def test_only_the_agreed_files_are_at_the_top() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_says_how_it_is_run_what_it_reads_and_what_it_writes(script: str) -> None:
    docstring = ast.get_docstring(tree(script)) or ""
    assert f"Run:    uv run {script}" in docstring
    assert "Reads:  " in docstring and "Writes: " in docstring


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_main_reads_settings(script: str) -> None:
    names = settings(script)
    assert names or script == "CNN.py"
    for node in tree(script).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & names
            assert not used, f"{script}: {node.name} reads {used}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_ends_in_one_line_when_it_is_interrupted(script: str) -> None:
    assert (ROOT / script).read_text().endswith('if __name__ == "__main__":\n    run_script(main)\n')


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_each_setting_has_a_comment(script: str) -> None:
    for line in (ROOT / script).read_text().splitlines():
        match = re.match(r"([A-Z][A-Z_]+)(: [^=]+)? = ", line)
        if match and match[1] in settings(script):
            assert "  # " in line, line


def test_settings_have_the_names_and_values_that_readers_rely_on() -> None:
    required = {"DATASET", "DATA_DIR", "EPOCHS", "BATCH_SIZE", "SEED", "DEVICE", "CHECKPOINT"}
    assert required <= settings("train_CNN.py")
    assert {"IMAGE", "LAYER"} <= settings("deconv.py")
    assert {"N_TOP", "IMAGES_PER_CLASS", "BATCH_SIZE"} <= settings("deconv_full.py")
    found = [constants(script) for script in SCRIPTS]
    for name in SHARED:
        assert len({values[name] for values in found if name in values}) == 1, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script: str) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in tree(script).body[1:]:
        assert isinstance(node, allowed), ast.unparse(node)
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")


def test_the_commands_of_the_readme_exist_and_name_each_other_in_order() -> None:
    commands = [name for name in re.findall(r"^uv run (\S+\.py)", README, re.MULTILINE) if name in STAGES]
    assert tuple(commands) == STAGES
    for script, following in pairwise(STAGES):
        assert f"next: uv run {following}" in (ROOT / script).read_text()
    for name in re.findall(r"uv run (?:python )?([\w/]+\.py)", README):
        assert (ROOT / name).is_file(), name


def test_the_command_for_notebooks_works_where_a_notebook_sets_mplbackend() -> None:
    (assignment,) = re.findall(r"`!(\S+) uv run train_CNN.py`", README)
    command = [sys.executable, "-c", "import load_data; load_data.set_style()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend"}
    name, value = assignment.split("=")
    subprocess.run(command, env=environment | {name: value}, check=True)


def test_the_python_example_of_the_readme_runs_as_printed(tiny_stl10: Path) -> None:
    write_checkpoint(CNN().eval())
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert Path("filter_42.png").stat().st_size > 1000


def test_the_tables_of_the_results_are_those_of_the_comparison() -> None:
    sys.path.insert(0, str(ROOT / "tests/benchmarks"))
    import update_readme

    comparison = update_readme.read_comparison(ROOT / "outputs/readme/comparison.csv")
    results = (ROOT / "outputs/readme/RESULTS.md").read_text(encoding="utf-8")
    assert update_readme.insert_tables(results, comparison) == results


def test_every_picture_and_page_that_is_linked_is_there() -> None:
    for page in (ROOT / name for name in TEXTS):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" in link:
                continue
            assert (page.parent / link).is_file(), link


def test_the_table_of_files_and_docstrings_name_every_file_that_the_pipeline_writes_and_no_other(
    pipeline: Path,
) -> None:
    files = {str(p.relative_to(pipeline / "outputs")) for p in pipeline.rglob("outputs/**/*") if p.is_file()}
    assert not [name for name in files if "partial" in name or "state" in name]
    rows = re.findall(r"^\| ([^|]+) \| \w+\.py \|", METHOD, re.MULTILINE)
    of_table = {re.sub(r"NNN|\{k\}|K_NAME", "*", name) for row in rows for name in row.split(", ")}
    docstrings = [ast.get_docstring(tree(script)) or "" for script in SCRIPTS]
    writes = " ".join(docstring.split("Writes: ")[1].split("\n\n")[0] for docstring in docstrings)
    of_scripts = set(re.findall(r"outputs/([\w/*.]+\w)", writes))
    for patterns in (of_table, of_scripts):
        assert not [name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)]
        assert not [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in files)]
