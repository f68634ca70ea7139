"""k-nearest-neighbor accuracy, compared with scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier

from mobilevit.data.sources import find_splits
from mobilevit.embed import EmbedOptions
from mobilevit.images import Preprocessing
from mobilevit.predict import Classifier, load, save
from mobilevit.tasks import knn
from mobilevit.tasks.knn import evaluate_knn, nearest_classes
from mobilevit.weights import read
from small_networks import randomize


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights without a classifier; images/ of three overlapping colors, not divided; split/ with train/ and test/."""
    folder = tmp_path_factory.mktemp("data")
    model = randomize(Classifier("xxs", num_classes=0))
    model.preprocessing = Preprocessing(resize_px=36, crop_px=32)
    save(model, folder / "w.safetensors")
    random = np.random.default_rng(0)
    for i in range(75):
        label = i % 3
        pixels = random.normal(100, 25, (3,)) + [70 * (channel == label) for channel in range(3)]
        pixels = (pixels + random.normal(0, 20, (34, 41, 3))).clip(0, 255).astype(np.uint8)
        for root in ("images", f"split/{'train' if i < 51 else 'test'}"):
            file = folder / root / "rgb"[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return folder


@pytest.mark.parametrize("k", [1, 4, 20])
def test_scikit_learn_classifies_equally(k: int, monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(k)
    index, queries = (random.normal(size=(n, 7)).astype(np.float32) for n in (101, 57))
    labels = random.integers(0, 4, 101)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(index, labels)
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 1000)  # several chunks
    predictions, fractions = nearest_classes(queries, index, labels, num_classes=4, k=k)
    assert predictions.tolist() == reference.predict(queries).tolist()
    np.testing.assert_allclose(fractions, reference.predict_proba(queries).max(1))


@pytest.mark.parametrize(("folder", "split", "size_px"), [("images", "val", None), ("split", "test", 48)])
def test_evaluate_knn(data: Path, folder: str, split: str, size_px: int | None):
    weights = read(data / "w.safetensors")
    result = evaluate_knn(weights, data / folder, k=5, size_px=size_px, options=EmbedOptions(batch_size=7))
    model = load(data / "w.safetensors")
    if size_px:
        model.preprocessing = Preprocessing(resize_px=54, crop_px=48)
    vectors = []
    sources = find_splits("classify", data / folder, 0.2)
    for source in sources:
        with torch.no_grad():
            vectors.append(model(model.preprocess([Path(str(sample.image)) for sample in source])).numpy())
    train, val = sources
    reference = KNeighborsClassifier(5, metric="cosine").fit(vectors[0], train.labels)
    assert result.split == split
    assert result.size_px == (size_px or 32)
    predictions = reference.predict(vectors[1])
    accuracy = 100 * accuracy_score(val.labels, predictions)
    assert result.metrics == {
        "knn_top1": pytest.approx(accuracy),
        "balanced_accuracy": pytest.approx(100 * balanced_accuracy_score(val.labels, predictions)),
        "macro_f1": pytest.approx(100 * f1_score(val.labels, predictions, average="macro")),
        "num_images": len(val),
    }
    assert 40 < accuracy <= 100  # above chance
    recalls = [row.metrics["recall"] for row in result.per_class]
    predictions = reference.predict(vectors[1])
    assert recalls == pytest.approx([100 * np.mean(predictions[np.array(val.labels) == i] == i) for i in range(3)])


def test_errors(data: Path):
    weights = read(data / "w.safetensors")
    with pytest.raises(ValueError, match=r"k is 0; it must be 1 or more"):
        evaluate_knn(weights, data / "split", k=0)
    with pytest.raises(ValueError, match=r"k is 52, but .*split has 51 training images; give fewer"):
        evaluate_knn(weights, data / "split", k=52)
    with pytest.raises(ValueError, match=r"split is 'train', .*choose val or test"):
        evaluate_knn(weights, data / "split", k=1, split="train")
    with pytest.raises(ValueError, match=r"has no split 'val'"):
        evaluate_knn(weights, data / "split", k=1, split="val")
