"""The exercises (all chapters): what they ask, what is known to go wrong, and how an answer is judged."""

from minillama.course.check import Mistake, case, check, hint
from minillama.course.clinic import chart, samples, treat
from minillama.course.progress import report
from minillama.course.swap import swap_in

__all__ = ["Mistake", "case", "chart", "check", "hint", "report", "samples", "swap_in", "treat"]
