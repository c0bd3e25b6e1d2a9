"""What is let in, and in which order."""
