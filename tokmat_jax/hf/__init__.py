"""Hugging Face weights in and out: `python -m tokmat_jax hf import | export | sphere`.

    file (safetensors, GGUF) ──► names and shapes checked ──► parameters ──► workdir
    files.py, gguf_file.py       families/                    convert.py     __main__.py
"""
