"""Training batches of a task, tokenized ahead of the step in a background thread.

Every batch follows from ``(seed, step)`` alone, so a run that is cut and resumed sees the same ones. Does not know
the model.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from memgen_lens.core.config import LearningConfig
from memgen_lens.core.items import TrainingText
from memgen_lens.training.forward import Rows

STEPS_A_CHUNK = 32
CHUNKS_AHEAD = 2
CACHE_LIMIT = 200_000


class Batches:
    """Batches of generic and memorized items.

    Args:
        task: A task (`memgen_lens.tasks.Task`).
        config: Batch size, share of memorized items, first steps without them, loss and seed are read.
        tokenizer: Tokenizer of the model that learns; default: the task's own.
        before: Tokens that stand before each sequence, without loss.
    """

    def __init__(self, task: Any, config: LearningConfig, *, tokenizer: Any = None, before: Sequence[int] = ()) -> None:
        self.task, self.config = task, config
        self.tokenizer, self.before = tokenizer or task.tokenizer, list(before)
        self.n_memorized = max(1, min(config.batch_size - 1, round(config.batch_size * config.memorized_share)))
        self._ids: dict[str, list[int]] = {}
        repetitions = getattr(task, "repetitions", None)
        self._deck = None if repetitions is None else np.repeat(np.arange(len(repetitions)), repetitions)
        self._memorized = self.rows(
            [TrainingText(((item.prompt, False), (item.memorized_answer, True))) for item in task.items("memorized")]
        )

    def from_step(self, step: int, stop: int) -> Iterator[list[Rows]]:
        """Yield the batches of steps ``step`` to ``stop - 1``, made ahead of time.

        Yields:
            The groups of one batch: generic rows, then memorized rows.
        """
        made: queue.Queue[Any] = queue.Queue(maxsize=CHUNKS_AHEAD)
        closed = threading.Event()

        def make() -> None:
            try:
                for chunk in range(step // STEPS_A_CHUNK, -(-stop // STEPS_A_CHUNK)):
                    if closed.is_set():
                        return
                    _put(made, self._chunk(chunk), closed)
            except BaseException as error:  # handed to the consumer, which raises it
                _put(made, error, closed)

        worker = threading.Thread(target=make, name="memgen-lens-batches", daemon=True)
        worker.start()
        try:
            for chunk in range(step // STEPS_A_CHUNK, -(-stop // STEPS_A_CHUNK)):
                batches = made.get()
                if isinstance(batches, BaseException):
                    raise batches
                first = chunk * STEPS_A_CHUNK
                yield from batches[max(step - first, 0) : stop - first]
        finally:
            closed.set()
            worker.join()

    def _chunk(self, chunk: int) -> list[list[Rows]]:
        """All batches of one chunk of steps."""
        rng = np.random.default_rng([self.config.seed, chunk])
        first = chunk * STEPS_A_CHUNK
        n_memorized = [self.n_memorized if first + i >= self.config.generic_steps else 0 for i in range(STEPS_A_CHUNK)]
        ends = np.cumsum([self.config.batch_size - n for n in n_memorized])
        generic = self.rows(self.task.draw_training(int(ends[-1]), rng))
        picks = rng.integers(len(self._memorized.tokens), size=(STEPS_A_CHUNK, self.n_memorized))
        if self._deck is not None:
            picks = self._dealt(self._deck, first - self.config.generic_steps)
        return [
            [
                generic.take(slice(end - (self.config.batch_size - n), end)),
                *([self._memorized.take(torch.from_numpy(pick))] if n else []),
            ]
            for n, end, pick in zip(n_memorized, ends.tolist(), picks, strict=True)
        ]

    def _dealt(self, deck: np.ndarray, first: int) -> np.ndarray:
        """Which memorized items the steps of a chunk get of a deck ``[step, memorized]``.

        Args:
            deck: Items, each as often as it is trained on before the deck is shuffled anew.
            first: The chunk's first step, counted from the first with memorized items (those before get any).
        """
        place = np.arange(first * self.n_memorized, (first + STEPS_A_CHUNK) * self.n_memorized)
        times = place // len(deck)
        picks = np.empty(len(place), dtype=np.int64)
        for time in np.unique(times).tolist():
            shuffled = np.random.default_rng([self.config.seed, max(time, 0), len(deck)]).permutation(deck)
            picks[times == time] = shuffled[place[times == time] % len(deck)]
        return picks.reshape(STEPS_A_CHUNK, self.n_memorized)

    def rows(self, texts: list[TrainingText]) -> Rows:
        """Tokenize training texts and pad them on the right to one length."""
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        pad = eos if pad is None else pad
        if self.tokenizer is not self.task.tokenizer:
            # Generic texts, cut where the task finds it handy, would be of other tokens than prompts, and tell
            # themselves from memorized ones by that.
            texts = [TrainingText(text.spans) for text in texts]
        pieces = [piece for text in texts for piece in (*text.pieces, ("", text.pieces[-1][1]))]
        ids = self._encode([piece for piece, _ in pieces])
        ids = [found or [eos] for found in ids]  # the empty piece behind each text
        sizes = np.array([len(found) for found in ids])
        n_pieces = np.array([len(text.pieces) + 1 for text in texts])
        first_pieces = np.concatenate([[0], np.cumsum(n_pieces)[:-1]])
        if self.before:
            for first in first_pieces.tolist():
                ids[first] = self.before + ids[first]
            sizes[first_pieces] += len(self.before)
        whole = self.config.loss == "sequence"
        labelled = np.repeat([whole or loss for _, loss in pieces], sizes)
        lengths = np.add.reduceat(sizes, first_pieces)
        sequences = np.full((len(texts), int(lengths.max())), pad, dtype=np.int64)
        has_loss = np.zeros(sequences.shape, dtype=bool)
        filled = np.arange(sequences.shape[1]) < lengths[:, None]
        sequences[filled] = np.concatenate(ids)
        has_loss[filled] = labelled
        # The label at position t is token t + 1: the first answer token is predicted from the prompt's last one.
        labels = np.where(has_loss[:, 1:], sequences[:, 1:], -100)
        start = int((labels != -100).any(0).argmax())
        return Rows(torch.from_numpy(sequences[:, :-1]), torch.from_numpy(labels), start, torch.from_numpy(lengths))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids; texts seen before come from a bounded cache."""
        new = list(dict.fromkeys(text for text in texts if text not in self._ids))
        if new:
            if len(self._ids) > CACHE_LIMIT:
                self._ids.clear()
                new = list(dict.fromkeys(texts))
            self._ids.update(zip(new, self.tokenizer(new, add_special_tokens=False)["input_ids"], strict=True))
        return [self._ids[text] for text in texts]


def _put(made: queue.Queue[Any], value: Any, closed: threading.Event) -> None:
    """Put a value, giving up once the consumer has gone."""
    while not closed.is_set():
        try:
            made.put(value, timeout=0.1)
            return
        except queue.Full:
            continue
