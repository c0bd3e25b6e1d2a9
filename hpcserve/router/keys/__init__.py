"""Who may use the endpoint, how much of it, and what they used."""
