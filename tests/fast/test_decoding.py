"""Copies of prompts that are changed each in its own way say what each says alone, written out with TransformerLens."""

from dataclasses import replace
from functools import partial

import helpers
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memgen_lens.core.errors import ModelError
from memgen_lens.fast.blocks import BLOCK_SITES, Blocks
from memgen_lens.fast.decoding import Change, Intervention, can_change, greedy_copies
from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER

EOS, N_NEW = 4, 6
PROMPTS = torch.tensor([[1, 2, 3, 5], [1, 2, 3, 6], [9, 2, 3, 5], [1, 2, 3, 5]])
SITES = [site for site in BLOCK_SITES if site != "mlp.hook_pre_linear"]  # of gated MLPs only: a test of its own
END = {"standard": 35.0, "rotary": 18.0}
"""How much likelier the end of a text is made: some end at once, some never."""
CLEAR = 2e-4
"""Logits nearer to each other than this decide by rounding: the tests choose models that have none."""


@pytest.fixture(scope="module")
def speaker(hooked_transformer):
    """Makes a model that says something else after every prompt, and that ends texts early or late."""

    def make(*, end: float | None = None, **shape):
        model = hooked_transformer(**shape)
        end = END[model.cfg.positional_embedding_type] if end is None else end
        with torch.no_grad():
            helpers.weights(model).unembed.W_U.mul_(20)
            helpers.weights(model).unembed.b_U[EOS] += end
        return model

    return make


def alone(model, prompt: Tensor, hooks: list, n_new: int = N_NEW) -> tuple[list[int], float]:
    """One copy of one prompt, the whole sequence anew for each token; and how near the nearest tie was."""
    tokens, said, margin = prompt[None], [], float("inf")
    for _ in range(n_new):
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        best, second = logits.topk(2).values.tolist()
        margin = min(margin, best - second)
        said.append(int(logits.argmax()))
        if said[-1] == EOS:
            break
        tokens = torch.cat([tokens, torch.tensor([[said[-1]]])], dim=1)
    return said, margin


def one_by_one(model, prompts: Tensor, copies: int, intervention: Intervention) -> tuple[list[list[list[int]]], float]:
    """What every copy of every prompt says, and how near the nearest tie was."""
    n, margins, said = prompts.shape[1], [], []
    where = slice(n - 1 + intervention.later_only, n if intervention.first_only else None)

    def hook(activation: Tensor, hook, *, change: Change, copy: int, prompt: int) -> Tensor:
        h = activation[0, where].flatten(1)
        out = activation.clone()
        changed = change(h, torch.full((len(h),), copy), torch.full((len(h),), prompt))
        out[0, where] = changed.view(out[0, where].shape)
        return out

    for copy in range(copies):
        said.append([])
        for i, prompt in enumerate(prompts):
            hooks = [
                (name, partial(hook, change=change, copy=copy, prompt=i))
                for name, change in intervention.changes.items()
            ]
            tokens, margin = alone(model, prompt, hooks)
            said[-1].append(tokens)
            margins.append(margin)
    return said, min(margins)


def together(model, prompts: Tensor, copies: int, intervention: Intervention) -> list[list[list[int]]]:
    """The same by `greedy_copies`, cut behind the end of each text."""
    with torch.no_grad():
        new = greedy_copies(
            model, prompts, copies=copies, max_new_tokens=N_NEW, eos=EOS, intervention=intervention
        ).tolist()
    cut = [[row[: row.index(EOS) + 1] if EOS in row else row for row in copy] for copy in new]
    for copy, whole in zip(cut, new, strict=True):
        for row, padded in zip(copy, whole, strict=True):
            assert set(padded[len(row) :]) <= {EOS}, "behind its end a text is filled with end-of-text tokens"
    assert len(new[0][0]) == max(len(row) for copy in cut for row in copy), "nothing is made when all have ended"
    return cut


def shift(width: int, copies: int, n_prompts: int, *, seed: int, size: float) -> Change:
    """Adds to each copy of each prompt what is its own; the first copy is left as it is."""
    draw = torch.Generator().manual_seed(seed)
    added = size * torch.randn(copies, n_prompts, width, generator=draw)
    added[0] = 0
    return lambda h, copy, prompt: h + added[copy, prompt]


def intervention_at(model, names: list[str], copies: int, n_prompts: int, *, first_only: bool = False, size=1.5):
    """A shift of its own at each of several sites."""
    cfg = model.cfg
    widths = {"attn": cfg.n_heads * cfg.d_head, "mlp": cfg.d_mlp}
    changes = {
        name: shift(widths.get(name.split(".")[2], cfg.d_model), copies, n_prompts, seed=i, size=size)
        for i, name in enumerate(names)
    }
    return Intervention(changes, first_only=first_only)


@pytest.mark.parametrize("names", [["blocks.1.hook_resid_post"], ["blocks.0.attn.hook_z", "blocks.2.mlp.hook_post"]])
def test_what_changes_generated_positions_alone_leaves_the_first_token(speaker, names):
    model = speaker()
    both = [intervention_at(model, names, 3, len(PROMPTS), size=4.0), Intervention({})]
    later = replace(both[0], later_only=True)
    assert_same(model, PROMPTS, 3, later)
    firsts = [[row[0] for copy in together(model, PROMPTS, 3, one) for row in copy] for one in (later, *both)]
    assert firsts[0] == firsts[2] != firsts[1]


def assert_same(model, prompts: Tensor, copies: int, intervention: Intervention, *, differ: bool = True) -> None:
    expected, margin = one_by_one(model, prompts, copies, intervention)
    assert margin > CLEAR, "too near a tie to tell anything: choose another model"
    assert together(model, prompts, copies, intervention) == expected
    said = [tuple(row) for copy in expected for row in copy]
    if differ:
        assert len(set(said)) > len({tuple(row) for row in prompts.tolist()}), "copies say the same: shift them more"
        assert len(set(map(len, said))) > 1, "all end at once: choose another model"


@pytest.mark.parametrize(
    ("positional_embedding_type", "first_only"), [("standard", False), ("standard", True), ("rotary", False)]
)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("site", SITES)
def test_each_copy_says_what_it_says_alone(speaker, site, layer, first_only, positional_embedding_type):
    model = speaker(positional_embedding_type=positional_embedding_type)
    name = f"blocks.{layer}.{site}"
    size = 8.0 if site.startswith("attn.hook_q") else 2.5
    intervention = intervention_at(model, [name], 3, len(PROMPTS), first_only=first_only, size=size)
    # Queries and keys of the last layer change little, a single time even less: some texts stay as they are.
    assert_same(model, PROMPTS, 3, intervention, differ=site not in ("attn.hook_q", "attn.hook_k"))


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["blocks.2.hook_resid_pre", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"],
        ["blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"],
        ["blocks.1.hook_resid_post", "blocks.1.attn.hook_k", "blocks.1.attn.hook_v"],
        ["blocks.2.hook_resid_post", "blocks.0.hook_attn_out"],
        [f"blocks.{layer}.{site}" for layer in range(3) for site in ("attn.hook_q", "ln2.hook_normalized")],
        [f"blocks.{layer}.hook_resid_post" for layer in range(3)],
    ],
    ids=lambda names: " ".join(names[:2]),
)
def test_several_sites_at_once_are_changed_each(speaker, names, first_only):
    model = speaker()
    assert_same(model, PROMPTS, 3, intervention_at(model, names, 3, len(PROMPTS), first_only=first_only))


@pytest.mark.parametrize(
    "shape",
    [
        {"normalization_type": "RMS", "act_fn": "silu", "gated_mlp": True, "positional_embedding_type": "rotary"},
        {
            "normalization_type": "LNPre",
            "act_fn": "gelu_new",
            "use_attn_scale": not HAS_HOOKED_TRANSFORMER,
            "end": -10.0,
        },
        {"normalization_type": None, "act_fn": "relu", "n_heads": 1, "d_head": 5},
        {"normalization_type": "RMSPre", "gated_mlp": True, "n_layers": 1},
    ],
    ids=lambda shape: " ".join(map(str, shape.values())),
)
def test_models_of_other_shapes_are_changed_too(speaker, shape):
    model = speaker(**shape)
    last = model.cfg.n_layers - 1
    gate = "mlp.hook_pre_linear" if model.cfg.gated_mlp else "mlp.hook_pre"
    for names in ([f"blocks.{last}.{gate}"], [f"blocks.0.{gate}", f"blocks.{last}.attn.hook_v"]):
        assert_same(model, PROMPTS, 3, intervention_at(model, names, 3, len(PROMPTS)))


@pytest.mark.parametrize("site", ["hook_resid_pre", "attn.hook_k", "attn.hook_z", "mlp.hook_post", "hook_resid_post"])
@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
def test_prompts_of_one_token_and_single_prompts_are_changed_too(speaker, site, positional_embedding_type):
    model = speaker(positional_embedding_type=positional_embedding_type)
    for prompts in (torch.tensor([[1], [7], [1]]), torch.tensor([[3]]), PROMPTS[:1]):
        for copies in (1, 4):
            assert_same(
                model, prompts, copies, intervention_at(model, [f"blocks.1.{site}"], 4, 3, size=3), differ=False
            )


@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], torch.tensor([[7], [1], [7]])], ids=["four", "one", "short"])
@pytest.mark.parametrize("copies", [1, 3])
def test_where_nothing_is_changed_every_copy_says_what_the_model_says(
    speaker, prompts, copies, positional_embedding_type
):
    model = speaker(positional_embedding_type=positional_embedding_type)
    for first_only in (False, True):
        assert_same(model, prompts, copies, Intervention({}, first_only=first_only), differ=False)


def test_a_change_may_replace_what_was_there_and_is_told_copy_and_prompt(speaker):
    model, told = speaker(), set()
    table = 3 * torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(2))

    def replace(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        told.update(zip(copy.tolist(), prompt.tolist(), strict=True))
        return torch.where((copy == 1)[:, None], table[copy, prompt], h)

    assert_same(model, PROMPTS, 3, Intervention({"blocks.1.hook_resid_mid": replace}, first_only=True))
    assert told == {(copy, prompt) for copy in range(3) for prompt in range(4)}


@pytest.mark.parametrize(("site", "n_rows"), [("hook_resid_pre", 20), ("attn.hook_k", 20), ("attn.hook_z", 4)])
def test_below_the_first_change_copies_that_say_the_same_share_their_rows(speaker, monkeypatch, site, n_rows):
    model, rows = speaker(), {}
    run = Blocks.run

    def count(self, layer: int, x: Tensor, *arguments, **keywords) -> Tensor:
        rows.setdefault(layer, []).append(len(x))
        return run(self, layer, x, *arguments, **keywords)

    monkeypatch.setattr(Blocks, "run", count)
    with torch.no_grad():
        greedy_copies(
            model,
            PROMPTS,
            copies=5,
            max_new_tokens=1,
            eos=EOS,
            intervention=intervention_at(model, [f"blocks.2.{site}"], 5, len(PROMPTS)),
        )
    # The first run of each is of the prompts before their last token.
    assert [rows[layer][1:] for layer in range(3)] == [[4], [4], [n_rows]]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([f"blocks.{layer}.{site}" for layer in range(3) for site in SITES]), max_size=3),
    st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([0.5, 4.0]),
)
def test_any_prompts_copies_and_sites_say_what_they_say_alone(speaker, names, prompts, copies, first_only, size):
    model = speaker(positional_embedding_type="rotary", act_fn="gelu_new")
    intervention = intervention_at(model, sorted(set(names)), copies, len(prompts), first_only=first_only, size=size)
    expected, margin = one_by_one(model, torch.tensor(prompts), copies, intervention)
    assume(margin > 10 * CLEAR)
    assert together(model, torch.tensor(prompts), copies, intervention) == expected


def test_a_text_that_does_not_end_within_the_context_is_refused(speaker):
    model = speaker(end=-1e6, n_ctx=8)
    how = {"copies": 2, "eos": EOS, "intervention": intervention_at(model, ["blocks.1.hook_resid_post"], 2, 4)}
    assert greedy_copies(model, PROMPTS, max_new_tokens=5, **how).shape == (2, 4, 5)
    with pytest.raises(ModelError, match=r"context of 8 tokens; received prompts of 4 tokens that end later or never"):
        greedy_copies(model, PROMPTS, max_new_tokens=6, **how)


def test_texts_that_end_at_the_contexts_end_are_not_refused(speaker):
    model = speaker(end=1e6, n_ctx=4)
    new = greedy_copies(model, PROMPTS, copies=1, max_new_tokens=9, eos=EOS, intervention=Intervention({}))
    assert new.tolist() == [[[EOS]] * 4]


def test_no_new_tokens_are_no_tokens(speaker):
    """As `behavior.greedy_tokens` gives none."""
    new = greedy_copies(speaker(), PROMPTS, copies=2, max_new_tokens=0, eos=EOS, intervention=Intervention({}))
    assert new.shape == (2, 4, 0)


@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
def test_under_autocast_clear_tokens_are_the_same(speaker, positional_embedding_type):
    model = speaker(positional_embedding_type=positional_embedding_type)
    intervention = intervention_at(model, ["blocks.1.mlp.hook_post", "blocks.2.attn.hook_k"], 3, len(PROMPTS))
    expected, _ = one_by_one(model, PROMPTS, 3, intervention)
    with torch.autocast("cpu", torch.bfloat16):
        found = together(model, PROMPTS, 3, intervention)
    same = [a == b for said, own in zip(found, expected, strict=True) for a, b in zip(said, own, strict=True)]
    assert sum(same) >= 8, f"{sum(same)} of 12 texts are the same"


def test_only_sites_that_are_known_can_be_changed():
    assert can_change([f"blocks.10.{site}" for site in BLOCK_SITES]) and can_change([])
    for name in ("hook_embed", "ln_final.hook_normalized", "blocks.0.attn.hook_pattern", "blocks.0.ln1.hook_scale"):
        assert not can_change(["blocks.0.hook_resid_pre", name])
