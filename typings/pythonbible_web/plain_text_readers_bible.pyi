# The module is a literal of 31,102 verses and as many places, from which a type checker would infer for minutes.

class _Bible:
    scripture_content: str
    verse_start_indices: dict[int, int]

bible: _Bible
