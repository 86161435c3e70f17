"""The model card has what the files of a run know, says what they lack, and is valid metadata of the Hub."""

import json

from etils import epath
import pytest
import yaml

from llmjax.errors import UserError
from llmjax.report import model_card
from llmjax.run import config as run_config
from tests.report.runs import make_run, put

TASK = {
    "task": "pronouns",
    "step": 1000,
    "n": 40,
    "main": "acc",
    "groups": {"she": 15, "he": 25},
    "settings": {"kind": "pairs", "group_field": "who"},
    "metrics": {
        "acc": {"value": 0.75, "low": 0.61, "high": 0.88},
        "acc/she": {"value": 0.6, "low": 0.33, "high": 0.86},
        "acc/he": {"value": 0.84, "low": 0.68, "high": 0.97},
        "nats_difference": {"value": None, "low": None, "high": None},
    },
}
CORPUS = {
    "records": {"documents": 100},
    "kept": {"documents": 60},
    "config": {"stages": ["read", "personal_data"]},
    "personal_data": {"action": "replace", "kinds": {"email": {"documents": 3, "occurrences": 7, "contexts": []}}},
    "licences": {"CC-BY-4.0": 60},
    "origins": {},
    "languages": {"de": {"documents": 50, "kept": 20}, "en": {"documents": 50, "kept": 40}, "fr": {"kept": 0}},
    "duplicates": {"exact": 4, "near": 5},
    "contamination": {"test": {"documents": 2, "occurrences": 9, "dropped": 2}},
}


@pytest.fixture
def workdir(tmp_path) -> epath.Path:
    run = make_run(tmp_path)
    put(run / "eval/1000/pronouns.json", TASK)
    put(run / "eval/500/old.json", TASK | {"task": "old", "step": 500})
    put(tmp_path / "corpus/report.json", CORPUS)
    sources = {"mine": {"path": f"{tmp_path}/corpus/curated/*.jsonl.zst"}}
    fields = {"model": {"family": "decoder"}, "report": {"license": "apache-2.0"}, "data": {"sources": sources}}
    config = run_config.apply_overrides(fields, [])
    put(run / "config.json", run_config.to_json(config))
    return epath.Path(run)


def split_card(text: str) -> tuple[dict, str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_front_matter_is_valid_for_the_hub(workdir):
    hub = pytest.importorskip("huggingface_hub")
    card = model_card.make_card(workdir, transformers_class="LlamaForCausalLM")
    data = hub.ModelCard(card, ignore_metadata_errors=False).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en", "de"], "transformers")
    assert (data.pipeline_tag, data.tags) == ("text-generation", ["llmjax", "decoder", "causal"])
    by_metric = {(result.dataset_name, result.metric_type): result for result in data.eval_results or []}
    assert by_metric["pronouns", "acc"].metric_value == 0.75
    assert by_metric["pronouns", "acc"].metric_name == "acc (95% interval 0.6100 to 0.8800)"
    assert by_metric["mine", "loss"].metric_value in (2.3, 2.2345678)
    assert not {name for name, _ in by_metric} & {"old"}, "a score of another step"


def test_the_sections_have_the_numbers_of_the_files(workdir):
    header, body = split_card(model_card.make_card(workdir))
    assert header["library_name"] == "llmjax" and "base_model" not in header
    for shown in (
        "- Parameters: 3,412,736",
        "- Documents: 60 kept of 100",
        "- Licences: CC-BY-4.0 (60)",
        "- Languages: en (40), de (20)\n",
        "- Duplicates removed: 4 exact, 5 near",
        "| email | 3 | 7 |",
        "replaced by placeholders",
        "| acc | 0.7500 [0.6100 to 0.8800] |",
        "| nats_difference | undefined |",
        "from 0.6000 (she, 15 examples) to 0.8400 (he, 25), a gap of 0.2400 between 2 groups",
        "Tasks about bias: not recorded.",
        "Not recorded: run.json does not record the starts.",
        "llmjax import --from=FOLDER --workdir=runs/quickstart",
    ):
        assert shown in body, shown
    assert str(workdir.parent) not in body, "paths of the machine are left out"
    sections = [line for line in body.splitlines() if line.startswith("## ")]
    assert len(sections) == 10 and sections[0] == "## Model description" and sections[-1] == "## How to use"


def test_a_card_of_an_earlier_step_has_its_scores(workdir):
    (workdir / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"--step=7: no such checkpoint in .*; there are none"):
        model_card.make_card(workdir, step=7)


def test_a_card_of_an_earlier_step_has_what_was_trained_up_to_there(workdir):
    mix = {"after_step": 600, "seq_len": None, "weights": {"mine": 2.0}, "learning_rate": 1e-4}
    phases = {"mix": mix, "long": {"after_step": 400, "seq_len": 512, "weights": {}, "skip": []}}
    config = json.loads((workdir / "config.json").read_text())
    put(workdir / "config.json", config | {"phases": phases})
    _, body = split_card(model_card.make_card(workdir))
    assert (
        "- Phase long: after step 400: seq_len 512\n- Phase mix: after step 600: learning_rate 0.0001; weights" in body
    )
    assert "- Tokens in a row: 256, then 512" in body and "- Scored targets: 2,040,000" in body
    for step in (400, 500):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    _, body = split_card(model_card.make_card(workdir, step=400))
    assert "- Phase" not in body and "- Tokens in a row: 256\n" in body and "rows of 256 tokens" in body
    assert "- Scored targets: 816,000" in body
    assert (
        "- Phase long" in (body := split_card(model_card.make_card(workdir, step=500))[1]) and "Phase mix" not in body
    )


def test_an_imported_model_says_what_nobody_recorded(tmp_path):
    config = run_config.apply_overrides({"model": {"family": "decoder", "vocab_size": 260}}, [])
    put(tmp_path / "mine/config.json", run_config.to_json(config))
    put(tmp_path / "mine/import.json", {"from": "/home/jane/models/Small-1B", "initialized": ["head"]})
    header, body = split_card(model_card.make_card(epath.Path(tmp_path / "mine")))
    assert header["base_model"] == "Small-1B" and "model-index" not in header and "license" not in header
    assert "jane" not in body
    for shown in (
        "Not recorded: the data of the base model, Small-1B",
        "Not recorded: llmjax has not trained this model.",
        "`llmjax eval --workdir=mine --split=test` records it.",
        "`llmjax train --workdir=mine --config.report.license=NAME` records it",
        "llmjax embed --workdir=runs/mine",
    ):
        assert shown in body, shown
    assert "- Parameters: " in body, "counted by the config"


def test_a_file_that_a_person_wrote_is_not_replaced(workdir, tmp_path):
    path = tmp_path / "README.md"
    text = model_card.make_card(workdir)
    assert not model_card.is_edited(text)
    model_card.write(path, text)
    model_card.write(path, text)  # its own card is replaced
    path.write_text(text.replace("Not recorded: state here", "A toy. State here"))
    with pytest.raises(UserError, match=r"--out=.*README.md: this file was not written by `llmjax card`"):
        model_card.write(path, text)
    assert model_card.find_edited(workdir) is None
    (workdir / "README.md").write_text("# Mine\n")
    assert model_card.find_edited(workdir) == "# Mine\n"


def test_a_damaged_or_foreign_report_is_no_corpus(workdir, tmp_path):
    for content in ("{", json.dumps({"cost": None})):
        (tmp_path / "corpus/report.json").write_text(content)
        assert "### Curation" not in model_card.make_card(workdir)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run there"):
        model_card.make_card(epath.Path(tmp_path))
