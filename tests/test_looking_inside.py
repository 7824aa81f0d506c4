"""Recorders and what is made of them: the same for our model and transformers', equal to what is worked out by hand."""

import random
import re

import pytest
import torch
from torch import nn

from minillama import load, world
from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.visualize import ablate, attention_probabilities, head_means, record
from minillama.visualize.anatomy import anatomy, logits_of
from minillama.visualize.effects import ablation_effects
from minillama.visualize.heads import copying_scores, induction_scores, previous_word_scores, rollout
from minillama.visualize.lens import attribution, logit_lens, residual_sizes
from minillama.visualize.patching import patching
from minillama.visualize.surprise import Surprises, surprises
from tests.benchmarks.decode import with_transformers

CONFIG = ModelConfig(
    dim=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=56, vocab_size=37, max_seq_len=64
)
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def random_model(tied: bool = False) -> Llama:
    torch.manual_seed(3)
    model = Llama(ModelConfig(**{**CONFIG.to_dict(), "tie_embeddings": tied})).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def ours() -> Llama:
    return random_model()


@pytest.fixture(scope="module", params=["ours", "transformers"])
def model(request, ours) -> nn.Module:
    return ours if request.param == "ours" else with_transformers(ours)


# Recorders


@pytest.mark.parametrize("part", ["attention", "heads", "stream", "feedforward"])
def test_transformers_model_is_recorded_as_ours_is(part, ours):
    seen = []
    for model in (ours, with_transformers(ours)):
        with record(model, part) as recording, torch.inference_mode():
            model(TOKENS[None])
        seen.append(getattr(recording, part))
    shapes = {"attention": (3, 1, 6, 8, 8), "heads": (3, 1, 8, 6, 10), "stream": (4, 1, 8, 48)}
    assert seen[0].shape == seen[1].shape == shapes.get(part, (3, 1, 8, 56))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5 * seen[0].abs().max().item())


def test_what_is_recorded_is_what_the_model_computed(ours):
    with record(ours, "heads", "stream", "feedforward") as seen, torch.inference_mode():
        logits = ours(TOKENS[None])
    block = ours.blocks[1]
    middle = seen.stream[1] + block.attention.wo(seen.heads[1].flatten(-2))
    torch.testing.assert_close(middle + block.feedforward.down(seen.feedforward[1]), seen.stream[2])
    torch.testing.assert_close(ours.scores(ours.norm(seen.stream[3])), logits)


def test_recording_changes_nothing_and_leaves_nothing_behind(model):
    hooks = lambda: [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]  # noqa: E731
    before = logits_of(model, TOKENS[None])
    with record(model, "heads", "stream", "feedforward"):
        assert torch.equal(logits_of(model, TOKENS[None]), before) and hooks()
    with record(model, "attention"):
        torch.testing.assert_close(logits_of(model, TOKENS[None]), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ZeroDivisionError), record(model, "attention", "stream"), ablate(model, heads=[(0, 0)]):
        1 / 0  # noqa: B018
    assert torch.equal(logits_of(model, TOKENS[None]), before) and not hooks()


def test_only_the_layers_asked_for_are_kept_in_the_dtype_asked_for(ours):
    with record(ours, "stream", "attention", layers=[3, 1], dtype=torch.float16) as seen:
        ours(TOKENS[None])
    assert seen.stream.shape == (2, 1, 8, 48) and seen.attention.shape == (1, 1, 6, 8, 8)
    assert seen.stream.dtype == torch.float16
    with record(ours, "stream") as all_of_them:
        ours(TOKENS[None])
    torch.testing.assert_close(seen.stream.float(), all_of_them.stream[[1, 3]], rtol=2e-3, atol=2e-3)


def test_one_token_after_the_other_is_recorded_in_a_quantized_model():
    model, tokenizer = load("toy", dtype="int4")
    from minillama.cache import KVCache

    ids = torch.tensor([tokenizer.encode("Once upon a time", bos=True)])
    cache = KVCache(model.config, 1, 20, dtype=torch.bfloat16)
    with record(model, "heads") as seen, torch.inference_mode():
        model(ids, cache)
        model(ids[:, :1], cache)
    assert seen.heads.shape == (4, 1, 1, model.config.n_heads, model.config.head_dim)


def test_wrong_parts_layers_and_models_are_refused(ours):
    with pytest.raises(ValueError, match="nothing called 'steam' to record, expected attention, heads"):
        record(ours, "steam").__enter__()
    with pytest.raises(ValueError, match="no layer 4, expected 0 to 2 .of the stream 3"):
        record(ours, "stream", layers=[4]).__enter__()
    with record(ours, "stream") as seen, pytest.raises(ValueError, match="heads was not recorded"):
        seen.heads  # noqa: B018
    with pytest.raises(ValueError, match="the model is a Linear, expected a Llama or"):
        anatomy(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"no layer and head \(0, 6\), expected layers 0 to 2, heads 0 to 5"):
        with ablate(ours, heads=[(0, 6)]):
            pass


# Ablation


def test_a_silent_head_is_one_whose_columns_of_wo_are_zero(model, ours):
    changed = random_model()
    changed.blocks[1].attention.wo.weight[:, 20:30] = 0
    with ablate(model, heads=[(1, 2)]):
        got = logits_of(model, TOKENS[None])
    torch.testing.assert_close(got, changed(TOKENS[None]), rtol=1e-4, atol=1e-4)


def test_a_silent_layer_adds_nothing(model, ours):
    changed = random_model()
    changed.blocks[0].attention.wo.weight.zero_()
    changed.blocks[2].feedforward.down.weight.zero_()
    with ablate(model, attention=[0], feedforward=[2]):
        got = logits_of(model, TOKENS[None])
    torch.testing.assert_close(got, changed(TOKENS[None]), rtol=1e-4, atol=1e-4)


def test_a_head_that_says_its_mean_says_the_same_everywhere(ours):
    means = head_means(ours, torch.stack([TOKENS, TOKENS.flip(0)]))
    assert means.shape == (3, 6, 10)
    with ablate(ours, heads=[(2, 4)], means=means), record(ours, "heads") as seen, torch.inference_mode():
        ours(TOKENS[None])  # (the recorder's hook comes after)
    assert torch.equal(seen.heads[2, 0, :, 4], means[2, 4].expand(8, 10))
    with record(ours, "heads") as plain, torch.inference_mode():
        ours(torch.stack([TOKENS, TOKENS.flip(0)]))
    torch.testing.assert_close(means, plain.heads.mean((1, 2)))


def test_the_effect_of_a_part_is_what_the_measure_says_without_it(ours):
    def score(model):
        return logits_of(model, TOKENS[None])[0, -1, 7].item()

    whole, effects = score(ours), ablation_effects(ours, score)
    assert effects["heads"].shape == (3, 6) and effects["attention"].shape == effects["feedforward"].shape == (3,)
    with ablate(ours, heads=[(1, 4)]):
        assert effects["heads"][1, 4].item() == pytest.approx(score(ours) - whole, abs=1e-5)
    changed = random_model()
    changed.blocks[2].feedforward.down.weight.zero_()
    assert effects["feedforward"][2].item() == pytest.approx(score(changed) - score(ours), abs=1e-4)
    said = ablation_effects(ours, score, means=head_means(ours, TOKENS[None]))
    assert not torch.allclose(said["heads"], effects["heads"])


def test_the_sizes_of_the_stream(ours):
    with record(ours, "stream") as seen, torch.inference_mode():
        ours(TOKENS[None])
    torch.testing.assert_close(residual_sizes(ours, TOKENS), seen.stream[:, 0].norm(dim=-1) / 48**0.5)


# Scores


def test_scores_of_heads_that_are_known():
    tokens = torch.tensor([5, 6, 7, 5, 6, 9, 7])
    maps = torch.zeros(1, 3, 7, 7)
    for place in range(1, 7):
        maps[0, 0, place, place - 1] = 1  # a previous-word head
    for looking, seen in ((3, 1), (4, 2), (6, 3)):
        maps[0, 1, looking, seen] = 1  # an induction head: the place after the last time
    for looking, seen in ((3, 0), (4, 1), (6, 2)):
        maps[0, 2, looking, seen] = 1  # looks at the same word: off by one
    assert previous_word_scores(maps).tolist() == [[1.0, 0.0, pytest.approx(0)]]
    assert induction_scores(maps, tokens).tolist() == [[0.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="no token of the text occurs twice"):
        induction_scores(maps, torch.arange(7))


@pytest.mark.parametrize("tied", [True, False])
def test_copying_scores_are_those_of_the_whole_matrix_from_tokens_to_tokens(tied):
    model = random_model(tied)
    got = copying_scores(model)
    torch.testing.assert_close(copying_scores(with_transformers(model)), got)
    attention, table = model.blocks[2].attention, model.embedding.weight.double()
    output = table if tied else model.output.weight.double()
    for head in (0, 4):
        wv = attention.wv.weight.double()[10 * (head // 3) : 10 * (head // 3) + 10]
        wo = attention.wo.weight.double()[:, 10 * head : 10 * head + 10]
        eigenvalues = torch.linalg.eigvals(table @ wv.T @ wo.T @ output.T)
        assert got[2, head].item() == pytest.approx((eigenvalues.real.sum() / eigenvalues.abs().sum()).item(), abs=1e-3)
    with pytest.raises(ValueError, match="weights are quantized"):
        copying_scores(load("toy", dtype="int8")[0])


def test_rollout_keeps_rows_that_sum_to_one_and_half_of_each_token():
    maps = attention_probabilities(random_model(), TOKENS)
    got = rollout(maps)
    torch.testing.assert_close(got.sum(-1), torch.ones(3, 8))
    first, second = (maps[layer].mean(0) / 2 + torch.eye(8) / 2 for layer in (0, 1))
    torch.testing.assert_close(got[1], second @ first)
    nothing = rollout(torch.eye(4).expand(5, 2, 4, 4))
    assert torch.equal(nothing, torch.eye(4).expand(5, 4, 4))


# Lens, attribution, patching


def test_the_lens_ends_with_what_the_model_says(model):
    lens = logit_lens(model, TOKENS)
    assert lens.shape == (4, 8, 37)
    torch.testing.assert_close(lens[-1], logits_of(model, TOKENS[None])[0].log_softmax(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lens.exp().sum(-1), torch.ones(4, 8))


def test_the_lens_after_a_layer_is_a_model_without_the_layers_above(ours):
    short = Llama(ModelConfig(**{**CONFIG.to_dict(), "n_layers": 2})).eval()
    short.load_state_dict({name: weight for name, weight in ours.state_dict().items() if "blocks.2" not in name})
    torch.testing.assert_close(logit_lens(ours, TOKENS)[2], short(TOKENS[None])[0].log_softmax(-1).detach())


def test_shares_add_up_to_the_difference_of_two_scores(model):
    shares = attribution(model, TOKENS, 7, 30)
    assert shares["heads"].shape == (3, 6) and shares["feedforward"].shape == (3,)
    logits = logits_of(model, TOKENS[None])[0, -1]
    whole = sum(share.sum().item() for share in shares.values())
    assert whole == pytest.approx((logits[7] - logits[30]).item(), abs=1e-3)


def test_a_patched_stream_brings_back_what_was_carried_there(model):
    corrupt = TOKENS.clone()
    corrupt[2] = 20
    back = patching(model, TOKENS, corrupt, 7, 30)
    assert back.shape == (4, 8)
    torch.testing.assert_close(back[0], torch.eye(8)[2], rtol=0, atol=1e-3)  # the word itself, and no other
    torch.testing.assert_close(back[3], torch.eye(8)[7], rtol=0, atol=1e-3)  # at the end only the last place counts
    assert not back[:, :2].any()  # before the words differ nothing does


def test_a_patched_head_brings_back_what_it_carried(ours):
    corrupt = TOKENS.clone()
    corrupt[2] = 20
    back = patching(ours, TOKENS, corrupt, 7, 30, heads=True)
    assert back.shape == (3, 6)
    with record(ours, "heads") as seen, torch.inference_mode():
        clean = ours(TOKENS[None])[0, -1]
    plain = ours(corrupt[None])[0, -1]
    # The head as if it always said what it says for the clean text.
    means = seen.heads[:, 0, -1]
    hook = ours.blocks[1].attention.wo.register_forward_pre_hook(
        lambda m, x: (torch.cat([x[0][..., :30], seen.heads[1, :, :, 3], x[0][..., 40:]], -1),)
    )
    patched = ours(corrupt[None])[0, -1]
    hook.remove()
    difference = [(z[7] - z[30]).item() for z in (plain, clean, patched)]
    expected = (difference[2] - difference[0]) / (difference[1] - difference[0])
    assert means.shape == (3, 6, 10) and back[1, 3].item() == pytest.approx(expected, abs=1e-3)


def test_texts_that_cannot_be_compared_are_refused(ours):
    with pytest.raises(ValueError, match=r"shapes \(8,\) and \(7,\), expected \(time,\) twice"):
        patching(ours, TOKENS, TOKENS[:-1], 7, 30)
    with pytest.raises(ValueError, match="both texts give the difference"):
        patching(ours, TOKENS, TOKENS, 7, 30)


# Surprise


@pytest.fixture(scope="module")
def toy():
    return load("toy")


@pytest.mark.parametrize("seed", range(5))
def test_surprises_add_up_to_the_models_loss_and_to_the_worlds_probability(toy, seed):
    model, tokenizer = toy
    story = world.sample(random.Random(seed))
    seen = surprises(model, tokenizer, story.text)
    assert "".join(seen.pieces[:-1]) == story.text and len(seen.model) == len(seen.world) == len(seen.pieces)
    assert seen.world.sum().item() == pytest.approx(-story.log_prob, abs=1e-3) and seen.world[-1] == 0
    ids = torch.tensor([tokenizer.encode(story.text, bos=True, eos=True)])
    expected = torch.nn.functional.cross_entropy(logits_of(model, ids[:, :-1])[0], ids[0, 1:], reduction="sum")
    assert seen.model.sum().item() == pytest.approx(expected.item(), abs=1e-3)


def test_a_word_that_costs_much_does_not_hide_the_others():
    seen = Surprises(["a", "b", "c"], torch.tensor([20.0, 3.0, -1e-8]), torch.zeros(3))
    colours = re.findall(r"rgba\([\d,]*,([\d.]+)\)", seen._repr_html_())
    assert colours == ["0.60", "0.45", "0.00"] and "-0.00" not in seen._repr_html_()
    assert repr(seen).startswith("23.0 nats by the model, 0.0 in the world.") and "“a” +20.0, “b” +3.0" in repr(seen)


def test_a_contradicted_fact_is_a_fault_and_a_page_shows_every_word_with_its_numbers(toy):
    model, tokenizer = toy
    text = world.sample(random.Random(1)).text
    page = surprises(model, tokenizer, text)._repr_html_()
    assert page.count("<span title=") == len(tokenizer.encode(text)) + 1 and "<script" not in page
    with pytest.raises(world.Fault):
        surprises(model, tokenizer, text + " And so on.")
