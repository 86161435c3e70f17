"""The overview, the help of each command, the list of config fields, and shell completion."""

import dataclasses
import os
import subprocess
import sys
import typing

import pytest

import llmjax
from llmjax import binding
from llmjax.cli import flags, main
from llmjax.run.config import RunConfig


def test_no_arguments_print_the_overview(capsys):
    assert main.run([]) == 0
    printed = capsys.readouterr().out
    assert all(f"llmjax {command}" in printed for command in main.COMMANDS)


def test_a_closed_output_ends_the_command_silently():
    """`llmjax fields | head -1`"""
    code = "import sys; from llmjax.cli import main as cli; sys.argv = ['llmjax', 'fields']; cli.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_version_is_printed(capsys):
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"llmjax {llmjax.__version__}\n"


@pytest.mark.parametrize("command", list(main.COMMANDS))
def test_each_verb_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.run([command, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"example:\n  llmjax {command}" in printed


@pytest.mark.parametrize(
    "words", [*([command] for command in main.COMMANDS), ["curate", "report"], ["curate", "classifier"]]
)
def test_help_mentions_config_fields_exactly_where_a_command_takes_them(words, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main.run([*words, "--help"])
    is_mentioned = "--config.FIELD=VALUE sets any config field" in capsys.readouterr().out
    remaining: list[str] = []  # arguments that are parsed as flags

    def parse_args(parser, arguments):
        remaining.extend(arguments)
        raise SystemExit

    monkeypatch.setattr(flags.Parser, "parse_args", parse_args)
    with pytest.raises(SystemExit):
        main.run([*words, "--config.seed=1"])
    assert is_mentioned == (not remaining)


def sections(cls: type, path: str = "") -> list[tuple[str, type]]:
    """Every section of the config with its dotted path, entries of open maps under NAME."""
    sections_below = [(path, cls)]
    for name, hint in typing.get_type_hints(cls).items():
        families = binding.families_of(hint).values()
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                entry = name if inner is hint or inner in families else f"{name}.NAME"
                sections_below += sections(inner, f"{path}.{entry}" if path else entry)
    return sections_below


def test_fields_explains_every_field(capsys):
    """`llmjax fields` lists each field with its default, and each section's docstring says what the field means."""
    assert main.run(["fields"]) == 0
    printed = capsys.readouterr().out
    for path, cls in sections(RunConfig):
        for field in dataclasses.fields(cls):
            hint = typing.get_type_hints(cls)[field.name]
            if not dataclasses.is_dataclass(hint) and not binding.families_of(hint):
                documented = "".join(parent.__doc__ or "" for parent in cls.__mro__)  # a family may extend another
                assert field.name in documented, f"{cls.__name__} does not explain {field.name}"
            if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(field.default):
                assert f"--config.{path}{'.' if path else ''}{field.name}={field.default!r}" in printed


def test_fields_shows_how_an_entry_of_a_map_is_set(capsys):
    assert main.run(["fields", "phases.NAME"]) == 0
    assert "--config.phases.NAME.weights.NAME=NUMBER" in capsys.readouterr().out


def test_fields_of_one_section_lists_no_other(capsys):
    assert main.run(["fields", "mesh"]) == 0
    printed = capsys.readouterr().out
    assert "--config.mesh.fsdp=1" in printed and "train.steps" not in printed


def test_the_package_runs_as_a_module():
    process = subprocess.run([sys.executable, "-m", "llmjax", "--version"], capture_output=True, text=True, check=True)
    assert process.stdout == f"llmjax {llmjax.__version__}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llmjax ge", {"generate"}),
        ("llmjax train --wor", {"--workdir"}),
        ("llmjax train --config=qu", {"--config=quickstart"}),
        ("llmjax eval --split=te", {"--split=test"}),
        ("llmjax curate report --w", {"--workdir"}),
        ("llmjax compare --out", {"--output"}),
        ("llmjax analyse --ta", {"--task"}),
        ("llmjax train --config.train.st", {"--config.train.steps", "--config.train.stop_at"}),
        ("llmjax curate --config.curate.personal_data.a", {"--config.curate.personal_data.action"}),
        ("llmjax inspect --config.tr", set()),
    ],
)
def test_shell_completion_lists_what_may_follow(line, expected, tmp_path):
    answer = tmp_path / "answer"
    request = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    request |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    subprocess.run([sys.executable, "-m", "llmjax"], env={**os.environ, **request}, check=True, cwd=tmp_path)
    assert {word.strip() for word in answer.read_text().split("\n") if word} == expected
