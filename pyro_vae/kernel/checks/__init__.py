"""Refusals: the checks that a program has known weights per datum. Read here why a program was refused."""
