"""Pages for people, of one file each: their look, and their charts. Nothing here knows what a page is about."""
