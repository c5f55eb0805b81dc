"""The OpenAI server: HTTP in, the engine's deltas out. A new endpoint is a new file and a line in `app.py`."""
