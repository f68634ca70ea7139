"""A run that is killed and resumed writes bit-identical weights and metrics."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.recipes import Compute, Data, Imbalance, Multilabel, Optimizer, Recipe, Sampler, to_dict
from mobilevit.training.loop import TIMES, Stopped, train
from mobilevit.weights import read
from small_runs import scenes

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # where there is one core
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]
# Everything that is random: two image sizes, dropout, random crops and flips. Several micro-batches per step. 10 steps.
RECIPE = Recipe(
    architecture="xxs",
    epochs=3,
    batch_size=8,
    data=Data(size_px=32, eval_resize=1.0, num_workers=0),
    sampler=Sampler("equation", (32, 64)),
    optimizer=Optimizer(warmup_steps=2),
    compute=Compute(micro_batch_size=4),
)
# Started by torchrun; the recipe is an argument.
PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from mobilevit.recipes import from_dict
from mobilevit.training.loop import train
import json, os
Path(sys.argv[3]).with_suffix(".pid" + os.environ["RANK"]).write_text(str(os.getpid()))
train(from_dict(json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3]), checkpoint_minutes=float(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for split, num in (("train", 24), ("val", 3)):
        for label, class_name in enumerate("ab"):
            for i in range(num):
                file = folder / split / class_name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, 100 + 100 * label, (40, 36, 3), dtype=np.uint8)).save(file)
    return folder


def start(run: Callable[[], object]) -> int:
    """The PID of a child process that calls `run` with one thread."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        run()
        code = 0
    except Stopped as stopped:
        code = 128 + stopped.signal_number
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(child: int) -> int:
    """The exit code of a child process; negative if a signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results_of(out: Path) -> dict[str, Any]:
    """The results of a run, without times."""

    def lines(name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (out / name).read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in TIMES} for line in found]

    files = {name: read(out / f"{name}.safetensors") for name in ("model", "raw", "best")}
    weights = {
        name: ({key: tensor.numpy().tobytes() for key, tensor in file.tensors.items()}, file.training["metrics"])
        for name, file in files.items()
    }
    return {**weights, "epochs": lines("metrics.jsonl"), "steps": lines("steps.jsonl")}


def last_step(out: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(file.stem) for file in out.glob("checkpoints/[0-9]*.pt")), default=0)


def wait_for_step(out: Path, step: int, child: int) -> None:
    """Wait until a checkpoint of `step` exists, or the child has ended."""
    while last_step(out) < step and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)


def weight_files(out: Path) -> dict[str, bytes]:
    """The bytes of the weight files."""
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


@pytest.fixture(scope="module")
def uninterrupted_out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert end(start(lambda: train(RECIPE, data, out))) == 0
    return out


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_out: Path) -> dict[str, Any]:
    """The results of an uninterrupted run."""
    return results_of(uninterrupted_out)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_times(uninterrupted: dict[str, Any], data: Path, tmp_path: Path, num_workers: int):
    expected = uninterrupted
    recipe = replace(RECIPE, data=replace(RECIPE.data, num_workers=num_workers))
    rng = random.Random(num_workers)
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        # With a checkpoint after every step, most of the time is spent in writing one.
        child = start(lambda: train(recipe, data, tmp_path / "run", checkpoint_minutes=1e-9))
        if len(codes) < 8:
            wait_for_step(tmp_path / "run", last_step(tmp_path / "run") + rng.randint(0, 2), child)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        codes.append(end(child))
    assert codes[-1] == 0
    assert len(codes) > 4
    assert results_of(tmp_path / "run") == expected
    steps = [line["step"] for line in expected["steps"]]
    assert steps == list(range(1, len(steps) + 1))


def test_killed_while_a_checkpoint_is_written(
    uninterrupted: dict[str, Any], uninterrupted_out: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Half a temporary file, a complete temporary file, one checkpoint too many."""
    save = torch.save

    def save_half(state: object, path: Path) -> None:
        save(state, path)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_whole(state: object, path: Path) -> None:
        save(state, path)
        os.kill(os.getpid(), signal.SIGKILL)

    unlink = Path.unlink

    def kill(path: Path, **options: Any) -> None:
        if path.suffix == ".pt":  # an old checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(path, **options)

    out = tmp_path / "run"
    for change in (
        lambda: monkeypatch.setattr(torch, "save", save_half),
        lambda: monkeypatch.setattr(torch, "save", save_whole),
        lambda: monkeypatch.setattr(Path, "unlink", kill),
    ):
        child = start(lambda: (change(), train(RECIPE, data, out, checkpoint_minutes=1e-9)))  # noqa: B023
        assert end(child) == -signal.SIGKILL
    assert end(start(lambda: train(RECIPE, data, out))) == 0
    assert results_of(out) == uninterrupted
    assert weight_files(out) == weight_files(uninterrupted_out)
    assert len(list((out / "checkpoints").iterdir())) == 2


def test_a_run_of_an_earlier_version_resumes(uninterrupted: dict[str, Any], data: Path, tmp_path: Path):
    """Version 0.1 used other keys in recipes, logs and checkpoints, and compared `max_unreadable`."""
    child = start(lambda: train(RECIPE, data, tmp_path, checkpoint_minutes=1e-9))
    wait_for_step(tmp_path, 5, child)
    os.kill(child, signal.SIGKILL)
    assert end(child) == -signal.SIGKILL
    facts = json.loads((tmp_path / "run.json").read_text())
    assert not {"imbalance", "metric", "patience"} & facts["recipe"].keys()  # its recipes did not have these
    assert not {"schedule", "cooldown_fraction"} & facts["recipe"]["optimizer"].keys()
    compute = facts["recipe"]["compute"]
    compute["pictures_at_once"] = compute.pop("micro_batch_size")
    facts["recipe"]["data"]["max_unreadable"] = 3
    (tmp_path / "run.json").write_text(json.dumps(facts))
    for name in ("metrics.jsonl", "steps.jsonl"):
        text = (tmp_path / name).read_text().replace('"data_wait_fraction"', '"waiting_share"')
        for old, new in (("pictures", "images"), ("pictures_per_second", "images_per_second")):
            text = text.replace(f'"{new}"', f'"{old}"').replace(f'"val_num_{new}"', f'"val_num_{old}"')
        (tmp_path / name).write_text(text)
    for file in tmp_path.glob("checkpoints/*.pt"):
        state = torch.load(file, weights_only=True)
        position = state.pop("progress")
        del position["main_metric"]
        position["waited"] = position.pop("data_wait_seconds")
        for record in position["history"]:
            record["val_num_pictures"] = record.pop("val_num_images")
            record["pictures_per_second"] = record.pop("images_per_second")
            record["waiting_share"] = record.pop("data_wait_fraction")
            for name in ("balanced_accuracy", "macro_f1"):
                del record[f"val_{name}"], record[f"raw_{name}"]
        torch.save({**state, "position": position, "average": state.pop("ema")}, file)
    assert end(start(lambda: train(RECIPE, data, tmp_path))) == 0
    assert results_of(tmp_path) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_and_saves_the_step(
    uninterrupted: dict[str, Any], data: Path, tmp_path: Path, number: signal.Signals
):
    recipe = replace(RECIPE, data=replace(RECIPE.data, num_workers=2))  # workers receive Ctrl-C, too
    child = start(lambda: (os.setpgrp(), train(recipe, data, tmp_path, checkpoint_minutes=1e-9)))
    wait_for_step(tmp_path, 1, child)
    os.killpg(child, number)
    assert end(child) == 128 + number
    done = len((tmp_path / "steps.jsonl").read_text().splitlines())
    assert last_step(tmp_path) == done < len(uninterrupted["steps"])
    assert end(start(lambda: train(recipe, data, tmp_path))) == 0
    assert results_of(tmp_path) == uninterrupted


def test_an_extended_run_killed_and_resumed(uninterrupted: dict[str, Any], data: Path, tmp_path: Path):
    """Two additional epochs at a constant learning rate; the epochs before them do not change."""
    longer, whole, killed = replace(RECIPE, epochs=5), tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        assert end(start(partial(train, RECIPE, data, out))) == 0
    assert end(start(lambda: train(longer, data, whole, extend=True))) == 0
    expected, num_steps = results_of(whole), len(uninterrupted["steps"])
    assert expected["epochs"][:3] == uninterrupted["epochs"]
    assert expected["steps"][:num_steps] == uninterrupted["steps"]
    assert [line["epoch"] for line in expected["epochs"]] == [1, 2, 3, 4, 5]
    assert {line["lr"] for line in expected["steps"][num_steps:]} == {RECIPE.optimizer.end_lr}
    for step in (1, 5):
        child = start(lambda: train(longer, data, killed, extend=True, checkpoint_minutes=1e-9))
        wait_for_step(killed, num_steps + step, child)
        os.kill(child, signal.SIGKILL)
        assert end(child) == -signal.SIGKILL
    assert end(start(lambda: train(longer, data, killed))) == 0  # without extend: run.json has the new number of epochs
    assert results_of(killed) == expected
    assert weight_files(killed) == weight_files(whole)
    assert json.loads((killed / "run.json").read_text()) == json.loads((whole / "run.json").read_text())


def torchrun(recipe: Recipe, data: Path, out: Path, minutes: float, *options: str) -> subprocess.Popen[bytes]:
    program = out.with_suffix(".py")
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *options]
    arguments = [json.dumps(to_dict(recipe)), str(data), str(out), str(minutes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (out.parent / "stderr").open("wb") as stderr:
        return subprocess.Popen([*command, str(program), *arguments], env=environment, stderr=stderr)


def ends_well(running: subprocess.Popen[bytes], out: Path) -> None:
    try:
        assert running.wait(120) == 0, (out.parent / "stderr").read_text()
    finally:
        running.kill()
        running.wait()


# Two micro-batches per step: of one process, or of two.
IN_TWO = replace(RECIPE, epochs=2, sampler=Sampler())


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of an uninterrupted run in two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    running = torchrun(IN_TWO, data, out, 5)
    ends_well(running, out)
    return results_of(out)


def test_two_processes_match_one(two: dict[str, Any], data: Path, tmp_path: Path):
    """Batches, crops, dropout masks and running statistics are equal, and a sum of two numbers is commutative."""
    assert end(start(lambda: train(IN_TWO, data, tmp_path))) == 0
    one = results_of(tmp_path)
    assert [line["loss"] for line in two["steps"]] == pytest.approx([line["loss"] for line in one["steps"]], rel=1e-6)
    assert [line["lr"] for line in two["steps"]] == [line["lr"] for line in one["steps"]]
    for ours, theirs in zip(one["epochs"], two["epochs"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    for name in ("model", "raw", "best"):
        for key, value in one[name][0].items():
            if not key.endswith("num_batches_tracked"):  # counts the micro-batches of a process
                theirs = np.frombuffer(two[name][0][key], np.float32)
                np.testing.assert_allclose(theirs, np.frombuffer(value, np.float32), rtol=1e-4, atol=1e-6, err_msg=key)


def train_in_processes(world: int, recipe: Recipe, data: Path, out: Path) -> dict[str, Any]:
    """The results of a run in `world` forked processes."""

    def train_as(rank: int, port: int) -> None:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in where.items()})
        signal.alarm(100)  # if one fails, the other waits for it
        train(recipe, data, out)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(partial(train_as, rank, port)) for rank in range(world)]
    assert [end(child) for child in children] == [0] * world
    return results_of(out)


def check_killed_and_resumed(recipe: Recipe, data: Any, out: Path, *, step: int, whole: dict[str, Any]) -> None:
    """Kill a run after a step and resume it: its results are those of an uninterrupted run."""
    child = start(lambda: train(recipe, data, out, checkpoint_minutes=1e-9))
    wait_for_step(out, step, child)
    os.kill(child, signal.SIGKILL)
    assert end(child) == -signal.SIGKILL
    assert end(start(lambda: train(recipe, data, out))) == 0
    assert results_of(out) == whole


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with 22, 7 and 3 training images."""
    folder = tmp_path_factory.mktemp("imbalanced")
    draw = np.random.default_rng(0)
    for split, counts in (("train", (22, 7, 3)), ("val", (2, 2, 2))):
        for label, num in enumerate(counts):
            for i in range(num):
                file = folder / split / "abc"[label] / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, 100 + 70 * label, (40, 36, 3), dtype=np.uint8)).save(file)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        Imbalance(balanced_sampler=True),
        Imbalance(class_weights=0.5),
        pytest.param(Imbalance(logit_adjustment=1.0), marks=pytest.mark.slow),
    ],
)
def test_two_processes_match_one_and_a_killed_run_resumes_with_imbalanced_classes(
    options: Imbalance, imbalanced: Path, tmp_path: Path
):
    recipe = replace(IN_TWO, imbalance=options)
    one, two = (train_in_processes(world, recipe, imbalanced, tmp_path / str(world)) for world in (1, 2))
    assert [line["loss"] for line in two["steps"]] == pytest.approx([line["loss"] for line in one["steps"]], rel=1e-6)
    check_killed_and_resumed(recipe, imbalanced, tmp_path / "killed", step=5, whole=one)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_two_processes_match_one_and_a_killed_run_resumes_with_several_labels(loss: Any, tmp_path: Path):
    draw = np.random.default_rng(0)
    rows = ["path,labels,split"]
    for i in range(40):
        has = draw.random(3) < 0.4 if i > 3 else np.arange(3) == i  # the fourth image has none
        pixels = draw.integers(0, 90, (40, 36, 3), dtype=np.uint8)
        pixels[8:32, 4:30, has] = 220
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'|'.join(np.array(['r', 'g', 'b'])[has])},{'train' if i < 32 else 'val'}")
    data = tmp_path / "labels.csv"
    data.write_text("\n".join(rows) + "\n")
    recipe = replace(IN_TWO, task="multilabel", label_smoothing=0.0, multilabel=Multilabel(loss))
    one, two = (train_in_processes(world, recipe, data, tmp_path / str(world)) for world in (1, 2))
    assert len(one["steps"]) == 8
    assert [line["loss"] for line in two["steps"]] == pytest.approx([line["loss"] for line in one["steps"]], rel=1e-6)
    for ours, theirs in zip(one["epochs"], two["epochs"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    thresholds = [read(tmp_path / str(world) / "model.safetensors").thresholds for world in (1, 2)]
    assert thresholds[1] == pytest.approx(thresholds[0], abs=1e-6)
    check_killed_and_resumed(recipe, data, tmp_path / "killed", step=5, whole=one)


class Noise:
    """A dataset in Python: arrays that depend on the index, brighter for the second class."""

    class_names = ("dark", "bright")

    def __init__(self, num_images: int, seed: int):
        self.num_images, self.seed = num_images, seed

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        draw = np.random.default_rng((self.seed, index))
        return draw.integers(0, 100 + 100 * (index % 2), (40, 36, 3), dtype=np.uint8), index % 2


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_on_python_datasets_resumes(num_workers: int, tmp_path: Path):
    recipe = replace(RECIPE, epochs=2, data=replace(RECIPE.data, num_workers=num_workers))
    data = Noise(32, seed=0), Noise(6, seed=1)
    assert end(start(lambda: train(recipe, data, tmp_path / "whole"))) == 0
    check_killed_and_resumed(recipe, data, tmp_path / "killed", step=2, whole=results_of(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_match_one_and_a_killed_run_resumes_in_quantization_aware_training(data: Path, tmp_path: Path):
    recipe = replace(IN_TWO, compute=replace(IN_TWO.compute, quantization_aware=True))
    one, two = (train_in_processes(world, recipe, data, tmp_path / str(world)) for world in (1, 2))
    assert [line["loss"] for line in two["steps"]] == pytest.approx([line["loss"] for line in one["steps"]], rel=1e-6)
    assert [line["int8_loss"] for line in two["epochs"]] == pytest.approx(
        [line["int8_loss"] for line in one["epochs"]], rel=1e-4
    )
    child = start(lambda: train(recipe, data, tmp_path / "killed", checkpoint_minutes=1e-9))
    wait_for_step(tmp_path / "killed", 5, child)
    os.kill(child, signal.SIGKILL)
    assert end(child) == -signal.SIGKILL
    assert end(start(lambda: train(recipe, data, tmp_path / "killed"))) == 0
    assert results_of(tmp_path / "killed") == one


@pytest.mark.parametrize(
    ("task", "metric"), [("detect", "ap"), pytest.param("segment", "miou", marks=pytest.mark.slow)]
)
def test_two_processes_match_one_for_boxes_and_masks(task: str, metric: str, tmp_path: Path):
    data = scenes(tmp_path / "data", task)
    recipe = replace(IN_TWO, task=task, data=Data(size_px=64, num_workers=0), optimizer=Optimizer(warmup_steps=1))

    found = [train_in_processes(world, recipe, data, tmp_path / str(world)) for world in (1, 2)]
    one, two = found
    assert len(one["steps"]) == 4
    for ours, theirs in zip(one["steps"] + one["epochs"], two["steps"] + two["epochs"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    assert one["epochs"][-1][f"raw_{metric}"] > 0
    assert one["epochs"][-1]["val_num_images"] == 6
    for key, value in one["raw"][0].items():
        if not key.endswith("num_batches_tracked"):  # counts the micro-batches of a process
            theirs = np.frombuffer(two["raw"][0][key], np.float32)
            np.testing.assert_allclose(theirs, np.frombuffer(value, np.float32), rtol=1e-3, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(two: dict[str, Any], data: Path, tmp_path: Path):
    out = tmp_path / "run"
    running = torchrun(IN_TWO, data, out, 1e-9, "--max-restarts", "3")
    for num_steps in (2, 5):
        while running.poll() is None and last_step(out) < num_steps:
            time.sleep(0.01)
        os.kill(int(out.with_suffix(f".pid{num_steps % 2}").read_text()), signal.SIGKILL)
    ends_well(running, out)
    assert results_of(out) == two
