"""Charts of results as inline SVG, drawn by our own small code; of_results.py has them in reading order."""
