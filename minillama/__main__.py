"""`python -m minillama` is `minillama`, for where its script is not on the PATH and for torchrun."""

from minillama.cli import main

main()
