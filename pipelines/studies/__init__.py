"""`convoy study`: common claims about these networks, each tested by a small experiment whose rule
was written beforehand.
"""
