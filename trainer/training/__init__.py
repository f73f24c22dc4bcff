"""The training loop and its components: loss, optimizers, learning rate, metrics, checkpoints."""
