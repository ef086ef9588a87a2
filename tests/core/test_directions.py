"""Rows of zeros, which discretised projections have: no gradient explodes."""

from __future__ import annotations

import pytest
import torch
from networks import CPU, finish, start, tiny_config, tiny_images
from torch.nn import functional as F

from headsearch.core.bottleneck import mutual_information
from headsearch.core.directions import unit_rows
from headsearch.core.levels import discretise
from headsearch.core.objectives import nt_xent


def test_rows_have_length_one_and_zeros_stay() -> None:
    rows = torch.randn(5, 3)
    rows[2] = 0
    found = unit_rows(rows)
    assert torch.equal(found[2], torch.zeros(3))
    torch.testing.assert_close(found, F.normalize(rows, dim=1))


def test_gradients_are_torchs_where_rows_are_not_zero() -> None:
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 4, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((scale(rows) * weights).sum(), rows)[0]
        for scale in (unit_rows, lambda x: F.normalize(x, dim=1))
    )
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(unit_rows, rows)


@pytest.mark.parametrize(("levels", "dim"), [(2, 4), (3, 2), (3, 8), (30, 2)])
def test_gradient_of_discretised_projections_stays_small(levels: int, dim: int) -> None:
    z = 0.5 * torch.randn(256, dim, generator=torch.Generator().manual_seed(0))
    z[0] = 0.0
    z.requires_grad_()
    projections = discretise(z, levels)
    assert (projections == 0).all(1).any()
    features = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    loss = nt_xent(projections, 0.5) + mutual_information(features, projections)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1


def test_a_discretised_head_trains(tmp_path) -> None:
    head = {"kind": "mlp", "width": 16, "projection_dim": 8, "levels": 30, "batch_norm": True}
    reports, trained = finish(start(tiny_config(head=head), tiny_images(), tmp_path))
    assert len(reports) == 3
    assert all(parameter.isfinite().all() for parameter in trained.head.parameters())
    assert trained.encoder.to(CPU)(torch.rand(2, 3, 8, 8)).isfinite().all()
