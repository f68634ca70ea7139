"""The command line. Every command imports what it needs when it runs, so that `mobilevit --help` waits for no torch."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import mobilevit
from mobilevit import options
from mobilevit.options import nearest
from mobilevit.recipes import MAX_MEGAPIXELS, RECIPES, Recipe, describe, named

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from mobilevit.export import Artifact
    from mobilevit.models.weights import Weights
    from mobilevit.pictures import Preprocessing
    from mobilevit.predict import Classifier, Detection, Detector, Prediction, Segmenter

WEIGHTS = "a file (ours, Apple's, timm's), a folder in transformers' layout, or a hub id such as apple/mobilevit-small"
ARTIFACTS = (".onnx", ".pte", ".xml", ".tflite", ".mlpackage")  # as in mobilevit.export, which is slow to import
OR_RUN = "or a run folder, of which model.safetensors is read: the averaged weights of the last epoch"
SomeWeights = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS", help=f"Weights: {WEIGHTS}; {OR_RUN}.")
]
Download = Annotated[bool, tyro.conf.arg(help="Fetch a hub id that is not in the local cache.")]
Device = Annotated[str, tyro.conf.arg(help="Where to compute: auto, cpu, cuda, cuda:1, mps.")]
MaxMegapixels = Annotated[
    float, tyro.conf.arg(help="Largest image file to read, width times height in millions of pixels.")
]
NumThreads = Annotated[int | None, tyro.conf.arg(help="CPU threads to compute with; unless given, PyTorch's default.")]


@dataclass(frozen=True)
class Predict:
    """Predict the classes, boxes or masks of images.

    What is predicted depends on what the weights were trained for. Exit code 1 if some images could not be read.
    """

    weights: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="WEIGHTS",
            help=f"Weights: {WEIGHTS}; {OR_RUN}; or an exported artifact ({', '.join(ARTIFACTS)}), run on the CPU.",
        ),
    ]
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Files, folders (searched through) or quoted patterns such as "photos/*.jpg"."""
    top_k: int | None = None
    """Of classifiers: classes to give for each picture; unless given, 5."""
    score_threshold: float | None = None
    """Of detectors: the score, 0 to 1, above which something is shown; unless given, 0.3."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for what detection and segmentation write; unless given, predictions. Files of the same names are
    replaced. Detection: STEM_boxes.jpg for each picture, and detections.json in COCO's results format, with the
    category_id that the class had in the data (its number + 1 where the weights do not know it) and the picture's stem
    for image_id, as a number where it is one. Segmentation: STEM.png, the class numbers in VOC's colours, and
    STEM_overlay.jpg."""
    json: bool = False
    """One JSON object a line instead of a table."""
    batch_size: int = 16
    """Pictures at a time."""
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS
    device: Device = "auto"
    num_threads: NumThreads = None
    download: Download = False

    def run(self) -> int:
        """Predict, print and, but for classifiers, write."""
        from rich.box import SIMPLE
        from rich.progress import Progress
        from rich.table import Column, Table

        from mobilevit.pictures import PictureError, find_pictures

        if not self.pictures:
            raise ValueError("no picture is named; give files, folders or quoted patterns")
        _limit_megapixels(self.max_megapixels)
        paths = find_pictures(self.pictures)
        _use_threads(self.num_threads)  # imports torch: wrong paths are reported before
        model = self._artifact() if Path(self.weights).suffix in ARTIFACTS else self._network()
        self._refuse_options(model.task)
        shown = {"classify": _Classes, "detect": _Boxes, "segment": _Masks}[model.task](self, model, paths)
        num_done = num_unread = 0
        interrupted: KeyboardInterrupt | None = None
        table = Table("picture", "class", *(Column(name, justify="right") for name in shown.columns), box=SIMPLE)
        console = _stderr()
        quiet = len(paths) < 32 or not console.is_terminal or (self.json and sys.stdout.isatty())
        # Left to itself, rich sends what is printed to stdout the way of its bar, to stderr.
        with Progress(console=console, transient=True, disable=quiet, redirect_stdout=False) as progress:
            try:
                for path, result in progress.track(shown.results, len(paths), description="predicting"):
                    try:
                        if isinstance(result, PictureError):
                            raise result
                        line, rows = shown.show(path, result)
                    except PictureError as error:  # or the picture has gone before it could be drawn on
                        num_unread += 1
                        _complain(str(error))
                        line, rows = {"error": str(error)}, []
                    if self.json:
                        print(json.dumps({"picture": str(path), **line}), flush=True)
                    for i, row in enumerate(rows):
                        table.add_row("" if i else str(path), *row)
                    num_done += 1
            except KeyboardInterrupt as interrupt:
                if not num_done:
                    raise
                interrupted = interrupt  # what is done by then is kept and told
        said = shown.close()
        if not self.json and table.row_count:
            _stdout().print(table)
            if said:
                print(said)
        if interrupted is not None and num_done < len(paths):
            raise type(interrupted)(
                f"{str(interrupted) or 'interrupted'} after {num_done} of {len(paths)} pictures; missing are "
                f"{paths[num_done]} and what comes after it"
            )
        return 1 if num_unread else 0

    def _network(self) -> Any:
        from mobilevit.models.fuse import fold_batch_norm
        from mobilevit.predict import classifier, detector, segmenter

        weights = _read(self.weights, self.download)
        _say_what_is_assumed(self.weights, weights)
        build = {"classify": classifier, "detect": detector, "segment": segmenter}[weights.task]
        return fold_batch_norm(build(weights).to(_device(self.device)))

    def _artifact(self) -> Any:
        from mobilevit.artifact import load_predictor

        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device is {self.device!r}; an artifact runs on the CPU: leave out --device")
        return load_predictor(_expand(Path(self.weights)))

    def _refuse_options(self, task: str) -> None:
        """Say so of an option that these weights have no use for, instead of not minding it."""
        does = {
            "classify": "only names classes, and they are printed",
            "detect": "shows all that it finds above a score",
            "segment": "gives every pixel one class",
        }[task]
        for option, value, tasks in (
            ("--top-k", self.top_k, ("classify",)),
            ("--score-threshold", self.score_threshold, ("detect",)),
            ("--out", self.out, ("detect", "segment")),
        ):
            if value is not None and task not in tasks:
                raise ValueError(f"{option} is for weights to {' or '.join(tasks)}; {self.weights} {does}")


class _Classes:
    """What `Predict` prints of a classifier."""

    columns = ("probability",)

    def __init__(self, command: Predict, model: Classifier, paths: list[Path]):
        from mobilevit.predict import predict_pictures

        options: dict[str, Any] = {} if command.top_k is None else {"top_k": command.top_k}
        self.results = predict_pictures(model, paths, batch_size=command.batch_size, **options)

    def show(self, path: Path, found: list[Prediction]) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
        """The line of JSON and the rows of the table."""
        line = [{"class": p.class_name, "index": p.class_index, "probability": p.probability} for p in found]
        return {"predictions": line}, [(p.class_name, f"{100 * p.probability:.1f} %") for p in found]

    def close(self) -> str:
        """Nothing was written."""
        return ""


class _Boxes:
    """What `Predict` prints and writes of a detector."""

    columns = ("score", "box: x1, y1, x2, y2 in px")

    def __init__(self, command: Predict, model: Detector, paths: list[Path]):
        from mobilevit.predict import detect_pictures

        self.out = _folder_for(command, {path: str(_image_id(path)) for path in paths})
        self.category_ids = model.category_ids or range(1, model.num_classes + 1)
        if not model.category_ids:
            _complain(
                f"{command.weights}: knows no category ids; in detections.json they are the number of the class + 1"
            )
        options: dict[str, Any] = (
            {} if command.score_threshold is None else {"score_threshold": command.score_threshold}
        )
        self.results = detect_pictures(model, paths, batch_size=command.batch_size, **options)
        self.coco: list[dict[str, Any]] = []

    def show(self, path: Path, found: list[Detection]) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
        """The line of JSON and the rows of the table; the picture is drawn on."""
        from mobilevit.draw import draw_boxes, write_jpeg
        from mobilevit.pictures import read_picture

        labels = [f"{d.class_name} {100 * d.score:.0f} %" for d in found]
        drawing = self.out / f"{path.stem}_boxes.jpg"
        picture = read_picture(path)
        write_jpeg(draw_boxes(picture, [d.box for d in found], [d.class_index for d in found], labels), drawing)
        coco = []
        for d in found:
            x1, y1, x2, y2 = d.box
            coco.append(
                {
                    "image_id": _image_id(path),
                    "category_id": self.category_ids[d.class_index],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": d.score,
                    "file_name": path.name,
                    "category_name": d.class_name,
                }
            )
        self.coco += coco  # all of a picture, or, where it is interrupted, nothing
        line = [{"class": d.class_name, "index": d.class_index, "score": d.score, "box": d.box} for d in found]
        rows = [(d.class_name, f"{d.score:.2f}", ", ".join(f"{value:.0f}" for value in d.box)) for d in found]
        return {"detections": line, "drawing": str(drawing)}, rows or [("nothing found", "", "")]

    def close(self) -> str:
        """Write detections.json and say what lies in the folder."""
        from mobilevit.files import write_whole

        text = json.dumps(self.coco)
        write_whole(self.out / "detections.json", lambda target: target.write_text(text, encoding="utf-8"))
        return f"{self.out}: detections.json, and the pictures with their boxes"


class _Masks:
    """What `Predict` prints and writes of a segmentation network."""

    columns = ("share of the pixels",)

    def __init__(self, command: Predict, model: Segmenter, paths: list[Path]):
        from mobilevit.predict import segment_pictures

        self.out = _folder_for(command, {path: path.stem for path in paths})
        self.model = model
        self.results = segment_pictures(model, paths, batch_size=command.batch_size)

    def show(self, path: Path, found: np.ndarray) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
        """The line of JSON and the rows of the table, the largest class first; mask and overlay are written."""
        import numpy as np

        from mobilevit.draw import draw_mask, palette_png, write_jpeg
        from mobilevit.pictures import read_picture

        counts = np.bincount(found.ravel(), minlength=256)
        order = [int(c) for c in np.argsort(-counts, kind="stable") if counts[c]]
        classes = {c: (self.model.class_name(c), int(counts[c]) / found.size) for c in order}
        mask, overlay = self.out / f"{path.stem}.png", self.out / f"{path.stem}_overlay.jpg"
        legend = {c: f"{name} {100 * share:.1f} %" for c, (name, share) in classes.items() if name != "background"}
        write_jpeg(draw_mask(read_picture(path), found, legend), overlay)
        palette_png(found, mask)
        line = [{"class": name, "index": c, "share": share} for c, (name, share) in classes.items()]
        rows = [(name, f"{100 * share:.1f} %") for name, share in classes.values()]
        return {"classes": line, "mask": str(mask), "overlay": str(overlay)}, rows

    def close(self) -> str:
        """Say what lies in the folder."""
        return f"{self.out}: class numbers (.png), and the pictures with the classes painted over (_overlay.jpg)"


def _image_id(path: Path) -> int | str:
    """How COCO's results name a picture: by the number that its stem is, 139 for 000000000139.jpg, else by its stem."""
    return int(path.stem) if path.stem.isascii() and path.stem.isdigit() else path.stem


def _folder_for(command: Predict, names: dict[Path, str]) -> Path:
    """The folder to write to. `names` are those that the pictures' results will go by, and have to differ.

    Raises:
        ValueError: two pictures of one name, a picture in that very folder, a file instead of it.
    """
    out = _expand(command.out or Path("predictions"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a folder with --out")
    seen: dict[str, Path] = {}
    for path, name in names.items():
        if path.absolute().parent.resolve() == out.resolve():
            raise ValueError(f"{path}: lies in {out}, where results are written; name another folder with --out")
        # To some file systems A.png and a.png are the same.
        other = seen.setdefault(name.casefold(), path)
        if other != path:
            raise ValueError(
                f"{other} and {path}: the results of both would be called {name}; predict one after the other, each "
                "with its own --out"
            )
    return out


@dataclass(frozen=True)
class Info:
    """Print parameters, multiply-accumulates and memory, stage by stage."""

    network: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="NETWORK", help=f"xxs, xs, s, or weights: {WEIGHTS}; {OR_RUN}."),
    ]
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Side of the picture, or its height and width, in pixels; unless given, what the weights were made for."""
    download: Download = False

    def run(self) -> int:
        """Count and print."""
        from mobilevit.benchmark.profile import profile, table
        from mobilevit.models.mobilevit import ARCHITECTURES, MobileViT

        if len(self.size) > 2 or any(side < 32 for side in self.size):
            raise ValueError(f"size is {self.size}; give one side or height and width, from 32 px up")
        console = _stdout()
        if self.network.lower() in ARCHITECTURES:
            model, size_px = MobileViT(self.network.lower()), 256
        else:
            weights = _read(self.network, self.download)
            _say_what_is_assumed(self.network, weights)
            model, size_px = weights.build(), weights.preprocessing.crop_px
            p, names = weights.preprocessing, weights.class_names
            console.print(
                f"{weights.name} from {self.network}, output stride "
                f"{weights.output_stride}\n"
                f"input: RGB, {_resized(p)}, / 255, mean {p.mean}, std {p.std}\n"
                f"classes: {weights.num_classes}"
                + (f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ", not named")
            )
        size = self.size or (size_px,)
        console.print(table(profile(model, (size[0], size[-1]))))
        return 0


@dataclass(frozen=True)
class Convert:
    """Convert weights to another format."""

    source: SomeWeights
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """A .safetensors file (ours, timm's), a .pt file (Apple's) or a folder (transformers')."""
    to: Literal["mobilevit", "apple", "timm", "transformers"] = "mobilevit"
    """Format to write."""
    overwrite: bool = False
    """Replace TARGET if it exists."""
    download: Download = False

    def run(self) -> int:
        """Read, write, say what was done."""
        from mobilevit.models.weights import write

        target = _expand(self.target)
        if target.exists() and not self.overwrite:
            raise ValueError(f"{target}: exists already; choose another name or say --overwrite")
        weights = _read(self.source, self.download)
        write(weights, target, self.to)
        print(f"{target}: {weights.name}, {weights.num_classes} classes, {self.to} format")
        _say_transparency(weights)
        if self.to == "apple":
            print("Apple's format has no place for class names and preprocessing; whoever reads it assumes the paper's")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a network on your images, or resume a run that was stopped.

    mobilevit train [RECIPE] --data FOLDER [OPTIONS]. The same command resumes the run.
    """

    data: str
    """A folder with a folder of pictures for each class, or with train/ and val/ that hold those; idx files, tar
    shards, parquet or arrow files; or hf:OWNER/NAME, a data set on the hub. To detect, COCO's or VOC's layout; to
    segment, VOC's, or images/ and masks/."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for checkpoints, weights, metrics and report; unless given, runs/ and the name of the data."""
    weights: Annotated[
        str | None,
        tyro.conf.arg(
            aliases=["--backbone"],
            help=f"Start from these weights instead of random ones: {WEIGHTS}. Of another task, their backbone.",
        ),
    ] = None
    download: Download = False
    device: Device = "auto"
    num_threads: NumThreads = None
    checkpoint_minutes: float = 5.0
    """A checkpoint is kept this often, and after every epoch."""
    tensorboard: bool = False
    """Write for TensorBoard as well."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    recipe_name: tyro.conf.Suppress[str] = "plain"
    command: tyro.conf.Suppress[str] = ""

    def run(self) -> int:
        """Train, then say what to do next."""
        from mobilevit.training.loop import FinishedError, train
        from mobilevit.training.report import Origin

        _use_threads(self.num_threads)
        if not self.checkpoint_minutes > 0:
            raise ValueError(f"checkpoint minutes are {self.checkpoint_minutes}; they must be above 0")
        data = _expand_data(self.data)
        out = _expand(self.out or Path("runs") / Path(data).resolve().name)
        pretrained = _read(self.weights, self.download) if self.weights else None
        architecture = self.recipe.architecture
        # The weights override the recipe's default, but not what the command names.
        is_given = any(arg.partition("=")[0] == "--architecture" for arg in shlex.split(self.command))
        if pretrained and is_given and architecture != pretrained.architecture.name:
            raise ValueError(
                f"--architecture is {architecture}, but {self.weights} is {pretrained.name}; leave out --architecture, "
                f"or give weights of MobileViT-{architecture.upper()}"
            )
        try:
            run = train(
                self.recipe,
                data,
                out,
                pretrained=pretrained,
                device=self.device,
                checkpoint_minutes=self.checkpoint_minutes,
                tensorboard=self.tensorboard,
                extend=True,
                origin=Origin(self.recipe_name, self.command),
            )
        except FinishedError as finished:  # scripts that repeat the command until it succeeds end here
            _complain(str(finished))
            return 0
        if os.environ.get("RANK", "0") == "0":
            value = run.epochs[-1][f"val_{run.main_metric}"]
            print(
                f"{run.weights}: weights of the last epoch, validation {_metric(run.main_metric, value)}\n"
                f"{out / 'report.html'}: curves, metrics by class, pictures\n"
                f"try next: mobilevit predict {run.weights} PICTURE..."
            )
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Evaluate weights on labeled images, at one or several sizes.

    Metrics: top-1 and top-5 accuracy of classes, AP of boxes, mIoU of masks.
    """

    weights: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="WEIGHTS...", help=f"Weights: {WEIGHTS}; or the folder of a run, for all it has."),
    ]
    data: str
    """As for train."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Split of the data to evaluate; unless given, val, or test where there is no val. Data without splits are divided
    as in training, if the weights were trained on them; of other data all images are evaluated."""
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX...")] = ()
    """Sides of the pictures in pixels; unless given, what the weights were made for."""
    per_class: bool = False
    """The figures of every class as well."""
    json: bool = False
    """A JSON object a line instead of a table."""
    batch_size: int = 32
    """Pictures at a time."""
    num_workers: int = 2
    """Processes that read pictures; 0 reads them in the main process."""
    max_unreadable: int = 0
    """Images that may be unreadable and are left out; one more is an error."""
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS
    device: Device = "auto"
    num_threads: NumThreads = None
    download: Download = False

    def run(self) -> int:
        """Evaluate and print."""
        from rich.box import SIMPLE
        from rich.table import Column, Table

        from mobilevit.models.weights import read
        from mobilevit.tasks import default_split, evaluate_weights

        _use_threads(self.num_threads)
        if not self.weights:
            raise ValueError("no weights are named; give files, hub ids or the folder of a run")
        if any(side < 32 for side in self.size):
            raise ValueError(f"size is {self.size}; sides are from 32 px up")
        if self.max_unreadable < 0:
            raise ValueError(f"max unreadable is {self.max_unreadable}; it must be 0 or more")
        _limit_megapixels(self.max_megapixels)
        if self.num_workers < 0:
            raise ValueError(f"num workers is {self.num_workers}; it must be 0 or more")
        # All of them first: a name that is wrong is said before the first one has been evaluated.
        named = {name: read(name, download=self.download) for given in self.weights for name in _weights_of_run(given)}
        data = _expand_data(self.data)
        tasks = {weights.task for weights in named.values()}
        if len(tasks) > 1:
            raise ValueError(
                f"these weights are to {' and to '.join(sorted(tasks))}; evaluate those of one task at once"
            )
        table: Table | None = None
        classes: list[tuple[str, Table]] = []
        splits: list[str] = []
        notes: list[str] = []

        def say(note: str) -> None:
            if note not in notes:  # once, for all weights and sizes
                notes.append(note)
                _complain(note)

        for name, weights in named.items():
            _say_what_is_assumed(name, weights)
            split = self.split or default_split(weights, data)
            for size_px in self.size or (weights.preprocessing.crop_px,):
                results = evaluate_weights(
                    weights,
                    data,
                    split=split,
                    size_px=size_px,
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    device=_device(self.device),
                    max_unreadable=self.max_unreadable,
                    say=say,
                )
                metrics = results.metrics()
                per_class = results.per_class(weights.class_names)
                if self.json:
                    line: dict[str, Any] = {"weights": name, "size_px": size_px, "split": split, **metrics}
                    print(json.dumps(line | ({"classes": per_class} if self.per_class else {})), flush=True)
                    continue
                if table is None:
                    columns = (Column(_heading(metric), justify="right") for metric in ("px", *metrics))
                    table = Table("weights", "split", *columns, box=SIMPLE)
                table.add_row(name, split, str(size_px), *(_number(metric, value) for metric, value in metrics.items()))
                classes.append((f"{name} at {size_px} px", _class_table(per_class)))
                splits.append(_split_line(weights, split, self.split, metrics["num_pictures"], data))
        if table:
            console = _stdout()
            console.print(table)
            for title, one in classes if self.per_class else ():
                console.print(title)
                console.print(one)
            for which in dict.fromkeys(splits):
                console.print(which)
        return 0


@dataclass(frozen=True)
class Export:
    """Export weights for phones, boards, servers and browsers.

    Each artifact is run on its own runtime and compared with torch before it is written.
    """

    weights: SomeWeights
    to: tuple[Literal["onnx", "executorch", "openvino", "litert", "coreml", "all"], ...] = ("onnx",)
    """Runtimes; "all" is all of those that are installed."""
    out: Path = Path("exports")
    """Folder to write to. Files are named after the run folder or the weights file, where that has a name of its own
    (not model.safetensors, say), or else after the architecture."""
    overwrite: bool = False
    """Replace files that exist."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Numbers to compute with; int8 is calibrated on --images."""
    pictures: Annotated[tuple[str, ...], tyro.conf.arg(name="images", metavar="IMAGE...")] = ()
    """Real images to compare on, and to calibrate int8 with: files, folders, patterns, or data as for train. Unless
    given, synthetic ones are compared."""
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Side of the pictures, or their height and width, in pixels; unless given, what the weights were made for."""
    batch_size: int = 1
    """Pictures in an input."""
    dynamic_batch: bool = False
    """Leave the batch open, where the runtime can."""
    dynamic_size: bool = False
    """Leave height and width open, where the runtime can."""
    uint8: bool = False
    """Take pixels as they are, 0 to 255 and (batch, height, width, 3), and scale them inside."""
    answers: bool = False
    """Of a detector the boxes that it finds, with their scores and labels, after NMS; of a segmentation network the
    class of every pixel. Refused where there is no such thing: for classifiers, and NMS outside onnx and openvino."""
    num_threads: int = 2
    """Of the runtimes while they are timed."""
    sensitivity: bool = False
    """Instead of writing anything, show what int8 would cost each part of the network, on --images."""
    json: bool = False
    """One JSON object a line instead of a table."""
    download: Download = False

    def run(self) -> int:
        """Export and print."""
        from mobilevit.export import BACKENDS, export, installed, sensitivity

        if len(self.size) > 2:
            raise ValueError(f"size is {self.size}; give one side or height and width")
        if self.num_threads < 1:
            raise ValueError(f"num threads is {self.num_threads}; it must be 1 or more")
        weights = _read(self.weights, self.download)
        _say_what_is_assumed(self.weights, weights)
        if self.sensitivity:
            pictures = _some_pictures(self.pictures)
            print("every part of the network alone in int8, in torch ...", file=sys.stderr, flush=True)
            costs = sensitivity(weights, pictures)
            if self.json:
                for cost in costs:
                    print(json.dumps(asdict(cost)), flush=True)
            else:
                _stdout().print(_sensitivity_table(costs))
            return 0
        names = list(self.to)
        if "all" in names:
            names = [name for name in BACKENDS if installed(name)]
            missing = [name for name in BACKENDS if name not in names]
            if missing:
                _complain("not installed, left out: " + ", ".join(f"{x} (mobilevit[{x}])" for x in missing))
            if not names:
                raise ValueError("no runtime is installed to export for; pip install 'mobilevit[onnx]', say")
        if _expand(self.out).exists() and not _expand(self.out).is_dir():
            raise ValueError(f"{self.out}: is a file; name a folder to write to")
        # What takes minutes says so; what is written is told at once, lest an interruption takes it along.
        more = ", calibrating, and timing it against fp32" if self.precision == "int8" else ""

        def tell(a: Artifact) -> None:
            if self.json:
                print(json.dumps(a.to_dict(), ensure_ascii=False), flush=True)
            else:
                print(f"{a.backend}: wrote {a.path}", file=sys.stderr, flush=True)

        artifacts = export(
            weights,
            names,
            _expand(self.out),
            precision=self.precision,
            size=(self.size[0], self.size[-1]) if self.size else None,
            batch_size=self.batch_size,
            dynamic_batch=self.dynamic_batch,
            dynamic_size=self.dynamic_size,
            uint8=self.uint8,
            answers=self.answers,
            pictures=_some_pictures(self.pictures),
            source=self.weights,
            prefix=_artifact_name(self.weights),
            overwrite=self.overwrite,
            num_threads=self.num_threads,
            on_start=lambda name: print(f"{name}: converting{more} ...", file=sys.stderr, flush=True),
            on_written=tell,
        )
        _say_transparency(weights)
        if not self.json:
            _stdout().print(_artifact_table(artifacts))
            real = "of yours" if self.pictures else "drawn by program; give --images to compare on real ones"
            num_pictures = max((a.agreement.num_pictures for a in artifacts if a.agreement), default=0)
            print(f"compared with torch on {num_pictures} pictures {real}" if num_pictures else "nothing could be run")
            for a in artifacts:
                if a.speed_ratio is not None:
                    verdict = "faster than" if a.speed_ratio > 1.02 else "NOT faster than"
                    print(f"{a.backend}: int8 is {verdict} fp32 here, {a.speed_ratio:.2f} times its speed")
        return 0


@dataclass(frozen=True)
class Benchmark:
    """Measure latency, throughput, memory and load time on this machine.

    Models are timed interleaved, in any runtime and beside models of other libraries. The last line is JSON.
    """

    targets: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="TARGET...",
            help=f"Artifacts (.onnx, .pte, .xml, .tflite), xxs, xs, s, xxs:detect, xxs:segment ..., or {WEIGHTS}.",
        ),
    ]
    runtime: tuple[Literal["torch", "compiled", "onnx", "executorch", "openvino", "litert"], ...] = ()
    """What to export weights for first; torch unless given. An artifact has its own."""
    precision: tuple[Literal["fp32", "fp16", "bf16", "int8"], ...] = ()
    """Numbers to compute with; fp32 unless given. An artifact has its own."""
    against: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """What to compare with, in turns: timm or transformers (the same network by that library), torchvision:NAME,
    timm:NAME or a name alone (another network), or self, whose ratio of about 1 shows what the others are worth."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = ()
    """Pictures in an input, one number or several; 1 unless given, or what an artifact was made for."""
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Side of the pictures, or their height and width, in pixels; unless given, what the weights were made for."""
    rounds: int = 40
    """Every side is timed once a round."""
    num_threads: int = 2
    """Of every runtime."""
    json: Annotated[Path | None, tyro.conf.arg(name="out", metavar="FILE")] = None
    """Write the JSON object to this file as well."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the times here, as .png, .svg or .pdf."""
    download: Download = False

    def run(self) -> int:
        """Write what is to be timed, time it, print."""
        import tempfile

        from mobilevit.benchmark import latency, others
        from mobilevit.models.mobilevit import ARCHITECTURES
        from mobilevit.models.weights import NETWORKS

        if not self.targets:
            raise ValueError("nothing is named; give artifacts, weights, or xxs, xs, s")
        if len(self.size) > 2 or any(side < 32 for side in self.size):
            raise ValueError(f"size is {self.size}; give one side or height and width, from 32 px up")
        counts = [("batch size", size) for size in self.batch_size]
        for name, value in (*counts, ("rounds", self.rounds), ("num threads", self.num_threads)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        artifacts = {name for name in self.targets if latency.runtime_of(Path(name))}
        if artifacts.issuperset(self.targets) and (self.runtime or self.precision):
            raise ValueError("an artifact has its runtime and precision; leave out --runtime and --precision")
        if self.figure:
            latency.check_figure(self.figure)
        for file in (self.json, self.figure):  # said now, and not when everything has been measured
            if file and not _expand(file).parent.is_dir():
                raise ValueError(f"{file}: there is no such folder to write to")
        shared: dict[str, Any] = {
            "size": (self.size[0], self.size[-1]) if self.size else None,
            "against": self.against,
            "on_start": lambda what: print(what, file=sys.stderr, flush=True),
            "on_problem": _complain,
        }
        drawn: dict[str, tuple[str, Any]] = {f"{x}:{task}": (x, task) for x in ARCHITECTURES for task in NETWORKS}
        drawn |= {name: drawn[f"{name}:classify"] for name in ARCHITECTURES}
        weights = {}  # all of them first: a name that is wrong is said before minutes of work
        for name in dict.fromkeys(self.targets):
            if name.lower() in drawn:
                architecture, task = drawn[name.lower()]
                weights[name] = others.random_weights(architecture, task=task)
            elif name not in artifacts:
                weights[name] = _read(name, self.download)
        sides = []
        with tempfile.TemporaryDirectory() as folder:
            for name in dict.fromkeys(self.targets):
                if name in artifacts:
                    path = _expand(Path(name))
                    sides += latency.sides_of_artifact(path, Path(folder), batch_sizes=self.batch_size, **shared)
                else:
                    sides += latency.sides_of_weights(
                        name,
                        weights[name],
                        Path(folder),
                        runtimes=tuple(dict.fromkeys(self.runtime)) or ("torch",),
                        precisions=tuple(dict.fromkeys(self.precision)) or ("fp32",),
                        batch_sizes=tuple(dict.fromkeys(self.batch_size)) or (1,),
                        **shared,
                    )
            report = latency.benchmark(
                sides, num_rounds=self.rounds, num_threads=self.num_threads, on_start=shared["on_start"]
            )
        _stdout().print(latency.table(report))
        for note in report["notes"]:
            print(note)
        line = json.dumps(report, ensure_ascii=False)
        if self.json:
            _expand(self.json).write_text(line + "\n", encoding="utf-8")
        if self.figure:
            latency.figure(report, _expand(self.figure))
        print(line)
        return 0


@dataclass(frozen=True)
class Demo:
    """Run a network in the browser, or write the page for a website.

    Inputs are image files, the camera or drawings. Nothing is uploaded.
    """

    weights: SomeWeights
    port: int = 0
    """Of the page on this machine, which alone can see it; 0 is any that is free."""
    open: bool = True
    """Do not open the page in the browser. The URL is always printed."""
    export: Annotated[Path | None, tyro.conf.arg(name="out", metavar="FOLDER")] = None
    """Write the page and all it needs into this folder, for any host of static files, instead of serving it."""
    drawing: Literal["optdigits", "mnist"] | None = None
    """Draw digits and letters like scikit-learn's (8 px) or MNIST's and EMNIST's (28 px); unless given, the former for
    networks of up to 32 px. Other classifiers get no pad to draw on unless this is given."""
    pictures: Annotated[tuple[str, ...], tyro.conf.arg(name="images", metavar="IMAGE...")] = ()
    """Real images to compare the exported network with torch on: files, folders, patterns, or data as for train.
    Unless given, synthetic ones are compared."""
    ort: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder with ONNX Runtime Web's files; unless given, those of the wheel, or fetched through npm and kept."""
    download: Download = False

    def run(self) -> int:
        """Write the page; serve it until interrupted."""
        import tempfile
        import webbrowser

        from mobilevit.demo import Server, write_page

        weights = _read(self.weights, self.download)
        _say_what_is_assumed(self.weights, weights)
        file = _expand(Path(self.weights))
        source = file.name if file.exists() else self.weights  # a page for the world does not tell of folders here
        with tempfile.TemporaryDirectory() as aside:
            out = _expand(self.export) if self.export else Path(aside)
            with contextlib.nullcontext() if self.export else Server(out, self.port) as server:
                write_page(
                    weights,
                    out,
                    source=source,
                    drawing=self.drawing,
                    pictures=_some_pictures(self.pictures),
                    ort=_expand(self.ort) if self.ort else None,
                    say=lambda text: print(text, file=sys.stderr, flush=True),
                )
                if server is None:
                    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                    print(f"{out}: a page of {num_bytes / 1e6:.0f} MB; put it on any host of static files, with https")
                    print(
                        "Browsers do not run it from disk. To try it here, run "
                        f'python -m http.server -b 127.0.0.1 -d "{out}" and open http://127.0.0.1:8000/'
                    )
                    return 0
                print(f"{server.url} (Ctrl-C stops it)", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    if self.open:
                        webbrowser.open(server.url)
                    server.serve_forever()
        return 0


@dataclass(frozen=True)
class Explain:
    """Show attention, receptive fields and class evidence for an image."""

    weights: SomeWeights
    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """A picture file."""
    at: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="X Y")] = None
    """The place to ask about, in pixels of the upright picture from its upper left corner; unless given, the middle."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Of classifiers: the class to show the evidence for; unless given, the likeliest."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Side of what the network is given, in pixels; unless given, what the weights were made for. A larger one has
    finer maps, and is answered by other activations than the network was trained with."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("explanation.html")
    """A page in which the place is moved with the mouse (.html), or one picture (.png); a file of that name is
    replaced."""
    device: Device = "auto"
    download: Download = False

    def run(self) -> int:
        """Compute, write, say what was found."""
        from rich.box import SIMPLE
        from rich.table import Column, Table

        from mobilevit.explain import explain_picture

        weights = _read(self.weights, self.download)
        _say_what_is_assumed(self.weights, weights)
        out = _expand(self.out)
        _limit_megapixels()
        explanation = explain_picture(
            weights,
            _expand(self.picture),
            at=self.at,
            class_name=self.class_name,
            size_px=self.size,
            out=out,
            device=_device(self.device),
        )
        if explanation.evidence:
            table = Table("class", Column("probability", justify="right"), box=SIMPLE)
            for one in explanation.evidence:
                table.add_row(one.class_name, f"{100 * one.probability:.1f} %")
            _stdout().print(table)
        for layer in explanation.fields:
            print(f"{layer.name}: depends on {100 * layer.share:.1f} % of the pixels")
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare MobileViT with other models: size, accuracy, latency.

    With --data, all models are trained on your images by one recipe and compared; the same command resumes what was
    stopped. The last line is JSON.
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Systems to show beside MobileViT's three sizes; all unless given, which takes many minutes with the times. With
    --data, to train beside one MobileViT or those that are named; unless given, four as large as MobileViT-XXS."""
    data: str | None = None
    """Train on these pictures, as for train, and report what is measured instead of what was published; then the times
    of the trained networks, for a picture of that size."""
    recipe: Literal["small", "plain", "tiny"] | None = None
    """With --data: what all are trained by; small unless given. `mobilevit train NAME --help` says what it is."""
    epochs: int | None = None
    """With --data: times that every picture is seen; the recipe's unless given."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = ()
    """With --data: a run of every system with each; 0 1 2 unless given."""
    lr: float | None = None
    """With --data: the highest learning rate, of all systems alike; the recipe's unless given."""
    clip_norm: float | None = None
    """With --data: gradient norm limit, the same for all models; the recipe's unless given, and 0 disables clipping."""
    flip: bool = True
    """With --data: do not flip images horizontally. Use it for digits, letters and other images with a direction."""
    num_workers: int | None = None
    """With --data: processes that read pictures; the recipe's unless given."""
    time: bool = True
    """Do not measure latency; the table then takes a minute or two."""
    runtime: tuple[Literal["torch", "onnx"], ...] = ()
    """What to time in, always in float32; both unless given, on an accelerator torch."""
    baseline: Literal["nearest", "mobilevit-xxs", "mobilevit-xs", "mobilevit-s"] = "nearest"
    """What the others are compared with; nearest is the MobileViT with the most similar number of parameters."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", aliases=["--batch"])] = ()
    """Pictures in an input, one number or several; 1 unless given. With --data pictures a training step, the recipe's
    unless given, and 1 in what is timed."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Side of the pictures in pixels; unless given, what each system was published with, with --data the recipe's.
    Systems that do not take it are left out, or refused where they are named."""
    rounds: int | None = None
    """Every system is timed once a round; 40 unless given."""
    num_threads: int | None = None
    """Of every runtime that is timed; 2 unless given. Of training, as many as torch takes unless given."""
    device: Annotated[str, tyro.conf.arg(help="Where torch computes: cpu, cuda, cuda:1.")] = "cpu"
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write table.md, table.csv, table.json and the figures here. With --data the runs as well; unless given,
    runs/compare/ and the name of the data."""

    def run(self) -> int:
        """Count, time or train, print and write. Exit code 1 if some system could not be trained."""
        counts = [("batch size", size) for size in self.batch_size]
        counts += [("rounds", self.rounds), ("num threads", self.num_threads)]
        for name, value in counts:
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        of_training = {
            **{"--recipe": self.recipe, "--epochs": self.epochs, "--seeds": self.seeds, "--lr": self.lr},
            **{"--no-flip": not self.flip, "--num-workers": self.num_workers, "--clip-norm": self.clip_norm},
        }
        for option, value in of_training.items():
            if self.data is None and value is not None and value is not False and value != ():  # 0 is a value
                raise ValueError(f"{option} is about training; give --data too")
        if self.runtime and not self.time:
            raise ValueError("--no-time times nothing; leave out --runtime")
        if self.out and _expand(self.out).is_file():
            raise ValueError(f"{self.out}: is a file; --out names a folder")
        return self._list() if self.data is None else self._train(self.data)

    def _train(self, data: str) -> int:
        from dataclasses import replace

        from mobilevit.benchmark.latency import check_figure
        from mobilevit.compare import show, training

        if len(self.batch_size) > 1:
            raise ValueError(f"batch size is {self.batch_size}; with --data give one")
        recipe = RECIPES[self.recipe or "small"]

        def changed(part: Any, **given: Any) -> Any:
            return replace(part, **{name: value for name, value in given.items() if value is not None})

        recipe = changed(
            recipe,
            epochs=self.epochs,
            batch_size=self.batch_size[0] if self.batch_size else None,
            data=changed(
                recipe.data, size_px=self.size, num_workers=self.num_workers, flip=None if self.flip else False
            ),
            optimizer=changed(recipe.optimizer, lr=self.lr, clip_norm=self.clip_norm),
        )
        networks = training.choose(self.only, recipe, self.baseline)
        data = _expand_data(data)
        out = _expand(self.out or Path("runs/compare") / Path(data).resolve().name)
        check_figure(out / "figure.png")  # said now, and not when everything has been trained
        if self.num_threads:
            _use_threads(self.num_threads)
        report = training.compare_trained(
            networks,
            data,
            out,
            recipe,
            seeds=self.seeds or (0, 1, 2),
            **self._options(),
        )
        _stdout().print(show.table_of_training(report))
        for line in show.findings_of_training(report):
            print(line)
        for file in show.write_training(report, out):
            print(file)
        print(json.dumps(report, ensure_ascii=False))
        return 1 if any(row["failures"] for row in report["rows"]) else 0

    def _options(self) -> dict[str, Any]:
        """What both ways of comparing are told."""
        from mobilevit.compare.table import RUNTIMES

        device = _device(self.device)
        runtimes = tuple(dict.fromkeys(self.runtime)) or (RUNTIMES if device == "cpu" else ("torch",))
        return {
            "runtimes": runtimes if self.time else (),
            "device": device,
            "baseline": self.baseline,
            "num_rounds": self.rounds or 40,
            "num_threads": self.num_threads or 2,
            "on_start": lambda what: print(what, file=sys.stderr, flush=True),
            "on_problem": _complain,
        }

    def _list(self) -> int:
        from mobilevit.benchmark.latency import check_figure
        from mobilevit.compare import show, table

        systems = table.choose(self.only)
        if self.only and self.size:  # of all systems, those that do not take it are left out
            for system in systems:
                system.check_size(self.size)
        out = _expand(self.out) if self.out else None
        if out:  # said now, and not when everything has been measured
            check_figure(out / "figure.png")
            out.mkdir(parents=True, exist_ok=True)
        report = table.compare(
            systems,
            batch_sizes=tuple(dict.fromkeys(self.batch_size)) or (1,),
            size_px=self.size,
            **self._options(),
        )
        _stdout().print(show.table(report))
        for line in show.findings(report):
            print(line)
        if out:
            for file in show.write(report, out):
                print(file)
        print(json.dumps(report, ensure_ascii=False))
        return 0


def _artifact_table(artifacts: Any) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    names = ("MB", "largest error", "same answer", "median ms", "operators", "outside the fast part")
    table = Table("file", *(Column(name, justify="right") for name in names), box=SIMPLE)
    for a in artifacts:
        found = a.agreement
        measured = (
            (f"{found.error:.1e}", f"{100 * found.same:.1f} % of {found.kind}", f"{found.latency_ms:.2f}")
            if found
            else ("converted, not run", "-", "-")
        )
        outside = ", ".join(sorted(set(a.operators.outside))) or "none"
        table.add_row(str(a.path), f"{a.num_bytes / 1e6:.2f}", *measured, str(a.operators.num_operators), outside)
    return table


def _sensitivity_table(costs: Any) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    names = ("layers", "weights", "error", "same answer")
    table = Table("in int8, alone", *(Column(name, justify="right") for name in names), box=SIMPLE)
    for c in costs:
        table.add_row(c.part, str(c.num_layers), f"{c.num_weights:,}", f"{c.error:.4f}", f"{100 * c.same:.1f} %")
    return table


def _some_pictures(names: tuple[str, ...], number: int = 256) -> list[Any]:
    """The pictures that `names` stand for: files, folders and patterns, or, evenly over it, a data set for training."""
    from mobilevit.data.sources import find_splits
    from mobilevit.pictures import find_pictures, read_picture

    _limit_megapixels()
    if len(names) == 1:
        data = _expand_data(names[0])
        try:
            return list(find_pictures([data]))
        except ValueError:
            if not data.startswith("hf:") and not Path(data).exists():
                raise
        try:
            source = find_splits(data, val_fraction=0.1)[0]
        except ValueError as error:
            if Path(data).is_dir() and not any(Path(data).iterdir()):
                raise ValueError(f"{names[0]}: no pictures in this folder") from None
            raise error
        number = min(number, len(source))
        samples = [source[i * len(source) // number] for i in range(number)]
        return [read_picture(sample.picture, sample.name) for sample in samples]
    return list(find_pictures(names))


def _weights_of_run(name: str) -> list[str]:
    """What a run left, if `name` is its folder: the averaged weights of the last epoch and the raw ones."""
    folder = _expand(Path(name))
    if not (folder / "run.json").is_file():
        return [name]
    found = [str(folder / file) for file in ("model.safetensors", "raw.safetensors") if (folder / file).is_file()]
    if not found:
        raise ValueError(f"{name}: this run has no weights yet; the first are there after its first epoch")
    return found


def _read(source: str, download: bool) -> Weights:
    """Weights of a file, a folder or a hub id; of a run folder, its model.safetensors."""
    from mobilevit.models.weights import read

    return read(_weights_of_run(source)[0], download=download)


def _artifact_name(source: str) -> str:
    """Name for artifacts: of the run folder or the weights file; "" where that does not tell weights apart."""
    path = _expand(Path(source))
    if (path / "run.json").is_file():
        return path.resolve().name
    if not path.is_file():
        return ""
    if path.stem not in ("model", "raw", "best", "pytorch_model"):
        return path.stem
    if not path.with_name("run.json").is_file():
        return ""
    return path.resolve().parent.name + ("" if path.stem == "model" else f"_{path.stem}")


def _split_line(weights: Weights, split: str, asked: str | None, num_pictures: float, data: str) -> str:
    """What was evaluated."""
    line = f"evaluated: {'all' if split == 'all' else f'the {split} split'} of {data}, {num_pictures:,} images"
    if split == "all" and asked is None:  # the validation split was not recognized
        line += "; if the weights were trained on some of them, "
        line += "they count as well" if weights.val_fraction is None else "give --split val"
    return line


# The figures of evaluations: what they are called, and with how many decimals they are given. Others are counts.
FIGURES = {
    "loss": ("loss", 4),
    **{
        name: (f"{said} %", 2)
        for name, said in {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "iou": "IoU"}.items()
    },
    **{name: (f"{name} %", 2) for name in ("recall", "precision", "pixel_accuracy")},
    **{
        name: (f"{name.replace('ap', 'AP')} %", 2)
        for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    },
}


def _heading(name: str) -> str:
    return FIGURES[name][0].replace("_", " ") if name in FIGURES else name.removeprefix("num_")


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{FIGURES[name][1]}f}" if name in FIGURES else f"{value:,}"


def _metric(name: str, value: float) -> str:
    heading, is_share, _ = _heading(name).partition(" %")
    return f"{heading} {_number(name, value)}{is_share}"


def _class_table(rows: list[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    figures = [name for name in rows[0] if name != "class"]
    table = Table("class", *(Column(_heading(name), justify="right") for name in figures), box=SIMPLE)
    for row in rows:
        table.add_row(row["class"], *(_number(name, row[name]) for name in figures))
    return table


COMMANDS: dict[str, type[Any]] = {
    "predict": Predict,
    "train": Train,
    "evaluate": Evaluate,
    "info": Info,
    "convert": Convert,
    "export": Export,
    "benchmark": Benchmark,
    "demo": Demo,
    "explain": Explain,
    "compare": Compare,
}


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 done in part, 2 the user's mistake, 130 interrupted, 143 terminated."""
    # Told to end, leave nothing half-written behind: as after Ctrl-C. (Training has its own way.)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(_run(sys.argv[1:] if args is None else args))
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again while it exits
        sys.exit(0)
    except OSError as error:
        file = error.filename2 or error.filename
        _complain(f"{file}: {(error.strerror or '').lower()}" if file else str(error))
        sys.exit(2)
    except ValueError as error:
        _complain(options.by_option(str(error)))
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun, which all stop, one says so
            _complain(str(interrupt) or "interrupted")
        sys.exit(128 + getattr(interrupt, "signal_number", signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    signal_number = signal.SIGTERM


def _terminated(number: int, frame: object) -> None:
    raise _Terminated("terminated")


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: mobilevit COMMAND [OPTIONS]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:11}{(command.__doc__ or '').splitlines()[0]}")
        print("\nmobilevit COMMAND --help describes a command, mobilevit --version prints the version.")
        return 0
    if args[0] == "--version":
        print(mobilevit.__version__)
        return 0
    if args[0] not in COMMANDS:
        raise ValueError(
            f"there is no command {args[0]!r}; {nearest(args[0], COMMANDS)}the commands are {', '.join(COMMANDS)}"
        )
    return parse(args).run()


def parse(args: list[str]) -> Any:
    """The command that `args` stands for.

    Raises:
        ValueError: a recipe, option or value that does not exist or does not fit.
    """
    name, rest = args[0], args[1:]
    command, default = COMMANDS[name], None
    description = inspect.getdoc(command) or ""
    if command is Train:
        recipe = rest.pop(0) if rest and not rest[0].startswith("-") else "plain"
        if recipe not in RECIPES:
            raise ValueError(
                f"there is no recipe {recipe!r}; {nearest(recipe, RECIPES)}the recipes are {', '.join(RECIPES)}"
            )
        default = Train(data="", recipe=named(recipe), recipe_name=recipe, command=shlex.join(["mobilevit", *args]))
        description += f"\nRECIPE {recipe}: {describe(recipe)}"
    try:
        return options.parse(command, rest, prog=f"mobilevit {name}", description=description, default=default)
    except SystemExit:  # the help was asked for
        if command is Train:
            print(f"\n{_recipe_list()}")
        raise


def _recipe_list() -> str:
    """The recipes, each with the first line of its description; those that differ in size alone together."""
    purposes: dict[str, list[str]] = {}
    for name in RECIPES:
        purposes.setdefault(describe(name).partition("\n")[0], []).append(name)
    lines = ["Recipes (mobilevit train RECIPE --help shows the defaults and results of one):"]
    for purpose, names in purposes.items():
        family = names[0].rpartition("-")[0]
        title = names[0] if len(names) == 1 else f"{family}-{{{','.join(n.removeprefix(f'{family}-') for n in names)}}}"
        lines.append(f"  {title:22}{options.wrapped(purpose, 24).strip()}")
    return "\n".join(lines)


def _expand(path: Path) -> Path:
    """With the home folder for a leading ~, which no shell sees to in --data=~/photos."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own stops at a folder called ~photos


def _expand_data(data: str) -> str:
    return data if data.startswith("hf:") or "://" in data else str(_expand(Path(data)))


def _limit_megapixels(max_megapixels: float = MAX_MEGAPIXELS) -> None:
    from mobilevit.pictures import limit_megapixels

    if not max_megapixels > 0:
        raise ValueError(f"max megapixels is {max_megapixels}; it must be above 0")
    limit_megapixels(max_megapixels)


def _use_threads(num_threads: int | None) -> None:
    from mobilevit.device import use_threads

    use_threads(num_threads)


def _device(name: str) -> str:
    from mobilevit.device import choose_device

    return choose_device(name)


def _say_what_is_assumed(source: str, weights: Weights) -> None:
    if not weights.described:
        p = weights.preprocessing
        names = {"classify": "ImageNet", "detect": "COCO", "segment": "PASCAL VOC"}[weights.task]
        _complain(
            f"{source}: says nothing of its input; assumed is what was published: {_resized(p)}"
            + (f", {names}'s class names" if weights.class_names else ", and no class names")
        )


def _say_transparency(weights: Weights) -> None:
    """Tell whoever writes the preprocessing on a device what happens to transparency, if training met any."""
    if num := weights.training.get("num_transparent"):
        _complain(
            f"{num:,} of the training images have an alpha channel or a transparent color; training composited them on "
            f"{weights.preprocessing.background}, and your own preprocessing must do the same (Pillow's convert('RGB') "
            "does not)"
        )


def _resized(p: Preprocessing) -> str:
    """How a picture becomes a square."""
    if isinstance(p.resize_px, int):
        return f"short side to {p.resize_px} px {p.interpolation}, middle {p.crop_px} px"
    height, width = p.resize_px
    warped = f"the whole picture to {width} x {height} px {p.interpolation}"
    return warped if height == width == p.crop_px else f"{warped}, middle {p.crop_px} px"


def _complain(message: str) -> None:
    print(f"mobilevit: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def _stdout() -> Console:
    from rich.console import Console

    # A pipe has no width: lines are then as long as they need to be, for whatever reads them. Names of files and
    # classes are printed as they are, whatever [brackets] or :colons: are in them.
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, markup=False, emoji=False, highlight=False)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)
