"""Interrupt every stage at random moments, then look at what it left and run it to the end.

Run:    uv run python tests/interruptions.py
Reads:  nothing; works in a temporary folder on a tiny set of generated images
Writes: nothing that stays; prints a table and what went wrong

A stage may be killed (SIGKILL), interrupted (SIGINT, as by Ctrl-C) or interrupted twice. Whatever the moment,
every file under a final name must be whole, what is half written must be called partial, an interruption must
end in one line and status 1, and the next run must end as if nothing had happened: with the same files, the
same numbers (for the training: the same bits) and no partial file.

The imports take longer than a stage on so few images. So one process imports everything and forks for every
run; the child leaves by the way a script leaves. The start-up itself is interrupted in fresh processes:
before `main` begins, Python's own traceback is no fault of the scripts.
"""

import atexit
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("load_data", "train_CNN", "deconv", "deconv_full", "analyse_projections", "heatmap")
KINDS: dict[str, tuple[int, ...]] = {
    "killed": (signal.SIGKILL,),
    "interrupted": (signal.SIGINT,),
    "interrupted twice": (signal.SIGINT, signal.SIGINT),
}
REPETITIONS = 10  # of each kind and stage

SETTINGS: dict[str, dict[str, Any]] = {  # of a run of seconds
    "load_data": {"DATASET": "shapes", "SHAPES_IMAGES": {"train": 40, "test": 20}},
    "train_CNN": {"DATASET": "shapes", "SHAPES_EPOCHS": 4, "BATCH_SIZE": 16, "FILTERS": (4, 5, 6, 8)},
    "deconv": {"N_FILTERS": 2},
    "deconv_full": {"IMAGES_PER_CLASS": 2, "EVOLUTION_FILTERS": 2, "BATCH_SIZE": 8, "CHUNK": 2},
    "analyse_projections": {"RESAMPLINGS": 5, "RANDOM_ORDERS": 2, "RANDOMISED_UNITS": 5, "PROBE_STEPS": 2},
    "heatmap": {
        **{"OCCLUSION_STRIDE": 24, "OCCLUSION_STRIDE_MANY": 48, "OCCLUDED_IMAGES": 2, "RESAMPLINGS": 5},
        **{"INVARIANCE_IMAGES": 1, "SHIFTS": [0, 8], "ZOOMS": [1, 1.5], "ANGLES": [0, 90]},
    },
}


def close_output() -> None:
    """Let nobody read what is printed, as `| head` does after its last line."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def limit_files() -> None:
    """Let no file grow beyond some kilobytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))


def choose_backend() -> None:
    """Ask for a window as MPLBACKEND=TkAgg does, of a kind that no machine has."""
    import matplotlib

    matplotlib.rcParams["backend"] = "module://no_such_backend"


def run_twice() -> None:
    """Run the stage in two processes at once; the first keeps the status of the second."""
    if second := os.fork():

        def wait() -> None:
            status = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
            Path("second.txt").write_text(str(status))

        atexit.register(wait)


def one_core() -> None:
    """Leave one core, where the system can say so, and no standard output."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.stdout = None


CONDITIONS: dict[str, Callable[[], object]] = {  # under which a stage can be run
    "": lambda: None,
    "nobody reads": close_output,
    "full disk": limit_files,
    "no display": choose_backend,
    "twice": run_twice,
    "one core and no output": one_core,
}


def serve() -> None:
    """Import everything once; then, for each line of the input, become a process that runs a stage.

    A line holds the stage, its folder and one of the `CONDITIONS`, separated by tabs. The process number and,
    at the end, the exit status are printed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    import matplotlib.pyplot as plt
    import torch

    modules = {stage: __import__(stage) for stage in STAGES}
    for stage, settings in SETTINGS.items():
        for name, value in settings.items():
            assert hasattr(modules[stage], name), f"{stage} has no {name}"
            setattr(modules[stage], name, value)
        if stage != "load_data":
            setattr(modules[stage], "DEVICE", "cpu")  # noqa: B010
    plt.rcParams["savefig.dpi"] = 20
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in map(os.fsdecode, iter(sys.stdin.buffer.readline, b"")):
        stage, folder, condition = line.rstrip("\n").split("\t")
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        os.chdir(folder)
        atexit.unregister(shutil.rmtree)  # a temporary folder of matplotlib's is the server's
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have let it be ignored
        for number, name in ((0, os.devnull), (1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        torch.set_num_threads(2)  # deconv_full.py has as many workers
        CONDITIONS[condition]()
        with modules["load_data"].plain_errors():
            modules[stage].main()
        return


class Server:
    """The process that runs stages, see `serve`."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process
        self.answer()

    def answer(self) -> str:
        """Return the next line of the server."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the process that runs the stages has ended"
        return line.strip()

    def start(self, stage: str, folder: Path, condition: str = "") -> int:
        """Start a stage in a folder and return the number of its process."""
        assert self.process.stdin
        self.process.stdin.write(f"{stage}\t{folder}\t{condition}\n")
        self.process.stdin.flush()
        return int(self.answer())

    def run(self, stage: str, folder: Path, condition: str = "") -> int:
        """Run a stage to its end and return its exit status."""
        self.start(stage, folder, condition)
        return int(self.answer())


@contextmanager
def server(environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start a `Server`, by default with this process's environment, and stop it at the end."""
    command = [sys.executable, __file__, "serve"]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


def files(folder: Path) -> dict[str, Path]:
    """Return the files of the outputs folder by name."""
    found = sorted((folder / "outputs").rglob("*"))
    return {str(path.relative_to(folder / "outputs")): path for path in found if path.is_file()}


def content(path: Path) -> Any:
    """Read a file to its end and return its numbers, None for a picture; raises whatever is wrong with it."""
    import numpy as np
    import pandas as pd
    import torch
    from PIL import Image

    from CNN import load_checkpoint

    if path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
        return None
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}
    if path.suffix == ".csv":
        assert path.read_text().endswith("\n")
        return pd.read_csv(path).drop(columns="seconds", errors="ignore").to_dict("list")
    if path.name == "training_state.pth":
        torch.load(path, weights_only=True)
        return None
    assert path.suffix == ".pth", f"{path} is no file of this project"
    return {name: value.numpy() for name, value in load_checkpoint(path).net.state_dict().items()}


def problems_after(folder: Path) -> list[str]:
    """Return what is wrong with the files that an interrupted stage left."""
    wrong = []
    for name, path in files(folder).items():
        try:
            if "partial" not in name:
                content(path)
        except (Exception, SystemExit) as error:
            wrong.append(f"{name} cannot be read: {error!r}")
    return wrong


def problems_of_next_run(folder: Path, expected: Path) -> list[str]:
    """Return in what the outputs of a run differ from those of one that nothing interrupted."""
    import numpy as np

    found, right = files(folder), files(expected)
    wrong = [f"{name} is left over" for name in found.keys() - right.keys()]
    wrong += [f"{name} is missing" for name in right.keys() - found.keys()]
    for name in found.keys() & right.keys():
        try:
            np.testing.assert_equal(content(found[name]), content(right[name]))
        except AssertionError:
            wrong.append(f"{name} holds other numbers")
    return wrong


def interrupt(runner: Server, stage: str, folder: Path, kind: str, moment: float) -> list[str] | None:
    """Run a stage, interrupt it after some seconds and return what was wrong then; None if it had ended."""
    process = runner.start(stage, folder)
    for number, number_of_signal in enumerate(KINDS[kind]):
        time.sleep(moment if number == 0 else 0.02)
        with suppress(ProcessLookupError):
            os.kill(process, number_of_signal)
    status, said = int(runner.answer()), (folder / "stderr.txt").read_text()
    told = (folder / "stdout.txt").read_text().splitlines()[-1:]
    if status == 0 or (told and told[0].startswith(("next: ", "this was the last stage"))):
        return None
    wrong = problems_after(folder)
    if kind == "killed":
        return wrong + ([] if status == -signal.SIGKILL else [f"status {status}"])
    if status != 1:
        wrong.append(f"status {status}")
    if "interrupted" not in said or len(said.strip().splitlines()) != 1:
        wrong.append(f"said {said!r}")
    return wrong


def prepare(runner: Server, folder: Path, stages: Sequence[str] = STAGES) -> dict[str, float]:
    """Run stages without interruption; keep the folder before and after each, return their seconds."""
    current, seconds = folder / "current", {}
    current.mkdir(parents=True)
    for stage in stages:
        shutil.copytree(current, folder / f"before {stage}")
        start = time.perf_counter()
        status = runner.run(stage, current)
        seconds[stage] = time.perf_counter() - start
        assert status == 0, (current / "stderr.txt").read_text()
        shutil.copytree(current, folder / f"after {stage}")
    return seconds


def try_stage(
    runner: Server, folder: Path, stage: str, seconds: float, repetitions: int, seed: int = 0
) -> tuple[Counter[str], list[str]]:
    """Interrupt a stage `repetitions` times in each way; return how often it was and what was wrong.

    Every other time the outputs of an earlier run are there already.
    """
    rng, counts, wrong = random.Random(f"{stage} {seed}"), Counter[str](), []
    for kind in KINDS:
        while counts[kind] < repetitions:
            trial = folder / "trial"
            shutil.rmtree(trial, ignore_errors=True)
            again = counts[kind] % 2
            shutil.copytree(folder / f"{'after' if again else 'before'} {stage}", trial)
            moment = rng.uniform(0, seconds)
            found = interrupt(runner, stage, trial, kind, moment)
            if found is None:
                counts["ended before"] += 1
                continue
            counts[kind] += 1
            counts["left a partial file"] += any("partial" in name for name in files(trial))
            status = runner.run(stage, trial)
            if status:
                found.append(f"the next run ended with {status}: {(trial / 'stderr.txt').read_text()}")
            else:
                found += problems_of_next_run(trial, folder / f"after {stage}")
            wrong += [f"{stage}, {kind} after {moment:.2f} s: {problem}" for problem in found]
            counts["survived"] += not found
    return counts, wrong


def try_start_up(folder: Path, repetitions: int) -> tuple[Counter[str], list[str]]:
    """Interrupt the start of a script in a fresh process, imports included."""
    command = [sys.executable, str(ROOT / "deconv.py")]  # ends with one line: there is no checkpoint
    folder.mkdir(parents=True)
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True)
    seconds, counts, wrong = time.perf_counter() - start, Counter[str](), []
    for number in range(2 * repetitions):
        kind = ("killed", "interrupted")[number % 2]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(random.Random(number).uniform(0.02, seconds))
            process.send_signal(KINDS[kind][0])
            _, said = process.communicate()
        counts[kind] += 1
        counts["traceback of an import"] += "Traceback" in said
        if kind == "interrupted" and process.returncode not in (1, 130, -signal.SIGINT):
            wrong.append(f"start-up, {kind}: status {process.returncode}, said {said!r}")
        if list(folder.iterdir()):
            wrong.append(f"start-up, {kind}: left {list(folder.iterdir())}")
    return counts, wrong


def main(repetitions: int = REPETITIONS, stages: Sequence[str] = STAGES) -> list[str]:
    """Interrupt the stages and the start-up, print a table and return what went wrong."""
    columns = [*KINDS, "survived", "left a partial file", "ended before"]
    print(f"{'stage':<22}{'seconds':>8}" + "".join(f"{column:>21}" for column in columns), flush=True)
    with tempfile.TemporaryDirectory() as name, server() as runner:
        folder, everything = Path(name), []
        seconds = prepare(runner, folder)
        for stage in stages:
            counts, wrong = try_stage(runner, folder, stage, seconds[stage], repetitions)
            numbers = "".join(f"{counts[column]:>21}" for column in columns)
            print(f"{stage:<22}{seconds[stage]:>8.1f}{numbers}", flush=True)
            print("".join(f"  {problem}\n" for problem in wrong), end="", flush=True)
            everything += wrong
        counts, wrong = try_start_up(folder / "start", repetitions)
        print(f"start-up: {dict(counts)}\n" + "".join(f"  {problem}\n" for problem in wrong), end="")
    return everything + wrong


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        sys.path.insert(0, str(ROOT))
        sys.exit(1 if main() else 0)
