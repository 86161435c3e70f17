"""Special ids, and the section of the config that requests them."""

import dataclasses

import pytest

from llmjax.data.config import OBJECTIVES, SEVERAL_TEXTS, DataConfig, ObjectiveConfig
from llmjax.data.objectives.objective import open_objective
from llmjax.data.store.tokenizer import Bytes
from llmjax.errors import UserError
from llmjax.run.config import RunConfig, with_vocabulary
from tests.data.objectives.masks import SEQ_LEN, make


class TestVocabulary:
    """Special ids."""

    def test_model_vocabulary_covers_added_tokens(self):
        for case, added in {"causal": 0, "prefix": 0, "masked": 1, "fim": 3, "span": 5, "ul2": 21}.items():
            objective = make(case)
            assert objective.min_vocab_size == 259 + added, case
            config = with_vocabulary(RunConfig(), objective.min_vocab_size)
            assert config.model.vocab_size == objective.min_vocab_size
        small = dataclasses.replace(RunConfig(), model=dataclasses.replace(RunConfig().model, vocab_size=259))
        with pytest.raises(UserError, match=r"model\.vocab_size=259 is smaller than the 260 ids"):
            with_vocabulary(small, make("masked").min_vocab_size)

    def test_ids_of_the_tokenizer_are_used(self):
        names = {
            "<s>": 256,
            "</s>": 257,
            "<mask>": 7,
            "<fim_prefix>": 3,
            "<fim_middle>": 4,
            "<fim_suffix>": 5,
        }
        names |= {f"<extra_id_{n}>": 99 - n for n in range(4)} | {"[NLU]": 40, "[S2S]": 41, "[NLG]": 42}

        class Special(Bytes):
            def __init__(self):
                self.special_tokens = names

        open_it = lambda **fields: (
            open_objective(ObjectiveConfig(**fields), Special(), seq_len=SEQ_LEN, start_id=-1).vocabulary
        )
        assert open_it(name="masked").ids == (7,) and open_it(name="masked").size == 259
        assert open_it(name="fim").ids == (3, 4, 5)
        ul2 = open_it(name="ul2")
        assert ul2.ids[:6] == (99, 98, 97, 96, 259, 260) and ul2.ids[-3:] == (40, 41, 42)
        assert ul2.size == 259 + len(ul2.ids) - 3 - 4 and ul2.names[259] == "<extra_id_4>"


class TestConfig:
    """Fields that an objective has no use for, families that it does not suit, values out of range."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"name": "mlm"}, r"objective\.name='mlm': expected one of causal, prefix, masked, span, ul2, fim"),
            ({"name": "mask"}, r"objective\.name='mask' \(did you mean 'masked'\?\)"),
            ({"rate": 0.1}, r"objective\.rate=0\.1: objective\.name='causal' does not use it, only masked, span"),
            ({"name": "ul2", "mean_span": 3.0}, r"objective\.mean_span=3\.0: .*'ul2' does not use it, only span"),
            ({"name": "fim", "whole_words": True}, r"objective\.whole_words=True: .* only masked"),
            ({"name": "masked", "rate": 1.0}, r"objective\.rate=1\.0: must be above 0 and below 1"),
            ({"name": "span", "mean_span": 0.5}, r"objective\.mean_span=0\.5: must be at least 1"),
            ({"name": "fim", "fim_rate": 1.5}, r"objective\.fim_rate=1\.5: must be above 0 and at most 1"),
            ({"name": "span", "target_len": -1}, r"objective\.target_len=-1"),
        ],
    )
    def test_refused(self, fields, message):
        with pytest.raises(UserError, match=message):
            ObjectiveConfig(**fields)

    def test_families(self):
        with pytest.raises(UserError, match=r"objective\.name='masked': .* supports objectives causal, prefix"):
            RunConfig(objective=ObjectiveConfig(name="masked"))
        with pytest.raises(UserError, match=r"objective\.target_len=9: .* is not an encoder-decoder"):
            RunConfig(objective=ObjectiveConfig(name="prefix", target_len=9))
        for name in OBJECTIVES:
            if name in RunConfig().model.objectives:
                classes = ("a", "b") if name == "classify" else ()
                data = DataConfig(classes=classes, packing="none" if name in SEVERAL_TEXTS else "best_fit")
                RunConfig(objective=ObjectiveConfig(name=name), data=data)

    def test_rows_too_short(self):
        with pytest.raises(UserError, match=r"data\.seq_len=4: objective\.name='fim' adds 4 tokens"):
            make("fim", 4)
