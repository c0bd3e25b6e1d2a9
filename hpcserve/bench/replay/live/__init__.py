"""A request trace played against routers that run: ours and the peers' own programs."""
