"""Teachers for knowledge distillation: frozen classifiers of this package, of other libraries, or in an ONNX file."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mobilevit.files import require
from mobilevit.images import Preprocessing, first_line
from mobilevit.messages import join_names, nearest
from mobilevit.weights import OTHER, Weights, imagenet_class_names, to_weights
from mobilevit.weights.record import hash_tensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Color = tuple[float, float, float]


@dataclass(frozen=True)
class TeacherNetwork:
    """A classifier as read from its source.

    Attributes:
        network: normalized RGB images (B, 3, H, W) -> logits (B, num_classes).
        mean, std: normalization of its input, for images in [0, 1].
        class_names: empty if unknown.
        size_px: the input size if the network accepts only one, else 0.
        name: for messages and the report.
    """

    network: nn.Module
    name: str
    class_names: tuple[str, ...] = ()
    mean: Color = (0.0, 0.0, 0.0)
    std: Color = (1.0, 1.0, 1.0)
    size_px: int = 0


class Teacher(nn.Module):
    """A frozen classifier: inputs of the student (B, 3, H, W) -> logits (B, C) and features (B, D).

    The features are the input of the last linear layer. Always in eval mode and without gradients.

    Args:
        source: the classifier. A module is copied, expects images in [0, 1], and has no class names; describe another
            one by a `TeacherNetwork`.
        size_px: input size, to which images are resized; 0: that of the images.
        sizes_px: sizes that the images will have; the network is tried with them, or with `size_px`.
        inputs: the preprocessing of the student; its normalization is replaced by the teacher's.

    Attributes:
        num_features: D, or 0 if the output is not that of a linear layer; the features are then the logits.

    Raises:
        ValueError: a network that does not accept images of these sizes, does not return logits (B, C), or has another
            number of class names.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        source: TeacherNetwork | nn.Module,
        *,
        size_px: int = 0,
        sizes_px: Sequence[int] = (64,),
        inputs: Preprocessing | None = None,
    ):
        super().__init__()
        if isinstance(source, nn.Module):
            source = TeacherNetwork(source, type(source).__name__)
        if source.size_px and size_px and source.size_px != size_px:
            raise ValueError(
                f"the input size of the teacher is {size_px} px, but {source.name} accepts {source.size_px} px only; "
                f"set distill.size_px to {source.size_px}"
            )
        self.name, self.class_names = source.name, source.class_names
        self.num_classes, path = 0, ""
        self.size_px = size_px or source.size_px
        inputs = inputs or Preprocessing()
        mean, std, input_mean, input_std = (
            torch.tensor(values)[:, None, None] for values in (source.mean, source.std, inputs.mean, inputs.std)
        )
        # (x * input_std + input_mean - mean) / std
        self.register_buffer("scale", input_std / std)
        self.register_buffer("shift", (input_mean - mean) / std)
        network = copy.deepcopy(source.network).cpu().float().eval().requires_grad_(False)
        self.network = network.to(memory_format=torch.channels_last)  # the layout of the images
        sizes_px = (self.size_px,) if self.size_px else sizes_px
        for px in sorted(set(sizes_px)):
            self.num_classes, path = self._probe(torch.zeros(2, 3, px, px))
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"teacher {self.name}: has {self.num_classes} outputs, but {len(self.class_names)} class names; give "
                "one name per output"
            )
        self.classifier: nn.Module = nn.Identity()
        self.num_features = 0
        if path:  # the network without its classifier returns the features
            classifier = self.network.get_submodule(path)
            assert isinstance(classifier, nn.Linear)
            self.classifier, self.num_features = classifier, classifier.in_features
            parent, _, name = path.rpartition(".")
            setattr(self.network.get_submodule(parent), name, nn.Identity())
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.size_px and images.shape[-2:] != (self.size_px, self.size_px):
            images = F.interpolate(images, (self.size_px, self.size_px), mode="bilinear", antialias=True)
        features = self.network(images * self.scale + self.shift)
        return self.classifier(features), features

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the weights, the normalization and the classes."""
        digest = hashlib.sha256(repr((self.class_names, self.size_px)).encode())
        hash_tensors(digest, self.state_dict())
        return digest.hexdigest()[:16]

    def _probe(self, images: Tensor) -> tuple[int, str]:
        """The number of classes, and the path of the linear layer whose output the network returns, or ""."""
        outputs: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, path=path: outputs.update({path: output}))
            for path, module in self.network.named_modules()
            if isinstance(module, nn.Linear)
        ]
        size_px = images.shape[-1]
        try:
            with torch.no_grad():
                logits = self.network(images)
        except Exception as error:  # whatever a network of another library raises
            raise ValueError(
                f"teacher {self.name}: cannot process images of {size_px} px ({first_line(error)}); set its input size "
                "with distill.size_px"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"teacher {self.name}: returns {found}, not logits (B, C); give a classifier")
        return logits.shape[1], next((path for path, output in outputs.items() if output is logits), "")


def read_teacher(source: str | os.PathLike[str], *, download: bool = False) -> TeacherNetwork:
    """A teacher from weights that `mobilevit.weights.read` reads, a model of another library, or an ONNX file.

    Args:
        source: a file, folder or hub id of MobileViT; "timm:NAME" or "torchvision:NAME" for a published model, with
            "@FILE" for weights in a local file; or a file with the ending .onnx.
        download: fetch published weights that are not in the local cache.

    Raises:
        ValueError: not found, not a classifier, weights of another model, or a library that is not installed.
    """
    text = os.fspath(source)
    library, separator, rest = text.partition(":")
    if separator and library in ("timm", "torchvision"):
        name, _, file = rest.partition("@")
        return _read_library_model(library, name, Path(file) if file else None, download)
    if text.endswith(".onnx"):
        return _read_onnx(Path(text))
    _check_prefix(text)
    return teacher_from_weights(to_weights(source, download=download), text)


def _check_prefix(text: str) -> None:
    """Raises ValueError for the name of a model of timm or torchvision without the library's prefix."""
    name, separator, file = text.partition("@")
    if Path(text).exists() or "/" in name:
        return
    if importlib.util.find_spec("timm") and require("timm", "compare", "a teacher from timm").is_model(name):
        raise ValueError(f"teacher {text}: is a model of timm; write timm:{name}{separator}{file}")
    if name in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"teacher {text}: is a model of torchvision; write torchvision:{name}{separator}{file}")


def teacher_from_weights(weights: Weights, name: str = "") -> TeacherNetwork:
    """A teacher with MobileViT `weights`. Raises ValueError for weights of another task or without classes."""
    name = name or weights.name
    if weights.task != "classify":
        raise ValueError(f"teacher {name}: weights for the task {weights.task!r}; give those of a classifier")
    if not weights.num_classes:
        raise ValueError(f"teacher {name}: has no classifier; give weights with classes")
    preprocessing = weights.preprocessing
    return TeacherNetwork(weights.build(), name, weights.class_names, preprocessing.mean, preprocessing.std)


def _read_library_model(library: str, name: str, file: Path | None, download: bool) -> TeacherNetwork:
    text = f"{library}:{name}" + (f"@{file}" if file else "")
    timm = require("timm", "compare", "a teacher from timm") if library == "timm" else None
    names = timm.list_models() if timm else torchvision.models.list_models(torchvision.models)
    if not (timm.is_model(name) if timm else name in names):
        hint = nearest(name, names)
        raise ValueError(f"teacher {text}: {library} has no such model; {hint}list_models() of {library} lists them")
    if file is None and not download:
        raise ValueError(
            f"teacher {text}: its published weights are not downloaded; add --download, or name a local file, "
            f"{text}@FILE"
        )
    tensors, class_names = _read_state_dict(file) if file else ({}, ())

    def build(**options: Any) -> nn.Module:
        with _errors_of(text):
            if timm:
                return timm.create_model(name, pretrained=file is None, **options)
            if file and name in ("googlenet", "inception_v3"):  # as torchvision does with its published weights
                options["transform_input"] = True
            return torchvision.models.get_model(name, weights=None if file else "DEFAULT", **options)

    network = build()
    if file:
        network = build(num_classes=_num_classes(file, tensors, network))
        network.load_state_dict(_match(tensors, network.state_dict(), text))
    if timm:
        config: Any = network.pretrained_cfg
        mean, std = config["mean"], config["std"]
        size_px = config["input_size"][-1] if config.get("fixed_input_size") else 0
    else:
        mean, std, size_px = IMAGENET_MEAN, IMAGENET_STD, getattr(network, "image_size", 0)
    if not class_names and _last_linear(network)[1] == 1000:
        class_names = imagenet_class_names()
    return TeacherNetwork(network, text, class_names, mean, std, size_px)


def _read_state_dict(file: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a file and the class names in its metadata, if this package has written it."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it should contain the weights of the teacher")
    class_names: tuple[str, ...] = ()
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            class_names = tuple(json.loads(metadata[OTHER])["class_names"]) if OTHER in metadata else ()
            state: Any = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text advises to load the file without protection
        raise ValueError(f"{file}: not weights, or it contains more than tensors; give a state_dict") from None
    except Exception as error:  # torch.load raises nearly anything
        raise ValueError(f"{file}: cannot be read as weights of a network ({first_line(error)})") from None
    for key in ("state_dict", "model"):  # training scripts save these around the tensors
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise ValueError(f"{file}: contains no tensors of a network; give a file with a state dict")
    return dict(state), class_names


def _last_linear(network: nn.Module) -> tuple[str, int]:
    """The path and the number of outputs of the last linear layer, ("", 0) without one."""
    layers = [(path, layer.out_features) for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    return layers[-1] if layers else ("", 0)


def _num_classes(file: Path, tensors: Mapping[str, Tensor], network: nn.Module) -> int:
    """The number of rows of the classifier: by its name in `network`, or the last tensor of a file with other names."""
    weight = tensors.get(f"{_last_linear(network)[0]}.weight")
    if weight is not None:
        return len(weight)
    last = list(tensors.values())[-1]
    if last.ndim != 1:
        raise ValueError(f"{file}: its last tensor has shape {tuple(last.shape)}, not (num_classes,); not a classifier")
    return len(last)


def _match(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """`tensors` under the names of `expected`: equal names, or else equal shapes in the same order."""
    if tensors.keys() == expected.keys():
        tensors = {key: tensors[key] for key in expected}
    shapes = [tuple(x.shape) for x in tensors.values()]
    if shapes != [tuple(x.shape) for x in expected.values()]:
        missing = [key for key in expected if key not in tensors]
        raise ValueError(
            f"teacher {name}: the file has {len(tensors)} tensors that are not those of the model ({len(expected)}); "
            f"{f'it lacks {missing[0]}' if missing else 'their shapes differ'}; name the model that the file is from"
        )
    return dict(zip(expected, tensors.values(), strict=True))


class OnnxNetwork(nn.Module):
    """An ONNX classifier, run by ONNX Runtime on the CPU."""

    def __init__(self, session: Any, content: bytes):
        super().__init__()
        self.session = session
        self.input_name = session.get_inputs()[0].name
        digest = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        self.register_buffer("digest", digest)  # so that `Teacher.fingerprint` covers the weights

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxNetwork:
        return self  # sessions cannot be copied, and do not change

    def forward(self, images: Tensor) -> Tensor:
        (logits, *_) = self.session.run(None, {self.input_name: images.float().cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)


def _read_onnx(file: Path) -> TeacherNetwork:
    """An artifact of `mobilevit export`, or another ONNX classifier for normalized images (B, 3, H, W)."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it should contain the network of the teacher")
    runtime = require("onnxruntime", "onnx", "a teacher in an ONNX file")
    content = file.read_bytes()
    with _errors_of(str(file)):
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (image, *others) = session.get_inputs()
    shape = image.shape
    if others or image.type != "tensor(float)" or len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"teacher {file}: its input is {image.type} {shape}; a teacher takes one float (B, 3, H, W)")
    if shape[0] == 1:
        raise ValueError(
            f"teacher {file}: its batch size is fixed to 1; export it with a dynamic batch (--dynamic-batch)"
        )
    metadata = session.get_modelmeta().custom_metadata_map
    if metadata.get("task", "classify") != "classify":
        raise ValueError(f"teacher {file}: is for the task {metadata['task']!r}; give a classifier")
    default = json.dumps({"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    preprocessing = json.loads(metadata.get("preprocessing", default))
    return TeacherNetwork(
        OnnxNetwork(session, content),
        str(file),
        tuple(json.loads(metadata.get("class_names", "[]"))),
        tuple(preprocessing["mean"]),
        tuple(preprocessing["std"]),
        shape[2] if isinstance(shape[2], int) else 0,
    )


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # libraries raise nearly anything: network, cache, arguments
        raise ValueError(f"teacher {name}: cannot be built ({first_line(error)})") from error


def match_classes(teacher: Sequence[str], student: Sequence[str], name: str) -> list[int]:
    """Indices of the student's classes among those of the teacher, matched by name.

    Raises:
        ValueError: a teacher without class names, or a class that the teacher does not have.
    """
    if not teacher:
        raise ValueError(
            f"teacher {name}: its class names are unknown, so its outputs cannot be matched with the classes of the "
            "data; distil its features only (--distill.soft-weight 0 --distill.feature-weight 1)"
        )
    index_of = {class_name: index for index, class_name in enumerate(teacher)}
    missing = [class_name for class_name in student if class_name not in index_of]
    if missing:
        raise ValueError(
            f"teacher {name}: {len(missing)} of the {len(student)} classes of the data are not among its "
            f"{len(teacher)} classes ({join_names(teacher)}): {join_names(missing)}; fine-tune it on these classes, or "
            "distil its features only (--distill.soft-weight 0 --distill.feature-weight 1)"
        )
    return [index_of[class_name] for class_name in student]
