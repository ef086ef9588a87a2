"""The published evaluation, beside scikit-learn's neighbours and a readout that is written out."""

from __future__ import annotations

import readout
import torch
from readout import knn_accuracy, linear_accuracy
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

CLASSES = 5


def clouds(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around a direction for each class."""
    draws = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(CLASSES, (count,), generator=draws)
    return centers[labels] + spread * torch.randn(count, 16, generator=draws), labels


def test_neighbours_are_scikit_learns():
    train, test = clouds(400, 2.0, 0), clouds(1001, 2.0, 1)
    theirs = KNeighborsClassifier(n_neighbors=10, metric="cosine").fit(*(part.numpy() for part in train))
    expected = theirs.score(*(part.numpy() for part in test))
    assert 0.3 < expected < 0.9
    assert knn_accuracy(train, test, classes=CLASSES) == expected


def test_of_equal_votes_the_first_class_wins():
    rows = torch.eye(3, 4)
    train = torch.cat([rows, rows]), torch.tensor([2, 1, 0, 1, 2, 0])
    # Two neighbours of the first row, one of class 2 and one of class 1.
    assert knn_accuracy(train, (rows[:1], torch.tensor([1])), classes=3, k=2) == 1.0
    assert knn_accuracy(train, (rows[:1], torch.tensor([2])), classes=3, k=2) == 0.0


def test_a_readout_learns_what_is_linear():
    train, test = clouds(300, 0.1, 0), clouds(100, 0.1, 1)
    assert linear_accuracy(train, test, classes=CLASSES, epochs=100) == 1.0
    assert linear_accuracy(train, test, classes=CLASSES, epochs=100) == 1.0


def test_a_readout_is_trained_as_published(monkeypatch):
    """Adam at 0.01 with L2 decay of 5e-6, a cosine that steps once an epoch, batches of 1,000 in random order."""
    made, rates = [], []

    class Noted(torch.optim.Adam):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self.defaults)

        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Noted)
    rows = torch.randn(2500, 4), torch.arange(2500) % 2
    sizes = []
    entropy = F.cross_entropy
    monkeypatch.setattr(
        readout.F,
        "cross_entropy",
        lambda logits, labels: (sizes.append(len(labels)), entropy(logits, labels))[1],
    )
    linear_accuracy(rows, rows, classes=2, epochs=4)
    assert (made[0]["lr"], made[0]["weight_decay"], made[0]["betas"]) == (0.01, 5e-6, (0.9, 0.999))
    assert sizes == [1000] * 8
    weight = torch.nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([weight], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=4)
    expected = []
    for _ in range(4):
        expected += [reference.param_groups[0]["lr"]] * 2
        reference.step()
        schedule.step()
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))
