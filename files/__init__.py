"""The ground floor: weights, text files, the command line. Imports nothing of the project."""
