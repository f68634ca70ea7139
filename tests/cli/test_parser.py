"""Help, options and the mistakes that the parser reports, the same for every command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mobilevit
from command_line import check_refused, refused, run
from mobilevit.cli import COMMANDS
from mobilevit.cli.parser import RECIPE_OPTIONS
from mobilevit.recipes import RECIPES, describe


def test_help(capsys: pytest.CaptureFixture[str]):
    for args in ([""], ["-h"], ["--help"]):
        assert run(*args) == 0
        assert re.findall(r"[•*] (\w+)  +[A-Z]", capsys.readouterr().out) == list(COMMANDS)
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{mobilevit.__version__}\n"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, columns: int
):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(f"{command} --help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mobilevit {command}")
    assert max(map(len, out.splitlines())) <= columns
    assert not re.search(r"default: (None|True|False)?\)|\{None", out)


def test_help_does_not_import_torch():
    program = """
import sys
from mobilevit.cli import main
for args in (["--help"], ["--version"], ["trian"], ["train", "--help"], ["predict", "--top-k", "x"]):
    try:
        main(args)
    except SystemExit:
        assert "torch" not in sys.modules, args
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


# Every option of train and its other name. New options must be added here as well.
TRAIN_OPTIONS = """
--data --out --weights=--backbone --teacher --download --device --num-threads --self-check --checkpoint-minutes
--track --tensorboard
--task --architecture --epochs --batch-size --label-smoothing --ema-decay --seed --patience --metric
--data.size-px=--size --data.eval-resize --data.min-scale --data.policy --data.flip=--flip
--data.val-fraction=--val-fraction --data.num-workers=--num-workers --data.max-unreadable=--max-unreadable
--data.max-megapixels=--max-megapixels --data.crops-per-image --data.cache-mb
--sampler.variant --sampler.sizes-px
--optimizer.start-lr --optimizer.lr=--lr --optimizer.end-lr --optimizer.warmup-steps --optimizer.cosine
--optimizer.schedule --optimizer.cooldown-fraction
--optimizer.weight-decay --optimizer.decay-all --optimizer.clip-norm=--clip-norm --optimizer.freeze=--freeze
--optimizer.backbone-lr-scale
--compute.precision=--precision --compute.compile=--compile --compute.sync-batch-norm --compute.micro-batch-size
--compute.quantization-aware=--quantization-aware
--distill.soft-weight --distill.temperature --distill.feature-weight --distill.size-px
--multilabel.loss --multilabel.gamma-negative --multilabel.gamma-positive --multilabel.margin
--imbalance.class-weights --imbalance.balanced-sampler --imbalance.logit-adjustment
"""


def test_options_of_train(capsys: pytest.CaptureFixture[str]):
    assert run("train tiny --help") == 0
    options = set(re.findall(r" (--[a-z][a-z.-]*[a-z])", capsys.readouterr().out)) - {"--help"}
    assert {re.sub(r"(--|\.)no-", r"\1", option) for option in options} == set(re.split(r"[\s=]+", TRAIN_OPTIONS)) - {
        ""
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe(capsys: pytest.CaptureFixture[str], recipe: str):
    assert run(f"train {recipe} --help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Recipe {recipe}: {' '.join(describe(recipe).split())}" in text
    assert all(describe(name).splitlines()[0] in text for name in RECIPES)
    assert f"(default: {RECIPES[recipe].epochs})" in text


# A command, and what the message must contain: the option, the value and the fix. tyro writes these messages.
MISTAKES = {
    "pretict w photos": "pretict predict, train",
    "--verbose": "--verbose predict, train",
    "predict": "WEIGHTS mobilevit predict --help",
    "predict w photos --top-k many": "--top-k 'many' INT",
    "predict w photos --top-k 1.5": "--top-k '1.5' INT",
    "predict w photos --top-k": "--top-k Expected 1 mobilevit predict --help",
    "predict w photos --epochs 3": "--epochs --help",
    "predict w photos --bach-size 1": "--bach-size --batch-size",
    "predict w photos --jsn": "--jsn --json",
    "predict w photos -k 3": "-k --help",
    "predict w photos --out ''": "--out '' empty",
    "predict '' photos": "WEIGHTS '' empty",
    "predict w ''": "IMAGE '' --help",
    "train": "--data mobilevit train --help",
    "train --dta classes": "--data",
    "train --data ''": "--data '' empty",
    "train --data classes --size 1e3": "--size '1e3'",
    "train --data classes --lr big": "--lr 'big' float",
    "train --data classes --precision int8": "--precision 'int8' 'float32', 'bfloat16', 'float16'",
    "train --data classes --freeze stage7": "--freeze 'stage7' 'nothing', 'stem', 'stage1'",
    "train --data classes --no-fip": "--no-fip --no-flip",
    "train --data classes --architecture xl": "--architecture 'xl' 'xxs', 'xs', 's'",
    "train tinny --data classes": "'tinny' did you mean tiny? plain, finetune",
    "train --data classes tiny": "RECIPE 'tiny'; before",
    "train tiny small --data classes": "small --help",
    "evaluate w": "--data mobilevit evaluate --help",
    "info": "NETWORK mobilevit info --help",
    "info xxs xs": "xs --help",
    "convert w": "TARGET mobilevit convert --help",
    "convert w ''": "TARGET '' empty",
    "convert w a.pt --to aple": "--to 'aple' 'mobilevit', 'apple', 'timm', 'transformers'",
    "demo w --open": "--open --no-open",
    "explain": "WEIGHTS IMAGE",
    "explain w photos/a.png --at 1": "--at X Y '1' --help",
    "explain w photos/a.png --at 1 b": "--at 'b' FLOAT",
    "compare --seeds a": "--seeds 'a' INT",
    "compare extra": "extra --help",
}


@pytest.mark.parametrize(("command", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, command: str, facts: str):
    check_refused(capsys, command, facts)


OUT_OF_RANGE = {
    "train --size 16": ("--size is 16; ", "32 or more"),
    "train --data.size-px 16": ("--size is 16; ", "32 or more"),
    "train --optimizer.lr -1": ("--lr is -1.0; ", "above 0"),
    "train --data.eval-resize 0.5": ("--data.eval-resize is 0.5; ", "1 or more"),
    "train --sampler.sizes-px 64 16": ("--sampler.sizes-px is 16; ", "32 or more"),
    "train --sampler.sizes-px": ("--sampler.sizes-px is empty; ", "one value or more"),
    "train --compute.micro-batch-size 1": ("--compute.micro-batch-size is 1; ", "0, or 2 or more"),
    "train --epochs 0": ("--epochs is 0; ", "1 or more"),
    "train --batch-size 1": ("--batch-size is 1; ", "2 or more"),
    "compare --size 16": ("--size is 16; ", "32 or more"),
}


@pytest.mark.parametrize(("command", "facts"), OUT_OF_RANGE.items())
def test_values_out_of_range(capsys: pytest.CaptureFixture[str], here: Path, command: str, facts: tuple[str, str]):
    message = refused(capsys, f"{command} --data classes")
    assert message.startswith(f"mobilevit: {facts[0]}")
    assert facts[1] in message


def test_every_recipe_field_has_an_option():
    assert set(RECIPE_OPTIONS.values()) <= set(re.split(r"[\s=]+", TRAIN_OPTIONS))
