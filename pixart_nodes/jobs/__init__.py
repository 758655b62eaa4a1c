"""Training runs as processes of their own: starting, watching, stopping them, and telling the browser."""
