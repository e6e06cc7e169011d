import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, MakeNet, make_checkpoint, write_checkpoint

import train_CNN
from CNN import (
    CNN,
    atomic_write,
    choose_device,
    frame_sizes,
    load_checkpoint,
    main,
    receptive_fields,
    retry,
    save_checkpoint,
)

PATH = Path("outputs/CNN.pth")
ROOT = Path(__file__).parent.parent


def test_importing_the_network_loads_nothing_heavier_than_torch() -> None:
    code = "import sys, CNN; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded and not loaded & {"torchvision", "matplotlib", "seaborn", "pandas"}


def test_a_switch_is_the_place_of_the_maximum_in_its_region(make_net: MakeNet) -> None:
    net, images = make_net(kernel_sizes=(5, 3, 3, 3), strides=(1,) * 4), torch.randn(3, 3, 96, 96)
    block = net.blocks[0]
    maps = block.bn(block.conv(images))
    pooled, switches = block.with_switches(images)
    at_switches = maps.flatten(2).gather(2, switches.flatten(2)).view_as(pooled)
    assert torch.equal(at_switches.clamp(min=0), pooled) and (at_switches < 0).any()
    assert torch.equal(at_switches, F.max_pool2d(maps, 2))  # also where nothing fires
    rows, columns = switches // 96, switches % 96
    assert torch.equal(rows // 2, torch.arange(48)[:, None].expand_as(rows))
    assert torch.equal(columns // 2, torch.arange(48).expand_as(columns))


def test_pooling_before_or_after_the_relu_gives_the_same_values(make_net: MakeNet) -> None:
    block, images = make_net().blocks[0], torch.randn(3, 3, 96, 96)
    paper = F.max_pool2d(block.relu(block.bn(block.conv(images))), 2)
    assert torch.equal(block(images), paper) and torch.equal(block.with_switches(images)[0], paper)


def test_each_relu_is_used_once(make_net: MakeNet) -> None:
    net, calls = make_net(), []
    for block in net.blocks:
        block.relu.register_forward_hook(lambda module, *_: calls.append(id(module)))
    net(torch.zeros(2, 3, 96, 96))
    assert len(calls) == len(set(calls)) == 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("head_size", "rows"), [(1, 6), (2, 6), (3, 6), (2, 5), (3, 7)])
def test_the_head_averages_as_adaptive_pooling_does(
    make_net: MakeNet, device: str, head_size: int, rows: int
) -> None:
    maps = torch.randn(2, 8, rows, rows).contiguous(memory_format=torch.channels_last).to(device)
    by_net, by_torch = (maps.clone().requires_grad_(True) for _ in range(2))
    averages = make_net(head_size=head_size).to(device).average(by_net)
    expected = F.adaptive_avg_pool2d(by_torch.cpu(), head_size).to(device)
    torch.testing.assert_close(averages, expected)
    weights = torch.randn_like(averages)
    (averages * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(by_net.grad, by_torch.grad)


def test_the_head_gives_avg_pool2d_contiguous_maps_only(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Apple GPUs its gradient is wrong for others."""
    right, layouts = F.avg_pool2d, []

    def avg_pool2d(maps: torch.Tensor, *sizes: Any) -> torch.Tensor:
        layouts.append(maps.is_contiguous())
        return right(maps, *sizes)

    monkeypatch.setattr(F, "avg_pool2d", avg_pool2d)
    make_net().average(torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last))
    assert layouts == [True]


def test_features_and_logits_come_from_the_same_pass(make_net: MakeNet) -> None:
    net, images = make_net(), torch.randn(2, 3, 96, 96)
    assert torch.equal(net(images), net.classify(net.features(images)[-1][0]))


def test_the_network_that_is_trained_is_the_default_and_has_256_filters_in_conv4() -> None:
    names = ("filters", "kernel_sizes", "strides", "pool_sizes", "head_size", "dropout")
    trained = {name: getattr(train_CNN, name.upper()) for name in names}
    assert CNN(**trained).config == CNN().config and CNN().config["filters"][-1] == 256


def test_images_are_normalised_by_the_mean_and_deviation_that_the_network_holds(make_net: MakeNet) -> None:
    net = make_net()
    net.mean.copy_(torch.tensor([0.2, 0.4, 0.0]).view(3, 1, 1))
    net.std.copy_(torch.tensor([0.1, 0.3, 1.0]).view(3, 1, 1))
    assert {"mean", "std"} <= dict(net.named_buffers()).keys()
    images = torch.tensor([102, 255, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([2.0, 2, 0]).view(1, 3, 1, 1)  # (0.4 - 0.2) / 0.1, (1 - 0.4) / 0.3, 0
    torch.testing.assert_close(net.normalise(images), expected)
    assert images.flatten().tolist() == [102, 255, 0]


def test_images_that_are_no_grey_levels_are_refused_and_left_alone(make_net: MakeNet) -> None:
    images = torch.ones(1, 3, 2, 2)
    with pytest.raises(TypeError, match=r"^the images are torch.float32, expected torch.uint8, 0 to 255$"):
        make_net().normalise(images)
    assert torch.equal(images, torch.ones(1, 3, 2, 2))


def test_receptive_fields_by_hand() -> None:
    # 5; pool: 6, jump 2; + 2*2 = 10; pool: 12, jump 4; + 2*4 = 20; pool: 24, jump 8; + 2*8 = 40
    fields = receptive_fields(CNN(filters=(2, 2, 2, 2), strides=(1, 1, 1, 1), kernel_sizes=(5, 3, 3, 3)))
    assert [tuple(field) for field in fields] == [(5, 1, -2), (10, 2, -4), (20, 4, -8), (40, 8, -16)]
    # 6, jump 2, 2 rows of padding; pool: 8, jump 4; + 2*4 = 16, starts 4 earlier
    even = receptive_fields(CNN(filters=(2, 2, 2, 2), strides=(2, 1, 1, 1), kernel_sizes=(6, 3, 3, 3)))
    assert [tuple(field) for field in even[:2]] == [(6, 2, -2), (16, 4, -6)]


CONFIGS: list[dict[str, Any]] = [
    {},
    {"strides": (2, 1, 1, 1), "pool_sizes": (2, 2, 1, 4)},
    {"kernel_sizes": (7, 5, 3, 1), "strides": (2, 2, 1, 1), "pool_sizes": (3, 1, 2, 2)},
    {"kernel_sizes": (6, 4, 3, 3), "strides": (2, 2, 1, 1), "pool_sizes": (2, 1, 2, 2)},
    {"kernel_sizes": (4, 3, 3, 3), "strides": (2, 1, 1, 1), "pool_sizes": (2, 2, 2, 2)},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_unit_depends_on_all_pixels_of_its_receptive_field_and_no_other(config: Any) -> None:
    net = CNN(filters=(2, 2, 2, 2), **config)
    images = torch.randn(1, 3, 96, 96, requires_grad=True)
    x = images
    for block, field in zip(net.blocks, receptive_fields(net), strict=True):
        maps = F.conv2d(x, torch.ones_like(block.conv.weight), None, block.conv.stride, block.conv.padding)
        for row in (0, maps.shape[-1] // 2, maps.shape[-1] - 1):
            (gradient,) = torch.autograd.grad(maps[0, 0, row, row], images, retain_graph=True)
            first = row * field.jump + field.start
            expected = torch.zeros(96, 96, dtype=torch.bool)
            expected[max(first, 0) : first + field.size, max(first, 0) : first + field.size] = True
            assert torch.equal(gradient[0].abs().sum(0) > 0, expected)
        x = F.avg_pool2d(maps, block.pool_size)  # in place of a maximum: every pixel counts


@pytest.mark.parametrize("config", [*CONFIGS, {"pool_sizes": (5, 2, 2, 1)}])  # 5 leaves a remainder
def test_frame_sizes_are_those_of_the_maps(make_net: MakeNet, config: Any) -> None:
    net, x = make_net(**config), torch.zeros(1, 3, 96, 96)
    for block, rows_in, rows_out in zip(net.blocks, *frame_sizes(net, 96), strict=True):
        assert (x.shape[-1], block.conv(x).shape[-1]) == (rows_in, rows_out)
        x = block(x)
    assert frame_sizes(net, 96)[1][0] == 96 / net.config["strides"][0]  # for odd kernels and for 6 and 4


def test_a_checkpoint_comes_back_whole(make_net: MakeNet) -> None:
    net = make_net(strides=(2, 1, 1, 1), head_size=1)
    net.mean.fill_(0.4)
    write_checkpoint(net, dataset="shapes", epochs=7)
    checkpoint = load_checkpoint(PATH)
    assert checkpoint[1:-1] == make_checkpoint(net, dataset="shapes", epochs=7)[1:-1]
    assert checkpoint.accuracy() == "test accuracy 10.0 %"
    assert checkpoint.net.config == net.config and torch.equal(checkpoint.net.mean, net.mean)
    assert not checkpoint.net.training and not any(p.requires_grad for p in checkpoint.net.parameters())
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(checkpoint.net(images), net(images))
    assert list(PATH.parent.iterdir()) == [PATH]
    write_checkpoint(net, epochs=8)
    assert len(checkpoint.sha256) == 64 and load_checkpoint(PATH).sha256 != checkpoint.sha256


def test_a_missing_checkpoint_names_both_ways_to_have_one() -> None:
    with pytest.raises(SystemExit, match=rf"^{Path.cwd()}/outputs/CNN.pth not found: ") as caught:
        load_checkpoint(PATH)
    line = str(caught.value.code)
    assert "`uv run train_CNN.py`" in line and "`cp -r outputs/readme/trained/* outputs/`" in line
    assert "\n" not in line


def test_a_path_may_be_a_str(make_net: MakeNet) -> None:
    write_checkpoint(make_net())
    assert load_checkpoint(str(PATH)).epochs == 3


def test_a_damaged_snapshot_needs_deleting_and_no_new_training() -> None:
    path = Path("outputs/snapshots/epoch_001.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"text")
    with pytest.raises(SystemExit, match=rf"^{path} is damaged or no checkpoint .*: delete it$"):
        load_checkpoint(path)


def assert_refused(content: bytes | dict[str, Any]) -> None:
    PATH.write_bytes(content) if isinstance(content, bytes) else torch.save(content, PATH)
    with pytest.raises(SystemExit, match=r"^outputs/CNN.pth is damaged or no checkpoint .*elsewhere and run"):
        load_checkpoint(PATH)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("bang").touch, ())


def test_foreign_files_are_refused_and_not_executed() -> None:
    PATH.parent.mkdir()
    for content in ({"state_dict": Bomb()}, pickle.dumps(Bomb()), pickle.dumps({"a": 1}), b"text", b""):
        assert_refused(content)
    assert not Path("bang").exists()


def test_a_truncated_checkpoint_is_refused(make_net: MakeNet) -> None:
    write_checkpoint(make_net())
    whole = PATH.read_bytes()
    for size in (1, 100, len(whole) // 2, len(whole) - 1):
        assert_refused(whole[:size])


def test_weights_that_do_not_fit_the_network_and_missing_entries_are_refused(make_net: MakeNet) -> None:
    write_checkpoint(make_net())
    content = torch.load(PATH, weights_only=True)
    config, weights = content["config"], content["state_dict"]
    assert_refused(content | {"config": {**config, "filters": [5, 6, 7, 9]}})
    assert_refused(content | {"config": {**config, "surprise": 1}})
    assert_refused(content | {"state_dict": {key: weights[key] for key in weights if "blocks.2" not in key}})
    for missing in ("config", "metrics"):
        assert_refused({key: content[key] for key in content if key != missing})


@pytest.mark.parametrize("name", ["tpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(SystemExit, match=rf"^DEVICE is '{name}'; this machine has .*cpu.* \(or \"auto\"\)$"):
        choose_device(name)


def test_convolutions_are_not_computed_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    choose_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_auto_takes_the_fastest_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert choose_device("auto").type == expected
        assert choose_device("cpu") == torch.device("cpu")


def test_main_prints_shape_parameters_and_receptive_field(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    conv4, total = lines[4].split(), lines[6].split()
    rows = CNN().features(torch.zeros(1, 3, 96, 96))[3][0].shape[-1]
    assert conv4[:6] == f"conv4 256 x {rows} x {rows}".split()
    assert conv4[-2:] == f"{receptive_fields(CNN())[3].size} px".split()
    assert total == ["total", f"{sum(p.numel() for p in CNN().parameters()):,}"]
    assert "default network" in lines[-1] and "train_CNN.py" in lines[-1]


def test_a_wrapped_network_is_saved_without_its_wrapper(make_net: MakeNet) -> None:
    net = make_net()
    for wrapped in (torch.nn.DataParallel(net), torch.compile(net)):
        write_checkpoint(wrapped)  # type: ignore[arg-type]
        loaded = load_checkpoint(Path("outputs/CNN.pth")).net
        assert all(map(torch.equal, loaded.state_dict().values(), net.state_dict().values()))


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_a_failed_write_keeps_the_earlier_file_and_leaves_nothing_behind() -> None:
    path = Path("new/folder/a.txt")
    with atomic_write(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    for error in (ValueError("bad"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_write(path) as partial:
            partial.write_text("half")
            raise error
        assert files() == {str(path): b"whole"}


def test_home_is_where_a_tilde_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    with atomic_write("~/a.txt") as partial:
        partial.write_text("x")
    assert files() == {"a.txt": b"x"}


def test_two_processes_that_write_one_file_do_not_meet() -> None:
    code = "import sys, CNN\nwith CNN.atomic_write('a') as p: print(p); p.write_text('other'); input()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as other:
        assert other.stdout is not None
        theirs = other.stdout.readline().strip()
        with atomic_write("a") as partial:
            assert str(partial) != theirs
            partial.write_text("mine")
        assert Path("a").read_text() == "mine"
        other.communicate("\n")
    assert other.returncode == 0 and files() == {"a": b"other"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_disk_and_a_folder_that_may_not_be_written_end_in_one_line(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def write_bytes(path: Path, content: Any) -> None:
        path.touch()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(SystemExit) as caught:
        save_checkpoint("a.pth", make_net())
    assert caught.value.code == f"{Path('a.pth').absolute()} cannot be written: {os.strerror(number)}"
    assert files() == {}


@pytest.mark.parametrize("kind", ["dead link", "file"])
def test_a_dead_link_or_a_file_in_the_place_of_the_folder_ends_in_one_line(kind: str) -> None:
    folder = Path("outputs")
    folder.symlink_to("nowhere") if kind == "dead link" else folder.touch()
    expected = f"{Path('outputs/a.txt').absolute()} cannot be written: outputs is no folder"
    with pytest.raises(SystemExit) as caught, atomic_write("outputs/a.txt"):
        raise AssertionError
    assert caught.value.code == expected


@pytest.mark.parametrize("refusals", [3, 10**6])
def test_a_file_held_open_by_a_viewer_is_waited_for_and_then_named(
    monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    """Windows refuses to replace an open file."""
    right, waits = Path.replace, [0.0]

    def replace(partial: Path, path: Path) -> Path:
        if len(waits) <= refusals:
            raise PermissionError(errno.EACCES, "used by another process")
        return right(partial, path)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr("time.sleep", waits.append)
    Path("a.csv").write_text("old")
    try:
        with atomic_write("a.csv") as partial:
            partial.write_text("new")
    except SystemExit as error:
        expected = (
            f"{Path('a.csv').absolute()} cannot be replaced: close the program that holds it and run again"
        )
        assert error.code == expected and sum(waits) == pytest.approx(2)
    assert files() == {"a.csv": b"new" if refusals == 3 else b"old"}


def test_a_file_that_is_waited_for_is_removed_in_the_end() -> None:
    Path("a").touch()
    retry(Path("a").unlink, Path("a"))
    assert files() == {}


def script(body: str) -> list[str]:
    """Return a command that runs a script whose main() has this body, as the stages are run."""
    code = f"import os, signal, sys\nfrom CNN import run_script\ndef main(): {body}\nrun_script(main)"
    return [sys.executable, "-c", code]


def test_ctrl_c_ends_a_script_with_one_line() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # a shell that runs the tests in the background has the signal ignored
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = script(f"{listen}; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "interrupted\n")


def test_a_reader_that_goes_away_ends_a_script_with_one_line() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        script("[print(line) for line in range(9)]"),
        env=environment,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nobody reads" in done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_a_terminal_lacks_are_replaced(encoding: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        script(r"print('\u017c\u00f3\u0142w'); print('end')"), env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    first, last = done.stdout.splitlines()
    assert first.endswith(b"?w") and last == b"end"
