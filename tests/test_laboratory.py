"""The laboratories: their numbers are the formulas', what a page gets is whole and small, what is wrong is said."""

import json
import math
import subprocess
import sys

import pytest
import torch

from minillama.generation import Sampling, min_p_filter, top_k_filter, top_p_filter
from minillama.visualize.laboratory import (
    hands,
    narrow,
    rotary_laboratory,
    sampling_laboratory,
    soften,
    softmax_laboratory,
)

WORDS = ["a", "b", "c", "d", "e"]
SCORES = torch.tensor([2.0, -1.0, 0.5, 2.0, -3.0])


@pytest.mark.parametrize(("query", "key", "head_dim", "theta"), [(26, 6, 16, 10_000.0), (3, 90, 10, 100.0)])
def test_each_hand_turns_by_its_power_of_theta_and_adds_the_cosine_between(query, key, head_dim, theta):
    found = hands(query, key, head_dim=head_dim, theta=theta)
    frequency = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    expected = torch.tensor([math.cos((query - key) * w) for w in frequency])
    torch.testing.assert_close(found.wavelengths, torch.tensor([2 * math.pi / w for w in frequency]), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.parts, expected, rtol=0, atol=1e-5)


def test_hands_add_the_same_wherever_both_stand():
    near, far = (hands(20 + shift, 6 + shift, head_dim=10, theta=100.0).parts for shift in (0, 500))
    torch.testing.assert_close(near, far, rtol=0, atol=2e-4)


def test_softened_shares_are_powers_of_the_shares_at_one():
    shares, entropy = soften(SCORES.double(), temperature=0.5, head_dim=4)
    powers = [math.exp(score / math.sqrt(4) / 0.5) for score in SCORES.tolist()]
    expected = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-12)
    assert entropy == pytest.approx(-sum(p * math.log(p) for p in expected.tolist()), abs=1e-12)


def test_narrowing_is_temperature_then_top_k_then_top_p_then_min_p():
    torch.manual_seed(2)
    scores = 3 * torch.randn(37, dtype=torch.float64)
    found = narrow(scores, Sampling(temperature=1.7, top_k=9, top_p=0.8, min_p=0.15))
    z = min_p_filter(top_p_filter(top_k_filter(scores[None] / 1.7, 9), 0.8), 0.15)
    torch.testing.assert_close(found.left, z.softmax(-1)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.said, (scores / 1.7).softmax(-1), rtol=0, atol=1e-12)
    assert 1 < int((found.left > 0).sum()) < 9


def test_what_a_page_gets_has_all_digits_of_fp32_and_is_small():
    torch.manual_seed(0)
    scores = torch.randn(2048) * 9
    words = [f"word{i}" for i in range(2048)]
    widget = sampling_laboratory(words, {"x": scores, "y": -scores, "z": scores / 7}, right={"y": {3, 1}})
    assert torch.equal(torch.tensor(widget.given["places"]["y"]), -scores)
    assert widget.given["words"] == words and widget.given["right"] == {"y": [1, 3]}
    assert widget.given["start"] == {"temperature": 1.0, "topK": 2048, "topP": 1.0, "minP": 0.0}
    assert len(json.dumps(widget.given)) < 150_000
    assert repr(widget) == "Run this cell to turn the dials."


def test_the_first_row_is_shown_unless_another_is_named():
    rows = {"one": SCORES, "two": -SCORES}
    assert softmax_laboratory(WORDS, rows, head_dim=8).given["first"] == "one"
    assert softmax_laboratory(WORDS, rows, head_dim=8, first="two").given["first"] == "two"


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: rotary_laboratory(head_dim=7), "head_dim must be even"),
        (lambda: rotary_laboratory(theta=0), "rope_theta must be a number above 0"),
        (lambda: rotary_laboratory(query=101), "query is 101, expected a whole number from 0 to 100"),
        (lambda: rotary_laboratory(pair=8), "pair is 8, expected a whole number from 0 to 7"),
        (lambda: softmax_laboratory(WORDS, {"x": SCORES[:4]}, head_dim=8), r"'x' has scores of shape \(4,\)"),
        (lambda: softmax_laboratory(WORDS, {"x": SCORES.log()}, head_dim=8), r"3 of them finite"),
        (lambda: softmax_laboratory(WORDS, {"x": SCORES}, head_dim=0), "head_dim is 0, expected"),
        (lambda: softmax_laboratory(WORDS, {"x": SCORES}, head_dim=8, first="y"), "no row 'y' to show"),
        (lambda: softmax_laboratory(WORDS, {}, head_dim=8), "no row '' to show"),
        (lambda: sampling_laboratory(WORDS, {"x": SCORES[None]}), r"'x' has scores of shape \(1, 5\)"),
        (lambda: sampling_laboratory(WORDS, {}), "0 places have 0 scores together"),
        (lambda: sampling_laboratory(["a"] * 20_001, {"x": torch.zeros(20_001)}), "1 places have 20001 scores"),
        (lambda: sampling_laboratory(WORDS, {"x": SCORES}, right={"x": [5]}), "expected 0 to 4"),
        (lambda: sampling_laboratory(WORDS, {"x": SCORES}, right={"y": [0]}), "right names 'y', expected"),
        (lambda: sampling_laboratory(WORDS, {"x": SCORES}, start=Sampling(temperature=0)), "the temperature is 0"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_sentence(build, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_the_package_needs_no_widgets_until_one_is_made():
    code = "import sys, minillama.visualize; assert not {'anywidget', 'ipywidgets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
