"""Shared code of the studies: their structure, running trainings, statistics, plots."""
