"""P's responses: reading, checking, repairing and writing their files."""
