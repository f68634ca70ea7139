"""Fingerprint of what mobilevit computes: run it before and after a change to show that no computed number changed.

    python fingerprint.py --out FOLDER              writes FOLDER/fingerprint.json, {name: SHA-256 or number}
    python fingerprint.py --compare a.json b.json   prints the differences; exit code 1 if there are any

The script uses the command line (`python -m mobilevit`), the documented Python API (`mobilevit.load` and the like),
weight files and exported artifacts. It imports no internal module. The copy of mobilevit under test is the one that
Python finds, so PYTHONPATH selects it. All data are synthetic, except for scikit-learn's digits, and are written into
FOLDER.

Hashes are of tensors (name, dtype, shape, bytes) or of numbers, never of files, so that metadata and layout may change.
Results are comparable on one machine with one set of libraries only. Everything is computed with one thread.

Entries that start with "augment:" depend on RandAugment, random erasing, Mixup and CutMix; --allow augment: accepts
differences in them.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Everything of mobilevit's interface that a change may rename. Where several names are given, the first one that
# `mobilevit COMMAND --help` shows is used, so that one file works before and after a renaming. An empty tuple leaves
# the option and its value out.
OPTIONS: dict[str, tuple[str, ...]] = {
    "answers": ("--postprocess", "--answers"),
    "architecture": ("--architecture",),
    "backbone": ("--backbone", "--weights"),
    "backbone lr scale": ("--optimizer.backbone-lr-scale", "--backbone-lr-scale"),
    "batch size": ("--batch-size",),
    "checkpoint minutes": ("--checkpoint-minutes",),
    "data": ("--data",),
    "device": ("--device",),
    "epochs": ("--epochs",),
    "freeze": ("--freeze", "--optimizer.freeze"),
    "images": ("--images",),
    "json": ("--json",),
    "lr": ("--lr", "--optimizer.lr"),
    "num threads": ("--num-threads",),
    "num workers": ("--num-workers", "--data.num-workers"),
    "out": ("--out",),
    "overwrite": ("--overwrite",),
    "per class": ("--per-class",),
    "pictures at once": ("--compute.pictures-at-once", "--pictures-at-once", "--compute.micro-batch-size"),
    "policy": ("--data.policy", "--policy"),
    "precision": ("--precision", "--compute.precision"),
    "rounds": ("--rounds",),
    "sampler sizes": ("--sampler.sizes-px", "--sampler.sizes"),
    "sampler variant": ("--sampler.variant",),
    "score threshold": ("--score-threshold",),
    "seed": ("--seed",),
    "size": ("--size", "--data.size-px"),
    "split": ("--split",),
    "to": ("--to",),
    "top k": ("--top-k",),
    "val fraction": ("--val-fraction", "--data.val-fraction"),
    "warmup steps": ("--optimizer.warmup-steps", "--warmup-steps"),
    "weights": ("--weights",),
}
# Names and values in commands.
VALUES: dict[str, str] = {
    "recipe digits": "tiny",
    "recipe photographs": "plain",
    "recipe small": "small",
    "recipe finetune": "finetune",
    "recipe detect": "detect",
    "recipe segment": "segment",
    "policy advanced": "advanced",
    "sampler main": "main",
    "sampler listing": "listing",
    "freeze": "stage1",
}
# The public functions of `mobilevit`; the first one that exists and accepts the weights is used.
API: dict[str, tuple[str, ...]] = {
    "classify": ("load",),
    "detect": ("load_detector", "load"),
    "segment": ("load_segmenter", "load"),
    "explain": ("explain_image", "explain_picture"),
}
# Keys of the JSON lines of `mobilevit evaluate`.
METRICS: dict[str, tuple[str, ...]] = {
    "top-1": ("top1", "top_1", "accuracy"),
    "top-5": ("top5", "top_5"),
    "loss": ("loss",),
    "AP": ("ap", "AP", "map"),
    "AP50": ("ap50", "AP50"),
    "mIoU": ("miou", "mean_iou", "mIoU"),
}
# Numbers under these keys are measured times, not computed results.
TIMES = re.compile(r"second|wait|_ms$|duration|elapsed")

SCRIPT = Path(__file__).resolve()


# ---------------------------------------------------------------------------------------------------------------------
# Hashes


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of byte strings, each preceded by its length."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def array_digest(array: np.ndarray) -> str:
    """Of dtype, shape and bytes."""
    array = np.ascontiguousarray(array)
    return digest([str(array.dtype).encode(), str(array.shape).encode(), array.tobytes()])


def tensors_digest(tensors: dict[str, Any]) -> str:
    """Of the names, dtypes, shapes and bytes of torch tensors, in the order of their names."""
    import torch

    parts = []
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        parts += [name.encode(), str(tensor.dtype).encode(), str(tuple(tensor.shape)).encode(), values]
    return digest(parts)


def file_digest(path: Path) -> str:
    """Of the tensors in a .safetensors or .pt file."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return tensors_digest(load_file(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return tensors_digest({name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)})


def leaves(value: Any, texts: frozenset[str] = frozenset()) -> Iterator[str]:
    """Every number in nested values as text, and the strings that are in `texts`. Keys and order do not count."""
    import torch
    from PIL import Image

    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield repr(float(value))
    elif isinstance(value, str):
        if value in texts:
            yield value
    elif isinstance(value, torch.Tensor):
        yield tensors_digest({"": value})
    elif isinstance(value, np.ndarray):
        yield array_digest(value)
    elif isinstance(value, np.generic):
        yield repr(float(value))
    elif isinstance(value, Image.Image):
        yield array_digest(np.asarray(value))
    elif isinstance(value, dict):
        for key, one in value.items():
            if not (isinstance(key, str) and TIMES.search(key)):
                yield from leaves(one, texts)
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from leaves(one, texts)
    elif is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), texts)


def numbers_digest(value: Any, texts: Iterable[str] = ()) -> str:
    """Of the sorted numbers and class names in nested values."""
    return digest(leaf.encode() for leaf in sorted(leaves(value, frozenset(texts))))


def tree_digest(folder: Path) -> str:
    """Of the names and bytes of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(part for path in files for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()))


# ---------------------------------------------------------------------------------------------------------------------
# Data


def write_digits(folder: Path, num: int) -> None:
    """scikit-learn's handwritten digits as 8 x 8 px PNG, a folder for each class; and the same as idx and tar files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = np.minimum(found.images[:num] * 16, 255).astype(np.uint8), found.target[:num]  # pyright: ignore[reportAttributeAccessIssue]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / "digits" / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    idx = folder / "digits_idx"
    idx.mkdir()
    for name, part in (("train", slice(0, num // 2)), ("t10k", slice(num // 2, num))):
        head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images[part].shape)
        stored = gzip.compress(head + images[part].tobytes(), mtime=0)
        (idx / f"{name}-images-idx3-ubyte.gz").write_bytes(stored)
        head = b"\0\0\x08\x01" + len(labels[part]).to_bytes(4, "big")
        stored = gzip.compress(head + labels[part].astype(np.uint8).tobytes(), mtime=0)
        (idx / f"{name}-labels-idx1-ubyte.gz").write_bytes(stored)
    names = "".join(f"{label}\n" for label in range(10))
    (idx / "classes.txt").write_text(names)

    shards = folder / "digits_tar"
    shards.mkdir()
    (shards / "classes.txt").write_text(names)
    for name, part in (("train-000", range(num // 2)), ("val-000", range(num // 2, num))):
        with tarfile.open(shards / f"{name}.tar", "w") as tar:
            for i in part:
                png = (folder / "digits" / str(labels[i]) / f"{i:04}.png").read_bytes()
                for ending, content in (("png", png), ("cls", str(labels[i]).encode())):
                    info = tarfile.TarInfo(f"{i:04}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def draw_scene(random: np.random.Generator, width: int, height: int, objects: Sequence[tuple[int, tuple[int, ...]]]):
    """An image with noise and an object for each (class, box), and its mask: class + 1, 0 for the background."""
    from PIL import Image, ImageDraw

    noise = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
    image, mask = Image.fromarray(noise), Image.new("L", (width, height), 0)
    for label, box in objects:
        color = [40, 40, 40]
        color[label % 3] = int(random.integers(170, 256))
        for target, fill in ((image, tuple(color)), (mask, label + 1)):
            draw = ImageDraw.Draw(target)
            x1, y1, x2, y2 = box
            if label == 0:
                draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=fill)
            elif label == 1:
                draw.ellipse((x1, y1, x2 - 1, y2 - 1), fill=fill)
            else:
                draw.polygon([(x1, y2 - 1), ((x1 + x2) // 2, y1), (x2 - 1, y2 - 1)], fill=fill)
    return image, mask


def random_box(random: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Of a third to two thirds of the sides."""
    w, h = (int(random.integers(side // 3, 2 * side // 3)) for side in (width, height))
    x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
    return x, y, x + w, y + h


SHAPES = ("circle", "square", "triangle")  # folders in alphabetical order


def write_shapes(folder: Path, num: int) -> None:
    """Images of three classes: JPEG, PNG, transparent, grayscale, palette, turned by EXIF, of many sizes."""
    from PIL import Image

    random = np.random.default_rng(1)
    for label, class_name in enumerate(SHAPES):
        for i in range(num):
            width, height = (int(random.integers(70, 180)) for _ in range(2))
            image, mask = draw_scene(random, width, height, [((1, 0, 2)[label], random_box(random, width, height))])
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
    """COCO's layout: ids with holes, a crowd, an image without boxes."""
    random = np.random.default_rng(2)
    ids = (1, 3, 7)
    categories = [{"id": i, "name": name} for i, name in zip(ids, ("square", "circle", "triangle"), strict=True)]
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split, num in (("train", num_train), ("val", num_val)):
        images, annotations = [], []
        (folder / "coco" / split).mkdir()
        for i in range(num):
            width, height = (int(random.integers(100, 180)) for _ in range(2))
            count = {3: 2, 5: 0}.get(i, int(random.integers(1, 3)))
            objects = [(int(random.integers(0, 3)), random_box(random, width, height)) for _ in range(count)]
            draw_scene(random, width, height, objects)[0].save(folder / "coco" / split / f"{i:012}.jpg", quality=92)
            images.append({"id": i, "file_name": f"{i:012}.jpg", "width": width, "height": height})
            for number, (label, (x1, y1, x2, y2)) in enumerate(objects):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i,
                        "category_id": ids[label],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(i == 3 and number == 0),
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write_masks(folder: Path, num: int) -> None:
    """images/ and masks/, undivided; the border of some objects is ignored."""
    random = np.random.default_rng(3)
    for name in ("images", "masks"):
        (folder / "masks" / name).mkdir(parents=True)
    (folder / "masks" / "classes.txt").write_text("background\nsquare\ncircle\ntriangle\n")
    for i in range(num):
        width, height = (int(random.integers(100, 180)) for _ in range(2))
        objects = [(int(random.integers(0, 3)), random_box(random, width, height))]
        image, mask = draw_scene(random, width, height, objects)
        if i % 4 == 0:
            mask.paste(255, (0, 0, width, 4))
        image.save(folder / "masks" / "images" / f"{i:02}.jpg", quality=92)
        mask.save(folder / "masks" / "masks" / f"{i:02}.png")


def write_voc(folder: Path, num: int) -> None:
    """PASCAL VOC's layout, with boxes and masks."""
    random = np.random.default_rng(4)
    names = ("square", "circle", "triangle")
    voc = folder / "voc"
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    (voc / "classes.txt").write_text("background\nsquare\ncircle\ntriangle\n")
    for i in range(num):
        width, height = (int(random.integers(100, 180)) for _ in range(2))
        objects = [(i % 3, random_box(random, width, height))]
        image, mask = draw_scene(random, width, height, objects)
        image.save(voc / "JPEGImages" / f"{i:04}.jpg", quality=92)
        palette = mask.convert("P")
        palette.putdata(list(mask.tobytes()))
        palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
        palette.save(voc / "SegmentationClass" / f"{i:04}.png")
        boxes = "".join(
            f"<object><name>{names[label]}</name><difficult>{int(i == 1)}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, (x1, y1, x2, y2) in objects
        )
        (voc / "Annotations" / f"{i:04}.xml").write_text(
            f"<annotation><filename>{i:04}.jpg</filename><size><width>{width}</width><height>{height}</height>"
            f"<depth>3</depth></size>{boxes}</annotation>"
        )
    for kind in ("Main", "Segmentation"):
        for split, part in (("train", range(num // 2)), ("val", range(num // 2, num))):
            (voc / "ImageSets" / kind / f"{split}.txt").write_text("".join(f"{i:04}\n" for i in part))


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are not trained


def generated_tensors(shapes: dict[str, Sequence[int]]) -> dict[str, Any]:
    """Every tensor from a generator that is seeded by its name, at a scale that keeps activations in range."""
    import torch

    tensors = {}
    for key, shape in shapes.items():
        random = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(0)
            continue
        if key.endswith("running_var"):
            values = 0.5 + random.random(shape)
        else:
            values = random.standard_normal(shape)
            if key.endswith(("running_mean", "bias")):
                values = 0.1 * values
            elif len(shape) == 1:
                values = 1 + 0.1 * values
            else:
                values = 1.3 * values / np.sqrt(np.prod(shape[1:]))
        tensors[key] = torch.from_numpy(np.asarray(values, np.float32))
    return tensors


def write_generated(folder: Path, golden: Path | None) -> dict[str, tuple[str, Path]]:
    """Files in the published format, from the keys of the golden files, and in timm's; name -> (task, path)."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    found: dict[str, tuple[str, Path]] = {}
    tasks = {"cls": "classify", "det": "detect", "seg": "segment"}
    for keys in sorted(golden.glob("*.keys.json")) if golden else ():
        name = keys.name.removesuffix(".keys.json")
        path = folder / f"{name}.pt"
        torch.save(generated_tensors(json.loads(keys.read_text())), path)
        found[f"published format {name}"] = (tasks[name.partition("_")[0]], path)
    try:
        import timm
    except ImportError:
        note("timm is not installed: no weights in its format")
        return found
    for size in ("xxs", "xs", "s"):
        shapes = {key: list(x.shape) for key, x in timm.create_model(f"mobilevit_{size}").state_dict().items()}
        path = folder / f"timm_{size}.safetensors"
        save_file(generated_tensors(shapes), path)  # pyright: ignore[reportArgumentType]
        found[f"timm format {size}"] = ("classify", path)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Commands


class CommandError(Exception):
    """A command that failed, with the end of what it said."""


def note(text: str) -> None:
    """A line on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """One thread, CPU, no network, no colors, wide lines, absolute PYTHONPATH."""
    path = os.pathsep.join(str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    fixed = {
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "300",
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | fixed


def execute(command: Sequence[str], cwd: Path) -> str:
    """Its stdout. Raises CommandError where it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        said = "\n".join([line for line in lines[:-25] if line.startswith("mobilevit: ")] + lines[-25:])
        raise CommandError(f"exit code {done.returncode}: {' '.join(command)}\n{said}")
    return done.stdout


@functools.cache
def help_text(command: str) -> str:
    """What `mobilevit COMMAND --help` prints."""
    return execute([sys.executable, "-m", "mobilevit", command, "--help"], Path.cwd())


def option(command: str, name: str) -> str | None:
    """The spelling that this version of mobilevit has for an option of OPTIONS."""
    names = OPTIONS[name]
    if len(names) > 1:
        shown = set(re.findall(r"(?<![\w-])--[\w.-]+", help_text(command)))
        return next((one for one in names if one in shown), names[0])
    return names[0] if names else None


def arguments(command: str, *positional: str | Path, **options: Any) -> list[str]:
    """`mobilevit` arguments; `num_workers=1` is the option OPTIONS["num workers"], True stands for a flag."""
    made = [command, *map(str, positional)]
    for name, value in options.items():
        if (spelled := option(command, name.replace("_", " "))) is None:
            continue
        made.append(spelled)
        if value is not True:
            made += [str(x) for x in value] if isinstance(value, list | tuple) else [str(value)]
    return made


def mobilevit(cwd: Path, command: str, *positional: str | Path, **options: Any) -> str:
    """Run a command of mobilevit; its stdout."""
    return execute([sys.executable, "-m", "mobilevit", *arguments(command, *positional, **options)], cwd)


def json_lines(text: str) -> list[Any]:
    """Those lines of a text that are JSON objects."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# ---------------------------------------------------------------------------------------------------------------------
# Checks


class Checks:
    """The folder that everything is written to, and what was found."""

    def __init__(self, out: Path, golden: Path | None):
        self.out, self.golden = out, golden
        self.data, self.runs = out / "data", out / "runs"
        self.found: dict[str, str | float | None] = {}
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def record(self, name: str, value: str | float | None) -> None:
        """Keep one entry."""
        with self._lock:
            if name in self.found:
                raise KeyError(f"two entries are called {name}")
            self.found[name] = value

    def attempt(self, check: Callable[[], None], name: str) -> None:
        """Run a check; a failure is an entry as well, and does not end the others."""
        started = time.monotonic()
        try:
            check()
        except Exception as error:
            self.problems.append(f"{name}: {error}")
            self.record(f"{name}: failed", type(error).__name__)
        note(f"{name}: {time.monotonic() - started:.0f} s")

    # Training

    def train_options(self, name: str, data: str, **options: Any) -> dict[str, Any]:
        """What all runs have in common, and `options`."""
        return {
            "data": self.data / data,
            "out": self.runs / name,
            "num_threads": 1,
            "device": "cpu",
            "num_workers": 0,
        } | options

    def train(self, name: str, recipe: str, data: str, *, processes: int = 1, prefix: str = "train", **options: Any):
        """Train, then record weights and metrics."""
        made = arguments("train", VALUES[recipe], **self.train_options(name, data, **options))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        execute([sys.executable, *(launcher if processes > 1 else ()), "-m", "mobilevit", *made], self.out)
        self.record_run(f"{prefix}: {name.replace('_', ' ')}", self.runs / name)

    def record_run(self, name: str, run: Path) -> None:
        """All weight files of a run, and the numbers of all its epochs and steps except for times."""
        files = sorted(run.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{run}: no .safetensors file")
        for file in files:
            self.record(f"{name}: {file.name}", file_digest(file))
        for file in (run / "metrics.jsonl", run / "steps.jsonl"):
            self.record(f"{name}: {file.name}", numbers_digest(json_lines(file.read_text())))

    def train_killed(self) -> None:
        """SIGKILL after the first epoch and a checkpoint more, then the same command; equal to a run left alone."""
        run = self.runs / "digits_killed"
        options = self.train_options("digits_killed", "digits", **DIGITS, checkpoint_minutes=1e-9)
        made = [sys.executable, "-m", "mobilevit", *arguments("train", VALUES["recipe digits"], **options)]
        process = subprocess.Popen(
            made,
            cwd=self.out,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            metrics = run / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and b"\n" in metrics.read_bytes()):
                time.sleep(0.002)
            names = {file.name for file in run.glob("checkpoints/*")}
            while process.poll() is None and {file.name for file in run.glob("checkpoints/*")} == names:
                time.sleep(0.002)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the run ended with {code} before it could be killed")
        epochs = len(metrics.read_text().splitlines())
        if epochs >= DIGITS["epochs"]:
            raise RuntimeError("the run was killed after its last epoch")
        execute(made, self.out)
        self.record_run("train: digits killed and resumed", run)
        same = all(
            file_digest(file) == file_digest(self.runs / "digits" / file.name) for file in run.glob("*.safetensors")
        )
        self.record("train: digits killed and resumed: equal to the uninterrupted run", float(same))
        if not same:
            self.problems.append("the run that was killed and resumed differs from the uninterrupted one")

    # Networks

    def child(self, what: str, order: Any) -> Any:
        """Compute in a process of its own, see CHILDREN."""
        text = execute([sys.executable, str(SCRIPT), "--child", what, json.dumps(order)], self.out)
        return json.loads(text.splitlines()[-1])

    def logits(self) -> None:
        """Outputs of networks for fixed random input of two sizes."""
        trained = {
            "trained classifier": ("classify", self.runs / "digits/model.safetensors", [(64, 64), (96, 75)]),
            "trained detector": ("detect", self.runs / "detect/model.safetensors", [(128, 128), (160, 192)]),
            "trained segmenter": ("segment", self.runs / "segment/model.safetensors", [(128, 128), (96, 160)]),
        }
        sizes = {
            "classify": [(256, 256), (160, 192)],
            "detect": [(320, 320), (256, 320)],
            "segment": [(256, 256), (160, 192)],
        }
        generated = write_generated(self.out / "generated", self.golden)
        orders = {
            **{name: [task, str(path), sizes_] for name, (task, path, sizes_) in trained.items()},
            **{name: [task, str(path), sizes[task]] for name, (task, path) in generated.items()},
        }
        for name, value in self.child("logits", orders).items():
            self.record(f"logits: {name}", value)

    def explain(self) -> None:
        """All numbers of the explanation of an image."""
        order = [str(self.runs / "finetune/model.safetensors"), str(self.images()[0])]
        self.record("explain: finetuned classifier", self.child("explain", order))

    def convert(self) -> None:
        """Weights in every format, and logits of what was converted."""
        for to, target in (("timm", "timm.safetensors"), ("apple", "apple.pt"), ("transformers", "transformers")):
            path = self.out / "converted" / target
            path.parent.mkdir(exist_ok=True)
            mobilevit(self.out, "convert", self.runs / "finetune/model.safetensors", path, to=to)
            files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
            self.record(f"convert: {to}", digest(file_digest(file).encode() for file in files))
            for file in sorted(path.glob("*.json")) if path.is_dir() else ():
                values = json.loads(file.read_text())
                values.pop("transformers_version", None)
                self.record(f"convert: {to}: {file.name}", numbers_digest(values, SHAPES))

    def info(self) -> None:
        """The numbers in the tables of parameters and multiply-accumulates."""
        for name in ("xxs", self.runs / "detect/model.safetensors", self.runs / "segment/model.safetensors"):
            said = mobilevit(self.out, "info", name).replace(str(self.out), "")
            numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", said)
            label = name if isinstance(name, str) else name.parent.name
            self.record(f"info: {label}", digest(number.encode() for number in sorted(numbers)))

    # Artifacts

    def export(self, name: str, to: str, precision: str = "fp32", **options: Any) -> None:
        """Export, run the artifact in its own runtime, record the outputs."""
        extra = "".join(f" {key}" for key in options if key == "answers")
        label = f"export: {name} {to} {precision}{extra}"
        folder = self.out / "exports" / f"{name}_{to}_{precision}{extra.replace(' ', '_')}"
        weights = self.runs / name / "model.safetensors"
        mobilevit(self.out, "export", weights, to=to, out=folder, precision=precision, num_threads=1, **options)
        ending = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte", "coreml": ".mlpackage"}[to]
        (path,) = folder.glob(f"*{ending}")
        if to == "coreml":  # its runtime exists on Apple's systems alone
            files = sorted(path.rglob("weight.bin"))
            self.record(f"{label}: weights", digest(file.read_bytes() for file in files))
            return
        for key, value in self.child("artifact", [to, str(path)]).items():
            if key == "note":
                note(f"{label}: {value}")
            else:
                self.record(f"{label}: {key}", value)
        if to == "onnx" and precision == "fp32" and not options:  # an artifact goes through `predict` as well
            self.predict(f"{name} onnx", path)

    # Evaluation and prediction

    def evaluate(self, name: str, run: str, data: str, **options: Any) -> None:
        """Metrics as numbers, and a hash of all numbers, those of every class among them."""
        said = mobilevit(
            self.out,
            "evaluate",
            self.runs / run,
            data=self.data / data,
            json=True,
            per_class=True,
            num_workers=0,
            num_threads=1,
            device="cpu",
            batch_size=8,
            **options,
        )
        lines = json_lines(said)
        for i, line in enumerate(lines):
            label = f"evaluate: {name}: line {i + 1} of {len(lines)}"
            for metric, keys in METRICS.items():
                for key in keys:
                    if key in line:
                        self.record(f"{label}: {metric}", line[key])
                        break
            self.record(f"{label}: all numbers", numbers_digest(line))

    def images(self) -> list[Path]:
        """Three images: JPEG, transparent PNG, JPEG turned by EXIF."""
        return [self.data / "shapes" / name for name in ("circle/00.jpg", "square/02.png", "triangle/04.jpg")]

    def predict(self, name: str, weights: Path) -> None:
        """Numbers and class names of three images, and what is written for boxes and masks."""
        from PIL import Image

        kind = next(kind for kind in ("detect", "segment", "") if kind in name)
        out = self.out / "predictions" / name.replace(" ", "_")
        options = {"detect": {"out": out, "score_threshold": 0.02}, "segment": {"out": out}, "": {"top_k": 3}}[kind]
        copies = self.out / "images"
        said = mobilevit(
            self.out,
            "predict",
            weights,
            *(copies / f"{i}{p.suffix}" for i, p in enumerate(self.images())),
            json=True,
            num_threads=1,
            batch_size=2,
            **options,
        )
        texts = (*SHAPES, "background", *map(str, range(10)))
        for i, line in enumerate(json_lines(said)):
            self.record(f"predict: {name}: image {i + 1}", numbers_digest(line, texts))
        if kind == "detect":
            self.record(
                f"predict: {name}: detections.json",
                numbers_digest(json.loads((out / "detections.json").read_text()), texts),
            )
        if kind == "segment":
            for path in sorted(out.glob("*.png")):
                self.record(f"predict: {name}: {path.name}", array_digest(np.asarray(Image.open(path))))

    # All of it

    def run(self, jobs: int) -> None:
        """Make the data, then all checks; what needs weights after the training that makes them."""
        self.data.mkdir(parents=True)
        write_digits(self.data, 600)
        write_shapes(self.data, 18)
        write_coco(self.data, 24, 8)
        write_masks(self.data, 24)
        write_voc(self.data, 8)
        for folder in sorted(self.data.iterdir()):
            self.record(f"data: {folder.name}", tree_digest(folder))
        (self.out / "images").mkdir()
        for i, image in enumerate(self.images()):
            shutil.copy(image, self.out / "images" / f"{i}{image.suffix}")

        with ThreadPoolExecutor(jobs) as pool:

            def together(checks: dict[str, Callable[[], None]]) -> None:
                list(pool.map(lambda item: self.attempt(item[1], item[0]), checks.items()))

            of = functools.partial
            digits = self.runs / "digits/model.safetensors"
            together({"train: digits": of(self.train, "digits", "recipe digits", "digits", **DIGITS)})
            together(
                {
                    "train: detect": of(
                        self.train,
                        "detect",
                        "recipe detect",
                        "coco",
                        backbone=digits,
                        epochs=25,
                        batch_size=4,
                        size=128,
                        warmup_steps=10,
                        lr=4e-3,
                        num_workers=1,
                    ),
                    "train: segment": of(
                        self.train,
                        "segment",
                        "recipe segment",
                        "masks",
                        epochs=12,
                        batch_size=4,
                        size=96,
                        warmup_steps=5,
                        lr=4e-3,
                        architecture="xxs",
                    ),
                    "train: digits killed and resumed": self.train_killed,
                    "train: digits 2 processes": of(
                        self.train, "digits_2_processes", "recipe digits", "digits", processes=2, **DIGITS
                    ),
                    "train: finetune": of(
                        self.train,
                        "finetune",
                        "recipe finetune",
                        "shapes",
                        weights=digits,
                        epochs=3,
                        batch_size=8,
                        size=64,
                        freeze=VALUES["freeze"],
                        backbone_lr_scale=0.5,
                    ),
                    "train: multi-scale": of(
                        self.train,
                        "multi-scale",
                        "recipe photographs",
                        "shapes",
                        architecture="xxs",
                        epochs=2,
                        batch_size=8,
                        size=96,
                        sampler_variant=VALUES["sampler main"],
                        sampler_sizes=[64, 96, 128],
                        pictures_at_once=4,
                        num_workers=1,
                    ),
                    "train: multi-scale 2 processes": of(
                        self.train,
                        "multi-scale_2_processes",
                        "recipe photographs",
                        "shapes",
                        processes=2,
                        architecture="xxs",
                        epochs=3,
                        batch_size=24,
                        size=64,
                        sampler_variant=VALUES["sampler listing"],
                        sampler_sizes=[64, 96],
                    ),
                    "train: bfloat16": of(
                        self.train,
                        "bfloat16",
                        "recipe small",
                        "shapes",
                        epochs=2,
                        batch_size=8,
                        precision="bfloat16",
                        seed=3,
                    ),
                    "train: idx files": of(self.train, "idx_files", "recipe digits", "digits_idx", epochs=1),
                    "augment: classifier": of(
                        self.train,
                        "classifier",
                        "recipe small",
                        "shapes",
                        prefix="augment",
                        epochs=2,
                        batch_size=8,
                        policy=VALUES["policy advanced"],
                    ),
                }
            )
            together(
                {
                    "export: classifier executorch": of(self.export, "digits", "executorch"),
                    "export: classifier onnx": of(self.export, "digits", "onnx"),
                    "export: classifier openvino": of(self.export, "digits", "openvino"),
                    "export: classifier onnx int8": of(
                        self.export, "digits", "onnx", "int8", images=self.data / "digits"
                    ),
                    "export: classifier coreml": of(self.export, "digits", "coreml"),
                    "export: detector onnx": of(self.export, "detect", "onnx"),
                    "export: detector onnx answers": of(
                        self.export, "detect", "onnx", answers=True, images=self.data / "coco/train"
                    ),
                    "export: segmenter onnx": of(self.export, "segment", "onnx"),
                    "logits": self.logits,
                    "convert": self.convert,
                    "info": self.info,
                    "explain": self.explain,
                    "evaluate: classifier": of(self.evaluate, "classifier", "digits", "digits", size=[32, 40]),
                    "evaluate: classifier idx": of(self.evaluate, "classifier idx", "digits", "digits_idx"),
                    "evaluate: classifier tar": of(
                        self.evaluate, "classifier tar", "digits", "digits_tar", split="val"
                    ),
                    "evaluate: finetuned": of(self.evaluate, "finetuned", "finetune", "shapes", split="all"),
                    "evaluate: detector": of(self.evaluate, "detector", "detect", "coco"),
                    "evaluate: detector train": of(self.evaluate, "detector train", "detect", "coco", split="train"),
                    "evaluate: detector voc": of(self.evaluate, "detector voc", "detect", "voc", split="val"),
                    "evaluate: segmenter": of(self.evaluate, "segmenter", "segment", "masks"),
                    "evaluate: segmenter voc": of(self.evaluate, "segmenter voc", "segment", "voc", split="val"),
                    "predict: digits": of(self.predict, "digits", digits),
                    "predict: finetuned": of(self.predict, "finetuned", self.runs / "finetune/model.safetensors"),
                    "predict: detect": of(self.predict, "detect", self.runs / "detect/model.safetensors"),
                    "predict: segment": of(self.predict, "segment", self.runs / "segment/model.safetensors"),
                }
            )


DIGITS: dict[str, Any] = {"epochs": 4, "batch_size": 16, "val_fraction": 0.2}


# ---------------------------------------------------------------------------------------------------------------------
# Processes of their own


def outputs_of(value: Any) -> list[np.ndarray]:
    """The arrays in what a network or a runtime returned, in order."""
    if hasattr(value, "detach"):
        return [value.detach().float().numpy()]
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        return [array for one in value.values() for array in outputs_of(one)]
    if isinstance(value, list | tuple):
        return [array for one in value for array in outputs_of(one)]
    raise TypeError(f"no arrays in a {type(value).__name__}")


def load_network(task: str, path: str) -> Any:
    """By the documented function for the task."""
    import mobilevit as package

    error: Exception | None = None
    for name in API[task]:
        if hasattr(package, name):
            try:
                return getattr(package, name)(path)
            except (TypeError, ValueError) as problem:
                error = error or problem
    raise error or AttributeError(f"mobilevit has none of {', '.join(API[task])}")


def child_logits(orders: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the outputs of networks; `orders` are name -> (task, path, sizes)."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for name, (task, path, sizes) in orders.items():
        model = load_network(task, path).eval()
        for height, width in sizes:
            pixels = np.random.default_rng(height * 10_000 + width).random((2, 3, height, width), np.float32)
            with torch.no_grad():
                outputs = outputs_of(model(torch.from_numpy(pixels)))
            if not all(np.isfinite(output).all() for output in outputs):
                raise ValueError(f"{name}: outputs are not finite")
            found[f"{name} {height}x{width}"] = digest(array_digest(output).encode() for output in outputs)
    return found


def child_explain(order: list[str]) -> str:
    """All numbers and arrays of an explanation; `order` is the path of the weights and that of the image."""
    import torch

    import mobilevit as package

    torch.set_num_threads(1)
    explain = next(getattr(package, name) for name in API["explain"] if hasattr(package, name))
    return numbers_digest(explain(*order))


def child_artifact(order: list[str]) -> dict[str, str]:
    """SHA-256 of what an artifact gives for fixed input, in its own runtime with one thread.

    Outputs are rounded to three decimals where two runs in one process differ.
    """
    runtime, path = order
    run, shape, dtype = {"onnx": load_onnx, "openvino": load_openvino, "executorch": load_executorch}[runtime](path)
    pixels = np.random.default_rng(5).random(shape, np.float32)
    pixels = (255 * pixels).astype(np.uint8) if "uint8" in dtype else pixels
    first, second = run(pixels), run(pixels)
    if all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)):
        return {f"output {i + 1}": array_digest(output) for i, output in enumerate(first)}
    found = {f"output {i + 1}, 3 decimals": array_digest(output.round(3)) for i, output in enumerate(first)}
    return found | {"note": "two runs differ, rounded values are recorded"}


def load_onnx(path: str) -> tuple[Callable[[np.ndarray], list[np.ndarray]], tuple[int, ...], str]:
    """A function that runs the artifact with ONNX Runtime, with the shape and the type of its input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda pixels: list(session.run(None, {given.name: pixels})), tuple(given.shape), given.type  # pyright: ignore[reportReturnType]


def load_openvino(path: str) -> tuple[Callable[[np.ndarray], list[np.ndarray]], tuple[int, ...], str]:
    """A function that runs the artifact with OpenVINO, in float32, with the shape and the type of its input."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    (given,) = compiled.inputs

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        results = compiled(pixels)
        return [np.array(results[i]) for i in range(len(compiled.outputs))]

    return run, tuple(given.shape), given.element_type.get_type_name()


def load_executorch(path: str) -> tuple[Callable[[np.ndarray], list[np.ndarray]], tuple[int, ...], str]:
    """A function that runs the artifact with ExecuTorch, with the shape and the type of its input."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if hasattr(portable_lib, "_unsafe_reset_threadpool"):
        portable_lib._unsafe_reset_threadpool(1)
    method = Runtime.get().load_program(Path(path)).load_method("forward")
    given = method.metadata.input_tensor_meta(0)  # pyright: ignore[reportOptionalMemberAccess]

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        return [output.numpy().copy() for output in method.execute([torch.from_numpy(pixels)])]  # pyright: ignore[reportOptionalMemberAccess]

    return run, tuple(given.sizes()), "float32" if given.dtype() == 6 else "uint8"


CHILDREN: dict[str, Callable[[Any], Any]] = {
    "logits": child_logits,
    "explain": child_explain,
    "artifact": child_artifact,
}


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(first: Path, second: Path, allowed: Sequence[str]) -> int:
    """Print the differences of two results; 1 if there are any that are not allowed."""
    a, b = (json.loads(path.read_text()) for path in (first, second))
    num_different = num_allowed = 0
    for name in sorted(a.keys() | b.keys()):
        if name in a and name in b and a[name] == b[name]:
            continue
        allow = name.startswith(tuple(allowed))
        num_allowed += allow
        num_different += not allow
        x, y = (str(values.get(name, "missing")) for values in (a, b))
        print(f"{'allowed  ' if allow else 'DIFFERENT'}  {name}\n    {x}\n    {y}")
    num_equal = len(a.keys() | b.keys()) - num_different - num_allowed
    print(f"{num_equal} entries equal, {num_different} different, {num_allowed} different and allowed")
    return 1 if num_different else 0


def default_golden() -> Path | None:
    """tests/golden of the clone that mobilevit is imported from, or that this script lies in."""
    from importlib.util import find_spec

    spec = find_spec("mobilevit")
    places = [Path(spec.origin).resolve().parents[2]] if spec and spec.origin else []
    places += [SCRIPT.parent.parent, Path.cwd()]
    return next((place / "tests/golden" for place in places if (place / "tests/golden").is_dir()), None)


def main() -> int:
    """Run the checks or compare two results; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write to; must be empty or missing")
    parser.add_argument("--golden", type=Path, help="folder with *.keys.json; unless given, tests/golden of the clone")
    parser.add_argument("--jobs", type=int, default=2, help="checks at a time, each with one thread (default: 2)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two results to compare")
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="PREFIX", help="with --compare: entries that may differ"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(CHILDREN[args.child[0]](json.loads(args.child[1]))))
        return 0
    if args.compare:
        return compare(*args.compare, args.allow)  # pyright: ignore[reportCallIssue]
    if args.out is None:
        parser.error("give --out or --compare")
    out = args.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    golden = args.golden or default_golden()
    if golden is None:
        note("no golden files: networks in the published format are left out")
    place = execute([sys.executable, "-c", "import mobilevit; print(mobilevit.__file__)"], out).strip()
    note(f"fingerprint of {place}")
    started = time.monotonic()
    checks = Checks(out, golden.resolve() if golden else None)
    checks.run(args.jobs)
    text = json.dumps(dict(sorted(checks.found.items())), indent=1)
    (out / "fingerprint.json").write_text(text + "\n")
    print(text)
    for problem in checks.problems:
        note(f"PROBLEM: {problem}")
    note(f"{len(checks.found)} entries in {time.monotonic() - started:.0f} s: {out / 'fingerprint.json'}")
    return 1 if checks.problems else 0


if __name__ == "__main__":
    sys.exit(main())
