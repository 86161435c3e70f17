"""Build the token store: scan, split, train a tokenizer, tokenize; resumable at every step."""

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
from llmjax.data.readers.documents import NO_FAULT
from llmjax.data.readers.sources import Unit
from llmjax.data.store import near_duplicates, split, stages, token_store, tokenizer, tokenizer_settings
from llmjax.data.store.settings import check_settings, settings_of
from llmjax.data.store.workers import Workers, cores, with_progress
from llmjax.errors import UserError
from llmjax.run import workdir

VERSION = 2
_LOCK = "prepare.lock"  # in the store's folder; a name of its own, as a store may lie in a workdir itself
_MAX_PART, _MIN_PART = 1 << 14, 1 << 10  # bytes of a part of a document, where documents are too few to be split
_SAMPLED_UNITS = 64  # of a source, that the tokenizer's training text is taken from
_MAX_COMPRESSED = 1 << 25  # bytes of validation text up to which it is compressed for comparison

logger = logging.getLogger(__name__)


def read_manifest(folder: Path | str) -> dict | None:
    """The top-level manifest of a complete store, None where there is no store.

    Raises UserError for a manifest that cannot be read, and for one of another version's format.
    """
    manifest = workdir.read_json(Path(folder) / "manifest.json")
    if manifest is not None and manifest.get("version") != VERSION:
        raise UserError(
            f"token store {folder}: format version {manifest.get('version')}, this llmjax reads {VERSION}; use the "
            "llmjax that made it, or delete that folder to prepare it again"
        )
    return manifest


def check_store(folder: Path | str, manifest: dict) -> None:
    """Raise UserError where the parts of a store are not those that its manifest was written for.

    Every split must have the tokenizer and the fingerprint that `manifest` names; a split binds its shards likewise.
    """
    folder = Path(folder)
    try:
        sha256, records = manifest["tokenizer"]["sha256"], manifest["sources"]
        prints = {name: {s: record[s]["fingerprint"] for s in split.SPLITS} for name, record in records.items()}
        seal = token_store.fingerprint_of({"sources": prints, "tokenizer": sha256})
    except (KeyError, TypeError, AttributeError):
        seal = None
    if seal is None or manifest.get("fingerprint") != seal:
        raise UserError(
            f"token store {folder}: manifest.json is not what was written (fingerprint); restore it from a copy, or "
            "delete the store and run `llmjax prepare` again"
        )
    for name, by_split in prints.items():
        for part, expected in by_split.items():
            opened = token_store.TokenStore(folder / name / part)
            if (opened.fingerprint, opened.tokenizer_sha256) != (expected, sha256):
                raise UserError(
                    f"token store {folder}: {name}/{part} belongs to another store (tokenizer "
                    f"{opened.tokenizer_sha256[:12]}, expected {sha256[:12]}; fingerprint {opened.fingerprint[:12]}, "
                    f"expected {expected[:12]}); restore the store from a copy, or delete it and run `llmjax prepare`"
                )


def prepare(config: DataConfig, folder: Path | str) -> dict:
    """The manifest of the store in `folder`, which is made first where it is missing.

    A store that is there is never replaced. One that another process is preparing is waited for, and taken if its
    settings are the same. An interrupted preparation goes on where it stopped, if neither settings nor files changed
    since. The store depends on the text and the settings alone, on no number of workers. Raises UserError for input
    that cannot be honoured, for a store that was made with other settings or is damaged, and when the disk is full.
    """
    folder = Path(folder)
    settings = settings_of(config)
    if manifest := _take(folder, settings):
        return manifest
    lock = workdir.Lock(folder, primary=True, wait=True, name=_LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            return _take(folder, settings) or _Preparation(config, settings, folder, lock).run()
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


def _take(folder: Path, settings: dict) -> dict | None:
    """The manifest of a store that is there, None where there is none. Raises UserError for one of other settings."""
    manifest = read_manifest(folder)
    if manifest is not None:
        check_store(folder, manifest)
        check_settings(manifest["settings"], settings, folder)
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
    return manifest


class _Preparation:
    """One run of `prepare`: the stages in order, each a pass of the workers over all units."""

    def __init__(self, config: DataConfig, settings: dict, folder: Path, lock: workdir.Lock):
        self.config, self.settings, self.folder, self.lock = config, settings, folder, lock
        self.units = [u for name in settings["sources"] for u in sources.list_units(name, config.sources[name])]
        self.place = stages.Workplace(folder / "unfinished")
        self.part_bytes: dict[str, int | None] = dict.fromkeys(settings["sources"])
        self.text_bytes: dict[str, int] = {}
        self.splits: list[np.ndarray] = []  # uint8 [documents], by unit
        self.keys = np.zeros(0, np.uint64)  # of each document's cluster of near copies

    def run(self) -> dict:
        self._begin()
        for name in self.settings["sources"]:
            logger.info(f"{name}: {sources.describe_formats(self._of(name))}")
        workers = min(self.config.workers or cores(), max(len(self.units), 2))
        with Workers(workers) as self.pool:
            self._scan(self.units)
            self._check_rejects()
            self._split()
            kind, model = self._tokenizer()
            self._tokenize(kind, model)
            compressors = self._compress()
        return self._finish(kind, model, compressors)

    def _begin(self) -> None:
        """Take up what an interrupted run left, if it was the same preparation; else remove it."""
        state = {"settings": self.settings, "units": hashlib.sha256(repr(self.units).encode()).hexdigest()}
        path = self.place.folder / "state.json"
        begun = workdir.read_json(path)
        if begun == state:
            logger.info("resuming the interrupted preparation")
            return
        sources = [self.folder / name for name in self.settings["sources"]]
        if begun is not None:
            logger.info("settings or files changed since the interrupted preparation: starting over")
            for source in sources:
                shutil.rmtree(source, ignore_errors=True)
        for source in sources:
            if source.is_dir() and any(source.iterdir()):
                raise UserError(
                    f"{source} exists, but {self.folder} holds neither a finished token store nor an interrupted one; "
                    "remove that folder, or set data.store to another one"
                )
        shutil.rmtree(self.place.folder, ignore_errors=True)
        for folder in (self.place.folder, *sources):
            folder.mkdir(exist_ok=True)
        write_bytes(path, json.dumps(state).encode())

    def _scan(self, units: list[Unit]) -> None:
        signed = self.config.split.near_copies
        tasks = [(unit, self.place, self.part_bytes[unit.source], signed) for unit in units]
        sizes = self._map("reading", stages.scan, tasks, None)
        for name in {unit.source for unit in units}:
            self.text_bytes[name] = sum(size for u, size in zip(units, sizes, strict=True) if u.source == name)

    def _check_rejects(self) -> None:
        """Write rejects.jsonl; raises UserError for a source with too many, or without any text."""
        with open(self.folder / "rejects.jsonl", "wb") as file:
            for unit in self.units:
                file.write(self.place.path("rejects", unit).with_suffix(".jsonl").read_bytes())
        for name, source in self.settings["sources"].items():
            counts = self._rejects(name)
            documents = sum(len(self.place.load_scan(unit).sizes) for unit in self._of(name))
            bad = sum(count for reason, count in counts.items() if reason not in NO_FAULT)
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            where = f"data.sources.{name}.path={source['path']!r}"
            if bad > self.config.max_bad_fraction * (bad + documents):
                raise UserError(
                    f"{where}: {bad} of {bad + documents} records cannot be used ({listed}), more than "
                    f"data.max_bad_fraction={self.config.max_bad_fraction} allows; see {self.folder / 'rejects.jsonl'}"
                )
            lost = sum(self.place.result("scan", unit)["bad_bytes"] for unit in self._of(name))
            total = lost + self.text_bytes[name]
            if lost > self.config.max_bad_fraction * total:
                raise UserError(
                    f"{where}: {lost:,} of {total:,} bytes cannot be used ({listed}), more than "
                    f"data.max_bad_fraction={self.config.max_bad_fraction} allows; see {self.folder / 'rejects.jsonl'}"
                )
            if not documents:
                raise UserError(f"{where}: holds no text{f' ({listed})' if listed else ''}; give files that do")
            if counts:
                logger.info(f"{name}: left out {listed}; see {self.folder / 'rejects.jsonl'}")

    def _split(self) -> None:
        """Assign documents to splits; sources of too few documents are cut into parts first."""
        self._assign()
        named = {name for name, source in self.settings["sources"].items() if "split_field" in source}
        few = [n for n in self.settings["sources"] if split.missing(self._splits_of(n), self.config.split)]
        for name in sorted(named.intersection(few)):
            lacking = split.missing(self._splits_of(name), self.config.split)
            said = f"{name}: no record names the split {' or '.join(split.SPLITS[part] for part in lacking)}"
            if split.TRAIN in lacking:
                raise UserError(f"data.sources.{said}: nothing to train on; give the files of all splits")
            logger.info(said)
        few = [name for name in few if name not in named]
        for name in few:
            size = min(max(self.text_bytes[name] // 64, _MIN_PART), _MAX_PART)
            self.part_bytes[name] = size
        if few:
            counts = {name: len(self._splits_of(name)) for name in few}
            self._scan([unit for unit in self.units if unit.source in few])
            self._assign()
            for name in few:
                size, parts = self.part_bytes[name] or 0, len(self._splits_of(name))
                logger.info(
                    f"{name}: too few documents for data.split ({counts[name]}), so they are cut at blank lines into "
                    f"{parts} parts of {size:,} to {2 * size:,} bytes"
                )
                self._fill(name)
        for unit, splits in zip(self.units, self.splits, strict=True):
            np.save(self.place.path("splits", unit).with_suffix(".npy"), splits)

    def _assign(self) -> None:
        scans = [self.place.load_scan(unit) for unit in self.units]
        edges = np.cumsum([0] + [len(scan.sizes) for scan in scans])
        keys = np.concatenate([scan.hashes[:, 0] for scan in scans])
        if self.config.split.near_copies:
            began = time.monotonic()
            parts = [functools.partial(self.place.signatures, unit) for unit in self.units]
            keys = split.near_copies(keys, near_duplicates.Signatures(parts, edges))
            copies = len(keys) - len(np.unique(keys))
            logger.info(f"{len(keys):,} documents, {copies:,} near copies of others ({time.monotonic() - began:.1f} s)")
        self.keys = keys
        given = np.concatenate([scan.given for scan in scans])
        assigned = np.where(given == split.NONE, split.assign(keys, self.config.split), given)
        self.splits = np.split(assigned, edges[1:-1])

    def _fill(self, name: str) -> None:
        """Give splits that are empty even so their first part."""
        chosen = [i for i, unit in enumerate(self.units) if unit.source == name]
        ends = np.cumsum([len(splits) for splits in self.splits])
        keys = np.concatenate([self.keys[ends[i] - len(self.splits[i]) : ends[i]] for i in chosen])
        filled = split.fill_missing(self._splits_of(name), keys, self.config.split)
        edges = np.cumsum([len(self.splits[i]) for i in chosen])[:-1]
        for i, splits in zip(chosen, np.split(filled, edges), strict=True):
            self.splits[i] = splits
        if lacking := split.missing(filled, self.config.split):
            logger.info(f"{name}: too little text for a {' and a '.join(split.SPLITS[s] for s in lacking)} split")

    def _tokenizer(self) -> tuple[str, Path]:
        """(kind, the store's own copy of the model file): trained, or given."""
        given = self.config.tokenizer
        model = self.folder / tokenizer.FILE_NAMES[given.kind]
        if given.kind == "bytes":
            return given.kind, model
        done = self.place.folder / "tokenizer.done"
        if done.exists():
            return given.kind, model
        if given.path:
            path = Path(given.path).expanduser()
            if not path.is_file():
                raise UserError(f"data.tokenizer.path={given.path!r}: no such file; give one, or none to train one")
            content = path.read_bytes()
            tokenizer.read_tokenizer_file(given.kind, path)  # raises for what is no model
            if settings := tokenizer_settings.read_settings(path):  # of an import
                write_bytes(self.folder / tokenizer_settings.FILE, settings.to_bytes())
        else:
            content = self._train()
        write_bytes(model, content)
        done.touch()
        return given.kind, model

    def _train(self) -> bytes:
        given = self.config.tokenizer
        units = [unit for name in self.settings["sources"] for unit in _spread(self._of(name), _SAMPLED_UNITS)]
        total = sum(self._bytes(unit, split.TRAIN) for unit in units)
        share = min(given.training_bytes / total, 1.0)
        tasks = [(unit, self.place, self.part_bytes[unit.source], share) for unit in units]
        self._map("sampling text for the tokenizer", stages.sample, tasks, None)
        size = sum(self.place.path("sample", unit).stat().st_size for unit in units)
        logger.info(f"training a {given.algorithm} tokenizer of {given.vocab_size:,} on {size / 1e6:.1f} MB")
        task = (units, self.place, given.algorithm, given.vocab_size)
        return self._map("training the tokenizer", stages.train_tokenizer, [task], None)[0]

    def _tokenize(self, kind: str, model: Path) -> None:
        tasks = [
            (unit, self.place, self.part_bytes[unit.source], kind, model, self.folder / unit.source)
            for unit in self.units
        ]
        sizes = [int(self.place.load_scan(unit).sizes.sum()) for unit in self.units]
        self._map("tokenizing", stages.tokenize, tasks, sizes)

    def _compress(self) -> dict | None:
        size = sum(self._bytes(unit, split.VALIDATION) for unit in self.units)
        if not 0 < size <= _MAX_COMPRESSED:
            return None
        task = (self.units, self.place, self.part_bytes)
        return self._map("compressing the validation text", stages.compress, [task], None)[0]

    def _finish(self, kind: str, model: Path, compressors: dict | None) -> dict:
        """The manifests: of every source and split, then the store's own."""
        lossy = [self.place.result("tokens", unit) for unit in self.units]
        count, first = sum(m["lossy"] for m in lossy), next((m["first_lossy"][0] for m in lossy if m["lossy"]), "")
        made = tokenizer.read_tokenizer_file(kind, model, lossless=not count)
        if count:
            logger.info(f"the tokenizer loses text: {count:,} documents do not come back as they were, such as {first}")
        listed = {name: self._manifests(name, made) for name in self.settings["sources"]}
        digest = hashlib.sha256()
        for unit in self.units:
            digest.update(self.place.load_scan(unit).hashes.astype(">u8").tobytes())
        manifest = {
            "version": VERSION,
            "tokenizer": {
                "kind": kind,
                "sha256": made.sha256,
                "vocab_size": made.vocab_size,
                "lossless": made.lossless,
                "lossy_documents": count,
            },
            "settings": self.settings,
            "sources": listed,
            "compressors": compressors,
            "python": platform.python_version(),
            "corpus_sha256": digest.hexdigest(),
        }
        self.lock.check()
        prints = {name: {s: item[s]["fingerprint"] for s in split.SPLITS} for name, item in listed.items()}
        manifest["fingerprint"] = token_store.fingerprint_of({"sources": prints, "tokenizer": made.sha256})
        remove_partial(self.folder)
        write_bytes(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(self.place.folder, ignore_errors=True)
        return manifest

    def _manifests(self, name: str, made: tokenizer.Tokenizer) -> dict:
        record: dict[str, Any] = {
            "path": self.settings["sources"][name]["path"],
            "rejected": self._rejects(name),
            "part_bytes": self.part_bytes[name],
        }
        markers = [self.place.result("tokens", unit) for unit in self._of(name)]
        for part in split.SPLITS:
            manifest = token_store.write_manifest(
                self.folder / name / part,
                [marker["shards"][part] for marker in markers if part in marker["shards"]],
                vocab_size=made.vocab_size,
                eos_id=made.eos_id,
                bos_id=made.bos_id,
                source=name,
                split=part,
                tokenizer_sha256=made.sha256,
            )
            record[part] = {field: manifest[field] for field in ("documents", "tokens", "text_bytes", "fingerprint")}
        counted = (f"{s} {record[s]['documents']:,} documents, {record[s]['tokens']:,} tokens" for s in split.SPLITS)
        logger.info(f"{name}: {'; '.join(counted)}")
        return record

    def _map(self, what: str, function: Callable, tasks: list[tuple], sizes: list[int] | None) -> list:
        """The tasks' results in their order."""
        self.lock.check()
        return with_progress(what, self.pool.map(function, tasks), len(tasks), sizes)

    def _of(self, name: str) -> list[Unit]:
        return [unit for unit in self.units if unit.source == name]

    def _splits_of(self, name: str) -> np.ndarray:
        return np.concatenate([s for unit, s in zip(self.units, self.splits, strict=True) if unit.source == name])

    def _bytes(self, unit: Unit, part: int) -> int:
        return int(self.place.load_scan(unit).sizes[self.place.splits(unit) == part].sum())

    def _rejects(self, name: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for unit in self._of(name):
            for reason, count in self.place.load_scan(unit).rejects.items():
                counts[reason] = counts.get(reason, 0) + count
        return dict(sorted(counts.items()))


def _spread(units: list[Unit], count: int) -> list[Unit]:
    """At most `count` units, evenly spaced."""
    return [units[i * len(units) // min(count, len(units))] for i in range(min(count, len(units)))]
