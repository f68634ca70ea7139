"""`mobilevit embed`."""

from pathlib import Path

import pandas as pd
import pytest

from command_line import check_refused, run
from mobilevit import embed


def test_embed(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("embed xyz.safetensors classes --out v.parquet --num-workers 1 --batch-size 4") == 0
    assert capsys.readouterr().out == "v.parquet: 6 images, 320 features each\n"
    assert pd.read_parquet("v.parquet")["id"].tolist() == [f"{name}/{i}.png" for name in "xy" for i in range(3)]
    assert run("embed xyz.safetensors photos --out v.parquet --num-workers 0 --overwrite") == 1
    out, err = capsys.readouterr()
    assert out == "v.parquet: 3 images, 320 features each\n"
    assert "photos/c.png: damaged" in err
    assert "v.parquet: without 1 unreadable images: c.png" in err


def test_interrupt(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embed, "write_atomic", interrupt)
    assert run("embed xyz.safetensors classes --out v.parquet --num-workers 0") == 130
    assert "interrupted; repeat the command to resume" in capsys.readouterr().err


def test_refused(capsys: pytest.CaptureFixture[str], here: Path):
    check_refused(capsys, "embed xyz.safetensors classes", "--out")
    check_refused(capsys, "embed xyz.safetensors classes --out v.csv", "v.csv .parquet")
    check_refused(capsys, "embed xyz.safetensors nowhere --out v.parquet", "nowhere")
    check_refused(capsys, "embed detector.safetensors classes --out v.parquet", "detect classifier")
    check_refused(capsys, "embed xyz.safetensors classes --out v.parquet --batch-size 0", "--batch-size 0 1")
    check_refused(capsys, "embed xyz.safetensors classes --out v.parquet --num-workers -1", "--num-workers -1 0")
    run("embed xyz.safetensors classes --out v.parquet --num-workers 0")
    check_refused(capsys, "embed xyz.safetensors photos --out v.parquet", "v.parquet num_images 6 4 --overwrite")
