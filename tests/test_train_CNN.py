import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeNet

import train_CNN
from CNN import CNN, load_checkpoint
from load_data import Augmentation, Split, augment, normalise

GREY = [0.5] * 3
QUARTER = [0.25] * 3


@pytest.fixture
def quick(tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings for a run of seconds on the tiny set."""
    settings = {"EPOCHS": 3, "BATCH_SIZE": 16, "FILTERS": (4, 5, 6, 8), "DEVICE": "cpu", "DATASET": "stl10"}
    for name, value in settings.items():
        monkeypatch.setattr(train_CNN, name, value)


def weights() -> dict[str, torch.Tensor]:
    return load_checkpoint(Path("outputs/CNN.pth")).net.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_loss_and_accuracy_are_over_all_images_whatever_the_batches(make_net: MakeNet) -> None:
    net = make_net()
    images = torch.randint(0, 256, (503, 3, 96, 96), dtype=torch.uint8)  # 250 + 250 + 3
    labels = torch.randint(0, 10, (503,))
    found = train_CNN.evaluate(net, images, labels, GREY, QUARTER, torch.float32)
    logits = torch.cat([net(normalise(batch, GREY, QUARTER)) for batch in images.split(1)])
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert abs(found.accuracy - float((logits.argmax(1) == labels).sum()) / 503) <= 1 / 503
    assert int((found.predictions != logits.argmax(1)).sum()) <= 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_uses_evaluation_mode_and_gives_the_mode_back(make_net: MakeNet, training: bool) -> None:
    net = make_net().train(training)
    modes = []
    net.blocks[0].bn.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images, labels = torch.zeros(4, 3, 96, 96, dtype=torch.uint8), torch.zeros(4).long()
    train_CNN.evaluate(net, images, labels, GREY, QUARTER, torch.float32)
    assert modes == [False] and net.training == training
    assert same(before, net.state_dict())


def test_the_mirrored_measurement_averages_both_logits(make_net: MakeNet) -> None:
    net = make_net()
    net.classifier.weight *= 20  # logits that differ between images
    images = torch.randint(0, 256, (60, 3, 96, 96), dtype=torch.uint8)
    images[..., :48] = 0  # mirror images differ
    normalised = normalise(images, GREY, QUARTER)
    logits = (net(normalised) + net(normalised.flip(3))) / 2
    labels = torch.randint(0, 10, (60,))
    plain = train_CNN.evaluate(net, images, labels, GREY, QUARTER, torch.float32)
    found = train_CNN.evaluate(net, images, labels, GREY, QUARTER, torch.float32, mirrored=True)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert found.loss != pytest.approx(plain.loss, rel=1e-4)
    assert torch.equal(found.predictions, logits.argmax(dim=1))


def test_test_images_are_measured_now_and_then_which_changes_no_weight(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_CNN, "SNAPSHOTS", (1,))
    monkeypatch.setattr(train_CNN, "EPOCHS", 4)
    train_CNN.main()
    log, seldom = pd.read_csv("outputs/training_log.csv"), weights()
    assert log.loc[log["test_loss"].notna(), "epoch"].tolist() == [1, 4]  # a snapshot, and the last
    monkeypatch.setattr(train_CNN, "MEASURE_EVERY", 1)
    train_CNN.main()
    log = pd.read_csv("outputs/training_log.csv")
    assert log["test_loss"].notna().all() and same(seldom, weights())


def test_confusion_counts_true_classes_in_rows() -> None:
    labels, predictions = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
    assert train_CNN.confusion_matrix(labels, predictions, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_the_report_gives_accuracies_confusions_and_interval(capsys: pytest.CaptureFixture[str]) -> None:
    train_CNN.report(np.array([[90, 10], [30, 70]]), ["cat", "dog"])
    out = capsys.readouterr().out
    assert "cat           90.0%  (90 of 100)" in out and "dog           70.0%  (70 of 100)" in out
    assert "30 images of dog were taken for cat" in out
    # 0.8 +- 1.96 * sqrt(0.8 * 0.2 / 200) = 0.8 +- 0.0554
    assert "accuracy 80.00%, 95 % interval 74.46% to 85.54%" in out


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_CNN.main()
    first, log = weights(), pd.read_csv("outputs/training_log.csv")
    train_CNN.main()
    again = pd.read_csv("outputs/training_log.csv")
    assert same(first, weights())
    assert log.drop(columns="seconds").equals(again.drop(columns="seconds"))
    monkeypatch.setattr(train_CNN, "SEED", 1)
    train_CNN.main()
    assert not same(first, weights())


def interrupt_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Makes Ctrl-C arrive in the evaluation that follows some epochs."""
    right, calls = train_CNN.evaluate, []

    def evaluate(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        return right(*args, **options)

    monkeypatch.setattr(train_CNN, "evaluate", evaluate)


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_CNN.main()
    whole, log = weights(), pd.read_csv("outputs/training_log.csv")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(SystemExit, match="interrupted in epoch 3; 2 finished epochs are kept"):
            train_CNN.main()
    torch.manual_seed(99)  # what happened in between does not matter
    capsys.readouterr()
    train_CNN.main()
    assert "going on after epoch 2 of an interrupted run" in capsys.readouterr().out
    assert same(whole, weights())
    resumed = pd.read_csv("outputs/training_log.csv")
    assert log.drop(columns="seconds").equals(resumed.drop(columns="seconds"))
    assert not Path("outputs/training_state.pth").exists()


def test_changed_settings_start_anew(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(SystemExit):
            train_CNN.main()
    state, kept = Path("outputs/training_state.pth"), Path("outputs/training_state_before.pth")
    before, rate = state.read_bytes(), train_CNN.LEARNING_RATE
    monkeypatch.setattr(train_CNN, "LEARNING_RATE", 1e-3)
    train_CNN.main()
    assert "an interrupted run of 1 epochs had other settings: starting anew" in capsys.readouterr().out
    assert kept.read_bytes() == before and not state.exists()
    monkeypatch.setattr(train_CNN, "LEARNING_RATE", rate)
    kept.rename(state)
    train_CNN.main()
    assert "going on after epoch 1 of an interrupted run" in capsys.readouterr().out
    Path("outputs/training_state.pth").write_bytes(b"damaged")
    train_CNN.main()
    assert "cannot be read: starting anew" in capsys.readouterr().out


def test_the_last_epoch_is_saved_with_snapshots_and_a_row_an_epoch(quick: None) -> None:
    train_CNN.main()
    log = pd.read_csv("outputs/training_log.csv")
    assert log["epoch"].tolist() == [1, 2, 3]
    columns = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate", "seconds"]
    assert list(log.columns) == ["epoch", *columns]
    assert log.notna().all(axis=None)
    names = sorted(path.name for path in Path("outputs/snapshots").iterdir())
    assert names == ["epoch_001.pth", "epoch_002.pth", "epoch_003.pth"]
    last = load_checkpoint(Path("outputs/snapshots/epoch_003.pth"))
    final = load_checkpoint(Path("outputs/CNN.pth"))
    assert same(last.net.state_dict(), final.net.state_dict())
    assert (final.dataset, final.epochs, final.seed) == ("stl10", 3, 0)
    assert load_checkpoint(Path("outputs/snapshots/epoch_001.pth")).epochs == 1
    assert json.dumps(final.metrics)  # plain numbers


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_CNN, "LEARNING_RATE", 1e30)
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf) in epoch 1, step \d, learning rate .*: low"):
        train_CNN.main()
    assert not Path("outputs/CNN.pth").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EPOCHS", 0, "EPOCHS is 0; expected a whole number from 1 to 1,000,000"),
        ("SHAPES_EPOCHS", 0, "SHAPES_EPOCHS is 0; expected a whole number from 1 to 1,000,000"),
        ("MEASURE_EVERY", 0, "MEASURE_EVERY is 0; expected a whole number from 1"),
        ("BATCH_SIZE", 41, "BATCH_SIZE is 41; there are only 40 training images"),
        ("BATCH_SIZE", 1, "BATCH_SIZE is 1; expected a whole number from 2"),
        ("DROPOUT", 2, "DROPOUT is 2; expected a number from 0 to 1"),
        ("PARTIAL_IDENTITY", "no", "PARTIAL_IDENTITY is 'no'; expected True or False"),
        ("LEARNING_RATE", -1.0, "LEARNING_RATE is -1.0; expected a number of at least 1e-09"),
        ("KERNEL_SIZES", (5, 4, 3, 3), r"KERNEL_SIZES is \(5, 4, 3, 3\); expected odd numbers"),
        ("FILTERS", (8, 8, 8), r"FILTERS is \(8, 8, 8\); expected 4 whole numbers from 1 to 10,000"),
        ("POOL_SIZES", (4, 4, 4, 4), "make no network of four layers for images of 96 pixels"),
        ("STRIDES", (0, 1, 1, 1), r"STRIDES is \(0, 1, 1, 1\); expected 4 whole numbers from 1 to 96"),
        ("DATASET", "cifar", "DATASET is 'cifar'"),
        ("DEVICE", "abacus", "DEVICE is 'abacus'"),
        ("TRAIN_ON", "fold 10", "TRAIN_ON is 'fold 10'"),
        ("TRAIN_ON", "fold 1", "fold_indices.txt not found"),
        ("TRAIN_ON", 3, "TRAIN_ON is 3; expected"),
        ("EPOCHS", 1.5, "EPOCHS is 1.5; expected a whole number from 1 to"),
        ("EPOCHS", "75", "EPOCHS is '75'; expected a whole number from 1 to"),
        ("EPOCHS", True, "EPOCHS is True; expected a whole number"),
        ("BATCH_SIZE", 64.0, "BATCH_SIZE is 64.0; expected a whole number from 2 to"),
        ("LEARNING_RATE", 0, "LEARNING_RATE is 0; expected a number of at least 1e-09"),
        ("LEARNING_RATE", float("nan"), "LEARNING_RATE is nan; expected a number of at least 1e-09"),
        ("LEARNING_RATE", float("inf"), "LEARNING_RATE is inf; expected a number of at least 1e-09"),
        ("LEARNING_RATE", "3e-3", "LEARNING_RATE is '3e-3'; expected a number of at least 1e-09"),
        ("LEARNING_RATE", None, "LEARNING_RATE is None; expected a number"),
        ("WARM_UP", 2, "WARM_UP is 2; expected a number from 0 to 1"),
        ("LABEL_SMOOTHING", -0.1, "LABEL_SMOOTHING is -0.1; expected a number from 0 to 1"),
        ("SEED", -1, "SEED is -1; expected a whole number from 0 to 4,294,967,295"),
        ("SEED", 10**30, "SEED is 10{30}; expected a whole number from 0 to 4,294,967,295"),
        ("SEED", "zero", "SEED is 'zero'; expected a whole number from 0 to 4,294,967,295"),
        ("HEAD_SIZE", 10**6, "HEAD_SIZE is 1000000; expected a whole number from 1 to 96"),
        ("FILTERS", (8, 8, 8, 8, 8), "FILTERS is .*; expected 4 whole numbers from 1 to 10,000"),
        ("DROPOUT", "0.3", "DROPOUT is '0.3'; expected a number from 0 to 1"),
        ("HEAD_SIZE", [2], r"HEAD_SIZE is \[2\]; expected a whole number from 1 to 96"),
        ("EPOCHS", 10**400, "EPOCHS is 10{400}; expected a whole number"),
        ("FILTERS", 8, "FILTERS is 8; expected 4 whole numbers from 1 to 10,000"),
        ("FILTERS", (8, 0, 8, 8), r"FILTERS is \(8, 0, 8, 8\); expected 4 whole numbers from 1 to 10,000"),
        ("FILTERS", (8, 8, 8, -8), r"FILTERS is \(8, 8, 8, -8\); expected 4 whole numbers"),
        ("FILTERS", (8, 8, 8, 8.5), r"FILTERS is \(8, 8, 8, 8.5\); expected 4 whole numbers"),
        ("AUGMENTATION", None, r"AUGMENTATION is None; expected Augmentation\(...\)"),
        (
            "AUGMENTATION",
            Augmentation(-1, 0, 0, 0, 0),
            "AUGMENTATION.shift is -1; expected a number from 0 to 96",
        ),
        (
            "AUGMENTATION",
            Augmentation(1, -1, 0, 0, 0),
            "AUGMENTATION.zoom is -1; expected a number from 0 to 9",
        ),
        (
            "AUGMENTATION",
            Augmentation(1, 0, 900, 0, 0),
            "AUGMENTATION.rotation is 900; expected a number from 0 to 180",
        ),
        (
            "AUGMENTATION",
            Augmentation(1, 0, 0, float("nan"), 0),
            "AUGMENTATION.colour is nan; expected a number from 0 to 1",
        ),
        (
            "AUGMENTATION",
            Augmentation(0, 0, 0, 0, 0.5),  # type: ignore[arg-type]
            "AUGMENTATION.cutout is 0.5; expected a whole number",
        ),
        ("SNAPSHOTS", 40, "SNAPSHOTS is 40; expected epochs in brackets"),
        ("SNAPSHOTS", "12", "SNAPSHOTS is '12'; expected epochs in brackets"),
        ("SNAPSHOTS", (1, "2"), "an epoch in SNAPSHOTS is '2'; expected a whole number from 1 to"),
        ("CHECKPOINT", Path(), "CHECKPOINT is '.'; expected a file name that ends in .pth"),
        ("CHECKPOINT", 5, "CHECKPOINT is 5; expected a path"),
        ("DATA_DIR", None, "DATA_DIR is None; expected a path"),
    ],
)
def test_settings_out_of_range_are_refused(
    quick: None, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
) -> None:
    monkeypatch.setattr(train_CNN, name, value)
    with pytest.raises(SystemExit, match=message):
        train_CNN.main()
    assert not Path("outputs").exists()


@pytest.mark.parametrize("name", ["TRAIN_ON", "DEVICE", "EPOCHS", "CHECKPOINT"])
def test_settings_are_checked_before_any_download(
    quick: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(train_CNN, name, 0)
    monkeypatch.setattr(train_CNN, "find_dataset", None)  # not reached
    with pytest.raises(SystemExit, match=f"{name} is 0"):
        train_CNN.main()


def test_text_is_as_good_as_a_path(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("EPOCHS", 1), ("DATA_DIR", "data"), ("CHECKPOINT", "outputs/CNN.pth")):
        monkeypatch.setattr(train_CNN, name, value)
    train_CNN.main()
    assert load_checkpoint(Path("outputs/CNN.pth")).epochs == 1


@pytest.mark.parametrize("warm_up", [0, 1, 0.0, 1.0, 1 / 11, 0.1])
def test_every_share_of_warm_up_gives_a_schedule(warm_up: float) -> None:
    settings = {"seed": 0, "label_smoothing": 0, "weight_decay": 0, "augmentation": train_CNN.AUGMENTATION}
    settings |= {"learning_rate": 1, "warm_up": warm_up}
    cpu = torch.device("cpu")
    trainer = train_CNN.Trainer({"filters": (1, 1, 1, 1)}, cpu, torch.float32, 10, settings)
    rates = []
    for _ in range(10):
        rates.append(float(trainer.schedule.get_last_lr()[0]))
        trainer.optimizer.step()
        trainer.schedule.step()
    assert np.isfinite(rates).all() and max(rates) > 0.9
    assert int(np.argmax(rates)) in ((9,) if warm_up == 1 else (0, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged, expected 10 lines of equally many indices"),
        ("\x00\xff\n" * 10, "damaged, expected 10 lines"),
        ("1 2 3\n" * 9, "damaged, expected 10 lines"),
        ("1 2 3\n" * 9 + "1 2\n", "damaged, expected 10 lines"),
        ("1.5 2 3\n" * 10, "damaged, expected 10 lines"),
        (f"{10**30} 2 3\n" * 10, "damaged, expected 10 lines"),
        ("1 2 40\n" * 10, "indices from 1 to 40, expected different ones in each line, from 0 to 39"),
        ("-1 2 3\n" * 10, "indices from -1 to 3, expected different ones"),
        ("1 2 2\n" * 10, "indices from 1 to 2, expected different ones"),
    ],
)
def test_a_damaged_file_of_folds_is_refused(
    quick: None, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    Path("data/stl10_binary/fold_indices.txt").write_text(text, encoding="latin1")
    monkeypatch.setattr(train_CNN, "TRAIN_ON", "fold 1")
    with pytest.raises(
        SystemExit, match=f"fold_indices.txt .*{message}.*: take it from the published archive"
    ):
        train_CNN.main()


def test_a_training_on_one_class_or_with_one_image_left_over_ends_well(
    quick: None, write_split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    write_split("train", rng.integers(0, 256, (33, 3, 96, 96)), np.full(33, 4))  # two batches of 16 and 1
    monkeypatch.setattr(train_CNN, "EPOCHS", 1)
    train_CNN.main()
    assert load_checkpoint(Path("outputs/CNN.pth")).epochs == 1


def test_until_a_training_ends_the_files_of_the_earlier_one_stay_together(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_CNN.main()
    names = ("CNN.pth", "training_log.csv", "training_curves.png", "confusion_matrix.png")
    before = {name: (Path("outputs") / name).read_bytes() for name in names}
    monkeypatch.setattr(train_CNN, "SEED", 1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        with pytest.raises(SystemExit, match="interrupted in epoch 1; no finished epoch yet"):
            train_CNN.main()
    assert len(list(Path("outputs/snapshots").iterdir())) == 3  # nothing is lost before an epoch is won
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(SystemExit, match="interrupted in epoch 3; 2 finished epochs are kept"):
            train_CNN.main()
    assert {name: (Path("outputs") / name).read_bytes() for name in names} == before
    assert len(list(Path("outputs/snapshots").iterdir())) == 2  # of the new one
    train_CNN.main()
    assert load_checkpoint(Path("outputs/CNN.pth")).seed == 1


def spoil(state: dict[str, Any], what: str) -> Any:
    """A state as a damaged, foreign or older file could hold it."""
    if what == "no dict":
        return [1, 2]
    if what == "no rows":
        return {**state, "rows": []}
    if what == "other rows":
        return {**state, "rows": 3}
    if what == "other weights":
        return {**state, "net": {"weight": torch.zeros(3)}}
    if what == "other random state":
        return {**state, "generator": torch.zeros(3)}
    if what == "other optimiser":
        return {**state, "optimizer": {}}
    return {key: value for key, value in state.items() if key != "schedule"}


def test_a_state_that_does_not_fit_is_not_taken_up(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_CNN, "EPOCHS", 2)
    train_CNN.main()
    right = weights()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(SystemExit):
            train_CNN.main()
    path = Path("outputs/training_state.pth")
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    spoilt = [
        whole[:-100],
        whole[: len(whole) // 2],
        whole[len(whole) // 2 :],
        b"",
        b"\x80\x04.",
        b"PK\x03\x04",
    ]
    whats = ["no dict", "no rows", "other rows", "other weights", "other random state", "other optimiser", ""]
    for what in whats:
        torch.save(spoil(state, what), path)
        spoilt.append(path.read_bytes())
    settings = json.loads(state["settings"])

    def start() -> train_CNN.Trainer:
        augmentation = Augmentation(*settings["augmentation"])
        some = {**settings, "augmentation": augmentation}
        return train_CNN.Trainer(settings["config"], torch.device("cpu"), torch.float32, 4, some)

    for content in spoilt:
        path.write_bytes(content)
        trainer, rows = train_CNN.resume(path, settings, start)
        assert rows == [] and "cannot be read: starting anew" in capsys.readouterr().out
        assert same(trainer.net.state_dict(), start().net.state_dict())  # nothing of the file is in it
    train_CNN.main()
    assert same(right, weights())


def test_validation_images_are_a_fifth_of_each_class_and_not_trained_on() -> None:
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    whole = Split(images, np.arange(50) % 5)
    train, held_out = train_CNN.part_of_training(whole, whole, "validation", Path("none"))
    assert np.bincount(held_out.labels).tolist() == [2] * 5 and np.bincount(train.labels).tolist() == [8] * 5
    assert not set(train.images.ravel()) & set(held_out.images.ravel())


def test_a_fold_is_a_line_of_the_published_file() -> None:
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    whole = Split(images, np.arange(50) % 5)
    Path("fold_indices.txt").write_text("\n".join(f"{k} {k + 10} {k + 20}" for k in range(10)))
    train, test = train_CNN.part_of_training(whole, whole, "fold 3", Path("fold_indices.txt"))
    assert train.images.ravel().tolist() == [3, 13, 23] and test is whole


def test_augmentation_of_no_strength_flips_or_leaves_alone() -> None:
    images = torch.randn(64, 3, 32, 32)
    nothing = Augmentation(shift=0, zoom=0, rotation=0, colour=0, cutout=0)
    changed = augment(images, nothing, torch.Generator().manual_seed(0))
    kept = (changed - images).abs().amax((1, 2, 3)) < 1e-5
    flipped = (changed - images.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (kept ^ flipped).all() and 10 < int(kept.sum()) < 54


def test_augmentation_differs_between_images_and_repeats_with_the_seed() -> None:
    images = torch.randn(1, 3, 32, 32).expand(8, 3, 32, 32)
    strength = Augmentation(shift=4, zoom=0.2, rotation=10, colour=0.2, cutout=0)
    first, again = (augment(images, strength, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert len({float(image.sum()) for image in first}) == 8


def test_a_shift_moves_by_no_more_than_its_pixels() -> None:
    images = torch.zeros(200, 3, 33, 33)
    images[:, :, 16, 16] = 1
    strength = Augmentation(shift=5, zoom=0, rotation=0, colour=0, cutout=0)
    moved = augment(images, strength, torch.Generator().manual_seed(0)).mean(dim=1)
    mass = moved.sum(dim=(1, 2))
    assert mass == pytest.approx(torch.ones(200), abs=1e-4)
    rows = (moved.sum(dim=2) * torch.arange(33)).sum(dim=1) - 16
    assert 4 < float(rows.abs().max()) <= 5.01 and abs(float(rows.mean())) < 0.7


def test_cutout_blanks_one_square_of_each_image() -> None:
    images = torch.ones(100, 3, 32, 32)
    strength = Augmentation(shift=0, zoom=0, rotation=0, colour=0, cutout=8)
    blanked = (augment(images, strength, torch.Generator().manual_seed(0)) == 0).all(dim=1)
    sizes = blanked.sum(dim=(1, 2))
    assert int(sizes.max()) == 64 and int(sizes.min()) >= 16  # a quarter stays if the centre is in a corner


def test_batch_size_two_and_one_epoch_work(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_CNN, "EPOCHS", 1)
    monkeypatch.setattr(train_CNN, "BATCH_SIZE", 2)
    train_CNN.main()
    assert isinstance(load_checkpoint(Path("outputs/CNN.pth")).net, CNN)


@pytest.fixture
def make_trainer() -> Any:
    """Makes trainers of a small network without dropout and augmentation, for two steps."""

    def make(**changed: Any) -> train_CNN.Trainer:
        nothing = Augmentation(shift=0, zoom=0, rotation=0, colour=0, cutout=0)
        settings = {"seed": 0, "label_smoothing": 0.0, "augmentation": nothing, "weight_decay": 0.05}
        settings |= {"learning_rate": 1e-2, "warm_up": 0.5, **changed}
        config = {"filters": (4, 5, 6, 8), "dropout": 0.0}
        return train_CNN.Trainer(config, torch.device("cpu"), torch.float32, 2, settings)

    return make


def test_filters_and_classifier_are_decayed_and_batch_norm_is_not(make_trainer: Any) -> None:
    trainer = make_trainer()
    decayed, others = ({id(p) for p in group["params"]} for group in trainer.optimizer.param_groups)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.05, 0]
    for name, parameter in trainer.net.named_parameters():
        wanted = name.endswith("weight") and ".bn." not in name
        assert (id(parameter) in decayed, id(parameter) in others) == (wanted, not wanted), name


def test_the_loss_is_smoothed_and_every_step_moves_the_weights_and_the_rate(make_trainer: Any) -> None:
    images = torch.randint(0, 256, (8, 3, 96, 96), dtype=torch.uint8)
    labels = torch.arange(8)
    arguments = images, labels, GREY, QUARTER
    losses = {}
    for smoothing in (0.0, 0.5, 1.0):
        trainer = make_trainer(label_smoothing=smoothing)
        before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
        losses[smoothing] = trainer.epoch(*arguments, 8).loss  # one step, from the same weights
        assert not same(before, trainer.net.state_dict()) and trainer.schedule.last_epoch == 1
    assert losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2, rel=1e-4)  # it is linear
    assert losses[0.0] != pytest.approx(losses[1.0], rel=1e-3)
    trainer.epoch(*arguments, 8)
    assert trainer.schedule.get_last_lr()[0] < 1e-6  # the last step ends the cosine
