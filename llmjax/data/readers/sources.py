"""List the files of a source as units of work that processes share."""

from collections.abc import Callable, Iterator
import dataclasses
import glob
import os
from pathlib import Path
import re
import sysconfig
from typing import Any, Generic, NamedTuple, TypeVar

from llmjax.data.config import SourceConfig
from llmjax.data.readers import dialogues, encodings, formats, streams
from llmjax.data.store.split import SPLITS
from llmjax.errors import UserError, suggest

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 20, 1 << 28
_CHAT_FORMATS = ("auto", *dialogues.NAMES)
_TARGET_UNITS = 64  # of a source: enough for the cores of a large machine, few enough for a store that opens at once
_TFDS_RECORDS = 8192  # in a unit
_TFDS = re.compile(r"(?P<name>[^:@]+(:\d+\.\d+\.\d+)?)(:(?P<split>[^@]+))?(@(?P<folder>.+))?")
# Not read from the standard library: tests, and files that are generated or differ from machine to machine.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}

Config = TypeVar("Config", bound=Any)  # SourceConfig of `prepare`, InputConfig of `curate`


@dataclasses.dataclass(frozen=True)
class Item:
    """A span of one file: bytes of lines, row groups of Parquet, records of TFDS; the whole file if `end` is None."""

    path: str
    begin: int = 0
    end: int | None = None


@dataclasses.dataclass(frozen=True)
class Unit(Generic[Config]):
    """Records that one process reads, and the shard that they become.

    source  name of the source in the config
    kind    a format, or "tfds"
    config  of the source
    items   files or spans of one file, read in this order
    size    bytes on disk (of TFDS: records)
    state   sizes and modification times of the files: if they differ, finished work is repeated
    base    the folder that the file names in ids are relative to
    """

    source: str
    index: int
    kind: str
    config: Config
    items: tuple[Item, ...]
    size: int
    state: str
    base: str = ""


class _Span(NamedTuple):
    kind: str
    item: Item
    size: int
    state: str


def list_units(name: str, source: SourceConfig) -> list[Unit[SourceConfig]]:
    """The units of a source of `prepare`, in an order that depends on the path names alone.

    Raises UserError for a path that does not exist or matches no file, and for an invalid field.
    """
    where = f"data.sources.{name}"
    check_format(source, where, formats.FORMATS)
    units = make_units(name, dataclasses.replace(source, weight=None), where, formats.FORMATS)
    if source.split_field and (other := next((unit for unit in units if unit.kind not in ("jsonl", "json")), None)):
        raise UserError(
            f"{where}.split_field={source.split_field!r}: {other.items[0].path} is no JSONL; leave it unset"
        )
    for field in ("label_field", "pair_field", "negative_field", "score_field", "chosen_field", "rejected_field"):
        if (value := getattr(source, field)) and (other := next((unit for unit in units if unit.kind == "text"), None)):
            raise UserError(
                f"{where}.{field}={value!r}: {other.items[0].path} is text, which has no fields; give JSONL, CSV, TSV "
                "or Parquet"
            )
    if source.chat:
        _check_chat(source, units, where)
    for field in ("negative_field", "score_field"):
        if (value := getattr(source, field)) and (source.label_field or not source.pair_field):
            hint = "unset label_field" if source.label_field else "set pair_field as well"
            raise UserError(f"{where}.{field}={value!r}: {hint}, or unset it")
    if source.score_field and source.negative_field:
        raise UserError(f"{where}: set only one of score_field and negative_field")
    if source.chosen_field or source.rejected_field:
        if not (source.chosen_field and source.rejected_field):
            raise UserError(f"{where}: set both of chosen_field and rejected_field, or unset the one that is set")
        if other := next((name for name in ("label_field", "pair_field") if getattr(source, name)), None):
            raise UserError(f"{where}.chosen_field={source.chosen_field!r}: unset {other}, or this and rejected_field")
    if source.split and source.split not in SPLITS:
        raise UserError(f"{where}.split={source.split!r}: expected one of {', '.join(SPLITS)}")
    if source.split and source.split_field:
        raise UserError(f"{where}: set only one of split and split_field")
    return units


def _check_chat(source: SourceConfig, units: list[Unit[SourceConfig]], where: str) -> None:
    """Raise UserError for a source that cannot hold dialogues."""
    field = f"{where}.chat={source.chat!r}"
    if source.chat not in _CHAT_FORMATS:
        near = suggest(source.chat, _CHAT_FORMATS)
        raise UserError(f"{field}{near}: expected one of {', '.join(_CHAT_FORMATS)}")
    if source.label_field:
        raise UserError(f"{field}: dialogues have no labels; unset {where}.label_field, or chat")
    if other := next((unit for unit in units if unit.kind == "text"), None):
        raise UserError(
            f"{field}: {other.items[0].path} is text, which has no turns; give JSONL, JSON, CSV, TSV or Parquet"
        )


def check_format(config: Any, where: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError for an unknown format or an invalid limit."""
    if config.format not in ("", *allowed):
        raise UserError(
            f"{where}.format={config.format!r}: expected one of {', '.join(allowed)}{suggest(config.format, allowed)}"
        )
    if config.max_record_bytes < 1:
        raise UserError(f"{where}.max_record_bytes={config.max_record_bytes}: must be at least 1")


def make_units(
    name: str, config: Config, where: str, allowed: tuple[str, ...], absolute: bool = False
) -> list[Unit[Config]]:
    """The units of a source with fields `path` and `format`.

    where     names the config in error messages
    allowed   formats to recognise
    absolute  make paths absolute, for processes that run in another folder
    """
    field = f"{where}.path={config.path!r}"
    base = ""
    if config.path.startswith("tfds:"):
        num_records = len(open_tfds(config.path, field))
        spans = [_make_tfds_span(config.path, begin, num_records) for begin in range(0, num_records, _TFDS_RECORDS)]
        groups = [[span] for span in spans]
    elif config.path == "stdlib:":
        files = list_stdlib_files(field)
        base = os.path.commonpath(files)
        groups = list(_group_spans(_make_spans(files, lambda path: config.format or "text")))
    else:
        path = os.path.expanduser(config.path)
        path = os.path.abspath(path) if absolute else path
        files = list_files(path, field)
        base = _find_fixed_folder(path, files)
        groups = list(_group_spans(_make_spans(files, lambda path: config.format or formats.detect(path, allowed))))
    return [
        Unit(
            source=name,
            index=index,
            kind=group[0].kind,
            config=config,
            items=tuple(span.item for span in group),
            size=sum(span.size for span in group),
            state=",".join(span.state for span in group),
            base=base,
        )
        for index, group in enumerate(groups)
    ]


def describe_formats(units: list[Unit]) -> str:
    """How the files of a source are read, such as "3 as JSON lines, 1 as text"."""
    files: dict[str, set[str]] = {}
    for unit in units:
        files.setdefault(unit.kind, set()).update(item.path for item in unit.items)
    counts = [f"{len(paths):,} as {formats.NAMES.get(kind, kind)}" for kind, paths in sorted(files.items())]
    return f"reads files: {', '.join(counts)}"


def list_files(path: str, where: str) -> list[str]:
    """The file, or the files of a glob in order of their names. Raises UserError, begun with `where`, for none."""
    if os.path.isdir(path):
        raise UserError(f"{where}: this is a folder; give a glob such as '{path.rstrip('/')}/**/*.txt'")
    # A name that holds glob characters, such as a[1].txt, still names its file.
    files = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not files:
        what = "no file matches this glob" if glob.has_magic(path) else "no such file"
        raise UserError(f"{where}: {what}; give a file, a quoted glob such as '/texts/**/*.txt', or 'stdlib:'")
    return files


def _find_fixed_folder(path: str, files: list[str]) -> str:
    """The part of a glob before its first wildcard, so that ids stay the same if the folder is moved."""
    if files == [path]:
        return os.path.dirname(path)
    fixed = []
    for part in Path(path).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return str(Path(*fixed)) if fixed else ""


def list_stdlib_files(where: str) -> list[str]:
    """Python's own sources, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    if not files:
        raise UserError(f"{where}: this Python has no sources at {root}; give text of your own")
    return [str(path) for path in sorted(files, key=lambda path: path.relative_to(root).as_posix())]


def _make_spans(files: list[str], kind_of: Callable[[str], str]) -> list[_Span]:
    """Spans of every file; large files of lines, and Parquet, are cut, so that one file becomes many units."""
    stats = [os.stat(path) for path in files]
    limit = choose_unit_bytes(sum(stat.st_size for stat in stats))
    spans = []
    for path, stat in zip(files, stats, strict=True):
        kind, state = kind_of(path), f"{stat.st_size}:{stat.st_mtime_ns}"
        if kind == "parquet":
            spans += [_Span(kind, item, size, state) for item, size in _list_row_groups(path, stat.st_size)]
        elif stat.st_size > limit and kind in ("jsonl", "lines") and _can_cut(path):
            for begin in range(0, stat.st_size, limit):
                end = min(begin + limit, stat.st_size)
                spans.append(_Span(kind, Item(path, begin, end), end - begin, state))
        else:
            spans.append(_Span(kind, Item(path), stat.st_size, state))
    return spans


def _can_cut(path: str) -> bool:
    """Whether every line feed byte of a file ends a line."""
    with open(path, "rb") as file:
        return not streams.detect_compression(path) and not encodings.is_wide(file.read(4))


def _list_row_groups(path: str, size: int) -> Iterator[tuple[Item, int]]:
    """(item, bytes) for every row group; a file with an unreadable footer stays whole, and its reader rejects it."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        yield Item(path), size
        return
    for group in range(metadata.num_row_groups):
        yield Item(path, group, group + 1), metadata.row_group(group).total_byte_size


def _make_tfds_span(path: str, begin: int, num_records: int) -> _Span:
    end = min(begin + _TFDS_RECORDS, num_records)
    return _Span("tfds", Item(path, begin, end), end - begin, f"{num_records} records")


def open_tfds(path: str, where: str) -> Any:
    """The records of `tfds:NAME[:SPLIT][@DATA_DIR]` by index, read without TensorFlow. The default split is train.

    Raises UserError for a set that is not in the folder, a split that it lacks, or files other than ArrayRecord.
    """
    import tensorflow_datasets as tfds

    match = _TFDS.fullmatch(path.removeprefix("tfds:"))
    if not match:
        raise UserError(f"{where}: expected tfds:NAME[:SPLIT][@DATA_DIR]")
    name, split, folder = match["name"], match["split"] or "train", match["folder"]
    builder: Any = tfds.builder  # the stubs lack its keywords
    try:
        return builder(name, data_dir=folder, try_gcs=False).as_data_source(split=split)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{where}: cannot be read ({reason}); the set must be prepared beforehand as ArrayRecord files "
            "(download_and_prepare with file_format='array_record')"
        ) from None


def choose_unit_bytes(total: int) -> int:
    """The size of a unit of a source of `total` bytes."""
    return min(max(total // _TARGET_UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)


def _group_spans(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Neighbouring spans of one kind, joined up to the size of a unit."""
    limit = choose_unit_bytes(sum(span.size for span in spans))
    group: list[_Span] = []
    size = 0
    for span in spans:
        if group and (span.kind != group[0].kind or size + span.size > limit):
            yield group
            group, size = [], 0
        group.append(span)
        size += span.size
    if group:
        yield group
