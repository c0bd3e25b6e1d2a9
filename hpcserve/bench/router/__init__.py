"""This router and its peers in front of the same mock engines, one after the other, in one run."""
