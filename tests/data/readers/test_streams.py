"""The bytes of files: blocks of bounded size, damage and what it costs, lines, lookahead."""

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys

import pytest
import zstandard

from llmjax.data.readers import streams
from llmjax.data.readers.streams import DamageError
from tests import jobs

PACKERS = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress}
# Reads FILE in the strict mode of `prepare` or the lenient mode of `curate`, and prints the memory that this adds.
_READ = """
import json, resource, sys
import numpy, pyarrow.parquet, zstandard  # so that imports are not counted
from llmjax.curate.config import InputConfig
from llmjax.curate.readers import documents as lenient, inputs
from llmjax.data.config import SourceConfig
from llmjax.data.readers import documents as strict, sources

mode, path = sys.argv[1:]
list_units, read_unit, config = {
    "strict": (sources.list_units, strict.read_unit, SourceConfig),
    "lenient": (inputs.list_units, lenient.read_unit, InputConfig),
}[mode]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found, lost = [], 0
for unit in list_units("main", config(path=path)):
    for record in read_unit(unit):
        found.append(getattr(record, "reason", getattr(record, "text", "")))
        lost += getattr(record, "size", 0)
added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps({"MB": added, "found": found, "lost": lost}))
"""


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


def read_all(path):
    """(content, the damage at its end or None)."""
    data = streams.UntilDamage(streams.read_blocks(str(path)))
    return b"".join(data), data.damage


@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_content_is_complete_and_truncation_is_damage(tmp_path, suffix):
    content = noise(50_000).hex().encode()
    pack = PACKERS.get(suffix, bytes)
    path = tmp_path / "a"  # the name says nothing: the first bytes do
    path.write_bytes(pack(content[:60_000]) + pack(content[60_000:]))
    assert read_all(path) == (content, None)
    if suffix:
        path.write_bytes(pack(content)[:-10])
        data, damage = read_all(path)
        assert content.startswith(data) and damage and damage.truncated and "ends inside" in str(damage)
        assert damage.lost_bytes >= len(data)  # the size of what is missing is unknown: the file counts whole


@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2"])
def test_zeros_after_the_last_stream_are_padding(tmp_path, suffix):
    (tmp_path / "a").write_bytes(PACKERS[suffix](b"text") + bytes(1000))
    assert read_all(tmp_path / "a") == (b"text", None)


def test_bytes_after_the_last_zstd_frame_cost_only_themselves(tmp_path):
    (tmp_path / "a").write_bytes(zstandard.compress(b"text" * 1000) + b"no frame")
    content, damage = read_all(tmp_path / "a")
    size = (tmp_path / "a").stat().st_size
    assert content == b"text" * 1000 and f"at byte {size - 8:,} of {size:,}" in str(damage)
    assert damage.lost_bytes < len(content)


def test_a_zstd_window_of_2_gib_is_accepted(tmp_path):
    """`zstd --long=31` declares it. The frame is written by hand: a raw block of a few bytes (RFC 8878, 3.1.1)."""
    text = b'{"text": "far"}\n'
    window_log = 31
    header = b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3])
    block = (len(text) << 3 | 1).to_bytes(3, "little") + text
    (tmp_path / "a.jsonl.zst").write_bytes(header + block)
    assert zstandard.get_frame_parameters(header).window_size == 1 << 31
    assert read_all(tmp_path / "a.jsonl.zst") == (text, None)


def _write_bomb(path):
    """A few kilobytes that expand to one line of 500 MB, between two records."""
    compressor = zstandard.ZstdCompressor().compressobj()
    spaces = b" " * 10_000_000
    parts = [compressor.compress(part) for part in (b'{"text": "a"}\n', *[spaces] * 50, b'\n{"text": "b"}\n')]
    path.write_bytes(b"".join([*parts, compressor.flush()]))
    assert path.stat().st_size < 100_000


def _write_long_line(path):
    """A record of 320 MB in a sparse file, between two others."""
    path.write_bytes(b'{"text": "a"}\n')
    with open(path, "r+b") as file:
        file.seek(320_000_000)
        file.write(b'\n{"text": "b"}\n')


@pytest.mark.parametrize("mode", ["strict", "lenient"])
@pytest.mark.parametrize(
    ("name", "write", "size"),
    [("bomb.jsonl.zst", _write_bomb, 500_000_001), ("long.jsonl", _write_long_line, 319_999_987)],
)
def test_records_above_the_limit_are_rejected_in_bounded_memory(tmp_path, mode, name, write, size):
    write(tmp_path / name)
    command = [sys.executable, "-c", _READ, mode, str(tmp_path / name)]
    result = json.loads(subprocess.run(command, env=jobs.environment(), capture_output=True, check=True).stdout)
    assert result["found"] == ["a", "longer than 67108864 bytes (max_record_bytes)", "b"]
    assert result["lost"] == size
    assert result["MB"] < 250  # at most the record limit, twice, and a block that zstd expands


def test_corrupt_gzip_members_lose_only_their_bytes(tmp_path):
    parts = [noise(3000, seed).hex().encode() for seed in range(6)]
    members = [bytearray(gzip.compress(part)) for part in parts]
    members[2][1000:] = noise(len(members[2]) - 1000, 7)
    (tmp_path / "a.gz").write_bytes(b"".join(members))
    content, damages = b"", []
    for segment in streams.read_gzip_segments(str(tmp_path / "a.gz")):
        try:
            for block in segment:
                content += block
        except DamageError as damage:
            damages.append(damage)
    assert content.startswith(parts[0] + parts[1]) and content.endswith(b"".join(parts[3:]))
    (damage,) = damages
    assert 1000 < damage.lost_bytes < 6000


def test_lines_end_where_damage_begins():
    def data():
        yield b"a\nb"
        yield b"c\nd"
        raise DamageError("why")

    lines = streams.split_lines(data(), max_bytes=100)
    assert [next(lines) for _ in range(2)] == [(0, b"a\n"), (2, b"bc\n")]
    with pytest.raises(DamageError):
        next(lines)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lines_of_any_block_size(size):
    data = b"ab\r\nc\rd\n\nlong line\nend"
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    assert list(streams.split_lines(iter(blocks), max_bytes=6)) == [
        (0, b"ab\r\n"),
        (4, b"c\rd\n"),
        (8, b"\n"),
        (9, 10),
        (19, b"end"),
    ]
    lone_cr = [line for _, line in streams.split_lines(iter(blocks), max_bytes=6, lone_cr=True)]
    assert lone_cr == [b"ab\r\n", b"c\r", b"d\n", b"\n", 10, b"end"]


def test_a_window_looks_ahead_and_ends_at_damage():
    def data():
        yield b"abc"
        yield b"def"
        raise DamageError("why", 5)

    window = streams.Window(data())
    assert window.peek(1) == b"abc" and window.read(4) == b"abcd" and window.skip_to(b"x") == 2
    assert window.read(9) == b"" and window.damage and window.damage.lost_bytes == 5
