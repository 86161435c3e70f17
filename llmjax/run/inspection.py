"""The output of `llmjax inspect`: checkpoints and config of a run, read without devices."""

from collections.abc import Iterator
import json
import pathlib
import time
from typing import Any

from etils import epath

from llmjax.binding import differences
from llmjax.checkpoint.manager import Checkpoints
from llmjax.data.store import prepare
from llmjax.data.store.token_store import TokenStore
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.metrics import read_metrics
from llmjax.run import next_commands, workdir as workdirs


def inspect(workdir: epath.PathLike) -> dict[str, Any]:
    """The run as plain JSON: its checkpoints (oldest first), damaged ones, config, token store and last logged step.

    A checkpoint has its step, the fingerprint of parameters and optimizer state, data_state, total_targets, and the
    fields in which its config differs from WORKDIR/config.json. No array is read, so only damage of meta is detected.
    Raises UserError where the folder contains no run.
    """
    root = epath.Path(workdir)
    if not root.exists():
        raise UserError(f"--workdir={root}: no such folder; `llmjax train --workdir={root}` creates it")
    config = workdirs.read_run_config(root)
    good, damaged = _read_checkpoints(root / workdirs.CHECKPOINTS, config)
    store = epath.Path((config or {}).get("data", {}).get("store") or root / workdirs.STORE).expanduser()
    manifest = workdirs.read_json(store / "manifest.json")
    if config is None and manifest is None and not good and not damaged:
        raise UserError(f"--workdir={root}: no run there (no config.json, store or checkpoints); give a run's folder")
    lines = read_metrics(root)
    return {
        "workdir": str(root),
        "checkpoints": good,
        "damaged": damaged,
        "config": config,
        "store": None if manifest is None else _summarize_store(store, manifest),
        "last_logged": lines[-1] if lines else None,
    }


def describe(run: dict[str, Any]) -> str:
    """The result of `inspect` as text: a table of checkpoints, the config in a few lines, and the next step."""
    lines = [f"run {run['workdir']}", ""]
    if run["checkpoints"]:
        rows = [("step", "fingerprint", "next sample", "targets", "config")]
        for item in run["checkpoints"]:
            state, changed = item["data_state"] or {}, item["config_differences"]
            rows.append(
                (
                    f"{item['step']:,}",
                    item["fingerprint"][:16],
                    f"{state['next_sample']:,}" if "next_sample" in state else "?",
                    "?" if item["total_targets"] is None else f"{item['total_targets']:,}",
                    ", ".join(changed) if changed else "same as config.json",
                )
            )
        lines += align(rows)
    else:
        lines.append("no checkpoint yet")
    lines += [f"damaged: {item['path']}: {item['reason']}" for item in run["damaged"]]
    if (last := run["last_logged"]) is not None:
        lines += ["", f"last logged step {last['step']:,}" + (f", loss {last['loss']:.4f}" if "loss" in last else "")]
    lines += ["", *_config_lines(run["config"])]
    if (store := run["store"]) is not None:
        lines.append(f"store: {store['path']}, {store['tokens']:,} tokens of {', '.join(store['sources'])}")
    return "\n".join([*lines, "", f"next: {_next_command(run)}"])


def verify(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Verify the token store of a run (the result of `inspect`); yields source, split, bytes and seconds of each split.

    Raises UserError for the first damage, a tokenizer that is not the store's, and a run without a store.
    """
    if (store := run["store"]) is None:
        raise UserError(f"--workdir={run['workdir']}: no token store to verify; `llmjax prepare` creates it")
    if (manifest := prepare.read_manifest(store["path"])) is not None:
        prepare.check_store(store["path"], manifest)
    load_tokenizer(store["path"])  # compares its hash
    for source, splits in store["sources"].items():
        for split in splits:
            began = time.monotonic()
            nbytes = TokenStore(epath.Path(store["path"]) / source / split).verify()
            yield {"source": source, "split": split, "bytes": nbytes, "seconds": time.monotonic() - began}


def describe_verified(part: dict[str, Any]) -> str:
    """One result of `verify` as text."""
    rate = part["bytes"] / 1e6 / max(part["seconds"], 1e-6)
    return f"verified {part['source']}/{part['split']}: {part['bytes']:,} bytes, {rate:,.0f} MB/s"


def _read_checkpoints(folder: epath.Path, config: dict | None) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    checkpoints, good, damaged = Checkpoints(folder), [], []
    for step in checkpoints.steps():
        try:
            meta = checkpoints.read_meta(step)
        except UserError as error:
            damaged.append({"path": str(folder / str(step)), "reason": str(error)})
            continue
        changed = differences(meta["config"], config) if config and "config" in meta else []
        good.append(
            {
                "step": step,
                "fingerprint": meta["fingerprint"],
                "data_state": meta.get("data_state"),
                "total_targets": meta.get("total_targets"),
                "config_differences": {field: [before, after] for field, before, after in changed},
            }
        )
    aside = folder / "damaged"
    if aside.exists():
        paths = sorted(aside.iterdir(), key=lambda path: path.name)
        damaged += [{"path": str(path), "reason": "set aside when a run resumed"} for path in paths]
    return good, damaged


def _summarize_store(path: epath.Path, manifest: dict[str, Any]) -> dict[str, Any]:
    splits = ("train", "validation", "test")
    return {
        "path": str(path),
        "fingerprint": manifest["fingerprint"],
        "tokenizer": manifest["tokenizer"],
        "sources": {name: {s: item[s] for s in splits if s in item} for name, item in manifest["sources"].items()},
        "tokens": sum(item[s]["tokens"] for item in manifest["sources"].values() for s in splits if s in item),
    }


def _config_lines(config: dict[str, Any] | None) -> list[str]:
    """One line a section, with its fields as field=value; empty sections are omitted."""
    if config is None:
        return ["no config.json: nothing was trained yet"]
    scalars = {name: value for name, value in config.items() if not isinstance(value, dict)}
    sections = {"run": scalars, **{name: value for name, value in config.items() if isinstance(value, dict)}}
    return [
        f"{name}: " + " ".join(f"{field}={json.dumps(value)}" for field, value in section.items())
        for name, section in sections.items()
        if section
    ]


def _next_command(run: dict[str, Any]) -> str:
    workdir, config, store = run["workdir"], run["config"], run["store"]
    if not run["checkpoints"]:
        if config is not None:
            return next_commands.train(workdir)
        return f"{next_commands.train(workdir)} --config=NAME, with the overrides that `llmjax prepare` had"
    if store is not None:
        return next_commands.score_model(workdir, pathlib.Path(store["path"]))
    return next_commands.use_model(workdir, (config or {}).get("objective", {}).get("name", ""))


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """A line for each row, with columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
