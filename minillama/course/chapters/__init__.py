"""A file for each chapter: its exercises, with their references, known wrong answers and hints."""
