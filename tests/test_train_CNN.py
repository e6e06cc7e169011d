import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, MakeNet
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

import load_data
import train_CNN
from CNN import CNN, load_checkpoint
from load_data import Split, augment, load_split, load_table, mean_and_std
from train_CNN import Trainer, confusion_matrix, evaluate, part_of_training

ROOT = Path(__file__).parent.parent
OUTPUTS, CHECKPOINT = Path("outputs"), Path("outputs/CNN.pth")
QUICK = {"EPOCHS": 3, "BATCH_SIZE": 16, "FILTERS": (4, 5, 6, 8), "DEVICE": "cpu", "SNAPSHOTS": (1, 3)}
MakeTrainer = Callable[..., Trainer]
CPU = torch.device("cpu")


@pytest.fixture
def quick(tiny_stl10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings for a run of a fraction of a second on the tiny set, without figures."""
    for name, value in QUICK.items():
        monkeypatch.setattr(train_CNN, name, value)
    monkeypatch.setattr(train_CNN, "draw_confusion", lambda *_: plt.figure())
    monkeypatch.setattr(train_CNN, "draw_curves", lambda *_: plt.figure())
    monkeypatch.setattr(train_CNN, "save_figure", lambda _, figure: plt.close(figure))


def weights(name: str = "CNN.pth") -> dict[str, Tensor]:
    return load_checkpoint(OUTPUTS / name).net.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def run() -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Train; return the weights and the log without what differs between equal runs."""
    train_CNN.main()
    log = load_table(OUTPUTS / "training_log.csv", load_checkpoint(CHECKPOINT))
    return weights(), log.drop(columns="seconds")


def state_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in OUTPUTS.glob("training_state_*.pth")}


def snapshots() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (OUTPUTS / "snapshots").iterdir()}


def numbered(count: int) -> Split:
    """Return images that hold their number, in five classes."""
    return Split(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(count) % 5)


def patchwork(count: int) -> Split:
    """Return images of 36 squares of random colours, so that activations differ between images."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (count, 3, 6, 6), np.uint8)
    return Split(squares.repeat(16, axis=2).repeat(16, axis=3), rng.integers(0, 10, count))


def test_validation_images_are_a_fifth_of_each_class_and_not_trained_on() -> None:
    train, held_out, name = part_of_training(numbered(50), numbered(5), "validation", Path("none"))
    assert name == "validation"
    assert np.bincount(train.labels).tolist() == [8] * 5 and np.bincount(held_out.labels).tolist() == [2] * 5
    images = [split.images.ravel() for split in (train, held_out)]
    assert sorted(np.concatenate(images).tolist()) == list(range(50))
    assert all(
        (part % 5 == split.labels).all() for part, split in zip(images, (train, held_out), strict=True)
    )


def test_a_fold_is_a_line_of_the_published_file_and_is_measured_on_the_test_images() -> None:
    lines = "\n".join(f"{k} {k + 10} {k + 20} \n" for k in range(10))  # with blank lines between
    Path("folds.txt").write_text(f"\ufeff{lines}", encoding="utf-8")
    train, measured, name = part_of_training(numbered(50), numbered(5), "fold 3", Path("folds.txt"))
    assert train.images.ravel().tolist() == [3, 13, 23] and train.labels.tolist() == [3, 3, 3]
    assert len(measured.images) == 5 and name == "test"
    assert [len(split.images) for split in part_of_training(train, measured, "all", Path())[:2]] == [3, 5]


@pytest.mark.parametrize(
    "text", [None, "1 2 50\n" * 10, "1 2 3\n" * 9, "1 2 3\n" * 9 + "1 2\n", "a b\n" * 10]
)
def test_a_missing_or_damaged_file_of_folds_is_refused(text: str | None) -> None:
    if text:
        Path("folds.txt").write_text(text)
    with pytest.raises(
        SystemExit, match=r"^folds.txt cannot be read \(.*\): take it from the published arch"
    ):
        part_of_training(numbered(50), numbered(5), "fold 9", Path("folds.txt"))


def sharpen(net: CNN, split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """Make classes differ between images; return images, logits of one image at a time and labels."""
    images, labels = net.normalise(torch.from_numpy(split.images)), torch.from_numpy(split.labels)
    net.classifier.weight /= net(images).std(dim=0).mean()
    net.classifier.bias.sub_(net(images).mean(dim=0))
    return images, torch.cat([net(image) for image in images.split(1)]), labels


def test_loss_and_accuracy_are_over_all_images_whatever_the_batches(make_net: MakeNet) -> None:
    net, split = make_net(), patchwork(103)  # 50 + 50 + 3
    _, logits, labels = sharpen(net, split)
    result, predicted = evaluate(net, split), logits.argmax(dim=1)
    assert len(predicted.unique()) > 5
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert torch.equal(result.predictions, predicted)
    assert result.accuracy == pytest.approx(float((predicted == labels).sum()) / 103)


def test_the_mirrored_measurement_averages_both_logits(make_net: MakeNet) -> None:
    net, split = make_net(), patchwork(60)
    images, logits, labels = sharpen(net, split)
    both = (logits + net(images.flip(3))) / 2
    mirrored = evaluate(net, split, mirrored=True)
    assert mirrored.loss == pytest.approx(float(F.cross_entropy(both, labels)), rel=1e-4)
    assert mirrored.loss != pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-2)
    assert torch.equal(mirrored.predictions, both.argmax(dim=1))


def test_measuring_uses_evaluation_mode_and_changes_nothing(make_net: MakeNet) -> None:
    net = make_net().train()
    modes: list[bool] = []
    net.blocks[0].bn.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluate(net, patchwork(4))
    assert modes == [False] and same(before, net.state_dict())


def test_confusion_counts_true_classes_in_rows() -> None:
    labels, predictions = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
    counts = confusion_matrix(labels, predictions, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]


def test_the_figure_of_the_confusions_has_shares_of_the_true_class_in_per_cent() -> None:
    figure = train_CNN.draw_confusion(np.array([[3, 1], [0, 0]]), ["cat", "dog"], "heading")
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "0", "0"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("predicted class", "true class")
    plt.close(figure)


def test_the_figure_of_many_confusions_has_no_numbers() -> None:
    for classes, numbers in ((15, 15 * 15), (16, 0)):
        names = [f"class {number}" for number in range(classes)]
        figure = train_CNN.draw_confusion(np.eye(classes, dtype=np.int64), names, "heading")
        assert len(figure.axes[0].texts) == numbers
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == names
        plt.close(figure)


def test_the_report_gives_accuracies_confusions_and_interval(capsys: pytest.CaptureFixture[str]) -> None:
    train_CNN.report(np.array([[90, 10], [30, 70]]), ["cat", "dog"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["cat", "90.0", "%", "90", "100"] in rows and ["dog", "70.0", "%", "70", "100"] in rows
    assert "30 images of dog were taken for cat" in out
    # Wilson's ends are where (share - 0.8)^2 = 1.96^2 share (1 - share) / 200
    low, high = np.sort(np.roots([1 + 1.96**2 / 200, -(1.6 + 1.96**2 / 200), 0.64]))
    assert f"accuracy 80.00 % (95 % interval {100 * low:.2f} % to {100 * high:.2f} %)" in out


@pytest.fixture
def make_trainer() -> MakeTrainer:
    """Makes trainers of a small network without dropout and augmentation, for two epochs of one step."""

    def make(data: Split | None = None, device: str = "cpu", **changed: Any) -> Trainer:
        settings: dict[str, Any] = {"seed": 0, "label_smoothing": 0.0, "augmentation": {}}
        settings |= {"learning_rate": 1e-2, "filter_rate": 0.1, "warm_up": 0.5, "weight_decay": 0.05}
        settings |= {"batch_size": 8, "epochs": 2}
        settings |= {"network": {"filters": (4, 5, 6, 8), "dropout": 0.0}}
        return Trainer(data or patchwork(12), settings | changed, torch.device(device), torch.float32)

    return make


def test_a_channel_that_is_the_same_in_all_images_or_black_images_can_be_trained_on(
    make_trainer: MakeTrainer,
) -> None:
    images, labels, _ = patchwork(12)
    images[:, 1] = 200
    for data in (Split(images, labels), Split(np.zeros_like(images), labels)):
        trainer = make_trainer(data)
        assert all(np.isfinite(trainer.epoch().loss) for _ in range(2))


def test_a_loss_that_is_nan_at_once_is_the_fault_of_the_images(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.net.std.fill_(torch.nan)  # whatever it is that would make it so
    with pytest.raises(SystemExit, match=r"^the loss of a batch is nan: look at the images in DATA_DIR$"):
        trainer.epoch()


@pytest.mark.parametrize("device", DEVICES)
def test_a_stored_state_goes_on_in_the_same_way(make_trainer: MakeTrainer, device: str) -> None:
    network = {"filters": (4, 5, 6, 8), "dropout": 0.5}
    trainer = make_trainer(device=device, network=network)
    trainer.epoch()
    torch.save(trainer.state(), "state.pth")
    expected = trainer.epoch().loss
    torch.manual_seed(99)
    again = make_trainer(device=device, network=network)
    again.restore(torch.load("state.pth", map_location="cpu", weights_only=True))
    assert again.epoch().loss == expected
    assert {value.device.type for value in again.net.state_dict().values()} == {device}


def test_muon_moves_the_filters_and_the_classifier_alone_is_decayed(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    muon, adamw = trainer.optimizers
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.05, 0]
    groups = [{id(p) for p in group["params"]} for o in (muon, adamw) for group in o.param_groups]
    for name, parameter in trainer.net.named_parameters():
        expected = 0 if "conv" in name else 1 if name == "classifier.weight" else 2
        assert [id(parameter) in group for group in groups] == [k == expected for k in range(3)], name


def test_a_parameter_that_no_optimiser_trains_is_named(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_network = train_CNN.build_network

    def build_with_biases(config: dict[str, Any]) -> CNN:
        net = build_network(config)
        for block, requires_grad in zip(net.blocks, (False, True, True, False), strict=True):
            bias = torch.zeros(block.conv.out_channels)
            block.conv.bias = torch.nn.Parameter(bias, requires_grad)  # one that is frozen may be untrained
        return net

    monkeypatch.setattr(train_CNN, "build_network", build_with_biases)
    expected = "no optimiser trains blocks.1.conv.bias, blocks.2.conv.bias: add them in build_optimizers"
    with pytest.raises(SystemExit, match=f"^{expected}$"):
        make_trainer()


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_orthogonalising_is_three_newton_schulz_steps(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, dtype=torch.float64)
    x = matrix / matrix.norm()
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    torch.testing.assert_close(train_CNN.orthogonalise(matrix), x, rtol=1e-5, atol=1e-6)


def test_a_step_of_muon_by_hand() -> None:
    # filters along the axes; their gradient has orthogonal rows of equal length, which stay as they are
    filters = torch.nn.Parameter(torch.tensor([[2.0, 0, 0], [0, 3.0, 0]])[..., None, None])
    muon = train_CNN.Muon([filters], lr=0.1)
    for _ in range(2):
        filters.grad = torch.tensor([[0.0, 0, 5.0], [5.0, 0, 0]])[..., None, None]
        before = filters.detach().flatten(1) / filters.detach().flatten(1).norm(dim=1, keepdim=True)
        muon.step()
        expected = before - 0.1 * torch.tensor([[0.0, 0, 1], [1, 0, 0]])
        torch.testing.assert_close(filters.detach().flatten(1), expected, rtol=1e-5, atol=1e-5)


def test_muon_looks_ahead_along_the_mean_of_the_gradients() -> None:
    filters = torch.nn.Parameter(torch.eye(2)[..., None, None])
    muon, gradients = train_CNN.Muon([filters], lr=0.1, momentum=0.9), torch.randn(2, 2, 2)
    velocity = torch.zeros(2, 2)
    for gradient in gradients:
        filters.grad = gradient[..., None, None]
        velocity = 0.9 * velocity + 0.1 * gradient
        before = filters.detach()[..., 0, 0] / filters.detach()[..., 0, 0].norm(dim=1, keepdim=True)
        muon.step()
        direction = train_CNN.orthogonalise(0.1 * gradient + 0.9 * velocity)
        expected = before - 0.1 * direction * 2**0.5 / direction.norm()
        torch.testing.assert_close(filters.detach()[..., 0, 0], expected)


def test_smoothing_changes_the_step_and_not_the_reported_loss(make_trainer: MakeTrainer) -> None:
    losses, weights = [], []
    for smoothing in (0.0, 0.5):
        trainer = make_trainer(label_smoothing=smoothing)
        before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
        losses.append(trainer.epoch().loss)  # one step, from the same weights
        weights.append(trainer.net.classifier.weight.detach().clone())
        assert not same(before, trainer.net.state_dict())
        assert [schedule.last_epoch for schedule in trainer.schedules] == [1, 1]
    assert losses[0] == losses[1] and not torch.equal(*weights)
    assert trainer.epoch().predictions.shape == (8,)  # the last incomplete batch is left out
    assert max(schedule.get_last_lr()[0] for schedule in trainer.schedules) < 1e-5  # the end of the cosine


def test_the_seed_decides_the_order_of_the_images_too(make_trainer: MakeTrainer) -> None:
    orders = [torch.randperm(99, generator=make_trainer(seed=seed).generator).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_bfloat16_is_used_only_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert train_CNN.choose_precision(CPU) == expected


def test_before_torch_2_11_a_processor_multiplies_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert train_CNN.choose_precision(CPU) == torch.float32


def test_the_device_that_is_used_is_asked_for_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    @contextmanager
    def current_device(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current_device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: asked[-1].index == 1)
    assert train_CNN.choose_precision(torch.device("cuda:1")) == torch.bfloat16
    assert train_CNN.choose_precision(torch.device("cuda:0")) == torch.float32


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, log), (again, log_again) = run(), run()
    assert same(first, again)
    pd.testing.assert_frame_equal(log, log_again, check_exact=True)
    monkeypatch.setattr(train_CNN, "SEED", 1)
    assert not same(first, run()[0])


def test_measuring_more_often_changes_no_weight(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seldom, log = run()
    assert log.loc[log["measured_loss"].notna(), "epoch"].tolist() == [1, 3]  # snapshots and the last
    monkeypatch.setattr(train_CNN, "MEASURE_EVERY", 1)
    often, log = run()
    assert log["measured_loss"].notna().all() and same(seldom, often)
    assert len(list((OUTPUTS / "snapshots").iterdir())) == 3  # before the first epoch, after 1 and 3


def interrupt(monkeypatch: pytest.MonkeyPatch, after_steps: int) -> str:
    """Train until Ctrl-C arrives in the step after some others, two of which make an epoch."""
    steps = iter(range(after_steps))

    def interrupted(*args: Any) -> Tensor:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return augment(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(train_CNN, "augment", interrupted)
        train_CNN.main()
    return str(caught.value.code)


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], epochs: int
) -> None:
    whole, log = run()
    message = interrupt(monkeypatch, 2 * epochs + 1)
    assert message == f"interrupted; run again to go on after epoch {epochs}"
    torch.manual_seed(99)  # what happens in between does not matter
    capsys.readouterr()
    resumed, log_resumed = run()
    assert f"going on after epoch {epochs} of an interrupted training" in capsys.readouterr().out
    assert same(whole, resumed)
    pd.testing.assert_frame_equal(log, log_resumed, check_exact=True)
    assert not state_files()


def test_a_run_with_other_settings_leaves_the_kept_state_and_the_earlier_results_alone(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_CNN.main()
    earlier = {path.name: path.read_bytes() for path in OUTPUTS.iterdir() if path.is_file()}
    interrupt(monkeypatch, 3)
    kept = state_files()
    assert len(kept) == 1
    monkeypatch.setattr(train_CNN, "LEARNING_RATE", 1e-3)
    interrupt(monkeypatch, 3)
    assert len(state_files()) == 2 and state_files().items() > kept.items()
    assert {name: (OUTPUTS / name).read_bytes() for name in earlier} == earlier
    train_CNN.main()
    assert state_files() == kept  # its own is gone


def test_a_second_training_that_is_stopped_leaves_the_snapshots_of_a_finished_one_alone(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_CNN.main()
    before = snapshots()
    assert set(before) == {"epoch_000.pth", "epoch_001.pth", "epoch_003.pth"}
    monkeypatch.setattr(train_CNN, "SEED", 7)
    interrupt(monkeypatch, 3)
    assert snapshots() == before


def test_a_finished_training_has_its_own_snapshots_and_no_other(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 3)
    monkeypatch.setattr(train_CNN, "SEED", 7)
    monkeypatch.setattr(train_CNN, "SNAPSHOTS", (2,))
    train_CNN.main()
    assert set(snapshots()) == {"epoch_000.pth", "epoch_002.pth"}
    monkeypatch.setattr(train_CNN, "SEED", 0)
    monkeypatch.setattr(train_CNN, "SNAPSHOTS", (1, 3))
    train_CNN.main()  # goes on
    seeds = {load_checkpoint(path).settings["seed"] for path in (OUTPUTS / "snapshots").iterdir()}
    assert set(snapshots()) == {"epoch_000.pth", "epoch_001.pth", "epoch_003.pth"} and seeds == {0}
    assert not list(OUTPUTS.glob("training_state*"))


def test_a_second_network_does_not_take_the_snapshots_of_one_in_the_same_folder(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_CNN.main()
    before = snapshots()
    monkeypatch.setattr(train_CNN, "CHECKPOINT", OUTPUTS / "wide.pth")
    with pytest.raises(SystemExit, match=r"^outputs holds CNN.pth, another network, .*: set CHECKPOINT to"):
        train_CNN.main()
    assert snapshots() == before and not (OUTPUTS / "wide.pth").exists()


def test_what_a_terminal_refuses_to_print_costs_no_training(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(*_: Any) -> None:
        raise UnicodeEncodeError("cp1252", "\u017c", 0, 1, "character maps to <undefined>")

    monkeypatch.setattr(train_CNN, "report", report)
    with pytest.raises(UnicodeEncodeError):
        train_CNN.main()
    assert load_checkpoint(CHECKPOINT).epochs == 3 and (OUTPUTS / "training_log.csv").is_file()
    assert not state_files()


def test_a_run_after_a_change_of_the_images_starts_anew(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, 3)
    path = Path("data/stl10_binary/train_X.bin")
    content = path.read_bytes()
    changed = bytes([content[0] ^ 1]) + content[1:]
    path.write_bytes(changed)
    monkeypatch.setitem(load_data.FILES, path.name, (len(changed), hashlib.md5(changed).hexdigest()))
    train_CNN.main()
    assert "going on" not in capsys.readouterr().out
    assert len(state_files()) == 1  # the interrupted training's, of other images


def test_convolutions_may_be_rounded_to_tf32_in_training_and_not_in_the_last_measurement(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[tuple[str, bool]] = []
    epoch = Trainer.epoch

    def train(trainer: Trainer, *arguments: Any) -> Any:
        allowed.append(("training", torch.backends.cudnn.allow_tf32))
        return epoch(trainer, *arguments)

    def measure(*arguments: Any, **mirrored: Any) -> Any:
        allowed.append(("measuring", torch.backends.cudnn.allow_tf32))
        return evaluate(*arguments, **mirrored)

    monkeypatch.setattr(Trainer, "epoch", train)
    monkeypatch.setattr(train_CNN, "evaluate", measure)
    train_CNN.main()
    assert ("training", True) in allowed and ("training", False) not in allowed
    assert allowed[-2:] == [("measuring", False)] * 2 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("warm_up", [0, 0.0, 1, 1.0, 1 / 7, 1e-6, 0.99])
def test_every_warm_up_from_none_to_the_whole_training_works(
    quick: None, monkeypatch: pytest.MonkeyPatch, warm_up: float
) -> None:
    monkeypatch.setattr(train_CNN, "WARM_UP", warm_up)  # of 3 epochs of 2 steps, and one step more
    rates = run()[1]["filter_rate"]
    assert rates.between(0, train_CNN.FILTER_RATE * 1.0001).all() and rates.max() > 0


def test_no_epoch_is_measured_but_snapshots_and_the_last_if_none_is_asked_for(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_CNN, "MEASURE_EVERY", 0)
    _, log = run()
    assert log.loc[log["measured_loss"].notna(), "epoch"].tolist() == [1, 3]


def test_snapshots_may_be_one_number_and_paths_may_be_text(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_CNN, "SNAPSHOTS", (2))
    monkeypatch.setattr(train_CNN, "CHECKPOINT", "outputs/CNN.pth")
    monkeypatch.setattr(train_CNN, "DATA_DIR", "data")
    train_CNN.main()
    assert set(snapshots()) == {"epoch_000.pth", "epoch_002.pth"}
    assert load_checkpoint(CHECKPOINT).settings["data"]["folder"] == "data"


def test_a_run_in_the_home_folder_goes_on(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setattr(train_CNN, "CHECKPOINT", Path("~/outputs/CNN.pth"))
    interrupt(monkeypatch, 3)
    assert len(state_files()) == 1
    train_CNN.main()
    assert "going on after epoch" in capsys.readouterr().out and not state_files()
    assert not Path("~").exists()


def test_pictures_in_folders_are_trained_on(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for folder in (Path("data") / split / name for split in ("train", "test") for name in ("b", "a", "c")):
        folder.mkdir(parents=True)
        for k in range(8):
            Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(folder / f"{k}.png")
    monkeypatch.setattr(train_CNN, "DATASET", "folders")
    train_CNN.main()
    checkpoint = load_checkpoint(OUTPUTS / "CNN.pth")
    assert (checkpoint.dataset, checkpoint.class_names) == ("folders", ["a", "b", "c"])
    assert checkpoint.net.classifier.out_features == 3
    monkeypatch.setattr(train_CNN, "BATCH_SIZE", 25)
    with pytest.raises(SystemExit, match=r"^BATCH_SIZE is 25; there are only 24 training images: lower it$"):
        train_CNN.main()


def test_a_damaged_state_is_refused(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 3)
    ((name, content),) = state_files().items()
    for damaged in (content[:-100], b"", b"text"):
        (OUTPUTS / name).write_bytes(damaged)
        reason = r"is damaged, or the code of the network has changed since \(\w+\)"
        with pytest.raises(SystemExit, match=rf"^outputs/{name} {reason}: delete it and start anew$"):
            train_CNN.main()


def test_a_state_of_another_network_is_refused_after_a_change_of_the_code(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 3)
    build_network = train_CNN.build_network

    def build_without_statistics(config: dict[str, Any]) -> CNN:
        net = build_network(config)
        net.blocks[0].bn = torch.nn.BatchNorm2d(4, track_running_stats=False)
        return net

    monkeypatch.setattr(train_CNN, "build_network", build_without_statistics)
    with pytest.raises(SystemExit, match=r"or the code of the network has changed since \(RuntimeError\)"):
        train_CNN.main()


@pytest.mark.parametrize("checkpoint", ["outputs", Path("outputs/networks")])
def test_a_folder_is_refused_as_a_checkpoint_before_the_training(
    quick: None, monkeypatch: pytest.MonkeyPatch, checkpoint: Path | str
) -> None:
    Path("outputs/networks").mkdir(parents=True)
    monkeypatch.setattr(train_CNN, "CHECKPOINT", checkpoint)
    expected = f"^CHECKPOINT is '{checkpoint}', a folder: name a file in it, such as '{checkpoint}/CNN.pth'$"
    with pytest.raises(SystemExit, match=expected):
        train_CNN.main()
    assert not [path for path in Path("outputs").rglob("*") if path.is_file()]


@pytest.mark.parametrize("dataset", ["folders", "shapes"])
def test_a_fold_is_refused_where_the_data_set_is_not_stl10(tiny_stl10: Path, dataset: str) -> None:
    (tiny_stl10 / load_data.FOLDER / "fold_indices.txt").write_text("0 1 2\n" * 10)
    with pytest.raises(SystemExit, match=r"^TRAIN_ON is 'fold 0'; only STL-10 has folds, not .*: set it to "):
        train_CNN.read_data(dataset, tiny_stl10, "fold 0")


def test_the_first_snapshot_is_the_network_before_the_first_step(quick: None) -> None:
    train_CNN.main()
    start = load_checkpoint(OUTPUTS / "snapshots" / "epoch_000.pth")
    torch.manual_seed(train_CNN.SEED)
    untrained = CNN(**start.net.config)
    untrained.mean, untrained.std = start.net.mean, start.net.std
    assert same(untrained.state_dict(), start.net.state_dict())
    assert (start.epochs, start.dataset) == (0, "stl10")
    assert not same(start.net.state_dict(), weights("snapshots/epoch_001.pth"))
    assert same(weights(), weights("snapshots/epoch_003.pth"))


def test_a_checkpoint_holds_what_made_it(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: Any, **mirrored: Any) -> Any:
        return evaluate(*args, **mirrored)._replace(accuracy=0.75 if mirrored else 0.5)

    monkeypatch.setattr(train_CNN, "evaluate", measure)
    train_CNN.main()
    checkpoint = load_checkpoint(CHECKPOINT)
    train, test = (load_split("stl10", Path("data"), split) for split in ("train", "test"))
    stored = [buffer.flatten().numpy() for buffer in (checkpoint.net.mean, checkpoint.net.std)]
    np.testing.assert_allclose(stored, mean_and_std(train.images), rtol=1e-6)
    settings = checkpoint.settings
    for name in ("LEARNING_RATE", "WARM_UP", "WEIGHT_DECAY", "LABEL_SMOOTHING", "SEED", "TRAIN_ON", *QUICK):
        where = settings["network"] if name == "FILTERS" else settings
        assert name == "SNAPSHOTS" or where[name.lower()] == getattr(train_CNN, name), name
    assert settings["augmentation"] == train_CNN.AUGMENTATION._asdict()
    result = evaluate(checkpoint.net, test)
    assert (checkpoint.metrics["accuracy"], checkpoint.metrics["accuracy_mirrored"]) == (0.5, 0.75)
    assert checkpoint.metrics["loss"] == result.loss
    assert (checkpoint.metrics["split"], checkpoint.epochs, checkpoint.dataset) == ("test", 3, "stl10")
    assert json.dumps(checkpoint.metrics)  # plain numbers


def test_the_pipeline_leaves_a_log_of_a_row_an_epoch_and_both_figures(pipeline: Path) -> None:
    folder = pipeline / "outputs"
    log = load_table(folder / "training_log.csv", load_checkpoint(folder / "CNN.pth"))
    assert log["epoch"].tolist() == [1, 2] and log.notna().all(axis=None)
    for name in ("training_curves.png", "confusion_matrix.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    names = sorted(path.name for path in (folder / "snapshots").iterdir())
    assert names == ["epoch_000.pth", "epoch_001.pth"]
    assert not list(folder.glob("training_state*"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("POOL_SIZES", (4, 4, 4, 4), "POOL_SIZES make no network of four layers for images of 96 pixels: .+"),
        ("KERNEL_SIZES", (5, 3, 3), "make no network of four layers for images of 96 pixels: .+"),
        ("KERNEL_SIZES", 3, "^FILTERS, KERNEL_SIZES, STRIDES and POOL_SIZES make no network of four layers"),
        ("HEAD_SIZE", 9, r"make no network .+ \(HEAD_SIZE and DROPOUT can be the cause, too\)$"),
        ("DROPOUT", 2, r"make no network .+ \(HEAD_SIZE and DROPOUT can be the cause, too\)$"),
        ("STRIDES", (0, 1, 1, 1), "make no network of four layers for images of 96 pixels: .+"),
        ("TRAIN_ON", "fold 10", "^TRAIN_ON is 'fold 10'; allowed are 'all', 'validation', 'fold 0' to 'fold"),
        ("TRAIN_ON", "fold 1", "^data/stl10_binary/fold_indices.txt cannot be read"),
        ("DATASET", "cifar", "^DATASET is 'cifar'"),
        ("DEVICE", "abacus", "^DEVICE is 'abacus'"),
        ("LEARNING_RATE", 1e30, r"^the loss of a batch is (nan|inf): lower FILTER_RATE or LEARNING_RATE$"),
        ("EPOCHS", 0, "^EPOCHS is 0; a training takes at least 1$"),
        ("BATCH_SIZE", 0, "^BATCH_SIZE is 0; a batch has at least 1 image$"),
        ("BATCH_SIZE", -5, "^BATCH_SIZE is -5; a batch has at least 1 image$"),
        ("WARM_UP", 5, "^WARM_UP is 5; it is a share of the training, from 0 to 1$"),
        ("WARM_UP", -0.1, "^WARM_UP is -0.1; it is a share of the training, from 0 to 1$"),
    ],
)
def test_settings_that_cannot_work_end_in_one_line_and_leave_no_checkpoint(
    quick: None, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
) -> None:
    monkeypatch.setattr(train_CNN, name, value)
    with pytest.raises(SystemExit, match=message) as caught:
        train_CNN.main()
    assert "\n" not in str(caught.value.code) and not CHECKPOINT.exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_classifier_of_no_region_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"make no network of four layers .+ \(HEAD_SIZE and DROPOUT can"):
        train_CNN.build_network({"head_size": 0})


@pytest.mark.parametrize("layers", [3, 5])
def test_a_network_of_another_number_of_layers_is_refused(layers: int) -> None:
    names = ("filters", "kernel_sizes", "strides", "pool_sizes")
    expected = f"^FILTERS, .+ make no network of four layers .+: each holds {layers} numbers, expected 4 "
    with pytest.raises(SystemExit, match=expected):
        train_CNN.build_network({name: (1,) * layers for name in names})


KILLED = """
import json, os, pathlib, signal, sys, load_data, train_CNN

def write_bytes(path, content):
    if path.name.startswith("CNN.pth"):
        right(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    right(path, content)

right, pathlib.Path.write_bytes = pathlib.Path.write_bytes, write_bytes
load_data.SHAPES_IMAGES = {"train": 40, "test": 20}
for name, value in json.loads(sys.argv[1]).items():
    setattr(train_CNN, name, value)
train_CNN.main()
"""


def test_a_stage_killed_while_it_writes_leaves_the_earlier_checkpoint_whole_and_runs_again(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_CNN.main()
    before = CHECKPOINT.read_bytes()
    settings = QUICK | {"DATASET": "shapes", "SHAPES_EPOCHS": 1}
    command = [sys.executable, "-c", KILLED, json.dumps(settings)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert CHECKPOINT.read_bytes() == before
    assert len(list(OUTPUTS.glob("CNN.pth.*.partial"))) == 1
    monkeypatch.setattr(load_data, "SHAPES_IMAGES", {"train": 40, "test": 20})
    for name, value in settings.items():
        monkeypatch.setattr(train_CNN, name, value)
    train_CNN.main()
    assert "going on after epoch 1 of an interrupted training" in capsys.readouterr().out
    assert same(weights(), weights("snapshots/epoch_001.pth"))  # nothing was left to train
    checkpoint = load_checkpoint(CHECKPOINT)
    assert (checkpoint.dataset, checkpoint.epochs) == ("shapes", 1)
    assert not state_files()
