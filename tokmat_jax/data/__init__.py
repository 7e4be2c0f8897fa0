"""Text → documents (`sources`) → ids (`tokenizer`) → windows on disk (`corpus`) → batches (`loader`)."""
