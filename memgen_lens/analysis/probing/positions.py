"""How early in the prompt can a probe tell the behaviour? One probe at each layer and position, from the end.

Does not choose a layer or a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memgen_lens.analysis.probing.probes import score_probe
from memgen_lens.analysis.probing.prompt import fit_prompt_probe, prompt_features
from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.analysis.recording.positions import aligned_tokens, lengths_of, tokens_at
from memgen_lens.analysis.recording.reading import read_last_positions
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.linear_probe import fit_probe
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.position_records import PositionProbes
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.records import ProbeScores
from memgen_lens.core.types import LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.sites import site_hooks
from memgen_lens.models.tokens import in_batches

CALL = "probe_by_position"
PROMPTS_AT_ONCE = 256
TOKENS_AT_ONCE = 4_096
"""Tokens of one forward pass: what is kept of one are all its positions."""
ROUNDING = 1e-5
"""Share of a layer's root mean square below which what varies is rounding."""


@arguments(
    model=lens_model(CALL),
    pairs=kinds.one(PromptPairs),
    site=kinds.Text,
    n_positions=kinds.Count | None,
    batch_size=kinds.Count | None,
    seed=kinds.Seed,
    progress=kinds.Flag,
)
def probe_by_position(
    model: LensModel,
    pairs: PromptPairs,
    site: str = "resid_post",
    *,
    n_positions: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PositionProbes:
    """How well a linear probe tells the behaviours apart at each layer and at each position before the answer.

    `fit_probes`' own probe (``StandardScaler`` + ``LogisticRegression``), fitted on the pairs of ``select`` and
    ``tune`` and tested on ``test``, at every position that all prompts have, counted from the end: the last one is the
    answer position, where `fit_probes` looks. Beside it ``input_only``, the same probe on the tokens up to that
    position (their counts, and one-hots of the token at each position): where the two prompts of a pair have been told
    apart by their words already, a probe on activations that does no better says nothing about the model.

    Neurons that vary by less than 1e-5 of their layer's root mean square over the training prompts are taken for
    constant: at positions where all prompts are alike so far, what is left is rounding, which standardizing would blow
    up.

    The activations of all positions are held: ``8 * pairs * layers * positions * neurons`` bytes. The full name of one
    hook point in place of a site (``"blocks.3.hook_resid_post"``) is one layer of it.

    Args:
        model: A lens model, left without hooks also after an exception.
        pairs: Its prompt pairs.
        site: Site to read; see `record`.
        n_positions: Positions from the end; default and at most: as many as the shortest prompt has.
        batch_size: Prompts in one forward pass at most, by default 256.
        seed: Seed of the bootstrap.
        progress: Show a bar, should it take longer than two seconds.

    Returns:
        AUROC ``[layer, position]`` on the test pairs, with intervals resampled by item.

    Raises:
        SiteError: The site is unknown, or has no row for each position.
        PairsError: A split holds fewer than 8 pairs.
        ModelError: The tokenizer lacks a character, or an activation is not finite.
    """
    train, test = np.concatenate([pairs.of("select"), pairs.of("tune")]), pairs.of("test")
    hooks = site_hooks(model, site)
    items = (*pairs.memorized, *pairs.generalized)
    tokens = aligned_tokens(model, items, prepend_bos=pairs.prepend_bos)
    n = int(lengths_of(tokens).min())
    n = n if n_positions is None else min(n, n_positions)
    batches = in_batches(
        model,
        [item.prompt for item in items],
        batch_size=batch_size or PROMPTS_AT_ONCE,
        tokens_at_once=TOKENS_AT_ONCE,
        prepend_bos=pairs.prepend_bos,
    )
    read = read_last_positions(model, batches, hooks, n=n)
    order = np.argsort([place for batch in batches for place in batch.index])
    values = {hook: np.concatenate(read.pop(hook))[order] for hook in hooks}  # [row, pos, neuron] each
    data = _Data(
        np.repeat([True, False], len(pairs)),
        np.tile(pairs.item, 2),
        np.concatenate([train, train + len(pairs)]),
        np.concatenate([test, test + len(pairs)]),
        seed,
    )
    scores: list[ProbeScores] = []
    alone: list[ProbeScores] = []
    with progress_bar(n * (1 + len(hooks)), "probing", shown=progress, unit="probe") as bar:
        for position in range(n):
            here = np.stack([values[hook][:, position] for hook in hooks], axis=1)  # [row, layer, neuron]
            require_finite(CALL, site, [here[: len(pairs)], here[len(pairs) :]], pairs)
            alone.append(data.prompt_alone(tokens[:, : tokens.shape[1] - n + position + 1]))
            bar.update()
            for layer in range(len(hooks)):
                scores.append(data.probed(here[:, layer]))
                bar.update()
    auroc, low, high = (part.reshape(n, len(hooks)).T for part in _with_interval(scores))
    only, only_low, only_high = _with_interval(alone)
    return PositionProbes(
        site=site,
        auroc=auroc,
        low=low,
        high=high,
        input_only=only,
        input_only_low=only_low,
        input_only_high=only_high,
        tokens=tokens_at(model, tokens[: len(pairs)], tokens[len(pairs) :], n),
        n_train=len(train),
        n_test=len(test),
        n_test_items=len(np.unique(pairs.item[test])),
    )


@dataclass(frozen=True)
class _Data:
    """Labels, items and the train and test rows; rows are all memorized prompts, then all generalized ones."""

    labels: Bool[np.ndarray, " row"]
    items: Int[np.ndarray, " row"]
    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]
    seed: int

    def probed(self, rows: Float[np.ndarray, "row neuron"]) -> ProbeScores:
        """Scores on the test rows of a probe fitted on the training rows."""
        varies = rows[self.train].std(0) > ROUNDING * np.sqrt(np.square(rows[self.train]).mean())
        rows = rows * varies
        return self._tested(fit_probe(rows[self.train], self.labels[self.train]), rows)

    def prompt_alone(self, tokens: Int[np.ndarray, "row pos"]) -> ProbeScores:
        """The same of a probe on tokens."""
        features = prompt_features(tokens)
        return self._tested(fit_prompt_probe(features[self.train], self.labels[self.train]), features)

    def _tested(self, probe: Any, rows: Any) -> ProbeScores:
        labels, items = self.labels[self.test], self.items[self.test]
        return score_probe(probe, rows[self.test], labels, items, seed=self.seed)


def _with_interval(scores: Sequence[ProbeScores]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUROC and both ends of its interval."""
    low, high = np.array([score.auroc_ci95 for score in scores]).T
    return np.array([score.auroc for score in scores]), low, high
