"""The tests, in the same folders as what they test; ``runs/`` are whole runs."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
