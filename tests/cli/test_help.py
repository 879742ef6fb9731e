"""`--help`, shell completion and what they import."""

import inspect
import json
import re
import subprocess
import sys

import pytest
from processes import environment
from typer.main import get_command

from madgen.cli.app import COMMANDS, app

GROUP = get_command(app)
NAMES = sorted(GROUP.commands)
HEAVY = {"torch", "lightning", "diffusers", "transformers", "wandb", "omegaconf", "datasets", "webdataset", "pyarrow"}
HEAVY |= {"numpy", "PIL", "yaml", "fsspec", "huggingface_hub", "pandas"}


def plain(text):
    """The words of a help page, without frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def show_help(madgen_here, monkeypatch):
    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "80")
        result = madgen_here(*arguments, "--help")
        assert (result.code, result.err) == (0, "")
        return result.out

    return run


def test_help_lists_every_command(show_help):
    text = plain(show_help())
    assert len(NAMES) == sum(map(len, COMMANDS.values()))
    for name in NAMES:
        summary = GROUP.commands[name].help.partition("\n\n")[0]
        assert f"{name} {summary}" in text
        assert re.match(r"[A-Z]\w+ ", summary), f"{name}: starts with a verb"


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_shows_examples_and_every_option(show_help, name):
    shown = show_help(name)
    text, command = plain(shown), GROUP.commands[name]
    examples = re.findall(r"^ {4}(\S.*)$", inspect.cleandoc(command.help), re.MULTILINE)
    assert examples
    for example in examples:
        assert re.search(rf"^ +{re.escape(example)} *$", shown, re.MULTILINE), "one line of 80 columns, markup intact"
        assert f"madgen {name} " in example
    for param in command.params:
        if param.name != "help":
            assert param.help, f"{param.name} has no help"
            assert param.help[0].isupper(), param.help
            assert param.help.endswith("."), param.help
        assert (param.opts[-1] if param.opts[-1].startswith("-") else param.metavar) in text


@pytest.mark.parametrize(
    "example",
    [line for name in NAMES for line in re.findall(r"^ {4}\s*madgen (.*)$", GROUP.commands[name].help, re.MULTILINE)],
)
def test_examples_parse(example):
    import shlex

    name, *arguments = shlex.split(example)
    context = GROUP.commands[name].make_context(name, arguments)
    assert context.params


def test_defaults_are_shown(show_help):
    assert "[default: 64]" in show_help("preview")
    assert "[default: (DIR/report)]" in show_help("evaluate")


def test_without_a_command_the_help_is_shown(madgen_here):
    result = madgen_here()
    assert (result.code, result.err) == (2, "")
    assert "Usage:" in result.out


def test_completion_of_commands_and_options(tmp_path):
    def complete(words, at):
        program = "import sys; sys.argv[0] = 'madgen'; from madgen.cli.app import main; main()"
        variables = {"_MADGEN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment(**variables), capture_output=True, text=True).stdout.split()

    assert complete("madgen gen", 1) == ["generate"]
    assert complete("madgen verify --re", 2) == ["--repair"]


@pytest.mark.parametrize(
    ("program", "light"),
    [
        ("import madgen", HEAVY | {"typer", "rich"}),
        ("from madgen.cli.app import app", HEAVY),
        ("from madgen.cli.app import app; app(['generate', '--help'], standalone_mode=False)", HEAVY),
    ],
)
def test_nothing_heavy_is_imported(program, light):
    code = f"import json, sys; {program}; print(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert light.isdisjoint(json.loads(done.stdout.splitlines()[-1]))
