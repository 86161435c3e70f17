"""Local YAML tasks of lm-eval: scores against forward passes by hand, prompts, files, the cache, and bad files."""

import dataclasses
import json
import math
import pathlib

from etils import epath
import jax
import numpy as np
import pytest
import yaml

from llmjax.cli.evaluate import evaluate as eval_command
from llmjax.data.store.tokenizer_kinds import Bytes
from llmjax.errors import UserError
from llmjax.evals import lm_eval_tasks
from llmjax.evals.requests import LanguageModel
from llmjax.evals.results import Options
from llmjax.inference.sampling import Sampling
from llmjax.models import registry
from llmjax.parallel import axes
from llmjax.run import config as run_config
from tests import jobs
from tests.evals.test_requests import log_probabilities, make_loaded
from tests.serve import runs
from tests.train.trainer import one_device

DOCUMENTS = [{"question": f"Q{n}", "choices": ["x", "yy", "zéz"][: 2 + n % 2], "answer": n % 2} for n in range(10)]
MULTIPLE_CHOICE = {
    "task": "letters",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "fewshot_split": "test",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
GENERATE = {
    "task": "say",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{question}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "none", "filter": [{"function": "take_first"}]},
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": "^(.)"}, {"function": "take_first"}]},
    ],
}
ROLLING = {
    "task": "text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question * 20}}",
    "metric_list": [
        {"metric": name, "aggregation": aggregation, "higher_is_better": False}
        for name, aggregation in (
            ("word_perplexity", "weighted_perplexity"),
            ("byte_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )
    ],
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No hub, and a cache of documents of its own."""
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    return pathlib.Path(runs.write_run(tmp_path_factory.mktemp("lm_eval") / "run"))


def write_task(folder: pathlib.Path, fields: dict, **changes) -> pathlib.Path:
    """A task file, and its documents beside it."""
    documents, path = folder / "documents.jsonl", folder / f"{fields['task']}.yaml"
    if not documents.exists():
        documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(documents)}}, "test_split": "test"}
    path.write_text(yaml.safe_dump(data | fields | changes))
    return path


def read(workdir: pathlib.Path, task: str) -> tuple[dict, list[dict]]:
    path = workdir / "eval" / "0" / f"{task}.json"
    return json.loads(path.read_text()), [json.loads(line) for line in path.with_suffix(".jsonl").open()]


def score_text(loaded, ids: list[int], scored: int) -> float:
    """The log-likelihood of the last `scored` ids, by one forward pass."""
    scores = log_probabilities(loaded, ids[:-1] + [0] * (65 - len(ids)))
    return sum(scores[i - 1, ids[i]] for i in range(len(ids) - scored, len(ids)))


class Bytes256(Bytes):
    """Bytes alone: byte 0 also starts and ends documents, as no text contains it."""

    vocab_size, bos_id, eos_id = 256, 0, 0


def test_a_uniform_byte_model_needs_exactly_8_bits_per_byte(tmp_path):
    model = dataclasses.replace(runs.make_config().model, vocab_size=256)
    config = dataclasses.replace(runs.make_config(), model=model)
    zeros = jax.tree.map(np.zeros_like, jax.jit(lambda key: registry.init(model, key))(jax.random.key(0)))
    loaded = dataclasses.replace(
        make_loaded(),
        config=config,
        graph=registry.abstract(model)[0],
        params=zeros,
        tokenizer=Bytes256(),
        objective=run_config.objective(config, Bytes256()),
    )
    file = lm_eval_tasks.load_task(
        write_task(tmp_path, ROLLING, doc_to_target="{{choices | join(question * 40)}}"), None
    )
    with axes.use_mesh(one_device(), config.parallel.rules):
        record = lm_eval_tasks.evaluate(
            epath.Path(tmp_path), loaded, file, Options(), make_model=lambda: LanguageModel(loaded, 8), template=None
        )
    assert record["metrics"]["bits_per_byte"] == pytest.approx({"value": 8.0, "low": 8.0, "high": 8.0}, abs=1e-6)
    assert record["metrics"]["byte_perplexity"]["value"] == pytest.approx(256, rel=1e-6)


def test_multiple_choice_equals_a_loop_over_choices(workdir, tmp_path):
    path = write_task(tmp_path, MULTIPLE_CHOICE)
    assert eval_command([f"--workdir={workdir}", f"--tasks={path}", "--batch=8"]) == 0
    record, lines = read(workdir, "letters")
    loaded, correct, correct_norm = make_loaded(), [], []
    for line, document in zip(lines, DOCUMENTS, strict=True):
        context = [256, *document["question"].encode()]
        scores = [
            score_text(loaded, [*context, *f" {choice}".encode()], len(choice.encode()) + 1)
            for choice in document["choices"]
        ]
        assert line["loglikelihoods"] == pytest.approx(scores, abs=2e-4) and line["document"] == document
        best = [np.argmax(scores), np.argmax(np.divide(scores, [len(choice) for choice in document["choices"]]))]
        correct.append(best[0] == document["answer"])
        correct_norm.append(best[1] == document["answer"])
        assert line["prediction"] == best[0] and line["target"] == document["answer"]
        assert line["metrics"] == {"acc": correct[-1], "acc_norm": correct_norm[-1]}
    assert record["metrics"]["acc"]["value"] == pytest.approx(np.mean(correct))
    assert record["metrics"]["acc_norm"]["value"] == pytest.approx(np.mean(correct_norm))
    assert record["metrics"]["acc"]["low"] < np.mean(correct) < record["metrics"]["acc"]["high"]
    assert (record["task"], record["step"], record["n"]) == ("letters", 0, 10)


def test_an_unchanged_task_is_not_computed_again(workdir, tmp_path, caplog):
    path = write_task(tmp_path, {**MULTIPLE_CHOICE, "task": "again"})
    written = workdir / "eval" / "0" / "again.json"

    def run(*flags: str) -> tuple[bool, dict]:
        caplog.clear()
        with caplog.at_level("INFO", "llmjax"):
            assert eval_command([f"--workdir={workdir}", f"--tasks={path}", *flags]) == 0
        assert "again: " in caplog.text and "next: llmjax generate" in caplog.text
        return "again: cached" not in caplog.text, json.loads(written.read_text())

    computed, first = run()
    assert computed and run() == (False, first)
    computed, limited = run("--limit=4")
    assert computed and limited["n"] == 4 and limited["key"] != first["key"]
    assert run("--shots=2")[0] and run("--config.data.seq_len=48", "--shots=2")[0]
    path.with_name("documents.jsonl").write_text(json.dumps(DOCUMENTS[1]) + "\n")
    computed, other = run()
    assert computed and other["n"] == 1


def test_generated_text_passes_the_filters(workdir, tmp_path):
    path = write_task(tmp_path, GENERATE)
    assert eval_command([f"--workdir={workdir}", f"--tasks={path}", "--batch=8"]) == 0
    record, lines = read(workdir, "say")
    prompts = [[256, *document["question"].encode()] for document in DOCUMENTS]
    expected = runs.generate_texts(prompts, Sampling(max_tokens=6, temperature=0))
    assert [line["prediction"] for line in lines] == expected and {line["prompt"] for line in lines} == {
        document["question"] for document in DOCUMENTS
    }
    assert record["metrics"].keys() == {"exact_match", "exact_match,first"}
    assert record["metrics"]["exact_match"]["value"] == np.mean([line["metrics"]["exact_match"] for line in lines])


def test_rolling_counts_nats_over_bytes_and_words(workdir, tmp_path):
    path = write_task(tmp_path, ROLLING)
    assert eval_command([f"--workdir={workdir}", f"--tasks={path}", "--limit=3"]) == 0
    record, _ = read(workdir, "text")
    nats = [-score_text(make_loaded(), [256, *(d["question"] * 20).encode()], 40) for d in DOCUMENTS[:3]]
    metrics = {name: number["value"] for name, number in record["metrics"].items()}
    assert metrics["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / 120, rel=1e-5)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(sum(nats) / 3), rel=1e-3)
    ends = [record["metrics"]["bits_per_byte"][end] for end in ("low", "high")]
    assert ends == pytest.approx([min(nats) / math.log(2) / 40, max(nats) / math.log(2) / 40], rel=1e-5)


def test_chat_templates_write_shots_as_turns(workdir, tmp_path):
    path = write_task(tmp_path, GENERATE, task="talk", gen_prefix="Well", num_fewshot=3, fewshot_split="test")
    path = path.rename(tmp_path / "talk.yaml")
    flags = [f"--workdir={workdir}", f"--tasks={path}", "--config.data.seq_len=200"]
    assert eval_command([*flags, "--chat", "--shots=1", "--limit=2"]) == 0
    record, lines = read(workdir, "talk")
    for line in lines:
        before, _, last = line["prompt"].rpartition("<user>")
        assert last == f"{line['document']['question']}\n<assistant>Well"
        assert before.count("<user>") == before.count("<assistant>Well") == 1
    assert record["settings"] == {"file": "talk.yaml", "limit": 2, "shots": 1, "chat": True}
    assert eval_command([*flags, "--limit=1"]) == 0
    _, [line] = read(workdir, "talk")
    assert line["prompt"].count("\n\n") == 3 and "<user>" not in line["prompt"]


BAD = {
    "not found": (None, r"--tasks=.*letters\.yaml: no such file; give a YAML file of lm-eval"),
    "no task": ("output_type: multiple_choice", r"has no name in the field `task`; add one, such as `task: my_task`"),
    "a group": ("group: all\ntask: [a, b]", r"a group of tasks; give the files of its tasks"),
    "not YAML": ("task: [", r"not a YAML file with the fields of a task \(while parsing"),
    "no fields": ("- a", r"not a YAML file with the fields of a task \(.* got list"),
    "a metric": (
        "task: a\nmetric_list: [{metric: acuracy}]",
        r"metric_list: unknown metric 'acuracy' \(did you mean 'acc'\?\)",
    ),
    "no metric": (
        "task: a\nmetric_list: [acc]",
        r"metric_list: 'acc' has no metric; give entries such as `- metric: acc`",
    ),
    "a field": ("task: a\ndoc_to_txt: b", r"unknown field 'doc_to_txt' \(did you mean 'doc_to_text'\?\)"),
    "a value": (
        "task: a\noutput_type: multiple_choise",
        r"output_type='multiple_choise' \(did you mean 'multiple_choice'",
    ),
    "images": ("task: a\ndoc_to_image: b", r"doc_to_image needs a model of images"),
    "programs": ("task: a\nunsafe_code: true", r"unsafe_code runs programs that the model writes"),
    "no documents": (
        "task: a\ndataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: /nowhere/x.jsonl}}",
        r"lm-eval cannot load it: FileNotFoundError: .*/nowhere/x\.jsonl",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_task_files_end_in_one_line(text, message, tmp_path):
    path = tmp_path / "letters.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        lm_eval_tasks.load_task(path, None)
    assert "\n" not in str(error.value)


def test_bad_values_of_a_task_end_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"task: 'test' cannot name files of results; .* which hold the scores of spl"):
        lm_eval_tasks.load_task(write_task(tmp_path, MULTIPLE_CHOICE, task="test"), None)
    broken = write_task(tmp_path, MULTIPLE_CHOICE, doc_to_text="{{question")
    with pytest.raises(UserError, match=r"letters\.yaml: lm-eval cannot load it: TemplateSyntaxError: unexpected end"):
        lm_eval_tasks.load_task(broken, None)


def test_options_and_models_that_do_not_fit_are_refused(workdir, tmp_path):
    path = write_task(tmp_path, GENERATE, generation_kwargs={"until": [], "do_sample": True, "top_k": 5})
    with pytest.raises(UserError, match=r"generation_kwargs: top_k is not supported; only until, max_gen_toks"):
        eval_command([f"--workdir={workdir}", f"--tasks={path}"])
    encoder = runs.write_run(tmp_path / "encoder", "encoder")
    with pytest.raises(UserError, match=r"model\.family='encoder' does not generate text"):
        eval_command([f"--workdir={encoder}", f"--tasks={path}"])
    with pytest.raises(UserError, match="--split scores documents, and --tasks tasks: set only one of them"):
        eval_command([f"--workdir={workdir}", f"--tasks={path}", "--split=test"])
    with pytest.raises(UserError, match="--shots is an option of tasks: give --tasks as well"):
        eval_command([f"--workdir={workdir}", "--shots=2"])
    with pytest.raises(UserError, match=r"--tasks=a\.yaml,a\.yaml: a\.yaml is given twice"):
        eval_command([f"--workdir={workdir}", "--tasks=a.yaml,a.yaml"])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_answer_as_one(tmp_path):
    workdir = runs.write_run(tmp_path / "run")
    tasks = [write_task(tmp_path, MULTIPLE_CHOICE), write_task(tmp_path, GENERATE)]
    command = [str(jobs.LLMJAX), "eval", f"--workdir={workdir}", f"--tasks={tasks[0]},{tasks[1]}", "--batch=4"]
    documents = str(tmp_path / "cache")
    jobs.run(jobs.launch([*command, "--config.mesh.fsdp=4"], 2, 2), HF_DATASETS_CACHE=documents)
    many = [read(tmp_path / "run", name) for name in ("letters", "say")]
    jobs.run([*command, "--config.mesh.data=1"], HF_DATASETS_CACHE=documents)  # another mesh needs no new result
    assert [read(tmp_path / "run", name) for name in ("letters", "say")] == many
    for path in (tmp_path / "run" / "eval" / "0").glob("*.json"):
        path.unlink()
    jobs.run([*command, "--config.mesh.data=1"], HF_DATASETS_CACHE=documents)
    for name, (record, lines) in zip(("letters", "say"), many, strict=True):
        alone, lines_alone = read(tmp_path / "run", name)
        assert alone["metrics"] == record["metrics"] and alone["key"] == record["key"]
        for line, other in zip(lines, lines_alone, strict=True):
            assert line["prediction"] == other["prediction"]
            assert line.get("loglikelihoods", []) == pytest.approx(other.get("loglikelihoods", []), abs=1e-4)
