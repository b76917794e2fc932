"""The backends in the box, announced through the same hook as everybody's."""

from collections.abc import Callable

from backends.hookspecs import hookimpl


@hookimpl
def register_backends(register: Callable[[str, str], None]) -> None:
    """Announce the built-in backends."""
    register("vertex_batch", "backends.vertex.batch:VertexBatchBackend")
    register("vertex_online", "backends.vertex.online:VertexOnlineBackend")
    register("local", "backends.local.backend:LocalBackend")
    register("files", "backends.files.backend:FilesBackend")
    register("openai_compatible", "backends.openai_compatible.backend:OpenAICompatibleBackend")
    register("transformers", "backends.transformers.backend:TransformersBackend")
