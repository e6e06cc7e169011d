"""Time a projection: deconv_full's engine beside deconv's full frame, Captum and rectified autograd.

Run:    uv run python tests/benchmarks/bench_projection.py
Reads:  outputs/CNN.pth and its data set
Writes: nothing; prints a table

One thread is timed in process CPU time, all cores in wall time. The ways take turns, round after round. Each
includes its forward pass: the engine's one serves all units of an image, the others need one for each unit.
"""

import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import NeuronDeconvolution
from torch import Tensor

from CNN import CNN, LAYERS, load_checkpoint
from deconv import backpropagate, crop, project_unit
from deconv_full import (
    BATCH_SIZE,
    Projector,
    Units,
    measure_activations,
    project_units,
    project_windows,
    strongest_of,
)
from load_data import TITLES, Array, load_split

ROUNDS = 9
Timer = Callable[[], float]


def strongest_units(net: CNN, layer: int, images: Array) -> Units:
    """Return the strongest unit of each image and filter that fires, as deconv_full projects them."""
    activations = measure_activations(images, net, BATCH_SIZE, "")
    maxima = activations[f"{LAYERS[layer]}_max"]
    return strongest_of(maxima, activations[f"{LAYERS[layer]}_position"], *np.nonzero(maxima > 0))


def engine(projector: Projector, images: Array, units: Units) -> int:
    """Project all units and keep next to nothing; return how many."""
    for _ in project_units(projector, images, units, "", lambda windows: windows[:, 0, 0].clone()):
        pass
    return len(units.image)


def clock(run: Callable[[], int | Tensor], timer: Timer) -> float:
    """Milliseconds a projection; `run` returns how many it made, or a single one."""
    start = timer()
    done = run()
    return 1e3 * (timer() - start) / (done if isinstance(done, int) else 1)


def fastest_rate(timer: Timer) -> float:
    """Return the 1e9 multiply-adds per second of a matrix product or a convolution, whichever is faster."""
    a, x, w = torch.randn(1024, 1024), torch.randn(16, 256, 32, 32), torch.randn(256, 256, 3, 3)
    x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
    ways: list[tuple[int, Callable[[], Tensor]]] = [
        (1024**3, lambda: a @ a),
        (16 * 256 * 256 * 9 * 32**2, lambda: F.conv2d(x, w, padding=1)),
    ]
    return max(size / min(clock(run, timer) for _ in range(8)) / 1e6 for size, run in ways)


def multiply_adds(projector: Projector, origins: Array) -> float:
    """Mean number of multiply-adds a unit needs in its window: every unpooled input x kernel x outputs."""
    total = 0
    for row, column in (origins - projector.field.start) // projector.field.jump:
        for k in range(projector.layer):
            block = projector.blocks[k]
            pooled = projector.windows[row][k + 1].size() * projector.windows[column][k + 1].size()
            total += pooled * block.pool_size**2 * block.conv.weight.numel()
    return total / len(origins)


def time_layer(net: CNN, layer: int, images: Array, rate: float, timer: Timer) -> None:
    """Print what a projection of one layer costs each way, and the engine's share of the limit."""
    projector, units = Projector(net, layer, BATCH_SIZE), strongest_units(net, layer, images)
    some = Units(*(entry[:: len(units.image) // ROUNDS] for entry in units))
    windows, origins = project_windows(projector, images, some, "")
    captum, size = NeuronDeconvolution(net, net.blocks[layer].relu), projector.field.size
    times: dict[str, list[float]] = {way: [] for way in ("engine", "plain", "captum", "autograd")}
    worst = 0.0
    for n in range(ROUNDS + 1):  # the first round warms up
        (image_number, *unit), value = (int(entry[n % ROUNDS]) for entry in some[:4]), some.value[n % ROUNDS]
        image, (top, left) = net.normalise(torch.from_numpy(images[[image_number]])), origins[n % ROUNDS]
        attribute = partial(captum.attribute, image, tuple(unit))
        filter_, row, column = (np.array([k]) for k in unit)
        ways: dict[str, Callable[[], int | Tensor]] = {
            "engine": partial(engine, projector, images, units),
            "plain": partial(project_unit, net, image, layer, *unit),
            "captum": attribute,
            "autograd": partial(backpropagate, net, image, layer, filter_, row, column, "deconvnet"),
        }
        for way, run in ways.items():
            times[way].append(clock(run, timer))
        expected = crop(attribute()[0].numpy() * value, int(top), int(left), size, 0)
        worst = max(worst, float(np.abs(windows[n % ROUNDS] - expected).max() / np.abs(expected).max()))
    fast, cells = statistics.median(times["engine"][1:]), []
    for way, (_, *values) in times.items():
        median = statistics.median(values)
        ratio = f" {median / fast:.0f}x" if way != "engine" else ""
        cells.append(f"{way} {median:.3f} ({min(values):.3f} to {max(values):.3f}){ratio}")
    print(f"{LAYERS[layer]}: {'; '.join(cells)}")
    needed = multiply_adds(projector, origins)
    print(
        f"       {needed / 1e6:.2f}e6 multiply-adds, {needed / fast / 1e6 / rate:.0%} of the limit; "
        f"differs from captum by {worst:.1e} of the largest",
        flush=True,
    )


def print_growth(net: CNN, images: Array) -> None:
    """Print how the cost of conv4 grows with images and with filters."""
    layer, filters = len(LAYERS) - 1, net.config["filters"][-1]
    projector, all_units = Projector(net, layer, BATCH_SIZE), strongest_units(net, layer, images)
    for share, of in ((4, "images"), (2, "images"), (1, "images"), (4, "filters"), (2, "filters")):
        numbers, count = (all_units.image, len(images)) if of == "images" else (all_units.filter, filters)
        units = Units(*(entry[numbers < count // share] for entry in all_units))
        best = min(clock(partial(engine, projector, images, units), time.perf_counter) for _ in range(3))
        seconds, made = best * len(units.image) / 1e3, f"{len(units.image):,} projections"
        print(f"{count // share:>5} {of:<8}{seconds:8.3f} s for {made}, {best:.3f} ms each")


def main() -> None:
    """Time all layers, one thread and all cores, then how the cost grows."""
    checkpoint, cores = load_checkpoint(Path("outputs/CNN.pth")), torch.get_num_threads()
    net, images = checkpoint.net, load_split(checkpoint.dataset, Path("data"), "test").images
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"test images of {TITLES[checkpoint.dataset]}, {BATCH_SIZE} for each thread")
    for threads, timer, name in (
        (1, time.process_time, "one thread, process CPU time"),
        (cores, time.perf_counter, f"{cores} threads, wall time"),
    ):
        torch.set_num_threads(threads)
        rate = fastest_rate(timer)
        print(f"\n{name}; the machine reaches {rate:.0f}e9 multiply-adds/s")
        print("ms a projection: median (min to max); x: how many times the engine's")
        for layer in range(len(LAYERS)):
            time_layer(net, layer, images[: BATCH_SIZE * threads], rate, timer)
    print("\ncost of conv4 on all cores, best of 3, forward pass and masks included")
    print_growth(net, images[: 4 * BATCH_SIZE * cores])


if __name__ == "__main__":
    with redirect_stderr(io.StringIO()):  # no progress bars; captum announces its hooks
        main()
