"""Damage to a file's bytes, anywhere or aimed at a part that a reader trusts. The same seed does the same damage."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from functools import cache
from random import Random

from fuzz_anatomy import Part, find_parts

MOST_INSERTED = 4096
SHARE_BOMBS = 0.02
JPEG_MARKERS = (0xC0, 0xC1, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE, 0x00, 0x51, 0x52, 0x90, 0x93)
NUMBERS_IN_TEXT = (b"nan", b"inf", b"-1", b"0", b"1e999", b"-0.0", b"99999999999999999999", b"0.0000001", b"4294967296")
STRANGE_TEXT = (
    *(b"\0", b"\xff\xfe", b"\xc3\x28", b"|", b"=", b"\r\n", b"\\", b"%s%n", b"<", b"&x;", b"]]>", b"\xf0\x9f\x94\xac"),
    *(b"A" * 1000, b'<?xml version="1.0"?>', b"<!DOCTYPE a [<!ENTITY b '" + b"c" * 40 + b"'><!ENTITY d '&b;&b;&b;'>]>"),
)
ENTITY_BOMB = (
    '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a0 "aaaaaaaaaa">'
    + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    + "]><OME>&a9;</OME>"
).encode()
BOMB_MB = 3072
Damage = Callable[[Random, bytearray], str]


def damage(rng: Random, data: bytes) -> tuple[bytes, list[str]]:
    """A damaged copy of a file and what was done to it: one to four operations, most of them aimed."""
    changed, done = bytearray(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        parts = find_parts(bytes(changed)) if rng.random() < 0.7 else []
        if parts and rng.random() < SHARE_BOMBS:
            done.append(plant_bomb(rng, changed, parts))
        elif parts:
            done.append(spoil_part(rng, changed, choose_part(rng, parts)))
        elif changed:
            done.append(rng.choice(ANYWHERE)(rng, changed))
    return bytes(changed), done


def choose_part(rng: Random, parts: list[Part]) -> Part:
    """A part of a field outside the tiles, a part that holds a kind of value chosen evenly among kinds, or any part."""
    way, among = rng.random(), parts
    if way < 0.5:
        fields = sorted({part.field for part in parts if not part.in_tile})
        field = rng.choice(fields)
        among = [part for part in parts if part.field == field]
    elif way < 0.8:
        holds = rng.choice(sorted({part.holds for part in parts}))
        among = [part for part in parts if part.holds == holds]
    return rng.choice(among)


def spoil_part(rng: Random, data: bytearray, part: Part) -> str:
    """Apply damage of a kind that suits what the part holds."""
    place = slice(part.start, part.start + part.size)
    before = bytes(data[place])
    if part.holds == "number":
        after = other_number(rng, before, part, len(data))
    elif part.holds == "rational":
        half = rng.choice((slice(0, 4), slice(4, 8)))
        number = bytearray(before)
        number[half] = other_number(rng, before[half], part, len(data))
        after = bytes(number)
    elif part.holds == "marker":
        after = b"\xff" + bytes([rng.choice(JPEG_MARKERS)])
    elif part.holds == "text":
        after = other_text(rng, before)
    else:
        inner = bytearray(before)
        what = rng.choice(WITHIN)(rng, inner)
        after = bytes(inner)
        data[place] = after
        return f"{part.name}: {what}"
    data[place] = after
    return f"{part.name}: {shown(before)} became {shown(after)}"


def plant_bomb(rng: Random, data: bytearray, parts: list[Part]) -> str:
    """Point a tile to a few megabytes after all others, which inflate to more memory than anybody should allocate."""
    named = {part.name: part for part in parts}
    starts = [name for name in named if "tag 324: value " in name and name.replace("tag 324", "tag 325") in named]
    if not starts:
        return cut_off(rng, data)
    name = rng.choice(starts)
    bomb = inflating_stream()
    for part, value in ((named[name], len(data)), (named[name.replace("tag 324", "tag 325")], len(bomb))):
        order = "little" if part.order == "<" else "big"
        data[part.start : part.start + part.size] = (value % 2 ** (8 * part.size)).to_bytes(part.size, order)
    data += bomb
    return f"{name}: a stream that inflates to {BOMB_MB} MB"


@cache
def inflating_stream() -> bytes:
    """A zlib stream of zeros, made of one megabyte's block again and again."""
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + again * (BOMB_MB - 1)


def other_number(rng: Random, before: bytes, part: Part, file_size: int) -> bytes:
    """A number of the same width: a limit, a neighbour, a multiple, an offset in the file or beyond, or any."""
    order, bits = ("little" if part.order == "<" else "big"), 8 * len(before)
    old = int.from_bytes(before, order)
    value = rng.choice(
        (
            *(0, 1, 2, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, old + 1, old - 1, old * 2, old // 2),
            *(old ^ (1 << rng.randrange(bits)), rng.randrange(file_size), file_size, file_size - 1, file_size + 1),
            *(rng.getrandbits(bits), rng.randrange(1, 20), rng.choice((3, 4, 5, 7, 16, 34712, 33005, 50002, 65000))),
        )
    )
    return (value % 2**bits).to_bytes(len(before), order)


def other_text(rng: Random, before: bytes) -> bytes:
    """Text of the same length, so that only the text is damaged: a number or a word changed, text let in or cut out."""
    way = rng.randrange(6)
    after = before
    numbers = list(re.finditer(rb"\d+(\.\d+)?", before))
    if way <= 1 and numbers:
        match = rng.choice(numbers)
        after = before[: match.start()] + rng.choice(NUMBERS_IN_TEXT) + before[match.end() :]
    elif way == 2:
        at = rng.randrange(len(before) + 1)
        after = before[:at] + rng.choice(STRANGE_TEXT) + before[at:]
    elif way == 3:
        at = rng.randrange(len(before))
        after = before[:at] + before[at + rng.randint(1, max(1, len(before) // 4)) :]
    elif way == 4 and len(before) > len(ENTITY_BOMB):
        after = ENTITY_BOMB
    else:
        changed = bytearray(before)
        rng.choice(WITHIN)(rng, changed)
        after = bytes(changed)
    return after[: len(before)].ljust(len(before), b"\0" if rng.random() < 0.5 else b" ")


def shown(data: bytes) -> str:
    return data.hex() if len(data) <= 8 else repr(data[:60])


def stretch(rng: Random, data: bytearray, most: int | None = None) -> tuple[int, int]:
    """Start and end of a run of bytes; short ones as likely as long ones."""
    size = min(len(data), most or len(data), max(1, int(2 ** rng.uniform(0, max(1, len(data)).bit_length()))))
    start = rng.randrange(len(data) - size + 1)
    return start, start + size


def flip_bits(rng: Random, data: bytearray) -> str:
    count = rng.choice((1, 1, 2, 8, 64))
    places = [rng.randrange(len(data)) for _ in range(count)]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    return f"bits flipped at {places[:8]}"


def overwrite(rng: Random, data: bytearray) -> str:
    start, end = stretch(rng, data, MOST_INSERTED)
    data[start:end] = rng.randbytes(end - start)
    return f"bytes {start} to {end} overwritten"


def zero(rng: Random, data: bytearray) -> str:
    start, end = stretch(rng, data)
    fill = rng.choice((0, 0, 0xFF))
    data[start:end] = bytes([fill]) * (end - start)
    return f"bytes {start} to {end} filled with {fill}"


def cut_off(rng: Random, data: bytearray) -> str:
    size = rng.choice((rng.randrange(len(data)), len(data) - rng.randint(1, min(64, len(data)))))
    del data[size:]
    return f"cut off at {size}"


def cut_out(rng: Random, data: bytearray) -> str:
    start, end = stretch(rng, data)
    del data[start:end]
    return f"bytes {start} to {end} cut out"


def swap(rng: Random, data: bytearray) -> str:
    size = rng.choice((1, 2, 4, 12, 64, 512))
    if len(data) < 2 * size:
        return flip_bits(rng, data)
    one, other = (rng.randrange(len(data) - size + 1) for _ in range(2))
    first, second = bytes(data[one : one + size]), bytes(data[other : other + size])
    data[one : one + size], data[other : other + size] = second, first
    return f"{size} bytes at {one} and {other} swapped"


def duplicate(rng: Random, data: bytearray) -> str:
    start, end = stretch(rng, data, MOST_INSERTED)
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[start:end]
    return f"bytes {start} to {end} inserted again at {at}"


def insert(rng: Random, data: bytearray) -> str:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 64, MOST_INSERTED))
    data[at:at] = rng.randbytes(size)
    return f"{size} bytes inserted at {at}"


def copy_over(rng: Random, data: bytearray) -> str:
    start, end = stretch(rng, data, MOST_INSERTED)
    at = rng.randrange(len(data) - (end - start) + 1)
    data[at : at + end - start] = bytes(data[start:end])
    return f"bytes {start} to {end} copied over those at {at}"


def lose_blocks(rng: Random, data: bytearray) -> str:
    """Blocks lost by a disk or by a broken transfer."""
    block = rng.choice((512, 4096))
    count = max(1, len(data) // block)
    lost = [rng.randrange(count) for _ in range(rng.choice((1, 2, 8)))]
    for number in lost:
        place = slice(number * block, min((number + 1) * block, len(data)))
        data[place] = bytes(place.stop - place.start)
    return f"blocks {lost} of {block} bytes are zero"


ANYWHERE: tuple[Damage, ...] = (
    *(flip_bits, flip_bits, overwrite, zero, cut_off, cut_out, swap, duplicate, insert, copy_over, lose_blocks),
)
# Within a part: the file keeps its length, so that everything else stays where it is.
WITHIN: tuple[Damage, ...] = (flip_bits, overwrite, zero, swap, copy_over)
