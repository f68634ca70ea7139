"""The command line. Every command imports what it needs when it runs, so that `mobilevit --help` waits for no torch."""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import sys
from typing import Any

import mobilevit
from mobilevit.cli import parser
from mobilevit.cli.benchmark import Benchmark
from mobilevit.cli.compare import Compare
from mobilevit.cli.console import warn
from mobilevit.cli.convert import Convert
from mobilevit.cli.demo import Demo
from mobilevit.cli.evaluate import Evaluate
from mobilevit.cli.explain import Explain
from mobilevit.cli.export import Export
from mobilevit.cli.info import Info
from mobilevit.cli.predict import Predict
from mobilevit.cli.train import Train, recipe_list
from mobilevit.logs import log_to_stderr
from mobilevit.names import nearest
from mobilevit.recipes import describe, named

COMMANDS: dict[str, type[Any]] = {
    "predict": Predict,
    "train": Train,
    "evaluate": Evaluate,
    "info": Info,
    "convert": Convert,
    "export": Export,
    "benchmark": Benchmark,
    "demo": Demo,
    "explain": Explain,
    "compare": Compare,
}


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 done in part, 2 the user's mistake, 130 interrupted, 143 terminated."""
    log_to_stderr(force=True)
    # Told to end, leave nothing half-written behind: as after Ctrl-C. (Training has its own way.)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(_run(sys.argv[1:] if args is None else args))
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again while it exits
        sys.exit(0)
    except OSError as error:
        file = error.filename2 or error.filename
        warn(f"{file}: {(error.strerror or '').lower()}" if file else str(error))
        sys.exit(2)
    except ValueError as error:
        warn(parser.by_option(str(error)))
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun, which all stop, one says so
            warn(str(interrupt) or "interrupted")
        sys.exit(128 + getattr(interrupt, "signal_number", signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    signal_number = signal.SIGTERM


def _terminated(number: int, frame: object) -> None:
    raise _Terminated("terminated")


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: mobilevit COMMAND [OPTIONS]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:11}{(command.__doc__ or '').splitlines()[0]}")
        print("\nmobilevit COMMAND --help describes a command, mobilevit --version prints the version.")
        return 0
    if args[0] == "--version":
        print(mobilevit.__version__)
        return 0
    if args[0] not in COMMANDS:
        raise ValueError(
            f"there is no command {args[0]!r}; {nearest(args[0], COMMANDS)}the commands are {', '.join(COMMANDS)}"
        )
    return parse(args).run()


def parse(args: list[str]) -> Any:
    """The command that `args` stands for.

    Raises:
        ValueError: a recipe, option or value that does not exist or does not fit.
    """
    name, rest = args[0], args[1:]
    command, default = COMMANDS[name], None
    description = inspect.getdoc(command) or ""
    if command is Train:
        recipe = rest.pop(0) if rest and not rest[0].startswith("-") else "plain"
        default = Train(data="", recipe=named(recipe), recipe_name=recipe, command=shlex.join(["mobilevit", *args]))
        description += f"\nRECIPE {recipe}: {describe(recipe)}"
    try:
        return parser.parse(command, rest, prog=f"mobilevit {name}", description=description, default=default)
    except SystemExit:  # the help was asked for
        if command is Train:
            print(f"\n{recipe_list()}")
        raise
