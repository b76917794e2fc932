"""What the service refuses: fields it does not know, values of the wrong type, values out of range.

A request that passes comes back in one canonical spelling (camelCase, nulls dropped, whole numbers as int), which is
what the rest of the world works with and what is hashed.
"""

from __future__ import annotations

import math
import re
from typing import Any

from tests.vertex_world.models import ModelSpec
from tests.vertex_world.wire import ApiError, malformed

Message = dict[str, Any]

# A field's kind: "string", "bool", "int", "float", "map", "any" (unchecked), a message by name, [kind] for a list.
MESSAGES: dict[str, dict[str, Any]] = {
    "GenerateContentRequest": {
        "contents": ["Content"],
        "systemInstruction": "Content",
        "generationConfig": "GenerationConfig",
        "safetySettings": ["SafetySetting"],
        "labels": "map",
        "cachedContent": "string",
        "tools": ["any"],
        "toolConfig": "any",
        "modelArmorConfig": "any",
    },
    "CountTokensRequest": {
        "contents": ["Content"],
        "systemInstruction": "Content",
        "generationConfig": "GenerationConfig",
        "model": "string",
        "instances": ["any"],
        "tools": ["any"],
    },
    "Content": {"role": "string", "parts": ["Part"]},
    "Part": {
        "text": "string",
        "thought": "bool",
        "thoughtSignature": "string",
        "inlineData": "any",
        "fileData": "any",
        "functionCall": "any",
        "functionResponse": "any",
        "executableCode": "any",
        "codeExecutionResult": "any",
        "videoMetadata": "any",
    },
    "GenerationConfig": {
        "temperature": "float",
        "topP": "float",
        "topK": "float",
        "candidateCount": "int",
        "maxOutputTokens": "int",
        "stopSequences": ["string"],
        "presencePenalty": "float",
        "frequencyPenalty": "float",
        "responseLogprobs": "bool",
        "logprobs": "int",
        "seed": "int",
        "responseMimeType": "string",
        "responseSchema": "any",
        "responseJsonSchema": "any",
        "responseModalities": ["string"],
        "mediaResolution": "string",
        "audioTimestamp": "bool",
        "speechConfig": "any",
        "routingConfig": "any",
        "modelConfig": "any",
        "imageConfig": "any",
        "enableAffectiveDialog": "bool",
        "thinkingConfig": "ThinkingConfig",
    },
    "ThinkingConfig": {"includeThoughts": "bool", "thinkingBudget": "int", "thinkingLevel": "string"},
    "SafetySetting": {"category": "string", "threshold": "string", "method": "string"},
    "BatchPredictionJob": {
        "displayName": "string",
        "model": "string",
        "inputConfig": "InputConfig",
        "outputConfig": "OutputConfig",
        "instanceConfig": "any",
        "modelParameters": "any",
        "labels": "map",
        "encryptionSpec": "any",
        "serviceAccount": "string",
        "disableContainerLogging": "bool",
        "dedicatedResources": "any",
        "manualBatchTuningParameters": "any",
        "generateExplanation": "bool",
    },
    "InputConfig": {"instancesFormat": "string", "gcsSource": "GcsSource", "bigquerySource": "any"},
    "GcsSource": {"uris": ["string"]},
    "OutputConfig": {
        "predictionsFormat": "string",
        "gcsDestination": "GcsDestination",
        "bigqueryDestination": "any",
    },
    "GcsDestination": {"outputUriPrefix": "string"},
}

# Known to the service, not spoken by this stand-in: refused loudly, so that nobody believes they were honoured.
_NOT_SPOKEN = {
    "cachedContent", "tools", "toolConfig", "modelArmorConfig", "responseSchema", "responseJsonSchema", "speechConfig",
    "routingConfig", "modelConfig", "imageConfig", "inlineData", "fileData", "functionCall", "functionResponse",
    "presencePenalty", "frequencyPenalty", "instances", "bigquerySource", "bigqueryDestination",
}  # fmt: skip
_LABEL = re.compile(r"[\w-]{0,63}", re.UNICODE)
_MORE = "Learn more: https://cloud.google.com/vertex-ai/generative-ai/docs/model-reference/gemini"


def parse_message(kind: str, value: Any, path: str = "") -> Message:
    """Check a JSON object against a message and return it in canonical spelling."""
    if not isinstance(value, dict):
        raise _invalid_value(path, f"type.googleapis.com/google.cloud.aiplatform.v1beta1.{kind}", value)
    fields = MESSAGES[kind]
    parsed: Message = {}
    for name, item in value.items():
        camel = re.sub(r"_([a-z])", lambda match: match.group(1).upper(), name)
        if camel not in fields:
            raise _unknown_field(path, name)
        if item is None:
            continue
        if camel in parsed:
            raise malformed(f"Invalid JSON payload received. Field {camel!r} is given twice at '{path}'.")
        if camel in _NOT_SPOKEN:
            raise malformed(f"The local stand-in does not speak {_join(path, name)!r}.")
        parsed[camel] = _parse_value(fields[camel], item, _join(path, _snake(camel)))
    return parsed


def _parse_value(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise _invalid_value(path, "repeated field", value)
        return [_parse_value(kind[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
    if kind == "any":
        return value
    if kind in MESSAGES:
        return parse_message(kind, value, path)
    return _SCALARS[kind](value, path)


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _invalid_value(path, "TYPE_STRING", value)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise malformed(f"Invalid JSON payload received. Unpaired surrogate at '{path}'.")
    return value


def _bool(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise _invalid_value(path, "TYPE_BOOL", value)
    return value


def _int(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise _invalid_value(path, "TYPE_INT32", value)
    return int(value)


def _float(value: Any, path: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _invalid_value(path, "TYPE_FLOAT", value)
    return int(value) if value == int(value) else value


def _map(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _invalid_value(path, "map", value)
    for key, item in value.items():
        for text in (key, _string(item, f"{path}[{key}]")):
            if not _LABEL.fullmatch(text) or text != text.lower():
                raise malformed(f"Invalid label {text!r}: at most 63 lower-case letters, digits, '_' and '-'.")
    return value


_SCALARS = {"string": _string, "bool": _bool, "int": _int, "float": _float, "map": _map}


def parse_request(body: Any) -> Message:
    """Check a generateContent request as far as that does not depend on the model."""
    request = parse_message("GenerateContentRequest", body)
    _check_contents(request.get("contents"))
    if "systemInstruction" in request:
        _check_parts(request["systemInstruction"])
    _check_ranges(request.get("generationConfig", {}))
    return request


def _check_contents(contents: list[Message] | None) -> None:
    if not contents:
        raise malformed(f"Unable to submit request because at least one contents field is required. {_MORE}")
    for turn in contents:
        role = turn.get("role")
        if role not in {"user", "model"} and not (role is None and len(contents) == 1):
            raise malformed("Please use a valid role: user, model.")
        _check_parts(turn)
    if len(contents) == 1 and contents[0].get("role") == "model":
        raise malformed("Please ensure that single turn requests end with a user role or the role field is empty.")


def _check_parts(content: Message) -> None:
    if not content.get("parts"):
        raise malformed(
            f"Unable to submit request because it must include at least one parts field, which describes the prompt "
            f"input. {_MORE}"
        )
    for part in content["parts"]:
        if not part.get("text"):
            raise malformed(
                "Unable to submit request because it has an empty text parameter. Add a value to the parameter and "
                f"try again. {_MORE}"
            )


_RANGES = {  # name: first and last allowed value, and the exclusive bound in the message
    "temperature": (0, 2, "2.0000001"),
    "topP": (0, 1, "1.0000001"),
    "topK": (1, 64, "65"),
    "candidateCount": (1, 8, "9"),
    "maxOutputTokens": (1, 65536, "65537"),
    "logprobs": (1, 20, "21"),
}


def _check_ranges(config: Message) -> None:
    for name, (low, high, bound) in _RANGES.items():
        if name in config and not low <= config[name] <= high:
            raise _out_of_range(name, config[name], low, bound)
    if len(config.get("stopSequences", [])) > 5:
        raise _out_of_range("stopSequences", len(config["stopSequences"]), 1, "6")
    if "logprobs" in config and config.get("responseLogprobs") is not True:
        raise malformed(
            "Unable to submit request because logprobs is supported only when response_logprobs is set to true. Update "
            f"the value and try again. {_MORE}"
        )
    thinking = config.get("thinkingConfig", {})
    if "thinkingBudget" in thinking and "thinkingLevel" in thinking:
        raise malformed("You can only set only one of thinking budget and thinking level.")


def check_model(spec: ModelSpec, request: Message) -> None:
    """Refuse what this model cannot do."""
    config = request.get("generationConfig", {})
    if not spec.prefill and request["contents"][-1].get("role") == "model":
        raise ApiError(400, "Requests ending with a model turn are not supported.")
    if not spec.logprobs and config.get("responseLogprobs"):
        raise ApiError(400, "Unable to submit request because Logprobs is not supported for this model.")
    _check_thinking(spec, config.get("thinkingConfig", {}))


def _check_thinking(spec: ModelSpec, thinking: Message) -> None:
    if thinking and spec.thinking == "none":
        raise ApiError(400, "Unable to submit request because Thinking is not supported by this model.")
    if "thinkingLevel" in thinking and not spec.thinking_level:
        raise ApiError(400, "Unable to submit request because thinking_level is not supported by this model.")
    budget = thinking.get("thinkingBudget", -1)
    if budget == 0 and spec.thinking == "forced":
        raise ApiError(400, "Budget 0 is invalid. This model only works in thinking mode.")
    if budget not in {-1, 0} and not spec.min_budget <= budget <= spec.max_budget:
        raise malformed(
            f"The thinking budget {budget} is invalid. Please choose a value between {spec.min_budget} and "
            f"{spec.max_budget}."
        )


def parse_job(body: Any) -> Message:
    """Check the body of batchPredictionJobs.create."""
    job = parse_message("BatchPredictionJob", body)
    for name in ("displayName", "model", "inputConfig", "outputConfig"):
        if not job.get(name):
            raise malformed(f"The required field {_snake(name)!r} is missing from batch_prediction_job.")
    if len(job["displayName"]) > 128:
        raise malformed("Display name must be at most 128 characters long.")
    source, target = job["inputConfig"], job["outputConfig"]
    if source.get("instancesFormat") != "jsonl" or target.get("predictionsFormat") != "jsonl":
        raise malformed("Only the jsonl format is supported with a Cloud Storage source and destination.")
    uris = source.get("gcsSource", {}).get("uris", [])
    prefix = target.get("gcsDestination", {}).get("outputUriPrefix", "")
    for uri in (*uris, prefix):
        if not re.fullmatch(r"gs://[^/]+(/.*)?", uri):
            raise malformed(f"Invalid Cloud Storage URI: {uri!r}.")
    if not uris:
        raise malformed("At least one URI is required in input_config.gcs_source.uris.")
    return job


def _unknown_field(path: str, name: str) -> ApiError:
    where = f" at '{path}'" if path else ""
    message = f'Invalid JSON payload received. Unknown name "{name}"{where}: Cannot find field.'
    return malformed(message, _violation(path, message))


def _invalid_value(path: str, kind: str, value: Any) -> ApiError:
    message = f"Invalid value at '{path}' ({kind}), {value!r}"
    return malformed(message, _violation(path, message))


def _violation(path: str, message: str) -> list[dict[str, Any]]:
    violations = [{"field": path, "description": message}] if path else [{"description": message}]
    return [{"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": violations}]


def _out_of_range(name: str, value: object, low: float, bound: str) -> ApiError:
    return malformed(
        f"Unable to submit request because it has a {name} value of {value} but the supported range is from {low} "
        f"(inclusive) to {bound} (exclusive). Update the value and try again. {_MORE}"
    )


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda match: "_" + match.group().lower(), name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
