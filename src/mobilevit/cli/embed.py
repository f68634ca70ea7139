"""`mobilevit embed`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mobilevit.cli.console import warn
from mobilevit.cli.options import (
    FLAT,
    SELF_CHECK,
    DeviceOptions,
    Flag,
    ImageOptions,
    WeightsArgument,
    WeightsOptions,
    expand,
)
from mobilevit.messages import join_names


@dataclass(frozen=True)
class Embed:
    """Write the pooled features of images, the input of the classifier, to a Parquet file.

    The columns are id, the path of the image relative to the given folder, and vector. The same command completes a
    file that an interrupted command has started. The exit code is 1 if some images cannot be read.
    """

    weights: WeightsArgument
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files, folders (searched recursively) or quoted patterns such as "photos/*.jpg"; or .tar shards."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Parquet file to write. Finished parts are in the folder FILE.parts until the file is complete."""
    overwrite: Flag = False
    """Replace a file, or the parts of an unfinished one, of other weights or images."""
    batch_size: int = 32
    """Batch size in images."""
    num_workers: int = 2
    """Number of processes that read images; 0 reads them in the main process."""
    self_check: Annotated[Flag, SELF_CHECK] = True
    image_options: Annotated[ImageOptions, FLAT] = ImageOptions()
    device_options: Annotated[DeviceOptions, FLAT] = DeviceOptions()
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        if not self.images:
            raise ValueError("no images; give files, folders or quoted patterns")
        weights = self.weights_options.read_for_inference(self.weights)
        self.image_options.apply()
        from mobilevit.embed import EmbedOptions, embed_images

        out = expand(self.out)
        options = EmbedOptions(self.batch_size, self.num_workers, self.device_options.apply(), self.self_check)
        try:
            embedded = embed_images(weights, self.images, out, options=options, overwrite=self.overwrite)
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(f"{str(interrupt) or 'interrupted'}; repeat the command to resume") from None
        print(f"{out}: {embedded.num_images:,} images, {embedded.num_features} features each")
        if embedded.unreadable:
            warn(f"{out}: without {len(embedded.unreadable)} unreadable images: {join_names(embedded.unreadable)}")
        return 1 if embedded.unreadable else 0
