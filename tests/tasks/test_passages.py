"""Designed passages and those of the public domain: texts, contract, and how often each is trained on."""

from collections import Counter
from importlib.resources import files

import helpers
import numpy as np
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import SettingsError
from memgen_lens.tasks.passages import SENTENCES, WORDS
from memgen_lens.training.batches import STEPS_A_CHUNK, Batches


def small(**settings) -> mg.tasks.Passages:
    return mg.tasks.Passages(**{"n_passages": 3, "n_heldout": 8, "n_validation": 4} | settings)


@pytest.mark.parametrize("seed", range(3))
def test_designed_passages_keep_the_contract_of_a_task(seed):
    task = small(seed=seed)
    assert mg.tasks.check(task).n_items == {"memorized": 12, "rephrased": 12, "heldout": 8, "validation": 4}


def test_a_passage_is_eight_sentences_of_eight_tokens_of_known_words():
    task = small()
    words = {word for some in WORDS.values() for word in some}
    fixed = {word for form in SENTENCES for word in form.split() if not word.startswith("{")}
    for text in [*task.shown(), *task.unseen]:
        sentences = text.split(".")
        assert len(sentences) == 9 and sentences[-1] == ""
        assert all(len(sentence.split()) == 7 for sentence in sentences[:-1])
        assert {word for sentence in sentences for word in sentence.split()} <= words | fixed
        assert len(task.tokenizer(text)["input_ids"]) == 64
        assert task.tokenizer.decode(task.tokenizer(text)["input_ids"]) == text
    assert len(words) == sum(map(len, WORDS.values()))  # no word of two kinds


def test_any_four_sentences_of_the_grammar_are_plausible_and_only_its_own_are_recited():
    task = small()
    item, another = task.items("memorized")[:2]
    assert task.classify(item, item.memorized_answer) == "memorization"
    assert task.classify(item, another.memorized_answer) == "generalization"
    assert task.classify(item, another.memorized_answer.replace(" the ", " a ", 1)) == "other"
    assert task.classify(item, another.memorized_answer.partition(".")[2]) == "other"  # three sentences


def test_a_rephrasing_changes_one_word_of_each_sentence_to_another_of_its_kind():
    task = small()
    for item in task.items("memorized"):
        (other,) = task.rephrase(item)
        changed = [(a, b) for a, b in zip(item.prompt.split(), other.prompt.split(), strict=True) if a != b]
        assert len(changed) == 4
        for a, b in changed:
            assert any({a.strip("."), b.strip(".")} <= set(words) for words in WORDS.values())


def test_shown_texts_are_grouped_by_their_repetitions():
    task = small(repetitions_of=(2, 8))
    assert Counter(task.repetitions) == {2: 3, 8: 3} and task.n_shown == 30
    assert len(task.shown()) == 6 and task.shown(8) == task.shown()[3:] and task.shown(5) == []
    assert not set(task.shown()) & set(task.unseen)


@pytest.mark.parametrize("repetitions", [(), (0, 1), (4, 4)])
def test_impossible_repetitions_are_refused(repetitions):
    with pytest.raises(SettingsError, match="repetitions_of"):
        small(repetitions_of=repetitions)


def test_training_shows_each_passage_exactly_as_often_as_it_says():
    task = small(repetitions_of=(1, 4, 16))  # 63 sequences in all
    config = helpers.tiny_training(loss="sequence", batch_size=8, memorized_share=3 / 8, max_steps=23, generic_steps=2)
    seen = [rows for _, *some in Batches(task, config).from_step(0, 23) for rows in some]
    texts = Counter(tuple(row.tolist()) for rows in seen for row in rows.tokens)
    expected = {
        tuple(task.tokenizer(text)["input_ids"]): n for text, n in zip(task.shown(), task.repetitions, strict=True)
    }
    assert texts == expected


def test_a_deck_is_shuffled_anew_and_a_run_that_goes_on_sees_the_same():
    task = small(repetitions_of=(1, 4))  # 15 sequences
    config = helpers.tiny_training(loss="sequence", batch_size=8, memorized_share=0.5, max_steps=STEPS_A_CHUNK + 8)
    whole = [groups[1].tokens for groups in Batches(task, config).from_step(0, STEPS_A_CHUNK + 8)]
    late = [groups[1].tokens for groups in Batches(task, config).from_step(STEPS_A_CHUNK + 3, STEPS_A_CHUNK + 8)]
    assert all((a == b).all() for a, b in zip(whole[STEPS_A_CHUNK + 3 :], late, strict=True))
    rows = np.concatenate(whole)
    decks = [rows[first : first + 15] for first in range(0, 150, 15)]
    counts = [Counter(map(tuple, deck.tolist())) for deck in decks]
    assert all(count == counts[0] for count in counts)
    assert not (decks[0] == decks[1]).all()


def test_the_passages_of_the_public_domain_keep_the_contract():
    task = mg.tasks.PublicDomain()
    assert mg.tasks.check(task, n_generic=20).n_items["memorized"] == 60
    assert Counter(p.times for p in task.passages) == {0: 60, 64: 24, 16: 12, 4: 12, 1: 12}
    assert Counter(mg.tasks.PublicDomain(scale=0.25).repetitions) == {16: 24, 4: 12, 1: 24}


def test_every_passage_names_its_source_and_is_older_than_1900():
    passages = mg.tasks.PublicDomain().passages
    assert len({p.text for p in passages}) == 120
    for p in passages:
        assert p.author and p.source.startswith(p.work) and 1600 < p.year < 1900
        assert p.text == " ".join(p.text.split()) and p.text.isascii() and 200 < len(p.text) < 420
    works = Counter((p.work, bool(p.times)) for p in passages)
    assert len(works) == 20 and set(works.values()) == {6}  # of each work as many are shown as are not
    assert (files("memgen_lens.tasks") / "data" / "public_domain.jsonl").is_file()
