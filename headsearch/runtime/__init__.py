"""What runs: workers, the embedded PostgreSQL server, the dashboard."""
