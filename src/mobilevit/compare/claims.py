"""Claims of the MobileViT paper (arXiv 2110.02178), recomputed; its detection and segmentation tables.

All published figures are the paper's. Parameter counts are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mobilevit.benchmark.cost import count_parameters
from mobilevit.compare.reports import CheckedClaim, Claim, DenseRow, PublishedRow, SpeedRatio
from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.ssdlite import SSDLite

# Milliseconds on the CPU of an iPhone 12.
PUBLISHED_LATENCY_MS = {"mobilevit-xs": 17.86, "mobilenetv2-1.0": 7.50, "pit-tiny": 24.03, "deit-tiny": 28.15}
LATENCY_BASELINE = "mobilevit-xs"


CLAIMS = (
    Claim("mobilevit-xs", "mobilenetv2-0.75", 5.0),
    Claim("mobilevit-xs", "shufflenetv2", 5.4),
    Claim("mobilevit-xs", "mobilenetv3-small", 7.4),
    Claim("mobilevit-s", "efficientnet-b0", 2.1),
    Claim("mobilevit-xs", "deit-tiny", 2.6, times_larger=2.5),
)


# SSDLite at 320 px, except for VGG.
DETECTION = (
    DenseRow("mobilenetv3", 4_900_000, 22.0),
    DenseRow("mobilenetv2", 4_300_000, 22.1),
    DenseRow("mobilenetv1", 5_100_000, 22.2),
    DenseRow("mixnet", 4_500_000, 22.3),
    DenseRow("mnasnet", 4_900_000, 23.0),
    DenseRow("vgg (ssd300)", 35_600_000, 25.1),
    DenseRow("resnet-50", 22_900_000, 25.2),
    DenseRow("mobilevit-xxs", 1_800_000, 19.9),
    DenseRow("mobilevit-xs", 2_700_000, 24.8),
    DenseRow("mobilevit-s", 5_700_000, 27.7),
)
# DeepLabv3.
SEGMENTATION = (
    DenseRow("mobilenetv1", 11_200_000, 75.3),
    DenseRow("mobilenetv2", 4_500_000, 75.7),
    DenseRow("resnet-101", 58_200_000, 80.5),
    DenseRow("mobilevit-xxs", 1_900_000, 73.6),
    DenseRow("mobilevit-xs", 2_900_000, 77.1),
    DenseRow("mobilevit-s", 6_400_000, 79.1),
)


def check_claims(rows: Sequence[PublishedRow]) -> list[CheckedClaim]:
    """Check every claim whose two models are among `rows`.

    A claim holds if the result equals the printed one when rounded to its precision.
    """
    by_name = {row.name: row for row in rows}
    checked = []
    for claim in CLAIMS:
        if not {claim.ours, claim.other} <= by_name.keys():
            continue
        ours, other = by_name[claim.ours], by_name[claim.other]
        difference = round(ours.published_top1 - other.published_top1, 2)
        times_larger = other.cost.num_parameters / ours.cost.num_parameters
        best = ours.best_weights, other.best_weights
        checked.append(
            CheckedClaim(
                claim,
                top1=(ours.published_top1, other.published_top1),
                num_parameters=(ours.cost.num_parameters, other.cost.num_parameters),
                difference=difference,
                times_larger=times_larger,
                holds=round(difference, 1) == claim.difference
                and (claim.times_larger is None or round(times_larger, 1) == claim.times_larger),
                best_top1=(best[0].top1, best[1].top1) if best[0] and best[1] else None,
            )
        )
    return checked


def speed_ratios(rows: Sequence[PublishedRow]) -> list[SpeedRatio]:
    """The times of models divided by that of MobileViT-XS, published and measured."""
    return [
        SpeedRatio(
            ours=LATENCY_BASELINE,
            other=row.name,
            published_ratio=PUBLISHED_LATENCY_MS[row.name] / PUBLISHED_LATENCY_MS[LATENCY_BASELINE],
            runtime=timing.runtime,
            batch_size=timing.batch_size,
            ratio=timing.ratios[LATENCY_BASELINE].median,
        )
        for row in rows
        if row.name in PUBLISHED_LATENCY_MS
        for timing in row.timings
        if timing.batch_size == 1 and LATENCY_BASELINE in timing.ratios
    ]


def dense_tables() -> dict[str, list[DenseRow]]:
    """The paper's detection and segmentation tables, with our parameter counts for MobileViT."""
    tables = {}
    for task, model, rows in (("detection", SSDLite, DETECTION), ("segmentation", DeepLabV3, SEGMENTATION)):
        with torch.device("meta"):
            counts = {f"mobilevit-{size}": count_parameters(model(size)) for size in ("xxs", "xs", "s")}
        tables[task] = [
            DenseRow(row.backbone, row.published_parameters, row.published, counts.get(row.backbone)) for row in rows
        ]
    return tables
