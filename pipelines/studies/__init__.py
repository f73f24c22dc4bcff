"""`convoy study`: tests common claims about these networks.

Each claim is tested by a small experiment whose rule was written beforehand.
"""
