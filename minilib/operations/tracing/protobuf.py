"""Protobuf on the wire, as much of it as a trace needs: a field is its number and wire type, then its value.

Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import struct

_VARINT, _FIXED64, _LENGTH = 0, 1, 2
_WORD = 2**64


def number_field(field: int, value: int) -> bytes:
    """A whole number of up to 64 bits; a negative one as its two's complement, as int64 has it."""
    if not -(_WORD // 2) <= value < _WORD:
        raise ValueError(f"field {field} takes 64 bits, got {value}")
    return _varint(field << 3 | _VARINT) + _varint(value % _WORD)


def fixed64_field(field: int, value: int) -> bytes:
    """A number of 64 bits without a sign, always 8 bytes."""
    return _varint(field << 3 | _FIXED64) + struct.pack("<Q", value)


def bytes_field(field: int, value: bytes) -> bytes:
    """Bytes, or a message within a message."""
    return _varint(field << 3 | _LENGTH) + _varint(len(value)) + value


def text_field(field: int, value: str) -> bytes:
    """Text as UTF-8."""
    return bytes_field(field, value.encode(errors="replace"))


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
