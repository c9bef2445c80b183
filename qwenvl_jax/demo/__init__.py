"""The demo: `cli.py` answers in the terminal, `app.py` is the chat page in the browser."""
