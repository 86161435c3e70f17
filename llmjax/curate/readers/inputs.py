"""List the files of an input of curation as units of work for parallel processes."""

from llmjax.curate.config import InputConfig
from llmjax.data.readers import encodings, formats, raw_records, sources
from llmjax.data.readers.raw_records import ReadOptions
from llmjax.data.readers.sources import Unit
from llmjax.errors import UserError, suggest

_CONTENTS = ("auto", "text", "html")


def list_units(name: str, config: InputConfig) -> list[Unit[InputConfig]]:
    """The units of one input, in an order that depends on the path names alone.

    Raises UserError for a path that does not exist, matches no file or contains no records, for an invalid field, and
    if the first table lacks the text field.
    """
    where = f"curate.inputs.{name}"
    sources.check_format(config, where, formats.CURATE_FORMATS)
    if config.content not in _CONTENTS:
        raise UserError(
            f"{where}.content={config.content!r}: expected one of {', '.join(map(repr, _CONTENTS))}"
            f"{suggest(config.content, _CONTENTS)}"
        )
    if config.encoding and not encodings.find_codec(config.encoding):
        raise UserError(f"{where}.encoding={config.encoding!r}: no such encoding; use one such as 'utf-8' or 'cp1252'")
    units = sources.make_units(name, config, where, formats.CURATE_FORMATS, absolute=True)
    if not units:
        raise UserError(f"{where}.path={config.path!r}: contains no records; give files that do")
    if first := next((unit for unit in units if unit.kind in raw_records.COLUMN_FORMATS), None):
        raw_records.check_columns(first.kind, first.items[0], read_options(first))
    return units


def read_options(unit: Unit[InputConfig]) -> ReadOptions:
    """Lenient reading with the settings of the unit's input."""
    config = unit.config
    return ReadOptions(
        where=f"curate.inputs.{unit.source}",
        text_field=config.text_field,
        max_record_bytes=config.max_record_bytes,
        is_lenient=True,
        encoding=config.encoding,
        columns=config.columns,
        fields=("*",) if "*" in config.fields else (config.id_field, *config.fields),
    )
