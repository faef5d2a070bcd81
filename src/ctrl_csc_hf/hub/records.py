"""Reading what a checkpoint holds: what is damaged is told by the file's name, with what to do about it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# Of files that are damaged, or hold something else than what was written.
DAMAGED = (
    OSError, SafetensorError, LookupError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError,
    UnicodeDecodeError,
)  # fmt: skip


@contextmanager
def readable(path: Path, remedy: str, errors: tuple[type[Exception], ...] = DAMAGED) -> Iterator[None]:
    """Turns `errors` into a ValueError that names the file and ends with `remedy`, what the user can do."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{path} cannot be read, {error!r}: {remedy}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The entries of a JSON file; where it has none, one of `DAMAGED`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"it must hold an object, but holds {content!r}")
    return content
