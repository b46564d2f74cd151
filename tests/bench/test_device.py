"""The two runs on a GPU keep what they have done, however they end (bench/gpu.sh, bench/device).

What needs a GPU is replaced by commands of a second; bench/device/rehearse.sh starts the real ones.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import ROOT
from programs import BENCH, ENVIRONMENT, rows_of

DEVICE = BENCH / "device"
# Hears an interrupt, as Python does.
PATIENT = """
import time
try:
    print("begun", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(30)"

pytestmark = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("timeout")), reason="needs bash and GNU timeout"
)


def script(folder: Path, seconds: int, *steps: str) -> list[str]:
    """A run of these steps with signals that follow each other by a second."""
    lines = [
        "set -uo pipefail",
        f". {DEVICE / 'steps.sh'}",
        "GRACE=1 FEWEST=1",
        f"python={sys.executable}",
        f"begin {seconds} {folder}",
        *steps,
        "finish",
    ]
    return ["bash", "-c", "\n".join(lines)]


def run(folder: Path, seconds: int, *steps: str) -> subprocess.CompletedProcess[str]:
    command = script(folder, seconds, *steps)
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)


def statuses(folder: Path) -> dict[str, str]:
    return {row["step"]: row["status"] for row in rows_of(folder / "summary.csv")}


def kept(folder: Path) -> dict[str, str]:
    """What the archive holds, by name."""
    with tarfile.open(folder / "results.tgz") as archive:
        files = [x for x in archive.getmembers() if x.isfile()]
        return {x.name.removeprefix("./"): archive.extractfile(x).read().decode() for x in files}


def test_steps_end_in_their_time_and_their_logs_are_kept(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        60,
        "step good 10 bash -c 'echo fine; echo 3 >$work/table.csv'",
        "show good 5 fine",
        "step bad 10 bash -c 'echo no luck; exit 3'",
        f"step slow 1 $python -c '{PATIENT}'",
        f"step deaf 1 $python -c '{DEAF}'",
        "step shot 10 bash -c 'echo hit; kill -9 $$'",
    )
    assert done.returncode == 1
    assert statuses(tmp_path) == {
        "good": "ok",
        "bad": "failed with 3",
        "slow": "out of time",
        "deaf": "killed",
        "shot": "killed",
    }
    files = kept(tmp_path)
    assert files["good.log"] == "fine\n"
    assert files["bad.log"] == "no luck\n"
    assert files["slow.log"] == "begun\ninterrupted\n"  # it could still say what it had
    assert files["shot.log"] == "hit\n"
    assert "deaf,killed" in files["summary.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.tgz", "summary.csv"]
    assert "\nfine\n" in done.stdout
    assert "| no luck" in done.stdout
    assert "failed: bad slow deaf shot;" in done.stdout


def test_results_of_a_step_are_kept_before_the_next_begins(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        60,
        "export work",
        "step first 10 bash -c 'echo 1,2 >$work/table.csv'",
        f"step second 10 tar -xOzf {tmp_path}/results.tgz ./table.csv ./summary.csv",
        "show second 5 .",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1,2\nstep,status,seconds\nfirst,ok,\d+\n", done.stdout)


def test_deadline_shortens_a_step_and_skips_the_next(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(tmp_path, 4, "step long 50 sleep 50", "step late 50 touch $work/late")
    assert time.monotonic() - began < 10
    assert done.returncode == 1
    assert statuses(tmp_path) == {"long": "out of time", "late": "skipped: out of time"}
    assert "skipped: late;" in done.stdout
    assert "late" not in kept(tmp_path)


def test_cut_off_run_keeps_its_logs_and_leaves_no_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    steps = (
        "step first 10 echo fine",
        f"step second 30 bash -c 'echo begun; echo $$ >{pid}; sleep 30 & sleep 30'",
        "step third 10 echo never",
    )
    folder = tmp_path / "kept"
    process = subprocess.Popen(script(folder, 60, *steps), stdout=subprocess.PIPE, text=True)
    while not pid.exists() or not pid.read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert statuses(folder) == {"first": "ok", "second": "cut off"}
    files = kept(folder)
    assert files["first.log"] == "fine\n"
    assert files["second.log"].startswith("begun\n")
    assert "cut off after" in output
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize(("number", "seconds"), [(1, 300), (2, 400)])
def test_limits_of_a_run_add_up_to_what_it_may_take(
    number: int, seconds: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", str(number), tmp_path / "out", "--list"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    limits = dict(line.split() for line in done.stdout.splitlines())
    assert {"smoke", "parity", "memcheck"} < limits.keys() or "driver" in limits
    assert 0 < sum(map(int, limits.values())) <= seconds


def test_run_says_what_it_wants(tmp_path: Path) -> None:
    for arguments in ([], ["3", "folder"], ["1"], ["1", str(tmp_path), "--wet"]):
        command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert "bash bench/gpu.sh 1 FOLDER" in done.stdout


def test_digest_shows_what_ran_and_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "contestant,rows,time_ms,status\n"
        "ours,8192,0.123456,ok\n"
        "theirs,8192,,failed: out of memory\n"
        "absent,8192,,skipped: is not installed\n",
        encoding="utf-8",
    )
    command = [sys.executable, DEVICE / "digest.py", path, "contestant", "rows", "time_ms"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == (
        "contestant | rows | time_ms\n"
        "ours | 8192 | 0.123\n"
        "theirs | 8192 |  | failed: out of memory\n"
    )


def test_smoke_tells_a_wrong_kernel_from_a_right_one() -> None:
    pytest.importorskip("triton")
    code = f"""
import sys
sys.path.insert(0, {str(DEVICE)!r})
import smoke
found = smoke.Smoke(smoke.parser().parse_args("--device cpu --rows 2 --scale 400".split()))
found.case("right", lambda: found.dense(30522))
loss = smoke.distillation_loss
def half(student, *arguments, backend, **keywords):
    output = loss(student, *arguments, backend=backend, **keywords)
    by = 0.5 if backend == "triton" else 1.0
    return output._replace(loss=output.loss * by)
smoke.distillation_loss = half
found.case("half", lambda: found.dense(30522))
found.case("absent", lambda: found.dense("many"))
print(found.failed)
"""
    environment = {**ENVIRONMENT, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    right, half, absent, failed = done.stdout.splitlines()
    assert "| ok " in right
    assert "| WRONG  WrongResultError: off by loss 5e-01 gradient 5e-01" in half
    assert "| FAILED  TypeError" in absent
    assert failed == "['half', 'absent']"
