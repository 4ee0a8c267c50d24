"""Who is computed with whom, when and where."""
