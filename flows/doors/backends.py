"""Which backends there are: ``python -m flows.backends``."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.commands.backends import main

    raise SystemExit(main())
