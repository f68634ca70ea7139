"""`mobilevit compare`."""

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import check_refused, files_in, refused, run


def test_compare(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("compare", "--only", "mobilenetv3-small", "--no-time", "--out", "table") == 0
    out, err = capsys.readouterr()
    *shown, line = out.splitlines()
    assert [row["name"] for row in json.loads(line)["rows"]] == [
        "mobilenetv3-small",
        *(f"mobilevit-{size}" for size in ("xxs", "xs", "s")),
    ]
    assert (here / "table/table.json").read_text() == f"{line}\n"
    files = {"table.md", "table.csv", "table.json", "accuracy_parameters_cnn.png"}
    assert files_in(here / "table") == files
    assert {str(Path("table", file)) for file in files} == set(shown[-4:])
    first = next(text for text in shown if text.split()[:1] == ["mobilenetv3-small"]).split()
    assert first[1:5] == ["224", "2.54", "0.057", "/"]
    assert "mobilenetv3-small" in err


def test_options_of_compare(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from mobilevit.compare import run as compare_run

    calls: list[Any] = []

    def record(models: Any, size_px: int | None, options: Any) -> None:
        calls.append((size_px, options))
        raise ValueError("stop here")

    monkeypatch.setattr(compare_run, "compare", record)
    assert "stop here" in refused(capsys, "compare")
    options = ["--runtime", "onnx", "--batch", "2", "1", "2", "--baseline", "mobilevit-s", "--size", "96"]
    assert "stop here" in refused(capsys, "compare", *options, "--rounds", "3", "--num-threads", "1")
    (no_size, defaults), (size, given) = calls
    assert (defaults.runtimes, defaults.batch_sizes, no_size) == (("torch", "onnx"), (1,), None)
    assert (given.runtimes, given.batch_sizes, size) == (("onnx",), (2, 1), 96)
    assert (given.baseline, given.num_rounds, given.num_threads) == ("mobilevit-s", 3, 1)


@pytest.mark.slow
def test_compare_by_training(capsys: pytest.CaptureFixture[str], here: Path):
    args = ["compare", "--data", "classes", "--only", "deit-84-patch8", "--epochs", "1", "--seeds", "0"]
    args += ["--batch-size", "4", "--lr", "1e-3", "--no-flip"]
    assert run(*args, "--size", "32", "--out", "out", "--runtime", "torch", "--rounds", "2") == 0
    out, err = capsys.readouterr()
    line = out.splitlines()[-1]
    report = json.loads(line)
    assert [row["name"] for row in report["rows"]] == ["mobilevit-xxs", "deit-84-patch8"]
    recipe = report["recipe"]
    assert (recipe["epochs"], recipe["batch_size"], recipe["optimizer"]["lr"]) == (1, 4, 1e-3)
    assert recipe["optimizer"]["clip_norm"] == 1
    assert (recipe["data"]["size_px"], recipe["data"]["flip"], report["seeds"]) == (32, False, [0])
    assert (here / "out/table.json").read_text() == f"{line}\n"
    assert [timing["runtime"] for row in report["rows"] for timing in row["timings"]] == ["torch"] * 2
    figures = {"accuracy_parameters.png", "learning_curves.png", "accuracy_latency_torch.png"}
    assert {file.name for file in (here / "out").iterdir()} == {"runs", "table.md", "table.csv", "table.json", *figures}
    assert all(fact in err for fact in ("deit-84-patch8", "seed 0", "run 2 of 2"))
    assert run(*args, "--size", "32", "--out", "out", "--no-time") == 0
    out, err = capsys.readouterr()
    untimed = [row | {"timings": []} for row in report["rows"]]
    assert json.loads(out.splitlines()[-1])["rows"] == untimed
    assert "validation top1" not in err  # finished runs are not repeated
    assert run("predict", "out/runs/mobilevit-xxs/seed-0/model.safetensors", "photos/a.png") == 0
    other = "out/runs/deit-84-patch8/seed-0/model.safetensors"
    check_refused(capsys, f"predict {other} photos/a.png", f"{other} deit-84-patch8")
    assert run(*args, "--size", "52", "--out", "odd", "--no-time") == 1
    out, err = capsys.readouterr()
    assert "deit-84-patch8 requires a multiple of 8" in out
    assert "deit-84-patch8, all seeds: cannot be built for 52 px and 2 classes" in err


MISTAKES = {
    "--only mobilnetv2": "'mobilnetv2' did you mean mobilenetv2-",
    "--only deit-tiny --size 100": "--size 100; deit-tiny multiple of 32",
    "--rounds 0": "--rounds 0 1 or more",
    "--num-threads 0": "--num-threads 0",
    "--batch-size 1 0": "--batch-size 0",
    "--no-time --runtime torch": "--no-time --runtime",
    "--runtime abacus": "--runtime 'abacus' 'torch', 'onnx'",
    "--baseline resnet": "'resnet' mobilevit-xxs",
    "--device abacus": "'abacus'",
    "--out photos/a.png": "photos/a.png file --out folder",
    "--epochs 3": "--epochs --data",
    "--seeds 3": "--seeds --data",
    "--num-workers 0": "--num-workers --data",
    "--data nowhere": "nowhere",
    "--data classes --only deit-84": "'deit-84' did you mean deit-84-patch8",
    "--data classes --epochs 0": "epochs 0 1 or more",
    "--data classes --lr 0": "--lr 0.0 above 0",
    "--data classes --clip-norm -1": "--clip-norm -1.0 0 or more",
    "--data classes --batch-size 8 16": "--batch-size 8 16; one",
    "--data classes --seeds 1 1": "--seeds 1, 1",
    "--data classes --seeds 0 -1": "seed -1",
    "--data classes --no-time --runtime onnx": "--no-time --runtime",
    "--data classes --recipe paper-s": "--recipe 'paper-s' 'small' 'plain' 'tiny'",
    "--task multilabel": "--task --data",
    "--data classes --task multilabel": "classes label file .csv",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    check_refused(capsys, f"compare {args}", facts)
