"""Project the strongest activations of every filter back to pixels, and measure conv4's projections.

Run:    uv run deconv_full.py
Reads:  outputs/CNN.pth, outputs/snapshots/epoch_*.pth, data/stl10_binary/test_{X,y}.bin
Writes: outputs/activations.npz, outputs/projections.npz, outputs/projection_statistics.npz,
        outputs/deconv/conv*.png, outputs/feature_evolution.png

The arithmetic is that of deconv.py (Zeiler & Fergus 2014, section 2.1), arranged for millions of units:

- A window suffices. Going down, one unit spreads over the kernel of its filter, each value of that over a
  pooling region, that over the next kernel, and so on; beyond the receptive field everything is zero. So only
  a window is computed, at every layer, and what of it lies outside the image is left out. Windows that the
  border cuts in the same way have the same shape and are projected together.
- To unpool, each pooled value is repeated over its pooling region and multiplied by a mask that is 1 at the
  maximum. A switch is a place in the whole map and would have to be counted anew for each window; a mask,
  made once for each image from its switches, can simply be cropped.
- A transposed convolution is a convolution with the filters turned round, which is faster here. Stride s
  makes s x s of them, one for each place between two steps, which are interleaved afterwards.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

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
)
from deconv import crop, displayed, fold_batch_norm
from load_data import TITLES, Array, load_checkpoint_split, save_arrays, save_figure, set_style, tile

N_TOP = 9  # images of a filter: the N_TOP different test images that drive it most
IMAGES_PER_CLASS: int | None = 100  # test images of each class in projection_statistics.npz; None: all
BATCH_SIZE = 16  # images whose masks are held at once by each thread; more costs memory, not time
FILTERS_PER_PAGE = 16  # filters in one picture of outputs/deconv/
EVOLUTION_FILTERS = 5  # filters of each layer in feature_evolution.png, evenly spaced by number
EVOLUTION_IMAGES = 1000  # test images in which each snapshot's strongest activation is sought
CHECKPOINT = Path("outputs/CNN.pth")  # written by train_CNN.py
DATA_DIR = Path("data")  # holds the folder stl10_binary
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1" or "mps"
OUTPUTS = Path("outputs")  # where results go

LEVELS = (99, 90, 75, 50)  # weaker examples: near these percentiles of a filter's activations above zero
EXAMPLES = 3  # at each of these levels
Arrays = dict[str, Array]


class Units(NamedTuple):
    """Some units of one layer: image, filter, row and column in the pooled map, int64 (units,) each.

    `value`, float32, is what the projection starts with: the activation.
    """

    image: Array
    filter: Array
    row: Array
    column: Array
    value: Array


# ---------------------------------------------------------------- the engine


class Span(NamedTuple):
    """Rows (or columns) of a window at the input of one convolution: `start` to `stop` inside the frame.

    `first` is where the transposed convolution puts its first row; start - first rows are cut off. For the
    unit at row 0 of a 3 x 3 convolution: first -1, start 0, stop 2.
    """

    first: int
    start: int
    stop: int

    def cut(self) -> slice:
        """Return the part of the rows from above that lies inside the frame."""
        return slice(self.start - self.first, self.stop - self.first)


def flip_kernels(block: ConvBlock) -> Tensor:
    """Return filters whose plain convolution is the block's transposed one, batch norm's gain included.

    With stride s a transposed convolution puts W[s t + e] at row s (r + t) + e for an input at row r. So for
    each e = 0 .. s - 1 there is one plain convolution with taps t, turned round because a plain convolution
    looks back where a transposed one spreads. Taps past the end of the kernel are zero. Kernel 6 with stride
    2, for instance, makes 2 x 2 convolutions of 3 x 3 taps: even rows of the result come from W[0], W[2],
    W[4], odd ones from W[1], W[3], W[5]; `interleave` puts the results together.

    Returns (s * s * channels, filters, taps, taps), then as many zeros as make the first number a multiple
    of 16, which fills vector registers (1.6 times as fast for conv1).
    """
    filters = fold_batch_norm(block)
    (count, channels, kernel, _), (_, stride, *_) = filters.shape, conv_geometry(block)
    taps = math.ceil(kernel / stride)
    filters = F.pad(filters, (0, taps * stride - kernel) * 2)
    filters = filters.view(count, channels, taps, stride, taps, stride).flip(2, 4)
    filters = filters.permute(3, 5, 1, 0, 2, 4).reshape(stride**2 * channels, count, taps, taps)
    filters = F.pad(filters, (0, 0, 0, 0, 0, 0, 0, -len(filters) % 16))
    return filters.contiguous(memory_format=torch.channels_last)


def interleave(parts: Tensor, stride: int, channels: int) -> Tensor:
    """Put the stride * stride results of `flip_kernels` side by side, (units, rows, columns, channels)."""
    n, rows, columns, _ = parts.shape  # torch's pixel_shuffle took seven times as long
    parts = parts[..., : stride**2 * channels]
    parts = parts.reshape(n, rows, columns, stride, -1)  # the last: places and channels within a row
    return parts.transpose(2, 3).reshape(n, rows * stride, columns * stride, channels)


class Projector:
    """Projects units of one layer of a network, many at a time, each in its receptive-field window.

    Masks of `batch_size` images are held at once by each thread. Arrays inside have channels last, (units,
    rows, columns, channels): the masks of a window's row are then one piece of memory, cheap to gather.
    """

    def __init__(self, net: CNN, layer: int, batch_size: int = 16):
        self.net, self.layer, self.batch_size = net, layer, batch_size
        self.blocks = net.blocks[: layer + 1]
        self.input_sizes, self.map_sizes = frame_sizes(net, IMAGE_SIZE)
        self.field = receptive_fields(net)[layer]
        self.own_filters = fold_batch_norm(self.blocks[layer]).permute(0, 2, 3, 1).contiguous()
        self.turned = [flip_kernels(block) for block in self.blocks[:layer]]
        self.windows = [self.spans(row) for row in range(self.map_sizes[layer])]
        # rows (and columns) whose windows the border cuts alike have the same pattern
        cuts = [tuple(span.cut() for span in row) for row in self.windows]
        self.pattern = np.array([cuts.index(cut) for cut in cuts])

    def spans(self, row: int) -> list[Span]:
        """Return the window of a unit at `row` (or column) at the input of its own layer and of all below.

        An input of the layer above is a pooled value here, spread over its pooling region. In the default
        network the unit at row 10 of conv2 sees rows 9 to 11 of conv1's pooled map, which are rows 18 to 23
        before pooling, and these see rows 34 to 49 of the image.
        """
        spans, start, stop = [], row, row + 1
        for k in reversed(range(self.layer + 1)):
            kernel, stride, padding, _ = conv_geometry(self.blocks[k])
            first = start * stride - padding
            last = (stop - 1) * stride - padding + kernel
            spans.append(Span(first, max(first, 0), min(last, self.input_sizes[k])))
            if k > 0:
                pool = self.blocks[k - 1].pool_size
                start, stop = spans[-1].start * pool, spans[-1].stop * pool
        return spans

    def masks(self, features: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return 1 where a maximum was, else 0, (images, rows, columns, filters), for each layer below.

        `features` is what `net.features` returned for the images.
        """
        masks = []
        for (pooled, switches), block, size in zip(features, self.blocks[:-1], self.map_sizes, strict=False):
            pools, ones = [block.pool_size] * 2, torch.ones_like(pooled)
            mask = F.max_unpool2d(ones, switches, pools, output_size=(size, size))
            masks.append(mask.permute(0, 2, 3, 1).contiguous())
        return masks

    def project(self, masks: Sequence[Tensor], units: Sequence[Tensor], row: int, column: int) -> Tensor:
        """Project units that the border cuts alike: their windows have one shape at every layer.

        `units` are image (among those of `masks`), filter, value, row and column before pooling, (units,)
        each; `row` and `column` are those of one of them. Returns float32 (units, rows, columns, 3), the part
        of each window inside the image, signed, in normalised pixels.
        """
        image, filter_, value, *place = units
        n, rows, columns = len(image), self.windows[row], self.windows[column]
        # 3 rows further down at conv2 are 3 * 2 rows of conv1's map: `step` grows by the pools and strides
        below, right, step = place[0] - row, place[1] - column, 1
        # of a single unit the transposed convolution is its filter times its value
        own = self.own_filters[:, rows[0].cut(), columns[0].cut()]
        signal = own[filter_] * value[:, None, None, None]
        for depth, k in enumerate(reversed(range(self.layer))):
            pool = self.blocks[k].pool_size
            step *= conv_geometry(self.blocks[k + 1])[1] * pool
            height, width = (spans[depth].stop - spans[depth].start for spans in (rows, columns))
            top, left = rows[depth].start * pool + below * step, columns[depth].start * pool + right * step
            unpooled = gather(masks[k], image, top, left, height * pool, width * pool)
            # in place: (units, rows, 1, columns, 1, filters) over the rows and columns of its pooling region
            regions = unpooled.view(n, height, pool, width, pool, unpooled.shape[-1])
            regions *= signal.clamp_(min=0)[:, :, None, :, None]  # rectified on the way
            stride, taps = conv_geometry(self.blocks[k])[1], self.turned[k].shape[-1]
            signal = F.conv2d(unpooled.permute(0, 3, 1, 2), self.turned[k], padding=taps - 1)
            signal = interleave(signal.permute(0, 2, 3, 1), stride, self.blocks[k].conv.in_channels)
            signal = signal[:, rows[depth + 1].cut(), columns[depth + 1].cut()]
        return signal


def gather(masks: Tensor, image: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Copy one window of `height` x `width` for each unit out of masks (images, rows, columns, filters)."""
    _, rows, columns, filters = masks.shape
    row = image[:, None] * rows + top[:, None] + torch.arange(height, device=masks.device)
    column = left[:, None] + torch.arange(width, device=masks.device)
    places = row[:, :, None] * columns + column[:, None, :]  # (units, height, width)
    return masks.view(-1, filters).index_select(0, places.view(-1)).view(len(image), height, width, filters)


def project_units(
    projector: Projector,
    images: Array,
    units: Units,
    doing: str,
    reduce: Callable[[Tensor], Tensor] = torch.Tensor.contiguous,
) -> Iterator[tuple[Array, Array, Array]]:
    """Project units of many images; on a CPU each thread takes whole batches of images.

    Args:
        projector: Of their layer.
        images: uint8 (images, 3, 96, 96).
        units: What is projected.
        doing: Label of the progress bar.
        reduce: Of projections (units, rows, columns, 3) what is kept, (units, ...); by default all.

    Yields:
        Of some units at a time: their places in `units` (n,); row and column of each window's top left pixel
        in the image (n, 2), negative where it crosses the border; what `reduce` made of the part inside.
    """
    net, side = projector.net, projector.map_sizes[projector.layer]
    device = net.mean.device
    on_cpu = device.type == "cpu"
    chunk = 32 if on_cpu else 2048  # units at once: on a CPU more take more memory, a GPU wants many
    threads = torch.get_num_threads() if on_cpu else 1

    def work(which: Array) -> list[tuple[Array, Array, Tensor]]:
        needed, image = np.unique(units.image[which], return_inverse=True)
        features = net.features(net.normalise(torch.from_numpy(images[needed])))
        masks = projector.masks(features)
        place = image, units.filter[which], units.row[which], units.column[which]
        switch = features[projector.layer][1][tuple(map(torch.from_numpy, place))].cpu().numpy()
        row, column = np.divmod(switch, side)  # before pooling
        origins = np.stack([row, column], axis=1) * projector.field.jump + projector.field.start
        kinds = projector.pattern[row] * side + projector.pattern[column]
        results = []
        for kind in np.unique(kinds):  # units that the border cuts alike
            alike = np.flatnonzero(kinds == kind)
            for group in np.split(alike, range(chunk, len(alike), chunk)):
                entries = image, units.filter[which], units.value[which], row, column
                tensors = [torch.from_numpy(entry[group]).to(device) for entry in entries]
                windows = projector.project(masks, tensors, int(row[group[0]]), int(column[group[0]]))
                results.append((which[group], origins[group], reduce(windows)))
        return results

    by_image = np.argsort(units.image, kind="stable")
    needed, starts = np.unique(units.image[by_image], return_index=True)
    batches = np.split(by_image, starts[projector.batch_size :: projector.batch_size]) if len(needed) else []
    torch.set_num_threads(1 if on_cpu else threads)  # threads started from here on take it over
    try:
        with ThreadPoolExecutor(threads) as pool:
            done = tqdm(pool.map(work, batches), doing, len(batches), unit=" batches", disable=None)
            for which, origins, kept in chain.from_iterable(done):
                yield which, origins, kept.cpu().numpy()
    finally:
        torch.set_num_threads(threads)


def project_windows(
    projector: Projector, images: Array, units: Units, doing: str, dtype: type = np.float32
) -> tuple[Array, Array]:
    """Return whole windows, zero outside the image, (units, 3, size, size), and their origins (units, 2).

    Arguments as for `project_units`.
    """
    size = projector.field.size
    projections: Array = np.zeros((len(units.image), 3, size, size), dtype)
    all_origins = np.zeros((len(units.image), 2), np.int16)
    for which, origins, windows in project_units(projector, images, units, doing):
        all_origins[which] = origins
        for unit, origin, window in zip(which, origins, windows, strict=True):
            top, left = np.maximum(-origin, 0)  # rows and columns outside the image
            height, width, _ = window.shape
            projections[unit, :, top : top + height, left : left + width] = window.transpose(2, 0, 1)
    return projections, all_origins


# ---------------------------------------------------------------- activations and strongest images


def measure_activations(images: Array, net: CNN, batch_size: int, doing: str) -> Arrays:
    """Measure each filter of each layer on each image, uint8 (images, 3, 96, 96), over its pooled map.

    Returns, for k = 1 to 4, conv{k}_max float32 (images, filters); conv{k}_position int16 (images, filters,
    2), row and column of the maximum, the first one, 0 where nothing fires; conv{k}_mean and conv{k}_nonzero,
    the mean and the share of positions above zero, float32 (images, filters).
    """
    arrays: Arrays = {}
    with tqdm(total=len(images), desc=doing, unit=" images", disable=None) as bar:
        for start in range(0, len(images), batch_size):
            batch = net.normalise(torch.from_numpy(images[start : start + batch_size]))
            for layer, (pooled, _) in zip(LAYERS, net.features(batch), strict=True):
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
                    if start == 0:  # not put together at the end, which would need the memory twice
                        arrays[name] = np.empty((len(images), *values.shape[1:]), values.dtype)
                    arrays[name][start : start + len(batch)] = values
            bar.update(len(batch))
    return arrays


def strongest_of(maxima: Array, positions: Array, image: Array, filter_: Array) -> Units:
    """Return the strongest unit of `filter_` in `image`, numbers (units,) each.

    `maxima` and `positions` are conv{k}_max and conv{k}_position of `measure_activations`.
    """
    row, column = positions[image, filter_].astype(np.int64).T
    return Units(image.astype(np.int64), filter_, row, column, maxima[image, filter_])


def top_images(values: Array, count: int) -> Array:
    """Return the images that drive each filter most, strongest first, ties to the lower index.

    Of `values`, conv{k}_max; int32 (filters, count), -1 where fewer images make the filter fire at all.
    """
    order = np.argsort(-values, axis=0, kind="stable")[:count]
    fires = np.take_along_axis(values, order, axis=0) > 0
    return np.where(fires, order, -1).T.astype(np.int32)


def by_class(reduce: Callable[..., Any], values: Array, labels: Array, classes: int) -> Array:
    """Reduce (images, filters) to (classes, filters) by np.mean or np.max."""
    return np.stack([reduce(values[labels == k].astype(np.float64), axis=0) for k in range(classes)])


def class_selectivity(means: Array) -> Array:
    """Return the selectivity index of each filter for each class: (mu - mu_rest) / (mu + mu_rest).

    For the class that a filter prefers this is the class selectivity index of Morcos et al. 2018 ("On the
    importance of single directions for generalization"): 0 if the filter fires alike on all classes, 1 if on
    one only. They average a feature map over space; here its strongest value counts.

    `means` are mu, the mean activation of each filter on each class, (..., classes, filters); mu_rest is the
    mean of the other classes' mu. The result has the same shape, -1 to 1; nan for a filter that never fires.
    """
    rest = (means.sum(axis=-2, keepdims=True) - means) / (means.shape[-2] - 1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that is promised
        return np.asarray((means - rest) / (means + rest))


def percentile_images(values: Array, top: Array) -> Array:
    """Choose `EXAMPLES` images near each of the `LEVELS`, of those on which a filter fires.

    They are drawn by a fixed seed from the three times as many whose activation is nearest to the percentile.
    None is among the filter's `top_images` of the same values, and none is chosen twice. Returns int32
    (filters, levels * examples), at each level strongest first; -1 where too few images are left.
    """
    rng, chosen = np.random.default_rng(0), np.full((len(top), len(LEVELS), EXAMPLES), -1, np.int32)
    for of_filter, own, strongest in zip(chosen, values.T, top, strict=True):
        fires = np.flatnonzero(own > 0)
        left = np.setdiff1d(fires, strongest)
        for places, level in zip(of_filter, LEVELS, strict=True):
            if not len(left):
                break
            distance = np.abs(own[left] - np.percentile(own[fires], level))
            nearest = left[np.argsort(distance, kind="stable")[: 3 * EXAMPLES]]
            drawn = rng.permutation(nearest)[:EXAMPLES]
            places[: len(drawn)] = drawn[np.argsort(-own[drawn], kind="stable")]
            left = np.setdiff1d(left, drawn)
    return chosen.reshape(len(top), -1)


def project_examples(
    projector: Projector, images: Array, image: Array, activations: Arrays, dtype: type
) -> Arrays:
    """Project every filter of a layer in images of its own, each from its strongest unit there.

    `image` says which, int32 (filters, examples), -1 for none; `dtype` is that of the projections.

    Returns:
        All zero where there is no image: image, as given; value, the activation, and position, its row and
        column in the pooled map (filters, examples, 2); origin, row and column of the window's top left pixel
        in the image, negative where it crosses the border; projection (filters, examples, 3, size, size) in
        normalised pixels; patch, likewise, uint8, zero outside the image.
    """
    layer = LAYERS[projector.layer]
    maxima, positions = activations[f"{layer}_max"], activations[f"{layer}_position"]
    fires, filter_ = image.ravel() >= 0, np.repeat(np.arange(len(image)), image.shape[1])
    units = strongest_of(maxima, positions, image.ravel(), filter_)  # -1, none, takes the last image for now
    doing = f"{layer}, {image.shape[1]} images a filter"
    projections, origins = project_windows(projector, images, units, doing, dtype)
    windows = zip(units.image, origins, strict=True)
    size = projector.field.size
    patches = np.stack([crop(images[n], top, left, size, 0) for n, (top, left) in windows])
    arrays: Arrays = {"value": units.value, "position": np.stack(units[2:4], axis=1).astype(np.int16)}
    arrays |= {"origin": origins, "projection": projections, "patch": patches}
    for values in arrays.values():
        values[~fires] = 0
    # (units, ...) -> (filters, examples, ...)
    return {"image": image} | {name: of.reshape(*image.shape, *of.shape[1:]) for name, of in arrays.items()}


def project_top(images: Array, net: CNN, activations: Arrays, n_top: int, batch_size: int) -> Arrays:
    """Project every filter's strongest activations in `n_top` different images (Figure 2), and weaker ones.

    Returns for k = 1 to 4 what `project_examples` returns, as conv{k}_image and so on, and the same of the
    `percentile_images`, as conv{k}_level_image and so on; their projections are float16, to save memory.
    """
    arrays: Arrays = {}
    for k, layer in enumerate(LAYERS):
        projector, maxima = Projector(net, k, batch_size), activations[f"{layer}_max"]
        top = top_images(maxima, n_top)
        levels = percentile_images(maxima, top)
        for prefix, image, dtype in ((f"{layer}_level", levels, np.float16), (layer, top, np.float32)):
            examples = project_examples(projector, images, image, activations, dtype)
            arrays |= {f"{prefix}_{name}": values for name, values in examples.items()}
    return arrays


def describe_filters(maxima: Array, labels: Array, names: Sequence[str]) -> list[str]:
    """Say of each filter which class it prefers, how selectively, and how strong it gets."""
    means = by_class(np.mean, maxima, labels, len(names))
    preferred, selectivity = means.argmax(axis=0), class_selectivity(means).max(axis=0)
    texts = []
    for f, top in enumerate(maxima.max(axis=0)):
        about = f"{names[preferred[f]]}, selectivity {selectivity[f]:.2f}, activation {top:.2f}"
        texts.append(f"filter {f}: {about if top else 'dead'}")
    return texts


def draw_page(top: Arrays, layer: str, filters: Sequence[int], texts: Sequence[str], heading: str) -> Figure:
    """Draw the layout of the paper's Figure 2: projections of each filter, beside them the image patches.

    Of conv1, whose projections are the filter times the activation, one stands for all. Of projections grey
    is zero, with one scale for each filter; of patches white lies beyond the image. `top` is what
    `project_top` returned; `texts` are written above the filters of the layer, by number.
    """
    names = "patch", "projection", "origin"
    patches, projections, origins = (top[f"{layer}_{name}"][filters] for name in names)
    once, side, size = layer == LAYERS[0], math.ceil(patches.shape[1] ** 0.5), patches.shape[-1]
    columns, height = (6, 1.05) if once else (2, 2.6)  # of a page, and inches of a row
    rows, frame = math.ceil(len(filters) / columns), np.ones((1, IMAGE_SIZE, IMAGE_SIZE))
    layout: dict[str, Any] = {"figsize": (10, 0.6 + height * rows), "layout": "constrained"}
    fig: Figure
    fig, axes = plt.subplots(rows, columns, squeeze=False, **layout)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])  # hidden ticks would be placed all the same, a quarter of the time
        ax.axis("off")
    for k, (ax, number) in enumerate(zip(axes.flat, filters, strict=False)):
        inside = [crop(frame, top_row, left, size, 0) for top_row, left in origins[k]]
        pictures = np.where(inside, patches[k] / 255, 1)  # (images, 3, rows, columns)
        right_half, shown = tile(np.moveaxis(pictures, 1, 3), side, 1), displayed(projections[k])
        left_half = tile(shown, side, 1)
        if once:  # as large as the patches together; one that the border does not cut, if there is one
            factor, whole = len(right_half) // (size + 1), int(np.all(inside, axis=(1, 2, 3)).argmax())
            large = shown[whole].repeat(factor, axis=0).repeat(factor, axis=1)
            left_half = np.pad(large, ((1, factor), (1, factor), (0, 0)), constant_values=1)
        gap = np.ones((len(left_half), max(2, len(left_half) // 20), 3))
        ax.imshow(np.concatenate([left_half, gap, right_half], axis=1), interpolation="nearest")
        text = "\n".join(texts[number].split(", ")[:2]) if once else texts[number]
        ax.set_title(text, fontsize=8, pad=2)
    fig.suptitle(heading, fontsize=9)
    return fig


def draw_pages(top: Arrays, texts: dict[str, list[str]], heading: str, per_page: int, folder: Path) -> None:
    """Draw the top projections of every filter of every layer, `per_page` filters a picture, conv1 in one.

    Earlier pages go first: those of a network with more filters would otherwise stay among the new ones.
    """
    for page in folder.expanduser().glob("conv*_filters_*.png"):
        page.unlink()
    for layer in LAYERS:
        count, *_, window = top[f"{layer}_patch"].shape
        step = count if layer == LAYERS[0] else per_page
        for start in range(0, count, step):
            last = min(start + step, count) - 1
            text = f"{layer}, filters {start} to {last}, windows of {window} x {window} pixels\n{heading}"
            path = folder / f"{layer}_filters_{start:03d}_to_{last:03d}.png"
            save_figure(path, draw_page(top, layer, range(start, last + 1), texts[layer], text))


# ---------------------------------------------------------------- evolution of features (Figure 4)


def read_snapshots(folder: Path, checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return the network after some epochs of the training that ended in `checkpoint`, itself last."""
    paths = sorted(folder.expanduser().glob("epoch_*.pth"))
    snapshots = [load_checkpoint(path, checkpoint.net.mean.device) for path in paths]
    same_training = [s for s in snapshots if s.settings == checkpoint.settings]
    earlier = [s for s in same_training if 0 < s.epochs < checkpoint.epochs]
    return [*sorted(earlier, key=lambda s: s.epochs), checkpoint]


class Evolution(NamedTuple):
    """The strongest activation of some filters of a layer after each of several epochs."""

    filters: Array  # their numbers
    image: Array  # in which image it was, (filters, epochs)
    projections: Array  # (filters, epochs, 3, rows, columns)


def project_evolution(
    images: Array, snapshots: Sequence[Checkpoint], count: int, batch_size: int
) -> dict[str, Evolution]:
    """Project the strongest activations of `count` filters of each layer, evenly spaced by number."""
    widths = snapshots[-1].net.config["filters"]
    numbers = [np.unique(np.linspace(0, width - 1, count).astype(np.int64)) for width in widths]
    columns: list[list[tuple[Array, Array]]] = [[] for _ in LAYERS]
    for snapshot in snapshots:
        doing = f"epoch {snapshot.epochs}"
        activations = measure_activations(images, snapshot.net, batch_size, doing)
        for k, (layer, chosen) in enumerate(zip(LAYERS, numbers, strict=True)):
            maxima, positions = activations[f"{layer}_max"], activations[f"{layer}_position"]
            units = strongest_of(maxima, positions, maxima[:, chosen].argmax(axis=0), chosen)
            projector = Projector(snapshot.net, k, batch_size)
            projections, _ = project_windows(projector, images, units, f"{doing}, {layer}")
            columns[k].append((units.image, projections))
    evolution = {}
    for layer, chosen, parts in zip(LAYERS, numbers, columns, strict=True):
        image, projections = (np.stack(of, axis=1) for of in zip(*parts, strict=True))
        evolution[layer] = Evolution(chosen, image, projections)
    return evolution


def draw_evolution(evolution: dict[str, Evolution], epochs: Sequence[int], heading: str) -> Figure:
    """Draw what `project_evolution` returned: a row for each filter, a column for each epoch.

    Each panel has a scale of its own, since projections grow as the network learns. A line stands before a
    panel whose image is another one than before.
    """
    fig, axes = plt.subplots(2, 2, figsize=(10, 7.3), layout="constrained")
    for ax, (layer, (numbers, image, projections)) in zip(axes.flat, evolution.items(), strict=True):
        rows, columns, _, size, _ = projections.shape
        gap = max(1, size // 12)
        step, middle = size + gap, gap + size / 2 - 0.5
        panels = np.stack([displayed(panel) for panel in projections.reshape(-1, 3, size, size)])
        ax.imshow(tile(panels, columns, gap), interpolation="nearest")
        row, column = np.nonzero(np.diff(image, axis=1))
        above = row * step + gap - 0.5
        ax.vlines((column + 1) * step + gap / 2 - 0.5, above, above + size, "C1", linewidth=1.5)
        ax.set_xticks(np.arange(columns) * step + middle, [str(epoch) for epoch in epochs])
        ax.set_yticks(np.arange(rows) * step + middle, [str(number) for number in numbers])
        ax.set_title(f"{layer}, windows of {size} x {size} pixels")
        sns.despine(ax=ax, left=True, bottom=True)
    fig.supxlabel("epoch", size="medium")
    fig.supylabel("filter", size="medium")
    fig.suptitle(heading, fontsize=10)
    return fig


# ---------------------------------------------------------------- statistics of all projections of conv4


def magnitude_statistics(projections: Tensor) -> Tensor:
    """Return nonzero_count, mean, max and variance of each projection's magnitude, float32 (units, 4).

    The magnitude at a pixel is the sum over RGB of the absolute values. The mean is over the non-zero pixels,
    0 where there are none; the variance is over all pixels of the full frame, zero outside the given part
    of each window, (units, rows, columns, 3).
    """
    red, green, blue = projections.abs().unbind(dim=3)
    magnitude = (red + green + blue).flatten(1)  # a sum over so short a dimension takes four times as long
    # counted as a sum of signs: four times as fast as a comparison, and exact
    count, total, pixels = magnitude.sign().sum(dim=1), magnitude.sum(dim=1), IMAGE_SIZE**2
    frame_mean = total / pixels
    outside = pixels - magnitude.shape[1]
    # around the mean rather than from the mean of squares, which would lose digits
    squares = (magnitude - frame_mean[:, None]).square().sum(dim=1) + outside * frame_mean.square()
    mean = total / count.clamp(min=1)
    return torch.stack([count, mean, magnitude.amax(dim=1), squares / pixels], dim=1)


def measure_projections(
    images: Array, chosen: Array, activations: Arrays, net: CNN, batch_size: int
) -> Arrays:
    """Project every filter of conv4 in the `chosen` images from its strongest unit; measure the projections.

    Returns what `magnitude_statistics` does, by name, float32 (chosen images, filters) each; all 0 where the
    filter does not fire, which costs no projection.
    """
    maxima, positions = activations["conv4_max"], activations["conv4_position"]
    measured = np.zeros((len(chosen), maxima.shape[1], 4), np.float32)
    projector = Projector(net, len(LAYERS) - 1, batch_size)
    for start in range(0, len(chosen), 1000):  # all at once, millions of units would fill the memory
        some = chosen[start : start + 1000]
        entry, filter_ = np.nonzero(maxima[some] > 0)
        units = strongest_of(maxima, positions, some[entry], filter_)
        doing = f"projections of {start + len(some):,} of {len(chosen):,} images"
        for which, _, values in project_units(projector, images, units, doing, magnitude_statistics):
            measured[start + entry[which], filter_[which]] = values
    names = "nonzero_count", "mean", "max", "variance"
    return dict(zip(names, np.moveaxis(measured, 2, 0), strict=True))


def main() -> None:
    """Measure activations, project the top images of every filter, then measure all projections of conv4."""
    set_style()
    device = choose_device(DEVICE)
    checkpoint = load_checkpoint(CHECKPOINT, device)
    net, title = checkpoint.net, TITLES[checkpoint.dataset]
    snapshots = read_snapshots(CHECKPOINT.parent / "snapshots", checkpoint)  # early: one may be damaged
    images, labels = load_checkpoint_split(checkpoint, DATA_DIR, "test")
    count, searched = sum(net.config["filters"]), f"{len(images):,} test images of {title}"
    print(f"projecting {count} filters over {searched} on {device}, torch {torch.__version__}")
    activations = measure_activations(images, net, BATCH_SIZE, "activations")
    save_arrays(OUTPUTS / "activations.npz", checkpoint, labels=labels, **activations)
    for layer in LAYERS:
        fires = activations[f"{layer}_max"] > 0  # (images, filters)
        dead = int((~fires.any(axis=0)).sum())
        print(f"{layer}: {fires.shape[1]:>3} filters, {dead} dead, firing in {fires.mean():.1%} of images")

    top = project_top(images, net, activations, N_TOP, BATCH_SIZE)
    save_arrays(OUTPUTS / "projections.npz", checkpoint, **top)
    heading = f"top {N_TOP} of {searched}; grey is zero; {checkpoint.accuracy()}"
    # what only the files hold would take memory from here on
    top = {name: values for name, values in top.items() if "level" not in name}
    activations = {name: values for name, values in activations.items() if name.endswith(("max", "position"))}
    names = checkpoint.class_names
    texts = {layer: describe_filters(activations[f"{layer}_max"], labels, names) for layer in LAYERS}
    draw_pages(top, texts, heading, FILTERS_PER_PAGE, OUTPUTS / "deconv")
    del top  # its memory is needed for what follows

    evolution = project_evolution(images[:EVOLUTION_IMAGES], snapshots, EVOLUTION_FILTERS, BATCH_SIZE)
    heading = f"strongest activation in {len(images[:EVOLUTION_IMAGES]):,} test images of {title} after each "
    heading += f"epoch, projected; at the end {checkpoint.accuracy()}\ngrey is zero, each panel has its own "
    heading += "scale; an orange line: the strongest activation is now in another image"
    figure = draw_evolution(evolution, [snapshot.epochs for snapshot in snapshots], heading)
    save_figure(OUTPUTS / "feature_evolution.png", figure)

    place = pd.Series(labels).groupby(labels).cumcount()  # among the images of its class
    chosen, start = np.flatnonzero(place < (IMAGES_PER_CLASS or len(labels))), time.perf_counter()
    measure_projections(images, chosen[:64], activations, net, BATCH_SIZE)  # to know how long all will take
    minutes = (time.perf_counter() - start) * max(1, len(chosen) / 64) / 60
    print(f"pictures are ready; statistics of all projections of conv4 will take about {minutes:.1f} minutes")
    start = time.perf_counter()
    statistics = measure_projections(images, chosen, activations, net, BATCH_SIZE)
    seconds = time.perf_counter() - start
    count = int((statistics["max"] > 0).sum())
    print(f"{count:,} projections of conv4 in {seconds:.0f} s, {1e3 * seconds / max(count, 1):.3f} ms each")
    path = OUTPUTS / "projection_statistics.npz"
    save_arrays(path, checkpoint, labels=labels[chosen], image=chosen, **statistics)
    print("next: uv run analyse_projections.py")


if __name__ == "__main__":
    main()
