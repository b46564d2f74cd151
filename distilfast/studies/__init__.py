"""Commands that train or measure many models: glue, finetune, ablate, compare, and `report`.

`glue`, `finetune`, `ablate`, `compare` and `pages` are one command each; nobody imports them. They
share `flags`, `inputs`, `folder`, `jobs`, `task_job`, `teaching`, `figures`, `sizes` and `speed`.
"""
