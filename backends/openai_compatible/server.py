"""What a server says of itself, before it is asked about any text."""

from __future__ import annotations

import difflib
import hashlib
from typing import Any, Literal, NamedTuple

from backends.errors import ModelNotUsableError
from backends.openai_compatible.client import Client, Json
from backends.openai_compatible.presets import Name

Kind = Literal["llama_cpp", "vllm", "sglang", "openai"]
_LOCAL_OWNERS: dict[str, Kind] = {"llamacpp": "llama_cpp", "vllm": "vllm", "sglang": "sglang"}


class Server(NamedTuple):
    """A server as it describes itself; ``facts`` and ``served`` are what decides its answers, without any time."""

    kind: Kind
    facts: dict[str, Any]
    served: dict[str, dict[str, Any]]
    context: int | None
    slots: int
    vocabulary: int | None


async def look_at(client: Client, model: str, preset: Name | None) -> Server:
    """Ask a server what it is.

    Raises
    ------
    ModelNotUsableError
        If it lists its models and this is none of them.
    """
    listed: list[Json] = (await client.get_if_there("models")).get("data") or []
    owners: list[Kind] = [_LOCAL_OWNERS[item["owned_by"]] for item in listed if item.get("owned_by") in _LOCAL_OWNERS]
    if not owners:
        name = "" if preset is None else f"preset {preset}"
        return Server("openai", {"address": client.address, "preset": name}, {}, None, 1, None)
    served = {name: item for item in listed for name in (item["id"], *(item.get("aliases") or ()))}
    if model not in served:
        near = difflib.get_close_matches(model, list(served), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ModelNotUsableError(
            f"the server has no model {model!r}.{hint} It has: {', '.join(sorted(served))}.",
            permanent=True,
            model=model,
        )
    kind: Kind = owners[0]
    described = _llama if kind == "llama_cpp" else _vllm
    return await described(client, kind, served, served[model])


async def _llama(client: Client, kind: Kind, served: dict[str, Json], entry: Json) -> Server:
    props = await client.get_if_there("/props")
    meta = entry.get("meta") or {}
    settings = props.get("default_generation_settings") or {}
    facts = {
        "version": props.get("build_info"),
        "file": _short(props.get("model_path")),
        "ftype": props.get("model_ftype") or meta.get("ftype"),
        "size": meta.get("size"),
        "n_params": meta.get("n_params"),
        "n_vocab": meta.get("n_vocab"),
        "template": _short(props.get("chat_template")),
        "lora": (settings.get("params") or {}).get("lora"),
    }
    context = settings.get("n_ctx") or meta.get("n_ctx")
    return Server(
        kind, facts, {name: {} for name in served}, context, int(props.get("total_slots") or 1), meta.get("n_vocab")
    )


async def _vllm(client: Client, kind: Kind, served: dict[str, Json], entry: Json) -> Server:
    said = await client.get_if_there("/version")
    if kind == "sglang":
        said = {"version": (await client.get_if_there("/get_server_info")).get("version")}
    models = {name: {"root": item.get("root"), "parent": item.get("parent")} for name, item in served.items()}
    return Server(kind, {"version": said.get("version")}, models, entry.get("max_model_len"), 1, None)


def _short(text: str | None) -> str | None:
    """A long text by its hash; of a path the last part, too."""
    if text is None:
        return None
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    name = text.replace("\\", "/").rsplit("/", 1)[-1]
    return f"{name} {digest}" if len(name) <= 120 and "\n" not in name else digest
