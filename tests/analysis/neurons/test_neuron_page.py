"""One neuron, looked at: a planted one whose part is known, and any against hooks and loops written by hand."""

from contextlib import contextmanager
from types import SimpleNamespace

import bridges
import helpers
import numpy as np
import planted
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformer_lens.utilities import get_act_name

import memgen_lens as mg
from memgen_lens.analysis.neurons import changed
from memgen_lens.analysis.neurons.look import look_at
from memgen_lens.core.errors import ModelError, PairsError, SettingsError, SiteError
from memgen_lens.core.neuron_records import NeuronRecord, load_neurons, save_neurons

SIDES = {"memorized": "memorized_answer", "generalized": "rule_answer"}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def known():
    model, pairs = planted.build_model(), planted.prompt_pairs(20)
    page = mg.neuron_page(model, pairs, planted.LAYER, planted.NEURON, split=None, **QUIET)
    return SimpleNamespace(model=model, pairs=pairs, page=page)


@pytest.fixture(scope="module")
def recalled(trained):
    """Pairs of the small trained model, whose memorized answers have several tokens, and a neuron that matters."""
    pairs = mg.collect_pairs(trained.model, trained.task, seed=0, progress=False).take(np.arange(10))
    score = mg.attribute(trained.model, pairs, "post", split=None, n_permutations=0, progress=False)
    place = divmod(int(np.abs(score.rho).argmax()), score.rho.shape[1])
    page = mg.neuron_page(trained.model, pairs, *place, split=None, task=trained.task, **QUIET)
    return SimpleNamespace(model=trained.model, task=trained.task, pairs=pairs, place=place, page=page)


def by_name(page):
    return {change.change: change for change in page.changes}


def assert_alike(page, other, atol=1e-4):
    """Two pages of one neuron say the same, to rounding."""
    for side in SIDES:
        assert np.allclose(getattr(page, side), getattr(other, side), atol=atol)
    assert page.nmd.value == pytest.approx(other.nmd.value, abs=atol)
    assert page.why == other.why
    for one, two in zip(page.changes, other.changes, strict=True):
        for side in SIDES:
            a, b = getattr(one, side), getattr(two, side)
            assert (a.kept, a.switched) == (b.kept, b.switched)
            assert a.contrast.value == pytest.approx(b.contrast.value, abs=atol)
            assert a.contrast.ci95 == pytest.approx(b.contrast.ci95, abs=atol)
        assert one.examples == two.examples


# --- a model whose deciding neuron is known ----------------------------------------------------------------------


def test_the_planted_neuron_is_active_on_recalling_prompts_alone(known):
    page = known.page
    assert np.allclose(page.memorized, 1, atol=1e-4) and np.allclose(page.generalized, 0, atol=1e-4)
    assert page.nmd.value == pytest.approx(1, abs=1e-4) and page.auroc.value == 1
    assert all("M" in one.prompt and one.side == "memorized" for one in page.highest)
    assert all("G" in one.prompt and one.side == "generalized" for one in page.lowest)
    assert len(page.highest) == len(page.lowest) == 5
    assert (page.n_pairs, page.n_items, page.split) == (20, len(set(known.pairs.item.tolist())), None)


def test_the_planted_neuron_favours_the_memorized_answer(known):
    (favoured, *_), (suppressed, *_) = known.page.favoured, known.page.suppressed
    # Its output weight is 1 onto a direction that is unembedded as +10 for m and -10 for r.
    assert (favoured.token, favoured.logit) == ("m", pytest.approx(10))
    assert (suppressed.token, suppressed.logit) == ("r", pytest.approx(-10))
    assert len(known.page.favoured) == len(known.page.suppressed) == 1, "no other token is touched"


def test_ablation_and_doubling_of_the_planted_neuron_do_what_its_weights_say(known):
    changes = by_name(known.page)
    for name, side, moved, kept in (
        ("zero", "memorized", -20, 0),
        ("zero", "generalized", 0, 1),
        ("mean", "memorized", -10, None),
        ("mean", "generalized", 10, None),
        ("double", "memorized", 20, 1),
        ("double", "generalized", 0, 1),
    ):
        done = getattr(changes[name], side)
        assert done.contrast.value == pytest.approx(moved, abs=1e-3), (name, side)
        assert done.contrast.ci95 == pytest.approx((moved, moved), abs=1e-3), "the same on every item"
        if kept is not None:
            assert (done.kept.rate, done.switched.rate) == (kept, 1 - kept)
            assert (done.kept.n, done.kept.n_items) == (20, known.page.n_items)
    example = changes["zero"].examples[0]
    assert (example["before"], example["after"]) == ("m", "r")
    assert (example["side"], example["behavior"]) == ("memorized", "generalization")
    assert not changes["double"].examples


def test_another_neuron_has_no_part(known):
    page = mg.neuron_page(known.model, known.pairs, planted.LAYER, planted.NEURON + 1, split=None, **QUIET)
    for change in page.changes:
        for side in SIDES:
            done = getattr(change, side)
            assert abs(done.contrast.value) < 0.2 and done.kept.rate == 1 and done.switched.rate == 0
        assert change.examples == ()


def test_a_coordinate_of_the_residual_stream_can_be_looked_at(known):
    page = mg.neuron_page(
        known.model, known.pairs, planted.LAYER, planted.DECISION, site="resid_post", split=None, **QUIET
    )
    assert page.favoured[0].token == "m" and page.suppressed[0].token == "r"
    assert by_name(page)["zero"].memorized.contrast.value == pytest.approx(-20, abs=1e-3)
    assert by_name(page)["zero"].memorized.switched.rate == 1
    whole = mg.neuron_page(
        known.model, known.pairs, 0, planted.NEURON, site="blocks.1.mlp.hook_post", split=None, **QUIET
    )
    assert_alike(whole, known.page)
    assert whole.favoured == known.page.favoured


def test_answers_that_the_pairs_do_not_name_are_those_that_the_model_gives(known):
    page = mg.neuron_page(
        known.model, planted.prompt_pairs(20, answers=False), planted.LAYER, planted.NEURON, split=None, **QUIET
    )
    assert_alike(page, known.page)


def test_a_metric_takes_the_place_of_the_contrast(known):
    token = {text: known.model.tokenizer.convert_tokens_to_ids(text) for text in "rm"}

    def metric(logits, items):
        return 3 * (logits[:, token["m"]] - logits[:, token["r"]])

    page = mg.neuron_page(known.model, known.pairs, planted.LAYER, planted.NEURON, split=None, metric=metric, **QUIET)
    assert page.metric == "metric" and known.page.metric is None
    assert by_name(page)["zero"].memorized.contrast.value == pytest.approx(-60, abs=1e-2)
    assert by_name(page)["zero"].memorized.kept.rate == 0


def test_what_cannot_be_known_is_left_out_and_says_why(known):
    same = mg.PromptPairs.from_strings(planted.prompts("M", 9, seed=0), planted.prompts("M", 9, seed=1))
    page = mg.neuron_page(known.model, same, 0, 3, site="pre", split=None, **QUIET)
    assert page.favoured == page.suppressed == ()
    assert page.why["tokens"].startswith("blocks.0.mlp.hook_pre, whose values are not written into the residual")
    assert "two answers that the model's tokenizer tells apart" in page.why["contrast"]
    assert all(change.memorized.contrast is None for change in page.changes)
    # Both sides say the same: no output shows one behaviour and not the other.
    assert all(change.memorized.kept is None and change.examples == () for change in page.changes)


def test_what_cannot_be_looked_at_is_refused(known):
    look = (known.model, known.pairs)
    with pytest.raises(SettingsError, match=r"neuron_page\(layer=2\): expected a layer of site 'post', 0 to 1"):
        mg.neuron_page(*look, 2, 0)
    with pytest.raises(SettingsError, match=r"neuron_page\(neuron=64\): expected a neuron of site 'post', 0 to 63"):
        mg.neuron_page(*look, 0, 64, split=None)
    with pytest.raises(SettingsError, match=r"neuron_page\(neuron=\.\.\.\)"):
        mg.neuron_page(*look, 0, -1)
    with pytest.raises(SiteError, match="Did you mean"):
        mg.neuron_page(*look, 0, 0, site="pots")
    with pytest.raises(PairsError, match="at least 8 pairs"):
        mg.neuron_page(known.model, known.pairs.take(np.arange(3)), 0, 0, split=None)
    with pytest.raises(ModelError, match="HookedTransformer or TransformerBridge"):
        mg.neuron_page(None, known.pairs, 0, 0)
    assert not planted.hooks_on(known.model)


# --- against loops -----------------------------------------------------------------------------------------------


@contextmanager
def neuron_set(model, hook, neuron, put, first):
    """The neuron's value is ``put(value)`` from position ``first`` on (of that position alone where it is a slice)."""
    where = first if isinstance(first, slice) else slice(first, None)

    def change(activation, hook):
        activation = activation.clone()
        activation[:, where, neuron] = put(activation[:, where, neuron])
        return activation

    with model.hooks(fwd_hooks=[(hook, change)]):
        yield


def contrast_by_hand(model, item, hook, neuron, put):
    """The contrast of one prompt, run whole and without a cache, the neuron changed at its end."""
    prompt = model.to_tokens(item.prompt)
    last, total = prompt.shape[1] - 1, 0.0
    for sign, answer in ((1, item.memorized_answer), (-1, item.rule_answer)):
        ids = model.tokenizer.encode(answer, add_special_tokens=False)
        tokens = torch.cat([prompt, torch.tensor([ids])], dim=1)
        with neuron_set(model, hook, neuron, put, slice(last, last + 1)), torch.no_grad():
            logits = model(tokens, attention_mask=torch.ones_like(tokens))[0].log_softmax(-1)
        total += sign * sum(float(logits[last + i, token]) for i, token in enumerate(ids))
    return total


def test_changes_of_any_neuron_are_those_of_a_loop(recalled):
    model, pairs, (layer, neuron), page = recalled.model, recalled.pairs, recalled.place, recalled.page
    hook = get_act_name("post", layer)
    assert max(len(model.tokenizer.encode(i.memorized_answer)) for i in pairs.memorized) > 1
    seen = []
    for side in SIDES:
        for item in getattr(pairs, side):
            with neuron_set(model, hook, neuron, lambda x: seen.append(float(x[0, -1])) or x, 0), torch.no_grad():
                model(model.to_tokens(item.prompt))
    mem, gen = np.array(seen).reshape(2, -1)
    assert np.allclose(page.memorized, mem, atol=1e-4) and np.allclose(page.generalized, gen, atol=1e-4)
    assert page.nmd.value == pytest.approx((mem - gen).mean(), abs=1e-4)
    labels = np.repeat([1, 0], len(mem))
    assert page.auroc.value == pytest.approx(roc_auc_score(labels, np.concatenate([mem, gen])))
    mean = float(np.mean(seen))
    puts = {"zero": lambda x: 0 * x, "mean": lambda x: 0 * x + mean, "double": lambda x: 2 * x}
    for name, put in puts.items():
        for side, answer in SIDES.items():
            done = getattr(by_name(page)[name], side)
            items = getattr(pairs, side)
            moved = [
                contrast_by_hand(model, item, hook, neuron, put)
                - contrast_by_hand(model, item, hook, neuron, lambda x: x)
                for item in items
            ]
            assert done.contrast.value == pytest.approx(np.mean(moved), abs=1e-3)
            assert done.contrast.ci95[0] - 1e-4 <= np.mean(moved) <= done.contrast.ci95[1] + 1e-4
            said = []
            for item in items:
                first = model.to_tokens(item.prompt).shape[1] - 1
                with neuron_set(model, hook, neuron, put, first):
                    said.append(planted.greedy_by_hand(model, item.prompt, 10))
            assert done.kept.k == sum(text == getattr(i, answer) for i, text in zip(items, said, strict=True))
            other = SIDES["generalized" if side == "memorized" else "memorized"]
            assert done.switched.k == sum(text == getattr(i, other) for i, text in zip(items, said, strict=True))
    assert page.highest[0].activation == pytest.approx(max(seen), abs=1e-4)
    assert page.lowest[0].activation == pytest.approx(min(seen), abs=1e-4)


@pytest.mark.parametrize("which", ["answers of many tokens", "prompts of many lengths"])
def test_batched_is_single_and_the_fast_forward_is_the_models_own(recalled, known, which, monkeypatch):
    many = which == "answers of many tokens"
    args = (recalled.model, *recalled.place) if many else (known.model, planted.LAYER, planted.NEURON)
    pairs = (recalled if many else known).pairs.take(np.arange(8))
    args, task = (args[0], pairs, *args[1:]), recalled.task if many else None
    page = mg.neuron_page(*args, split=None, task=task, **QUIET)
    assert_alike(mg.neuron_page(*args, split=None, task=task, batch_size=1, **QUIET), page)
    monkeypatch.setattr(changed, "is_plain", lambda model: False)
    assert_alike(mg.neuron_page(*args, split=None, task=task, **QUIET), page)
    monkeypatch.setattr(changed, "rows_at_once", lambda *args, **how: 3)
    assert_alike(mg.neuron_page(*args, split=None, task=task, **QUIET), page)


def test_several_neurons_of_several_layers_are_looked_at_together(recalled):
    places = [recalled.place, (0, 5), (1, 5), (1, 6)]
    how = {"site": "post", "split": None}
    together = look_at(recalled.model, recalled.task, recalled.pairs, places, **how, **QUIET)
    assert_alike(together[0], recalled.page)
    for place, record in zip(places, together, strict=True):
        alone = mg.neuron_page(recalled.model, recalled.pairs, *place, task=recalled.task, split=None, **QUIET)
        assert (record.layer, record.neuron) == place
        assert_alike(record, alone)
        assert record.favoured == alone.favoured


@helpers.either_kind
def test_heads_and_both_kinds_of_model(native, trained):
    if native:
        from memgen_lens.models.native import config_of, native_bridge, set_state, state_of

        model = native_bridge(config_of(trained.model), trained.task.tokenizer, device="cpu").eval()
        set_state(model, state_of(trained.model))
    else:
        model = trained.model
    pairs = mg.collect_pairs(model, trained.task, seed=0, progress=False).take(np.arange(8))
    neuron = 40  # of the second head, with 32 coordinates each
    page = mg.neuron_page(model, pairs, 1, neuron, site="z", split=None, task=trained.task, **QUIET)
    weights = helpers.weights(model)
    written = weights.blocks[1].attn.W_O.flatten(0, 1)[neuron].detach()
    logits = (written - written.mean()) * weights.ln_final.w.detach() @ weights.unembed.W_U.detach()
    logits = logits - logits.mean()
    assert page.favoured[0].id == int(logits.argmax()) and page.suppressed[0].id == int(logits.argmin())
    assert page.favoured[0].logit == pytest.approx(float(logits.max()), rel=1e-4)
    texts = model.tokenizer.convert_ids_to_tokens([effect.id for effect in page.favoured])
    assert [effect.token for effect in page.favoured] == texts, "a tokenizer of whole characters"
    hook, seen = get_act_name("z", 1), []

    def change(activation, hook):
        activation = activation.clone()
        seen.append(float(activation[0, -1].flatten()[neuron]))
        activation[0, -1, neuron // 32, neuron % 32] = 0
        return activation

    moved = []
    for item in pairs.memorized:
        one_token = model.to_tokens(item.prompt)
        with model.hooks(fwd_hooks=[(hook, change)]), torch.no_grad():
            zeroed = model(one_token)[0, -1].log_softmax(-1)
        with torch.no_grad():
            plain = model(one_token)[0, -1].log_softmax(-1)
        moved.append((zeroed - plain).numpy())
    assert np.allclose(page.memorized, seen, atol=1e-4)
    metric = mg.neuron_page(
        model,
        pairs,
        1,
        neuron,
        site="z",
        split=None,
        task=trained.task,
        metric=lambda logits, items: logits.log_softmax(-1)[:, 7],
        **QUIET,
    )
    assert by_name(metric)["zero"].memorized.contrast.value == pytest.approx(np.mean(moved, axis=0)[7], abs=1e-4)


# --- a pretrained model, by raw hooks on transformers' own ---------------------------------------------------------


@pytest.fixture(scope="module")
def spoken():
    """A tiny Llama, pairs whose answers are what it says to them, and the raw model."""
    model, hf = bridges.bridge("llama"), bridges.hugging_face("llama")
    texts = [f"{a}{'z' * n}+{b}=" for n, a in enumerate("abcdefghijkl") for b in "pqrstu"]
    said = {text: raw_greedy(hf, model.tokenizer, text) for text in texts}
    # Answers of two tokens each, as they stand; else they would be spelled, or ended, in another way.
    plain = [text for text in texts if len(said[text]) == 2 and set(said[text]) <= set(bridges.CHARACTERS.strip())]
    rows = [(a, b) for a, b in zip(plain[::2], plain[1::2], strict=False) if said[a] != said[b]][:8]
    assert len(rows) == 8
    mem, gen = zip(*rows, strict=True)
    pairs = mg.PromptPairs.from_strings(
        mem,
        gen,
        memorized_answers=[said[text] for text in mem],
        rule_answers=[said[text] for text in gen],
        match="exact",
        max_new_tokens=2,
        prepend_bos=False,
    )
    return SimpleNamespace(model=model, hf=hf, pairs=pairs)


@contextmanager
def raw_set(hf, layer, neuron, put, first):
    def change(module, inputs):
        x = inputs[0].clone()
        x[:, first, neuron] = put(x[:, first, neuron])
        return (x,)

    handle = hf.model.layers[layer].mlp.down_proj.register_forward_pre_hook(change)
    yield
    handle.remove()


@torch.no_grad()
def raw_greedy(hf, tokenizer, text, layer=0, neuron=0, put=lambda x: x, n=2):
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = len(ids)
    with raw_set(hf, layer, neuron, put, slice(start - 1, None)):
        while len(ids) < start + n and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode([i for i in ids[start:] if i != tokenizer.eos_token_id])


@torch.no_grad()
def raw_contrast(hf, tokenizer, item, layer, neuron, put):
    ids, total = tokenizer.encode(item.prompt, add_special_tokens=False), 0.0
    for sign, answer in ((1, item.memorized_answer), (-1, item.rule_answer)):
        more = tokenizer.encode(answer, add_special_tokens=False)
        with raw_set(hf, layer, neuron, put, len(ids) - 1):
            logits = hf(torch.tensor([ids + more]), use_cache=False).logits[0].log_softmax(-1)
        total += sign * sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(more))
    return total


def test_on_a_pretrained_model_changes_are_those_of_raw_hooks(spoken):
    model, hf, pairs, (layer, neuron) = spoken.model, spoken.hf, spoken.pairs, (1, 4)
    page = mg.neuron_page(model, pairs, layer, neuron, split=None, **QUIET)
    written, norm, unembed = hf.model.layers[layer].mlp.down_proj.weight[:, neuron], hf.model.norm, hf.lm_head.weight
    logits = (unembed @ (written * norm.weight)).detach()
    logits = (logits - logits.mean())[: len(model.tokenizer)]  # the vocabulary is larger
    assert [effect.id for effect in page.favoured] == logits.argsort(descending=True)[:10].tolist()
    assert page.suppressed[0].logit == pytest.approx(float(logits.min()), abs=1e-5)
    own = SimpleNamespace(tokenizer=model.tokenizer)
    mean = float(np.concatenate([page.memorized, page.generalized]).mean())
    puts = {"zero": lambda x: 0 * x, "mean": lambda x: 0 * x + mean, "double": lambda x: 2 * x}
    for name, put in puts.items():
        for side, answer in SIDES.items():
            done, items = getattr(by_name(page)[name], side), getattr(pairs, side)
            moved = [
                raw_contrast(hf, own.tokenizer, item, layer, neuron, put)
                - raw_contrast(hf, own.tokenizer, item, layer, neuron, lambda x: x)
                for item in items
            ]
            assert done.contrast.value == pytest.approx(np.mean(moved), abs=1e-3)
            said = [raw_greedy(hf, own.tokenizer, item.prompt, layer, neuron, put) for item in items]
            assert done.kept.n == len(items), "unsteered, all of them say what they are labelled with"
            assert done.kept.k == sum(text == getattr(i, answer) for i, text in zip(items, said, strict=True))
    assert_alike(mg.neuron_page(model, pairs, layer, neuron, split=None, batch_size=1, **QUIET), page)


# --- what it is as a record ----------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(known, recalled, tmp_path):
    save_neurons([known.page, recalled.page], tmp_path)
    for read, page in zip(load_neurons(tmp_path), (known.page, recalled.page), strict=True):
        assert type(read) is NeuronRecord
        for name, value in vars(page).items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(getattr(read, name), value) and getattr(read, name).dtype == value.dtype
            else:
                assert getattr(read, name) == value, name


def test_the_callers_mode_does_not_matter(known):
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            page = mg.neuron_page(known.model, known.pairs, planted.LAYER, planted.NEURON, split=None, **QUIET)
        assert_alike(page, known.page, atol=0)
