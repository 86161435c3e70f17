"""Bind config files and command-line overrides to frozen dataclasses, one per section."""

import ast
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import math
import pathlib
import traceback
import types
import typing
from typing import Any

import ml_collections

from llmjax.errors import UserError, suggest


def _entry_type(hint: Any) -> Any | None:
    """The type of the entries of a Mapping[str, Entry] field; None for any other field."""
    if typing.get_origin(hint) in (dict, Mapping):
        return typing.get_args(hint)[1]
    return None


def families_of(hint: Any) -> dict[str, type]:
    """Family -> dataclass of a union such as DecoderConfig | RecurrentConfig, by their field `family`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    if not options or not all(dataclasses.is_dataclass(option) for option in options):
        return {}
    return {option.family: option for option in options}


def bind(cls: type, section: Mapping[str, Any], path: str = "") -> Any:
    """A frozen dataclass from a mapping, nested sections and open maps included.

    Raises UserError for an unknown field (with the nearest known one) and for a value of a wrong type.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in section.items():
        where = f"{path}.{name}" if path else name
        values[name] = _bind_value(_find_hint(name, hints, where), value, where)
    return cls(**values)


def _find_hint(name: str, hints: dict[str, Any], path: str) -> Any:
    if name not in hints:
        raise UserError(f"unknown config field {path!r}{suggest(name, hints)}")
    return hints[name]


def _bind_value(hint: Any, value: Any, where: str) -> Any:
    if families := families_of(hint):
        name = value.get("family", next(iter(families))) if isinstance(value, Mapping) else next(iter(families))
        if name not in families:
            raise UserError(
                f"{where}.family={name!r}{suggest(str(name), families)}: choose one of {', '.join(families)}"
            )
        hint = families[name]
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(
                f"{where}={value!r}: this is a section; set one of its fields, such as {where}."
                f"{dataclasses.fields(hint)[0].name}"
            )
        return bind(typing.cast(type, hint), value, where)
    if (entry := _entry_type(hint)) is not None:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value!r}: this is a map of named entries; set {where}.NAME.FIELD")
        return {name: _bind_value(entry, item, f"{where}.{name}") for name, item in value.items()}
    return _convert(hint, value, where)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the field's type. Integers are accepted as floats and lists as tuples; nothing else is converted."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        hint = next(option for option in options if option is not type(None))
        origin = typing.get_origin(hint)
    kind = origin or hint
    if typing.get_args(hint)[:1] == (str,):  # tuple[str, ...]
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}={value!r}: expected a tuple of strings such as ('a',) or ('a', 'b')")
        return tuple(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value!r}: expected a finite number")
    if kind is Any or (isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))):
        return _tuples(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is tuple and isinstance(value, list):
        return _tuples(value)
    raise UserError(f"{where}={value!r}: expected {_describe(kind)}, got {type(value).__name__}")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _describe(kind: type) -> str:
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        tuple: "a tuple such as (1, 2)",
    }
    return names.get(kind, kind.__name__)


def shipped_files() -> dict[str, pathlib.Path]:
    """Name -> file of every config that ships with llmjax: in llmjax/configs of a wheel, or configs/ of a checkout."""
    package = pathlib.Path(__file__).resolve().parent
    folder = next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def find_file(spec: str) -> pathlib.Path:
    """The file of `FILE.py[:ARG]`, or of `NAME[:ARG]` for a config that ships with llmjax.

    Raises UserError where there is none, and suggests the nearest name.
    """
    file, _, argument = spec.partition(":")
    path, shipped = pathlib.Path(file).expanduser(), shipped_files()
    if path.suffix != ".py" and "/" not in file and not path.is_file():
        if file not in shipped:
            near = suggest(file.lower(), shipped)
            raise UserError(
                f"--config={spec}: there is no config {file!r}{near}; choose one of {', '.join(shipped)}, "
                "or give a Python file with get_config()"
            )
        return shipped[file]
    if not path.is_file() or path.suffix != ".py":
        problem = "not a Python file" if path.is_file() else "no such file"
        if names := difflib.get_close_matches(path.stem.lower(), shipped, n=1):
            problem += f" (did you mean --config={names[0]}{argument and ':' + argument}, which ships with llmjax?)"
        raise UserError(
            f"--config={spec}: {problem}; give a Python file with get_config(), or a name of `llmjax configs`"
        )
    return path


def load_file(spec: str) -> dict[str, Any]:
    """`FILE.py[:ARG]` or `NAME[:ARG]` -> the nested dict of the ConfigDict that its get_config(ARG) returns.

    A file with a table SIZES takes its keys alone as ARG.
    """
    file, _, argument = spec.partition(":")
    path = find_file(spec)
    with _as_user_error(spec, path):
        module = load_module(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config={spec}: {file} has no function get_config()")
    if argument and not inspect.signature(module.get_config).parameters:
        raise UserError(f"--config={spec}: {file} has no sizes; remove {':' + argument!r}")
    if argument and argument not in (sizes := getattr(module, "SIZES", (argument,))):
        raise UserError(f"--config={spec}: no such size; choose one of {', '.join(sizes)}")
    with _as_user_error(spec, path):
        config = module.get_config(argument) if argument else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config={spec}: get_config() returns {type(config).__name__}; return an ml_collections.ConfigDict"
        )
    return _to_dict(config)


def _to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return {k: _to_dict(v) if isinstance(v, ml_collections.ConfigDict) else v for k, v in config.items()}


@contextlib.contextmanager
def _as_user_error(spec: str, path: pathlib.Path) -> Iterator[None]:
    """Turn any error of a config file into a UserError that names the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f"line {lines[-1]}: " if lines else ""  # a SyntaxError names its line itself
        raise UserError(f"--config={spec}: cannot be read ({line}{type(error).__name__}: {error})") from error


def load_module(path: pathlib.Path) -> Any:
    """Import a config file as a module."""
    module_spec = importlib.util.spec_from_file_location(f"llmjax_config_{path.stem}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def parse_override(cls: type, field: str, text: str) -> Any:
    """The typed value of one `--config.FIELD=TEXT`, by the type that the field has in `cls`."""
    hint: Any = cls
    parents: list[str] = []
    for name in field.split("."):
        parents.append(name)
        where = ".".join(parents)
        if not name:
            raise UserError(f"unknown config field {field!r}: a name between its dots is empty")
        if families := families_of(hint):  # families give a shared field the same type
            hints = {n: h for family in reversed(families.values()) for n, h in typing.get_type_hints(family).items()}
            hint = _find_hint(name, hints, where)
        elif dataclasses.is_dataclass(hint):
            hint = _find_hint(name, typing.get_type_hints(hint), where)
        elif (entry := _entry_type(hint)) is not None:
            hint = entry
        else:
            raise UserError(f"unknown config field {where!r}: {'.'.join(parents[:-1])} is a value, not a section")
    if dataclasses.is_dataclass(hint) or families_of(hint) or _entry_type(hint) is not None:
        raise UserError(f"--config.{field}={text}: this is a section; set one of its fields")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in options and not (type(None) in options and text == "None"):
        return text
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _convert(hint, value, field)


def set_field(tree: dict, field: str, value: Any) -> None:
    """Set one dotted field of a nested dict."""
    *parents, leaf = field.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def bind_overridden(cls: type, tree: dict[str, Any], overrides: Sequence[tuple[str, str]], *, inputs: str) -> Any:
    """`cls` from a nested dict and `(FIELD, TEXT)` overrides.

    inputs   the open map of named texts, such as data.sources: a new name on the command line replaces the config's
             `stdlib:` entries, which exist so that a config runs before the user has named any text, and those without
             a path
    """
    section, _, leaf = inputs.partition(".")
    entries = tree.setdefault(section, {}).setdefault(leaf, {})
    values = [(field, parse_override(cls, field, text)) for field, text in overrides]
    overridden = {field.split(".")[2] for field, _ in values if field.startswith(f"{inputs}.")}
    if overridden - set(entries):
        examples = {name for name, entry in entries.items() if entry.get("path", "stdlib:") in ("stdlib:", "")}
        for name in examples - overridden:
            del entries[name]
    for field, value in values:
        set_field(tree, field, value)
    return bind(cls, tree)


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) for every leaf that differs between two nested dicts; lists equal tuples."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        changed = []
        for name in dict.fromkeys([*old, *new]):
            changed += differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
        return changed
    return [] if _tuples(old) == _tuples(new) else [(path, old, new)]
