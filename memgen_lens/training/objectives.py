"""Losses beside plain cross-entropy: memorization-aware training.

Does not know where the expectations come from: see `memgen_lens.training.held_out`.
"""

from jaxtyping import Float
from torch import Tensor

from memgen_lens.training.forward import Rows, labelled_loss


def shifted_loss(
    logits: Float[Tensor, "labelled d_vocab"],
    groups: list[Rows],
    expected: Float[Tensor, "labelled d_vocab"],
    *,
    strength: float = 1.0,
) -> Float[Tensor, ""]:
    """The loss of memorization-aware training (MAT): cross-entropy of logits shifted by what is expected anyway.

    ``-mean_t log softmax(f(x_t) + strength * log p_ho(. | x_t))[y_t]``, in nats a labelled token, after Bayat et al.,
    "The Pitfalls of Memorization" (arXiv 2412.07684) and their code: ``f`` are the model's logits, ``p_ho`` is what a
    predictor expects that was not trained on ``x`` (calibrated; `memgen_lens.training.held_out`), and ``t`` runs over
    all labelled tokens. Where ``p_ho`` gives the label alone, no gradient is left; where it is sure of another token,
    the model has to outdo it, by the rule or by heart. Whoever asks the trained model asks ``f``, without the shift.

    Departures: the paper's ``y`` is a class; ours are the tokens of an answer, each shifted by what is expected behind
    the right tokens before it. ``strength`` is ours (1 in the paper).

    Args:
        logits: The model's, at and after each group's first label.
        groups: The rows that they are of.
        expected: ``log p_ho``, at the same places; no gradient passes it.
        strength: What it is multiplied by.
    """
    return labelled_loss(logits.float() + strength * expected.detach(), groups)
