"""What a llama model is: sizes, constants and the tensors it consists of, checked before any number is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backends.local.gguf import GGUFFile, unusable


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes and constants of a model, from the metadata of its file."""

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_rotated: int
    ffn_width: int
    vocabulary: int
    context_length: int
    norm_eps: float
    rope_base: float
    rope_scale: float

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> LlamaConfig:
        """Read and check the metadata.

        Raises
        ------
        ModelNotUsableError
            For another architecture, or a variant whose numbers would be wrong here.
        """
        _refuse_variants(file)
        meta = file.metadata
        width, n_heads = int(file.need("llama.embedding_length")), int(file.need("llama.attention.head_count"))
        head_dim = int(meta.get("llama.attention.key_length", width // n_heads))
        return cls(
            n_layers=int(file.need("llama.block_count")),
            width=width,
            n_heads=n_heads,
            n_kv_heads=int(meta.get("llama.attention.head_count_kv", n_heads)),
            head_dim=head_dim,
            n_rotated=int(meta.get("llama.rope.dimension_count", head_dim)),
            ffn_width=int(file.need("llama.feed_forward_length")),
            vocabulary=len(file.need("tokenizer.ggml.tokens")),
            context_length=int(file.need("llama.context_length")),
            norm_eps=float(file.need("llama.attention.layer_norm_rms_epsilon")),
            rope_base=float(meta.get("llama.rope.freq_base", 10000.0)),  # llama.cpp's default
            rope_scale=_rope_scale(meta),
        )


def _refuse_variants(file: GGUFFile) -> None:
    architecture = file.need("general.architecture")
    if architecture != "llama":
        raise unusable(
            file.path,
            f"architecture {architecture!r} is not supported, 'llama' is; serve the model with llama.cpp or vLLM.",
        )
    if file.metadata.get("llama.expert_count", 0):
        raise unusable(file.path, "a mixture of experts is not supported; serve the model with llama.cpp or vLLM.")
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise unusable(file.path, f"llama.rope.scaling.type {scaling!r} is not supported; 'none' and 'linear' are.")
    for key in ("llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length"):
        if isinstance(file.metadata.get(key), list):
            raise unusable(file.path, f"{key} differs from layer to layer, which is not supported.")
    key_length = file.metadata.get("llama.attention.key_length")
    if file.metadata.get("llama.attention.value_length", key_length) != key_length:
        raise unusable(
            file.path, "llama.attention.value_length is not llama.attention.key_length, which is not supported."
        )


def _rope_scale(meta: dict[str, Any]) -> float:
    factor = float(meta.get("llama.rope.scaling.factor", meta.get("llama.rope.scale_linear", 0.0)))
    return 1.0 / factor if factor and meta.get("llama.rope.scaling.type") != "none" else 1.0


def check_shapes(file: GGUFFile, config: LlamaConfig) -> None:
    """Prove that the file holds the tensors of a plain llama model, no fewer and no others.

    Raises
    ------
    ModelNotUsableError
        That names the tensor. One that would be ignored is refused too: the numbers would be another model's.
    """
    if config.n_heads % config.n_kv_heads or config.n_rotated % 2 or config.n_rotated > config.head_dim:
        raise unusable(file.path, f"sizes do not fit together: {config}.")
    shapes = _shapes(config)
    optional = {name for name in shapes if name.endswith(".bias")} | {"output.weight", "rope_freqs.weight"}
    for name, shape in shapes.items():
        if name not in file.tensors:
            if name not in optional:
                raise unusable(file.path, f"tensor {name!r} is missing.")
        elif file.tensors[name].shape != shape:
            raise unusable(
                file.path, f"tensor {name!r} has shape {file.tensors[name].shape}, the metadata say {shape}."
            )
    others = sorted(set(file.tensors) - set(shapes))
    if others:
        raise unusable(
            file.path,
            f"{len(others)} tensors are not part of a plain llama model, the first is {others[0]!r}; "
            "serve the model with llama.cpp or vLLM.",
        )


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    width, q, kv = config.width, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    linear = {
        "attn_q": (q, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_output": (width, q),
        "ffn_gate": (config.ffn_width, width),
        "ffn_up": (config.ffn_width, width),
        "ffn_down": (width, config.ffn_width),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocabulary, width),
        "output.weight": (config.vocabulary, width),
        "output_norm.weight": (width,),
        "rope_freqs.weight": (config.n_rotated // 2,),
    }
    for layer in range(config.n_layers):
        shapes |= {f"blk.{layer}.{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"blk.{layer}.{name}.bias": shape[:1] for name, shape in linear.items()}
    return shapes
