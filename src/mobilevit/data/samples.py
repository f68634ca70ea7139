"""What a source is, whatever its images are kept in: the protocol, and how labels get their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mobilevit.images import ImageInput

# The number of a class, where images are classified; else what `annotations.py` knows of an image.
Label = TypeVar("Label", covariant=True)


@dataclass(frozen=True)
class Sample(Generic[Label]):
    """An image still to be read (a file, the bytes of one, or pixels), the number of its class, its name."""

    image: ImageInput | bytes
    label: Label
    name: str


class Source(Protocol[Label]):
    """Labelled images by index. Sources never decode: what they hand over is for `read_image`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class number."""
        ...

    @property
    def labels(self) -> Sequence[Label]:
        """Class number of every image."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample[Label]: ...


@dataclass(frozen=True)
class Subset(Generic[Label]):
    """Some images of a source, in the order of `indices`."""

    source: Source[Label]
    indices: tuple[int, ...]
    labels: tuple[Label, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        labels = self.source.labels
        object.__setattr__(self, "labels", tuple(labels[i] for i in self.indices))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the whole source."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample[Label]:
        return self.source[self.indices[index]]


class Images(Protocol):
    """Images without labels, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageInput | bytes: ...

    def key(self, index: int) -> str:
        """What tells an image from the others, and stays the same where the data are moved."""
        ...

    def name(self, index: int) -> str:
        """What to call an image in an error."""
        ...


@dataclass(frozen=True)
class Labelled:
    """`Images` with a label each."""

    images: Images
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample[int]:
        return Sample(self.images[index], self.labels[index], self.images.name(index))


@dataclass(frozen=True)
class Part:
    """A split as it was found, its labels not yet looked at: numbers, names, or None where there is no label.

    `class_names` are those that came with numbers; None where the labels are names, or numbers that nothing names.
    """

    where: str
    images: Images
    labels: Sequence[int | str | None]
    class_names: tuple[str, ...] | None = None

    def own_class_names(self) -> tuple[str, ...]:
        """Class names of a network trained on this part: its own, else the sorted labels, else 0 to the highest number.

        Raises:
            ValueError: no images or labels, numbers and names, one class only, a class without images.
        """
        self._check()
        names: tuple[str, ...]
        if self.class_names is not None:
            names = self.class_names
        elif isinstance(self.labels[0], str):
            names = tuple(sorted({label for label in self.labels if isinstance(label, str)}))
        else:
            names = tuple(str(i) for i in range(max(label for label in self.labels if isinstance(label, int)) + 1))
        found = {names[label] if isinstance(label, int) else label for label in self.labels}
        if len(names) < 2:
            raise ValueError(f"{self.where}: all images are of {listed(names)}; expected two classes or more")
        empty = [name for name in names if name not in found]
        if empty:
            gap = "" if self.class_names else "; classes without names are numbered from 0 without gaps"
            raise ValueError(f"{self.where}: no images of {listed(empty)}; add some or remove the class{gap}")
        return names

    def source(self, class_names: Sequence[str]) -> Labelled:
        """The images with the numbers that `class_names` give their classes, as `find_evaluation` explains.

        Raises:
            ValueError: no images or labels, numbers and names, a class that is not among `class_names`.
        """
        self._check()
        number_of = {name: number for number, name in enumerate(class_names)}
        if self.class_names is not None:
            names = [self.class_names[label] if isinstance(label, int) else label for label in self.labels]
        else:
            names = [str(label) for label in self.labels]
        unknown = sorted({name for name in names if name not in number_of}, key=str)
        if not unknown:
            labels = tuple(number_of[name] for name in names if name is not None)
        elif self.class_names is None and all(isinstance(label, int) for label in self.labels):
            labels = tuple(label for label in self.labels if isinstance(label, int))
            self._check_range(len(class_names))
        else:
            raise ValueError(
                f"{self.where}: {listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the "
                f"{len(class_names)} classes known ({few(class_names)}); rename or remove"
            )
        return Labelled(self.images, labels, tuple(class_names))

    def _check(self) -> None:
        """Whatever is wrong with labels whoever uses them."""
        if not self.labels:
            raise ValueError(f"{self.where}: holds no images")
        if len(self.labels) != len(self.images):
            raise ValueError(f"{self.where}: {len(self.images)} images, but {len(self.labels)} labels")
        unlabelled = [i for i, label in enumerate(self.labels) if label is None]
        if unlabelled:
            raise ValueError(
                f"{self.images.name(unlabelled[0])}: has no label, like {len(unlabelled) - 1} more of "
                f"{len(self.labels)} images; label or remove them"
            )
        kinds = {type(label) for label in self.labels}
        if len(kinds) > 1:
            a, b = (next(label for label in self.labels if isinstance(label, kind)) for kind in (int, str))
            raise ValueError(f"{self.where}: labels are numbers ({a}) and names ({b!r}); use one of the two")
        if kinds == {int}:
            self._check_range(None if self.class_names is None else len(self.class_names))
        elif self.class_names is not None:
            unknown = sorted({label for label in self.labels if isinstance(label, str)} - set(self.class_names))
            if unknown:
                raise ValueError(
                    f"{self.where}: {listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the "
                    f"{len(self.class_names)} names of its own ({few(self.class_names)}); mend labels or names"
                )

    def _check_range(self, num_classes: int | None) -> None:
        for i, label in enumerate(self.labels):
            assert isinstance(label, int)
            if label < 0 or (num_classes is not None and label >= num_classes):
                right = "0 or more" if num_classes is None else f"from 0 to {num_classes - 1}, one of the classes known"
                raise ValueError(f"{self.images.name(i)}: label {label} is out of range; it must be {right}")


def listed(names: Sequence[object]) -> str:
    """Names of classes for the middle of a sentence."""
    return f"{'class' if len(names) == 1 else 'classes'} {few([repr(name) for name in names])}"


def few(names: Sequence[str]) -> str:
    """The first five names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
