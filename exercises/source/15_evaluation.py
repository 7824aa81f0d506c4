# %% [markdown]
# # 15 · Exercises: evaluation
#
# Chapter: [15 evaluation](../chapters/15_evaluation.ipynb). Run a check as often as you like: it says what is wrong.

# %%
import math
import random
from collections import Counter

import torch
from torch import Tensor

from minillama import load, world
from minillama.course import case, check, hint, report

# %% [markdown] exercise="15.1"
# `bleu(answers, references)`: two lists with as many texts, each a list of words, one reference for each answer → the BLEU-4 of
# the whole corpus, a float from 0 to 100 (Papineni et al. 2002). For n = 1, 2, 3, 4, over all sentences together:
#
# - matches: each n-gram of an answer counts as often as it stands there, but at most as often as it stands in that answer's own
#   reference;
# - precision: all matches by all n-grams of the answers.
#
# BLEU is the geometric mean of the four, times the penalty min(1, exp(1 − r/c)), times 100. c and r are the numbers of words in
# all answers and in all references; an answer may be empty. If there are no matches of some order, BLEU is 0: nothing is
# smoothed. Words are equal only letter for letter.
#
# For example the answer `a b c d e` to the reference `a b c d f g` has the precisions 4/5, 3/4, 2/3 and 1/2, so 0.2 to the
# power of 1/4, and the penalty exp(−1/5): 54.75.


# %% exercise="15.1"
def bleu(answers: list[list[str]], references: list[list[str]]) -> float:
    """N texts, N texts → BLEU from 0 to 100"""
    # <solution>
    logs = 0.0
    for n in range(1, 5):
        matches = count = 0
        for answer, reference in zip(answers, references, strict=True):
            found, expected = (Counter(zip(*(t[i:] for i in range(n)), strict=False)) for t in (answer, reference))
            matches += sum((found & expected).values())
            count += sum(found.values())
        if matches == 0:
            return 0.0
        logs += math.log(matches / count)
    c, r = sum(map(len, answers)), sum(map(len, references))
    penalty = 1.0 if c > r else math.exp(1 - r / c)
    return 100 * penalty * math.exp(logs / 4)
    # </solution>


# %% [markdown]
# What does your BLEU think of these translations of 他把球藏在树下?

# %% tags=["nbval-ignore-output"]
try:
    reference = "he hid the ball under the tree".split()
    for answer in ("he hid the ball under the tree", "he hid the kite under the tree", "under the tree he hid the ball",
                   "he hid the ball", "the the the the the the the"):  # fmt: skip
        print(f"{bleu([answer.split()], [reference]):6.2f}  {answer}")
except NotImplementedError:
    print("Write 15.1 first.")

# %% [markdown] exercise="15.2"
# `rouge_l(answer, references)`: answer is a list of words, references a list of at least one such list → precision, recall and
# F1, three floats from 0 to 1 (Lin 2004). For one reference, let L be the length of the longest common subsequence: words that
# both texts have in the same order, whatever stands between. Precision is L by the number of words in the answer, recall is L by
# that of the reference, F1 their harmonic mean. If a text has no words, or nothing is common, all three are 0.
#
# With several references, return all three for the one that has the best F1; the first of them, if several have it.
#
# For example the answer `a b c d` has in common with `a x c d y` the subsequence `a c d`: (0.75, 0.6, 0.667). With a second
# reference `b c d`, which has F1 = 6/7, the result is (0.75, 1.0, 0.857). The check has a pair of which a recursion without memory asks
# the same things millions of times.


# %% exercise="15.2"
def rouge_l(answer: list[str], references: list[list[str]]) -> tuple[float, float, float]:
    """words, texts → (precision, recall, F1)"""
    # <solution>
    best = (0.0, 0.0, 0.0)
    for reference in references:
        row = [0] * (len(reference) + 1)
        for word in answer:
            new = [0]
            for j, token in enumerate(reference):
                new.append(row[j] + 1 if word == token else max(row[j + 1], new[j]))
            row = new
        length = row[-1]
        f1 = 2 * length / (len(answer) + len(reference)) if length else 0.0  # the same as the harmonic mean
        if f1 > best[2]:
            best = (length / len(answer), length / len(reference), f1)
    return best
    # </solution>


# %% [markdown] exercise="15.3"
# `sliding_loss(nats, window, stride)`: the loss of a text of L tokens (at least 2) on a model that sees `window` tokens at most.
# The first window begins at token 0, each next one `stride` tokens after the one before, and all hold `window` tokens, or fewer
# at the end of the text. No further window begins once one has reached the end. A window scores those of its tokens that no
# window before it has scored; token 0 has nothing before it and is never scored.
#
# In place of a model there is a table: nats (L, L) fp64, where nats[b, t] is the surprise at token t if the window begins at
# token b; for t ≤ b nothing stands before it, and the table has NaN there.
#
# → two things: the plan, a list of a triple (begin, end, first) for each window, which scores the tokens from `first` to
# `end` − 1, all three counted from the beginning of the text; and the mean loss in nats of all scored tokens, a float. If stride
# is not below window, raise a ValueError: the first token of a window would have no context there.
#
# For example 7 tokens with window 4 and stride 2 have the plan `[(0, 4, 1), (2, 6, 4), (4, 7, 6)]`.


# %% exercise="15.3"
def sliding_loss(nats: Tensor, window: int, stride: int) -> tuple[list[tuple[int, int, int]], float]:
    """(L, L), tokens, tokens → [(begin, end, first), …], nats per token"""
    # <solution>
    if stride >= window:
        raise ValueError(f"stride is {stride}, expected less than the window's {window}")
    plan, total, begin, first = [], 0.0, 0, 1
    while first < len(nats):
        end = min(begin + window, len(nats))
        plan.append((begin, end, first))
        total += nats[begin, first:end].sum().item()
        begin, first = begin + stride, end
    return plan, total / (len(nats) - 1)
    # </solution>


# %% [markdown]
# How much does the stride change the loss of the toy, if it may look at 48 tokens only? And what does it cost?

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
tokens = torch.tensor(tokenizer.encode(world.sample(random.Random(1)).text, bos=True))
nats = torch.full((len(tokens), len(tokens)), torch.nan, dtype=torch.float64)
try:
    for window, stride in ((48, 47), (48, 24), (48, 8), (48, 1)):
        for begin in range(0, len(tokens) - 1, stride):  # the table's rows, as the model gives them
            part = tokens[begin : begin + window]
            with torch.inference_mode():
                log_probs = model(part[None, :-1])[0].log_softmax(-1)
            nats[begin, begin + 1 : begin + len(part)] = -log_probs.gather(1, part[1:, None])[:, 0].double()
        plan, loss = sliding_loss(nats, window, stride)
        print(f"stride {stride:2}: {loss:.3f} nats per token, {len(plan):2} windows")
except NotImplementedError:
    print("Write 15.3 first.")

# %% [markdown] exercise="15.4"
# `bootstrap(a, b, draws, level)`: is model a better than model b, and how sure is that? a and b (N,) are their scores on the
# same N examples, fp64, fp32 or int64. draws (R, N) int64 are R resamples, drawn for you so that the result is certain: each row
# has the numbers of N examples, some of them several times. → four floats, in fp64:
#
# - the mean of a minus that of b, on the examples as they are;
# - low and high: the ends between which the share `level` of the resamples lies. Compute that difference on each resample, both
#   models on the same drawn examples. Cut off as many of these R numbers below as above: low is their quantile
#   (1 − level)/2, and high their quantile (1 + level)/2, interpolated on a straight line between neighbours, as by `torch.quantile`;
# - flips: the share of resamples in which the model that is better on all examples is not better; alike is not better.
#   If neither is better on all examples, flips is 1.
#
# No loop over the resamples: the check has many. For example a = `[1, 1, 0]`, b = `[0, 1, 0]` with the draws `[[0, 0, 1],
# [2, 1, 2], [0, 1, 2]]` has the differences 2/3, 0 and 1/3: with the level 0.5 that is `(0.333, 0.167, 0.5, 0.333)`.


# %% exercise="15.4"
def bootstrap(a: Tensor, b: Tensor, draws: Tensor, level: float) -> tuple[float, float, float, float]:
    """(N,), (N,), (R, N), share → (difference, low, high, flips)"""
    # <solution>
    gaps = a.double() - b.double()  # (N,)
    found = gaps.mean()
    means = gaps[draws].mean(dim=1)  # (R,)
    ends = torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64)
    low, high = torch.quantile(means, ends).tolist()
    better = means > 0 if found > 0 else means < 0
    flips = 1 - better.double().mean().item() if found != 0 else 1.0
    return found.item(), low, high, flips
    # </solution>


# %% [markdown]
# How many examples do you need? Model a answers 85 of 100 right, b 80, on examples that are hard for both or for neither.

# %% tags=["nbval-ignore-output"]
rng = torch.Generator().manual_seed(0)
try:
    for count in (50, 200, 800, 3200):
        hard = torch.rand(count, generator=rng)
        noise = 0.05 * torch.randn(2, count, generator=rng)
        a, b = (hard + noise[0] < 0.85).long(), (hard + noise[1] < 0.80).long()
        draws = torch.randint(count, (2000, count), generator=rng)
        found, low, high, flips = bootstrap(a, b, draws, 0.95)
        print(f"{count:5} examples: {found:+.3f}, 95 % from {low:+.3f} to {high:+.3f}, flips in {flips:.1%}")
except NotImplementedError:
    print("Write 15.4 first.")

# %% [markdown] exercise="15.5"
# `choose(log_probs, begin, end, n_bytes)`: the answers of a model to Q multiple choice questions with up to C choices each.
#
# - log_probs (Q, C, T), fp32 or bf16: for each choice a row with the log-probability of each token of the context and then of
#   the choice; what stands behind the choice is filling, and may be anything, NaN too;
# - begin (Q,): the place of the choices' first token, which is where the context ends;
# - end (Q, C): the place behind each choice's last token;
# - n_bytes (Q, C): the bytes of each choice's text. A question with fewer than C choices has 0 there, and such a choice is never
#   taken.
#
# → two tensors (Q,) int64, the number of the choice with the largest sum of its tokens' log-probabilities, and of the one with
# the largest sum per byte. Add up in fp32 or fp64. No loop over questions or choices: the check has many.
#
# For example one question of two choices, with begin 1 and the rows `[-9, -2, 0]` (end 2, 3 bytes) and `[-9, -1, -2]`
# (end 3, 9 bytes), has the sums −2 and −3, and per byte −0.67 and −0.33: the result is `[0]` and `[1]`.


# %% exercise="15.5"
def choose(log_probs: Tensor, begin: Tensor, end: Tensor, n_bytes: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, C, T), (Q,), (Q, C), (Q, C) → (Q,), (Q,)"""
    # <solution>
    place = torch.arange(log_probs.shape[2])
    outside = (place < begin[:, None, None]) | (place >= end[:, :, None])
    sums = log_probs.float().masked_fill(outside, 0.0).sum(dim=2)  # (Q, C)
    sums[n_bytes == 0] = -torch.inf
    return sums.argmax(dim=1), (sums / n_bytes.clamp(min=1)).argmax(dim=1)
    # </solution>


# %% [markdown] exercise="15.6"
# `bits_per_byte(nats, texts, tokens)`: N texts, and for each of them a tensor with the surprises in nats of all its tokens and of
# the end behind them, fp32 or bf16, as long as its tokenizer makes it. → two floats:
#
# - the bits per byte: all surprises in bits, by all bytes of all texts in UTF-8. An end has no bytes, and a text may be
#   empty;
# - the perplexity that the model has per token of another tokenizer, which makes `tokens` tokens, ends included, of all texts
#   together: as if the same probability of these texts were shared out among them.
#
# For example two texts `"ab"` and `"é"` with the surprises `[ln 2, ln 2]` and `[ln 4]` have 4 bits in 4 bytes, so 1.0; for a
# tokenizer that makes 2 tokens of them, the perplexity is 4.0.


# %% exercise="15.6"
def bits_per_byte(nats: list[Tensor], texts: list[str], tokens: int) -> tuple[float, float]:
    """N × (T_i,), N texts, count → (bits per byte, perplexity per token of the other)"""
    # <solution>
    total = torch.cat(nats).double().sum().item()
    size = sum(len(text.encode("utf-8")) for text in texts)
    return total / math.log(2) / size, math.exp(total / tokens)
    # </solution>


# %% [markdown]
# Two models tell the same story, each in its own tokens. Which one is better, and would the perplexities have said so?

# %% tags=["nbval-ignore-output"]
story = world.sample(random.Random(3)).text
try:
    split = {"toy": tokenizer.encode(story, bos=True, eos=True), "letters": [0, *story.encode()]}
    counts = Counter(story.encode())
    letters = torch.tensor([math.log(len(story) / counts[byte]) for byte in story.encode()])
    with torch.inference_mode():
        log_probs = model(torch.tensor([split["toy"][:-1]]))[0].log_softmax(-1)
    surprises = {"toy": -log_probs.gather(1, torch.tensor(split["toy"][1:])[:, None])[:, 0], "letters": letters}
    for name, own in surprises.items():
        bits, shared = bits_per_byte([own], [story], len(surprises["toy"]))
        print(f"{name:8} perplexity {own.mean().exp():7.2f} per own token, {shared:9.2f} per token of the toy, "
              f"{bits:.3f} bits per byte")  # fmt: skip
except NotImplementedError:
    print("Write 15.6 first.")

# %% [markdown] exercise="15.7"
# How much does BLEU see? Take 100 stories of the toy world, made one after the other with `random.Random(0)`, as references, cut
# into words by `split()`. As answers take each version of `versions(story)` below, and as "another story" the story that
# follows, the first one for the last. Give each version of all stories to your `bleu`, as one corpus.
#
# Three of these versions say what the story does not say; one tells the same in other words. Write down first which BLEU you expect of
# that one.

# %%
COLOURS = ["red", "blue", "green", "yellow", "purple", "pink", "white", "brown"]
SAME = {"child": "kid", "named": "called", "lived": "dwelt", "loved": "adored", "friend": "pal", "told": "informed",
        "felt": "was", "went": "left", "took": "brought", "gave": "handed", "bought": "got", "said": "replied",
        "asked": "said", "found": "discovered", "looked": "searched"}  # fmt: skip


def versions(story: world.Story) -> dict[str, str]:
    text, child, friend = story.text, story.facts["child"], story.facts["friend"]
    after = {colour: COLOURS[(i + 1) % 8] for i, colour in enumerate(COLOURS)}
    return {
        "wrong colour": " ".join(after.get(word, word) for word in text.split()),
        "who is who": text.replace(friend, "@").replace(child, friend).replace("@", child),
        "backwards": ". ".join(reversed(text.removesuffix(".").split(". "))) + ".",
        "other words": " ".join(SAME.get(word, word) for word in text.split()),
    }


for name, text in versions(world.sample(random.Random(0))).items():
    print(f"{name}: {text}\n")

# %% exercise="15.7"
measured_15 = {
    "predicted": None,  # BLEU of "other words", from 0 to 100, before you measure
    "wrong colour": None,
    "who is who": None,
    "backwards": None,
    "other words": None,
    "another story": None,
    "because": None,  # a sentence
}
# <solution>
rng = random.Random(0)
stories = [world.sample(rng) for _ in range(100)]
references = [story.text.split() for story in stories]
measured_15["predicted"] = 90.0
for name in list(measured_15)[1:5]:
    measured_15[name] = bleu([versions(story)[name].split() for story in stories], references)
measured_15["another story"] = bleu([*references[1:], references[0]], references)
measured_15["because"] = "only the other words are true, but BLEU counts equal n-grams and knows no facts and no order"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
