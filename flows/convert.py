"""``python -m flows.convert``: other people's files of responses in the form of the documentation, one per prompt."""

from __future__ import annotations

if __name__ == "__main__":
    from flows.commands.convert import main

    raise SystemExit(main())
