"""Distil a student from a teacher.

    deepspeed distilfast/train.py --config configs/X.yaml [--key.sub value ...]
    torchrun --nproc_per_node 2 distilfast/train.py --config configs/X.yaml
    distilfast train --config configs/X.yaml

Without any argument it runs the demo's recipe, and says so. The training loop is in
`driver/loop.py`.

Exit status: 0, if it is done, or SIGTERM stopped it and a checkpoint was written; 130, if Ctrl-C
stopped it, with a checkpoint too, or at once by a second Ctrl-C; 2, if the configuration or the
inputs were found wrong before training; 1 otherwise.
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
from distilfast.driver.step import TrainingError
from distilfast.errors import ConfigError
from distilfast.progress import log_to_stderr


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    log_to_stderr()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = os.environ.get("RANK", "0") == "0"
    try:
        if all(a.startswith("--local_rank=") for a in arguments):  # `deepspeed` adds it
            if first:
                print(f"no arguments: the demo's recipe, {demo.RECIPE}", flush=True)
            demo.distil()
        else:
            loop.run(configs.parse(arguments))
    except (ConfigError, TrainingError, CheckpointError) as error:
        if first:
            print(f"distilfast: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except loop.Interrupted:
        return 130
    return 0


def script() -> None:
    """`main` as a program of its own."""
    try:
        status = main()
    except KeyboardInterrupt:  # before training, or a second one; other ranks may be anywhere
        print("distilfast: stopped", file=sys.stderr)
        sys.exit(130)
    if status != 1:  # after an error, other ranks may not reach the barrier
        processes.finish()
    sys.exit(status)


if __name__ == "__main__":
    # Import this module by its name: as __main__ it would be a second copy of the module.
    from distilfast import train as this

    this.script()
