"""Adapters that we write give PEFT's model the same logits, and adapters that PEFT writes give ours the same."""

import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
peft = pytest.importorskip("peft", reason="parity needs `make parity`")

from etils import epath
import numpy as np

from llmjax.interop import exporting, importing
from llmjax.run import loading
from tests.interop import published
from tests.parity import test_interop as parity


def build(kind: str, dora: bool):
    """A model of transformers, and the config of adapters on it."""
    name, settings = parity.CAUSAL[kind]
    base = parity.build(name, parity.transformers.AutoModelForCausalLM, settings)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, use_dora=dora, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM"
    )
    return base, config


def our_logits(workdir, ids: np.ndarray) -> np.ndarray:
    with loading.load(epath.Path(workdir)) as loaded:
        return np.asarray(parity.logits(loaded, parity.rows(ids)))


@pytest.mark.parametrize(("kind", "dora"), [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True)])
def test_logits_agree_in_both_directions(tmp_path, kind, dora):
    base, config = build(kind, dora)
    source = parity.save(base, tmp_path / "base")
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.eval().save_pretrained(tmp_path / "adapter")
    ids = np.random.default_rng(0).integers(3, published.VOCAB, (2, 12)).astype(np.int32)
    expected = model(torch.tensor(ids, dtype=torch.long)).logits.detach().numpy()
    importing.import_checkpoint(source, epath.Path(tmp_path / "run"), adapter=tmp_path / "adapter")
    ours = our_logits(tmp_path / "run", ids)[..., : published.VOCAB]
    # float32 in both, a few layers deep: as in test_interop.
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())

    exporting.export_adapter(epath.Path(tmp_path / "run"), tmp_path / "out")
    fresh = parity.transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    logits = again(torch.tensor(ids, dtype=torch.long)).logits.detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
