"""Patching maps on a model whose deciding places are known, against TransformerLens' own, and against loops."""

import bridges
import numpy as np
import planted
import pytest
import torch
from transformer_lens import patching
from transformer_lens.utilities import get_act_name

import memgen_lens as mg
from memgen_lens.analysis.attribution import contrast
from memgen_lens.analysis.attribution.answers import answers_of
from memgen_lens.core.errors import ModelError, PairsError, SettingsError, SiteError
from memgen_lens.models.step import last_logits
from memgen_lens.models.tokens import tokenized

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def known():
    return planted.build_model(), planted.twin_pairs(40)


@pytest.fixture(scope="module")
def recalled(trained):
    """Pairs of the small trained model: prompts of one length, memorized answers of many tokens."""
    pairs = mg.collect_pairs(trained.model, trained.task, seed=0, progress=False)
    return trained.model, pairs.take(np.arange(10))


def first_tokens(model):
    """The logit of the memorized answer's first token minus that of the rule's: a metric, and its two ids a prompt."""

    def ids(items):
        texts = [(item.memorized_answer, item.rule_answer) for item in items]
        return torch.tensor([[model.tokenizer.encode(t, add_special_tokens=False)[0] for t in both] for both in texts])

    def metric(logits, items):
        both = logits.gather(1, ids(items).to(logits.device))
        return both[:, 0] - both[:, 1]

    return metric, ids


# --- a model whose deciding places are known ---------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_marker_decides_where_it_stands_and_the_answer_position_from_then_on(known, direction):
    model, pairs = known
    at_marker = np.array([[len(i.prompt) - i.prompt.index("M") == d for d in range(7, 0, -1)] for i in pairs.memorized])
    there = np.array([[len(i.prompt) >= d for d in range(7, 0, -1)] for i in pairs.memorized])
    enough = there.sum(0) >= 8
    share = (at_marker.sum(0) / there.sum(0))[enough]
    answer = np.arange(enough.sum()) == enough.sum() - 1
    nothing = np.zeros(enough.sum())
    expected = {
        "resid_pre": [share, answer],
        "attn_out": [answer, nothing],  # the first layer moves it
        "mlp_out": [nothing, answer],  # the last one decides
        "resid_post": [answer, answer],
    }
    for site, effect in expected.items():
        found = mg.patching_map(model, pairs, site, direction=direction, split=None, **QUIET)
        assert np.allclose(found.effect, effect, atol=1e-5), site
        assert ((found.low <= found.effect + 1e-9) & (found.effect <= found.high + 1e-9)).all()
        assert np.array_equal(found.n, there.sum(0)[enough]) and np.array_equal(found.n, found.n_items)
        assert np.allclose(found.tokens.differing, share) and found.tokens.memorized[-1] == "="
        assert found.total == pytest.approx(20, abs=1e-3) and (found.n_pairs, found.n_left_out) == (40, 0)
    assert not planted.hooks_on(model)


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_the_head_that_moves_the_marker_carries_it_all(known, positions):
    model, pairs = known
    for direction in ("denoising", "noising"):
        how = {"by": "head", "positions": positions, "direction": direction, "split": None, **QUIET}
        found = mg.patching_map(model, pairs, "z", **how)
        assert np.allclose(found.effect, [[1, 0], [0, 0]], atol=1e-5)
        assert (found.n == 40).all()
    alone = mg.patching_map(model, pairs, "blocks.0.attn.hook_z", by="head", split=None, **QUIET)
    assert np.allclose(alone.effect, [[1, 0]], atol=1e-5)


def test_a_moved_marker_is_two_positions_each_of_which_decides_nothing_alone(known):
    """Where the marker's place differs too, the answer position still has all of it behind the first layer."""
    model, _ = known
    n = 12
    pairs = mg.PromptPairs.from_strings(
        ["aMbc="] * n, ["abGc="] * n, memorized_answers=["m"] * n, rule_answers=["r"] * n, items=range(n)
    )
    found = mg.patching_map(model, pairs, split=None, **QUIET)
    assert np.allclose(found.effect[1], [0, 0, 0, 0, 1], atol=1e-5)
    assert np.allclose(found.effect[0][[0, 3, 4]], 0, atol=1e-5)
    assert found.tokens.memorized == ("a", "M", "b", "c", "=") and found.tokens.generalized == ("a", "b", "G", "c", "=")
    assert found.tokens.differing.tolist() == [0, 1, 1, 0, 0] and (found.tokens.memorized_share == 1).all()
    assert found.n_items.tolist() == [1] * 5, "equal prompts are one item"


# --- against others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z"])
def test_maps_are_those_of_transformer_lens(recalled, site):
    model, pairs = recalled
    metric, ids = first_tokens(model)
    clean, corrupted = (
        tokenized(model, [item.prompt for item in side])[0] for side in (pairs.memorized, pairs.generalized)
    )
    both = ids(pairs.memorized)

    def mean(logits):
        said = logits[:, -1].gather(1, both)
        return (said[:, 0] - said[:, 1]).mean()

    with torch.no_grad():
        logits, cache = model.run_with_cache(clean)
        ends = [float(mean(model(corrupted))), float(mean(logits))]
        name = {"z": "attn_head_out_all_pos"}.get(site, site)
        theirs = getattr(patching, f"get_act_patch_{name}")(model, corrupted, cache, mean).numpy()
    by = "head" if site == "z" else "position"
    ours = mg.patching_map(model, pairs, site, by=by, metric=metric, split=None, **QUIET)
    assert ours.total == pytest.approx(ends[1] - ends[0], abs=1e-4)
    assert np.allclose(ours.effect, (theirs - ends[0]) / (ends[1] - ends[0]), atol=1e-5)


def by_hand(model, item, hook, put):
    """The contrast of one prompt, run whole, alone and without a cache."""
    prompt, total = tokenized(model, [item.prompt])[0], 0.0
    last = prompt.shape[1] - 1
    for sign, answer in ((1, item.memorized_answer), (-1, item.rule_answer)):
        ids = model.tokenizer.encode(answer, add_special_tokens=False)
        tokens = torch.cat([prompt, torch.tensor([ids])], dim=1)
        with model.hooks(fwd_hooks=[(hook, put)]):
            logits = model(tokens, attention_mask=torch.ones_like(tokens))[0].log_softmax(-1)
        total += sign * sum(float(logits[last + i, token]) for i, token in enumerate(ids))
    return total


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@torch.no_grad()
def test_maps_of_answers_of_many_tokens_are_those_of_a_loop(recalled, direction):
    model, pairs = recalled
    found = mg.patching_map(model, pairs, "resid_mid", direction=direction, split=None, **QUIET)
    heads = mg.patching_map(model, pairs, "z", by="head", positions="answer", direction=direction, split=None, **QUIET)
    n_positions = tokenized(model, [pairs.memorized[0].prompt])[0].shape[1]
    assert found.effect.shape == (model.cfg.n_layers, n_positions)
    cells = [("resid_mid", 0, 1, slice(None)), ("resid_mid", 1, n_positions - 1, slice(None)), ("z", 1, -1, 2)]
    total = gained = None
    for site, layer, position, part in cells:
        hook, gained, total = get_act_name(site, layer), 0.0, 0.0
        place = position % n_positions
        for mem, gen in zip(pairs.memorized, pairs.generalized, strict=True):
            source, target = (mem, gen) if direction == "denoising" else (gen, mem)
            seen = []
            tokens = tokenized(model, [source.prompt])[0]
            with model.hooks(fwd_hooks=[(hook, lambda a, hook, seen=seen: seen.append(a.clone()))]):
                model(tokens, attention_mask=torch.ones_like(tokens))

            def put(activation, hook, seen=seen, place=place, part=part):
                activation[0, place, part] = seen[0][0, place, part]
                return activation

            def keep(activation, hook):
                return activation

            plain = by_hand(model, target, hook, keep)
            gained += by_hand(model, target, hook, put) - plain
            total += by_hand(model, source, hook, keep) - plain
        effect = heads.effect[layer, part] if site == "z" else found.effect[layer, place]
        assert effect == pytest.approx(gained / total, abs=1e-5), (site, layer, position)
    assert found.total == pytest.approx(abs(total) / len(pairs), abs=1e-5)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("kind", bridges.KINDS)
@torch.no_grad()
def test_on_a_pretrained_model_maps_are_those_of_raw_hooks(kind, site):
    model, hf = bridges.bridge(kind), bridges.hugging_face(kind)
    n = 8
    mem, gen = ([f"{a}{b}{c}=" for a, b in zip("abcdabcd", "efghhgfe", strict=True)] for c in "12")
    pairs = mg.PromptPairs.from_strings(mem, gen, memorized_answers=["12"] * n, rule_answers=["3"] * n)
    answers = answers_of(model, pairs, batch_size=8, call="here")
    blocks = hf.transformer.h if kind == "gpt2" else hf.model.layers
    norm = {"gpt2": "ln_2", "llama": "post_attention_layernorm", "gemma": "pre_feedforward_layernorm"}[kind]
    places = [getattr(block, norm) if site == "resid_mid" else block for block in blocks]

    def run(tokens, place, look):
        """Logits, with a look at what enters a module (or, of resid_post, leaves it), which may change it."""
        if site == "resid_post":
            handle = place.register_forward_hook(lambda m, i, out: look(out[0] if isinstance(out, tuple) else out))
        else:
            handle = place.register_forward_pre_hook(lambda m, inputs: look(inputs[0]))
        logits = hf(torch.tensor([tokens])).logits[0].log_softmax(-1)
        handle.remove()
        return logits

    def said(prompt, both, place=blocks[0], look=lambda x: None):
        total = 0.0
        for sign, ids in zip((1, -1), both, strict=True):
            logits = run(prompt + ids, place, look)
            total += sign * sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))
        return total

    def put(position, value):
        def look(x):
            x[0, position] = value  # in place: the stream beside the norm too

        return look

    totals, gains = [], []
    for m, g, both in zip(mem, gen, answers, strict=True):
        clean, corrupted = (tokenized(model, [text])[0][0].tolist() for text in (m, g))
        plain = said(corrupted, both)
        totals.append(said(clean, both) - plain)
        rows = []
        for place in places:
            seen = []
            run(clean, place, lambda x, seen=seen: seen.append(x[0].clone()))
            rows.append([said(corrupted, both, place, put(p, seen[0][p])) - plain for p in range(len(clean))])
        gains.append(rows)
    expected = np.mean(gains, axis=0) / np.mean(totals)
    if np.mean(totals) < 0:  # a random model may have it either way
        pairs = mg.PromptPairs.from_strings(mem, gen, memorized_answers=["3"] * n, rule_answers=["12"] * n)
    found = mg.patching_map(model, pairs, site, split=None, **QUIET)
    assert found.total == pytest.approx(abs(np.mean(totals)), rel=1e-4)
    assert np.allclose(found.effect, expected, atol=1e-4 * np.abs(expected).max())
    if site == "resid_pre":
        assert np.allclose(found.effect[0], [*[0] * (expected.shape[1] - 2), 1, 0], atol=1e-4), (
            "they differ there alone"
        )


def test_what_both_prompts_begin_with_is_not_run(known, monkeypatch):
    """Positions before the first unlike token have no effect; that is known without a look at the model."""
    model, _ = known
    late, early = (planted.twin_pairs(10, lengths=(5, 5), at=at) for at in (4, 0))
    rows = []

    def counted(model, tokens, *args, **how):
        rows.append(len(tokens))
        return last_logits(model, tokens, *args, **how)

    monkeypatch.setattr(contrast, "last_logits", counted)
    found = mg.patching_map(model, late, split=None, **QUIET)
    assert np.allclose(found.effect, [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]], atol=1e-5)
    of_late, rows[:] = sum(rows), []
    mg.patching_map(model, early, split=None, **QUIET)
    assert sum(rows) - of_late == 10 * 2 * 4, "four positions of two layers less"


# --- the same however it is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"site": "z", "by": "head"}])
@pytest.mark.parametrize("which", ["answers of many tokens", "prompts of many lengths"])
def test_batched_is_single(recalled, known, which, how, monkeypatch):
    model, pairs = recalled if which == "answers of many tokens" else (known[0], known[1].take(np.arange(10)))
    many, single = (
        mg.patching_map(model, pairs, split=None, batch_size=size, **how, **QUIET).effect for size in (None, 1)
    )
    assert np.allclose(many, single, atol=1e-5)
    monkeypatch.setattr(contrast, "rows_at_once", lambda *args, **how: 1)
    one_row = mg.patching_map(model, pairs, split=None, **how, **QUIET).effect
    assert np.allclose(many, one_row, atol=1e-5)


def test_pairs_of_unlike_lengths_are_left_out_and_counted(known):
    model, pairs = known
    longer = [item.prompt if i % 3 else f"a{item.prompt}" for i, item in enumerate(pairs.memorized)]
    answers = {"memorized_answers": ["m"] * 40, "rule_answers": ["r"] * 40}
    mixed = mg.PromptPairs.from_strings(longer, [item.prompt for item in pairs.generalized], **answers)
    found = mg.patching_map(model, mixed, split=None, **QUIET)
    assert (found.n_pairs, found.n_left_out) == (26, 14)
    kept = mg.patching_map(model, pairs.take(np.flatnonzero(np.arange(40) % 3)), split=None, **QUIET)
    assert np.array_equal(found.effect, kept.effect) and np.array_equal(found.low, kept.low)
    with pytest.raises(
        PairsError, match=r"at least 8 pairs whose two prompts have equally many tokens; received 1 of 9"
    ):
        mg.patching_map(model, mixed.take(np.r_[np.arange(0, 24, 3), 1]), split=None, **QUIET)


def test_intervals_count_items(known):
    model, pairs = known
    few = np.arange(10)
    one = mg.patching_map(model, pairs.take(few), split=None, **QUIET)
    many = mg.patching_map(model, pairs.take(np.repeat(few, 4)), split=None, **QUIET)
    both = many.n_items >= 8
    assert np.array_equal(many.n_items[both], one.n_items) and (many.n == 4 * many.n_items).all()
    assert np.allclose(many.low[:, both], one.low) and np.allclose(many.high[:, both], one.high)
    assert one.high[0].max() - one.low[0].min() > 0.1


def test_what_cannot_be_patched_is_refused(known):
    model, pairs = known
    with pytest.raises(SettingsError, match=r"patching_map: .*by='head' and site='resid_pre'"):
        mg.patching_map(model, pairs, by="head")
    with pytest.raises(SettingsError, match=r"by='position' and positions='answer'"):
        mg.patching_map(model, pairs, positions="answer")
    with pytest.raises(SiteError):
        mg.patching_map(model, pairs, "nowhere")
    with pytest.raises(SiteError, match=r"one row a position|positions that are run"):
        mg.patching_map(model, pairs, "blocks.0.attn.hook_pattern", split=None, **QUIET)
    with pytest.raises(PairsError, match=r"make the memorized answer likelier .*received a mean difference of -20"):
        flipped = mg.PromptPairs.from_strings(
            [item.prompt for item in pairs.generalized],
            [item.prompt for item in pairs.memorized],
            memorized_answers=["m"] * 40,
            rule_answers=["r"] * 40,
        )
        mg.patching_map(model, flipped, split=None, **QUIET)
    with pytest.raises(ModelError, match=r"a tensor of one number a row"):
        mg.patching_map(model, pairs, metric=lambda logits, items: logits, split=None, **QUIET)
    with pytest.raises(PairsError, match="both answers of each pair"):
        mg.patching_map(model, planted.prompt_pairs(90, answers=False, lengths=(3, 3)), split=None, **QUIET)
    with pytest.raises(PairsError, match="at least 8 pairs"):
        mg.patching_map(model, pairs.take(np.arange(9)), split="select", **QUIET)
    assert not planted.hooks_on(model)
