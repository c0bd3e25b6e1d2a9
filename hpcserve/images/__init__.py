"""Container images of registries: pulled once, checked, and found again."""
