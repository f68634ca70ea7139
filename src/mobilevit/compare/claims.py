"""What the paper says of MobileViT beside the others, computed anew from the table; and its other two comparisons.

All published figures here are the MobileViT paper's (arXiv 2110.02178); what is counted is our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mobilevit.compare.counts import count_parameters
from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.ssdlite import SSDLite


@dataclass(frozen=True)
class Claim:
    """`ours` has `better` points more of top-1 than `other`, and `other` has `larger` times its parameters."""

    ours: str
    other: str
    better: float
    larger: float | None = None


CLAIMS = (
    Claim("mobilevit-xs", "mobilenetv2-0.75", 5.0),
    Claim("mobilevit-xs", "shufflenetv2", 5.4),
    Claim("mobilevit-xs", "mobilenetv3-small", 7.4),
    Claim("mobilevit-s", "efficientnet-b0", 2.1),
    Claim("mobilevit-xs", "deit-tiny", 2.6, larger=2.5),
)

# Milliseconds on an iPhone 12's CPU, by name in the table.
PUBLISHED_LATENCY_MS = {"mobilevit-xs": 17.86, "mobilenetv2-1.0": 7.50, "pit-tiny": 24.03, "deit-tiny": 28.15}


@dataclass(frozen=True)
class Dense:
    """A backbone under a detection or segmentation head; `published` is COCO mAP or VOC mIoU, in per cent."""

    backbone: str
    published_parameters: int
    published: float


# SSDLite at 320 px, but for the VGG.
DETECTION = (
    Dense("mobilenetv3", 4_900_000, 22.0),
    Dense("mobilenetv2", 4_300_000, 22.1),
    Dense("mobilenetv1", 5_100_000, 22.2),
    Dense("mixnet", 4_500_000, 22.3),
    Dense("mnasnet", 4_900_000, 23.0),
    Dense("vgg (ssd300)", 35_600_000, 25.1),
    Dense("resnet-50", 22_900_000, 25.2),
    Dense("mobilevit-xxs", 1_800_000, 19.9),
    Dense("mobilevit-xs", 2_700_000, 24.8),
    Dense("mobilevit-s", 5_700_000, 27.7),
)
# DeepLabv3.
SEGMENTATION = (
    Dense("mobilenetv1", 11_200_000, 75.3),
    Dense("mobilenetv2", 4_500_000, 75.7),
    Dense("resnet-101", 58_200_000, 80.5),
    Dense("mobilevit-xxs", 1_900_000, 73.6),
    Dense("mobilevit-xs", 2_900_000, 77.1),
    Dense("mobilevit-s", 6_400_000, 79.1),
)


def check_claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every claim whose two systems are among `rows` of the table, with the numbers it is computed from.

    A claim holds if what comes out is what the paper prints, rounded as the paper prints it. `difference_today` is
    that of the best weights of the libraries on both sides; None where there are none.
    """
    by_name = {row["name"]: row for row in rows}
    checked = []
    for claim in CLAIMS:
        if not {claim.ours, claim.other} <= by_name.keys():
            continue
        ours, other = by_name[claim.ours], by_name[claim.other]
        difference = ours["published_top1"] - other["published_top1"]
        times_larger = other["num_parameters"] / ours["num_parameters"]
        today = [max((w["top1"] for w in row["library_weights"]), default=None) for row in (ours, other)]
        difference_today = None if today[0] is None or today[1] is None else round(today[0] - today[1], 2)
        checked.append(
            {
                "ours": claim.ours,
                "other": claim.other,
                "claimed_difference": claim.better,
                "claimed_times_larger": claim.larger,
                "top1": [ours["published_top1"], other["published_top1"]],
                "num_parameters": [ours["num_parameters"], other["num_parameters"]],
                "difference": round(difference, 2),
                "times_larger": times_larger,
                "holds": round(difference, 1) == claim.better
                and (claim.larger is None or round(times_larger, 1) == claim.larger),
                "top1_today": today,
                "difference_today": difference_today,
            }
        )
    return checked


def speeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many times as long as MobileViT-XS others take for an image, as published for a phone, and as timed here."""
    return [
        {
            "ours": "mobilevit-xs",
            "other": row["name"],
            "published_ratio": PUBLISHED_LATENCY_MS[row["name"]] / PUBLISHED_LATENCY_MS["mobilevit-xs"],
            "runtime": timing["runtime"],
            "batch_size": timing["batch_size"],
            "ratio": timing["ratios"]["mobilevit-xs"]["median"],
        }
        for row in rows
        if row["name"] in PUBLISHED_LATENCY_MS and row["name"] != "mobilevit-xs"
        for timing in row["timings"]
        if timing["batch_size"] == 1 and "mobilevit-xs" in timing["ratios"]
    ]


def dense_tables() -> dict[str, list[dict[str, Any]]]:
    """The paper's detection and segmentation tables, with our own counts for the networks that are here."""
    with torch.device("meta"):
        counts = {
            "detection": {f"mobilevit-{size}": count_parameters(SSDLite(size)) for size in ("xxs", "xs", "s")},
            "segmentation": {f"mobilevit-{size}": count_parameters(DeepLabV3(size)) for size in ("xxs", "xs", "s")},
        }
    return {
        task: [
            {
                "backbone": row.backbone,
                "published_parameters": row.published_parameters,
                "num_parameters": counts[task].get(row.backbone),
                "published": row.published,
            }
            for row in published
        ]
        for task, published in (("detection", DETECTION), ("segmentation", SEGMENTATION))
    }


def sentence(claim: Mapping[str, Any]) -> str:
    """A checked claim in words."""
    ours, other = claim["top1"]
    small, large = (f"{number / 1e6:.2f} M" for number in claim["num_parameters"])
    text = (
        f"{claim['ours']} over {claim['other']}: claimed +{claim['claimed_difference']:.1f}, "
        f"{ours:.1f} - {other:.1f} = {claim['difference']:+.1f}"
    )
    if claim["claimed_times_larger"]:
        text += (
            f"; claimed {claim['claimed_times_larger']:.1f} times smaller, {large} / {small} = "
            f"{claim['times_larger']:.2f}"
        )
    else:
        text += f", at {small} and {large} parameters"
    text += "; holds" if claim["holds"] else "; does not hold"
    if claim["difference_today"] is not None:
        ours, other = claim["top1_today"]
        text += (
            f" (with the libraries' best weights of today {ours:.2f} - {other:.2f} = {claim['difference_today']:+.2f})"
        )
    return text
