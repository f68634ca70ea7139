"""`mobilevit predict`."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilevit.defaults import MAX_MEGAPIXELS

if TYPE_CHECKING:
    import numpy as np

    from mobilevit.predict import Classifier, Detection, Detector, Prediction, Segmenter
from mobilevit.cli.console import stderr, stdout, warn
from mobilevit.cli.options import (
    ARTIFACTS,
    OR_RUN,
    WEIGHTS,
    Device,
    Download,
    MaxMegapixels,
    NumThreads,
    choose_device,
    expand,
    limit_megapixels,
    read_weights,
    use_threads,
    warn_of_assumptions,
)


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
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Files, folders (searched through) or quoted patterns such as "photos/*.jpg"."""
    top_k: int | None = None
    """Of classifiers: classes to give for each image; unless given, 5."""
    score_threshold: float | None = None
    """Of detectors: the score, 0 to 1, above which something is shown; unless given, 0.3."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for what detection and segmentation write; unless given, predictions. Files of the same names are
    replaced. Detection: STEM_boxes.jpg for each image, and detections.json in COCO's results format, with the
    category_id that the class had in the data (its number + 1 where the weights do not know it) and the image's stem
    for image_id, as a number where it is one. Segmentation: STEM.png, the class numbers in VOC's colours, and
    STEM_overlay.jpg."""
    json: bool = False
    """One JSON object a line instead of a table."""
    batch_size: int = 16
    """Images at a time."""
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS
    device: Device = "auto"
    num_threads: NumThreads = None
    download: Download = False

    def run(self) -> int:
        """Predict, print and, but for classifiers, write."""
        from rich.box import SIMPLE
        from rich.progress import Progress
        from rich.table import Column, Table

        from mobilevit.images import ImageError, find_images

        if not self.images:
            raise ValueError("no image is named; give files, folders or quoted patterns")
        limit_megapixels(self.max_megapixels)
        paths = find_images(self.images)
        use_threads(self.num_threads)  # imports torch: wrong paths are reported before
        model = self._artifact() if Path(self.weights).suffix in ARTIFACTS else self._network()
        self._refuse_options(model.task)
        shown = {"classify": _Classes, "detect": _Boxes, "segment": _Masks}[model.task](self, model, paths)
        num_done = num_unread = 0
        interrupted: KeyboardInterrupt | None = None
        table = Table("image", "class", *(Column(name, justify="right") for name in shown.columns), box=SIMPLE)
        console = stderr()
        quiet = len(paths) < 32 or not console.is_terminal or (self.json and sys.stdout.isatty())
        # Left to itself, rich sends what is printed to stdout the way of its bar, to stderr.
        results: Any = shown.results  # a generator, whose threads end here, also after an exception
        with (
            contextlib.closing(results),
            Progress(console=console, transient=True, disable=quiet, redirect_stdout=False) as progress,
        ):
            try:
                for path, result in progress.track(results, len(paths), description="predicting"):
                    try:
                        if isinstance(result, ImageError):
                            raise result
                        line, rows = shown.show(path, result)
                    except ImageError as error:  # or the image has gone before it could be drawn on
                        num_unread += 1
                        warn(str(error))
                        line, rows = {"error": str(error)}, []
                    if self.json:
                        print(json.dumps({"image": str(path), **line}), flush=True)
                    for i, row in enumerate(rows):
                        table.add_row("" if i else str(path), *row)
                    num_done += 1
            except KeyboardInterrupt as interrupt:
                if not num_done:
                    raise
                interrupted = interrupt  # what is done by then is kept and told
        said = shown.close()
        if not self.json and table.row_count:
            stdout().print(table)
            if said:
                print(said)
        if interrupted is not None and num_done < len(paths):
            raise type(interrupted)(
                f"{str(interrupted) or 'interrupted'} after {num_done} of {len(paths)} images; missing are "
                f"{paths[num_done]} and what comes after it"
            )
        return 1 if num_unread else 0

    def _network(self) -> Any:
        from mobilevit.models.fuse import fold_batch_norm
        from mobilevit.predict import classifier, detector, segmenter

        weights = read_weights(self.weights, self.download)
        warn_of_assumptions(self.weights, weights)
        build = {"classify": classifier, "detect": detector, "segment": segmenter}[weights.task]
        return fold_batch_norm(build(weights).to(choose_device(self.device)))

    def _artifact(self) -> Any:
        from mobilevit.export.predictor import load_predictor

        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device is {self.device!r}; an artifact runs on the CPU: leave out --device")
        return load_predictor(expand(Path(self.weights)))

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
        from mobilevit.predict import predict_images

        options: dict[str, Any] = {} if command.top_k is None else {"top_k": command.top_k}
        self.results = predict_images(model, paths, batch_size=command.batch_size, **options)

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
        from mobilevit.predict import detect_images

        self.out = _folder_for(command, {path: str(_image_id(path)) for path in paths})
        self.category_ids = model.category_ids or range(1, model.num_classes + 1)
        if not model.category_ids:
            warn(f"{command.weights}: knows no category ids; in detections.json they are the number of the class + 1")
        options: dict[str, Any] = (
            {} if command.score_threshold is None else {"score_threshold": command.score_threshold}
        )
        self.results = detect_images(model, paths, batch_size=command.batch_size, **options)
        self.coco: list[dict[str, Any]] = []

    def show(self, path: Path, found: list[Detection]) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
        """The line of JSON and the rows of the table; the image is drawn on."""
        from mobilevit.draw import draw_boxes, write_jpeg
        from mobilevit.images import read_image

        labels = [f"{d.class_name} {100 * d.score:.0f} %" for d in found]
        drawing = self.out / f"{path.stem}_boxes.jpg"
        image = read_image(path)
        write_jpeg(draw_boxes(image, [d.box for d in found], [d.class_index for d in found], labels), drawing)
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
        self.coco += coco  # all of an image, or, where it is interrupted, nothing
        line = [{"class": d.class_name, "index": d.class_index, "score": d.score, "box": d.box} for d in found]
        rows = [(d.class_name, f"{d.score:.2f}", ", ".join(f"{value:.0f}" for value in d.box)) for d in found]
        return {"detections": line, "drawing": str(drawing)}, rows or [("nothing found", "", "")]

    def close(self) -> str:
        """Write detections.json and say what lies in the folder."""
        from mobilevit.files import write_whole

        text = json.dumps(self.coco)
        write_whole(self.out / "detections.json", lambda target: target.write_text(text, encoding="utf-8"))
        return f"{self.out}: detections.json, and the images with their boxes"


class _Masks:
    """What `Predict` prints and writes of a segmentation network."""

    columns = ("fraction of the pixels",)

    def __init__(self, command: Predict, model: Segmenter, paths: list[Path]):
        from mobilevit.predict import segment_images

        self.out = _folder_for(command, {path: path.stem for path in paths})
        self.model = model
        self.results = segment_images(model, paths, batch_size=command.batch_size)

    def show(self, path: Path, found: np.ndarray) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
        """The line of JSON and the rows of the table, the largest class first; mask and overlay are written."""
        import numpy as np

        from mobilevit.draw import draw_mask, write_jpeg, write_mask_png
        from mobilevit.images import read_image

        counts = np.bincount(found.ravel(), minlength=256)
        order = [int(c) for c in np.argsort(-counts, kind="stable") if counts[c]]
        classes = {c: (self.model.class_name(c), int(counts[c]) / found.size) for c in order}
        mask, overlay = self.out / f"{path.stem}.png", self.out / f"{path.stem}_overlay.jpg"
        legend = {
            c: f"{name} {100 * fraction:.1f} %" for c, (name, fraction) in classes.items() if name != "background"
        }
        write_jpeg(draw_mask(read_image(path), found, legend), overlay)
        write_mask_png(found, mask)
        line = [{"class": name, "index": c, "fraction": fraction} for c, (name, fraction) in classes.items()]
        rows = [(name, f"{100 * fraction:.1f} %") for name, fraction in classes.values()]
        return {"classes": line, "mask": str(mask), "overlay": str(overlay)}, rows

    def close(self) -> str:
        """Say what lies in the folder."""
        return f"{self.out}: class numbers (.png), and the images with the classes painted over (_overlay.jpg)"


def _image_id(path: Path) -> int | str:
    """How COCO's results name an image: by the number that its stem is, 139 for 000000000139.jpg, else by its stem."""
    return int(path.stem) if path.stem.isascii() and path.stem.isdigit() else path.stem


def _folder_for(command: Predict, names: dict[Path, str]) -> Path:
    """The folder to write to. `names` are those that the images' results will go by, and have to differ.

    Raises:
        ValueError: two images of one name, an image in that very folder, a file instead of it.
    """
    out = expand(command.out or Path("predictions"))
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
