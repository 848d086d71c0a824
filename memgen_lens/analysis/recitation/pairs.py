"""Contexts that are recited, each beside one that is not.

Does not know activations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memgen_lens.analysis.recitation.texts import continuations, cut_texts
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.dealing import require_shares, same_prompts, split_items
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.types import LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.tokens import decode, tokenized


@dataclass(frozen=True)
class Recites:
    """Whether an output recites its prompt's own text: the ``match`` of pairs of contexts.

    Attributes:
        suffixes: What follows each prompt in its text.
    """

    suffixes: Mapping[str, str]

    def __call__(self, item: Item, output: str) -> bool:
        """Whether the output is what the one answer that the item names stands for: reciting, or not reciting."""
        recites = output.startswith(self.suffixes[item.prompt])
        return recites if item.memorized_answer is not None else not recites


@arguments(
    model=lens_model("collect_recitation_pairs"),
    recited=kinds.Lines,
    fresh=kinds.Lines,
    prefix_tokens=kinds.Counts,
    suffix_tokens=kinds.Count,
    seed=kinds.Seed,
    shares=kinds.Parts,
    prepend_bos=kinds.Flag | None,
)
def collect_recitation_pairs(
    model: LensModel,
    recited: Sequence[str],
    fresh: Sequence[str],
    *,
    prefix_tokens: int | Sequence[int] = 32,
    suffix_tokens: int = 32,
    seed: int = 0,
    shares: Sequence[float] = (0.4, 0.2),
    prepend_bos: bool | None = None,
) -> PromptPairs:
    """Pairs of a context that the model recites from and one of like length that it does not recite from.

    For `record`, `attribute`, `fit_probes` and `Steering` as they are. Unlike the pairs of a designed task the two
    sides are different texts, so a pair is a comparison and no rephrasing:

    - The answer position is the context's last token. What differs there between the sides holds reciting or not, and
      all else in which the texts differ; of the latter the mean over pairs keeps what the two *sets* differ in. Give
      texts of like kind, and look at what the prompts alone tell (`fit_probes` reports it).
    - An output is `Behavior.MEMORIZATION` where it begins with the ``suffix_tokens`` tokens that follow its context in
      its text, and `Behavior.GENERALIZATION` where it does not, whatever else it is; there is no ``other``.
    - Meaningful: mean differences, correlations and probes; steering *away* from recitation, and how many recite
      after it (``to_generalization.shift`` of `evaluate_steering`, and `recitation_under_steering`, which has the
      cost). Without meaning: ``to_memorization``, as a fresh text cannot be recited. Causal methods of `attribute`
      contrast the first tokens of the two texts' suffixes, which says which neurons make for *these* tokens.

    Args:
        model: A lens model with a tokenizer.
        recited: Texts that the model may recite, such as those trained on often. Those that it does recite from all
            of their contexts are kept; ``n_items`` counts all, ``n_flipped`` those kept, and an item's key is the place
            of its text in this list (of the first of texts that are the same).
        fresh: Texts that it may not recite: unseen ones, or paraphrases. Those that it does not recite from any context
            are kept, and the p-th kept text goes with the p-th of the others; what is over is left out.
        prefix_tokens: Tokens of a context. Several numbers make several contexts of each text, all of one item.
        suffix_tokens: Tokens behind the context that count as recited.
        seed: Seed of the split.
        shares: Shares of the items in ``select`` and ``tune``; the rest is ``test``.
        prepend_bos: See `memgen_lens.complete`.

    Returns:
        The pairs. There may be few or none: whoever needs a split refuses it below 8 pairs. A context that the
        tokenizer reads as other tokens where the text ends behind it is left out with its text.

    Raises:
        SettingsError: A text is too short for the longest context and the suffix.
        PairsError: The shares leave no pairs to test on.
    """
    call = "collect_recitation_pairs"
    require_shares(shares)
    lengths = sorted(set(np.atleast_1d(np.asarray(prefix_tokens)).tolist()))
    sides = {"recited": recited, "fresh": fresh}
    contexts = {
        name: _contexts(model, texts, lengths, suffix_tokens, prepend_bos, call, name, wanted=name == "recited")
        for name, texts in sides.items()
    }
    own = set(recited)
    kept = [[(place, found) for place, found in enumerate(of) if found] for of in contexts.values()]
    kept[1] = [(place, found) for place, found in kept[1] if fresh[place] not in own]
    items: list[tuple[int, str, str, str, str]] = []
    for (key, mine), (_, other) in zip(*kept, strict=False):
        items += [
            (key, *context, *partner) for context, partner in zip(mine, other, strict=True) if context[1] != partner[1]
        ]
    keys = same_prompts([row[0] for row in items], [row[1] for row in items], [row[3] for row in items])
    suffixes = {prompt: suffix for row in items for prompt, suffix in (row[1:3], row[3:5])}
    return PromptPairs(
        memorized=tuple(Item(key, "user", row[1], row[4], row[2]) for key, row in zip(keys, items, strict=True)),
        generalized=tuple(Item(key, "user", row[3], row[4], row[2]) for key, row in zip(keys, items, strict=True)),
        split=split_items(keys, shares=shares, seed=seed),
        n_items=len(dict.fromkeys(recited)),
        n_flipped=len(set(keys)),
        prepend_bos=prepend_bos,
        match=Recites(suffixes),
        max_new_tokens=suffix_tokens,
    )


def _contexts(
    model: LensModel,
    texts: Sequence[str],
    lengths: Sequence[int],
    suffix_tokens: int,
    prepend_bos: bool | None,
    call: str,
    name: str,
    *,
    wanted: bool,
) -> list[list[tuple[str, str]]]:
    """Of each text its contexts and what follows them; none where one of them is (not) recited as it is ``wanted``."""
    found: list[list[tuple[str, str]]] = [[] for _ in texts]
    right = np.ones(len(texts), dtype=bool)
    cut_texts(
        model,
        texts,
        prefix_tokens=lengths[-1],
        suffix_tokens=suffix_tokens,
        prepend_bos=prepend_bos,
        call=call,
        name=name,
    )
    for length in lengths:
        how = {"prefix_tokens": length, "suffix_tokens": suffix_tokens, "prepend_bos": prepend_bos}
        cut = cut_texts(model, texts, **how, call=call, name=name)
        said = continuations(model, cut.prefix, suffix_tokens)
        right &= ((said == cut.suffix).all(1) == wanted).cpu().numpy()
        prompts = decode(model, cut.prefix[:, cut.n_before :])
        again, sizes = tokenized(model, prompts, prepend_bos=prepend_bos)
        width = cut.prefix.shape[1]
        same = (sizes == width).numpy()
        if again.shape[1] >= width:
            same &= (again[:, :width] == cut.prefix).all(1).cpu().numpy()
        right &= same
        for contexts, prompt, suffix in zip(found, prompts, decode(model, cut.suffix), strict=True):
            contexts.append((prompt, suffix))
    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    return [found[i] if right[i] and first[text] == i else [] for i, text in enumerate(texts)]
