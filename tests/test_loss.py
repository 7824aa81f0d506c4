"""The loss against torch.nn.functional and against the formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillama.loss import IGNORE, cross_entropy, perplexity


def case(shape: tuple[int, ...] = (3, 5), vocab: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape, vocab) * 3, torch.randint(vocab, shape)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4,), (2, 3, 2)])
def test_it_is_the_mean_surprise_in_nats(shape):
    logits, targets = case(shape)
    p = torch.exp(logits.double()) / torch.exp(logits.double()).sum(-1, keepdim=True)
    expected = -torch.log(p.gather(-1, targets[..., None])).mean()
    assert cross_entropy(logits, targets).shape == ()
    assert cross_entropy(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    assert cross_entropy(torch.zeros(2, 3, 50), torch.zeros(2, 3).long()).item() == pytest.approx(math.log(50))


@pytest.mark.parametrize("ignore_index", [None, 7])
def test_ignored_targets_count_neither_above_nor_below_the_line(ignore_index):
    logits, targets = case()
    options = {} if ignore_index is None else {"ignore_index": ignore_index}
    targets[targets == 7] = 8
    scored = torch.rand(3, 5) < 0.6
    masked = targets.masked_fill(~scored, IGNORE if ignore_index is None else ignore_index)
    loss = cross_entropy(logits.requires_grad_(), masked, **options)
    torch.testing.assert_close(loss, F.cross_entropy(logits[scored], targets[scored]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[~scored] == 0).all() and (grad[scored] != 0).any(-1).all()


@pytest.mark.parametrize(("shape", "size"), [((2, 3), 6), ((0, 3), 0)])
def test_without_any_scored_target_it_refuses(shape, size):
    with pytest.raises(ValueError, match=f"no target is scored: all {size} are -100"):
        cross_entropy(torch.zeros(*shape, 5), torch.full(shape, IGNORE))
    with pytest.raises(ValueError, match=f"all {size} are 4"):
        cross_entropy(torch.zeros(*shape, 5), torch.full(shape, 4), ignore_index=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_fp32(dtype):
    logits, targets = case((7, 5), 300)
    logits = logits.to(dtype)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy(logits.float(), targets))


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert cross_entropy(logits, torch.tensor([0])).item() == 0
    assert cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(2e4)


@pytest.mark.parametrize("target", [11, -1])
def test_a_target_that_is_not_in_the_vocabulary_is_refused(target):
    logits, targets = case()
    targets[1, 2] = target
    with pytest.raises(IndexError):
        cross_entropy(logits, targets)


def test_gradient():
    logits, targets = case((2, 3), 5)
    targets[0, 1] = IGNORE
    (grad,) = torch.autograd.grad(cross_entropy(logits.requires_grad_(), targets), logits)
    scored = (targets != IGNORE).unsqueeze(-1)
    one_hot = F.one_hot(targets.clamp_min(0), 5)
    torch.testing.assert_close(grad, (logits.softmax(-1) - one_hot) * scored / scored.sum())


def test_perplexity_is_the_number_of_equally_likely_tokens():
    assert perplexity(cross_entropy(torch.zeros(4, 50), torch.zeros(4).long()).item()) == pytest.approx(50)
    assert perplexity(0.0) == 1.0
