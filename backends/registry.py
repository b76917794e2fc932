"""Which backends exist, and how a name becomes a class."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import pluggy
from pydantic import ValidationError

import backends.builtin
import backends.hookspecs
from backends.base import Backend, BackendOptions, own_name
from backends.errors import ConfigError, DuplicateBackendError, UnknownBackendError, did_you_mean

ENTRY_POINT_GROUP = "tokenkl.backends"
_BUILT_IN = "built in"
_NUMBER = " ["


def build_targets(plugins: Iterable[object] = ()) -> dict[str, str]:
    """Name → ``module:Class`` of every backend, as `registered` finds them."""
    return {name: found.target for name, found in registered(plugins).items()}


class Registered(NamedTuple):
    """Where a backend's class is, ``module:Class``, and who announced it: a distribution with its version."""

    target: str
    origin: str


def registered(plugins: Iterable[object] = ()) -> dict[str, Registered]:
    """Name → place of every backend: built-in, from entry points, and from ``plugins``.

    Raises
    ------
    ConfigError
        If a plugin cannot be loaded, or a hook is misspelt.
    DuplicateBackendError
        If two plugins register one name.
    """
    manager = pluggy.PluginManager(backends.hookspecs.PROJECT)
    manager.add_hookspecs(backends.hookspecs)
    manager.register(backends.builtin, name=_BUILT_IN)
    _load_entry_points(manager)
    for plugin in plugins:
        _register(manager, plugin, getattr(plugin, "__name__", type(plugin).__name__))
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ConfigError(
            f"a backend plugin implements a hook that does not exist: {error}. "
            "The one hook is register_backends(register)."
        ) from error
    return _collect(manager)


def _load_entry_points(manager: pluggy.PluginManager) -> None:
    from importlib.metadata import entry_points

    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        dist = entry_point.dist
        where = f"{entry_point.name} = {entry_point.value}"
        origin = where if dist is None else f"{dist.name} {dist.version}"
        try:
            plugin = entry_point.load()
        except Exception as error:
            raise ConfigError(
                f"the backend plugin {where!r} (entry-point group {ENTRY_POINT_GROUP}) cannot be imported: "
                f"{type(error).__name__}: {error}. Repair or uninstall it."
            ) from error
        _register(manager, plugin, origin)


def _register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    # Registered under a name of our own, because pluggy skips a second plugin of one name without a word.
    try:
        manager.register(plugin, name=f"{name}{_NUMBER}{len(manager.get_plugins())}]")
    except pluggy.PluginValidationError as error:
        raise ConfigError(f"the backend plugin {name!r} does not fit the hook: {error}") from error


def _collect(manager: pluggy.PluginManager) -> dict[str, Registered]:
    found: dict[str, Registered] = {}
    origin = ""

    def register(name: str, target: str) -> None:
        module, _, attribute = target.partition(":")
        if not name or not module or not attribute:
            raise ConfigError(f"backend {name!r} has the target {target!r}; write it as 'module:Class'.")
        if name in found:
            raise DuplicateBackendError(
                f"the backend name {name!r} is registered twice: {found[name].target} and {target}. "
                "Rename or remove one."
            )
        found[name] = Registered(target, origin)

    for hook in reversed(manager.hook.register_backends.get_hookimpls()):  # as pluggy calls them, but one by one
        origin = hook.plugin_name.partition(_NUMBER)[0]
        hook.function(*(register for _ in hook.argnames))
    return found


def check_known(name: str, known: Collection[str]) -> None:
    """Refuse a name that no backend is registered under.

    Raises
    ------
    UnknownBackendError
        With the closest name and all that exist.
    """
    if name not in known:
        hint = did_you_mean(name, known)
        raise UnknownBackendError(f"unknown backend {name!r}.{hint} Known: {', '.join(sorted(known))}.")


def load_backend(name: str, targets: dict[str, str] | None = None) -> type[Backend]:
    """The class behind a backend name.

    Raises
    ------
    UnknownBackendError
        With the closest name and all that exist.
    ConfigError
        If the target cannot be imported, is no backend, or one of another name.
    """
    known = build_targets() if targets is None else targets
    check_known(name, known)
    module, _, attribute = known[name].partition(":")
    try:
        backend = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backend {name!r} ({known[name]}) cannot be imported: {error}.") from error
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise ConfigError(f"backend {name!r}: {known[name]} is not a subclass of backends.base.Backend.")
    own = own_name(backend)
    if own not in (None, name):
        raise ConfigError(
            f"backend {name!r}: {known[name]} has name = {own!r}, under which its scores are kept. "
            "Register it as that, or register a subclass with a name of its own."
        )
    return backend


def deferred_backends() -> list[str]:
    """The names of the backends whose jobs outlive the process, of those that can be imported here."""
    targets = build_targets()
    names: list[str] = []
    for name in sorted(targets):
        with suppress(ConfigError):  # one that cannot be imported is no alternative
            if load_backend(name, targets).capabilities.deferred:
                names.append(name)
    return names


def parse_options(name: str, backend: type[Backend], values: dict[str, Any]) -> BackendOptions:
    """Validate a backend's options.

    Raises
    ------
    ConfigError
        One line that names the option, the value, and what is allowed.
    """
    try:
        return backend.Options.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_option_problem(name, backend, item) for item in error.errors())) from error


def _option_problem(name: str, backend: type[Backend], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    known = backend.Options.model_fields
    if item["type"] == "extra_forbidden":
        hint = did_you_mean(path, known)
        return f"backend {name!r} has no option {path!r}.{hint} Known: {', '.join(sorted(known)) or 'none'}."
    description = known[path].description if path in known else None
    about = f" ({description})" if description else ""
    return f"backend.{path}: {item['msg']}, got {item['input']!r}{about}"
