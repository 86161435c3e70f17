"""Split inputs into units of work that processes share, independent of the number of processes."""

from collections.abc import Iterable
import csv
import dataclasses
import glob
import os
from pathlib import Path

from llmjax.curate.config import InputConfig
from llmjax.curate.readers import encodings, tables
from llmjax.data.readers import formats, sources, streams
from llmjax.data.readers.sources import Item
from llmjax.data.readers.streams import Damage
from llmjax.errors import UserError, suggest

FORMATS = ("text", "lines", "jsonl", "json", "parquet", "csv", "tsv", "html", "warc")
_BY_NAME = {
    **formats.ENDINGS,
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".warc": "warc",
    ".wet": "warc",
    ".arc": "warc",
}


@dataclasses.dataclass(frozen=True)
class Unit:
    """Records that one process reads: the shard that they become.

    kind    the reader: a format of InputConfig, or "tfds"
    config  the input's
    base    the folder that the names of files in ids are relative to
    items   files or spans of one file, read in this order
    size    bytes on disk (of TFDS: records)
    state   size and time of change of the files: they tell whether finished work still stands
    """

    source: str
    index: int
    kind: str
    config: InputConfig
    base: str
    items: tuple[Item, ...]
    size: int
    state: str


def list_units(name: str, config: InputConfig) -> list[Unit]:
    """The units of one input, in an order that depends on the path names alone, whatever the number of processes.

    Plain JSONL is cut by bytes, Parquet by row groups, small files are put together; other files are whole.
    Raises UserError for a path that does not exist or matches no file, for a value that is not offered, and
    where the first Parquet, CSV or TSV file lacks the text field.
    """
    where = f"curate.inputs.{name}"
    _check(config, where)
    place = f"{where}.path={config.path!r}"
    if config.path.startswith("tfds:"):
        source = sources.open_tfds(config.path, place)
        records = len(source)
        if records:
            _check_names(source[0], config, f"{where}.text_field={config.text_field!r}: {config.path}")
        groups, base = list(sources.tfds_groups(config.path, records)), ""
        sizes = {item: (item.end or 0) - item.begin for _, items, _ in groups for item in items}
    else:
        standard = config.path == "stdlib:"
        # Absolute: a process of a cluster may stand in another folder.
        path = config.path if standard else os.path.abspath(os.path.expanduser(config.path))
        files = sources.stdlib_files(place) if standard else sources.matching_files(path, place)
        base = os.path.commonpath(files) if standard else _fixed_folder(path, files)
        cuts = lambda path, kind: kind in ("jsonl", "lines") and _is_plain(path)
        spans = sources.file_spans(files, lambda path: config.format or kind_of(path), cuts)
        _check_columns(spans, config, where)
        groups = list(sources.grouped(spans))
        sizes = {item: size for _, item, size, _ in spans}
    if not groups:
        raise UserError(f"{place}: holds no records; give files that do")
    return [
        Unit(name, index, kind, config, base, tuple(items), sum(sizes[item] for item in items), state)
        for index, (kind, items, state) in enumerate(groups)
    ]


def kind_of(path: str) -> str:
    """The format of a file: JSON by its content, others by the name; "text" where the name says nothing."""
    named = _BY_NAME.get(formats.ending_of(path), "text")
    if named not in ("text", "jsonl"):
        return named
    return formats.json_format(formats.head_of(path), named == "jsonl") or named


def _check(config: InputConfig, where: str) -> None:
    for field, value, known in (
        ("format", config.format, ("", *FORMATS)),
        ("content", config.content, ("auto", "text", "html")),
    ):
        if value not in known:
            raise UserError(
                f"{where}.{field}={value!r}: expected one of {', '.join(map(repr, known))}{suggest(value, known)}"
            )
    if config.encoding and not encodings.codec_of(config.encoding):
        raise UserError(f"{where}.encoding={config.encoding!r}: no such encoding; give one such as 'utf-8' or 'cp1252'")


def _fixed_folder(path: str, files: list[str]) -> str:
    """The part of a glob before its first wildcard: ids then stay the same where the folder is moved."""
    if files == [path]:
        return os.path.dirname(path)
    parts = Path(path).parts
    fixed = [
        part
        for part, end in zip(parts, range(1, len(parts)), strict=False)
        if not any(map(glob.has_magic, parts[:end]))
    ]
    return str(Path(*fixed)) if fixed else ""


def _is_plain(path: str) -> bool:
    """Whether a line feed byte ends a line wherever it is found."""
    with open(path, "rb") as file:
        return not streams.compression_of(path) and not encodings.is_wide(file.read(4))


def _check_columns(spans: list[tuple[str, Item, int, str]], config: InputConfig, where: str) -> None:
    path, kind = next(((item.path, kind) for kind, item, *_ in spans if kind in ("parquet", "csv", "tsv")), ("", ""))
    names: Iterable[str] = ()
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            names = pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError):
            return  # for the reader to refuse
    elif kind:
        try:
            names = config.columns or next(tables.rows(path, kind), ())
        except (Damage, csv.Error, OSError):
            return
    more = "" if kind == "parquet" else ", or name the columns of files without a header line in `columns`"
    _check_names(names, config, f"{where}.text_field={config.text_field!r}: {path}", more)


def _check_names(names: Iterable[str], config: InputConfig, where: str, more: str = "") -> None:
    if names and config.text_field not in names:
        listed = ", ".join(map(str, names))[:300]
        raise UserError(f"{where} has the columns {listed}; name the one that holds the text{more}")
