"""The list of backends, and a backend's options in the help of a call that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backends.registry import registered
from flows.commands import backends as program
from flows.commands.run import main as run


def test_every_backend_is_listed_with_its_origin_and_what_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 0
    out = capsys.readouterr().out
    for name in registered():
        assert f"{name}  (built in; " in out
    assert "can be P and Q; lists of up to 1,000; full_vocabulary, samples" in out


def test_a_backend_in_full_has_its_options_with_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["vertex_batch"]) == 0
    out = capsys.readouterr().out
    assert "backend.poll_interval_s  (number, above 0, at most 3600; default 10.0)\n      Longest pause" in out
    assert 'backend.on_cancel  (leave, cancel; default "leave")' in out
    assert program.main(["vertex_batch", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["capabilities"]["deferred"] is True


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["locl"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown backend 'locl'. Did you mean 'local'? Known: ")


def test_a_plugin_that_cannot_be_loaded_is_listed_with_the_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lost_plugin.py").write_text(
        "from backends.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def register_backends(register):\n"
        "    register('lost', 'no_such_module:Lost')\n"
    )
    info = tmp_path / "lost_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lost-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tokenkl.backends]\nlost = lost_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert program.main([]) == 1
    out = capsys.readouterr().out
    assert "lost  (lost-plugin 1; no_such_module:Lost)\n  cannot be used: backend 'lost'" in out
    assert "No module named 'no_such_module'" in out
    assert "local  (built in; " in out


@pytest.mark.parametrize("by_file", [False, True])
def test_the_help_ends_with_the_options_of_the_chosen_backend(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, by_file: bool
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("backend: {name: vertex_online, max_concurrent: 3}\n")
    arguments = ["--config", str(file)] if by_file else ["--backend", "vertex_online"]

    def load_flow() -> object:
        raise AssertionError("the help needs no flow")

    with pytest.raises(SystemExit) as left:
        run(load_flow, [*arguments, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "\nthe chosen backend:\nvertex_online  (built in; " in out
    assert "backend.max_concurrent  (integer, at least 1, at most 1000; default 10)" in out
