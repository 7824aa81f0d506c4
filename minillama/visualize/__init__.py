"""Looking inside (chapter 11): recorders, which take numbers out of a running model, and views, which draw them."""

from minillama.visualize.attention_map import attention_figure, strongest_head
from minillama.visualize.picture import picture
from minillama.visualize.record import ablate, attention_probabilities, head_means, record

__all__ = [
    "ablate",
    "attention_figure",
    "attention_probabilities",
    "head_means",
    "picture",
    "record",
    "strongest_head",
]
