"""Pretrained and external weights: reading state dicts, matching their names and classes."""
