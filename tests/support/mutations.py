"""Seeded damage to files: JSON values of other types, missing and additional keys, bytes cut and flipped."""

import json
import random

VALUES = (
    None, True, False, 0, -1, 1.5, 10**30, 10**400, 2**63, 2**64 - 1, "", "x", "../../etc", "a\x00b", "\ud800", [], {},
    [1], {"a": 1}, [[]], "9" * 5000, 1e308, -0.5,
)  # fmt: skip


def mutate_json(content, rng: random.Random):
    """Change a value, remove a key, or add one, anywhere in a JSON value."""
    places = list(_places(content))
    if not places or rng.random() < 0.03:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    action = rng.random()
    if action < 0.6:
        parent[key] = rng.choice(VALUES)
    elif action < 0.8:
        del parent[key]
    elif isinstance(parent, dict):
        parent[rng.choice(["new", "", "key", "samples", key + "2"])] = rng.choice(VALUES)
    else:
        parent.insert(key, rng.choice([*VALUES, parent[key]]))
    return content


def _places(value):
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip or insert bytes."""
    action, at = rng.randrange(4), rng.randrange(len(data)) if data else 0
    if action == 0:
        return data[:at]
    if action == 1 and data:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if action == 2:
        return data[:at] + rng.randbytes(3) + data[at:]
    return b"" if rng.random() < 0.3 else data[at:]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damage a file of JSON, or of one JSON value per line."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    try:
        return json.dumps(mutate_json(json.loads(data), rng)).encode()
    except ValueError:
        lines = data.splitlines() or [b"{}"]
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(mutate_json(json.loads(lines[number]), rng)).encode()
        return b"\n".join(lines) + b"\n"
