"""Decode the body of an HTTP message: transfer and content codings (RFC 9112 section 7, RFC 9110 section 8.4).

The input is decoded in fixed steps up to a limit of the output: time is linear in input and output, and a small body
cannot fill the memory. A body is returned complete or not at all.
"""

from collections.abc import Callable
import re
from typing import Any
import zlib

import zstandard

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_NO_CODING = ("identity", "none", "utf-8", "")  # values that servers send for a body that is not encoded
_MAX_CODINGS = 5  # each can expand to the limit
# Bytes per decoding call: zstandard does not limit the output of a call, and 4 bytes can expand to 128 KiB.
_STEP = 256
_MAX_WINDOW = 1 << 31  # as of zstd --ultra --long=31; only the used part of a window takes memory
_PADDING = b"\0\r\n\t "  # may follow the last gzip member
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\n]*)?\r?\n")
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


class BodyError(Exception):
    """A body cannot be decoded to its end. The message is the reason, in a few words."""


def decode(body: bytes, transfer: str, content: str, limit: int) -> bytes:
    """The content of a message body.

    transfer, content  values of Transfer-Encoding and Content-Encoding: codings in the order in which they were applied
    limit              maximum bytes of the content

    Some servers, and crawlers that decode bodies but keep the headers, state a coding that was not applied: a body that
    clearly lacks the coding is returned unchanged.
    Raises BodyError if the body is cut off, damaged, longer than the limit, or in an unknown coding.
    """
    codings = [name for value in (content, transfer) for name in value.lower().replace(",", " ").split()]
    codings = [name.removeprefix("x-") for name in codings if name not in _NO_CODING]
    if len(codings) > _MAX_CODINGS:
        raise BodyError(f"content encoding of {len(codings)} layers")
    for name in reversed(codings):
        if name not in _DECODERS:
            raise BodyError(f"content encoding {name[:20]}")
        try:
            body = _DECODERS[name](body, limit)
        except BodyError:
            if name == "chunked" or not _is_uncompressed(body):
                raise
    return body


def _is_uncompressed(body: bytes) -> bool:
    """Whether a body is text that was never compressed."""
    return not _CONTROL.search(body, 0, 1024) and not body.startswith(_ZSTD)


def _dechunk(body: bytes, limit: int) -> bytes:
    parts, at = [], 0
    while header := _CHUNK.match(body, at):
        size = int(header[1], 16)
        if not size:
            return b"".join(parts)
        at = header.end() + size
        parts.append(body[header.end() : at])
        at += 2 if body[at : at + 2] == b"\r\n" else 1 if body[at : at + 1] == b"\n" else 0
    if not parts:
        return body  # not chunked
    raise BodyError("cut off" if at >= len(body) else "damaged chunks")


def _inflate(body: bytes, limit: int) -> bytes:
    """Gzip, zlib or raw deflate data: servers send any of them as "deflate", and some as "gzip"."""
    if body.startswith(_GZIP):
        return _decode_stream(body, lambda: zlib.decompressobj(31), limit, zlib.error, _GZIP)
    has_zlib_header = len(body) > 1 and body[0] & 0x8F == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    return _decode_stream(body, lambda: zlib.decompressobj(15 if has_zlib_header else -15), limit, zlib.error)


def _decode_zstd(body: bytes, limit: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    return _decode_stream(body, lambda: _ZstdDecoder(decompressor.decompressobj()), limit, zstandard.ZstdError, _ZSTD)


def _decode_brotli(body: bytes, limit: int) -> bytes:
    import brotli  # in the extra `curate`

    return _decode_stream(body, lambda: _BrotliDecoder(brotli.Decompressor()), limit, brotli.error)


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "chunked": _dechunk,
    "gzip": _inflate,
    "deflate": _inflate,
    "zstd": _decode_zstd,
    "br": _decode_brotli,
}


class _ZstdDecoder:
    """A zstandard frame with the interface of zlib's decompressor."""

    def __init__(self, frame: Any):
        self._frame = frame

    def decompress(self, data: bytes, _: int) -> bytes:
        return self._frame.decompress(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frame, name)


class _BrotliDecoder:
    """A Brotli stream with the interface of zlib's decompressor."""

    unused_data = b""

    def __init__(self, stream: Any):
        self._stream = stream

    def decompress(self, data: bytes, size: int) -> bytes:
        return self._stream.process(data, output_buffer_limit=size)

    @property
    def eof(self) -> bool:
        return self._stream.is_finished()


def _decode_stream(
    body: bytes, make_decoder: Callable[[], Any], limit: int, error: type[Exception], magic: bytes = b""
) -> bytes:
    """The content of one stream; with `magic`, also of the streams after it that begin with these bytes."""
    decoder, parts, size, at = make_decoder(), [], 0, 0
    while not decoder.eof:
        if at >= len(body):
            raise BodyError("cut off")
        step = body[at : at + _STEP]
        try:
            parts.append(decoder.decompress(step, limit - size + 1))
        except error:
            raise BodyError("damaged content encoding") from None
        size += len(parts[-1])
        if size > limit:
            raise BodyError(f"longer than {limit >> 20} MiB")
        at += len(step) - len(decoder.unused_data)
        if decoder.eof and magic and body.startswith(magic, at):
            decoder = make_decoder()
    if body[at:].strip(_PADDING):
        raise BodyError("damaged content encoding")
    return b"".join(parts)
