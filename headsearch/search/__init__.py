"""Optuna and PostgreSQL: studies, proposals, claims, leases, rungs, outcomes.

Optuna holds the studies, parameters, final values and states that its samplers and its dashboard
read. What it does not have lives beside it in the schema ``headsearch``: specs, leases, learning
curves, workers. Nothing here knows torch.
"""
