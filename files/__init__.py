"""File formats and command-line helpers. Imports nothing of the project."""
