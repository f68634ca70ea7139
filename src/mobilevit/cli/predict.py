"""`mobilevit predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilevit.cli.console import stdout, warn
from mobilevit.cli.options import (
    FLAT,
    RUN_FOLDER,
    SELF_CHECK,
    WEIGHTS,
    DeviceOptions,
    Flag,
    ImageOptions,
    WeightsOptions,
    expand,
)
from mobilevit.defaults import LABEL_THRESHOLD, PREDICT_BATCH_SIZE, SCORE_THRESHOLD, TOP_K
from mobilevit.export_options import ARTIFACT_SUFFIXES

if TYPE_CHECKING:
    import numpy as np

    from mobilevit.predict import (
        Classifier,
        Detection,
        Detector,
        ImageResult,
        MultilabelClassifier,
        Prediction,
        Segmenter,
    )

Rows = list[tuple[str, ...]]  # of the table, without the column of the image
Predictions = Callable[[Any, Any], list[Any]]  # (pixels, sizes) of a batch -> a result per image
MIN_IMAGES_FOR_PROGRESS = 32
ARTIFACTS = tuple(ARTIFACT_SUFFIXES.values())


@dataclass(frozen=True)
class Predict:
    """Predict the classes, labels, boxes or masks of images.

    The weights determine the task. The exit code is 1 if some images cannot be read.
    """

    weights: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="WEIGHTS",
            help=f"Weights: {WEIGHTS}; {RUN_FOLDER}; or an exported artifact ({', '.join(ARTIFACTS)}), run on the CPU.",
        ),
    ]
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files, folders (searched recursively) or quoted patterns such as "photos/*.jpg"."""
    top_k: Annotated[
        int | None,
        tyro.conf.arg(metavar="INT", help=f"Classification: number of most likely classes to print. Default: {TOP_K}."),
    ] = None
    score_threshold: Annotated[
        float | None,
        tyro.conf.arg(
            metavar="FLOAT",
            help=f"Minimum score, from 0 to 1. Detection: of a box. Default: {SCORE_THRESHOLD}. Several labels per "
            "image: of a label. Default: the thresholds of the weights.",
        ),
    ] = None
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Detection and segmentation: output folder; existing files are replaced. Default: predictions. Detection writes
    STEM_boxes.jpg for each image and detections.json in the format of COCO results: image_id is the file stem, as a
    number if it is one; category_id is that of the training data, or class index + 1 if unknown. Segmentation writes
    STEM.png (class indices) and STEM_overlay.jpg."""
    json: Flag = False
    """Print one JSON object per line instead of a table."""
    batch_size: int = PREDICT_BATCH_SIZE
    """Batch size in images."""
    image_options: Annotated[ImageOptions, FLAT] = ImageOptions()
    device_options: Annotated[DeviceOptions, FLAT] = DeviceOptions()
    self_check: Annotated[Flag, SELF_CHECK] = True
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        from mobilevit.images import find_images

        if not self.images:
            raise ValueError("no images; give files, folders or quoted patterns")
        self.image_options.apply()
        paths = find_images(self.images)  # before the import of torch, so that a wrong path is reported at once
        model = self._artifact() if Path(self.weights).suffix in ARTIFACTS else self._network()
        self._check_options(model.task)
        outputs = {"classify": _Classes, "multilabel": _Labels, "detect": _Boxes, "segment": _Masks}
        output = outputs[model.task](self, model, paths)
        return self._print(model, paths, output)

    def _print(self, model: Any, paths: list[Path], output: _Classes | _Labels | _Boxes | _Masks) -> int:
        from rich.box import SIMPLE
        from rich.table import Column, Table

        from mobilevit.images import ImageError
        from mobilevit.predict import predict_images

        num_done = num_failed = 0
        interrupt: KeyboardInterrupt | None = None
        table = Table("image", "class", *(Column(name, justify="right") for name in output.columns), box=SIMPLE)
        # A generator: it ends its threads when it is closed.
        results: Any = predict_images(model, paths, output.predict, batch_size=self.batch_size)
        try:
            for one in self._with_progress(results, len(paths)):
                try:
                    line, rows = output.write(one)
                except ImageError as error:
                    num_failed += 1
                    warn(str(error))
                    line, rows = {"error": str(error)}, []
                if self.json:
                    print(json.dumps({"image": str(one.path), **line}), flush=True)
                for i, row in enumerate(rows):
                    table.add_row("" if i else str(one.path), *row)
                num_done += 1
        except KeyboardInterrupt as error:
            if not num_done:
                raise
            interrupt = error  # after the results so far are written
        finally:
            results.close()
        written = output.finish()
        if not self.json and table.row_count:
            stdout().print(table)
            if written:
                print(written)
        if interrupt is not None and num_done < len(paths):
            raise type(interrupt)(
                f"{str(interrupt) or 'interrupted'} after {num_done} of {len(paths)} images; the first one without a "
                f"result is {paths[num_done]}"
            )
        return 1 if num_failed else 0

    def _with_progress(self, results: Any, num_images: int) -> Any:
        """`results` with a progress bar, if there are many and it does not mix with the output."""
        from mobilevit.logs import CONSOLE

        if num_images < MIN_IMAGES_FOR_PROGRESS or not CONSOLE.is_terminal or (self.json and sys.stdout.isatty()):
            yield from results
            return
        from rich.progress import Progress

        # By default, rich redirects standard output to the console of the bar, standard error.
        with Progress(console=CONSOLE, transient=True, redirect_stdout=False) as progress:
            yield from progress.track(results, num_images, description="predicting")

    def _network(self) -> Any:
        from mobilevit.models.fuse import fold_batch_norm
        from mobilevit.predict import PREDICTORS
        from mobilevit.self_check import check_device

        device = self.device_options.apply()
        weights = self.weights_options.read_for_inference(self.weights)
        model = fold_batch_norm(PREDICTORS[weights.task].from_weights(weights).to(device), inplace=True)
        if self.self_check:
            check_device(model, weights.preprocessing.crop_px)
        return model

    def _artifact(self) -> Any:
        from mobilevit.export.predictor import load_predictor

        device = self.device_options.device
        if device not in ("auto", "cpu"):
            raise ValueError(f"--device is {device}, but an artifact runs on the CPU; leave out --device")
        return load_predictor(expand(Path(self.weights)))

    def _check_options(self, task: str) -> None:
        """Check that the given options apply to the task."""
        for option, value, tasks in (
            ("--top-k", self.top_k, ("classify",)),
            ("--score-threshold", self.score_threshold, ("multilabel", "detect")),
            ("--out", self.out, ("detect", "segment")),
        ):
            if value is not None and task not in tasks:
                raise ValueError(
                    f"{option} is for the task {' or '.join(tasks)}, but {self.weights} is for {task}; leave it out"
                )


class _Classes:
    """The output of classification."""

    columns = ("probability",)

    def __init__(self, command: Predict, model: Classifier, paths: list[Path]):
        top_k = TOP_K if command.top_k is None else command.top_k
        self.model, self.top_k = model, top_k
        self.num_rejected = 0

    def predict(self, pixels: Any, sizes: Any) -> list[tuple[list[Prediction], float]]:
        """Predictions and energy of each image of a batch."""
        logits = self.model.logits(pixels)
        return list(zip(self.model.decode(logits, self.top_k), self.model.energy(logits).tolist(), strict=True))

    def write(self, one: ImageResult[tuple[list[Prediction], float]]) -> tuple[dict[str, Any], Rows]:
        """JSON values and table rows.

        Raises:
            ImageError: the image could not be read.
        """
        predictions, energy = one.value()
        line = [{"class": p.class_name, "index": p.class_index, "probability": p.probability} for p in predictions]
        rows = [(p.class_name, f"{100 * p.probability:.1f} %") for p in predictions]
        rejected = predictions[0].rejected
        if rejected:
            self.num_rejected += 1
            rows[0] = (f"{rows[0][0]} (rejected)", rows[0][1])
        return {"predictions": line, "rejected": rejected, "energy": energy}, rows

    def finish(self) -> str:
        """A line about rejected images, if there are any."""
        c = self.model.calibration
        return (
            f"rejected: {self.num_rejected} with a probability below {100 * c.min_probability:.1f} %"
            + ("" if c.min_precision is None else f", the threshold for a precision of {100 * c.min_precision:g} %")
            if self.num_rejected
            else ""
        )


class _Labels:
    """The output of multi-label classification."""

    columns = ("probability", "threshold")

    def __init__(self, command: Predict, model: MultilabelClassifier, paths: list[Path]):
        threshold = command.score_threshold
        self.predict: Predictions = lambda pixels, sizes: model.predict_pixels(pixels, sizes, threshold)
        self.thresholds = model.thresholds if threshold is None else (threshold,) * model.num_classes
        if not self.thresholds:
            warn(f"{command.weights}: no thresholds; {LABEL_THRESHOLD} is used for all classes")
            self.thresholds = (LABEL_THRESHOLD,) * model.num_classes

    def write(self, one: ImageResult[list[Prediction]]) -> tuple[dict[str, Any], Rows]:
        """JSON values and table rows.

        Raises:
            ImageError: the image could not be read.
        """
        labels = [(p, self.thresholds[p.class_index]) for p in one.value()]
        line = [
            {"class": p.class_name, "index": p.class_index, "probability": p.probability, "threshold": threshold}
            for p, threshold in labels
        ]
        rows: Rows = [(p.class_name, f"{100 * p.probability:.1f} %", f"{100 * t:.1f} %") for p, t in labels]
        return {"labels": line}, rows or [("no label", "", "")]

    def finish(self) -> str:
        """A line about the written files; there are none."""
        return ""


class _Boxes:
    """The output of detection."""

    columns = ("score", "box: x1, y1, x2, y2 in px")

    def __init__(self, command: Predict, model: Detector, paths: list[Path]):
        self.out = _output_folder(command, {path: str(_image_id(path)) for path in paths})
        self.category_ids = model.category_ids or range(1, model.num_classes + 1)
        if not model.category_ids:
            warn(f"{command.weights}: no category ids; detections.json has class index + 1 instead")
        threshold = SCORE_THRESHOLD if command.score_threshold is None else command.score_threshold
        self.predict: Predictions = lambda pixels, sizes: model.predict_pixels(pixels, sizes, threshold)
        self.coco: list[dict[str, Any]] = []

    def write(self, one: ImageResult[list[Detection]]) -> tuple[dict[str, Any], Rows]:
        """JSON values and table rows; writes the image with its boxes."""
        from mobilevit.draw import draw_boxes, write_jpeg

        detections, path = one.value(), one.path
        labels = [f"{d.class_name} {100 * d.score:.0f} %" for d in detections]
        drawing = self.out / f"{path.stem}_boxes.jpg"
        boxes, classes = [d.box for d in detections], [d.class_index for d in detections]
        write_jpeg(draw_boxes(one.decoded(), boxes, classes, labels), drawing)
        # All detections of an image, or none if the program is interrupted.
        self.coco += [
            {
                "image_id": _image_id(path),
                "category_id": self.category_ids[d.class_index],
                "bbox": [d.box[0], d.box[1], d.box[2] - d.box[0], d.box[3] - d.box[1]],
                "score": d.score,
                "file_name": path.name,
                "category_name": d.class_name,
            }
            for d in detections
        ]
        line = [{"class": d.class_name, "index": d.class_index, "score": d.score, "box": d.box} for d in detections]
        rows = [(d.class_name, f"{d.score:.2f}", ", ".join(f"{value:.0f}" for value in d.box)) for d in detections]
        return {"detections": line, "drawing": str(drawing)}, rows or [("nothing found", "", "")]

    def finish(self) -> str:
        """Write detections.json; a line about the written files."""
        from mobilevit.files import write_atomic

        write_atomic(self.out / "detections.json", json.dumps(self.coco))
        return f"{self.out}: detections.json, and the images with their boxes (_boxes.jpg)"


class _Masks:
    """The output of segmentation."""

    columns = ("fraction of the pixels",)

    def __init__(self, command: Predict, model: Segmenter, paths: list[Path]):
        self.out = _output_folder(command, {path: path.stem for path in paths})
        self.class_name = model.class_name
        self.predict: Predictions = model.predict_pixels

    def write(self, one: ImageResult[np.ndarray]) -> tuple[dict[str, Any], Rows]:
        """JSON values and table rows, the largest class first; writes the mask and the overlay."""
        import numpy as np

        from mobilevit.draw import draw_mask, write_jpeg, write_mask_png

        mask = one.value()
        counts = np.bincount(mask.ravel(), minlength=256)
        order = [int(c) for c in np.argsort(-counts, kind="stable") if counts[c]]
        classes = {c: (self.class_name(c), int(counts[c]) / mask.size) for c in order}
        legend = {c: f"{name} {100 * part:.1f} %" for c, (name, part) in classes.items() if name != "background"}
        mask_path, overlay_path = self.out / f"{one.path.stem}.png", self.out / f"{one.path.stem}_overlay.jpg"
        write_jpeg(draw_mask(one.decoded(), mask, legend), overlay_path)
        write_mask_png(mask, mask_path)
        line = [{"class": name, "index": c, "fraction": fraction} for c, (name, fraction) in classes.items()]
        rows: Rows = [(name, f"{100 * fraction:.1f} %") for name, fraction in classes.values()]
        return {"classes": line, "mask": str(mask_path), "overlay": str(overlay_path)}, rows

    def finish(self) -> str:
        """A line about the written files."""
        return f"{self.out}: class indices (.png), and the images with colored classes (_overlay.jpg)"


def _image_id(path: Path) -> int | str:
    """The image id in COCO's results: the stem, as a number if it is one, such as 139 for 000000000139.jpg."""
    return int(path.stem) if path.stem.isascii() and path.stem.isdigit() else path.stem


def _output_folder(command: Predict, names: dict[Path, str]) -> Path:
    """The output folder. `names` are the names of the images' results, which must be unique.

    Raises:
        ValueError: two images with the same name, an image in the output folder, or a file instead of the folder.
    """
    out = expand(command.out or Path("predictions"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder with --out")
    by_name: dict[str, Path] = {}
    for path, name in names.items():
        if path.absolute().parent.resolve() == out.resolve():
            raise ValueError(f"{path}: is in {out}, where results are written; give another folder with --out")
        # Case-insensitive: some file systems do not distinguish A.png and a.png.
        other = by_name.setdefault(name.casefold(), path)
        if other != path:
            raise ValueError(
                f"{other} and {path}: the results of both would be named {name}; predict them separately, each with "
                "its own --out"
            )
    return out
