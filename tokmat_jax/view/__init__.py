"""The liquid tail to look at: in a terminal (`terminal`), and as a page to replay (`replay`)."""
