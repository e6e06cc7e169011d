"""Time a projection: deconv_full's engine in two precisions, deconv's full frame, captum, autograd.

Run:    uv run python tests/benchmarks/bench_projection.py
Reads:  outputs/CNN.pth and its data set
Writes: nothing; prints a table

One thread is timed in process CPU time, all cores in wall time. The ways take turns, round after round. Each
includes its forward pass: the engine's one serves all units of an image, the others need one for each unit.

What a window saves depends on how much of the frame it covers. So conv4 is timed twice: in the trained
network, whose conv4 windows are 75 pixels wide, and in one with 3 x 3 filters, no stride and 32, 64, 128, 256
filters, whose windows are 38 pixels wide (random weights: the arithmetic does not depend on them).
"""

import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from captum.attr import NeuronDeconvolution
from torch import Tensor

from CNN import CNN, LAYERS, load_checkpoint
from deconv import project_unit
from deconv_full import CHUNK, Projector, Units
from load_data import load_split, normalise, title

IMAGES = 32  # the engine projects every filter of each
UNITS = 4  # projected one by one by the other ways, in each round
ROUNDS = 9


class Rectified(torch.autograd.Function):
    """ReLU that passes max(signal, 0) on the way back."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """Rectify."""
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: object, signal: Tensor) -> Tensor:
        """Rectify the signal that comes back."""
        return signal.clamp(min=0)


def strongest_units(net: CNN, projector: Projector, images: Tensor) -> tuple[list[Tensor], Units]:
    """Forward pass, masks and the strongest active unit of each image and filter."""
    features = net.features(images)
    units = projector.units(features, features[projector.layer][0].flatten(2).argmax(dim=2))
    return projector.masks(features), units.take(units.value.nonzero().flatten())


def project_all(projector: Projector, masks: list[Tensor], units: Units, threads: int) -> None:
    """Project all units, as deconv_full does: each thread takes chunks of its own."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        for _ in workers.map(
            lambda group: projector.project(masks, units.take(group)).shape, projector.groups(units, CHUNK)
        ):
            pass


def engine(net: CNN, projector: Projector, images: Tensor, threads: int) -> int:
    """Project the strongest unit of every image and filter; return how many."""
    masks, units = strongest_units(net, projector, images)
    project_all(projector, masks, units, threads)
    return len(units.image)


def by_autograd(net: CNN, image: Tensor, layer: int, unit: tuple[int, int, int]) -> Tensor:
    """Value x rectified derivative, by torch's autograd."""
    image = image.clone().requires_grad_()
    x = image
    for block in net.blocks[: layer + 1]:
        x, _ = block.pool(Rectified.apply(block.bn(block.conv(x))))
    value = x[0, unit[0], unit[1], unit[2]]
    (gradient,) = torch.autograd.grad(value, image)
    return value.detach() * gradient


def multiply_adds(projector: Projector, units: Units) -> float:
    """Mean number of multiply-adds a unit needs in its window: every unpooled input x kernel x outputs."""
    total = 0
    for row, column in zip(units.row.tolist(), units.column.tolist(), strict=True):
        for k, r, c in zip(
            reversed(range(projector.layer)), projector.windows[row], projector.windows[column], strict=False
        ):
            filters, channels, kernel, _ = projector.blocks[k].conv.weight.shape
            pixels = (r.stop - r.start) * (c.stop - c.start) * projector.blocks[k].pool_size ** 2
            total += pixels * filters * channels * kernel**2
    return total / len(units.image)


def clock(run: Callable[[], int | Tensor], timer: Callable[[], float]) -> float:
    """Milliseconds a projection; `run` returns how many it made, or a single one."""
    start = timer()
    done = run()
    return 1e3 * (timer() - start) / (done if isinstance(done, int) else 1)


def fastest_rate(timer: Callable[[], float]) -> float:
    """Return the 1e9 multiply-adds per second of a matrix product or a convolution, whichever is faster."""
    a = torch.randn(1024, 1024)
    x = torch.randn(16, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    rates = []
    ways: list[tuple[int, Callable[[], Tensor]]] = [
        (1024**3, lambda: a @ a),
        (16 * 256 * 256 * 9 * 32**2, lambda: F.conv2d(x, w, padding=1)),
    ]
    for size, run in ways:
        run()
        rates.append(size / min(clock(run, timer) for _ in range(7)) / 1e6)
    return max(rates)


def time_layer(
    net: CNN, projector: Projector, images: Tensor, threads: int, timer: Callable[[], float]
) -> tuple[dict[str, list[float]], float]:
    """Return the milliseconds a projection of each way, and the engine's largest deviation from captum."""
    _, units = strongest_units(net, projector, images[:UNITS])
    chosen = [int(units.value.argmax()), *range(0, len(units.image), len(units.image) // UNITS)]
    rounded = Projector(net, projector.layer, torch.bfloat16)
    times: dict[str, list[float]] = {way: [] for way in ("engine", "bfloat16", "plain", "captum", "autograd")}
    captum, pool = NeuronDeconvolution(net, net.blocks[projector.layer].relu), projector.blocks[-1].pool_size
    worst = 0.0
    for round_ in range(ROUNDS + 1):  # the first one warms up
        unit = units.take(torch.tensor([chosen[round_ % len(chosen)]]))
        image, place = images[unit.image], (int(unit.filter), int(unit.row), int(unit.column))
        pooled = place[0], place[1] // pool, place[2] // pool

        def plain(image: Tensor = image, pooled: tuple[int, int, int] = pooled) -> Tensor:
            return project_unit(net, net.features(image), projector.layer, *pooled)

        ways: dict[str, Callable[[], int | Tensor]] = {
            "engine": partial(engine, net, projector, images[:IMAGES], threads),
            "bfloat16": partial(engine, net, rounded, images[:IMAGES], threads),
            "plain": plain,
            "captum": partial(captum.attribute, image, place),
            "autograd": partial(by_autograd, net, image, projector.layer, pooled),
        }
        for way, run in ways.items():
            milliseconds = clock(run, timer)
            if round_:
                times[way].append(milliseconds)
        expected = captum.attribute(image, place)[0] * unit.value
        masks, _ = strongest_units(net, projector, image)
        alone = unit._replace(image=torch.zeros(1, dtype=torch.int64))
        frame = torch.zeros_like(expected)
        window = projector.project(masks, alone)[0].permute(2, 0, 1)
        frame[:, *projector.inside(*place[1:])] = window
        worst = max(worst, float((frame - expected).abs().max() / expected.abs().max()))
    return times, worst


def small_windows(images: Tensor) -> CNN:
    """Return an untrained network with conv4 windows of 38 pixels, its batch norms set by the images."""
    torch.manual_seed(0)
    net = CNN((32, 64, 128, 256), (3, 3, 3, 3), (1, 1, 1, 1), (2, 2, 2, 2)).train()
    with torch.no_grad():
        for _ in range(30):  # running statistics approach those of the batch
            net(images[:IMAGES])
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def print_layer(
    name: str,
    net: CNN,
    projector: Projector,
    images: Tensor,
    threads: int,
    rate: float,
    timer: Callable[[], float],
) -> None:
    """Print what a projection of one layer costs each way, and the engine's share of the limit."""
    times, worst = time_layer(net, projector, images, threads, timer)
    fast = statistics.median(times["engine"])
    cells = []
    for way, values in times.items():
        median = statistics.median(values)
        ratio = f" {median / fast:.0f}x" if way != "engine" else ""
        cells.append(f"{way} {median:.3f} ({min(values):.3f} to {max(values):.3f}){ratio}")
    needed = multiply_adds(projector, strongest_units(net, projector, images[:2])[1])
    print(f"{name}: {'; '.join(cells)}")
    print(
        f"       {needed / 1e6:.2f}e6 multiply-adds, {needed / fast / 1e6 / rate:.0%} of the limit; "
        f"differs from captum by {worst:.1e} of the largest",
        flush=True,
    )


def print_growth(net: CNN, projector: Projector, images: Tensor, threads: int) -> None:
    """Print how the cost grows with images and with filters."""
    print("\ncost of conv4 on all cores, best of 3, forward pass and masks included for images")
    for count in (IMAGES, 2 * IMAGES, 4 * IMAGES):
        seconds, made = [], 0
        for _ in range(3):
            start = time.perf_counter()
            made = sum(engine(net, projector, part, threads) for part in images[:count].split(IMAGES))
            seconds.append(time.perf_counter() - start)
        print(f"{count:>4} images, all filters {min(seconds):8.3f} s for {made:>6,} projections")
    masks, units = strongest_units(net, projector, images[: 2 * IMAGES])
    for filters in (64, 128, 256):
        some = units.take((units.filter < filters).nonzero().flatten())
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            project_all(projector, masks, some, threads)
            seconds.append(time.perf_counter() - start)
        made = len(some.image)
        print(f"{2 * IMAGES:>4} images, {filters} filters {min(seconds):8.3f} s for {made:>6,} projections")


def main() -> None:
    """Time all layers, one thread and all cores, then how the cost grows."""
    warnings.simplefilter("ignore")  # captum announces its hooks
    checkpoint = load_checkpoint(Path("outputs/CNN.pth"))
    split = load_split(checkpoint.dataset, Path("data"), "test")
    images = normalise(torch.from_numpy(split.images[: 4 * IMAGES]), checkpoint.mean, checkpoint.std)
    images = images.contiguous(memory_format=torch.channels_last)
    net, cores = checkpoint.net, torch.get_num_threads()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{IMAGES} test images of {title(checkpoint.dataset)}, float32, chunks of {CHUNK}")
    projectors = [Projector(net, layer) for layer in range(len(LAYERS))]
    for threads, timer, name in (
        (1, time.process_time, "one thread, process CPU time"),
        (cores, time.perf_counter, f"{cores} threads, wall time"),
    ):
        torch.set_num_threads(threads)
        rate = fastest_rate(timer)
        print(f"\n{name}; the machine reaches {rate:.0f}e9 multiply-adds/s")
        print("ms a projection: median (min to max); x: how many times the engine's")
        for layer, projector in zip(LAYERS, projectors, strict=True):
            print_layer(layer, net, projector, images, threads, rate, timer)
        small = small_windows(images)
        print_layer(
            f"{LAYERS[-1]} of the small-window network",
            small,
            Projector(small, 3),
            images,
            threads,
            rate,
            timer,
        )
    print_growth(net, projectors[-1], images, cores)


if __name__ == "__main__":
    main()
