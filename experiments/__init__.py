"""One file = one row of a paper or one figure: `python -m experiments.NAME --help`."""
