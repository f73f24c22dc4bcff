"""``convoy study``: the statements about these networks and techniques, each a small experiment with a rule written beforehand."""
