"""`deqmpc COMMAND ...`: a thin dispatcher.

A command is an entry point in the group `deqmpc.commands`: a function `main(argv) -> exit status`
whose docstring's first line is its help. It lives in the package that owns it.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

GROUP = 'deqmpc.commands'


def main(argv: list[str] | None = None) -> int:
    """Run one command; exit status 2 on wrong usage, else the command's own."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {e.name: e for e in entry_points(group=GROUP)}
    if not argv or argv[0] in ('-h', '--help'):
        print('usage: deqmpc COMMAND [options]\n\ncommands (deqmpc COMMAND --help tells more):')
        for name in sorted(commands):
            summary = (commands[name].load().__doc__ or '').strip().splitlines()
            print(f'  {name:<12} {summary[0] if summary else ""}')
        return 0 if argv else 2
    if argv[0] not in commands:
        print(f'deqmpc: unknown command {argv[0]!r}; expected one of: {", ".join(sorted(commands))}',
              file=sys.stderr)
        return 2
    return commands[argv[0]].load()(argv[1:]) or 0


if __name__ == '__main__':
    sys.exit(main())
