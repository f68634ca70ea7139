"""Decode image files, and preprocess them for a network."""

from __future__ import annotations

import contextlib
import glob
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from mobilevit.messages import first_line

if TYPE_CHECKING:
    from torch import Tensor

try:  # decodes JPEG to the same pixels as Pillow, a quarter faster
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:
    simplejpeg = None

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# EXIF orientation -> the transposition that makes the image upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)  # orientations that swap width and height
# Transparent images are composited on this color in training, evaluation and prediction.
BACKGROUND = "white"

_max_megapixels = math.inf  # see limit_megapixels


class ImageError(ValueError):
    """An image that cannot be read. The message names the file and the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# Limit on the size


def limit_megapixels(max_megapixels: float) -> None:
    """Reject image files above `max_megapixels` (width times height, in millions) in this process.

    Replaces Pillow's own check: a warning above 89 megapixels, an error above 179.
    """
    global _max_megapixels
    _max_megapixels = max_megapixels
    Image.MAX_IMAGE_PIXELS = None


def megapixel_limit() -> float:
    """The limit set by `limit_megapixels` in this process; infinite if Pillow's own check applies."""
    return _max_megapixels


@contextlib.contextmanager
def megapixel_limit_restored() -> Iterator[None]:
    """Restore the limit, and Pillow's own, at the end of the block."""
    global _max_megapixels
    before = _max_megapixels, Image.MAX_IMAGE_PIXELS
    try:
        yield
    finally:
        _max_megapixels, Image.MAX_IMAGE_PIXELS = before


def _check_size(image: Image.Image, name: str) -> None:
    megapixels = image.width * image.height / 1e6
    if megapixels > _max_megapixels:
        raise ImageError(
            f"{name}: too large ({image.width} x {image.height} px, {megapixels:,.0f} megapixels; limit "
            f"{_max_megapixels:g}); save a smaller copy, or raise the limit (--max-megapixels of train, evaluate and "
            "predict)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Decode


@dataclass(frozen=True)
class Header:
    """The header of an image file: upright (width, height) in pixels, format, transparency, mode of Pillow."""

    size: tuple[int, int]
    format: str | None
    has_transparency: bool
    mode: str

    @property
    def megapixels(self) -> float:
        return self.size[0] * self.size[1] / 1e6


def read_header(source: ImageInput | bytes, name: str = "", *, of_any_size: bool = False) -> Header:
    """The header of an image file, from its path or its first bytes, without decoding pixels; or of a decoded image.

    `of_any_size` ignores the limit of `limit_megapixels`.

    Raises:
        ImageError: no such file, not an image, or above the limit.
    """
    name = name or _name(source)
    if isinstance(source, Image.Image | np.ndarray):
        image = _open(source, name)
        return Header(image.size, image.format, image.has_transparency_data, image.mode)
    with (
        _errors_named(name),
        io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file,
        Image.open(file) as image,
    ):
        if not of_any_size:
            _check_size(image, name)
        # EXIF data of a PNG may follow the pixels, and Pillow decodes all pixels to read them.
        has_exif = image.format != "PNG" or "exif" in image.info
        swaps_sides = has_exif and _orientation(image) in SWAPS_SIDES
        size = (image.height, image.width) if swaps_sides else image.size
        return Header(size, image.format, image.has_transparency_data, image.mode)


def read_image(source: ImageInput | bytes, name: str = "") -> Image.Image:
    """Decode an image: first frame, upright, 8-bit RGB, transparency composited on white.

    `bytes` are the contents of a file. `name` is for error messages; by default the file name. A PIL image that needs
    no conversion is returned itself, not copied.

    Raises:
        ImageError: no such file, not an image, truncated, or pixel values without an agreed range.
    """
    name = name or _name(source)
    with _errors_named(name):
        return to_rgb(_open(source, name), name)


def read_crop(
    source: ImageInput | bytes,
    choose: Callable[[int, int], tuple[int, int, int, int]],
    min_px: int,
    name: str = "",
) -> np.ndarray:
    """A crop of the image that `read_image` returns, uint8 (H, W, 3), with as little decoding as possible.

    `choose(width, height)` returns the crop (left, top, right, bottom) in pixels. A JPEG file is decoded at 1/2, 1/4 or
    1/8 of its size if neither side of the crop becomes smaller than `min_px`. Truncated files are errors even if the
    crop is complete.

    Raises:
        ImageError: see `read_image`.
    """
    name = name or _name(source)
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,):
        left, top, right, bottom = choose(source.shape[1], source.shape[0])
        return np.array(source[top:bottom, left:right])
    with _errors_named(name):
        if isinstance(source, str | os.PathLike):
            source = Path(source).read_bytes()
        image = _open(source, name)
        # Files whose header is sufficient. A PIL image may have been changed by the caller.
        is_plain_jpeg = isinstance(source, bytes) and isinstance(image, JpegImageFile) and image.mode in ("RGB", "L")
        orientation = _orientation(image) if is_plain_jpeg else None
        if not is_plain_jpeg:
            image = to_rgb(image, name)
    left, top, right, bottom = choose(*(image.size[::-1] if orientation in SWAPS_SIDES else image.size))
    with _errors_named(name):
        if is_plain_jpeg:
            assert isinstance(image, JpegImageFile)
            scale = next((s for s in (8, 4, 2) if s * min_px <= min(right - left, bottom - top)), 1)
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
                left, top, right, bottom = left // scale, top // scale, -(-right // scale), -(-bottom // scale)
            elif simplejpeg is not None and image.mode == "RGB" and orientation not in TRANSPOSITIONS:
                # If it fails, Pillow is used, so that the same files are readable with and without simplejpeg.
                with contextlib.suppress(ValueError):
                    return simplejpeg.decode_jpeg(source)[top:bottom, left:right]
            image = to_rgb(image, name)
        return np.array(image.crop((left, top, right, bottom)))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The first frame of `image`, upright, as 8-bit RGB; `image` itself if no conversion is necessary.

    `name` is for error messages.
    """
    image.load()  # first: in some formats, the EXIF data follow the pixels
    orientation = _orientation(image)
    if orientation in TRANSPOSITIONS:
        image = image.transpose(TRANSPOSITIONS[orientation])
        # Without the EXIF data, which would transpose the copy again.
        image.info = {key: value for key, value in image.info.items() if key == "transparency"}
    if 0 in image.size:
        raise ImageError(f"{name}: {image.width} x {image.height} px; an image needs at least one pixel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's conversion clips these instead of scaling 65535 to 255. Some readers use mode I for 16 bits.
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: 32-bit integer pixels outside 0..65535; save it with 8 or 16 bits per channel")
        return Image.fromarray((values / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no agreed range; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data raise almost any exception, but the pixels are intact
        return None


def _name(image: ImageInput | bytes) -> str:
    return str(Path(image)) if isinstance(image, str | os.PathLike) else "image"


def _open(source: ImageInput | bytes, name: str) -> Image.Image:
    """`source` as a PIL image; the pixels of a file are not decoded yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise ImageError(
                f"array of {source.dtype} and shape {source.shape}: an image is uint8 of shape (H, W, 3), "
                "(H, W, 4) or (H, W)"
            )
        return Image.fromarray(source)
    # From memory: Pillow memory-maps some files that it opens itself, and then transposes them incorrectly.
    image = Image.open(io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes()))
    _check_size(image, name)
    return image


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Raise errors of the block as ImageError with the name of the image."""
    try:
        yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image, or of a format that Pillow does not read") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large ({first_line(error)}); save a smaller copy") from None
    except Exception as error:  # a damaged file raises almost anything: OSError, SyntaxError, struct.error
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of Pillow
            raise ImageError(f"{name}: {os.strerror(error.errno).lower()}") from None
        raise ImageError(
            f"{name}: damaged image ({first_line(error)}); replace it with an intact image of the same name"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Find


def list_images(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders; see `scan_folder`."""
    return scan_folder(folder)[0]


def scan_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder and its subfolders, recognized by their extensions, and all other files, both sorted.

    Hidden files and folders are ignored.
    """
    # Without formats that Pillow can only write, such as .pdf.
    extensions = {extension for extension, format in Image.registered_extensions().items() if format in Image.OPEN}
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            (images if path.suffix.lower() in extensions else others).append(path)
    return images, others


def find_images(names: Iterable[str]) -> list[Path]:
    """The images of files, folders (searched recursively) and glob patterns, each once, in order.

    Hidden files of a folder are ignored, and so are mask folders beside image folders: masks/ beside images/, and
    those of VOC.

    Raises:
        ValueError: a name without images.
    """
    paths: dict[Path, None] = {}
    for name in names:
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser fails for a file named ~cat.jpg
        if path.is_dir():
            matches = [file for file in list_images(path) if not _is_mask(file, path)]
            if not matches:
                raise ValueError(f"{name}: no images in this folder")
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())  # noqa: PTH207
            if not matches:
                raise ValueError(f"{name}: no such image, folder or pattern; check the name")
        paths.update(dict.fromkeys(matches))
    return list(paths)


def _is_mask(file: Path, data: Path) -> bool:
    image_folders = {"masks": "images", "SegmentationClass": "JPEGImages", "SegmentationObject": "JPEGImages"}
    folders = file.parents[: len(file.relative_to(data).parts) - 1]
    return any(
        folder.name in image_folders and (folder.parent / image_folders[folder.name]).is_dir() for folder in folders
    )


# ---------------------------------------------------------------------------------------------------------------------
# Preprocess


@dataclass(frozen=True)
class Preprocessing:
    """Resizing, cropping and normalization of the input of a network. The defaults are those of the paper's evaluation.

    Attributes:
        resize_px: new length of the short side, or (height, width), which does not keep the aspect ratio.
        crop_px: side of the square center crop.
        interpolation: one of `FILTERS`.
        mean: subtracted after scaling to [0, 1]; R, G, B.
        std: divisor after that; R, G, B.
        background: color on which transparent images are composited first.

    Raises:
        ValueError: sizes that are not positive integers, a crop larger than the resized image, an unknown
            interpolation, `mean` or `std` that are not three finite numbers, a `std` not above 0, a background other
            than white.
    """

    resize_px: int | tuple[int, int] = 288
    crop_px: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    background: str = BACKGROUND  # absent in weights of earlier versions, which used white

    def __post_init__(self) -> None:
        sides = (self.resize_px,) * 2 if isinstance(self.resize_px, int) else self.resize_px
        if not (isinstance(sides, tuple) and len(sides) == 2 and all(isinstance(x, int) and x > 0 for x in sides)):
            raise ValueError(f"resize_px is {self.resize_px!r}; it must be an integer above 0 or (height, width)")
        if not (isinstance(self.crop_px, int) and 0 < self.crop_px <= min(sides)):
            raise ValueError(f"crop_px is {self.crop_px!r}; it must be from 1 to the resized side, {min(sides)}")
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation is {self.interpolation!r}; it can be {', '.join(FILTERS)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} is {values}; it must be three finite numbers, for R, G and B")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}; it must be above 0")
        if self.background != BACKGROUND:
            raise ValueError(f"background is {self.background!r}; this version supports only {BACKGROUND!r}")

    def __call__(self, image: ImageInput) -> Tensor:
        """One image -> float32 (3, crop_px, crop_px), RGB.

        Raises:
            ImageError: see `read_image`.
        """
        import torch  # on use: file names are checked before the import of torch

        rgb = self.resize_and_crop(read_image(image))
        return self.scale(torch.from_numpy(np.array(rgb)).permute(2, 0, 1))

    def scale(self, pixels: Tensor) -> Tensor:
        """Normalize: uint8 pixels (..., 3, H, W) -> float32, on the same device."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return pixels.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)

    def at_size(self, crop_px: int) -> Preprocessing:
        """For another crop size, with `resize_px` in proportion."""
        sides = (self.resize_px,) * 2 if isinstance(self.resize_px, int) else self.resize_px
        height, width = (max(crop_px, round(side * crop_px / self.crop_px)) for side in sides)
        return replace(self, resize_px=height if isinstance(self.resize_px, int) else (height, width), crop_px=crop_px)

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """The geometric part: an RGB image of any size -> crop_px by crop_px."""
        filter = FILTERS[self.interpolation]
        if max(image.size) > 10 * min(image.size):
            # Resized as a whole, an image of 1 x 10,000 px would have 288 x 2,880,000 px.
            return image.resize((self.crop_px, self.crop_px), filter, box=self.input_box(*image.size))
        # Resize the whole image, then crop, as other libraries do. For a crop only, Pillow may resize rows before
        # columns where it would not for the whole image, and round differently, by several levels with bicubic.
        resized = image.resize(self._resized_size(*image.size), filter)
        left, top = ((side - self.crop_px) // 2 for side in resized.size)
        return resized.crop((left, top, left + self.crop_px, top + self.crop_px))

    def input_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The box (left, top, right, bottom) of a `width` x `height` px image, in its pixels, that the crop covers."""
        new_width, new_height = self._resized_size(width, height)
        left, top = (new_width - self.crop_px) // 2, (new_height - self.crop_px) // 2
        x, y = width / new_width, height / new_height
        return left * x, top * y, min((left + self.crop_px) * x, width), min((top + self.crop_px) * y, height)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        if not isinstance(self.resize_px, int):
            return self.resize_px[1], self.resize_px[0]
        short = min(width, height)
        return int(self.resize_px * width / short), int(self.resize_px * height / short)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From the JSON values of `to_dict`, where tuples are lists."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)
