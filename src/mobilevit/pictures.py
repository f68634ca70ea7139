"""From a picture, whatever its file holds, to the tensor that a network reads."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

Picture = str | os.PathLike[str] | Image.Image | np.ndarray

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# How the camera was held, as its EXIF tag says -> what turns the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture that cannot be read; the message names the file and the reason."""


def read_picture(picture: Picture) -> Image.Image:
    """Open `picture` as a person sees it: upright, 8-bit RGB, first frame, see-through parts on white.

    Raises:
        PictureError: no such file, no picture, cut short, or of a kind without an agreed meaning of its numbers.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))):
            raise PictureError(
                f"array of {picture.dtype} and shape {picture.shape}: a picture is uint8 of shape (H, W, 3), "
                "(H, W, 4) or (H, W)"
            )
        picture = Image.fromarray(picture)
    name = "picture" if isinstance(picture, Image.Image) else str(Path(picture))
    try:
        if isinstance(picture, Image.Image):
            return to_rgb(picture, name)
        # Opened here: some files that Pillow opens it maps into memory, and then scrambles them in a quarter turn.
        with Path(picture).open("rb") as file, Image.open(file) as image:
            return to_rgb(image, name)
    except PictureError:
        raise
    except Image.UnidentifiedImageError:
        raise PictureError(f"{name}: not a picture, or of a format that Pillow does not read") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: too large a picture ({first_line(error)})") from None
    except Exception as error:  # a damaged file makes Pillow raise nearly anything: OSError, SyntaxError, struct.error
        if isinstance(error, OSError) and error.errno is not None:  # said by the system, not by Pillow
            raise PictureError(f"{name}: {os.strerror(error.errno).lower()}") from None
        raise PictureError(f"{name}: damaged picture ({first_line(error)})") from error


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders by their endings, sorted; hidden files and folders aside."""
    # What Pillow can only write, .pdf say, is no picture; nor is ._cat.jpg, which some systems put beside cat.jpg.
    endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The first frame of `image`, turned as its EXIF tag says, as 8-bit RGB; `name` is for the error message."""
    image = _upright(image)
    if 0 in image.size:
        raise PictureError(f"{name}: {image.width} x {image.height} px; there is nothing to see")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips instead of scaling when it converts these; 65535 must become 255. Mode I is how some readers hand
        # over 16 bits.
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError(f"{name}: 32-bit integer pixels beyond 0..65535; save it with 8 or 16 bits a channel")
        return Image.fromarray((values / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PictureError(f"{name}: floating-point pixels have no agreed range; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data make Pillow raise nearly anything; the pixels are whole
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input: resize, crop, pixel values; the defaults are the paper's evaluation.

    `resize_px` is the new length of the short side, or (height, width) where the ratio is not kept. `crop_px` is the
    side of the square cut from the middle. Pixels are scaled to [0, 1], then `mean` is taken off and `std` divided by,
    both in the order R, G, B.

    Raises:
        ValueError: sizes that are no whole numbers above 0, a crop larger than the resized picture, an unknown
            interpolation, means and deviations that are not three finite numbers, deviations not above 0.
    """

    resize_px: int | tuple[int, int] = 288
    crop_px: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        sides = (self.resize_px,) * 2 if isinstance(self.resize_px, int) else self.resize_px
        if not (isinstance(sides, tuple) and len(sides) == 2 and all(isinstance(x, int) and x > 0 for x in sides)):
            raise ValueError(f"resize_px is {self.resize_px!r}; it must be a whole number above 0 or (height, width)")
        if not (isinstance(self.crop_px, int) and 0 < self.crop_px <= min(sides)):
            raise ValueError(f"crop_px is {self.crop_px!r}; it must be from 1 to the resized side, {min(sides)}")
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation is {self.interpolation!r}; it can be {', '.join(FILTERS)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} is {values}; it must be three finite numbers, for R, G and B")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}; it must be above 0")

    def __call__(self, picture: Picture) -> Tensor:
        """One picture -> float32 (3, crop_px, crop_px), RGB. Raises PictureError."""
        pixels = torch.from_numpy(np.array(self.resize_and_crop(read_picture(picture)))).permute(2, 0, 1)
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        return (pixels.float() / 255 - mean) / std

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """The geometric half: an RGB image of any size -> crop_px by crop_px."""
        width, height = image.size
        if isinstance(self.resize_px, int):
            short = min(width, height)
            new_width, new_height = (int(self.resize_px * side / short) for side in (width, height))
        else:
            new_height, new_width = self.resize_px
        left, top = (new_width - self.crop_px) // 2, (new_height - self.crop_px) // 2
        right, bottom = left + self.crop_px, top + self.crop_px
        filter = FILTERS[self.interpolation]
        if max(width, height) <= 10 * min(width, height):
            # Resized whole and then cut, as everywhere else: asked for a part, Pillow may resize the rows before the
            # columns where it would not for the whole, and round otherwise, by several grey levels where bicubic.
            return image.resize((new_width, new_height), filter).crop((left, top, right, bottom))
        # A picture of 1 x 10,000 px would be one of 288 x 2,880,000 on the way.
        x, y = width / new_width, height / new_height
        box = (left * x, top * y, min(right * x, width), min(bottom * y, height))
        return image.resize((self.crop_px, self.crop_px), filter, box=box)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` undoes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From `to_dict`'s JSON values, where tuples have become lists."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def first_line(error: BaseException) -> str:
    """What an error says, in one line, for the end of a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
