"""The one door to the lake: local files, S3 and what must stay secret."""
