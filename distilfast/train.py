"""Distil a student from a teacher.

    deepspeed distilfast/train.py --config configs/X.yaml [--key.sub value ...]
    torchrun --nproc_per_node 2 distilfast/train.py --config configs/X.yaml
    distilfast train --config configs/X.yaml

Without --config it runs the demo's recipe. Exit status: 0 done, or stopped by a signal with a
checkpoint written; 2 something wrong in the configuration or the inputs, found before training;
1 anything else. The loop is in `driver/loop.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    # Python puts the folder of a program first on sys.path, where `config`, `data` or `progress`
    # would be found in place of packages by these names.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]

from distilfast import config as configs
from distilfast import demo
from distilfast.driver import loop, processes
from distilfast.driver.checkpoint import CheckpointError
from distilfast.errors import ConfigError
from distilfast.progress import log_to_stderr


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    log_to_stderr()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if any(a.split("=")[0] in ("--config", "--help", "-h") for a in arguments):
            loop.run(configs.parse(arguments))
        else:
            demo.distil(arguments)
    except (ConfigError, loop.TrainingError, CheckpointError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"distilfast: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def script() -> None:
    """`main` as a program of its own."""
    status = main()
    if status != 1:  # after an error the others may not come
        processes.finish()
    sys.exit(status)


if __name__ == "__main__":
    # The module by its name: this one is __main__, whose errors nobody else would recognise.
    from distilfast import train as this

    this.script()
