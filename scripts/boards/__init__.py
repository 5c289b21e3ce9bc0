"""Grafana's boards as code; `scripts/generate_boards.py` writes their JSON."""
