"""MLflow as a team runs it, on loopback: PostgreSQL or sqlite, proxied artifacts, passwords.

Passwords need the package Flask-WTF; without it the server asks nobody who they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PASSWORD = "only-for-these-tests"
ASKS_FOR_PASSWORD = importlib.util.find_spec("flask_wtf") is not None
START_SECONDS = 180  # a server imports for long on a busy machine


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Run PostgreSQL with an empty database; yield its address. It refuses to run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    program = programs[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="medssl-postgres-"))
    before: list[str] = []
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        before = ["setpriv", *ids]
    data, port = folder / "data", free_port()
    subprocess.run(
        [*before, program / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync"],
        check=True, capture_output=True, cwd=folder,
    )  # fmt: skip
    server = subprocess.Popen(
        [*before, program / "postgres", "-D", data, "-p", str(port), "-k", folder,
         "-c", "listen_addresses=127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
    )  # fmt: skip
    try:
        create = [program / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "runs"]
        limit = time.monotonic() + START_SECONDS
        while subprocess.run(create, check=False, capture_output=True).returncode:
            assert server.poll() is None, "PostgreSQL did not start"
            assert time.monotonic() < limit, "PostgreSQL does not answer"
            time.sleep(0.2)
        yield f"postgresql://mlflow@127.0.0.1:{port}/runs"
    finally:
        server.send_signal(signal.SIGINT)  # its fast way to end
        server.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """``mlflow server`` with basic-auth and proxied artifacts; can be killed and started again."""

    def __init__(self, folder: Path, database: str) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{folder / 'auth.db'}\nadmin_username = admin\n"
            f"admin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database,
            "--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts",
            "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            *(["--app-name", "basic-auth"] if ASKS_FOR_PASSWORD else []),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers."""
        environment = os.environ | {
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_AUTH_CONFIG_PATH": str(self._folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": PASSWORD,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        limit = time.monotonic() + START_SECONDS
        while not self._answers():
            said = (self._folder / "server.log").read_text()[-2000:]
            assert self._process.poll() is None, said
            assert time.monotonic() < limit, said
            time.sleep(0.2)

    def kill(self) -> None:
        """End it as a power cut does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/api/2.0/mlflow/experiments/get?experiment_id=0")  # noqa: S310
        except urllib.error.HTTPError as refusal:
            return ASKS_FOR_PASSWORD and refusal.code == 401
        except OSError:
            return False
        return not ASKS_FOR_PASSWORD
