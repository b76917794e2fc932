"""In front of fake-gcs-server: what version 1.54 of it lacks and the product depends on.

* ``ifGenerationMatch`` on resumable and simple uploads, downloads, reads and deletes (it checks multipart uploads);
* what a bucket was created or patched with: lifecycle, uniform access, location, labels;
* the rules for names of buckets, and pages of listings.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import urllib3

from tests.vertex_world.storage import GcsServer, ObjectStore

_BUCKET_PATH = re.compile(r"/storage/v1/b(?:/([^/]+))?/?")
_LIST_PATH = re.compile(r"/storage/v1/b/([^/]+)/o/?")
_OBJECT_PATH = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)")
_UPLOAD_PATH = re.compile(r"/(?:resumable/)?upload/(?:storage/v1/b/([^/]+)/o|resumable/([^/]+))")
_BUCKET_NAME = re.compile(r"(?!goog)(?!.*google)[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_KEPT = ("lifecycle", "iamConfiguration", "location", "labels", "storageClass", "versioning", "softDeletePolicy")
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
_PAGE = 1000


class StorageReply(NamedTuple):
    """Status, headers, and the body: whole, or still to be read when the reply is a download."""

    status: int
    headers: dict[str, str]
    body: bytes | urllib3.BaseHTTPResponse


class _Upload(NamedTuple):
    bucket: str
    name: str
    generation: str | None


@dataclass
class StorageProxy:
    """Forwards storage requests and adds what is missing."""

    server: GcsServer
    objects: ObjectStore
    _buckets: dict[str, dict[str, Any]] = field(default_factory=dict)
    _uploads: dict[str, _Upload] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @staticmethod
    def speaks(path: str) -> bool:
        """Whether a path belongs to Cloud Storage."""
        return path.startswith(("/storage/", "/upload/", "/download/", "/resumable/", "/batch/storage/"))

    @staticmethod
    def endpoint(method: str, path: str) -> str:
        """The endpoint kind, for faults."""
        if path.startswith(("/upload/", "/resumable/")):
            return "storage.upload"
        if path.startswith("/download/") or "alt=media" in path:
            return "storage.download"
        if method == "GET" and _LIST_PATH.fullmatch(urlsplit(path).path):
            return "storage.list"
        return "storage.other"

    def handle(self, method: str, target: str, headers: dict[str, str], body: bytes) -> StorageReply:
        """Answer one request."""
        path = urlsplit(target).path
        query = {name: values[0] for name, values in parse_qs(urlsplit(target).query).items()}
        if match := _UPLOAD_PATH.fullmatch(path):
            return self._upload(method, target, headers, body, query, match)
        if match := _LIST_PATH.fullmatch(path):
            if method == "GET":
                return self._list(target, headers, query)
        elif match := _OBJECT_PATH.fullmatch(path):
            refusal = self._precondition(unquote(match[1]), unquote(match[2]), query)
            if refusal is not None:
                return refusal
        elif match := _BUCKET_PATH.fullmatch(path):
            return self._bucket(method, target, headers, body, match[1] and unquote(match[1]))
        return self._forward(method, target, headers, body)

    def _bucket(self, method: str, target: str, headers: dict[str, str], body: bytes, name: str | None) -> StorageReply:
        sent = json.loads(body) if body else {}
        if method == "POST" and not _BUCKET_NAME.fullmatch(sent.get("name", "")):
            return _error(400, f"Invalid bucket name: '{sent.get('name', '')}'")
        reply = self._forward(method, target, headers, body)
        if reply.status >= 300 or not isinstance(reply.body, bytes):
            return reply
        with self._lock:
            if method == "DELETE":
                self._buckets.pop(name or "", None)
                return reply
            if method in {"POST", "PATCH", "PUT"}:
                self._keep(name or sent["name"], sent)
            answer = json.loads(reply.body)
            for bucket in answer.get("items", [answer]):
                bucket.update(self._buckets.get(bucket.get("name"), {}))
        return reply._replace(body=json.dumps(answer).encode())

    def _keep(self, name: str, sent: dict[str, Any]) -> None:
        kept = {**self._buckets.get(name, {}), **{key: sent[key] for key in _KEPT if key in sent}}
        if isinstance(kept.get("location"), str):
            kept["location"] = kept["location"].upper()
        self._buckets[name] = {key: value for key, value in kept.items() if value is not None}

    def _list(self, target: str, headers: dict[str, str], query: dict[str, str]) -> StorageReply:
        if "matchGlob" in query:
            return _error(501, "The local stand-in does not speak matchGlob.")
        page, token = int(query.pop("maxResults", _PAGE)), query.pop("pageToken", None)
        query.pop("fields", None)  # the paging needs the names
        reply = self._forward("GET", f"{urlsplit(target).path}?{urlencode(query)}", headers, b"")
        if reply.status != 200 or not isinstance(reply.body, bytes):
            return reply
        answer = json.loads(reply.body)
        items = sorted(answer.get("items", []), key=lambda item: item["name"].encode())
        if token is not None:
            last = base64.urlsafe_b64decode(token)
            items = [item for item in items if item["name"].encode() > last]
            answer.pop("prefixes", None)
        if len(items) > page:
            items = items[:page]
            answer["nextPageToken"] = base64.urlsafe_b64encode(items[-1]["name"].encode()).decode()
        return reply._replace(body=json.dumps({**answer, "items": items}).encode())

    def _upload(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes,
        query: dict[str, str],
        match: re.Match[str],
    ) -> StorageReply:
        upload_id = match[2] or query.get("upload_id")
        if upload_id is not None:
            return self._resume(method, target, headers, body, upload_id)
        if query.get("uploadType") == "media":
            with self._lock:
                refusal = self._precondition(unquote(match[1]), query.get("name", ""), query)
                return refusal or self._forward(method, target, headers, body)
        reply = self._forward(method, target, headers, body)
        if query.get("uploadType") == "resumable" and reply.status == 200:
            name = query.get("name") or json.loads(body)["name"]
            location = reply.headers["Location"]
            started = parse_qs(urlsplit(location).query).get("upload_id", [location.rsplit("/", 1)[-1]])[0]
            with self._lock:
                self._uploads[started] = _Upload(unquote(match[1]), name, query.get("ifGenerationMatch"))
        return reply

    def _resume(self, method: str, target: str, headers: dict[str, str], body: bytes, upload_id: str) -> StorageReply:
        # The condition is looked at when the upload is finished, not when it begins: two that began together race.
        content_range = next((value for key, value in headers.items() if key.lower() == "content-range"), "")
        upload = self._uploads.get(upload_id)
        if content_range.endswith("/*") or upload is None or upload.generation is None:
            return self._forward(method, target, headers, body)
        with self._lock:
            condition = {"ifGenerationMatch": upload.generation}
            refusal = self._precondition(upload.bucket, upload.name, condition)
            return refusal or self._forward(method, target, headers, body)

    def _precondition(self, bucket: str, name: str, query: dict[str, str]) -> StorageReply | None:
        wanted, unwanted = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        if wanted is None and unwanted is None:
            return None
        found = self.objects.metadata(bucket, name)
        generation = str(found["generation"]) if found else "0"
        if (wanted is not None and generation != wanted) or generation == unwanted:
            return _error(412, "At least one of the pre-conditions you specified did not hold.")
        return None

    def _forward(self, method: str, target: str, headers: dict[str, str], body: bytes) -> StorageReply:
        sent = {key: value for key, value in headers.items() if key.lower() not in _HOP_BY_HOP}
        sent["Host"] = self.server.external_host  # where uploads go on, and where mediaLink points
        reply = self.server.pool.request(
            method,
            self.server.url + quote(target, safe="/?&=%:+*,;@!$'()~"),
            body=body,
            headers=sent,
            preload_content=False,
            decode_content=False,
            redirect=False,
            retries=False,
        )
        kept = {key: value for key, value in reply.headers.items() if key.lower() not in _HOP_BY_HOP}
        length = reply.headers.get("Content-Length")
        if reply.status < 300 and self.endpoint(method, target) == "storage.download" and length:
            return StorageReply(reply.status, {**kept, "Content-Length": length}, reply)
        data = reply.read()
        reply.release_conn()
        return StorageReply(reply.status, kept, data)


def _error(code: int, message: str) -> StorageReply:
    body = {"error": {"code": code, "message": message, "errors": [{"message": message, "domain": "global"}]}}
    return StorageReply(code, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(body).encode())
