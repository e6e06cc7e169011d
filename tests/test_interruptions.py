"""A few interruptions of a few stages; tests/interruptions.py, run by hand, tries all of them often."""

import random
from pathlib import Path

import interruptions
import pytest


@pytest.mark.skipif(not hasattr(interruptions.os, "fork"), reason="the stages are run by forking")
def test_an_interrupted_stage_leaves_whole_files_and_the_next_run_ends_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    stages = ("load_data", "train_CNN", "deconv", "deconv_full")
    with interruptions.server() as runner:
        seconds = interruptions.prepare(runner, tmp_path, stages)
        for stage in ("train_CNN", "deconv_full"):
            seed = random.randrange(1 << 30)  # said below if it goes wrong
            counts, wrong = interruptions.try_stage(runner, tmp_path, stage, seconds[stage], 1, seed)
            assert not wrong, (seed, wrong)
            assert counts["survived"] == len(interruptions.KINDS)
