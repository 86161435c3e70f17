"""A folder that does not hold the complete store is refused, and not changed."""

import json
import shutil

import pytest

from llmjax.data.config import TokenizerConfig
from llmjax.data.store.prepare import check_store, read_manifest
from llmjax.errors import UserError
from tests.data.preparation import SMALL, config, run_prepare


def test_a_store_of_another_format_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n\n" * 500)
    run_prepare(config(tmp_path / "a.txt"), tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 7}))
    with pytest.raises(UserError, match=r"format version 7, this llmjax reads 2; .*prepare it again"):
        run_prepare(config(tmp_path / "a.txt"), tmp_path / "s")


def test_parts_of_two_stores_are_refused(corpus, tmp_path):
    """Each split is complete; only the manifest shows that they do not belong together."""
    for name, vocab_size in (("a", 300), ("b", 310)):
        run_prepare(config(corpus[0], tokenizer=TokenizerConfig(vocab_size=vocab_size)), tmp_path / name)
    shutil.copytree(tmp_path / "a", tmp_path / "mixed")
    shutil.copytree(tmp_path / "b/main/test", tmp_path / "mixed/main/test", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"main/test belongs to another store \(tokenizer"):
        run_prepare(config(corpus[0], tokenizer=SMALL), tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed/main")
    shutil.copytree(tmp_path / "b/main", tmp_path / "mixed/main")
    with pytest.raises(UserError, match=r"main/train belongs to another store"):
        check_store(tmp_path / "mixed", read_manifest(tmp_path / "mixed") or {})


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": ', b"[" * 100_000, None])
def test_a_store_whose_manifest_is_damaged_is_not_prepared_again(tmp_path, content):
    (tmp_path / "a.txt").write_text("one line\n\n" * 500)
    run_prepare(config(tmp_path / "a.txt"), tmp_path / "s")
    path = tmp_path / "s/manifest.json"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    with pytest.raises(UserError, match=r"manifest\.json"):
        run_prepare(config(tmp_path / "a.txt"), tmp_path / "s")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}


def test_folder_of_other_files_is_not_changed(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n\n" * 500)
    (tmp_path / "s/main").mkdir(parents=True)
    (tmp_path / "s/main/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"s/main exists, but .* neither a finished token store nor an interrupted one"):
        run_prepare(config(tmp_path / "a.txt"), tmp_path / "s")
    assert (tmp_path / "s/main/thesis.tex").read_text() == "years of work"
