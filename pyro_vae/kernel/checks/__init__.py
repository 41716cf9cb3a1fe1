"""The checks that a program has a well-defined importance weight per datum, with the errors that they raise."""
