"""Exercises of chapter 08, loss."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.checkpoint import load
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.loss import IGNORE, cross_entropy

# 08.1 ----------------------------------------------------------------------------------------------------------------


def _logit_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    masked = torch.randn(3, 6, generator=rng)
    masked[0, 2], masked[1, :4] = -torch.inf, -torch.inf
    return [
        (torch.randn(2, 4, 7, generator=rng),),
        (torch.randn(3, 5, generator=rng) * 1e4,),
        (torch.randn(5, generator=rng) - 1e5,),
        (masked,),
        (torch.tensor([[0.0, -200.0, -300.0], [90.0, 0.0, -60.0]]),),
        ((torch.randn(3, 301, generator=rng) * 4).bfloat16(),),
        (torch.randn(1, generator=rng),),
        (torch.randn(0, 4, generator=rng),),
    ]


def _narrow(z: Tensor) -> Tensor:
    """Log-softmax in the dtype of z, whose largest is 0."""
    return (z - z.exp().sum(-1, keepdim=True).log()).float()


LOG_SOFTMAX = Exercise(
    "08.1", "log-softmax", "log_softmax", minutes=12, difficulty=2,
    why="Every loss goes through it, and written as it is defined it gives infinity on ordinary logits.",
    reference=lambda x: F.log_softmax(x.float(), dim=-1),
    cases=_logit_cases,
    wrong=(
        Wrong("an exponential overflows: large logits give infinity or NaN.",
              lambda x: x.float() - x.float().exp().sum(-1, keepdim=True).log()),
        Wrong("a small probability underflows to zero before its logarithm is taken: stay in logarithms.",
              lambda x: x.float().softmax(-1).log()),
        Wrong("the largest logit was taken away and never counted again.",
              lambda x: x.float() - (x.float() - x.float().amax(-1, keepdim=True)).exp().sum(-1, keepdim=True).log()),
        Wrong("it runs over the first axis: the vocabulary is the last one.",
              lambda x: F.log_softmax(x.float(), dim=0)),
        Wrong("the logarithm is to base 2: nats are wanted.",
              lambda x: F.log_softmax(x.float(), dim=-1) / math.log(2)),
        Wrong("bf16 logits were summed in bf16: widen to fp32 first.",
              lambda x: _narrow(x - x.amax(-1, keepdim=True))),
    ),
    hints=(
        "What happens to log-softmax if you take the same number away from all logits?",
        "Take the largest away first; then the logarithm of the sum of exponentials is of a number from 1 to V.",
        "fp32 · minus the row's largest · minus log of the sum of exp, over the last axis, kept.",
    ),
    tolerance=2e-6,
    blocked=("torch.log_softmax", "torch.Tensor.log_softmax", "torch.nn.functional.log_softmax", "torch.logsumexp",
             "torch.Tensor.logsumexp"),
)  # fmt: skip


# 08.2 ----------------------------------------------------------------------------------------------------------------


def _loss_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    # Each row's last target is scored, and of three axes the middle one has one place: a mean of means is then a
    # number, the same one whether it is taken over the first axis or over all but the last.
    for shape, classes, share in (
        ((2, 5), 7, 0.4), ((3, 4), 6, 0.0), ((6,), 9, 0.4), ((1, 1), 3, 0.0), ((4, 1, 5), 5, 0.4),
    ):  # fmt: skip
        targets = torch.randint(classes, shape, generator=rng)
        ignored = torch.rand(*shape, generator=rng) < share
        ignored[..., -1] = False
        yield torch.randn(*shape, classes, generator=rng) * 3, targets.masked_fill(ignored, IGNORE)
    uneven = torch.randint(8, (2, 6), generator=rng)
    uneven[1, 1:] = IGNORE  # a mean of the rows' means would count that row as much as the other
    yield torch.randn(2, 6, 8, generator=rng) * 2, uneven
    yield (torch.randn(2, 3, 50, generator=rng) * 2).bfloat16(), torch.randint(50, (2, 3), generator=rng)
    zeros = torch.tensor([[4, 0, 0, IGNORE], [0, 3, 0, 5]])  # token 0 is a token like the others
    yield torch.randn(2, 4, 6, generator=rng) * 300, zeros  # exponentials of such logits overflow


def _surprises(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of every target, 0 where it is ignored; and which are scored."""
    scored = targets != IGNORE
    chosen = F.log_softmax(logits.float(), -1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return -chosen * scored, scored


def _every_pair(logits: Tensor, targets: Tensor) -> Tensor:
    scored = targets != IGNORE
    return -F.log_softmax(logits[scored].float(), -1)[:, targets[scored]].mean()


def _rows_mean(logits: Tensor, targets: Tensor) -> Tensor:
    losses, scored = _surprises(logits, targets)
    if losses.dim() == 1:
        return losses.sum() / scored.sum()
    rows, counts = losses.flatten(1).sum(1), scored.flatten(1).sum(1)
    return (rows[counts > 0] / counts[counts > 0]).mean()


CROSS_ENTROPY = Exercise(
    "08.2", "cross-entropy with a mask", "masked_cross_entropy", minutes=15, difficulty=3,
    why="Padding and prompts must not count; the commonest quiet bug of training is that they do.",
    reference=lambda logits, targets: F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(),
                                                      ignore_index=IGNORE),
    cases=_loss_cases,
    wrong=(
        Wrong("it is the mean over all positions: divide by the number of those that are scored.",
              lambda logits, targets: _surprises(logits, targets)[0].mean()),
        Wrong("it is the sum, not the mean.", lambda logits, targets: _surprises(logits, targets)[0].sum()),
        Wrong("it is the mean of each row's mean: a short row then counts as much as a long one.", _rows_mean),
        Wrong("the sign is turned round: a surprise is minus the logarithm of a probability.",
              lambda logits, targets: -_surprises(logits, targets)[0].sum() / (targets != IGNORE).sum()),
        Wrong("ignored targets are counted as token 0.",
              lambda logits, targets: F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten().clamp_min(0))),
        Wrong("it is in bits: leave the natural logarithm as it is.",
              lambda logits, targets: _surprises(logits, targets)[0].sum() / (targets != IGNORE).sum() / math.log(2)),
        Wrong("targets of 0 are ignored too: 0 is a token like any other, only -100 is not scored.",
              lambda logits, targets: _surprises(logits, targets)[0][targets > 0].mean()),
        Wrong("each place is asked for the targets of all places: it has one target, its own.", _every_pair),
        Wrong("it is the mean probability, below 0: the logarithm is missing.",
              lambda logits, targets: -(-_surprises(logits, targets)[0][targets != IGNORE]).exp().mean()),
        Wrong("the targets are shifted once more: they already stand at the place from which they are guessed.",
              lambda logits, targets: F.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(),
                                                      targets[..., 1:].flatten(), ignore_index=IGNORE)),
    ),
    hints=(
        "Four positions, one of them padding: by which number do you divide?",
        "Look each target's log-probability up, leave out the ignored ones, and take the mean of what is left.",
        "log-softmax in fp32 · a mask of targets that are not -100 · pick these rows · minus mean of the picked.",
    ),
    tolerance=2e-6,
    blocked=("torch.nn.functional.cross_entropy", "torch.nn.functional.nll_loss", "minillama.loss.cross_entropy",
             "torch.nn.CrossEntropyLoss.forward", "torch.nn.NLLLoss.forward"),
)  # fmt: skip


# 08.3 ----------------------------------------------------------------------------------------------------------------


def _shift_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for rows, length in ((3, 7), (2, 5), (1, 2), (4, 9), (0, 6)):
        tokens = torch.randint(3, 100, (rows, length), generator=rng)
        lengths = torch.randint(2, length + 1, (rows,), generator=rng)
        if rows > 1:
            lengths[0], lengths[1] = length, max(2, length - 3)
        tokens[:, 0] = 1  # BOS
        for row, real in enumerate(lengths.tolist()):
            tokens[row, real - 1], tokens[row, real:] = 2, 0  # EOS and the filling
            if real > 4:
                tokens[row, 2] = 0  # the same number inside a text, where it is real
        yield tokens, lengths


def _shift(
    tokens: Tensor, lengths: Tensor, *, by: int = 1, scored: int = 0, mask: bool = True
) -> tuple[Tensor, Tensor]:
    inputs = tokens[:, :-1].clone()
    ahead = torch.cat([tokens[:, by:], tokens[:, :0].new_full((len(tokens), by), IGNORE)], dim=1)
    targets = ahead[:, : inputs.shape[1]].clone()
    if mask:
        places = torch.arange(inputs.shape[1])
        targets[places >= (lengths[:, None] - by + scored)] = IGNORE
    return inputs, targets


def _by_number(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    inputs, targets = _shift(tokens, lengths, mask=False)
    return inputs, targets.masked_fill(targets == 0, IGNORE)


def _inputs_ignored(tokens: Tensor, lengths: Tensor, *, last: int = 0) -> tuple[Tensor, Tensor]:
    inputs, targets = _shift(tokens, lengths)
    inputs[torch.arange(inputs.shape[1]) >= lengths[:, None] - last] = IGNORE
    return inputs, targets


def _wrapped(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    targets = tokens.roll(-1, 1)
    targets[torch.arange(tokens.shape[1]) >= lengths[:, None]] = IGNORE
    return tokens.clone(), targets


SHIFT = Exercise(
    "08.3", "inputs and targets", "shift", minutes=12, difficulty=2,
    why="One place too many or too few, and the model learns to copy or to skip; the loss curve looks fine.",
    reference=lambda tokens, lengths: _shift(tokens, lengths),
    cases=_shift_cases,
    wrong=(
        Wrong("targets are the inputs themselves: a model that copies its input then has no loss at all.",
              lambda tokens, lengths: _shift(tokens, lengths, by=0, scored=-1)),
        Wrong("targets are two ahead: every second step of the text is never asked for.",
              lambda tokens, lengths: _shift(tokens, lengths, by=2)),
        Wrong("it wraps round: the last input's target is the row's first token.", _wrapped),
        Wrong("padding is scored: a target behind the end of a row must be -100.",
              lambda tokens, lengths: _shift(tokens, lengths, mask=False)),
        Wrong("the end of each text is not scored: the model never learns to stop.",
              lambda tokens, lengths: _shift(tokens, lengths, scored=-1)),
        Wrong("one place of padding behind each text is scored.",
              lambda tokens, lengths: _shift(tokens, lengths, scored=1)),
        Wrong("a 0 inside a text is ignored: there it is a real token, only the length says where a text ends.",
              _by_number),
        Wrong("inputs and targets have changed places.", lambda tokens, lengths: _shift(tokens, lengths)[::-1]),
        Wrong("the inputs' filling is -100 too: the embedding has no row of that number, only targets are ignored.",
              _inputs_ignored),
        Wrong("the inputs are -100 wherever the targets are, the last real token too: only targets are ignored.",
              lambda tokens, lengths: _inputs_ignored(tokens, lengths, last=1)),
    ),
    hints=(
        "For a text of 5 tokens, how many questions are there, and what is the answer to the last one?",
        "Inputs leave out the last column, targets the first; then ignore all targets that stand behind a row's end.",
        "two slices · copy the targets · column number compared with lengths minus 1 · fill with -100.",
    ),
    tolerance=0.0,
)  # fmt: skip


# 08.4 ----------------------------------------------------------------------------------------------------------------


def _nat_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for shape in ((2, 5), (7,), (1,), (3, 4)):
        nats = torch.rand(*shape, generator=rng) * 3 + 0.1
        scored = torch.rand(*shape, generator=rng) < 0.7
        scored.view(-1)[0] = True
        yield nats, scored, int(torch.randint(5, 60, (1,), generator=rng))


def _measures(nats: Tensor, scored: Tensor, n_bytes: int) -> tuple[float, float]:
    return math.exp(nats[scored].mean().item()), nats[scored].sum().item() / math.log(2) / n_bytes


MEASURES = Exercise(
    "08.4", "perplexity and bits per byte", "perplexity_and_bits", minutes=10, difficulty=2,
    why="Two numbers that everybody reports, and that only one of which compares models with different tokenizers.",
    reference=_measures,
    cases=_nat_cases,
    wrong=(
        Wrong("perplexity is the mean of the exponentials: it is the exponential of the mean.",
              lambda nats, scored, n: (nats[scored].exp().mean().item(), _measures(nats, scored, n)[1])),
        Wrong("perplexity is to base 2 although the losses are in nats.",
              lambda nats, scored, n: (2 ** nats[scored].mean().item(), _measures(nats, scored, n)[1])),
        Wrong("bits per byte are still in nats: one nat is 1 / ln 2 bits.",
              lambda nats, scored, n: (_measures(nats, scored, n)[0], nats[scored].sum().item() / n)),
        Wrong("bits per byte divides the mean loss, not the whole: all tokens together wrote all the bytes.",
              lambda nats, scored, n: (_measures(nats, scored, n)[0], nats[scored].mean().item() / math.log(2) / n)),
        Wrong("tokens that are not scored are counted as well.",
              lambda nats, scored, n: _measures(nats, torch.ones_like(scored), n)),
        Wrong("bits per byte multiplies by ln 2: there are more bits than nats, so divide.",
              lambda nats, scored, n: (_measures(nats, scored, n)[0], nats[scored].sum().item() * math.log(2) / n)),
    ),
    hints=(
        "If every token has probability 1/8, what is the perplexity, and how many bits is each?",
        "Perplexity needs the mean, bits per byte the sum; only scored tokens belong to either.",
        "select the scored · exp of their mean · their sum over ln 2, over the number of bytes · two floats.",
    ),
    tolerance=1e-6,
    blocked=("minillama.loss.perplexity",),
)  # fmt: skip


# 08.5 ----------------------------------------------------------------------------------------------------------------


def _kl_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for rows, classes in ((4, 6), (1, 3), (7, 5)):
        log_q, log_p = (F.log_softmax(torch.randn(rows, classes, generator=rng) * 2, -1) for _ in range(2))
        yield log_q, log_p
    sure = torch.full((3, 4), -torch.inf)  # a truth that is certain: the others have probability 0
    sure[torch.arange(3), torch.randint(4, (3,), generator=rng)] = 0.0
    yield sure, F.log_softmax(torch.randn(3, 4, generator=rng), -1)
    half = torch.tensor([[math.log(0.5), math.log(0.5), -torch.inf]])
    yield half, F.log_softmax(torch.randn(1, 3, generator=rng), -1)
    far = torch.randn(2, 5, generator=rng)
    far[:, 1] -= 200  # a probability of e^-200: not 0, but 0 in fp32
    yield F.log_softmax(torch.randn(2, 5, generator=rng), -1), F.log_softmax(far, -1)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)


KL = Exercise(
    "08.5", "KL divergence", "kl_divergence", minutes=15, difficulty=3,
    why="The loss is a floor that nobody can pass, plus this: the only part that training can lower.",
    reference=lambda log_q, log_p: _kl(log_q, log_p).mean(),
    cases=_kl_cases,
    wrong=(
        Wrong("the direction is turned round: that is the divergence from the model to the truth.",
              lambda log_q, log_p: (log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        Wrong("it is the cross-entropy: the entropy of the truth was not taken away.",
              lambda log_q, log_p: -torch.where(log_q.exp() > 0, log_q.exp() * log_p, 0.0).sum(-1).mean()),
        Wrong("where the truth has probability 0 it is NaN: 0 times infinity must count as 0.",
              lambda log_q, log_p: (log_q.exp() * (log_q - log_p)).sum(-1).mean()),
        Wrong("the sign is turned round: a KL divergence is never below 0.",
              lambda log_q, log_p: -_kl(log_q, log_p).mean()),
        Wrong("it is the sum over the positions, expected their mean.", lambda log_q, log_p: _kl(log_q, log_p).sum()),
        Wrong("the mean is over the vocabulary too: add up over the last axis, average over positions.",
              lambda log_q, log_p: torch.where(log_q.exp() > 0, log_q.exp() * (log_q - log_p), 0.0).mean()),
        Wrong("the mean is over all terms that are not 0: add up over the last axis, then average over positions.",
              lambda log_q, log_p: (log_q.exp() * (log_q - log_p))[log_q > -torch.inf].mean()),
        Wrong("a small probability of the model underflows to zero before its logarithm is taken: stay in logarithms.",
              lambda log_q, log_p: torch.where(log_q.exp() > 0, log_q.exp() * (log_q.exp() / log_p.exp()).log(), 0.0)
              .sum(-1).mean()),
        Wrong("the differences are not weighted: each counts as often as the truth draws its token.",
              lambda log_q, log_p: (log_q - log_p).sum(-1).mean()),
        Wrong("the weights are logarithms: how often a token is drawn is its probability.",
              lambda log_q, log_p: (log_q * (log_q - log_p)).sum(-1).mean()),
        Wrong("it is in bits: leave the natural logarithm as it is.",
              lambda log_q, log_p: _kl(log_q, log_p).mean() / math.log(2)),
    ),
    hints=(
        "Who draws the tokens, the truth or the model, and whose surprise is too large by how much?",
        "For each position average log q - log p under q; what q never draws adds nothing.",
        "q = exp of log q · q times the difference of logarithms, 0 where q is 0 · sum over the last axis · mean.",
    ),
    blocked=("torch.nn.functional.kl_div", "torch.kl_div", "torch.nn.KLDivLoss.forward"),
)  # fmt: skip


# 08.6 ----------------------------------------------------------------------------------------------------------------


def _gradient(logits: Tensor, targets: Tensor) -> Tensor:
    z = logits.detach().clone().requires_grad_()
    F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=IGNORE).backward()
    assert z.grad is not None
    return z.grad


def _gradient_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    return [(logits, targets) for logits, targets in _loss_cases(rng) if logits.dtype == torch.float32]


def _by_hand(logits: Tensor, targets: Tensor, *, divide: str = "scored", zero: bool = True) -> Tensor:
    scored = (targets != IGNORE)[..., None]
    one_hot = F.one_hot(targets.clamp_min(0), logits.shape[-1]) * scored
    difference = logits.softmax(-1) - one_hot
    count = {"scored": int(scored.sum()), "all": targets.numel(), "none": 1}[divide]
    return (difference * scored if zero else difference) / count


GRADIENT = Exercise(
    "08.6", "gradient of the masked loss", "loss_gradient", minutes=20, difficulty=3,
    why="Every update of every weight begins with this tensor.",
    reference=_gradient,
    cases=_gradient_cases,
    wrong=(
        Wrong("it is not divided by the number of scored targets: the loss is a mean.",
              lambda logits, targets: _by_hand(logits, targets, divide="none")),
        Wrong("it is divided by the number of all positions: only the scored ones are in the mean.",
              lambda logits, targets: _by_hand(logits, targets, divide="all")),
        Wrong("the sign is turned round: a step against this gradient would raise the loss.",
              lambda logits, targets: -_by_hand(logits, targets)),
        Wrong("ignored positions have a gradient: it must be exactly 0 there.",
              lambda logits, targets: _by_hand(logits, targets, zero=False)),
        Wrong("the probabilities alone are no gradient: the target's 1 must be taken away.",
              lambda logits, targets: logits.softmax(-1) * (targets != IGNORE)[..., None] / (targets != IGNORE).sum()),
    ),
    hints=(
        "If the model gives the right token all the probability, what should the gradient be?",
        "Probabilities minus a one-hot of the target, over the number of scored positions, and nothing where ignored.",
        "softmax · subtract 1 at each scored target · rows of ignored targets to 0 · over the count of the scored.",
    ),
    blocked=("torch.autograd.grad", "torch.autograd.backward", "torch.Tensor.backward"),
)  # fmt: skip


# 08.7 ----------------------------------------------------------------------------------------------------------------


def _scaled_losses() -> dict[float, float]:
    """The toy's loss on 20 stories with its logits multiplied."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    totals, count = dict.fromkeys((0.5, 1.0, 2.0), 0.0), 0
    with torch.inference_mode():
        for batch in story_validation(tokenizer, 20, seed=0).batches:
            logits = model(batch.inputs)
            count += batch.scored
            for scale in totals:
                totals[scale] += cross_entropy(logits * scale, batch.targets).item() * batch.scored
    return {scale: total / count for scale, total in totals.items()}


def _verify(measured: dict[str, Any]) -> str:
    true = _scaled_losses()
    for key, scale in (("half", 0.5), ("loss", 1.0), ("double", 2.0)):
        if abs(measured[key] - true[scale]) > 0.02 * true[scale]:
            return (
                f"{key!r} is not the mean loss with the logits multiplied by {scale:g}: take the 20 stories of seed 0, "
                "every scored token counted once, and multiply before the softmax."
            )
    if not 0 < measured["predicted"] < 100:
        return f"the prediction is {measured['predicted']}, expected the factor with the lowest loss, above 0."
    return ""


EXPERIMENT = Experiment(
    "08.7", "experiment: too sure, not sure enough", "measured_08", minutes=20, difficulty=3,
    why="The loss does not ask for the right word only, but for the right amount of trust in it.",
    keys={
        "predicted": "the factor on the logits at which you expect the lowest loss, written before you measure",
        "half": "the loss with all logits times 0.5, in nats per token",
        "loss": "the loss as it is",
        "double": "the loss with all logits times 2, in nats per token",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what the loss punishes at either side",
    hints=(
        "What happens to a probability of 0.5 when the logits are doubled, and what if that token then does not come?",
        "One pass over each batch gives the logits; multiply them, and take the loss of each version.",
        "story_validation(tokenizer, 20, seed=0) · logits times the factor · cross_entropy · weight by batch.scored.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [LOG_SOFTMAX, CROSS_ENTROPY, SHIFT, MEASURES, KL, GRADIENT, EXPERIMENT]
