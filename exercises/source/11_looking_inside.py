# %% [markdown]
# # 11 · Exercises: looking inside
#
# Chapter: [11 looking inside](../chapters/11_looking_inside.ipynb). Run a check as often as you like:
# it says what is wrong.

# %%
import functools

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from minillama import Llama, ModelConfig, load
from minillama.course import case, check, hint, report
from minillama.data import story_validation
from minillama.trainer import mean_loss
from minillama.visualize import ablate, attention_probabilities, record

# %% [markdown]
# Two exercises are about a model and its hooks, but a check hands over data only. `@on_data` stands between: called with a model,
# your function is called as it is; called with a config, weights and a list of calls, it is called for each of these with a
# model that is built from them. Then the number of hooks in the model is noted, and every layer's `fast`, so that a check sees what
# you leave behind. Two of the hooks are somebody else's, and `fast` is off in the last layer from the beginning. A text with
# a token that the model does not have makes it fail.


# %%
def on_data(function):
    """Let function(model, …) be called with a config, all weights in one tensor, and calls, too."""

    @functools.wraps(function)
    @torch.no_grad()
    def call(model, *given):
        if isinstance(model, Llama):
            return function(model, *given)
        config, (weights, calls) = model, given
        model = Llama(ModelConfig(**config)).requires_grad_(False).to(weights.dtype)
        vector_to_parameters(weights, model.parameters())
        last = model.blocks[-1].attention
        last.fast = False
        last.wo.register_forward_pre_hook(lambda *_: None)
        last.tap.register_forward_hook(lambda *_: None)
        found = []
        for arguments in calls:
            try:
                found.append(function(model, *arguments))
            except IndexError:
                if all(int(x.max()) < config["vocab_size"] for x in arguments if isinstance(x, Tensor)):
                    raise
                found.append("the model failed")
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        return {"found": found, "hooks": hooks, "fast": [block.attention.fast for block in model.blocks]}

    return call


# %% [markdown] exercise="11.1"
# `record_heads(model, tokens)`: tokens (T,) int64, one text → two tensors in fp32, for all L layers, first to last:
#
# - probabilities (L, H, T, T): what passes through the layers' `attention.tap`. The last axis is what is looked at;
# - mixtures (L, H, T, D): what each head has mixed, before `attention.wo`, which is given (1, T, H·D): of each token the first
#   head's D numbers, then the second's, and so on.
#
# `tap` is passed only while a layer's `attention.fast` is False. Leave the model as you have found it, even if it raises an error
# on its way, which you let pass: your hooks are gone, those of others are not, and each layer's `fast` is what it was.
#
# For example a model of 3 layers, with 6 heads of 4, gives for a text of 5 tokens the shapes (3, 6, 5, 5) and (3, 6, 5, 4). Of
# a text of one token all probabilities are 1.


# %% exercise="11.1"
@on_data
def record_heads(model: Llama, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """model, (T,) → (L, H, T, T), (L, H, T, D)"""
    # <solution>
    layers = [block.attention for block in model.blocks]
    before = [layer.fast for layer in layers]
    probabilities, mixtures, handles = {}, {}, []

    def listen(number, layer):
        def after_tap(module, inputs, output):
            probabilities[number] = output[0].float()

        def before_wo(module, inputs):
            mixtures[number] = inputs[0][0].float().unflatten(-1, (layer.n_heads, -1)).transpose(0, 1)

        layer.fast = False
        handles.append(layer.tap.register_forward_hook(after_tap))
        handles.append(layer.wo.register_forward_pre_hook(before_wo))

    try:
        for number, layer in enumerate(layers):
            listen(number, layer)
        model(tokens[None])
    finally:
        for handle in handles:
            handle.remove()
        for layer, was in zip(layers, before, strict=True):
            layer.fast = was
    numbers = range(len(layers))
    return torch.stack([probabilities[i] for i in numbers]), torch.stack([mixtures[i] for i in numbers])
    # </solution>


# %% [markdown]
# Which heads of the toy look at one token most of the time, and how long are their mixtures?

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
tokens = torch.tensor(tokenizer.encode("Once upon a time, there was a kind child named Leo. He", bos=True))
try:
    probabilities, mixtures = record_heads(model, tokens)
    for layer, (p, x) in enumerate(zip(probabilities, mixtures, strict=True)):
        sharp = " ".join(f"{largest:.2f}" for largest in p.amax(-1).mean(-1))
        print(f"layer {layer}: largest probability {sharp}, length {x.norm(dim=-1).mean():.2f}")
except NotImplementedError:
    print("Write 11.1 first.")

# %% [markdown] exercise="11.2"
# `induction_scores(attention, tokens, lengths)` → (L, H), from many texts at once:
#
# - attention (N, L, H, T, T) fp32: of each text, layer and head; the last axis is what is looked at;
# - tokens (N, T) int64, and lengths (N,) int64: the first lengths[n] tokens are the text, the others padding, whatever their
#   numbers are. A length may be 0.
#
# A place counts if its token has been there before, earlier in the same text. It is scored by how much it looks at the token after the *last*
# of the earlier occurrences (which, where a token stands twice side by side, is the place itself). The score is the mean
# over all places that count, of all texts together; if there are none, it is 0.
#
# For example in the text 7 8 9 7 8 the places 3 and 4 count: place 3 should look at place 1, and place 4 at place 2. If a head looks
# there with 0.5 and 0.7, its score is 0.6.


# %% exercise="11.2"
def induction_scores(attention: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """(N, L, H, T, T), (N, T), (N,) → (L, H)"""
    # <solution>
    T = tokens.shape[1]
    places = torch.arange(T)
    repeats = (tokens[:, :, None] == tokens[:, None, :]) & (places[None, :] < places[:, None])  # (N, T, T)
    last = (repeats * (places + 1)).amax(dim=2) - 1  # (N, T), -1 where there is none
    counts = (last >= 0) & (places < lengths[:, None])
    text, place = counts.nonzero(as_tuple=True)
    looks = attention[text, :, :, place, last[text, place] + 1]  # (places that count, L, H)
    return looks.sum(dim=0) / max(len(place), 1)
    # </solution>


# %% [markdown]
# Do the toy's heads continue what they have seen? Random tokens, said twice: nothing but the first time tells the second.

# %% tags=["nbval-ignore-output"]
rng = torch.Generator().manual_seed(0)
twice = torch.stack([torch.randperm(2000, generator=rng)[:20].repeat(2) + 10 for _ in range(8)])
maps = torch.stack([attention_probabilities(model, text) for text in twice])
try:
    scores = induction_scores(maps, twice, torch.full((8,), 40))
    for layer, row in enumerate(scores):
        print(f"layer {layer}:", " ".join(f"{score:.2f}" for score in row))
except NotImplementedError:
    print("Write 11.2 first.")

# %% [markdown] exercise="11.3"
# `rollout(attention, strength)`: attention (N, L, H, T, T) and strength (N, L, H), both fp32 or both bf16 → (N, L, T, T) fp32.
#
# The chapter's rollout takes all heads for equally strong. Here head h of layer l adds with the strength s_h ≥ 0, measured for each
# text, beside the residual stream, which brings the token itself with the strength 1:
#
# $$A_l = \frac{I + \sum_h s_h\, A_{l,h}}{1 + \sum_h s_h}$$
#
# and what the tokens rest on behind layer l is the product of the layers up to it, A_l … A_2 A_1, so that rows sum to 1. Compute in
# fp32. A loop over layers is fine, but not over texts: there may be thousands, or none.
#
# For example one layer with one head of strength 3, and two tokens of which the second looks at the first only, gives
# `[[1, 0], [0.75, 0.25]]`. With a second layer of the same kind, the second token rests on the first with 0.75 + 0.25 · 0.75 =
# 0.9375.


# %% exercise="11.3"
def rollout(attention: Tensor, strength: Tensor) -> Tensor:
    """(N, L, H, T, T), (N, L, H) → (N, L, T, T)"""
    # <solution>
    attention, strength = attention.float(), strength.float()
    heads = (strength[..., None, None] * attention).sum(dim=2)  # (N, L, T, T)
    whole = 1 + strength.sum(dim=2)[..., None, None]
    layers = (torch.eye(attention.shape[-1]) + heads) / whole
    found = [layers[:, 0]]
    for number in range(1, layers.shape[1]):
        found.append(layers[:, number] @ found[-1])
    return torch.stack(found, dim=1)
    # </solution>


# %% [markdown]
# What does the toy's last token rest on, with all strengths equal, and with the length of what each head adds, against the length of
# the stream that it is added to?

# %% tags=["nbval-ignore-output"]
with record(model, "attention", "heads", "stream") as seen, torch.no_grad():
    model(tokens[None])
wo = torch.stack([block.attention.wo.weight.detach().unflatten(1, (8, -1)) for block in model.blocks])  # (L, dim, H, D)
added = torch.einsum("lthd,lehd->lthe", seen.heads[:, 0], wo).norm(dim=-1).mean(dim=1)  # (L, H)
measured = added / seen.stream[:-1, 0].norm(dim=-1).mean(dim=-1)[:, None]
try:
    for name, strength in {"equal": torch.full((4, 8), 1 / 8), "measured": measured}.items():
        rests = rollout(seen.attention[:, 0][None], strength[None])[0, -1, -1]
        best = rests.topk(5)
        words = [f"{tokenizer.decode([int(tokens[i])])!r} {share:.2f}" for share, i in zip(*best, strict=True)]
        print(f"{name:9}", ", ".join(words))
except NotImplementedError:
    print("Write 11.3 first.")

# %% [markdown] exercise="11.4"
# `logit_lens(stream, norm_weight, eps, output, targets)` → two tensors:
#
# - stream (L+1, T, dim): the residual stream of a text, before the first layer and behind each;
# - norm_weight (dim,) and eps: those of the last norm, which is an RMSNorm; output (V, dim): the output head. These three tensors
#   are all fp32 or all bf16;
# - targets (T,) int64: targets[t] is what should follow token t.
#
# The first result is (L+1, T) fp32: the natural logarithm of the probability that the lens gives the target, at each layer. The
# second is (T,) int64: the smallest number l, from 0, such that in `stream[l]` and in all that follow the target is the most
# probable token of all; L+1 if it is not even at the end. No two tokens are equally probable.
#
# Compute in fp32, scores may be in the hundreds.
#
# For example, if the lens's best tokens behind each other are 5, 2, 5, 5 (L = 3), the target 5 stands from 2 on, and for the
# target 2 the number is 4. With dim = 2, weights 1, eps 0 and the stream `[3, 4]` the normed vector is `[0.849, 1.131]`.


# %% exercise="11.4"
def logit_lens(
    stream: Tensor, norm_weight: Tensor, eps: float, output: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(L+1, T, dim), (dim,), number, (V, dim), (T,) → (L+1, T), (T,)"""
    # <solution>
    x = stream.float()
    x = x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * norm_weight.float()
    scores = x @ output.float().T  # (L+1, T, V)
    log_probs = torch.log_softmax(scores, dim=-1)
    wanted = targets.expand(len(scores), -1)  # (L+1, T)
    right = scores.argmax(dim=-1) == wanted
    from_here = right.flip(0).cummin(dim=0).values.flip(0)  # right here and in all that follow
    return log_probs.gather(2, wanted[:, :, None])[:, :, 0], (~from_here).sum(dim=0)
    # </solution>


# %% [markdown]
# From which layer on does the toy know the next word of a story?

# %% tags=["nbval-ignore-output"]
text = "Once upon a time, there was a kind child named Leo. He lived on a green hill"
story = torch.tensor(tokenizer.encode(text, bos=True))
with record(model, "stream") as seen, torch.no_grad():
    model(story[None])
head = model.embedding.weight.detach()  # the toy's output head is the table of embeddings
try:
    logs, first = logit_lens(seen.stream[:, 0, :-1], model.norm.weight.detach(), model.norm.eps, head, story[1:])
    for token, column, layer in zip(story[1:].tolist(), logs.exp().T, first.tolist(), strict=True):
        known = f"stands from {layer} on" if layer <= 4 else "is not the best guess"
        print(f"{tokenizer.decode([token])!r:10}", " ".join(f"{p:.2f}" for p in column), known)
except NotImplementedError:
    print("Write 11.4 first.")

# %% [markdown] exercise="11.5"
# `silence(mixtures, silent, lengths, mean)` → like mixtures, with some heads silent:
#
# - mixtures (B, T, H, D), fp32 or bf16: what each head has mixed, before `wo`;
# - silent (B, H) booleans: True where a head is silent in a text. A head may be silent in one text and not in another;
# - lengths (B,) int64: the first lengths[b] places are the text, the others padding;
# - mean: if False, a silent head says zeros. If True, it says its mean, D numbers: the mean over all tokens of all texts, those in
#   which it is silent, too, but not over padding. Take it in fp32, then go back to the dtype of the mixtures.
#
# A silent head is silent at all T places, padding too. What was given stays as it was.
#
# For example two texts of one token each, one head of D = 2, which says `[1, 2]` and `[3, 6]`, and is silent in the first text
# only: with zeros, `[0, 0]` and `[3, 6]`; with means `[2, 4]` and `[3, 6]`.


# %% exercise="11.5"
def silence(mixtures: Tensor, silent: Tensor, lengths: Tensor, mean: bool) -> Tensor:
    """(B, T, H, D), (B, H), (B,), bool → (B, T, H, D)"""
    # <solution>
    said = torch.zeros(mixtures.shape[2:])
    if mean:
        inside = torch.arange(mixtures.shape[1]) < lengths[:, None]  # (B, T)
        said = mixtures[inside].float().mean(dim=0)  # (H, D)
    return torch.where(silent[:, None, :, None], said.to(mixtures.dtype), mixtures)
    # </solution>


# %% [markdown]
# All eight heads of a layer at once: eight copies of a story, in each another head silent. What does each cost the story?

# %% tags=["nbval-ignore-output"]
batch = story_validation(tokenizer, 1, seed=3).batches[0]
copies, following = batch.inputs.expand(8, -1), batch.targets.expand(8, -1)
try:
    for layer, block in enumerate(model.blocks):

        def cut(module, inputs):
            x = inputs[0].unflatten(-1, (8, -1))
            return (silence(x, torch.eye(8, dtype=torch.bool), torch.full((8,), x.shape[1]), True).flatten(-2),)

        handle = block.attention.wo.register_forward_pre_hook(cut)
        try:
            with torch.no_grad():
                logs = model(copies).log_softmax(-1)
        finally:
            handle.remove()
        losses = -logs.gather(2, following[:, :, None])[:, :, 0].mean(dim=1)
        print(f"layer {layer}:", " ".join(f"{loss:.2f}" for loss in losses))
except NotImplementedError:
    print("Write 11.5 first.")

# %% [markdown] exercise="11.6"
# `patching_effect(model, clean, corrupt, word, other)` → (2, L, T) fp32. The chapter has patched the stream; here it is what the
# parts *add* to it: in [0] what `blocks[l].attention` returns, in [1] what `blocks[l].feedforward` returns.
#
# clean and corrupt (T,) int64 are two texts of the same length; word and other are two tokens of the vocabulary. A text's
# score is the model's score (logit) of `word` minus that of `other`, behind the last token.
#
# Let the model read `corrupt`, but at one place t replace what one part of layer l returns there by what it had returned at the
# same place for `clean`. How much of the score comes back?
#
# $$\frac{\text{patched} - \text{corrupt}}{\text{clean} - \text{corrupt}}$$
#
# 0: as if nothing had been done, 1: as if the text were the clean one. Below 0 and above 1 are possible. One place at a time; each
# text and part starts afresh, and no hook is left, even if the model raises an error.
#
# For example, if the clean text has the score 3, the corrupt one -1, and a patched one 1, half of it comes back: 0.5. Before the
# place at which the texts begin to differ, all shares are 0.


# %% exercise="11.6"
@on_data
def patching_effect(model: Llama, clean: Tensor, corrupt: Tensor, word: int, other: int) -> Tensor:
    """model, (T,), (T,), tokens → (2, L, T)"""
    # <solution>
    parts = [[block.attention for block in model.blocks], [block.feedforward for block in model.blocks]]

    def score(tokens, hooks):
        """The score of a text while (module, hook) pairs are in the model."""
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            logits = model(tokens[None])[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits[word] - logits[other]

    returned = {}

    def keep(module, inputs, output):
        returned[module] = output[0]

    def patch(module, place):
        def put(_, inputs, output):
            output = output.clone()
            output[0, place] = returned[module][place]
            return output

        return module, put

    best = score(clean, [(module, keep) for part in parts for module in part])
    worst = score(corrupt, [])
    places = range(len(clean))
    patched = [[[score(corrupt, [patch(module, t)]) for t in places] for module in part] for part in parts]
    return (torch.tensor(patched) - worst) / (best - worst)
    # </solution>


# %% [markdown]
# Two stories that differ in a thing: which part, at which place, brings its name to where it is due?

# %% tags=["nbval-ignore-output"]
start = "Once upon a time, there was a kind child named Leo. He lived on a green hill with his uncle and liked to sing songs. "
texts = [f"{start}Last spring, his uncle gave him a big purple {thing}. At the park, his friend Mia sat inside the barrel and "
         "saw the" for thing in ("blanket", "kite")]  # fmt: skip
clean, corrupt = (torch.tensor(tokenizer.encode(text, bos=True)) for text in texts)
names = [int(x[clean != corrupt][0]) for x in (clean, corrupt)]
try:
    back = patching_effect(model, clean, corrupt, *names)
    for part, name in zip(back, ("attention", "feed-forward"), strict=True):
        for share, place in zip(*part.flatten().topk(3), strict=True):
            layer, t = divmod(int(place), len(clean))
            print(f"{name:13} of layer {layer} at {tokenizer.decode([int(clean[t])])!r:8} {share:.2f}")
except NotImplementedError:
    print("Write 11.6 first.")

# %% [markdown] exercise="11.7"
# What is a single head of the toy's second layer (layer 1) worth, and what all eight? Measure the mean loss on
# `story_validation(tokenizer, 20, seed=0)`, one batch of 20 stories: with no head silent; with one of the eight silent, in all
# eight ways; with only one of them left, in all eight ways; with all eight at zero; and with all eight at their mean over all
# tokens that go into the model and are not padding (`tokenizer.pad_id`). Where no mean is spoken of, a silent head says zero. Other
# layers stay as they are. You may use `ablate` and `record`. Without any knowledge the loss would be ln 2048 = 7.6. Write your
# prediction down first.

# %% exercise="11.7"
measured_11 = {
    "predicted": None,  # nats per token, with all eight at zero, before you measure
    "loss": None,
    "one silent": None,  # the largest of eight losses
    "one left": None,  # the smallest of eight losses
    "all zero": None,
    "all mean": None,
    "because": None,  # a sentence
}
# <solution>
model, tokenizer = load("toy")
batches = story_validation(tokenizer, 20, seed=0).batches
heads = [(1, head) for head in range(model.config.n_heads)]
with record(model, "heads") as seen, torch.no_grad():
    model(batches[0].inputs)
inside = batches[0].inputs != tokenizer.pad_id
means = seen.heads[:, inside].mean(dim=1)  # (L, H, D)


def loss_without(silent: list, means: Tensor | None = None) -> float:
    with ablate(model, heads=silent, means=means):
        return mean_loss(model, batches)


measured_11["predicted"] = 1.0
measured_11["loss"] = mean_loss(model, batches)
measured_11["one silent"] = max(loss_without([head]) for head in heads)
measured_11["one left"] = min(loss_without([other for other in heads if other != head]) for head in heads)
measured_11["all zero"] = loss_without(heads)
measured_11["all mean"] = loss_without(heads, means)
measured_11["because"] = "what one head brings, others of the layer bring as well: only together are they missed"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
