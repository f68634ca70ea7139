"""Maps dataclasses to commands and their fields to options, with tyro; every mistake is one line.

tyro parses the arguments and renders the help. Its own error messages fill boxes of several lines, so this module
converts the values itself: a mistake then names the option, the value and the fix.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import itertools
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec

from mobilevit.messages import nearest
from mobilevit.recipes import Recipe

# Short names for the recipe options that are used most; other commands use the same names.
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
}
# The parts of a recipe prefix their options; all other nested dataclasses share options between commands.
_PREFIXES = {hint: f"{name}." for name, hint in get_type_hints(Recipe).items() if is_dataclass(hint)}
_ArgConf: Any = type(tyro.conf.arg())


def parse(
    commands: Mapping[str, type], args: Sequence[str], descriptions: Mapping[str, str], defaults: Mapping[str, Any]
) -> Any:
    """Return an instance of one of the dataclasses `commands` with the values of `args`.

    Prints the help and exits if `args` ask for it. `defaults` holds instances that replace the defaults of a command.

    Raises:
        ValueError: an unknown command; unknown or repeated options; missing, surplus or invalid values.
    """
    mistakes: list[str] = []  # found in the values; unknown options are reported first
    registry = ConstructorRegistry()
    registry.struct_rule(lambda info: _struct_spec(info.type, info.default, mistakes) if _is_ours(info.type) else None)
    choices: list[Any] = []
    for name, command in commands.items():
        default = {"default": defaults[name]} if name in defaults else {}
        text = descriptions[name] if name in args[:1] else descriptions[name].partition("\n")[0]
        choices.append(Annotated[command, tyro.conf.subcommand(name, description=text, **default)])
    any_command: Any = Union[tuple(choices)]  # noqa: UP007
    result, surplus = None, []
    errors = io.StringIO()
    try:
        with registry, contextlib.redirect_stderr(errors):
            result, surplus = tyro.cli(any_command, prog="mobilevit", args=list(args), return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        # All that is left to tyro: an option with too few values. Its message fills a box with a title: take the lines
        # between the title and the first rule.
        lines = [line.strip("│| ") for line in errors.getvalue().splitlines()[1:]]
        groups = itertools.groupby(lines, key=lambda line: any(map(str.isalpha, line)))
        mistakes.append(next(" ".join(group).rstrip(".") for has_text, group in groups if has_text))
    if args[0] not in commands:
        raise ValueError(
            f"there is no command {args[0]!r}; {nearest(args[0], commands)}the commands are {', '.join(commands)}"
        )
    help_hint = f"mobilevit {args[0]} --help lists the options"
    labels = _labels(commands[args[0]])
    before_separator = itertools.takewhile(lambda arg: arg != "--", args)
    given = [arg.partition("=")[0].replace("_", "-") for arg in before_separator if arg.startswith("--")]
    unknown = [option for option in given if option not in labels]
    unknown += [arg for arg in surplus if arg.startswith("-") and arg[1:2].isalpha()]
    if unknown:
        raise ValueError(f"there is no option {unknown[0]}; {nearest(unknown[0], labels)}{help_hint}")
    given_labels = [labels[option] for option in given]
    for option, label in zip(given, given_labels, strict=True):
        if given_labels.count(label) > 1:
            alias = "" if option == label else f", as {label} too"
            raise ValueError(f"{option} is given {given_labels.count(label)} times{alias}; give it once")
    if mistakes:
        raise ValueError(f"{mistakes[0]}; {help_hint}")
    if surplus:
        raise ValueError(f"{' '.join(surplus)!r} is not expected here; {help_hint}")
    return result


def with_option_name(message: str) -> str:
    """Replace the name of a recipe field at the start of a message, "optimizer.lr is 0", by that of its option."""
    field, verb, rest = message.partition(" is ")
    return f"{SHORT_NAMES.get(field, _long_name(field))}{verb}{rest}" if field in _recipe_fields() else message


def _recipe_fields() -> Iterator[str]:
    for field in fields(Recipe):
        if (part := get_type_hints(Recipe)[field.name]) in _PREFIXES:
            yield from (f"{_PREFIXES[part]}{inner.name}" for inner in fields(part))
        else:
            yield field.name


@dataclass(frozen=True)
class _Option:
    """A field of a command's dataclass, as an option or a positional argument."""

    field: Field[Any]
    type: Any  # without Annotated
    metadata: list[Any]  # of Annotated
    label: str  # in messages
    names: tuple[str, ...]  # all that stand for it on the command line: the long name, aliases and inverses
    aliases: tuple[str, ...]
    metavar: str | None

    @property
    def is_required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def is_nested(self) -> bool:
        return is_dataclass(self.type)


def _options(cls: Any) -> Iterator[_Option]:
    """The fields of a dataclass, without those that tyro is told to suppress."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        metadata = list(getattr(hints[field.name], "__metadata__", ()))
        type_ = hints[field.name].__origin__ if metadata else hints[field.name]
        confs: list[Any] = [one for one in metadata if isinstance(one, _ArgConf)]
        metavar = next((one.metavar for one in confs if one.metavar), None)
        path = _PREFIXES.get(cls, "") + field.name
        long = _long_name(next((one.name for one in confs if one.name is not None), path))
        aliases = [alias for one in confs for alias in one.aliases or ()] or [a for a in [SHORT_NAMES.get(path)] if a]
        label, names = SHORT_NAMES.get(path, long), [long, *aliases]
        if tyro.conf.Positional in metadata:
            label, names = (metavar or field.name.upper()).removesuffix("..."), []
        elif type_ is bool:
            inverses = [f"--{prefix}{dot}no-{name}" for prefix, dot, name in (n[2:].rpartition(".") for n in names)]
            # A recipe decides what the default is, so both exist. Elsewhere only the one that changes something.
            names = names + inverses if cls in _PREFIXES else inverses if field.default else names
        if tyro.conf.Suppress not in metadata:
            yield _Option(field, type_, metadata, label, tuple(names), tuple(aliases), metavar)


def _is_ours(type_: Any) -> bool:
    return is_dataclass(type_) and type_.__module__.startswith("mobilevit.")  # tyro has dataclasses as well


def _long_name(path: str) -> str:
    return f"--{path}".replace("_", "-")


def _labels(cls: Any) -> dict[str, str]:
    """Each name of each option of a command, to the label of the option."""
    labels = {"--help": "--help"}
    for option in _options(cls):
        labels |= _labels(option.type) if option.is_nested else dict.fromkeys(option.names, option.label)
    return labels


def _struct_spec(cls: Any, instance: Any, mistakes: list[str]) -> StructConstructorSpec:
    """The fields of a dataclass for tyro. Constructs None instead of an instance where there are mistakes."""
    texts = _field_docstrings(cls)
    values_of = instance if is_dataclass(instance) else None
    defaults = {field.name: _default(field, values_of) for field in fields(cls)}
    specs, required = [], {}
    for option in _options(cls):
        name, default = option.field.name, defaults[option.field.name]
        if option.is_required:
            required[name] = option.label
            default = () if get_origin(option.type) is tuple else None  # so that `instantiate` reports it
        text = texts.get(name) or (inspect.getdoc(option.type) if option.is_nested else None)
        type_ = _annotated(cls, option, default, mistakes)
        specs.append(StructFieldSpec(name=name, type=type_, default=default, helptext=text))

    def instantiate(**values: Any) -> Any:
        missing = [label for name, label in required.items() if values[name] is None]
        if missing and not mistakes:
            mistakes.append(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        if mistakes:
            return None
        try:
            return cls(**(defaults | values))
        except ValueError as error:
            mistakes.append(with_option_name(str(error)))
            return None

    return StructConstructorSpec(instantiate=instantiate, fields=tuple(specs))


def _default(field: Field[Any], instance: Any) -> Any:
    if instance is not None:
        return getattr(instance, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _annotated(cls: Any, option: _Option, default: Any, mistakes: list[str]) -> Any:
    """The type of a field with what tyro needs to know: names, the default that the help shows, the conversion."""
    if option.is_nested:
        return Annotated[option.type, tyro.conf.arg(name=_PREFIXES.get(option.type, "").removesuffix("."))]
    conf: dict[str, Any] = {"aliases": option.aliases} if option.aliases else {}
    if option.type is bool:
        is_pair = cls in _PREFIXES
        conf["help_behavior_hint"] = f"(default: {'on' if default else 'off'})" if is_pair else ""
        markers = [] if is_pair else [tyro.conf.FlagCreatePairsOff]
        return Annotated[(bool, *option.metadata, *markers, tyro.conf.arg(**conf))]
    nargs, word, convert = _conversion(option, mistakes)
    spec = PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=word,
        instance_from_str=convert,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )
    # No default is shown where the text says what happens without the option.
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    hint = "(required)" if option.is_required else "" if shown in (None, "") else f"(default: {shown})"
    conf |= {"metavar": option.metavar or word, "help_behavior_hint": hint}
    return Annotated[(object, *option.metadata, spec, tyro.conf.arg(**conf))]


def _field_docstrings(cls: Any) -> dict[str, str]:
    """The docstrings under the fields of a class, as one paragraph each."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _conversion(option: _Option, mistakes: list[str]) -> tuple[Any, str, Callable[[list[str]], Any]]:
    """How many values an option takes, the placeholder of one of them, and their conversion."""
    type_ = option.type
    if get_origin(type_) in (Union, UnionType):
        (type_,) = (one for one in get_args(type_) if one is not NoneType)
    element, *others = get_args(type_) if get_origin(type_) is tuple else (type_,)
    word, kind, convert_one = _scalar(element)

    def convert(values: list[str]) -> Any:
        if not values:
            mistakes.append(f"{option.label} is given without a value; give one or more")
        converted = []
        for value in values:
            try:
                converted.append(convert_one(value))
            except (ValueError, KeyError):
                hint = nearest(value, get_args(element)) if get_origin(element) is Literal else ""
                mistakes.append(f"{option.label} is {value!r}; {hint}it must be {kind}")
        return tuple(converted) if get_origin(type_) is tuple else next(iter(converted), None)

    if others == [...]:
        return "*", f"{word}...", convert
    return 1 + len(others), word, convert


def _scalar(type_: Any) -> tuple[str, str, Callable[[str], Any]]:
    """The placeholder of a value, what it must be, and its conversion from a string."""
    if get_origin(type_) is Literal:
        names = get_args(type_)
        return "{" + ",".join(names) + "}", f"one of {', '.join(names)}", {n: n for n in names}.__getitem__
    return {
        int: ("INT", "an integer", int),
        float: ("FLOAT", "a number", float),
        str: ("STR", "a non-empty string", _not_empty),
        Path: ("PATH", "a non-empty path", lambda text: Path(_not_empty(text))),
    }[type_]


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError
    return text


def wrapped(text: str, indent: int = 2) -> str:
    """A docstring, wrapped to the terminal. tyro joins lines that are not indented, and wraps none."""
    width, spaces = min(shutil.get_terminal_size().columns, 120) - 2, " " * indent
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
