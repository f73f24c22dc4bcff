"""Recipes: keys and types, loading with overrides, derived run plans, and preflight checks."""
