"""Our own equivalents of programs that people write with Pyro, with right values, for the table in docs/programs.md."""
