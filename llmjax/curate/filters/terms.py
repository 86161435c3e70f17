"""Count the words of topic lists, to show which topics and groups a corpus mentions. Nothing is dropped for it.

A list is a text file of lines such as `gender/women: she, her, woman, women`.
"""

from collections import Counter
import functools
from pathlib import Path
import re

from llmjax.data.readers import streams
from llmjax.errors import UserError

# Small and neutral on purpose: groups that many corpora should mention in some proportion.
DEFAULT = """\
gender/women: she, her, hers, herself, woman, women, girl, girls, mother, daughter, sister
gender/men: he, him, his, himself, man, men, boy, boys, father, son, brother
gender/unspecified: they, them, their, theirs, themselves, person, people, child, children, parent, sibling
region/africa: africa, african, nigeria, egypt, ethiopia, kenya
region/asia: asia, asian, china, chinese, india, indian, japan, japanese, indonesia
region/europe: europe, european, britain, british, france, french, germany, german, russia, russian
region/north america: america, american, americans, canada, canadian, mexico, mexican
region/south america: brazil, brazilian, argentina, colombia, chile, peru
region/oceania: australia, australian, zealand, fiji, samoa
belief/buddhism: buddhism, buddhist, buddhists
belief/christianity: christianity, christian, christians, church, bible
belief/hinduism: hinduism, hindu, hindus
belief/islam: islam, islamic, muslim, muslims, quran, mosque
belief/judaism: judaism, jewish, jew, jews, synagogue
belief/none: atheism, atheist, atheists, secular
age/old: elderly, old people, seniors, pensioner, pensioners
age/young: teenager, teenagers, young people, youth, youths
tone/insults: idiot, idiots, stupid, moron, morons, loser, losers, pathetic, scum
tone/violence: kill, killed, killing, murder, murdered, rape, torture, massacre
tone/profanity: damn, crap, bastard, bitch, shit, fuck, fucking
"""


def count_terms(text: str, files: tuple) -> dict[str, int]:
    """Name such as gender/women -> number of occurrences of its words in the text, without zeros."""
    pattern, groups_by_word = _compile(files, tuple(map(streams.file_state, files)))
    return Counter(group for match in pattern.finditer(text.lower()) for group in groups_by_word[match[0]])


@functools.lru_cache(maxsize=4)
def _compile(files: tuple, _states: tuple) -> tuple[re.Pattern, dict[str, list[str]]]:
    groups_by_word: dict[str, list[str]] = {}
    for group, words in parse_lists(files).items():
        for word in words:
            groups_by_word.setdefault(word, []).append(group)
    longest_first = sorted(groups_by_word, key=lambda word: (-len(word), word))
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b"), groups_by_word


def parse_lists(files: tuple) -> dict[str, list[str]]:
    """Name such as gender/women -> its words, from the files, or from DEFAULT if there are none.

    Raises UserError for a file that cannot be read and for a line without words.
    """
    groups: dict[str, list[str]] = {}
    for path, text in [(path, _read(path)) for path in files] or [("", DEFAULT)]:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, colon, words = line.partition(":")
            terms = [word.strip().lower() for word in words.split(",") if word.strip()]
            if not colon or not terms:
                raise UserError(
                    f"curate.sample.terms: line {number} of {path!r} is {line[:60]!r}; "
                    "expected a line such as 'gender/women: she, her'"
                )
            groups.setdefault(name.strip(), []).extend(terms)
    return groups


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"curate.sample.terms: {path!r} cannot be read ({error}); give text files") from None
