"""Compiles C text into a shared library once per machine and loads it.

The library lies in $XDG_CACHE_HOME/deqmpc (~/.cache/deqmpc) under a name made of the text, the flags, the compiler's
version and the processor's instruction set, so a changed file, compiler or machine never meets an old library. It
is written beside its place and renamed onto it: two processes that build at once both end with a whole file.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

FLAGS = ('-O3', '-march=native', '-std=gnu11', '-fno-math-errno', '-fno-trapping-math', '-ffp-contract=fast',
         '-fPIC', '-shared')


class NoCompiler(RuntimeError):
    """There is no C compiler, or it refuses the text."""


def load(text: str) -> ctypes.CDLL:
    """The library made of `text`. Raises NoCompiler where it can be neither found nor built."""
    compiler = _compiler()
    if compiler is None:
        raise NoCompiler('no C compiler found (looked for $CC, cc, gcc, clang)')
    try:
        version = subprocess.run([compiler, '--version'], capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompiler(f'{compiler} --version: {error}') from error
    key = hashlib.sha256('\0'.join([text, *FLAGS, version.decode(errors='replace'), _processor()]).encode()).hexdigest()
    library = _folder() / f'{key[:32]}.so'
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:  # cut off by a full disk, or from another C library
            log.warning('%s cannot be loaded (%s); building it again', library, error)
    _compile(compiler, text, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NoCompiler(f'{library} was built and cannot be loaded: {error}') from error


def cached_text(parts: Sequence[str], make: Callable[[], str], renew: bool = False) -> str:
    """The text that `make` returns for these `parts`; kept in the cache, since it may take seconds to make."""
    path = _folder() / f'{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.c'
    if path.exists() and not renew:
        return path.read_text()
    text = make()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='build-') as folder:
        made = Path(folder) / 'text.c'
        made.write_text(text)
        os.replace(made, path)
    return text


def available() -> bool:
    """Whether there is a C compiler."""
    return _compiler() is not None


def _compiler() -> str | None:
    return shutil.which(os.environ.get('CC', 'cc')) or shutil.which('gcc') or shutil.which('clang')


def _compile(compiler: str, text: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix='build-') as folder:
        source, made = Path(folder) / 'solver.c', Path(folder) / 'solver.so'
        source.write_text(text)
        log.info('compiling the real-time solver into %s: a few seconds, once', library)
        try:
            done = subprocess.run([compiler, *FLAGS, str(source), '-o', str(made), '-lm'], capture_output=True,
                                  text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise NoCompiler(f'{compiler}: {error}') from error
        if done.returncode:
            raise NoCompiler(f'{compiler} ended with {done.returncode}: {done.stderr.strip()[:500]}')
        os.replace(made, library)


def _folder() -> Path:
    """The cache, or a folder of this user under the temporary directory where home cannot be written."""
    home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'deqmpc'
    for folder in (home, Path(tempfile.gettempdir()) / f'deqmpc-{os.getuid()}'):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            owner = folder.stat().st_uid
        except OSError:
            continue
        if owner == os.getuid() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise NoCompiler(f'neither {home} nor the temporary directory can be written')


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    wanted = ('model name', 'flags', 'Features', 'CPU part')
    own = dict(line.split(':', 1) for line in lines if ':' in line)  # of the last core
    return platform.machine() + '\n'.join(v for k, v in own.items() if k.strip() in wanted)
