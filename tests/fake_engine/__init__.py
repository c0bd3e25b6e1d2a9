"""The fake engine as clients, routers and other engines see it."""
