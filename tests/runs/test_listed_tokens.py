"""Runs over responses whose lists do not say, or say in another form, which tokens they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kl.pieces import visible_bytes
from tests import ROOT
from tests.programs import Run

CHARACTER_OF = {byte: character for character, byte in visible_bytes().items()}
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def as_nothing(own: bytes, is_part: bool) -> dict[str, Any]:
    return {"token": "", "bytes": []} if is_part else {"token": own.decode(), "bytes": list(own)}


def as_replacement(own: bytes, is_part: bool) -> dict[str, Any]:
    shown = own.decode("utf-8", "replace")
    return {"token": shown, "bytes": list(shown.encode())}


def as_first_byte(own: bytes, is_part: bool) -> dict[str, Any]:
    return {"token": f"<0x{own[0]:02X}>" if is_part else own.decode()}


def as_raw_pieces(own: bytes, is_part: bool) -> dict[str, Any]:
    is_name = own.decode("utf-8", "replace") in CONTROL
    return {"token": own.decode() if is_name else "".join(CHARACTER_OF[byte] for byte in own)}


def written(write: Callable[[bytes, bool], dict[str, Any]], folder: Path) -> int:
    """The examples with their lists written otherwise and without ids; the number of parts of characters in them."""
    folder.mkdir()
    n_parts = 0
    for path in sorted((ROOT / "examples/responses").glob("*.json"))[1:3]:
        document = json.loads(path.read_text())
        for response in document["responses"]:
            for position in response["logprobs"]["content"]:
                for entry in (position, *position["top_logprobs"]):
                    own = bytes(entry.pop("bytes", entry["token"].encode()))
                    is_part = "\ufffd" in own.decode("utf-8", "replace")
                    n_parts += is_part
                    del entry["token_id"]
                    entry |= write(own, is_part)
        (folder / path.name).write_text(json.dumps(document))
    return n_parts


@pytest.mark.parametrize("write", [as_nothing, as_replacement, as_first_byte, as_raw_pieces])
def test_a_model_differs_from_itself_by_nothing_however_its_lists_are_written(write, run_program: Run, tmp_path: Path):
    n_parts = written(write, tmp_path / "in")
    output = tmp_path / "out"
    flags = ("--input-dir", tmp_path / "in", "--output-dir", output, "--model2", "smollm2-135m", "--backend", "local")
    done = run_program("flows.run", *flags)
    assert done.code == 0, done.err
    tokens = pl.read_parquet(output / "tokens.parquet")
    assert tokens["reason"].null_count() == tokens.height
    assert tokens.select(pl.max_horizontal(pl.max("kl_lower", "reverse_kl_lower", "js_lower"))).item() <= 1e-6
    assert tokens["kl_estimate"].max() <= 1e-6
    hidden = tokens.filter(pl.col("ambiguous_mass_p") > 0)
    assert n_parts >= 9
    assert hidden.height == 0 if write is as_raw_pieces else hidden.height > 4
    assert hidden["kl_floor"].null_count() == hidden.height
