"""The manifest of a token store, and the check that the store's parts belong together."""

from pathlib import Path
from typing import Any

from llmjax.data.store import split, token_store
from llmjax.errors import UserError
from llmjax.run import workdir

VERSION = 2
Manifest = dict[str, Any]


def read_manifest(folder: Path | str) -> Manifest | None:
    """Read the top-level manifest of a complete store; None if there is no store.

    Raises UserError for a manifest that cannot be read, or has another format version.
    """
    manifest = workdir.read_json(Path(folder) / "manifest.json")
    if manifest is not None and manifest.get("version") != VERSION:
        raise UserError(
            f"token store {folder}: format version {manifest.get('version')}, this llmjax reads {VERSION}; use the "
            "llmjax that wrote it, or delete that folder to prepare it again"
        )
    return manifest


def has_dialogues(manifest: Manifest) -> bool:
    """Whether a source of the store has dialogues, of which the assistant's turns alone are scored."""
    return any("dialogues" in source for source in manifest["sources"].values())


def check_store(folder: Path | str, manifest: Manifest) -> None:
    """Raise UserError if the parts of a store are not those that its manifest was written for.

    Every split must have the tokenizer and the fingerprint that `manifest` names, and a split's own manifest names its
    shards.
    """
    folder = Path(folder)
    try:
        sha256 = manifest["tokenizer"]["sha256"]
        fingerprints = split_fingerprints(manifest["sources"])
        fingerprint = token_store.compute_fingerprint({"sources": fingerprints, "tokenizer": sha256})
    except (KeyError, TypeError, AttributeError):
        sha256, fingerprints, fingerprint = "", {}, None
    if fingerprint is None or manifest.get("fingerprint") != fingerprint:
        raise UserError(
            f"token store {folder}: manifest.json is not what was written (fingerprint); restore it from a copy, or "
            "delete the store and run `llmjax prepare` again"
        )
    for name, by_split in fingerprints.items():
        for part, expected in by_split.items():
            store = token_store.TokenStore(folder / name / part)
            if (store.fingerprint, store.tokenizer_sha256) != (expected, sha256):
                raise UserError(
                    f"token store {folder}: {name}/{part} belongs to another store (tokenizer "
                    f"{store.tokenizer_sha256[:12]}, expected {sha256[:12]}; fingerprint {store.fingerprint[:12]}, "
                    f"expected {expected[:12]}); restore the store from a copy, or delete it and run `llmjax prepare`"
                )


def split_fingerprints(records: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The fingerprint of every source and split, from the records of the sources in a store's manifest."""
    return {name: {part: record[part]["fingerprint"] for part in split.SPLITS} for name, record in records.items()}
