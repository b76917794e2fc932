"""Which files lie in the subfolders of a remote folder, without a request for each."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from backends.storage.files import StoredFile, list_remote

# (process, folder, subfolder) → how often this process changed it.
_changes: dict[tuple[int, str, str], int] = {}
_changes_lock = threading.Lock()


class RemoteListing:
    """One listing of the whole folder, made when it is first needed; what this process changes is listed anew.

    What other processes write later is not seen.

    Parameters
    ----------
    root : Path
    suffix : str
        Of the files that matter.
    """

    def __init__(self, root: Path, suffix: str) -> None:
        self._root = root
        self._suffix = suffix
        self._files: dict[str, list[StoredFile]] | None = None
        self._seen: dict[str, int] = {}

    def note_change(self, subfolder: str) -> None:
        """Say that a subfolder was written to, or removed from, by this process."""
        place = (os.getpid(), str(self._root), subfolder)
        with _changes_lock:
            _changes[place] = _changes.get(place, 0) + 1

    def subfolders(self) -> list[str]:
        """The names of all subfolders with files, sorted."""
        return sorted(name for name in self._all() if self.files_of(name))

    def files(self) -> list[StoredFile]:
        """All files in all subfolders."""
        return [file for name in self._all() for file in self.files_of(name)]

    def files_of(self, subfolder: str) -> list[StoredFile]:
        """The files in one subfolder, sorted."""
        files = self._all()
        now = self._count(subfolder)
        if self._seen.get(subfolder, 0) != now:
            files[subfolder] = self._matching(list_remote(self._root / subfolder))
            self._seen[subfolder] = now
        return files.get(subfolder, [])

    def _count(self, subfolder: str) -> int:
        with _changes_lock:
            return _changes.get((os.getpid(), str(self._root), subfolder), 0)

    def _all(self) -> dict[str, list[StoredFile]]:
        if self._files is None:
            process, root = os.getpid(), str(self._root)
            with _changes_lock:
                seen = {name: n for (pid, place, name), n in _changes.items() if (pid, place) == (process, root)}
            files: dict[str, list[StoredFile]] = {}
            for file in self._matching(list_remote(self._root)):
                if file.path.parent.parent == self._root:
                    files.setdefault(file.path.parent.name, []).append(file)
            self._seen, self._files = seen, files
        return self._files

    def _matching(self, files: list[StoredFile]) -> list[StoredFile]:
        return [file for file in files if file.path.name.endswith(self._suffix)]
