"""Attention by hand and by torch's fused kernel is a masked softmax written out in float64."""

import pytest
import torch
from torch import Tensor

from memgen_lens.fast import attention as module
from memgen_lens.fast.attention import SHORT, ShortAttention, attention, fused_attention, gathered_attention

SHAPES = pytest.mark.parametrize(
    ("batch", "pos", "n_heads", "d_head", "start"),
    [
        (1, 1, 1, 1, 0),
        (3, 1, 2, 4, 0),
        (2, 7, 3, 5, 0),
        (2, 7, 3, 5, 1),
        (4, 7, 3, 5, 6),
        (1, 14, 1, 16, 9),
        (2, SHORT, 2, 4, 0),
        (2, SHORT, 2, 4, SHORT - 1),
        (2, SHORT + 1, 2, 4, 0),
        (2, SHORT + 1, 2, 4, SHORT),
        (1, SHORT + 20, 3, 5, 30),
    ],
)
SCALE = 0.7


def random_heads(batch: int, pos: int, n_heads: int, d_head: int, *, seed: int = 0, spread: float = 2.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return spread * torch.randn(batch, pos, 3, n_heads, d_head, generator=draw)


def written_out(heads: Tensor, start: int, scale: float = SCALE) -> Tensor:
    """Causal attention position by position in float64 ``[batch, kept, head, d_head]``, differentiable."""
    q, k, v = heads.double().unbind(2)
    rows = []
    for position in range(start, heads.shape[1]):
        scores = scale * (q[:, position, None] * k[:, : position + 1]).sum(-1)  # [batch, key, head]
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        rows.append((weights[..., None] * v[:, : position + 1]).sum(1))
    return torch.stack(rows, 1)


@SHAPES
@pytest.mark.parametrize("attend", [attention, fused_attention, ShortAttention.apply])
def test_the_output_is_a_masked_softmax_of_the_scores_times_the_values(attend, batch, pos, n_heads, d_head, start):
    heads = random_heads(batch, pos, n_heads, d_head)
    found = attend(heads, start, SCALE)
    assert found.shape == (batch, pos - start, n_heads, d_head) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), written_out(heads, start), atol=1e-5, rtol=1e-5)


@SHAPES
def test_sequences_of_shared_rows_are_attended_to_like_sequences_of_their_own(batch, pos, n_heads, d_head, start):
    qkv = random_heads(1, 11, n_heads, d_head)[0]
    path = torch.randint(11, (batch, pos), generator=torch.Generator().manual_seed(1))
    found = gathered_attention(qkv, path, start, SCALE)
    assert found.shape == (batch, pos - start, n_heads, d_head)
    torch.testing.assert_close(found.double(), written_out(qkv[path], start), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("pos", "by_hand"), [(2, True), (SHORT, True), (SHORT + 1, False)])
def test_short_sequences_go_by_hand_and_long_ones_to_torchs_kernel(monkeypatch, pos, by_hand):
    other = "fused_attention" if by_hand else "_by_hand"
    monkeypatch.setattr(module, other, lambda *arguments: pytest.fail(f"{other} at {pos} tokens"))
    heads = random_heads(1, pos, 2, 4)
    attention(heads, 0, SCALE)
    gathered_attention(heads[0], torch.arange(pos)[None], 0, SCALE)


@SHAPES
def test_the_gradient_by_hand_is_that_of_the_softmax_written_out(batch, pos, n_heads, d_head, start):
    heads = random_heads(batch, pos, n_heads, d_head, spread=1.0)
    dz = random_heads(batch, pos - start, n_heads, d_head, seed=1)[:, :, 0]
    ours, theirs = (heads.clone().requires_grad_() for _ in range(2))
    ShortAttention.apply(ours, start, SCALE).backward(dz)
    written_out(theirs, start).backward(dz.double())
    torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=1e-5)
    assert not ours.grad[:, :start, 0].any(), "a query that is not wanted has no influence"


@pytest.mark.parametrize("start", [0, 2, 4])
def test_the_gradient_by_hand_is_the_slope_of_the_output(start):
    heads = random_heads(2, 5, 2, 3, spread=1.0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda heads: ShortAttention.apply(heads, start, SCALE), (heads,), eps=1e-5)


def test_a_gradient_that_is_one_number_spread_out_or_part_of_a_table_is_no_exception():
    """A sum hands back a gradient without strides; heads may be part of a wider table."""
    heads = random_heads(4, 6, 2, 8)
    for view in (heads[::2], heads[..., ::2], heads.transpose(0, 1), heads.flip(3)):
        ours, theirs = (view.clone().requires_grad_() for _ in range(2))
        ShortAttention.apply(ours[:], 1, SCALE).sum().backward()
        written_out(theirs, 1).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            attention(view, 1, SCALE).double(), written_out(view, 1).detach(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("attend", [attention, fused_attention, ShortAttention.apply])
@pytest.mark.parametrize("pos", [9, SHORT + 3])
def test_later_positions_have_no_influence(attend, pos):
    heads = random_heads(2, pos, 2, 4)
    for start in (0, 3):
        before = attend(heads, start, SCALE)
        for position in range(start, pos, 5):
            changed = heads.clone()
            changed[:, position + 1 :] = 50 * torch.randn(changed[:, position + 1 :].shape)
            after = attend(changed, start, SCALE)
            torch.testing.assert_close(
                after[:, : position + 1 - start], before[:, : position + 1 - start], atol=1e-6, rtol=1e-6
            )


@pytest.mark.parametrize("start", [0, 3])
def test_no_gradient_goes_to_later_positions(start):
    heads = random_heads(2, 9, 2, 4).requires_grad_()
    z = ShortAttention.apply(heads, start, SCALE)
    for position in range(start, 9):
        (gradient,) = torch.autograd.grad(z[:, position - start].square().sum(), heads, retain_graph=True)
        assert not gradient[:, position + 1 :].any()
        assert gradient[:, : position + 1, 2].any(-1).all(), "every value up to the position has an influence"


def test_sequences_and_heads_do_not_see_each_other():
    heads = random_heads(3, 7, 2, 4)
    whole = attention(heads, 2, SCALE)
    for batch in range(3):
        for head in range(2):
            alone = attention(heads[batch : batch + 1, :, :, head : head + 1], 2, SCALE)
            torch.testing.assert_close(alone[0, :, 0], whole[batch, :, head], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attend", [attention, ShortAttention.apply])
def test_scores_that_would_overflow_an_exponential_pick_the_largest(attend):
    heads = random_heads(2, 6, 2, 4, spread=40.0)
    q, k, v = heads.unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    top = scores.topk(2, dim=-1).values
    clear = (top[..., 0] - top[..., 1] > 50).transpose(1, 2)  # [batch, query, head]
    picked = torch.stack([v[b, scores[b, h].argmax(-1), h] for b in range(2) for h in range(2)]).view(2, 2, 6, 4)
    found = attend(heads, 0, 1.0)
    assert found.isfinite().all() and clear.float().mean() > 0.8
    torch.testing.assert_close(found[clear], picked.transpose(1, 2)[clear], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("start", [0, 4])
def test_in_bfloat16_output_and_gradient_are_bfloat16s_and_near(start):
    heads = random_heads(3, 9, 2, 8, spread=1.0).bfloat16()
    dz = random_heads(3, 9 - start, 2, 8, seed=1)[:, :, 0].bfloat16()
    ours, theirs = heads.clone().requires_grad_(), heads.double().requires_grad_()
    z, expected = ShortAttention.apply(ours, start, SCALE), written_out(theirs, start)
    z.backward(dz), expected.backward(dz.double())
    assert z.dtype == ours.grad.dtype == torch.bfloat16
    for found, true in ((z, expected), (ours.grad, theirs.grad)):
        assert (found.double() - true).norm() < 0.02 * true.norm()
