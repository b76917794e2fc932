"""What a program takes from the folder that it is started in."""

import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT

ASK = """
import os
from flows.runtime.environment import prepare_environment
prepare_environment()
print(os.environ["GOOGLE_CLOUD_PROJECT"])
"""


def project_seen(folder: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GOOGLE_")}
    variables = kept | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", ASK], env=variables, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_dotenv_is_read_where_the_user_is_and_the_environment_wins_over_it(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GOOGLE_CLOUD_PROJECT=from-dotenv\n")
    (tmp_path / "deeper").mkdir()
    assert project_seen(tmp_path / "deeper") == "from-dotenv"
    assert project_seen(tmp_path, GOOGLE_CLOUD_PROJECT="from-environment") == "from-environment"
