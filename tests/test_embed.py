"""`mobilevit.embed`: features in Parquet files, and resume."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mobilevit import embed
from mobilevit.data.samples import ImageFiles, Source
from mobilevit.embed import EmbedOptions, embed_images, features_of
from mobilevit.images import ImageError, Preprocessing, read_image
from mobilevit.predict import Classifier, Detector, load, save
from small_networks import randomize


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """photos/ with seven images of which the fifth is damaged, and weights with and without a classifier."""
    random = np.random.default_rng(0)
    for i in range(7):
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 33 + i, 3), dtype=np.uint8)).save(file)
    damaged = tmp_path / "photos/a/4.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    for name, num_classes in (("plain", 0), ("classes", 3)):
        model = randomize(Classifier("xxs", num_classes=num_classes))
        model.preprocessing = Preprocessing(resize_px=36, crop_px=32)
        save(model, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


IDS = ["a/0.png", "a/2.png", "a/6.png", "b/1.png", "b/3.png", "b/5.png"]


@pytest.mark.parametrize("weights", ["plain.safetensors", "classes.safetensors"])
def test_vectors_are_the_input_of_the_classifier(folder: Path, weights: str, caplog: pytest.LogCaptureFixture):
    embedded = embed_images(weights, "photos", "out/v.parquet", options=EmbedOptions(batch_size=2))
    assert (embedded.num_images, embedded.num_features, embedded.unreadable) == (6, 320, ("a/4.png",))
    assert "photos/a/4.png: damaged image" in caplog.text
    frame = pd.read_parquet("out/v.parquet")
    assert frame["id"].tolist() == IDS
    model, inputs = load(weights), []
    hook = model.classifier.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad():
        for name in IDS:  # one by one, by the public forward pass
            model(model.preprocess(folder / "photos" / name))
    hook.remove()
    np.testing.assert_allclose(np.stack(frame["vector"].tolist()), torch.cat(inputs).numpy(), rtol=1e-4, atol=1e-5)
    assert [path.name for path in (folder / "out").iterdir()] == ["v.parquet"]


def test_description(folder: Path):
    embed_images("plain.safetensors", ["photos/a/0.png", "photos/b"], "v.parquet")
    schema = pq.read_schema("v.parquet")
    assert str(schema.field("vector").type).startswith("fixed_size_list<")
    assert schema.field("vector").type.list_size == 320
    assert pd.read_parquet("v.parquet")["id"].tolist() == ["a/0.png", "b/1.png", "b/3.png", "b/5.png"]
    description = json.loads(schema.metadata[b"mobilevit"])
    assert description["architecture"] == "xxs"
    assert Preprocessing.from_dict(description["preprocessing"]) == Preprocessing(resize_px=36, crop_px=32)
    assert len(description["weights_sha256"]) == 64
    assert description["unreadable"] == []


def test_tar_shards(folder: Path):
    """The vectors are those of the same images in files."""
    for shard, names in (("0.tar", ("a/0", "a/4")), ("1.tar", ("b/1", "b/3"))):
        with tarfile.open(folder / shard, "w") as tar:
            for name in names:
                tar.add(folder / "photos" / f"{name}.png", f"{name}.png")
    embedded = embed_images("plain.safetensors", ["0.tar", "1.tar"], "shards.parquet")
    assert (embedded.num_images, embedded.unreadable) == (3, ("0.tar/a/4",))
    embed_images("plain.safetensors", "photos", "files.parquet")
    shards, files = (pd.read_parquet(name).set_index("id")["vector"] for name in ("shards.parquet", "files.parquet"))
    assert shards.index.tolist() == ["0.tar/a/0", "1.tar/b/1", "1.tar/b/3"]
    for name in shards.index:
        np.testing.assert_allclose(shards[name], files[f"{str(name)[6:]}.png"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"photos/a/0\.png: is not a \.tar shard, but .*0\.tar is"):
        embed_images("plain.safetensors", ["photos/a/0.png", "0.tar"], "v.parquet")
    (folder / "other").mkdir()
    (folder / "0.tar").rename(folder / "other" / "1.tar")
    with pytest.raises(ValueError, match="have the same name"):
        embed_images("plain.safetensors", ["1.tar", "other/1.tar"], "v.parquet")


def test_weights_with_several_labels_have_features(folder: Path):
    embed_images("classes.safetensors", "photos", "one.parquet")
    weights = replace(embed.to_weights("classes.safetensors"), task="multilabel", class_names=("a", "b", "c"))
    embed_images(weights, "photos", "several.parquet")
    one, several = (pd.read_parquet(name)["vector"].tolist() for name in ("one.parquet", "several.parquet"))
    assert all((x == y).all() for x, y in zip(one, several, strict=True))


def test_resume(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embed, "PART_IMAGES", 2)
    options = EmbedOptions(batch_size=3)
    embed_images("plain.safetensors", "photos", "whole.parquet", options=options)

    read: list[str] = []
    monkeypatch.setattr("mobilevit.data.transforms.read_image", lambda x, name: (read.append(name), read_image(x))[1])
    write, num_written = embed.write_atomic, 0

    def interrupted(*args: Any) -> None:
        nonlocal num_written
        if num_written == 3:
            raise KeyboardInterrupt
        write(*args)
        num_written += 1

    monkeypatch.setattr(embed, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_images("plain.safetensors", "photos", "v.parquet", options=options)
    parts = folder / "v.parquet.parts"
    assert not (folder / "v.parquet").exists()
    assert len(list(parts.iterdir())) == 3
    assert len(read) == 7
    monkeypatch.setattr(embed, "write_atomic", write)
    (parts / "000000002.parquet").unlink()  # any part can be missing

    read.clear()
    with pytest.raises(ValueError, match=r"v\.parquet\.parts: has weights_sha256 .*--overwrite"):
        embed_images("classes.safetensors", "photos", "v.parquet", options=options)
    assert len(list(parts.iterdir())) == 2
    assert embed_images("plain.safetensors", "photos", "v.parquet", options=options).unreadable == ("a/4.png",)
    assert [Path(name).name for name in read] == ["4.png", "6.png", "5.png"]
    assert (folder / "v.parquet").read_bytes() == (folder / "whole.parquet").read_bytes()
    assert not parts.exists()

    read.clear()
    embed_images("plain.safetensors", "photos", "v.parquet", options=options)
    assert read == []  # complete


def test_other_weights_or_images(folder: Path):
    embed_images("plain.safetensors", "photos", "v.parquet")
    before = (folder / "v.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"v\.parquet: has weights_sha256 \w+, .*--overwrite"):
        embed_images("classes.safetensors", "photos", "v.parquet")
    Image.new("RGB", (40, 40)).save(folder / "photos/new.png")
    with pytest.raises(ValueError, match=r"v\.parquet: has num_images 7, .* have 8; .*--overwrite"):
        embed_images("plain.safetensors", "photos", "v.parquet")
    assert (folder / "v.parquet").read_bytes() == before
    assert embed_images("plain.safetensors", "photos", "v.parquet", overwrite=True).num_images == 7
    assert "new.png" in pd.read_parquet("v.parquet")["id"].tolist()


def test_errors(folder: Path):
    (folder / "labels.csv").write_text("path,label\n")
    with pytest.raises(ImageError, match=r"none of the 1 images can be read \(.*labels\.csv\)"):
        embed_images("plain.safetensors", "labels.csv", "u.parquet")
    assert not list(folder.glob("u.parquet*"))
    with pytest.raises(ValueError, match=r"v\.csv: .*must end in \.parquet"):
        embed_images("plain.safetensors", "photos", "v.csv")
    (folder / "v.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"v\.parquet: not a Parquet file"):
        embed_images("plain.safetensors", "photos", "v.parquet")
    save(randomize(Detector("xxs", num_classes=2)), folder / "detector.safetensors")
    with pytest.raises(ValueError, match=r"task 'detect' .*classifier"):
        embed_images("detector.safetensors", "photos", "w.parquet")
    with pytest.raises(ValueError, match=r"batch size is 0; it must be 1 or more"):
        EmbedOptions(batch_size=0)
    with pytest.raises(ValueError, match=r"num workers is -1; it must be 0 or more"):
        EmbedOptions(num_workers=-1)
    weights = load("plain.safetensors")
    files = tuple(sorted((folder / "photos").rglob("*.png")))
    source = Source(ImageFiles(files, folder), (0,) * 7, ())
    with pytest.raises(ImageError, match=r"1 images cannot be read \(.*4\.png\).*--max-unreadable 1"):
        features_of(embed.to_weights("plain.safetensors"), source, EmbedOptions())
    indices, features = features_of(embed.to_weights("plain.safetensors"), source, EmbedOptions(), max_unreadable=1)
    assert indices.tolist() == [0, 1, 3, 4, 5, 6]
    assert features.shape == (6, weights.architecture.head_channels)


def test_file_name_that_is_not_text(folder: Path):
    name = b"photos/b/caf\xe9.png".decode(errors="surrogateescape")
    Image.new("RGB", (40, 40)).save(folder / name)
    embed_images("plain.safetensors", "photos/b", "v.parquet")
    assert pd.read_parquet("v.parquet")["id"].tolist() == ["1.png", "3.png", "5.png", "caf\\xe9.png"]
