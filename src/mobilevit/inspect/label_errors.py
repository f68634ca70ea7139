"""Find likely label errors by confident learning, with probabilities of models that were fitted without the image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mobilevit.files import require

NUM_FOLDS = 5
C = 0.01  # inverse of the regularization of standardized features; better than 1 in docs/inspect.md


@dataclass(frozen=True)
class LabelError:
    """An image whose label is probably wrong: its index, the most probable class and its probability (0 to 1)."""

    image: int
    predicted: str
    probability: float
    label_probability: float


@dataclass(frozen=True)
class LabelCheck:
    """Likely label errors, the most likely first.

    `accuracy` in percent is that of the predictions; if it is low, the reports mean little. `skipped` are classes with
    too few images to be checked.
    """

    errors: tuple[LabelError, ...]
    accuracy: float
    skipped: tuple[str, ...]


def find_label_errors(
    images: np.ndarray, features: np.ndarray, labels: Sequence[str], groups: np.ndarray
) -> LabelCheck:
    """Find likely label errors among `images`.

    A logistic regression on `features` (n, D) is fitted on four fifths of the images and predicts the others; copies of
    an image (equal `groups`) are never on both sides. cleanlab's filter selects the images whose label is improbable by
    the thresholds of confident learning (Northcutt, Jiang and Chuang 2021). Results do not depend on the number of
    threads or processes, and there are no random numbers but those of a fixed seed.

    Args:
        images: (n,) indices that the results refer to.
        features: one row for each of `images`.
        labels: the class of each.
        groups: (n,) images with the same number are copies.

    Raises:
        ValueError: scikit-learn or cleanlab is not installed, or fewer than two classes have enough images.
    """
    filter_ = require("cleanlab.filter", "inspect", "finding label errors")
    linear_model = require("sklearn.linear_model", "inspect", "finding label errors")
    selection = require("sklearn.model_selection", "inspect", "finding label errors")
    pipeline = require("sklearn.pipeline", "inspect", "finding label errors")
    preprocessing = require("sklearn.preprocessing", "inspect", "finding label errors")
    names, classes = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
    is_large = np.array([len(np.unique(groups[classes == i])) >= NUM_FOLDS for i in range(len(names))])
    if is_large.sum() < 2:
        raise ValueError(
            f"{is_large.sum()} classes have {NUM_FOLDS} different images or more, and finding label errors needs two; "
            "add images, or leave out WEIGHTS"
        )
    is_used = is_large[classes]
    used_names, classes = np.unique(classes[is_used], return_inverse=True)
    used_names, images, features = names[used_names], images[is_used], features[is_used]
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(C=C, max_iter=200))
    folds = selection.StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # An unfinished fit is a good one; a fold may have no image of a class of which most images are copies.
        warnings.simplefilter("ignore")
        probabilities = selection.cross_val_predict(
            model, features, classes, groups=groups[is_used], cv=folds, method="predict_proba"
        )
        order = filter_.find_label_issues(classes, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    best = probabilities.argmax(1)
    errors = tuple(
        LabelError(
            int(images[i]), str(used_names[best[i]]), float(probabilities[i, best[i]]), float(probabilities[i, c])
        )
        for i, c in ((i, classes[i]) for i in order.tolist())
    )
    return LabelCheck(errors, 100 * float((best == classes).mean()), tuple(names[~is_large].tolist()))
