"""From a prompt to a reply: `decode.py` holds the compiled programs, `sampling.py` picks tokens, `text.py` turns tokens
into text as they come, and `generate.py` runs a batch of prompts to the end."""
