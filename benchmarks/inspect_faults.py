"""Plant faults in a real dataset and count how many of them `mobilevit inspect` finds.

    python benchmarks/inspect_faults.py /usr/share/tuxpaint/stamps weights.safetensors --out stamps.json

Images of the dataset are written as PNG to a temporary folder, divided into train/ and val/, and inspected. Then the
faults are planted and the data are inspected again: NUM duplicates in train/, NUM leaks from train/ to val/ (half of
the copies are JPEG of quality 75, half are resized to 3/4 and then JPEG), and NUM wrong labels of other images of
train/. A finding that was there before is a finding in the original data, not a false report.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mobilevit.data.sources import find_splits
from mobilevit.images import read_image
from mobilevit.inspect import Inspection, inspect_data

Groups = set[frozenset[str]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("weights")
    parser.add_argument("--max-images", type=int, default=5000, help="random images of the dataset to use")
    parser.add_argument("--num", type=int, default=50, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(args.data, args.max_images, folder, random)
        started = time.perf_counter()
        before = inspect_data(folder, args.weights)
        seconds = time.perf_counter() - started
        planted = plant(folder, args.num, random)
        after = inspect_data(folder, args.weights)
    result = {
        "data": args.data,
        "date": time.strftime("%Y-%m-%d"),
        "num_images": len(before.collection),
        "seconds": round(seconds, 1),
        "seed": args.seed,
        "original": before.counts(),
        **compare(before, after, *planted),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def write_images(data: str, max_images: int, folder: Path, random: np.random.Generator) -> None:
    train, val = find_splits("classify", data, 0.2)
    samples = [(split, source, i) for split, source in (("train", train), ("val", val)) for i in range(len(source))]
    chosen = sorted(random.permutation(len(samples))[:max_images].tolist())
    for number, (split, source, i) in enumerate(samples[k] for k in chosen):
        sample = source[i]
        target = folder / split / source.class_names[sample.label].replace("/", "_") / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        read_image(sample.image, sample.name).save(target)


def plant(folder: Path, num: int, random: np.random.Generator) -> tuple[Groups, Groups, set[str]]:
    """Pairs of keys of duplicates and of leaks, and the keys of images with wrong labels."""
    files = sorted((folder / "train").rglob("*.png"))
    classes = sorted(path.name for path in (folder / "train").iterdir())
    chosen = [files[i] for i in random.permutation(len(files))[: 3 * num]]
    duplicates, leaks = (
        {plant_copy(folder, file, split, k % 2 == 1) for k, file in enumerate(part)}
        for split, part in (("train", chosen[:num]), ("val", chosen[num : 2 * num]))
    )
    wrong: set[str] = set()
    for file in chosen[2 * num :]:
        others = [name for name in classes if name != file.parent.name]
        target = folder / "train" / others[random.integers(len(others))] / f"wrong_{file.name}"
        file.rename(target)
        wrong.add(target.relative_to(folder).as_posix())
    return duplicates, leaks, wrong


def plant_copy(folder: Path, file: Path, split: str, resized: bool) -> frozenset[str]:
    """Write a copy into the same class of `split`; the keys of both."""
    image = Image.open(file)
    if resized:
        size = (max(1, round(image.width * 0.75)), max(1, round(image.height * 0.75)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    target = folder / split / file.parent.name / f"copy_{file.stem}.jpg"
    target.parent.mkdir(exist_ok=True)
    image.save(target, quality=75)
    return frozenset(path.relative_to(folder).as_posix() for path in (file, target))


def compare(before: Inspection, after: Inspection, duplicates: Groups, leaks: Groups, wrong: set[str]) -> dict:
    groups = keys_of(after)
    original = keys_of(before)
    planted = duplicates | leaks
    copies = {key for pair in planted for key in pair}
    # New groups without a planted copy, and groups that joined a planted copy with an image it is not a copy of.
    false = [group for group in groups if group not in original and group not in planted]
    joined = [group for group in false if group & copies]
    expected = {keys for group in original for keys in group}
    ranked = [
        [one.collection.key(error.image) for error in one.label_check.errors] if one.label_check else []
        for one in (before, after)
    ]
    labels_before, labels_after = map(set, ranked)
    return {
        "duplicates_found": sum(any(pair <= group for group in groups) for pair in duplicates),
        "leaks_found": sum(any(pair <= group for group in leak_keys(after)) for pair in leaks),
        "false_groups": len(false) - len(joined),
        "groups_with_another_image": sum(not (group - copies) <= expected for group in joined),
        "wrong_labels_found": len(wrong & labels_after),
        "wrong_labels_among_as_many_first": len(wrong & set(ranked[1][: len(wrong)])),
        "other_labels_reported": len(labels_after - wrong),
        "other_labels_also_reported_before": len(labels_after & labels_before),
        "accuracy": round(after.label_check.accuracy, 1) if after.label_check else None,
    }


def keys_of(inspection: Inspection) -> Groups:
    return {frozenset(inspection.collection.key(i) for i in group.images) for group in inspection.groups}


def leak_keys(inspection: Inspection) -> Groups:
    return {frozenset(inspection.collection.key(i) for i in group.images) for group in inspection.leaks}


if __name__ == "__main__":
    main()
