"""What a model says to the same prompts under each of many steerings.

Does not judge the outputs (see `evaluation`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from memgen_lens.analysis.steering.steering import Steering, steering_changes, steering_hooks
from memgen_lens.core.types import Direction, LensModel, Positions
from memgen_lens.fast.decoding import Intervention, can_change, greedy_copies
from memgen_lens.fast.support import is_hooked_transformer, is_plain
from memgen_lens.models.step import greedy_tokens, prefix_cache, repeat_cache
from memgen_lens.models.tokens import by_length, decode


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
    nothing before the answer position, all of the prompt before it is run once, and its keys and values are reused. On
    a plain HookedTransformer the layers below the first that is changed run once for steerings that say the same.

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
    for index, tokens in by_length(model, prompts, batch_size=batch_size):
        at_once = max(1, batch_size // len(index))
        for members in kinds.values():
            for start in range(0, len(members), at_once):
                block = members[start : start + at_once]
                new = _complete(
                    model,
                    tokens,
                    [steerings[i] for i in block],
                    toward=toward,
                    pairs=None if pairs is None else pairs[index],
                    max_new_tokens=max_new_tokens,
                    use_cache=use_cache,
                )
                texts = iter(decode(model, new))
                for i in block:
                    for prompt in index:
                        outputs[i][prompt] = next(texts)
    return outputs


def _complete(
    model: LensModel,
    tokens: Int[Tensor, "prompt pos"],
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    pairs: Int[np.ndarray, " prompt"] | None,
    max_new_tokens: int,
    use_cache: bool,
) -> Int[Tensor, "row new"]:
    """New tokens of prompts of one length under each steering, steering after steering."""
    positions, n = steerings[0].setting.positions, len(steerings)
    if use_cache and positions != "all" and is_plain(model):
        changes = steering_changes(model, steerings, toward=toward, pairs=pairs)
        if can_change(list(changes)):
            new = greedy_copies(
                model,
                tokens,
                copies=n,
                max_new_tokens=max_new_tokens,
                eos=model.tokenizer.eos_token_id,
                intervention=Intervention(changes, first_only=positions == "prompt"),
            )
            return new.flatten(0, 1)
    prefix = None
    if use_cache and is_hooked_transformer(model) and positions != "all":
        prefix = repeat_cache(prefix_cache(model, tokens), n, room=max_new_tokens)
    # Where tokens come one by one, the first of them is the answer position.
    where = None if prefix is None else slice(None)
    hooks = steering_hooks(model, steerings, toward=toward, pairs=pairs, prompt_length=tokens.shape[1], where=where)

    def during(step: int) -> AbstractContextManager[Any]:
        ended = prefix is not None and positions == "prompt" and step > 0
        return nullcontext() if ended else model.hooks(fwd_hooks=hooks)

    return greedy_tokens(
        model,
        tokens.repeat(n, 1),
        max_new_tokens=max_new_tokens,
        use_cache=use_cache,
        prefix=prefix,
        during=during,
    )
