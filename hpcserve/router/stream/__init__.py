"""An engine's stream on its way to the client."""
