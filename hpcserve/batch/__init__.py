"""Datasets through models: every row of the input gives exactly one row of the output."""
