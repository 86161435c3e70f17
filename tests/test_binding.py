"""Config files, overrides and their mistakes."""

import pathlib

import pytest

from llmjax import binding
from llmjax.curate.config import Curation
from llmjax.errors import UserError
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig, resolve

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.py")


@pytest.mark.parametrize("spec", [spec for specs in run_config.shipped_specs().values() for spec in specs])
def test_every_shipped_config_binds_and_its_model_fits_its_mesh(spec):
    config = resolve(spec, [])
    config.model.check(seq_len=config.data.seq_len, tensor=config.mesh.tensor)
    # What is written to the workdir and to checkpoints gives the same config again.
    assert binding.bind(RunConfig, run_config.to_json(config)) == config


@pytest.mark.parametrize("specs", [specs for specs in run_config.shipped_specs().values() if len(specs) > 1])
def test_the_first_size_is_the_default_and_an_unknown_size_lists_all(specs):
    name, first, *_ = specs
    assert resolve(name, []) == resolve(first, [])
    sizes = ", ".join(spec.partition(":")[2] for spec in specs[1:])
    with pytest.raises(UserError, match=f"--config={name}:9T: no such size; choose one of {sizes}"):
        resolve(f"{name}:9T", [])


def test_the_curation_config_binds():
    tree = binding.load_file(str(CONFIGS / "curate.py"))
    assert binding.bind_overridden(Curation, tree, [], inputs="curate.inputs").curate.inputs["python"].path == "stdlib:"


def test_overrides_reach_fields_that_the_file_does_not_list():
    bound = resolve(QUICKSTART, [("train.steps", "7"), ("mesh.data", "2"), ("data.skip", "((10, 20), (30, 31))")])
    assert (bound.train.steps, bound.mesh.data, bound.data.skip) == (7, 2, ((10, 20), (30, 31)))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2", 2.0), ("None", None)], ids=["float", "whole number", "none"]
)
def test_an_optional_number_is_read_as_a_number_or_none(text, value):
    assert resolve(QUICKSTART, [("optimizer.learning_rate", text)]).optimizer.learning_rate == value


def test_a_string_field_takes_its_text_unchanged():
    """A path that looks like Python, such as a number, stays the text it is."""
    for text in ("1234", "True", "[a].txt", "/a/b c/**/*.txt"):
        assert resolve(QUICKSTART, [("data.sources.main.path", text)]).data.sources["main"].path == text


def test_a_new_source_replaces_the_standard_library():
    bound = resolve(QUICKSTART, [("data.sources.main.path", "/my/texts/*.txt")])
    assert list(bound.data.sources) == ["main"]
    assert bound.data.sources["main"].weight is None


def test_the_standard_library_stays_when_it_is_overridden_too():
    bound = resolve(QUICKSTART, [("data.sources.python.weight", "0.5"), ("data.sources.main.path", "/x")])
    assert list(bound.data.sources) == ["python", "main"]


MISTAKES = {
    "unknown field": ("train.stepz", "7", r"unknown config field 'train.stepz' \(did you mean 'steps'\?\)"),
    "unknown section": ("trian.steps", "7", r"unknown config field 'trian' \(did you mean 'train'\?\)"),
    "field of a source": ("data.sources.main.pth", "x", r"unknown config field 'data.sources.main.pth' .*'path'"),
    "text for a number": ("train.steps", "many", r"train.steps='many': expected an integer, got str"),
    "fraction for a whole number": ("train.steps", "1.5", r"train.steps=1.5: expected an integer"),
    "bool for a number": ("train.steps", "True", r"train.steps=True: expected an integer"),
    "infinity for a whole number": ("train.steps", "1e999", r"train.steps=inf: expected an integer"),
    "infinity": ("optimizer.learning_rate", "1e999", r"optimizer.learning_rate=inf: expected a finite number"),
    "number for a bool": ("checkpoint.accept_changes", "1", r"checkpoint.accept_changes=1: expected true or false"),
    "number for a tuple": ("data.skip", "3", r"data.skip=3: expected a tuple"),
    "a section": ("train", "7", r"--config.train=7: this is a section"),
    "field of a value": ("train.steps.more", "7", r"unknown config field 'train.steps.more': train.steps is a value"),
    "seed of more than 32 bits": ("seed", "4294967296", r"seed=4294967296: must be from 0 to 4294967295"),
    "negative seed": ("seed", "-1", r"seed=-1: must be from 0 to 4294967295"),
    "negative count": ("data.workers", "-1", r"data.workers=-1: must not be negative"),
    "out of range": ("train.steps", "0", r"train.steps=0: must be at least 1"),
    "stop beyond the end": ("train.stop_at", "100000", r"train.stop_at=100000 is beyond train.steps"),
    "uneven accumulation": (
        "train.accumulation",
        "3",
        r"train.global_batch=8 is not divisible by train.accumulation=3",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_override_is_refused_in_one_line(mistake):
    field, text, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as caught:
        resolve(QUICKSTART, [(field, text)])
    assert "\n" not in str(caught.value)


def test_a_missing_config_file_is_refused():
    with pytest.raises(UserError, match=r"--config=nowhere.py: no such file"):
        resolve("nowhere.py", [])


FILES = {
    "no function": ("x = 1\n", r"has no function get_config"),
    "a name that is no function": ("get_config = 1\n", r"has no function get_config"),
    "syntax": ("def get_config(:\n", r"cannot be read \(SyntaxError: invalid syntax \(file.py, line 1\)\)"),
    "a package that is missing": ("import nowhere\n", r"cannot be read \(line 1: ModuleNotFoundError: .*nowhere"),
    "an error inside": ("def get_config():\n    return 1 / 0\n", r"cannot be read \(line 2: ZeroDivisionError: "),
    "a dict": ("def get_config():\n    return {}\n", r"get_config\(\) returns dict; return an ml_collections"),
}


@pytest.mark.parametrize("mistake", FILES)
def test_a_broken_config_file_is_refused(mistake, tmp_path):
    text, message = FILES[mistake]
    (tmp_path / "file.py").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(str(tmp_path / "file.py"), [])


def test_a_file_that_is_not_python_is_refused(tmp_path):
    (tmp_path / "file.txt").write_text("hello\n")
    with pytest.raises(UserError, match=r"file.txt: not a Python file"):
        resolve(str(tmp_path / "file.txt"), [])


def test_an_unknown_field_of_a_file_is_refused(tmp_path):
    text = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'train': {'step': 3}})\n"
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(UserError, match=r"unknown config field 'train.step' \(did you mean 'steps'\?\)"):
        resolve(str(tmp_path / "wrong.py"), [])


def test_differences_lists_field_old_and_new_value():
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 0}, {"a": {"b": 2, "c": (1, 2)}, "d": 0}
    assert binding.differences(old, new) == [("a.b", 1, 2)]


def test_an_entry_without_a_name_is_refused():
    with pytest.raises(
        UserError, match=r"unknown config field 'phases\.\.after_step': a name between its dots is empty"
    ):
        binding.parse_override(RunConfig, "phases..after_step", "4")
