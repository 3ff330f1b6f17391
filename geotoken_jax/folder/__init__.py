"""`geotoken predict PHOTOS`: photos that a user names, and files of answers."""
