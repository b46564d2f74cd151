"""Tests that start themselves as programs, on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from distilfast.driver import processes

TESTS = Path(__file__).parent


def environment(**variables: str) -> dict[str, str]:
    """One thread a process, and what the tests share can be imported."""
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}


def torchrun(file: str, *arguments: Any, timeout: float = 900, **variables: str) -> str:
    """Run a file on two ranks; what it printed. It has to end well."""
    program = Path(sys.executable).parent / "torchrun"
    port = str(processes.free_port())
    done = subprocess.run(
        [program, "--nproc_per_node", "2", "--master_port", port, file, *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr
