"""Rows of a job on their way into its output folder, with everything that can befall a file."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from typing import IO, Any

import numpy as np

from tests.vertex_world.faults import Faults
from tests.vertex_world.storage import ObjectStore


class RowSpool:
    """Output lines on disk, and where each of them lies; nothing large is kept in memory."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()
        self._spans: list[tuple[int, int, str | None]] = []

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, line: dict[str, Any], bought: str | None) -> None:
        """Keep one line; ``bought`` is the request's hash if the row was answered."""
        data = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        offset = self._file.seek(0, 2)
        self._file.write(data + b"\n")
        self._spans.append((offset, len(data) + 1, bought))

    def write(self, objects: ObjectStore, folder: str, faults: Faults, job_id: str) -> Counter[str]:
        """Write the folder; returns the hashes of the answered rows that can be read there."""
        order = self._order(faults, job_id)
        bought = Counter(span[2] for span in self._spans if span[2] is not None)
        names = _file_names(faults)
        for index, name in enumerate(names):
            share = order[index :: len(names)]
            cut = self._cut(faults, share) if index == len(names) - 1 else 0
            if cut and order.count(share[-1]) == 1 and (lost := self._spans[share[-1]][2]) is not None:
                bought[lost] -= 1
            self._write_file(objects, f"{folder}/{name}", share, cut)
        if faults.incremental_siblings:
            faults.count("incremental_siblings")
            objects.write(f"{folder}/incremental_predictions.jsonl", _wrong_lines(self._lines(order)))
            objects.write(f"{folder}/incremental_predictions-00000-of-00001.jsonl", b'{"status":"half a li')
        return +bought

    def _order(self, faults: Faults, job_id: str) -> list[int]:
        order = list(range(len(self)))
        order += [index for index in order if faults.hits(faults.duplicate_rate, "duplicate", job_id, index)]
        if faults.shuffle_rows:
            faults.count("shuffle_rows")
            np.random.default_rng([faults.seed, len(order)]).shuffle(order)
        return order

    def _cut(self, faults: Faults, share: list[int]) -> int:
        if not (faults.truncate_last_line and share):
            return 0
        faults.count("truncate_last_line")
        return max(2, self._spans[share[-1]][1] // 2)

    def _write_file(self, objects: ObjectStore, uri: str, share: list[int], cut: int) -> None:
        if share == list(range(len(self))) and not cut:
            self._file.seek(0)
            objects.write(uri, self._file)
            return
        with tempfile.TemporaryFile() as target:
            for index in share:
                target.write(self._line(index))
            if cut:
                target.truncate(target.tell() - cut)
            target.seek(0)
            objects.write(uri, target)

    def _line(self, index: int) -> bytes:
        offset, length, _ = self._spans[index]
        self._file.seek(offset)
        return self._file.read(length)

    def _lines(self, order: list[int]) -> list[bytes]:
        return [self._line(index) for index in order[:100]]

    def close(self) -> None:
        self._file.close()


def _file_names(faults: Faults) -> list[str]:
    if not faults.shards:
        return ["predictions.jsonl"]
    faults.count("shards")
    return [faults.shard_name.format(index=index, count=faults.shards) for index in range(faults.shards)]


def _wrong_lines(lines: list[bytes]) -> bytes:
    """The same rows with other probabilities: whoever reads them gets wrong numbers."""
    wrong: list[bytes] = []
    for line in lines:
        row = json.loads(line)
        for candidate in (row.get("response") or {}).get("candidates", []):
            for step in candidate.get("logprobsResult", {}).get("topCandidates", []):
                for token in step["candidates"]:
                    token["logProbability"] = -1.0
        wrong.append(json.dumps(row).encode() + b"\n")
    return b"".join(wrong)
