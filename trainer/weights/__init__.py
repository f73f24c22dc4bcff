"""Pretrained and external weights: reads state dicts and matches their names and classes."""
