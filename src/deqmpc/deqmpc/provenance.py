"""Which code and which files made a result."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the code, with `-dirty` where it was changed; 'unknown' outside a repository."""
    try:
        answer = subprocess.run(['git', 'describe', '--always', '--abbrev=40', '--dirty'], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return 'unknown'
    return answer.stdout.strip()


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
