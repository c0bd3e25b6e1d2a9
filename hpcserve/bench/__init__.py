"""Measurements of the router: against its peers, and on traces."""
