"""Time a projection: deconv_full's engine beside deconv's full frame, Captum and rectified autograd.

Run:    uv run python tests/benchmarks/bench_projection.py
Reads:  outputs/CNN.pth and its data set
Writes: nothing; prints tables

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
Way = Callable[[], int | Tensor]  # projects; returns how many projections it made, or its only one


def strongest_units(net: CNN, layer: int, images: Array) -> Units:
    """Return the strongest unit of each image and filter that fires, as deconv_full projects them."""
    activations = measure_activations(images, net, BATCH_SIZE, "")
    peaks = activations[f"{LAYERS[layer]}_max"]
    image, filter_index = np.nonzero(peaks > 0)
    return strongest_of(peaks, activations[f"{LAYERS[layer]}_position"], image, filter_index)


def run_engine(projector: Projector, images: Array, units: Units) -> int:
    """Project all units and keep next to nothing; return how many."""
    for _ in project_units(projector, images, units, "", lambda windows: windows[:, 0, 0].clone()):
        pass
    return len(units.image)


def clock(way: Way, timer: Timer) -> float:
    """Return milliseconds a projection."""
    start = timer()
    made = way()
    return 1e3 * (timer() - start) / (made if isinstance(made, int) else 1)


def fastest_rate(timer: Timer) -> float:
    """Return the 1e9 multiply-adds per second of a matrix product or a convolution, whichever is faster."""
    a = torch.randn(1024, 1024)
    maps = torch.randn(16, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    filters = torch.randn(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)

    product = min(clock(lambda: a @ a, timer) for _ in range(8))
    convolution = min(clock(lambda: F.conv2d(maps, filters, padding=1), timer) for _ in range(8))
    return max(1024**3 / product, 16 * 256 * 256 * 9 * 32**2 / convolution) / 1e6


def multiply_adds(projector: Projector, origins: Array) -> float:
    """Return the mean number of multiply-adds in a window: every unpooled input x kernel x outputs."""
    total = 0
    for row, column in projector.map_positions(origins):
        for k in range(projector.layer):
            block = projector.blocks[k]
            pooled = projector.spans_of_row[row][k + 1].size() * projector.spans_of_row[column][k + 1].size()
            total += pooled * block.pool_size**2 * block.conv.weight.numel()
    return total / len(origins)


def time_layer(net: CNN, layer: int, images: Array, rate: float, timer: Timer) -> None:
    """Print what a projection of one layer costs each way, and the engine's share of the limit."""
    projector = Projector(net, layer, BATCH_SIZE)
    units = strongest_units(net, layer, images)
    single_units = units.select(np.arange(ROUNDS) * (len(units.image) // ROUNDS))
    windows, origins = project_windows(projector, images, single_units, "")
    captum = NeuronDeconvolution(net, net.blocks[layer].relu)

    times: dict[str, list[float]] = {way: [] for way in ("engine", "plain", "captum", "autograd")}
    worst = 0.0
    for n in range(-1, ROUNDS):  # the first round warms up
        unit = single_units.select(np.array([n]))
        image = net.normalise(torch.from_numpy(images[unit.image]))
        position = (int(unit.filter[0]), int(unit.row[0]), int(unit.column[0]))
        ways: dict[str, Way] = {
            "engine": partial(run_engine, projector, images, units),
            "plain": partial(project_unit, net, image, layer, *position),
            "captum": partial(captum.attribute, image, position),
            "autograd": partial(
                backpropagate, net, image, layer, unit.filter, unit.row, unit.column, "deconvnet"
            ),
        }
        for name, way in ways.items():
            times[name].append(clock(way, timer))

        top, left = origins[n].tolist()
        frame = captum.attribute(image, position)[0].numpy() * unit.value[0]
        expected = crop(frame, top, left, projector.field.size, 0)
        worst = max(worst, float(np.abs(windows[n] - expected).max() / np.abs(expected).max()))

    share = multiply_adds(projector, origins) / statistics.median(times["engine"][1:]) / 1e6 / rate
    print_times(LAYERS[layer], times)
    print(f"{'':<7}{share:.0%} of the limit; differs from captum by {worst:.1e} of the largest", flush=True)


def print_times(layer: str, times: dict[str, list[float]]) -> None:
    """Print a line for each way; the first round, which warmed up, does not count."""
    engine = statistics.median(times["engine"][1:])
    for name, (_, *values) in times.items():
        median = statistics.median(values)
        print(f"{layer:<7}{name:<9}{median:9.3f}{min(values):9.3f}{max(values):9.3f}{median / engine:8.0f}")


def print_growth(net: CNN, images: Array) -> None:
    """Print how the cost of conv4 grows with images and with filters."""
    layer = len(LAYERS) - 1
    projector = Projector(net, layer, BATCH_SIZE)
    units = strongest_units(net, layer, images)

    def print_cost(label: str, chosen: Units) -> None:
        way = partial(run_engine, projector, images, chosen)
        best = min(clock(way, time.perf_counter) for _ in range(3))
        count = len(chosen.image)
        print(f"{label:<13}{best * count / 1e3:8.3f} s for {count:,} projections, {best:.3f} ms each")

    for count in (len(images) // 4, len(images) // 2, len(images)):
        print_cost(f"{count} images", units.select(units.image < count))
    filter_count = net.config["filters"][-1]
    for count in (filter_count // 4, filter_count // 2):
        print_cost(f"{count} filters", units.select(units.filter < count))


def main() -> None:
    """Time all layers, one thread and all cores, then how the cost grows."""
    checkpoint = load_checkpoint(Path("outputs/CNN.pth"))
    net = checkpoint.net
    images = load_split(checkpoint.dataset, Path("data"), "test").images
    cores = torch.get_num_threads()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"test images of {TITLES[checkpoint.dataset]}, {BATCH_SIZE} for each thread")

    for threads, timer, name in (
        (1, time.process_time, "one thread, process CPU time"),
        (cores, time.perf_counter, f"{cores} threads, wall time"),
    ):
        torch.set_num_threads(threads)
        rate = fastest_rate(timer)
        print(f"\n{name}; the machine reaches {rate:.0f}e9 multiply-adds/s; milliseconds a projection")
        print(f"{'layer':<7}{'way':<9}{'median':>9}{'min':>9}{'max':>9}{'ratio':>8}")
        for layer in range(len(LAYERS)):
            time_layer(net, layer, images[: BATCH_SIZE * threads], rate, timer)

    print("\ncost of conv4 on all cores, best of 3, forward pass and masks included")
    print_growth(net, images[: 4 * BATCH_SIZE * cores])


if __name__ == "__main__":
    with redirect_stderr(io.StringIO()):  # no progress bars; captum announces its hooks
        main()
