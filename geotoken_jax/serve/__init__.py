"""`geotoken serve`: serves an exported model over HTTP."""
