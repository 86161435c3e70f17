"""Build the token store: scan, split, train a tokenizer, tokenize; resumable at every step."""

from collections import Counter
from collections.abc import Callable
import functools
import hashlib
import json
import logging
from pathlib import Path
import platform
import shutil
import time
from typing import Any

import numpy as np

from llmjax.atomic import NO_SPACE, remove_partial, write_bytes
from llmjax.data.config import DataConfig
from llmjax.data.readers import sources
from llmjax.data.readers.dialogues import NO_FIELD, describe_formats
from llmjax.data.readers.documents import NO_FAULT
from llmjax.data.readers.sources import Unit
from llmjax.data.store import (
    chat,
    near_duplicates,
    record_texts,
    split,
    stages,
    token_store,
    tokenizer,
    tokenizer_settings,
)
from llmjax.data.store.manifest import VERSION, Manifest, check_store, read_manifest, split_fingerprints
from llmjax.data.store.settings import check_settings, collect_settings
from llmjax.data.store.workers import Workers, count_cores, with_progress
from llmjax.errors import UserError
from llmjax.run import workdir

_LOCK = "prepare.lock"  # in the store's folder; not the workdir's lock, since a store may be in a workdir itself
_MAX_PART, _MIN_PART = 1 << 14, 1 << 10  # bytes of a part of a document, if a source has too few documents to split
_NUM_SAMPLED_UNITS = 64  # of a source, for the tokenizer's training text
_MAX_COMPRESSED = 1 << 25  # bytes of validation text up to which it is compressed for comparison

logger = logging.getLogger(__name__)


def prepare(config: DataConfig, folder: Path | str) -> Manifest:
    """Prepare the token store in `folder` unless it exists, and return its manifest.

    An existing store is never replaced. If another process is preparing it, this one waits, and then uses the store if
    its settings are the same. An interrupted preparation is resumed if neither settings nor files have changed. The
    store depends on the text and the settings alone, not on the number of workers. Raises UserError for bad settings or
    input, for a store that is damaged or was prepared with other settings, and for a full disk.
    """
    folder = Path(folder)
    settings = collect_settings(config)
    if manifest := _open_existing(folder, settings):
        return manifest
    lock = workdir.Lock(folder, primary=True, wait=True, name=_LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            return _open_existing(folder, settings) or _Preparation(config, settings, folder, lock).run()
    except OSError as error:
        if isinstance(error, PermissionError):
            raise UserError(
                f"{error.filename}: permission denied; set data.store to a folder that you may write"
            ) from None
        if error.errno in NO_SPACE:
            raise UserError(
                f"no space left for the token store at {error.filename or folder}; free some, or set data.store to a "
                "larger disk, and run again: finished shards are kept"
            ) from None
        if isinstance(error, FileNotFoundError) and str(error.filename).startswith(str(folder)):
            raise UserError(
                f"{folder} was removed or renamed while it was being prepared; run the same command again"
            ) from None
        raise


def _open_existing(folder: Path, settings: dict[str, Any]) -> Manifest | None:
    """Check the store in `folder` and return its manifest, None if there is none."""
    manifest = read_manifest(folder)
    if manifest is not None:
        check_store(folder, manifest)
        check_settings(manifest["settings"], settings, folder)
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
    return manifest


class _Preparation:
    """One run of `prepare`: the stages in order, each applied to all units by the workers."""

    def __init__(self, config: DataConfig, settings: dict[str, Any], folder: Path, lock: workdir.Lock):
        self.config, self.settings, self.folder, self.lock = config, settings, folder, lock
        self.form = stages.Formats(records=record_texts.make_format(config), chat=chat.make_format(config))
        self.names = list(settings["sources"])
        self.units = [unit for name in self.names for unit in sources.list_units(name, config.sources[name])]
        self.scratch = stages.ScratchDir(folder / "unfinished")
        self.model = folder / tokenizer.FILE_NAMES[config.tokenizer.kind]
        self.part_bytes: dict[str, int | None] = dict.fromkeys(self.names)
        self.text_bytes: dict[str, int] = {}
        self.splits: list[np.ndarray] = []  # uint8 [documents], by unit
        self.keys = np.zeros(0, np.uint64)  # of all documents, see split.cluster_near_copies

    def run(self) -> Manifest:
        self._start_or_resume()
        for name in self.names:
            logger.info("%s: %s", name, sources.describe_formats(self._units_of(name)))
        if self.form.chat is not None:
            logger.info(chat.describe_template(self.form.chat))
        num_workers = min(self.config.workers or count_cores(), max(len(self.units), 2))
        with Workers(num_workers) as self.pool:
            self._scan(self.units)
            self._check_rejects()
            self._assign_splits()
            self._make_tokenizer()
            self._tokenize()
            compressors = self._compress()
        return self._write_manifests(compressors)

    def _start_or_resume(self) -> None:
        """Keep the files of an interrupted run of the same preparation, else remove them."""
        units = hashlib.sha256(repr(self.units).encode()).hexdigest()
        state = {"version": VERSION, "settings": self.settings, "units": units}
        path = self.scratch.folder / "state.json"
        old_state = workdir.read_json(path)
        if old_state == state:
            logger.info("resuming the interrupted preparation")
            return
        folders = [self.folder / name for name in self.names]
        if old_state is not None:
            logger.info("settings or files changed since the interrupted preparation: starting over")
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in folders:
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} exists, but {self.folder} holds neither a finished token store nor an interrupted one; "
                    "remove that folder, or set data.store to another one"
                )
        shutil.rmtree(self.scratch.folder, ignore_errors=True)
        for folder in (self.scratch.folder, *folders):
            folder.mkdir(exist_ok=True)
        write_bytes(path, json.dumps(state).encode())

    def _scan(self, units: list[Unit]) -> None:
        near_copies = self.config.split.near_copies
        tasks = [(u, self.scratch, self.part_bytes[u.source], near_copies, self.form) for u in units]
        sizes = self._map("reading", stages.scan, tasks)
        for name in {unit.source for unit in units}:
            self.text_bytes[name] = sum(size for u, size in zip(units, sizes, strict=True) if u.source == name)

    def _check_rejects(self) -> None:
        """Write rejects.jsonl. Raises UserError for a source with too many rejects, or without any text."""
        path = self.folder / "rejects.jsonl"
        with open(path, "wb") as file:
            for unit in self.units:
                file.write(self.scratch.path("rejects", unit, ".jsonl").read_bytes())
        for name in self.names:
            units, counts = self._units_of(name), self._count_rejects(name)
            documents = sum(len(self.scratch.load_scan(unit).sizes) for unit in units)
            bad = sum(count for reason, count in counts.items() if reason not in NO_FAULT)
            bad_bytes = sum(self.scratch.result("scan", unit)["bad_bytes"] for unit in units)
            listed = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            where = f"data.sources.{name}.path={self.settings['sources'][name]['path']!r}"
            totals = (bad, bad + documents, "records"), (bad_bytes, bad_bytes + self.text_bytes[name], "bytes")
            for amount, total, what in totals:
                if amount > self.config.max_bad_fraction * total:
                    hint = ""
                    if any(reason.startswith(NO_FIELD) for reason in counts):
                        content = "turns" if self.config.sources[name].chat else "text"
                        hint = f"; data.sources.{name}.text_field must name the field of the {content}"
                    raise UserError(
                        f"{where}: {amount:,} of {total:,} {what} cannot be used ({listed}), more than "
                        f"data.max_bad_fraction={self.config.max_bad_fraction} allows; see {path}{hint}"
                    )
            if not documents:
                raise UserError(f"{where}: contains no text{f' ({listed})' if listed else ''}; give files that do")
            if dialogues := self._count_dialogues(name):
                logger.info("%s: %s", name, describe_formats(dialogues))
            if counts:
                logger.info("%s: left out %s; see %s", name, listed, path)

    def _assign_splits(self) -> None:
        """Assign documents to splits; one with too few is first cut into parts, but records and dialogues are not."""
        self._assign_by_key()
        incomplete = [name for name in self.names if self._missing_splits(name) and not self.config.sources[name].split]
        to_cut = [name for name in incomplete if "split_field" not in self.settings["sources"][name]]
        whole = [name for name in to_cut if self.form.records is not None or self.config.sources[name].chat]
        for name in whole:
            self._fill_empty_splits(name)
        incomplete = [name for name in incomplete if name not in whole]
        to_cut = [name for name in to_cut if name not in whole]
        for name in incomplete:
            if name not in to_cut:  # its records name their splits, so a cut would not fill the others
                missing = self._missing_splits(name)
                message = f"{name}: no record names the split {' or '.join(split.SPLITS[part] for part in missing)}"
                if split.TRAIN in missing:
                    raise UserError(f"data.sources.{message}: nothing to train on; give the files of all splits")
                logger.info(message)
        if to_cut:
            num_documents = {name: len(self._splits_of(name)) for name in to_cut}
            for name in to_cut:
                self.part_bytes[name] = min(max(self.text_bytes[name] // 64, _MIN_PART), _MAX_PART)
            self._scan([unit for unit in self.units if unit.source in to_cut])
            self._assign_by_key()
            for name in to_cut:
                size, parts = self.part_bytes[name] or 0, len(self._splits_of(name))
                logger.info(
                    f"{name}: too few documents for data.split ({num_documents[name]}), so they are cut at blank lines "
                    f"into {parts} parts of {size:,} to {2 * size:,} bytes"
                )
                self._fill_empty_splits(name)
        for unit, splits in zip(self.units, self.splits, strict=True):
            np.save(self.scratch.path("splits", unit, ".npy"), splits)

    def _assign_by_key(self) -> None:
        """Set `keys` and `splits` from the content hashes, near-duplicates, and the splits that records name."""
        scans = [self.scratch.load_scan(unit) for unit in self.units]
        edges = np.cumsum([0] + [len(scan.sizes) for scan in scans])
        self.keys = np.concatenate([scan.hashes[:, 0] for scan in scans])
        if self.config.split.near_copies:
            start = time.monotonic()
            loaders = [functools.partial(self.scratch.load_signatures, unit) for unit in self.units]
            self.keys = split.cluster_near_copies(self.keys, near_duplicates.Signatures(loaders, edges))
            copies, seconds = len(self.keys) - len(np.unique(self.keys)), time.monotonic() - start
            logger.info(f"{len(self.keys):,} documents, {copies:,} near-duplicates of others ({seconds:.1f} s)")
        named = np.concatenate([scan.named_splits for scan in scans])
        assigned = np.where(named == split.NONE, split.assign_splits(self.keys, self.config.split), named)
        self.splits = np.split(assigned, edges[1:-1])

    def _fill_empty_splits(self, name: str) -> None:
        """Move documents of a source from train to its splits that are still empty."""
        splits = np.concatenate(self.splits)
        chosen = np.repeat([unit.source == name for unit in self.units], [len(part) for part in self.splits])
        splits[chosen] = split.fill_empty(splits[chosen], self.keys[chosen], self.config.split)
        self.splits = np.split(splits, np.cumsum([len(part) for part in self.splits])[:-1])
        if missing := self._missing_splits(name):
            named = " and a ".join(split.SPLITS[part] for part in missing)
            logger.info("%s: too little text for a %s split", name, named)

    def _make_tokenizer(self) -> None:
        """Write the model file into the store: trained, or a copy of the file that the config names."""
        config, marker = self.config.tokenizer, self.scratch.folder / "tokenizer.done"
        if config.kind == "bytes" or marker.exists():
            return
        if config.path:
            path = Path(config.path).expanduser()
            if not path.is_file():
                raise UserError(
                    f"data.tokenizer.path={config.path!r}: no such file; give one, or leave it empty to train one"
                )
            model = path.read_bytes()
            tokenizer.read_tokenizer_file(config.kind, path)  # raises if it is not a model
            if settings := tokenizer_settings.read_settings(path):  # of an import
                write_bytes(self.folder / tokenizer_settings.FILE, settings.to_bytes())
        else:
            model = self._train_tokenizer()
        write_bytes(self.model, model)
        marker.touch()

    def _train_tokenizer(self) -> bytes:
        config = self.config.tokenizer
        units = [unit for name in self.names for unit in _spread(self._units_of(name), _NUM_SAMPLED_UNITS)]
        total = sum(self._split_bytes(unit, split.TRAIN) for unit in units)
        fraction = min(config.training_bytes / total, 1.0)
        self._map("sampling text for the tokenizer", stages.sample, [(u, self.scratch, fraction) for u in units])
        size = sum(self.scratch.path("sample", unit).stat().st_size for unit in units)
        logger.info(
            f"training a {config.algorithm} tokenizer with {config.vocab_size:,} ids on {size / 1e6:.1f} MB of text"
        )
        task = (units, self.scratch, config.algorithm, config.vocab_size)
        return self._map("training the tokenizer", stages.train_tokenizer, [task])[0]

    def _tokenize(self) -> None:
        kind = self.config.tokenizer.kind
        tasks = [(unit, self.scratch, kind, self.model, self.folder / unit.source, self.form) for unit in self.units]
        sizes = [int(self.scratch.load_scan(unit).sizes.sum()) for unit in self.units]
        self._map("tokenizing", stages.tokenize, tasks, sizes)

    def _compress(self) -> dict[str, dict[str, int]] | None:
        """Measure compressors on the validation text; None if it is empty, large or dialogues (no bits per byte)."""
        if self.form.chat is not None:
            return None
        size = sum(self._split_bytes(unit, split.VALIDATION) for unit in self.units)
        if not 0 < size <= _MAX_COMPRESSED:
            return None
        return self._map("compressing the validation text", stages.compress, [(self.units, self.scratch)])[0]

    def _write_manifests(self, compressors: dict[str, dict[str, int]] | None) -> Manifest:
        """Write the manifest of every source and split, and last the store's own."""
        results = [self.scratch.result("tokens", unit) for unit in self.units]
        num_lossy = sum(result["lossy"] for result in results)
        model = tokenizer.read_tokenizer_file(self.config.tokenizer.kind, self.model, lossless=not num_lossy)
        if num_lossy:
            first = next(result["first_lossy"][0] for result in results if result["lossy"])
            logger.info(f"the tokenizer loses text: {num_lossy:,} documents decode to another text, such as {first}")
        records = {name: self._write_source_manifests(name, model) for name in self.names}
        corpus = hashlib.sha256()
        for unit in self.units:
            corpus.update(self.scratch.load_scan(unit).hashes.astype(">u8").tobytes())
        manifest = {
            "version": VERSION,
            "tokenizer": {
                "kind": model.kind,
                "sha256": model.sha256,
                "vocab_size": model.vocab_size,
                "lossless": model.lossless,
                "lossy_documents": num_lossy,
            },
            "settings": self.settings,
            "sources": records,
            "compressors": compressors,
            "python": platform.python_version(),
            "corpus_sha256": corpus.hexdigest(),
        }
        if self.form.chat is not None:
            chat.write_template(self.form.chat.template, self.folder)
        self.lock.check()
        fingerprints = {"sources": split_fingerprints(records), "tokenizer": model.sha256}
        manifest["fingerprint"] = token_store.compute_fingerprint(fingerprints)
        remove_partial(self.folder)
        write_bytes(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(self.scratch.folder, ignore_errors=True)
        return manifest

    def _write_source_manifests(self, name: str, model: tokenizer.Tokenizer) -> dict[str, Any]:
        record: dict[str, Any] = {
            "path": self.settings["sources"][name]["path"],
            "rejected": self._count_rejects(name),
            "part_bytes": self.part_bytes[name],
        }
        results = [self.scratch.result("tokens", unit) for unit in self._units_of(name)]
        shards = [result["shards"] for result in results]
        if dialogues := self._count_dialogues(name):
            record["dialogues"] = dialogues
        if self.form.records is not None:
            record["cut"] = sum(result["cut"] for result in results)
        for part in split.SPLITS:
            manifest = token_store.write_manifest(
                self.folder / name / part,
                [by_split[part] for by_split in shards if part in by_split],
                vocab_size=model.vocab_size,
                eos_id=model.eos_id,
                bos_id=model.bos_id,
                source=name,
                split=part,
                tokenizer_sha256=model.sha256,
            )
            record[part] = {field: manifest[field] for field in ("documents", "tokens", "text_bytes", "fingerprint")}
            if self.config.sources[name].chat:
                record[part]["scored_tokens"] = sum(info["scored_tokens"] for info in manifest["shards"])
        parts = []
        for part in split.SPLITS:
            fields = record[part]
            scored = f", {fields['scored_tokens']:,} of them scored" if fields.get("scored_tokens") else ""
            parts.append(f"{part} {fields['documents']:,} documents, {fields['tokens']:,} tokens{scored}")
        logger.info("%s: %s", name, "; ".join(parts))
        if cut := record.get("cut"):
            logger.info("%s: %s texts were cut to data.seq_len=%d", name, f"{cut:,}", self.config.seq_len)
        return record

    def _map(self, what: str, function: Callable, tasks: list[tuple], sizes: list[int] | None = None) -> list:
        """Run the tasks on the workers and return their results in order."""
        self.lock.check()
        return with_progress(what, self.pool.map(function, tasks), len(tasks), sizes)

    def _units_of(self, name: str) -> list[Unit]:
        return [unit for unit in self.units if unit.source == name]

    def _splits_of(self, name: str) -> np.ndarray:
        return np.concatenate([s for unit, s in zip(self.units, self.splits, strict=True) if unit.source == name])

    def _missing_splits(self, name: str) -> list[int]:
        return split.find_missing(self._splits_of(name), self.config.split)

    def _split_bytes(self, unit: Unit, part: int) -> int:
        return int(self.scratch.load_scan(unit).sizes[self.scratch.load_splits(unit) == part].sum())

    def _count_rejects(self, name: str) -> dict[str, int]:
        return self._sum_counts("rejects", name)

    def _count_dialogues(self, name: str) -> dict[str, int]:
        """Dialogues of a source by format; {} for other sources."""
        return self._sum_counts("dialogues", name)

    def _sum_counts(self, field: str, name: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for unit in self._units_of(name):
            counts.update(self.scratch.result("scan", unit).get(field, {}))
        return dict(sorted(counts.items()))


def _spread(units: list[Unit], count: int) -> list[Unit]:
    """At most `count` units, evenly spaced."""
    return [units[i * len(units) // min(count, len(units))] for i in range(min(count, len(units)))]
