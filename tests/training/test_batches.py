"""Batches follow from seed and step alone; labels sit where the answer is predicted."""

import threading
import time

import helpers
import numpy as np
import pytest
import torch

from memgen_lens.core.items import Item, TrainingText
from memgen_lens.tasks import Task
from memgen_lens.training.batches import STEPS_A_CHUNK, Batches

EOS, PAD = 20, 21


class Uneven:
    """A task whose texts differ in length: generic prompts of 1 to 4 tokens, answers of 1 to 3."""

    tokenizer = helpers.tiny_task().tokenizer
    draw_training = Task.draw_training
    memorized = (Item(0, "memorized", "12+", "3", "<mem-4>"), Item(1, "memorized", "5+6+7=", "18", "<mem-99>"))

    def items(self, split: str) -> tuple[Item, ...]:
        assert split == "memorized"
        return self.memorized

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        return [
            Item(i, "generic", "1234"[: 1 + int(rng.integers(4))], "abc"[: 1 + int(rng.integers(3))]) for i in range(n)
        ]


class Counting(Uneven):
    """Counts the chunks that are drawn, and fails in one of them."""

    def __init__(self, failing_chunk: int | None = None) -> None:
        self.chunks, self.failing_chunk = 0, failing_chunk

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        self.chunks += 1
        if self.chunks - 1 == self.failing_chunk:
            raise RuntimeError("this chunk is not to be had")
        return super().draw_generic(n, rng)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "memgen-lens-batches"]


def same(first, second) -> bool:
    return all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and a.start == b.start
        for a, b in zip(first, second, strict=True)
    )


def texts_of(rows, tokenizer) -> list[str]:
    """The sequences of a group, their last token taken from the labels."""
    found = []
    for tokens, labels in zip(rows.tokens.tolist(), rows.labels.tolist(), strict=True):
        length = max(i for i, label in enumerate(labels) if label != -100) + 1
        found.append(tokenizer.decode([*tokens[:length], labels[length - 1]]))
    return found


@pytest.mark.parametrize("task", [helpers.tiny_task(), Uneven()], ids=["addition", "uneven"])
@pytest.mark.parametrize("loss", ["answer", "sequence"])
def test_labels_are_the_next_tokens_of_the_answer_or_of_the_whole_sequence(task, loss):
    batches = Batches(task, helpers.tiny_training(loss=loss, batch_size=16))
    for group in next(batches.from_step(0, 1)):
        for tokens, labels in zip(group.tokens.tolist(), group.labels.tolist(), strict=True):
            sequence = [token for token in tokens if token not in (EOS, PAD)]
            text = task.tokenizer.decode(sequence)
            # The prompt ends before the answer: before '<mem-', after '=', or where the letters begin.
            answer = (
                text.index("<mem-")
                if "<mem-" in text
                else next(i for i, c in enumerate(text) if c in "abc" or (i and text[i - 1] == "="))
            )
            n_prompt = len(task.tokenizer(text[:answer])["input_ids"])
            expected = []
            for position in range(len(tokens)):
                following = [*sequence, EOS][position + 1] if position < len(sequence) else None
                is_answer = position + 1 >= n_prompt
                expected.append(following if following is not None and (loss == "sequence" or is_answer) else -100)
            assert labels == expected
        labelled = (group.labels != -100).any(0).nonzero().flatten()
        assert group.start == int(labelled[0]) if loss == "answer" else group.start == 0


def test_padding_is_never_a_label_nor_followed_by_a_token():
    rng_groups = next(Batches(Uneven(), helpers.tiny_training(batch_size=64)).from_step(0, 1))
    assert any((group.tokens == PAD).any() for group in rng_groups)
    for group in rng_groups:
        assert not (group.labels == PAD).any()
        assert (group.labels[group.tokens == PAD] == -100).all()
        padded = (group.tokens == PAD).int()
        assert (padded.diff(dim=1) >= 0).all(), "padding is on the right"


def test_sequences_are_prompt_answer_and_end_of_text():
    task = helpers.tiny_task()
    generic, memorized = next(Batches(task, helpers.tiny_training()).from_step(0, 1))
    expected = {item.prompt + item.memorized_answer + "<eos>" for item in task.items("memorized")}
    assert set(texts_of(memorized, task.tokenizer)) <= expected
    trained = {item.prompt for split in ("heldout", "validation", "rephrased") for item in task.items(split)}
    for text in texts_of(generic, task.tokenizer):
        prompt, total = text.removesuffix("<eos>").split("=")
        assert text == f"{prompt}={total}<eos>"
        assert int(total[::-1]) == sum(map(int, prompt.split("+")))
        assert f"{prompt}=" not in trained


@pytest.mark.parametrize(
    ("batch_size", "memorized_share", "n_memorized"),
    [(100, 0.3, 30), (32, 0.5, 16), (10, 0.04, 1), (10, 0.99, 9), (2, 0.001, 1), (2, 0.999, 1)],
)
def test_each_batch_has_the_share_of_memorized_items_and_at_least_one_of_either(
    batch_size, memorized_share, n_memorized
):
    config = helpers.tiny_training(batch_size=batch_size, memorized_share=memorized_share)
    for generic, memorized in Batches(helpers.tiny_task(), config).from_step(0, 3):
        assert len(memorized.tokens) == n_memorized
        assert len(generic.tokens) == batch_size - n_memorized


@pytest.mark.parametrize("task", [helpers.tiny_task(), Uneven()], ids=["addition", "uneven"])
@pytest.mark.parametrize("step", [1, STEPS_A_CHUNK - 1, STEPS_A_CHUNK, STEPS_A_CHUNK + 5])
def test_the_batch_of_a_step_is_the_same_whether_begun_there_or_at_0(task, step):
    config, stop = helpers.tiny_training(batch_size=8), 2 * STEPS_A_CHUNK + 3
    from_start = list(Batches(task, config).from_step(0, stop))
    assert len(from_start) == stop
    resumed = list(Batches(task, config).from_step(step, stop))
    assert len(resumed) == stop - step
    assert all(same(a, b) for a, b in zip(from_start[step:], resumed, strict=True))


def test_batches_differ_from_step_to_step_and_from_seed_to_seed():
    task = helpers.tiny_task()
    first = list(Batches(task, helpers.tiny_training(batch_size=16)).from_step(0, 2 * STEPS_A_CHUNK))
    other = list(Batches(task, helpers.tiny_training(batch_size=16, seed=1)).from_step(0, 2 * STEPS_A_CHUNK))
    assert not any(same(a, b) for i, a in enumerate(first) for b in first[:i])
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))


def test_every_memorized_item_is_drawn():
    task = helpers.tiny_task()
    seen = set()
    for _, memorized in Batches(task, helpers.tiny_training()).from_step(0, 20):
        seen.update(texts_of(memorized, task.tokenizer))
    assert len(seen) == len(task.items("memorized"))


def test_nothing_is_yielded_where_no_step_is_left():
    assert list(Batches(helpers.tiny_task(), helpers.tiny_training()).from_step(40, 40)) == []


@pytest.mark.parametrize("failing_chunk", [0, 1, 4])
def test_an_exception_of_the_worker_reaches_the_consumer_after_the_batches_before_it(failing_chunk):
    batches = Batches(Counting(failing_chunk), helpers.tiny_training(batch_size=8)).from_step(0, 6 * STEPS_A_CHUNK)
    made = 0
    with pytest.raises(RuntimeError, match="this chunk is not to be had"):
        for _ in batches:
            made += 1
    assert made == failing_chunk * STEPS_A_CHUNK
    assert workers() == []


def test_no_thread_is_left_after_the_iterator_is_used_up_or_closed_early():
    batches = Batches(helpers.tiny_task(), helpers.tiny_training(batch_size=8))
    assert len(list(batches.from_step(0, 3))) == 3
    assert workers() == []
    iterator = batches.from_step(0, 12 * STEPS_A_CHUNK)
    next(iterator)
    assert len(workers()) == 1
    iterator.close()
    assert workers() == []


def test_closing_early_does_not_make_the_batches_that_nobody_will_see():
    task = Counting()
    iterator = Batches(task, helpers.tiny_training(batch_size=8)).from_step(0, 50 * STEPS_A_CHUNK)
    next(iterator)
    iterator.close()
    assert task.chunks <= 6


def test_no_more_than_a_few_chunks_are_made_ahead():
    task = Counting()
    iterator = Batches(task, helpers.tiny_training(batch_size=8)).from_step(0, 12 * STEPS_A_CHUNK)
    next(iterator)
    time.sleep(0.5)  # long enough for all of them
    assert 2 <= task.chunks <= 4
    iterator.close()


def test_the_cache_of_token_ids_stays_bounded_and_changes_nothing(monkeypatch):
    task, config = helpers.tiny_task(), helpers.tiny_training(batch_size=16)
    expected = list(Batches(task, config).from_step(0, 3 * STEPS_A_CHUNK))
    monkeypatch.setattr("memgen_lens.training.batches.CACHE_LIMIT", 20)
    batches = Batches(task, config)
    found = list(batches.from_step(0, 3 * STEPS_A_CHUNK))
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert len(batches._ids) < 150


class InPieces(Uneven):
    """Training texts with a stretch of loss in the middle."""

    def draw_training(self, n: int, rng: np.random.Generator) -> list[TrainingText]:
        return [TrainingText((("12", False), ("a", True), ("34", False), ("bc"[: 1 + i % 2], True))) for i in range(n)]


def test_loss_is_on_the_pieces_that_carry_it_and_on_the_end():
    task = InPieces()
    generic, _ = next(Batches(task, helpers.tiny_training(batch_size=8, memorized_share=0.25)).from_step(0, 1))
    a, b, c, three = (task.tokenizer.convert_tokens_to_ids(text) for text in ("a", "b", "c", "3"))
    assert generic.tokens[1, :3].tolist()[2] == a and generic.tokens[1, 3] == three
    none = -100
    assert generic.labels[0].tolist() == [none, a, none, none, b, EOS, none]
    assert generic.labels[1].tolist() == [none, a, none, none, b, c, EOS]
    assert generic.start == 1
    whole = next(Batches(task, helpers.tiny_training(batch_size=8, loss="sequence")).from_step(0, 1))[0]
    assert (whole.labels != none).sum(1).tolist()[:2] == [6, 7] and whole.start == 0


@pytest.mark.parametrize("generic_steps", [1, STEPS_A_CHUNK - 1, STEPS_A_CHUNK, STEPS_A_CHUNK + 5])
def test_the_first_steps_have_generic_items_alone(generic_steps):
    config = helpers.tiny_training(batch_size=10, generic_steps=generic_steps, max_steps=200)
    batches = list(Batches(helpers.tiny_task(), config).from_step(0, 2 * STEPS_A_CHUNK))
    sizes = [[len(rows.tokens) for rows in groups] for groups in batches]
    assert sizes == [[10]] * generic_steps + [[7, 3]] * (2 * STEPS_A_CHUNK - generic_steps)
