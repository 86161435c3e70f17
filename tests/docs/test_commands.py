"""Every command line in the documentation can be parsed: its flags, config file, fields and values exist."""

import pytest

from llmjax import binding
from llmjax.cli import flags, main
from llmjax.curate.config import Curation
from llmjax.run import config as run_config
from tests.docs.pages import PAGES, ROOT, commands

COMMANDS = list({tuple(words): (page.name, words) for page in PAGES for words in commands(page)}.values())


class Parsed(Exception):
    """Stops a command once its flags are parsed."""


def test_every_command_is_documented():
    assert {words[0] for _, words in COMMANDS} == set(main.COMMANDS)


@pytest.mark.parametrize("arguments", [c for _, c in COMMANDS], ids=[f"{n}: {' '.join(c)[:60]}" for n, c in COMMANDS])
def test_every_command_line_parses(arguments, monkeypatch):
    parse = flags.Parser.parse_args

    def stop(parser, rest):
        raise Parsed(parse(parser, rest))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(flags.Parser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        main.run(arguments)
    options = parsed.value.args[0]
    words = [word.removeprefix("--config.") for word in arguments if word.startswith("--config.")]
    overrides = [(field, value) for field, _, value in (word.partition("=") for word in words)]
    if arguments[0] == "curate":
        tree = binding.load_file("configs/curate.py")
        assert binding.bind_overridden(Curation, tree, overrides, inputs="curate.inputs").curate.inputs
        return
    resolved = run_config.resolve(getattr(options, "config", None) or "configs/quickstart.py", overrides)
    assert arguments[0] in ("size", "plan") or all(source.path for source in resolved.data.sources.values())


def test_every_documented_section_exists(capsys):
    for _, arguments in COMMANDS:
        if arguments[0] == "fields":
            assert main.run(arguments) == 0
            assert "--config." in capsys.readouterr().out
