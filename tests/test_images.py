"""Decoding against pixels computed by hand; preprocessing against transformers and timm."""

import io
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from mobilevit import images
from mobilevit.images import (
    Header,
    ImageError,
    Preprocessing,
    find_images,
    limit_megapixels,
    megapixel_limit,
    read_crop,
    read_header,
    read_image,
)

# An asymmetric upright image, 48 x 32 px, of flat 16 px blocks, which JPEG compression changes little.
BLOCKS = np.array([[[250, 20, 20], [20, 240, 20], [20, 20, 230]], [[240, 240, 20], [128, 128, 128], [20, 20, 20]]])
UPRIGHT = BLOCKS.repeat(16, 0).repeat(16, 1).astype(np.uint8)
# EXIF orientation -> stored pixels of the upright image.
STORED = {
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT[::-1].transpose(1, 0, 2),  # left, bottom
}


def pixels(source: Any) -> np.ndarray:
    """`read_image` as int, so that differences do not wrap."""
    image = read_image(source)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def gray(*values: int) -> np.ndarray:
    return np.array(values)[None, :, None].repeat(3, 2)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int):
    exif = Image.Exif()
    exif[0x112] = orientation
    file = tmp_path / f"rotated.{suffix}"
    Image.fromarray(STORED[orientation]).save(file, exif=exif, quality=95)
    result = pixels(file)
    assert result.shape == UPRIGHT.shape
    assert np.abs(result - UPRIGHT)[8::16, 8::16].max() <= 12  # centers of the blocks
    assert np.array_equal(pixels(read_image(file)), result)  # applied once


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_exif_orientation_in_other_modes(tmp_path: Path, mode: str):
    exif = Image.Exif()
    exif[0x112] = 6
    straight, rotated = tmp_path / "straight.tiff", tmp_path / "rotated.tiff"
    image = Image.fromarray(UPRIGHT).convert("L" if mode in ("1", "I;16") else "RGB").convert(mode)
    image.save(straight)
    image.save(rotated, exif=exif)
    assert np.array_equal(pixels(rotated), np.rot90(pixels(straight), -1))


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, count, value of 4 bytes), written by hand."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


ORIENTATION_6 = (0x112, 3, 1, b"\x06\0\0\0")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_exif(tmp_path: Path, suffix: str):
    file = tmp_path / f"image.{suffix}"
    Image.fromarray(UPRIGHT).save(file, exif=b"Exif\0\0rubbish!rubbish!", quality=95)
    assert np.abs(pixels(file) - UPRIGHT)[8::16, 8::16].max() <= 12
    # A valid orientation, but a resolution unit of the wrong type.
    Image.fromarray(STORED[6]).save(file, exif=exif_of(ORIENTATION_6, (0x128, 2, 4, b"abc\0")), quality=95)
    assert np.abs(pixels(file) - UPRIGHT)[8::16, 8::16].max() <= 12


PALETTE = [10, 20, 30, 200, 100, 50, 0, 255, 0]
WHITE = [255, 255, 255]


def palette_image() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette(PALETTE)
    return image


GRAY = Image.fromarray(np.array([[0, 77, 255]], np.uint8))
BITS = Image.fromarray(np.array([[True, False, True]]))
RGBA = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 200, 128]]], np.uint8)
GRAY_ALPHA = Image.merge("LA", [Image.fromarray(np.array([row], np.uint8)) for row in ([90, 90, 0], [255, 0, 64])])
GRAY_16 = np.array([[0, 256, 32768, 65535]], np.uint16)
ON_WHITE = np.array([[[255, 0, 0], WHITE, [127, 127, 227]]])
COLORS = np.array(PALETTE).reshape(1, 3, 3)
SECOND_TRANSPARENT = np.array([[PALETTE[:3], WHITE, PALETTE[6:]]])
# Name -> suffix, image, options of `save`, expected pixels.
KINDS: dict[str, tuple[str, Image.Image, dict[str, Any], np.ndarray]] = {
    "gray": ("png", GRAY, {}, gray(0, 77, 255)),
    "one bit": ("png", BITS, {}, gray(255, 0, 255)),
    "one bit tiff": ("tiff", BITS, {}, gray(255, 0, 255)),
    "palette": ("png", palette_image(), {}, COLORS),
    "palette gif": ("gif", palette_image(), {}, COLORS),
    "palette with one transparent color": ("png", palette_image(), {"transparency": 1}, SECOND_TRANSPARENT),
    "gif with one transparent color": ("gif", palette_image(), {"transparency": 1}, SECOND_TRANSPARENT),
    "palette with alpha": (
        "png",
        palette_image(),
        {"transparency": bytes([128, 0, 255])},
        np.array([[[132, 137, 142], WHITE, PALETTE[6:]]]),  # (10, 20, 30) at 128 / 255 over white
    ),
    "rgba": ("png", Image.fromarray(RGBA), {}, ON_WHITE),
    "rgba webp": ("webp", Image.fromarray(RGBA), {"lossless": True}, ON_WHITE),
    "rgb with one transparent color": (
        "png",
        Image.fromarray(RGBA[..., :3]),
        {"transparency": (255, 0, 0)},
        np.array([[WHITE, WHITE, [0, 0, 200]]]),
    ),
    "gray with one transparent gray": ("png", GRAY, {"transparency": 0}, gray(255, 77, 255)),
    "gray with alpha": ("png", GRAY_ALPHA, {}, gray(90, 255, 191)),
    "16 bits png": ("png", Image.fromarray(GRAY_16), {}, gray(0, 1, 128, 255)),
    "16 bits tiff": ("tiff", Image.fromarray(GRAY_16), {}, gray(0, 1, 128, 255)),
    "32 bits tiff": ("tiff", Image.fromarray(GRAY_16.astype(np.int32)), {}, gray(0, 1, 128, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pixels(tmp_path: Path, kind: str):
    suffix, image, options, expected = KINDS[kind]
    file = tmp_path / f"image.{suffix}"
    image.save(file, **options)
    assert np.array_equal(pixels(file), expected)
    assert np.array_equal(crop(file, (1, 0, 3, 1), 1), expected[:, 1:3])


def test_cmyk_jpeg(tmp_path: Path):
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 100, 200, 0], [0, 0, 0, 155]], np.uint8)
    channels = [Image.fromarray(inks[None, :, i].repeat(16, 0).repeat(16, 1)) for i in range(4)]
    Image.merge("CMYK", channels).save(tmp_path / "inks.jpg", quality=100)
    expected = [[255, 255, 255], [0, 255, 255], [255, 155, 55], [100, 100, 100]]
    assert np.abs(pixels(tmp_path / "inks.jpg")[8, 8::16] - expected).max() <= 4


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_first_frame(tmp_path: Path, suffix: str):
    frames = [Image.new("RGB", (9, 7), color) for color in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
    frames[0].save(tmp_path / f"animated.{suffix}", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / f"animated.{suffix}") as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.abs(pixels(tmp_path / f"animated.{suffix}") - [200, 30, 30]).max() <= 8


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tiff", "bmp"])
def test_truncated(tmp_path: Path, suffix: str):
    file = tmp_path / f"half.{suffix}"
    noise(120, 90).save(file)
    halve(file)
    with pytest.raises(ImageError, match=rf"half.{suffix}: damaged image .* replace"):
        read_image(file)
    if suffix == "jpg":  # Pillow opens it, and fails when it decodes the pixels
        with Image.open(file) as image, pytest.raises(ImageError, match="damaged"):
            read_image(image)


def test_other_files(tmp_path: Path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    for name, reason in {
        "empty.jpg": "not an image",
        "text.jpg": "not an image",
        "missing.jpg": "no such file",
        "": "directory",
        "text.jpg/below.jpg": "not a directory",
        "x" * 5000: "too long",
    }.items():
        for read in (read_image, lambda file: read_crop(file, lambda *_: (0, 0, 1, 1), 1)):
            with pytest.raises(ImageError, match=reason) as caught:
                read(tmp_path / name)
            assert str(caught.value).startswith(f"{tmp_path / name}: ")
            assert "\n" not in str(caught.value)


def test_limit_on_megapixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "large.png"
    noise(120, 90).save(file)  # 0.0108 megapixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow warns, and warnings are errors here
    monkeypatch.setattr(images, "_max_megapixels", math.inf)
    with pytest.raises(ImageError, match="exceeds limit"):
        read_image(file)
    limit_megapixels(0.02)
    assert megapixel_limit() == 0.02
    assert read_image(file).size == read_header(file).size == (120, 90)
    assert read_crop(file, lambda *_: (0, 0, 120, 90), 32).shape == (90, 120, 3)
    limit_megapixels(0.01)
    reads: list[Callable[[], object]] = [
        lambda: read_image(file),
        lambda: read_header(file),
        lambda: read_crop(file, lambda *_: (0, 0, 9, 9), 9),
    ]
    for read in reads:
        with pytest.raises(ImageError, match=rf"^{file}: .*120 x 90 px.* 0\.01.*--max-megapixels"):
            read()
    assert read_image(noise(120, 90)).size == (120, 90)  # it is in memory already


@pytest.mark.parametrize(
    ("mode", "suffix", "has_transparency"), [("RGB", "png", False), ("RGBA", "png", True), ("LA", "png", True)]
)
def test_header(tmp_path: Path, mode: str, suffix: str, has_transparency: bool):
    file = tmp_path / f"x.{suffix}"
    Image.new(mode, (5, 3)).save(file)
    for image in (file, file.read_bytes(), Image.open(io.BytesIO(file.read_bytes()))):
        assert read_header(image) == Header((5, 3), "PNG", has_transparency, mode)
    rotated = Image.Exif()
    rotated[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (5, 3)).save(tmp_path / "x.jpg", exif=rotated)
    assert read_header(tmp_path / "x.jpg") == Header((3, 5), "JPEG", False, "RGB")
    with pytest.raises(ImageError, match=r"^here: not an image"):
        read_header(b"none", "here")


def test_background_of_preprocessing():
    values = Preprocessing().to_dict()
    assert values["background"] == "white"
    del values["background"]  # as earlier versions wrote it
    assert Preprocessing.from_dict(values) == Preprocessing()
    with pytest.raises(ValueError, match=r"background.*'black'.*'white'"):
        Preprocessing(background="black")


@pytest.mark.parametrize(
    ("value", "dtype"), [(0.5, np.float32), (70_000, np.int32), (-1, np.int32)], ids=["float", "large", "negative"]
)
def test_pixel_values_without_agreed_range(tmp_path: Path, value: float, dtype: type):
    Image.fromarray(np.full((2, 3), value, dtype)).save(tmp_path / "numbers.tiff")
    with pytest.raises(ImageError, match=r"numbers\.tiff: .*8 or 16 bits"):
        read_image(tmp_path / "numbers.tiff")


def test_arrays():
    assert np.array_equal(pixels(UPRIGHT), UPRIGHT)
    assert np.array_equal(pixels(UPRIGHT[::-1, ::2]), UPRIGHT[::-1, ::2])  # not contiguous
    assert np.array_equal(pixels(np.array([[0, 9]], np.uint8)), gray(0, 9))
    assert np.abs(pixels(RGBA) - ON_WHITE).max() <= 1


@pytest.mark.parametrize(
    "array",
    [
        UPRIGHT / 255,
        UPRIGHT.astype(np.uint16),
        UPRIGHT > 100,
        UPRIGHT.transpose(2, 0, 1),
        UPRIGHT[..., :2],
        UPRIGHT[None],
        UPRIGHT[0, 0],
        UPRIGHT[:0],
        UPRIGHT[:, :0],
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_of_wrong_shape_or_dtype(array: np.ndarray):
    with pytest.raises(ImageError, match=r"array of|at least one pixel"):
        read_image(array)


def test_an_rgb_image_is_not_copied():
    image = Image.fromarray(UPRIGHT)
    assert read_image(image) is image


# ---------------------------------------------------------------------------------------------------------------------
# Crops

PHOTOGRAPHS = [Image.fromarray(photograph) for photograph in load_sample_images().images]


def crop(image: Any, box: tuple[int, int, int, int], min_px: int) -> np.ndarray:
    """`read_crop` as int; checks that `choose` gets the size of `read_image`."""
    sizes = []
    values = read_crop(image, lambda *size: sizes.append(size) or box, min_px)
    assert sizes == [read_image(image).size]
    assert values.dtype == np.uint8
    return values.astype(int)


@pytest.fixture(
    params=[
        {"quality": 90},
        {"quality": 75, "subsampling": 0},
        {"quality": 60, "subsampling": 1, "progressive": True},
        {"restart_marker_blocks": 5},
        {"quality": 90, "keep_rgb": True},
        {"mode": "L"},
        {"mode": "CMYK"},
        *({"orientation": orientation} for orientation in STORED),
    ],
    ids=str,
)
def jpeg(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A photograph of odd size, with different JPEG options."""
    save = dict(request.param)
    save["exif"] = Image.Exif()
    save["exif"][0x112] = save.pop("orientation", 1)
    PHOTOGRAPHS[0].resize((333, 245)).convert(save.pop("mode", "RGB")).save(tmp_path / "photograph.jpg", **save)
    return tmp_path / "photograph.jpg"


def test_crops_of_jpeg_at_full_size_are_exact(jpeg: Path):
    left, top, right, bottom = box = (21, 30, 232, 241)
    expected = pixels(jpeg)[top:bottom, left:right]
    for source in (jpeg, jpeg.read_bytes(), read_image(jpeg)):
        assert np.array_equal(crop(source, box, 106), expected)
    with Image.open(jpeg) as image:
        assert np.array_equal(crop(image, box, 8), expected)


@pytest.mark.parametrize(("min_px", "scale"), [(105, 2), (53, 2), (52, 4), (27, 4), (26, 8), (3, 8)])
def test_crops_of_jpeg_at_reduced_size(jpeg: Path, min_px: int, scale: int):
    left, top, right, bottom = box = (21, 30, 232, 241)
    found = crop(jpeg, box, min_px)
    assert np.array_equal(crop(jpeg.read_bytes(), box, min_px), found)
    if read_mode(jpeg) == "CMYK":  # never reduced
        assert np.array_equal(found, pixels(jpeg)[top:bottom, left:right])
        return
    assert min(found.shape[:2]) >= min_px
    assert all(side in (211 // scale, -(-211 // scale), -(-211 // scale) + 1) for side in found.shape[:2])
    height, width = found.shape[:2]
    whole = read_image(jpeg).crop((left, top, right, bottom))
    expected = np.asarray(whole.resize((width, height), Image.Resampling.BOX)).astype(int)
    # Equal up to the resampling filter and a pixel of the reduced crop.
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.92
    assert np.abs(found.mean((0, 1)) - expected.mean((0, 1))).max() < 10


def read_mode(file: Path) -> str:
    with Image.open(file) as image:
        return image.mode


def test_crop_of_the_whole_image_at_reduced_size(jpeg: Path):
    width, height = read_image(jpeg).size
    assert min(crop(jpeg, (0, 0, width, height), 30).shape[:2]) >= 30


@pytest.mark.parametrize("min_px", [100, 10])
@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_crops_of_truncated_images(tmp_path: Path, min_px: int, fraction: float):
    file = tmp_path / "short.jpg"
    noise(120, 150).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(fraction * len(content))])
    # The crop itself would be complete.
    with pytest.raises(ImageError, match=rf"^{file}: damaged image .* replace"):
        read_crop(file, lambda *_: (0, 0, 120, 40), min_px)
    with pytest.raises(ImageError, match=r"^a name: damaged image"):
        read_crop(file.read_bytes(), lambda *_: (0, 0, 120, 40), min_px, "a name")


def test_errors_of_the_caller_are_not_image_errors():
    with pytest.raises(ZeroDivisionError):
        read_crop(UPRIGHT, lambda width, height: (0, 0, width // 0, height), 1)


def test_simplejpeg_gives_the_same_pixels(jpeg: Path, monkeypatch: pytest.MonkeyPatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    box = (21, 30, 232, 241)
    with monkeypatch.context() as without:
        without.setattr(images, "simplejpeg", None)
        expected = crop(jpeg, box, 106)
    calls = []
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda data, decode=simplejpeg.decode_jpeg: calls.append(1) or decode(data)
    )
    assert np.array_equal(crop(jpeg, box, 106), expected)
    is_transposed = images._orientation(Image.open(io.BytesIO(jpeg.read_bytes()))) in images.TRANSPOSITIONS
    assert bool(calls) == (read_mode(jpeg) == "RGB" and not is_transposed)
    # Damage that Pillow ignores: no error, and the same pixels.
    content = bytearray(jpeg.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4] = b"\x12\x34\x56\x78"
    with monkeypatch.context() as without:
        without.setattr(images, "simplejpeg", None)
        expected = crop(bytes(content), box, 106)
    assert np.array_equal(crop(bytes(content), box, 106), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Find


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "b.JPG",
        "a.png",
        "deep/er/c.webp",
        "notes.txt",
        "paper.pdf",
        "._a.png",
        ".trash/d.png",
        "[1].png",
        "~e.png",
        "other/z.png",
        "empty/readme",
    ):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["."], ["[1].png", "a.png", "b.JPG", "deep/er/c.webp", "other/z.png", "~e.png"]),
        (["other", "a.png", "deep"], ["other/z.png", "a.png", "deep/er/c.webp"]),
        (["b.JPG", "a.png", "./b.JPG", "*.png"], ["b.JPG", "a.png", "[1].png", "~e.png"]),
        (["**/*.webp", "other/[a-z].png"], ["deep/er/c.webp", "other/z.png"]),
        (["[1].png", "~e.png"], ["[1].png", "~e.png"]),
        (["notes.txt", ".trash"], ["notes.txt", ".trash/d.png"]),  # explicit names are not filtered
    ],
    ids=str,
)
def test_find(folder: Path, names: list[str], expected: list[str]):
    assert find_images(names) == [Path(name) for name in expected]
    # Absolute names find the same files.
    absolute = find_images([os.path.join(folder, name) for name in names])  # noqa: PTH118 - keeps "."
    assert absolute == [folder / name for name in expected]


@pytest.mark.parametrize(
    "images", ["images", "train/images", "images/val", "JPEGImages", "VOCdevkit/VOC2012/JPEGImages"]
)
def test_mask_folders_are_not_searched(tmp_path: Path, images: str):
    masks = [images.replace("images", "masks").replace("JPEGImages", "SegmentationClass"), "other/masks"]
    for name in (f"{images}/a.png", *(f"{folder}/a.png" for folder in masks)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    found = [tmp_path / images / "a.png", tmp_path / "other/masks/a.png"]  # without images beside it
    assert find_images([str(tmp_path)]) == sorted(found)
    assert find_images([str(tmp_path / masks[0])]) == [tmp_path / masks[0] / "a.png"]  # explicit names are not filtered


@pytest.mark.parametrize("name", ["missing.png", "missing/", "*.gif", "empty", "~nobody/a.png"])
def test_find_nothing(folder: Path, name: str):
    with pytest.raises(ValueError, match=r"no images in this folder|no such image") as caught:
        find_images(["a.png", name])
    assert str(caught.value).startswith(f"{name}: ")


def test_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder))
    assert find_images(["~/a.png", "~/oth*/*"]) == [folder / "a.png", folder / "other/z.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing
SIZES = [(640, 427), (427, 640), (333, 501), (501, 333), (257, 300), (131, 97), (288, 288), (900, 301)]


# torchvision, and so timm, rounds half a pixel of margin to even; transformers and this package round it down.
SAME_CENTER = [
    size for size in SIZES if all(round(m / 2) == m // 2 for m in (int(284 * x / min(size)) - 256 for x in size))
]


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def photograph(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    PHOTOGRAPHS[sum(request.param) % 2].resize(request.param).save(tmp_path / "photograph.jpg", quality=92)
    return tmp_path / "photograph.jpg"


def opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


@pytest.mark.parametrize(("backend", "num_levels"), [("pil_mobilevit", 0), ("mobilevit", 1)])
def test_against_transformers(photograph: Path, backend: str, num_levels: int):
    module = pytest.importorskip(f"transformers.models.mobilevit.image_processing_{backend}")
    processor = getattr(module, "MobileViTImageProcessor" + ("Pil" if backend.startswith("pil") else ""))
    processor = processor(
        size={"shortest_edge": 288}, crop_size={"height": 256, "width": 256}, resample=2, do_flip_channel_order=True
    )
    bgr = processor(opened(photograph), return_tensors="pt")["pixel_values"][0]
    assert (Preprocessing()(photograph) - bgr.flip(0)).abs().max() <= (num_levels + 0.01) / 255


@pytest.mark.parametrize("photograph", SAME_CENTER, indirect=True, ids=lambda size: f"{size[0]}x{size[1]}")
def test_against_timm(photograph: Path):
    data = pytest.importorskip("timm.data")
    config = {"input_size": (3, 256, 256), "interpolation": "bicubic", "crop_pct": 0.9}
    config |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_mode": "center"}
    theirs = data.create_transform(**data.resolve_data_config({}, pretrained_cfg=config))(opened(photograph))
    ours = Preprocessing(284, 256, "bicubic", mean=config["mean"], std=config["std"])(photograph)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_height_comes_before_width():
    image = PHOTOGRAPHS[0]
    expected = np.asarray(image.resize((90, 70), Image.Resampling.LANCZOS).crop((13, 3, 77, 67)))
    ours = Preprocessing(resize_px=(70, 90), crop_px=64, interpolation="lanczos")(image)
    np.testing.assert_allclose(ours, expected.transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (1, 100_000)])
def test_smallest_and_longest(size: tuple[int, int]):
    ours = Preprocessing()(Image.new("RGB", size, (255, 51, 0)))
    assert ours.dtype == torch.float32
    assert ours.equal(torch.tensor([1.0, 51 / 255, 0.0])[:, None, None].expand(3, 256, 256))


@pytest.mark.parametrize("size", [(31, 640), (640, 31)])
def test_center_of_a_long_image(size: tuple[int, int]):
    image = PHOTOGRAPHS[1].resize(size)
    width, height = (int(72 * side / 31) for side in size)
    left, top = (width - 64) // 2, (height - 64) // 2
    expected = np.asarray(
        image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 64, top + 64))
    )
    ours = Preprocessing(72, 64)(image)
    assert np.abs(255 * ours.numpy() - expected.transpose(2, 0, 1)).max() < 2.01


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resize_px", 0),
        ("resize_px", 288.0),
        ("resize_px", (288,)),
        ("resize_px", (288, 0)),
        ("resize_px", "288"),
        ("crop_px", 0),
        ("crop_px", 289),
        ("crop_px", 256.0),
        ("interpolation", "cubic"),
        ("mean", (0.5, 0.5)),
        ("mean", (0.0, 0.0, math.nan)),
        ("std", (1.0,)),
        ("std", (1.0, 1.0, 0.0)),
        ("std", (1.0, 1.0, math.inf)),
    ],
    ids=str,
)
def test_invalid_values(field: str, value: Any):
    with pytest.raises(ValueError, match=f"^{field} is ") as caught:
        Preprocessing(**{field: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "preprocessing",
    [Preprocessing(), Preprocessing((300, 280), 224, "hamming", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))],
    ids=["default", "all other"],
)
def test_json_round_trip(preprocessing: Preprocessing):
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
