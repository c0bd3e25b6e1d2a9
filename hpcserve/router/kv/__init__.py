"""What is in the workers' KV caches: confirmed by the engines' events, or predicted from what was sent."""
