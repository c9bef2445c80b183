"""Serving over HTTP in the form of OpenAI's API; `cli.py` is the command, `app.py` lists the routes."""
