"""What runs say: tables, verdicts, a page of figures, and advice."""
