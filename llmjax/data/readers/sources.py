"""List the documents of a source as units of work that processes share."""

from collections.abc import Callable, Iterator
import dataclasses
import glob
import os
from pathlib import Path
import re
import sysconfig

from llmjax.data.config import SourceConfig
from llmjax.data.readers import formats, streams
from llmjax.errors import UserError, suggest

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 20, 1 << 28
_TARGET_UNITS = 64  # of a source: enough for the cores of a large machine, few enough for a store that opens at once
_TFDS_RECORDS = 8192  # in a unit
_TFDS = re.compile(r"(?P<name>[^:@]+(:\d+\.\d+\.\d+)?)(:(?P<split>[^@]+))?(@(?P<folder>.+))?")
# Left out of the standard library: tests, and files that are generated or differ from machine to machine.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


@dataclasses.dataclass(frozen=True)
class Item:
    """A span of one file: bytes of JSONL, row groups of Parquet, records of TFDS; whole where end is None."""

    path: str
    begin: int = 0
    end: int | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """Documents that one process reads, splits and tokenizes: the shard of the token store that they become.

    kind         a format of SourceConfig, or "tfds"
    text_field   of a record
    split_field  of a record; empty: none
    items        files or spans of one file, read in this order
    state        size and time of change of the files: an interrupted preparation starts over when they differ
    """

    source: str
    index: int
    kind: str
    text_field: str
    items: tuple[Item, ...]
    state: str
    split_field: str = ""
    max_record_bytes: int = 1 << 26
    accept_truncated: bool = False


def list_units(name: str, source: SourceConfig) -> list[Unit]:
    """The units of one source, in an order that depends on the path names alone.

    Raises UserError for a path that does not exist, that matches no file, or whose Parquet files lack the text field.
    """
    where = f"data.sources.{name}.path={source.path!r}"
    if source.format not in ("", *formats.FORMATS):
        raise UserError(
            f"data.sources.{name}.format={source.format!r}{suggest(source.format, formats.FORMATS)}: expected one of "
            f"{', '.join(formats.FORMATS)}"
        )
    if source.max_record_bytes < 1:
        raise UserError(f"data.sources.{name}.max_record_bytes={source.max_record_bytes}: must be at least 1")
    if source.path.startswith("tfds:"):
        groups = tfds_groups(source.path, len(open_tfds(source.path, where)))
    else:
        files = stdlib_files(where) if source.path == "stdlib:" else matching_files(source.path, where)
        given = source.format or ("text" if source.path == "stdlib:" else "")
        plain = lambda path, kind: kind == "jsonl" and not streams.compression_of(path)
        groups = grouped(file_spans(files, lambda path: given or formats.detect(path), plain))
    units = [
        Unit(
            name,
            index,
            kind,
            source.text_field,
            tuple(items),
            state,
            source.split_field,
            source.max_record_bytes,
            source.accept_truncated,
        )
        for index, (kind, items, state) in enumerate(groups)
    ]
    if source.split_field and (other := next((unit for unit in units if unit.kind not in ("jsonl", "json")), None)):
        raise UserError(
            f"data.sources.{name}.split_field={source.split_field!r}: {other.items[0].path} is no JSONL; leave it unset"
        )
    return units


def recognised(units: list[Unit]) -> str:
    """How the files of a source are read, such as "3 files as JSON lines, 1 as text"."""
    files: dict[str, set[str]] = {}
    for unit in units:
        files.setdefault(unit.kind, set()).update(item.path for item in unit.items)
    counts = [f"{len(paths):,} as {formats.NAMES.get(kind, kind)}" for kind, paths in sorted(files.items())]
    return f"reads files: {', '.join(counts)}"


def matching_files(path: str, where: str) -> list[str]:
    """The file, or the files of a glob in order of their names; UserError, begun with `where`, where there is none."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise UserError(f"{where}: this is a folder; give a glob such as '{path.rstrip('/')}/**/*.txt'")
    # A name that holds glob characters, such as a[1].txt, still names its file.
    found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not found:
        what = "no file matches this glob" if glob.has_magic(path) else "no such file"
        raise UserError(f"{where}: {what}; give a file, a quoted glob such as '/texts/**/*.txt', or 'stdlib:'")
    return found


def stdlib_files(where: str) -> list[str]:
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


def file_spans(
    files: list[str], kind_of: Callable[[str], str], cuts: Callable[[str, str], bool]
) -> list[tuple[str, Item, int, str]]:
    """(kind, item, bytes, state) for every file; files of lines and Parquet are cut, so that one feeds many units.

    cuts   whether a file of this path and kind may be cut between any two lines
    """
    stats = [os.stat(path) for path in files]
    limit = unit_bytes(sum(stat.st_size for stat in stats))
    spans = []
    for path, stat in zip(files, stats, strict=True):
        kind, state = kind_of(path), f"{stat.st_size}:{stat.st_mtime_ns}"
        if kind == "parquet":
            spans += [(kind, item, size, state) for item, size in row_groups(path, stat.st_size)]
        elif stat.st_size > limit and cuts(path, kind):
            for begin in range(0, stat.st_size, limit):
                end = min(begin + limit, stat.st_size)
                spans.append((kind, Item(path, begin, end), end - begin, state))
        else:
            spans.append((kind, Item(path), stat.st_size, state))
    return spans


def row_groups(path: str, size: int) -> Iterator[tuple[Item, int]]:
    """(item, bytes) for every row group; a file whose footer cannot be read stays whole, for the reader to reject."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        yield Item(path), size
        return
    for group in range(metadata.num_row_groups):
        yield Item(path, group, group + 1), metadata.row_group(group).total_byte_size


def tfds_groups(path: str, records: int) -> Iterator[tuple[str, list[Item], str]]:
    """(kind, items, state) of the units of a TFDS source of so many records."""
    for begin in range(0, records, _TFDS_RECORDS):
        yield "tfds", [Item(path, begin, min(begin + _TFDS_RECORDS, records))], f"{records} records"


def open_tfds(path: str, where: str):
    """The records of `tfds:NAME[:SPLIT][@DATA_DIR]` by index, read without TensorFlow. The default split is train.

    Raises UserError for a set that is not in the folder, a split that it lacks, or files other than ArrayRecord.
    """
    import tensorflow_datasets as tfds

    match = _TFDS.fullmatch(path.removeprefix("tfds:"))
    if not match:
        raise UserError(f"{where}: expected tfds:NAME[:SPLIT][@DATA_DIR]")
    name, split, folder = match["name"], match["split"] or "train", match["folder"]
    try:
        return tfds.builder(name, data_dir=folder, try_gcs=False).as_data_source(split=split)  # type: ignore[call-arg]
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{where}: cannot be read ({reason}); the set must be prepared beforehand as ArrayRecord files "
            "(download_and_prepare with file_format='array_record')"
        ) from None


def unit_bytes(total: int) -> int:
    """The size of a unit of a source of `total` bytes."""
    return min(max(total // _TARGET_UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)


def grouped(spans: list[tuple[str, Item, int, str]]) -> Iterator[tuple[str, list[Item], str]]:
    """Neighbours of one kind put together up to the size of a unit."""
    limit = unit_bytes(sum(size for _, _, size, _ in spans))
    kind, items, size, states = "", [], 0, []
    for span_kind, item, span_size, state in spans:
        if items and (span_kind != kind or size + span_size > limit):
            yield kind, items, ",".join(states)
            items, size, states = [], 0, []
        kind, size = span_kind, size + span_size
        items.append(item)
        states.append(state)
    if items:
        yield kind, items, ",".join(states)
