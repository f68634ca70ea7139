"""The command line as a user meets it: what it prints, what it leaves, its exit codes, and its mistakes in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mobilevit
from conftest import randomise
from mobilevit.cli import main
from mobilevit.models.weights import read
from mobilevit.pictures import Preprocessing
from mobilevit.predict import Classifier, load, save

COMMANDS = ["predict", "train", "evaluate", "info", "convert"]
# Names that look like the markup of a terminal library.
NAMES = ("[bold]ant[/bold]", ":bee:", "cat [/]")
PROGRAM = Path(sys.executable).with_name("mobilevit")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = Classifier("xxs", num_classes=3)
    randomise(model)
    model.class_names, model.preprocessing = NAMES, Preprocessing(resize_px=36, crop_px=32)
    path = tmp_path_factory.mktemp("weights") / "three.safetensors"
    save(model, path)
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: photos/ with three good pictures and a bad one, classes/ with two classes of three."""
    random = np.random.default_rng(0)
    photos = ["photos/a.png", "photos/[old]/b.png", "photos/d.jpg"]
    for name in [*photos, *(f"classes/{label}/{i}.png" for label in "xy" for i in range(3))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 33, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "photos/c.png").write_bytes((tmp_path / "photos/a.png").read_bytes()[:500])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def mistake(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the one line says with which `args` are refused."""
    capsys.readouterr()
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"mobilevit: \S.*\n", err), err
    return err


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Help


def test_help(capsys: pytest.CaptureFixture[str]):
    for args in ([], ["-h"], ["--help"]):
        assert run(*args) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert re.findall(r"^  (\w+) +[A-Z].*\.$", out, re.MULTILINE) == COMMANDS
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{mobilevit.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], command: str):
    assert run(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: mobilevit {command}")


def test_help_waits_for_no_torch():
    program = """
import sys
from mobilevit.cli import main
for args in (["--help"], ["--version"], ["trian"], ["train", "--help"], ["predict", "--top-k", "x"]):
    try:
        main(args)
    except SystemExit:
        assert "torch" not in sys.modules, args
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


# A new option is a decision: write it here as well, and remember that none has ever been removed from a program in use.
TRAIN_OPTIONS = {
    "--data",
    "--out",
    "--weights",
    "--download",
    "--device",
    "--architecture",
    "--epochs",
    "--batch-size",
    "--label-smoothing",
    "--ema-decay",
    "--seed",
    "--data.size-px",
    "--data.eval-resize",
    "--data.min-scale",
    "--data.flip",
    "--data.val-fraction",
    "--data.num-workers",
    "--sampler.variant",
    "--sampler.sizes-px",
    "--optimizer.start-lr",
    "--optimizer.lr",
    "--optimizer.end-lr",
    "--optimizer.warmup-steps",
    "--optimizer.weight-decay",
}


@pytest.mark.parametrize("recipe", ["plain", "small"])
def test_options_of_train(capsys: pytest.CaptureFixture[str], recipe: str):
    assert run("train", recipe, "--help") == 0
    options = set(re.findall(r" (--[a-z][a-z.-]+)", capsys.readouterr().out)) - {"--help"}
    assert {re.sub(r"(--|\.)no-", r"\1", option) for option in options} == TRAIN_OPTIONS
    assert len(TRAIN_OPTIONS) <= 45


# ---------------------------------------------------------------------------------------------------------------------
# Predict


def test_predict_in_a_table(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    assert run("predict", weights, "photos", "--top-k", "2") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mobilevit: photos/c\.png: damaged picture .+\n", err)
    model = load(weights)
    expected = []
    for name in ("photos/[old]/b.png", "photos/a.png", "photos/d.jpg"):
        first, second = model.predict(here / name, top_k=2)
        expected.append([name, *first.class_name.split(), f"{100 * first.probability:.1f}", "%"])
        expected.append([*second.class_name.split(), f"{100 * second.probability:.1f}", "%"])
    assert [line.split() for line in out.splitlines() if "%" in line] == expected


def test_predict_in_json(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    assert run("predict", weights, "photos/d.jpg", "photos/c.png", "photos/*/b.png", "--json", "--batch-size", "2") == 1
    out, err = capsys.readouterr()
    good, bad, other = map(json.loads, out.splitlines())
    assert bad == {"picture": "photos/c.png", "error": err.removeprefix("mobilevit: ").rstrip()}
    model = load(weights)
    for line in (good, other):
        predictions = model.predict(line["picture"])
        assert [p["index"] for p in line["predictions"]] == [p.class_index for p in predictions]
        assert [p["class"] for p in line["predictions"]] == [p.class_name for p in predictions]
        assert [p["probability"] for p in line["predictions"]] == pytest.approx([p.probability for p in predictions])
    assert (good["picture"], other["picture"]) == ("photos/d.jpg", "photos/[old]/b.png")


def test_predict_all_is_well(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    assert run("predict", weights, "photos/a.png", "--device", "cpu") == 0
    assert capsys.readouterr().err == ""


def test_the_bar_takes_nothing_from_the_output(
    capsys: pytest.CaptureFixture[str], here: Path, weights: str, monkeypatch: pytest.MonkeyPatch
):
    for i in range(40):
        (here / f"many{i}.png").write_bytes((here / "photos/a.png").read_bytes())
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr is a terminal, stdout a pipe
    assert run("predict", weights, "many*.png", "photos/c.png", "--json") == 1
    out, err = capsys.readouterr()
    assert len([json.loads(line) for line in out.splitlines()]) == 41
    assert "predicting" in err


def test_mistakes_of_predict(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    (here / "empty").mkdir()
    headless = str(here / "headless.safetensors")
    save(Classifier("xxs", num_classes=0), headless)
    for args, said in {
        (): "WEIGHTS",
        (weights,): "no picture is named",
        (weights, "missing.jpg"): "missing.jpg: no such picture",
        (weights, "empty"): "empty: no pictures",
        (weights, "photos", "--top-k", "0"): "top_k is 0",
        (weights, "photos", "--top-k", "many"): "--top-k: .*'many'",
        (weights, "photos", "--batch-size", "-1"): "batch size is -1",
        (weights, "photos", "--bach-size", "1"): "Unrecognized options: --bach-size.*--batch-size",
        (weights, "photos", "--device", "toaster"): "device 'toaster' cannot be used",
        (headless, "photos"): "no classifier",
        ("missing.safetensors", "photos"): "missing.safetensors: no such file",
        ("photos/a.png", "photos"): "is it really weights",
        ("empty", "photos"): "empty: a folder of weights holds",
    }.items():
        assert re.search(said, mistake(capsys, "predict", *args)), args


# ---------------------------------------------------------------------------------------------------------------------
# Info


@pytest.mark.parametrize(
    ("size", "shown", "feature_map"),
    [([], "256 x 256", "8 x 8"), (["--size", "97"], "97 x 97", "4 x 4"), (["--size", "64", "97"], "64 x 97", "2 x 4")],
    ids=["default", "one", "two"],
)
def test_info_of_a_name(capsys: pytest.CaptureFixture[str], size: list[str], shown: str, feature_map: str):
    assert run("info", "xs", *size) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"MobileViT-XS, {shown} px")
    assert "2,317,848 parameters" in out  # paper, table 1: 2.3 M
    assert re.search(rf"stage5\D+96\D+{feature_map} ", out)


def test_info_of_weights(capsys: pytest.CaptureFixture[str], weights: str):
    assert run("info", weights) == 0
    out = capsys.readouterr().out
    assert f"classes: 3 ({', '.join(NAMES)})" in out
    assert "short side to 36 px bilinear, middle 32 px" in out
    assert "MobileViT-XXS, 32 x 32 px" in out


def test_mistakes_of_info(capsys: pytest.CaptureFixture[str]):
    for args, said in {
        (): "NETWORK",
        ("xxl",): "xxl: no such file",
        ("xs", "--size", "31"): "from 32 px up",
        ("xs", "--size", "64", "64", "64"): "one side or height and width",
        ("xs", "--size", "big"): "--size",
        ("nobody/nothing",): "--download",
    }.items():
        assert re.search(said, mistake(capsys, "info", *args)), args


# ---------------------------------------------------------------------------------------------------------------------
# Convert


@pytest.mark.parametrize(
    ("to", "target", "files"),
    [
        ("mobilevit", "new/a.safetensors", {"new/a.safetensors"}),
        ("timm", "a.safetensors", {"a.safetensors"}),
        ("apple", "a.pt", {"a.pt"}),
        ("transformers", "a", {"a/config.json", "a/preprocessor_config.json", "a/model.safetensors"}),
    ],
)
def test_convert(capsys: pytest.CaptureFixture[str], here: Path, weights: str, to: str, target: str, files: set[str]):
    before = names(here)
    assert run("convert", weights, target, "--to", to) == 0
    assert capsys.readouterr().out.startswith(f"{target}: MobileViT-XXS, 3 classes, {to} format\n")
    assert names(here) - before == files
    original, converted = read(weights), read(target)
    assert all(converted.tensors[key].equal(tensor) for key, tensor in original.tensors.items())

    stamps = {file: (here / file).stat().st_mtime_ns for file in files}
    assert "exists already" in mistake(capsys, "convert", weights, target, "--to", to)
    assert stamps == {file: (here / file).stat().st_mtime_ns for file in files}
    assert run("convert", weights, target, "--to", to, "--overwrite") == 0
    assert names(here) - before == files


def test_mistakes_of_convert(
    capsys: pytest.CaptureFixture[str], here: Path, weights: str, monkeypatch: pytest.MonkeyPatch
):
    (here / "folder.safetensors").mkdir()
    (here / "mine.safetensors").write_text("precious")
    monkeypatch.setenv("HOME", str(here))
    before = names(here)
    for args, said in {
        (weights,): "TARGET",
        (weights, "a.pt"): "ends in .safetensors",
        (weights, "a.safetensors", "--to", "apple"): "ends in .pt",
        (weights, "a.safetensors", "--to", "transformers"): "is a folder",
        (weights, "a.onnx", "--to", "onnx"): "'onnx'",
        (weights, "photos/a.png/a.safetensors"): "photos/a.png: ",
        (weights, "folder.safetensors", "--overwrite"): "folder.safetensors: is a directory",
        (weights, "mine.safetensors"): "exists already",
        (weights, "~/mine.safetensors"): "exists already",
        ("missing.pt", "a.safetensors"): "missing.pt: no such file",
        (weights, "a.safetensors", "more"): "Unrecognized options: more",
    }.items():
        assert re.search(said, mistake(capsys, "convert", *args)), args
    assert names(here) == before
    assert (here / "mine.safetensors").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# Train and evaluate


TRAIN = ["--epochs", "2", "--batch-size", "3", "--data.num-workers", "0", "--device", "cpu"]


def test_train_then_use(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    overrides = ["--optimizer.lr", "1e-4", "--data.flip", "--architecture", "s", "--weights", weights]
    assert run("train", "small", "--data=classes", *TRAIN, *overrides) == 0
    out, err = capsys.readouterr()
    result = "runs/classes/model.safetensors"
    kept = rf"{result}: weights of the last epoch, validation top-1 [\d.]+ %"
    assert re.fullmatch(rf"{kept}\ntry next: mobilevit predict {result} PICTURE...\n", out)
    assert "MobileViT-XXS from the given weights; 4 pictures of 2 classes for training, 2 for validation" in err
    assert names(here / "runs") == {f"classes/{name}" for name in ("model.safetensors", "metrics.jsonl", "recipe.json")}
    recipe = json.loads(Path("runs/classes/recipe.json").read_text())
    assert (recipe["epochs"], recipe["optimizer"]["lr"], recipe["data"]["flip"]) == (2, 1e-4, True)
    assert recipe["data"]["size_px"] == 32  # of the recipe "small"
    trained = load(result)
    assert trained.class_names == ("x", "y")
    assert trained.architecture.name == "xxs"  # of the weights, whatever is asked for

    assert run("predict", "runs/classes", "photos/a.png", "--json") == 0
    assert {p["class"] for p in json.loads(capsys.readouterr().out)["predictions"]} == {"x", "y"}
    assert "holds a run already" in mistake(capsys, "train", "small", "--data", "classes", *TRAIN)


def test_evaluate(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    model = load(weights)
    model.class_names = ("x", "y", "z")
    save(model, here / "xyz.safetensors")
    right, loss = 0, 0.0
    for file in sorted((here / "classes").rglob("*.png")):
        probabilities = {p.class_name: p.probability for p in model.predict(file)}
        right += max(probabilities, key=lambda name: probabilities[name]) == file.parent.name
        loss -= float(np.log(probabilities[file.parent.name])) / 6
    evaluate = ["evaluate", "xyz.safetensors", "--data", "classes", "--num-workers", "0", "--batch-size", "4"]
    assert run(*evaluate, "--json") == 0
    expected = {"top1": 100 * right / 6, "top5": 100.0, "loss": loss, "num_pictures": 6}
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected, rel=1e-4)
    assert run(*evaluate) == 0
    expected = f"top-1 {100 * right / 6:.2f} %, top-5 100.00 %, loss {loss:.4f} on 6 pictures"
    expected += ": all in this folder, those it was trained on as well\n"
    assert capsys.readouterr().out == expected


def test_mistakes_of_train_and_evaluate(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    for args, said in {
        ("train",): "--data",
        ("train", "papar", "--data", "classes"): "no recipe 'papar'; there are plain, small",
        ("train", "--data", "missing"): "missing: no such folder",
        ("train", "--data", "photos/[old]"): "found no folders",
        ("train", "--data", "classes", "--epochs", "0"): "epochs is 0",
        ("train", "--data", "classes", "--optimizer.lr", "-1"): "optimizer.lr is -1",
        ("train", "--data", "classes", "--optimiser.lr", "1"): "Unrecognized options: --optimiser.lr",
        ("train", "--data", "classes", "--architecture", "xl"): "'xl'",
        ("train", "--data", "classes", "--weights", "missing.pt"): "missing.pt: no such file",
        ("train", "--data", "classes", "--out", "photos/a.png", *TRAIN): "photos/a.png: file exists",
        ("evaluate", weights): "--data",
        ("evaluate", weights, "--data", "missing"): "missing: no such folder",
        ("evaluate", weights, "--data", "classes"): "'x' is not one of the 3 classes",
        ("evaluate", weights, "--data", "classes", "--batch-size", "0"): "batch size is 0",
        ("trian", "--data", "classes"): "no command 'trian'; there are predict, train",
        ("--verbose",): "no command '--verbose'",
    }.items():
        assert re.search(said, mistake(capsys, *args)), args
    assert not (here / "runs").exists()


def test_evaluate_on_a_damaged_picture(capsys: pytest.CaptureFixture[str], here: Path):
    model = Classifier("xxs", num_classes=2)
    model.class_names, model.preprocessing = ("x", "y"), Preprocessing(36, 32)
    save(model, here / "xy.safetensors")
    (here / "classes/y/1.png").write_bytes((here / "photos/c.png").read_bytes())
    said = mistake(capsys, "evaluate", "xy.safetensors", "--data", "classes", "--num-workers", "0")
    assert said.startswith("mobilevit: classes/y/1.png: damaged picture")


# ---------------------------------------------------------------------------------------------------------------------
# As a program


def test_program(here: Path, weights: str):
    done = subprocess.run(
        [PROGRAM, "predict", weights, "photos", "--json", "--top-k", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 4
    assert re.fullmatch(r"mobilevit: photos/c\.png: damaged picture .+\n", done.stderr)


def test_whoever_reads_has_seen_enough(here: Path, weights: str):
    for i in range(300):  # more than a pipe holds
        (here / f"{i}{'x' * 200}.png").write_bytes((here / "photos/c.png").read_bytes())
    with subprocess.Popen(
        [PROGRAM, "predict", weights, *sorted(p.name for p in here.glob("*.png")), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout
        assert program.stderr
        assert json.loads(program.stdout.readline())["error"]
        program.stdout.close()
        assert [line for line in program.stderr if not line.startswith("mobilevit: ")] == []
    assert program.returncode == 0
