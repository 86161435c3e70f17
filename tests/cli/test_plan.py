"""`llmjax plan` from the command line."""

import json

import pytest

from llmjax.cli import main
from llmjax.errors import UserError

CPU = ["plan", "--config=t5:tiny", "--topology=cpu:2", "--quick"]
SMALL = [f"--config.{field}" for field in ("model.vocab_size=512", "model.num_layers=1", "data.seq_len=64")]


def test_json_is_the_last_line_and_the_program_is_kept(capsys, tmp_path):
    flags = [f"--dump={tmp_path / 'kept'}", f"--workdir={tmp_path / 'run'}", "--tokens=1e9", "--price=2"]
    assert main.run([*CPU, *SMALL, "--json", *flags]) == 0
    printed = capsys.readouterr()
    output = json.loads(printed.out)
    expected = (
        "fits hbm_bytes model_flops executed_flops attention_calls ici_bytes dcn_bytes host_bytes step_seconds mfu"
    )
    assert set(expected.split()) <= set(output)
    assert output["executed_flops"] > 0 and output["ici_bytes"] > 0 and output["devices"] == 2
    assert output["fits"] is None and output["step_seconds"] is None  # no cost model of a CPU, and it says so
    assert "unknown" in printed.err
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == output
    assert (tmp_path / "kept" / "optimized.txt").read_text().startswith("HloModule jit_train_step")


def test_auto_prints_the_policy_that_it_takes(capsys):
    """The host holds the step without remat, which computes nothing again, so no other policy is compiled."""
    assert main.run([*CPU, *SMALL, "--json", "--config.model.remat=auto"]) == 0
    printed = capsys.readouterr()
    output = json.loads(printed.out)
    assert output["remat"]["policy"] == "none" and set(output["remat"]["tried"]) == {"none"}
    assert output["remat"]["tried"]["none"]["hbm_bytes"] == output["hbm_bytes"]
    assert "model.remat=auto: none, computes least again" in printed.err
    assert "model.remat=none;" in printed.err


def test_each_phase_with_a_step_of_its_own_is_planned(capsys):
    """The last phase changes the learning rate alone."""
    phases = {
        "train.steps": 100,
        "train.global_batch": 8,
        "phases.long.after_step": 60,
        "phases.long.seq_len": 128,
        "phases.long.global_batch": 2,
        "phases.end.after_step": 90,
        "phases.end.schedule": "linear",
    }
    flags = [f"--config.{field}={value}" for field, value in phases.items()]
    assert main.run([*CPU, *SMALL, "--json", *flags]) == 0
    printed = capsys.readouterr()
    output = json.loads(printed.out)
    steps = {name: (plan["first_step"], plan["last_step"]) for name, plan in output["phases"].items()}
    assert steps == {"first": (1, 60), "long": (61, 90), "end": (91, 100)}
    first, long, end = output["phases"].values()
    assert first["step_tokens"] > long["step_tokens"] and first["executed_flops"] > long["executed_flops"]
    assert {**end, "first_step": 61, "last_step": 90} == long
    assert "2 rows of 128 tokens a step" in printed.err and "its steps are those of an earlier phase" in printed.err
    assert output["run"] is None  # no cost model of a CPU
    with pytest.raises(UserError, match=r"--tokens=1000000000.0: not with a config of phases"):
        main.run([*CPU, *SMALL, *flags, "--tokens=1e9"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v6x:4x4"], "did you mean 'v6e'"),
        (["--topology=cpu:2", "--slices=2"], "cpu has no slices"),
        (["--topology=cpu", "--price=2"], "--price=2: give --tokens"),
        (["--topology=cpu", "--tokens=0"], "--tokens=0: must be above 0"),
        (["--topology=cpu"], "model.vocab_size=0: .* 128256: set --config.model.vocab_size=128256"),
        (["--topology=cpu", "--config.xla.flags=(1,)"], "xla.flags: 1 is not a pair"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(arguments, message):
    with pytest.raises(UserError, match=message):
        main.run(["plan", "--config=llama:8B", *arguments])


def test_the_size_of_a_vocabulary_of_bytes_is_named():
    with pytest.raises(UserError, match=r"the tokenizer bytes has 259: set --config.model.vocab_size=259"):
        main.run(["plan", "--config=quickstart", "--topology=cpu", "--config.data.tokenizer.kind=bytes"])


def test_a_mesh_that_does_not_fill_the_machine_is_refused():
    with pytest.raises(UserError, match="3 does not divide the 2 devices"):
        main.run([*CPU, *SMALL, "--config.mesh.fsdp=3"])
