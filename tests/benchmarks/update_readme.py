"""Make the files of outputs/readme/ anew from the runs in outputs/ and in the folders it is compared with.

Run:    uv run python tests/benchmarks/update_readme.py
Reads:  outputs/, after all stages, with the comparison of three seeds in outputs/comparison.csv
Writes: outputs/readme/: the figures, trained/, live.html, comparison.csv, and the tables in RESULTS.md

A table of RESULTS.md stands between two comments that name it, and is replaced as a whole.
tests/test_conventions.py holds the tables to comparison.csv.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
from PIL import Image

from CNN import load_checkpoint
from deconv import first_of_each_class, write_live_page
from load_data import load_checkpoint_split

OUTPUTS = Path("outputs")
README = OUTPUTS / "readme"
FIGURES = {  # name in outputs/readme: file in outputs
    "ablation.png": "ablation.png",
    "class_2_car.png": "heatmaps/class_2_car.png",
    "class_filter_heatmap.png": "heatmaps/class_filter_heatmap.png",
    "conv1_filters.png": "conv1_filters.png",
    "deconv_image.png": "deconv_image.png",
    "feature_evolution.png": "feature_evolution.png",
    "invariance.png": "heatmaps/invariance.png",
    "occlusion.png": "heatmaps/occlusion.png",
    "probes.png": "probes.png",
    "specialisation.png": "specialisation.png",
    "training_curves.png": "training_curves.png",
    "trust.png": "trust.png",
}
PAGE = "deconv/conv4_filters_032_to_047.png"  # an example of the pages of deconv_full.py
SEEDS = ("seed 0", "seed 1", "seed 2")  # the columns of comparison.csv, in order


class Row(NamedTuple):
    """A row of table A."""

    text: str  # what is written first
    name: str  # of the quantity in comparison.csv
    layer: str = "conv4"
    control: str = ""  # name of the quantity that it is compared with
    control_text: str = ""


OWN = "the network's own classifier"
UNTRAINED = "probe on untrained features"
MOST = "filters whose ablation hurts their preferred class most"
NETWORK = [
    Row("test accuracy", "test accuracy", layer=""),
    Row(
        "the same, averaged over the image and its mirror image",
        "test accuracy, averaged over the image and its mirror image",
        layer="",
    ),
    Row(
        "test accuracy of a linear probe on conv4",
        "test accuracy of a linear probe, trained network",
        control="test accuracy of a linear probe, untrained network",
        control_text="untrained network",
    ),
    Row("dead filters of conv4, of 256", "dead filters"),
    Row(
        "selectivity, median over the filters of conv4",
        "selectivity, median over filters, trained network",
        control="selectivity, median over filters, untrained network",
        control_text="untrained network",
    ),
    Row(
        "AUC, median over the filters of conv4",
        "auc, median over filters, trained network",
        control="auc, median over filters, untrained network",
        control_text="untrained network",
    ),
    Row(
        "loss increase of the preferred class under mean ablation",
        f"loss increase of the preferred class: {OWN}",
        control=f"loss increase of the preferred class: {UNTRAINED}",
        control_text=UNTRAINED,
    ),
    Row(
        "size of the loss increase of each other class, up or down",
        f"size of the loss increase of each other class: {OWN}",
        control=f"size of the loss increase of each other class: {UNTRAINED}",
        control_text=UNTRAINED,
    ),
    Row(MOST, f"{MOST}: {OWN}", control=f"{MOST}: {UNTRAINED}", control_text=UNTRAINED),
    Row(
        "the same if preferred classes were shuffled among the filters",
        f"{MOST}: {OWN}, preferred classes shuffled",
        control=f"{MOST}: {UNTRAINED}, preferred classes shuffled",
        control_text=UNTRAINED,
    ),
]
METHODS = (
    "projection",
    "guided backpropagation",
    "gradient",
    "edges x window profile",
    "other filter, same window",
    "centre",
    "chance",
)
SHARES = ("10 %", "25 %")
CONDITIONS = (
    "random conv4",
    "other filter, same window",
    "random conv4 to conv3",
    "random conv4 to conv2",
    "random conv4 to conv1",
    "edges of the image",
    "same filter, other top-9 example",
    "other filter, its top-9 example",
    "same filter, other image",
    "other filter, other image",
)


Comparison = dict[tuple[str, str], dict[str, str]]  # by name and layer: unit and one cell a seed


def read_comparison(path: Path) -> Comparison:
    """Read comparison.csv of outputs/ or of outputs/readme/, where its columns are called by seed."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not set(SEEDS) <= set(table.columns):
        known = ("name", "layer", "unit", "apart", "checkpoint", "dataset")
        runs = [column for column in table.columns if column not in known]
        table = table.rename(columns=dict(zip(runs, SEEDS, strict=True)))

    comparison: Comparison = {}
    for record in table.to_dict("records"):
        row = {str(key): str(value) for key, value in record.items()}
        comparison[row["name"], row["layer"]] = row
    return comparison


def number(cell: str) -> float:
    """Return the value of a cell such as `0.25 (0.24 to 0.27)`."""
    return float(cell.split(" ")[0].replace(",", ""))


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_network(comparison: Comparison) -> str:
    """Return table A: the network and its filters, seed by seed, and what they are compared with."""
    lines = []
    for row in NETWORK:
        cells = comparison[row.name, row.layer]
        unit = f" ({cells['unit']})" if cells["unit"] not in ("", "filters") else ""
        others = [cells[seed].split(" (")[0] for seed in SEEDS[1:]]
        compared = ""
        if row.control:
            compared = f"{row.control_text}: {comparison[row.control, row.layer]['seed 0']}"
        lines.append([f"{row.text}{unit}", cells["seed 0"], *others, compared])
    return as_markdown(["", "seed 0 (95 % interval)", "seed 1", "seed 2", "compared with (seed 0)"], lines)


def is_as_good(test: str, difference: str) -> bool:
    """Return whether a method is as good as the projection, or better, by a cell of paired differences."""
    limits = re.search(r"\((\S+) to (\S+)\)", difference)
    assert limits, difference
    low = float(limits[1])
    high = float(limits[2])
    return low <= 0 if test == "insertion" else high >= 0


def table_masks(comparison: Comparison) -> str:
    """Return table B: insertion and deletion, a row a method; in bold what the projection does not beat."""
    columns = [(test, share) for test in ("insertion", "deletion") for share in SHARES]
    rows = []
    for method in METHODS:
        cells = [method]
        for test, share in columns:
            cell = comparison[f"{test}, {share} of the window: {method}", "conv4"]["seed 0"]
            name = f"{test} difference, {share} of the window: projection minus {method}"
            as_good = method == "projection" or is_as_good(test, comparison[name, "conv4"]["seed 0"])
            cells.append(f"**{cell}**" if as_good else cell)
        rows.append(cells)
    arrows = {"insertion": "higher is better ↑", "deletion": "lower is better ↓"}
    header = [f"{test}, {share} ({arrows[test]})" for test, share in columns]
    return as_markdown(["blocks ranked by", *header], rows)


def table_differences(comparison: Comparison) -> str:
    """Return the table of paired differences, projection minus method, and of the pixels in common."""
    columns = [(test, share) for test in ("insertion", "deletion") for share in SHARES]
    rows = []
    for method in METHODS[1:]:
        names = [
            f"{test} difference, {share} of the window: projection minus {method}" for test, share in columns
        ]
        names += [f"overlap, {SHARES[0]} of the window: {method}"]
        rows.append([method, *(comparison[name, "conv4"]["seed 0"] for name in names)])
    header = [f"{test}, {share}" for test, share in columns]
    return as_markdown(["projection minus", *header, f"common pixels of the {SHARES[0]} (%)"], rows)


def table_similarity(comparison: Comparison) -> str:
    """Return table C: how alike projections in one window are, a row a condition, seed by seed."""
    rows = []
    for condition in CONDITIONS:
        row = comparison[f"partial rank correlation with the unit's projection: {condition}", "conv4"]
        others = [row[seed].split(" (")[0] for seed in SEEDS[1:]]
        rows.append([condition, row["seed 0"], *others])
    header = ["a unit's projection compared with", "partial rank correlation, seed 0 (95 % interval)"]
    return as_markdown([*header, "seed 1", "seed 2"], rows)


TABLES = {
    "network": table_network,
    "masks": table_masks,
    "differences": table_differences,
    "similarity": table_similarity,
}


def differing_rows(comparison: Comparison) -> list[str]:
    """Return the quantities whose value of seed 1 or 2 lies outside the 95 % interval of seed 0."""
    names = []
    for row in comparison.values():
        limits = re.search(r"\((\S+) to (\S+)\)", row["seed 0"])
        if limits and all(row[seed] for seed in SEEDS):
            low = float(limits[1])
            high = float(limits[2])
            if not all(low <= number(row[seed]) <= high for seed in SEEDS[1:]):
                names.append(f"{row['name']}, {row['layer']}".removesuffix(", "))
    return names


def insert_tables(text: str, comparison: Comparison) -> str:
    """Return RESULTS.md with each table replaced by the one that comparison.csv gives."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(\n<!-- end -->)"
        table = make(comparison)
        text, count = re.subn(pattern, lambda match: match[1] + table + match[2], text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise SystemExit(f"RESULTS.md has {count} places for the table {name}")
    return text


def main() -> None:
    """Copy figures and the trained network, write the live page, replace the tables."""
    checkpoint = load_checkpoint(OUTPUTS / "CNN.pth")
    test = load_checkpoint_split(checkpoint, "data", "test")
    pictures = first_of_each_class(checkpoint, test)
    write_live_page(README / "live.html", checkpoint, pictures, "../explorer/index.html")

    (README / "trained/snapshots").mkdir(parents=True, exist_ok=True)
    for name in ("CNN.pth", "snapshots/epoch_000.pth"):
        shutil.copyfile(OUTPUTS / name, README / "trained" / name)
    for name, source in FIGURES.items():
        shutil.copyfile(OUTPUTS / source, README / name)
    with Image.open(OUTPUTS / PAGE) as page:  # in half its size
        page.reduce(2).save(README / "conv4_filters.png", optimize=True)
    comparison = read_comparison(OUTPUTS / "comparison.csv")
    table = pd.DataFrame(comparison.values())[["name", "layer", "unit", *SEEDS]]
    table.to_csv(README / "comparison.csv", index=False, lineterminator="\n")
    path = README / "RESULTS.md"
    path.write_text(insert_tables(path.read_text(encoding="utf-8"), comparison), encoding="utf-8")
    differing = differing_rows(comparison)
    count = sum("(" in row["seed 0"] for row in comparison.values())
    print(f"{count} quantities with an interval; outside it with seed 1 or 2: {len(differing)}")
    print("\n".join(differing))


if __name__ == "__main__":
    main()
