"""`mobilevit export`."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import check_refused, run


def test_artifacts_are_named_after_the_weights(here: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "mobilevit.export.export_each",
        lambda weights, backends, out, options, **more: calls.append(more | {"overwrite": options.overwrite}) or [],
    )
    (here / "pets").mkdir()
    (here / "pets/run.json").write_text("{}")
    sources = {"pets": "pets", "pets/model.safetensors": "pets", "pets/raw.safetensors": "pets_raw"}
    sources |= {"mine.safetensors": "mine", "model.safetensors": ""}
    for source, prefix in sources.items():
        shutil.copy("classifier.safetensors", source if "." in source else f"{source}/model.safetensors")
        assert run(f"export {source}") == 0
        assert (calls[-1]["prefix"], calls[-1]["overwrite"]) == (prefix, False), source
    monkeypatch.chdir("pets")
    assert run("export . --overwrite") == 0
    assert (calls[-1]["prefix"], calls[-1]["overwrite"]) == ("pets", True)


MISTAKES = {
    "--to onxx": "--to 'onxx' 'onnx', 'executorch', 'openvino', 'litert', 'coreml', 'all'",
    "--to": "backend onnx, executorch",
    "--precision int4": "--precision 'int4' 'fp32', 'fp16', 'bf16', 'int8'",
    "--images nothere": "nothere image, folder pattern",
    "--num-threads 0": "--num-threads 0",
    "--size 64 64 64": "--size (64, 64, 64) one number or height and width",
    "--out photos/a.png": "photos/a.png file folder",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    check_refused(capsys, f"export classifier.safetensors {args}", facts)


DEMO_MISTAKES = {
    "--port abc": "--port 'abc' INT",
    "--port -1 --no-open": "--port -1 from 0",
    "--drawing cats": "--drawing 'cats' 'optdigits' 'mnist'",
    "--precision int4": "--precision 'int4' 'fp32', 'fp16', 'int8'",
}


@pytest.mark.parametrize(("args", "facts"), DEMO_MISTAKES.items())
def test_mistakes_of_demo(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    check_refused(capsys, f"demo classifier.safetensors {args}", facts)
