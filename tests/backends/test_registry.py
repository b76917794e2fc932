"""Backends by name: what exists, what is misspelt, what is there twice."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import Backend, BackendOptions, Capabilities, ScoreRequest
from backends.errors import ConfigError, DuplicateBackendError, UnknownBackendError
from backends.hookspecs import hookimpl
from backends.registry import build_targets, load_backend, parse_options
from kl.records import Prompt, Turn


def plugin(name: str, target: str) -> object:
    class Plugin:
        @hookimpl
        def register_backends(self, register: Callable[[str, str], None]) -> None:
            register(name, target)

    return Plugin()


def test_the_built_in_backends_exist() -> None:
    assert {"vertex_batch", "local"} <= build_targets().keys()


def test_an_outside_backend_is_found_through_the_same_hook() -> None:
    targets = build_targets([plugin("echo", "tests.somewhere:Echo")])
    assert targets["echo"] == "tests.somewhere:Echo"


def test_two_plugins_with_one_name_are_both_named() -> None:
    with pytest.raises(DuplicateBackendError, match=r"'local' is registered twice: .*mine:Local"):
        build_targets([plugin("local", "mine:Local")])


def test_two_outside_plugins_with_one_name_are_both_named() -> None:
    with pytest.raises(DuplicateBackendError, match=r"one:A and two:B|two:B and one:A"):
        build_targets([plugin("echo", "one:A"), plugin("echo", "two:B")])


def test_a_misspelt_hook_is_an_error() -> None:
    class Plugin:
        @hookimpl
        def register_backend(self, register: object) -> None:
            raise AssertionError("never called")

    with pytest.raises(ConfigError, match=r"register_backends\(register\)"):
        build_targets([Plugin()])


def test_a_hook_with_other_arguments_is_an_error() -> None:
    class Plugin:
        @hookimpl
        def register_backends(self, registry: object) -> None:
            raise AssertionError("never called")

    with pytest.raises(ConfigError, match="does not fit the hook"):
        build_targets([Plugin()])


@pytest.mark.parametrize("target", ["nowhere", ":Class", "module:"])
def test_a_target_without_module_and_class_is_an_error(target: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(target))):
        build_targets([plugin("echo", target)])


def test_an_unknown_name_says_what_is_close_and_what_exists() -> None:
    with pytest.raises(UnknownBackendError, match=r"'vertex_bach'. Did you mean 'vertex_batch'\? Known: .*local"):
        load_backend("vertex_bach")


@pytest.mark.parametrize("target", ["no_such_module_anywhere:X", "backends.base:NoSuchClass", "pathlib:Path"])
def test_a_target_that_is_no_backend_is_an_error(target: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be imported|not a subclass"):
        load_backend("broken", {"broken": target})


class Options(BackendOptions):
    poll_interval_s: float = 10.0


class Slow(Backend):
    Options = Options
    capabilities = Capabilities(max_top_logprobs=5)


def test_options_are_validated_by_the_backend() -> None:
    assert parse_options("slow", Slow, {"poll_interval_s": "3"}) == Options(poll_interval_s=3.0)


def test_an_unknown_option_says_what_is_close() -> None:
    with pytest.raises(ConfigError, match=r"no option 'poll_intervall_s'. Did you mean 'poll_interval_s'\?"):
        parse_options("slow", Slow, {"poll_intervall_s": 3})


def test_an_option_of_the_wrong_kind_names_the_value() -> None:
    with pytest.raises(ConfigError, match=r"backend.poll_interval_s: .*'soon'"):
        parse_options("slow", Slow, {"poll_interval_s": "soon"})


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_plugin.py").write_text("import a_package_that_is_not_there\n")
    info = tmp_path / "broken_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tokenkl.backends]\nbroken = broken_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"'broken = broken_plugin'.*a_package_that_is_not_there"):
        build_targets()


def test_a_plugin_of_an_installed_distribution_is_found(tmp_path, monkeypatch) -> None:
    source = (
        "from backends.hookspecs import hookimpl\n\n\n@hookimpl\ndef register_backends(register):\n"
        "    register('outside', 'outside_plugin:Outside')\n"
    )
    (tmp_path / "outside_plugin.py").write_text(source)
    info = tmp_path / "outside_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tokenkl.backends]\noutside = outside_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_targets()["outside"] == "outside_plugin:Outside"


def test_a_plain_object_without_hooks_registers_nothing() -> None:
    assert build_targets([SimpleNamespace()]) == build_targets()


class Named(Backend):
    name = "named"
    capabilities = Capabilities(max_top_logprobs=5)


class Child(Named):
    pass


class WithIdentity(Named):
    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        return {"engine": 1}


ASKED = ScoreRequest("n", "m", Prompt((Turn("user", "?"),)), "", (), None, (), (), 5)


def target(kind: type[Backend]) -> str:
    return f"{__name__}:{kind.__name__}"


def test_scores_are_kept_under_the_name_that_is_registered() -> None:
    kind = load_backend("named", {"named": target(Named)})
    assert kind.identity(kind.Options(), ASKED) == {"backend": "named", "top_logprobs": 5, "full": False}


def test_a_class_registered_under_another_name_than_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="has name = 'named', under which its scores are kept"):
        load_backend("other", {"named": target(Named), "other": target(Named)})


def test_a_subclass_has_no_name_until_it_gives_itself_one() -> None:
    kind = load_backend("child", {"child": target(Child)})
    with pytest.raises(ConfigError, match="Child has no name for its scores"):
        kind.identity(kind.Options(), ASKED)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_class_with_an_identity_of_its_own_may_go_by_any_name(name: str) -> None:
    kind = load_backend(name, {name: target(WithIdentity)})
    assert kind.identity(kind.Options(), ASKED) == {"engine": 1}


def test_the_built_in_backends_are_registered_as_they_call_themselves() -> None:
    for name in ("vertex_batch", "vertex_online", "local"):
        assert load_backend(name).name == name
