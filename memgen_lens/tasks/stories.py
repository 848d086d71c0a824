"""Stories of rules and facts as numbers: which words, in which order, and what follows from them.

Does not know their wording: see `memgen_lens.tasks.inference`.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

# All take "a" and a plural in "s".
ANIMALS = tuple("bear cat dog frog goat hen horse lion mole pig rabbit seal swan tiger toad zebra".split())  # noqa: SIM905
NAMES = tuple("Ada Ben Cora Dan Ella Finn Gus Hana Ivan June Kai Lily Max Nora Omar Rosa".split())  # noqa: SIM905
COLOURS = tuple("black blue brown green pink red white yellow".split())  # noqa: SIM905


@dataclass(frozen=True)
class Story:
    """One story: rules ``(kind, colour)``, facts ``(name, kind)``, and the kind or name that is asked about."""

    rules: tuple[tuple[int, int], ...]
    facts: tuple[tuple[int, int], ...]
    asked: int
    depth: int

    def answers(self) -> dict[int, int]:
        """The colour of every subject, as told: of each rule's animal, or of each fact's name."""
        colours = dict(self.rules)
        return colours if self.depth == 1 else {name: colours[kind] for name, kind in self.facts}

    def asked_last(self) -> "Story":
        """The same story with what is asked about told last in its group."""
        rules, facts = (
            tuple(sorted(group, key=lambda said: said[0] == self.asked)) for group in (self.rules, self.facts)
        )
        return replace(self, rules=rules) if self.depth == 1 else replace(self, facts=facts)


@dataclass(frozen=True)
class Stories:
    """Many stories as arrays: rule r says ``kinds[r]`` are ``colours[r]``, fact f ``names[f]`` is ``fact_kinds[f]``."""

    kinds: Int[np.ndarray, "story rule"]
    colours: Int[np.ndarray, "story rule"]
    names: Int[np.ndarray, "story fact"]
    fact_kinds: Int[np.ndarray, "story fact"]
    asked: Int[np.ndarray, " story"]
    depth: int

    def codes(self) -> Int[np.ndarray, " story"]:
        """A number for each story that does not depend on its order and question: the sum of its sentences' numbers.

        Two stories share one by chance only, and then count as the same story: neither is drawn where the other is in
        a split.
        """
        numbers = np.random.default_rng(0).integers(2**59, size=(2, len(ANIMALS), len(NAMES)))
        return numbers[0][self.kinds, self.colours].sum(1) + numbers[1][self.fact_kinds, self.names].sum(1)

    def take(self, index: Int[np.ndarray, " row"]) -> "Stories":
        """Some of the stories."""
        return replace(self, **{name: column[index] for name, column in self._columns().items()})

    def and_more(self, more: "Stories") -> "Stories":
        """These stories, then others."""
        columns = more._columns()
        return replace(self, **{name: np.concatenate([c, columns[name]]) for name, c in self._columns().items()})

    def each(self) -> list[Story]:
        """The stories one by one."""
        return [
            Story(tuple(zip(k, c, strict=True)), tuple(zip(n, f, strict=True)), asked, self.depth)
            for k, c, n, f, asked in zip(*(column.tolist() for column in self._columns().values()), strict=True)
        ]

    def _columns(self) -> dict[str, np.ndarray]:
        names = ("kinds", "colours", "names", "fact_kinds", "asked")
        return {name: getattr(self, name) for name in names}
