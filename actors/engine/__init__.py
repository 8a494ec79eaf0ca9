"""Scheduling and bookkeeping of requests; knows neither torch nor Ray."""
