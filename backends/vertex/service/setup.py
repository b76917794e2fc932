"""What can be known to be wrong before the service is asked: the name of a model, and the credentials."""

from __future__ import annotations

import os
import re
from pathlib import Path

import google.auth
from google.auth.exceptions import DefaultCredentialsError

from backends.errors import ConfigError
from backends.service.retry import one_line

_VARIABLE, _USUAL_FILE = "GOOGLE_APPLICATION_CREDENTIALS", "application_default_credentials.json"
_GET_SOME = f"Run 'gcloud auth application-default login', or set {_VARIABLE} to a service-account file"
INSTEAD = "; a model on this machine needs none (--backend local)"
# Names, "publishers/google/models/NAME", "projects/…/endpoints/…"; also versions such as "NAME@001".
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]*(/[A-Za-z0-9][A-Za-z0-9._@:-]*)*")


def check_model_name(model: str) -> None:
    """Refuse what no model of Vertex AI can be called.

    Raises
    ------
    ConfigError
        With the value.
    """
    if not _MODEL_NAME.fullmatch(model):
        raise ConfigError(f"{model!r} cannot be the name of a Vertex AI model, such as gemini-2.5-flash.")


def check_credentials() -> None:
    """Load the credentials of this machine; a file is read, and no token is asked for.

    Raises
    ------
    ConfigError
        If there are none, with a backend that needs none; or if the file that holds them is broken, with its path.
    """
    try:
        google.auth.default()
    # Of a file that holds other JSON than an object, Google's library fails by what it does with it.
    except (DefaultCredentialsError, OSError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(credentials_problem(error, INSTEAD)) from error


def credentials_problem(error: Exception, instead: str = "") -> str:
    """What is wrong with the credentials, where Google's library found none that it can use."""
    file = _file()
    if file is None:
        return f"no Google credentials were found. {_GET_SOME}{instead}."
    if not file.exists():
        return f"the file of the Google credentials, {file} ({_VARIABLE}), does not exist. {_GET_SOME}{instead}."
    said = (error.strerror if isinstance(error, OSError) else None) or "; ".join(map(str, error.args))
    return f"the file of the Google credentials, {file}, is broken: {one_line(said).rstrip('.')}. {_GET_SOME}."


def _file() -> Path | None:
    """Where Google's library looks for a file: the variable's, else that of gcloud if it is there."""
    named = os.environ.get(_VARIABLE)
    if named:
        return Path(named)
    folder = os.environ.get("CLOUDSDK_CONFIG")
    if not folder:
        roaming = os.environ.get("APPDATA") if os.name == "nt" else None
        folder = f"{roaming}/gcloud" if roaming else os.path.expanduser("~/.config/gcloud")
    usual = Path(folder, _USUAL_FILE)
    return usual if usual.exists() else None
