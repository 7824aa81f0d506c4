"""Looking inside (chapter 11): recorders, which take numbers out of a running model, and views, which draw them."""

from minillama.visualize.attention_map import attention_figure, strongest_head
from minillama.visualize.attention_widget import attention
from minillama.visualize.difference import first_difference
from minillama.visualize.effects import ablation_effects
from minillama.visualize.grid import grid, head_grid
from minillama.visualize.heads import copying_scores, induction_scores, previous_word_scores, rollout
from minillama.visualize.laboratory import rotary_laboratory, sampling_laboratory, softmax_laboratory
from minillama.visualize.lens import attribution, logit_lens, residual_sizes
from minillama.visualize.lens_widget import lens
from minillama.visualize.patching import patching
from minillama.visualize.picture import picture
from minillama.visualize.record import ablate, attention_probabilities, head_means, record
from minillama.visualize.surprise import surprises

__all__ = [
    "ablate",
    "ablation_effects",
    "attention",
    "attention_figure",
    "attention_probabilities",
    "attribution",
    "copying_scores",
    "first_difference",
    "grid",
    "head_grid",
    "head_means",
    "induction_scores",
    "lens",
    "logit_lens",
    "patching",
    "picture",
    "previous_word_scores",
    "record",
    "residual_sizes",
    "rollout",
    "rotary_laboratory",
    "sampling_laboratory",
    "softmax_laboratory",
    "strongest_head",
    "surprises",
]
