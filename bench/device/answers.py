"""Does every bench import and answer --help where DeepSpeed, datasets and jsonargparse are missing?

    python bench/device/answers.py

Part of the rehearsal. One process for all, since importing torch takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import runpy
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
ABSENT = ("deepspeed", "datasets", "jsonargparse")


def answer(path: Path) -> str:
    """What is wrong with a script's answer to --help, or "". One without arguments is imported."""
    takes_arguments = "argparse" in path.read_text(encoding="utf-8")
    said = io.StringIO()
    sys.argv = [str(path), "--help"]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(path), run_name="__main__" if takes_arguments else path.stem)
    except SystemExit as error:
        if error.code:
            return f"exit status {error.code}"
    except Exception as error:
        return repr(error)
    return "" if not takes_arguments or "usage:" in said.getvalue() else "no usage"


def main() -> None:
    there = [name for name in ABSENT if importlib.util.find_spec(name)]
    if there:
        sys.exit(f"installed: {', '.join(there)}; this wants an environment without")
    sys.path.insert(0, str(BENCH))  # where a script that is started finds its neighbours
    import distilfast

    print(f"distilfast {distilfast.__version__}")
    failed = 0
    for path in sorted([*BENCH.glob("*.py"), *BENCH.glob("device/*.py")]):
        if path != Path(__file__).resolve():
            wrong = answer(path)
            failed += bool(wrong)
            print(f"{path.relative_to(BENCH)}: {wrong or 'ok'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
