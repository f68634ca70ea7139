"""Boxes and masks of every format, compared with the written values and with pycocotools."""

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobilevit.data.boxes import Boxes
from mobilevit.data.checks import check_images
from mobilevit.data.masks import MaskFile
from mobilevit.data.samples import Source, fingerprint
from mobilevit.data.sources import default_split, find_evaluation_split, find_splits
from mobilevit.images import ImageError, read_image

find_boxes = partial(find_splits, "detect")
find_masks = partial(find_splits, "segment")


def find_boxes_to_evaluate(data: Path, class_names: tuple[str, ...], split: str = "", fraction: float = 0.5) -> Source:
    return find_evaluation_split("detect", data, class_names, split or default_split("detect", data), fraction)


def find_masks_to_evaluate(data: Path, class_names: tuple[str, ...]) -> Source:
    return find_evaluation_split("segment", data, class_names, default_split("segment", data))


def files(source: Source) -> list[Path]:
    return [Path(source[i].image) for i in range(len(source))]  # pyright: ignore[reportArgumentType]


WIDTH, HEIGHT = 40, 31
CATEGORIES = [{"id": 7, "name": "tree"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "dog"}]


def image(file: Path, size: tuple[int, int] = (WIDTH, HEIGHT), orientation: int | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, "gray").save(file, exif=exif)


def annotation(image: int, category: int, bbox: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, "area": 50.0, "iscrowd": 0} | more


ANNOTATIONS = [
    annotation(11, 90, [1, 2, 30, 4.5]),
    annotation(11, 2, [0, 0, 40, 31], iscrowd=1, area=321.5),
    annotation(5, 2, [10.25, 3.5, 7.5, 9]),
]
NAMES = {11: "b.jpg", 5: "a/c.jpg", 8: "empty.jpg"}


def coco(file: Path, folder: Path, annotations: list[dict] = ANNOTATIONS, **lists: Any) -> None:
    """A COCO file and its images; ids have gaps and are unsorted; one image has no boxes."""
    for name in NAMES.values():
        image(folder / name)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in NAMES.items()],
        "annotations": [{"id": i, **entry} for i, entry in enumerate(annotations)],
        "categories": CATEGORIES,
    }
    file.write_text(json.dumps(content | lists))


def coco2017(root: Path, annotations: list[dict] = ANNOTATIONS, **lists: Any) -> Path:
    for split in ("train", "val"):
        coco(root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017", annotations, **lists)
    return root


def by_name(source: Source) -> dict[str, Any]:
    return {file.name: label for file, label in zip(files(source), source.labels, strict=True)}


# --- COCO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["2017", "below images/", "roboflow", "train.json", "cvat"])
def test_coco_is_read_as_pycocotools_reads_it(tmp_path: Path, layout: str):
    reference = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    places = {
        "2017": ("annotations/instances_{}2017.json", "{}2017"),
        "below images/": ("annotations/instances_{}2017.json", "images/{}2017"),
        "roboflow": ("{}/_annotations.coco.json", "{}"),
        "train.json": ("{}.json", "images"),
        "cvat": ("annotations/instances_default.json", "images/default"),
    }
    splits = ("all",) if layout == "cvat" else ("train", "valid" if layout == "roboflow" else "val")
    files = [tmp_path / places[layout][0].format(split) for split in splits]
    for file, split in zip(files, splits, strict=True):
        coco(file, tmp_path / places[layout][1].format(split))
    sources = (find_boxes_to_evaluate(tmp_path, ("cat", "tree", "dog")),)
    assert default_split("detect", tmp_path) == ("all" if layout == "cvat" else "val")
    if layout != "cvat":
        sources = find_boxes(tmp_path, 0.5)
    for file, source in zip(files, sources, strict=True):
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = reference.COCO(str(file))
        assert source.class_names == tuple(theirs.cats[i]["name"] for i in sorted(theirs.cats))
        assert source.category_ids == tuple(sorted(theirs.cats))
        assert len(source) == len(theirs.imgs)
        for i in range(len(source)):
            sample = source[i]
            image = next(image for image in theirs.imgs.values() if sample.name.endswith(image["file_name"]))
            assert read_image(sample.image).size == sample.label.size == (image["width"], image["height"])
            expected = theirs.loadAnns(theirs.getAnnIds(image["id"]))
            x, y, width, height = np.array([a["bbox"] for a in expected], float).reshape(-1, 4).T
            assert np.array_equal(sample.label.corners, np.stack([x, y, x + width, y + height], 1))
            names = [source.class_names[label] for label in sample.label.labels]
            assert names == [theirs.cats[a["category_id"]]["name"] for a in expected]
            assert sample.label.crowd.tolist() == [bool(a["iscrowd"]) for a in expected]
            assert sample.label.areas.tolist() == [a["area"] for a in expected]
            assert [a.dtype for a in (sample.label.corners, sample.label.labels)] == [np.float32, np.int64]
    assert check_images(*sources).unreadable == []


def test_boxes_are_clipped_and_empty_ones_ignored(tmp_path: Path):
    boxes = [
        annotation(5, 2, [-3, -4, 10, 10]),
        annotation(5, 2, [35, 30, 100, 100]),
        *(annotation(8, 2, box) for box in ([5, 5, 0, 3], [5, 5, 3, -1], [5, 5, float("nan"), 2], [41, 0, 9, 9])),
        annotation(11, 2, [1, 1, 2, 3], area=None),
    ]
    train, _ = find_boxes(coco2017(tmp_path, boxes), 0.5)
    found = by_name(train)
    assert found["c.jpg"].corners.tolist() == [[0, 0, 7, 6], [35, 30, 40, 31]]
    assert len(found["empty.jpg"].corners) == 0
    assert found["b.jpg"].areas.tolist() == [6]
    assert any("4 boxes without area" in note and "empty.jpg" in note for note in train.notes)
    assert any("'tree', 'dog'" in note for note in train.notes)  # classes without boxes


def test_image_sizes_missing_in_the_annotation(tmp_path: Path):
    images = [{"id": i, "file_name": name} for i, name in NAMES.items()]
    coco2017(tmp_path, [annotation(5, 2, [30, 20, 50, 50])], images=images)
    train, val = find_boxes(tmp_path, 0.5)
    assert by_name(train)["c.jpg"].corners.tolist() == [[30, 20, WIDTH, HEIGHT]]
    assert check_images(train, val).unreadable == []


@pytest.mark.parametrize(
    ("annotations", "lists", "message"),
    [
        ([annotation(99, 2, [0, 0, 1, 1])], {}, "annotation 0 has the unknown image_id 99"),
        ([annotation(5, 1, [0, 0, 1, 1])], {}, "annotation 0 has the unknown category_id 1;"),
        ([annotation(5, 2, [0, 0, 1])], {}, r"annotation 0 has the bbox \[0, 0, 1\]"),
        ([annotation(5, 2, [0, 0, 1, 1], area="big")], {}, "and the area big; expected"),
        ([{"image_id": 5, "bbox": [0, 0, 1, 1]}], {}, r"annotations\[0\] has no category_id"),
        (
            [annotation(5, 2, [0, 0, 1, 1], image_id=[5])],
            {},
            r"annotations\[0\] has the ids 0, \[5\], 2; expected whole",
        ),
        (ANNOTATIONS, {"categories": [*CATEGORIES, CATEGORIES[0]]}, r"category 7 \('tree'\) is a duplicate"),
        (ANNOTATIONS, {"categories": {}}, "expected the lists images, annotations, categories"),
        (ANNOTATIONS, {"images": [{"id": 1, "file_name": "gone.jpg"}]}, "train2017/gone.jpg: no such file"),
        (ANNOTATIONS, {"images": [{"id": 1, "file_name": "../b.jpg"}]}, r"image 1 \(../b.jpg\) is not below"),
        (ANNOTATIONS, {"images": [{"id": 1, "file_name": "/etc/b.jpg"}]}, r"image 1 \(/etc/b.jpg\) is not below"),
        (ANNOTATIONS, {"images": [{"id": 1, "file_name": "b.jpg"}] * 2}, r"image 1 \(b.jpg\) is a duplicate"),
        ([], {"images": []}, "contains no images"),
        ([], {}, "no boxes in the images to train on"),
        ([annotation(5, 2, [0, 0, 9, 9], iscrowd=1)], {}, "no boxes in the images to train on"),
    ],
)
def test_invalid_coco(tmp_path: Path, annotations: list[dict], lists: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        find_boxes(coco2017(tmp_path, annotations, **lists), 0.2)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_coco_files_of_one_split_or_not_json(tmp_path: Path):
    coco2017(tmp_path)
    coco(tmp_path / "annotations" / "instances_train2014.json", tmp_path / "train2014")
    with pytest.raises(ValueError, match=r"instances_train2014.json, .*train2017.json are of the same split"):
        find_boxes(tmp_path, 0.2)
    (tmp_path / "annotations" / "instances_train2014.json").unlink()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2017.json: not JSON"):
        find_boxes(tmp_path, 0.2)


@pytest.mark.parametrize("below", ["val2017", "images/val", "valid"])
def test_validation_images_without_annotations(tmp_path: Path, below: str):
    coco2017(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    train, val = find_boxes(tmp_path, 0.5)
    assert len(train) + len(val) == 3
    assert [f"{len(val)} of 3 images" in note for note in train.notes if "no validation split" in note] == [True]
    assert not any("held out" in note for note in val.notes)
    image(tmp_path / below / "x.jpg")
    with pytest.raises(ValueError, match=f"^{tmp_path / below}: validation images without annotations"):
        find_boxes(tmp_path, 0.5)


def test_classes_are_matched_by_name(tmp_path: Path):
    coco2017(tmp_path)
    for class_names in (("dog", "cat"), ("x", "cat", "dog", "tree")):  # no box is a tree
        source = find_boxes_to_evaluate(tmp_path, class_names)
        assert source.class_names == class_names
        assert [class_names[label] for label in by_name(source)["b.jpg"].labels] == ["dog", "cat"]
        assert source.category_ids == ()  # the classes are in another order
    with pytest.raises(ValueError, match=r"class 'dog' not among the 1 known classes \(cat\)"):
        find_boxes_to_evaluate(tmp_path, ("cat",))


def test_image_size_must_match_the_annotation(tmp_path: Path):
    coco2017(tmp_path)
    folder = tmp_path / "train2017"
    image(folder / "b.jpg", (HEIGHT, WIDTH), orientation=6)  # the upright image has the annotated size
    sources = find_boxes(tmp_path, 0.5)
    assert read_image(folder / "b.jpg").size == (WIDTH, HEIGHT)
    assert check_images(*sources).unreadable == []
    image(folder / "b.jpg", orientation=8)
    image(folder / "empty.jpg", (WIDTH, 8))
    with pytest.raises(ImageError) as caught:
        check_images(*sources)
    assert f"{folder / 'b.jpg'}: 31 x 40 px, but annotated as 40 x 31; remove its EXIF" in str(caught.value)
    assert f"{folder / 'empty.jpg'}: 40 x 8 px, but annotated as 40 x 31; fix" in str(caught.value)
    image(folder / "b.jpg")
    (folder / "empty.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"empty.jpg: not an image.*; replace .*--max-unreadable 1$"):
        check_images(*sources)
    assert [error.partition(": ")[0] for error in check_images(*sources, max_unreadable=1).unreadable] == [
        str(folder / "empty.jpg")
    ]


def test_validation_split_of_boxes_depends_on_names_only(tmp_path: Path):
    def found(root: Path, num: int) -> tuple[set[str], set[str]]:
        for i in range(num):
            image(root / "images" / f"{i}.jpg", (4, 4))
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 4, "height": 4} for i in range(num)]
        boxes = [{"id": i, **annotation(i, 2, [0, 0, 2, 2])} for i in range(num)]
        lists = {"images": images, "annotations": boxes, "categories": CATEGORIES}
        (root / "all.json").write_text(json.dumps(lists))
        train, val = find_boxes(root, 0.25)
        assert len(train) + len(val) == num
        return set(by_name(train)), set(by_name(val))

    train, val = found(tmp_path / "here", 120)
    more_train, more_val = found(tmp_path / "there", 150)
    assert not train & val
    assert (len(val), len(more_val)) == (30, 38)  # 37.5, rounded
    assert len(train & more_val | val & more_train) <= 30
    for split, images in (("train", train), ("val", val)):
        assert set(by_name(find_boxes_to_evaluate(tmp_path / "here", ("dog", "cat"), split, 0.25))) == images
    assert len(find_boxes_to_evaluate(tmp_path / "here", ("dog", "cat"), "all")) == 120
    with pytest.raises(ValueError, match=r"here: has no split 'test'.*--split all"):
        find_boxes_to_evaluate(tmp_path / "here", ("dog", "cat"), "test", 0.25)
    assert [len(x) for x in found(tmp_path / "two", 2)] == [1, 1]
    with pytest.raises(ValueError, match="one image is too few"):
        found(tmp_path / "one", 1)
    with pytest.raises(ValueError, match=r"^val_fraction is 0"):
        find_boxes(tmp_path / "here", 0)


def test_fingerprint_depends_on_boxes(tmp_path: Path):
    prints = []
    for i, box in enumerate(([0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 8])):
        prints.append(fingerprint(find_boxes(coco2017(tmp_path / str(i), [annotation(5, 2, box)]), 0.5)[0]))
    assert prints[0] == prints[1] != prints[2]


def test_no_or_several_formats(tmp_path: Path):
    for find, what in ((find_boxes, r"expected COCO .* or VOC"), (find_masks, r"expected VOC .*images/")):
        with pytest.raises(ValueError, match=f"^{tmp_path}: data format not recognized; {what}"):
            find(tmp_path, 0.2)
        with pytest.raises(ValueError, match=r"missing: no such folder$"):
            find(tmp_path / "missing", 0.2)
    voc(coco2017(tmp_path))
    with pytest.raises(ValueError, match="contains COCO and VOC; remove all but one"):
        find_boxes(tmp_path, 0.2)


# --- VOC --------------------------------------------------------------------------------------------------------------

THING = (
    "<object><name>{}</name><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
    "</bndbox></part><difficult>{}</difficult>"
    "<bndbox><xmax>{}</xmax><xmin>{}</xmin><ymax>{}</ymax><ymin>{}</ymin></bndbox></object>"
)


def voc(root: Path, sets: dict[str, str] | None = None, xml: str | None = None) -> Path:
    """Three images: one with two objects, one with a crowd, one without objects."""
    sets = {"train": "1\n3\n", "val": "2\n", "trainval": "1\n2\n3\n"} if sets is None else sets
    for folder in ("Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    things = {
        "1": THING.format("dog", 0, 20, 11, 31, 1) + THING.format("cat", 0, "40.0", "39.0", 5, 5),
        "2": THING.format("dog", 1, 40, 1, 31, 1),
        "3": "",
    }
    for stem, objects in things.items():
        image(root / "JPEGImages" / f"{stem}.jpg")
        text = f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{objects}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(xml if xml is not None and stem == "1" else text)
    for name, text in sets.items():
        for folder in ("Main", "Segmentation"):
            (root / "ImageSets" / folder / f"{name}.txt").write_text(text)
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("1 1\n3 -1\n")
    return root


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2007"])
def test_voc_boxes(tmp_path: Path, below: str):
    voc(tmp_path / below)
    train, val = find_boxes(tmp_path, 0.5)
    assert train.class_names == val.class_names == ("cat", "dog")
    assert [file.stem for file in files(train)] == ["1", "3"]
    # Pixels 11 to 20 and 1 to 31 of the image, counted from 1.
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    for x in range(11, 21):
        for y in range(1, 32):
            pixels[y - 1, x - 1] = True
    x1, y1, x2, y2 = train.labels[0].corners[0].astype(int)
    assert pixels[y1:y2, x1:x2].all()
    assert pixels.sum() == (x2 - x1) * (y2 - y1) == train.labels[0].areas[0]
    assert train.labels[0].corners[1].tolist() == [38, 4, 40, 5]
    assert train.labels[0].labels.tolist() == [1, 0]
    assert len(train.labels[1].labels) == 0
    assert (train.labels[0].crowd.tolist(), val.labels[0].crowd.tolist()) == ([False, False], [True])
    assert check_images(train, val).unreadable == []
    assert find_boxes_to_evaluate(tmp_path, ("dog", "cat")).labels[0].labels.tolist() == [0]


def test_voc_without_lists_or_val(tmp_path: Path):
    for i, sets in enumerate(({}, {"trainval": "1\n2\n3\n"})):
        source = find_boxes_to_evaluate(voc(tmp_path / str(i), sets), ("cat", "dog"))
        assert sorted(file.stem for file in files(source)) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("sets", "xml", "message"),
    [
        (None, "<annotation>", "Annotations/1.xml: not XML"),
        (None, "<a>" + THING.format("dog", 0, 1, "x", 1, 1) + "</a>", r"1.xml: object 1 \(dog\) has the corners \['x'"),
        (None, "<a>" + THING.format(" ", 0, 1, 1, 1, 1) + "</a>", "1.xml: object 1 has no name"),
        ({"train": "1\n4\n", "val": "2\n"}, None, "JPEGImages/4.jpg: no such file"),
        ({"train": "3\n", "val": "2\n"}, None, "class 'dog' not among the 0 known"),
        ({"val": "2\n"}, None, "has only the splits val; expected one to train on"),
    ],
)
def test_invalid_voc(tmp_path: Path, sets: dict[str, str] | None, xml: str | None, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        find_boxes(voc(tmp_path, sets, xml), 0.2)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_voc_annotation_missing_and_several_years(tmp_path: Path):
    voc(tmp_path / "VOCdevkit" / "VOC2007")
    (tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / "3.xml").unlink()
    with pytest.raises(ValueError, match=r"3.xml: no such file; add it, or remove 3 from .*Main$"):
        find_boxes(tmp_path, 0.2)
    voc(tmp_path / "VOCdevkit" / "VOC2012")
    with pytest.raises(ValueError, match="contains VOC2007, VOC2012; give one of them"):
        find_boxes(tmp_path, 0.2)


# --- Masks ------------------------------------------------------------------------------------------------------------


def values(num_classes: int) -> np.ndarray:
    """A mask with every class and 255."""
    found = np.random.default_rng(num_classes).integers(0, num_classes, (HEIGHT, WIDTH)).astype(np.uint8)
    found[3:5, 7:9] = 255
    return found


def palette_png(file: Path, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def test_voc_masks(tmp_path: Path):
    voc(tmp_path)
    for stem in "123":
        palette_png(tmp_path / "SegmentationClass" / f"{stem}.png", values(21))
    train, val = find_masks(tmp_path, 0.5)
    assert len(train.class_names) == 21
    assert [train.class_names[i] for i in (0, 1, 12, 15, 20)] == [
        *("background", "aeroplane", "dog", "person", "tvmonitor")  # as VOC2012's development kit numbers them
    ]
    for source in (train, val):
        for i in range(len(source)):
            assert np.array_equal(source[i].label.read(WIDTH, HEIGHT), values(21))
    assert check_images(train, val).unreadable == []
    assert train.notes == (f"{tmp_path}: no classes.txt; assuming the 21 classes of PASCAL VOC",)
    assert val.notes == ()
    palette_png(tmp_path / "SegmentationClass" / "1.png", values(22))
    with pytest.raises(ImageError, match=r"1.png: value 21 at x \d+, y \d+ has no class; expected 0 to 20, and 255"):
        train[0].label.read(WIDTH, HEIGHT)
    xml = tmp_path / "Annotations" / "3.xml"
    xml.write_text(f"<annotation>{THING.format('tree', 0, 9, 1, 9, 1)}</annotation>")
    with pytest.raises(ValueError, match=f"^{xml}: 'tree' is not a class of PASCAL VOC.*; write .*classes.txt"):
        find_masks(tmp_path, 0.5)
    (tmp_path / "classes.txt").write_text("sky\nroad\n" + "\n".join(f"c{i}" for i in range(20)))
    train, _ = find_masks(tmp_path, 0.5)
    assert train.class_names[:3] == ("sky", "road", "c0")
    assert train.notes == ()
    assert np.array_equal(train[0].label.read(WIDTH, HEIGHT), values(22))
    (tmp_path / "SegmentationClass" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1.png: no such mask; add it or remove its image"):
        find_masks(tmp_path, 0.5)


COLORS = {"road": (128, 64, 128), "sky": (70, 130, 180), "tree": (0, 0, 0)}


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}", "{kind}"])
@pytest.mark.parametrize("coding", ["L", "P", "RGB", "RGBA"])
def test_mask_folders(tmp_path: Path, layout: str, coding: str):
    ignored = (255, 255, 254)
    colored = coding.startswith("RGB")
    lines = [f"{name} #{bytes(rgb).hex()}" if colored else name for name, rgb in COLORS.items()]
    # The class "ignore" is not counted as a class, wherever it is listed.
    (tmp_path / "classes.txt").write_text(
        "\n".join([lines[0], f"ignore #{bytes(ignored).hex()}"] * colored + lines[colored:])
    )
    for split in ("train", "validation"):
        images, masks = (tmp_path / layout.format(split=split, kind=kind) for kind in ("images", "masks"))
        image(images / "deep" / f"{split}.jpeg")
        mask = masks / "deep" / f"{split}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        if coding == "P":
            palette_png(mask, values(3))
        elif coding == "L":
            Image.fromarray(values(3)).save(mask)
        else:
            table = np.full((256, 3), ignored, np.uint8)
            table[:3] = list(COLORS.values())
            Image.fromarray(table[values(3)]).convert(coding).save(mask)
    sources = find_masks(tmp_path, 0.5)
    assert default_split("segment", tmp_path) == ("all" if layout == "{kind}" else "val")
    assert {file.stem for source in sources for file in files(source)} == {"train", "validation"}
    assert check_images(*sources).unreadable == []
    for source in sources:
        assert source.class_names == tuple(COLORS)
        read = source[0].label.read(WIDTH, HEIGHT)
        assert read.dtype == np.uint8
        assert np.array_equal(read, values(3))
    source = find_masks_to_evaluate(tmp_path, ("x", "tree", "road", "sky"))
    expected = np.array([2, 3, 1] + [255] * 253, np.uint8)[values(3)]
    assert np.array_equal(source[0].label.read(WIDTH, HEIGHT), expected)
    with pytest.raises(ValueError, match="class 'sky' not among the 2 known classes"):
        find_masks_to_evaluate(tmp_path, ("road", "tree"))


def masks(root: Path, classes: str | None = "a\nb\n") -> tuple[Path, Path]:
    image(root / "images" / "1.jpg")
    image(root / "images" / "2.jpg")
    for stem in "12":
        palette_png(root / "masks" / f"{stem}.png", values(2))
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root / "images" / "1.jpg", root / "masks" / "1.png"


def one_mask(root: Path) -> MaskFile:
    return by_name(find_masks_to_evaluate(root, ("a", "b")))["1.jpg"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, "classes.txt: no such file; write one class per line, line 1 for the value 0"),
        ("a", "classes.txt: 1 classes; expected 2 to 254"),
        ("a\na", "'a' is in lines 1 and 2"),
        ("a #ff0000\nb", "no color for b"),
        ("a #ff0000\nb #FF0000", "duplicate color"),
        ("a #ff0000\na #ff0001", "duplicate name"),
    ],
)
def test_invalid_classes_txt(tmp_path: Path, classes: str | None, message: str):
    masks(tmp_path, classes)
    with pytest.raises(ValueError, match=f"^{tmp_path}/.*{message}"):
        find_masks(tmp_path, 0.5)


def test_invalid_masks(tmp_path: Path):
    image, mask = masks(tmp_path)
    sources = find_masks(tmp_path, 0.5)

    def refused(message: str, at_once: bool = True) -> None:
        for call in [lambda: one_mask(tmp_path).read(WIDTH, HEIGHT)] + [lambda: check_images(*sources)] * at_once:
            with pytest.raises(ImageError, match=f"^{mask}: {message}") as caught:
                call()
            assert "\n" not in str(caught.value)

    palette_png(mask, values(3))
    refused("value 2 at x", at_once=False)
    palette_png(mask, values(2)[1:])
    refused("40 x 30 px, but its image has 40 x 31")
    Image.new("RGB", (WIDTH, HEIGHT)).save(mask)
    refused("a mask of mode RGB, but the classes have no colors")
    mask.write_bytes(b"no image")
    refused("mask cannot be read")
    mask.unlink()
    with pytest.raises(ValueError, match=r"1.png: no such mask"):
        one_mask(tmp_path)
    with pytest.raises(ImageError, match=r"1.png: mask cannot be read \(no such file or directory\)"):
        MaskFile(mask, sources[0].labels[0].coding).read(WIDTH, HEIGHT)
    image.unlink()
    (tmp_path / "classes.txt").write_text("a #000000\nb #0000ff\n")
    Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 254)).save(tmp_path / "masks" / "2.png")
    source = find_masks_to_evaluate(tmp_path, ("a", "b"))
    with pytest.raises(ImageError, match=r"2.png: color #0000fe at x 0, y 0 has no class; expected those of the 2"):
        source[0].label.read(WIDTH, HEIGHT)


def test_truncated_masks_and_masks_without_an_image(tmp_path: Path):
    first, mask = masks(tmp_path)
    whole = mask.read_bytes()
    mask.write_bytes(whole[: len(whole) - 60])
    with pytest.raises(ImageError, match=f"^{mask}: mask cannot be read"):
        one_mask(tmp_path).read(WIDTH, HEIGHT)
    first.unlink()
    image(tmp_path / "images" / "3.jpg")
    palette_png(tmp_path / "masks" / "3.png", values(2))
    train, val = find_masks(tmp_path, 0.5)
    assert [("masks without an image" in note, "1.png" in note) for note in train.notes[:-1]] == [(True, True)]
    assert "1 of 2 images" in train.notes[-1]
    assert val.notes == ()


def test_masks_refer_to_the_upright_image(tmp_path: Path):
    turned, _ = masks(tmp_path)
    image(turned, (HEIGHT, WIDTH), orientation=6)
    assert check_images(*find_masks(tmp_path, 0.5)).unreadable == []
    assert one_mask(tmp_path).read(*read_image(turned).size).shape == (HEIGHT, WIDTH)


def test_fingerprint_depends_on_masks(tmp_path: Path):
    prints = []
    for i, classes in enumerate(("a\nb", "a\nb", "a\nc", "a #000000\nb #ffffff")):
        masks(tmp_path / str(i), classes)
        prints.append(fingerprint(find_masks(tmp_path / str(i), 0.5)[0]))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_check_reads_headers_only(tmp_path: Path):
    """A PNG file without pixels passes the check, because its header has a size."""
    image, _ = masks(tmp_path)
    image.unlink()
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
    image.with_suffix(".png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    sources = find_masks(tmp_path, 0.5)
    assert check_images(*sources).unreadable == []


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_digest_depends_on_all_values():
    corners, labels, crowd, areas = np.zeros((1, 4), np.float32), np.zeros(1, int), np.zeros(1, bool), np.ones(1)
    others = [
        Boxes(corners + 1, labels, crowd, areas),
        Boxes(corners, labels + 1, crowd, areas),
        Boxes(corners, labels, ~crowd, areas),
        Boxes(corners, labels, crowd, areas + 1),
    ]
    digests = {
        Boxes(corners, labels, crowd, areas).digest(),
        Boxes(corners.copy(), labels.copy(), crowd, areas).digest(),
    }
    assert len(digests) == 1
    assert len(digests | {other.digest() for other in others}) == 5
