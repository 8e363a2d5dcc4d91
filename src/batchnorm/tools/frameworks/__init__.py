"""The frameworks, one folder each: `switch.py` picks one, and each answers as an `Adapter`."""
