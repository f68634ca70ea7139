"""`mobilevit info`."""

import re
from pathlib import Path

import pytest

from command_line import CLASS_NAMES, check_refused, run


@pytest.mark.parametrize(
    ("size", "input_px", "feature_map"),
    [("", "256 x 256", "8 x 8"), ("--size 97", "97 x 97", "4 x 4"), ("--size 64 97", "64 x 97", "2 x 4")],
    ids=["default", "one", "two"],
)
def test_info_of_a_name(capsys: pytest.CaptureFixture[str], size: str, input_px: str, feature_map: str):
    assert run(f"info xs {size}") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"MobileViT-XS, {input_px} px")
    assert "2,317,848 parameters" in out  # paper, table 1: 2.3 M
    assert re.search(rf"stage5\D+96\D+{feature_map} ", out)


def test_info_of_weights(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("info classifier.safetensors") == 0
    out = capsys.readouterr().out
    assert f"3 ({', '.join(CLASS_NAMES)})" in out
    assert "36 px bilinear" in out
    assert "MobileViT-XXS, 32 x 32 px" in out


def test_info_of_weights_without_preprocessing(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("info detector.safetensors") == 0
    out, err = capsys.readouterr()
    assert "whole image to 64 x 64 px bilinear" in out
    assert err == ""
    assert run("convert detector.safetensors apple.pt --to apple") == 0
    assert run("info apple.pt --size 64") == 0
    assert re.fullmatch(r"mobilevit: apple\.pt: .*320 x 320 px bilinear.*no class names\n", capsys.readouterr().err)


MISTAKES = {
    "xxl": "xxl: no such file",
    "xs --size 31": "--size 31; 32 px",
    "xs --size 64 64 64": "--size 64 64 64; one number, or height and width",
    "nobody/nothing": "nobody/nothing --download",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], args: str, facts: str):
    check_refused(capsys, f"info {args}", facts)
