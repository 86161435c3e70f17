"""The commands that another command suggests when it ends."""

import os
import pathlib
import shlex

from etils import epath

from llmjax.run import workdir as workdirs

_TEXT = "--config.data.sources.main.path=/my/texts/**/*.txt"


def use_model(workdir: epath.PathLike, objective: str, prompt: str = "Once upon a time") -> str:
    """The command that shows what a model predicts: `fill` for the objective masked, `predict` for labels, `embed` for
    vectors, else `generate`."""
    if objective in ("contrastive", "similarity"):
        return embed_texts(workdir)
    if objective in ("classify", "regress", "reward"):
        files = "--input=texts.jsonl", "--output=labels.jsonl"
        files += ("--field=prompt", "--pair_field=answer") if objective == "reward" else ()
        return _command("predict", f"--workdir={os.fspath(workdir)}", *files)
    flags = ["fill", "--text=The [MASK] of the"] if objective == "masked" else ["generate", f"--prompt={prompt}"]
    return _command(flags[0], f"--workdir={os.fspath(workdir)}", flags[1])


def use_step(workdir: epath.Path, step: int, objective: str) -> str:
    """`use_model` for one checkpoint of a run; `embed` where its head was not trained yet."""
    return embed_texts(workdir) if lacks_head(workdir, step) else use_model(workdir, objective)


def lacks_head(workdir: epath.Path, step: int) -> bool:
    """Whether the head has random parameters, as that of an imported sentence encoder, so that `fill` means nothing."""
    return step == 0 and bool((workdirs.read_json(workdir / workdirs.IMPORT) or {}).get("initialized"))


def embed_texts(workdir: epath.PathLike) -> str:
    """`embed`, which needs no head."""
    return _command("embed", f"--workdir={os.fspath(workdir)}", "--input=texts.jsonl", "--output=vectors.npy")


def chat(workdir: epath.PathLike) -> str:
    """`chat`, which needs a chat template."""
    return _command("chat", f"--workdir={os.fspath(workdir)}")


def score_model(workdir: epath.PathLike, store: pathlib.Path | None) -> str:
    """`eval`; without a token store, which it needs (after an import), `train` with a text."""
    if store is None or not (store / "manifest.json").is_file():
        return train(workdir, _TEXT)
    return _command("eval", f"--workdir={os.fspath(workdir)}", "--split=test")


def suggest_labels(workdir: epath.PathLike, task: str) -> str:
    """`analyse` with the file of suggested labels."""
    return _command("analyse", f"--workdir={os.fspath(workdir)}", f"--task={task}", "--fix")


def prepare(workdir: epath.PathLike, *, has_sources: bool) -> str:
    """`prepare` in a workdir whose config has sources or, after an import, has none."""
    return _command("prepare", f"--workdir={os.fspath(workdir)}", *([] if has_sources else [_TEXT]))


def train(workdir: epath.PathLike, *flags: str) -> str:
    """`train` in a workdir."""
    return _command("train", f"--workdir={os.fspath(workdir)}", *flags)


def _command(*words: str) -> str:
    """A line for the shell. Only the value of a flag is quoted, where that is necessary: --prompt='def main('."""
    parts = (word.partition("=") for word in words)
    return " ".join(
        ["llmjax", *(f"{flag}{equals}{shlex.quote(value) if value else ''}" for flag, equals, value in parts)]
    )
