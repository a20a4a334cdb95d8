"""The bundle on disk: its records, reading and writing."""
