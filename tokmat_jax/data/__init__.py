"""Files (`patterns`) → documents (`sources`) → ids (`tokenizer`) → windows on disk (`prepare`) → batches (`loader`)."""
