"""Whole datasets through the pipeline: exactly one row out for each row in."""
