"""The mathematics of batch normalization, written once over an array namespace `xp`.

Imports the standard library only. Every formula cites the section of docs/spec.md it implements.
"""
