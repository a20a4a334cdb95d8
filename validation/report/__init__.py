"""The report for people, and the evidence for machines."""
