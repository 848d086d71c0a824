"""What a large job would take, by arithmetic: a model too large for this machine, pairs by the million, many GPUs.

Every number is counted from the code's own bounds, assumed (`Machine`) or measured here (`Host`); none is measured at
that size. ``python -m benchmarks.paper`` prints it from scaling.json; `report` takes other shapes, jobs and machines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.assumed import Host, Job, Machine, Shape
from benchmarks.harness import RESULTS_OF_SCALING
from memgen_lens.analysis.recording.reading import TOKENS_AT_ONCE
from memgen_lens.core.files import read_json
from memgen_lens.models.step import CACHE_AT_ONCE

GPUS = (1, 8, 64)
Shared = Literal["pairs", "batch"]


@dataclass(frozen=True)
class Passes:
    """Forward passes of one kind.

    Attributes:
        n: How many.
        tokens: Tokens of each that run through the blocks.
        logits: Positions of each whose logits are made.
        context: Positions that a token attends to, on average.
        backward: Whether they are gone back through, by activations alone: as many operations again.
    """

    n: float
    tokens: float
    logits: float
    context: float
    backward: bool = False

    def flops(self, shape: Shape) -> float:
        """Operations of all of them: two a weight and token, four a position attended to, head and coordinate."""
        attention = 4 * shape.layers * shape.heads * shape.d_head * self.context
        one = self.tokens * (2 * shape.block_weights + attention) + self.logits * 2 * shape.vocabulary_weights
        return self.n * one * (1 + self.backward)

    def shared(self, n_gpus: int, shared: Shared) -> "Passes":
        """What one of several processes runs of them."""
        if shared == "pairs":
            return replace(self, n=self.n / n_gpus)
        return replace(self, tokens=self.tokens / n_gpus, logits=self.logits / n_gpus)

    def bounds(self, shape: Shape, machine: Machine, host: Host) -> dict[str, float]:
        """Seconds of all of them, were there one bound alone; the largest holds."""
        again = 1 + self.backward
        read = shape.weight_bytes * (shape.block_weights + shape.vocabulary_weights)
        return {
            "products": self.flops(shape) / (machine.flops * machine.flops_share),
            "reading weights": self.n * again * read / (machine.bandwidth * machine.bandwidth_share),
            "calls": self.n * again * shape.layers * host.layer_pass / machine.core,
        }


@dataclass(frozen=True)
class Cost:
    """What one call takes.

    Attributes:
        name: The call.
        passes: Its forward passes.
        host: Seconds beside them on the host, by what for.
        shared: What several processes share today: the ``"pairs"``, each with passes of its own; the ``"batch"`` of
            each pass; or nothing.
        sent: Bytes that each of them sends.
    """

    name: str
    passes: Sequence[Passes]
    host: Mapping[str, float]
    shared: Shared | None = None
    sent: float = 0.0

    def gpu_seconds(self, shape: Shape, machine: Machine, host: Host) -> float:
        """Seconds of its passes, each kind at its own bound."""
        return sum(max(passes.bounds(shape, machine, host).values()) for passes in self.passes)

    def of_one(self, n_gpus: int, shared: Shared) -> "Cost":
        """What each of several processes does."""
        passes = [passes.shared(n_gpus, shared) for passes in self.passes]
        return replace(self, passes=passes, host={name: each / n_gpus for name, each in self.host.items()})

    def bound(self, shape: Shape, machine: Machine, host: Host) -> str:
        """What holds back the kind of passes that takes longest."""
        longest = max((passes.bounds(shape, machine, host) for passes in self.passes), key=lambda b: max(b.values()))
        return max(longest, key=lambda name: longest[name])

    def seconds(
        self, n_gpus: int, shape: Shape, machine: Machine, host: Host, *, shared: Shared | None = None
    ) -> float:
        """Seconds on some GPUs, a process each: passes and host take turns, and what is not shared runs on one.

        Args:
            n_gpus: GPUs.
            shape: The model.
            machine: A GPU and its share of the host.
            host: A core.
            shared: As if this were shared.
        """
        shared = shared or self.shared
        alone = shared is None or n_gpus == 1
        mine = self if shared is None else self.of_one(n_gpus, shared)
        sending = 0.0 if alone else self.sent / machine.link
        return mine.gpu_seconds(shape, machine, host) + sum(mine.host.values()) + sending


def costs(shape: Shape, job: Job, machine: Machine, host: Host, *, cache: int = CACHE_AT_ONCE) -> list[Cost]:
    """The calls, one after another.

    Args:
        shape: The model.
        job: What is asked for.
        machine: A GPU and its share of the host, assumed.
        host: A core, measured.
        cache: Numbers that keys and values of one batch may hold.
    """
    prompts, neurons = 2 * job.pairs, shape.all_neurons
    length = job.prompt + job.answer
    rows = max(1, TOKENS_AT_ONCE // job.prompt)
    prompt = Passes(prompts / rows, rows * job.prompt, rows, job.prompt / 2)
    speed = machine.core
    tokenized = {"tokens": prompts * job.prompt * host.token / speed}
    merged = {"moments": prompts * neurons * host.value / speed / machine.cores}
    flips = 2 * (1 + job.permutations) * job.pairs * neurons
    tested = {"sign flips": flips / (host.flip_flops * speed * machine.cores)}
    stored = 8 * job.pairs * neurons / machine.disk

    # Gradients: both answers of a few prompts behind what is kept of these; a forward pass for activations, one to see
    # how answers are spelled, one to keep keys and values.
    few = max(1, shape.rows_at_once(length, job.answer, cache) // 2)
    kept = Passes(prompts / few, few * (job.prompt - 1), few, job.prompt / 2)
    answers = Passes(prompts / few, 2 * few * job.answer, 2 * few * job.answer, job.prompt, backward=True)
    # One neuron at a time, both answers; an unchanged copy rides with as many changed ones as there is room for.
    copies = max(1, max(1, shape.rows_at_once(length, job.answer, cache) // (2 * few)) - 1)
    n_runs = job.pairs / few * neurons / copies
    one_row = 2 * few * (1 + copies) * job.answer
    each = Passes(n_runs, one_row, one_row, job.prompt)

    together = shape.rows_at_once(length, 1, cache)
    begun = Passes(prompts / together, together * (job.prompt - 1), together, job.prompt / 2)
    unsteered = Passes(prompts / together * job.answer, together, together, job.prompt)

    def steered(n: int) -> list[Passes]:
        return [begun, unsteered, begun, Passes(prompts / together * n * job.answer, together, together, job.prompt)]

    steps = prompts / job.batch
    learned = Passes(steps, job.batch * length, job.batch * job.answer, length / 2, backward=True)
    # Around a ring each process sends everything about twice; gradients at each step, in float32.
    sums, gradients = 2 * 8 * (1 + job.permutations) * neurons, 2 * 4 * shape.adapter_weights(job.rank) * steps
    twice = {"moments": 2 * merged["moments"]}  # of activations, and of effects
    thrice = {"tokens": 3 * tokenized["tokens"]}
    return [
        Cost('record(["post"], out=)', [prompt], tokenized | {"disk": stored}),
        Cost("attribute on what was recorded, tested", [], {"disk": stored} | merged | tested),
        Cost("attribute_streaming, tested", [prompt], tokenized | merged | tested, "pairs", sums),
        Cost("attribution_patching, tested", [prompt, prompt, kept, answers], thrice | twice | tested),
        Cost("ablation of every neuron", [prompt, prompt, kept, each], thrice | merged),
        Cost(f"evaluate_steering, {job.steerings} steerings", steered(job.steerings), thrice),
        Cost(f"sweep_steering, {job.settings} settings", steered(job.settings), thrice),
        Cost("LoRA, each prompt once", [learned], {}, "batch", gradients),
    ]


def sizes(shape: Shape, job: Job, machine: Machine, host: Host) -> dict[str, float]:
    """Bytes, by what for."""
    neurons = shape.all_neurons
    return {
        "weights, on each GPU": shape.weight_bytes * (shape.block_weights + shape.vocabulary_weights),
        "recorded activations of one site, both sides, float32": 8.0 * job.pairs * neurons,
        "attribute_streaming's moments": 8.0 * 5 * neurons,
        f"its sums of {job.permutations:,} permutations (also what processes send, once)": 8.0
        * (1 + job.permutations)
        * neurons,
        f"a bootstrap of {job.resamples:,} resamples": 24.0 * job.resamples * neurons,
        "pairs, in each process": host.pair_bytes * job.pairs,
        "token ids of recorded prompts": 8.0 * 2 * job.pairs * job.prompt,
    }


def report(
    found: Mapping[str, Any], shape: Shape | None = None, job: Job | None = None, machine: Machine | None = None
) -> str:
    """Markdown: hours on some GPUs, with the room for keys and values as it is and with 64 times as much; bytes."""
    shape, job, machine = shape or Shape(), job or Job(), machine or Machine()
    host = Host.of(found)
    where = (shape, machine, host)
    parts = [
        f"On paper: {job.pairs:,} pairs of {job.prompt}-token prompts, {shape.layers} layers, width {shape.width}, "
        f"{shape.neurons} neurons a layer. One core here: {1e3 * host.layer_pass:.2f} ms a layer and pass, "
        f"{1e9 * host.value:.2f} ns a value merged, {host.flip_flops / 1e9:.1f} GFLOP/s of sign flips, "
        f"{1 / host.token:,.0f} tokens/s, {host.pair_bytes:,.0f} bytes a pair."
    ]
    for cache in (CACHE_AT_ONCE, 64 * CACHE_AT_ONCE):
        room = f"hours; at most {cache * 4 / 2**30:.2g} GiB of keys and values"
        heads = [room, "FLOP", "passes", "GPU", "held back by", "host"]
        heads += [f"{n} GPU{'s' if n > 1 else ''}" for n in GPUS] + [f"{GPUS[-1]} if it were shared"]
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
        for cost in costs(shape, job, machine, host, cache=cache):
            cells = [cost.name, "", "", "", "", _hours(sum(cost.host.values()))]
            if cost.passes:
                flops, n = (
                    sum(numbers) for numbers in ((p.flops(shape) for p in cost.passes), (p.n for p in cost.passes))
                )
                cells[1:5] = [f"{flops:.1e}", f"{n:.1e}", _hours(cost.gpu_seconds(*where)), cost.bound(*where)]
            cells += [_hours(cost.seconds(n, *where)) for n in GPUS]
            cells += ["(it is)" if cost.shared else _hours(cost.seconds(GPUS[-1], *where, shared="pairs"))]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    lines = ["| bytes of | GB |", "|---|---|"]
    lines += [f"| {name} | {_number(size / 1e9)} |" for name, size in sizes(shape, job, machine, host).items()]
    parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """The report from what was measured last."""
    print(report(read_json(RESULTS_OF_SCALING)))


def _hours(seconds: float) -> str:
    return _number(seconds / 3600)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


if __name__ == "__main__":
    main()
