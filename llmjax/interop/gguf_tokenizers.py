"""Tokenizers of GGUF files: from their metadata to the files of a Hugging Face folder, and back."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from llmjax.errors import UserError

# Types of tokens; those of SentencePiece models have the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_TOKENIZER = "tokenizer.ggml."
_ID_FIELDS = {"bos": "bos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id", "mask": "mask_token_id"}
# Generation stops at each of these: the end of a text, of a turn, and of a message.
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SPACE = "\u2581"

# How byte-level BPE splits a text before it merges: patterns as in the tokenizer.json of these models.
# None: the rule of GPT-2, which is ByteLevel's own.
_GPT2_RULE = None
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_RULE = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2_RULE = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_TAIL}"
# tokenizer.ggml.pre -> (pattern, whether digits are split one by one first, NFC, whole pieces are not merged)
_SPLITS: dict[str, tuple[str | None, bool, bool, bool]] = {
    "gpt-2": (_GPT2_RULE, False, False, False),
    "olmo": (_GPT2_RULE, False, False, False),
    "phi-2": (_GPT2_RULE, False, False, False),
    "smollm": (_GPT2_RULE, True, False, False),
    "starcoder": (_GPT2_RULE, True, False, False),
    "llama-bpe": (_LLAMA3_RULE, False, False, True),
    "dbrx": (_LLAMA3_RULE, False, False, False),
    "qwen2": (_QWEN2_RULE, False, True, False),
    "deepseek-r1-qwen": (_QWEN2_RULE, False, True, False),
}
_BERT_TOKENS = {"unknown_token_id": "[UNK]", "mask_token_id": "[MASK]"}
Frame = tuple[tuple[int, ...], tuple[int, ...]]
# Whether a tokenizer puts BOS before and EOS after a text, where the metadata do not say it.
_ADDS = {"gpt2": (False, False), "llama": (True, False), "t5": (False, True), "bert": (True, True)}


def write_files(metadata: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the tokenizer of the metadata into `folder`; returns the fields of config.json about special ids.

    Raises UserError for a kind of tokenizer or a split rule that is not supported, and for lists that do not fit.
    """
    kind = metadata.get(f"{_TOKENIZER}model")
    if kind not in _ADDS:
        raise UserError(f"{_TOKENIZER}model={kind!r} is not supported; supported are {', '.join(_ADDS)}")
    fields = {key.removeprefix(_TOKENIZER): value for key, value in metadata.items() if key.startswith(_TOKENIZER)}
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{_TOKENIZER}tokens is missing")
    types = fields.setdefault("token_type", [NORMAL] * len(tokens))
    for name in ("token_type", "scores"):
        if name in fields and len(fields[name]) != len(tokens):
            raise UserError(f"{_TOKENIZER}{name} has {len(fields[name])} entries for {len(tokens)} tokens")
    for name, value in fields.items():
        if name.endswith("_token_id") and not (type(value) is int and 0 <= value < len(tokens)):
            raise UserError(f"{_TOKENIZER}{name}={value!r}: there are {len(tokens)} tokens")
    adds_bos, adds_eos = (
        fields.get(f"add_{name}_token", default) for name, default in zip(("bos", "eos"), _ADDS[kind], strict=True)
    )
    if kind == "gpt2" and fields.get("pre") == "llama-bpe":
        adds_bos = fields.get("add_bos_token", True)
    config = {f"{role}_token": tokens[fields[key]] for role, key in _ID_FIELDS.items() if key in fields}
    if "eos_token_id" in fields:
        config["eos_token"] = tokens[fields["eos_token_id"]]
    if kind in ("llama", "t5"):
        content, name = _make_sentencepiece(kind, fields, tokens, types), "tokenizer.model"
        config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": adds_bos, "add_eos_token": adds_eos}
        config |= {"legacy": bool(fields.get("add_space_prefix", True)), "extra_ids": 0}
        if kind == "t5":
            config["tokenizer_class"] = "T5Tokenizer"
    else:
        make = _make_bert if kind == "bert" else _make_byte_level
        parts, name = make(fields, tokens, types, adds_bos, adds_eos), "tokenizer.json"
        content = json.dumps(parts).encode()
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    _write_templates(metadata, folder)
    if kind == "bert":  # it ends a text with [SEP]
        stops = [fields[key] for key in ("eos_token_id", "seperator_token_id") if key in fields][:1]
    else:
        stops = list(dict.fromkeys(fields[key] for key in _STOPS if key in fields))
    if not stops:
        raise UserError(f"{_TOKENIZER}eos_token_id is missing: no token is known to end a text")
    ids = {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    names = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
    return ids | {name: fields[key] for name, key in names.items() if key in fields}


def _write_templates(metadata: Mapping[str, Any], folder: Path) -> None:
    """Chat templates: the default one, and those with a name."""
    key = "tokenizer.chat_template"
    if key in metadata:
        (folder / "chat_template.jinja").write_text(metadata[key])
    for name, template in metadata.items():
        if name.startswith(f"{key}.") and (label := name.removeprefix(f"{key}.")).replace("_", "").isalnum():
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            (folder / "additional_chat_templates" / f"{label}.jinja").write_text(template)


def _make_sentencepiece(kind: str, fields: dict[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """A SentencePiece model: BPE for `llama`, Unigram for `t5`."""
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2  # its classes are created at import
    proto = message.ModelProto()
    proto.trainer_spec.model_type = {"llama": message.TrainerSpec.BPE, "t5": message.TrainerSpec.UNIGRAM}[kind]
    proto.trainer_spec.byte_fallback = BYTE in types
    scores = fields.get("scores")
    if scores is None:
        raise UserError(f"{_TOKENIZER}scores is missing")
    for token, score, token_type in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=token_type)
    names = {"unk": "unknown_token_id", "bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    for role, key in names.items():
        if key in fields:
            setattr(proto.trainer_spec, f"{role}_piece", tokens[fields[key]])
    if types.count(UNKNOWN) != 1:
        raise UserError(f"{_TOKENIZER}token_type has {types.count(UNKNOWN)} unknown tokens; expected one")
    spec = proto.normalizer_spec
    spec.add_dummy_prefix = bool(fields.get("add_space_prefix", True))
    spec.remove_extra_whitespaces = bool(fields.get("remove_extra_whitespaces", False))
    spec.precompiled_charsmap = bytes(byte & 255 for byte in fields.get("precompiled_charsmap", ()))
    return proto.SerializeToString()


def _list_added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Entries of tokenizer.json for the tokens that are recognized before a text is split."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": token_id, "content": token, **flags, "special": token_type != USER_DEFINED}
        for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _make_template(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> dict[str, Any] | None:
    """A post-processor that puts (token, id) around a text."""
    if not before and not after:
        return None
    special = lambda tokens: [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in tokens]
    text = lambda letter, number: {"Sequence": {"id": letter, "type_id": number}}
    return {
        "type": "TemplateProcessing",
        "single": [*special(before), text("A", 0), *special(after)],
        "pair": [*special(before), text("A", 0), *special(after), text("B", 1), *special(after)],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in before + after},
    }


def _make_byte_level(
    fields: dict[str, Any], tokens: list[str], types: list[int], adds_bos: bool, adds_eos: bool
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE."""
    pre = fields.get("pre")
    if pre not in _SPLITS:
        raise UserError(f"{_TOKENIZER}pre={pre!r} is not supported; supported are {', '.join(_SPLITS)}")
    if "merges" not in fields:
        raise UserError(f"{_TOKENIZER}merges is missing")
    pattern, digits, nfc, ignore_merges = _SPLITS[pre]
    around = [
        [(tokens[fields[key]], fields[key])] if adds and key in fields else []
        for adds, key in ((adds_bos, "bos_token_id"), (adds_eos, "eos_token_id"))
    ]
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if digits else []
    if pattern is not None:
        steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": pattern is None}
    steps.append(byte_level | {"add_prefix_space": bool(fields.get("add_space_prefix", False))})
    return {
        "version": "1.0",
        "added_tokens": _list_added_tokens(tokens, types),
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _make_template(*around),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": fields["merges"],
            "ignore_merges": ignore_merges,
        },
    }


def _make_bert(
    fields: dict[str, Any], tokens: list[str], types: list[int], adds_bos: bool, adds_eos: bool
) -> dict[str, Any]:
    """tokenizer.json of WordPiece. The metadata mark the start of a word, WordPiece its continuation."""

    def name(token: str, token_type: int) -> str:
        if token_type in (CONTROL, UNKNOWN) or (token.startswith("[") and token.endswith("]")):
            return token
        return token.removeprefix(_SPACE) if token.startswith(_SPACE) else f"##{token}"

    names = [name(*pair) for pair in zip(tokens, types, strict=True)]
    find = lambda *keys: next(([(names[fields[key]], fields[key])] for key in keys if key in fields), [])
    begin, end = find("cls_token_id", "bos_token_id"), find("seperator_token_id", "eos_token_id")
    special = dict(begin + end + find("unknown_token_id") + find("padding_token_id") + find("mask_token_id"))
    types = [CONTROL if token in special else token_type for token, token_type in zip(names, types, strict=True)]
    # llama.cpp always lowercases; a vocabulary with capital letters needs the text as it is.
    is_cased = any(
        token != token.lower() for token, kind in zip(names, types, strict=True) if kind == NORMAL and "[" not in token
    )
    return {
        "version": "1.0",
        "added_tokens": _list_added_tokens(names, types),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": not is_cased,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _make_template(begin if adds_bos else [], end if adds_eos else []),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": next(iter(find("unknown_token_id")), ("[UNK]", 0))[0],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: token_id for token_id, token in enumerate(names)},
        },
    }


def read_files(folder: Path, token_ids: Mapping[str, Any], frame: Frame, vocab_size: int) -> dict[str, Any]:
    """The metadata of the tokenizer in a Hugging Face folder.

    token_ids    bos_token_id, eos_token_id (one or several) and pad_token_id, as in config.json
    frame        (ids before, ids after) that it puts around a text
    vocab_size   ids of the model; those that the tokenizer lacks get a name that no text contains
    Raises UserError for a tokenizer that llama.cpp does not have.
    """
    models = [folder / name for name in ("tokenizer.model", "spiece.model") if (folder / name).exists()]
    if models:
        fields = _read_sentencepiece(models[0].read_bytes())
    elif (folder / "tokenizer.json").exists():
        fields = _read_json(json.loads((folder / "tokenizer.json").read_bytes()))
    else:
        raise UserError("--format=gguf: llama.cpp has no tokenizer of bytes; train with another data.tokenizer.kind")
    for name, default in (("tokens", None), ("token_type", UNUSED), ("scores", -1e4)):
        if name in fields:
            missing = range(len(fields[name]), vocab_size)
            fields[name] += [f"[PAD{i}]" if default is None else default for i in missing]
    stops = token_ids.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    ids = dict(zip(_STOPS, stops, strict=False))
    before, after = frame
    if len(before) > 1 or len(after) > 1:
        raise UserError(f"--format=gguf: llama.cpp puts one token at most around a text, not {before} and {after}")
    ids |= {"bos_token_id": before[0] if before else token_ids.get("bos_token_id")}
    ids |= {"padding_token_id": token_ids.get("pad_token_id")} | fields.pop("ids", {})
    if fields["model"] == "bert":
        ids |= {"cls_token_id": ids["bos_token_id"], "seperator_token_id": ids["eos_token_id"]}
    for token_id in ids.values():
        if token_id is not None and fields["token_type"][token_id] == NORMAL:
            fields["token_type"][token_id] = CONTROL
    fields |= {name: token_id for name, token_id in ids.items() if token_id is not None}
    fields |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    templates = {"tokenizer.chat_template": template} if (template := _find_template(folder)) else {}
    return {f"{_TOKENIZER}{name}": value for name, value in fields.items()} | templates


def _find_template(folder: Path) -> str | None:
    if (path := folder / "chat_template.jinja").exists():
        return path.read_text()
    path = folder / "tokenizer_config.json"
    template = json.loads(path.read_bytes()).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read_sentencepiece(content: bytes) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2
    proto = message.ModelProto.FromString(content)
    spec, is_bpe = proto.normalizer_spec, proto.trainer_spec.model_type == message.TrainerSpec.BPE
    types = [piece.type for piece in proto.pieces]
    fields = {
        "model": "llama" if is_bpe else "t5",
        "pre": "default",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [float(piece.score) for piece in proto.pieces],
        "token_type": types,
        "add_space_prefix": spec.add_dummy_prefix,
        "remove_extra_whitespaces": spec.remove_extra_whitespaces,
        "ids": {"unknown_token_id": types.index(UNKNOWN)} if UNKNOWN in types else {},
    }
    return fields | ({"precompiled_charsmap": spec.precompiled_charsmap} if spec.precompiled_charsmap else {})


def _read_json(parts: dict[str, Any]) -> dict[str, Any]:
    """Those of a tokenizer.json: WordPiece of lowercased text, or byte-level BPE with a known split rule."""
    model, added = parts["model"], {token["id"]: token for token in parts.get("added_tokens") or []}
    kind, vocab = model.get("type"), model.get("vocab")
    if kind not in ("BPE", "WordPiece") or (kind == "BPE" and "ByteLevel" not in json.dumps(parts["pre_tokenizer"])):
        raise UserError(
            f"--format=gguf: tokenizer.json of type {kind} is not supported, only WordPiece and byte-level BPE; "
            "a SentencePiece model is (tokenizer.model)"
        )
    names = {token_id: token for token, token_id in vocab.items()} | {i: token["content"] for i, token in added.items()}
    size = 1 + max(names)
    types = [NORMAL if i in names else UNUSED for i in range(size)]
    for token_id, token in added.items():
        types[token_id] = CONTROL if token["special"] else USER_DEFINED
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    if kind == "WordPiece":
        if not (parts.get("normalizer") or {}).get("lowercase"):
            raise UserError(
                "--format=gguf: llama.cpp lowercases what it encodes with WordPiece; this tokenizer does not"
            )
        marked = [
            token if types[i] == CONTROL else token[2:] if token.startswith("##") else f"{_SPACE}{token}"
            for i, token in enumerate(tokens)
        ]
        ids = {key: vocab[token] for key, token in _BERT_TOKENS.items() if token in vocab}
        return {"model": "bert", "pre": "default", "tokens": marked, "token_type": types, "ids": ids}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    fields = {"model": "gpt2", "pre": _find_split(parts), "tokens": tokens, "token_type": types, "merges": merges}
    return fields | {"add_space_prefix": '"add_prefix_space": true' in json.dumps(parts["pre_tokenizer"])}


def _find_split(parts: dict[str, Any]) -> str:
    """tokenizer.ggml.pre of the rule by which a tokenizer.json splits a text."""

    def simplify(parts: dict[str, Any]) -> Any:
        pre = parts["pre_tokenizer"]
        steps = [dict(step) for step in (pre["pretokenizers"] if pre["type"] == "Sequence" else [pre])]
        for step in steps:
            for name in ("trim_offsets", "add_prefix_space"):  # offsets alone; a field of its own
                step.pop(name, None)
        normalizer = (parts.get("normalizer") or {}).get("type")
        return steps, normalizer, bool(parts["model"].get("ignore_merges"))

    for pre in _SPLITS:
        if simplify(_make_byte_level({"pre": pre, "merges": []}, [], [], False, False)) == simplify(parts):
            return pre
    raise UserError(
        "--format=gguf: tokenizer.json splits texts by a rule that is none of those known for llama.cpp "
        f"({', '.join(_SPLITS)})"
    )
