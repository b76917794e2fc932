"""Which call goes where: Vertex AI, the Gemini Developer API, the token endpoint and Cloud Storage."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.vertex_world.answering import Channel, Service
from tests.vertex_world.credentials import ServiceAccount, TokenError
from tests.vertex_world.jobs import JobStore, check_job
from tests.vertex_world.ledger import Ledger, OnlineCall
from tests.vertex_world.server import Call, Handled, Reply, json_reply
from tests.vertex_world.storage_proxy import StorageProxy
from tests.vertex_world.validation import parse_message
from tests.vertex_world.wire import ApiError, canonical_request_hash, malformed

_VERTEX = re.compile(
    r"/(?:v1|v1beta1)/projects/(?P<project>[^/]+)/locations/(?P<location>[^/]+)/"
    r"(?:batchPredictionJobs(?:/(?P<job>\d+)(?P<cancel>:cancel)?)?"
    r"|publishers/google/models/(?P<model>[^/:]+):(?P<method>\w+))"
)
_EXPRESS = re.compile(r"/(?:v1|v1beta1)/publishers/google/models/(?P<model>[^/:]+):(?P<method>\w+)")
_DEVELOPER = re.compile(r"/(?:v1|v1beta)/models/(?P<model>[^/:]+):(?P<method>\w+)")
_LOCATION = re.compile(r"global|us|eu|[a-z]+-[a-z]+\d")
_JOB_KINDS = {
    ("POST", False, False): "create",
    ("GET", False, False): "list",
    ("GET", True, False): "get",
    ("DELETE", True, False): "delete",
    ("POST", True, True): "cancel",
}
_METHODS = {"generateContent": "online", "countTokens": "count"}


@dataclass
class Router:
    """Finds the endpoint of a call. Bodies are looked at when the work is done, so that faults can come first."""

    project: str
    service: Service
    jobs: JobStore
    account: ServiceAccount
    storage: StorageProxy
    ledger: Ledger
    api_key: str

    def __call__(self, call: Call) -> Handled:
        path = urlsplit(call.target).path
        if self.storage.speaks(path):
            return Handled(self.storage.endpoint(call.method, call.target), lambda: self._store(call))
        if path == "/token" and call.method == "POST":
            return Handled("token", lambda: self._token(call))
        if match := _VERTEX.fullmatch(path):
            return self._vertex(call, match)
        if match := _EXPRESS.fullmatch(path) or _DEVELOPER.fullmatch(path):
            channel: Channel = "developer" if "/publishers/" not in path else "online"
            return self._model_call(call, match, "global", channel)
        return Handled("other", lambda: _not_found(call))

    def _vertex(self, call: Call, match: re.Match[str]) -> Handled:
        location = match["location"]
        if match["model"]:
            return self._model_call(call, match, location, "online")
        kind = _JOB_KINDS.get((call.method, bool(match["job"]), bool(match["cancel"])))
        if kind is None:
            return Handled("other", lambda: _not_found(call))
        work: dict[str, Callable[[], Any]] = {
            "create": lambda: self._create(call, match["project"], location),
            "list": lambda: self._list(call, location),
            "get": lambda: self.jobs.get(location, match["job"]),
            "cancel": lambda: self.jobs.cancel(location, match["job"]),
            "delete": lambda: self.jobs.delete(location, match["job"]),
        }

        def answer() -> Reply:
            self._authorize(call, match["project"], location)
            return json_reply(work[kind]())

        return Handled(kind, answer)

    def _model_call(self, call: Call, match: re.Match[str], location: str, channel: Channel) -> Handled:
        kind = _METHODS.get(match["method"])
        if kind is None or call.method != "POST":
            return Handled("other", lambda: _not_found(call))
        project = match.groupdict().get("project")

        def answer() -> Reply:
            self._authorize(call, project, location)
            if kind == "count":
                return json_reply(self._count(call))
            return self._generate(call, match["model"], location, channel)

        return Handled(kind, answer)

    def _authorize(self, call: Call, project: str | None, location: str) -> None:
        if project is None:
            if call.headers.get("x-goog-api-key") != self.api_key:
                raise ApiError(400, "API key not valid. Please pass a valid API key.")
            return
        self.account.check(call.headers.get("authorization"))
        if project != self.project:
            message = f"Permission 'aiplatform.endpoints.predict' denied on resource '//aiplatform.googleapis.com/projects/{project}' (or it may not exist)."  # noqa: E501
            raise ApiError(403, message)
        if not _LOCATION.fullmatch(location):
            raise ApiError(404, f"Location {location!r} is not found or access is unauthorized.")

    def _token(self, call: Call) -> Reply:
        self.ledger.note_token()
        try:
            return json_reply(self.account.grant(call.body))
        except TokenError as error:
            return json_reply(error.body, 400)

    def _create(self, call: Call, project: str, location: str) -> Any:
        body = _parse_json(call)
        try:
            model, job = check_job(body)
            self.service.resolve(model, location, job["model"])
        except ApiError as error:
            self.ledger.note_refusal("create", error.message, body, malformed=error.malformed)
            raise
        return self.jobs.create(project, location, model, job)

    def _list(self, call: Call, location: str) -> Any:
        query = dict(parse_qsl(urlsplit(call.target).query))
        try:
            return self.jobs.list(location, query)
        except ApiError as error:
            self.ledger.note_refusal("list", error.message, query, malformed=error.malformed)
            raise

    def _generate(self, call: Call, model: str, location: str, channel: Channel) -> Reply:
        body: Any = None
        try:
            body = _parse_json(call)
            spec = self.service.resolve(model, location, _resource(call, model))
            request = self.service.parse(spec, model, body, channel)
        except ApiError as error:
            self.ledger.note_refusal("online", error.message, body, malformed=error.malformed)
            raise
        status = 500
        request_hash = canonical_request_hash(model, request)
        arrived = time.monotonic()
        with self.ledger.online_in_flight():
            try:
                response = self.service.answer(spec, model, request, channel).response
                status = 200
            except ApiError as error:
                status = error.code
                raise
            finally:
                time.sleep(max(0.0, arrived + self.service.faults.latency_s - time.monotonic()))
                self.ledger.note_online(OnlineCall(model, request_hash, request, status, arrived, time.monotonic()))
        bought = Counter([request_hash])
        return json_reply(response)._replace(delivered=lambda: self.ledger.note_bought(bought))

    def _count(self, call: Call) -> Any:
        return self.service.count_tokens(parse_message("CountTokensRequest", _parse_json(call)))

    def _store(self, call: Call) -> Reply:
        return Reply(*self.storage.handle(call.method, call.target, call.raw_headers, call.body))


def _parse_json(call: Call) -> Any:
    def no_constant(name: str) -> None:
        raise ValueError(f"unexpected {name}")

    try:
        return json.loads(call.body, parse_constant=no_constant)
    except ValueError as error:
        raise malformed(f"Invalid JSON payload received. {error}") from error


def _resource(call: Call, model: str) -> str:
    path = urlsplit(call.target).path.partition(":")[0]
    return path.split("/", 2)[-1] if "/projects/" in path else f"models/{model}"


def _not_found(call: Call) -> Reply:
    message = f"The local stand-in does not speak {call.method} {urlsplit(call.target).path}."
    raise ApiError(404, message, malformed=True)
