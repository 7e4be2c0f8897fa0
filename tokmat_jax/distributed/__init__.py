"""Where arrays live (`mesh`), and the processes of a run (`processes`)."""
