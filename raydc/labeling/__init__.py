"""One slice: read, encode, assign, write, count."""
