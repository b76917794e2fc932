"""Options of the `transformers` backend: how models are loaded, for all of them and for one by its name."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from backends.base import BackendOptions

DType = Literal["auto", "float32", "bfloat16", "float16"]
Template = Literal["own", "none"]


class ModelOptions(BaseModel):
    """What holds for one model in the place of the backend's own options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(
        default=None, min_length=1, description="A folder, a hub id or a GGUF file. Default: the model's name."
    )
    revision: str | None = Field(default=None, min_length=1, description="Branch, tag or commit on the hub.")
    gguf_file: str | None = Field(default=None, min_length=1, description="A GGUF file in the folder or repository.")
    adapter: str | None = Field(
        default=None,
        min_length=1,
        description="A PEFT adapter (LoRA): a folder, or a hub id, with @REVISION if need be.",
    )
    dtype: DType | None = Field(default=None, description="As the backend's.")
    device: str | None = Field(default=None, min_length=1, description="As the backend's.")
    device_map: str | dict[str, int | str] | None = Field(default=None, description="As the backend's.")
    quantization: dict[str, Any] | None = Field(default=None, description="As the backend's.")
    attn_implementation: str | None = Field(default=None, min_length=1, description="As the backend's.")
    template: Template | None = Field(default=None, description="As the backend's.")
    template_options: dict[str, Any] | None = Field(default=None, description="As the backend's.")
    trust_remote_code: bool | None = Field(default=None, description="As the backend's.")


class TransformersOptions(BackendOptions):
    """Of all models, unless ``models`` says otherwise for one."""

    dtype: DType = Field(
        default="auto", description="Of weights and arithmetic; auto is what the checkpoint says. The head's too."
    )
    device: str = Field(
        default="auto", min_length=1, description="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."
    )
    device_map: str | dict[str, int | str] | None = Field(
        default=None, description="Spreads a model over devices (accelerate): auto, balanced, or module → device."
    )
    quantization: dict[str, Any] | None = Field(
        default=None,
        description="Passed to transformers as the quantization config, such as {quant_method: bitsandbytes, "
        "load_in_4bit: true}; its package must be installed.",
    )
    attn_implementation: str | None = Field(
        default=None, min_length=1, description="eager, sdpa, flash_attention_2 …; default: transformers' choice."
    )
    template: Template = Field(
        default="own", description="own is the checkpoint's chat template, none continues one user turn as plain text."
    )
    template_options: dict[str, Any] = Field(
        default={}, description="Values that the chat template reads, such as {enable_thinking: false}."
    )
    today: date | None = Field(
        default=None, description="The date that chat templates write which ask for one. Default: they are told none."
    )
    tokens_per_pass: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Tokens of a forward pass, padding included. Default: 8192 on a GPU, 1024 on a processor; "
        "halved for the rest of the run where memory does not suffice.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the comparison of vocabularies (torch.compile), which takes a while at the start.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Whether a checkpoint may bring code of its own, which is then run."
    )
    local_files_only: bool = Field(default=False, description="Whether nothing may be fetched from the hub.")
    models: dict[str, ModelOptions] = Field(
        default={}, description="Options for single models, by the name that the run uses."
    )

    def of_model(self, name: str) -> Mapping[str, Any]:
        """What holds for one model: every field of `ModelOptions`, its own or the backend's."""
        own = self.models.get(name, ModelOptions())
        return {
            field: getattr(self, field, None) if value is None else value
            for field in ModelOptions.model_fields
            for value in (getattr(own, field),)
        }
