"""From an image, whatever its file holds, to the tensor that a network reads."""

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
# How the camera was held, as its EXIF tag says -> what turns the image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # the turns that swap width and height


# Transparent images are composited on this colour, by training, evaluation and prediction alike.
BACKGROUND = "white"

_max_megapixels = math.inf  # of an image file; see limit_megapixels


class ImageError(ValueError):
    """An image that cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class Header:
    """What the header of an image file says: upright width and height in pixels, format, transparency."""

    size: tuple[int, int]
    format: str | None
    has_transparency: bool

    @property
    def megapixels(self) -> float:
        """Width times height, in millions of pixels."""
        return self.size[0] * self.size[1] / 1e6


def limit_megapixels(max_megapixels: float) -> None:
    """Refuse image files above `max_megapixels` (width times height, in millions) in this process.

    Pillow's own check, a warning above 89 megapixels and an error above 179, is switched off for the process.
    """
    global _max_megapixels
    _max_megapixels = max_megapixels
    Image.MAX_IMAGE_PIXELS = None


@contextlib.contextmanager
def megapixel_limit_restored() -> Iterator[None]:
    """Afterwards, this process has the limit that it had before, and so has Pillow."""
    global _max_megapixels
    before = _max_megapixels, Image.MAX_IMAGE_PIXELS
    try:
        yield
    finally:
        _max_megapixels, Image.MAX_IMAGE_PIXELS = before


def megapixel_limit() -> float:
    """What `limit_megapixels` was given in this process; infinite before, where Pillow's own check holds."""
    return _max_megapixels


def read_header(source: ImageInput | bytes, name: str = "", *, of_any_size: bool = False) -> Header:
    """The header of an image file, given by its path or by its first bytes; no pixels are decoded.

    Of an image in memory, its size and transparency. `of_any_size` reads headers above the limit too.

    Raises:
        ImageError: no such file, no image, or one above the limit of `limit_megapixels`.
    """
    name = name or _name(source)
    if isinstance(source, Image.Image | np.ndarray):
        image = _opened(source, name)
        return Header(image.size, image.format, image.has_transparency_data)
    with (
        _naming(name),
        io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file,
        Image.open(file) as image,
    ):
        if not of_any_size:
            _check_size(image, name)
        # Pillow reads EXIF data behind the pixels of a PNG too, and decodes all of it to get there.
        is_known = image.format != "PNG" or "exif" in image.info
        is_sideways = is_known and _orientation(image) in SIDEWAYS
        size = (image.height, image.width) if is_sideways else image.size
        return Header(size, image.format, image.has_transparency_data)


def _check_size(image: Image.Image, name: str) -> None:
    megapixels = image.width * image.height / 1e6
    if megapixels > _max_megapixels:
        raise ImageError(
            f"{name}: too large ({image.width} x {image.height} px, {megapixels:,.0f} megapixels; limit "
            f"{_max_megapixels:g}); save a smaller copy, or raise the limit (--max-megapixels of train, evaluate and "
            "predict)"
        )


def read_image(source: ImageInput | bytes, name: str = "") -> Image.Image:
    """Open `image` as a person sees it: upright, 8-bit RGB, first frame, see-through parts on white.

    `bytes` are those of an image file. `name` is what to call the image in an error; a file's name unless given.

    Raises:
        ImageError: no such file, no image, cut short, or of a kind without an agreed meaning of its numbers.
    """
    name = name or _name(source)
    with _naming(name):
        image = _opened(source, name)
        rgb = to_rgb(image, name)
    return rgb.copy() if rgb is source else rgb


def read_part(
    source: ImageInput | bytes,
    choose: Callable[[int, int], tuple[int, int, int, int]],
    least_px: int,
    name: str = "",
) -> np.ndarray:
    """A part of `image` as `read_image` shows it, uint8 (H, W, 3): no more than is needed is decoded.

    `choose` is told width and height and answers (left, top, right, bottom) in pixels. Where JPEG can, the part comes
    at 1/2, 1/4 or 1/8 of its size, with neither side below `least_px`. The file must be whole all the same.

    Raises:
        ImageError: as `read_image`.
    """
    name = name or _name(source)
    with _naming(name):
        if isinstance(source, str | os.PathLike):
            source = Path(source).read_bytes()
        image = _opened(source, name)
        # Of these the header says all there is to know, unless the caller opened it and did we know not what.
        is_plain = isinstance(source, bytes) and isinstance(image, JpegImageFile) and image.mode in ("RGB", "L")
        orientation = _orientation(image) if is_plain else None
        if not is_plain:
            image = to_rgb(image, name)
    left, top, right, bottom = choose(*(image.size[::-1] if orientation in SIDEWAYS else image.size))
    with _naming(name):
        if is_plain:
            assert isinstance(image, JpegImageFile)
            scale = next((s for s in (8, 4, 2) if s * least_px <= min(right - left, bottom - top)), 1)
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
                left, top, right, bottom = left // scale, top // scale, -(-right // scale), -(-bottom // scale)
            elif simplejpeg is not None and image.mode == "RGB" and orientation not in TURNS:
                # What it finds fault with is Pillow's to judge: with or without it, the same images can be read.
                with contextlib.suppress(ValueError):
                    return simplejpeg.decode_jpeg(source)[top:bottom, left:right]
            image = to_rgb(image, name)
        return np.array(image.crop((left, top, right, bottom)))


def _name(image: ImageInput | bytes) -> str:
    return str(Path(image)) if isinstance(image, str | os.PathLike) else "image"


def _opened(source: ImageInput | bytes, name: str) -> Image.Image:
    """`image` itself or its file's header, as Pillow sees it."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise ImageError(
                f"array of {source.dtype} and shape {source.shape}: an image is uint8 of shape (H, W, 3), "
                "(H, W, 4) or (H, W)"
            )
        return Image.fromarray(source)
    # From memory: some files that Pillow opens itself it maps into memory, and then scrambles them in a quarter turn.
    image = Image.open(io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes()))
    _check_size(image, name)
    return image


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn whatever is raised while the image `name` is read into a ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image, or of a format that Pillow does not read") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large ({first_line(error)}); save a smaller copy") from None
    except Exception as error:  # a damaged file makes Pillow raise nearly anything: OSError, SyntaxError, struct.error
        if isinstance(error, OSError) and error.errno is not None:  # said by the system, not by Pillow
            raise ImageError(f"{name}: {os.strerror(error.errno).lower()}") from None
        raise ImageError(
            f"{name}: damaged image ({first_line(error)}); replace it with an intact image of the same name"
        ) from error


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders by their endings, sorted; hidden files and folders aside."""
    return images_and_others(folder)[0]


def images_and_others(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder and its subfolders by their endings, and all other files, both sorted.

    Hidden files and folders are in neither list.
    """
    # What Pillow can only write, .pdf say, is no image; nor is ._cat.jpg, which some systems put beside cat.jpg.
    endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            (images if path.suffix.lower() in endings else others).append(path)
    return images, others


def find_images(names: Iterable[str]) -> list[Path]:
    """The images that files, folders (searched through, hidden ones aside) and globs stand for, each once, in order.

    Masks below a folder, in masks/ beside images/ or as VOC keeps them, are no images of it.

    Raises:
        ValueError: a name that stands for nothing.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own stops at a file called ~cat.jpg
        if path.is_dir():
            matches = [file for file in image_files(path) if not _is_mask(file, path)]
            if not matches:
                raise ValueError(f"{name}: no images in this folder")
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())  # noqa: PTH207
            if not matches:
                raise ValueError(f"{name}: no such image, folder or pattern; check the name")
        found.update(dict.fromkeys(matches))
    return list(found)


def _is_mask(file: Path, data: Path) -> bool:
    beside = {"masks": "images", "SegmentationClass": "JPEGImages", "SegmentationObject": "JPEGImages"}
    above = file.parents[: len(file.relative_to(data).parts) - 1]
    return any(parent.name in beside and (parent.parent / beside[parent.name]).is_dir() for parent in above)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The first frame of `image`, turned as its EXIF tag says, as 8-bit RGB; `name` is for the error message.

    It is `image` itself where there is nothing to do.
    """
    image.load()  # first: in some formats what the camera says comes after the pixels
    orientation = _orientation(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
        # The copy must not say that it is still to be turned.
        image.info = {name: value for name, value in image.info.items() if name == "transparency"}
    if 0 in image.size:
        raise ImageError(f"{name}: {image.width} x {image.height} px; there is nothing to see")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips instead of scaling when it converts these; 65535 must become 255. Mode I is how some readers hand
        # over 16 bits.
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: 32-bit integer pixels beyond 0..65535; save it with 8 or 16 bits a channel")
        return Image.fromarray((values / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no agreed range; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data make Pillow raise nearly anything; the pixels are whole
        return None


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input: resize, crop, pixel values; the defaults are the paper's evaluation.

    `resize_px` is the new length of the short side, or (height, width) where the ratio is not kept. `crop_px` is the
    side of the square cut from the middle. Pixels are scaled to [0, 1], then `mean` is taken off and `std` divided by,
    both in the order R, G, B. `background` is the colour on which transparent images are composited before all that.

    Raises:
        ValueError: sizes that are no whole numbers above 0, a crop larger than the resized image, an unknown
            interpolation, means and deviations that are not three finite numbers, deviations not above 0, a
            background other than white.
    """

    resize_px: int | tuple[int, int] = 288
    crop_px: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    background: str = BACKGROUND  # weights saved by earlier versions do not name it: it was white as well

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
        if self.background != BACKGROUND:
            raise ValueError(f"background is {self.background!r}; this version knows only {BACKGROUND!r}")

    def __call__(self, image: ImageInput) -> Tensor:
        """One image -> float32 (3, crop_px, crop_px), RGB. Raises ImageError."""
        import torch  # on use: names of files are checked before anyone waits for it

        return self.scale(torch.from_numpy(np.array(self.resize_and_crop(read_image(image)))).permute(2, 0, 1))

    def scale(self, pixels: Tensor) -> Tensor:
        """The other half: uint8 pixels (..., 3, H, W) -> float32 as the network expects them, wherever they are."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return pixels.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)

    def at_size(self, crop_px: int) -> Preprocessing:
        """The same for another side of the square, resized in proportion."""
        sides = (self.resize_px,) * 2 if isinstance(self.resize_px, int) else self.resize_px
        height, width = (max(crop_px, round(side * crop_px / self.crop_px)) for side in sides)
        return replace(self, resize_px=height if isinstance(self.resize_px, int) else (height, width), crop_px=crop_px)

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
        # An image of 1 x 10,000 px would be one of 288 x 2,880,000 on the way.
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
