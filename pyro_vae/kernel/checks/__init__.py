"""Refusals: why a program has no known weights per datum is answered in this folder."""
