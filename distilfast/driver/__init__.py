"""A run, from its configuration to a trained student. Read `loop.py` first.

- `loop`: the training loop and one optimiser step; `commands`: prepare, check, recipes, replay.
- `checks`: everything that can be found wrong before training.
- `processes`, `watch`: the ranks, and how they end when one of them is gone.
- `step`: one forward and its loss; `engine`: DeepSpeed, made exact; `optimizers`.
- `checkpoint`, `replay`: the state of a run on disk, and one step of a run again.
- `heldout`, `metrics`, `export`, `results`: scores, metrics.jsonl, the model, the end of a run.
"""
