"""What a model says to the same prompts under each of many steerings.

Does not judge the outputs (see `evaluation`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from jaxtyping import Int
from transformer_lens import HookedTransformer

from memgen_lens.analysis.steering import Steering, steering_hooks
from memgen_lens.behavior import by_length, decode, greedy_tokens, prefix_cache, repeat_cache
from memgen_lens.core.types import Direction, LensModel, Positions


def steered_outputs(
    model: LensModel,
    prompts: Sequence[str],
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    max_new_tokens: int,
    pairs: Int[np.ndarray, " prompt"] | None = None,
    batch_size: int = 2048,
    use_cache: bool = True,
) -> list[list[str]]:
    """Greedy completions of the same prompts under each of several steerings.

    Steerings of one site, mode and positions share a forward pass: they ride in the batch dimension. Where they change
    nothing before the answer position, all of the prompt before it is run once, and its keys and values are reused.

    Args:
        model: A HookedTransformer.
        prompts: Prompts, the same for all steerings.
        steerings: Any number, of any sites.
        toward: The behaviour to push towards.
        max_new_tokens: Tokens generated at most.
        pairs: In patch mode, the source pair of each prompt.
        batch_size: Rows (steerings x prompts) in one forward pass.
        use_cache: Keep keys and values while generating; without, the outputs are the same and slower.

    Returns:
        For each steering, one output a prompt.
    """
    outputs = [[""] * len(prompts) for _ in steerings]
    kinds: dict[tuple[str, int, Positions], list[int]] = {}
    for i, steering in enumerate(steerings):
        setting = steering.setting
        kinds.setdefault((setting.site, id(steering.source), setting.positions), []).append(i)

    def during(
        block: list[Steering], index: list[int], prompt_length: int, one_by_one: bool
    ) -> Callable[[int], AbstractContextManager[Any]]:
        """Hooks of each step; where tokens come one by one, the first of them is the answer position."""
        hooks = steering_hooks(
            model,
            block,
            toward=toward,
            pairs=None if pairs is None else pairs[index],
            prompt_length=prompt_length,
            where=slice(None) if one_by_one else None,
        )
        answer_only = one_by_one and block[0].setting.positions == "prompt"
        return lambda step: nullcontext() if answer_only and step > 0 else model.hooks(fwd_hooks=hooks)

    for index, tokens in by_length(model, prompts, batch_size=batch_size):
        at_once = max(1, batch_size // len(index))
        prefix = None
        if use_cache and isinstance(model, HookedTransformer) and any(kind[2] != "all" for kind in kinds):
            prefix = prefix_cache(model, tokens)
        for (_, _, positions), members in kinds.items():
            for start in range(0, len(members), at_once):
                block = members[start : start + at_once]
                shared = prefix if positions != "all" else None
                new = greedy_tokens(
                    model,
                    tokens.repeat(len(block), 1),
                    max_new_tokens=max_new_tokens,
                    use_cache=use_cache,
                    prefix=repeat_cache(shared, len(block), room=max_new_tokens) if shared is not None else None,
                    during=during([steerings[i] for i in block], index, tokens.shape[1], shared is not None),
                )
                texts = iter(decode(model, new))
                for i in block:
                    for prompt in index:
                        outputs[i][prompt] = next(texts)
    return outputs
