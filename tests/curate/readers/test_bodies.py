"""HTTP bodies are decoded completely in bounded time and memory, or refused with a reason."""

import gzip
import random
import time
import zlib

import brotli
import pytest
import zstandard

from llmjax.curate.readers.bodies import BodyError, decode

LIMIT = 1 << 20
PAGE = b"<html><p>" + random.Random(0).randbytes(2000).hex().encode() + b"</html>"


def chunked(data, size=100):
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def bare_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def long_window_zstd(data):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return packer.compress(data) + packer.flush()


PACKERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize(
    ("body", "transfer", "content"),
    [
        *((pack(PAGE), "", name) for name, pack in PACKERS.items()),
        *((chunked(pack(PAGE)), f"{name}, chunked", "") for name, pack in PACKERS.items()),
        (chunked(gzip.compress(PAGE)), "chunked", "gzip"),
        (chunked(gzip.compress(brotli.compress(PAGE))), "GZIP,Chunked", "br"),
        (gzip.compress(zlib.compress(PAGE)), "", "deflate, gzip"),
        (bare_deflate(PAGE), "", "deflate"),
        (gzip.compress(PAGE), "", "deflate"),
        (zlib.compress(PAGE), "", "gzip"),
        (long_window_zstd(PAGE), "", "zstd"),
        (b"".join(gzip.compress(PAGE[at : at + 9]) for at in range(0, len(PAGE), 9)), "", "gzip"),
        (zstandard.compress(PAGE[:50]) + zstandard.compress(PAGE[50:]), "", "zstd"),
        (gzip.compress(PAGE) + b"\0" * 600 + b"\r\n", "", "gzip"),
        (chunked(PAGE).replace(b"\r\n", b"\n"), "chunked", ""),
        (chunked(PAGE) + b"Expires: never\r\n\r\n", "chunked", "identity"),
        # A coding that is stated but was not applied.
        *((PAGE, "", name) for name in PACKERS),
        (PAGE, "gzip, chunked", "br"),
    ],
)
def test_a_body_is_decoded_completely(body, transfer, content):
    assert decode(body, transfer, content, LIMIT) == PAGE


@pytest.mark.parametrize(
    ("body", "coding"), [*((pack(PAGE), name) for name, pack in PACKERS.items()), (bare_deflate(PAGE), "deflate")]
)
def test_truncated_or_damaged_bodies_are_refused(body, coding):
    for at in (20, len(body) // 2, len(body) - 1):
        with pytest.raises(BodyError, match="cut off"):
            decode(body[:at], "", coding, LIMIT)
    with pytest.raises(BodyError, match="damaged content encoding"):
        decode(body + b"<p>more\x01", "", coding, LIMIT)
    for seed in range(20):  # formats without a checksum may not detect damage, but must not return the body undecoded
        at = random.Random(seed).randrange(10, len(body) - 20)
        try:
            decode(body[:at] + random.Random(seed).randbytes(8) + body[at + 8 :], "", coding, LIMIT)
        except BodyError as error:
            assert str(error) in ("damaged content encoding", "cut off", "longer than 1 MiB")


def test_a_damaged_second_gzip_member_is_refused():
    first, second = gzip.compress(PAGE[:99]), gzip.compress(PAGE[99:])
    for damaged in (second[:-9], second[:3], b"\x1f\x8b\x09" + second[3:], b"\0" + second):
        with pytest.raises(BodyError):
            decode(first + damaged, "", "gzip", LIMIT)


def test_truncated_or_damaged_chunks_are_refused():
    encoded = chunked(PAGE)
    for at in (50, len(encoded) // 2, len(encoded) - 5):
        with pytest.raises(BodyError, match="cut off"):
            decode(encoded[:at], "chunked", "", LIMIT)
    with pytest.raises(BodyError, match="damaged chunks"):
        decode(encoded.replace(b"\r\n64\r\n", b"\r\n\xff\xff\r\n"), "chunked", "", LIMIT)
    assert decode(PAGE, "chunked", "", LIMIT) == PAGE  # not chunked


def zstd_bomb(size):
    packer = zstandard.ZstdCompressor().compressobj()
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "bomb"),
    [
        ("zstd", zstd_bomb(300 << 20)),
        ("br", brotli.compress(bytes(64 << 20), quality=1)),
        ("gzip", gzip.compress(bytes(64 << 20), 1)),
        ("deflate", bare_deflate(bytes(64 << 20))),
        ("gzip", gzip.compress(bytes(LIMIT // 2)) * 3),
    ],
)
def test_a_body_above_the_limit_is_refused_early(coding, bomb):
    began = time.process_time()
    with pytest.raises(BodyError, match="longer than 1 MiB"):
        decode(bomb, "", coding, LIMIT)
    assert time.process_time() - began < 5  # takes 0.05 s


def test_a_body_at_the_limit_is_accepted():
    for name, pack in PACKERS.items():
        assert decode(pack(PAGE), "", name, len(PAGE)) == PAGE
        with pytest.raises(BodyError, match="longer than 0 MiB"):
            decode(pack(PAGE), "", name, len(PAGE) - 1)


def test_unknown_codings_and_too_many_codings_are_refused():
    with pytest.raises(BodyError, match="content encoding rot13"):
        decode(PAGE, "", "gzip, rot13", LIMIT)
    with pytest.raises(BodyError, match="content encoding of 6 layers"):
        decode(PAGE, "", "gzip," * 6, LIMIT)
