"""Greedy completion in batches gives each prompt what it would get alone; bad input is refused."""

import copy
import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import helpers
import planted
import pytest
import spelled
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import memgen_lens as mg
from memgen_lens.behavior import complete, observe, observe_items
from memgen_lens.core.errors import ModelError, TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.types import LensModel
from memgen_lens.models import build_model
from memgen_lens.models.step import greedy_tokens
from memgen_lens.models.tokens import by_length, decode, tokenized
from memgen_lens.tasks import Task
from memgen_lens.tasks.tokenizer import build_tokenizer, encoded

TASK = helpers.tiny_task()
MIXED = ["12+34=", "1", "7", "12+", "99+01=", "0=1+2", "1", "12+34=0", "5+", "<mem-7f>", "12+34=<mem-"]


@pytest.fixture(autouse=True)
def _one_thread():
    with helpers.one_thread():
        yield


def untrained(n_ctx: int = 24, **shape) -> Any:
    """A model of random weights, whose completions are arbitrary but differ from prompt to prompt."""
    config = helpers.tiny_training().model.but(n_layers=2, **shape)
    model = build_model(config, TASK.tokenizer, n_ctx=n_ctx, seed=0).eval()
    with torch.no_grad():
        helpers.weights(model).unembed.W_U.mul_(20)
    return model


def endless(**settings) -> Any:
    """The same, but never ends a text by itself."""
    model = untrained(**settings)
    with torch.no_grad():
        helpers.weights(model).unembed.b_U[model.tokenizer.eos_token_id] = -1e6
    return model


def alone(model, prompt: str, max_new_tokens: int) -> str:
    """A completion written out: one prompt, the whole sequence anew for each token."""
    tokens = model.to_tokens(prompt)
    new: list[int] = []
    for _ in range(max_new_tokens):
        following = int(model(tokens)[0, -1].argmax())
        if following == model.tokenizer.eos_token_id:
            break
        new.append(following)
        tokens = torch.cat([tokens, torch.tensor([[following]])], dim=1)
    return model.tokenizer.decode(new)


class Scripted:
    """What the protocol asks for and no more: continues a prompt that begins with digit d by d times 'a', then ends."""

    tokenizer = TASK.tokenizer
    cfg = SimpleNamespace(n_layers=1, n_ctx=10, d_vocab=23, n_heads=1, d_head=4)
    hook_dict: dict = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[torch.Size] = []

    def hooks(self, fwd_hooks=()):
        return nullcontext()

    def to_tokens(self, texts, **options):
        return self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]

    def generate(self, *arguments, **options):
        raise AssertionError("greedy completion goes through the forward")

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, tokens, attention_mask=None):
        self.calls.append(tokens.shape)
        assert attention_mask is None or attention_mask.all()
        made = (tokens == 10).sum(1)
        following = torch.where(made < tokens[:, 0], 10, 20)
        return torch.nn.functional.one_hot(following, 23).float()[:, None].expand(-1, tokens.shape[1], -1)


@pytest.mark.parametrize("shape", [{}, {"positional_embedding_type": "rotary"}], ids=["standard", "rotary"])
@pytest.mark.parametrize("batch_size", [1, 2, 2048])
def test_prompts_of_different_lengths_get_what_each_would_get_alone(shape, batch_size):
    model = untrained(**shape)
    outputs = complete(model, MIXED, max_new_tokens=8, batch_size=batch_size)
    assert outputs == [alone(model, prompt, 8) for prompt in MIXED]
    assert len(set(outputs)) > 5


def test_a_trained_models_completions_are_those_it_would_give_alone_and_by_its_own_generate(trained):
    task = helpers.SMALL_TASK
    prompts = [item.prompt for split in ("memorized", "rephrased", "heldout") for item in task.items(split)[:8]]
    outputs = complete(trained.model, [*prompts, "12+"], max_new_tokens=task.max_answer_tokens)
    assert len({len(output) for output in outputs}) > 1
    for prompt, output in zip([*prompts, "12+"], outputs, strict=True):
        assert output == alone(trained.model, prompt, task.max_answer_tokens)
    whole = trained.model.generate(
        trained.model.to_tokens(prompts), max_new_tokens=task.max_answer_tokens, do_sample=False, verbose=False
    )
    assert outputs[:-1] == decode(trained.model, whole[:, task.max_prompt_tokens :])


@pytest.mark.parametrize("shape", [{}, {"positional_embedding_type": "rotary"}], ids=["standard", "rotary"])
def test_the_tokens_are_the_same_with_and_without_the_cache_of_keys_and_values(shape):
    model = untrained(**shape)
    tokens = model.to_tokens(["12+34=", "<mem-7f>", "000000"])
    with_cache = greedy_tokens(model, tokens, max_new_tokens=12)
    assert torch.equal(with_cache, greedy_tokens(model, tokens, max_new_tokens=12, use_cache=False))


def test_a_row_that_has_ended_stays_ended_while_others_go_on():
    model = Scripted()
    assert isinstance(model, LensModel)
    tokens = model.to_tokens(["3=", "0=", "1="])
    new = greedy_tokens(model, tokens, max_new_tokens=7)
    assert new.tolist() == [[10, 10, 10, 20], [20] * 4, [10, 20, 20, 20]]
    assert decode(model, new) == ["aaa", "", "a"]


def test_a_model_that_only_meets_the_protocol_runs_the_whole_sequence_every_time():
    model = Scripted()
    assert complete(model, ["2=", "1=="], max_new_tokens=7) == ["aa", "a"]
    assert model.calls == [(1, 2), (1, 3), (1, 4), (1, 3), (1, 4)]


@pytest.mark.parametrize(("max_new_tokens", "output"), [(1, "a"), (3, "aaa"), (4, "aaaa"), (5, "aaaa"), (6, "aaaa")])
def test_no_more_tokens_are_made_than_asked_for_the_end_of_text_counted(max_new_tokens, output):
    model = Scripted()
    assert complete(model, ["4="], max_new_tokens=max_new_tokens) == [output]
    assert len(model.calls) == min(max_new_tokens, 5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_an_end_of_text_token_in_a_prompt_is_not_taken_for_padding(padding_side, use_cache):
    # Left to itself, TransformerLens masks the first tokens that equal the padding token, which may be the same.
    model = endless()
    model.tokenizer.pad_token = model.tokenizer.eos_token
    tokens = torch.tensor([[20, 20, 1, 16, 2], [3, 20, 4, 17, 20]])
    expected = greedy_tokens(endless(), tokens, max_new_tokens=6, use_cache=False)
    model.tokenizer.padding_side = padding_side
    assert torch.equal(greedy_tokens(model, tokens, max_new_tokens=6, use_cache=use_cache), expected)


def test_a_begin_of_text_token_that_the_model_adds_is_counted(tmp_path):
    tokenizer = build_tokenizer([*TASK.vocabulary, "<bos>"])
    tokenizer.bos_token = "<bos>"
    tokenizer.save_pretrained(str(tmp_path))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))  # TransformerLens loads it again by its path
    settings = {
        "n_layers": 2,
        "d_model": 32,
        "n_ctx": 16,
        "d_head": 16,
        "n_heads": 2,
        "d_mlp": 32,
        "act_fn": "relu",
        "d_vocab": len(tokenizer),
        "seed": 1,
        "device": "cpu",
    }
    model = helpers.model_of(settings, tokenizer)
    with torch.no_grad():
        helpers.weights(model).unembed.W_U.mul_(20)
    assert model.to_tokens("12").shape == (1, 3)
    prompts = ["12+34=", "1", "12+"]
    assert complete(model, prompts, max_new_tokens=5) == [alone(model, prompt, 5) for prompt in prompts]
    assert [tokens.shape[1] for _, tokens in by_length(model, prompts, batch_size=8)] == [2, 4, 7]


def test_batches_hold_every_prompt_once_and_only_prompts_of_one_length():
    model = untrained()
    batches = by_length(model, MIXED, batch_size=2)
    assert sorted(i for index, _ in batches for i in index) == list(range(len(MIXED)))
    for index, tokens in batches:
        assert len(index) == len(tokens) <= 2
        assert model.to_string(tokens) == [MIXED[i] for i in index]


def test_no_prompts_give_no_completions():
    assert complete(untrained(), [], max_new_tokens=3) == []


def test_a_hook_that_the_user_sets_fires_and_counts():
    model, seen = endless(), []

    def note(activation, hook):
        seen.append(tuple(activation.shape))

    def erase(activation, hook):
        return torch.zeros_like(activation)

    plain = complete(model, ["12+34=", "34+12="], max_new_tokens=3)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", note)]):
        assert complete(model, ["12+34=", "34+12="], max_new_tokens=3) == plain
    assert seen[0] == (2, 6, 32)
    assert len(seen) == 3
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", erase)]):
        erased = complete(model, ["12+34=", "34+12="], max_new_tokens=3)
    assert erased[0] == erased[1]
    assert complete(model, ["12+34=", "34+12="], max_new_tokens=3) == plain


def test_a_hook_that_fails_leaves_the_model_as_it_was():
    model = untrained()
    plain = complete(model, ["12+34="], max_new_tokens=3)

    def fail(activation, hook):
        raise RuntimeError("the user's hook failed")

    with pytest.raises(RuntimeError, match="the user's hook failed"), model.hooks(fwd_hooks=[("hook_embed", fail)]):
        complete(model, ["12+34="], max_new_tokens=3)
    assert all(not point.fwd_hooks for point in model.hook_dict.values())
    assert complete(model, ["12+34="], max_new_tokens=3) == plain


def test_completing_leaves_the_models_mode_gradients_and_random_state_alone():
    model = untrained().train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    complete(model, ["12+34="], max_new_tokens=3)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model(model.to_tokens("1+2=")).sum().backward()


@pytest.mark.parametrize(
    ("prompt", "lacking"),
    [
        ("12 34=", "' '"),
        ("12+34=\n", r"'\\n'"),
        ("x", "'x'"),
        ("zxz1", "'z', 'x'"),
        ("é12", "'é'"),
        ("12+34=<mem-7g>", "'g'"),
    ],
)
def test_a_character_that_the_tokenizer_lacks_is_named_and_no_other(prompt, lacking):
    message = (
        f"expected non-empty prompts over the tokenizer's vocabulary; received .*, in which {lacking} has no token"
    )
    with pytest.raises(ModelError, match=message):
        complete(untrained(), ["12+34=", prompt], max_new_tokens=3)


def test_an_empty_prompt_is_refused():
    with pytest.raises(
        ModelError, match=r"expected non-empty prompts over the tokenizer's vocabulary; received ''. Use"
    ):
        complete(untrained(), ["12", ""], max_new_tokens=3)


def test_a_prompt_beyond_the_context_is_refused_with_its_length():
    model = untrained(n_ctx=8)
    message = "expected prompts of at most 8 tokens, the model's context; received 9 tokens: '123456789'. Shorten"
    with pytest.raises(ModelError, match=message):
        complete(model, ["1", "123456789"], max_new_tokens=1)
    assert len(complete(model, ["12345678"], max_new_tokens=1)) == 1


@pytest.mark.parametrize("shape", [{}, {"positional_embedding_type": "rotary"}], ids=["standard", "rotary"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_completion_that_would_leave_the_context_is_refused(shape, use_cache):
    model = endless(n_ctx=8, **shape)
    tokens = model.to_tokens("123456")
    assert greedy_tokens(model, tokens, max_new_tokens=3, use_cache=use_cache).shape == (1, 3)
    with pytest.raises(ModelError, match="context"):
        greedy_tokens(model, tokens, max_new_tokens=4, use_cache=use_cache)


def test_a_model_without_a_tokenizer_is_refused_with_how_to_give_it_one():
    model = untrained()
    model.tokenizer = None
    message = r"expected a model whose tokenizer has an end-of-text token; received no tokenizer. Pass one .*tokenizer="
    with pytest.raises(ModelError, match=message):
        complete(model, ["12"], max_new_tokens=1)


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    model = untrained()
    model.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="received a tokenizer without eos_token"):
        complete(model, ["12"], max_new_tokens=1)


@pytest.mark.parametrize("move", [lambda m: torch.nn.Module.to(m, "meta"), lambda m: m.to_empty(device="meta")])
def test_weights_on_another_device_than_the_tokens_are_refused_with_where_each_is(move):
    model = untrained()
    move(model)
    message = r"expected model and tokens on one device; received weights on meta, tokens on cpu. .*model.to\(device\)"
    with pytest.raises(ModelError, match=message):
        complete(model, ["12"], max_new_tokens=1)
    with pytest.raises(ModelError, match=message):
        observe(model, TASK)


@pytest.mark.parametrize("split", ["memorized", "rephrased", "heldout", "validation"])
def test_observe_gives_one_classified_outcome_a_prompt_in_the_tasks_order(trained, split):
    task = helpers.SMALL_TASK
    outcomes = observe(trained.model, task, split=split, batch_size=13)
    assert [outcome.item for outcome in outcomes] == list(task.items(split))
    for outcome in outcomes:
        output, item = outcome.output, outcome.item
        expected = mg.Behavior.OTHER
        if output == item.rule_answer:
            expected = mg.Behavior.GENERALIZATION
        elif output == item.memorized_answer:
            expected = mg.Behavior.MEMORIZATION
        assert outcome.behavior is expected
        assert outcome.memorized_form == (output.startswith("<mem-") and output.endswith(">") and len(output) == 8)


def test_a_trained_model_recalls_and_computes_and_so_the_outcomes_say(trained):
    task = helpers.SMALL_TASK
    recalled = [outcome.behavior for outcome in observe(trained.model, task)]
    computed = [outcome.behavior for outcome in observe(trained.model, task, split="heldout")]
    assert recalled.count(mg.Behavior.MEMORIZATION) >= 0.95 * len(recalled)
    assert computed.count(mg.Behavior.GENERALIZATION) >= 0.8 * len(computed)
    assert computed.count(mg.Behavior.MEMORIZATION) == 0


def test_observe_refuses_an_unknown_split(monkeypatch):
    # The tests' run-time type checks would answer first: call the functions below them, as users do.
    monkeypatch.setattr(Task, "items", inspect.unwrap(Task.items))
    with pytest.raises(
        TaskError, match=r"Addition.items: expected one of memorized, .* received 'memorised'. Did you mean"
    ):
        inspect.unwrap(observe)(untrained(), TASK, split="memorised")


def test_items_of_any_origin_can_be_observed():
    model = Scripted()
    items = [Item(0, "user", "2=", "aa"), Item(1, "user", "1=", "b", "a"), Item(2, "user", "0=", "a")]
    outcomes = observe_items(model, helpers.tiny_task(), items)
    assert [outcome.output for outcome in outcomes] == ["aa", "a", ""]
    assert [str(outcome.behavior) for outcome in outcomes] == ["generalization", "memorization", "other"]


def test_a_token_that_a_tokenizer_adds_behind_the_prompts_is_kept():
    model, prompts = planted.build_model(), ["abM=", "G="]
    eos = model.tokenizer.eos_token_id
    behind = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", eos)])
    model.tokenizer.backend_tokenizer.post_processor = behind
    tokens, lengths = tokenized(model, prompts)
    assert lengths.tolist() == [5, 3]
    for prompt, row, length in zip(prompts, tokens, lengths, strict=True):
        assert row[:length].tolist() == model.to_tokens(prompt)[0].tolist()
        assert row[length - 1] == eos


def test_outputs_are_judged_alike_under_the_tasks_own_tokenizer_and_a_models_of_more_tokens():
    task = spelled.Spelled()
    own, foreign = spelled.build_model(task.tokenizer), spelled.build_model(spelled.LETTERS)
    assert (task.answer_tokens(own.tokenizer), task.answer_tokens(foreign.tokenizer)) == (2, 5)
    for split, shown in (("memorized", {"memorization"}), ("rephrased", {"generalization", "other"})):
        outcomes = observe(own, task, split=split)
        assert observe(foreign, task, split=split) == outcomes
        assert {str(outcome.behavior) for outcome in outcomes} == shown


def test_a_task_that_knows_no_tokenizers_is_asked_for_the_tokens_that_it_declares():
    task, model = spelled.Spelled(), spelled.build_model(spelled.LETTERS)
    declared = spelled.Declared(task)
    assert {outcome.output for outcome in observe(model, declared)} == {spelled.MEMORY[:2]}
    declared.max_answer_tokens = 5
    assert observe(model, declared) == observe(model, task)


def test_the_length_of_answers_is_counted_once_a_tokenizer_and_anew_when_tokens_are_added(monkeypatch):
    from memgen_lens.tasks import tokenizer as counting

    task, tokenizer = spelled.Spelled(), copy.deepcopy(spelled.LETTERS)
    calls = []
    monkeypatch.setattr(counting, "encoded", lambda *asked: calls.append(asked) or encoded(*asked))
    assert [task.answer_tokens(tokenizer) for _ in range(3)] == [5, 5, 5]
    assert spelled.Spelled().answer_tokens(tokenizer) == 5
    assert len(calls) == 1
    tokenizer.add_tokens([spelled.RULE, spelled.MEMORY])
    assert task.answer_tokens(tokenizer) == 2
    assert len(calls) == 2
