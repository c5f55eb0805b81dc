"""The engine process: drives `core.Engine`, keeps the tokens, tells workers what to compute. No torch."""
