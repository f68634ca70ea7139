"""Options of the command line: dataclass fields become options, `parse` reads them, and mistakes become one line.

tyro maps the fields to options and renders the help. This module decides what it is told: the text, the default that is
shown, the short names, and how a value is converted, so that a value that does not fit is reported by name.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec

from mobilevit.names import nearest

# The options of a recipe that most commands share or that are used most, under the names that other commands use.
SHORT = {
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
}
_ArgConf: Any = type(tyro.conf.arg())


class _BadValueError(Exception):
    """A value that does not fit. Not a ValueError, which tyro would catch and print in its own way."""


def parse(command: Any, args: Sequence[str], *, prog: str, description: str, default: Any = None) -> Any:
    """An instance of the dataclass `command` with the values of `args`; prints the help and exits if `args` ask for it.

    Raises:
        ValueError: unknown or repeated options, missing or surplus values, values that do not fit.
    """
    help_hint = f"{prog} --help lists the options"
    table = _Table(help_hint)
    said = io.StringIO()
    found: Any = None
    problem, left = "", []
    try:
        with table.registry, contextlib.redirect_stderr(said):
            found, left = tyro.cli(
                command,
                prog=prog,
                description=wrapped(description),
                args=list(args),
                return_unknown_args=True,
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # All other mistakes are found here: an option is followed by fewer values than it takes, or by a surplus one.
        option = re.search(r"--[\w.-]+\w", said.getvalue())
        number = re.search(r"xpected (\d+)", said.getvalue())
        count = number[1] if number else "no"
        problem = f"{option[0] if option else prog} takes {count} value{'' if count == '1' else 's'}; {help_hint}"
    except _BadValueError as mistake:
        problem = str(mistake)
    given = [re.sub(r"_", "-", arg.partition("=")[0]) for arg in _before_separator(args) if arg.startswith("--")]
    unknown = [option for option in given if option not in table.options]
    unknown += [arg for arg in left if re.match(r"-[A-Za-z]", arg)]
    if unknown:
        raise ValueError(f"there is no option {unknown[0]}; {nearest(unknown[0], table.options)}{help_hint}")
    names = [table.names.get(option, option) for option in given]
    for option, name in zip(given, names, strict=True):
        if names.count(name) > 1:
            also = "" if option == name else f", as {name} too"
            raise ValueError(f"{option} is given {names.count(name)} times{also}; give it once")
    if problem:
        raise ValueError(problem)
    if left:
        raise ValueError(f"{' '.join(left)!r} is not expected here; {help_hint}")
    return found


def by_option(message: str) -> str:
    """A message about a field of a recipe, such as "optimizer.lr is 0", with the name of its option instead."""
    return re.sub(
        r"^((data|sampler|optimizer|compute)\.\w+|epochs|batch_size|label_smoothing|ema_decay|seed)(?= is )",
        lambda field: SHORT.get(field[0], f"--{field[0]}".replace("_", "-")),
        message,
    )


def _before_separator(args: Sequence[str]) -> Sequence[str]:
    return args[: args.index("--")] if "--" in args else args


class _Table:
    """What one call of tyro knows of the options: rules that tell it, and names that it was told."""

    def __init__(self, help_hint: str) -> None:
        self.help_hint = help_hint
        self.options = {"--help"}
        self.names: dict[str, str] = {}  # of every option, whatever alias or inverse it is given by
        self.prefixes: dict[Any, str] = {}  # of the options of nested dataclasses
        self.registry = ConstructorRegistry()
        self.registry.struct_rule(self._rule)

    def _rule(self, info: Any) -> StructConstructorSpec | None:
        """The fields of a dataclass as tyro is told of them."""
        if not is_dataclass(info.type):
            return None
        cls: Any = info.type
        hints, texts = get_type_hints(cls, include_extras=True), _texts(cls)
        prefix = self.prefixes.get(cls, "")
        specs, required = [], {}
        for field in fields(cls):
            default = _default(field, info.default, hints[field.name])
            path = f"{prefix}{field.name}"
            is_required = field.default is MISSING and field.default_factory is MISSING
            type_, name = self._field(hints[field.name], path, default, is_required)
            if is_required:
                required[field.name] = name
            text = texts.get(field.name) or (inspect.getdoc(default) if is_dataclass(default) else None)
            specs.append(StructFieldSpec(name=field.name, type=type_, default=default, helptext=text))

        def instantiate(**values: Any) -> Any:
            missing = [name for field, name in required.items() if values[field] is None]
            if missing:
                verb = "is" if len(missing) == 1 else "are"
                raise _BadValueError(f"{' and '.join(missing)} {verb} missing; {self.help_hint}")
            try:
                return cls(**values)
            except ValueError as error:
                raise _BadValueError(str(error)) from None

        return StructConstructorSpec(instantiate=instantiate, fields=tuple(specs))

    def _field(self, hint: Any, path: str, default: Any, is_required: bool) -> tuple[Any, str]:
        """The type that tyro is told, and the name that messages use."""
        metadata = list(hint.__metadata__) if get_origin(hint) is Annotated else []
        bare = hint.__origin__ if metadata else hint
        confs: list[Any] = [one for one in metadata if isinstance(one, _ArgConf)]
        given_name = next((one.name for one in confs if one.name is not None), path)
        if is_dataclass(bare):
            self.prefixes[bare] = f"{given_name}." if given_name else ""
            return hint, given_name
        if tyro.conf.Suppress in metadata:  # set by the command itself
            return hint, given_name
        long = f"--{given_name}".replace("_", "-")
        aliases = [SHORT[path]] if path in SHORT else [a for one in confs for a in one.aliases or ()]
        if aliases:
            metadata.append(tyro.conf.arg(aliases=aliases))
        options, name = [*aliases, long], SHORT.get(path, long)
        if bare is bool:
            inverse = [re.sub(r"^(--(?:\w+\.)?)", r"\1no-", option) for option in options]
            self.names.update(dict.fromkeys(options + inverse, name))
            # A recipe decides what the default is, so both are there. Elsewhere only what changes something.
            if "." in path:
                hint, options = f"(default: {'on' if default else 'off'})", options + inverse
            else:
                hint, options = "", inverse if default else options
                metadata.append(tyro.conf.FlagCreatePairsOff)
            self.options.update(options)
            return Annotated[(bool, *metadata, tyro.conf.arg(help_behavior_hint=hint))], name
        self.options.update(options)
        self.names.update(dict.fromkeys(options, name))
        metavar = next((one.metavar for one in confs if one.metavar), None)
        if tyro.conf.Positional in metadata:
            name = (metavar or name).removesuffix("...")
        nargs, word, convert = _conversion(bare, name)
        spec = PrimitiveConstructorSpec(
            nargs=nargs,
            metavar=word,
            instance_from_str=convert,
            is_instance=lambda value: True,
            str_from_instance=lambda value: [str(value)],
        )
        conf = tyro.conf.arg(
            metavar=metavar or word, help_behavior_hint="(required)" if is_required else _hint(default)
        )
        return Annotated[(object, *metadata, spec, conf)], name


def _hint(default: Any) -> str:
    """The default as the help shows it; nothing where the text says what happens without the option."""
    if default is None or default == ():
        return ""
    return f"(default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def _default(field: Field[Any], instance: Any, hint: Any) -> Any:
    """The default of a field: that of the instance, if there is one, or its own; None or () where it is required."""
    if field.default is MISSING and field.default_factory is MISSING:
        return () if get_origin(get_args(hint)[0] if get_origin(hint) is Annotated else hint) is tuple else None
    if is_dataclass(instance):
        return getattr(instance, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _texts(cls: Any) -> dict[str, str]:
    """The docstrings under the fields of a class, as one paragraph each."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _conversion(hint: Any, name: str) -> tuple[Any, str, Callable[[list[str]], Any]]:
    """How many values a type takes, the word for one of them, and what makes it of them."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is not tuple:
        word, convert = _scalar(hint, name)
        return 1, word, lambda values: convert(values[0])
    element, *others = get_args(hint)
    word, convert = _scalar(element, name)
    nargs = "*" if others == [...] else 1 + len(others)

    def convert_all(values: list[str]) -> tuple[Any, ...]:
        if not values:
            raise _BadValueError(f"{name} is given without a value; give one or more")
        return tuple(map(convert, values))

    return nargs, f"{word}..." if nargs == "*" else word, convert_all


def _scalar(hint: Any, name: str) -> tuple[str, Callable[[str], Any]]:
    """The word for a value, and what makes it of a string."""
    if get_origin(hint) is Literal:
        names = get_args(hint)
        word, kind, make = "{" + ",".join(names) + "}", f"one of {', '.join(names)}", {n: n for n in names}.__getitem__
    else:
        word, kind, make = {
            int: ("INT", "an integer", int),
            float: ("FLOAT", "a number", float),
            str: ("STR", "a non-empty string", _not_empty),
            Path: ("PATH", "a non-empty path", lambda text: Path(_not_empty(text))),
        }[hint]

    def convert(text: str) -> Any:
        try:
            return make(text)
        except (ValueError, KeyError):
            raise _BadValueError(f"{name} is {text!r}; it must be {kind}") from None

    return word, convert


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError
    return text


def wrapped(text: str, indent: int = 2) -> str:
    """A docstring or line, wrapped to the terminal and indented: tyro joins lines without an indent, and wraps none."""
    width, spaces = min(shutil.get_terminal_size().columns, 120), " " * indent
    paragraphs: list[str] = []
    previous = ""
    for line in text.splitlines():
        # A line continues the one before it if that had no room for its first word.
        if previous and len(f"{previous} {line.split(maxsplit=1)[0] if line else ''}") > 116:
            paragraphs[-1] += f" {line}"
        elif line:
            paragraphs.append(line)
        previous = line
    return "\n".join(
        textwrap.fill(one, width, initial_indent=spaces, subsequent_indent=spaces, break_on_hyphens=False)
        for one in paragraphs
    )
