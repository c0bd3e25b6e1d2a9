"""What follows from the fabric of the job's nodes: rails, NVLink, and engines' variables. Pure."""
