"""The training loop and what it uses: loss, optimizers, learning rate, metrics, checkpoints."""
