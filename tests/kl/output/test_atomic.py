"""Files that appear whole or not at all, and strict JSON."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest

from kl.output.atomic import write_json_atomic, write_many_atomic


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_not_a_number_and_leaves_the_old_file(tmp_path: Path, value: float):
    target = tmp_path / "x.json"
    write_json_atomic(target, {"x": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json_atomic(target, {"x": [value]})
    assert json.loads(target.read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_keeps_text_as_it_is(tmp_path: Path):
    text = "Grüße 東京 🎈 \ud83d \\ \u2028 \x00"  # with half of a surrogate pair
    write_json_atomic(tmp_path / "x.json", {"text": text})
    data = (tmp_path / "x.json").read_bytes()
    assert "Grüße 東京 🎈".encode() in data
    assert json.loads(data.decode("utf-8"))["text"] == text


def test_files_have_the_usual_permissions(tmp_path: Path):
    write_json_atomic(tmp_path / "sub" / "run.json", {"a": 1})
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "sub" / "run.json").stat().st_mode == plain.stat().st_mode


def test_many_files_are_there_when_they_are_given_and_in_their_order(tmp_path: Path):
    targets = [tmp_path / f"{number}.txt" for number in range(50)]
    given = write_many_atomic((target, partial(Path.write_text, data=target.stem)) for target in targets)
    for target, expected in zip(given, targets, strict=True):
        assert (target, target.read_text()) == (expected, expected.stem)
    assert sorted(os.listdir(tmp_path)) == sorted(target.name for target in targets)


def test_files_before_a_failing_one_are_whole_and_nothing_else_is_left(tmp_path: Path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("full")

    files = [(tmp_path / f"{number}.txt", partial(Path.write_text, data="whole")) for number in range(5)]
    with pytest.raises(RuntimeError, match="full"):
        list(write_many_atomic([*files, (tmp_path / "last.txt", fail)]))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"{number}.txt": "whole" for number in range(5)
    }
