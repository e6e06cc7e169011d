import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeNet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import train_CNN
from CNN import (
    CNN,
    choose_device,
    frame_sizes,
    layer_index,
    load_checkpoint,
    main,
    receptive_fields,
    save_checkpoint,
)

INFO: dict[str, Any] = {
    "dataset": "stl10",
    "class_names": [f"class {k}" for k in range(10)],
    "mean": [0.4, 0.4, 0.4],
    "std": [0.2, 0.2, 0.2],
    "seed": 3,
    "epochs": 7,
    "metrics": {"test_accuracy": 0.5},
}
PATH = Path("outputs/CNN.pth")


def test_pooling_records_where_each_maximum_was() -> None:
    net = CNN(filters=(2, 2, 2, 2), strides=(1, 1, 1, 1)).eval()
    images = torch.randn(3, 3, 96, 96)
    block = net.blocks[0]
    rectified = block.relu(block.bn(block.conv(images)))
    pooled, switches = block(images)
    assert torch.equal(rectified.flatten(2).gather(2, switches.flatten(2)), pooled.flatten(2))
    rows, columns = switches // 96, switches % 96
    assert torch.equal(rows // 2, torch.arange(48)[:, None].expand_as(rows))
    assert torch.equal(columns // 2, torch.arange(48).expand_as(columns))


def test_the_network_does_nothing_that_an_apple_gpu_cannot(make_net: MakeNet) -> None:
    # Tensors without numbers; torch lists both in torch/testing/_internal/common_mps.py as failing there.
    class Checker(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.__name__.split(".")[0]
            if isinstance(result, torch.Tensor) and result.device.type == "mps":
                seen.add(name)
                assert result.dtype != torch.float64
                if name in ("adaptive_avg_pool2d", "_adaptive_avg_pool2d"):
                    assert not args[0].shape[-1] % result.shape[-1]
            return result

    seen = set[str]()
    for head_size in (1, 2, 3):  # of maps of 3 x 3
        net = make_net(head_size=head_size)
        assert frame_sizes(net)[1][-1] // net.blocks[-1].pool_size == 3
        shapes = {name: (value.shape, value.dtype) for name, value in net.state_dict().items()}
        with FakeTensorMode(), torch.no_grad():
            there = {name: torch.empty(n, dtype=kind, device="mps") for name, (n, kind) in shapes.items()}
            with Checker():  # type: ignore[no-untyped-call]
                logits = functional_call(net, there, torch.empty(4, 3, 96, 96, device="mps"))
            assert logits.device.type == "mps" and logits.shape == (4, 10)
    assert {"convolution", "_adaptive_avg_pool2d"} <= seen


def test_features_and_logits_come_from_the_same_pass(make_net: MakeNet) -> None:
    net, images = make_net(), torch.randn(2, 3, 96, 96)
    assert torch.equal(net(images), net.classify(net.features(images)[-1][0]))


def test_the_network_that_is_trained_is_the_default_and_has_256_filters_in_conv4() -> None:
    assert CNN().config == {
        "filters": list(train_CNN.FILTERS),
        "kernel_sizes": list(train_CNN.KERNEL_SIZES),
        "strides": list(train_CNN.STRIDES),
        "pool_sizes": list(train_CNN.POOL_SIZES),
        "head_size": train_CNN.HEAD_SIZE,
        "dropout": train_CNN.DROPOUT,
        "partial_identity": train_CNN.PARTIAL_IDENTITY,
        "classes": 10,
    }
    assert train_CNN.FILTERS[-1] == 256


def test_each_relu_is_used_once() -> None:
    net, calls = CNN(filters=(2, 2, 2, 2)), []
    for block in net.blocks:
        block.relu.register_forward_hook(lambda module, *_: calls.append(id(module)))
    net(torch.zeros(2, 3, 96, 96))
    assert len(calls) == len(set(calls)) == 4


def test_receptive_fields_by_hand() -> None:
    # 5; pool: 6, jump 2; +2*2 = 10; pool: 12, jump 4; +2*4 = 20; pool: 24, jump 8; +2*8 = 40
    net = CNN(filters=(2, 2, 2, 2), kernel_sizes=(5, 3, 3, 3), strides=(1, 1, 1, 1), pool_sizes=(2, 2, 2, 2))
    assert [field.size for field in receptive_fields(net)] == [5, 10, 20, 40]
    assert [field.jump for field in receptive_fields(net)] == [1, 2, 4, 8]
    assert [field.start for field in receptive_fields(net)] == [-2, -4, -8, -16]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"strides": (2, 1, 1, 1), "pool_sizes": (2, 2, 1, 4)},
        {"kernel_sizes": (7, 5, 3, 1), "strides": (2, 2, 1, 1), "pool_sizes": (3, 1, 2, 2)},
    ],
)
def test_a_unit_depends_on_its_receptive_field_and_nothing_else(make_net: MakeNet, config: Any) -> None:
    net = make_net(dtype=torch.float64, **config)
    for layer, field in enumerate(receptive_fields(net)):
        images = torch.randn(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
        x = images
        for block in net.blocks[:layer]:
            x, _ = block(x)
        maps = net.blocks[layer].conv(x)
        row = maps.shape[-1] // 2
        (gradient,) = torch.autograd.grad(maps[0, :, row, row].sum(), images)
        first = row * field.jump + field.start
        seen = gradient[0].abs().sum(0)
        seen_rows = seen.sum(1).nonzero().flatten().tolist()
        assert seen_rows[0] >= max(first, 0) and seen_rows[-1] < first + field.size
        inside = seen[max(first, 0) : first + field.size, max(first, 0) : first + field.size]
        assert int((inside > 0).sum()) == int((seen > 0).sum())


def test_frame_sizes_are_those_of_the_maps(make_net: MakeNet) -> None:
    net = make_net(kernel_sizes=(7, 5, 3, 3), strides=(2, 1, 1, 1), pool_sizes=(3, 2, 2, 2))
    inputs, outputs = frame_sizes(net)
    x = torch.zeros(1, 3, 96, 96)
    for block, rows_in, rows_out in zip(net.blocks, inputs, outputs, strict=True):
        assert (x.shape[-1], block.conv(x).shape[-1]) == (rows_in, rows_out)
        x, _ = block(x)


def test_a_checkpoint_comes_back_whole(make_net: MakeNet) -> None:
    net = make_net(strides=(2, 1, 1, 1), head_size=2)
    save_checkpoint(PATH, net, **INFO)
    found = load_checkpoint(PATH)
    assert {name: getattr(found, name) for name in INFO} == INFO
    assert found.net.config == net.config and not found.net.training
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(found.net(images), net(images))
    assert len(found.sha256) == 64
    assert list(PATH.parent.iterdir()) == [PATH]


def test_a_missing_checkpoint_names_the_command() -> None:
    with pytest.raises(SystemExit, match=r"outputs/CNN.pth not found: run `uv run train_CNN.py` first"):
        load_checkpoint(PATH)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("bang").touch, ())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Bomb()), pickle.dumps({"a": 1})])
def test_foreign_files_are_refused_and_not_executed(content: bytes) -> None:
    PATH.parent.mkdir()
    PATH.write_bytes(content)
    with pytest.raises(SystemExit, match=r"^outputs/CNN.pth .*`uv run train_CNN.py` again$"):
        load_checkpoint(PATH)
    torch.save({"format": 1, "state_dict": Bomb()}, PATH)
    with pytest.raises(SystemExit, match="damaged or no checkpoint"):
        load_checkpoint(PATH)
    assert not Path("bang").exists()


def test_a_truncated_checkpoint_is_refused(make_net: MakeNet) -> None:
    save_checkpoint(PATH, make_net(), **INFO)
    whole = PATH.read_bytes()
    for size in (1, 100, len(whole) // 2, len(whole) - 1):
        PATH.write_bytes(whole[:size])
        with pytest.raises(SystemExit, match="damaged or no checkpoint"):
            load_checkpoint(PATH)


@pytest.mark.parametrize(
    "key", ["format", "state_dict", "config", "dataset", "class_names", "mean", "std", "seed"]
)
def test_a_checkpoint_without_a_key_is_refused(make_net: MakeNet, key: str) -> None:
    save_checkpoint(PATH, make_net(), **INFO)
    content = torch.load(PATH, weights_only=True)
    del content[key]
    torch.save(content, PATH)
    with pytest.raises(SystemExit, match=f"{key}.*`uv run train_CNN.py` again"):
        load_checkpoint(PATH)


def test_weights_of_another_architecture_are_refused(make_net: MakeNet) -> None:
    save_checkpoint(PATH, make_net(), **INFO)
    content = torch.load(PATH, weights_only=True)
    changes: list[dict[str, Any]] = [
        {"config": {**content["config"], "filters": [5, 6, 7, 9]}},
        {"config": {**content["config"], "filters": [10**7] * 4}},  # never allocated
        {"config": {**content["config"], "surprise": 1}},
        {"config": {**content["config"], "strides": [0, 1, 1, 1]}},
        {
            "state_dict": {
                name: value for name, value in content["state_dict"].items() if "blocks.2" not in name
            }
        },
    ]
    for change in changes:
        torch.save({**content, **change}, PATH)
        with pytest.raises(SystemExit, match="weights that do not fit"):
            load_checkpoint(PATH)


def test_weights_that_are_not_finite_are_refused(make_net: MakeNet) -> None:
    net = make_net()
    net.classifier.weight[0, 0] = float("nan")
    save_checkpoint(PATH, net, **INFO)
    with pytest.raises(SystemExit, match="not finite"):
        load_checkpoint(PATH)


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "cuda:", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(SystemExit, match=rf"DEVICE is '{name}'; this machine has .*cpu"):
        choose_device(name)


def test_an_unknown_layer_is_refused() -> None:
    assert layer_index("conv3") == 2
    with pytest.raises(SystemExit, match="LAYER is 'conv5'; this network has conv1, conv2, conv3, conv4"):
        layer_index("conv5")


def test_main_prints_shape_parameters_and_receptive_field(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    conv4 = next(line for line in lines if line.startswith("conv4"))
    size = receptive_fields(CNN())[3].size
    assert "256 x" in conv4 and f"{size} px" in conv4
    total = sum(p.numel() for p in CNN().parameters())
    assert any(line.startswith("total") and f"{total:,}" in line for line in lines)


def test_conv2_to_conv4_start_as_partial_identity_and_conv1_at_random() -> None:
    net = CNN(filters=(4, 6, 8, 8), pool_sizes=(1, 1, 1, 1), strides=(1, 1, 1, 1))
    maps = torch.randn(2, 6, 5, 5)
    assert torch.equal(net.blocks[2].conv(maps)[:, :6], maps)
    assert not torch.equal(net.blocks[2].conv(maps)[:, 6:8], maps[:, :2])
    assert bool((net.blocks[0].conv.weight != 0).all())
    net = CNN(filters=(4, 6, 8, 8), pool_sizes=(1, 1, 1, 1), strides=(1, 1, 1, 1), partial_identity=False)
    assert all(bool((block.conv.weight != 0).all()) for block in net.blocks)
