"""The engine of steps: requests, scheduling, pages, sampling."""
