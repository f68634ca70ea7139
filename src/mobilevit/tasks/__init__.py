"""Tasks: datasets, model, loss, metrics and results of classification, detection and segmentation."""

from mobilevit.tasks.classification import Classification
from mobilevit.tasks.detection import Detection
from mobilevit.tasks.multilabel import MultilabelClassification
from mobilevit.tasks.segmentation import Segmentation
from mobilevit.tasks.task import ClassMetrics, Described, Gather, Results, Task, single_process

__all__ = ["TASKS", "ClassMetrics", "Described", "Gather", "Results", "Task", "single_process"]

TASKS: dict[str, Task] = {
    "classify": Classification(),
    "multilabel": MultilabelClassification(),
    "detect": Detection(),
    "segment": Segmentation(),
}
