"""An engine in a process of its own, asked by one line of JSON at a time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitquant.errors import ExportError
from vitquant.export import engine as engine_file

Where = Callable[[str], "str | None"]
"""Finds the place in the model that an engine's message is about."""


def nowhere(message: str) -> None:
    """For files whose nodes are not known."""


class Process:
    """Runs `export/engine.py`. Raises ExportError in one line if the engine fails, or dies of a signal."""

    def __init__(self, engine: str, model: Path, where: Where = nowhere, **options: Any) -> None:
        self.engine, self.model, self.where = engine, model, where
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        # Not `-m`, which would import torch and this package first.
        start = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        arguments = [str(engine_file.__file__), engine, json.dumps(options), str(model)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply to one request; see `engine.py`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died before; the reply is missing too
        line = self.process.stdout.readline()
        if not line:
            raise ExportError(f"{self.engine} cannot run {self.model}: {self._reason()}")
        return json.loads(line)

    def _reason(self) -> str:
        """Why it ended, in one line."""
        code = self.process.wait()
        if code < 0:
            return f"it crashed ({signal.Signals(-code).name})"
        self.errors.seek(0)
        message = self.errors.read()
        place = self.where(message)
        last = [line.strip() for line in message.splitlines() if line.strip()] or ["it gave no message"]
        return f"{place}: {last[-1][:300]}" if place else last[-1][:300]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()
