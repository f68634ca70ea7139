"""The detector. test_parity.py compares its outputs with those of Apple's network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_convert, nms

from mobilevit.models import ssdlite
from mobilevit.models.mobilevit import ARCHITECTURES, XXS
from mobilevit.models.ssdlite import SeparableConv, SSDLite, decode, detect, encode
from small_networks import randomize

SIZES = [(320, 320), (97, 131), (64, 200), (33, 257)]


@pytest.fixture(scope="module")
def model() -> SSDLite:
    return randomize(SSDLite("xxs", num_classes=5))


@pytest.mark.parametrize(
    ("name", "count", "published"), [("xxs", 1_755_050, 1.8), ("xs", 2_742_042, 2.7), ("s", 5_738_826, 5.7)]
)
def test_parameters_as_published(name: str, count: int, published: float) -> None:
    found = sum(p.numel() for p in SSDLite(name).parameters())
    assert found == count
    assert round(found / 1e6, 1) == published


@pytest.mark.parametrize("size", SIZES)
def test_anchors_against_torchvision(model: SSDLite, size: tuple[int, int]) -> None:
    maps: list[Tensor] = []
    hooks = [head.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0])) for head in model.heads]
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        class_logits, locations = model(images)
    for hook in hooks:
        hook.remove()
    generator = DefaultBoxGenerator([[2, 3]] * 5 + [[2]], scales=torch.linspace(0.1, 1.05, 7).tolist())
    expected = generator(ImageList(images, [size] * 2), maps)[0] / torch.tensor([size[1], size[0]] * 2)
    anchors = model.anchors(*size)
    torch.testing.assert_close(anchors, box_convert(expected, "xyxy", "cxcywh"), rtol=0, atol=1e-6)
    assert class_logits.shape == (2, len(anchors), 6)
    assert locations.shape == (2, len(anchors), 4)


def test_outputs_are_in_the_order_of_the_anchors(model: SSDLite) -> None:
    """Changing one pixel of a map affects only the outputs of the anchors around it."""
    head = model.heads[2]
    x = torch.zeros(1, 256, 5, 7)
    with torch.no_grad():
        blank = head(x)
        x[0, :, 3, 2] = 1
        changed = (head(x) - blank).abs().amax(-1).reshape(5, 7, 6).amax(-1) > 0
    rows, columns = changed.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 4, 1, 3)  # the 3x3 window of pixel (3, 2)


def random_boxes(count: int) -> Tensor:
    corners = torch.rand(count, 2)
    return torch.cat((corners, corners + 0.02 + torch.rand(count, 2)), dim=1)


def test_encode_and_decode_against_torchvision(model: SSDLite) -> None:
    anchors = model.anchors(97, 131)
    boxes = random_boxes(len(anchors))
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    anchors_xyxy = box_convert(anchors, "cxcywh", "xyxy")
    locations = encode(boxes, anchors)
    torch.testing.assert_close(locations, coder.encode_single(boxes, anchors_xyxy), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(decode(locations, anchors), boxes, rtol=0, atol=1e-5)
    wild = 30 * torch.randn(2, len(anchors), 4)  # includes sides that are clamped
    expected = torch.stack([coder.decode_single(one, anchors_xyxy) for one in wild])
    torch.testing.assert_close(decode(wild, anchors), expected, rtol=1e-4, atol=1e-4)
    doubles = locations.double(), anchors.double()
    centers = doubles[1][:, :2] + 0.1 * doubles[0][:, :2] * doubles[1][:, 2:]
    sides = doubles[1][:, 2:] * torch.exp(0.2 * doubles[0][:, 2:])
    expected = box_convert(torch.cat((centers, sides), 1), "cxcywh", "xyxy")
    torch.testing.assert_close(decode(locations, anchors).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("max_per_class", "max_per_image"), [(200, 10_000), (3, 10_000), (200, 4), (3, 7)])
def test_detect_against_a_loop(max_per_class: int, max_per_image: int) -> None:
    class_logits, locations = 2 * torch.randn(2, 300, 5), torch.randn(2, 300, 4)
    anchors = torch.cat((torch.rand(300, 2), 0.1 + 0.4 * torch.rand(300, 2)), dim=1)
    found = detect(
        class_logits,
        locations,
        anchors,
        score_threshold=0.3,
        iou_threshold=0.4,
        max_per_class=max_per_class,
        max_per_image=max_per_image,
    )
    for image in range(2):
        expected = []
        boxes = decode(locations[image], anchors)
        for label in range(4):
            scores = class_logits[image].softmax(-1)[:, label + 1]
            above = (scores > 0.3).nonzero()[:, 0]
            kept = above[nms(boxes[above], scores[above], 0.4)][:max_per_class]
            expected += [(scores[i].item(), label, i) for i in kept]
        expected.sort(key=lambda one: -one[0])
        expected = expected[:max_per_image]
        one = found[image]
        assert one.scores.tolist() == [score for score, _, _ in expected]
        assert one.labels.tolist() == [label for _, label, _ in expected]
        assert torch.equal(one.boxes, torch.stack([boxes[i] for _, _, i in expected]))


@pytest.mark.parametrize(("max_per_class", "max_per_image"), [(200, 10), (3, 300), (7, 30), (200, 700)])
def test_number_of_nms_candidates_does_not_change_the_detections(
    max_per_class: int, max_per_image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NMS of the top candidates gives the same boxes as NMS of all. All scores differ."""
    class_logits, locations = 0.1 * torch.randn(2, 500, 41), 0.3 * torch.randn(2, 500, 4)
    anchors = torch.cat((torch.rand(500, 2), 0.1 + 0.1 * torch.rand(500, 2)), dim=1)
    options = {"score_threshold": 0.01, "max_per_class": max_per_class, "max_per_image": max_per_image}
    found, asked = [], []

    def counted(boxes: Tensor, *more: Any) -> Tensor:
        asked.append(len(boxes))
        return batched_nms(boxes, *more)

    monkeypatch.setattr("torchvision.ops.batched_nms", counted)
    for least in (16, 10**6):
        monkeypatch.setattr(ssdlite, "MIN_CANDIDATES", least)
        asked.clear()
        found.append(detect(class_logits, locations, anchors, **options))
        if max_per_image <= 30:
            assert (max(asked) < 2000) == (least == 16)
    assert len(found[0][0].scores.unique()) == len(found[0][0].scores) == min(max_per_image, 40 * max_per_class)
    for few, whole in zip(*found, strict=True):
        for ours, theirs in zip(few, whole, strict=True):
            assert torch.equal(ours, theirs)


def test_no_detections(model: SSDLite) -> None:
    anchors = model.anchors(64, 64)
    logits = torch.zeros(1, len(anchors), 6)
    logits[..., 0] = 20
    (found,) = detect(logits, torch.zeros(1, len(anchors), 4), anchors, score_threshold=0.5, max_per_image=100)
    assert [part.shape for part in found] == [(0, 4), (0,), (0,)]


def test_other_classes() -> None:
    model = randomize(SSDLite("xxs", num_classes=5))
    x = torch.rand(1, 3, 97, 131)
    with torch.no_grad():
        class_logits, locations = model(x)
        model.reset_classes(2)
        assert model.num_classes == 2
        new_logits, new_locations = model(x)
    assert new_logits.shape[-1] == 3
    torch.testing.assert_close(new_locations, locations)
    torch.testing.assert_close(new_logits[..., 0], class_logits[..., 0])
    assert new_logits[..., 1:].std() > 0
    assert torch.isfinite(new_logits).all()
    model.half().reset_classes(3)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}
    assert SSDLite("xxs", num_classes=3).state_dict().keys() == model.state_dict().keys()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"num_classes is {wrong}"):
            model.reset_classes(wrong)
        with pytest.raises(ValueError, match=f"num_classes is {wrong}"):
            SSDLite("xxs", num_classes=wrong)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 5)])
def test_an_extra_layer_in_training(size: tuple[int, int]) -> None:
    """Values and gradients against the definition in float64; a map of one column is computed differently."""
    layer = SeparableConv(8, 12).train()
    x = torch.randn(6, 8, *size)
    x_double = x.double().requires_grad_()
    weights = [parameter.detach().double().requires_grad_() for parameter in layer.parameters()]
    depthwise, scale, shift, pointwise, scale_2, shift_2 = weights
    y = F.conv2d(x_double, depthwise, stride=2, padding=1, groups=8)
    y = F.batch_norm(y, None, None, scale, shift, training=True)
    y = F.batch_norm(F.conv2d(y, pointwise), None, None, scale_2, shift_2, training=True).relu()
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x_double, *weights), g)
    x.requires_grad_()
    found = layer(x)
    torch.testing.assert_close(found.double(), y, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(found, (x, *layer.parameters()), g.float()), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


def fill_free_memory_with_nan() -> None:
    """Leave NaN in the memory that is allocated next, so that reads of uninitialized memory return NaN."""
    for num in (64, 128, 256, 512, 1152, 2048, 4096, 9 * 512):
        _ = [torch.full((num,), float("nan")) for _ in range(50)]


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 1)])
def test_an_extra_layer_in_bfloat16(size: tuple[int, int]) -> None:
    """The gradients of the weights equal those in float32 up to rounding, whatever the memory contained before."""
    layer = SeparableConv(80, 16).train().to(memory_format=torch.channels_last)
    weights = (layer.depthwise.conv.weight, layer.pointwise.conv.weight)
    x = torch.randn(8, 80, *size).to(memory_format=torch.channels_last)
    expected = torch.autograd.grad(layer(x).square().sum(), weights)
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().square().sum()
        fill_free_memory_with_nan()
        for ours, theirs in zip(torch.autograd.grad(loss, weights), expected, strict=True):
            assert (ours - theirs).norm() < 0.2 * theirs.norm()


def test_initial_values() -> None:
    """Xavier uniform in all layers but the backbone: its bound and its standard deviation."""
    model = SSDLite("xxs")
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m not in set(model.backbone.modules())]
    assert len(convs) == 6 + 1 + 2 + 5 + 6
    for conv in convs:
        fan_in, fan_out = conv.weight[0].numel(), conv.weight[:, 0].numel()
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert conv.weight.abs().max() <= bound
        assert abs(conv.weight.std() / (bound / 3**0.5) - 1) < 0.1
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = SSDLite(name, num_classes=2).train()
    # Large enough for extra maps of several pixels: two values per channel become -1 and 1 in batch norm.
    class_logits, locations = model(torch.rand(2, 3, 96, 288))
    (class_logits.square().mean() + locations.square().mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_channels_last(model: SSDLite) -> None:
    layouts = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    hooks = [m.register_forward_pre_hook(watch) for m in model.modules() if isinstance(m, nn.Conv2d)]
    x = torch.rand(2, 3, 97, 131)
    with torch.no_grad():
        expected = model(x)
        layouts.clear()
        found = model(x.to(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    assert all(layouts)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(96, 64), (97, 131)])
def test_export(model: SSDLite, size: tuple[int, int]) -> None:
    x = torch.rand(1, 3, *size)
    program = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))


def test_architecture_by_value() -> None:
    assert SSDLite(XXS).architecture is XXS
    with pytest.raises(ValueError, match="xl"):
        SSDLite("xl")
