"""Data on disk: files (`files`, `npy`), a run's folder (`workdir`), checkpoints (`checkpoint`, `integrity`)."""
