"""Results joined: their tables, Markdown, and one page for a browser."""
