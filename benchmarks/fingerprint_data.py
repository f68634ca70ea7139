"""The synthetic data and random weights of `fingerprint.py`: the same bytes on every run."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("square", "circle", "triangle")


def write_data(folder: Path) -> None:
    """Write all data sets, a folder for each."""
    folder.mkdir()
    write_digits(folder, 600)
    write_shapes(folder, 18)
    write_coco(folder, 24, 8)
    write_masks(folder, 24)
    write_voc(folder, 8)


def write_digits(folder: Path, num: int) -> None:
    """scikit-learn's handwritten digits as 8 x 8 px PNG, a folder for each class; and the same as idx and tar files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.minimum(pixels[:num].reshape(-1, 8, 8) * 16, 255).astype(np.uint8)
    pngs = [folder / "digits" / str(label) / f"{i:04}.png" for i, label in enumerate(labels[:num])]
    for path, image in zip(pngs, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    idx, tars = folder / "digits_idx", folder / "digits_tar"
    for path in (idx, tars):
        path.mkdir()
        (path / "classes.txt").write_text("".join(f"{label}\n" for label in range(10)))
    for name, split in (("train", range(num // 2)), ("t10k", range(num // 2, num))):
        for kind, values in (("images-idx3", images[split]), ("labels-idx1", labels[split].astype(np.uint8))):
            header = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            content = gzip.compress(header + values.tobytes(), mtime=0)
            (idx / f"{name}-{kind}-ubyte.gz").write_bytes(content)
    for name, split in (("train", range(num // 2)), ("val", range(num // 2, num))):
        with tarfile.open(tars / f"{name}-000.tar", "w") as tar:
            for i in split:
                for suffix, content in (("png", pngs[i].read_bytes()), ("cls", str(labels[i]).encode())):
                    info = tarfile.TarInfo(f"{i:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def draw_scene(random: np.random.Generator, width: int, height: int, objects: Sequence[tuple[int, tuple[int, ...]]]):
    """An image with noise and an object for each (class, box), and its mask: class + 1, 0 for the background."""
    from PIL import Image, ImageDraw

    noise = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
    image, mask = Image.fromarray(noise), Image.new("L", (width, height), 0)
    for label, (x1, y1, x2, y2) in objects:
        color = [40, 40, 40]
        color[label % 3] = int(random.integers(170, 256))
        for target, fill in ((image, tuple(color)), (mask, label + 1)):
            draw = ImageDraw.Draw(target)
            if CLASSES[label] == "square":
                draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=fill)
            elif CLASSES[label] == "circle":
                draw.ellipse((x1, y1, x2 - 1, y2 - 1), fill=fill)
            else:
                draw.polygon([(x1, y2 - 1), ((x1 + x2) // 2, y1), (x2 - 1, y2 - 1)], fill=fill)
    return image, mask


def random_size(random: np.random.Generator, smallest: int = 100) -> tuple[int, int]:
    """A random width and height of up to 180 px."""
    return int(random.integers(smallest, 180)), int(random.integers(smallest, 180))


def random_box(random: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """A random box; each side is a third to two thirds of that of the image."""
    w, h = (int(random.integers(side // 3, 2 * side // 3)) for side in (width, height))
    x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
    return x, y, x + w, y + h


def write_shapes(folder: Path, num: int) -> None:
    """Images of three classes: JPEG, PNG, transparent, grayscale, palette, rotated by EXIF, of many sizes."""
    from PIL import Image

    random = np.random.default_rng(1)
    for class_name in sorted(CLASSES):
        for i in range(num):
            width, height = random_size(random, 70)
            objects = [(CLASSES.index(class_name), random_box(random, width, height))]
            image, mask = draw_scene(random, width, height, objects)
            path = folder / "shapes" / class_name / f"{i:02}"
            path.parent.mkdir(parents=True, exist_ok=True)
            match i % 6:
                case 0:
                    image.save(path.with_suffix(".jpg"), quality=90)
                case 1:
                    image.save(path.with_suffix(".png"))
                case 2:
                    image.putalpha(mask.point(lambda value: 255 if value else 60))
                    image.save(path.with_suffix(".png"))
                case 3:
                    image.convert("L").save(path.with_suffix(".png"))
                case 4:
                    exif = Image.Exif()
                    exif[0x0112] = 6
                    image.save(path.with_suffix(".jpg"), exif=exif, quality=85)
                case 5:
                    image.quantize(32).save(path.with_suffix(".png"))


def write_coco(folder: Path, num_train: int, num_val: int) -> None:
    """COCO's layout: ids with gaps, a crowd, an image without boxes."""
    random = np.random.default_rng(2)
    ids = (1, 3, 7)
    categories = [{"id": i, "name": name} for i, name in zip(ids, CLASSES, strict=True)]
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split, num in (("train", num_train), ("val", num_val)):
        images, annotations = [], []
        (folder / "coco" / split).mkdir()
        for i in range(num):
            width, height = random_size(random)
            num_objects = {3: 2, 5: 0}.get(i, int(random.integers(1, 3)))
            objects = [(int(random.integers(0, 3)), random_box(random, width, height)) for _ in range(num_objects)]
            draw_scene(random, width, height, objects)[0].save(folder / "coco" / split / f"{i:012}.jpg", quality=92)
            images.append({"id": i, "file_name": f"{i:012}.jpg", "width": width, "height": height})
            for index, (label, (x1, y1, x2, y2)) in enumerate(objects):
                annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": ids[label]}
                annotation |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                annotations.append(annotation | {"iscrowd": int(i == 3 and index == 0)})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write_masks(folder: Path, num: int) -> None:
    """images/ and masks/ without splits; the border of some objects is ignored."""
    random = np.random.default_rng(3)
    for name in ("images", "masks"):
        (folder / "masks" / name).mkdir(parents=True)
    (folder / "masks" / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *CLASSES)))
    for i in range(num):
        width, height = random_size(random)
        objects = [(int(random.integers(0, 3)), random_box(random, width, height))]
        image, mask = draw_scene(random, width, height, objects)
        if i % 4 == 0:
            mask.paste(255, (0, 0, width, 4))
        image.save(folder / "masks" / "images" / f"{i:02}.jpg", quality=92)
        mask.save(folder / "masks" / "masks" / f"{i:02}.png")


def write_voc(folder: Path, num: int) -> None:
    """PASCAL VOC's layout, with boxes and masks."""
    random = np.random.default_rng(4)
    voc = folder / "voc"
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    (voc / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *CLASSES)))
    for i in range(num):
        width, height = random_size(random)
        label, (x1, y1, x2, y2) = i % 3, random_box(random, width, height)
        image, mask = draw_scene(random, width, height, [(label, (x1, y1, x2, y2))])
        image.save(voc / "JPEGImages" / f"{i:04}.jpg", quality=92)
        palette = mask.convert("P")
        palette.putdata(list(mask.tobytes()))
        palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
        palette.save(voc / "SegmentationClass" / f"{i:04}.png")
        (voc / "Annotations" / f"{i:04}.xml").write_text(
            f"<annotation><filename>{i:04}.jpg</filename><size><width>{width}</width><height>{height}</height>"
            f"<depth>3</depth></size><object><name>{CLASSES[label]}</name><difficult>{int(i == 1)}</difficult>"
            f"<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            "</annotation>"
        )
    for kind in ("Main", "Segmentation"):
        for split, indices in (("train", range(num // 2)), ("val", range(num // 2, num))):
            (voc / "ImageSets" / kind / f"{split}.txt").write_text("".join(f"{i:04}\n" for i in indices))


def generated_tensors(shapes: dict[str, Sequence[int]]) -> dict[str, Any]:
    """Random tensors, each from a generator seeded by its name, at a scale that keeps activations in range."""
    import torch

    tensors = {}
    for key, shape in shapes.items():
        random = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(0)
            continue
        if key.endswith("running_var"):
            values = 0.5 + random.random(shape)
        elif key.endswith(("running_mean", "bias")):
            values = 0.1 * random.standard_normal(shape)
        elif len(shape) == 1:
            values = 1 + 0.1 * random.standard_normal(shape)
        else:
            values = 1.3 * random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        tensors[key] = torch.from_numpy(np.asarray(values, np.float32))
    return tensors


def write_generated(folder: Path, golden: Path) -> dict[str, tuple[str, Path]]:
    """Random weights in the published format, with the keys of `golden`, and in timm's: {name: (task, path)}."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    found: dict[str, tuple[str, Path]] = {}
    tasks = {"cls": "classify", "det": "detect", "seg": "segment"}
    for keys in sorted(golden.glob("*.keys.json")):
        name = keys.name.removesuffix(".keys.json")
        path = folder / f"{name}.pt"
        torch.save(generated_tensors(json.loads(keys.read_text())), path)
        found[f"published format {name}"] = (tasks[name.partition("_")[0]], path)
    for size in ("xxs", "xs", "s"):
        shapes = {key: list(x.shape) for key, x in timm.create_model(f"mobilevit_{size}").state_dict().items()}
        path = folder / f"timm_{size}.safetensors"
        save_file(generated_tensors(shapes), path)  # pyright: ignore[reportArgumentType]
        found[f"timm format {size}"] = ("classify", path)
    return found
