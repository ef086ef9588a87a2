"""What people and machines read of a study: fronts, tables, progress lines, figures, notes."""
