"""Damaged bytes for tests/test_fuzz.py: every kind of damage is a function of (bytes, rng).

Bytes: flipped, overwritten, inserted, removed, repeated, zeroed, cut, appended to. JSON, in a file,
in a line of one or in a safetensors header: a value of another type or size, a key that is gone,
renamed or new; lines that are gone, twice or in another order.
"""
import json
from collections.abc import Callable
from random import Random

DEEP: object = []
for _ in range(60):
    DEEP = [DEEP]
VALUES = [None, True, False, 0, 1, -1, 0.5, -1e300, 1000, 2 ** 31, 2 ** 62, 2 ** 64, -10 ** 400,
          float("inf"), float("nan"), "", "x", "1", "\x1b[2J\u202e\x00", "../../etc/passwd",
          "x" * 3000, [], [None], ["", ""], [0] * 300, {}, {"": 0}, DEEP, "\U0001f468\u200d\u0301"]

Damage = Callable[[bytes, Random], bytes]


# ---- bytes --------------------------------------------------------------------------------------

def damaged_bytes(raw: bytes, rng: Random) -> bytes:
    """One to three of eight kinds of damage."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randrange(len(raw) + 1)
        end = min(len(raw), start + rng.choice((1, 1, 2, 8, 64, 1000)))
        kind = rng.randrange(8)
        part = raw[start:end]
        if kind == 0:
            part = bytes(byte ^ 1 << rng.randrange(8) for byte in part[:1]) + part[1:]
        elif kind == 1:
            part = rng.randbytes(len(part))
        elif kind == 2:
            part += rng.choice((rng.randbytes(3), b"\x00", b"\n", b"\xff\xfe", b"[" * 9000, b'"'))
        elif kind == 3:
            part = b""
        elif kind == 4:
            part *= 2
        elif kind == 5:
            part = bytes(len(part))
        elif kind == 6:
            return raw[:start]
        else:
            return raw + rng.choice((rng.randbytes(9), b"\n", b"{", raw))
        raw = raw[:start] + part + raw[end:]
    return raw


# ---- JSON ---------------------------------------------------------------------------------------

def places(value: object) -> list[tuple[object, object]]:
    """(container, key or index) of every value inside a JSON value."""
    found, containers = [], [value]
    for container in containers:                         # it grows on the way
        keys = (range(len(container)) if isinstance(container, list)
                else list(container) if isinstance(container, dict) else ())
        found += [(container, key) for key in keys]
        containers += [container[key] for key in keys]
    return found


def damaged_json(raw: bytes, rng: Random) -> bytes:
    """A JSON value with one value, or one key, of something else."""
    value = json.loads(raw)
    found = places(value)
    if not found or rng.random() < 0.03:
        return json.dumps(rng.choice(VALUES)).encode()
    container, key = rng.choice(found)
    kind = rng.randrange(10)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(("", "x", "label", "step", key + " "))] = container.pop(key)
    elif kind == 2 and isinstance(container[key], (int, float)):
        container[key] += rng.choice((-1, 1, 1e-9))
    elif kind == 3:
        container[key] = rng.choice((str(container[key]), [container[key]], {"a": container[key]}))
    else:
        container[key] = rng.choice(VALUES)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()


def damaged_lines(raw: bytes, rng: Random) -> bytes:
    """JSON lines with one of them damaged, gone, twice or elsewhere."""
    lines = raw.splitlines(keepends=True)
    number, kind = rng.randrange(len(lines)), rng.randrange(8)
    if kind == 0:
        del lines[number]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[number])
    elif kind == 2:
        rng.shuffle(lines)
    else:
        lines[number] = damaged_json(lines[number], rng) + b"\n"
    return b"".join(lines)


def damaged_header(raw: bytes, rng: Random) -> bytes:
    """A safetensors file whose JSON header, or the number of its bytes, is another one."""
    size = int.from_bytes(raw[:8], "little")
    header, rest = raw[8:8 + size], raw[8 + size:]
    if rng.random() < 0.2:
        size = rng.choice((0, 1, size - 1, size + 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1))
        return size.to_bytes(8, "little") + header + rest
    header = damaged_json(header, rng)
    return len(header).to_bytes(8, "little") + header + rest


def damage_of(name: str) -> list[Damage]:
    """The kinds of damage for a file of this name; bytes for every one of them."""
    kinds = {".json": [damaged_json] * 3, ".jsonl": [damaged_lines] * 3,
             ".safetensors": [damaged_header]}
    return [damaged_bytes, *next((found for end, found in kinds.items() if name.endswith(end)), [])]
