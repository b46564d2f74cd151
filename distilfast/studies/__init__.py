"""Commands that train or measure many models: glue, finetune, ablate, compare, and `report`.

`glue`, `finetune`, `ablate`, `compare` and `pages` are one command each; nobody imports them. They
share `flags`, `inputs`, `folder`, `jobs`, `task_job`, `soft_targets`, `figures`, `sizes` and
`speed`.
"""
