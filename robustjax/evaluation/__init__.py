"""Evaluation: input checks, model checks, the runner and its report."""
