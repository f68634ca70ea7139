"""Maps dataclasses to commands and their fields to options, with tyro."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from mobilevit.recipes import Recipe, to_dict

# Short names for the options of a recipe that are used most; other commands use the same names.
SHORT_NAMES = {
    "data.size_px": "--size",
    "data.flip": "--flip",
    "data.val_fraction": "--val-fraction",
    "data.num_workers": "--num-workers",
    "data.max_unreadable": "--max-unreadable",
    "data.max_megapixels": "--max-megapixels",
    "optimizer.lr": "--lr",
    "optimizer.clip_norm": "--clip-norm",
    "optimizer.freeze": "--freeze",
    "compute.precision": "--precision",
    "compute.compile": "--compile",
    "compute.quantization_aware": "--quantization-aware",
}

# As in the other commands. The dataclasses of these fields do not import tyro.
METAVARS = {"exportoptions.size": "PX [PX]", "exportoptions.max_loss": "POINTS", "sampler.sizes_px": "PX..."}


def _recipe_options() -> dict[str, str]:
    options = {}
    for name, value in to_dict(Recipe()).items():
        for field in [f"{name}.{nested}" for nested in value] if isinstance(value, dict) else [name]:
            options[field] = SHORT_NAMES.get(field, f"--{field.replace('_', '-')}")
    return options


RECIPE_OPTIONS = _recipe_options()
"""The option of each recipe field, such as --size for data.size_px: its short name if it has one."""
# The same for arguments of the Python API, as its messages write them.
ARGUMENT_OPTIONS = {"size_px": "--size"} | {
    name: f"--{re.sub('[ _]', '-', name)}"
    for name in (
        *("batch size", "class", "k", "max loss", "num threads", "num workers"),
        *("ood", "port", "score_threshold", "seeds", "size", "top_k"),
    )
}


class _ValueOutOfRangeError(Exception):
    """A ValueError of a dataclass. tyro adds the path of the dataclass to the message of a ValueError itself."""


def parse(
    commands: Mapping[str, type], args: Sequence[str], descriptions: Mapping[str, str], defaults: Mapping[str, Any]
) -> Any:
    """Return an instance of one of the dataclasses `commands` with the values of `args`.

    `descriptions` are shown in the help. `defaults` holds instances that replace the defaults of a command.

    Raises:
        SystemExit: with code 0 after the help, with code 2 after an error message.
        ValueError: a value is out of range, or values do not fit together.
    """
    subcommands: list[Any] = []
    for name, command in commands.items():
        default = {"default": defaults[name]} if name in defaults else {}
        conf = tyro.conf.subcommand(name, description=descriptions[name], **default)
        subcommands.append(Annotated[command, conf])
    any_command = Annotated[Union[tuple(subcommands)], tyro.conf.arg(name="")]  # noqa: UP007
    # A field instead of the union itself, because tyro's messages then contain the name of the field.
    program = make_dataclass("Program", [("command", any_command)])
    registry = ConstructorRegistry()
    registry.primitive_rule(_non_empty)
    registry.primitive_rule(_choice_or_none)
    registry.struct_rule(_dataclass)
    with registry:
        try:
            return tyro.cli(program, prog="mobilevit", description="", args=list(args)).command
        except _ValueOutOfRangeError as error:
            raise ValueError(str(error)) from None


def name_option(message: str) -> str:
    """`message` with the option instead of the Python name at its start: "data.size_px is 16" -> "--size is 16"."""
    options = RECIPE_OPTIONS | ARGUMENT_OPTIONS
    return re.sub(r"^([\w. ]+?)(?= (is|are) )", lambda match: options.get(match[1], match[1]), message)


def _non_empty(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Rejects an empty string or path, such as the value of an unset variable in --out "$FOLDER"."""
    if info.type not in (str, Path):
        return None

    def convert(values: list[str]) -> Any:
        if not values[0]:
            raise ValueError("the value '' is empty")
        return info.type(values[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar={str: "STR", Path: "PATH"}[info.type],
        instance_from_str=convert,
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda value: [str(value)],
    )


def _choice_or_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A choice that is None if the option is left out. tyro would list 'None' as a choice."""
    literals = [one for one in get_args(info.type) if get_origin(one) is Literal]
    if len(literals) != 1 or set(get_args(info.type)) != {literals[0], type(None)}:
        return None
    values = get_args(literals[0])
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(values) + "}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or value in values,
        str_from_instance=lambda value: [str(value)],
        choices=values,
    )


def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """As tyro's rule for dataclasses, with the short names and two changes of the help.

    A help text is wrapped to the terminal and not at the line ends of the docstring. A default is only shown where it
    says something: not for an option that is left out, and as on or off for a pair such as --flip and --no-flip.
    """
    if not is_dataclass(info.type) or not info.type.__module__.startswith("mobilevit."):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    texts = _field_docstrings(info.type)
    specs = []
    for field in fields(info.type):
        default = getattr(info.default, field.name) if isinstance(info.default, info.type) else _default(field)
        is_single = tyro.conf.FlagCreatePairsOff in getattr(hints[field.name], "__metadata__", ())
        if default is None or default == () or is_single:
            hint = ""
        elif isinstance(default, bool):
            hint = f"(default: {'on' if default else 'off'})"
        else:
            hint = "(required)" if default is tyro.MISSING else None
        conf: dict[str, Any] = {"help_behavior_hint": hint}
        name = f"{info.type.__name__.lower()}.{field.name}"
        if name in SHORT_NAMES:
            conf["aliases"] = [SHORT_NAMES[name]]
        if name in METAVARS:
            conf["metavar"] = METAVARS[name]
        type_: Any = Annotated[hints[field.name], tyro.conf.arg(**conf)]
        specs.append(StructFieldSpec(field.name, type_, default, helptext=texts.get(field.name)))

    def instantiate(*args: Any, **kwargs: Any) -> Any:
        try:
            return info.type(*args, **kwargs)
        except ValueError as error:
            raise _ValueOutOfRangeError(str(error)) from None

    return StructConstructorSpec(instantiate=instantiate, fields=tuple(specs))


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is MISSING else field.default


def _field_docstrings(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a class, each as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                texts[name] = " ".join(docstring.split())
    return texts


def wrapped(text: str, indent: int = 2) -> str:
    """The paragraphs of a text, wrapped to the terminal. tyro wraps no description, and joins lines without indent."""
    width = min(shutil.get_terminal_size().columns, 120)
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return "\n".join(
        textwrap.indent(textwrap.fill(p, width - indent, break_on_hyphens=False), " " * indent) for p in paragraphs
    )
