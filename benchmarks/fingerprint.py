"""Fingerprint of what mobilevit computes: run it before and after a change to show that no computed number changed.

    python fingerprint.py --out FOLDER              writes FOLDER/fingerprint.json, {name: SHA-256 or number}
    python fingerprint.py --compare a.json b.json   prints the differences; exit code 1 if there are any

The script uses the command line (`python -m mobilevit`), the public Python API, weight files and exported artifacts. It
imports no internal module. PYTHONPATH selects the copy of mobilevit under test. All data are synthetic, except for
scikit-learn's digits, and are written to FOLDER.

Hashes are of tensors (name, dtype, shape, bytes) or of numbers, never of files, so that metadata and layout may change.
Results are comparable on one machine with one set of libraries only. Everything is computed with one thread.

Entries that start with "augment:" depend on RandAugment, random erasing, Mixup and CutMix; --allow augment: accepts
differences in them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fingerprint_data import CLASSES, write_data, write_generated

SCRIPT = Path(__file__).resolve()
TIMES = re.compile(r"second|wait|_ms$|duration|elapsed")  # numbers under these keys are measured times
METRICS = {"top1": "top-1", "top5": "top-5", "loss": "loss", "ap": "AP", "ap50": "AP50", "miou": "mIoU"}
ARTIFACT_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte", "coreml": ".mlpackage"}
DIGITS_EPOCHS = 4
DIGITS = f"--epochs {DIGITS_EPOCHS} --batch-size 16 --val-fraction 0.2"


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
    """SHA-256 of dtype, shape and bytes."""
    array = np.ascontiguousarray(array)
    return digest([str(array.dtype).encode(), str(array.shape).encode(), array.tobytes()])


def tensors_digest(tensors: dict[str, Any]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of torch tensors, sorted by name."""
    import torch

    parts = []
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        parts += [name.encode(), str(tensor.dtype).encode(), str(tuple(tensor.shape)).encode(), values]
    return digest(parts)


def file_digest(path: Path) -> str:
    """SHA-256 of the tensors in a .safetensors or .pt file."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return tensors_digest(load_file(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return tensors_digest({name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)})


def leaves(value: Any, texts: Iterable[str]) -> Iterator[str]:
    """Every number in nested values as text, and the strings that are in `texts`. Keys do not count."""
    import torch
    from PIL import Image

    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float | np.generic):
        yield repr(float(value))
    elif isinstance(value, str):
        if value in texts:
            yield value
    elif isinstance(value, torch.Tensor):
        yield tensors_digest({"": value})
    elif isinstance(value, np.ndarray | Image.Image):
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
    """SHA-256 of the sorted numbers in nested values, and of the strings that are in `texts`."""
    return digest(leaf.encode() for leaf in sorted(leaves(value, texts)))


def tree_digest(folder: Path) -> str:
    """SHA-256 of the names and bytes of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(part for path in files for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


class CommandError(Exception):
    """A command that failed; the message is the end of its output."""


def log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """One thread, CPU, no network, no colors, wide lines, absolute PYTHONPATH."""
    path = os.pathsep.join(str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "300"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return os.environ | variables | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def execute(*arguments: str | Path, cwd: Path) -> str:
    """Run Python with `arguments`; returns stdout. Raises CommandError if it fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        shown = "\n".join([line for line in lines[:-25] if line.startswith("mobilevit: ")] + lines[-25:])
        raise CommandError(f"exit code {done.returncode}: {' '.join(command)}\n{shown}")
    return done.stdout


def json_lines(text: str) -> list[Any]:
    """The lines of a text that are JSON objects."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# ---------------------------------------------------------------------------------------------------------------------
# Checks


class Checks:
    """All checks; they write to the folder `out` and record their results in `found`."""

    def __init__(self, out: Path, golden: Path):
        self.out, self.golden = out, golden
        self.data, self.runs = out / "data", out / "runs"
        # JPEG, transparent PNG, JPEG rotated by EXIF
        self.images = [self.data / "shapes" / name for name in ("circle/00.jpg", "square/02.png", "triangle/04.jpg")]
        self.found: dict[str, str | float] = {}
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def record(self, name: str, value: str | float) -> None:
        with self._lock:
            if name in self.found:
                raise KeyError(f"two entries are called {name}")
            self.found[name] = value

    def attempt(self, name: str, check: Callable[[], None]) -> None:
        """Run a check. A failure is an entry as well, and does not stop the others."""
        started = time.monotonic()
        try:
            check()
        except Exception as error:
            self.problems.append(f"{name}: {error}")
            self.record(f"{name}: failed", type(error).__name__)
        log(f"{name}: {time.monotonic() - started:.0f} s")

    def mobilevit(self, *arguments: str | Path) -> str:
        return execute("-m", "mobilevit", *arguments, cwd=self.out)

    def child(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Call one of `CHILDREN` in a process of its own."""
        text = execute(SCRIPT, "--child", function.__name__, json.dumps(argument), cwd=self.out)
        return json.loads(text.splitlines()[-1])

    def weights(self, run: str) -> Path:
        return self.runs / run / "model.safetensors"

    # Training

    def train_arguments(self, run: str, recipe: str, data: str, options: str) -> list[str]:
        shared = "--num-threads 1 --device cpu" + ("" if "--num-workers" in options else " --num-workers 0")
        paths = ["--data", str(self.data / data), "--out", str(self.runs / run)]
        return ["-m", "mobilevit", "train", recipe, *paths, *shared.split(), *options.split()]

    def train(self, run: str, recipe: str, data: str, options: str, processes: int = 1, prefix: str = "train") -> None:
        """Train, then record weights and metrics."""
        launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
        arguments = self.train_arguments(run, recipe, data, options)
        execute(*(launcher if processes > 1 else ()), *arguments, cwd=self.out)
        self.record_run(f"{prefix}: {run.replace('_', ' ')}", self.runs / run)

    def record_run(self, name: str, run: Path) -> None:
        """Record all weight files of a run, and the numbers of all its epochs and steps except for times."""
        files = sorted(run.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{run}: no .safetensors file")
        for file in files:
            self.record(f"{name}: {file.name}", file_digest(file))
        for file in (run / "metrics.jsonl", run / "steps.jsonl"):
            self.record(f"{name}: {file.name}", numbers_digest(json_lines(file.read_text())))

    def train_killed(self) -> None:
        """Kill a run one checkpoint after its first epoch, and resume it: equal to an uninterrupted run."""
        run, name = self.runs / "digits_killed", "train: digits killed and resumed"
        arguments = self.train_arguments(run.name, "tiny", "digits", f"{DIGITS} --checkpoint-minutes 1e-9")
        null = subprocess.DEVNULL
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.out,
            env=environment(),
            stdin=null,
            stdout=null,
            stderr=null,
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
        if code != -signal.SIGKILL or len(metrics.read_text().splitlines()) >= DIGITS_EPOCHS:
            raise RuntimeError(f"the run finished before it was killed (exit code {code})")
        execute(*arguments, cwd=self.out)
        self.record_run(name, run)
        same = all(file_digest(file) == file_digest(self.runs / "digits" / file.name) for file in run.glob("*.safete*"))
        self.record(f"{name}: equal to the uninterrupted run", float(same))
        if not same:
            self.problems.append("the run that was killed and resumed differs from the uninterrupted one")

    # Networks

    def logits(self) -> None:
        """Record the outputs of networks for random images of two sizes."""
        sizes = {
            "classify": [(256, 256), (160, 192)],
            "detect": [(320, 320), (256, 320)],
            "segment": [(256, 256), (160, 192)],
        }
        networks = {
            "trained classifier": ("classify", str(self.weights("digits")), [(64, 64), (96, 75)]),
            "trained detector": ("detect", str(self.weights("detect")), [(128, 128), (160, 192)]),
            "trained segmenter": ("segment", str(self.weights("segment")), [(128, 128), (96, 160)]),
        }
        for name, (task, path) in write_generated(self.out / "generated", self.golden).items():
            networks[name] = (task, str(path), sizes[task])
        for name, value in self.child(child_logits, networks).items():
            self.record(f"logits: {name}", value)

    def explain(self) -> None:
        """Record all numbers of the explanation of an image."""
        value = self.child(child_explain, [str(self.weights("finetune")), str(self.images[0])])
        self.record("explain: finetuned classifier", value)

    def convert(self) -> None:
        """Record the weights in every format."""
        (self.out / "converted").mkdir()
        for to, target in (("timm", "timm.safetensors"), ("apple", "apple.pt"), ("transformers", "transformers")):
            path = self.out / "converted" / target
            self.mobilevit("convert", self.weights("finetune"), path, "--to", to)
            files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
            self.record(f"convert: {to}", digest(file_digest(file).encode() for file in files))
            for file in sorted(path.glob("*.json")) if path.is_dir() else ():
                values = json.loads(file.read_text())
                values.pop("transformers_version", None)
                self.record(f"convert: {to}: {file.name}", numbers_digest(values, CLASSES))

    def info(self) -> None:
        """Record the numbers in the tables of parameters and multiply-accumulates."""
        for name, target in (("xxs", "xxs"), ("detect", self.weights("detect")), ("segment", self.weights("segment"))):
            text = self.mobilevit("info", target).replace(str(self.out), "")
            numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", text)
            self.record(f"info: {name}", digest(number.encode() for number in sorted(numbers)))

    # Artifacts

    def export(
        self, run: str, to: str, precision: str = "fp32", *, postprocess: bool = False, images: str = ""
    ) -> None:
        """Export, run the artifact in its own runtime, record the outputs."""
        label = f"export: {run} {to} {precision}" + (" answers" if postprocess else "")
        folder = self.out / "exports" / f"{run}_{to}_{precision}_{postprocess}"
        options = ["--postprocess"] * postprocess + (["--images", str(self.data / images)] if images else [])
        shared = ("--to", to, "--out", folder, "--precision", precision, "--num-threads", "1")
        self.mobilevit("export", self.weights(run), *shared, *options)
        (path,) = folder.glob(f"*{ARTIFACT_SUFFIXES[to]}")
        if to == "coreml":  # its runtime exists on Apple systems only
            files = sorted(path.rglob("weight.bin"))
            self.record(f"{label}: weights", digest(file.read_bytes() for file in files))
            return
        for key, value in self.child(child_artifact, [to, str(path)]).items():
            self.record(f"{label}: {key}", value)
        if to == "onnx" and precision == "fp32" and not postprocess:  # `predict` also reads artifacts
            self.predict(f"{run} onnx", path)

    # Evaluation and prediction

    def evaluate(self, name: str, run: str, data: str, *options: str) -> None:
        """Record the metrics, and a hash of all numbers, including those of every class."""
        shared = ("--num-workers", "0", "--num-threads", "1", "--device", "cpu", "--batch-size", "8")
        paths = (self.runs / run, "--data", self.data / data)
        lines = json_lines(self.mobilevit("evaluate", *paths, "--json", "--per-class", *shared, *options))
        for i, line in enumerate(lines):
            label = f"evaluate: {name}: line {i + 1} of {len(lines)}"
            for key in METRICS.keys() & line.keys():
                self.record(f"{label}: {METRICS[key]}", line[key])
            self.record(f"{label}: all numbers", numbers_digest(line))

    def predict(self, name: str, weights: Path) -> None:
        """Record the numbers and class names of three images, and the files of boxes and masks."""
        from PIL import Image

        out = self.out / "predictions" / name.replace(" ", "_")
        task = name.removesuffix(" onnx")
        options = {"detect": ["--out", str(out), "--score-threshold", "0.02"], "segment": ["--out", str(out)]}
        copies = [self.out / "images" / f"{i}{path.suffix}" for i, path in enumerate(self.images)]
        shared = ("--json", "--num-threads", "1", "--batch-size", "2")
        text = self.mobilevit("predict", weights, *copies, *shared, *options.get(task, ["--top-k", "3"]))
        texts = (*CLASSES, "background", *map(str, range(10)))
        for i, line in enumerate(json_lines(text)):
            self.record(f"predict: {name}: image {i + 1}", numbers_digest(line, texts))
        if task == "detect":
            detections = json.loads((out / "detections.json").read_text())
            self.record(f"predict: {name}: detections.json", numbers_digest(detections, texts))
        if task == "segment":
            for path in sorted(out.glob("*.png")):
                self.record(f"predict: {name}: {path.name}", array_digest(np.asarray(Image.open(path))))

    # Everything

    def run(self, jobs: int) -> None:
        """Write the data, then train, then run the checks that need the weights."""
        write_data(self.data)
        for folder in sorted(self.data.iterdir()):
            self.record(f"data: {folder.name}", tree_digest(folder))
        (self.out / "images").mkdir()
        for i, image in enumerate(self.images):
            shutil.copy(image, self.out / "images" / f"{i}{image.suffix}")
        self.attempt("train: digits", lambda: self.train("digits", "tiny", "digits", DIGITS))
        with ThreadPoolExecutor(jobs) as pool:
            for checks in (self.training_checks(), self.checks_of_weights()):
                list(pool.map(self.attempt, checks.keys(), checks.values()))

    def training_checks(self) -> dict[str, Callable[[], None]]:
        detect = "--epochs 25 --batch-size 4 --size 128 --optimizer.warmup-steps 10 --lr 4e-3 --num-workers 1"
        segment = "--epochs 12 --batch-size 4 --size 96 --optimizer.warmup-steps 5 --lr 4e-3 --architecture xxs"
        finetune = "--epochs 3 --batch-size 8 --size 64 --freeze stage1 --optimizer.backbone-lr-scale 0.5"
        main = "--architecture xxs --epochs 2 --batch-size 8 --size 96 --sampler.variant main"
        main += " --sampler.sizes-px 64 96 128 --compute.micro-batch-size 4 --num-workers 1"
        listing = "--architecture xxs --epochs 3 --batch-size 24 --size 64 --sampler.variant listing"
        listing += " --sampler.sizes-px 64 96"
        digits = self.weights("digits")
        train = functools.partial(functools.partial, self.train)
        return {
            "train: detect": train("detect", "detect", "coco", f"{detect} --backbone {digits}"),
            "train: segment": train("segment", "segment", "masks", segment),
            "train: digits killed and resumed": self.train_killed,
            "train: digits 2 processes": train("digits_2_processes", "tiny", "digits", DIGITS, processes=2),
            "train: finetune": train("finetune", "finetune", "shapes", f"{finetune} --weights {digits}"),
            "train: multi-scale": train("multi-scale", "plain", "shapes", main),
            "train: multi-scale 2 processes": train("multi-scale_2_processes", "plain", "shapes", listing, processes=2),
            "train: bfloat16": train(
                "bfloat16", "small", "shapes", "--epochs 2 --batch-size 8 --precision bfloat16 --seed 3"
            ),
            "train: idx files": train("idx_files", "tiny", "digits_idx", "--epochs 1"),
            "augment: classifier": train(
                *("classifier", "small", "shapes", "--epochs 2 --batch-size 8 --data.policy advanced"), prefix="augment"
            ),
        }

    def checks_of_weights(self) -> dict[str, Callable[[], None]]:
        export, evaluate, predict = (
            functools.partial(functools.partial, method) for method in (self.export, self.evaluate, self.predict)
        )
        return {
            "export: classifier executorch": export("digits", "executorch"),
            "export: classifier onnx": export("digits", "onnx"),
            "export: classifier openvino": export("digits", "openvino"),
            "export: classifier onnx int8": export("digits", "onnx", "int8", images="digits"),
            "export: classifier coreml": export("digits", "coreml"),
            "export: detector onnx": export("detect", "onnx"),
            "export: detector onnx answers": export("detect", "onnx", postprocess=True, images="coco/train"),
            "export: segmenter onnx": export("segment", "onnx"),
            "logits": self.logits,
            "convert": self.convert,
            "info": self.info,
            "explain": self.explain,
            "evaluate: classifier": evaluate("classifier", "digits", "digits", "--size", "32", "40"),
            "evaluate: classifier idx": evaluate("classifier idx", "digits", "digits_idx"),
            "evaluate: classifier tar": evaluate("classifier tar", "digits", "digits_tar", "--split", "val"),
            "evaluate: finetuned": evaluate("finetuned", "finetune", "shapes", "--split", "all"),
            "evaluate: detector": evaluate("detector", "detect", "coco"),
            "evaluate: detector train": evaluate("detector train", "detect", "coco", "--split", "train"),
            "evaluate: detector voc": evaluate("detector voc", "detect", "voc", "--split", "val"),
            "evaluate: segmenter": evaluate("segmenter", "segment", "masks"),
            "evaluate: segmenter voc": evaluate("segmenter voc", "segment", "voc", "--split", "val"),
            "predict: digits": predict("digits", self.weights("digits")),
            "predict: finetuned": predict("finetuned", self.weights("finetune")),
            "predict: detect": predict("detect", self.weights("detect")),
            "predict: segment": predict("segment", self.weights("segment")),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Functions that run in a process of their own


def outputs_of(value: Any) -> list[np.ndarray]:
    """The arrays in the output of a network, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [array for one in value for array in outputs_of(one)]
    return [value.detach().float().numpy()]


def child_logits(networks: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the outputs of networks; `networks` are {name: (task, path, sizes)}."""
    import torch

    import mobilevit

    torch.set_num_threads(1)
    load = {"classify": mobilevit.load, "detect": mobilevit.load_detector, "segment": mobilevit.load_segmenter}
    found = {}
    for name, (task, path, sizes) in networks.items():
        model = load[task](path).eval()
        for height, width in sizes:
            pixels = np.random.default_rng(height * 10_000 + width).random((2, 3, height, width), np.float32)
            with torch.no_grad():
                outputs = outputs_of(model(torch.from_numpy(pixels)))
            if not all(np.isfinite(output).all() for output in outputs):
                raise ValueError(f"{name}: outputs are not finite")
            found[f"{name} {height}x{width}"] = digest(array_digest(output).encode() for output in outputs)
    return found


def child_explain(paths: list[str]) -> str:
    """SHA-256 of all numbers of an explanation; `paths` are of the weights and of the image."""
    import torch

    import mobilevit

    torch.set_num_threads(1)
    return numbers_digest(mobilevit.explain_image(*paths))


def child_artifact(runtime_and_path: list[str]) -> dict[str, str]:
    """SHA-256 of the outputs of an artifact for random images, in its own runtime with one thread.

    Outputs are rounded to three decimals if two runs differ.
    """
    runtime, path = runtime_and_path
    run, shape = {"onnx": load_onnx, "openvino": load_openvino, "executorch": load_executorch}[runtime](path)
    pixels = np.random.default_rng(5).random(shape, np.float32)
    first, second = run(pixels), run(pixels)
    if all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)):
        return {f"output {i + 1}": array_digest(output) for i, output in enumerate(first)}
    return {f"output {i + 1}, 3 decimals": array_digest(output.round(3)) for i, output in enumerate(first)}


Loaded = tuple[Callable[[np.ndarray], list[np.ndarray]], tuple[int, ...]]  # input -> outputs, and the input's shape


def load_onnx(path: str) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda pixels: list(session.run(None, {given.name: pixels})), tuple(given.shape)  # pyright: ignore[reportReturnType]


def load_openvino(path: str) -> Loaded:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", options)

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        results = compiled(pixels)
        return [np.array(results[i]) for i in range(len(compiled.outputs))]

    return run, tuple(compiled.inputs[0].shape)


def load_executorch(path: str) -> Loaded:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(1)
    method = Runtime.get().load_program(Path(path)).load_method("forward")
    assert method is not None

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        return [output.numpy().copy() for output in method.execute([torch.from_numpy(pixels)])]

    return run, tuple(method.metadata.input_tensor_meta(0).sizes())


CHILDREN = {function.__name__: function for function in (child_logits, child_explain, child_artifact)}


# ---------------------------------------------------------------------------------------------------------------------


def compare(first: Path, second: Path, allowed: Sequence[str]) -> int:
    """Print the differences of two results; returns 1 if there are any that are not allowed."""
    a, b = (json.loads(path.read_text()) for path in (first, second))
    different = [name for name in sorted(a.keys() | b.keys()) if a.get(name, "missing") != b.get(name, "missing")]
    num_allowed = sum(name.startswith(tuple(allowed)) for name in different)
    for name in different:
        kind = "allowed  " if name.startswith(tuple(allowed)) else "DIFFERENT"
        print(f"{kind}  {name}\n    {a.get(name, 'missing')}\n    {b.get(name, 'missing')}")
    num_equal, num_different = len(a.keys() | b.keys()) - len(different), len(different) - num_allowed
    print(f"{num_equal} entries equal, {num_different} different, {num_allowed} different and allowed")
    return 1 if num_different else 0


def main() -> int:
    """Run the checks or compare two results; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    golden = SCRIPT.parent.parent / "tests/golden"
    parser.add_argument("--out", type=Path, help="folder to write to; must be empty or missing")
    parser.add_argument("--golden", type=Path, default=golden, help="folder of *.keys.json (default: tests/golden)")
    parser.add_argument("--jobs", type=int, default=2, help="parallel checks, each with one thread (default: 2)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two results to compare")
    parser.add_argument("--allow", nargs="+", default=[], metavar="PREFIX", help="with --compare: ignored entries")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(CHILDREN[args.child[0]](json.loads(args.child[1]))))
        return 0
    if args.compare:
        return compare(*args.compare, allowed=args.allow)
    if args.out is None:
        parser.error("give --out or --compare")
    out = args.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    log("fingerprint of " + execute("-c", "import mobilevit; print(mobilevit.__file__)", cwd=out).strip())
    started = time.monotonic()
    checks = Checks(out, args.golden.resolve())
    checks.run(args.jobs)
    text = json.dumps(dict(sorted(checks.found.items())), indent=1)
    (out / "fingerprint.json").write_text(text + "\n")
    print(text)
    for problem in checks.problems:
        log(f"PROBLEM: {problem}")
    log(f"{len(checks.found)} entries in {time.monotonic() - started:.0f} s: {out / 'fingerprint.json'}")
    return 1 if checks.problems else 0


if __name__ == "__main__":
    sys.exit(main())
