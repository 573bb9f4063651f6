"""What runs say: tables and verdicts."""
