"""Make a data set for detection and segmentation from the photographs that come with Tux Paint.

Each image shows up to five stamps (birds, coins, vehicles, ...) at random positions, sizes and angles, which may
occlude each other, on a cluttered background made of other stamps. `train` and `val` use different stamps, so
validation metrics measure generalization to new objects. The same arguments write the same bytes.

    python examples/stamps.py FOLDER [--num-train 3000 --num-val 500 --seed 0 --size-px 320]

FOLDER has the COCO layout (annotations/, train/, val/), FOLDER/voc the same images in the VOC layout with masks, and
FOLDER/crops the cropped objects in one folder per class. Requires the Debian package tuxpaint-stamps-default.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.pool
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from mobilevit.draw import write_mask_png

STAMPS = Path("/usr/share/tuxpaint/stamps")
# Class -> groups of similar stamps -> files or folders (without subfolders).
CLASSES = {
    "animal": [
        ["animals/birds"],
        ["animals/insects", "animals/lizards", "animals/amphibians"],
        [
            *("animals/mammals/cats", "animals/mammals/dogs", "animals/mammals/bears", "animals/mammals/rodents"),
            *("animals/marsupials", "animals/mammals/badger.png", "animals/mammals/ferret.png"),
            *("animals/mammals/rabbit_little.png", "animals/mammals/aquatic/otter.png"),
        ],
        ["animals/mammals/bovines", "animals/mammals/deer", "animals/mammals/equines"],
        ["animals/fish", "animals/mammals/aquatic"],
    ],
    "coin": [["symbols/money/us/coins", "symbols/money/euro/coins", "symbols/money/canadian/coins"]],
    "flower": [["plants/flowers"]],
    "food": [["food/fruit", "food/vegetables"]],
    "planet": [["space/planets", "space/moon"]],
    "sign": [["town/roadsigns"]],
    "tool": [["household/tools", "household/dishes/utensils", "household/arttools/scissors_small_open.png"]],
    "vehicle": [
        [
            *("vehicles", "vehicles/auto", "vehicles/construction", "vehicles/emergency", "vehicles/masstransit"),
            *("vehicles/race", "vehicles/ship", "military/vehicles"),
        ]
    ],
}
# Drawings, mirrored copies, coloring pages, and stamps of another class.
EXCLUDED = {
    *("0_sun", "7spoke256", "bradley_mirror", "cementmixer", "dumper_mirror", "f22_raptor", "measuring_tape_mirror"),
    *("otter", "railroad_crossing", "sedan_police", "sedan_police_mirror", "spade", "stoplight_01_red"),
    *("stoplight_02_yellow", "stoplight_03_green", "traffic_cone", "wheel_tractor", "wheelie_bin"),
    "xing_school_mirror",
}
MIN_VISIBLE = 0.25  # smallest visible fraction of an object
EMPTY = 0.04  # fraction of images without objects
MAX_ZOOM = 4.0  # largest enlargement: some stamps are 50 px wide
STAMP_PX = 400  # larger stamps (up to 2,000 px) are reduced to save memory


@cache
def stamps() -> dict[str, dict[str, list[Path]]]:
    """Files by split and class. Every fourth stamp of a group is in "val"."""
    files_of: dict[str, dict[str, list[Path]]] = {split: {name: [] for name in CLASSES} for split in ("train", "val")}
    for name, groups in CLASSES.items():
        for places in groups:
            paths = [STAMPS / place for place in places]
            files = sorted(file for path in paths for file in (path.glob("*.png") if path.is_dir() else [path]))
            files = [file for file in files if file.stem not in EXCLUDED or file in paths]
            for i, file in enumerate(files):
                files_of["val" if i % 4 == 2 else "train"][name].append(file)
    return files_of


@dataclass
class Object:
    """One stamp in an image: its class name and its visible pixels (H, W), bool."""

    name: str
    visible: np.ndarray
    num_px: int  # without occlusion

    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom (exclusive) of the visible pixels."""
        ys, xs = self.visible.nonzero()
        return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@cache
def cut_out(file: Path) -> Image.Image:
    """A stamp as RGBA without its empty margin, at most STAMP_PX."""
    with Image.open(file) as image:
        stamp = image.convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").point([255 * (a > 127) for a in range(256)]).getbbox())
    stamp.thumbnail((STAMP_PX, STAMP_PX), Image.Resampling.LANCZOS)
    return stamp


def texture(split: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """RGB of `size`: a crop from inside a stamp, tiled by mirroring, enlarged, blurred and with changed colors."""
    files = [file for of_class in stamps()[split].values() for file in of_class]
    while True:
        stamp = cut_out(files[rng.integers(len(files))])
        side = int(rng.uniform(0.15, 0.4) * min(stamp.size))
        for _ in range(10 if side >= 8 else 0):
            x, y = (int(rng.integers(length - side)) for length in stamp.size)
            piece = stamp.crop((x, y, x + side, y + side))
            if np.asarray(piece.getchannel("A")).min() > 250:
                piece = piece.convert("RGB").transpose(Image.Transpose(int(rng.integers(5))))
                piece = ImageEnhance.Brightness(piece).enhance(rng.uniform(0.5, 1.4))
                piece = ImageEnhance.Color(piece).enhance(rng.uniform(0.3, 1.2))
                pixels = np.asarray(piece)
                for _ in range(rng.integers(3)):  # doubles width and height without a seam
                    pixels = np.concatenate([pixels, pixels[:, ::-1]], 1)
                    pixels = np.concatenate([pixels, pixels[::-1]], 0)
                piece = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                return piece.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))


def gradient(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """RGB of `size`: a linear gradient between two colors in a random direction."""
    width, height = size
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * np.linspace(-1, 1, width) + np.sin(angle) * np.linspace(-1, 1, height)[:, None]
    weight = ((slope + 1.5) / 3)[..., None]
    return Image.fromarray((weight * rng.uniform(0, 255, 3) + (1 - weight) * rng.uniform(0, 255, 3)).astype(np.uint8))


def clouds(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """L of `size`: smooth noise, the mask that blends two images."""
    cells = rng.uniform(-100, 355, (int(rng.integers(3, 9)), int(rng.integers(3, 9)))).clip(0, 255)
    return Image.fromarray(cells.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def background(split: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """RGB of `size`: blended textures, and polygons filled with others."""
    image = gradient(size, rng)
    for _ in range(rng.integers(1, 4)):
        image = Image.composite(texture(split, size, rng), image, clouds(size, rng))
    for _ in range(rng.integers(0, 9)):  # distractors, so that an edge alone does not indicate an object
        mask = Image.new("L", size)
        center, radius = rng.uniform(0, size), rng.uniform(0.05, 0.35) * min(size)
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        corners = center + radius * rng.uniform(0.5, 1.5, (len(angles), 1)) * np.stack(
            [np.cos(angles), np.sin(angles)], 1
        )
        ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in corners], fill=int(rng.integers(120, 256)))
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
        scrap = texture(split, size, rng) if rng.random() < 0.7 else gradient(size, rng)
        image = Image.composite(scrap, image, mask)
    return image


def placed(stamp: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """RGBA of `size` with `stamp` at a random position, size, angle and brightness; it may extend beyond the border."""
    length = min(np.exp(rng.uniform(np.log(0.15), np.log(0.7))) * min(size), MAX_ZOOM * max(stamp.size))
    width, height = (max(1, round(length * side / max(stamp.size))) for side in stamp.size)
    # Premultiplied alpha: otherwise the colors of transparent pixels would form a light fringe around the stamp.
    stamp = stamp.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stamp = stamp.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True).convert("RGBA")
    alpha = stamp.getchannel("A")
    for adjust in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        stamp = adjust(stamp).enhance(rng.uniform(0.75, 1.25))
    stamp.putalpha(alpha)
    layer = Image.new("RGBA", size)
    x, y = (int(rng.uniform(-0.15 * a, b - 0.85 * a)) for a, b in zip(stamp.size, size, strict=True))
    layer.paste(stamp, (x, y))
    return layer


def compose(split: str, rng: np.random.Generator, size_px: int) -> tuple[Image.Image, np.ndarray, list[Object]]:
    """An image, its mask (H, W; 0 background, 255 object borders) and its objects."""
    long = int(rng.uniform(1, 1.5) * size_px)
    short = round(long / (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9)[rng.integers(5)])
    size = (long, short) if rng.random() < 0.65 else (short, long)
    image = background(split, size, rng)
    mask = np.zeros(size[::-1], np.uint8)
    objects: list[Object] = []
    names = list(CLASSES)
    for _ in range(0 if rng.random() < EMPTY else rng.integers(1, 6)):
        index = int(rng.integers(len(names)))
        files = stamps()[split][names[index]]
        stamp = cut_out(files[rng.integers(len(files))])
        for _ in range(10):  # attempts to find a position that does not occlude other objects too much
            layer = placed(stamp, size, rng)
            alpha = np.asarray(layer.getchannel("A"))
            visible = alpha > 127
            if visible.sum() > 100 and all((o.visible & ~visible).sum() > MIN_VISIBLE * o.num_px for o in objects):
                for o in objects:
                    o.visible = o.visible & ~visible
                objects.append(Object(names[index], visible, int(visible.sum())))
                mask[visible] = index + 1
                mask[(alpha > 31) & (alpha < 224)] = 255
                image.paste(layer, mask=layer.getchannel("A"))
                break
    pixels = np.asarray(image) + rng.normal(0, rng.uniform(0, 8), (*mask.shape, 1))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), mask, objects


def write_image(index: int, out: Path, split: str, seed: int, size_px: int) -> tuple[int, int, list[Object]]:
    """Compose image `index` of a split and write it with its mask and annotation; returns width, height and objects."""
    rng = np.random.default_rng([seed, split == "val", index])
    image, mask, objects = compose(split, rng, size_px)
    stem = f"{split}_{index:05}"
    image.save(out / split / f"{stem}.jpg", quality=90)
    os.link(out / split / f"{stem}.jpg", out / "voc" / "JPEGImages" / f"{stem}.jpg")
    write_mask_png(mask, out / "voc" / "SegmentationClass" / f"{stem}.png")
    write_xml(out / "voc" / "Annotations" / f"{stem}.xml", image.size, objects)
    for i, thing in enumerate(objects):
        crop(image, thing.box()).save(out / "crops" / split / thing.name / f"{stem}_{i}.jpg", quality=90)
    return *image.size, objects


def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The square crop around a box, enlarged by a tenth of its longer side and clipped to the image."""
    left, top, right, bottom = box
    half = 0.6 * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    width, height = image.size
    left, top, right, bottom = max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)
    return image.crop((round(left), round(top), round(right), round(bottom)))


def write_xml(file: Path, size: tuple[int, int], objects: list[Object]) -> None:
    """VOC's annotation of an image. Pixel coordinates start at 1, and boxes include their last pixel."""
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = f"{file.stem}.jpg"
    element = ET.SubElement(root, "size")
    for tag, value in (("width", size[0]), ("height", size[1]), ("depth", 3)):
        ET.SubElement(element, tag).text = str(value)
    ET.SubElement(root, "segmented").text = "1"
    for thing in objects:
        element = ET.SubElement(root, "object")
        ET.SubElement(element, "name").text = thing.name
        ET.SubElement(element, "difficult").text = "0"
        left, top, right, bottom = thing.box()
        box = ET.SubElement(element, "bndbox")
        for tag, value in (("xmin", left + 1), ("ymin", top + 1), ("xmax", right), ("ymax", bottom)):
            ET.SubElement(box, tag).text = str(value)
    ET.indent(root)
    ET.ElementTree(root).write(file)


def write_split(
    out: Path, split: str, num: int, seed: int, size_px: int, pool: multiprocessing.pool.Pool
) -> Counter[str]:
    """Write the images of a split and their COCO and VOC lists; returns the number of objects per class."""
    (out / split).mkdir()
    images, annotations = [], []
    write = partial(write_image, out=out, split=split, seed=seed, size_px=size_px)
    for index, (width, height, objects) in enumerate(pool.imap(write, range(num), chunksize=8)):
        images.append({"id": index + 1, "file_name": f"{split}_{index:05}.jpg", "width": width, "height": height})
        for thing in objects:
            left, top, right, bottom = thing.box()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": list(CLASSES).index(thing.name) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(thing.visible.sum()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    listed = {"images": images, "annotations": annotations, "categories": categories}
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(listed))
    for sets in ("Main", "Segmentation"):
        text = "".join(f"{split}_{index:05}\n" for index in range(num))
        (out / "voc" / "ImageSets" / sets / f"{split}.txt").write_text(text)
    return Counter(list(CLASSES)[a["category_id"] - 1] for a in annotations)


def main(out: Path, num_train: int, num_val: int, seed: int, size_px: int) -> None:
    """Write the data set and print its statistics."""
    if not STAMPS.is_dir():
        sys.exit(f"{STAMPS}: no such folder; install it with apt-get install tuxpaint-stamps-default")
    if out.exists():
        if any(out.iterdir()) and not (out / "voc" / "SegmentationClass").is_dir():
            sys.exit(f"{out}: is not a dataset of this example; choose another folder")
        shutil.rmtree(out)
    for folder in ("annotations", "voc/Annotations", "voc/JPEGImages", "voc/SegmentationClass"):
        (out / folder).mkdir(parents=True)
    for sets in ("Main", "Segmentation"):
        (out / "voc" / "ImageSets" / sets).mkdir(parents=True)
    for split in ("train", "val"):
        for name in CLASSES:
            (out / "crops" / split / name).mkdir(parents=True)
    (out / "voc" / "classes.txt").write_text("\n".join(["background", *CLASSES]) + "\n")
    with multiprocessing.Pool() as pool:
        objects = {
            split: write_split(out, split, num, seed, size_px, pool)
            for split, num in (("train", num_train), ("val", num_val))
        }
    print(f"{'class':<14}  stamps train / val  objects train / val")
    for name in CLASSES:
        files = stamps()
        print(
            f"{name:<14}  {len(files['train'][name]):>12} / {len(files['val'][name]):<3}"
            f"  {objects['train'][name]:>13} / {objects['val'][name]:<3}"
        )
    print(f"\nBoxes: {out}\nMasks: {out / 'voc'}\nClasses: {out / 'crops'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FOLDER", help="replaced if this example wrote it")
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-val", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size-px",
        type=int,
        default=320,
        help="smallest long side of an image in pixels; the largest is 1.5 times this",
    )
    main(**vars(parser.parse_args()))
