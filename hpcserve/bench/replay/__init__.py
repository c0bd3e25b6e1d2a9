"""A request trace played through routing policies, in a simulation of several engines."""
