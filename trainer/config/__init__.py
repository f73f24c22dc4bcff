"""Recipes: their keys and types, loading with overrides, what they amount to, and checks before a
run.
"""
