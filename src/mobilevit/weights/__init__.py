"""Read and write weights in four formats.

| format | file | channel order | contains preprocessing and class names |
|---|---|---|---|
| mobilevit | one .safetensors file of this package | RGB | yes, in its metadata |
| apple | the .pt of the released code, a pickled state dict | BGR (with one exception, see `keys.is_bgr`) | no |
| timm | one .safetensors file, or a hub folder with config.json | RGB | in config.json or our metadata |
| transformers | a folder: config.json, preprocessor_config.json, weights | BGR | yes |

`read` converts each of them to `Weights`: tensors with the names of this package, for RGB. `write` converts back.
`keys.py` has the table of tensor names, `configs.py` the metadata, `class_names.py` the names of published classes. No
other module depends on a format. `TASK_FORMATS` lists the formats that have a network for a task.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mobilevit import hub
from mobilevit.files import write_atomic
from mobilevit.messages import first_line, nearest
from mobilevit.weights.class_names import (
    coco_category_ids,
    coco_class_names,
    imagenet_class_names,
    voc_class_names,
    with_published_names,
)
from mobilevit.weights.configs import (
    METADATA,
    OTHER,
    PUBLISHED_STRIDES,
    check_published,
    describe,
    metadata_of,
    parse_json,
    transformers_config,
    transformers_processor,
)
from mobilevit.weights.keys import (
    FORMAT_NAMES,
    Layout,
    closest_layout,
    detect_format,
    from_standard,
    key_names,
    to_standard,
)
from mobilevit.weights.record import (
    CLASSIFIERS,
    FORMATS,
    NETWORKS,
    PAPER_PREPROCESSING,
    PREPROCESSING,
    TASK_FORMATS,
    TIMM_PREPROCESSING,
    UNCALIBRATED,
    Calibration,
    Format,
    TaskName,
    Weights,
    WeightsError,
    backbone_tensors,
)

__all__ = [
    "FORMATS",
    "NETWORKS",
    "OTHER",
    "PAPER_PREPROCESSING",
    "PREPROCESSING",
    "PUBLISHED_STRIDES",
    "TASK_FORMATS",
    "TIMM_PREPROCESSING",
    "UNCALIBRATED",
    "Calibration",
    "Format",
    "TaskName",
    "Weights",
    "WeightsError",
    "backbone_tensors",
    "coco_category_ids",
    "coco_class_names",
    "imagenet_class_names",
    "read",
    "to_safetensors",
    "to_weights",
    "voc_class_names",
    "write",
]

_ENDINGS: dict[Format, tuple[str, ...]] = {
    "mobilevit": (".safetensors",),
    "timm": (".safetensors",),
    "apple": (".pt", ".pth"),
    "transformers": (),
}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def read(source: str | os.PathLike[str], *, download: bool = False, num_classes: int | None = None) -> Weights:
    """Read weights from a file, a folder in transformers' or timm's layout, or a hub id: "apple/mobilevit-small".

    The format is detected from the keys. A hub id ("owner/name" or "owner/name@revision") is looked up in the local
    cache of huggingface_hub, and downloaded only with `download=True`.

    Raises:
        WeightsError: not found, not downloaded, unsafe, truncated, another architecture, missing or surplus keys, or
            another number of classes than `num_classes`, if that is given.
    """
    path = _locate(os.fspath(source), download)
    stored, metadata = _read_tensors(path)
    if OTHER in metadata:
        name = parse_json(path, metadata[OTHER]).get("network")
        raise WeightsError(f"{path}: weights of {name}, trained for a comparison; give weights of MobileViT")
    format, task = detect_format(path, stored)
    described = describe(path, format, task, stored, metadata)
    if described.architecture is None:
        layout = closest_layout(format, task, described.head, stored)
    else:
        layout = Layout(format, described.architecture, task, described.head)
    weights = Weights(
        architecture=layout.architecture,
        tensors=to_standard(path, layout, stored, bgr=described.bgr),
        preprocessing=described.preprocessing,
        output_stride=described.output_stride,
        training=described.training,
        has_description=described.source is not None,
        task=described.task or task,
        head=described.head,
    )
    classifier = key_names(layout)[CLASSIFIERS[task]][0]
    if num_classes is not None and num_classes != weights.num_classes:
        reset = "reset_classifier" if task == "classify" else "reset_classes"
        raise WeightsError(
            f"{path}: key {classifier} has {weights.num_classes} classes, expected {num_classes}; load it without "
            f"num_classes and call {reset}({num_classes}) to train a new classifier"
        )
    if described.class_names is None:
        return with_published_names(weights)
    if described.class_names and len(described.class_names) != weights.num_classes:
        raise WeightsError(
            f"{path}: {classifier} has {weights.num_classes} classes, but there are {len(described.class_names)} class "
            f"names; fix the class names in its {described.source}"
        )
    return replace(
        weights,
        class_names=described.class_names,
        category_ids=described.category_ids,
        thresholds=described.thresholds,
        calibration=described.calibration,
    )


def to_weights(source: Weights | str | os.PathLike[str], *, download: bool = False) -> Weights:
    """`source` itself if it is `Weights`, else `read(source)`.

    Raises:
        WeightsError: see `read`.
        TypeError: `source` of another type, for example a model.
    """
    if isinstance(source, Weights):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"weights are a {type(source).__name__}; give a path, a hub id or Weights "
            "(mobilevit.save(model, path) writes a model to a path)"
        )
    return read(source, download=download)


def write(weights: Weights, path: str | os.PathLike[str], format: Format = "mobilevit") -> None:
    """Write `weights` atomically to `path`: a .safetensors or .pt file, or a folder for transformers.

    Raises:
        WeightsError: `format` cannot express these weights, or `path` has the wrong ending for it.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111
    if format not in FORMATS:
        raise WeightsError(f"format is {format!r}; it can be {', '.join(FORMATS)}")
    if format not in TASK_FORMATS[weights.task]:
        formats = " or ".join(TASK_FORMATS[weights.task])
        raise WeightsError(
            f"{path}: not written: {FORMAT_NAMES[format]} format has no MobileViT for the task {weights.task!r}; "
            f"write {formats}"
        )
    if format == "transformers" and path.suffix in _SUFFIXES:
        raise WeightsError(f"{path}: {FORMAT_NAMES[format]} format is a folder; give a folder")
    if format != "transformers" and path.suffix not in _ENDINGS[format]:
        raise WeightsError(f"{path}: the file name must end in {' or '.join(_ENDINGS[format])} for format {format}")
    if format in ("apple", "timm"):
        check_published(weights, format)
    layout_task = "classify" if weights.task == "multilabel" else weights.task  # the tensors are the same
    tensors = from_standard(Layout(format, weights.architecture, layout_task, weights.head), weights.tensors)
    if format == "apple":
        write_atomic(path, lambda target: torch.save(tensors, target))
        return
    metadata = {"format": "pt"}
    if format == "transformers":
        configs = {
            "config.json": transformers_config(weights),
            "preprocessor_config.json": transformers_processor(weights),
        }
        for name, values in configs.items():
            write_atomic(path / name, json.dumps(values, indent=2) + "\n")
        path = path / "model.safetensors"
    else:
        metadata[METADATA] = json.dumps(metadata_of(weights))
    # Not written by safetensors: Python's errors name the cause, for example a full disk.
    write_atomic(path, to_safetensors(tensors, metadata))


def to_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Serialize to the .safetensors format, deterministically. The library writes the metadata in random order."""
    content = safetensors.torch.save(tensors)
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": metadata, **json.loads(content[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def _locate(source: str, download: bool) -> Path:
    """The file with the tensors."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path.expanduser fails for a file named ~weights.pt
    if path.is_dir():
        for name in hub.WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if len(files) == 1:
            return files[0]
        raise WeightsError(
            f"{path}: a folder of weights must contain {' or '.join(hub.WEIGHT_FILES)}; "
            + (f"found {', '.join(p.name for p in files)}: give one of them" if files else "found neither")
        )
    if path.exists():
        return path
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings)
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", source)
    if hub_id and path.suffix not in _SUFFIXES:
        try:
            return hub.find_model(hub_id[1], hub_id[2], download=download)
        except hub.HubError as error:
            if path.parent.is_dir() and not download:
                raise WeightsError(f"{source}: no such file or folder in {path.parent}; {hint}check the name") from None
            raise WeightsError(f"{error}{'; ' if hint else ''}{hint.strip()}") from None
    raise WeightsError(f"{source}: no such file or folder; {hint}a model on the hub has the form owner/name")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and the metadata of a .safetensors file. The format is detected from the first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from None
    if not start.startswith((b"PK", b"\x80")):
        raise WeightsError(
            f"{path}: neither a .safetensors file nor one of torch.save; give a file of weights (an exported artifact "
            "is not one)"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise _damaged(path, error) from None
        match = re.search(r"GLOBAL ([\w.]+)|(?:class|type|function)\s+'?([\w.]+)", str(error))
        name = (match[1] or match[2]) if match else "an object"
        raise WeightsError(
            f"{path}: not loaded, because loading would run code ({name}); get the weights as .safetensors, or save "
            "the state_dict again in an environment where you trust the file"
        ) from None
    except Exception as error:  # a damaged archive: RuntimeError, EOFError, KeyError, ValueError...
        raise _damaged(path, error) from None
    for container in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(container), dict):
            loaded = loaded[container]
    if not isinstance(loaded, dict):
        problem = type(loaded).__name__
    elif not loaded:
        problem = "an empty dict"
    elif wrong := [key for key, value in loaded.items() if not (isinstance(key, str) and _is_dense(value))]:
        kind = type(loaded[wrong[0]]).__name__
        problem = f"{len(wrong)} of {len(loaded)} entries of another kind, first {wrong[0]!r}: {kind}"
    else:
        prefix = "module." if all(key.startswith("module.") for key in loaded) else ""  # of DistributedDataParallel
        return {key.removeprefix(prefix): value for key, value in loaded.items()}, {}
    raise WeightsError(f"{path}: found {problem}, expected a state_dict (names to dense tensors); save only that")


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _damaged(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path}: truncated or damaged ({first_line(error)}); download or copy it again")
