"""robustjax: compiled attacks, adversarial training and honest evaluation in JAX."""
