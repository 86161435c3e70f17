"""Personal data: found where it is, not where it is not; replaced, and never shown in a report."""

from collections import Counter
import gzip
import itertools
import json
import random
import string
import time

import pytest

from llmjax.curate.config import PersonalConfig
from llmjax.curate.filters import personal_data
from llmjax.curate.filters.personal_data import Span
from llmjax.errors import UserError


def found(text, **options):
    return [(span.kind, text[span.begin : span.end]) for span in personal_data.find(text, **options)]


def drawn(size, letters=string.ascii_letters + string.digits, seed=0):
    """Characters drawn by chance: no key that was ever issued."""
    rng = random.Random(seed)
    return "7a" + "".join(rng.choice(letters) for _ in range(size - 2))


FINDINGS = [
    ("email", "Write to {}.", "jane.o'neil+news@mail.example.co.uk"),
    ("email", "<{}>", "a@b.io"),
    ("email", "mailto:{}?subject=x", "a_b@xn--bcher-kva.example"),
    ("email", "mail {}, please", "x%y@sub-domain.museum"),
    ("ip", "from {} at noon", "203.0.113.77"),
    ("ip", "[{}]:8080", "2001:db8::8a2e:370:7334"),
    ("ip", "{}/64", "fe80:0:0:0:204:61ff:fe9d:f156"),
    ("ip", "at {}.", "::ffff:192.0.2.128"),
    ("ip", "server {}", "8.8.8.8"),
    ("ip", "http://{}:80/", "10.1.2.3"),
    ("ssn", "SSN: {}", "078-05-1120"),
    ("ssn", "my social security number is {}.", "219 09 9999"),
    ("card", "card {}", "4111111111111111"),
    ("card", "card {} expires", "4012 8888 8888 1881"),
    ("card", "{}", "3782-822463-10005"),
    ("card", "pay by {}!", "5555-5555-5555-4444"),
    ("iban", "IBAN {}.", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "to {}, please", "DE89370400440532013000"),
    ("iban", "{} is mine", "nl91abna0417164300"),
    ("iban", "{}", "MT84MALT011000012345MTLCAST001S"),
    ("phone", "at {} now", "+1 (212) 555-0199"),
    ("phone", "{}", "(212) 555-0199"),
    ("phone", "or {}.", "212-555-0199 x123"),
    ("phone", "({})", "+44 20 7946 0958"),
    ("phone", "rufen Sie {} an", "030 1234 5678"),
    ("phone", "{}", "01.23.45.67.89"),
    ("phone", "Tel: {}", "5551234567"),
    ("phone", "Please call {}", "555 1234"),
    ("phone", "{} (fax)", "55 51 23 45"),
    ("secret", "key {}", "AKIA" + "Q7" * 8),
    ("secret", "{}", "ghp_" + drawn(36)),
    ("secret", "{}", "github_pat_" + drawn(82)),
    ("secret", "'{}'", "xoxb-" + drawn(40)),
    ("secret", "{}", "AIza" + drawn(35)),
    ("secret", "{}", "sk-proj-" + drawn(48)),
    ("secret", "Bearer {}", "eyJ" + drawn(20) + ".eyJ" + drawn(30) + "." + drawn(40)),
    ("secret", "{}\n", "-----BEGIN RSA PRIVATE KEY-----\n" + drawn(200) + "\n-----END RSA PRIVATE KEY-----"),
    ("secret", "{}", "-----BEGIN PRIVATE KEY-----\n" + drawn(200)),
    ("secret", 'password = "{}"', "hunter2!"),
    ("secret", "PASSWORD={}\n", drawn(12)),
    ("secret", '"api_key": "{}",', drawn(32)),
    ("secret", "export AWS_SECRET_ACCESS_KEY={}", drawn(40)),
    ("secret", "postgres://user:{}@db.example.org/x", "pw7Xq9"),
]


@pytest.mark.parametrize(("kind", "text", "value"), FINDINGS)
def test_each_kind_is_found_where_it_is(kind, text, value):
    for before, after in (("", ""), ("One word.\n", "\nAnother."), ("é" * 100 + " ", " é")):
        assert (kind, value) in found(before + text.format(value) + after)
        assert (
            personal_data.replace(text.format(value), personal_data.find(text.format(value))).count(f"<{kind.upper()}>")
            == 1
        )


@pytest.mark.parametrize(
    "text",
    [
        "icon@2x.png and @property, user@host, a@b",
        "git@github.com:owner/name.git",
        "Python 3.11.7 and version 1.2.3.4, v10.20.30.40, Section 21.22.23.24",
        "kernel 2.6.18.6 on 127.0.0.1, mask 255.255.255.0, 999.1.1.1, 01.02.03.04, 1.2.3.4.5",
        "std::vector<int>::iterator, a::b, dead::beef, at 12:30:45, ab:cd:ef:01:23:45, 0:0:0:0:0:0:0:1",
        "000-12-3456 and 666-12-3456 and 912-12-3456 and 123-00-4567 and 123-45-0000",
        "4111111111111112 has a wrong check digit; 0.4111111111111111 is a number; 1111111111111111",
        "GB82 WEST 1234 5698 7654 33 has wrong check digits, XX82WEST12345698765432 no country",
        "on 2024-05-17, 17.05.2024 and 1999/12/31 at 10:30, ISO 8601-1:2019, pages 1234-5678",
        "1234567, 12345678 and 123 456 789 people; $1,234,567.89; 3.14159265358979; 0.123 456 789",
        "ISBN 978-3-16-148410-0, the license number is 6940579, the year 1977 1978 1979",
        "password = getpass(), token: str, secret = os.environ['KEY'], password: required",
        'api_key="YOUR_API_KEY_0123456789", token = ${TOKEN_12345678901234}, password="password"',
        "secret = ch02-00-guessing-game-tutorial.html, key: value, https://user:password@host.org",
        "ghp_short, AKIA, sk-learn, eyJ, -----BEGIN CERTIFICATE-----",
    ],
)
def test_what_only_looks_like_it_is_left(text):
    assert found(text) == []


# ruff: noqa: RUF001 (letters of other alphabets are meant)
@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("mail: jürgen@example.de please", "mail: <EMAIL> please"),
        ("info@bücher.de now", "<EMAIL> now"),
        ("Dörte@Sörensen.example.com, χρήστης@παράδειγμα.ελ", "<EMAIL>, <EMAIL>"),
        ("квіточка@пошта.укр अजय@डाटा.भारत 用户@例子.广告", "<EMAIL> <EMAIL> <EMAIL>"),
        ("ｊａｎｅ＠ｅｘａｍｐｌｅ．ｃｏｍ jane@example。com", "<EMAIL> <EMAIL>"),
        ("邮箱jane@example.com。谢谢", "邮箱<EMAIL>。谢谢"),
        ("jane@example.com으로", "<EMAIL>으로"),
        ("see...jane@mail.example.com2, r&d@example.com", "see...<EMAIL>, <EMAIL>"),
        ("电话：13800138000", "电话：<PHONE>"),
        ("Tel.: 030/901820, Tel 030 / 90 18 20", "Tel.: <PHONE>, Tel <PHONE>"),
        ("Tel: 212\u2011555\u20110199 +49\u00a030/901820", "Tel: <PHONE> <PHONE>"),
        ("電話：０３−１２３４−５６７８", "電話：<PHONE>"),
        ("тел. 8 495 123-45-67", "тел. <PHONE>"),
        ("電話:03(1234)5678 전화: 02) 123-4567", "電話:<PHONE> 전화: <PHONE>"),
        ("8 (800) 555-35-35, 8(4012)12-34-56", "<PHONE>, <PHONE>"),
        ("Tel.: (0 30) 1 23 45 67", "Tel.: <PHONE>"),
        ("Tel: 0049 (0) 30 123456 or +1 – 415 – 555 – 0132", "Tel: <PHONE> or <PHONE>"),
    ],
)
def test_other_alphabets_leave_no_half(text, right):
    assert personal_data.replace(text, personal_data.find(text)) == right


def test_published_cases(shared_data):
    for line in (shared_data / "cases" / "personal.jsonl").read_text().splitlines():
        case = json.loads(line)
        assert personal_data.replace(case["text"], personal_data.find(case["text"])) == case["right"]


def test_findings_are_in_order_and_apart():
    text = "a@b.io 203.0.113.77 GB82 WEST 1234 5698 7654 32, tel 212-555-0199; 4111 1111 1111 1111; SSN 219-09-9999"
    spans = personal_data.find(text)
    assert [span.kind for span in spans] == ["email", "ip", "iban", "phone", "card", "ssn"]
    assert all(a.end <= b.begin for a, b in itertools.pairwise(spans))
    assert personal_data.find(text) == spans


def test_of_two_that_overlap_the_first_kind_stays():
    # The number of an account within an IBAN, and a password that is an address.
    assert found("call DE89 3704 0044 0532 0130 00") == [("iban", "DE89 3704 0044 0532 0130 00")]
    assert found('password = "me7@mail.org"') == [("secret", "me7@mail.org")]
    assert found("+41111111111111111") == []


def test_kinds_can_be_chosen():
    text = "a@b.io 203.0.113.77 https://u:pw7Xq9@h.org"
    assert found(text, kinds=("ip",)) == [("ip", "203.0.113.77")]
    assert found(text, kinds=("email",)) == [("email", "a@b.io")]
    assert found(text, kinds=()) == []


def test_replace_leaves_the_rest_and_nothing_to_find():
    text = "\n".join(line.format(value) for _, line, value in FINDINGS)
    clean = personal_data.replace(text, personal_data.find(text))
    assert personal_data.find(clean) == []
    assert clean.startswith("Write to <EMAIL>.\n<<EMAIL>>\nmailto:<EMAIL>?subject=x\n")


def test_mask_shows_no_value():
    text = "Call me at 212-555-0199, or write to jane@example.org; my pin is 4711. " * 3
    spans = personal_data.find(text)
    assert len(spans) == 6
    for index, span in enumerate(spans):
        shown = personal_data.mask(text, spans, index, width=30)
        assert span.placeholder in shown
        assert not any(c.isdigit() for c in shown) and "jane" not in shown and "@" not in shown
    assert personal_data.mask(text, spans, 0, width=14) == "Call me at <PHONE>, or write to"


def test_unknown_kind_and_action_are_refused():
    personal_data.check(PersonalConfig())
    with pytest.raises(UserError, match=r"no kind 'e-mail' \(did you mean 'email'\?\)"):
        personal_data.check(PersonalConfig(kinds=("e-mail",)))
    with pytest.raises(UserError, match="action='mask': expected one of replace, drop, count"):
        personal_data.check(PersonalConfig(action="mask"))


@pytest.mark.parametrize(
    "word", ["x", "1", "@", ":", "a.", "(0", "password=", "eyJ", "AB12", "1 ", "-----BEGIN ", "+1"]
)
def test_a_long_word_takes_no_long_time(word):
    """Twice the length takes at most about twice the time."""
    seconds = []
    for size in (1 << 17, 1 << 19):
        text = word * (size // len(word))
        began = time.process_time()
        personal_data.find(text)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 12 * max(seconds[0], 0.01)


def test_speed_on_ordinary_text(shared_data):
    with gzip.open(shared_data / "gutenberg" / "frankenstein.txt.gz", "rt") as file:
        text = file.read()
    seconds = []
    for _ in range(3):
        began = time.process_time()
        personal_data.find(text)
        seconds.append(time.process_time() - began)
    assert len(text) / min(seconds) > 4e6  # bytes a second; 25 MB/s was measured


NAMES = {
    "EMAIL_ADDRESS": "email",
    "IP_ADDRESS": "ip",
    "US_SSN": "ssn",
    "IBAN_CODE": "iban",
    "CREDIT_CARD": "card",
    "PHONE_NUMBER": "phone",
}
RECALL = {"email": 0.99, "ip": 0.99, "ssn": 0.95, "iban": 0.95, "card": 0.92, "phone": 0.75}
PRECISION = {"email": 0.95, "ip": 0.95, "ssn": 0.95, "iban": 0.95, "card": 0.95, "phone": 0.6}


def test_recall_and_precision_on_labelled_sentences(shared_data):
    with gzip.open(shared_data / "pii" / "synth_dataset_v2.json.gz", "rt") as file:
        sentences = json.load(file)
    there, hit, given, right = Counter(), Counter(), Counter(), Counter()
    for sentence in sentences:
        spans = personal_data.find(sentence["full_text"])
        true = [
            Span(NAMES[span["entity_type"]], span["start_position"], span["end_position"])
            for span in sentence["spans"]
            if span["entity_type"] in NAMES
        ]
        for one in true:
            there[one.kind] += 1
            hit[one.kind] += any(s.kind == one.kind and s.begin <= one.begin and s.end >= one.end for s in spans)
        for span in spans:
            given[span.kind] += 1
            right[span.kind] += any(s.kind == span.kind and s.begin < span.end and span.begin < s.end for s in true)
    assert {k: hit[k] / there[k] for k in RECALL if hit[k] / there[k] < RECALL[k]} == {}
    assert {k: right[k] / given[k] for k in PRECISION if right[k] / given[k] < PRECISION[k]} == {}
    assert given["secret"] == 0
