"""Project the strongest activations of every filter back to pixels, and measure conv4's projections.

Run:    uv run deconv_full.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_*.pth, data/stl10_binary/test_{X,y}.bin
Writes: outputs/activations.npz, outputs/projections.npz, outputs/projection_statistics.npz,
        outputs/deconv/conv*.png, outputs/feature_evolution.png

The arithmetic is the one of deconv.py (Zeiler & Fergus 2014, section 2.1), arranged for millions of units:

- A window suffices. Going down, one unit spreads over the kernel of its filter, each value of that over a
  pooling region, that over the next kernel, and so on; beyond the receptive field everything is zero. So only
  a window is computed, at every layer, without the part outside the image. Windows that the border cuts in
  the same way have the same shape and are projected together.
- To unpool, each pooled value is repeated over its pooling region and multiplied by a mask that is 1 at the
  maximum. A switch is a position in the whole map and would have to be counted anew for each window; a mask,
  made once for each image from its switches, can simply be cropped.
- A transposed convolution of stride s equals s x s plain convolutions with flipped kernels, which are faster
  here and are run as one. `flip_kernels` explains and makes them.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from CNN import (
    CNN,
    IMAGE_SIZE,
    LAYERS,
    Checkpoint,
    ConvBlock,
    choose_device,
    conv_geometry,
    frame_sizes,
    load_checkpoint,
    receptive_fields,
    run_script,
)
from deconv import crop, displayed, fold_batch_norm
from load_data import TITLES, Array, load_checkpoint_split, save_arrays, save_figure, set_style, shorten, tile

N_TOP = 9  # images of a filter: the N_TOP different test images that drive it most
IMAGES_PER_CLASS: int | None = 100  # of the test images, in projection_statistics.npz alone; None: all
BATCH_SIZE = 16  # images whose masks are held at once by each thread; more costs memory, not time
FILTERS_PER_PAGE = 16  # filters in one picture of outputs/deconv/
EVOLUTION_FILTERS = 5  # filters of each layer in feature_evolution.png, evenly spaced by number
EVOLUTION_IMAGES = 1000  # test images in which each snapshot's strongest activation is sought
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds stl10_binary, or your own folders train and test
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
OUTPUTS = Path("outputs")  # where results go

CPU_GROUP = 32  # units projected at once: on a CPU more would take more memory
GPU_GROUP = 2048  # a GPU wants many
GPU_IMAGES = 256  # images at once on a GPU, if BATCH_SIZE is smaller
LEVELS = (99, 90, 75, 50)  # percentile examples: near these percentiles of a filter's peak activations
EXAMPLES = 3  # images at each of these levels
Arrays = dict[str, Array]


# ---------------------------------------------------------------- the engine


class Units(NamedTuple):
    """Some units of one layer; every field has the shape (units,)."""

    image: Array  # int64, index into the images
    filter: Array  # int64
    row: Array  # int64, in the pooled map
    column: Array  # int64, likewise
    value: Array  # float32, what the projection starts with: the activation

    def select(self, indices: Array) -> "Units":
        """Return the units at `indices`, which can be numbers or flags."""
        return Units(*(entry[indices] for entry in self))


class ProjectedGroup(NamedTuple):
    """Some projected units whose windows have one shape, as `project_units` yields them."""

    indices: Array  # which of the given units they are, (n,)
    origins: Array  # row and column of each window's top left pixel, (n, 2), negative beyond the border
    kept: Array  # what `reduce` made of the part of each window inside the image, (n, ...)


class Span(NamedTuple):
    """Rows of a unit's window at the input of one convolution; columns are counted alike.

    Example: a 3 x 3 convolution with a padding of 1 has its unit at row 0. The kernel lies on rows -1, 0 and
    1, and row -1 is padding. So `first` is -1, `start` is 0 and `stop` is 2. The transposed convolution makes
    all three rows; `inside` is slice(1, 3) and leaves out the one in the padding.
    """

    first: int  # the first row that the transposed convolution makes; it may be padding
    start: int  # the first row inside the map
    stop: int  # the row after the last one inside the map

    def inside(self) -> slice:
        """Return which of the rows that the transposed convolution makes lie inside the map."""
        return slice(self.start - self.first, self.stop - self.first)

    def size(self) -> int:
        """Return the number of rows inside the map."""
        return self.stop - self.start


class UnitTensors(NamedTuple):
    """Some units on the network's device; every field has the shape (units,)."""

    image: Tensor  # index into the masks
    filter: Tensor
    value: Tensor
    map_row: Tensor  # in the map before pooling
    map_column: Tensor  # likewise


def flip_kernels(block: ConvBlock) -> Tensor:
    """Return the flipped kernels with which a plain convolution does the block's transposed convolution.

    A transposed convolution of stride s lays a copy of the kernel W on every s-th row and column, so along
    the rows its result is::

        out[s r + e] = sum over j of x[r - j] W[s j + e],   with a remainder e from 0 to s - 1

    A row with the remainder e meets only the rows e, s + e, 2 s + e, ... of W. So the transposed convolution
    falls apart into s x s plain convolutions of stride 1, one for each pair of remainders: its phases (the
    polyphase decomposition). The four phases of a 6 x 6 kernel at stride 2 have 3 x 3 taps each. They are
    called A to D here::

        A B A B A B
        C D C D C D
        A B A B A B         A makes the even rows and even columns of the result.
        C D C D C D         B makes the even rows and odd columns.
        A B A B A B         C makes the odd rows and even columns.
        C D C D C D         D makes the odd rows and odd columns.

    F.conv2d sums x[r + j] K[j] where the formula has x[r - j]: that is why each phase is flipped. All phases
    run as one convolution, because their channels are its output channels. `interleave` puts them together.

    Returns:
        (phases * channels, filters, taps, taps) with batch norm's gain included. A kernel that s does not
        divide is filled up with zero taps. Zeros also make the first number a multiple of 16, which fills
        vector registers (1.6 times as fast for conv1).
    """
    filters = fold_batch_norm(block)
    filter_count, channels = filters.shape[:2]
    geometry = conv_geometry(block)
    stride = geometry.stride
    taps = math.ceil(geometry.kernel / stride)

    missing = taps * stride - geometry.kernel
    filters = F.pad(filters, (0, missing, 0, missing))

    # (filters, channels, taps, row phase, taps, column phase), flipped along the taps
    filters = filters.view(filter_count, channels, taps, stride, taps, stride).flip(2, 4)
    # -> (row phase, column phase, channels, filters, taps, taps) -> (phases * channels, filters, taps, taps)
    kernels = filters.permute(3, 5, 1, 0, 2, 4).reshape(stride**2 * channels, filter_count, taps, taps)

    # zero kernels make the first dimension a multiple of 16
    kernels = F.pad(kernels, (0, 0, 0, 0, 0, 0, 0, -len(kernels) % 16))
    return kernels.contiguous(memory_format=torch.channels_last)


def interleave(phases: Tensor, stride: int, channels: int) -> Tensor:
    """Put the results of the stride * stride phases of `flip_kernels` side by side.

    (units, rows, columns, phases * channels) -> (units, rows * stride, columns * stride, channels). The zero
    channels that `flip_kernels` added are dropped. torch's pixel_shuffle took seven times as long.
    """
    n, rows, columns, _ = phases.shape
    phases = phases[..., : stride**2 * channels]
    # (units, rows, columns, row phase, column phase * channels): a column's phases already follow one
    # another, a row's phases must first be moved beside the rows
    phases = phases.reshape(n, rows, columns, stride, -1)
    return phases.transpose(2, 3).reshape(n, rows * stride, columns * stride, channels)


class Projector:
    """Projects units of one layer of a network, many at a time, each in its receptive-field window.

    Masks of `batch_size` images are held at once by each thread, on a GPU of `GPU_IMAGES` at least. Arrays
    inside have channels last, (units, rows, columns, channels): the masks of a window's row are then one
    piece of memory, cheap to gather.
    """

    def __init__(self, net: CNN, layer: int, batch_size: int = 16):
        self.net = net
        self.layer = layer
        self.device_type = net.mean.device.type
        self.batch_size = images_at_once(batch_size, self.device_type)
        self.blocks = net.blocks[: layer + 1]
        self.input_sizes, self.map_sizes = frame_sizes(net, IMAGE_SIZE)
        self.field = receptive_fields(net)[layer]

        # (filters, channels, rows, columns) -> (filters, rows, columns, channels)
        self.own_filters = fold_batch_norm(self.blocks[layer]).permute(0, 2, 3, 1).contiguous()
        self.flipped = [flip_kernels(block) for block in self.blocks[:layer]]

        self.spans_of_row = [self.spans(map_row) for map_row in range(self.map_sizes[layer])]
        self.pattern = self.find_patterns()

    def spans(self, map_row: int) -> list[Span]:
        """Return what a unit at `map_row`, before pooling, sees at the input of each layer.

        There is one `Span` for each layer from conv1 to the units' own. Where a layer above met the border,
        the rows that it lost are missing below, too.

        Example: in the default network the unit at row 10 of conv2 sees rows 9 to 11 of conv1's pooled map,
        Span(9, 9, 12). These are rows 18 to 23 of conv1's map before pooling, which see rows 34 to 49 of the
        image, Span(34, 34, 50). The result is [Span(34, 34, 50), Span(9, 9, 12)].
        """
        spans: list[Span] = []
        start = map_row  # rows of a map before pooling
        stop = map_row + 1
        for k in reversed(range(self.layer + 1)):
            kernel, stride, padding, _ = conv_geometry(self.blocks[k])
            first = start * stride - padding
            end = (stop - 1) * stride - padding + kernel  # the row after the last one
            span = Span(first, max(first, 0), min(end, self.input_sizes[k]))
            spans.insert(0, span)

            # an input of this layer is a pooled value of the layer below, spread over its pooling region
            if k > 0:
                pool = self.blocks[k - 1].pool_size
                start = span.start * pool
                stop = span.stop * pool
        return spans

    def find_patterns(self) -> Array:
        """Number the ways in which the border cuts windows; rows of the same number are cut alike.

        The windows of such rows differ by a shift alone, at every layer.
        """
        patterns: list[list[slice]] = []
        numbers = []
        for spans in self.spans_of_row:
            parts_inside = [span.inside() for span in spans]
            if parts_inside not in patterns:
                patterns.append(parts_inside)
            numbers.append(patterns.index(parts_inside))
        return np.array(numbers)

    def map_positions(self, origins: Array) -> Array:
        """Return the position before pooling of units whose windows have these origins, int64 (units, 2)."""
        return (origins.astype(np.int64) - self.field.start) // self.field.jump

    def masks(self, features: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return 1 where a maximum was, else 0, (images, rows, columns, filters), for each layer below.

        `features` is what `net.features` returned for the images.
        """
        masks = []
        for k in range(self.layer):
            pooled, switches = features[k]
            pool = self.blocks[k].pool_size
            map_size = (self.map_sizes[k], self.map_sizes[k])
            mask = F.max_unpool2d(torch.ones_like(pooled), switches, [pool, pool], output_size=map_size)
            masks.append(mask.permute(0, 2, 3, 1).contiguous())
        return masks

    def project(
        self, masks: Sequence[Tensor], units: UnitTensors, reference_row: int, reference_column: int
    ) -> Tensor:
        """Project units that the border cuts alike: their windows have one shape at every layer.

        The reference is the position before pooling of one of the units, whichever; the windows of the others
        are shifted copies of its window. It is given as numbers, because reading them from a GPU would stall.
        The result is the part of each window inside the image, float32 (units, rows, columns, 3), signed, in
        normalised pixels.
        """
        row_spans = self.spans_of_row[reference_row]
        column_spans = self.spans_of_row[reference_column]
        down = units.map_row - reference_row  # how far each unit lies below the reference
        right = units.map_column - reference_column

        # In their own layer the units stand at their positions before pooling: nothing is left to unpool. Nor
        # to rectify, since an activation is never negative. What is left is the filter, times the activation.
        # (filters, kernel rows, kernel columns, channels) -> (units, rows, columns, channels)
        filters = self.own_filters[:, row_spans[self.layer].inside(), column_spans[self.layer].inside()]
        signal = filters[units.filter] * units.value[:, None, None, None]

        step = 1  # one row further in the units' own map is `step` rows further in the map of layer k
        for k in reversed(range(self.layer)):
            block = self.blocks[k]
            pool = block.pool_size
            step *= conv_geometry(self.blocks[k + 1]).stride * pool  # through a convolution and a pooling

            # Rectify, before unpooling because there are fewer values; the result is the same.
            signal = signal.clamp_(min=0)  # (units, pooled rows, pooled columns, filters)

            # Unpool. The window in the pooled map of layer k is the one at the input of layer k + 1.
            row_indices = window_rows(row_spans[k + 1], pool, down * step)
            column_indices = window_rows(column_spans[k + 1], pool, right * step)
            unpooled = unpool(signal, gather(masks[k], units.image, row_indices, column_indices), pool)

            # Filter: (units, rows, columns, filters) -> (units, rows, columns, channels) at the input. Padded
            # by taps - 1, because the outermost copies of the kernel reach so far beyond the signal.
            taps = self.flipped[k].shape[-1]
            signal = F.conv2d(unpooled.permute(0, 3, 1, 2), self.flipped[k], padding=taps - 1)
            stride = conv_geometry(block).stride
            signal = interleave(signal.permute(0, 2, 3, 1), stride, block.conv.in_channels)
            signal = signal[:, row_spans[k].inside(), column_spans[k].inside()]
        return signal

    def project_batch(
        self, images: Array, units: Units, map_positions: Array | None, reduce: Callable[[Tensor], Tensor]
    ) -> list[ProjectedGroup]:
        """Project units of a few images, after one forward pass, in groups that the border cuts alike.

        The arguments are described in `project_units`.
        """
        needed, mask_index = np.unique(units.image, return_inverse=True)
        features = self.net.features(self.net.normalise(torch.from_numpy(images[needed])))
        masks = self.masks(features)

        # the positions before pooling, and with them the windows
        if map_positions is None:
            _, switches = features[self.layer]
            image, filters, rows, columns = self.to_device(mask_index, units.filter, units.row, units.column)
            unit_switches = switches[image, filters, rows, columns].cpu().numpy()
            map_row, map_column = np.divmod(unit_switches, self.map_sizes[self.layer])
        else:
            map_row, map_column = map_positions.T
        origins = np.stack([map_row, map_column], axis=1) * self.field.jump + self.field.start

        # groups of units whose windows have the same shape; all of them go to the device in one piece
        groups = group_equal(
            self.pattern[map_row] * len(self.pattern) + self.pattern[map_column],  # one number a pair
            limit=CPU_GROUP if self.device_type == "cpu" else GPU_GROUP,
        )
        padded = [pad_to_power_of_two(group) for group in groups] if self.device_type == "mps" else groups
        order = np.concatenate(padded)
        entries = (mask_index, units.filter, units.value, map_row, map_column)
        tensors = self.to_device(*(entry[order] for entry in entries))
        lengths = [len(group) for group in padded]
        pieces = zip(*(tensor.split(lengths) for tensor in tensors), strict=True)

        results = []
        for indices, piece in zip(groups, pieces, strict=True):
            reference = indices[0]
            reference_position = (int(map_row[reference]), int(map_column[reference]))
            projections = self.project(masks, UnitTensors(*piece), *reference_position)
            projections = projections[: len(indices)]  # without what `pad_to_power_of_two` repeated
            results.append(ProjectedGroup(indices, origins[indices], reduce(projections).cpu().numpy()))
        return results

    def to_device(self, *arrays: Array) -> list[Tensor]:
        """Return arrays as tensors on the network's device."""
        return [torch.from_numpy(array).to(self.net.mean.device) for array in arrays]


def images_at_once(batch_size: int, device_type: str) -> int:
    """Return how many images a forward pass takes: `batch_size`, on a GPU at least `GPU_IMAGES`."""
    return batch_size if device_type == "cpu" else max(batch_size, GPU_IMAGES)


def group_equal(values: Array, limit: int) -> list[Array]:
    """Return the indices of equal values together, in groups of at most `limit`."""
    order = np.argsort(values, kind="stable")
    changes = np.flatnonzero(np.diff(values[order])) + 1
    groups = []
    for equal in np.split(order, changes):
        groups += np.split(equal, range(limit, len(equal), limit))
    return groups


def pad_to_power_of_two(indices: Array) -> Array:
    """Repeat the last index until their number is a power of two.

    An Apple GPU compiles and keeps a graph for every shape that it meets, so there should be few.
    """
    length = 1 << (len(indices) - 1).bit_length()
    return np.pad(indices, (0, length - len(indices)), mode="edge")


def window_rows(span: Span, pool: int, shift: Tensor) -> Tensor:
    """Return the rows of each unit's window in the map before pooling, (units, rows).

    `span` is the window of one unit in the pooled map, `shift` is how far each unit's window lies below it,
    in rows before pooling. Columns are counted alike.
    """
    return shift[:, None] + torch.arange(span.start * pool, span.stop * pool, device=shift.device)


def gather(masks: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Copy one window for each unit out of masks (images, rows, columns, filters).

    `image` (units,) says from which mask; `rows` (units, window rows) and `columns` (units, window columns)
    say which window of it.
    """
    _, map_rows, map_columns, filters = masks.shape
    first = (image[:, None] * map_rows + rows) * map_columns  # position of each row's first column
    positions = first[:, :, None] + columns[:, None, :]  # (units, window rows, window columns)
    windows = masks.view(-1, filters).index_select(0, positions.view(-1))
    return windows.view(*positions.shape, filters)


def unpool(signal: Tensor, mask: Tensor, pool: int) -> Tensor:
    """Repeat each value over its pooling region, and multiply by the mask, which is 1 at the switch.

    `signal` is (units, pooled rows, pooled columns, filters), `mask` (units, rows, columns, filters). The
    product takes the mask's place in memory, which saves a copy.
    """
    _, pooled_rows, pooled_columns, filter_count = signal.shape
    # a view: (units, pooled rows, rows of a region, pooled columns, columns of a region, filters)
    regions = mask.view(-1, pooled_rows, pool, pooled_columns, pool, filter_count)
    regions *= signal[:, :, None, :, None]
    return mask


def project_units(
    projector: Projector,
    images: Array,
    units: Units,
    desc: str,
    reduce: Callable[[Tensor], Tensor] = torch.Tensor.contiguous,
    map_positions: Array | None = None,
) -> Iterator[ProjectedGroup]:
    """Project units of many images; on a CPU each thread takes whole batches of images.

    The switch of a unit decides which pixels its window covers. To compare filters or networks in one and
    the same window, pass its position before pooling as `map_positions`; `Projector.map_positions` finds it.
    Then row and column of the units, and the switches of their own layer, are ignored.

    Args:
        projector: The `Projector` of the units' layer.
        images: uint8 (images, 3, 96, 96).
        units: What is projected, in any order.
        desc: Label of the progress bar.
        reduce: Turns projections (units, rows, columns, 3) into what is kept of them, (units, ...); by
            default everything is kept, without the larger array that it was cropped from.
        map_positions: Row and column of each unit in its map before pooling, int64 (units, 2); by default
            where its switch points.

    Yields:
        Some of the units at a time, in an order of the engine's own: their indices in `units`, the origins of
        their windows, and what `reduce` made of the part of the windows inside the image.
    """
    on_cpu = projector.device_type == "cpu"
    threads = torch.get_num_threads()
    batches = split_by_image(units.image, projector.batch_size)

    def work(batch: Array) -> list[ProjectedGroup]:
        positions = None if map_positions is None else map_positions[batch]
        return projector.project_batch(images, units.select(batch), positions, reduce)

    executor = ThreadPoolExecutor(threads)
    try:
        if on_cpu:
            torch.set_num_threads(1)  # threads started from here on take it over
        results = executor.map(work, batches) if on_cpu else map(work, batches)
        with tqdm(total=len(batches), desc=desc, unit=" batches", disable=None) as bar:
            for batch, groups in zip(batches, results, strict=True):
                for group in groups:
                    yield group._replace(indices=batch[group.indices])  # numbers in the batch -> in `units`
                bar.update()
    finally:
        executor.shutdown(cancel_futures=True)  # after an error or Ctrl-C no further batch is begun
        torch.set_num_threads(threads)


def split_by_image(image: Array, batch_size: int) -> list[Array]:
    """Return indices of units in batches that hold all units of `batch_size` images."""
    order = np.argsort(image, kind="stable")
    _, starts = np.unique(image[order], return_index=True)  # where the units of each image begin
    return np.split(order, starts[batch_size::batch_size]) if len(order) else []


def project_windows(
    projector: Projector,
    images: Array,
    units: Units,
    desc: str,
    dtype: type = np.float32,
    map_positions: Array | None = None,
) -> tuple[Array, Array]:
    """Project units of many images and keep their whole windows.

    Args:
        projector: The `Projector` of the units' layer.
        images: uint8 (images, 3, 96, 96).
        units: What is projected, in any order.
        desc: Label of the progress bar.
        dtype: In which type the projections are stored.
        map_positions: As for `project_units`.

    Returns:
        The projections in the order of the units, (units, 3, size, size), zero outside the image. Beside them
        row and column of each window's top left pixel, int16 (units, 2), negative beyond the border.
    """
    size = projector.field.size
    projections: Array = np.zeros((len(units.image), 3, size, size), dtype)
    all_origins = np.zeros((len(units.image), 2), np.int16)
    for indices, origins, windows in project_units(
        projector, images, units, desc, map_positions=map_positions
    ):
        all_origins[indices] = origins
        for index, origin, window in zip(indices, origins, windows, strict=True):
            top, left = np.maximum(-origin, 0)  # rows and columns outside the image
            height, width, _ = window.shape
            projections[index, :, top : top + height, left : left + width] = window.transpose(2, 0, 1)
    return projections, all_origins


# ---------------------------------------------------------------- activations and examples


def measure_activations(images: Array, net: CNN, batch_size: int, desc: str) -> Arrays:
    """Measure the map of each filter of each layer in each image.

    Args:
        images: uint8 (images, 3, 96, 96).
        net: A network in evaluation mode.
        batch_size: Images in one forward pass; on a GPU `GPU_IMAGES` at least.
        desc: Label of the progress bar.

    Returns:
        For k = 1 to 4, over the pooled map:

        - conv{k}_max: The peak activation, float32 (images, filters).
        - conv{k}_position: Row and column of the peak, the first one of several, int16 (images, filters, 2);
          0 where nothing fires.
        - conv{k}_mean: The mean activation, float32 (images, filters).
        - conv{k}_nonzero: The share of positions above zero, float32 (images, filters).
    """
    arrays: Arrays = {}
    batch_size = images_at_once(batch_size, net.mean.device.type)
    with tqdm(total=len(images), desc=desc, unit=" images", disable=None) as bar:
        for start in range(0, len(images), batch_size):
            batch = net.normalise(torch.from_numpy(images[start : start + batch_size]))
            for layer, (pooled, _) in zip(LAYERS, net.features(batch), strict=True):
                measured = {f"{layer}_{name}": part for name, part in measure_maps(pooled).items()}
                if start == 0:  # whole arrays at once: to put parts together takes the memory twice
                    for name, part in measured.items():
                        arrays[name] = np.empty((len(images), *part.shape[1:]), part.dtype)
                for name, part in measured.items():
                    arrays[name][start : start + len(batch)] = part
            bar.update(len(batch))
    return arrays


def measure_maps(pooled: Tensor) -> Arrays:
    """Return max, position, mean and nonzero of pooled maps (images, filters, rows, columns)."""
    flat = pooled.flatten(2)  # (images, filters, positions)
    peak = flat.argmax(dim=2)
    columns = pooled.shape[-1]
    measured = {
        "max": flat.amax(dim=2),
        "position": torch.stack([peak // columns, peak % columns], dim=2).short(),
        "mean": flat.mean(dim=2),
        "nonzero": (flat > 0).float().mean(dim=2),
    }
    return {name: values.cpu().numpy() for name, values in measured.items()}


def strongest_of(peaks: Array, positions: Array, image: Array, filter_index: Array) -> Units:
    """Return the strongest unit of filter `filter_index[n]` in image `image[n]`, for each n.

    `peaks` and `positions` are conv{k}_max and conv{k}_position of `measure_activations`.
    """
    row, column = positions[image, filter_index].astype(np.int64).T
    return Units(image.astype(np.int64), filter_index, row, column, peaks[image, filter_index])


def top_images(peaks: Array, count: int) -> Array:
    """Return the `count` images in which each filter has its highest peak activations.

    `peaks` is conv{k}_max. The result is int32 (filters, count), highest first, ties to the lower index; -1
    where fewer images make the filter fire at all.
    """
    order = np.argsort(-peaks, axis=0, kind="stable")[:count]
    fires = np.take_along_axis(peaks, order, axis=0) > 0
    return np.where(fires, order, -1).T.astype(np.int32)


def percentile_images(peaks: Array, top: Array) -> Array:
    """Choose `EXAMPLES` images for each filter near each percentile in `LEVELS` of its peak activation.

    A percentile is taken over the images in which the filter fires. The images are drawn by a fixed seed from
    the 3 * `EXAMPLES` whose peak activation is nearest to it. No image is chosen twice.

    Args:
        peaks: conv{k}_max, (images, filters).
        top: The filters' `top_images`, (filters, count), which are not chosen here.

    Returns:
        int32 (filters, levels * examples), level by level, highest peak activation first; -1 where too few
        images are left.
    """
    rng = np.random.default_rng(0)
    chosen = np.full((len(top), len(LEVELS), EXAMPLES), -1, np.int32)
    for number in range(len(top)):
        filter_peaks = peaks[:, number]
        firing = np.flatnonzero(filter_peaks > 0)
        candidates = np.setdiff1d(firing, top[number])
        for level_index, level in enumerate(LEVELS):
            if not len(candidates):
                break

            percentile = np.percentile(filter_peaks[firing], level)
            distance = np.abs(filter_peaks[candidates] - percentile)
            nearest = candidates[np.argsort(distance, kind="stable")[: 3 * EXAMPLES]]
            drawn = rng.permutation(nearest)[:EXAMPLES]

            highest_first = np.argsort(-filter_peaks[drawn], kind="stable")
            chosen[number, level_index, : len(drawn)] = drawn[highest_first]
            candidates = np.setdiff1d(candidates, drawn)
    return chosen.reshape(len(top), -1)


class Examples(NamedTuple):
    """Some images for each filter of a layer, each projected from the filter's strongest unit in it.

    The first two numbers of every shape are (filters, examples). Where a filter has fewer examples the image
    is -1 and everything else is zero.
    """

    image: Array  # int32, index into the test split
    value: Array  # float32, the activation
    position: Array  # int16 (..., 2), row and column of the unit in the pooled map
    origin: Array  # int16 (..., 2), row and column of the window's top left pixel, negative beyond the border
    projection: Array  # (..., 3, size, size), signed, in normalised pixels, zero outside the image
    patch: Array  # uint8 (..., 3, size, size), the image in the same window, zero outside it


def project_examples(
    projector: Projector, images: Array, image: Array, activations: Arrays, dtype: type
) -> Examples:
    """Project every filter of a layer in images chosen for it, each from the filter's strongest unit there.

    Args:
        projector: The `Projector` of the layer.
        images: uint8 (images, 3, 96, 96).
        image: The images chosen for each filter, int32 (filters, examples), -1 for none.
        activations: What `measure_activations` returned for the images.
        dtype: In which type the projections are stored.

    Returns:
        The examples in the order of `image`.
    """
    layer = LAYERS[projector.layer]
    size = projector.field.size
    exists = image >= 0
    filter_index, _ = np.nonzero(exists)
    peaks = activations[f"{layer}_max"]
    units = strongest_of(peaks, activations[f"{layer}_position"], image[exists], filter_index)
    desc = f"{layer}, {image.shape[1]} images a filter"
    projections, origins = project_windows(projector, images, units, desc, dtype)
    patches = np.zeros((len(origins), 3, size, size), np.uint8)
    for patch, number, (top, left) in zip(patches, units.image, origins, strict=True):
        patch[:] = crop(images[number], top, left, size, 0)

    def spread(values: Array) -> Array:
        """Put existing examples into the order of `image`, (existing, ...) -> (filters, examples, ...)."""
        if exists.all():  # the usual case, and then no copy is needed
            return values.reshape(*image.shape, *values.shape[1:])
        spread_values = np.zeros((*image.shape, *values.shape[1:]), values.dtype)
        spread_values[exists] = values
        return spread_values

    return Examples(
        image=image,
        value=spread(units.value),
        position=spread(np.stack([units.row, units.column], axis=1).astype(np.int16)),
        origin=spread(origins),
        projection=spread(projections),
        patch=spread(patches),
    )


def project_top(images: Array, net: CNN, activations: Arrays, n_top: int, batch_size: int) -> Arrays:
    """Project every filter in its `n_top` top images (Figure 2) and in its percentile images.

    Returns:
        For k = 1 to 4 the fields of `Examples`: conv{k}_image and so on for the `top_images`,
        conv{k}_level_image and so on for the `percentile_images`. The projections of these are float16, to
        save memory.
    """
    arrays: Arrays = {}
    for k, layer in enumerate(LAYERS):
        projector = Projector(net, k, batch_size)
        top = top_images(activations[f"{layer}_max"], n_top)
        levels = percentile_images(activations[f"{layer}_max"], top)

        examples = project_examples(projector, images, levels, activations, np.float16)
        arrays |= {f"{layer}_level_{name}": values for name, values in examples._asdict().items()}
        examples = project_examples(projector, images, top, activations, np.float32)
        arrays |= {f"{layer}_{name}": values for name, values in examples._asdict().items()}
    return arrays


# ---------------------------------------------------------------- pages of filters (Figure 2)


def title_filters(top: Arrays, layer: str, labels: Array, names: Sequence[str]) -> list[str]:
    """Return a title for each filter of a layer: `filter 42: 7 of 9 car, peak 3.21`.

    The class is the most frequent one among the filter's top images, and the peak is its activation in the
    first of them. `top` is what `project_top` returned, `labels` are the classes of the images.
    """
    separator = "\n" if layer == LAYERS[0] else ", "  # conv1's panels are narrow
    titles = []
    for number, image in enumerate(top[f"{layer}_image"]):
        firing = image[image >= 0]
        if not len(firing):
            titles.append(f"filter {number}: dead")
            continue
        counts = np.bincount(labels[firing], minlength=len(names))
        peak = top[f"{layer}_value"][number, 0]
        title = f"filter {number}: {counts.max()} of {len(firing)} {shorten(names[int(counts.argmax())])}"
        titles.append(f"{title}{separator}peak {peak:.2f}")
    return titles


def draw_pages(top: Arrays, titles: dict[str, list[str]], heading: str, per_page: int, folder: Path) -> None:
    """Draw the top projections of every filter of every layer, `per_page` filters a picture, conv1 in one.

    Earlier pages are deleted first: pages of a network with more filters would otherwise stay beside the new
    ones.
    """
    for page in folder.expanduser().glob("conv*_filters_*.png"):
        page.unlink()
    for layer in LAYERS:
        count, *_, size = top[f"{layer}_patch"].shape
        step = count if layer == LAYERS[0] else per_page
        for start in range(0, count, step):
            stop = min(start + step, count)
            page_heading = (
                f"{layer}, filters {start} to {stop - 1}, windows of {size} x {size} pixels\n{heading}"
            )
            figure = draw_page(top, layer, range(start, stop), titles[layer], page_heading)
            save_figure(folder / f"{layer}_filters_{start:03d}_to_{stop - 1:03d}.png", figure)


def draw_page(top: Arrays, layer: str, filters: Sequence[int], titles: Sequence[str], heading: str) -> Figure:
    """Draw the layout of the paper's Figure 2: each filter's projections, and beside them the image patches.

    `top` is what `project_top` returned; `titles` has one for each filter of the layer, by number.
    """
    is_conv1 = layer == LAYERS[0]
    columns = 6 if is_conv1 else 2
    row_height = 1.05 if is_conv1 else 2.6  # inches
    rows = math.ceil(len(filters) / columns)

    fig: Figure
    size = (10, 0.6 + row_height * rows)
    fig, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])  # hidden ticks would be placed all the same, a quarter of the time
        ax.axis("off")

    for ax, number in zip(axes.flat, filters, strict=False):
        projections = top[f"{layer}_projection"][number]
        patches = top[f"{layer}_patch"][number]
        inside = mark_inside(top[f"{layer}_origin"][number], patches.shape[-1])
        ax.imshow(lay_out_filter(projections, patches, inside, is_conv1), interpolation="nearest")
        ax.set_title(titles[number], fontsize=8, pad=2)
    fig.suptitle(heading, fontsize=9)
    return fig


def mark_inside(origins: Array, size: int) -> Array:
    """Return which pixels of each window lie inside the image, bool (windows, size, size)."""
    pixels = origins[:, :, None] + np.arange(size)  # (windows, 2, size), rows and columns in the image
    inside = (pixels >= 0) & (pixels < IMAGE_SIZE)
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def lay_out_filter(projections: Array, patches: Array, inside: Array, only_one: bool) -> Array:
    """Lay out a filter's projections in a grid, and its patches in a grid beside it.

    Grey is zero in the projections, with one scale for all; white lies beyond the border of an image.

    Args:
        projections: Signed, (examples, 3, size, size).
        patches: uint8, likewise.
        inside: What `mark_inside` returned for the windows.
        only_one: Show one projection as high as the grid, as for conv1, whose projections are the filter
            times the activation and so differ in their contrast alone.

    Returns:
        A picture (rows, columns, 3) from 0 to 1.
    """
    columns = math.ceil(len(patches) ** 0.5)
    panels = displayed(projections)  # (examples, size, size, 3)
    patches_on_white = np.where(inside[:, None], patches / 255, 1)
    patch_grid = tile(np.moveaxis(patches_on_white, 1, 3), columns, 1)

    if only_one:
        whole = int(inside.all(axis=(1, 2)).argmax())  # one that the border does not cut, if there is one
        scale = math.ceil(len(patches) / columns)
        large = panels[whole].repeat(scale, axis=0).repeat(scale, axis=1)
        projection_grid = np.pad(large, ((1, scale), (1, scale), (0, 0)), constant_values=1)
    else:
        projection_grid = tile(panels, columns, 1)

    rows = len(patch_grid)
    gap = np.ones((rows, max(2, rows // 20), 3))
    return np.concatenate([projection_grid, gap, patch_grid], axis=1)


# ---------------------------------------------------------------- evolution of features (Figure 4)


def read_snapshot(path: Path, device: torch.device) -> Checkpoint:
    """Read a snapshot, or raise SystemExit with the advice to delete it, since the others suffice."""
    try:
        return load_checkpoint(path, device)
    except SystemExit:
        message = f"{path} is damaged or no snapshot of this network: delete it; the other snapshots suffice"
        raise SystemExit(message) from None


def read_snapshots(folder: Path, checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return the network after some epochs of the training that ended in `checkpoint`, itself last."""
    paths = sorted(folder.expanduser().glob("epoch_*.pth"))
    snapshots = [read_snapshot(path, checkpoint.net.mean.device) for path in paths]
    same_training = [s for s in snapshots if s.settings == checkpoint.settings]
    earlier = [s for s in same_training if 0 < s.epochs < checkpoint.epochs]
    return [*sorted(earlier, key=lambda s: s.epochs), checkpoint]


class Evolution(NamedTuple):
    """The strongest unit of some filters of a layer after each of several epochs."""

    filters: Array  # their numbers
    image: Array  # in which image the unit is, (filters, epochs)
    projections: Array  # (filters, epochs, 3, rows, columns)


def project_evolution(
    images: Array, snapshots: Sequence[Checkpoint], count: int, batch_size: int
) -> dict[str, Evolution]:
    """Project the strongest unit of `count` filters of each layer, evenly spaced by number.

    The unit is sought in all given images, uint8 (images, 3, 96, 96), after each snapshot anew.
    """
    evolution = {}
    filter_counts = snapshots[-1].net.config["filters"]
    for layer, filter_count in zip(LAYERS, filter_counts, strict=True):
        filters = np.unique(np.linspace(0, filter_count - 1, count).astype(np.int64))
        size = receptive_fields(snapshots[-1].net)[LAYERS.index(layer)].size
        image = np.zeros((len(filters), len(snapshots)), np.int64)
        projections = np.zeros((*image.shape, 3, size, size), np.float32)
        evolution[layer] = Evolution(filters, image, projections)

    for epoch_index, snapshot in enumerate(snapshots):
        desc = f"epoch {snapshot.epochs}"
        activations = measure_activations(images, snapshot.net, batch_size, desc)
        for k, (layer, (filters, image, projections)) in enumerate(evolution.items()):
            peaks = activations[f"{layer}_max"]
            strongest_image = peaks[:, filters].argmax(axis=0)
            units = strongest_of(peaks, activations[f"{layer}_position"], strongest_image, filters)
            projector = Projector(snapshot.net, k, batch_size)
            windows, _ = project_windows(projector, images, units, f"{desc}, {layer}")
            image[:, epoch_index] = strongest_image
            projections[:, epoch_index] = windows
    return evolution


def draw_evolution(evolution: dict[str, Evolution], epochs: Sequence[int], heading: str) -> Figure:
    """Draw what `project_evolution` returned: a row for each filter, a column for each epoch.

    Each panel has a scale of its own, since projections grow as the network learns. A line stands before a
    panel whose image is another one than before.
    """
    fig, axes = plt.subplots(2, 2, figsize=(10, 7.3), layout="constrained")
    for ax, (layer, (filters, image, projections)) in zip(axes.flat, evolution.items(), strict=True):
        rows, columns, _, size, _ = projections.shape
        gap = max(1, size // 12)
        step = size + gap  # pixels from one panel to the next
        middle = gap + size / 2 - 0.5

        panels = np.stack([displayed(panel) for panel in projections.reshape(-1, 3, size, size)])
        ax.imshow(tile(panels, columns, gap), interpolation="nearest")

        # an orange line where the image changes
        row, column = np.nonzero(np.diff(image, axis=1))
        x = (column + 1) * step + gap / 2 - 0.5
        y = row * step + gap - 0.5
        ax.vlines(x, y, y + size, "C1", linewidth=1.5)

        ax.set_xticks(np.arange(columns) * step + middle, [str(epoch) for epoch in epochs])
        ax.set_yticks(np.arange(rows) * step + middle, [str(number) for number in filters])
        ax.set_title(f"{layer}, windows of {size} x {size} pixels")
        sns.despine(ax=ax, left=True, bottom=True)
    fig.supxlabel("epoch", size="medium")
    fig.supylabel("filter", size="medium")
    fig.suptitle(heading, fontsize=10)
    return fig


# ---------------------------------------------------------------- statistics of conv4's projections


def choose_images(labels: Array, per_class: int | None) -> Array:
    """Return the indices of the first `per_class` images of each class; all for None."""
    rank = pd.Series(labels).groupby(labels).cumcount()  # of an image among the images of its class
    return np.flatnonzero(rank < (per_class or len(labels)))


def magnitude_statistics(projections: Tensor) -> Tensor:
    """Return nonzero_count, mean, max and variance of each projection's magnitude, float32 (units, 4).

    The magnitude at a pixel is the sum over RGB of the absolute values. The mean is taken over the non-zero
    pixels, and is 0 where there are none. The variance is taken over all pixels of the full frame, which are
    zero outside the given part of each window, (units, rows, columns, 3).
    """
    red, green, blue = projections.abs().unbind(dim=3)
    magnitude = (red + green + blue).flatten(1)  # a sum over so short a dimension takes four times as long

    # counted as a sum of signs: four times as fast as a comparison, and exact
    count = magnitude.sign().sum(dim=1)
    total = magnitude.sum(dim=1)
    mean = total / count.clamp(min=1)

    # around the mean rather than from the mean of squares, which would lose digits
    frame_pixels = IMAGE_SIZE**2
    frame_mean = total / frame_pixels
    outside = frame_pixels - magnitude.shape[1]
    squares = (magnitude - frame_mean[:, None]).square().sum(dim=1) + outside * frame_mean.square()
    return torch.stack([count, mean, magnitude.amax(dim=1), squares / frame_pixels], dim=1)


def measure_projections(
    images: Array, chosen: Array, activations: Arrays, net: CNN, batch_size: int
) -> Arrays:
    """Measure the projection of every filter of conv4 in the `chosen` images, from its strongest unit there.

    Returns:
        nonzero_count, mean, max and variance as `magnitude_statistics` defines them, float32 (chosen images,
        filters) each. All are 0 where the filter does not fire, which costs no projection.
    """
    peaks = activations["conv4_max"]
    statistics = np.zeros((len(chosen), peaks.shape[1], 4), np.float32)
    projector = Projector(net, len(LAYERS) - 1, batch_size)
    for start in range(0, len(chosen), 1000):  # all at once, millions of units would fill the memory
        part = chosen[start : start + 1000]
        index_in_part, filter_index = np.nonzero(peaks[part] > 0)
        units = strongest_of(peaks, activations["conv4_position"], part[index_in_part], filter_index)
        desc = f"projections of {start + len(part):,} of {len(chosen):,} images"
        for indices, _, values in project_units(projector, images, units, desc, magnitude_statistics):
            statistics[start + index_in_part[indices], filter_index[indices]] = values

    names = ("nonzero_count", "mean", "max", "variance")
    return dict(zip(names, np.moveaxis(statistics, 2, 0), strict=True))


def measure_with_times(
    images: Array, chosen: Array, activations: Arrays, net: CNN, batch_size: int
) -> Arrays:
    """Return what `measure_projections` does, and print how long it will take and how long it took."""
    start = time.perf_counter()
    measure_projections(images, chosen[:64], activations, net, batch_size)
    minutes = (time.perf_counter() - start) * max(1, len(chosen) / 64) / 60
    print(f"statistics of all projections of conv4 will take about {minutes:.1f} minutes")

    start = time.perf_counter()
    statistics = measure_projections(images, chosen, activations, net, batch_size)
    seconds = time.perf_counter() - start
    count = int((statistics["max"] > 0).sum())
    print(f"{count:,} projections of conv4 in {seconds:.0f} s, {1e3 * seconds / max(count, 1):.3f} ms each")
    return statistics


def print_activations(activations: Arrays) -> None:
    """Print how many filters of each layer are dead, and in what share of images a filter fires."""
    print(f"{'layer':<7}{'filters':>8}{'dead':>6}{'fires in':>10}")
    for layer in LAYERS:
        fires = activations[f"{layer}_max"] > 0  # (images, filters)
        dead = int((~fires.any(axis=0)).sum())
        print(f"{layer:<7}{fires.shape[1]:>8}{dead:>6}{100 * fires.mean():>8.1f} % of images, on average")


def main() -> None:
    """Measure activations, project the top images of every filter, then measure conv4's projections."""
    set_style()
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    net = checkpoint.net
    snapshots = read_snapshots(Path(CHECKPOINT).parent / "snapshots", checkpoint)  # early: one may be damaged
    images, labels, _ = load_checkpoint_split(checkpoint, DATA_DIR, "test")
    title = TITLES[checkpoint.dataset]
    searched = f"{len(images):,} test images of {title}"
    filter_count = sum(net.config["filters"])
    outputs = Path(OUTPUTS)
    print(f"projecting {filter_count} filters over {searched} on {device}, torch {torch.__version__}")

    # the map of each filter in each image
    activations = measure_activations(images, net, BATCH_SIZE, "activations")
    save_arrays(outputs / "activations.npz", checkpoint, labels=labels, **activations)
    print_activations(activations)

    # each filter's top images and percentile examples, projected
    top = project_top(images, net, activations, N_TOP, BATCH_SIZE)
    save_arrays(outputs / "projections.npz", checkpoint, **top)
    # what only the files hold would take memory from here on
    top = {name: values for name, values in top.items() if "level" not in name}
    activations = {name: values for name, values in activations.items() if name.endswith(("max", "position"))}
    titles = {layer: title_filters(top, layer, labels, checkpoint.class_names) for layer in LAYERS}
    heading = (
        f"left: projections of each filter's top {N_TOP} of {searched}, grey is zero; "
        f"right: the images there, white beyond the border; {checkpoint.accuracy()}"
    )
    draw_pages(top, titles, heading, FILTERS_PER_PAGE, outputs / "deconv")
    del top  # its memory is needed for what follows

    # some filters' strongest unit after each epoch that was kept
    evolution = project_evolution(images[:EVOLUTION_IMAGES], snapshots, EVOLUTION_FILTERS, BATCH_SIZE)
    heading = (
        f"strongest unit in {len(images[:EVOLUTION_IMAGES]):,} test images of {title} after each epoch, "
        f"projected; at the end {checkpoint.accuracy()}\ngrey is zero, each panel has its own scale; "
        "an orange line: the strongest unit is now in another image"
    )
    figure = draw_evolution(evolution, [snapshot.epochs for snapshot in snapshots], heading)
    save_figure(outputs / "feature_evolution.png", figure)

    # all projections of conv4 in some images of each class
    chosen = choose_images(labels, IMAGES_PER_CLASS)
    print("pictures are ready")
    statistics = measure_with_times(images, chosen, activations, net, BATCH_SIZE)
    path = outputs / "projection_statistics.npz"
    save_arrays(path, checkpoint, labels=labels[chosen], image=chosen, **statistics)
    print("next: uv run analyse_projections.py")


if __name__ == "__main__":
    run_script(main)
