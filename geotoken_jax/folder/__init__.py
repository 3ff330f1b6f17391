"""`geotoken predict PHOTOS`: finds the photos that a user names, predicts them and writes the answers."""
