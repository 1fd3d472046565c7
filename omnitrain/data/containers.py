"""Where files end by their own account: a decoder reads what is left of a cut file, and says nothing.

Some containers cannot say it (MPEG and elementary streams, live recordings); there, only what decoders find counts.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from omnitrain.data.sample import BadSample


def check_whole(data: bytes, name: str, kind: str) -> None:
    """Raises BadSample: ``*_corrupt`` for a file that ends before its container says so."""
    declared = _declared_bytes(data, name)
    if declared is None or len(data) < declared:
        missing = "no end is found" if declared is None else f"{len(data)} bytes, the header says {declared}"
        raise BadSample(f"{kind}_corrupt", f"cut off: {missing}")
    if name == "ogg":
        for at, end in ogg_pages(data, kind):
            if _ogg_checksum(data[at : at + 22] + bytes(4) + data[at + 26 : end]) != data[at + 22 : at + 26]:
                raise BadSample(f"{kind}_corrupt", f"damaged: the Ogg page at byte {at} has another checksum")
    if name == "mpegts" and len(data) % 188:
        raise BadSample(f"{kind}_corrupt", "cut off within a packet of the transport stream")


def _declared_bytes(data: bytes, name: str) -> int | None:
    """Where the file ends by its header, 0 if that says nothing (0 and the largest number mark a live stream); None
    where what must be in it does not come."""
    if name == "avi":
        return struct.unpack_from("<I", data, 4)[0]
    if name == "w64" or data[:4] == b"RF64":
        return struct.unpack_from("<Q", data, 16 if name == "w64" else 20)[0]
    if name == "au":
        begin, size = struct.unpack_from(">II", data, 4)
        return begin + size if size < _LIVE else 0
    if name == "asf":  # its header, then its data, of nearly no bytes in a live recording
        header = struct.unpack_from("<Q", data, 16)[0]
        return header + struct.unpack_from("<Q", data, header + 16)[0]
    if name == "matroska":
        header, at = _ebml_size(data, 4)
        size, begin = _ebml_size(data, at + header + 4)
        return begin + size
    if name == "gif":
        return _gif_end(data)
    at = {"flv": 13, "wav": 12, "aiff": 12, "caf": 8, "mp4": 0}.get(name, len(data))
    while at < len(data):
        if name == "flv":
            at += 15 + int.from_bytes(data[at + 1 : at + 4])
        elif name == "mp4" and not data[at + 4 : at + 8].isalnum():  # no box: something hung on behind the last
            return at
        elif name == "mp4":
            size = int.from_bytes(data[at : at + 4])
            size = int.from_bytes(data[at + 8 : at + 16]) if size == 1 else size
            if size < 8:  # 0: up to the end of the file
                return None if size else 0
            at += size
        else:
            chunk, size = struct.unpack_from({"wav": "<4sI", "aiff": ">4sI", "caf": ">4sQ"}[name], data, at)
            at += 12 if name == "caf" else 8
            if chunk in (b"data", b"SSND"):
                return at + size if size < _LIVE else 0
            at += size + (size % 2 if name != "caf" else 0)
    return at if name in ("flv", "mp4") else None if name in ("wav", "aiff", "caf") else 0


def _gif_end(data: bytes) -> int | None:
    """Behind the trailer of an animation; None where its blocks do not follow each other."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    while (block := data[at]) != 0x3B:
        if block == 0x2C:  # a picture: its place, perhaps colours of its own, and the size of its first codes
            at += 11 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 128 else 0)
        elif block == 0x21:
            at += 2
        else:
            return None
        while size := data[at]:
            at += size + 1
        at += 1
    return at + 1


_LIVE = 0xFFFFFF00


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """The number of variable length at byte `at` (RFC 8794, section 4; 0 for an unknown one), and where it ends."""
    length = 9 - data[at].bit_length()
    size = int.from_bytes(data[at : at + length]) & ((1 << 7 * length) - 1)
    return (0 if size == (1 << 7 * length) - 1 else size), at + length


def ogg_pages(data: bytes, kind: str = "audio") -> Iterator[tuple[int, int]]:
    """Where each page begins and ends. Raises BadSample: ``*_corrupt`` where one is not whole."""
    at = 0
    while at < len(data):
        if data[at : at + 4] != b"OggS":
            raise BadSample(f"{kind}_corrupt", f"no Ogg page at byte {at}")
        segments = data[at + 26] if at + 27 <= len(data) else 0
        end = at + 27 + segments + sum(data[at + 27 : at + 27 + segments])
        if at + 27 > len(data) or end > len(data):
            raise BadSample(f"{kind}_corrupt", f"cut off: the Ogg page at byte {at} is incomplete")
        yield at, end
        at = end


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> bytes:
    """RFC 3533, section 6: zlib's checksum, with the bits in the other order and no inversion."""
    return (zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF).to_bytes(4).translate(_REVERSED)
