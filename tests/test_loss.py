"""The loss against torch.nn.functional and against the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillama import loss as loss_module
from minillama.loss import IGNORE, cross_entropy, head_cross_entropy, perplexity


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


@pytest.fixture(params=[1, 4, 15, 512])
def rows(request, monkeypatch):
    """15 vectors in chunks of as many rows: one each, the last one shorter, all in one."""
    monkeypatch.setattr(loss_module, "ROWS", request.param)


def head_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(11, (3, 5))
    targets[0, 1] = targets[2, 4] = IGNORE
    return torch.randn(3, 5, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True), targets


def test_a_head_in_chunks_has_the_loss_and_the_gradients_of_all_logits_at_once(rows):
    x, head, targets = head_case()
    expected = F.cross_entropy((x @ head.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    found = head_cross_entropy(x, head, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    both = [torch.autograd.grad(3 * loss, (x, head)) for loss in (found, expected)]
    for ours, reference in zip(*both, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


def test_a_tied_head_in_chunks_gets_both_gradients_and_a_frozen_one_none(rows):
    _, head, targets = head_case()
    tokens = targets.clamp_min(0)
    both = []
    for loss in (head_cross_entropy(head[tokens], head, targets), cross_entropy(head[tokens] @ head.T, targets)):
        both.append(torch.autograd.grad(loss, head)[0])
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)
    x = torch.randn(3, 5, 7, requires_grad=True)
    (ours,) = torch.autograd.grad(head_cross_entropy(x, head.detach(), targets), x)
    torch.testing.assert_close(ours, torch.autograd.grad(cross_entropy(x @ head.T, targets), x)[0])


def test_a_head_in_chunks_under_autocast_multiplies_in_bf16_and_keeps_sums_in_fp32(rows):
    x, head, targets = head_case()
    with torch.autocast("cpu", torch.bfloat16):
        found = head_cross_entropy(x, head, targets)
        expected = cross_entropy(x @ head.T, targets)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-6)
    whole = F.cross_entropy((x @ head.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    for ours, reference in zip(*(torch.autograd.grad(loss, (x, head)) for loss in (found, whole)), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference, rtol=0, atol=0.01 * reference.abs().max().item())
    assert not torch.equal(found, whole)


def test_a_head_in_chunks_refuses_what_the_loss_refuses_and_takes_no_gradient_where_none_is_wanted():
    x, head, targets = head_case()
    with pytest.raises(ValueError, match="no target is scored: all 15 are -100"):
        head_cross_entropy(x, head, torch.full((3, 5), IGNORE))
    with torch.no_grad():
        assert not head_cross_entropy(x, head, targets).requires_grad
    targets[1, 2] = 11
    with pytest.raises(IndexError):
        head_cross_entropy(x, head, targets)


class LargestTensor(TorchDispatchMode):
    """The most numbers that any tensor held which an operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_a_head_in_chunks_never_makes_a_tensor_of_all_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS", 32)
    x, head = torch.randn(256, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    targets = torch.randint(1000, (256,))
    with LargestTensor() as seen:
        head_cross_entropy(x, head, targets).backward()
    assert seen.numbers == 32 * 1000
    with LargestTensor() as seen:
        cross_entropy(x @ head.T, targets).backward()
    assert seen.numbers == 256 * 1000


def test_perplexity_is_the_number_of_equally_likely_tokens():
    assert perplexity(cross_entropy(torch.zeros(4, 50), torch.zeros(4).long()).item()) == pytest.approx(50)
    assert perplexity(0.0) == 1.0
