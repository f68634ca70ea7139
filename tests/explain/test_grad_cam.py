"""Class evidence against a network whose evidence is known, and against the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit import MobileViT
from mobilevit.explain.grad_cam import compute_class_evidence, find_class
from small_networks import randomize


class MeanColors(nn.Module):
    """A backbone whose feature maps are mean colors of tiles: of 16 px in stage 4, of 32 px in stage 5."""

    def __init__(self):
        super().__init__()
        self.stage4 = nn.AvgPool2d(16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"stage5": F.avg_pool2d(self.stage4(images), 2)}


def test_evidence_of_a_network_that_counts_colors():
    """The classes are colors, and the image contains one patch of red and one of green."""
    model = MobileViT("xxs", num_classes=3).eval()
    model.backbone = MeanColors()  # pyright: ignore[reportAttributeAccessIssue]
    model.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    model.classifier = nn.Linear(3, 3)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.eye(3) - 0.5 * torch.eye(3).roll(1, 1))
        model.classifier.bias.copy_(torch.tensor([7.0, -3.0, 2.0]))
    pixels = torch.zeros(1, 3, 96, 160)
    pixels[0, 0, 32:64, 128:160] = 1  # red
    pixels[0, 1, 0:16, 0:16] = 1  # green
    red, green = (
        compute_class_evidence(model, pixels, ("red", "green", "blue"), class_index=0)[0],
        compute_class_evidence(model, pixels, ())[1:],
    )
    assert (red.class_name, red.class_index) == ("red", 0)
    expected = torch.zeros(3, 5)
    expected[1, 4] = 1 / 15  # its fraction of the mean
    expected[0, 0] = -0.5 / 4 / 15  # a quarter of that tile is green, which lowers red
    torch.testing.assert_close(red.grad_cam, expected)
    fine = torch.zeros(6, 10)
    fine[2:4, 8:10] = 1 / 60
    torch.testing.assert_close(red.layer_cam, fine)
    (green,) = (one for one in green if one.class_index == 1)
    assert green.class_name == "class 1"
    assert green.layer_cam.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_grad_cam_sums_to_the_logits(size: tuple[int, int]):
    model = randomize(MobileViT("xxs", num_classes=7)).double()
    pixels = torch.rand(1, 3, *size, dtype=torch.float64)
    assert isinstance(model.classifier, nn.Linear)
    with torch.no_grad():
        logits = model(pixels)[0]
        last = model.head(model.backbone(pixels)["stage5"])
    evidence = compute_class_evidence(model, pixels, (), temperature=1.7)
    assert [one.class_index for one in evidence] == logits.topk(5).indices.tolist()
    for one in evidence:
        by_hand = torch.einsum("c,chw->hw", model.classifier.weight[one.class_index], last[0]) / last[0, 0].numel()
        torch.testing.assert_close(one.grad_cam, by_hand.detach().float())
        assert one.grad_cam.sum().item() + model.classifier.bias[one.class_index].item() == pytest.approx(
            logits[one.class_index].item(), rel=1e-4, abs=1e-5
        )
        assert one.probability == pytest.approx((logits / 1.7).softmax(0)[one.class_index].item())
        assert one.layer_cam.min() >= 0
        assert one.layer_cam.max() > 0
    assert [
        one.class_index for one in compute_class_evidence(model, pixels, (), class_index=evidence[2].class_index)
    ] == [evidence[i].class_index for i in (2, 0, 1, 3, 4)]


def test_find_class():
    names = ("Tabby", "tiger cat", "tricycle")
    assert find_class("tabby", names, 3) == 0
    assert find_class("class 1", (), 3) == 1
    many = (*names, *(f"breed {i}" for i in range(18)))
    for name, names, hint in (
        ("tigercat", many, "tiger cat"),
        ("zzz", many, "Tabby, tiger cat, tricycle"),
        ("zzz", many[:20], ", ".join(many[:20])),  # all of them if there are at most 20
    ):
        with pytest.raises(ValueError, match=rf"'{name}'.* {len(names)} .*{hint}"):
            find_class(name, names, len(names))
    with pytest.raises(ValueError, match="class 0, class 1"):
        find_class("dog", (), 2)
