"""What the files of a finished run are called."""

from __future__ import annotations

TOKENS = "tokens.parquet"
CANDIDATES = "candidates.parquet"  # not there where a run was told to keep none, nor of earlier versions
RESPONSES = "responses.parquet"
FIRST_LISTS = "first_lists.parquet"  # of a run of first positions
SUMMARY = "summary.json"
REPORT = "report.html"  # for people; not there of earlier versions
RECORD = "run.json"  # written last
UNFINISHED = ".parts"  # made when a run begins, removed when everything is written
REQUIRED = (TOKENS, RESPONSES, SUMMARY, RECORD)
