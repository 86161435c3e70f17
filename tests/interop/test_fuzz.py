"""Damaged config.json, index and headers: one line of error, or the same weights as before; never anything else."""

import contextlib
import json
import random

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from llmjax.binding import bind
from llmjax.errors import UserError
from llmjax.interop import files, hf_checkpoint, mapping
from llmjax.interop.hf_checkpoint import ARCHITECTURES
from llmjax.models import registry
from tests.interop import published, state_dicts

VALUES = [
    *(
        "0",
        "-1",
        "1",
        "2",
        "31",
        "1000000000",
        "1e30",
        "-1e-3",
        "NaN",
        "Infinity",
        "9" * 400,
        "9" * 5000,
        "true",
        "null",
    ),
    *(
        '""',
        '"x"',
        "[]",
        "{}",
        "[1,2]",
        '{"a":{"b":[]}}',
        "[" * 2000 + "]" * 2000,
        "[" * 100_000,
        '"\\ud800"',
        '"a\\nb"',
    ),
]
CONFIG = bind(registry.config_class("decoder"), ARCHITECTURES["LlamaForCausalLM"].read_config(published.LLAMA), "model")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = published.random_tensors(published.llama_shapes())
    return published.write_folder(tmp_path_factory.mktemp("fuzz") / "in", published.LLAMA, tensors, limit=60_000)


@pytest.fixture(scope="module")
def tensors(source):
    return published.read_tensors(source)


def damage(rng: random.Random, content: bytes) -> bytes:
    """One change: bytes replaced, removed, repeated or cut off, or a JSON value replaced by another."""
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice([1, 1, 2, 5, 40]))
    kind = rng.randrange(6)
    if kind == 0:
        return content[:start] + bytes(rng.randrange(256) for _ in range(stop - start)) + content[stop:]
    if kind == 1:
        return content[:start] + content[stop:]
    if kind == 2:
        return content[:stop] + content[start:]
    if kind == 3:
        return content[:start]
    return replace_value(rng, content)


def replace_value(rng: random.Random, content: bytes) -> bytes:
    """Replace a random value, at any depth, by another one."""
    tree = json.loads(content)
    marker = "the value that is replaced"
    node: dict | list = tree
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        inner = node[key]  # type: ignore[index]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            node = inner
            continue
        node[key] = marker  # type: ignore[index]
        new = (
            json.dumps(inner + rng.choice([-1, 1, 4, -4, 1 << 40])) if type(inner) is int and rng.random() < 0.5 else ""
        )
        return json.dumps(tree).replace(json.dumps(marker), new or rng.choice(VALUES)).encode()


def refused(action) -> bool:
    """Whether `action` raises UserError; it must be one line."""
    try:
        action()
    except UserError as error:
        assert str(error).isprintable(), error
        assert len(str(error)) < 1000, error
        return True
    return False


def compare_with_reference(path) -> None:
    """It refuses NaN and halves of a surrogate pair in keys that nobody reads, which Python's JSON accepts."""
    entries = files.read_header(path)
    with contextlib.suppress(SafetensorError), safe_open(path, "np") as reference:
        assert set(entries) == set(reference.keys())
        for name, entry in entries.items():
            assert published.same_bits(entry.read(), reference.get_tensor(name))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers(source, tensors, seed):
    """What is accepted is read as the library of this format reads it, and is what was written."""
    table = mapping.ParamMapping(ARCHITECTURES["LlamaForCausalLM"].rules(CONFIG), CONFIG)
    path = sorted(source.glob("model-*.safetensors"))[0]
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, data = original[8 : 8 + length].rstrip(), original[8 + length :]
    rng, accepted = random.Random(seed), 0
    try:
        for number in range(100):
            new = damage(rng, header)
            size = (
                len(new) if number % 4 else rng.choice([length, 0, len(new) + 1, 1 << 63, len(original), 100_000_001])
            )
            path.write_bytes(size.to_bytes(8, "little") + new + data)
            if refused(lambda: files.read_header(path)):
                continue
            compare_with_reference(path)
            if not refused(lambda: table.check_tensors(hf_checkpoint.read(source).tensors)):
                accepted += 1
                back = published.read_tensors(source)
                assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())
    finally:
        path.write_bytes(original)
    assert accepted < 20


@pytest.mark.parametrize("seed", range(2))
def test_damaged_indexes(source, tensors, seed):
    table = mapping.ParamMapping(ARCHITECTURES["LlamaForCausalLM"].rules(CONFIG), CONFIG)
    path, rng = source / "model.safetensors.index.json", random.Random(seed)
    original = path.read_bytes()
    try:
        for _ in range(60):
            path.write_bytes(damage(rng, original))
            if not refused(lambda: table.check_tensors(hf_checkpoint.read(source).tensors)):
                back = published.read_tensors(source)
                assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())
    finally:
        path.write_bytes(original)


def import_tensors(source) -> dict[str, np.ndarray]:
    """The tensors of a folder after one way through our parameters, as an import reads and an export writes them."""
    checkpoint = hf_checkpoint.read(source)
    config = bind(registry.config_class(checkpoint.family), checkpoint.read_model(), "model")
    rules = checkpoint.architecture.rules(config)
    table = mapping.ParamMapping(rules, config)
    table.check_tensors(checkpoint.tensors)
    table.check_aliases(checkpoint.tensors)
    original = {name: tuple(slice(0, size) for size in leaf.shape) for name, leaf in table.shapes.items()}
    params = table.unflatten({name: table.read(name, index, checkpoint.tensors) for name, index in original.items()})
    return state_dicts.dump(rules, params, config)


@pytest.mark.parametrize("seed", range(2))
def test_damaged_configs(source, tensors, seed):
    """A config.json that is accepted, such as one with another epsilon, gives the same weights."""
    path, rng = source / "config.json", random.Random(seed)
    original, accepted = path.read_bytes(), 0
    try:
        for _ in range(60):
            path.write_bytes(damage(rng, original))
            if not refused(lambda: import_tensors(source)):
                accepted += 1
                back = import_tensors(source)
                assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())
    finally:
        path.write_bytes(original)
    assert accepted < 40
