"""`mobilevit train`."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import check_refused, files_in, run
from mobilevit.predict import load
from mobilevit.recipes import RECIPES
from mobilevit.report.training import Origin
from mobilevit.training import loop

TRAIN = "train tiny --data classes --epochs 2 --batch-size 3 --num-workers 0 --device cpu"


def test_train_then_use(capsys: pytest.CaptureFixture[str], here: Path):
    overrides = "--optimizer.lr 1e-4 --data.flip"
    train = f"{TRAIN} {overrides} --weights classifier.safetensors"
    assert run(train) == 0
    out, err = capsys.readouterr()
    result = "runs/classes/model.safetensors"
    assert re.search(rf"{result}: .*top-1 [\d.]+ %\n", out)
    assert "runs/classes/report.html" in out
    assert f"mobilevit predict {result} IMAGE..." in out
    assert "classes: has no validation split: 2 of 6 images" in err
    files = {"model.safetensors", "best.safetensors", "raw.safetensors", "metrics.jsonl", "steps.jsonl", "report.html"}
    files |= {"run.json", ".lock", "checkpoints/000000001.pt", "checkpoints/000000002.pt"}  # one step per epoch
    assert files_in(here / "runs") == {f"classes/{name}" for name in files}
    recipe = json.loads(Path("runs/classes/run.json").read_text())["recipe"]
    assert (recipe["epochs"], recipe["optimizer"]["lr"], recipe["data"]["flip"]) == (2, 1e-4, True)
    assert recipe["data"]["size_px"] == RECIPES["tiny"].data.size_px
    trained = load(result)
    assert trained.class_names == ("x", "y")
    assert trained.architecture.name == "xxs"

    assert run("predict runs/classes photos/a.png --json") == 0
    assert {p["class"] for p in json.loads(capsys.readouterr().out)["predictions"]} == {"x", "y"}

    before = {name: (here / "runs" / name).read_bytes() for name in files_in(here / "runs")}
    assert run(train) == 0
    err = capsys.readouterr().err
    assert all(fact in err for fact in ("runs/classes", "finished", "--epochs"))
    check_refused(capsys, f"{train} --seed 3", "runs/classes recipe.seed 0 3 another folder")
    check_refused(capsys, f"{TRAIN} {overrides}", "weights")
    assert {name: (here / "runs" / name).read_bytes() for name in files_in(here / "runs")} == before


def test_a_full_disk(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    saved: list[Path] = []
    save = torch.save

    def save_once(state: object, file: Path) -> None:
        if saved:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(file)
        save(state, file)

    with monkeypatch.context() as change:
        change.setattr(torch, "save", save_once)
        assert run(TRAIN) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "mobilevit: runs/classes/checkpoints/000000002.pt: no space left on device"
    assert files_in(here / "runs/classes/checkpoints") == {"000000001.pt"}
    assert run(TRAIN) == 0  # resumes when there is space again
    assert "step 1" in capsys.readouterr().err
    assert len((here / "runs/classes/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "data", "out"),
    [
        ("hf:owner/flowers", "hf:owner/flowers", "runs/flowers"),
        ("~/photos", "HOME/photos", "runs/photos"),
        ("classes", "classes", "runs/classes"),
        (".", ".", "runs/HERE"),
    ],
)
def test_arguments_of_train(here: Path, monkeypatch: pytest.MonkeyPatch, given: str, data: str, out: str):
    calls: list[Any] = []

    def train(*arguments: Any, **options: Any) -> None:
        calls.append((arguments, options))
        raise ValueError("stop here")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setenv("HOME", str(here / "home"))
    assert run("train", "finetune", f"--data={given}", "--device", "cpu", "--checkpoint-minutes", "7") == 2
    expected = (RECIPES["finetune"], data.replace("HOME", str(here / "home")), Path(out.replace("HERE", here.name)))
    options = {
        "pretrained": None,
        "teacher": None,
        "device": "cpu",
        "checkpoint_minutes": 7.0,
        "trackers": (),
        "self_check": True,
        "extend": True,
    }
    options["origin"] = Origin(
        "finetune", f"mobilevit train finetune {shlex.quote(f'--data={given}')} --device cpu --checkpoint-minutes 7"
    )
    assert calls == [(expected, options)]


MISTAKES = {
    "--data missing": "missing: no such folder",
    "samll --data classes": "'samll' did you mean small?",
    "--data classes samll": "'samll' did you mean small?",
    "--data classes tiny": "RECIPE 'tiny' before",
    "--data classes --weights photos/missing": "photos/missing no such file in photos; check the name",
    "--data classes --metric map": "--metric map classify top1, balanced_accuracy, macro_f1",
    "--data classes --distill.temperature 3": "--distill.temperature 3.0 --teacher",
    "--data classes --multilabel.loss asymmetric": "--multilabel.loss asymmetric recipe multilabel",
    "--data 'photos/[old]'": "photos/[old] folders",
    "--data classes/x/0.png": "classes/x/0.png folder",
    "--data https://host/flowers.zip": "https://host/flowers.zip URL download",
    "--data hf:": "hf:",
    "--data classes --weights missing.pt": "missing.pt: no such file",
    "--data classes --weights classifier.safetensors --architecture s": (
        "--architecture s classifier.safetensors MobileViT-XXS MobileViT-S"
    ),
    "--data classes --num-threads 0": "--num-threads 0 1 or more",
    "--data classes --out photos/a.png": "photos/a.png not a directory",
    "--data classes --out photos/a.png/b": "photos/a.png/b not a directory",
    "--data classes --checkpoint-minutes 0": "--checkpoint-minutes 0.0 above 0",
    "--data classes --checkpoint-minutes nan": "--checkpoint-minutes nan above 0",
    "--data classes --freeze stage3": "--freeze stage3 --weights",
    "--data classes --max-megapixels 1e-4": "classes/x/0.png large --max-megapixels --max-unreadable 6",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    check_refused(capsys, f"train {args}", facts)
    assert not (here / "runs").exists()


def test_resumes_after_signals(here: Path):
    command = [sys.executable, "-m", "mobilevit", "train", "tiny", "--data", "classes", "--device", "cpu"]
    command += ["--epochs", "1000", "--batch-size", "3", "--num-workers", "0", "--checkpoint-minutes", "1e-9"]
    checkpoints = here / "runs/classes/checkpoints"

    def last_step() -> int:
        return max((int(file.stem) for file in checkpoints.glob("[0-9]*.pt")), default=0)

    stopped_after = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
            while last_step() < stopped_after + 2 and program.poll() is None:
                time.sleep(0.01)
            program.send_signal(number)
            out, err = program.communicate()
        assert program.returncode == code, err
        assert out == ""
        assert "Traceback" not in err
        if stopped_after:
            assert f"step {stopped_after}" in err
        stop = re.fullmatch(r"mobilevit: .* step (\d+) .*runs/classes.*", err.splitlines()[-1])
        assert stop, err
        stopped_after = int(stop[1])
        assert stopped_after == last_step() < 1000
