"""Pages that open from disk and need nothing else, drawn from figures."""
