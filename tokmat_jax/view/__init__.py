"""Displays the liquid tail: live in a terminal (`terminal`), or as an HTML page that replays it (`replay`)."""
