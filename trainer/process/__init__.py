"""One operating system process: its environment, standard streams, signals, limits, child
processes.
"""
