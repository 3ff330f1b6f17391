"""`geotoken serve`: an exported model as an HTTP service."""
