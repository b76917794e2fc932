"""Checkpoints in memory: body and head, and the proof that together they are the model."""

# pyright: reportMissingImports=false
# torch is in no installation that uv makes by itself.

from __future__ import annotations

import functools
import gc
import inspect
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from datetime import date
from typing import Any

from backends.errors import MissingDependencyError, TokenKLError
from backends.local.gguf import read_gguf
from backends.local.tokenizer import ChatTemplate, Tokenizer
from backends.transformers.checkpoints import Checkpoint, how_to_install, unusable
from backends.transformers.tokens import UNUSED, CheckpointTemplate, CheckpointTokenizer

_KEPT = 2  # models in memory: P and Q
_PROVED_ON = 8  # tokens
# How far body and head may be from the whole model, of its largest logit: kernels round differently for other shapes.
_SAME = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

Tensor = Any  # torch.Tensor; torch is imported when the first model is loaded


Words = tuple[CheckpointTokenizer | Tokenizer, CheckpointTemplate | ChatTemplate, int]
"""Tokenizer and template, and the limit of a context that the tokenizer knows."""


class LoadedModel:
    """A model in memory, for one thread.

    Attributes
    ----------
    checkpoint : Checkpoint
    tokenizer : CheckpointTokenizer or Tokenizer
        The latter for GGUF files, whose rules transformers does not take over.
    template : CheckpointTemplate or ChatTemplate
    limit : int
        The most tokens of a context. A pass, padding included, has no more.
    device : torch.device
        Where ids go, and where the rows of `hidden` are.
    n_vocabulary : int
        Columns of `logits`.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, words: Words) -> None:
        """Take over a causal language model of transformers, and prove it.

        Raises
        ------
        ModelNotUsableError
            With what is wrong with it, in one line.
        """
        import torch

        self.checkpoint = checkpoint
        self._torch = torch
        self._model, whole, config = model, model, model.config.get_text_config()
        self._head: Any = whole.get_output_embeddings()
        if self._head is None:
            raise unusable(checkpoint.name, "it has no output embeddings: no causal language model.")
        self.device = whole.device if getattr(whole, "hf_device_map", None) is None else _first_device(whole)
        # How the library calls keys and values changed within its version 5.
        self._cache = "cache" if "cache" in inspect.signature(whole.forward).parameters else "past_key_values"
        self._finish = _finishing(config, torch)
        self.tokenizer, self.template, own_limit = words
        self.stop_ids = self.tokenizer.stop_ids | _stops_of(whole)
        self.limit = min(
            int(getattr(config, "max_position_embeddings", None) or own_limit), own_limit, _longest(config)
        )
        self.n_vocabulary = 0  # until it is proved
        with torch.inference_mode():
            self._prove()

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head is given for each row of ids, shape (n, length) to (n, length, width).

        Sequences shorter than the longest are filled up at their end, which no row before it sees.
        """
        return self._run(ids, whole=False)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Of some rows of `hidden`, shape (n, width) to (n, V), as the model's own dtype has them."""
        return self._finish(self._head(hidden[None])[0])

    def step(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Feed ids after those of a cache (None at first), shape (n, length); the next token's logits, (n, V), and it.

        ``mask``, shape (n, all so far), is 0 where a shorter row was filled up at its start.
        """
        hook = self._head.register_forward_pre_hook(lambda module, given: (given[0][:, -1:], *given[1:]))
        try:
            given = {"attention_mask": mask, "position_ids": positions, self._cache: cache}
            found = self._model(input_ids=ids, use_cache=True, **given)
        finally:
            hook.remove()
        return found.logits[:, -1], getattr(found, self._cache)

    @functools.cached_property
    def pieces(self) -> list[bytes | None]:
        """The bytes of each id that is a piece of text; None for the others."""
        known = self.tokenizer
        return [None if known.is_added(index) else known.token_bytes(index) for index in range(len(known))]

    @functools.cached_property
    def unused(self) -> Tensor:
        """Which columns of `logits` are no tokens, shape (V,)."""
        known, size = self.tokenizer, len(self.tokenizer)
        holes = known.is_unused if isinstance(known, CheckpointTokenizer) else lambda index: False
        no_token = [index >= size or holes(index) for index in range(self.n_vocabulary)]
        return self._torch.tensor(no_token, device=self.device)

    def token(self, index: int) -> tuple[str, bytes]:
        """How a list shows an id, and its exact bytes; rows that pad the vocabulary have a name, as control tokens."""
        if index < len(self.tokenizer):
            return self.tokenizer.token(index)
        name = UNUSED.format(index)
        return name, name.encode()

    def _run(self, ids: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
        """What the head was given, and the logits, which are those of one row only unless ``whole``."""
        taken: list[Tensor] = []

        def take(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            taken.append(given[0])
            return None if whole else (given[0][:1, :1], *given[1:])

        hook = self._head.register_forward_pre_hook(take)
        try:
            logits = self._model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        return taken[0], logits

    def _prove(self) -> None:
        """Compare body and head with the whole model: some models change what the head gives, or call no head.

        Raises
        ------
        ModelNotUsableError
            If they differ.
        """
        torch = self._torch
        # Ordinary tokens, whatever the vocabulary: ids spread over it.
        n = len(self.tokenizer)
        ids = torch.tensor([[n * (at + 1) // (_PROVED_ON + 2) for at in range(_PROVED_ON)]], device=self.device)
        try:
            hidden, whole = self._run(ids, whole=True)
            parts = self.logits(hidden[0]).float()
            whole = whole[0].float()
        except (RuntimeError, IndexError, TypeError, AttributeError, ValueError) as error:
            what = f"its forward pass failed ({type(error).__name__}: {error})"
            raise unusable(self.checkpoint.name, what) from error
        self.n_vocabulary = int(whole.shape[-1])
        if not bool(torch.isfinite(whole).any(dim=-1).all()):
            raise unusable(self.checkpoint.name, "it gives no finite logits; try another dtype.")
        same = torch.where(whole == parts, 0.0, (whole - parts).abs())  # infinities are equal
        largest = whole[torch.isfinite(whole)].abs().max()
        dtype = str(hidden.dtype).removeprefix("torch.")
        if parts.shape != whole.shape or not bool((same <= _SAME.get(dtype, 5e-2) * largest).all()):
            what = "its logits are not what its head gives, in a way that is not known here"
            raise unusable(self.checkpoint.name, f"{what}; serve it with vLLM and ask it there.")


def words_of(checkpoint: Checkpoint) -> Words:
    """Tokenizer and template, and the limit of a context that the tokenizer knows."""
    options, name = checkpoint.options, checkpoint.name
    if checkpoint.gguf_file is not None:
        if options["template_options"] or options["today"] is not None:
            raise unusable(name, "template_options and today are not for the templates of GGUF files.")
        file = read_gguf(_gguf_path(checkpoint))
        tokenizer = Tokenizer(file)
        return tokenizer, ChatTemplate(file, tokenizer, plain=options["template"] == "none"), sys.maxsize
    import transformers

    library: Any = transformers  # it makes its names when they are asked for, which no type checker sees
    try:
        own = library.AutoTokenizer.from_pretrained(
            checkpoint.base.path,
            revision=checkpoint.base.commit,
            trust_remote_code=options["trust_remote_code"],
            local_files_only=options["local"],
        )
    except Exception as error:
        raise unusable(name, f"its tokenizer cannot be read: {type(error).__name__}: {error}") from error
    tokenizer = CheckpointTokenizer(name, own)
    today = None if options["today"] is None else date.fromisoformat(options["today"])
    template = CheckpointTemplate(own, tokenizer, options["template"], options["template_options"], today)
    return tokenizer, template, min(int(own.model_max_length), sys.maxsize)


def _gguf_path(checkpoint: Checkpoint) -> Any:
    from pathlib import Path

    from huggingface_hub import hf_hub_download

    base, file = checkpoint.base, checkpoint.gguf_file
    assert file is not None
    if base.commit is None:
        return Path(base.path) / file
    return Path(hf_hub_download(base.path, file, revision=base.commit, local_files_only=checkpoint.options["local"]))


def _stops_of(model: Any) -> frozenset[int]:
    """The ids that end an answer by the model's own settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset([own] if isinstance(own, int) else own or ())


def _model_of(checkpoint: Checkpoint) -> Any:
    import torch
    import transformers

    options, name, base = checkpoint.options, checkpoint.name, checkpoint.base
    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    given: dict[str, Any] = {
        "revision": base.commit,
        "dtype": options["dtype"] if options["dtype"] == "auto" else getattr(torch, options["dtype"]),
        "trust_remote_code": options["trust_remote_code"],
        "local_files_only": options["local"],
        "output_loading_info": True,
    }
    given |= {key: options[key] for key in ("device_map", "attn_implementation") if options[key] is not None}
    if checkpoint.gguf_file is not None:
        given["gguf_file"] = checkpoint.gguf_file
    try:
        if options["quantization"] is not None:
            from transformers.quantizers.auto import AutoQuantizationConfig

            given["quantization_config"] = AutoQuantizationConfig.from_dict(options["quantization"])
        model, info = library.AutoModelForCausalLM.from_pretrained(base.path, **given)
        lacking = [*info["missing_keys"], *info["mismatched_keys"], *info.get("error_msgs", ())]
        if lacking:
            raise unusable(name, f"the files lack {len(lacking)} of the model's weights, such as {lacking[0]}.")
        if options["device_map"] is None and options["quantization"] is None:
            model = model.to(_device(options["device"], torch))
        if checkpoint.adapter is not None:
            model = _adapted(model, checkpoint)
    except TokenKLError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"model {name!r} needs a package ({_line(error)}): {how_to_install()}") from error
    except Exception as error:
        raise unusable(name, f"it cannot be loaded: {type(error).__name__}: {_line(error)}") from error
    return model.eval().requires_grad_(False)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _adapted(model: Any, checkpoint: Checkpoint) -> Any:
    """The model with an adapter active in it, not merged: merging would round its weights again."""
    import peft

    adapter = checkpoint.adapter
    assert adapter is not None
    found = peft.PeftModel.from_pretrained(model, adapter.path, revision=adapter.commit, is_trainable=False)
    if found.peft_config["default"].is_prompt_learning:
        raise unusable(checkpoint.name, f"the adapter {adapter.path} learns a prompt; only those in the weights serve.")
    return found.get_base_model()


def _device(wanted: str, torch: Any) -> Any:
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _first_device(model: Any) -> Any:
    return model.get_input_embeddings().weight.device


def _longest(config: Any) -> int:
    """The most tokens of a context whose figures do not depend on what is fed after it or beside it.

    With ``longrope`` a pass whose longest row goes beyond the original length has other frequencies in all its rows.
    (`dynamic` does the same beyond ``max_position_embeddings``, which is a limit anyway.)
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    layers = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    lengths = [each["original_max_position_embeddings"] for each in layers if each.get("rope_type") == "longrope"]
    return min(map(int, lengths), default=sys.maxsize)


def _finishing(config: Any, torch: Any) -> Callable[[Tensor], Tensor]:
    """What models do to the head's output; `LoadedModel` proves that it is all they do."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    factor = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    factor *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon H1
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite

    def finish(logits: Tensor) -> Tensor:
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits if factor == 1.0 else logits * factor

    return finish


class Models:
    """The few models in memory, the one that was not used for the longest time forgotten first."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()

    def load(self, checkpoint: Checkpoint) -> LoadedModel:
        """The model of a checkpoint; equal content in equal settings is one model under all its names.

        Raises
        ------
        MissingDependencyError, ModelNotUsableError
            If a package is missing, or with what is wrong with the checkpoint, in one line.
        """
        key = json.dumps([checkpoint.content, checkpoint.settings])
        if key not in self._models:
            while len(self._models) >= _KEPT:
                self._models.popitem(last=False)
                self._free()
            self._models[key] = LoadedModel(checkpoint, _model_of(checkpoint), words_of(checkpoint))
        self._models.move_to_end(key)
        return self._models[key]

    def release(self) -> None:
        """Forget all of them, and give their memory back."""
        self._models.clear()
        self._free()

    @staticmethod
    def _free() -> None:
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
