"""The command line. A command imports what it needs when it runs, so `mobilevit --help` does not import torch."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from inspect import getdoc  # not the module, whose name is that of a command
from typing import Any

import tyro

import mobilevit
from mobilevit.cli import parser
from mobilevit.cli.benchmark import Benchmark
from mobilevit.cli.calibrate import Calibrate
from mobilevit.cli.compare import Compare
from mobilevit.cli.console import warn
from mobilevit.cli.convert import Convert
from mobilevit.cli.demo import Demo
from mobilevit.cli.embed import Embed
from mobilevit.cli.evaluate import Evaluate
from mobilevit.cli.explain import Explain
from mobilevit.cli.export import Export
from mobilevit.cli.info import Info
from mobilevit.cli.inspect import Inspect
from mobilevit.cli.predict import Predict
from mobilevit.cli.train import Train, recipe_list
from mobilevit.logs import log_to_stderr
from mobilevit.recipes import RECIPES, describe, named

COMMANDS: dict[str, type[Any]] = {
    "predict": Predict,
    "train": Train,
    "evaluate": Evaluate,
    "calibrate": Calibrate,
    "info": Info,
    "convert": Convert,
    "export": Export,
    "benchmark": Benchmark,
    "demo": Demo,
    "explain": Explain,
    "compare": Compare,
    "embed": Embed,
    "inspect": Inspect,
}


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 partial success, 2 invalid input, 130 SIGINT, 143 SIGTERM."""
    log_to_stderr(force=True)
    # SIGTERM raises an exception, as Ctrl-C does, so that cleanup code runs. Training handles both signals itself.
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(_run(sys.argv[1:] if args is None else args))
    except BrokenPipeError:  # the reader of the output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python prints a traceback at exit
        sys.exit(0)
    except OSError as error:
        file = error.filename2 or error.filename
        warn(f"{file}: {(error.strerror or '').lower()}" if file else str(error))
        sys.exit(2)
    except ValueError as error:
        warn(parser.name_option(str(error)))
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # torchrun: only one process prints it
            warn(str(interrupt) or "interrupted")
        sys.exit(128 + getattr(interrupt, "signal_number", signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    signal_number = signal.SIGTERM


def _terminated(number: int, frame: object) -> None:
    raise _Terminated("terminated")


def _run(args: list[str]) -> int:
    if args == ["--version"]:
        print(mobilevit.__version__)
        return 0
    return parse(args or ["--help"]).run()


def parse(args: list[str]) -> Any:
    """Return the command that `args` describe, an instance of one of `COMMANDS`.

    Raises:
        SystemExit: with code 0 after the help, with code 2 after the message about an invalid command or option.
        ValueError: an unknown recipe, or one after an option.
    """
    # The recipe determines the defaults in the help of `train`.
    recipe = args[1] if args[0] == "train" and args[1:] and not args[1].startswith("-") else "plain"
    named(recipe)
    train = Train(
        data=tyro.MISSING, recipe=RECIPES[recipe], recipe_name=recipe, command=shlex.join(["mobilevit", *args])
    )
    descriptions = {name: getdoc(command) or "" for name, command in COMMANDS.items()}
    if args[0] in COMMANDS:
        descriptions = {name: parser.wrapped(text) for name, text in descriptions.items()}
        descriptions["train"] += f"\n{parser.wrapped(f'Recipe {recipe}: {describe(recipe)}')}\n{recipe_list()}"
    else:  # the list of commands shows the first line of each
        descriptions = {name: text.partition("\n")[0] for name, text in descriptions.items()}
    command = parser.parse(COMMANDS, args, descriptions, {"train": train})
    if isinstance(command, Train) and command.recipe_name != recipe:
        named(command.recipe_name)
        raise ValueError(f"RECIPE is {command.recipe_name!r}; name it before the options: mobilevit train RECIPE ...")
    return command
