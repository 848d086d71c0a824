"""How far a model recites texts: the greedy continuation of each prefix against its own suffix.

Does not know how often a text was trained on, nor steers: see `steered`.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from memgen_lens.analysis.recitation.texts import continuations, cut_texts, in_parts, suffix_nll
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.recitation_records import MEASURES, Recitation
from memgen_lens.core.types import LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.tokens import decode

N_RANDOM = 20
"""Random suffixes that each continuation is held against."""


@arguments(
    model=lens_model("recitation"),
    texts=kinds.Lines,
    prefix_tokens=kinds.Count,
    suffix_tokens=kinds.Count,
    groups=kinds.Listing | None,
    prepend_bos=kinds.Flag | None,
    seed=kinds.Seed,
    progress=kinds.Flag,
)
def recitation(
    model: LensModel,
    texts: Sequence[str],
    prefix_tokens: int = 32,
    suffix_tokens: int = 32,
    *,
    groups: Sequence[int | str] | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Recitation:
    """Give a model the beginning of each text and see how much of what follows it recites.

    After Carlini et al. 2022 (arXiv 2202.07646, section 3: greedy decoding, the prompt being the text's own prefix) and
    arXiv 2503.06040. Ours: the longest common run, the share of tokens and the edit similarity beside the exact match;
    the same measures against random tokens and against other texts' suffixes, which is what chance gives; and
    the perplexity of the suffix, which tells a text that is known from one that is merely predictable.

    Hooks on the model fire: inside ``with steer.applied(model, toward="generalization")`` it is the steered model that
    recites. Steering that acts at the answer position alone (``positions="prompt"``) changes the first token's logits
    and what attends to them; ``"answer"`` and ``"all"`` change every generated position too.

    Args:
        model: A lens model with a tokenizer.
        texts: Texts of at least ``prefix_tokens + suffix_tokens`` tokens under the model's tokenizer; what is behind
            these is not looked at.
        prefix_tokens: Tokens the model is given, what its tokenizer puts before a text not counted.
        suffix_tokens: Tokens it is asked for.
        groups: A label for each text, a whole number or a name; such as how often it was trained on.
        prepend_bos: See `memgen_lens.complete`.
        seed: Seed of the random suffixes.
        progress: Show a progress bar, should it take longer than two seconds.

    Raises:
        SettingsError: A text is too short, or there are not as many groups as texts.
        ModelError: The model has no tokenizer, it lacks a character, or texts do not fit the context.
    """
    call = "recitation"
    labels = _labels(groups, len(texts), call)
    how = {"prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens, "prepend_bos": prepend_bos}
    cut = cut_texts(model, texts, **how, call=call)
    said, nll = [], []
    with progress_bar(len(texts), "reciting", shown=progress) as bar:
        for some in in_parts(model, cut):
            part = cut.take(some)
            said.append(continuations(model, part.prefix, suffix_tokens))
            nll.append(suffix_nll(model, part))
            bar.update(len(part))
    new = torch.cat(said)
    given, wanted = new.cpu().numpy(), cut.suffix.cpu().numpy()
    own = measured(given, wanted)
    bare = cut.prefix[:, cut.n_before :]
    return Recitation(
        prefix_tokens=prefix_tokens,
        suffix_tokens=suffix_tokens,
        group=labels,
        item=np.unique(torch.cat([cut.prefix, cut.suffix], 1).cpu().numpy(), axis=0, return_inverse=True)[1].reshape(
            -1
        ),
        matched=own["matched"].astype(np.int64),
        run=own["run"].astype(np.int64),
        share=own["share"],
        similarity=own["similarity"],
        perplexity=np.exp(torch.cat(nll).mean(1).double().cpu().numpy()),
        chance=_chance(given, wanted, int(model.cfg.d_vocab), seed),
        prefixes=tuple(decode(model, bare)),
        suffixes=tuple(decode(model, cut.suffix)),
        continuations=tuple(decode(model, new)),
    )


def measured(said: Int[np.ndarray, "text suffix"], wanted: Int[np.ndarray, "text suffix"]) -> dict[str, np.ndarray]:
    """Each of `MEASURES` of each text (see `Recitation`), as floats."""
    same = said == wanted
    values = {"matched": same.cumprod(1).sum(1), "share": same.mean(1)}
    matchers = [
        SequenceMatcher(None, a.tolist(), b.tolist(), autojunk=False) for a, b in zip(said, wanted, strict=True)
    ]
    values["run"] = np.array([matcher.find_longest_match().size for matcher in matchers])
    values["similarity"] = np.array([matcher.ratio() for matcher in matchers])
    return {name: values[name].astype(float) for name in MEASURES}


def _chance(
    said: Int[np.ndarray, "text suffix"], wanted: Int[np.ndarray, "text suffix"], d_vocab: int, seed: int
) -> dict[str, dict[str, float] | None]:
    """Mean of each measure against random tokens, and against the suffix of the next text that has another one."""
    rng = np.random.default_rng(seed)
    random = measured(np.tile(said, (N_RANDOM, 1)), rng.integers(d_vocab, size=(N_RANDOM * len(said), said.shape[1])))
    partners = [
        (i, int(j))
        for i in range(len(said))
        for j in [next((j for j in (np.arange(1, len(said)) + i) % len(said) if (wanted[j] != wanted[i]).any()), -1)]
        if j >= 0
    ]
    mine, others = (np.array(side, dtype=np.int64) for side in zip(*partners, strict=True)) if partners else ([], [])
    other = measured(said[mine], wanted[others]) if partners else None
    return {
        "random_tokens": {name: float(values.mean()) for name, values in random.items()},
        "other_suffix": None if other is None else {name: float(values.mean()) for name, values in other.items()},
    }


def _labels(groups: Sequence[Any] | None, n: int, call: str) -> tuple[int | str, ...]:
    if groups is None:
        return ("",) * n
    wrong = [label for label in groups if isinstance(label, bool) or not isinstance(label, int | str)]
    if wrong or len(groups) != n:
        raise SettingsError(
            f"{call}(groups=...)",
            expected=f"a whole number or a name for each of {n} texts",
            received=f"{len(groups)} labels" if not wrong else f"{type(wrong[0]).__name__} among them",
            fix="Give one label a text, e.g. how often it was trained on.",
        )
    return tuple(groups)
