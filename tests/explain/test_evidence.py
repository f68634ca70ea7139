"""Evidence for classes: where it is known by hand, and as the sum that it must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import randomise
from mobilevit import MobileViT
from mobilevit.explain.evidence import evidence_of, find_class


class Colours(nn.Module):
    """A backbone whose maps are the mean colours of tiles, of 16 px in stage 4 and of 32 px in stage 5."""

    def __init__(self):
        super().__init__()
        self.stage4 = nn.AvgPool2d(16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"stage5": F.avg_pool2d(self.stage4(images), 2)}


def test_evidence_is_where_it_is_by_construction():
    """A network that calls the image by the colour there is most of, and an image with a patch of each."""
    model = MobileViT("xxs", num_classes=3).eval()
    model.backbone = Colours()  # pyright: ignore[reportAttributeAccessIssue]
    model.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    model.classifier = nn.Linear(3, 3)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.eye(3) - 0.5 * torch.eye(3).roll(1, 1))
        model.classifier.bias.copy_(torch.tensor([7.0, -3.0, 2.0]))
    pixels = torch.zeros(1, 3, 96, 160)
    pixels[0, 0, 32:64, 128:160] = 1  # red
    pixels[0, 1, 0:16, 0:16] = 1  # green
    red, green = evidence_of(model, pixels, ("red", "green", "blue"), chosen=0)[0], evidence_of(model, pixels, ())[1:]
    assert (red.class_name, red.class_index) == ("red", 0)
    expected = torch.zeros(3, 5)
    expected[1, 4] = 1 / 15  # its share of the mean
    expected[0, 0] = -0.5 / 4 / 15  # a quarter of that tile is green, which speaks against red
    torch.testing.assert_close(red.shares, expected)
    fine = torch.zeros(6, 10)
    fine[2:4, 8:10] = 1 / 60
    torch.testing.assert_close(red.fine, fine)
    (green,) = (one for one in green if one.class_index == 1)
    assert green.class_name == "class 1"
    assert green.fine.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_shares_sum_to_the_logits(size: tuple[int, int]):
    model = randomise(MobileViT("xxs", num_classes=7)).double()
    pixels = torch.rand(1, 3, *size, dtype=torch.float64)
    assert isinstance(model.classifier, nn.Linear)
    with torch.no_grad():
        logits = model(pixels)[0]
        last = model.head(model.backbone(pixels)["stage5"])
    found = evidence_of(model, pixels, ())
    assert [one.class_index for one in found] == logits.topk(5).indices.tolist()
    for one in found:
        by_hand = torch.einsum("c,chw->hw", model.classifier.weight[one.class_index], last[0]) / last[0, 0].numel()
        torch.testing.assert_close(one.shares, by_hand.detach().float())
        assert one.shares.sum().item() + model.classifier.bias[one.class_index].item() == pytest.approx(
            logits[one.class_index].item(), rel=1e-4, abs=1e-5
        )
        assert one.probability == pytest.approx(logits.softmax(0)[one.class_index].item())
        assert one.fine.min() >= 0
        assert one.fine.max() > 0
    assert [one.class_index for one in evidence_of(model, pixels, (), chosen=found[2].class_index)] == [
        found[i].class_index for i in (2, 0, 1, 3, 4)
    ]
    with pytest.raises(ValueError, match="no classifier"):
        evidence_of(MobileViT("xxs", num_classes=0), pixels, ())


def test_classes_by_name():
    names = ("Tabby", "tiger cat", "tricycle")
    assert find_class("tabby", names, 3) == 0
    assert find_class("class 1", (), 3) == 1
    many = (*names, *(f"breed {i}" for i in range(18)))
    with pytest.raises(ValueError, match=r"class is 'tigercat', which none of the 21 .* did you mean tiger cat"):
        find_class("tigercat", many, 21)
    with pytest.raises(ValueError, match=r"the first are Tabby, tiger cat, tricycle, breed 0, breed 1$"):
        find_class("zzz", many, 21)
    for name in ("tigercat", "zzz"):  # all of them, where they are few
        with pytest.raises(ValueError, match=rf"they are {', '.join(many[:20])}$"):
            find_class(name, many[:20], 20)
    with pytest.raises(ValueError, match=r"they are class 0, class 1$"):
        find_class("dog", (), 2)
