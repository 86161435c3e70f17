"""Count the words of topic lists, to show which groups and topics a corpus mentions.

A list is a text file of lines such as `gender/women: she, her, woman, women`. Counts describe; nothing is dropped.
"""

import functools
from pathlib import Path
import re

from llmjax.data.readers import streams
from llmjax.errors import UserError

# Small and neutral on purpose: groups that many corpora should have in some proportion. A list of one's own says more.
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


def count(text: str, files: tuple) -> dict[str, int]:
    """Topic/group -> how often the text has one of its words; groups that it has nothing of are left out."""
    pattern, names = _compiled(files, tuple(map(streams.file_state, files)))
    found: dict[str, int] = {}
    for match in pattern.finditer(text.lower()):
        for name in names[match[0]]:
            found[name] = found.get(name, 0) + 1
    return found


@functools.lru_cache(maxsize=4)
def _compiled(files: tuple, _states: tuple) -> tuple[re.Pattern, dict[str, list[str]]]:
    names: dict[str, list[str]] = {}
    for name, words in parse(files).items():
        for word in words:
            names.setdefault(word, []).append(name)
    longest_first = sorted(names, key=lambda word: (-len(word), word))
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b"), names


def parse(files: tuple) -> dict[str, list[str]]:
    """Topic/group -> its words, of the files given, or of the small list that comes with llmjax."""
    groups: dict[str, list[str]] = {}
    for path, text in [(path, _read(path)) for path in files] or [("", DEFAULT)]:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, colon, words = line.partition(":")
            listed = [word.strip().lower() for word in words.split(",") if word.strip()]
            if not colon or not listed:
                raise UserError(
                    f"curate.sample.terms names {path!r}: line {number} is {line[:60]!r}; "
                    "expected a line such as 'gender/women: she, her'"
                )
            groups.setdefault(name.strip(), []).extend(listed)
    return groups


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"curate.sample.terms names {path!r}: cannot be read ({error}); give text files") from None
