"""Writes the box's model, and tiny random ones, as folders that transformers reads.

torch and transformers are imported where they are used: every process that collects the tests would wait for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from backends.local.config import LlamaConfig as Sizes
from backends.local.gguf import GGUFFile, read_gguf
from backends.local.models import find_model
from kl.pieces import visible_bytes

if TYPE_CHECKING:
    import torch

CONTROL = 3  # type of a token in GGUF files
PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he", "Ġ Ġ"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, tokens: list[str], control: list[str], merges: list[str], **changes: Any) -> None:
    """A byte-level tokenizer by the rules of the box's model: each digit alone, all control tokens known."""
    made = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(control)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    settings = {key: value for key, value in (settings | changes).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def box_model(folder: Path, bits: int | None = None) -> Path:
    """The box's weights in float32, rounded to ``bits`` as `local` rounds them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    file = read_gguf(find_model("smollm2-135m").path)
    sizes = Sizes.from_gguf(file)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn_width,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.context_length,
        rms_norm_eps=sizes.norm_eps,
        rope_theta=sizes.rope_base,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(_weights(file, sizes, bits), strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokens: list[str] = file.need("tokenizer.ggml.tokens")
    types: list[int] = file.need("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    merges = file.need("tokenizer.ggml.merges")
    write_tokenizer(folder, tokens, control, merges, chat_template=file.need("tokenizer.chat_template"))
    return folder


def _weights(file: GGUFFile, sizes: Sizes, bits: int | None) -> dict[str, torch.Tensor]:
    import torch

    def load(name: str) -> np.ndarray:
        return file.load(name, bits if len(file.tensors[name].shape) == 2 else None)

    def rotated(name: str, heads: int) -> np.ndarray:
        """GGUF has the pairs that are turned together as neighbours, transformers half a head apart."""
        rows = load(name)
        return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    found = {"model.embed_tokens.weight": load("token_embd.weight"), "model.norm.weight": load("output_norm.weight")}
    for layer in range(sizes.n_layers):
        here, there = f"blk.{layer}.", f"model.layers.{layer}."
        found[f"{there}self_attn.q_proj.weight"] = rotated(f"{here}attn_q.weight", sizes.n_heads)
        found[f"{there}self_attn.k_proj.weight"] = rotated(f"{here}attn_k.weight", sizes.n_kv_heads)
        for name, own in {
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():
            found[f"{there}{own}.weight"] = load(f"{here}{name}.weight")
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}


def tiny_model(folder: Path, *, seed: int = 0, tokenizer: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A random llama of two layers that knows bytes and a few words; ``changes`` are of its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokens = [PAD, BEGIN, END, *sorted(visible_bytes()), *(merge.replace(" ", "") for merge in MERGES)]
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = sizes | {"vocab_size": len(tokens), "initializer_range": 0.3, "max_position_embeddings": 512}
    config = LlamaConfig(**(settings | {"bos_token_id": 1, "eos_token_id": 2} | changes))
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, tokens, [PAD, BEGIN, END], MERGES, **({"chat_template": TEMPLATE} | dict(tokenizer or {})))
    return folder
