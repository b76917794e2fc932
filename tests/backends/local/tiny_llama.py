"""Writes llama models of a few thousand random weights as GGUF files, with gguf's own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 32
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_characters() -> list[str]:
    """The visible character of each byte, as GPT-2 writes them."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def vocabulary() -> list[str]:
    return [*CONTROL, *byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]


def random_weights(
    *, seed: int = 0, tied: bool = True, bias: bool = False, freqs: bool = False, rotated: int = HEAD_DIM
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 1.5 / shape[-1] ** 0.5).astype(np.float32)

    size = len(vocabulary())
    weights = {"token_embd.weight": 4 * draw(size, WIDTH), "output_norm.weight": 1 + draw(WIDTH)}
    if not tied:
        weights["output.weight"] = 3 * draw(size, WIDTH)
    if freqs:
        weights["rope_freqs.weight"] = np.linspace(1, 8, rotated // 2).astype(np.float32)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"attn_q": (q, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, q)}
    shapes |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"blk.{layer}.{name}.weight"] = draw(*shape)
            if bias:
                weights[f"blk.{layer}.{name}.bias"] = draw(shape[0])
        for name in ("attn_norm", "ffn_norm"):
            weights[f"blk.{layer}.{name}.weight"] = 1 + draw(WIDTH)
    return weights


def metadata(**changes: Any) -> dict[str, Any]:
    """Metadata of a complete model; a change to ``None`` leaves the key out. Dots in names are written ``__``."""
    tokens = vocabulary()
    values: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": 256,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def write(path: Path, weights: dict[str, np.ndarray], values: dict[str, Any], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
