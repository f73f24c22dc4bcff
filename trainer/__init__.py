"""The program inside every training pod: ``python -m trainer RECIPE key=value ...``."""
