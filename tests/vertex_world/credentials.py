"""A service account of the world's own, and the token endpoint that honours it."""

from __future__ import annotations

import json
import secrets
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt

from tests.vertex_world.wire import ApiError

GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_AUDIENCE = "https://oauth2.googleapis.com/token"  # google-auth names this one, whatever the token_uri
_INVALID = (
    "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid "
    "authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project."
)


@lru_cache(maxsize=1)
def _key_pair() -> tuple[str, str]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


class TokenError(Exception):
    """What the token endpoint answers with 400, as OAuth 2 has it."""

    def __init__(self, error: str, description: str) -> None:
        super().__init__(description)
        self.body = {"error": error, "error_description": description}


class ServiceAccount:
    """Issues and checks access tokens for one generated key."""

    def __init__(self, project: str, base_url: str, lifetime_s: int) -> None:
        self.private_key, self.public_key = _key_pair()
        self.email = f"stand-in@{project}.iam.gserviceaccount.com"
        self.token_uri = f"{base_url}/token"
        self.project = project
        self.lifetime_s = lifetime_s
        self._tokens: set[str] = set()
        self._lock = threading.Lock()

    def write_key_file(self, path: Path) -> None:
        """Write the JSON that GOOGLE_APPLICATION_CREDENTIALS names."""
        content = {
            "type": "service_account",
            "project_id": self.project,
            "private_key_id": "stand-in",
            "private_key": self.private_key,
            "client_email": self.email,
            "client_id": "100000000000000000001",
            "token_uri": self.token_uri,
            "universe_domain": "googleapis.com",
        }
        path.write_text(json.dumps(content), encoding="utf-8")
        path.chmod(0o600)

    def grant(self, form: bytes) -> dict[str, Any]:
        """The token endpoint: a signed JWT in, an access token out."""
        fields = {name: values[0] for name, values in parse_qs(form.decode("latin-1")).items()}
        if fields.get("grant_type") != GRANT:
            raise TokenError("unsupported_grant_type", f"Invalid grant_type: {fields.get('grant_type', '')}")
        try:
            claims = jwt.decode(fields.get("assertion", ""), certs=self.public_key, audience=_AUDIENCE)
        except (ValueError, TypeError) as error:  # google-auth's own errors are ValueErrors
            raise TokenError("invalid_grant", f"Invalid JWT Signature: {error}") from error
        if claims.get("iss") != self.email:
            raise TokenError("invalid_grant", "Invalid grant: account not found")
        if SCOPE not in str(claims.get("scope", "")).split():
            raise TokenError("invalid_scope", "Invalid OAuth scope or ID token audience provided.")
        token = f"ya29.{secrets.token_urlsafe(32)}"
        with self._lock:
            self._tokens.add(token)
        return {"access_token": token, "expires_in": self.lifetime_s, "token_type": "Bearer"}

    def check(self, authorization: str | None) -> None:
        """Refuse a call without a token that was issued here."""
        token = (authorization or "").removeprefix("Bearer ")
        with self._lock:
            known = token in self._tokens
        if not known:
            raise ApiError(401, _INVALID)

    def expire_tokens(self) -> None:
        """All tokens issued so far stop working."""
        with self._lock:
            self._tokens.clear()
