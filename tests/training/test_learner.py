"""What a pretrained model learns from: loss, gradients, adapters and their places, against peft and torch alone."""

import bridges
import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors
from tuning import TASK, settings

from memgen_lens.fast import products
from memgen_lens.models.tokens import own_beginning
from memgen_lens.training.loop import seeded_random_state
from memgen_lens.training.pretrained import Pretrained, with_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own


def learner_of(kind: str = "llama", **changes) -> Pretrained:
    tokenizer = bridges.character_tokenizer()
    with seeded_random_state(0):
        return Pretrained(bridges.hugging_face(kind), tokenizer, TASK, settings(**changes), before=())


def told_apart(learner):
    """The learner with adapters that do something, and nothing that is drawn anew in each pass."""
    with torch.no_grad():  # peft's second factor starts at zero: gradients of the first would all be zero
        for name, parameter in learner.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    for part in learner.network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # GPT-2's own
    return learner


@pytest.mark.parametrize("loss", ["answer", "sequence"])
@pytest.mark.parametrize("kind", bridges.KINDS)
def test_loss_and_gradients_are_those_of_peft_and_transformers_alone(kind, loss):
    learner = told_apart(learner_of(kind, loss=loss, precision="float32", generic_steps=0))
    groups = next(learner.batches.from_step(4, 5))
    learner.loss(groups).backward()
    ours = [p.grad.clone() for p in learner.parameters]
    learner.network.zero_grad()
    losses = []
    for rows in groups:  # all positions' logits, a group at a time
        found = learner.network(input_ids=rows.tokens).logits.log_softmax(-1)
        chosen = found.gather(-1, rows.labels.clamp(min=0)[..., None])[..., 0]
        losses.append(-chosen[rows.labels != -100])
    mean = torch.cat(losses).mean()
    mean.backward()
    assert learner.loss(groups).item() == pytest.approx(mean.item(), abs=1e-5)
    for mine, parameter in zip(ours, learner.parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", bridges.KINDS)
def test_in_bfloat16_the_loss_is_near_that_of_float32_and_gradients_are_float32(kind):
    learner = told_apart(learner_of(kind, precision="float32", generic_steps=0))
    groups = next(learner.batches.from_step(4, 5))

    def loss_and_gradients() -> tuple[float, list[torch.Tensor]]:
        learner.network.zero_grad(set_to_none=True)
        loss = learner.loss(groups)
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in learner.parameters)
        return loss.item(), [p.grad.clone() for p in learner.parameters]

    exact, exact_gradients = loss_and_gradients()
    learner.bf16 = True  # as on a processor that multiplies bfloat16 natively
    rounded, gradients = loss_and_gradients()
    assert rounded != exact, "else it was not used"
    assert rounded == pytest.approx(exact, rel=0.02)
    both = [torch.cat([g.flatten() for g in found]) for found in (gradients, exact_gradients)]
    assert torch.cosine_similarity(*both, dim=0) > 0.99


def test_no_logits_are_made_where_there_is_no_label():
    learner, seen = learner_of(generic_steps=0), []
    handle = learner.head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    groups = next(learner.batches.from_step(4, 5))
    learner.loss(groups)
    handle.remove()
    assert seen == [(sum(int((rows.labels != -100).sum()) for rows in groups), 48)]
    assert not learner.head._forward_pre_hooks


def test_frozen_blocks_below_the_lowest_adapter_run_without_a_graph():
    learner = learner_of(layers=(1,))
    names = {name for name, p in learner.network.named_parameters() if p.requires_grad}
    assert names and all(".layers.1." in name for name in names)
    graphs = []
    handles = [
        block.register_forward_pre_hook(lambda module, inputs: graphs.append(inputs[0].requires_grad))
        for block in (*learner.network.get_base_model().model.layers, learner.network.get_base_model().model.norm)
    ]
    learner.loss(next(learner.batches.from_step(4, 5)))
    for handle in handles:
        handle.remove()
    assert graphs == [False, False, True], "what enters both blocks and the last norm"


@pytest.mark.parametrize("kind", bridges.KINDS)
def test_adapters_are_on_each_target_of_each_block_that_is_named_and_nowhere_else(kind):
    name = {"gpt2": "attn.c_proj"}.get(kind, "self_attn.o_proj")
    network = with_adapters(bridges.hugging_face(kind), settings(targets=(name,), layers=(1,)))
    paths = {path for path, part in network.named_modules() if hasattr(part, "lora_A")}
    assert len(paths) == 1 and all(path.endswith(f".1.{name}") for path in paths)


def test_a_model_whose_tokenizer_begins_texts_is_tuned_with_that_beginning(tmp_path):
    tokenizer = bridges.character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    before = own_beginning(tokenizer)
    assert before == (tokenizer.bos_token_id,)
    learner = Pretrained(bridges.hugging_face("llama"), tokenizer, TASK, settings(generic_steps=0), before)
    for rows in next(learner.batches.from_step(4, 5)):
        assert (rows.tokens[:, 0] == tokenizer.bos_token_id).all()
        assert (rows.tokens[:, 1] != tokenizer.bos_token_id).all()
        assert rows.lengths.min() > 6


def test_products_for_training_are_torchs_forth_and_back():
    generator = torch.Generator().manual_seed(0)
    for frozen in (True, False):
        for bias in (None, torch.randn(7, generator=generator)):
            x = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
            weight = torch.randn(7, 11, generator=generator).requires_grad_(not frozen)
            wanted = [x, *([] if frozen else [weight])]
            with products.trained_products():
                y = F.linear(x, weight, bias)
            torch.testing.assert_close(y, F.linear(x, weight, bias))
            found = torch.autograd.grad(y.square().sum(), wanted)
            expected = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), wanted)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
