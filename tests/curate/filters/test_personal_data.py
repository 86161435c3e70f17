"""Personal data are found, replaced, and not shown in reports; similar text is left unchanged."""

import gzip
import itertools
import json
import pathlib
import random
import string
import time

import pytest

from llmjax.binding import load_module
from llmjax.curate.config import PersonalDataConfig
from llmjax.curate.filters import personal_data
from llmjax.errors import UserError


def find(text, **options):
    return [(span.kind, text[span.begin : span.end]) for span in personal_data.find_spans(text, **options)]


def random_key(size, letters=string.ascii_letters + string.digits, seed=0):
    """Random characters: not a key that was ever issued."""
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
    ("secret", "{}", "ghp_" + random_key(36)),
    ("secret", "{}", "github_pat_" + random_key(82)),
    ("secret", "'{}'", "xoxb-" + random_key(40)),
    ("secret", "{}", "AIza" + random_key(35)),
    ("secret", "{}", "sk-proj-" + random_key(48)),
    ("secret", "Bearer {}", "eyJ" + random_key(20) + ".eyJ" + random_key(30) + "." + random_key(40)),
    ("secret", "{}\n", "-----BEGIN RSA PRIVATE KEY-----\n" + random_key(200) + "\n-----END RSA PRIVATE KEY-----"),
    ("secret", "{}", "-----BEGIN PRIVATE KEY-----\n" + random_key(200)),
    ("secret", 'password = "{}"', "hunter2!"),
    ("secret", "PASSWORD={}\n", random_key(12)),
    ("secret", '"api_key": "{}",', random_key(32)),
    ("secret", "export AWS_SECRET_ACCESS_KEY={}", random_key(40)),
    ("secret", "postgres://user:{}@db.example.org/x", "pw7Xq9"),
]


@pytest.mark.parametrize(("kind", "text", "value"), FINDINGS)
def test_each_kind_is_found(kind, text, value):
    for before, after in (("", ""), ("One word.\n", "\nAnother."), ("é" * 100 + " ", " é")):
        assert (kind, value) in find(before + text.format(value) + after)
        assert (
            personal_data.replace_spans(text.format(value), personal_data.find_spans(text.format(value))).count(
                f"<{kind.upper()}>"
            )
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
def test_similar_text_is_not_found(text):
    assert find(text) == []


# ruff: noqa: RUF001 (letters of other alphabets are intended)
@pytest.mark.parametrize(
    ("text", "replaced"),
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
def test_values_in_other_scripts_are_replaced_completely(text, replaced):
    assert personal_data.replace_spans(text, personal_data.find_spans(text)) == replaced


def test_shared_cases(shared_data):
    for line in (shared_data / "cases" / "personal.jsonl").read_text().splitlines():
        case = json.loads(line)
        assert personal_data.replace_spans(case["text"], personal_data.find_spans(case["text"])) == case["right"]


def test_spans_are_in_order_without_overlaps():
    text = "a@b.io 203.0.113.77 GB82 WEST 1234 5698 7654 32, tel 212-555-0199; 4111 1111 1111 1111; SSN 219-09-9999"
    spans = personal_data.find_spans(text)
    assert [span.kind for span in spans] == ["email", "ip", "iban", "phone", "card", "ssn"]
    assert all(a.end <= b.begin for a, b in itertools.pairwise(spans))
    assert personal_data.find_spans(text) == spans


def test_the_kind_of_higher_priority_wins_an_overlap():
    # A phone number within an IBAN, and a password that is an e-mail address.
    assert find("call DE89 3704 0044 0532 0130 00") == [("iban", "DE89 3704 0044 0532 0130 00")]
    assert find('password = "me7@mail.org"') == [("secret", "me7@mail.org")]
    assert find("+41111111111111111") == []


def test_kinds_can_be_selected():
    text = "a@b.io 203.0.113.77 https://u:pw7Xq9@h.org"
    assert find(text, kinds=("ip",)) == [("ip", "203.0.113.77")]
    assert find(text, kinds=("email",)) == [("email", "a@b.io")]
    assert find(text, kinds=()) == []


def test_replaced_text_contains_no_further_spans():
    text = "\n".join(line.format(value) for _, line, value in FINDINGS)
    replaced = personal_data.replace_spans(text, personal_data.find_spans(text))
    assert personal_data.find_spans(replaced) == []
    assert replaced.startswith("Write to <EMAIL>.\n<<EMAIL>>\nmailto:<EMAIL>?subject=x\n")


def test_masked_contexts_show_no_value():
    text = "Call me at 212-555-0199, or write to jane@example.org; my pin is 4711. " * 3
    spans = personal_data.find_spans(text)
    assert len(spans) == 6
    for index, span in enumerate(spans):
        shown = personal_data.mask_context(text, spans, index, width=30)
        assert span.placeholder in shown
        assert not any(c.isdigit() for c in shown) and "jane" not in shown and "@" not in shown
    assert personal_data.mask_context(text, spans, 0, width=14) == "Call me at <PHONE>, or write to"


def test_unknown_kind_and_action_are_refused():
    assert set(PersonalDataConfig().kinds) == set(personal_data.KINDS)
    with pytest.raises(UserError, match=r"no kind 'e-mail' \(did you mean 'email'\?\)"):
        PersonalDataConfig(kinds=("e-mail",))
    with pytest.raises(UserError, match="action='mask': expected 'replace', 'drop' or 'count'"):
        PersonalDataConfig(action="mask")


@pytest.mark.parametrize(
    "word", ["x", "1", "@", ":", "a.", "(0", "password=", "eyJ", "AB12", "1 ", "-----BEGIN ", "+1"]
)
def test_finding_spans_takes_linear_time(word):
    """Twice the length takes at most about twice the time."""
    seconds = []
    for size in (1 << 17, 1 << 19):
        text = word * (size // len(word))
        began = time.process_time()
        personal_data.find_spans(text)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 12 * max(seconds[0], 0.01)


def test_throughput_on_ordinary_text(shared_data):
    with gzip.open(shared_data / "gutenberg" / "frankenstein.txt.gz", "rt") as file:
        text = file.read()
    seconds = []
    for _ in range(3):
        began = time.process_time()
        personal_data.find_spans(text)
        seconds.append(time.process_time() - began)
    assert len(text) / min(seconds) > 4e6  # bytes a second; 25 MB/s was measured


TOOLS = pathlib.Path(__file__).resolve().parents[3] / "tools"
RECALL = {"email": 0.99, "ip": 0.99, "ssn": 0.95, "iban": 0.95, "card": 0.92, "phone": 0.75}
PRECISION = {"email": 0.95, "ip": 0.95, "ssn": 0.95, "iban": 0.95, "card": 0.95, "phone": 0.6}


def test_recall_and_precision_on_labelled_sentences(shared_data, monkeypatch):
    with gzip.open(shared_data / "pii" / "synth_dataset_v2.json.gz", "rt") as file:
        sentences = json.load(file)
    monkeypatch.syspath_prepend(TOOLS)
    score = load_module(TOOLS / "curate_recall.py").score_personal_data
    num_labels, num_hits, num_found, num_correct = score(sentences)
    recall = {kind: num_hits[kind] / num_labels[kind] for kind in RECALL}
    precision = {kind: num_correct[kind] / num_found[kind] for kind in PRECISION}
    assert {kind: value for kind, value in recall.items() if value < RECALL[kind]} == {}
    assert {kind: value for kind, value in precision.items() if value < PRECISION[kind]} == {}
    assert num_found["secret"] == 0
