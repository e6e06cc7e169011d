"""Run stages on machines as users have them, and interrupt them; tests/interruptions.py says how."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import interruptions
import pytest
from interruptions import STAGES, Server

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the stages are run by forking")
MINE = ("train_CNN", "deconv_full")  # one that writes a bit every epoch, one that writes large arrays


@pytest.fixture(scope="module")
def runner() -> Iterator[Server]:
    with interruptions.server() as running:
        yield running


@pytest.fixture(scope="module")
def prepared(runner: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Holds the folders before and after each of some stages, and says how many seconds each took."""
    folder = tmp_path_factory.mktemp("kept")
    return folder, interruptions.prepare(runner, folder, STAGES[:4])


@pytest.fixture(scope="module")
def kept(prepared: tuple[Path, dict[str, float]]) -> Path:
    return prepared[0]


@pytest.fixture(params=MINE)
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kept: Path, stage: str, tmp_path: Path) -> Path:
    """What the stage finds when it starts; its results of an earlier run are there already."""
    return Path(shutil.copytree(kept / f"after {stage}", tmp_path / "Zwölf Äpfel, 1 Birne"))


def said(folder: Path) -> str:
    return (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in interruptions.files(folder).items()}


def assert_ends_well(folder: Path, stage: str, kept: Path, status: int) -> None:
    assert (status, said(folder)) == (0, "")
    assert not interruptions.problems_of_next_run(folder, kept / f"after {stage}")


def assert_ends_in_one_line(folder: Path, status: int, *words: str) -> None:
    assert status == 1 and len(said(folder).splitlines()) == 1, said(folder)
    assert all(word in said(folder) for word in words), said(folder)
    assert not interruptions.problems_after(folder)
    assert not [name for name in interruptions.files(folder) if "partial" in name]


def test_an_interrupted_stage_leaves_whole_files_and_the_next_run_ends_as_if_nothing_had_happened(
    runner: Server, prepared: tuple[Path, dict[str, float]], stage: str
) -> None:
    # once in each way; `uv run python tests/interruptions.py` tries all stages often
    seed = 0  # the same moments, as far as a machine is as fast
    counts, wrong = interruptions.try_stage(runner, prepared[0], stage, prepared[1][stage], 1, seed)
    assert not wrong, (seed, wrong)
    assert counts["survived"] == len(interruptions.KINDS)


def test_a_folder_with_spaces_and_accents_one_core_and_no_output_at_all(
    runner: Server, kept: Path, stage: str, folder: Path
) -> None:
    shutil.rmtree(folder)
    shutil.copytree(kept / f"before {stage}", folder)
    assert_ends_well(folder, stage, kept, runner.run(stage, folder, "one core and no output"))


def test_a_display_that_is_not_there_does_not_matter(
    runner: Server, kept: Path, stage: str, folder: Path
) -> None:
    assert_ends_well(folder, stage, kept, runner.run(stage, folder, "no display"))


def test_an_output_that_nobody_reads_ends_the_run(runner: Server, stage: str, folder: Path) -> None:
    before = contents(folder)
    assert_ends_in_one_line(folder, runner.run(stage, folder, "nobody reads"), "closed before the end")
    assert contents(folder) == before


def test_outputs_that_is_a_file_is_named(runner: Server, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    assert_ends_in_one_line(tmp_path, runner.run("train_CNN", tmp_path), "outputs", "File exists")
    assert (tmp_path / "outputs").read_text() == "a file"


def test_a_folder_that_cannot_be_made_is_named_before_the_work(
    runner: Server, stage: str, folder: Path
) -> None:
    name = {"train_CNN": "snapshots", "deconv_full": "deconv"}[stage]
    shutil.rmtree(folder / "outputs" / name)
    (folder / "outputs" / name).write_text("a file")
    before = contents(folder)
    assert runner.run(stage, folder) == 1 and len(said(folder).splitlines()) == 1
    assert f"outputs/{name}, but no file can be written there" in said(folder)
    assert contents(folder) == before and "wrote" not in (folder / "stdout.txt").read_text()


def test_a_full_disk_ends_in_one_line_and_leaves_what_was_there(
    runner: Server, stage: str, folder: Path
) -> None:
    before = contents(folder)
    status = runner.run(stage, folder, "full disk")
    assert_ends_in_one_line(folder, status, "run again")
    after = contents(folder)
    lost = {name for name in before if after.get(name) != before[name]}
    # a training replaces the snapshots of the earlier one when its first epoch has ended
    assert not [name for name in lost if not name.startswith("snapshots")]


@pytest.fixture
def mounted(folder: Path) -> Iterator[Path]:
    """The folder, its outputs on a small disk of their own."""
    outputs = folder / "outputs"
    shutil.move(outputs, folder / "earlier")
    outputs.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(outputs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"this user may not mount a disk: {done.stderr.strip()}")
    try:
        shutil.copytree(folder / "earlier", outputs, dirs_exist_ok=True)
        yield folder
    finally:
        subprocess.run(["umount", str(outputs)], check=True)


def remount(folder: Path, options: str) -> None:
    outputs = str(folder / "outputs")
    subprocess.run(["mount", "-o", f"remount,{options}", outputs], check=True, capture_output=True)


def test_a_disk_that_is_read_only_and_one_that_is_full_end_in_one_line(
    runner: Server, stage: str, mounted: Path
) -> None:
    before = contents(mounted)
    remount(mounted, "ro")
    assert_ends_in_one_line(mounted, runner.run(stage, mounted), "outputs", "Read-only file system")
    assert contents(mounted) == before
    remount(mounted, "rw")
    (mounted / "outputs" / "ballast").write_bytes(b"")
    with (mounted / "outputs" / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(4096)):
                pass
        except OSError:
            pass
    status = runner.run(stage, mounted)
    (mounted / "outputs" / "ballast").unlink()
    assert_ends_in_one_line(mounted, status, "No space left on device", "run again")
    after = contents(mounted)
    assert not [n for n in before if after.get(n) != before[n] and not n.startswith("snapshots")]


def test_two_runs_at_once_write_no_half_file(runner: Server, stage: str, folder: Path) -> None:
    first = runner.run(stage, folder, "twice")
    statuses = {first, int((folder / "second.txt").read_text())}
    assert 0 in statuses and statuses <= {0, 1} and "Traceback" not in said(folder), said(folder)
    assert not interruptions.problems_after(folder)
    assert not [name for name in interruptions.files(folder) if "partial" in name]


def test_no_home_a_plain_locale_and_a_narrow_dumb_terminal(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "MPLBACKEND")}
    environment |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "20"}
    environment |= {"MPLCONFIGDIR": "/proc/nothing", "XDG_CACHE_HOME": "/proc/nothing"}
    with interruptions.server(environment) as odd:
        for name in STAGES:
            status = odd.run(name, tmp_path)
            assert (status, said(tmp_path)) == (0, ""), name
    assert not interruptions.problems_after(tmp_path)
