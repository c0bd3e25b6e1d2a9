"""Answers as files: OpenAI's batch lines, or the input's columns with the answers beside them."""
