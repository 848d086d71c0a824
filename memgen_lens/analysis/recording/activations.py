"""Record activations at the answer position, at the sites asked for and nowhere else.

The answer position is the last token of a prompt, whose logits pick the first answer token. Does not score.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np

from memgen_lens.analysis.recording.finite import EMBEDDING, SIDES
from memgen_lens.analysis.recording.reading import recorded_blocks
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import PairsError
from memgen_lens.core.files import damaged, read_arrays, read_json, write_arrays, write_json
from memgen_lens.core.items import Item
from memgen_lens.core.ownership import require_ours
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import Activations, SiteActivations
from memgen_lens.core.run_directory import alone_in
from memgen_lens.core.shards import map_shard, new_shard
from memgen_lens.core.types import LensModel
from memgen_lens.models.guard import lens_model


@arguments(
    model=lens_model("record"),
    pairs=kinds.one(PromptPairs),
    sites=kinds.Texts,
    batch_size=kinds.Count | None,
    out=kinds.place("record(out=...)") | None,
    progress=kinds.Flag,
)
def record(
    model: LensModel,
    pairs: PromptPairs,
    sites: Sequence[str],
    *,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Activations:
    """Activations of both prompts of every pair at the answer position.

    No cache of the model is made: the last position of the sites asked for is kept, batch by batch, and the forward
    pass stops after the last layer asked for. Where the model is a plain HookedTransformer (no hooks on it, see
    `memgen_lens.fast.support`), beginnings that prompts of a batch share are run once, and of the last layer the last
    position alone; else the model's own forward runs, with prompts of about one length in a batch, padded and masked.
    The numbers are the same to rounding.

    Args:
        model: A HookedTransformer or TransformerBridge; left without hooks, also after an exception.
        pairs: Prompt pairs, ours or a user's own.
        sites: TransformerLens short names, e.g. ``["resid_post", "post"]``; heads are flattened into the neuron
            axis (``z``: neuron = head * d_head + coordinate).
        batch_size: Prompts in one forward pass; default: as many as make some 20,000 tokens, at least 256.
        out: Directory to write the activations into as safetensors, one file a site, with a manifest. They are then
            read from there where and when they are used (`load_activations` opens them again), and memory does not
            grow with the pairs.
        progress: Show a progress bar, should it take longer than two seconds.

    Returns:
        For each site both sides as float32 ``[pair, layer, neuron]``; and what enters the first block at the answer
        position (the token's embedding, with its position where that is added), which the probes' baseline needs.

    Raises:
        SiteError: A site is unknown, or the model lacks it.
        PairsError: There are no pairs.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
        RunDirectoryError: ``out`` cannot be written, is being written by another process, or holds somebody else's
            file of one of these names.
    """
    if out is not None and callable(pairs.match):
        raise PairsError(
            "record(out=...)",
            expected='pairs with match="prefix" or "exact", which a file can hold',
            received="a function as match",
            fix='Record dataclasses.replace(pairs, match="prefix"); activations are the same whatever the match. '
            "Hand the pairs with the function to sweep_steering and evaluate_steering.",
        )
    blocks = recorded_blocks(model, pairs, sites, batch_size=batch_size, progress=progress, call="record")
    first = next(blocks)
    shapes = {name: (len(pairs), *values.shape[2:]) for name, values in first.sides.items()}
    with ExitStack() as stack:
        if out is not None:
            out = Path(out)
            stack.enter_context(alone_in(out, call=f"record(out={str(out)!r})"))
            files = [*(f"{name}.safetensors" for name in (*shapes, "tokens")), "manifest.json"]
            require_ours([out / name for name in files], call=f"record(out={str(out)!r})")
        sides = {
            name: {side: np.empty(shape, np.float32) for side in SIDES}
            if out is None
            else stack.enter_context(new_shard(Path(out) / f"{name}.safetensors", dict.fromkeys(SIDES, shape)))
            for name, shape in shapes.items()
        }
        tokens = []
        for block in chain([first], blocks):
            rows = slice(block.first, block.first + len(block.tokens[0]))
            for name, values in block.sides.items():
                for side, value in zip(SIDES, values, strict=True):
                    sides[name][side][rows] = value
            tokens.append(block.tokens)
    widest = max(block.shape[2] for block in tokens)
    padded = [np.pad(block, ((0, 0), (0, 0), (0, widest - block.shape[2])), constant_values=-1) for block in tokens]
    tokens = np.concatenate(padded, axis=1).reshape(2 * len(pairs), -1)
    if out is not None:
        write_arrays(Path(out) / "tokens.safetensors", {"tokens": tokens})
        write_json(Path(out) / "manifest.json", {"sites": list(sites)} | vars(pairs))
        return load_activations(out)
    recorded = {name: SiteActivations(**both) for name, both in sides.items()}
    return Activations(embedding=recorded.pop(EMBEDDING), sites=recorded, pairs=pairs, tokens=tokens)


@arguments(directory=kinds.place("load_activations"))
def load_activations(directory: str | Path) -> Activations:
    """Open what ``record(..., out=directory)`` wrote; arrays are read from disk where and when they are used.

    Raises:
        RunDirectoryError: A file is missing or damaged.
    """
    directory = Path(directory)
    manifest = read_json(directory / "manifest.json")
    try:
        pairs = PromptPairs(
            memorized=tuple(Item(**row) for row in manifest["memorized"]),
            generalized=tuple(Item(**row) for row in manifest["generalized"]),
            split=np.array(manifest["split"]),
            n_items=manifest["n_items"],
            n_flipped=manifest["n_flipped"],
            n_items_by_task=manifest["n_items_by_task"],
            prepend_bos=manifest.get("prepend_bos"),
            match=manifest["match"],
            stop=tuple(manifest["stop"]),
            max_new_tokens=manifest["max_new_tokens"],
        )
        sites = {name: SiteActivations(**map_shard(directory / f"{name}.safetensors")) for name in manifest["sites"]}
        embedding = SiteActivations(**map_shard(directory / f"{EMBEDDING}.safetensors"))
        tokens = read_arrays(directory / "tokens.safetensors")["tokens"]
    except (KeyError, TypeError) as error:
        raise damaged(directory / "manifest.json", f"content that is not its own ({error!r})") from None
    return Activations(sites=sites, pairs=pairs, embedding=embedding, tokens=tokens)
