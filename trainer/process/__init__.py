"""Support for one OS process: environment, standard streams, signals, limits, child processes."""
