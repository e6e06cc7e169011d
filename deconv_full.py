"""Project the strongest activations of every filter back to pixels, and measure all projections of conv4.

Run:    uv run deconv_full.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_*.pth, data/stl10_binary/test_{X,y}.bin
Writes: outputs/activations.npz, outputs/projections.npz, outputs/projection_statistics.npz,
        outputs/deconv/conv*.png, outputs/feature_evolution.png

The arithmetic is that of deconv.py (Zeiler & Fergus 2014, section 2.1), arranged for millions of units:

- A window suffices. Going down, one unit spreads over the kernel of its filter, each value of that over a
  pooling region, that over the next kernel, and so on; beyond the receptive field everything is zero. So only
  a window is computed, at every layer, and what of it lies outside the image is left out. Windows that the
  border cuts in the same way have the same shape and are projected together.
- Unpooling needs no switches of its own: each pooled value is repeated over its pooling region and multiplied
  by a mask that is 1 at the maximum. The masks are made once for each image, for all its units.
- A transposed convolution is a convolution with the filters turned round. Stride s makes s x s of them, one
  for each place between two steps, which are interleaved afterwards.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from CNN import (
    CNN,
    IMAGE_SIZE,
    LAYERS,
    Checkpoint,
    ConvBlock,
    choose_device,
    frame_sizes,
    load_checkpoint,
    receptive_fields,
)
from deconv import displayed, gain_filters, unpool, window_of
from load_data import (
    Split,
    check_numbers,
    check_paths,
    load_split,
    normalise,
    plain_errors,
    prepare_folders,
    save_arrays,
    save_figure,
    title,
)

N_TOP = 9  # images of a filter: the N_TOP different test images that drive it most
IMAGES_PER_CLASS: int | None = None  # test images of each class in projection_statistics.npz; None: all
BATCH_SIZE = 32  # images whose masks are held at once; more costs memory, not time
CHUNK = 32  # units projected at once by one thread; on a CPU they should fit its cache, on a GPU try 2048
PRECISION = "float32"  # of projection_statistics.npz; or "bfloat16": faster, rounded; README says how much
FILTERS_PER_PAGE = 32  # filters in one picture of outputs/deconv/
EVOLUTION_FILTERS = 5  # filters of each layer in feature_evolution.png, evenly spaced by number
EVOLUTION_IMAGES = 1000  # test images in which each snapshot's strongest activation is sought
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
OUTPUTS = Path("outputs")  # where results go


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Span(NamedTuple):
    """Rows (or columns) of a window at one layer's input: `start` to `stop` inside the frame.

    `first` is where the rows that come out of the layer above start; start - first of them are cut off.
    """

    first: int
    start: int
    stop: int


class Units(NamedTuple):
    """Some units of one layer, one entry each: (units,), int64 except the value."""

    image: Tensor  # index into the images whose masks are at hand
    filter: Tensor  # its number
    value: Tensor  # activation, float32
    row: Tensor  # of the unit in the map before pooling: where the switch points
    column: Tensor  # likewise

    def take(self, which: Tensor) -> "Units":
        """Return the units at the places `which`."""
        return Units(*(entry[which] for entry in self))


def turned_filters(block: ConvBlock) -> Tensor:
    """Return filters whose plain convolution is the block's transposed one, batch norm's gain included.

    With stride s a transposed convolution puts W[s t + e] at row s (r + t) + e for an input at row r. So for
    each e = 0 .. s - 1 there is one plain convolution with taps t, turned round because a plain convolution
    looks back where a transposed one spreads. Taps past the end of the kernel are zero.

    Returns:
        (s * s * channels, filters, taps, taps); `interleave` puts the s * s results together.
    """
    filters = gain_filters(block)
    (count, channels, kernel, _), (_, stride, _) = filters.shape, block.sizes()
    taps = math.ceil(kernel / stride)
    filters = F.pad(filters, (0, taps * stride - kernel) * 2)
    filters = filters.view(count, channels, taps, stride, taps, stride).flip(2, 4)
    filters = filters.permute(3, 5, 1, 0, 2, 4).reshape(stride**2 * channels, count, taps, taps)
    return filters.contiguous(memory_format=torch.channels_last)


def interleave(parts: Tensor, stride: int) -> Tensor:
    """Put the stride * stride results of `turned_filters` side by side, channels last.

    Args:
        parts: (units, rows, columns, stride * stride * channels).
        stride: Of the block whose convolution is transposed.

    Returns:
        (units, rows * stride, columns * stride, channels); torch's pixel_shuffle took seven times as long.
    """
    n, rows, columns, _ = parts.shape
    parts = parts.reshape(n, rows, columns, stride, -1)  # the last: places and channels within a row
    return parts.transpose(2, 3).reshape(n, rows * stride, columns * stride, -1)


class Projector:
    """Projects units of one layer, many at a time, each in its receptive-field window.

    Arrays inside have channels last, (units, rows, columns, channels): the masks of a window's row are then
    one piece of memory, which is what makes gathering them cheap.

    Args:
        net: The network, in evaluation mode; its weights are read once, here.
        layer: 0 for conv1 to 3 for conv4.
        precision: Of the arithmetic on the way down.
    """

    def __init__(self, net: CNN, layer: int, precision: torch.dtype = torch.float32):
        self.layer = layer
        self.blocks = net.blocks[: layer + 1]
        self.input_sizes, self.conv_sizes = frame_sizes(net)
        self.field = receptive_fields(net)[layer]
        self.precision = precision
        self.own_filters = gain_filters(self.blocks[layer]).permute(0, 2, 3, 1).contiguous()
        self.turned = [turned_filters(block).to(precision) for block in self.blocks[:layer]]
        self.windows = [self.spans(row) for row in range(self.conv_sizes[layer])]
        # rows (and columns) whose windows the border cuts alike have the same pattern
        cuts = [tuple((start - first, stop - start) for first, start, stop in row) for row in self.windows]
        numbers = {cut: number for number, cut in enumerate(dict.fromkeys(cuts))}
        device = self.own_filters.device
        self.pattern = torch.tensor([numbers[cut] for cut in cuts], device=device)

    def spans(self, row: int) -> list[Span]:
        """Return the window of a unit at `row` (or column) at the input of its own layer and of all below.

        An input of the layer above is a pooled value here, spread over its pooling region.
        """
        spans, start, stop = [], row, row + 1
        for k in reversed(range(self.layer + 1)):
            kernel, stride, padding = self.blocks[k].sizes()
            first = start * stride - padding
            last = (stop - 1) * stride - padding + kernel
            spans.append(Span(first, max(first, 0), min(last, self.input_sizes[k])))
            if k > 0:
                pool = self.blocks[k - 1].pool_size
                start, stop = spans[-1].start * pool, spans[-1].stop * pool
        return spans

    def origin(self, row: int) -> int:
        """Return the pixel row (or column) where the window of a unit at `row` starts; it may be negative."""
        return row * self.field.jump + self.field.start

    def inside(self, row: int, column: int) -> tuple[slice, slice]:
        """Return the rows and columns of the image that the window of a unit covers."""
        rows, columns = self.windows[row][-1], self.windows[column][-1]
        return slice(rows.start, rows.stop), slice(columns.start, columns.stop)

    def masks(self, features: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return, for each layer below, 1 where a maximum was and 0 elsewhere.

        Args:
            features: What `net.features` returned for the images.

        Returns:
            (images, rows, columns, filters) each, without rows and columns that pooling left over.
        """
        masks = []
        for k in range(self.layer):
            pooled, switches = features[k]
            mask = unpool(torch.ones_like(pooled, dtype=self.precision), switches, self.conv_sizes[k])
            side = pooled.shape[-1] * self.blocks[k].pool_size
            masks.append(mask[:, :, :side, :side].permute(0, 2, 3, 1).contiguous())
        return masks

    def units(self, features: Sequence[tuple[Tensor, Tensor]], places: Tensor) -> Units:
        """Return the unit of each image and filter at a given place of this layer's pooled maps.

        Args:
            features: What `net.features` returned for the images.
            places: row * columns + column in the pooled map, int64 (images, filters).
        """
        pooled, switches = (
            maps.flatten(2).gather(2, places[:, :, None]).flatten() for maps in features[self.layer]
        )
        images, filters = places.shape
        image = torch.arange(images, device=places.device).repeat_interleave(filters)
        filter_ = torch.arange(filters, device=places.device).repeat(images)
        size = self.conv_sizes[self.layer]
        return Units(image, filter_, pooled, switches // size, switches % size)

    def groups(self, units: Units, chunk: int) -> Iterator[Tensor]:
        """Yield the places of units that the border cuts alike, at most `chunk` at a time."""
        kinds = self.pattern[units.row] * len(self.pattern) + self.pattern[units.column]
        order = kinds.argsort(stable=True)
        for group in order.split(kinds.unique(return_counts=True)[1].tolist()):
            yield from group.split(chunk)

    def project(self, masks: Sequence[Tensor], units: Units) -> Tensor:
        """Project units that the border cuts alike (one of `groups`).

        Returns:
            float32 (units, rows, columns, 3): the part of each window that lies inside the image, signed, in
            units of normalised pixels.
        """
        n = len(units.image)
        rows, columns = self.windows[int(units.row[0])], self.windows[int(units.column[0])]
        # how far each unit lies from the first one, in steps of the layer that is being looked at
        below, right, step = units.row - units.row[0], units.column - units.column[0], 1
        own = self.own_filters[:, cut(rows[0]), cut(columns[0])]
        signal = (own[units.filter] * units.value[:, None, None, None]).to(self.precision)
        for k, row, column in zip(reversed(range(self.layer)), rows, columns, strict=False):
            pool = self.blocks[k].pool_size
            step *= self.blocks[k + 1].sizes()[1] * pool
            height, width = row.stop - row.start, column.stop - column.start  # of pooled values
            top, left = row.start * pool + below * step, column.start * pool + right * step
            mask = gather(masks[k], units.image, top, left, height * pool, width * pool)
            # unpool: (units, rows, 1, columns, 1, filters) over the rows and columns of its pooling region
            regions = mask.view(n, height, pool, width, pool, mask.shape[-1])
            regions *= signal.clamp_(min=0)[:, :, None, :, None]  # rectified on the way
            stride, taps = self.blocks[k].sizes()[1], self.turned[k].shape[-1]
            signal = F.conv2d(mask.permute(0, 3, 1, 2), self.turned[k], padding=taps - 1)
            signal = signal.permute(0, 2, 3, 1)
            signal = interleave(signal, stride) if stride > 1 else signal
            depth = self.layer - k
            signal = signal[:, cut(rows[depth]), cut(columns[depth])]
        return signal.float()


def cut(span: Span) -> slice:
    """Return the part of a full window that lies inside the frame."""
    return slice(span.start - span.first, span.stop - span.first)


def gather(masks: Tensor, image: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Copy one window of `height` x `width` for each unit out of masks (images, rows, columns, filters)."""
    _, rows, columns, filters = masks.shape
    row = image[:, None] * rows + top[:, None] + torch.arange(height, device=masks.device)
    column = left[:, None] + torch.arange(width, device=masks.device)
    places = row[:, :, None] * columns + column[:, None, :]  # (units, height, width)
    return masks.view(-1, filters).index_select(0, places.view(-1)).view(len(image), height, width, filters)


def batches(
    images: NDArray[np.uint8],
    chosen: NDArray[np.int64],
    checkpoint: Checkpoint,
    device: torch.device,
    batch_size: int,
    doing: str,
) -> Iterator[tuple[NDArray[np.int64], list[tuple[Tensor, Tensor]]]]:
    """Yield, under a progress bar, which of the chosen images a batch holds and their `CNN.features`."""
    with tqdm(total=len(chosen), desc=doing, unit=" images", disable=None) as bar:
        for start in range(0, len(chosen), batch_size):
            which = chosen[start : start + batch_size]
            batch = normalise(torch.from_numpy(images[which]).to(device), checkpoint.mean, checkpoint.std)
            yield which, checkpoint.net.features(batch.contiguous(memory_format=torch.channels_last))
            bar.update(len(which))


def measure_activations(
    images: NDArray[np.uint8], checkpoint: Checkpoint, device: torch.device, batch_size: int
) -> dict[str, NDArray[Any]]:
    """Measure each filter of each layer on each image.

    Args:
        images: uint8 (images, 3, 96, 96).
        checkpoint: The network, with the mean and std of its training images.
        device: Where to compute.
        batch_size: Images at once.

    Returns:
        For k = 1 to 4, over the pooled map: conv{k}_max float32 (images, filters); conv{k}_position int16
        (images, filters, 2), row and column of the maximum, the first one, 0 where nothing fires;
        conv{k}_mean and conv{k}_nonzero, the mean and the share of positions above zero, float32.
    """
    found: dict[str, NDArray[Any]] = {}
    everything = np.arange(len(images))
    for which, features in batches(images, everything, checkpoint, device, batch_size, "activations"):
        for layer, (pooled, _) in zip(LAYERS, features, strict=True):
            flat = pooled.flatten(2)  # (images, filters, positions)
            place, columns = flat.argmax(dim=2), pooled.shape[-1]
            measured = {
                f"{layer}_max": flat.amax(dim=2),
                f"{layer}_position": torch.stack([place // columns, place % columns], dim=2).short(),
                f"{layer}_mean": flat.mean(dim=2),
                f"{layer}_nonzero": (flat > 0).float().mean(dim=2),
            }
            for name, part in measured.items():
                values = part.cpu().numpy()
                if name not in found:  # not put together at the end, which would need the memory twice
                    found[name] = np.empty((len(images), *values.shape[1:]), values.dtype)
                found[name][which] = values
    return found


def top_images(values: NDArray[np.float32], count: int) -> NDArray[np.int32]:
    """Return the images that drive each filter most, strongest first, ties to the lower index.

    Args:
        values: Strongest activation of each filter in each image, (images, filters).
        count: How many images a filter.

    Returns:
        int32 (filters, count); -1 where fewer images make the filter fire at all.
    """
    order = np.argsort(-values, axis=0, kind="stable")[:count]
    fires = np.take_along_axis(values, order, axis=0) > 0
    return np.where(fires, order, -1).T.astype(np.int32)


def project_top(
    split: Split,
    checkpoint: Checkpoint,
    activations: dict[str, NDArray[Any]],
    device: torch.device,
    n_top: int,
    batch_size: int,
    chunk: int,
) -> dict[str, NDArray[Any]]:
    """Project every filter's strongest activations in `n_top` different images (Figure 2 of the paper).

    Args:
        split: Images, with the labels that came with them.
        checkpoint: The network, with the mean and std of its training images.
        activations: What `measure_activations` returned for these images.
        device: Where to compute.
        n_top: Images a filter.
        batch_size: Images at once.
        chunk: Units at once.

    Returns:
        For k = 1 to 4: conv{k}_image, _value, _position, _origin, _projection and _patch, as the README's
        table of outputs describes them.
    """
    found: dict[str, NDArray[Any]] = {}
    projectors = [Projector(checkpoint.net, k) for k in range(len(LAYERS))]
    for layer, projector in zip(LAYERS, projectors, strict=True):
        image = top_images(activations[f"{layer}_max"], n_top)  # (filters, n_top)
        filter_ = np.arange(len(image))[:, None]
        fires, size = image >= 0, projector.field.size
        found[f"{layer}_image"] = image
        strongest, position = (activations[f"{layer}_{key}"][image, filter_] for key in ("max", "position"))
        found[f"{layer}_value"] = np.where(fires, strongest, 0).astype(np.float32)
        found[f"{layer}_position"] = np.where(fires[:, :, None], position, 0).astype(np.int16)
        found[f"{layer}_origin"] = np.zeros((*image.shape, 2), np.int16)
        found[f"{layer}_projection"] = np.zeros((*image.shape, 3, size, size), np.float32)
        found[f"{layer}_patch"] = np.zeros((*image.shape, 3, size, size), np.uint8)

    needed = np.unique(np.concatenate([found[f"{layer}_image"].ravel() for layer in LAYERS]))
    needed = needed[needed >= 0].astype(np.int64)
    for which, features in batches(split.images, needed, checkpoint, device, batch_size, "top images"):
        for layer, projector in zip(LAYERS, projectors, strict=True):
            image = found[f"{layer}_image"]
            filter_, rank = np.nonzero(np.isin(image, which))  # of each unit
            local = torch.from_numpy(np.searchsorted(which, image[filter_, rank])).to(device)
            index = torch.from_numpy(filter_).to(device)
            row, column = torch.from_numpy(found[f"{layer}_position"][filter_, rank]).long().to(device).T
            value = torch.from_numpy(found[f"{layer}_value"][filter_, rank]).to(device)
            switch = features[projector.layer][1][local, index, row, column]
            side = projector.conv_sizes[projector.layer]
            units = Units(local, index, value, switch // side, switch % side)
            masks = projector.masks(features)
            for group in projector.groups(units, chunk):
                some = units.take(group)
                signal = projector.project(masks, some).permute(0, 3, 1, 2).cpu().numpy()
                where = some.row.tolist(), some.column.tolist()
                for number, r, c, window in zip(group.tolist(), *where, signal, strict=True):
                    entry = filter_[number], rank[number]
                    origin = projector.origin(r), projector.origin(c)
                    found[f"{layer}_origin"][entry] = origin
                    seen = zip(projector.inside(r, c), origin, strict=True)
                    rows, columns = (slice(part.start - o, part.stop - o) for part, o in seen)
                    found[f"{layer}_projection"][entry][:, rows, columns] = window
                    pixels = split.images[image[entry]]
                    found[f"{layer}_patch"][entry] = window_of(pixels, *origin, projector.field.size, 0)
    return found


def magnitude_statistics(projections: Tensor, pixels: int) -> Tensor:
    """Return nonzero_count, mean, max and variance of each projection's magnitude, float32 (units, 4).

    The magnitude at a pixel is the sum over RGB of the absolute values. The mean is over the non-zero pixels,
    0 where there are none; the variance is over all `pixels` of the full frame.

    Args:
        projections: (units, rows, columns, 3), the part of each window inside the image.
        pixels: Number of pixels of the image; those outside the window are zero.
    """
    red, green, blue = projections.abs().unbind(dim=3)
    magnitude = (red + green + blue).flatten(1)  # a sum over so short a dimension takes four times as long
    count = (magnitude > 0).sum(dim=1)
    total = magnitude.sum(dim=1)
    frame_mean = total / pixels
    outside = pixels - magnitude.shape[1]
    # around the mean rather than from the mean of squares, which would lose digits
    squares = (magnitude - frame_mean[:, None]).square().sum(dim=1) + outside * frame_mean.square()
    mean = total / count.clamp(min=1)
    return torch.stack([count.float(), mean, magnitude.amax(dim=1), squares / pixels], dim=1)


def measure_projections(
    images: NDArray[np.uint8],
    chosen: NDArray[np.int64],
    positions: NDArray[np.int16],
    checkpoint: Checkpoint,
    device: torch.device,
    batch_size: int,
    chunk: int,
    precision: torch.dtype = torch.float32,
) -> dict[str, NDArray[np.float32]]:
    """Project every filter of conv4 in every chosen image from its strongest unit; measure the projections.

    Args:
        images: uint8 (images, 3, 96, 96).
        chosen: Indices of those to project.
        positions: Row and column of the strongest unit in conv4's pooled map, (images, filters, 2).
        checkpoint: The network, with the mean and std of its training images.
        device: Where to compute.
        batch_size: Images at once.
        chunk: Units at once, for each thread.
        precision: Of the arithmetic on the way down; activations are float32 always.

    Returns:
        nonzero_count, mean, max and variance of `magnitude_statistics`, float32 (chosen images, filters); all
        0 where the filter does not fire, which costs no projection.
    """
    projector = Projector(checkpoint.net, len(LAYERS) - 1, precision)
    names = ("nonzero_count", "mean", "max", "variance")
    found, done = np.empty((len(names), len(chosen), positions.shape[1]), np.float32), 0
    # On a CPU each thread takes chunks that stay in its own cache; that beats sharing each operation.
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    workers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for which, features in batches(images, chosen, checkpoint, device, batch_size, "projections"):
            rows, columns = torch.from_numpy(positions[which]).long().to(device).unbind(dim=2)
            units = projector.units(features, rows * features[-1][0].shape[-1] + columns)
            fires = units.value.nonzero().flatten()
            units, masks = units.take(fires), projector.masks(features)

            def measure(group: Tensor, masks: list[Tensor] = masks, units: Units = units) -> Tensor:
                return magnitude_statistics(projector.project(masks, units.take(group)), IMAGE_SIZE**2)

            groups = list(projector.groups(units, chunk))
            statistics = torch.zeros(rows.numel(), len(names), device=device)
            if groups:
                statistics[fires[torch.cat(groups)]] = torch.cat(list(workers.map(measure, groups)))
            measured = statistics.view(*rows.shape, -1).permute(2, 0, 1).cpu().numpy()
            found[:, done : done + len(which)] = measured
            done += len(which)
    finally:
        workers.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what is queued
    return dict(zip(names, found, strict=True))


def first_of_each_class(labels: NDArray[np.int64], count: int | None) -> NDArray[np.int64]:
    """Return the indices of the first `count` images of each class, in order; all of them for None."""
    if count is None:
        return np.arange(len(labels))
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def grid(panels: NDArray[Any]) -> NDArray[Any]:
    """Lay (panels, rows, columns, 3) out in a square, one white pixel between them."""
    side = math.ceil(math.sqrt(len(panels)))
    _, height, width, _ = panels.shape
    sheet = np.ones((side * (height + 1) - 1, side * (width + 1) - 1, 3), np.float32)
    for number, panel in enumerate(panels):
        top, left = number // side * (height + 1), number % side * (width + 1)
        sheet[top : top + height, left : left + width] = panel
    return sheet


def white_outside(patches: NDArray[np.uint8], origins: NDArray[np.int16]) -> NDArray[np.float64]:
    """Turn patches into pictures (patches, rows, columns, 3) from 0 to 1, white beyond the image's border.

    Args:
        patches: uint8 (patches, 3, rows, columns).
        origins: Row and column of each patch's top left pixel in the image, (patches, 2).
    """
    place = origins[:, :, None].astype(int) + np.arange(patches.shape[-1])  # (patches, 2, rows or columns)
    row_inside, column_inside = np.moveaxis((place >= 0) & (place < IMAGE_SIZE), 1, 0)
    inside = row_inside[:, :, None] & column_inside[:, None, :]
    return np.where(inside[..., None], np.moveaxis(patches, 1, 3) / 255, 1.0)


def draw_page(
    projections: NDArray[np.float32],
    patches: NDArray[np.uint8],
    origins: NDArray[np.int16],
    values: NDArray[np.float32],
    filters: Sequence[int],
    heading: str,
) -> Figure:
    """Draw the layout of the paper's Figure 2: projections of each filter, beside them the image patches.

    Args:
        projections: (filters, n_top, 3, rows, columns), signed; grey is zero, one scale for each filter.
        patches: uint8 of the same shape.
        origins: Row and column of each window's top left pixel in the image, (filters, n_top, 2).
        values: Activations (filters, n_top), strongest first; the first is written above its filter.
        filters: Numbers of the filters.
        heading: Title of the page.
    """
    columns = 4
    rows = math.ceil(len(filters) / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(10, 0.55 + 1.32 * rows), dpi=150, squeeze=False, layout="constrained"
    )
    fig.get_layout_engine().set(w_pad=0.05, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    for ax in axes.ravel():
        ax.axis("off")
    for k, (ax, number) in enumerate(zip(axes.flat, filters, strict=False)):
        left = grid(displayed(projections[k]))
        right = grid(white_outside(patches[k], origins[k]))
        gap = np.ones((len(left), max(2, len(left) // 20), 3))
        ax.imshow(np.concatenate([left, gap, right], axis=1), interpolation="nearest")
        strongest = values[k, 0]
        text = f"filter {number}, activation {strongest:.2f}" if strongest > 0 else f"filter {number}, dead"
        ax.set_title(text, fontsize=7, pad=2)
    fig.suptitle(heading, fontsize=9, parse_math=False)
    return fig


def draw_pages(found: dict[str, NDArray[Any]], heading: str, per_page: int, folder: Path) -> list[Path]:
    """Draw the top projections of every filter of every layer, `per_page` filters a picture.

    Earlier pages go first: those of a network with more filters would otherwise stay among the new ones.
    """
    for page in folder.glob("conv*_filters_*.png"):
        page.unlink(missing_ok=True)
    paths, keys = [], ("projection", "patch", "origin", "value")
    for layer in LAYERS:
        count, window = len(found[f"{layer}_value"]), found[f"{layer}_patch"].shape[-1]
        for start in range(0, count, per_page):
            stop = min(start + per_page, count)
            projections, patches, origins, values = (found[f"{layer}_{key}"][start:stop] for key in keys)
            text = f"{layer}, filters {start} to {stop - 1}, windows of {window} x {window} pixels\n{heading}"
            paths.append(folder / f"{layer}_filters_{start:03d}_to_{stop - 1:03d}.png")
            figure = draw_page(projections, patches, origins, values, range(start, stop), text)
            save_figure(figure, paths[-1])
    return paths


def read_snapshots(folder: Path, checkpoint: Checkpoint, device: torch.device) -> list[Checkpoint]:
    """Return the snapshots of the training that ended in `checkpoint`, in order.

    None if there are none, or, after a line that names it, if one is damaged: all else can do without them.
    """
    try:
        snapshots = [load_checkpoint(path, device) for path in sorted(folder.glob("epoch_*.pth"))]
    except SystemExit as damage:
        print(f"going on without snapshots: {damage}")
        return []
    snapshots.sort(key=lambda snapshot: snapshot.epochs)  # by name, 1000 comes before 200
    if not snapshots or snapshots[-1].net.config != checkpoint.net.config:
        return []
    last, final = snapshots[-1].net.state_dict(), checkpoint.net.state_dict()
    return snapshots if all(torch.equal(last[name], final[name]) for name in final) else []


def project_evolution(
    split: Split,
    snapshots: Sequence[Checkpoint],
    count: int,
    device: torch.device,
    batch_size: int,
    chunk: int,
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Project, for a few filters, the strongest activation after each of several epochs (Figure 4).

    Args:
        split: Images in which it is sought, anew for each epoch.
        snapshots: The network after each of these epochs.
        count: Filters of each layer, evenly spaced by number.
        device: Where to compute.
        batch_size: Images at once.
        chunk: Units at once.

    Returns:
        For each layer numbers of filters (filters,) and projections (filters, snapshots, 3, rows, columns).
    """
    every = [np.linspace(0, filters - 1, count) for filters in snapshots[0].net.config["filters"]]
    numbers = [np.unique(places.astype(np.int64)) for places in every]
    parts: dict[str, list[NDArray[np.float32]]] = {layer: [] for layer in LAYERS}
    for snapshot in snapshots:
        activations = measure_activations(split.images, snapshot, device, batch_size)
        top = project_top(split, snapshot, activations, device, 1, batch_size, chunk)
        for layer, chosen in zip(LAYERS, numbers, strict=True):
            parts[layer].append(top[f"{layer}_projection"][chosen, 0])
    return {
        layer: (chosen, np.stack(parts[layer], axis=1)) for layer, chosen in zip(LAYERS, numbers, strict=True)
    }


def draw_evolution(
    found: Mapping[str, tuple[NDArray[np.int64], NDArray[np.float32]]], epochs: Sequence[int], heading: str
) -> Figure:
    """Draw what `project_evolution` found: a row for each filter, a column for each epoch.

    Each panel has a scale of its own, since projections grow as the network learns.
    """
    fig, axes = plt.subplots(2, 2, figsize=(10, 7.3), dpi=200, layout="constrained")
    for ax, (layer, (numbers, projections)) in zip(axes.flat, found.items(), strict=True):
        rows, columns, _, size, _ = projections.shape
        step = size + max(1, size // 12)  # panel and gap
        sheet = np.ones((rows, step, columns, step, 3), np.float32)
        for row, column in np.ndindex(rows, columns):
            sheet[row, :size, column, :size] = displayed(projections[row, column])
        ax.imshow(sheet.reshape(rows * step, columns * step, 3), interpolation="nearest")
        ax.set_xticks(np.arange(columns) * step + size / 2 - 0.5, [str(epoch) for epoch in epochs])
        ax.set_yticks(np.arange(rows) * step + size / 2 - 0.5, [str(number) for number in numbers])
        ax.tick_params(length=0)
        ax.set_title(f"{layer}, windows of {size} x {size} pixels")
        sns.despine(ax=ax, left=True, bottom=True)
    fig.supxlabel("epoch", size="medium")
    fig.supylabel("filter", size="medium")
    fig.suptitle(heading, fontsize=10, parse_math=False)
    return fig


def main() -> None:
    """Measure activations, project the top images of every filter, then measure all projections of conv4."""
    sns.set_theme(context="paper", style="white", palette="colorblind")
    outputs, network, data_dir = check_paths(OUTPUTS=OUTPUTS, CHECKPOINT=CHECKPOINT, DATA_DIR=DATA_DIR)
    check_numbers(1, N_TOP=N_TOP, BATCH_SIZE=BATCH_SIZE, CHUNK=CHUNK, EVOLUTION_IMAGES=EVOLUTION_IMAGES)
    check_numbers(0, EVOLUTION_FILTERS=EVOLUTION_FILTERS)  # 0: none
    check_numbers(1, 256, FILTERS_PER_PAGE=FILTERS_PER_PAGE)  # a larger page would hardly be a picture
    if IMAGES_PER_CLASS is not None:  # None: all
        check_numbers(1, IMAGES_PER_CLASS=IMAGES_PER_CLASS)
    if not isinstance(PRECISION, str) or PRECISION not in PRECISIONS:
        raise SystemExit(f"PRECISION is {PRECISION!r}; expected {' or '.join(PRECISIONS)}")
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(network, device)
    split = load_split(checkpoint.dataset, data_dir, "test")
    if len(split.images) < N_TOP:
        raise SystemExit(f"N_TOP is {N_TOP}; expected 1 to {len(split.images):,}, the number of test images")
    prepare_folders("OUTPUTS", outputs, outputs / "deconv")
    snapshots = read_snapshots(network.parent / "snapshots", checkpoint, device)
    filters = sum(checkpoint.net.config["filters"])
    print(
        f"projecting {filters} filters over {len(split.images):,} test images of {title(checkpoint.dataset)} "
        f"on {device}, torch {torch.__version__};\n"
        f"starting anew, earlier results are replaced as new ones finish"
    )

    def save(name: str, arrays: dict[str, NDArray[Any]]) -> None:
        save_arrays(
            outputs / name,
            checkpoint_sha256=checkpoint.sha256,
            dataset=checkpoint.dataset,
            class_names=checkpoint.class_names,
            **arrays,
        )
        print(f"wrote {outputs / name}", flush=True)

    activations = measure_activations(split.images, checkpoint, device, BATCH_SIZE)
    save("activations.npz", {"labels": split.labels, **activations})
    for layer in LAYERS:
        fires = activations[f"{layer}_max"] > 0  # (images, filters)
        dead = int((~fires.any(axis=0)).sum())
        print(f"{layer}: {fires.shape[1]:>3} filters, {dead} dead, firing in {fires.mean():.1%} of images")

    top = project_top(split, checkpoint, activations, device, N_TOP, BATCH_SIZE, CHUNK)
    save("projections.npz", top)
    accuracy = f"{checkpoint.measured_on} accuracy {checkpoint.metrics['test_accuracy']:.1%}"
    heading = f"top {N_TOP} of {len(split.images):,} test images of {title(checkpoint.dataset)}; "
    heading += f"grey is zero; {accuracy}"
    pages = draw_pages(top, heading, FILTERS_PER_PAGE, outputs / "deconv")
    print(f"wrote {len(pages)} pages, {pages[0]} to {pages[-1].name}", flush=True)
    del top  # its memory is needed for what follows
    positions, fires = activations["conv4_position"], activations["conv4_max"] > 0
    del activations

    path = outputs / "feature_evolution.png"
    if snapshots and EVOLUTION_FILTERS > 0:
        some = Split(split.images[:EVOLUTION_IMAGES], split.labels[:EVOLUTION_IMAGES])
        evolution = project_evolution(some, snapshots, EVOLUTION_FILTERS, device, BATCH_SIZE, CHUNK)
        heading = f"strongest activation in {len(some.images):,} test images of {title(checkpoint.dataset)} "
        heading += "after each epoch, projected; grey is zero, each panel has its own scale\n"
        heading += accuracy.replace("accuracy", "accuracy at the end")
        epochs = [snapshot.epochs for snapshot in snapshots]
        save_figure(draw_evolution(evolution, epochs, heading), path)
        print(f"wrote {path}", flush=True)
    else:
        path.unlink(missing_ok=True)  # of another training
        print("no snapshots of this training: feature_evolution.png is not drawn")

    chosen = first_of_each_class(split.labels, IMAGES_PER_CLASS)
    start = time.perf_counter()
    statistics = measure_projections(
        split.images, chosen, positions, checkpoint, device, BATCH_SIZE, CHUNK, PRECISIONS[PRECISION]
    )
    seconds = time.perf_counter() - start
    count = int(fires[chosen].sum())
    print(f"{count:,} projections of conv4 in {seconds:.0f} s, {1e3 * seconds / max(count, 1):.3f} ms each")
    save("projection_statistics.npz", {"labels": split.labels[chosen], "image": chosen, **statistics})
    print("next: uv run analyse_projections.py")


if __name__ == "__main__":
    with plain_errors():
        main()
