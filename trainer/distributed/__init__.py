"""Distributed runs: process group, collectives, environment variables, pod startup."""
