"""`python -m minillama.cli` is `minillama`, for where its script is not on the PATH."""

from minillama.cli import main

main()
