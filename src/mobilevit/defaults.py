"""Defaults and limits that several modules and the command line share. Each is written here and nowhere else."""

from __future__ import annotations

from typing import Literal

MIN_SIZE_PX = 32
"""Smallest height or width of an input: the output stride of the network."""
MAX_MEGAPIXELS = 180.0
"""Largest image file to read, in millions of pixels: about where Pillow refuses a file as a decompression bomb."""
TOP_K = 5
"""Classes that a prediction lists."""
SCORE_THRESHOLD = 0.3
"""Detections below this score are not shown."""
LABEL_THRESHOLD = 0.5
"""Probability of a label in multi-label classification, for weights without thresholds of their own."""
PREDICT_BATCH_SIZE = 16
"""Images per batch of predictions."""
MAX_PER_IMAGE = 100
"""Boxes per image after non-maximum suppression."""
NUM_THREADS = 2
"""CPU threads of a benchmark, and of the check of an exported artifact."""
NUM_CALIBRATION_IMAGES = 256
"""Images that determine the ranges of int8 values."""
NUM_ROUNDS = 40
"""Interleaved rounds of a benchmark."""
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""Tools for experiment tracking; see `mobilevit.training.track`."""
CorruptionName = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]
"""Common corruptions; see `mobilevit.data.corruptions`."""
