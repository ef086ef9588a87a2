"""Workers on many machines: thin launchers, each with the conventions of the engine it starts them on.

`launch.py` says what will be done and does it; `local.py`, `slurm.py` and `kubernetes.py` are the engines.
The worker is the same everywhere: ``headsearch worker --study NAME``.
"""
