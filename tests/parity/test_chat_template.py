"""Rendered dialogues and their ids are those of transformers' apply_chat_template."""

import pytest

transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from llmjax.data.chat_template import ChatTemplate
from tests.data.test_chat_template import DIALOGUE, TEMPLATES, TOKENS, read, tokenizer_json


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("space_marks", [False, True])
def test_prompt_ids_equal_those_of_transformers(name, space_marks):
    model = tokenizer_json(space_marks)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **TOKENS, unk_token="<unk>")
    hf.chat_template = TEMPLATES[name]
    template = ChatTemplate(TEMPLATES[name], TOKENS, name)
    for messages in (DIALOGUE, DIALOGUE[:1]):
        assert template.render(messages) == hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert template.encode(messages, read(model)).tolist() == expected
