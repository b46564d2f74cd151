"""A run, from its configuration to a trained student. Read `loop.py` first.

- `loop`: the training loop; `step`: one optimiser step; `micro_batch`: its two forwards.
- `commands`: prepare, check, recipes, replay.
- `checks`: everything that can be found wrong before training; `choices`: what `auto` stands for.
- `processes`, `dead_ranks`: the ranks, and how they end when one of them is gone.
- `engine`: DeepSpeed, made exact; `optimizers`: AdamW, LAMB and the learning rate.
- `checkpoint`, `replay`: the state of a run on disk, and one step of a run again.
- `heldout`, `metrics`, `export`, `results`: scores, metrics.jsonl, the model, the end of a run.
"""
