"""Labelled documents: framed as prompts, scored at one position, isolated in packed rows."""

import numpy as np
import pytest

from llmjax.data.batches.pipeline import EvalData, TrainData
from llmjax.data.config import DataConfig, ObjectiveConfig, SourceConfig
from llmjax.data.objectives.objective import open_objective
from llmjax.data.store.tokenizer_kinds import Bytes
from llmjax.errors import UserError
from tests.data.preparation import BYTES, run_prepare

TOKENIZER = Bytes()
BOS, EOS, SEQ_LEN = TOKENIZER.bos_id, TOKENIZER.eos_id, 40


class Framed(Bytes):
    """Bytes with the frame of an imported BERT: a start, and an end that also separates two texts."""

    def __init__(self):
        super().__init__()
        self.prompt_frame = (self.bos_id,), (self.eos_id,)


def make(
    name: str,
    *,
    first: bool,
    tokenizer=TOKENIZER,
    classes=("0", "1", "2"),
    multi_label=False,
    seq_len=SEQ_LEN,
    **fields,
):
    config = ObjectiveConfig(name=name)
    classes = () if name == "regress" else classes
    return open_objective(
        config, tokenizer, seq_len=seq_len, classes=classes, multi_label=multi_label, labels_first=first, **fields
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Folder of a store by the kind of its labels; document n has n letters, and pairs a second text."""
    root, stores = tmp_path_factory.mktemp("labelled"), {}
    rows = [(chr(97 + n % 26) * n, "z" * (n % 5 + 1), n % 3) for n in range(1, 30)]
    kinds = {"class": ("0", "1", "2"), "pair": ("0", "1", "2"), "number": ()}
    for kind, classes in kinds.items():
        (root / f"{kind}.csv").write_text("".join(f"{a},{b},{label}\n" for a, b, label in rows))
        source = SourceConfig(
            path=str(root / f"{kind}.csv"),
            columns=("a", "b", "label"),
            text_field="a",
            pair_field="b" if kind == "pair" else "",
            label_field="label",
            split="train",
        )
        config = DataConfig(sources={"main": source}, tokenizer=BYTES, workers=1, seq_len=SEQ_LEN, classes=classes)
        run_prepare(config, root / kind)
        stores[kind] = root / kind, config
    return stores


def batches(stores, kind: str, objective):
    folder, config = stores[kind]
    data = EvalData(folder, config, split="train", source="main", batch=4, objective=objective)
    return list(data.batches(np.arange(4)))


def documents(batch):
    """(ids, token types, index of the scored position, its target) of each document."""
    for row in range(len(batch.inputs)):
        for number in range(1, batch.segments[row].max() + 1):
            inside = batch.segments[row] == number
            scored = np.flatnonzero(batch.weights[row][inside])
            types = None if batch.token_types is None else batch.token_types[row][inside].tolist()
            yield (
                batch.inputs[row][inside].tolist(),
                types,
                scored.tolist(),
                batch.targets[row][inside][scored].tolist(),
            )


def test_an_encoder_scores_the_first_position_and_a_decoder_the_last(stores):
    seen = {}
    for first in (True, False):
        for batch in batches(stores, "class", make("classify", first=first)):
            for ids, types, scored, target in documents(batch):
                size = len(ids) - 1
                assert ids == [BOS, *[97 + size % 26] * size] and target == [size % 3]
                assert scored == [0 if first else size] and types == ([0] * len(ids) if first else None)
                seen[first, size] = True
    assert len(seen) == 2 * 29


def test_packed_rows_hold_several_documents(stores):
    batch = batches(stores, "class", make("classify", first=True))[0]
    assert batch.segments.max() > 1 and (batch.weights > 0).sum() == batch.segments.max(axis=1).sum()
    assert not batch.weights[batch.segments == 0].any()


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Framed()])
def test_the_second_text_of_a_pair_has_token_type_1(stores, tokenizer):
    after = list(tokenizer.prompt_frame[1]) if tokenizer.prompt_frame else []
    count = 0
    for batch in batches(stores, "pair", make("classify", first=True, tokenizer=tokenizer)):
        for ids, types, scored, target in documents(batch):
            size = ids.index(EOS) - 1
            second = min(size % 5 + 1, len(ids) - size - 2 - len(after))
            assert ids == [BOS, *[97 + size % 26] * size, EOS, *[122] * second, *after]
            assert types == [0] * (size + 2) + [1] * (second + len(after)) and target == [size % 3] and scored == [0]
            count += 1
    assert count == 29


def test_numbers_and_lists_of_classes_are_labels_of_the_batch(stores):
    for batch in batches(stores, "number", make("regress", first=False)):
        assert batch.labels.dtype == np.float32 and not batch.multi_label and not batch.targets.any()
        lengths = [len(ids) - 1 for ids, *_ in documents(batch)]
        assert batch.labels[batch.weights > 0].tolist() == [[size % 3] for size in lengths]
        assert not batch.labels[batch.weights == 0].any()


def test_a_full_row_fits_and_shorter_rows_are_refused(stores):
    folder, config = stores["pair"]
    framed = make("classify", first=True, tokenizer=Framed(), seq_len=41)
    assert framed.row_budget.costs is not None and framed.row_budget.costs.max() == 41
    with pytest.raises(UserError, match=r"data.seq_len=20: .* prepared for longer rows"):
        TrainData(
            folder,
            DataConfig(sources=config.sources, seq_len=20, classes=config.classes),
            seed=0,
            global_batch=1,
            objective=make("classify", first=True, seq_len=20),
        )


@pytest.mark.parametrize(("start_id", "tokenizer"), [(-1, TOKENIZER), (77, Framed())])
def test_an_encoder_decoder_reads_a_text_and_writes_the_name_of_its_class(stores, start_id, tokenizer):
    names = ("no", "maybe", "yes")
    objective = make("classify", first=False, tokenizer=tokenizer, classes=names, start_id=start_id)
    before, after = tokenizer.prompt_frame or ((), (EOS,))
    begin, width, seen = BOS if start_id < 0 else start_id, len("maybe") + 1, []
    for batch in batches(stores, "class", objective):
        assert batch.source.shape == (4, SEQ_LEN) and batch.targets.shape == (4, objective.target_len)
        for row in range(4):
            for number in range(1, batch.source_segments[row].max() + 1):
                source = batch.source[row][batch.source_segments[row] == number].tolist()
                inside, size = batch.segments[row] == number, len(source) - len(before) - len(after)
                assert source == [*before, *[97 + size % 26] * size, *after]
                targets, scored = batch.targets[row][inside], batch.weights[row][inside] > 0
                name = [*names[size % 3].encode(), EOS]
                assert targets[scored].tolist() == name and scored.tolist() == [True] * len(name) + [False] * (
                    width - len(name)
                )
                assert batch.inputs[row][inside][: len(name)].tolist() == [begin, *name[:-1]]
                seen.append(size)
            assert batch.segments[row].max() == batch.source_segments[row].max() <= objective.target_len // width
    assert sorted(seen) == list(range(1, 30))


def test_classes_that_the_tokenizer_encodes_alike_are_refused():
    with pytest.raises(UserError, match="encodes 'a' and 'a' alike"):
        make("classify", first=False, classes=("a", "b", "a"), start_id=-1)


def test_a_row_depends_on_nothing_else(stores):
    folder, config = stores["class"]
    objective = make("classify", first=True)
    data = TrainData(folder, config, seed=1, global_batch=3, objective=objective)
    whole = next(data.batches(data.start(), np.arange))[0]
    part = next(data.batches(data.start(), lambda _: np.array([2])))[0]
    for name in ("inputs", "targets", "weights", "token_types"):
        np.testing.assert_array_equal(getattr(whole, name)[2:], getattr(part, name))
    data.close()
