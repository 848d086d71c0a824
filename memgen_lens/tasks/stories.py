"""Stories of rules and facts as numbers: which words, in which order, and what follows from them.

Does not know their wording: see `memgen_lens.tasks.wording`.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

MOST_WORDS = 16
"""Words of one kind at most."""


@dataclass(frozen=True)
class Story:
    """One story: rules ``(kind, colour)``, facts ``(name, kind)``, and the name that is asked about.

    With one hop there are no rules, and the facts are ``(name, colour)``.
    """

    rules: tuple[tuple[int, int], ...]
    facts: tuple[tuple[int, int], ...]
    asked: int

    def answers(self) -> dict[int, int]:
        """The colour of every name, in the order of the facts."""
        colours = dict(self.rules)
        return {name: colours[kind] for name, kind in self.facts} if colours else dict(self.facts)

    def asked_last(self) -> "Story":
        """The same story with the fact that is asked about told last."""
        return replace(self, facts=tuple(sorted(self.facts, key=lambda said: said[0] == self.asked)))


@dataclass(frozen=True)
class Stories:
    """Many stories as arrays: rule r says ``kinds[r]`` are ``colours[r]``, fact f that ``names[f]`` is ``said[f]``.

    What a fact says is a kind; a colour where there are no rules.
    """

    kinds: Int[np.ndarray, "story rule"]
    colours: Int[np.ndarray, "story rule"]
    names: Int[np.ndarray, "story fact"]
    said: Int[np.ndarray, "story fact"]
    asked: Int[np.ndarray, " story"]

    def codes(self) -> Int[np.ndarray, " story"]:
        """A number for each story that does not depend on its order and question: the sum of its sentences' numbers.

        Two stories share one by chance only, and then count as the same story: neither is drawn where the other is in
        a split.
        """
        numbers = np.random.default_rng(0).integers(2**59, size=(2, MOST_WORDS, MOST_WORDS))
        return numbers[0][self.kinds, self.colours].sum(1) + numbers[1][self.said, self.names].sum(1)

    def take(self, index: Int[np.ndarray, " row"]) -> "Stories":
        """Some of the stories."""
        return replace(self, **{name: column[index] for name, column in vars(self).items()})

    def and_more(self, more: "Stories") -> "Stories":
        """These stories, then others."""
        columns = vars(more)
        return replace(self, **{name: np.concatenate([c, columns[name]]) for name, c in vars(self).items()})

    def each(self) -> list[Story]:
        """The stories one by one."""
        return [
            Story(tuple(zip(k, c, strict=True)), tuple(zip(n, s, strict=True)), asked)
            for k, c, n, s, asked in zip(*(column.tolist() for column in vars(self).values()), strict=True)
        ]
