"""Attacks: the contract and its driver (`base`), then one file per family."""
