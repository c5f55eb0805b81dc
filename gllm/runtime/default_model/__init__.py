"""The model that is served when none is named: a few megabytes, trained here on tasks whose answers can be checked.

This folder is both a package (the tasks, the tokenizer, the training script) and a Hugging Face model folder.
"""

from __future__ import annotations

from pathlib import Path

NAME = "gllm-demo"
"""What servers and reports call it."""

PATH = Path(__file__).parent
"""The model folder: config.json, model.safetensors, tokenizer.json and what belongs to them."""
