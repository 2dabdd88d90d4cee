"""Files that a reader meets whole or not at all: written beside their name, then renamed onto it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The place, in the same folder, to write what shall become `path` at the end of the block, if that raises
    nothing. One writer at a time."""
    part = path.with_name(path.name + '.part')
    yield part
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`."""
    with replacing(path) as part:
        part.write_text(text)
