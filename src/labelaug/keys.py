"""The name of a result: a hash of its description."""

import hashlib
import json
from dataclasses import MISSING, fields


def description_key(description) -> str:
    """First 12 hex digits of the SHA-256 of a frozen dataclass in canonical form.

    Canonical: class name and the fields that differ from their default, as JSON with sorted keys. A field added later
    with a neutral default therefore leaves every older key, and the results filed under it, alone.
    """
    return hashlib.sha256(json.dumps(_canonical(description), sort_keys=True).encode()).hexdigest()[:12]


def _canonical(value):
    if hasattr(value, "__dataclass_fields__"):
        kept = {}
        for field in fields(value):
            current = getattr(value, field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if current != default:
                kept[field.name] = _canonical(current)
        return {"type": type(value).__name__, **kept}
    if isinstance(value, tuple | list):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 are one strength
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a description holds numbers, strings, tuples and dataclasses, got {type(value).__name__}")
