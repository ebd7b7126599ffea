"""What is made of a run's folder: tables, figures, pages. Knows no torch."""
