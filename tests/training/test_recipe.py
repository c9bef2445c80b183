"""Recipes: what a file and a command line may say, and what is answered to a slip."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.training import cli
from qwenvl_jax.training.recipe import Recipe, parse_arguments, read_recipe, remember_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def recipe_of(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_reads_and_says_what_it_does(path):
    assert isinstance(read_recipe(path), Recipe)
    head = path.read_text().splitlines()
    assert head[0].startswith("# ")
    assert any("python train.py configs/" in line for line in head[:4])


def test_fields_reach_their_places(tmp_path):
    recipe = recipe_of(tmp_path, "steps: 7\noptimizer: {learning_rate: 1e-4}\ndata: {curriculum: [[0, 1], [0.5, 6]]}\n")
    assert (recipe.steps, recipe.optimizer.learning_rate) == (7, 1e-4)
    assert recipe.data.curriculum == ((0.0, 1), (0.5, 6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 7", r"recipe\.yaml: unknown field stepz; did you mean steps\?"),
        ("optimizer: {learning_rat: 1}", r"unknown field optimizer\.learning_rat; did you mean learning_rate\?"),
        ("steps: many", r"steps is 'many'; expected int"),
        ("steps: true", r"steps is True; expected int"),
        ("steps: 0", r"steps is 0; it must be at least 1"),
        ("optimizer: {name: adam}", r"optimizer\.name is 'adam'; use one of adamw, adafactor, muon"),
        ("optimizer: 3", r"optimizer must be a mapping"),
        ("optimizer: {learning_rate: 0}", r"optimizer\.learning_rate is 0\.0; it must be above 0"),
        ("data: {curriculum: [[0.5, 6]]}", r"data\.curriculum has the shares"),
        ("data: {weights: {colour: 1}}", r"data\.weights names 'colour'"),
        ("a: [", r"not YAML"),
        ("- a", r"the file must be a mapping"),
    ],
)
def test_a_slip_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        recipe_of(tmp_path, text)


def test_overrides_on_the_command_line():
    flags = ["--optimizer.learning-rate", "0.5", "--data.seed", "3", "--auxiliary.weight", "4"]
    recipe = parse_arguments([str(ROOT / "configs/tiny.yaml"), *flags])
    assert recipe.auxiliary is not None
    assert (recipe.optimizer.learning_rate, recipe.data.seed, recipe.auxiliary.weight) == (0.5, 3, 4)


def test_steps_on_the_command_line_are_in_place_of_epochs():
    recipes = [parse_arguments([str(ROOT / "configs/lora.yaml"), *flags]) for flags in ([], ["--steps", "30"])]
    assert [recipe.records.epochs for recipe in recipes if recipe.records] == [5, None]
    assert recipes[1].steps == 30


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["configs/tiny.yaml", "--optimizer.learning-rat", "1"], "optimizer.learning-rate"),
        (["configs/tny.yaml"], "did you mean configs/tiny.yaml?"),
        ([], "name a recipe first"),
    ],
)
def test_a_mistyped_command_exits_with_2_and_no_traceback(arguments, expected, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    try:
        status = cli.main()
    except SystemExit as end:  # what the parser of flags does
        status = end.code
    assert status == 2
    said = capsys.readouterr()
    assert expected in said.out + said.err


def test_help_needs_no_recipe():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--optimizer.learning-rate" in done.stdout


@pytest.mark.parametrize("inside", [".", "deeper"], ids=["a file", "within a file"])
def test_an_output_that_cannot_be_a_folder_is_named(tmp_path, inside):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / inside
    with pytest.raises(UserError, match=f"--output {output}: .*; give a folder"):
        remember_recipe(Recipe(), output)
