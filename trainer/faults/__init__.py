"""Detection of hardware and disk errors, as opposed to program and user errors."""
