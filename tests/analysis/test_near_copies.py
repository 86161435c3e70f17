"""Near-copies between training texts and examples."""

from llmjax.analysis.near_copies import find_near_copies

LONG = "the quick brown fox jumps over the lazy dog and then it sleeps in the warm sun for most of the long afternoon"


def test_copies_are_found_and_other_texts_are_not():
    train = ["an entirely different sentence about trains", LONG, "short one"]
    texts = [LONG.upper() + " !", "nothing of this kind was in the training data at all", LONG + " again", "Short  one"]
    copies = find_near_copies(train, texts)
    assert {(copy.index, copy.train_index) for copy in copies} == {(0, 1), (2, 1), (3, 2)}
    similarities = [copy.similarity for copy in copies]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] == 1.0 and similarities[-1] < 1.0


def test_no_training_texts():
    assert find_near_copies([], ["a"]) == [] and find_near_copies(["a"], []) == []
