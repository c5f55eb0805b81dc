"""Sample traces generated for this project, their generator and the schema of gLLM's own trace format."""
