"""Tasks: datasets, model, loss, metrics and result records of classification, detection and segmentation."""

from mobilevit.tasks.classification import Classification
from mobilevit.tasks.detection import Detection
from mobilevit.tasks.segmentation import Segmentation
from mobilevit.tasks.task import ClassMetrics, Gather, Results, Task, single_process

__all__ = ["TASKS", "ClassMetrics", "Gather", "Results", "Task", "single_process"]

TASKS: dict[str, Task] = {"classify": Classification(), "detect": Detection(), "segment": Segmentation()}
