"""Weights in the four formats in use: read, write, and what travels with them.

| format | what it is | channel order | carries preprocessing and class names |
|---|---|---|---|
| mobilevit | one .safetensors file of ours | RGB | yes, in its metadata |
| apple | the released code's .pt, a pickled state_dict | BGR (but see `_is_bgr`) | no |
| timm | one .safetensors file, or a hub folder with config.json | RGB | yes, in config.json or in metadata of ours |
| transformers | a folder: config.json, preprocessor_config.json, weights | BGR | yes |

Ours and Apple's have networks for all three tasks; see `TASK_FORMATS`.

`read` takes any of them to `Weights`: our names, RGB, everything that is needed to use them. `write` is the way back.
Nothing outside this file knows that other formats exist.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mobilevit.files import write_whole
from mobilevit.hub import unreachable
from mobilevit.images import FILTERS, Preprocessing, first_line
from mobilevit.models.deeplabv3 import LATER_HEAD, PAPER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import ARCHITECTURES, Architecture, MobileViT, Stage, Transformer
from mobilevit.models.ssdlite import EXTRA_CHANNELS, HEAD_CHANNELS, NUM_ANCHORS, SSDLite

Format = Literal["mobilevit", "apple", "timm", "transformers"]
FORMATS: tuple[Format, ...] = get_args(Format)
TaskName = Literal["classify", "detect", "segment"]
STEM = "backbone.stem.conv.weight"
OTHER = "mobilevit.other"  # in the metadata of a file: what it says of a network that is no MobileViT
# A tensor whose number of rows tells the number of classes.
CLASSIFIERS: dict[TaskName, str] = {
    "classify": "classifier.weight",
    "detect": f"heads.{len(NUM_ANCHORS) - 1}.out.weight",
    "segment": "classifier.weight",
}
# Which formats have a network for the task.
TASK_FORMATS: dict[TaskName, tuple[Format, ...]] = {
    "classify": FORMATS,
    "detect": ("mobilevit", "apple"),
    "segment": ("mobilevit", "apple", "transformers"),
}
PUBLISHED_STRIDES = {PAPER_HEAD: 16, LATER_HEAD: 8}  # output strides of Apple's two segmentation networks
NETWORKS: dict[TaskName, type[nn.Module]] = {"classify": MobileViT, "detect": SSDLite, "segment": DeepLabV3}
Network = TypeVar("Network", bound=nn.Module)

# What is assumed where a file says nothing: the evaluation of the paper, and timm's entry for these weights. Detection
# and segmentation warp the whole image to a square, since they have to answer for its margins too.
PAPER_PREPROCESSING = Preprocessing(resize_px=288, crop_px=256, interpolation="bilinear")
TIMM_PREPROCESSING = Preprocessing(resize_px=284, crop_px=256, interpolation="bicubic")
DETECTION_PREPROCESSING = Preprocessing(resize_px=(320, 320), crop_px=320, interpolation="bilinear")
SEGMENTATION_PREPROCESSING = Preprocessing(resize_px=(512, 512), crop_px=512, interpolation="bilinear")
PREPROCESSING: dict[TaskName, Preprocessing] = {
    "classify": PAPER_PREPROCESSING,
    "detect": DETECTION_PREPROCESSING,
    "segment": SEGMENTATION_PREPROCESSING,
}


class WeightsError(ValueError):
    """Weights that cannot be used; one line: the file, the key, what was found, what was expected, the remedy."""


@dataclass(frozen=True)
class Weights:
    """Tensors under our own names, stem in RGB order, and all that is needed to use them.

    `class_names` is empty where nobody said; the background of a detector has no name, that of a segmentation network
    is a class like the others. `category_ids` are the numbers that COCO's annotations of a detector's classes have,
    which may have holes; empty where nobody said. `training` is free JSON about how the weights came to be. `head`
    describes what stands on the backbone of a segmentation network, and is None for the other tasks.

    Raises:
        ValueError: an unknown task, a segmentation network without `head` or another one with it, a detector with an
            output stride other than 32, ids of anything but the named classes of a detector.
    """

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    preprocessing: Preprocessing = PAPER_PREPROCESSING
    class_names: tuple[str, ...] = ()
    output_stride: int = 32
    training: Mapping[str, Any] = field(default_factory=dict)
    described: bool = True  # False where a file said nothing and the published preprocessing is assumed
    task: TaskName = "classify"
    head: DeepLabHead | None = None
    category_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.task not in NETWORKS:
            raise ValueError(f"task is {self.task!r}; it can be {', '.join(NETWORKS)}")
        if (self.head is not None) != (self.task == "segment"):
            raise ValueError(f"head is {self.head} for the task {self.task!r}; it belongs to segmentation, and alone")
        if self.task == "detect" and self.output_stride != 32:
            raise ValueError(f"output_stride is {self.output_stride}; that of a detector is always 32")
        if self.category_ids and (self.task != "detect" or len(self.category_ids) != len(self.class_names)):
            raise ValueError(
                f"category_ids are {len(self.category_ids)} for {len(self.class_names)} class names and the task "
                f"{self.task!r}; give one for each named class of a detector, or none"
            )

    @property
    def name(self) -> str:
        """What the network is called, "MobileViT-XXS"."""
        return f"MobileViT-{self.architecture.name.upper()}"

    @property
    def val_fraction(self) -> float | None:
        """The fraction of the training data that validates, where they come undivided; None where nobody said."""
        return self.training.get("recipe", {}).get("data", {}).get("val_fraction")

    @property
    def num_classes(self) -> int:
        """How many classes there are, the background of a detector not counted; 0 without a classifier."""
        classifier = self.tensors.get(CLASSIFIERS[self.task])
        if classifier is None:
            return 0
        return classifier.shape[0] // NUM_ANCHORS[-1] - 5 if self.task == "detect" else classifier.shape[0]

    @overload
    def build(self) -> Any: ...
    @overload
    def build(self, network: type[Network]) -> Network: ...
    def build(self, network: type[nn.Module] | None = None) -> nn.Module:
        """The network with these weights, float32, in eval mode.

        It is a `MobileViT`, `SSDLite` or `DeepLabV3`, as the task says, or the class derived from it that `network` is.

        Raises:
            WeightsError: `network` is for another task.
        """
        made = NETWORKS[self.task]
        network = network or made
        if not issubclass(network, made):
            raise WeightsError(f"weights for the task {self.task!r} make a {made.__name__}, not a {network.__name__}")
        options: dict[str, Any] = {} if self.task == "detect" else {"output_stride": self.output_stride}
        if self.head is not None:
            options["head"] = self.head
        # Built without memory first: initial values that are overwritten at once cost time and random numbers.
        with torch.device("meta"):
            model = network(self.architecture, num_classes=self.num_classes, **options)
        # As `to_empty(device="cpu")`, which imports sympy to compute the strides: a fifth of `import torch`.
        model._apply(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype))
        model.load_state_dict(self.tensors)
        return model.eval()


def backbone_tensors(weights: Weights) -> dict[str, Tensor]:
    """The tensors of the backbone under its own names, from weights of any task.

    They are what `load_state_dict` of the `backbone` of another network takes, so that a detector can start from a
    classifier.
    """
    prefix = "backbone."
    return {key.removeprefix(prefix): value for key, value in weights.tensors.items() if key.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# Names: one row a module, one column a format


def _modules(a: Architecture, task: TaskName, head: DeepLabHead | None) -> Iterator[tuple[str, str, str, str, str]]:
    """(kind, mobilevit, apple, timm, transformers) prefixes of every module with parameters.

    "" stands where a format has no name, since it has no network for the task.
    """
    encoder = "" if task == "classify" else "encoder."
    yield "conv_norm", "backbone.stem", f"{encoder}conv_1.block", "stem", "mobilevit.conv_stem"
    for i, stage in enumerate(a.stages, start=1):
        ours, apple, timm = f"backbone.stage{i}", f"{encoder}layer_{i}", f"stages.{i - 1}"
        hf = f"mobilevit.encoder.layer.{i - 1}"
        for j in range(stage.num_residuals):
            hf_residual = f"{hf}.downsampling_layer" if stage.transformer else f"{hf}.layer.{j}"
            for o, p, t, h in (
                ("expand", "exp_1x1", "conv1_1x1", "expand_1x1"),
                ("depthwise", "conv_3x3", "conv2_kxk", "conv_3x3"),
                ("reduce", "red_1x1", "conv3_1x1", "reduce_1x1"),
            ):
                yield (
                    "conv_norm",
                    f"{ours}.{j}.{o}",
                    f"{apple}.{j}.block.{p}.block",
                    f"{timm}.{j}.{t}",
                    f"{hf_residual}.{h}",
                )
        if stage.transformer is None:
            continue
        ours, apple, timm = (f"{prefix}.{stage.num_residuals}" for prefix in (ours, apple, timm))
        yield "conv_norm", f"{ours}.local", f"{apple}.local_rep.conv_3x3.block", f"{timm}.conv_kxk", f"{hf}.conv_kxk"
        yield (
            "weight",
            f"{ours}.to_tokens",
            f"{apple}.local_rep.conv_1x1.block.conv",
            f"{timm}.conv_1x1",
            f"{hf}.conv_1x1.convolution",
        )
        for k in range(stage.transformer.num_layers):
            o, p, t, h = (
                f"{ours}.layers.{k}",
                f"{apple}.global_rep.{k}",
                f"{timm}.transformer.{k}",
                f"{hf}.transformer.layer.{k}",
            )
            mha, ffn = f"{p}.pre_norm_mha", f"{p}.pre_norm_ffn"
            yield "affine", f"{o}.attention_norm", f"{mha}.0", f"{t}.norm1", f"{h}.layernorm_before"
            yield "qkv", f"{o}.attention.qkv", f"{mha}.1.qkv_proj", f"{t}.attn.qkv", f"{h}.attention.attention"
            yield "affine", f"{o}.attention.out", f"{mha}.1.out_proj", f"{t}.attn.proj", f"{h}.attention.output.dense"
            yield "affine", f"{o}.ffn_norm", f"{ffn}.0", f"{t}.norm2", f"{h}.layernorm_after"
            yield "affine", f"{o}.ffn_in", f"{ffn}.1", f"{t}.mlp.fc1", f"{h}.intermediate.dense"
            yield "affine", f"{o}.ffn_out", f"{ffn}.4", f"{t}.mlp.fc2", f"{h}.output.dense"
        last = f"{apple}.global_rep.{stage.transformer.num_layers}"
        yield "affine", f"{ours}.norm", last, f"{timm}.norm", f"{hf}.layernorm"
        yield (
            "conv_norm",
            f"{ours}.from_tokens",
            f"{apple}.conv_proj.block",
            f"{timm}.conv_proj",
            f"{hf}.conv_projection",
        )
        yield "conv_norm", f"{ours}.fuse", f"{apple}.fusion.block", f"{timm}.conv_fusion", f"{hf}.fusion"
    if task == "detect":
        yield from _modules_of_ssdlite(a)
    elif head is not None:
        yield from _modules_of_deeplabv3(head)
    else:
        yield "conv_norm", "head", "conv_1x1_exp.block", "final_conv", "mobilevit.conv_1x1_exp"
        yield "affine", "classifier", "classifier.fc", "head.fc", "classifier"


def _modules_of_ssdlite(a: Architecture) -> Iterator[tuple[str, str, str, str, str]]:
    for i in range(len(EXTRA_CHANNELS)):
        ours, apple = f"extra_layers.{i}", f"extra_layers.os_{64 << i}"
        yield "conv_norm", f"{ours}.depthwise", f"{apple}.dw_conv.block", "", ""
        yield "conv_norm", f"{ours}.pointwise", f"{apple}.pw_conv.block", "", ""
    yield "weight", "pooled", "extra_layers.os_-1.1.block.conv", "", ""
    in_channels = (a.stages[3].channels, a.stages[4].channels, *EXTRA_CHANNELS)
    for i, (width, channels) in enumerate(zip(in_channels, HEAD_CHANNELS, strict=True)):
        ours, apple = f"heads.{i}", f"ssd_heads.{i}"
        if width != channels:
            yield "conv_norm", f"{ours}.project", f"{apple}.proj_layer.block", "", ""
        yield "conv_norm", f"{ours}.depthwise", f"{apple}.loc_cls_layer.dw_conv.block", "", ""
        yield "affine", f"{ours}.out", f"{apple}.loc_cls_layer.pw_conv.block.conv", "", ""
    last = len(HEAD_CHANNELS)
    yield "affine", f"heads.{last}.out", f"ssd_heads.{last}.loc_cls_layer.block.conv", "", ""


def _modules_of_deeplabv3(head: DeepLabHead) -> Iterator[tuple[str, str, str, str, str]]:
    apple, hf = "seg_head.aspp.aspp_layer", "segmentation_head.aspp"
    last = 1 + len(head.rates)
    for i in range(last):
        yield "conv_norm", f"pyramid.convs.{i}", f"{apple}.convs.{i}.block", "", f"{hf}.convs.{i}"
    pooled = f"convs.{last}"
    yield "conv_norm", "pyramid.pooled", f"{apple}.{pooled}.aspp_pool.conv_1x1.block", "", f"{hf}.{pooled}.conv_1x1"
    yield "conv_norm", "pyramid.project", f"{apple}.project.block", "", f"{hf}.project"
    # What tells Apple's two releases apart.
    classifier = "classifier.block.conv" if _is_later(head) else "classifier.classifier.block.conv"
    yield "affine", "classifier", f"seg_head.{classifier}", "", "segmentation_head.classifier.convolution"
    if head.auxiliary_channels:
        yield "conv_norm", "auxiliary.project", "seg_head.aux_head.0.block", "", ""
        yield "affine", "auxiliary.classifier", "seg_head.aux_head.2.block.conv", "", ""


def _is_later(head: DeepLabHead | None) -> bool:
    return head is not None and replace(head, dropout=LATER_HEAD.dropout) == LATER_HEAD


def _is_bgr(format: Format, head: DeepLabHead | None) -> bool:
    """Whether published weights of this format expect blue first; Apple went over to RGB after the paper's release."""
    return format == "transformers" or (format == "apple" and not _is_later(head))


_CONV_NORM = {
    # ours and Apple's, timm's, transformers' name of the two parts
    "conv": ("conv", "conv", "conv", "convolution"),
    "norm": ("norm", "norm", "bn", "normalization"),
}
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def key_names(
    architecture: Architecture, format: Format, task: TaskName = "classify", head: DeepLabHead | None = None
) -> dict[str, tuple[str, ...]]:
    """Each of our keys -> the key in `format`; three keys (query, key, value) where `format` keeps them apart."""
    column = FORMATS.index(format)
    names: dict[str, tuple[str, ...]] = {}
    for kind, *prefixes in _modules(architecture, task, head):
        ours, theirs = prefixes[0], prefixes[column]
        if kind == "conv_norm":
            for part, leaves in (("conv", ("weight",)), ("norm", _BATCH_NORM)):
                for leaf in leaves:
                    names[f"{ours}.{part}.{leaf}"] = (f"{theirs}.{_CONV_NORM[part][column]}.{leaf}",)
        else:
            for leaf in ("weight",) if kind == "weight" else ("weight", "bias"):
                split = kind == "qkv" and format == "transformers"
                parts = [f"{theirs}.{part}" for part in ("query", "key", "value")] if split else [theirs]
                names[f"{ours}.{leaf}"] = tuple(f"{part}.{leaf}" for part in parts)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Read


def read(source: str | os.PathLike[str], *, download: bool = False, num_classes: int | None = None) -> Weights:
    """Weights from a file, a folder in transformers' or timm's layout, or a hub id such as "apple/mobilevit-small".

    The format is recognised from the keys. A hub id ("owner/name" or "owner/name@revision") is looked for in the local
    cache of huggingface_hub, and fetched only with `download=True`. A classifier of another size than `num_classes`,
    where that is given, is an error.

    Raises:
        WeightsError: not found, not fetched, unsafe, truncated, of another architecture, with missing or surplus keys,
            with another number of classes.
    """
    path = _locate(os.fspath(source), download)
    stored, metadata = _read_tensors(path)
    if OTHER in metadata:
        name = _parse_json(path, metadata[OTHER]).get("network")
        raise WeightsError(f"{path}: weights of {name}, trained to compare with; give weights of MobileViT")
    format, task = _recognise(path, stored)
    described = _describe(path, format, task, stored, metadata)
    head = described.head
    architecture = described.architecture or _closest(format, task, head, stored)
    tensors = _to_ours(path, format, architecture, task, head, stored, described.bgr)
    weights = Weights(
        architecture=architecture,
        tensors=tensors,
        preprocessing=described.preprocessing,
        class_names=described.class_names or (),
        output_stride=described.output_stride,
        training=described.training,
        described=described.source is not None,
        task=task,
        head=head,
        category_ids=described.category_ids,
    )
    if described.class_names is None:  # published weights say nothing of their classes, but how many they are tells
        names, usual = _PUBLISHED_CLASSES[task]
        if weights.num_classes == usual:
            ids = coco_category_ids() if task == "detect" else ()
            weights = replace(weights, class_names=names(), category_ids=ids)
    classifier = key_names(architecture, format, task, head)[CLASSIFIERS[task]][0]
    if num_classes is not None and num_classes != weights.num_classes:
        reset = "reset_classifier" if task == "classify" else "reset_classes"
        raise WeightsError(
            f"{path}: key {classifier} has {weights.num_classes} classes, expected "
            f"{num_classes}; load it as it is and call {reset}({num_classes}) to train a new classifier"
        )
    if weights.class_names and len(weights.class_names) != weights.num_classes:
        raise WeightsError(
            f"{path}: {classifier} has {weights.num_classes} classes, but "
            f"{len(weights.class_names)} class names come with it; mend the class names in its {described.source}"
        )
    return weights


def to_weights(source: Weights | str | os.PathLike[str], *, download: bool = False) -> Weights:
    """`source` if it is `Weights`, else what `read` returns for it.

    Raises:
        WeightsError: as `read`.
        TypeError: `source` of another type, a model for example.
    """
    if isinstance(source, Weights):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"the weights are a {type(source).__name__}; give a path, a hub id or Weights "
            "(mobilevit.save(model, path) writes a model to a path)"
        )
    return read(source, download=download)


def imagenet_class_names() -> tuple[str, ...]:
    """The 1,000 names of ImageNet-1k in their usual order, from torchvision."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def coco_class_names() -> tuple[str, ...]:
    """The 80 names of COCO's boxes in their usual order, without background, from torchvision.

    torchvision keeps COCO's own numbers, which go up to 90 with gaps; published networks close the gaps.
    """
    return tuple(_coco_categories().values())


def coco_category_ids() -> tuple[int, ...]:
    """COCO's own numbers, 1 to 90 with gaps, of the classes that `coco_class_names` names."""
    return tuple(_coco_categories())


def _coco_categories() -> dict[int, str]:
    from torchvision.models.detection import SSD300_VGG16_Weights

    names = SSD300_VGG16_Weights.COCO_V1.meta["categories"]
    return {number: name for number, name in enumerate(names) if name not in ("__background__", "N/A")}


def voc_class_names() -> tuple[str, ...]:
    """The 20 names of PASCAL VOC in their usual order, from torchvision, behind "background"."""
    from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

    return "background", *DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:]


_PUBLISHED_CLASSES: dict[TaskName, tuple[Callable[[], tuple[str, ...]], int]] = {
    "classify": (imagenet_class_names, 1000),
    "detect": (coco_class_names, 80),
    "segment": (voc_class_names, 21),
}


def _locate(source: str, download: bool) -> Path:
    """The file that holds the tensors."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path's own stops at a file called ~weights.pt
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
        found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if len(found) == 1:
            return found[0]
        raise WeightsError(
            f"{path}: a folder of weights holds model.safetensors or pytorch_model.bin; "
            + (f"found {', '.join(p.name for p in found)}: name one of them" if found else "found neither")
        )
    if path.exists():
        return path
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", source)
    if hub_id and path.suffix not in _SUFFIXES:
        return _from_hub(hub_id[1], hub_id[2], download)
    raise WeightsError(f"{source}: no such file or folder, and not of the form owner/name of a model on the hub")


_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def _from_hub(repo_id: str, revision: str | None, download: bool) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    names = ("model.safetensors", "pytorch_model.bin")
    # Looked up as plain files: even with local_files_only the downloading functions may talk to the hub.
    for name in names:
        cached = hub.try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    if not download:
        raise WeightsError(
            f"{repo_id}: no such file or folder here, and not in the local cache of the hub; "
            "to fetch it from the hub say --download (in Python download=True)"
        )
    if reason := unreachable():
        raise WeightsError(
            f"{repo_id}: not in the local cache, and the hub cannot be reached ({reason}); check the connection, or "
            "fetch the folder elsewhere and give its path"
        )

    def fetch(name: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(repo_id, name, revision=revision))
        except LocalEntryNotFoundError:  # a kind of EntryNotFoundError, but it says that nobody could be asked
            raise
        except EntryNotFoundError:
            return None

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of every one of its tries
    try:
        # The small files first: with the weights in the cache, everything that belongs to them is there too.
        for name in ("config.json", "preprocessor_config.json"):
            fetch(name)
        found = fetch(names[0]) or fetch(names[1])
    except RepositoryNotFoundError:
        raise WeightsError(f"{repo_id}: the hub has no such model, or not for you; check the name") from None
    except Exception as error:  # whatever the network and its libraries come up with
        reason = "the hub cannot be reached" if isinstance(error, LocalEntryNotFoundError) else first_line(error)
        raise WeightsError(
            f"{repo_id}: could not be fetched ({reason}); try again later, or fetch the folder elsewhere "
            "and give its path"
        ) from None
    finally:
        logger.setLevel(level)
    if found is None:
        raise WeightsError(f"{repo_id}: the hub has neither {' nor '.join(names)} in it; is it a MobileViT?")
    licence = "weights by Apple under Apple's licence" if repo_id.startswith(("apple/", "timm/")) else "see its licence"
    print(f"{repo_id}: fetched; {licence}, on its model card", file=sys.stderr, flush=True)
    return found


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and the metadata of a .safetensors file; what the file is, its first bytes say."""
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise WeightsError(f"{path}: truncated or damaged ({first_line(error)}); fetch or copy it again") from None
    if not start.startswith((b"PK", b"\x80")):
        raise WeightsError(f"{path}: neither a .safetensors file nor one of torch.save; is it really weights?")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)|(?:class|type|function)\s+'?([\w.]+)", str(error))
        if "truncated" in str(error):
            raise WeightsError(f"{path}: truncated or damaged; fetch or copy it again") from None
        name = next((group for group in asked.groups() if group), "an object") if asked else "an object"
        raise WeightsError(
            f"{path}: refused, because reading it would run code ({name}); a weights file holds only tensors: "
            "get it as .safetensors, or save its state_dict again where you trust it"
        ) from None
    except Exception as error:  # a damaged archive: RuntimeError, EOFError, KeyError, ValueError...
        raise WeightsError(f"{path}: truncated or damaged ({first_line(error)}); fetch or copy it again") from None
    for container in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(container), dict):
            loaded = loaded[container]
    if not isinstance(loaded, dict):
        found = type(loaded).__name__
    elif not loaded:
        found = "an empty dict"
    elif wrong := [key for key, value in loaded.items() if not (isinstance(key, str) and _is_dense(value))]:
        kind = type(loaded[wrong[0]]).__name__
        found = f"{len(wrong)} of {len(loaded)} entries of another kind, first {wrong[0]!r}: {kind}"
    else:
        found = ""
    if found:
        raise WeightsError(f"{path}: found {found}, expected a state_dict (names to dense tensors); save that alone")
    prefix = "module." if all(key.startswith("module.") for key in loaded) else ""  # left by DistributedDataParallel
    return {key.removeprefix(prefix): value for key, value in loaded.items()}, {}


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _recognise(path: Path, stored: Mapping[str, Tensor]) -> tuple[Format, TaskName]:
    task = _task_of(stored)
    head = PAPER_HEAD if task == "segment" else None
    for format in TASK_FORMATS[task]:
        names = key_names(ARCHITECTURES["s"], format, task, head)
        stem = names[STEM][0]
        # The second key tells MobileViT from relatives that begin alike (MobileViTv2, other networks with a "stem").
        attention = names["backbone.stage3.1.layers.0.attention.qkv.weight"][0]
        if stem in stored and (attention in stored or format == "mobilevit"):
            return format, task
    if any(key.startswith(("encoder.conv_1.", "mobilevit.")) for key in stored):
        kind = (
            "a detection or segmentation network of Apple's without its head"
            if "encoder.conv_1.block.conv.weight" in stored
            else "no whole MobileViT"
        )
        raise WeightsError(f"{path}: {kind}; take the whole file from its source")
    raise WeightsError(
        f"{path}: not MobileViT in any of the four formats: {len(stored)} keys, first {next(iter(stored), 'none')}; "
        "give weights of MobileViT-XXS, XS or S from Apple, timm, transformers or this package"
    )


def _task_of(stored: Mapping[str, Tensor]) -> TaskName:
    """What a network is for, from the names that ours, Apple's and transformers' heads begin with."""
    if any(key.startswith(("heads.", "ssd_heads.")) for key in stored):
        return "detect"
    if any(key.startswith(("pyramid.", "seg_head.", "segmentation_head.")) for key in stored):
        return "segment"
    return "classify"


@dataclass(frozen=True)
class _Description:
    """What travels with the tensors, as far as the format tells."""

    preprocessing: Preprocessing
    bgr: bool
    source: str | None  # the part of the file that says it; None where nothing does, and all this is assumed
    architecture: Architecture | None = None
    class_names: tuple[str, ...] | None = None  # None: the format has no place for them
    output_stride: int = 32
    training: Mapping[str, Any] = field(default_factory=dict)
    head: DeepLabHead | None = None
    category_ids: tuple[int, ...] = ()


def _describe(
    path: Path, format: Format, task: TaskName, stored: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> _Description:
    if "mobilevit" in metadata:
        values = _parse_json(path, metadata["mobilevit"])
        with _naming(path, "metadata"):
            said = values.get("task", "classify")  # files of the first release are all classifiers
            if said != task:
                raise ValueError(f"task is {said!r}, but the keys are those of {task!r}")
            head = _head_from_dict(values["head"]) if task == "segment" else None
            ids = tuple(values.get("category_ids", ()))  # files from before there were any have none
            if ids and len(ids) != len(values["class_names"]):
                raise ValueError(f"{len(ids)} category_ids for {len(values['class_names'])} class_names")
            return _Description(
                source="metadata",
                bgr=_is_bgr(format, head),
                architecture=_architecture_from_dict(values["architecture"]),
                preprocessing=Preprocessing.from_dict(values["preprocessing"]),
                class_names=tuple(values["class_names"]),
                output_stride=values["output_stride"],
                training=values["training"],
                head=head,
                category_ids=ids,
            )
    config_path = path.with_name("config.json")
    in_hub_layout = path.name in ("model.safetensors", "pytorch_model.bin") and config_path.is_file()
    if format == "transformers" and in_hub_layout:
        return _describe_transformers(config_path, task)
    if format == "timm" and in_hub_layout:
        config = _parse_json(config_path, config_path.read_text(encoding="utf-8"))
        with _naming(config_path, "config"):
            names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
            return _Description(
                bgr=False,
                preprocessing=_preprocessing_from_timm(config.get("pretrained_cfg", {})),
                class_names=tuple(names) if names else None,
                source="config.json",
            )
    assumed = TIMM_PREPROCESSING if format == "timm" else PREPROCESSING[task]
    if task != "segment":
        return _Description(assumed, bgr=_is_bgr(format, None), source=None)
    # Dilations and output stride leave no trace in the tensors; but only two kinds of these networks were published.
    later = any(key.startswith(("auxiliary.", "seg_head.aux_head.", "seg_head.classifier.block.")) for key in stored)
    head = LATER_HEAD if later else PAPER_HEAD
    return _Description(
        assumed, bgr=_is_bgr(format, head), source=None, head=head, output_stride=PUBLISHED_STRIDES[head]
    )


def _describe_transformers(config_path: Path, task: TaskName) -> _Description:
    config = _parse_json(config_path, config_path.read_text(encoding="utf-8"))
    with _naming(config_path, "config"):
        architecture = _architecture_from_transformers(config)
        labels = {int(index): name for index, name in config.get("id2label", {}).items()}
        if sorted(labels) != list(range(len(labels))):
            raise ValueError(f"id2label numbers the classes {sorted(labels)[:6]}...; expected 0 to {len(labels) - 1}")
        class_names = tuple(labels[index] for index in range(len(labels)))
        # transformers' way to say that nobody named them
        if class_names == tuple(f"LABEL_{index}" for index in labels):
            class_names = ()
        output_stride = config.get("output_stride", 32)
        head = (
            DeepLabHead(
                channels=config.get("aspp_out_channels", 256),
                rates=tuple(config.get("atrous_rates", (6, 12, 18))),
                dropout=config.get("aspp_dropout_prob", 0.1),
            )
            if task == "segment"
            else None
        )
    preprocessing, bgr = PREPROCESSING[task], True
    processor_path = config_path.with_name("preprocessor_config.json")
    if processor_path.is_file():
        values = _parse_json(processor_path, processor_path.read_text(encoding="utf-8"))
        with _naming(processor_path, "preprocessing"):
            preprocessing = _preprocessing_from_transformers(values)
            if task == "segment" and isinstance(preprocessing.resize_px, int):
                # A crop from the middle would leave the margins of the image without an answer.
                preprocessing = replace(preprocessing, resize_px=(preprocessing.crop_px,) * 2)
            # A network that somebody trained anew on RGB says so here. The older key do_flip_channels has no effect.
            bgr = values.get("do_flip_channel_order", True)
    return _Description(
        preprocessing=preprocessing,
        source="config.json",
        architecture=architecture,
        class_names=class_names,
        output_stride=output_stride,
        bgr=bgr,
        head=head,
    )


def _closest(format: Format, task: TaskName, head: DeepLabHead | None, stored: Mapping[str, Tensor]) -> Architecture:
    """The published size whose shapes fit best; a file without a description is one of the three."""

    def num_fitting(architecture: Architecture) -> int:
        shapes = _stored_shapes(architecture, format, task, head, num_classes=1)
        return sum(key in stored and stored[key].shape == shape for key, shape in shapes.items())

    return max(ARCHITECTURES.values(), key=num_fitting)


@functools.cache  # building a network to look at its shapes takes longer than reading a file
def _our_shapes(
    architecture: Architecture, task: TaskName, head: DeepLabHead | None, num_classes: int
) -> dict[str, torch.Size]:
    options = {} if head is None else {"head": head}
    with torch.device("meta"):
        model = NETWORKS[task](architecture, num_classes=num_classes, **options)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _stored_shapes(
    architecture: Architecture, format: Format, task: TaskName, head: DeepLabHead | None, num_classes: int
) -> dict[str, torch.Size]:
    names = key_names(architecture, format, task, head)
    shapes = {}
    for ours, shape in _our_shapes(architecture, task, head, num_classes).items():
        for theirs in names[ours]:
            shapes[theirs] = torch.Size((shape[0] // len(names[ours]), *shape[1:])) if shape else shape
    return shapes


def _count_classes(path: Path, task: TaskName, weight: str, bias: str, stored: Mapping[str, Tensor]) -> int:
    """How many classes the rows of a classifier are for; 0 where there is none, as a classifier may be left out."""
    rows = next((stored[key].shape[0] for key in (weight, bias) if key in stored and stored[key].ndim), 0)
    if task == "classify":
        return rows
    if task == "segment":
        return max(rows, 1)  # without a classifier the check of the keys says what is missing
    num_classes, surplus = divmod(rows, NUM_ANCHORS[-1])
    if rows and (surplus or num_classes < 6):
        raise WeightsError(
            f"{path}: key {weight} has {rows} rows, expected {NUM_ANCHORS[-1]} anchors times 4 for the box, 1 for the "
            "background and 1 for each class; take the whole file from its source"
        )
    return max(num_classes - 5, 1)


def _to_ours(
    path: Path,
    format: Format,
    architecture: Architecture,
    task: TaskName,
    head: DeepLabHead | None,
    stored: Mapping[str, Tensor],
    bgr: bool,
) -> dict[str, Tensor]:
    """Check every key and shape, then rename, join query, key and value, and turn the stem to RGB."""
    names = key_names(architecture, format, task, head)
    classifier = CLASSIFIERS[task]
    weight, bias = names[classifier][0], names[classifier.replace("weight", "bias")][0]
    num_classes = _count_classes(path, task, weight, bias, stored)
    expected = _stored_shapes(architecture, format, task, head, num_classes)
    names = {ours: theirs for ours, theirs in names.items() if theirs[0] in expected}  # a backbone has no classifier
    counters = {key: torch.tensor(0) for key in expected if key.endswith("num_batches_tracked") and key not in stored}
    stored = {**stored, **counters}  # some tools drop these counters; inference never reads them

    kind = {"classify": "", "detect": " with SSDLite", "segment": " with DeepLabv3"}[task]
    what = f"MobileViT-{architecture.name.upper()}{kind} in {_FORMAT_NAMES[format]} names"
    remedy = "take the whole file from its source, or say which network it is from"
    if missing := [key for key in expected if key not in stored]:
        raise WeightsError(f"{path}: key {missing[0]} is missing{_and_more(missing)}, expected in {what}; {remedy}")
    if surplus := [key for key in stored if key not in expected]:
        raise WeightsError(f"{path}: surplus key {surplus[0]}{_and_more(surplus)}, not expected in {what}; {remedy}")
    if wrong := [key for key, shape in expected.items() if stored[key].shape != shape]:
        key = wrong[0]
        raise WeightsError(
            f"{path}: key {key} has shape {tuple(stored[key].shape)}{_and_more(wrong)}, "
            f"expected {tuple(expected[key])} in {what}; another structure than the published three has to come in our "
            "format or transformers', which describe it"
        )
    for key, tensor in stored.items():
        is_float = tensor.is_floating_point() and tensor.itemsize > 1  # 8 bits are for quantized weights
        if not is_float and not key.endswith("num_batches_tracked"):
            raise WeightsError(
                f"{path}: key {key} is {tensor.dtype}, expected floating point; quantized files do not load"
            )
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: key {key} holds NaN or infinity; this network has not survived its training")

    tensors = {}
    for ours, theirs in names.items():
        parts = [stored[key] for key in theirs]
        tensors[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if bgr:
        tensors[STEM] = tensors[STEM].flip(1)
    return tensors


_FORMAT_NAMES = {"mobilevit": "our", "apple": "Apple's", "timm": "timm's", "transformers": "transformers'"}


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more like it)" if len(keys) > 1 else ""


# ---------------------------------------------------------------------------------------------------------------------
# Write


def write(weights: Weights, path: str | os.PathLike[str], format: Format = "mobilevit") -> None:
    """Write `weights` to `path`, whole or not at all: a .safetensors or .pt file, or a folder for transformers.

    Raises:
        WeightsError: `format` cannot express these weights, or `path` has the wrong ending for it.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111
    if format not in FORMATS:
        raise WeightsError(f"format is {format!r}; it can be {', '.join(FORMATS)}")
    if format not in TASK_FORMATS[weights.task]:
        task = "detection" if weights.task == "detect" else "segmentation"
        raise WeightsError(
            f"{path}: not written: {_FORMAT_NAMES[format]} format has no MobileViT for {task}; write ours or Apple's"
        )
    if weights.class_names and len(weights.class_names) != weights.num_classes:
        raise WeightsError(
            f"{path}: not written: {weights.num_classes} classes, but {len(weights.class_names)} class names"
        )
    endings = {
        "mobilevit": (".safetensors",),
        "timm": (".safetensors",),
        "apple": (".pt", ".pth"),
        "transformers": ("",),
    }
    if path.suffix not in endings[format] and not (format == "transformers" and path.suffix not in _SUFFIXES):
        wanted = "is a folder" if format == "transformers" else f"ends in {' or '.join(endings[format])}"
        raise WeightsError(f"{path}: {_FORMAT_NAMES[format]} format {wanted}; name the target accordingly")
    if format in ("apple", "timm"):
        _check_published(weights, format)
    tensors = _to_theirs(weights, format)
    metadata = {"format": "pt"}
    if format == "transformers":
        config, processor = _config_for_transformers(weights), _processor_for_transformers(weights)
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "config.json", lambda target: target.write_text(_to_json(config), encoding="utf-8"))
        write_whole(
            path / "preprocessor_config.json", lambda target: target.write_text(_to_json(processor), encoding="utf-8")
        )
        path = path / "model.safetensors"
    elif format != "apple":
        description = {
            "architecture": asdict(weights.architecture),
            "output_stride": weights.output_stride,
            "preprocessing": weights.preprocessing.to_dict(),
            "class_names": weights.class_names,
            "training": dict(weights.training),
            "task": weights.task,
            "head": asdict(weights.head) if weights.head else None,
            "category_ids": weights.category_ids,
        }
        metadata["mobilevit"] = json.dumps(description)
    if format == "apple":
        write_whole(path, lambda target: torch.save(tensors, target))
    else:
        # Python writes the file, since its errors say what is wrong, a full disk for one; the library's do not.
        write_whole(path, lambda target: target.write_bytes(to_safetensors(tensors, metadata)))


def to_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A .safetensors file whose bytes depend on its content alone: the library writes metadata in random order."""
    content = safetensors.torch.save(tensors)
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": metadata, **json.loads(content[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def _to_theirs(weights: Weights, format: Format) -> dict[str, Tensor]:
    names = key_names(weights.architecture, format, weights.task, weights.head)
    bgr = _is_bgr(format, weights.head)
    tensors = {}
    for ours, tensor in weights.tensors.items():
        if bgr and ours == STEM:
            tensor = tensor.flip(1)
        parts = names[ours]
        for name, part in zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True):
            tensors[name] = part.detach().cpu().contiguous()
    return tensors


def _check_published(weights: Weights, format: Format) -> None:
    """Apple's and timm's files hold tensors alone: what the reader cannot see from them must be as published."""
    others = "ours or transformers'" if "transformers" in TASK_FORMATS[weights.task] else "ours"
    published = ARCHITECTURES.get(weights.architecture.name)
    if published is None or _without_dropout(weights.architecture) != _without_dropout(published):
        raise WeightsError(
            f"{_FORMAT_NAMES[format]} format holds only the published networks, not the architecture "
            f"{weights.architecture.name!r} with its changes; write {others}"
        )
    stride = 32
    if weights.head is not None:
        head = replace(weights.head, dropout=PAPER_HEAD.dropout)
        if head not in PUBLISHED_STRIDES:
            raise WeightsError(
                f"{_FORMAT_NAMES[format]} format holds only the published heads, not {weights.head}; write {others}"
            )
        stride = PUBLISHED_STRIDES[head]
    if weights.output_stride != stride:
        raise WeightsError(
            f"{_FORMAT_NAMES[format]} format cannot say that the output stride is {weights.output_stride}; "
            f"write {others}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions: architecture and preprocessing as JSON, ours and theirs


def _without_dropout(architecture: Architecture) -> Architecture:
    """Without what changes only training, and the name."""
    return replace(architecture, name="", transformer_dropout=0.0, classifier_dropout=0.0)


def _named(architecture: Architecture) -> Architecture:
    """With the published name, if it is a published function."""
    for name, published in ARCHITECTURES.items():
        if _without_dropout(published) == _without_dropout(architecture):
            return replace(architecture, name=name)
    return architecture


def _architecture_from_dict(values: Mapping[str, Any]) -> Architecture:
    stages = tuple(
        Stage(**{**stage, "transformer": Transformer(**stage["transformer"]) if stage["transformer"] else None})
        for stage in values["stages"]
    )
    return Architecture(**{**values, "stages": stages})


def _head_from_dict(values: Mapping[str, Any]) -> DeepLabHead:
    return DeepLabHead(**{**values, "rates": tuple(values["rates"])})


def _architecture_from_transformers(config: Mapping[str, Any]) -> Architecture:
    fixed = {
        "model_type": "mobilevit",
        "num_channels": 3,
        "conv_kernel_size": 3,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "qkv_bias": True,
    }
    for key, expected in fixed.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"{key} is {config[key]!r}; expected {expected!r}")
    dims, channels = config["hidden_sizes"], config["neck_hidden_sizes"]
    if len(dims) != 3 or len(channels) != 7:
        raise ValueError(
            f"hidden_sizes and neck_hidden_sizes have {len(dims)} and {len(channels)} entries; expected 3 and 7"
        )
    transformers = [
        Transformer(
            dim=dim,
            num_layers=num_layers,
            ffn_dim=int(dim * config.get("mlp_ratio", 2.0)),
            num_heads=config.get("num_attention_heads", 4),
            patch_px=config.get("patch_size", 2),
        )
        for dim, num_layers in zip(dims, (2, 4, 3), strict=True)
    ]
    return _named(
        Architecture(
            name="custom",
            stem_channels=channels[0],
            stages=(
                Stage(channels[1], num_residuals=1, stride=1),
                Stage(channels[2], num_residuals=3, stride=2),
                *(
                    Stage(width, num_residuals=1, stride=2, transformer=transformer)
                    for width, transformer in zip(channels[3:6], transformers, strict=True)
                ),
            ),
            head_channels=channels[6],
            expansion=config.get("expand_ratio", 4.0),
            transformer_dropout=config.get("hidden_dropout_prob", 0.1),
            classifier_dropout=config.get("classifier_dropout_prob", 0.1),
        )
    )


def _config_for_transformers(weights: Weights) -> dict[str, Any]:
    a = weights.architecture
    transformers = [stage.transformer for stage in a.stages if stage.transformer]
    names = weights.class_names or tuple(f"LABEL_{index}" for index in range(weights.num_classes))
    kind = "MobileViTForImageClassification" if weights.head is None else "MobileViTForSemanticSegmentation"
    config = {
        "architectures": [kind],
        "model_type": "mobilevit",
        "num_channels": 3,
        "image_size": weights.preprocessing.crop_px,
        "patch_size": transformers[0].patch_px,
        "hidden_sizes": [t.dim for t in transformers],
        "neck_hidden_sizes": [a.stem_channels, *(stage.channels for stage in a.stages), a.head_channels],
        "num_attention_heads": transformers[0].num_heads,
        "mlp_ratio": transformers[0].ffn_dim / transformers[0].dim,
        "expand_ratio": float(a.expansion),
        "hidden_act": "silu",
        "conv_kernel_size": 3,
        "output_stride": weights.output_stride,
        "hidden_dropout_prob": a.transformer_dropout,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": a.classifier_dropout,
        "layer_norm_eps": 1e-5,
        "qkv_bias": True,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if (head := weights.head) is not None:
        if head.auxiliary_channels or head.align_corners:
            raise WeightsError(f"transformers' format cannot express {head}; write ours")
        config |= {
            "aspp_out_channels": head.channels,
            "atrous_rates": list(head.rates),
            "aspp_dropout_prob": head.dropout,
            "semantic_loss_ignore_index": 255,
        }
    # One patch size, one head count and one ffn ratio is all that their configuration can say.
    if replace(_architecture_from_transformers(config), name=a.name) != a:
        raise WeightsError(f"transformers' format cannot express the architecture {a.name!r}; write ours")
    return config


# timm, the model library, names interpolations as we do; transformers gives Pillow's numbers.
def _preprocessing_from_transformers(values: Mapping[str, Any]) -> Preprocessing:
    for key, expected in (("do_resize", True), ("do_center_crop", True), ("do_rescale", True)):
        if values.get(key, expected) != expected:
            raise ValueError(f"{key} is {values[key]!r}; expected {expected!r}")
    if not math.isclose(values.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor is {values['rescale_factor']}; expected 1/255")
    size, crop = values.get("size", 288), values.get("crop_size", 256)
    if isinstance(size, Mapping):
        size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    if isinstance(crop, Mapping):
        if crop["height"] != crop["width"]:
            raise ValueError(f"crop_size is {crop['height']} x {crop['width']}; expected a square")
        crop = crop["height"]
    filters = {int(number): name for name, number in FILTERS.items()}
    return Preprocessing(resize_px=size, crop_px=crop, interpolation=filters[values.get("resample", 2)])


def _processor_for_transformers(weights: Weights) -> dict[str, Any]:
    p = weights.preprocessing
    if p.mean != (0.0, 0.0, 0.0) or p.std != (1.0, 1.0, 1.0):
        raise WeightsError(
            f"transformers' MobileViT does not normalise, but these weights expect mean {p.mean} and std {p.std}; "
            "write ours"
        )
    size = (
        {"shortest_edge": p.resize_px}
        if isinstance(p.resize_px, int)
        else dict(zip(("height", "width"), p.resize_px, strict=True))
    )
    return {
        "image_processor_type": "MobileViTImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": int(FILTERS[p.interpolation]),
        "do_center_crop": True,
        "crop_size": {"height": p.crop_px, "width": p.crop_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_flip_channel_order": True,
    }


def _preprocessing_from_timm(config: Mapping[str, Any]) -> Preprocessing:
    _, height, width = config.get("input_size", (3, 256, 256))
    if height != width:
        raise ValueError(f"input_size is {height} x {width}; expected a square")
    if config.get("crop_mode", "center") != "center":
        raise ValueError(f"crop_mode is {config['crop_mode']!r}; expected 'center'")
    return Preprocessing(
        resize_px=math.floor(height / config.get("crop_pct", 0.9)),
        crop_px=height,
        interpolation=config.get("interpolation", "bicubic"),
        mean=tuple(config.get("mean", (0.0, 0.0, 0.0))),
        std=tuple(config.get("std", (1.0, 1.0, 1.0))),
    )


@contextlib.contextmanager
def _naming(path: Path, part: str) -> Iterator[None]:
    """Turn what goes wrong inside into one line that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else first_line(error)
        raise WeightsError(f"{path}: its {part} cannot be used: {reason}") from None


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); fetch or copy it again") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: found a JSON {type(values).__name__}, expected an object")
    return values


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
