"""What all studies share: their form, running trainings, statistics, plots."""
