"""Training methods: values that turn a batch into gradients."""
