"""The loss of memorization-aware training against its equation by hand."""

import numpy as np
import pytest
import torch

from memgen_lens.training.forward import Rows, labelled_loss
from memgen_lens.training.objectives import shifted_loss

LABELS = torch.tensor([[-100, 2, 0], [-100, 1, -100]])
GROUPS = [Rows(torch.zeros(2, 3, dtype=torch.int64), LABELS, 1, torch.tensor([4, 3]))]
LOGITS = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, 0.3], [1.5, 0.2, -0.7], [9.0, 9.0, 9.0]])
"""At the second and third position of either row; the last has no label."""
SURE = torch.log(torch.eye(3) + 1e-6)


def expectations(*tokens: int) -> torch.Tensor:
    """A predictor that is sure of one token at each place."""
    return torch.stack([SURE[token] for token in tokens])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_loss_is_the_equation_by_hand(strength):
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]])
    total = 0.0
    for row, label in ((0, 2), (1, 0), (2, 1)):
        odds = np.exp(LOGITS[row].numpy()) * p[row] ** strength
        total -= np.log(odds[label] / odds.sum())
    found = shifted_loss(LOGITS, GROUPS, torch.from_numpy(np.log(p)).float(), strength=strength)
    assert found.item() == pytest.approx(total / 3, rel=1e-6)


def test_no_gradient_is_left_where_the_answer_is_expected_and_more_than_plainly_where_another_is():
    def gradient(expected: torch.Tensor | None) -> torch.Tensor:
        logits = LOGITS.clone().requires_grad_()
        loss = labelled_loss(logits, GROUPS) if expected is None else shifted_loss(logits, GROUPS, expected)
        loss.backward()
        assert logits.grad is not None
        return logits.grad.norm(dim=1)

    plain, explained, contradicted = (
        gradient(None),
        gradient(expectations(2, 0, 1, 0)),
        gradient(expectations(0, 1, 2, 0)),
    )
    assert (explained[:3] < 1e-4).all() and (plain[:3] > 0.05).all()
    assert (contradicted[:3] > plain[:3]).all()


def test_no_gradient_passes_what_is_expected():
    logits, expected = LOGITS.clone().requires_grad_(), expectations(0, 1, 2, 0).requires_grad_()
    shifted_loss(logits, GROUPS, expected).backward()
    assert expected.grad is None and logits.grad is not None
