"""Reads datasets: JSON Lines, CSV, Parquet, Arrow and Hugging Face dataset directories."""
