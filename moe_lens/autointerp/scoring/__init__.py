"""Scores of labels: items to judge, judges that answer, and what the answers are worth (METRICS 1.6)."""
