"""Extraction of the main text of pages, and detection of HTML."""

from collections import Counter
import gzip
import json
import re
import sysconfig
import time

import pytest

from llmjax.curate.config import CurateConfig, InputConfig
from llmjax.curate.document import Document
from llmjax.curate.engine.stages import STAGES
from llmjax.curate.readers import html
from llmjax.curate.readers.documents import Record, read_unit
from llmjax.curate.readers.html import extract_main_text
from llmjax.curate.readers.inputs import list_units
from llmjax.curate.readers.markup import detect_html

STORY = [
    "The river had risen overnight, and by morning the lower meadow was a lake that reached the first fence.",
    "Nobody in the village remembered such a spring, though the oldest of them, when asked, remembered worse.",
    "They moved the sheep first; the cows, being stubborn, waited until the water was at their knees & then followed.",
    "By the evening it was over, and what was left was mud, a broken gate, and a boat that belonged to no one.",
]
PAGE = """<!DOCTYPE html><html><head><title>The flood &amp; after | News</title>
<style>p {{ color: red }}</style>
<script>if (a < b) document.write("<p>never this text of a script, however long it is</p>")</script></head>
<body class="has-comments">
<header><h1>Daily news</h1><nav><ul><li><a href="/">Home</a><li><a href="/s">Sport</a></ul></nav></header>
<!-- a comment of the page's author that nobody reads, with <p>markup in it that is not to be taken for text</p> -->
<div class="social-share">Share this story with all of your friends, and with everybody else as well, right now</div>
<div id="content"><h2>The flood</h2>{story}</div>
<div class="related-posts"><p>Read also: another story, about something else, that has to do with other things</p></div>
<aside><p>Our newsletter comes every week, and it is read by all who want to know what others have known</p></aside>
<div id="comments"><p>I was there and I say that it was not so bad, and the boat is mine, please bring it back</p></div>
<footer><p>All rights reserved, no part of this page may be copied, printed or read aloud without consent</p></footer>
</body></html>"""
PARAGRAPHS = "".join(f"<p>{line.replace('&', '&amp;')}</p>" for line in STORY)
BOILERPLATE = (
    "script",
    "Home",
    "Share",
    "Read also",
    "newsletter",
    "I was there",
    "rights reserved",
    "never this",
    "nobody",
)


def word_f1(text, true):
    """F1 score of the two bags of words."""
    words, true_words = (Counter(re.findall(r"\w+", side.lower())) for side in (text, true))
    return 2 * (words & true_words).total() / (words.total() + true_words.total())


def test_the_main_text_is_extracted_without_boilerplate():
    text, title = extract_main_text(PAGE.format(story=PARAGRAPHS), "http://news.org/flood")
    assert title == "The flood & after | News"
    for line in STORY:
        assert line in text
    assert not [word for word in BOILERPLATE if word in text]
    assert (text, title) == extract_main_text(PAGE.format(story=PARAGRAPHS), "http://news.org/flood")


@pytest.mark.parametrize("page", ["", "<html>", "<script>x</script>", "\0", "<p></p>"])
def test_a_page_without_text_gives_an_empty_text(page):
    assert extract_main_text(page)[0] == ""


def test_an_error_of_the_parser_gives_an_empty_text(monkeypatch):
    import trafilatura

    def fail(*args, **options):
        raise ValueError("broken page")

    monkeypatch.setattr(trafilatura, "extract", fail)
    assert extract_main_text("<p>x</p>")[0] == ""


@pytest.mark.parametrize("piece", ["<div>", "<!--", "<", "<a b='", "<script>", "<p>", "<svg>", "<b ", "</p>", "&lt;p"])
def test_html_detection_takes_linear_time(piece):
    began = time.process_time()
    detect_html("<p>" + piece * ((1 << 20) // len(piece)))
    assert time.process_time() - began < 5


HTML = [
    '<div class="post"><script>var a = 1; document.write("x")</script><p>The river had risen.</p></div>',
    "<p>One short sentence.</p>",
    "<P>ONE</P>\n<P>TWO</P>",
    "Breaking news\n<div class=a><p>The river had risen overnight, and the meadow was a lake.</p></div>",
    "<ul><li>one<li>two</ul><my-widget></my-widget><style>p { color: red }</style>",
    "<!DOCTYPE html><html><body>{{ text }}</body></html>",
    '<?xml version="1.0"?><html><body><p>x</p></body></html>',
    "&lt;p&gt;One &amp;amp; two.&lt;/p&gt;",
    "<!-- made by hand --><table><tr><td>one</td></tr></table>",
]
TEXT = [
    "plain words, 1 < 2 and 3 > 2, a<b and c>d",
    "# Title\n\nSome *words* with <b>bold</b>, H<sub>2</sub>O<br>and a\n\n- list\n- of two\n",
    '<p align="center"><img src="a.png"></p>\n\n# Project\n\nRead [this](a.md) and run `make`. It is short.',
    "<div> is a block; use <p> for paragraphs, and end each <div> by its end tag.",
    "function App() { return (<div className='x'><p>Hi</p></div>); }",
    "<div className={styles.a}><p>Hi {name}</p></div>",
    '<template><div><p v-if="x">Hi</p></div></template><script>export default {}</script>',
    "{% extends 'a.html' %}<div><p>Hi</p></div>",
    "<?php echo 1; ?><div><p>Hi</p></div>",
    'page = """<div><p>Hello</p></div>"""',
    "```html\n<div><p>Hi</p></div>\n```",
    "#include <map>\n#include <b>\nstd::map<a, b> x; vector<p> y;",
    '<?xml version="1.0"?><rss><channel><title>a</title><item><title>b</title></item></channel></rss>',
    "<TEI><teiHeader><title>a</title></teiHeader><text><body><p>b</p></body></text></TEI>",
    "<p>Let <math><mi>x</mi><mo>=</mo><mn>2</mn></math> be even.</p>",
    "<svg><title>a</title><path d='M0 0'/></svg>",
    "<s>[INST] Hello [/INST] Hi </s>",
    "<alice> hi\n<bob> hello\n<alice> how are you?",
    "I loved it.<br /><br />It was <i>good</i>.",
    "On Monday <jane@example.org> wrote:\n> see <https://example.org/>",
]


@pytest.mark.parametrize("text", HTML)
def test_html_is_detected(text):
    assert detect_html(text) is not None


@pytest.mark.parametrize("text", TEXT)
def test_text_with_tags_is_not_html(text):
    assert detect_html(text) is None


def test_html_in_a_field_is_extracted_and_counted():
    page = HTML[0]
    measured = STAGES["extract"].measure(Document("a", "main", page, "auto"), CurateConfig())
    assert isinstance(measured, Document) and (measured.text, measured.kind) == ("The river had risen.", "text")
    assert measured.scores == {"repair.text extracted from HTML in a field": 1}
    for text, kind in ((page, "text"), (TEXT[1], "auto")):
        measured = STAGES["extract"].measure(Document("a", "main", text, kind), CurateConfig())
        assert isinstance(measured, Document) and (measured.text, measured.kind, measured.scores) == (text, "text", {})


def test_python_sources_are_not_html():
    path = sysconfig.get_path("stdlib")
    for name in ("pydoc.py", "cgitb.py", "html/parser.py", "xml/sax/saxutils.py"):
        try:
            with open(f"{path}/{name}") as file:
                assert detect_html(file.read()) is None
        except FileNotFoundError:
            continue


def test_captured_pages_have_text(shared_data):
    path = shared_data / "warc" / "dolma-sample-0000.warc.gz"
    records = [record for unit in list_units("web", InputConfig(path=str(path))) for record in read_unit(unit)]
    texts = [extract_main_text(record.text, record.meta["url"])[0] for record in records if isinstance(record, Record)]
    assert len(texts) == 24 and sum(map(bool, texts)) >= 20


def test_word_f1_on_annotated_pages(shared_data):
    """It is .978."""
    with gzip.open(shared_data / "web-articles" / "articles.jsonl.gz", "rt") as file:
        pages = [json.loads(line) for line in file][:30]
    assert all(detect_html(page["html"]) for page in pages)
    scores = [word_f1(extract_main_text(page["html"], page["url"])[0], page["text"]) for page in pages]
    assert sum(scores) / len(scores) >= 0.95


def test_package_versions():
    assert re.fullmatch(r"trafilatura \S+, lxml \S+", html.get_package_versions())
